// Attention: checks what could corrupt memory, divides the work, calls the kernels without the GIL.
#include <cmath>
#include <cstdlib>
#include <memory>

#include "bindings/binding.h"
#include "cpu/attention_plan.h"
#include "cpu/isa.h"
#include "mmfast/attention.h"

MMFAST_DECLARE_KERNEL(attention_forward, AttentionParams)
MMFAST_DECLARE_KERNEL(attention_backward, AttentionParams)

namespace mmfast {
namespace {

HeadsView heads_of(const char* op, const char* name, const TensorView& t, DType dtype, int64_t rows,
                   int64_t heads, int64_t dim) {
  check_tensor(op, name, t, dtype, 3);
  check_size(op, name, t, 0, rows);
  check_size(op, name, t, 1, heads);
  check_size(op, name, t, 2, dim);
  check_last_contiguous(op, name, t);
  return {t.data, t.stride[0], t.stride[1]};
}

LayoutView layout_of(const char* op, const char* side, int64_t total, const std::vector<TensorView>& fields) {
  check(fields.size() == 5, op, ": layout_", side, " has ", fields.size(),
        " fields; expected cu_seqlens, seqused, modality, time, start");
  return check_layout(op, side, total, fields[0], fields[1], fields[2], fields[3], fields[4]);
}

struct Options {
  std::vector<int64_t> rules;
  int64_t window_left, window_right;
  double scale, softcap, dropout_p;
  TensorView seed;
};

AttentionParams params_of(const char* op, const TensorView& q, const TensorView& k, const TensorView& v,
                          const std::vector<TensorView>& layout_q, const std::vector<TensorView>& layout_k,
                          const Options& options) {
  AttentionParams p;
  p.dtype = q.dtype;
  check(q.dtype == DType::f32 || q.dtype == DType::bf16, op, ": q has dtype ", name_of(q.dtype),
        "; expected float32 or bfloat16");
  check(q.ndim == 3 && k.ndim == 3, op, ": q must be [Tq, H, D] and k [Tk, Hk, D]");
  const int64_t heads = q.size[1], heads_k = k.size[1], dim = q.size[2];
  check(dim >= 8 && dim <= 256 && dim % 8 == 0, op, ": D is ", dim, "; expected a multiple of 8 up to 256");
  check(heads_k >= 1 && heads % heads_k == 0 && heads < (1 << 20), op, ": k has ", heads_k,
        " heads, which must divide q's ", heads);
  p.heads = int(heads);
  p.heads_k = int(heads_k);
  p.dim = int(dim);
  p.q = heads_of(op, "q", q, p.dtype, q.size[0], heads, dim);
  p.k = heads_of(op, "k", k, p.dtype, k.size[0], heads_k, dim);
  p.v = heads_of(op, "v", v, p.dtype, k.size[0], heads_k, dim);
  p.layout_q = layout_of(op, "q", q.size[0], layout_q);
  p.layout_k = layout_of(op, "k", k.size[0], layout_k);
  check(p.layout_q.batch == p.layout_k.batch, op, ": layout_q has ", p.layout_q.batch, " samples, layout_k ",
        p.layout_k.batch, "; they must have the same");
  check(options.rules.size() == kMaxModalities, op, ": rules has ", options.rules.size(),
        " numbers; expected ", kMaxModalities);
  for (int m = 0; m < kMaxModalities; ++m) p.mask.rules[m] = options.rules[size_t(m)];
  auto window = [&](int64_t w) {
    check(w >= -1 && w <= INT32_MAX, op, ": a window is ", w, "; expected -1 to 2**31 - 1");
    return int32_t(w);
  };
  p.mask.window_left = window(options.window_left);
  p.mask.window_right = window(options.window_right);
  p.scale = float(options.scale);
  p.softcap = float(options.softcap);
  p.dropout_p = float(options.dropout_p);
  check(p.dropout_p >= 0 && p.dropout_p < 1, op, ": dropout_p is ", options.dropout_p,
        "; expected 0 <= p < 1");
  if (p.dropout_p > 0) {
    check(options.seed.present() && options.seed.dtype == DType::i64 && options.seed.numel() == 1 &&
              options.seed.device == Device::cpu,
          op, ": dropout_seed must be one int64 on the CPU");
    p.seed = uint64_t(*options.seed.ptr<int64_t>());
  }
  p.threads = num_threads();
  return p;
}

void check_lse(const char* op, AttentionParams& p, const TensorView& lse) {
  check_tensor(op, "lse", lse, DType::f32, 2);
  check_size(op, "lse", lse, 0, p.heads);
  check_size(op, "lse", lse, 1, p.layout_q.total);
  check_contiguous(op, "lse", lse);
  p.lse = lse.ptr<float>();
}

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
  if (work < kWorkOfTeam) p.threads = 1;
  py::gil_scoped_release release;
  kernel(p);
}

void forward(const TensorView& q, const TensorView& k, const TensorView& v, const TensorView& out,
             const TensorView& lse, const std::vector<TensorView>& layout_q,
             const std::vector<TensorView>& layout_k, const std::vector<int64_t>& rules, int64_t window_left,
             int64_t window_right, double scale, double softcap, double dropout_p, const TensorView& seed) {
  const char* op = "attention";
  AttentionParams p = params_of(op, q, k, v, layout_q, layout_k,
                                {rules, window_left, window_right, scale, softcap, dropout_p, seed});
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
  AttentionParams p = params_of(op, q, k, v, layout_q, layout_k,
                                {rules, window_left, window_right, scale, softcap, dropout_p, seed});
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
