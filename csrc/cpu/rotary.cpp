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

// cos and sin of frequency * position quarter turns. Reduced and evaluated in double: positions of millions
// keep float32 accuracy.
MMFAST_INLINE void angles(const double* frequency, int32_t position, int64_t n, float* cosines,
                          float* sines) {
  constexpr double kMagic = 6755399441055744.0;  // 1.5 * 2^52: rounds to an integer in the low bits
  for (int64_t j = 0; j < n; ++j) {
    const double turns = position * frequency[j];
    const double shifted = turns + kMagic;
    int64_t quadrant;
    std::memcpy(&quadrant, &shifted, 8);
    const double a = (turns - (shifted - kMagic)) * 1.5707963267948966, z = a * a;
    const double sine =
        a * (1 + z * (-1.0 / 6 +
                      z * (1.0 / 120 + z * (-1.0 / 5040 + z * (1.0 / 362880 + z * (-1.0 / 39916800))))));
    const double cosine =
        1 + z * (-0.5 + z * (1.0 / 24 + z * (-1.0 / 720 + z * (1.0 / 40320 + z * (-1.0 / 3628800)))));
    const bool odd = quadrant & 1;
    const double s = odd ? cosine : sine, c = odd ? sine : cosine;
    sines[j] = float(quadrant & 2 ? -s : s);
    cosines[j] = float((quadrant + 1) & 2 ? -c : c);
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
MMFAST_INLINE void rotate(const RotaryParams& p, const Angles& angle, At at, Finish finish) {
  if (p.interleaved) {
    for_each_vector(p.dim, [&](int64_t i, int n) MMFAST_INLINE_LAMBDA {
      const vf x = at(i, n);
      finish(i, n, x * load(angle.cosines + i) + swap_pairs(x) * load(angle.sines + i));
    });
    return;
  }
  const int64_t half = p.dim / 2;
  for_each_vector(half, [&](int64_t i, int n) MMFAST_INLINE_LAMBDA {
    const vf x = at(i, n), y = at(half + i, n), c = load(angle.cosines + i), s = load(angle.sines + i);
    finish(i, n, x * c - y * s);
    finish(half + i, n, y * c + x * s);
  });
}

template <typename T>
MMFAST_INLINE float rstd_of(const RotaryParams& p, const T* x) {
  Four squares;
  for_each_vector_in_four(p.dim, [&](int64_t i, int n, int k) MMFAST_INLINE_LAMBDA {
    const vf v = get(x + i, n);
    squares.v[k] += v * v;
  });
  return 1.0f / std::sqrt(squares.total() / float(p.dim) + p.eps);
}

template <typename T, bool kStream>
MMFAST_INLINE void forward_head(const RotaryParams& p, const RotarySide& side, const Angles& angle,
                                const T* x, T* out) {
  auto finish = [&](int64_t i, int n, vf v) MMFAST_INLINE_LAMBDA { set<kStream>(out + i, v, n); };
  if (!p.norm)
    return rotate(p, angle, [&](int64_t i, int n) MMFAST_INLINE_LAMBDA { return get(x + i, n); }, finish);
  const float rstd = rstd_of(p, x);
  if (!side.weight)
    return rotate(
        p, angle, [&](int64_t i, int n) MMFAST_INLINE_LAMBDA { return get(x + i, n) * rstd; }, finish);
  rotate(
      p, angle,
      [&](int64_t i, int n) MMFAST_INLINE_LAMBDA { return get(x + i, n) * rstd * get(side.weight + i, n); },
      finish);
}

// dweight: this chunk's partial sum, or null.
template <typename T, bool kStream>
MMFAST_INLINE void backward_head(const RotaryParams& p, const RotarySide& side, const Angles& angle,
                                 const T* x, const T* grad, T* out, float* scratch, float* dweight) {
  auto at = [&](int64_t i, int n) MMFAST_INLINE_LAMBDA { return get(grad + i, n); };
  if (!p.norm)
    return rotate(p, angle, at,
                  [&](int64_t i, int n, vf v) MMFAST_INLINE_LAMBDA { set<kStream>(out + i, v, n); });
  rotate(p, angle, at, [&](int64_t i, int n, vf v) MMFAST_INLINE_LAMBDA { set<false>(scratch + i, v, n); });
  const float rstd = rstd_of(p, x);
  vf product = splat(0);
  for_each_vector(p.dim, [&](int64_t i, int n) MMFAST_INLINE_LAMBDA {
    const vf y = get(x + i, n) * rstd;
    vf g = get(scratch + i, n);
    if (dweight) store(dweight + i, load(dweight + i) + g * y);
    if (side.weight) g *= get(side.weight + i, n);
    set<false>(scratch + i, g, n);
    product += g * y;
  });
  const float mean = sum(product) / float(p.dim);
  for_each_vector(p.dim, [&](int64_t i, int n) MMFAST_INLINE_LAMBDA {
    set<kStream>(out + i, (get(scratch + i, n) - get(x + i, n) * rstd * mean) * rstd, n);
  });
}

template <typename T, bool kBackward, bool kStream>
void run(const RotaryParams& p) {
  const int64_t stride = padded(p.dim), chunks = chunks_of(p.rows);
  float* scratch = allocate(p.threads * 4 * stride);
  float* partials = allocate(chunks * 2 * stride);
  std::memset(partials, 0, size_t(chunks * 2 * stride) * sizeof(float));
  std::memset(scratch, 0, size_t(p.threads * 4 * stride) * sizeof(float));
#pragma omp parallel num_threads(p.threads)
  {
    float* mine = scratch + omp_get_thread_num() * 4 * stride;
    const Angles angle{mine, mine + stride};
#pragma omp for schedule(static)
    for (int64_t c = 0; c < chunks; ++c) {
      for (int64_t t = p.rows * c / chunks; t < p.rows * (c + 1) / chunks; ++t) {
        if (p.inside[t]) row_angles<kBackward>(p, t, mine + 2 * stride, angle);
        for (int i = 0; i < p.sides; ++i) {
          const RotarySide& side = p.side[i];
          T* out = static_cast<T*>(side.out) + t * side.heads * p.dim;
          if (!p.inside[t]) {
            std::memset(out, 0, size_t(side.heads * p.dim) * sizeof(T));
            continue;
          }
          float* dweight = side.dweight ? partials + (2 * c + i) * stride : nullptr;
          for (int64_t h = 0; h < side.heads; ++h, out += p.dim) {
            const T* x = static_cast<const T*>(side.x) + t * side.x_stride[0] + h * side.x_stride[1];
            if constexpr (kBackward) {
              const T* grad =
                  static_cast<const T*>(side.grad) + t * side.grad_stride[0] + h * side.grad_stride[1];
              backward_head<T, kStream>(p, side, angle, x, grad, out, mine + 2 * stride, dweight);
            } else {
              forward_head<T, kStream>(p, side, angle, x, out);
            }
          }
        }
      }
    }
    if (kStream) stream_fence();
  }
  for (int i = 0; i < p.sides; ++i) {
    if (!p.side[i].dweight) continue;
    for (int64_t d = 0; d < p.dim; ++d) {
      float total = 0;
      for (int64_t c = 0; c < chunks; ++c) total += partials[(2 * c + i) * stride + d];
      p.side[i].dweight[d] = total;
    }
  }
  release(partials);
  release(scratch);
}

template <bool kBackward>
void dispatch(const RotaryParams& p) {
  const bool f32 = p.dtype == DType::f32;
  bool stream = p.stream;
  // Half-split heads are written in two halves, each of which must be aligned.
  for (int i = 0; i < p.sides; ++i) stream = stream && can_stream(p.side[i].out, p.dim / 2 * (f32 ? 4 : 2));
  if (f32) return stream ? run<float, kBackward, true>(p) : run<float, kBackward, false>(p);
  return stream ? run<bf16, kBackward, true>(p) : run<bf16, kBackward, false>(p);
}

}  // namespace

void rotary_forward(const RotaryParams& p) {
  dispatch<false>(p);
}
void rotary_backward(const RotaryParams& p) {
  dispatch<true>(p);
}

}  // namespace MMFAST_ISA
}  // namespace mmfast
