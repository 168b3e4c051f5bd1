// Packing and its gradient. Formulas: mmfast/reference/packing.py.
//
// A group of threads holds a row in registers from its sum to its norm: one read, one write. Backward, a
// group has a chunk of rows of one part, and keeps its sums over them in shared memory, where each thread has
// its own columns; the sums of all chunks are added in order. Rows are taken in the order of the row of a
// position table that they add to: those that share one are neighbours, a run. A run that crosses the border
// of two chunks leaves its pieces in `carry`, and a second kernel adds them in order. So no sum depends on
// timing. A second and third axis take one more pass each.
#include "mmfast/packing.h"

#include "cuda/grid.h"
#include "cuda/packing_rows.h"

namespace mmfast {
namespace cuda {
namespace {

// A backward pass.
struct Pass {
  PackParams p;
  PackOrder of;
  int64_t first_chunk[PackParams::kMaxParts + 1];  // of each part
  int64_t first_key[PackParams::kMaxParts];
  float* sums[3];  // [chunks, dim] each: of dweight, dbias and dtype_embedding; null where not wanted
  float* carry;    // [chunks, 2, dim]: pieces of the run from the chunk before, and of that into the next one
};

// Forward

template <class T, class P, int V, int N>
__global__ void __launch_bounds__(block_limit(V* N)) forward_kernel(const __grid_constant__ PackParams p) {
  const int64_t t = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  const int dim = int(p.dim);
  const bool exists = t < p.rows;
  const Row row = row_of(p, index_of(p, t));
  const int end = row.there ? dim : 0;
  float x[N][V];
  Terms<T, P, V, N>(p, row, end).sum(p, row, end, x);
  if (p.norm != Norm::none) {
    RowSums over_row;
    float sum[1] = {}, square[1] = {}, mean = 0;
    if (p.norm == Norm::layer) {
#pragma unroll
      for (int k = 0; k < N; ++k) {
#pragma unroll
        for (int i = 0; i < V; ++i) sum[0] += x[k][i];
      }
      over_row(sum);
      mean = sum[0] / float(dim);
    }
    for_columns<V, N>(dim, [&](int k, int) {
#pragma unroll
      for (int i = 0; i < V; ++i) {
        x[k][i] -= mean;
        square[0] += x[k][i] * x[k][i];
      }
    });
    over_row(square);
    const float rstd = 1.0f / sqrtf(square[0] / float(dim) + p.eps);
    if (exists && threadIdx.x == 0) {
      if (p.norm == Norm::layer) p.mean[t] = mean;
      p.rstd[t] = rstd;
    }
    for_columns<V, N>(dim, [&](int k, int column) {
      float weight[V], bias[V];
      read_or<P>(p.weight, column, 1, weight);
      read_or<P>(p.bias, column, 0, bias);
#pragma unroll
      for (int i = 0; i < V; ++i) x[k][i] = x[k][i] * rstd * weight[i] + bias[i];
    });
  }
  if (exists) put<T>(p.x, t * p.dim, dim, x);
}

// Backward

__device__ __forceinline__ int part_of_chunk(const Pass& s, int64_t chunk) {
  int m = 0;
  while (m + 1 < s.p.parts && chunk >= s.first_chunk[m + 1]) ++m;
  return m;
}

__device__ __forceinline__ int64_t begin_of(const Pass& s, int m, int64_t chunk) {
  return s.p.part[m].first + (chunk - s.first_chunk[m]) * s.of.chunk_rows;
}

__device__ __forceinline__ int64_t least(int64_t a, int64_t b) {
  return a < b ? a : b;
}

// Whether the pass adds up gradients of this part's table; if not, all its rows have one key.
__host__ __device__ __forceinline__ bool has_keys(const PackPart& part, int axis) {
  return axis < part.tables && part.dtable[axis];
}

// Where the sum of the run that ends at place i goes: the gradient's row, or the carry.
template <class P, int V, int N>
__device__ __forceinline__ void put_run(const Pass& s, int m, int64_t chunk, int64_t begin, int64_t i,
                                        int64_t end, const float (&run)[N][V]) {
  const PackPart& part = s.p.part[m];
  const int dim = int(s.p.dim), axis = s.of.axis;
  const int32_t mine = s.of.key[i];
  const int64_t n = mine - s.first_key[m];
  if (!has_keys(part, axis) || n < 0 || n >= part.table_rows[axis]) return;  // negative: another part's row
  const bool from_before = begin > part.first && s.of.key[begin - 1] == mine;
  const bool goes_on = i + 1 == end && end < part.first + part.rows && s.of.key[end] == mine;
  if (from_before || goes_on)
    put<float>(s.carry, (2 * chunk + !from_before) * s.p.dim, dim, run);
  else
    put<P>(part.dtable[axis], n * s.p.dim, dim, run);
}

// Sums over the rows of a chunk, in shared memory: there each thread has its own columns only.
enum Sum { kWeight, kBias, kType, kSums };

template <int V, int N>
class OwnSums {
 public:
  __device__ __forceinline__ explicit OwnSums(const Pass& s) : s_(s) {
#pragma unroll
    for (int i = 0; i < kSums * N; ++i) {
      if (!s.sums[i / N]) continue;
#pragma unroll
      for (int j = 0; j < V / kUnit; ++j) write(place(i, j), Unit{}.x);
    }
  }

