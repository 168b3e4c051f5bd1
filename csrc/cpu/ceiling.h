// The arithmetic peak that benchmarks hold kernels against: multiply-adds on registers alone.
#pragma once
#include <cstdint>

#include "cpu/isa.h"

namespace mmfast {

struct CeilingParams {
  bool bf16 = false;  // pairs of bfloat16 where the instruction set has their products, else float32
  int64_t rounds = 0;
  int threads = 1;
  double* flops = nullptr;  // operations done
};

}  // namespace mmfast

MMFAST_DECLARE_KERNEL(multiply_adds, CeilingParams)
