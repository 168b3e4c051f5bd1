#include "bindings/binding.h"

namespace mmfast {

void bind_attention(py::module_&) {}

}  // namespace mmfast
