#include "bindings/attention.h"

#include <algorithm>

#include "mmfast/attention_schedule.h"

namespace mmfast {

using attention::check_lse;
using attention::heads_of;
using attention::params_of;

namespace {

float* floats_of(const char* op, const char* name, const TensorView& t, int64_t size) {
  check(t.present() && t.dtype == DType::f32 && t.numel() == size, op, ": ", name, " must have ", size,
        " float32 numbers");
  check_device(op, name, t);
  check_contiguous(op, name, t);
  return t.ptr<float>();
}

// Rows are read 16 bytes at a time.
void check_aligned(const char* op, const char* name, const HeadsView& t) {
  check(reinterpret_cast<uintptr_t>(t.data) % 16 == 0 && t.row % 8 == 0 && t.head % 8 == 0, op, ": ", name,
        " has rows that are not aligned to 16 bytes; call .contiguous() on it");
}

CudaAttentionParams cuda_params(const char* op, const TensorView& q, const TensorView& k, const TensorView& v,
                                const std::vector<TensorView>& layout_q,
                                const std::vector<TensorView>& layout_k, const attention::Options& options,
                                int key_parts, int query_parts, const TensorView& summaries,
                                const TensorView& rows) {
  auto p = params_of<CudaAttentionParams>(op, q, k, v, layout_q, layout_k, options);
  check(std::count(std::begin(cuda::kAttentionDims), std::end(cuda::kAttentionDims), p.dim), op, ": D is ",
        p.dim, "; expected 64 or 128");
  check_aligned(op, "q", p.q);
  check_aligned(op, "k", p.k);
  check_aligned(op, "v", p.v);
  p.tiles_q = most_tiles(p.layout_q.total, p.layout_q.batch, p.heads / p.heads_k);
  p.tiles_k = most_tiles(p.layout_k.total, p.layout_k.batch, 1);
  constexpr int kMostBlocks = 65535;
  for (const int parts : {key_parts, query_parts})
    check(parts >= 1 && parts <= kMostBlocks, op, ": a tile has ", parts, " parts; expected 1 to ",
          kMostBlocks);
  check(p.heads_k <= kMostBlocks, op, ": k has ", p.heads_k, " heads; expected at most ", kMostBlocks);
  check(p.layout_q.total * (p.heads / p.heads_k) <= kMostVirtualRows && p.layout_k.total <= kMostVirtualRows,
        op, ": q has ", p.layout_q.total, " rows in groups of ", p.heads / p.heads_k, ", k ",
        p.layout_k.total, "; at most ", kMostVirtualRows, " fit into 32 bits");
  check_tensor(op, "summaries", summaries, DType::i32, 2);
  check_contiguous(op, "summaries", summaries);
  check_size(op, "summaries", summaries, 0, p.tiles_q + p.tiles_k);
  check_size(op, "summaries", summaries, 1, sizeof(TileSummary) / 4);
  p.summaries = summaries.ptr<TileSummary>();
  p.key_parts = key_parts;
  p.query_parts = query_parts;
  if (p.key_parts > 1)
    p.rows_parts = floats_of(op, "rows", rows, p.key_parts * p.layout_q.total * p.heads * int64_t(p.dim));
  return p;
}

void forward(const TensorView& q, const TensorView& k, const TensorView& v, const TensorView& out,
             const TensorView& lse, const std::vector<TensorView>& layout_q,
             const std::vector<TensorView>& layout_k, const std::vector<int64_t>& rules, int64_t window_left,
             int64_t window_right, double scale, double softcap, double dropout_p, const TensorView& seed,
             int key_parts, const TensorView& summaries, const TensorView& rows, const TensorView& lse_parts,
             uintptr_t stream) {
  const char* op = "attention";
  CudaAttentionParams p = cuda_params(op, q, k, v, layout_q, layout_k,
                                      {rules, window_left, window_right, scale, softcap, dropout_p, seed},
                                      key_parts, 1, summaries, rows);
  p.out = heads_of(op, "out", out, p.dtype, q.size[0], p.heads, p.dim);
  check_contiguous(op, "out", out);
  check_lse(op, p, lse);
  if (key_parts > 1)
    p.lse_parts = floats_of(op, "lse_parts", lse_parts, int64_t(key_parts) * p.heads * p.layout_q.total);
  py::gil_scoped_release release;
  cuda::attention_forward(p, reinterpret_cast<void*>(stream));
}

void backward(const TensorView& dout, const TensorView& q, const TensorView& k, const TensorView& v,
              const TensorView& out, const TensorView& lse, const TensorView& dq, const TensorView& dk,
              const TensorView& dv, const std::vector<TensorView>& layout_q,
              const std::vector<TensorView>& layout_k, const std::vector<int64_t>& rules, int64_t window_left,
              int64_t window_right, double scale, double softcap, double dropout_p, const TensorView& seed,
              int key_parts, int query_parts, const TensorView& summaries, const TensorView& delta,
              const TensorView& rows, const TensorView& dk_parts, const TensorView& dv_parts,
              uintptr_t stream) {
  const char* op = "attention_backward";
  CudaAttentionParams p = cuda_params(op, q, k, v, layout_q, layout_k,
                                      {rules, window_left, window_right, scale, softcap, dropout_p, seed},
                                      key_parts, query_parts, summaries, rows);
  p.out = heads_of(op, "out", out, p.dtype, q.size[0], p.heads, p.dim);
  p.dout = heads_of(op, "dout", dout, p.dtype, q.size[0], p.heads, p.dim);
  check_aligned(op, "dout", p.dout);
  p.dq = heads_of(op, "dq", dq, p.dtype, q.size[0], p.heads, p.dim);
  p.dk = heads_of(op, "dk", dk, p.dtype, k.size[0], p.heads_k, p.dim);
  p.dv = heads_of(op, "dv", dv, p.dtype, k.size[0], p.heads_k, p.dim);
  check_contiguous(op, "dq", dq);
  check_contiguous(op, "dk", dk);
  check_contiguous(op, "dv", dv);
  check_lse(op, p, lse);
  p.delta = floats_of(op, "delta", delta, p.heads * p.layout_q.total);
  if (query_parts > 1) {
    const int64_t size = query_parts * p.layout_k.total * p.heads_k * int64_t(p.dim);
    p.dk_parts = floats_of(op, "dk_parts", dk_parts, size);
    p.dv_parts = floats_of(op, "dv_parts", dv_parts, size);
  }
  py::gil_scoped_release release;
  cuda::attention_backward(p, reinterpret_cast<void*>(stream));
}

}  // namespace

void bind_attention(py::module_& m) {
  m.def("attention_forward", &forward);
  m.def("attention_backward", &backward);
  m.def("attention_tiles",
        [](int64_t rows, int64_t batch, int group) { return most_tiles(rows, batch, group); });
  m.attr("attention_dims") =
      std::vector<int>(std::begin(cuda::kAttentionDims), std::end(cuda::kAttentionDims));
}

}  // namespace mmfast
