// Attention, backward (Dao, FlashAttention-2, arXiv 2307.08691, algorithm 2). With p the weights, kept their
// dropout's factors, and delta = sum of dout * out over a row:
//   dv = (kept p)^T dout,  ds = p (kept dout v^T - delta) scale,  dk = ds^T q,  dq = ds k.
//
// Two kernels compute the scores anew: one owns a tile of keys and visits its queries, the other owns a tile
// of queries. Nothing is added to by two blocks: where blocks are few they share the other side, each with a
// float32 part of its own, and the parts are added in order.
#pragma once
#include "cuda/attention_tiles.cuh"

namespace mmfast {
namespace cuda {

template <class T, int kDim>
struct KeysShared {
  T keys[kTileRows * kDim];
  T values[kTileRows * kDim];
  T queries[2][kTileRows * kDim];
  T dout[2][kTileRows * kDim];
  float lse[kTileRows];  // in exponents of 2; infinity where nothing is seen, so that weights are 0
  float delta[kTileRows];
  uint64_t visible[kTileRows];
  uint64_t kept[kTileRows];
  uint8_t kinds[kThreads];
};

// lse, in exponents of 2, and delta of a virtual row of a tile.
struct RowState {
  float lse = kInfinity, delta = 0;
};
__device__ __forceinline__ RowState row_state(const CudaAttentionParams& p, const SampleTile& tile,
                                              int head_k, int group, int i) {
  RowState state;
  if (i >= tile.valid) return state;
  const int virtual_row = tile.first + i;
  const int64_t at =
      (head_k * group + virtual_row % group) * p.layout_q.total + tile.begin + virtual_row / group;
  const float lse = p.lse[at];
  if (lse == -kInfinity) return state;
  return {lse * kLog2e, p.delta[at]};
}

// Turns scores into weights as dv needs them, and dout v^T into the scores' gradients over scale. `cell(c,
// half)` says what there is to know of register 2 half + c % 2 of column block c / 2.
struct Cell {
  RowState row;
  bool seen, stays;
};
template <int kColumns, class CellOf>
__device__ __forceinline__ void differentiate(float (&s)[kColumns][4], float (&dp)[kColumns][4],
                                              const CudaAttentionParams& p, float keep_scale, CellOf cell) {
#pragma unroll
  for (int i = 0; i < 4 * kColumns; ++i) {
    const Cell at = cell(i / 4 * 2 + i % 2, i / 2 % 2);
    float& x = dp[i / 4][i % 4];
    x = (at.stays ? x * keep_scale : 0) - at.row.delta;
  }
  if (p.softcap > 0) {
#pragma unroll
    for (int i = 0; i < 4 * kColumns; ++i) {
      const float tanh = cap(s[i / 4][i % 4], p.inner);
      s[i / 4][i % 4] = tanh;
      dp[i / 4][i % 4] *= 1 - tanh * tanh;
    }
  }
#pragma unroll
  for (int i = 0; i < 4 * kColumns; ++i) {
    const Cell at = cell(i / 4 * 2 + i % 2, i / 2 % 2);
    float& x = s[i / 4][i % 4];
    x = at.seen ? exp2_approx(x * p.exponent - at.row.lse) : 0;
    dp[i / 4][i % 4] *= x;
    x = at.stays ? x * keep_scale : 0;
  }
}

template <class T, int kDim>
__global__ void __launch_bounds__(kThreads, 2) keys_kernel(const __grid_constant__ CudaAttentionParams p) {
  auto& shared = *reinterpret_cast<KeysShared<T, kDim>*>(shared_memory());
  const int group = p.heads / p.heads_k, head_k = int(blockIdx.y), part = int(blockIdx.z);
  const SampleTile tile = find_tile(p.layout_k, 1, blockIdx.x);
  if (tile.extent <= 0) return;
  SampleRows queries{};
  if (tile.valid > 0) queries = sample_rows(p.layout_q, tile.sample, group);
  Walk walk{p.mask, nullptr, nullptr, false, share_of(queries.tiles(), part, p.query_parts), shared.kinds};
  if (p.summaries && tile.valid > 0) {
    walk.own = p.summaries + p.tiles_q + blockIdx.x;
    walk.summaries = p.summaries + first_tile(p.layout_q, tile.sample, group);
  }
  const bool drops = p.dropout_p > 0;
  const float keep_scale = 1 / (1 - p.dropout_p);
  RowState coming;  // of one row of the tile that is on its way
  auto copy_queries = [&](int stage, int i) {
    const SampleTile q = queries.tile(i);
    copy_tile<kDim>(shared.queries[stage], q.valid, query_rows<T>(p.q, q, head_k, group));
    copy_tile<kDim>(shared.dout[stage], q.valid, query_rows<T>(p.dout, q, head_k, group));
    cp_async_commit();
    if (threadIdx.x < kTileRows) coming = row_state(p, q, head_k, group, int(threadIdx.x));
  };

  constexpr int kRows = kDim == 64 ? kStep : 16;  // of queries at a time
  const int first = warp_id() * kWarpRows, lane = lane_id();
  const bool works = first < tile.valid;
  float dk[kDim / 8][4] = {}, dv[kDim / 8][4] = {};
  int i = walk.visit(walk.range.begin);
  if (i < walk.range.end) {
    copy_tile<kDim>(shared.keys, tile.valid, key_rows<T>(p.k, tile, head_k));
    copy_tile<kDim>(shared.values, tile.valid, key_rows<T>(p.v, tile, head_k));
    copy_queries(0, i);
  }
  for (int stage = 0; i < walk.range.end; stage ^= 1) {
    const SampleTile q = queries.tile(i);
    const bool mixed = walk.kind != kFullTile || tile.valid < kTileRows;
    __syncthreads();  // all have done with the tile before
    if (threadIdx.x < kTileRows) {
      shared.lse[threadIdx.x] = coming.lse;
      shared.delta[threadIdx.x] = coming.delta;
    }
    if (mixed) write_visible(shared.visible, p, q, tile, walk.kind, group);
    if (drops) write_kept(shared.kept, p, q, tile.first, head_k, group);
    cp_async_wait<0>();
    __syncthreads();
    const int next = walk.visit(i + 1);
    if (next < walk.range.end) copy_queries(stage ^ 1, next);
    // A query's word holds 64 keys; those of a warp are one quarter.
    const uint16_t* const visible = reinterpret_cast<const uint16_t*>(shared.visible) + warp_id();
    const uint16_t* const kept = reinterpret_cast<const uint16_t*>(shared.kept) + warp_id();
    if (works) {
#pragma unroll 1
      for (int begin = 0; begin < q.valid; begin += kRows) {
        float s[kRows / 8][4] = {}, dp[kRows / 8][4] = {};
        uint32_t a[4];
#pragma unroll 4  // all eight of D = 128 would need more registers than there are
        for (int step = 0; step < kDim / 16; ++step) {
          load_a<kDim>(a, shared.keys, first, step);
          multiply_transposed<kDim>(s, a, shared.queries[stage], begin, step);
          load_a<kDim>(a, shared.values, first, step);
          multiply_transposed<kDim>(dp, a, shared.dout[stage], begin, step);
        }
        differentiate(s, dp, p, keep_scale, [&](int c, int half) {
          const int row = begin + c / 2 * 8 + lane % 4 * 2 + c % 2, key = lane / 4 + 8 * half;
          return Cell{{shared.lse[row], shared.delta[row]},
                      !mixed || (visible[4 * row] >> key & 1),
                      !drops || (kept[4 * row] >> key & 1)};
        });
#pragma unroll
        for (int step = 0; step < kRows / 16; ++step) {
          to_a<T>(a, s[2 * step], s[2 * step + 1]);
          multiply_rows<kDim>(dv, a, shared.dout[stage], begin + 16 * step);
          to_a<T>(a, dp[2 * step], dp[2 * step + 1]);
          multiply_rows<kDim>(dk, a, shared.queries[stage], begin + 16 * step);
        }
      }
    }
    i = next;
  }

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int own = first + lane / 4 + 8 * half;
    if (own >= tile.extent) continue;
    const bool exists = own < tile.valid;
    const int64_t row = tile.begin + tile.first + own;
    const int column = lane % 4 * 2;
    const bool split = p.query_parts > 1;
    const int64_t at = ((int64_t(part) * p.layout_k.total + row) * p.heads_k + head_k) * kDim + column;
    T* const dk_row = static_cast<T*>(p.dk.data) + row * p.dk.row + head_k * p.dk.head + column;
    T* const dv_row = static_cast<T*>(p.dv.data) + row * p.dv.row + head_k * p.dv.head + column;
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) {
      const float k0 = exists ? dk[n][2 * half] * p.scale : 0,
                  k1 = exists ? dk[n][2 * half + 1] * p.scale : 0;
      const float v0 = exists ? dv[n][2 * half] : 0, v1 = exists ? dv[n][2 * half + 1] : 0;
      if (split) {
        store_pair(p.dk_parts + at + 8 * n, k0, k1);
        store_pair(p.dv_parts + at + 8 * n, v0, v1);
      } else {
        store_pair(dk_row + 8 * n, k0, k1);
        store_pair(dv_row + 8 * n, v0, v1);
      }
    }
  }
}

