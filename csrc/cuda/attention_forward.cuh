// Attention, forward: out = softmax(rule(softcap(scale * q k^T))) v over packed samples. Online softmax over
// tiles of keys (Milakov and Gimelshein 2018; Dao, FlashAttention-2, arXiv 2307.08691, algorithm 1).
//
// A block owns a tile of virtual query rows of one key head, and its share of the sample's keys: where
// queries are few, several blocks divide the keys and combine_kernel adds up what they found. Queries stay in
// registers; tiles of keys and values come through two stages of shared memory.
#pragma once
#include "cuda/attention_tiles.cuh"

namespace mmfast {
namespace cuda {

template <class T, int kDim>
struct ForwardShared {
  T keys[2][kTileRows * kDim];
  T values[2][kTileRows * kDim];
  uint64_t visible[kTileRows];
  uint64_t kept[kTileRows];
  uint8_t kinds[kThreads];
};

// What a thread knows of its two rows, lane / 4 and lane / 4 + 8 of its warp's.
template <int kDim>
struct Accumulator {
  float out[kDim / 8][4] = {};
  float peak[2] = {-kInfinity, -kInfinity};
  float total[2] = {0, 0};
};

// Cells of keys from `begin` on whose bit is not set become `other`; `words`: those of the tile's rows.
__device__ __forceinline__ void select(float (&s)[kStepColumns][4], const uint64_t* words, int begin,
                                       float other) {
  const int row = warp_id() * kWarpRows + lane_id() / 4, shift = begin + lane_id() % 4 * 2;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint32_t bits = uint32_t(words[row + 8 * half] >> shift);
#pragma unroll
    for (int i = 0; i < 2 * kStepColumns; ++i)
      if (!(bits >> (i / 2 * 8 + i % 2) & 1)) s[i / 2][2 * half + i % 2] = other;
  }
}

// kStep keys of a tile from `begin` on. `visible` and `kept` are null where all cells are.
template <class T, int kDim>
__device__ __forceinline__ void attend(Accumulator<kDim>& acc, const uint32_t (&queries)[kDim / 16][4],
                                       const T* keys, const T* values, int begin, const uint64_t* visible,
                                       const uint64_t* kept, const CudaAttentionParams& p, float exponent) {
  float s[kStepColumns][4] = {};
#pragma unroll
  for (int step = 0; step < kDim / 16; ++step) multiply_transposed<kDim>(s, queries[step], keys, begin, step);
  if (p.softcap > 0) {
#pragma unroll
    for (int i = 0; i < 4 * kStepColumns; ++i) s[i / 4][i % 4] = cap(s[i / 4][i % 4], p.inner);
  }
  if (visible) select(s, visible, begin, -kInfinity);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float peak = acc.peak[half];
#pragma unroll
    for (int i = 0; i < 2 * kStepColumns; ++i) peak = fmaxf(peak, s[i / 2][2 * half + i % 2]);
    peak = max_of_row(peak);
    // Nothing seen so far: exponents of minus infinity, not of infinity minus infinity.
    const float shift = peak == -kInfinity ? 0 : peak * exponent;
    const float rescale = exp2_approx(acc.peak[half] * exponent - shift);
    acc.peak[half] = peak;
    acc.total[half] *= rescale;
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) {
      acc.out[n][2 * half] *= rescale;
      acc.out[n][2 * half + 1] *= rescale;
    }
#pragma unroll
    for (int i = 0; i < 2 * kStepColumns; ++i) {
      float& x = s[i / 2][2 * half + i % 2];
      x = exp2_approx(x * exponent - shift);
      acc.total[half] += x;
    }
  }
  if (kept) select(s, kept, begin, 0);
#pragma unroll
  for (int step = 0; step < kStep / 16; ++step) {
    uint32_t weights[4];
    to_a<T>(weights, s[2 * step], s[2 * step + 1]);
    multiply_rows<kDim>(acc.out, weights, values, begin + 16 * step);
  }
}

