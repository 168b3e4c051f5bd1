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

}  // namespace mmfast
