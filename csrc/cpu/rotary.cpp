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

// A row's turn of a head: y[i] = x[i] cosine[i] + x[j] sine[i], j being the other column of i's pair. The
// sign is in the sine.
struct Turn {
  float *cosine, *sine;  // [dim]
};

// Calls body(a, i, j) with the columns i and j of pair a.
template <typename Body>
MMFAST_INLINE void for_each_pair(int64_t dim, bool interleaved, Body body) {
  const int64_t half = dim / 2;
  if (interleaved)
    for (int64_t a = 0; a < half; ++a) body(a, 2 * a, 2 * a + 1);
  else
    for (int64_t a = 0; a < half; ++a) body(a, a, half + a);
}

// The turn of row t. Angles are reduced in double, so that positions of millions keep float32 accuracy;
// Cephes' polynomials on what is left. rest: [dim], memory to work in.
template <bool kInverse>
MMFAST_INLINE void turn_of_row(const RotaryParams& p, int64_t dim, int64_t t, float* rest, const Turn& out) {
  constexpr double kMagic = 6755399441055744.0;  // 1.5 * 2^52: rounds to an integer in the low bits
  const int64_t half = dim / 2;
  double position[3] = {};
  for (int a = 0; a < p.axes; ++a) position[a] = p.position[t * p.axes + a];
  int32_t* quadrants = reinterpret_cast<int32_t*>(rest + half);
  for (int64_t j = 0; j < half; ++j) {
    const double* f = p.frequency + j;
    const double turns = position[0] * f[0] + position[1] * f[half] + position[2] * f[2 * half];
    const double shifted = turns + kMagic;
    int64_t bits;
    std::memcpy(&bits, &shifted, 8);
    quadrants[j] = int32_t(bits);
    rest[j] = float(turns - (shifted - kMagic));
  }
  for_each_pair(dim, p.interleaved, [&](int64_t a, int64_t i, int64_t j) MMFAST_INLINE_LAMBDA {
    const int32_t quadrant = quadrants[a];
    const float x = rest[a] * 1.57079633f, z = x * x;
    const float s = ((-1.9515296e-4f * z + 8.3321609e-3f) * z - 1.6666655e-1f) * z * x + x;
    const float c = ((2.4433157e-5f * z - 1.3887316e-3f) * z + 4.1666646e-2f) * z * z - 0.5f * z + 1.0f;
    const float sine = quadrant & 1 ? c : s, cosine = quadrant & 1 ? s : c;
    out.cosine[i] = out.cosine[j] = (quadrant + 1) & 2 ? -cosine : cosine;
    out.sine[j] = (quadrant & 2 ? -sine : sine) * (kInverse ? -1.0f : 1.0f);
    out.sine[i] = -out.sine[j];
  });
}

typedef uint64_t vl __attribute__((vector_size(MMFAST_VECTOR_BYTES)));

MMFAST_INLINE vf swap_pairs(vf v) {
  const vl bits = (vl)v;
  return (vf)((bits << 32) | (bits >> 32));
}

// Columns that all heads need, [kDim]: vectors where the compiler knows how many, so that they stay in
// registers.
template <int kDim>
struct Columns {
  vf v[kDim / kLanes];
  __attribute__((always_inline)) explicit Columns(const float* p) {
    for (int k = 0; k < kDim / kLanes; ++k) v[k] = load(p + k * kLanes);
  }
  __attribute__((always_inline)) vf at(int64_t i) const { return v[i / kLanes]; }
};
template <>
struct Columns<0> {
  const float* p;
  __attribute__((always_inline)) explicit Columns(const float* p) : p(p) {}
  __attribute__((always_inline)) vf at(int64_t i) const { return load(p + i); }
};

