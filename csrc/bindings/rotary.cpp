#include "bindings/binding.h"

namespace mmfast {

void bind_rotary(py::module_&) {}

}  // namespace mmfast
