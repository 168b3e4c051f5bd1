// What the attention kernels share: tiles in shared memory, their products on the tensor cores, which tiles a
// block visits, and which cells of a tile are visible or dropped.
//
// A block is four warps. A tile holds kTileRows rows; warp w owns rows 16 w to 16 w + 15 of the side that
// accumulates.
#pragma once
#include "cuda/launch.h"
#include "cuda/ptx.h"
#include "mmfast/attention.h"
#include "mmfast/attention_schedule.h"
#include "mmfast/rng.h"

namespace mmfast {
namespace cuda {

constexpr int kThreads = 128;
constexpr int kWarpRows = 16;
constexpr int kStep = 32;  // columns of the other side at a time: more would not fit into registers
constexpr int kStepColumns = kStep / 8;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr float kLog2e = 1.44269504f;
constexpr float kLn2 = 0.693147181f;
constexpr float kInfinity = __builtin_huge_valf();
static_assert(kThreads / 32 * kWarpRows == kTileRows);

__device__ __forceinline__ int lane_id() {
  return int(threadIdx.x) % 32;
}
__device__ __forceinline__ int warp_id() {
  return int(threadIdx.x) / 32;
}

// Tiles in shared memory: [kTileRows][kDim], chunks of 8 elements permuted within a row, so that the eight
// rows that ldmatrix reads at a time lie in different banks.
template <int kDim>
__device__ __forceinline__ int place(int row, int chunk) {
  return row * kDim + (chunk ^ (row & 7)) * 8;
}

// Begins to copy `count` rows into a tile; zeros behind them. `row_of(i)` points to row i.
template <int kDim, class T, class RowOf>
__device__ __forceinline__ void copy_tile(T* tile, int count, RowOf row_of) {
  constexpr int kChunks = kDim / 8, kRowsAtOnce = kThreads / kChunks;
  const int chunk = int(threadIdx.x) % kChunks;
#pragma unroll 2
  for (int i = 0; i < kTileRows; i += kRowsAtOnce) {
    const int row = i + int(threadIdx.x) / kChunks;
    const bool valid = row < count;
    cp_async_16(tile + place<kDim>(row, chunk), row_of(valid ? row : 0) + chunk * 8, valid);
  }
}

// Row i of a tile of virtual query rows. Without any valid row the address is not read.
template <class T>
struct QueryRows {
  const T* base;
  int64_t row, head;
  int first, group;
  __device__ __forceinline__ const T* operator()(int i) const {
    const int virtual_row = first + i;
    return base + virtual_row / group * row + virtual_row % group * head;
  }
};
template <class T>
__device__ __forceinline__ QueryRows<T> query_rows(const HeadsView& view, const SampleTile& tile, int head_k,
                                                   int group) {
  return {static_cast<const T*>(view.data) + tile.begin * view.row + int64_t(head_k) * group * view.head,
          view.row, view.head, tile.first, group};
}

template <class T>
struct KeyRows {
  const T* base;
  int64_t row;
  __device__ __forceinline__ const T* operator()(int i) const { return base + i * row; }
};
template <class T>
__device__ __forceinline__ KeyRows<T> key_rows(const HeadsView& view, const SampleTile& tile, int head_k) {
  return {
      static_cast<const T*>(view.data) + (tile.begin + tile.first) * view.row + int64_t(head_k) * view.head,
      view.row};
}

// Fragments of mma_16816 from a tile. a: 16 rows from `row` on, dims 16 step to 16 step + 15.
template <int kDim, class T>
__device__ __forceinline__ void load_a(uint32_t (&a)[4], const T* tile, int row, int step) {
  ldmatrix_x4(a, tile + place<kDim>(row + lane_id() % 16, 2 * step + lane_id() / 16));
}

// d[n] += a b^T for rows of b from `row` + 8 n on; a is one step of dims.
template <int kDim, int kColumns, class T>
__device__ __forceinline__ void multiply_transposed(float (&d)[kColumns][4], const uint32_t (&a)[4],
                                                    const T* b, int row, int step) {
#pragma unroll
  for (int n = 0; n < kColumns; n += 2) {
    uint32_t r[4];
    const int lane = lane_id();
    ldmatrix_x4(r, b + place<kDim>(row + 8 * n + lane / 16 * 8 + lane % 8, 2 * step + lane / 8 % 2));
    mma_16816<T>(d[n], a, {r[0], r[1]});
    mma_16816<T>(d[n + 1], a, {r[2], r[3]});
  }
}

// d += a b for 16 rows of b from `row` on.
template <int kDim, class T>
__device__ __forceinline__ void multiply_rows(float (&d)[kDim / 8][4], const uint32_t (&a)[4], const T* b,
                                              int row) {
#pragma unroll
  for (int n = 0; n < kDim / 8; n += 2) {
    uint32_t r[4];
    ldmatrix_x4_trans(r, b + place<kDim>(row + lane_id() % 16, n + lane_id() / 16));
    mma_16816<T>(d[n], a, {r[0], r[1]});
    mma_16816<T>(d[n + 1], a, {r[2], r[3]});
  }
}

// Two 16 x 8 results side by side, as the left operand of the next product.
template <class T>
__device__ __forceinline__ void to_a(uint32_t (&a)[4], const float (&left)[4], const float (&right)[4]) {
  a[0] = pack2<T>(left[0], left[1]);
  a[1] = pack2<T>(left[2], left[3]);
  a[2] = pack2<T>(right[0], right[1]);
  a[3] = pack2<T>(right[2], right[3]);
}

__device__ __forceinline__ float max_of_row(float x) {
  x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, 1));
  return fmaxf(x, __shfl_xor_sync(kAllLanes, x, 2));
}
__device__ __forceinline__ float sum_of_row(float x) {
  x += __shfl_xor_sync(kAllLanes, x, 1);
  return x + __shfl_xor_sync(kAllLanes, x, 2);
}

