// y = R(position) norm(x): pairs (x1, x2) of a head turn by angle position * base^(-2 j / D).
// Su et al., RoFormer (arXiv 2104.09864), equation 34. A row's cosines and sines are computed once for all
// heads.
#include "cpu/rotary.h"

#include <omp.h>

#include <cmath>
#include <cstring>

#include "cpu/rows.h"

namespace mmfast {
namespace MMFAST_ISA {
namespace {

constexpr int64_t kAngles = 64;  // made at a time

// cos and sin of frequency * position quarter turns. Reduced in double, so that positions of millions keep
// float32 accuracy; Cephes' polynomials on what is left.
MMFAST_INLINE void angles(const double* frequency, int32_t position, int64_t n, float* cosines,
                          float* sines) {
  constexpr double kMagic = 6755399441055744.0;  // 1.5 * 2^52: rounds to an integer in the low bits
  int32_t quadrants[kAngles];
  for (int64_t first = 0; first < n; first += kAngles) {
    const int64_t count = n - first < kAngles ? n - first : kAngles;
    float *cosine = cosines + first, *sine = sines + first;
    for (int64_t j = 0; j < count; ++j) {
      const double turns = position * frequency[first + j], shifted = turns + kMagic;
      int64_t bits;
      std::memcpy(&bits, &shifted, 8);
      quadrants[j] = int32_t(bits);
      sine[j] = float(turns - (shifted - kMagic));
    }
    for (int64_t j = 0; j < count; ++j) {
      const int32_t quadrant = quadrants[j];
      const float a = sine[j] * 1.57079633f, z = a * a;
      const float s = ((-1.9515296e-4f * z + 8.3321609e-3f) * z - 1.6666655e-1f) * z * a + a;
      const float c = ((2.4433157e-5f * z - 1.3887316e-3f) * z + 4.1666646e-2f) * z * z - 0.5f * z + 1.0f;
      const float x = quadrant & 1 ? c : s, y = quadrant & 1 ? s : c;
      sine[j] = quadrant & 2 ? -x : x;
      cosine[j] = (quadrant + 1) & 2 ? -y : y;
    }
  }
}

typedef uint64_t vl __attribute__((vector_size(MMFAST_VECTOR_BYTES)));

MMFAST_INLINE vf swap_pairs(vf v) {
  const vl bits = (vl)v;
  return (vf)((bits << 32) | (bits >> 32));
}

struct Angles {
  float *cosines,
      *sines;  // half-split: [dim / 2]; interleaved: [dim], each twice, sines with the sign of their lane
};

template <bool kInverse>
MMFAST_INLINE void row_angles(const RotaryParams& p, int64_t t, float* scratch, const Angles& out) {
  const int64_t half = p.dim / 2;
  float* cosines = p.interleaved ? scratch : out.cosines;
  float* sines = p.interleaved ? scratch + half : out.sines;
  int64_t first = 0;
  for (int a = 0; a < p.axes; ++a) {
    angles(p.frequency + first, p.position[t * p.axes + a], p.sections[a], cosines + first, sines + first);
    first += p.sections[a];
  }
  if (kInverse)
    for (int64_t j = 0; j < half; ++j) sines[j] = -sines[j];
  if (!p.interleaved) return;
  for (int64_t j = 0; j < half; ++j) {
    out.cosines[2 * j] = out.cosines[2 * j + 1] = cosines[j];
    out.sines[2 * j] = -sines[j];
    out.sines[2 * j + 1] = sines[j];
  }
}

// y = R x, with x read by at(i, n) and y written by finish(i, n, v).
template <typename At, typename Finish>
MMFAST_INLINE void rotate(const RotaryParams& p, int64_t dim, const Angles& angle, At at, Finish finish) {
  if (p.interleaved) {
    for_each_vector(dim, [&](int64_t i, int n) MMFAST_INLINE_LAMBDA {
      const vf x = at(i, n);
      finish(i, n, x * load(angle.cosines + i) + swap_pairs(x) * load(angle.sines + i));
    });
    return;
  }
  const int64_t half = dim / 2;
  for_each_vector(half, [&](int64_t i, int n) MMFAST_INLINE_LAMBDA {
    const vf x = at(i, n), y = at(half + i, n), c = load(angle.cosines + i), s = load(angle.sines + i);
    finish(i, n, x * c - y * s);
    finish(half + i, n, y * c + x * s);
  });
}

// Heads that are worked on together: one head's sum over lanes, root and division would wait for each other.
constexpr int kGroup = 16;

// Some heads of a row.
template <typename T>
struct Heads {
  const T* x;
  int64_t stride;
  int count;
  int64_t ahead;  // elements to the same heads of the row that is fetched meanwhile

