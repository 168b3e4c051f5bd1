// The only headers that know Python. A torch tensor becomes a TensorView by its attributes: no torch header.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "mmfast/check.h"
#include "mmfast/tensor_view.h"

namespace py = pybind11;

namespace mmfast {

// Reads pointer, dtype, device, sizes and strides of a torch.Tensor; None becomes a view without data.
TensorView view_of(py::handle tensor);

// Threads for this call: torch.get_num_threads() at the time of the last set_num_threads, never more than the
// machine has.
int num_threads();

// Outputs larger than this bypass the last-level cache: with as large an input they would not fit into it.
int64_t streamed_bytes();

// Dtypes of what kernels compute with. The CPU's callers widen float16.
constexpr const char* kDTypes = kHostReads ? "float32 or bfloat16" : "float32, bfloat16 or float16";
inline bool takes(DType dtype) {
  return dtype == DType::f32 || dtype == DType::bf16 || (dtype == DType::f16 && !kHostReads);
}

void bind_attention(py::module_& m);
void bind_rotary(py::module_& m);
void bind_packing(py::module_& m);
void bind_perturbation(py::module_& m);
void bind_contrastive(py::module_& m);

}  // namespace mmfast

namespace pybind11::detail {
template <>
struct type_caster<mmfast::TensorView> {
  PYBIND11_TYPE_CASTER(mmfast::TensorView, const_name("torch.Tensor | None"));
  bool load(handle source, bool) {
    value = mmfast::view_of(source);
    return true;
  }
};
}  // namespace pybind11::detail
