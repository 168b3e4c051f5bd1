// Attention: what does not depend on head dimension and dtype, and the choice of the kernels that do.
#include <cfloat>
#include <cmath>

#include "cuda/attention_tiles.cuh"

namespace mmfast {
namespace cuda {
namespace {

// Summaries of the tiles of both sides, one warp each.
__global__ void __launch_bounds__(kThreads) summarize_kernel(const __grid_constant__ CudaAttentionParams p) {
  const int64_t number = int64_t(blockIdx.x) * (kThreads / 32) + warp_id();
  if (number >= p.tiles_q + p.tiles_k) return;
  const bool queries = number < p.tiles_q;
  const LayoutView& layout = queries ? p.layout_q : p.layout_k;
  const int group = queries ? p.heads / p.heads_k : 1;
  const SampleTile tile = find_tile(layout, group, queries ? number : number - p.tiles_q);
  TileSummary s = summarize(layout, tile, group, lane_id(), 32);
#pragma unroll
  for (int bit = 16; bit; bit /= 2) {
    TileSummary other;
    other.modalities = __shfl_xor_sync(kAllLanes, s.modalities, bit);
    other.time_min = __shfl_xor_sync(kAllLanes, s.time_min, bit);
    other.time_max = __shfl_xor_sync(kAllLanes, s.time_max, bit);
    other.position_min = __shfl_xor_sync(kAllLanes, s.position_min, bit);
    other.position_max = __shfl_xor_sync(kAllLanes, s.position_max, bit);
    s = merge(s, other);
  }
  if (lane_id() == 0) p.summaries[number] = s;
}

// Fills in what follows from the rest, and makes the summaries.
CudaAttentionParams prepare(CudaAttentionParams p, void* stream, const char* op) {
  const bool capped = p.softcap > 0;
  p.inner = capped ? p.scale / p.softcap : 0;
  p.exponent = (capped ? p.softcap : p.scale) * kLog2e;
  // Hidden scores are minus infinity, which times 0 would be no number.
  if (std::fabs(p.exponent) < FLT_MIN) p.exponent = FLT_MIN;
  if (sees_all(p.mask, p.layout_q.modality || p.layout_k.modality)) {
    p.summaries = nullptr;
  } else {
    const int64_t warps = kThreads / 32, blocks = (p.tiles_q + p.tiles_k + warps - 1) / warps;
    launch(summarize_kernel, dim3(unsigned(blocks)), dim3(kThreads), 0, stream, p, op);
  }
  return p;
}

}  // namespace

void attention_forward(const CudaAttentionParams& given, void* stream) {
  const CudaAttentionParams p = prepare(given, stream, "attention");
  if (p.dtype == DType::bf16)
    p.dim == 64 ? launch_forward<bf16, 64>(p, stream) : launch_forward<bf16, 128>(p, stream);
  else
    p.dim == 64 ? launch_forward<f16, 64>(p, stream) : launch_forward<f16, 128>(p, stream);
}

void attention_backward(const CudaAttentionParams& given, void* stream) {
  const CudaAttentionParams p = prepare(given, stream, "attention_backward");
  if (p.dtype == DType::bf16)
    p.dim == 64 ? launch_backward<bf16, 64>(p, stream) : launch_backward<bf16, 128>(p, stream);
  else
    p.dim == 64 ? launch_backward<f16, 64>(p, stream) : launch_backward<f16, 128>(p, stream);
}

}  // namespace cuda
}  // namespace mmfast
