// Arguments of attention, checked and read for the CPU's and the GPU's kernels alike.
#pragma once
#include "mmfast/attention.h"

#include "bindings/binding.h"

namespace mmfast {
namespace attention {

inline HeadsView heads_of(const char* op, const char* name, const TensorView& t, DType dtype, int64_t rows,
                          int64_t heads, int64_t dim) {
  check_tensor(op, name, t, dtype, 3);
  check_size(op, name, t, 0, rows);
  check_size(op, name, t, 1, heads);
  check_size(op, name, t, 2, dim);
  check_last_contiguous(op, name, t);
  return {t.data, t.stride[0], t.stride[1]};
}

inline LayoutView layout_of(const char* op, const char* side, int64_t total,
                            const std::vector<TensorView>& fields) {
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

// What q, k, v, layouts and options say; `Params` is AttentionParams or one with more fields. A seed is read
// where the host can, and left to the kernels otherwise.
template <class Params>
Params params_of(const char* op, const TensorView& q, const TensorView& k, const TensorView& v,
                 const std::vector<TensorView>& layout_q, const std::vector<TensorView>& layout_k,
                 const Options& options) {
  Params p;
  p.dtype = q.dtype;
  check(q.dtype == DType::bf16 || q.dtype == (kHostReads ? DType::f32 : DType::f16), op, ": q has dtype ",
        name_of(q.dtype), "; expected bfloat16 or ", kHostReads ? "float32" : "float16");
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
    check(options.seed.present() && options.seed.dtype == DType::i64 && options.seed.numel() == 1, op,
          ": dropout_seed must be one int64");
    check_device(op, "dropout_seed", options.seed);
    if constexpr (kHostReads)
      p.seed = uint64_t(*options.seed.ptr<int64_t>());
    else
      p.seed_on_device = options.seed.ptr<int64_t>();
  }
  return p;
}

inline void check_lse(const char* op, AttentionParams& p, const TensorView& lse) {
  check_tensor(op, "lse", lse, DType::f32, 2);
  check_size(op, "lse", lse, 0, p.heads);
  check_size(op, "lse", lse, 1, p.layout_q.total);
  check_contiguous(op, "lse", lse);
  p.lse = lse.ptr<float>();
}

}  // namespace attention
}  // namespace mmfast
