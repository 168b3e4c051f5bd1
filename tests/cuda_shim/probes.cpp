#include "probes.h"

#include "bindings/binding.h"
#include "fibres.h"

namespace mmfast {

PYBIND11_MODULE(_probes, m) {
  m.def("probe", [](const std::string& name, const TensorView& a, const TensorView& b, const TensorView& c,
                    int64_t rows, bool transposed, int fault, const std::array<unsigned, 3>& grid,
                    const std::array<unsigned, 2>& block, size_t shared) {
    ProbeParams p{a.data, b.data, c.ptr<float>(), rows, transposed, Fault(fault)};
    probe(name, p, {grid[0], grid[1], grid[2]}, {block[0], block[1]}, shared);
  });
  m.def("set_order", &shim::set_order);
}

}  // namespace mmfast
