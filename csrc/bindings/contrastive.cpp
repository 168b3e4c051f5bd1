#include "bindings/binding.h"

namespace mmfast {

void bind_contrastive(py::module_&) {}

}  // namespace mmfast
