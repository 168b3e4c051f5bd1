// A row in the registers of a group of threads: where it comes from, what is added to it, sums over it.
#pragma once
#include "cuda/vectors.h"
#include "mmfast/packing.h"

namespace mmfast {
namespace cuda {

constexpr int kBlock = 128;  // threads of a block whose rows take a warp or less each

// Elements of a row that a thread holds, and the threads of a block at most.
constexpr int kFew = 8, kSome = 16, kMany = 32;
constexpr int block_limit(int elements) {
  return elements == kFew ? kBlock : int(kMaxDim) / elements;
}

// Threads (x) have one row together; y counts rows of the block. A warp has N V 32 elements, a thread V of
// each V 32 of them: steps that the compiler knows cost no registers. Only short rows share a warp.
template <int V, int N>
__device__ __forceinline__ int column_of(int k) {
  if constexpr (N * V == kFew) return (int(threadIdx.x) + k * int(blockDim.x)) * V;
  return (int(threadIdx.x) / 32 * (32 * N) + int(threadIdx.x) % 32 + 32 * k) * V;
}

// f(k, column) for all elements of the row that this thread has.
template <int V, int N, class F>
__device__ __forceinline__ void for_columns(int dim, const F& f) {
#pragma unroll
  for (int k = 0; k < N; ++k) {
    const int column = column_of<V, N>(k);
    if (column < dim) f(k, column);
  }
}

// A row as it is stored: its first `end` elements, then zeros. Rows that are loaded behind each other are on
// their way at once; the first use of a number waits.
template <class S, int V, int N>
struct StoredRow {
  Stored<S, V> piece[N];

  __device__ __forceinline__ void load(const void* p, int64_t at, int end) {
    for_columns<V, N>(end, [&](int k, int column) { piece[k].load(static_cast<const S*>(p) + at + column); });
  }
  __device__ __forceinline__ void copy_to(float (&x)[N][V]) const {
#pragma unroll
    for (int k = 0; k < N; ++k) {
#pragma unroll
      for (int i = 0; i < V; ++i) x[k][i] = piece[k][i];
    }
  }
  __device__ __forceinline__ void add_to(float (&x)[N][V]) const {
#pragma unroll
    for (int k = 0; k < N; ++k) {
#pragma unroll
      for (int i = 0; i < V; ++i) x[k][i] += piece[k][i];
    }
  }
};

template <class S, int V, int N>
__device__ __forceinline__ void put(void* p, int64_t at, int dim, const float (&x)[N][V]) {
  for_columns<V, N>(dim, [&](int k, int column) { write(static_cast<S*>(p) + at + column, x[k]); });
}

// Parameters of the norm, or what stands for those that are not given.
template <class P, int V>
__device__ __forceinline__ void read_or(const void* p, int column, float otherwise, float (&x)[V]) {
#pragma unroll
  for (int i = 0; i < V; ++i) x[i] = otherwise;
  if (p) read(static_cast<const P*>(p) + column, x);
}

// What is known of row t of x, as it is read.
struct Index {
  int64_t t, source = 0;
  int part = PackParams::kMaxParts;
  int position[PackPart::kMaxAxes] = {};
};

__device__ __forceinline__ Index index_of(const PackParams& p, int64_t t) {
  Index index;
  index.t = t;
  const bool exists = t >= 0 && t < p.rows;
  if (exists) index.part = p.modality[t];
  if (exists) index.source = p.source[t];
#pragma unroll
  for (int a = 0; a < PackPart::kMaxAxes; ++a)
    if (exists && a < p.axes) index.position[a] = p.position[t * p.axes + a];
  return index;
}

// Where row t of x comes from; a row of no part is taken for zeros. `place` are rows of the part's tables,
// negative for none: outside a table nothing is added.
struct Row {
  int64_t t, at;  // row of x, row of the part
  int part;
  bool there;
  int place[PackPart::kMaxAxes];
};

__device__ __forceinline__ Row row_of(const PackParams& p, const Index& index) {
  Row row;
  row.t = index.t;
  row.part = index.part < p.parts ? index.part : 0;
  const PackPart& part = p.part[row.part];
  row.at = index.source - part.first;
  row.there = index.part < p.parts && row.at >= 0 && row.at < part.rows;
#pragma unroll
  for (int a = 0; a < PackPart::kMaxAxes; ++a) {
    const int n = index.position[a];
    row.place[a] = row.there && a < part.tables && n < part.table_rows[a] ? n : -1;
  }
  return row;
}

// What is summed before the norm. Tokens and type embedding are loaded at once, unless numbers are read one
// by one and fill the registers; the rows of tables follow.
template <class T, class P, int V, int N>
struct Terms {
  static constexpr bool kAtOnce = V > 1;
  StoredRow<T, V, N> tokens;
  StoredRow<P, V, N> type;

  __device__ __forceinline__ Terms(const PackParams& p, const Row& row, int end) {
    const PackPart& part = p.part[row.part];
    tokens.load(part.tokens, row.at * part.stride, end);
    if (kAtOnce) type.load(p.type, row.part * p.dim, p.type ? end : 0);
  }

  __device__ __forceinline__ void sum(const PackParams& p, const Row& row, int end, float (&x)[N][V]) const {
    const PackPart& part = p.part[row.part];
    const auto add = [&](const void* table, int64_t at) {
      StoredRow<P, V, N> stored;
      stored.load(table, at, end);
      stored.add_to(x);
    };
    tokens.copy_to(x);
    if (kAtOnce)
      type.add_to(x);
    else if (p.type)
      add(p.type, row.part * p.dim);
#pragma unroll
    for (int a = 0; a < PackPart::kMaxAxes; ++a)
      if (row.place[a] >= 0) add(part.table[a], row.place[a] * part.table_stride[a]);
  }
};

// Sums over the threads of a row, in an order that is always the same.
class RowSums {
 public:
  template <int n>
  __device__ __forceinline__ void operator()(float (&x)[n]) {
    const int threads = int(blockDim.x);
    for (int bits = threads < 32 ? threads / 2 : 16; bits; bits /= 2) {
#pragma unroll
      for (int i = 0; i < n; ++i) x[i] += __shfl_xor_sync(0xffffffffu, x[i], bits);
    }
    if (threads <= 32) return;
    // Two buffers by turns: who writes one again has met all that read it at the barrier between.
    __shared__ float of_warp[2][n][32];
    turn_ ^= 1;
#pragma unroll
    for (int i = 0; i < n; ++i) {
      if (threadIdx.x % 32 == 0) of_warp[turn_][i][threadIdx.x / 32] = x[i];
      x[i] = 0;
    }
    __syncthreads();
#pragma unroll 1
    for (int w = 0; w < threads / 32; ++w) {
#pragma unroll
      for (int i = 0; i < n; ++i) x[i] += of_warp[turn_][i][w];
    }
  }

 private:
  int turn_ = 0;
};

}  // namespace cuda
}  // namespace mmfast
