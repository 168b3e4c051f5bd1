#include "bindings/binding.h"

namespace mmfast {

void bind_packing(py::module_&) {}

}  // namespace mmfast
