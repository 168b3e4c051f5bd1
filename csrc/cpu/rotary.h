// Rotary embedding of queries and keys, with optional RMS norm before it.
#pragma once
#include <cstdint>

#include "cpu/isa.h"
#include "mmfast/tensor_view.h"

namespace mmfast {

struct RotarySide {
  const void* x;     // [rows, heads, dim], last dimension contiguous
  const void* grad;  // backward: gradient of the output, likewise
  void* out;         // [rows, heads, dim] contiguous: the output, or the gradient of x
  int64_t heads;
  int64_t x_stride[2], grad_stride[2];  // elements from row to row, from head to head
  const float* weight;                  // [dim], or null
  float* dweight;                       // [dim], or null
};

struct RotaryParams {
  DType dtype;  // float32 or bfloat16
  int64_t rows, dim;
  int sides;
  RotarySide side[2];
  const uint8_t* inside;    // [rows]: the row belongs to the layout; the others' output is zero
  const int32_t* position;  // [rows, axes]
  int axes;
  const double* frequency;  // [3, dim / 2], quarter turns per position; zero where an axis has no part
  bool norm, interleaved;
  float eps;
  bool stream;
  int threads;
};

}  // namespace mmfast

MMFAST_DECLARE_KERNEL(rotary_forward, RotaryParams)
MMFAST_DECLARE_KERNEL(rotary_backward, RotaryParams)
