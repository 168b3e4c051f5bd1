// x[t] = norm(tokens[source[t]] + type[modality[t]] + sum over axes a of table[a][position[t, a]]), and
// backward. Sums in float32. A row is summed into a scratch row that stays in the first-level cache, then
// normalised from there: tokens are read once and x is written once.
#include "cpu/packing.h"

#include <omp.h>

#include <cmath>
#include <cstring>

#include "cpu/rows.h"

namespace mmfast {
namespace MMFAST_ISA {
namespace {

// Lanes from n on become zero.
MMFAST_INLINE vf first_lanes(vf v, int n) {
  if (n == kLanes) return v;
  float lanes[kLanes] = {};
  std::memcpy(lanes, &v, size_t(n) * sizeof(float));
  return load(lanes);
}

// What is added up for one row.
template <typename T, typename P>
struct Row {
  const T* tokens;
  const P* add[1 + PackPart::kMaxAxes];
  int adds = 0;

  __attribute__((always_inline)) Row(const PackParams& p, int64_t t) {
    const PackPart& part = p.part[p.modality[t]];
    tokens =
        part.tokens ? static_cast<const T*>(part.tokens) + (p.source[t] - part.first) * part.stride : nullptr;
    if (p.type) add[adds++] = static_cast<const P*>(p.type) + p.modality[t] * p.dim;
    for (int a = 0; a < part.tables; ++a) {
      if (!part.table[a]) continue;
      add[adds++] = static_cast<const P*>(part.table[a]) + p.position[t * p.axes + a] * part.table_stride[a];
    }
  }

  template <int kAdds>
  __attribute__((always_inline)) vf at(int64_t i, int n) const {
    vf v = get(tokens + i, n);
    if constexpr (kAdds > 0) v += get(add[0] + i, n);
    if constexpr (kAdds > 1) v += get(add[1] + i, n);
    if constexpr (kAdds > 2) v += get(add[2] + i, n);
    if constexpr (kAdds > 3) v += get(add[3] + i, n);
    return v;
  }
};

// Calls body with the number of addends as a compile-time constant.
template <typename Body>
MMFAST_INLINE void with_adds(int adds, Body body) {
  switch (adds) {
    case 0:
      return body.template run<0>();
    case 1:
      return body.template run<1>();
    case 2:
      return body.template run<2>();
    case 3:
      return body.template run<3>();
    default:
      return body.template run<4>();
  }
}

template <typename T, typename P, bool kStream>
struct Forward {
  const PackParams& p;
  int64_t t;
  float* scratch;
  Row<T, P> row;

  template <int kAdds>
  __attribute__((always_inline)) void run() {
    const int64_t dim = p.dim;
    T* out = static_cast<T*>(p.x) + t * dim;
    if (p.norm == Norm::none) {
      for_each_vector(dim, [&](int64_t i, int n) MMFAST_INLINE_LAMBDA {
        set<kStream>(out + i, row.template at<kAdds>(i, n), n);
      });
      return;
    }
    Four total, squares;
    for_each_vector_in_four(dim, [&](int64_t i, int n, int k) MMFAST_INLINE_LAMBDA {
      const vf v = row.template at<kAdds>(i, n);
      store(scratch + i, v);
      total.v[k] += v;
      squares.v[k] += v * v;
    });
    float mean = 0, variance = squares.total() / float(dim);
    if (p.norm == Norm::layer) {
      // The two-pass variance: the sum of squares loses digits where the mean is large.
      mean = total.total() / float(dim);
      squares = {};
      for_each_vector_in_four(dim, [&](int64_t i, int n, int k) MMFAST_INLINE_LAMBDA {
        const vf v = first_lanes(load(scratch + i) - mean, n);
        squares.v[k] += v * v;
      });
      variance = squares.total() / float(dim);
      p.mean[t] = mean;
    }
    const float rstd = 1.0f / std::sqrt(variance + p.eps);
    p.rstd[t] = rstd;
    const P* weight = static_cast<const P*>(p.weight);
    const P* bias = static_cast<const P*>(p.bias);
    for_each_vector(dim, [&](int64_t i, int n) MMFAST_INLINE_LAMBDA {
      vf v = (load(scratch + i) - mean) * rstd;
      if (weight) v *= get(weight + i, n);
      if (bias) v += get(bias + i, n);
      set<kStream>(out + i, v, n);
    });
  }
};

template <typename T, typename P, bool kStream>
void forward(const PackParams& p) {
  const int64_t stride = padded(p.dim);
  float* scratch = allocate(p.threads * stride);
#pragma omp parallel num_threads(p.threads)
  {
    float* mine = scratch + omp_get_thread_num() * stride;
#pragma omp for schedule(static)
    for (int64_t t = 0; t < p.rows; ++t) {
      Forward<T, P, kStream> body{p, t, mine, Row<T, P>(p, t)};
      with_adds(body.row.adds, body);
    }
    if (kStream) stream_fence();
  }
  release(scratch);
}

// Partial sums of one chunk, each null where it is not wanted.
struct Partials {
  float *weight, *bias, *type;
};

template <typename T, typename P, bool kStream>
struct Backward {
  const PackParams& p;
  int64_t t;
  float *normed, *scaled;
  float* coefficients;  // [rows, 2]: dx = (g - a - normed * b) * rstd, kept for the position tables
  Partials partial;
  Row<T, P> row;