  __device__ __forceinline__ void add(Sum which, int k, const float (&x)[V]) {
    if (!s_.sums[which]) return;
#pragma unroll
    for (int j = 0; j < V / kUnit; ++j) {
      Unit sum;
      read(place(which * N + k, j), sum.x);
#pragma unroll
      for (int i = 0; i < kUnit; ++i) sum.x[i] += x[j * kUnit + i];
      write(place(which * N + k, j), sum.x);
    }
  }

  // All sums of columns k to element `at` of the results.
  __device__ __forceinline__ void put(int k, int64_t at) const {
#pragma unroll
    for (int which = 0; which < kSums; ++which) {
      if (!s_.sums[which]) continue;
#pragma unroll
      for (int j = 0; j < V / kUnit; ++j) {
        Unit sum;
        read(place(which * N + k, j), sum.x);
        write(s_.sums[which] + at + j * kUnit, sum.x);
      }
    }
  }

 private:
  static constexpr int kUnit = V < 4 ? 1 : 4;
  struct Unit {
    float x[kUnit] = {};
  };
  const Pass& s_;

  __device__ __forceinline__ static float* place(int i, int j) {
    const int thread = int(threadIdx.y * blockDim.x + threadIdx.x);
    const int unit = (thread / 32 * kSums * N + i) * (V / kUnit) + j;
    return reinterpret_cast<float*>(shared_memory()) + (32 * unit + thread % 32) * kUnit;
  }
};

template <class T, class P, int V, int N>
__global__ void __launch_bounds__(block_limit(V* N), V* N == kFew ? 4 : 1)
    backward_kernel(const __grid_constant__ Pass s) {
  const PackParams& p = s.p;
  const int64_t chunk = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  const bool exists = chunk < s.first_chunk[p.parts];
  const int m = part_of_chunk(s, chunk), dim = int(p.dim);
  const PackPart& part = p.part[m];
  const int64_t begin = begin_of(s, m, chunk);
  const int64_t end = exists ? least(begin + s.of.chunk_rows, part.first + part.rows) : begin;
  const bool runs = s.of.key != nullptr;

  OwnSums<V, N> sums(s);
  float run[N][V] = {};
  RowSums over_row;
  const auto order_at = [&](int64_t i) { return i < end ? s.of.order[i] : int64_t(-1); };
  // What is known of a row is read while the row before is on its way, where registers allow it.
  constexpr bool kAhead = V > 1;
  int64_t after_next = order_at(begin + kAhead);
  Index next = index_of(p, kAhead ? order_at(begin) : -1);
  // As often in all threads of a warp, which may have several chunks: they sum over rows together.
  for (int r = 0; r < s.of.chunk_rows; ++r) {
    const int64_t i = begin + r;
    if (!kAhead) next = index_of(p, order_at(i));
    Row row = row_of(p, next);
    row.there = row.there && row.part == m;
    const int row_end = row.there ? dim : 0;
    StoredRow<T, V, N> gradient;
    if (kAhead) gradient.load(p.x, row.t * p.x_stride, row_end);
    const Terms<T, P, V, N> terms(p, row, p.norm != Norm::none ? row_end : 0);
    if (kAhead) {
      next = index_of(p, after_next);
      after_next = order_at(i + 2);
    }
    float d[N][V], y[N][V] = {};
    if (p.norm != Norm::none) terms.sum(p, row, row_end, y);
    if (!kAhead) gradient.load(p.x, row.t * p.x_stride, row_end);
    gradient.copy_to(d);
    if (p.norm != Norm::none) {
      const float rstd = row.there ? p.rstd[row.t] : 0;
      const float mean = row.there && p.norm == Norm::layer ? p.mean[row.t] : 0;
      float along[2] = {};  // of d with y, and with ones
      for_columns<V, N>(dim, [&](int k, int column) {
        float weight[V], product[V];
        read_or<P>(p.weight, column, 1, weight);
        sums.add(kBias, k, d[k]);
#pragma unroll
        for (int j = 0; j < V; ++j) {
          y[k][j] = (y[k][j] - mean) * rstd;
          product[j] = d[k][j] * y[k][j];
          d[k][j] *= weight[j];
          along[0] += d[k][j] * y[k][j];
          along[1] += d[k][j];
        }
        sums.add(kWeight, k, product);
      });
      over_row(along);
      const float product = along[0] / float(dim), sum = p.norm == Norm::layer ? along[1] / float(dim) : 0.0f;
#pragma unroll
      for (int k = 0; k < N; ++k) {
#pragma unroll
        for (int j = 0; j < V; ++j) d[k][j] = (d[k][j] - sum - y[k][j] * product) * rstd;
      }
    }
    if (row.there && part.dtokens) put<T>(part.dtokens, row.at * p.dim, dim, d);
#pragma unroll
    for (int k = 0; k < N; ++k) {
#pragma unroll
      for (int j = 0; j < V; ++j) run[k][j] += d[k][j];
    }
    if (i < end && (i + 1 == end || (runs && s.of.key[i + 1] != s.of.key[i]))) {
      if (runs) put_run<P>(s, m, chunk, begin, i, end, run);
#pragma unroll
      for (int k = 0; k < N; ++k) {
        sums.add(kType, k, run[k]);
#pragma unroll
        for (int j = 0; j < V; ++j) run[k][j] = 0;
      }
    }
  }
  if (exists) for_columns<V, N>(dim, [&](int k, int column) { sums.put(k, chunk * p.dim + column); });
}

// Adds up the pieces of the run that goes on after chunk x, if it began there.
template <class P>
__global__ void __launch_bounds__(kBlock) join_kernel(const __grid_constant__ Pass s) {
  const int64_t chunk = blockIdx.x, column = int64_t(blockIdx.y) * kBlock + threadIdx.x;
  const int m = part_of_chunk(s, chunk), axis = s.of.axis;
  const PackPart& part = s.p.part[m];
  const int64_t begin = begin_of(s, m, chunk), end = begin + s.of.chunk_rows;
  if (!has_keys(part, axis) || end >= part.first + part.rows || column >= s.p.dim) return;
  const int32_t mine = s.of.key[end];
  if (s.of.key[end - 1] != mine || (begin > part.first && s.of.key[begin - 1] == mine)) return;
  const int64_t n = mine - s.first_key[m];
  if (n < 0 || n >= part.table_rows[axis]) return;
  int64_t last = chunk + 1, beyond = s.first_chunk[m + 1];  // keys ascend
  while (beyond - last > 1) {
    const int64_t middle = (last + beyond) / 2;
    (s.of.key[begin_of(s, m, middle)] == mine ? last : beyond) = middle;
  }
  float total = s.carry[(2 * chunk + 1) * s.p.dim + column];
#pragma unroll 8
  for (int64_t c = chunk + 1; c <= last; ++c) total += s.carry[2 * c * s.p.dim + column];
  static_cast<P*>(part.dtable[axis])[n * s.p.dim + column] = from_float<P>(total);
}

// Sums of the chunks, in their order: weight, bias, then the type embedding of each part.
constexpr int kColumns = 32, kLines = 16;

template <class P>
__global__ void __launch_bounds__(kColumns* kLines) reduce_kernel(const __grid_constant__ Pass s) {
  const PackParams& p = s.p;
  const int which = blockIdx.y < 2 ? int(blockIdx.y) : 2, m = int(blockIdx.y) - 2;
  void* out = which == 0 ? p.dweight : which == 1 ? p.dbias : p.dtype_embedding;
  if (!out) return;
  const float* from = s.sums[which];
  const int64_t column = int64_t(blockIdx.x) * kColumns + threadIdx.x;
  const int64_t first = which < 2 ? 0 : s.first_chunk[m], last = s.first_chunk[which < 2 ? p.parts : m + 1];
  float total = 0;
  if (column < p.dim) {
#pragma unroll 8
    for (int64_t c = first + threadIdx.y; c < last; c += kLines) total += from[c * p.dim + column];
  }
  __shared__ float of_line[kLines][kColumns];
  of_line[threadIdx.y][threadIdx.x] = total;
  __syncthreads();
  if (threadIdx.y != 0 || column >= p.dim) return;
  for (int i = 1; i < kLines; ++i) total += of_line[i][threadIdx.x];
  static_cast<P*>(out)[(which < 2 ? 0 : m * p.dim) + column] = from_float<P>(total);
}

// Sort keys

struct Keys {
  Pass s;
  int32_t* key;  // [rows]
};

__global__ void __launch_bounds__(kBlock) keys_kernel(const __grid_constant__ Keys k) {
  const PackParams& p = k.s.p;
  const int axis = k.s.of.axis;
  const int64_t t = int64_t(blockIdx.x) * kBlock + threadIdx.x;
  if (t >= p.rows) return;
  const Row row = row_of(p, index_of(p, t));
  const PackPart& part = p.part[row.part];
  int64_t n = 0;
  if (has_keys(part, axis)) {
    n = axis == 0 ? row.place[0] : axis == 1 ? row.place[1] : row.place[2];
    if (n < 0) n = part.table_rows[axis];  // behind the table: a run that is not written
  }
  k.key[t] = int32_t(k.s.first_key[row.part] + n);
}

// Launching

// How rows are spread over threads.
struct Shape {
  bool vector;   // 16 bytes at a time
  int elements;  // of a thread
  dim3 block;