template <class T, int kDim>
struct QueriesShared {
  T queries[kTileRows * kDim];
  T dout[kTileRows * kDim];
  T keys[2][kTileRows * kDim];
  T values[2][kTileRows * kDim];
  uint64_t visible[kTileRows];
  uint64_t kept[kTileRows];
  uint8_t kinds[kThreads];
};

template <class T, int kDim>
__global__ void __launch_bounds__(kThreads, kDim == 64 ? 3 : 2)
    queries_kernel(const __grid_constant__ CudaAttentionParams p) {
  auto& shared = *reinterpret_cast<QueriesShared<T, kDim>*>(shared_memory());
  const int group = p.heads / p.heads_k, head_k = int(blockIdx.y), part = int(blockIdx.z);
  const SampleTile tile = find_tile(p.layout_q, group, blockIdx.x);
  if (tile.extent <= 0) return;
  SampleRows keys{};
  if (tile.valid > 0) keys = sample_rows(p.layout_k, tile.sample, 1);
  Walk walk{p.mask, nullptr, nullptr, true, share_of(keys.tiles(), part, p.key_parts), shared.kinds};
  if (p.summaries && tile.valid > 0) {
    walk.own = p.summaries + blockIdx.x;
    walk.summaries = p.summaries + p.tiles_q + first_tile(p.layout_k, tile.sample, 1);
  }
  const bool drops = p.dropout_p > 0;
  const float keep_scale = 1 / (1 - p.dropout_p);
  auto copy_keys = [&](int stage, int i) {
    const SampleTile k = keys.tile(i);
    copy_tile<kDim>(shared.keys[stage], k.valid, key_rows<T>(p.k, k, head_k));
    copy_tile<kDim>(shared.values[stage], k.valid, key_rows<T>(p.v, k, head_k));
    cp_async_commit();
  };

  const int first = warp_id() * kWarpRows, lane = lane_id();
  const bool works = first < tile.valid;
  float dq[kDim / 8][4] = {};
  RowState state[2];
  int i = walk.visit(walk.range.begin);
  if (i < walk.range.end) {
    copy_tile<kDim>(shared.queries, tile.valid, query_rows<T>(p.q, tile, head_k, group));
    copy_tile<kDim>(shared.dout, tile.valid, query_rows<T>(p.dout, tile, head_k, group));
    copy_keys(0, i);
#pragma unroll
    for (int half = 0; half < 2; ++half)
      state[half] = row_state(p, tile, head_k, group, first + lane / 4 + 8 * half);
  }
  for (int stage = 0; i < walk.range.end; stage ^= 1) {
    cp_async_wait<0>();
    __syncthreads();
    const TileKind kind = walk.kind;
    const int next = walk.visit(i + 1);
    if (next < walk.range.end) copy_keys(stage ^ 1, next);
    const SampleTile k = keys.tile(i);
    const bool mixed = kind != kFullTile || k.valid < kTileRows;
    if (works) {
      __syncwarp();
      if (mixed) write_visible(shared.visible, p, tile, k, kind, group);
      if (drops) write_kept(shared.kept, p, tile, k.first, head_k, group);
      __syncwarp();
#pragma unroll 1
      for (int begin = 0; begin < k.valid; begin += kStep) {
        float s[kStepColumns][4] = {}, dp[kStepColumns][4] = {};
        uint32_t a[4];
#pragma unroll 4  // all eight of D = 128 would need more registers than there are
        for (int step = 0; step < kDim / 16; ++step) {
          load_a<kDim>(a, shared.queries, first, step);
          multiply_transposed<kDim>(s, a, shared.keys[stage], begin, step);
          load_a<kDim>(a, shared.dout, first, step);
          multiply_transposed<kDim>(dp, a, shared.values[stage], begin, step);
        }
        const int row = first + lane / 4, shift = begin + lane % 4 * 2;
        uint32_t seen[2], stays[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          seen[half] = mixed ? uint32_t(shared.visible[row + 8 * half] >> shift) : ~0u;
          stays[half] = drops ? uint32_t(shared.kept[row + 8 * half] >> shift) : ~0u;
        }
        differentiate(s, dp, p, keep_scale, [&](int c, int half) {
          const int bit = c / 2 * 8 + c % 2;
          return Cell{state[half], bool(seen[half] >> bit & 1), bool(stays[half] >> bit & 1)};
        });
#pragma unroll
        for (int step = 0; step < kStep / 16; ++step) {
          to_a<T>(a, dp[2 * step], dp[2 * step + 1]);
          multiply_rows<kDim>(dq, a, shared.keys[stage], begin + 16 * step);
        }
      }
    }
    i = next;
  }

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int own = first + lane / 4 + 8 * half;
    if (own >= tile.extent) continue;
    const bool exists = own < tile.valid;
    const int virtual_row = tile.first + own;
    const int64_t row = tile.begin + virtual_row / group, head = head_k * group + virtual_row % group;
    const int column = lane % 4 * 2;
    float* const part_row =
        p.rows_parts + ((int64_t(part) * p.layout_q.total + row) * p.heads + head) * kDim + column;
    T* const dq_row = static_cast<T*>(p.dq.data) + row * p.dq.row + head * p.dq.head + column;
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) {
      const float x = exists ? dq[n][2 * half] * p.scale : 0, y = exists ? dq[n][2 * half + 1] * p.scale : 0;
      if (p.key_parts > 1)
        store_pair(part_row + 8 * n, x, y);
      else
        store_pair(dq_row + 8 * n, x, y);
    }
  }
}