  template <int kAdds>
  __attribute__((always_inline)) void run() {
    const int64_t dim = p.dim;
    const PackPart& part = p.part[p.modality[t]];
    const T* dx = static_cast<const T*>(p.x) + t * p.x_stride;
    T* out = part.dtokens ? static_cast<T*>(part.dtokens) + (p.source[t] - part.first) * dim : nullptr;
    float* type = partial.type ? partial.type + p.modality[t] * padded(dim) : nullptr;
    auto finish = [&](int64_t i, int n, vf v) MMFAST_INLINE_LAMBDA {
      if (out) set<kStream>(out + i, v, n);
      if (type) store(type + i, load(type + i) + v);
    };
    if (p.norm == Norm::none) {
      for_each_vector(dim, [&](int64_t i, int n) MMFAST_INLINE_LAMBDA { finish(i, n, get(dx + i, n)); });
      return;
    }
    const float rstd = p.rstd[t], mean = p.norm == Norm::layer ? p.mean[t] : 0.0f;
    const P* weight = static_cast<const P*>(p.weight);
    Four sum_scaled, sum_product;
    for_each_vector_in_four(dim, [&](int64_t i, int n, int k) MMFAST_INLINE_LAMBDA {
      const vf y = (row.template at<kAdds>(i, n) - mean) * rstd;
      const vf d = get(dx + i, n);
      const vf g = weight ? d * get(weight + i, n) : d;
      store(normed + i, y);
      store(scaled + i, g);
      sum_scaled.v[k] += g;
      sum_product.v[k] += g * y;
      if (partial.weight) store(partial.weight + i, load(partial.weight + i) + d * y);
      if (partial.bias) store(partial.bias + i, load(partial.bias + i) + d);
    });
    const float a = p.norm == Norm::layer ? sum_scaled.total() / float(dim) : 0.0f;
    const float b = sum_product.total() / float(dim);
    coefficients[2 * t] = a;
    coefficients[2 * t + 1] = b;
    if (!out && !type) return;
    for_each_vector(dim, [&](int64_t i, int n) MMFAST_INLINE_LAMBDA {
      finish(i, n, (load(scaled + i) - a - load(normed + i) * b) * rstd);
    });
  }
};

// Adds the chunks' partial sums in order: columns are shared by threads.
template <typename P>
void reduce(const float* partials, int64_t chunk_stride, int64_t chunks, void* out, int64_t dim,
            int threads) {
  P* result = static_cast<P*>(out);
  const int64_t vectors = (dim + kLanes - 1) / kLanes;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t v = 0; v < vectors; ++v) {
    const int64_t i = v * kLanes;
    const int n = dim - i < kLanes ? int(dim - i) : kLanes;
    vf total = splat(0);
    for (int64_t c = 0; c < chunks; ++c) total += load(partials + c * chunk_stride + i);
    set<false>(result + i, total, n);
  }
}

constexpr int64_t kColumns = 256;

// Adds columns [first, first + width) of a row's gradient before the norm to total, computed again in
// float32.
template <typename T, typename P>
struct AddGradient {
  const PackParams& p;
  int64_t t, first, width;
  const float* coefficients;
  float* total;
  Row<T, P> row;