template <class T>
__device__ __forceinline__ void store_pair(T* to, float x, float y) {
  *reinterpret_cast<uint32_t*>(to) = pack2<T>(x, y);
}
template <>
__device__ __forceinline__ void store_pair(float* to, float x, float y) {
  *reinterpret_cast<float2*>(to) = make_float2(x, y);
}

// Softcap: the tanh of a score times `inner`. Off by no more than a rounding of 1, which is far below what
// scores of 16-bit operands are off.
__device__ __forceinline__ float cap(float score, float inner) {
  return 1 - __fdividef(2.0f, exp2_approx(score * inner * (2 * kLog2e)) + 1);
}

// The tiles of the other side that a block visits, in order; those that the mask skips are left out. All
// threads of the block call together.
struct Walk {
  const Mask& mask;
  const TileSummary* summaries;  // of the sample's tiles on the other side; null: all are full
  const TileSummary* own;
  bool own_queries;
  TileRange range;
  uint8_t* kinds;  // shared, [kThreads]
  int known = 0;   // kinds holds those of tiles known - kThreads to known - 1
  TileKind kind = kFullTile;

  // The first tile from `tile` on, or range.end; `kind` is then its kind.
  __device__ __forceinline__ int visit(int tile) {
    if (!summaries) return tile;
    for (; tile < range.end; ++tile) {
      if (tile >= known) classify_from(tile);
      kind = TileKind(kinds[tile - (known - kThreads)]);
      if (kind != kSkip) break;
    }
    return tile;
  }

  __device__ __forceinline__ void classify_from(int tile) {
    __syncthreads();
    const int mine = tile + int(threadIdx.x);
    TileKind found = kSkip;
    if (mine < range.end) {
      const TileSummary other = summaries[mine];
      found = own_queries ? classify(mask, *own, other) : classify(mask, other, *own);
    }
    kinds[threadIdx.x] = found;
    known = tile + kThreads;
    __syncthreads();
  }
};

// Bit j of word i: row i of a tile of queries sees key j of a tile. A warp writes the words of its rows.
__device__ __forceinline__ void write_visible(uint64_t* words, const CudaAttentionParams& p,
                                              const SampleTile& q, const SampleTile& k, TileKind kind,
                                              int group) {
  const int lane = lane_id(), first = warp_id() * kWarpRows;
  uint64_t mine = k.valid < 64 ? (uint64_t(1) << k.valid) - 1 : ~uint64_t(0);
  if (kind == kPartial) {
    const uint64_t exist = mine;
    int modality[2], time[2], position[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int key = lane + 32 * i;
      const int row = k.first + (key < k.valid ? key : 0);
      modality[i] = modality_of(p.layout_k, k.begin, row);
      time[i] = time_of(p.layout_k, k.sample, k.begin, row);
      position[i] = position_of(p.layout_k, k.sample, row);
    }
    const int own = first + lane % kWarpRows;
    const int row = (q.first + (own < q.valid ? own : 0)) / group;
    const int own_modality = modality_of(p.layout_q, q.begin, row);
    const int own_time = time_of(p.layout_q, q.sample, q.begin, row);
    const int own_position = position_of(p.layout_q, q.sample, row);
#pragma unroll 1
    for (int r = 0; r < kWarpRows; ++r) {
      const int64_t rules = p.mask.rules[__shfl_sync(kAllLanes, own_modality, r)];
      const int time_q = __shfl_sync(kAllLanes, own_time, r),
                position_q = __shfl_sync(kAllLanes, own_position, r);
      uint64_t seen = 0;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const bool holds = rule_holds(Rule((rules >> (3 * modality[i])) & 7), time_q, time[i]) &&
                           window_holds(p.mask, position_q, position[i]);
        seen |= uint64_t(__ballot_sync(kAllLanes, holds)) << (32 * i);
      }
      if (lane == r) mine = seen & exist;
    }
  }
  if (lane < kWarpRows) words[first + lane] = mine;
}

// Bit j of word i: dropout keeps the weight of key j of row i (mmfast/reference/attention.py, dropout_keep).
// A warp writes the words of its rows.
__device__ __forceinline__ void write_kept(uint64_t* words, const CudaAttentionParams& p, const SampleTile& q,
                                           int key, int head_k, int group) {
  const int row = warp_id() * kWarpRows + lane_id() / 2, half = lane_id() % 2;
  const int virtual_row = q.first + row;
  const uint32_t head = uint32_t(head_k * group + virtual_row % group);
  const uint64_t seed = uint64_t(*p.seed_on_device);
  uint32_t kept[4] = {};
#pragma unroll 1
  for (int i = 0; i < 8; ++i) {
    const Philox4 r = philox(seed, head, uint32_t(q.sample), uint32_t(virtual_row / group),
                             uint32_t(key / 64 * 16 + half * 8 + i));
    const uint32_t word[4] = {r.x, r.y, r.z, r.w};
#pragma unroll
    for (int w = 0; w < 4; ++w) kept[w] |= uint32_t(uniform_from(word[w]) >= p.dropout_p) << i;
  }
  uint8_t* bytes = reinterpret_cast<uint8_t*>(words + row);
#pragma unroll
  for (int w = 0; w < 4; ++w) bytes[2 * w + half] = uint8_t(kept[w]);
}

// Kernels for one head dimension and dtype, in files of their own.
template <class T, int kDim>
void launch_forward(const CudaAttentionParams& p, void* stream);
template <class T, int kDim>
void launch_backward(const CudaAttentionParams& p, void* stream);

}  // namespace cuda
}  // namespace mmfast
