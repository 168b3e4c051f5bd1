#include "bindings/perturbation.h"

#include "cpu/isa.h"

MMFAST_DECLARE_KERNEL(perturb, PerturbParams)
MMFAST_DECLARE_KERNEL(random_start, PerturbParams)

namespace mmfast {

using perturbation::tensors_of;
using perturbation::Views;

void bind_perturbation(py::module_& m) {
  m.def("perturb", [](const Views& delta, const Views& grad, const Views& momentum, const Views& previous,
                      const Views& origin, const Views& step_size, const Views& eps, const Views& cu_seqlens,
                      const Views& seqused, const std::vector<float>& step_values,
                      const std::vector<float>& eps_values, const std::vector<float>& low,
                      const std::vector<float>& high, bool l2, bool token, float decay, float blend) {
    const auto tensors = tensors_of("perturb_",
                                    {delta, grad, origin, momentum, previous, step_size, eps, cu_seqlens,
                                     seqused, step_values, eps_values, low, high},
                                    token, false);
    PerturbParams p;
    p.tensors = tensors.data();
    p.count = int64_t(tensors.size());
    p.dtype = delta[0].dtype;
    p.l2 = l2;
    p.decay = decay;
    p.blend = blend;
    p.threads = num_threads();
    py::gil_scoped_release release;
    perturb(p);
  });
  m.def("random_start",
        [](const Views& delta, const Views& origin, const Views& eps, const Views& cu_seqlens,
           const Views& seqused, const std::vector<float>& eps_values, const std::vector<float>& low,
           const std::vector<float>& high, bool l2, bool token, const TensorView& seed) {
          const Views none;
          const std::vector<float> steps(delta.size(), 0.0f);
          const auto tensors = tensors_of(
              "random_start_",
              {delta, none, origin, none, none, none, eps, cu_seqlens, seqused, steps, eps_values, low, high},
              token, true);
          check(seed.present() && seed.device == Device::cpu && seed.dtype == DType::i64 && seed.numel() == 1,
                "random_start_: seed must be one int64 on the CPU");
          PerturbParams p;
          p.tensors = tensors.data();
          p.count = int64_t(tensors.size());
          p.dtype = delta[0].dtype;
          p.l2 = l2;
          p.seed = uint64_t(*seed.ptr<int64_t>());
          p.threads = num_threads();
          py::gil_scoped_release release;
          random_start(p);
        });
}

}  // namespace mmfast
