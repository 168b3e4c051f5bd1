// Argument checks of the compiled modules: a failed check throws with a message that names function and
// argument.
#pragma once
#include <sstream>
#include <stdexcept>
#include <string>

#include "mmfast/tensor_view.h"

namespace mmfast {

template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

template <typename... Parts>
void check(bool condition, const Parts&... parts) {
  if (!condition) fail(parts...);
}

// Where this module's kernels read and write. The host cannot look at values on a device, so that there
// kernels guard themselves; tests build the CUDA module with MMFAST_CUDA_SHIM, where memory of the CPU stands
// for a device's.
#if defined(MMFAST_CUDA_MODULE)
constexpr bool kHostReads = false;
#else
constexpr bool kHostReads = true;
#endif
#if defined(MMFAST_CUDA_MODULE) && !defined(MMFAST_CUDA_SHIM)
constexpr Device kDevice = Device::cuda;
constexpr const char* kDeviceName = "a GPU";
#else
constexpr Device kDevice = Device::cpu;
constexpr const char* kDeviceName = "the CPU";
#endif

inline void check_device(const char* op, const char* name, const TensorView& t) {
  check(t.device == kDevice, op, ": ", name, " is not on ", kDeviceName,
        "; move it there or use another backend");
}

// Bytes of an element.
inline int64_t size_of(DType dtype) {
  switch (dtype) {
    case DType::u8:
      return 1;
    case DType::f16:
    case DType::bf16:
      return 2;
    case DType::f32:
    case DType::i32:
      return 4;
    case DType::f64:
    case DType::i64:
      return 8;
    default:
      fail("mmfast: a tensor has an unsupported dtype");
  }
}

// What could corrupt memory if it were wrong: presence, device, dtype and number of dimensions.
inline void check_tensor(const char* op, const char* name, const TensorView& t, DType dtype, int ndim) {
  check(t.present(), op, ": ", name, " is missing; expected a tensor");
  check_device(op, name, t);
  check(t.data || t.numel() == 0, op, ": ", name, " has no memory; it is no ordinary tensor");
  check(t.dtype == dtype, op, ": ", name, " has dtype ", name_of(t.dtype), "; expected ", name_of(dtype));
  check(t.ndim == ndim, op, ": ", name, " has ", t.ndim, " dimensions; expected ", ndim);
}

inline void check_size(const char* op, const char* name, const TensorView& t, int dim, int64_t expected) {
  check(t.size[dim] == expected, op, ": ", name, " has size ", t.size[dim], " in dimension ", dim,
        "; expected ", expected);
}

inline void check_last_contiguous(const char* op, const char* name, const TensorView& t) {
  check(t.ndim > 0 && (t.stride[t.ndim - 1] == 1 || t.size[t.ndim - 1] <= 1 || t.numel() == 0), op, ": ",
        name, " is not contiguous in its last dimension; call .contiguous() on it");
}

inline void check_contiguous(const char* op, const char* name, const TensorView& t) {
  check(t.contiguous(), op, ": ", name, " is not contiguous; call .contiguous() on it");
}

}  // namespace mmfast
