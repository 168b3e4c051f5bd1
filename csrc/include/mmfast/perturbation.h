// One attack step and its random start over a list of tensors. Formulas: mmfast/reference/perturbation.py.
#pragma once
#include "mmfast/tensor_view.h"

namespace mmfast {

struct PerturbTensor {
  void* delta = nullptr;             // [rows, row_size], changed in place
  const void* grad = nullptr;        // as delta
  const void* origin = nullptr;      // as delta, or null: no bounds
  void* momentum = nullptr;          // as delta, changed in place, or null
  void* previous = nullptr;          // as delta, changed in place, or null
  const float* step_size = nullptr;  // [batch], or null: step_value
  const float* eps = nullptr;        // [batch], or null: eps_value
  float step_value = 0, eps_value = 0;
  float low = 0, high = 0;              // origin + delta stays within
  const int32_t* cu_seqlens = nullptr;  // [batch + 1], or null: row b is sample b
  const int32_t* seqused = nullptr;     // [batch], or null
  int64_t batch = 0;
  int64_t rows = 0;        // of delta, those outside the layout included
  int64_t row_size = 0;    // elements of a row
  int64_t token_size = 0;  // norms over this many elements; 0: over the sample

  int64_t begin(int64_t b) const { return (cu_seqlens ? cu_seqlens[b] : b) * row_size; }
  int64_t size(int64_t b) const {
    if (!cu_seqlens) return row_size;
    return (seqused ? seqused[b] : int64_t(cu_seqlens[b + 1]) - cu_seqlens[b]) * row_size;
  }
  float step_of(int64_t b) const { return step_size ? step_size[b] : step_value; }
  float eps_of(int64_t b) const { return eps ? eps[b] : eps_value; }
};

struct PerturbParams {
  const PerturbTensor* tensors = nullptr;  // [count]
  int64_t count = 0;
  DType dtype = DType::f32;
  bool l2 = false;
  float decay = 0;
  float blend = 1;
  uint64_t seed = 0;  // random start only
  int threads = 1;
  const int64_t* seed_on_device = nullptr;  // [1], in place of seed
  double* workspace = nullptr;              // [perturb_workspace()], CUDA only
};

namespace cuda {

// `stream` is a cudaStream_t. The kernels run after what was queued there; nothing waits for them.
void perturb(const PerturbParams& p, void* stream);
void random_start(const PerturbParams& p, void* stream);

// float64 numbers that the workspace of a call holds.
int64_t perturb_workspace(const PerturbParams& p, bool momentum);

}  // namespace cuda

}  // namespace mmfast
