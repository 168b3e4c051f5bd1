// Arguments of the attack step, checked and read for the CPU's and the GPU's kernels alike.
#pragma once
#include "mmfast/perturbation.h"

#include "bindings/binding.h"
#include "mmfast/layout.h"

namespace mmfast {
namespace perturbation {

using Views = std::vector<TensorView>;

// Element i of a list that may be empty (nothing given) or holds one view per tensor.
inline TensorView item(const char* op, const char* name, const Views& list, size_t i, size_t count) {
  if (list.empty()) return {};
  check(list.size() == count, op, ": ", name, " has ", list.size(), " entries; expected ", count,
        ", one per tensor of delta");
  return list[i];
}

inline void* data_like(const char* op, const char* name, const TensorView& t, const TensorView& delta) {
  if (!t.present()) return nullptr;
  check_device(op, name, t);
  check(t.dtype == delta.dtype, op, ": ", name, " has dtype ", name_of(t.dtype), "; expected delta's ",
        name_of(delta.dtype));
  bool same = t.ndim == delta.ndim;
  for (int d = 0; same && d < t.ndim; ++d) same = t.size[d] == delta.size[d];
  check(same, op, ": ", name, " must have delta's shape");
  check_contiguous(op, name, t);
  return t.data;
}

inline const float* per_sample(const char* op, const char* name, const TensorView& t, int64_t batch) {
  if (!t.present()) return nullptr;
  check_tensor(op, name, t, DType::f32, 1);
  check_size(op, name, t, 0, batch);
  check_contiguous(op, name, t);
  return t.ptr<float>();
}

struct Arguments {
  const Views &delta, &grad, &origin, &momentum, &previous, &step_size, &eps, &cu_seqlens, &seqused;
  const std::vector<float>&step_values, &eps_values, &low, &high;
};

inline std::vector<PerturbTensor> tensors_of(const char* op, const Arguments& a, bool token, bool start) {
  const size_t count = a.delta.size();
  check(count > 0, op, ": delta holds no tensor");
  check(a.step_values.size() == count && a.eps_values.size() == count && a.low.size() == count &&
            a.high.size() == count,
        op, ": one step size, eps and pair of bounds per tensor are expected");
  std::vector<PerturbTensor> tensors(count);
  for (size_t i = 0; i < count; ++i) {
    const TensorView& delta = a.delta[i];
    PerturbTensor& t = tensors[i];
    check(delta.present(), op, ": delta is missing");
    check_device(op, "delta", delta);
    check(delta.dtype == a.delta[0].dtype && takes(delta.dtype), op, ": delta has dtype ",
          name_of(delta.dtype), "; expected ", kDTypes, ", the same in all tensors");
    check(delta.ndim >= 1, op, ": delta has no dimension; expected [B, ...]");
    check_contiguous(op, "delta", delta);
    t.delta = delta.data;
    if (!start) {
      check(item(op, "grad", a.grad, i, count).present(), op, ": grad is missing");
      t.grad = data_like(op, "grad", a.grad[i], delta);
    }
    t.origin = data_like(op, "origin", item(op, "origin", a.origin, i, count), delta);
    t.momentum = data_like(op, "momentum", item(op, "momentum", a.momentum, i, count), delta);
    t.previous = data_like(op, "previous", item(op, "previous", a.previous, i, count), delta);
    const TensorView cu = item(op, "cu_seqlens", a.cu_seqlens, i, count);
    t.batch = delta.size[0];
    if (cu.present()) {
      const LayoutView layout =
          check_layout(op, "layout", delta.size[0], cu, item(op, "seqused", a.seqused, i, count), {}, {}, {});
      t.cu_seqlens = layout.cu_seqlens;
      t.seqused = layout.seqused;
      t.batch = layout.batch;
    }
    t.rows = delta.size[0];
    t.row_size = 1;
    for (int d = 1; d < delta.ndim; ++d) t.row_size *= delta.size[d];
    t.token_size = token ? delta.size[delta.ndim - 1] : 0;
    check(!token || delta.ndim >= 2, op,
          ": norms over tokens need delta [..., D] with two dimensions or more");
    t.step_size = per_sample(op, "step_size", item(op, "step_size", a.step_size, i, count), t.batch);
    t.eps = per_sample(op, "eps", item(op, "eps", a.eps, i, count), t.batch);
    t.step_value = a.step_values[i];
    t.eps_value = a.eps_values[i];
    t.low = a.low[i];
    t.high = a.high[i];
    if (t.row_size == 0) t.batch = 0;
  }
  return tensors;
}

}  // namespace perturbation
}  // namespace mmfast
