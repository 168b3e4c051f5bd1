// mmfast._cuda: the CUDA kernels behind pybind11.
#include "bindings/binding.h"

namespace mmfast {

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of mmfast";
  m.attr("device") = kDevice == Device::cuda ? "cuda" : "cpu";  // where its tensors are: "cpu" in tests only
  bind_attention(m);
  bind_packing(m);
  bind_perturbation(m);
}

}  // namespace mmfast
