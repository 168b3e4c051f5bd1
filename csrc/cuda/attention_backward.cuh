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

constexpr int kStep = 32;  // columns of the other side at a time: more would not fit into registers
constexpr int kStepColumns = kStep / 8;

template <class T, int kDim>
struct KeysShared {
  T keys[kTileRows * kDim];
  T values[kTileRows * kDim];
  T queries[2][kTileRows * kDim];
  T dout[2][kTileRows * kDim];
  float lse[2][kTileRows];  // in exponents of 2; infinity where nothing is seen, so that weights are 0
  float delta[2][kTileRows];
  uint64_t visible[2][kTileRows];
  uint64_t kept[2][kTileRows];
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
  const int64_t virtual_row = tile.first + i;
  const int64_t at =
      (head_k * group + virtual_row % group) * p.layout_q.total + tile.begin + virtual_row / group;
  const float lse = p.lse[at];
  if (lse == -kInfinity) return state;
  return {lse * kLog2e, p.delta[at]};
}

// From a raw score and dout v^T to the weight as dv needs it, and to the score's gradient over scale.
struct Cell {
  float weight, ds;
};
__device__ __forceinline__ Cell differentiate(float s, float dp, RowState row, bool seen, bool stays,
                                              const CudaAttentionParams& p, float keep_scale) {
  float slope = 1;
  if (p.softcap > 0) {
    s = cap(s, p.inner);
    slope = 1 - s * s;
  }
  const float weight = seen ? exp2_approx(s * p.exponent - row.lse) : 0;
  const float gradient = stays ? dp * keep_scale : 0;
  return {stays ? weight * keep_scale : 0, weight * (gradient - row.delta) * slope};
}

template <class T, int kDim>
__global__ void __launch_bounds__(kThreads) keys_kernel(const __grid_constant__ CudaAttentionParams p) {
  auto& shared = *reinterpret_cast<KeysShared<T, kDim>*>(shared_memory());
  const int group = p.heads / p.heads_k, head_k = int(blockIdx.y), part = int(blockIdx.z);
  const SampleTile tile = find_tile(p.layout_k, 1, blockIdx.x);
  if (tile.extent <= 0) return;
  SampleRows queries{};
  if (tile.valid > 0) queries = sample_rows(p.layout_q, tile.sample, group);
  Walk walk{p.mask, nullptr, {}, false, share_of(queries.tiles(), part, p.query_parts), shared.kinds};
  if (p.summaries && tile.valid > 0) {
    walk.own = p.summaries[p.tiles_q + blockIdx.x];
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
    if (threadIdx.x < kTileRows) {
      shared.lse[stage][threadIdx.x] = coming.lse;
      shared.delta[stage][threadIdx.x] = coming.delta;
    }
    if (mixed) write_visible(shared.visible[stage], p, q, tile, walk.kind, group);
    if (drops) write_kept(shared.kept[stage], p, q, tile.first, head_k, group);
    cp_async_wait<0>();
    __syncthreads();
    const int next = walk.visit(i + 1);
    if (next < walk.range.end) copy_queries(stage ^ 1, next);
    // A query's word holds 64 keys; those of a warp are one quarter.
    const uint16_t* const visible = reinterpret_cast<const uint16_t*>(shared.visible[stage]) + warp_id();
    const uint16_t* const kept = reinterpret_cast<const uint16_t*>(shared.kept[stage]) + warp_id();
    if (works) {
#pragma unroll 1
      for (int begin = 0; begin < q.valid; begin += kStep) {
        float s[kStepColumns][4] = {}, dp[kStepColumns][4] = {};
        uint32_t a[4];
#pragma unroll 4  // more would not fit into registers
        for (int step = 0; step < kDim / 16; ++step) {
          load_a<kDim>(a, shared.keys, first, step);
          multiply_transposed<kDim>(s, a, shared.queries[stage], begin, step);
          load_a<kDim>(a, shared.values, first, step);
          multiply_transposed<kDim>(dp, a, shared.dout[stage], begin, step);
        }
#pragma unroll
        for (int c = 0; c < 2 * kStepColumns; ++c) {
          const int row = begin + c / 2 * 8 + lane % 4 * 2 + c % 2;
          const RowState state{shared.lse[stage][row], shared.delta[stage][row]};
          const int seen = mixed ? visible[4 * row] >> (lane / 4) : ~0;
          const int stays = drops ? kept[4 * row] >> (lane / 4) : ~0;
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            float &x = s[c / 2][2 * half + c % 2], &y = dp[c / 2][2 * half + c % 2];
            const Cell cell =
                differentiate(x, y, state, seen >> (8 * half) & 1, stays >> (8 * half) & 1, p, keep_scale);
            x = cell.weight;
            y = cell.ds;
          }
        }
#pragma unroll
        for (int step = 0; step < kStep / 16; ++step) {
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
__global__ void __launch_bounds__(kThreads) queries_kernel(const __grid_constant__ CudaAttentionParams p) {
  auto& shared = *reinterpret_cast<QueriesShared<T, kDim>*>(shared_memory());
  const int group = p.heads / p.heads_k, head_k = int(blockIdx.y), part = int(blockIdx.z);
  const SampleTile tile = find_tile(p.layout_q, group, blockIdx.x);
  if (tile.extent <= 0) return;
  SampleRows keys{};
  if (tile.valid > 0) keys = sample_rows(p.layout_k, tile.sample, 1);
  Walk walk{p.mask, nullptr, {}, true, share_of(keys.tiles(), part, p.key_parts), shared.kinds};
  if (p.summaries && tile.valid > 0) {
    walk.own = p.summaries[blockIdx.x];
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
#pragma unroll
        for (int step = 0; step < kDim / 16; ++step) {
          load_a<kDim>(a, shared.queries, first, step);
          multiply_transposed<kDim>(s, a, shared.keys[stage], begin, step);
          load_a<kDim>(a, shared.dout, first, step);
          multiply_transposed<kDim>(dp, a, shared.values[stage], begin, step);
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = first + lane / 4 + 8 * half, shift = begin + lane % 4 * 2;
          const uint32_t seen = mixed ? uint32_t(shared.visible[row] >> shift) : ~0u;
          const uint32_t stays = drops ? uint32_t(shared.kept[row] >> shift) : ~0u;
#pragma unroll
          for (int c = 0; c < 2 * kStepColumns; ++c) {
            float& y = dp[c / 2][2 * half + c % 2];
            const int bit = c / 2 * 8 + c % 2;
            y = differentiate(s[c / 2][2 * half + c % 2], y, state[half], seen >> bit & 1, stays >> bit & 1,
                              p, keep_scale)
                    .ds;
          }
        }
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
    const int64_t virtual_row = tile.first + own;
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

template <class T, int kDim>
void launch_backward(const CudaAttentionParams& p, void* stream) {
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