template <class T, int kDim>
__global__ void __launch_bounds__(kThreads, kDim == 64 ? 3 : 2)
    forward_kernel(const __grid_constant__ CudaAttentionParams p) {
  auto& shared = *reinterpret_cast<ForwardShared<T, kDim>*>(shared_memory());
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
  auto copy_keys = [&](int stage, int i) {
    const SampleTile k = keys.tile(i);
    copy_tile<kDim>(shared.keys[stage], k.valid, key_rows<T>(p.k, k, head_k));
    copy_tile<kDim>(shared.values[stage], k.valid, key_rows<T>(p.v, k, head_k));
    cp_async_commit();
  };

  const int first = warp_id() * kWarpRows;
  const bool works = first < tile.valid;
  Accumulator<kDim> acc;
  const float exponent = fabsf(p.exponent);
  int i = walk.visit(walk.range.begin);
  if (i < walk.range.end) {
    // The queries pass through the second stage, which is free until the first tile of keys is at work.
    copy_tile<kDim>(shared.keys[1], tile.valid, query_rows<T>(p.q, tile, head_k, group));
    copy_keys(0, i);
    cp_async_wait<0>();
    __syncthreads();
    uint32_t queries[kDim / 16][4];
    // The largest exponent belongs to the largest product: a negative factor goes into the queries.
    const uint32_t sign = p.exponent < 0 ? 0x80008000u : 0;
#pragma unroll
    for (int step = 0; step < kDim / 16; ++step) {
      load_a<kDim>(queries[step], shared.keys[1], first, step);
#pragma unroll
      for (int r = 0; r < 4; ++r) queries[step][r] ^= sign;
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
        if (p.dropout_p > 0) write_kept(shared.kept, p, tile, k.first, head_k, group);
        __syncwarp();
#pragma unroll 1
        for (int begin = 0; begin < k.valid; begin += kStep)
          attend<T, kDim>(acc, queries, shared.keys[stage], shared.values[stage], begin,
                          mixed ? shared.visible : nullptr, p.dropout_p > 0 ? shared.kept : nullptr, p,
                          exponent);
      }
      i = next;
    }
  }

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int own = first + lane_id() / 4 + 8 * half;
    const float total = sum_of_row(acc.total[half]);
    if (own >= tile.extent) continue;
    const bool sees = own < tile.valid && total != 0;
    const float factor = sees ? 1 / (total * (1 - p.dropout_p)) : 0;
    const int virtual_row = tile.first + own;
    const int64_t row = tile.begin + virtual_row / group, head = head_k * group + virtual_row % group;
    const bool split = p.key_parts > 1;
    float* const lse = split ? p.lse_parts + int64_t(part) * p.heads * p.layout_q.total : p.lse;
    if (lane_id() % 4 == 0)
      lse[head * p.layout_q.total + row] =
          sees ? (acc.peak[half] * exponent + log2f(total)) * kLn2 : -kInfinity;
    const int column = lane_id() % 4 * 2;
    float* const part_row =
        p.rows_parts + ((int64_t(part) * p.layout_q.total + row) * p.heads + head) * kDim + column;
    T* const out_row = static_cast<T*>(p.out.data) + row * p.out.row + head * p.out.head + column;
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) {
      const float x = sees ? acc.out[n][2 * half] * factor : 0,
                  y = sees ? acc.out[n][2 * half + 1] * factor : 0;
      if (split)
        store_pair(part_row + 8 * n, x, y);
      else
        store_pair(out_row + 8 * n, x, y);
    }
  }
}

// The parts' outputs, weighted by their share of the softmax's denominator, in order. One warp per row and
// head.
template <class T, int kDim>
__global__ void __launch_bounds__(kThreads) combine_kernel(const __grid_constant__ CudaAttentionParams p) {
  const int64_t lines = p.layout_q.total * p.heads;
  const int64_t line = int64_t(blockIdx.x) * (kThreads / 32) + warp_id();
  if (line >= lines) return;
  const int64_t row = line / p.heads, head = line % p.heads;
  const float* const lse = p.lse_parts + head * p.layout_q.total + row;
  float peak = -kInfinity;
  for (int part = 0; part < p.key_parts; ++part) peak = fmaxf(peak, lse[part * lines]);
  constexpr int kEach = kDim / 32;
  const float* const rows = p.rows_parts + line * kDim + lane_id() * kEach;
  float total = 0, out[kEach] = {};
  for (int part = 0; part < p.key_parts; ++part) {
    const float share = lse[part * lines];
    if (share == -kInfinity) continue;  // saw nothing
    const float weight = exp2_approx((share - peak) * kLog2e);
    total += weight;
#pragma unroll
    for (int i = 0; i < kEach; ++i) out[i] += weight * rows[part * lines * kDim + i];
  }
  const float factor = total == 0 ? 0 : 1 / total;
  if (lane_id() == 0) p.lse[head * p.layout_q.total + row] = total == 0 ? -kInfinity : peak + logf(total);
  T* const to = static_cast<T*>(p.out.data) + row * p.out.row + head * p.out.head + lane_id() * kEach;
#pragma unroll
  for (int i = 0; i < kEach; i += 2) store_pair(to + i, out[i] * factor, out[i + 1] * factor);
}

template <class T, int kDim>
void launch_forward(const CudaAttentionParams& p, void* stream) {
  const dim3 grid(unsigned(p.tiles_q), unsigned(p.heads_k), unsigned(p.key_parts));
  launch(forward_kernel<T, kDim>, grid, dim3(kThreads), sizeof(ForwardShared<T, kDim>), stream, p,
         "attention");
  if (p.key_parts == 1) return;
  const int64_t lines = p.layout_q.total * p.heads, warps = kThreads / 32;
  launch(combine_kernel<T, kDim>, dim3(unsigned((lines + warps - 1) / warps)), dim3(kThreads), 0, stream, p,
         "attention");
}

}  // namespace cuda
}  // namespace mmfast