// The turned head, x[i] read by at(i, n); finish(count, i, n, v) takes one or two vectors v from column i on.
template <int kDim, typename At, typename Finish>
MMFAST_INLINE void rotate(bool interleaved, int64_t dim, const Columns<kDim>& cosine,
                          const Columns<kDim>& sine, At at, Finish finish) {
  auto turned = [&](int64_t i, vf x, vf other)
                    MMFAST_INLINE_LAMBDA { return x * cosine.at(i) + other * sine.at(i); };
  if (interleaved) {
    for_each_group<2>(dim, [&](auto count, int64_t first, int n) MMFAST_INLINE_LAMBDA {
      vf v[count.value];
      for (int k = 0; k < count.value; ++k) {
        const int64_t i = first + k * kLanes;
        const vf x = at(i, n);
        v[k] = turned(i, x, swap_pairs(x));
      }
      finish(count, first, n, v);
    });
    return;
  }
  const int64_t half = dim / 2;
  for_each_group<2>(half, [&](auto count, int64_t first, int n) MMFAST_INLINE_LAMBDA {
    vf low[count.value], high[count.value];
    for (int k = 0; k < count.value; ++k) {
      const int64_t i = first + k * kLanes, j = half + i;
      const vf x = at(i, n), y = at(j, n);
      low[k] = turned(i, x, y);
      high[k] = turned(j, y, x);
    }
    finish(count, first, n, low);
    finish(count, half + first, n, high);
  });
}

// Heads that are worked on together: one head's sum over lanes, root and division would wait for each other.
constexpr int kGroup = 16;

// Some heads of a row that is read.
template <typename T>
struct Heads {
  const T* x;
  int64_t stride;
  int count;
  int64_t ahead;  // elements to the same heads of the row that is fetched meanwhile

  __attribute__((always_inline)) const T* head(int h) const { return x + h * stride; }
  __attribute__((always_inline)) void fetch_ahead(int h, int64_t dim) const {
    fetch<false>(head(h) + ahead, dim);
  }
  // Calls body(Count<4>, h) for every four heads, then body(Count<1>, h) for the rest.
  template <typename Body>
  __attribute__((always_inline)) void for_each_four(Body body) const {
    int h = 0;
    for (; h + 4 <= count; h += 4) body(Count<4>(), h);
    for (; h < count; ++h) body(Count<1>(), h);
  }
};

// Lanes whose sum is that of the squares of x.
template <typename T>
MMFAST_INLINE vf squares_of(const T* x, int64_t dim) {
  vf squares[2] = {};
  int64_t done = 0;
#if defined(__AVX512BF16__)
  if constexpr (sizeof(T) == 2) {
    for (; done + 2 * kLanes <= dim; done += 2 * kLanes) {
      __m512bh v;
      std::memcpy(&v, x + done, sizeof v);
      squares[0] = (vf)_mm512_dpbf16_ps((__m512)squares[0], v, v);
    }
  }
#endif
  for_each_group<2>(dim - done, [&](auto count, int64_t i, int n) MMFAST_INLINE_LAMBDA {
    for (int k = 0; k < count.value; ++k) {
      const vf v = get(x + done + i + k * kLanes, n);
      squares[k] += v * v;
    }
  });
  return squares[0] + squares[1];
}

template <typename T>
MMFAST_INLINE void rstd_of(int64_t dim, float eps, const Heads<T>& heads, float* rstd) {
  heads.for_each_four([&](auto four, int h) MMFAST_INLINE_LAMBDA {
    vf squares[four.value];
    for (int k = 0; k < four.value; ++k) squares[k] = squares_of(heads.head(h + k), dim);
    float total[four.value];
    sum_each(four, squares, total);
    for (int k = 0; k < four.value; ++k) total[k] = 1.0f / std::sqrt(total[k] / float(dim) + eps);
    std::memcpy(rstd + h, total, sizeof total);
  });
}

