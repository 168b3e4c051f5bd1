// What the attention kernels take. Rows of q are [Tq, H, D], rows of k and v [Tk, Hk, D]; strides in
// elements.
#pragma once
#include "mmfast/layout.h"
#include "mmfast/mask.h"
#include "mmfast/tensor_view.h"

namespace mmfast {

// A tensor [T, heads, D] whose last dimension is contiguous.
struct HeadsView {
  void* data = nullptr;
  int64_t row = 0;   // stride of T
  int64_t head = 0;  // stride of heads
};

// What one thread does at a time, for each key head: rows begin to end of one sample. Forward: of the queries
// of a group, row = q row * (H / Hk) + head in the group. Backward: keys; `part` says which private dQ they
// add to.
struct AttentionItem {
  int32_t sample;
  int32_t part;
  int64_t begin, end;
};

struct AttentionParams {
  HeadsView q, k, v, out;          // out [Tq, H, D]: written forward, read backward
  float* lse = nullptr;            // [H, Tq], natural logarithm; written forward, read backward
  HeadsView dout;                  // [Tq, H, D]
  HeadsView dq, dk, dv;            // as q, k, v
  float* dq_parts = nullptr;       // [parts, H, Tq, round_up(D, 16)], or null where no sample is split
  const int32_t* parts = nullptr;  // [B]: into how many parts a sample's keys are split (backward)
  DType dtype = DType::f32;
  LayoutView layout_q, layout_k;
  Mask mask;
  int heads = 0, heads_k = 0, dim = 0;
  float scale = 1;
  float softcap = 0;    // 0: none
  float dropout_p = 0;  // 0: none
  uint64_t seed = 0;
  const AttentionItem* items = nullptr;
  int64_t num_items = 0;
  int threads = 1;
};

// What the CUDA kernels take besides; the fields above for how the CPU divides its work are not read.
struct CudaAttentionParams : AttentionParams {
  const int64_t* seed_on_device = nullptr;  // [1], in place of seed
  int64_t tiles_q = 0, tiles_k = 0;         // most_tiles() of either side
  TileSummary* summaries = nullptr;  // [tiles_q + tiles_k], written first; null: every row sees every row
  int key_parts = 1;                 // blocks that share the keys of a tile of queries, and add up in order
  int query_parts = 1;               // blocks that share the queries of a tile of keys
  float* delta = nullptr;            // [H, Tq], written first in backward: sum of dout * out
  float* rows_parts = nullptr;       // [key_parts, Tq, H, D], of out or dq; null where key_parts is 1
  float* lse_parts = nullptr;        // [key_parts, H, Tq]
  float* dk_parts = nullptr;         // [query_parts, Tk, Hk, D]; null where query_parts is 1
  float* dv_parts = nullptr;         // [query_parts, Tk, Hk, D]
  float inner = 0;                   // with a softcap: factor of q k^T inside the tanh
  float exponent = 0;                // factor of q k^T, or of the tanh, in exponents of 2; never 0
};

namespace cuda {

constexpr int kAttentionDims[] = {64, 128};  // D that there are kernels for, in bfloat16 and float16

// `stream` is a cudaStream_t. The kernels run after what was queued there; nothing waits for them.
void attention_forward(const CudaAttentionParams& p, void* stream);
void attention_backward(const CudaAttentionParams& p, void* stream);

}  // namespace cuda

}  // namespace mmfast