// delta of every row and head. One warp each; rows that see nothing, and those outside the layout, are not
// read.
template <class T, int kDim>
__global__ void __launch_bounds__(kThreads) delta_kernel(const __grid_constant__ CudaAttentionParams p) {
  const int64_t line = int64_t(blockIdx.x) * (kThreads / 32) + warp_id();
  if (line >= p.layout_q.total * p.heads) return;
  const int64_t row = line / p.heads, head = line % p.heads;
  const int64_t at = head * p.layout_q.total + row;
  float sum = 0;
  if (p.lse[at] != -kInfinity) {
    const T* const out = static_cast<const T*>(p.out.data) + row * p.out.row + head * p.out.head;
    const T* const dout = static_cast<const T*>(p.dout.data) + row * p.dout.row + head * p.dout.head;
#pragma unroll
    for (int d = lane_id(); d < kDim; d += 32) sum += to_float(out[d]) * to_float(dout[d]);
  }
#pragma unroll
  for (int bit = 16; bit; bit /= 2) sum += __shfl_xor_sync(kAllLanes, sum, bit);
  if (lane_id() == 0) p.delta[at] = sum;
}

template <class T>
struct SumParams {
  const float* parts;  // [count, size]
  int count;
  int64_t size;  // even
  T* sum;        // [size]
};

