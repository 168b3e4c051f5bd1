#include "bindings/binding.h"

namespace mmfast {

void bind_perturbation(py::module_&) {}

}  // namespace mmfast
