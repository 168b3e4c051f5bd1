// What a kernel sees of a tensor: pointer, dtype, sizes and strides. No framework header.
#pragma once
#include <cstdint>

namespace mmfast {

enum class DType : uint8_t { f32, f64, f16, bf16, u8, i32, i64, other };
enum class Device : uint8_t { none, cpu, cuda, other };

inline const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::f32:
      return "float32";
    case DType::f64:
      return "float64";
    case DType::f16:
      return "float16";
    case DType::bf16:
      return "bfloat16";
    case DType::u8:
      return "uint8";
    case DType::i32:
      return "int32";
    case DType::i64:
      return "int64";
    default:
      return "another dtype";
  }
}

// A view does not own its memory. An absent optional tensor is a view without data and with device `none`.
struct TensorView {
  static constexpr int kMaxDims = 5;
  void* data = nullptr;
  DType dtype = DType::other;
  Device device = Device::none;
  int ndim = 0;
  int64_t size[kMaxDims] = {};
  int64_t stride[kMaxDims] = {};  // in elements

  bool present() const { return device != Device::none; }
  int64_t numel() const {
    int64_t n = 1;
    for (int i = 0; i < ndim; ++i) n *= size[i];
    return n;
  }
  bool contiguous() const {
    if (numel() == 0) return true;
    int64_t expected = 1;
    for (int i = ndim - 1; i >= 0; --i) {
      if (size[i] != 1 && stride[i] != expected) return false;
      expected *= size[i];
    }
    return true;
  }
  template <typename T>
  T* ptr() const {
    return static_cast<T*>(data);
  }
};

}  // namespace mmfast