template <int kDim, typename T, bool kStream>
MMFAST_INLINE void forward_heads(const RotaryParams& p, int64_t dim, bool norm, const Turn& turn,
                                 const Heads<T>& heads, T* out, int64_t out_ahead) {
  const Columns<kDim> cosine(turn.cosine), sine(turn.sine);
  float rstd[kGroup];
  if (norm) rstd_of(dim, p.eps, heads, rstd);
  for (int h = 0; h < heads.count; ++h, out += dim) {
    const T* x = heads.head(h);
    const float factor = norm ? rstd[h] : 1.0f;
    heads.fetch_ahead(h, dim);
    if (!kStream) fetch<true>(out + out_ahead, dim);
    rotate(
        p.interleaved, dim, cosine, sine,
        [&](int64_t i, int n) MMFAST_INLINE_LAMBDA { return get(x + i, n); },
        [&](auto count, int64_t i, int n, vf* v) MMFAST_INLINE_LAMBDA {
          for (int k = 0; k < count.value; ++k) v[k] *= factor;
          put_columns<kStream>(count, out + i, v, n);
        });
  }
}

// With g the gradient turned back, y = x rstd and w the norm's weight:
//   dw += g y;  dx = (g w - y avg(g w y)) rstd.
// scratch: [kGroup + 1, padded(dim)]; dweight: this chunk's partial sum, to which the heads' sum is added.
template <int kDim, typename T, bool kStream>
MMFAST_INLINE void norm_backward_heads(const RotaryParams& p, int64_t dim, const float* weight,
                                       const Turn& turn, const Heads<T>& heads, const Heads<T>& grads, T* out,
                                       int64_t out_ahead, float* scratch, float* dweight) {
  const Columns<kDim> cosine(turn.cosine), sine(turn.sine), weights(weight);
  float rstd[kGroup], mean[kGroup];
  rstd_of(dim, p.eps, heads, rstd);
  heads.for_each_four([&](auto four, int first) MMFAST_INLINE_LAMBDA {
    vf products[four.value];
    for (int k = 0; k < four.value; ++k) {
      const T *x = heads.head(first + k), *grad = grads.head(first + k);
      float* turned = scratch + (first + k) * padded(dim);
      vf product[2] = {};
      grads.fetch_ahead(first + k, dim);
      rotate(
          p.interleaved, dim, cosine, sine,
          [&](int64_t i, int n) MMFAST_INLINE_LAMBDA { return get(grad + i, n); },
          [&](auto count, int64_t i, int n, const vf* g) MMFAST_INLINE_LAMBDA {
            for (int j = 0; j < count.value; ++j) {
              const int64_t column = i + j * kLanes;
              set<false>(turned + column, g[j], n);
              product[j] += g[j] * weights.at(column) * get(x + column, n);
            }
          });
      products[k] = product[0] + product[1];
    }
    float total[four.value];
    sum_each(four, products, total);
    for (int k = 0; k < four.value; ++k) total[k] *= rstd[first + k] / float(dim);
    std::memcpy(mean + first, total, sizeof total);
  });
  float* const of_heads = scratch + kGroup * padded(dim);
  std::memset(of_heads, 0, size_t(padded(dim)) * sizeof(float));
  for (int h = 0; h < heads.count; ++h, out += dim) {
    const T* x = heads.head(h);
    heads.fetch_ahead(h, dim);
    if (!kStream) fetch<true>(out + out_ahead, dim);
    const float *turned = scratch + h * padded(dim), factor = rstd[h], average = mean[h];
    for_each_group<2>(dim, [&](auto count, int64_t i, int n) MMFAST_INLINE_LAMBDA {
      vf v[count.value];
      for (int k = 0; k < count.value; ++k) {
        const int64_t column = i + k * kLanes;
        const vf g = load(turned + column), y = get(x + column, n) * factor;
        store(of_heads + column, load(of_heads + column) + g * y);
        v[k] = (g * weights.at(column) - y * average) * factor;
      }
      put_columns<kStream>(count, out + i, v, n);
    });
  }
  for (int64_t i = 0; i < padded(dim); i += kLanes)
    store(dweight + i, load(dweight + i) + load(of_heads + i));
}