  __attribute__((always_inline)) const T* head(int h) const { return x + h * stride; }
  __attribute__((always_inline)) void fetch_ahead(int h, int64_t dim) const {
    for (int64_t i = 0; i < dim; i += int64_t(64 / sizeof(T))) __builtin_prefetch(head(h) + ahead + i);
  }
};

template <typename T>
MMFAST_INLINE float sum_of_squares(const T* x, int64_t dim) {
  Four squares;
  int64_t done = 0;
#if defined(__AVX512BF16__)
  if constexpr (sizeof(T) == 2) {
    for (; done + 2 * kLanes <= dim; done += 2 * kLanes) {
      __m512bh v;
      std::memcpy(&v, x + done, sizeof v);
      squares.v[0] = (vf)_mm512_dpbf16_ps((__m512)squares.v[0], v, v);
    }
  }
#endif
  for_each_vector_in_four(dim - done, [&](int64_t i, int n, int k) MMFAST_INLINE_LAMBDA {
    const vf v = get(x + done + i, n);
    squares.v[k] += v * v;
  });
  return squares.total();
}

template <typename T>
MMFAST_INLINE void rstd_of(const RotaryParams& p, int64_t dim, const Heads<T>& heads, float* rstd) {
  std::memset(rstd, 0, kGroup * sizeof(float));
  for (int h = 0; h < heads.count; ++h) rstd[h] = sum_of_squares(heads.head(h), dim);
  for (int h = 0; h < kGroup; ++h) rstd[h] = 1.0f / std::sqrt(rstd[h] / float(dim) + p.eps);
}

template <typename T, bool kStream>
MMFAST_INLINE void forward_heads(const RotaryParams& p, int64_t dim, const float* weight, const Angles& angle,
                                 const Heads<T>& heads, T* out) {
  float rstd[kGroup];
  if (p.norm) rstd_of(p, dim, heads, rstd);
  for (int h = 0; h < heads.count; ++h, out += dim) {
    const T* x = heads.head(h);
    heads.fetch_ahead(h, dim);
    auto finish = [&](int64_t i, int n, vf v) MMFAST_INLINE_LAMBDA { set<kStream>(out + i, v, n); };
    if (!p.norm) {
      rotate(p, dim, angle, [&](int64_t i, int n) MMFAST_INLINE_LAMBDA { return get(x + i, n); }, finish);
      continue;
    }
    const float factor = rstd[h];
    if (!weight)
      rotate(
          p, dim, angle, [&](int64_t i, int n) MMFAST_INLINE_LAMBDA { return get(x + i, n) * factor; },
          finish);
    else
      rotate(
          p, dim, angle,
          [&](int64_t i, int n) MMFAST_INLINE_LAMBDA { return get(x + i, n) * factor * get(weight + i, n); },
          finish);
  }
}

// scratch: [1 + kGroup, padded(dim)]; dweight: this chunk's partial sum, or null, to which the heads' sum is
// added.
template <typename T, bool kStream>
MMFAST_INLINE void backward_heads(const RotaryParams& p, int64_t dim, const float* weight,
                                  const Angles& angle, const Heads<T>& heads, const Heads<T>& grads, T* out,
                                  float* scratch, float* dweight) {
  if (!p.norm) {
    for (int h = 0; h < heads.count; ++h, out += dim) {
      const T* grad = grads.head(h);
      grads.fetch_ahead(h, dim);
      rotate(
          p, dim, angle, [&](int64_t i, int n) MMFAST_INLINE_LAMBDA { return get(grad + i, n); },
          [&](int64_t i, int n, vf v) MMFAST_INLINE_LAMBDA { set<kStream>(out + i, v, n); });
    }
    return;
  }
  float rstd[kGroup], mean[kGroup];
  rstd_of(p, dim, heads, rstd);
  float* const of_heads = scratch;
  scratch += padded(dim);
  if (dweight) std::memset(of_heads, 0, size_t(padded(dim)) * sizeof(float));
  for (int h = 0; h < heads.count; ++h) {
    const T *x = heads.head(h), *grad = grads.head(h);
    grads.fetch_ahead(h, dim);
    float* scaled = scratch + h * padded(dim);
    const float factor = rstd[h];
    vf product = splat(0);
    rotate(
        p, dim, angle, [&](int64_t i, int n) MMFAST_INLINE_LAMBDA { return get(grad + i, n); },
        [&](int64_t i, int n, vf g) MMFAST_INLINE_LAMBDA {
          const vf y = get(x + i, n) * factor;
          if (dweight) set<false>(of_heads + i, get(of_heads + i, n) + g * y, n);
          if (weight) g *= get(weight + i, n);
          set<false>(scaled + i, g, n);
          product += g * y;
        });
    mean[h] = sum(product) / float(dim);
  }
  if (dweight)
    for_each_vector(dim, [&](int64_t i, int n) MMFAST_INLINE_LAMBDA {
      set<false>(dweight + i, get(dweight + i, n) + get(of_heads + i, n), n);
    });
  for (int h = 0; h < heads.count; ++h, out += dim) {
    const T* x = heads.head(h);
    heads.fetch_ahead(h, dim);
    const float *scaled = scratch + h * padded(dim), factor = rstd[h], shift = factor * mean[h];
    for_each_vector(dim, [&](int64_t i, int n) MMFAST_INLINE_LAMBDA {
      set<kStream>(out + i, (get(scaled + i, n) - get(x + i, n) * shift) * factor, n);
    });
  }
}

// kDim: the number of columns where the compiler shall know it, else 0.
template <typename T, bool kBackward, bool kStream, int kDim>
void run(const RotaryParams& p) {
  const int64_t dim = kDim ? kDim : p.dim;
  const int64_t stride = padded(dim), chunks = chunks_of(p.rows);
  const Scratch scratch(p.threads, (3 + kGroup) * stride);
  float* partials = allocate(chunks * 2 * stride);
  std::memset(partials, 0, size_t(chunks * 2 * stride) * sizeof(float));
#pragma omp parallel num_threads(p.threads)
  {
    float* mine = scratch.of(omp_get_thread_num());
    const Angles angle{mine, mine + stride};
#pragma omp for schedule(static)
    for (int64_t c = 0; c < chunks; ++c) {
      for (int64_t t = p.rows * c / chunks; t < p.rows * (c + 1) / chunks; ++t) {
        if (p.inside[t]) row_angles<kBackward>(p, t, mine + 2 * stride, angle);
        for (int i = 0; i < p.sides; ++i) {
          const RotarySide& side = p.side[i];
          T* out = static_cast<T*>(side.out) + t * side.heads * dim;
          if (!p.inside[t]) {
            std::memset(out, 0, size_t(side.heads * dim) * sizeof(T));
            continue;
          }
          const int64_t next = row_ahead<kStream>(t, p.rows, side.heads * dim * int64_t(sizeof(T)));
          float* dweight = side.dweight ? partials + (2 * c + i) * stride : nullptr;
          for (int64_t h = 0; h < side.heads; h += kGroup, out += kGroup * dim) {
            const int count = side.heads - h < kGroup ? int(side.heads - h) : kGroup;
            const Heads<T> x{static_cast<const T*>(side.x) + t * side.x_stride[0] + h * side.x_stride[1],
                             side.x_stride[1], count, (next - t) * side.x_stride[0]};
            if constexpr (kBackward) {
              const Heads<T> grad{
                  static_cast<const T*>(side.grad) + t * side.grad_stride[0] + h * side.grad_stride[1],
                  side.grad_stride[1], count, (next - t) * side.grad_stride[0]};
              backward_heads<T, kStream>(p, dim, side.weight, angle, x, grad, out, mine + 2 * stride,
                                         dweight);
            } else {
              forward_heads<T, kStream>(p, dim, side.weight, angle, x, out);
            }
          }
        }
      }
    }
    if (kStream) stream_fence();
  }
  for (int i = 0; i < p.sides; ++i) {
    if (!p.side[i].dweight) continue;
    for (int64_t d = 0; d < dim; ++d) {
      double total = 0;
      for (int64_t c = 0; c < chunks; ++c) total += double(partials[(2 * c + i) * stride + d]);
      p.side[i].dweight[d] = float(total);
    }
  }
  release(partials);
}

template <typename T, bool kBackward, bool kStream>
void dispatch_dim(const RotaryParams& p) {
  if (p.dim == 64) return run<T, kBackward, kStream, 64>(p);
  if (p.dim == 128) return run<T, kBackward, kStream, 128>(p);
  run<T, kBackward, kStream, 0>(p);
}

template <typename T, bool kBackward>
void dispatch(const RotaryParams& p) {
  bool stream = p.stream;
  // Half-split heads are written in two halves, each of which must be aligned.
  for (int i = 0; i < p.sides; ++i)
    stream = stream && can_stream(p.side[i].out, p.dim / 2 * int64_t(sizeof(T)));
  stream ? dispatch_dim<T, kBackward, true>(p) : dispatch_dim<T, kBackward, false>(p);
}

}  // namespace

void rotary_forward(const RotaryParams& p) {
  p.dtype == DType::f32 ? dispatch<float, false>(p) : dispatch<bf16, false>(p);
}
void rotary_backward(const RotaryParams& p) {
  p.dtype == DType::f32 ? dispatch<float, true>(p) : dispatch<bf16, true>(p);
}

}  // namespace MMFAST_ISA
}  // namespace mmfast