// Parts added in order, two numbers per thread.
template <class T>
__global__ void __launch_bounds__(kThreads) sum_kernel(const __grid_constant__ SumParams<T> p) {
  const int64_t i = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * 2;
  if (i >= p.size) return;
  float x = 0, y = 0;
  for (int part = 0; part < p.count; ++part) {
    const float* const from = p.parts + part * p.size + i;
    x += from[0];
    y += from[1];
  }
  store_pair(p.sum + i, x, y);
}

template <class T>
void launch_sum(const float* parts, int count, int64_t size, const HeadsView& sum, void* stream) {
  const int64_t blocks = (size / 2 + kThreads - 1) / kThreads;
  launch(sum_kernel<T>, dim3(unsigned(blocks)), dim3(kThreads), 0, stream,
         SumParams<T>{parts, count, size, static_cast<T*>(sum.data)}, "attention_backward");
}

constexpr size_t kMostShared = 99 << 10;  // of a block on sm_86 and sm_89

template <class T, int kDim>
void launch_backward(const CudaAttentionParams& p, void* stream) {
  static_assert(sizeof(KeysShared<T, kDim>) <= kMostShared && sizeof(QueriesShared<T, kDim>) <= kMostShared);
  const char* op = "attention_backward";
  const dim3 block(kThreads);
  const int64_t lines = p.layout_q.total * p.heads, warps = kThreads / 32;
  launch(delta_kernel<T, kDim>, dim3(unsigned((lines + warps - 1) / warps)), block, 0, stream, p, op);
  launch(keys_kernel<T, kDim>, dim3(unsigned(p.tiles_k), unsigned(p.heads_k), unsigned(p.query_parts)), block,
         sizeof(KeysShared<T, kDim>), stream, p, op);
  launch(queries_kernel<T, kDim>, dim3(unsigned(p.tiles_q), unsigned(p.heads_k), unsigned(p.key_parts)),
         block, sizeof(QueriesShared<T, kDim>), stream, p, op);
  if (p.query_parts > 1) {
    const int64_t size = p.layout_k.total * p.heads_k * kDim;
    launch_sum<T>(p.dk_parts, p.query_parts, size, p.dk, stream);
    launch_sum<T>(p.dv_parts, p.query_parts, size, p.dv, stream);
  }
  if (p.key_parts > 1) launch_sum<T>(p.rows_parts, p.key_parts, lines * kDim, p.dq, stream);
}

}  // namespace cuda
}  // namespace mmfast