// One side's norm weight by column, and by the other column of its pair; ones where it has none.
struct Weight {
  float *own, *other;  // [dim]
};

MMFAST_INLINE void widen(const RotaryParams& p, const float* weight, const Weight& out) {
  for_each_pair(p.dim, p.interleaved, [&](int64_t, int64_t i, int64_t j) MMFAST_INLINE_LAMBDA {
    out.own[i] = out.other[j] = weight ? weight[i] : 1.0f;
    out.own[j] = out.other[i] = weight ? weight[j] : 1.0f;
  });
}

// kDim: the number of columns where the compiler shall know it, else 0.
template <typename T, bool kBackward, bool kStream, int kDim>
void run(const RotaryParams& p) {
  const int64_t dim = kDim ? kDim : p.dim;
  const int64_t stride = padded(dim) + 16, chunks = chunks_of(p.rows);  // a vector may reach past the end
  const Scratch scratch(p.threads, (5 + kGroup) * stride);
  float* partials = allocate((chunks + 2) * 2 * stride);
  std::memset(partials, 0, size_t((chunks + 2) * 2 * stride) * sizeof(float));
  Weight weights[2];
  for (int i = 0; i < p.sides; ++i) {
    weights[i].own = partials + (chunks + i) * 2 * stride;
    weights[i].other = weights[i].own + stride;
    widen(p, p.side[i].weight, weights[i]);
  }
#pragma omp parallel num_threads(p.threads)
  {
    float* mine = scratch.of(omp_get_thread_num());
    const Turn of_row{mine, mine + stride}, weighted{mine + 2 * stride, mine + 3 * stride};
    float* const work = mine + 4 * stride;
#pragma omp for schedule(static)
    for (int64_t c = 0; c < chunks; ++c) {
      const int64_t end = p.rows * (c + 1) / chunks;
      for (int64_t t = p.rows * c / chunks; t < end; ++t) {
        if (p.inside[t]) turn_of_row<kBackward>(p, dim, t, work, of_row);
        for (int i = 0; i < p.sides; ++i) {
          const RotarySide& side = p.side[i];
          T* out = static_cast<T*>(side.out) + t * side.heads * dim;
          if (!p.inside[t]) {
            std::memset(out, 0, size_t(side.heads * dim) * sizeof(T));
            continue;
          }
          const Turn& turn = !kBackward && side.weight ? weighted : of_row;
          // The weight is in the turn, so that it is multiplied once for all heads.
          for (int64_t d = 0; d < padded(dim) && &turn == &weighted; d += kLanes) {
            store(weighted.cosine + d, load(of_row.cosine + d) * load(weights[i].own + d));
            store(weighted.sine + d, load(of_row.sine + d) * load(weights[i].other + d));
          }
          const int64_t next = row_ahead<kStream>(t, p.rows, side.heads * dim * int64_t(sizeof(T)));
          const int64_t out_ahead = (next - t) * side.heads * dim;
          for (int64_t h = 0; h < side.heads; h += kGroup, out += kGroup * dim) {
            const int count = side.heads - h < kGroup ? int(side.heads - h) : kGroup;
            const Heads<T> x{static_cast<const T*>(side.x) + t * side.x_stride[0] + h * side.x_stride[1],
                             side.x_stride[1], count, (next - t) * side.x_stride[0]};
            if constexpr (kBackward) {
              const Heads<T> grad{
                  static_cast<const T*>(side.grad) + t * side.grad_stride[0] + h * side.grad_stride[1],
                  side.grad_stride[1], count, (next - t) * side.grad_stride[0]};
              if (p.norm)
                norm_backward_heads<kDim, T, kStream>(p, dim, weights[i].own, turn, x, grad, out, out_ahead,
                                                      work, partials + (2 * c + i) * stride);
              else
                forward_heads<kDim, T, kStream>(p, dim, false, turn, grad, out, out_ahead);
            } else {
              forward_heads<kDim, T, kStream>(p, dim, p.norm, turn, x, out, out_ahead);
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
