// Attention: checks what could corrupt memory, divides the work, calls the kernels without the GIL.
#include "bindings/attention.h"

#include <memory>

#include "cpu/attention_plan.h"
#include "cpu/isa.h"

MMFAST_DECLARE_KERNEL(attention_forward, AttentionParams)
MMFAST_DECLARE_KERNEL(attention_backward, AttentionParams)

namespace mmfast {

using attention::check_lse;
using attention::heads_of;
using attention::params_of;

namespace {

// Fewer operations than this are done before a second thread has woken.
constexpr int64_t kWorkOfTeam = 1 << 21;

// Rows and keys of all items, seen or not.
int64_t cells_of(const AttentionParams& p, const LayoutView& other) {
  int64_t cells = 0;
  for (int64_t i = 0; i < p.num_items; ++i)
    cells += (p.items[i].end - p.items[i].begin) * other.length(p.items[i].sample);
  return cells;
}

void run(void (*kernel)(const AttentionParams&), AttentionParams& p, int64_t work) {
  if (!p.layout_q.total && !p.layout_k.total) return;
  p.threads = work < kWorkOfTeam ? 1 : num_threads();
  py::gil_scoped_release release;
  kernel(p);
}

void forward(const TensorView& q, const TensorView& k, const TensorView& v, const TensorView& out,
             const TensorView& lse, const std::vector<TensorView>& layout_q,
             const std::vector<TensorView>& layout_k, const std::vector<int64_t>& rules, int64_t window_left,
             int64_t window_right, double scale, double softcap, double dropout_p, const TensorView& seed) {
  const char* op = "attention";
  AttentionParams p = params_of<AttentionParams>(
      op, q, k, v, layout_q, layout_k, {rules, window_left, window_right, scale, softcap, dropout_p, seed});
  p.out = heads_of(op, "out", out, p.dtype, q.size[0], p.heads, p.dim);
  check_lse(op, p, lse);
  const AttentionPlan plan = plan_forward(p);
  p.items = plan.items.data();
  p.num_items = int64_t(plan.items.size());
  run(&attention_forward, p, 4 * cells_of(p, p.layout_k) * p.heads_k * p.dim);
}

void backward(const TensorView& dout, const TensorView& q, const TensorView& k, const TensorView& v,
              const TensorView& out, const TensorView& lse, const TensorView& dq, const TensorView& dk,
              const TensorView& dv, const std::vector<TensorView>& layout_q,
              const std::vector<TensorView>& layout_k, const std::vector<int64_t>& rules, int64_t window_left,
              int64_t window_right, double scale, double softcap, double dropout_p, const TensorView& seed) {
  const char* op = "attention_backward";
  AttentionParams p = params_of<AttentionParams>(
      op, q, k, v, layout_q, layout_k, {rules, window_left, window_right, scale, softcap, dropout_p, seed});
  p.out = heads_of(op, "out", out, p.dtype, q.size[0], p.heads, p.dim);
  p.dout = heads_of(op, "dout", dout, p.dtype, q.size[0], p.heads, p.dim);
  p.dq = heads_of(op, "dq", dq, p.dtype, q.size[0], p.heads, p.dim);
  p.dk = heads_of(op, "dk", dk, p.dtype, k.size[0], p.heads_k, p.dim);
  p.dv = heads_of(op, "dv", dv, p.dtype, k.size[0], p.heads_k, p.dim);
  check_lse(op, p, lse);
  const AttentionPlan plan = plan_backward(p);
  p.items = plan.items.data();
  p.num_items = int64_t(plan.items.size());
  p.parts = plan.parts.data();
  std::unique_ptr<float[]> dq_parts;
  if (plan.max_parts > 1) {
    dq_parts.reset(new float[size_t(plan.max_parts) * p.heads * p.layout_q.total * ((p.dim + 15) / 16 * 16)]);
    p.dq_parts = dq_parts.get();
  }
  run(&attention_backward, p, 10 * cells_of(p, p.layout_q) * p.heads * p.dim);
}

}  // namespace

void bind_attention(py::module_& m) {
  m.def("attention_forward", &forward);
  m.def("attention_backward", &backward);
}

}  // namespace mmfast