  template <int kAdds>
  __attribute__((always_inline)) void run() {
    const T* dx = static_cast<const T*>(p.x) + t * p.x_stride + first;
    if (p.norm == Norm::none) {
      for_each_vector(width, [&](int64_t i, int n) MMFAST_INLINE_LAMBDA {
        store(total + i, load(total + i) + get(dx + i, n));
      });
      return;
    }
    const float rstd = p.rstd[t], mean = p.norm == Norm::layer ? p.mean[t] : 0.0f;
    const float a = coefficients[2 * t], b = coefficients[2 * t + 1];
    const P* weight = p.weight ? static_cast<const P*>(p.weight) + first : nullptr;
    for_each_vector(width, [&](int64_t i, int n) MMFAST_INLINE_LAMBDA {
      const vf y = (row.template at<kAdds>(first + i, n) - mean) * rstd;
      const vf d = get(dx + i, n);
      const vf g = weight ? d * get(weight + i, n) : d;
      store(total + i, load(total + i) + (g - a - y * b) * rstd);
    });
  }
};

// Gradient of one position table: rows are bucketed by position (stable), then each table row adds its own
// rows in order. Blocks of columns give work to all threads where a table is short.
template <typename T, typename P>
void table_backward(const PackParams& p, const float* coefficients, int which, int axis) {
  const PackPart& part = p.part[which];
  const int64_t size = part.table_rows[axis], dim = p.dim;
  int64_t* end = new int64_t[size + 1]();
  int64_t* member = new int64_t[part.rows];
  for (int64_t t = 0; t < p.rows; ++t)
    if (p.modality[t] == which) ++end[p.position[t * p.axes + axis] + 1];
  for (int64_t n = 0; n < size; ++n) end[n + 1] += end[n];
  // end[n] is the beginning of bucket n, and moves to its end.
  for (int64_t t = 0; t < p.rows; ++t)
    if (p.modality[t] == which) member[end[p.position[t * p.axes + axis]]++] = t;
  P* out = static_cast<P*>(part.dtable[axis]);
  const int64_t blocks = (dim + kColumns - 1) / kColumns;
#pragma omp parallel for num_threads(p.threads) schedule(dynamic, 8)
  for (int64_t task = 0; task < size * blocks; ++task) {
    const int64_t n = task / blocks, first = task % blocks * kColumns;
    const int64_t width = dim - first < kColumns ? dim - first : kColumns;
    float total[kColumns] = {};
    for (int64_t m = n ? end[n - 1] : 0; m < end[n]; ++m) {
      AddGradient<T, P> body{p, member[m], first, width, coefficients, total, Row<T, P>(p, member[m])};
      with_adds(body.row.adds, body);
    }
    for_each_vector(width, [&](int64_t i, int k) MMFAST_INLINE_LAMBDA {
      set<false>(out + n * dim + first + i, load(total + i), k);
    });
  }
  delete[] member;
  delete[] end;
}

template <typename T, typename P, bool kStream>
void backward(const PackParams& p) {
  const int64_t stride = padded(p.dim), chunks = chunks_of(p.rows);
  const bool want_weight = p.dweight, want_bias = p.dbias, want_type = p.dtype_embedding;
  const int64_t chunk_stride = stride * (want_weight + want_bias + (want_type ? p.parts : 0));
  float* partials = allocate(chunks * chunk_stride + 1);
  float* scratch = allocate(p.threads * 2 * stride);
  float* coefficients = p.norm == Norm::none ? nullptr : allocate(2 * p.rows + 1);
#pragma omp parallel num_threads(p.threads)
  {
    float* mine = scratch + omp_get_thread_num() * 2 * stride;
#pragma omp for schedule(static)
    for (int64_t c = 0; c < chunks; ++c) {
      float* base = partials + c * chunk_stride;
      if (chunk_stride) std::memset(base, 0, size_t(chunk_stride) * sizeof(float));
      const Partials partial{want_weight ? base : nullptr, want_bias ? base + want_weight * stride : nullptr,
                             want_type ? base + (want_weight + want_bias) * stride : nullptr};
      for (int64_t t = p.rows * c / chunks; t < p.rows * (c + 1) / chunks; ++t) {
        Backward<T, P, kStream> body{p, t, mine, mine + stride, coefficients, partial, Row<T, P>(p, t)};
        with_adds(p.norm == Norm::none ? 0 : body.row.adds, body);
      }
    }
    if (kStream) stream_fence();
  }
  if (want_weight) reduce<P>(partials, chunk_stride, chunks, p.dweight, p.dim, p.threads);
  if (want_bias) reduce<P>(partials + want_weight * stride, chunk_stride, chunks, p.dbias, p.dim, p.threads);
  for (int m = 0; want_type && m < p.parts; ++m) {
    reduce<P>(partials + (want_weight + want_bias + m) * stride, chunk_stride, chunks,
              static_cast<P*>(p.dtype_embedding) + m * p.dim, p.dim, p.threads);
  }
  release(scratch);
  release(partials);
  for (int m = 0; m < p.parts; ++m) {
    for (int a = 0; a < p.part[m].tables; ++a)
      if (p.part[m].dtable[a]) table_backward<T, P>(p, coefficients, m, a);
  }
  if (coefficients) release(coefficients);
}

template <typename T, typename P>
void dispatch_stream(const PackParams& p, bool is_forward) {
  bool stream = p.stream;
  if (is_forward) {
    stream = stream && can_stream(p.x, p.dim * int64_t(sizeof(T)));
    return stream ? forward<T, P, true>(p) : forward<T, P, false>(p);
  }
  for (int m = 0; m < p.parts; ++m)
    stream = stream && can_stream(p.part[m].dtokens, p.dim * int64_t(sizeof(T)));
  return stream ? backward<T, P, true>(p) : backward<T, P, false>(p);
}

void dispatch(const PackParams& p, bool is_forward) {
  if (p.dtype == DType::f32) return dispatch_stream<float, float>(p, is_forward);
  if (p.param_dtype == DType::f32) return dispatch_stream<bf16, float>(p, is_forward);
  return dispatch_stream<bf16, bf16>(p, is_forward);
}

template <bool kStream>
MMFAST_INLINE void copy_row(char* out, const char* from, int64_t bytes) {
  if constexpr (kStream) {
    for (int64_t i = 0; i < bytes; i += 4 * kLanes)
      put<true>(reinterpret_cast<float*>(out + i), load(reinterpret_cast<const float*>(from + i)));
  } else {
    std::memcpy(out, from, size_t(bytes));
  }
}

template <bool kStream>
void gather(const GatherParams& p) {
#pragma omp parallel num_threads(p.threads)
  {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < p.rows; ++i) {
      const char* from = p.index[i] < 0 ? p.fill : p.x + p.index[i] * p.x_stride;
      copy_row<kStream>(p.out + i * p.bytes, from, p.bytes);
    }
    if (kStream) stream_fence();
  }
}

}  // namespace

void pack_forward(const PackParams& p) {
  dispatch(p, true);
}
void pack_backward(const PackParams& p) {
  dispatch(p, false);
}
void gather_rows(const GatherParams& p) {
  p.stream&& can_stream(p.out, p.bytes) ? gather<true>(p) : gather<false>(p);
}

}  // namespace MMFAST_ISA
}  // namespace mmfast