  Shape(const PackParams& p, int most) {
    if (p.dim > kMaxDim) throw std::runtime_error("pack: D is more than " + std::to_string(kMaxDim));
    vector = is_aligned(p);
    elements = p.dim <= 32 * kFew ? kFew : !vector || p.dim <= 32 * kSome ? kSome : most;
    const int group = group_of((p.dim + elements - 1) / elements);
    block = dim3(unsigned(group), unsigned(group < 32 ? kBlock / group : group == 32 ? kBlock / 32 : 1));
  }

 private:
  static bool is_aligned(const PackParams& p) {
    bool aligned = true;
    const auto rows = [&](const void* base, int64_t stride, DType dtype) {
      const int64_t size = dtype == DType::f32 ? 4 : 2;
      aligned =
          aligned && (!base || (reinterpret_cast<uintptr_t>(base) % 16 == 0 && stride * size % 16 == 0));
    };
    for (int m = 0; m < p.parts; ++m) {
      const PackPart& part = p.part[m];
      rows(part.tokens, part.stride, p.dtype);
      rows(part.dtokens, p.dim, p.dtype);
      for (int a = 0; a < part.tables; ++a) {
        rows(part.table[a], part.table_stride[a], p.param_dtype);
        rows(part.dtable[a], p.dim, p.param_dtype);
      }
    }
    rows(p.x, p.x_stride, p.dtype);
    rows(p.x, p.dim, p.dtype);
    for (const void* base : {p.type, p.weight, p.bias}) rows(base, p.dim, p.param_dtype);
    return aligned;
  }
};

template <class T, class P>
Kernel<PackParams> forward_of(const Shape& shape) {
  constexpr int V = 16 / sizeof(T);
  if (!shape.vector)
    return shape.elements == kFew ? forward_kernel<T, P, 1, kFew> : forward_kernel<T, P, 1, kSome>;
  return shape.elements == kFew    ? forward_kernel<T, P, V, kFew / V>
         : shape.elements == kSome ? forward_kernel<T, P, V, kSome / V>
                                   : forward_kernel<T, P, V, kMany / V>;
}

template <class T, class P>
Kernel<Pass> backward_of(const Shape& shape) {
  constexpr int V = 16 / sizeof(T);
  if (!shape.vector)
    return shape.elements == kFew ? backward_kernel<T, P, 1, kFew> : backward_kernel<T, P, 1, kSome>;
  return shape.elements == kFew ? backward_kernel<T, P, V, kFew / V> : backward_kernel<T, P, V, kSome / V>;
}

// f<T, P>() for the dtypes of tokens and parameters.
template <class F>
auto with_types(const PackParams& p, const F& f) {
  const bool wide = p.param_dtype == DType::f32;
  if (p.dtype == DType::f32) return f(float(), float());
  if (p.dtype == DType::bf16) return wide ? f(bf16(), float()) : f(bf16(), bf16());
  return wide ? f(f16(), float()) : f(f16(), f16());
}

template <class F>
auto with_param_type(const PackParams& p, const F& f) {
  return p.param_dtype == DType::f32 ? f(float()) : p.param_dtype == DType::bf16 ? f(bf16()) : f(f16());
}

Pass pass_of(const PackParams& p, const PackOrder& of) {
  Pass s{};
  s.p = p;
  s.of = of;
  int64_t key = 0;
  for (int m = 0; m < p.parts; ++m) {
    const PackPart& part = p.part[m];
    s.first_chunk[m + 1] = s.first_chunk[m] + (part.rows + s.of.chunk_rows - 1) / s.of.chunk_rows;
    s.first_key[m] = key;
    key += of.axis >= 0 && has_keys(part, of.axis) ? part.table_rows[of.axis] + 1 : 1;
  }
  if (key > INT32_MAX)
    throw std::runtime_error("pack_backward: the position tables have more than 2^31 rows");
  const int64_t size = s.first_chunk[p.parts] * p.dim;
  float* place = of.workspace;
  void* wanted[] = {p.dweight, p.dbias, p.dtype_embedding};
  for (int i = 0; i < 3; ++i) {
    s.sums[i] = wanted[i] ? place : nullptr;
    place += wanted[i] ? size : 0;
  }
  s.carry = place;
  return s;
}

}  // namespace

void pack_forward(const PackParams& given, void* stream) {
  PackParams p = given;
  p.x_stride = p.dim;
  if (p.rows == 0 || p.dim == 0) return;
  const Shape shape(p, kMany);
  const auto kernel =
      with_types(p, [&](auto t, auto param) { return forward_of<decltype(t), decltype(param)>(shape); });
  launch(kernel, blocks_of("pack", p.rows, shape.block.y), shape.block, 0, stream, p, "pack");
}

int pack_threads(int64_t dim) {
  PackParams p{};
  p.dim = dim;
  return int(Shape(p, kSome).block.x);
}

void pack_keys(const PackParams& p, int axis, int32_t* key, void* stream) {
  const char* op = "pack_backward";
  PackOrder of;
  of.axis = axis;
  const Keys k{pass_of(p, of), key};
  launch(keys_kernel, blocks_of(op, p.rows, kBlock), dim3(kBlock), 0, stream, k, op);
}

void pack_backward(const PackParams& p, const PackOrder& order, void* stream) {
  const char* op = "pack_backward";
  if (p.dim == 0) return;
  const Pass s = pass_of(p, order);
  const Shape shape(p, kSome);
  const int64_t chunks = s.first_chunk[p.parts];
  const auto kernel =
      with_types(p, [&](auto t, auto param) { return backward_of<decltype(t), decltype(param)>(shape); });
  const bool any = p.dweight || p.dbias || p.dtype_embedding;
  const size_t shared = any ? kSums * sizeof(float) * shape.elements * shape.block.x * shape.block.y : 0;
  launch(kernel, blocks_of(op, chunks, shape.block.y), shape.block, shared, stream, s, op);
  if (order.key) {
    const auto join =
        with_param_type(p, [](auto param) -> Kernel<Pass> { return join_kernel<decltype(param)>; });
    launch(join, blocks_of(op, chunks, 1, (p.dim + kBlock - 1) / kBlock), dim3(kBlock), 0, stream, s, op);
  }
  if (any) {
    const auto reduce =
        with_param_type(p, [](auto param) -> Kernel<Pass> { return reduce_kernel<decltype(param)>; });
    launch(reduce, blocks_of(op, p.dim, kColumns, 2 + p.parts), dim3(kColumns, kLines), 0, stream, s, op);
  }
}

}  // namespace cuda
}  // namespace mmfast
