#include "bindings/perturbation.h"

namespace mmfast {

using perturbation::tensors_of;
using perturbation::Views;

namespace {

PerturbParams params_of(const std::vector<PerturbTensor>& tensors, const Views& delta, bool l2) {
  PerturbParams p;
  p.tensors = tensors.data();
  p.count = int64_t(tensors.size());
  p.dtype = delta[0].dtype;
  p.l2 = l2;
  return p;
}

void take_workspace(const char* op, PerturbParams& p, const TensorView& workspace, bool momentum) {
  check_tensor(op, "workspace", workspace, DType::f64, 1);
  check_contiguous(op, "workspace", workspace);
  const int64_t needed = cuda::perturb_workspace(p, momentum);
  check(workspace.size[0] >= needed, op, ": workspace has ", workspace.size[0], " numbers; expected ",
        needed);
  p.workspace = workspace.ptr<double>();
}

}  // namespace

void bind_perturbation(py::module_& m) {
  m.def("perturb_workspace",
        [](const Views& delta, const Views& cu_seqlens, bool l2, bool token, bool momentum) {
          const Views none;
          const std::vector<float> numbers(delta.size(), 0.0f);
          const auto tensors = tensors_of("perturb_",
                                          {delta, none, none, none, none, none, none, cu_seqlens, none,
                                           numbers, numbers, numbers, numbers},
                                          token, true);
          return cuda::perturb_workspace(params_of(tensors, delta, l2), momentum);
        });
  m.def("perturb",
        [](const Views& delta, const Views& grad, const Views& momentum, const Views& previous,
           const Views& origin, const Views& step_size, const Views& eps, const Views& cu_seqlens,
           const Views& seqused, const std::vector<float>& step_values, const std::vector<float>& eps_values,
           const std::vector<float>& low, const std::vector<float>& high, bool l2, bool token, float decay,
           float blend, const TensorView& workspace, uintptr_t stream) {
          const auto tensors = tensors_of("perturb_",
                                          {delta, grad, origin, momentum, previous, step_size, eps,
                                           cu_seqlens, seqused, step_values, eps_values, low, high},
                                          token, false);
          PerturbParams p = params_of(tensors, delta, l2);
          p.decay = decay;
          p.blend = blend;
          take_workspace("perturb_", p, workspace, !momentum.empty());
          py::gil_scoped_release release;
          cuda::perturb(p, reinterpret_cast<void*>(stream));
        });
  m.def("random_start", [](const Views& delta, const Views& origin, const Views& eps, const Views& cu_seqlens,
                           const Views& seqused, const std::vector<float>& eps_values,
                           const std::vector<float>& low, const std::vector<float>& high, bool l2, bool token,
                           const TensorView& seed, const TensorView& workspace, uintptr_t stream) {
    const Views none;
    const std::vector<float> steps(delta.size(), 0.0f);
    const auto tensors = tensors_of(
        "random_start_",
        {delta, none, origin, none, none, none, eps, cu_seqlens, seqused, steps, eps_values, low, high},
        token, true);
    check(seed.present() && seed.dtype == DType::i64 && seed.numel() == 1,
          "random_start_: seed must be one int64");
    check_device("random_start_", "seed", seed);
    PerturbParams p = params_of(tensors, delta, l2);
    p.seed_on_device = seed.ptr<int64_t>();
    take_workspace("random_start_", p, workspace, false);
    py::gil_scoped_release release;
    cuda::random_start(p, reinterpret_cast<void*>(stream));
  });
}

}  // namespace mmfast
