// What an attack's kernels work on: tensors cut into tiles, the tile of a group of threads, its elements,
// sums.
#pragma once
#include "cuda/vectors.h"
#include "mmfast/perturbation.h"

namespace mmfast {
namespace cuda {
namespace attack {

constexpr int kBlock = 256;          // threads
constexpr int64_t kTile = 8192;      // elements
constexpr int64_t kWarpUnit = 1024;  // units up to this size are left to a warp each
constexpr int kTensors = 16;         // of one launch; longer lists take several
constexpr unsigned kAll = 0xffffffffu;

// What a pass over the tiles does: everything, the sums for a norm, or the step by sums of earlier passes.
enum class Stage : int { whole, l1, l2, blend, apply };

struct Part {
  PerturbTensor tensor;
  int64_t first_slot, first_unit;  // of the launch's, in all tensors before
  int64_t tiles;                   // of a unit; 0: samples of a layout, whose lengths only the device knows
  int32_t index;                   // place in the caller's list
  bool vector;                     // 16 bytes at a time
};

struct Launch {
  Part part[kTensors];
  int count;
  Stage stage;
  bool l2;
  float decay, blend;
  int64_t slots, units;
  const int64_t* seed;             // [1]
  double* partial;                 // [planes, slots]
  double *l1, *l2_sums, *blended;  // [units], [3, units]: g g, d g, d d; [units]
  const double* from;              // what `add` adds: [planes, slots]
  double* to;                      // [planes, units]
  int planes;
};
struct Tile {
  int64_t at = 0;  // first element of the tensor
  int64_t n = 0;   // elements; none: nothing to do
  int64_t sample = 0;
  int64_t unit = 0;   // of the launch
  int64_t place = 0;  // of the first element within its sample
  int64_t count = 0;  // elements of the unit
};

__device__ __forceinline__ int64_t least(int64_t a, int64_t b) {
  return a < b ? a : b;
}

__device__ __forceinline__ int64_t clamp(int64_t x, int64_t low, int64_t high) {
  return x < low ? low : x > high ? high : x;
}

// First and last row of a sample that exist: within the tensor whatever the layout says.
__device__ __forceinline__ int64_t begin_of(const PerturbTensor& t, int64_t b) {
  return clamp(t.cu_seqlens[b], 0, t.rows);
}
__device__ __forceinline__ int64_t end_of(const PerturbTensor& t, int64_t b) {
  const int64_t begin = begin_of(t, b), end = clamp(t.cu_seqlens[b + 1], begin, t.rows);
  return t.seqused ? least(end, begin + (t.seqused[b] > 0 ? t.seqused[b] : 0)) : end;
}

// Slots of a packed sample begin here, those of the next one at its end or behind: floor(x) + b grows by at
// least the tiles between.
__device__ __forceinline__ int64_t slot_of(const PerturbTensor& t, int64_t b) {
  return begin_of(t, b) * t.row_size / kTile + b;
}

// The last b of [0, n) for which holds(b), or 0.
template <class F>
__device__ __forceinline__ int64_t last_that(int64_t n, const F& holds) {
  int64_t low = 0, high = n;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (holds(middle) ? low : high) = middle;
  }
  return low;
}

__device__ inline Tile tile_of(const Part& part, int64_t slot) {
  const PerturbTensor& t = part.tensor;
  Tile tile;
  int64_t begin = 0, end = 0, piece = 0;  // elements of the unit, and which tile of it
  if (part.tiles == 0) {
    const int64_t b = last_that(t.batch, [&](int64_t b) { return slot_of(t, b) <= slot; });
    tile.sample = tile.unit = b;
    begin = begin_of(t, b) * t.row_size;
    end = end_of(t, b) * t.row_size;
    piece = slot - slot_of(t, b);
  } else if (t.token_size == 0) {
    tile.sample = tile.unit = slot / part.tiles;
    begin = tile.sample * t.row_size;
    end = begin + t.row_size;
    piece = slot % part.tiles;
  } else {
    tile.unit = slot / part.tiles;
    begin = tile.unit * t.token_size;
    end = begin + t.token_size;
    piece = slot % part.tiles;
    const int64_t row = begin / t.row_size;
    tile.sample = row;
    if (t.cu_seqlens) {
      tile.sample = last_that(t.batch, [&](int64_t b) { return t.cu_seqlens[b] <= row; });
      if (row < begin_of(t, tile.sample) || row >= end_of(t, tile.sample)) end = begin;
    }
  }
  const int64_t first = t.cu_seqlens ? begin_of(t, tile.sample) : tile.sample;
  tile.count = end - begin;
  tile.at = begin + piece * kTile;
  tile.n = piece < 0 ? 0 : clamp(end - tile.at, 0, kTile);
  tile.place = tile.at - first * t.row_size;
  tile.unit += part.first_unit;
  return tile;
}
// The slot of a group, and the tensor it belongs to; behind the last slot none.
template <int kThreads>
__device__ __forceinline__ const Part* part_of(const Launch& p, int64_t& slot) {
  slot = int64_t(blockIdx.x) * (kBlock / kThreads) + threadIdx.x / kThreads;
  if (slot >= p.slots) return nullptr;
  int which = 0;
  for (int i = 1; i < p.count; ++i) which += slot >= p.part[i].first_slot;
  return &p.part[which];
}

template <int V>
struct Values {
  float v[V];
};

// V numbers of a tensor from the given one on.
template <class T, int V>
__device__ __forceinline__ Values<V> read(const void* p, int64_t at) {
  Values<V> x;
  mmfast::read(static_cast<const T*>(p) + at, x.v);
  return x;
}

template <class T, int V>
__device__ __forceinline__ void write(void* p, int64_t at, const Values<V>& x) {
  mmfast::write(static_cast<T*>(p) + at, x.v);
}

// NaN as 0, infinities as the largest finite number.
__device__ __forceinline__ float finite(float g) {
  constexpr float kTop = 3.402823466e38f;
  return g != g ? 0.0f : fminf(fmaxf(g, -kTop), kTop);
}

// Clamp that keeps a NaN of v.
__device__ __forceinline__ float within(float v, float low, float high) {
  v = v < low ? low : v;
  return v > high ? high : v;
}

// The largest number of the dtype that is not above eps, so that stored values keep the limit.
template <class T>
__device__ __forceinline__ float round_down(float eps) {
  if constexpr (sizeof(T) == 4) {
    return eps;
  } else {
    T nearest = from_float<T>(eps);
    if (to_float(nearest) > eps) --nearest.bits;
    return to_float(nearest);
  }
}

// A group of kThreads threads has a tile; thread i takes V elements from the i-th V on.
template <int kThreads, int V, class F>
__device__ __forceinline__ void for_elements(const Tile& tile, const F& f) {
  for (int64_t i = int64_t(threadIdx.x % kThreads) * V; i < tile.n; i += kThreads * V) f(i);
}

template <int kThreads>
__device__ double group_sum(double value) {
  for (int bits = 16; bits; bits /= 2) value += __shfl_xor_sync(kAll, value, bits);
  if constexpr (kThreads > 32) {
    __shared__ double of_warp[kThreads / 32];
    __syncthreads();  // the sum before has been read
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = value;
    __syncthreads();
    value = 0;
    for (int i = 0; i < kThreads / 32; ++i) value += of_warp[i];
  }
  return value;
}

// 1 / norm as a power of two and the rest: the inverse of a tiny norm is no float32 number. 0 for a norm of
// 0.
struct Inverse {
  float scale = 1, rest = 0;
};
__device__ __forceinline__ Inverse inverse_of(double norm) {
  Inverse r;
  if (norm > 0) {
    int exponent;
    frexp(norm, &exponent);
    exponent = exponent < -126 ? -126 : exponent > 126 ? 126 : exponent;
    const double scale = ldexp(1.0, -exponent);
    r.scale = float(scale);
    r.rest = float(1 / (norm * scale));
  }
  return r;
}

// The factor that brings a vector into the ball.
__device__ __forceinline__ float shrink(double square, double eps) {
  return square > eps * eps ? float(eps / sqrt(square)) : 1.0f;
}

}  // namespace attack
}  // namespace cuda
}  // namespace mmfast
