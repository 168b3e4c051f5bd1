// Packing: rows of several parts into one sequence, with embeddings and norm, in one pass.
#pragma once
#include <cstdint>

#include "cpu/isa.h"
#include "mmfast/tensor_view.h"

namespace mmfast {

enum class Norm : int { none = 0, layer = 1, rms = 2 };

struct PackPart {
  static constexpr int kMaxAxes = 3;
  const void* tokens;  // [rows, dim]; backward: null without norm
  void* dtokens;       // [rows, dim] contiguous, or null
  int64_t stride;      // elements from a row of tokens to the next
  int64_t first;       // row of the concatenated parts at which this part begins
  int64_t rows;
  int tables;                   // position tables: one for each of the first axes
  const void* table[kMaxAxes];  // [table_rows, dim]
  void* dtable[kMaxAxes];       // [table_rows, dim] contiguous, or null
  int64_t table_stride[kMaxAxes];
  int64_t table_rows[kMaxAxes];
};

struct PackParams {
  static constexpr int kMaxParts = 16;
  DType dtype;        // of tokens, x and their gradients: float32 or bfloat16
  DType param_dtype;  // of embeddings, weight, bias and their gradients: dtype or float32
  int64_t rows, dim;
  int parts;
  PackPart part[kMaxParts];
  const int64_t* source;    // [rows], row in the concatenated parts
  const uint8_t* modality;  // [rows], part of each row
  const int32_t* position;  // [rows, axes], or null
  int axes;
  const void* type;  // [parts, dim], or null
  Norm norm;
  const void *weight, *bias;  // [dim], or null
  float eps;
  void* x;  // [rows, dim] contiguous; backward: the gradient of x, read only
  int64_t x_stride;
  float* mean;                              // [rows], layer norm only
  float* rstd;                              // [rows]
  void *dtype_embedding, *dweight, *dbias;  // [parts, dim], [dim], [dim], or null
  bool stream;                              // the output is larger than the cache
  int threads;
};

// Consecutive rows of the concatenation that a gather reads from.
struct GatherSource {
  const char* x;   // rows of `bytes` bytes
  int64_t stride;  // bytes from row to row
  int64_t first;   // row of the concatenation at which x begins
};

// out[i] = concatenation[index[i]], or the fill pattern where index[i] is negative. Rows are bytes.
struct GatherParams {
  const GatherSource* source;  // [sources], by their first rows
  int64_t sources;
  char* out;             // [rows, bytes] contiguous
  const int64_t* index;  // [rows]
  int64_t rows, bytes;
  const char* fill;  // [bytes]
  bool stream;
  int threads;
};

}  // namespace mmfast

MMFAST_DECLARE_KERNEL(pack_forward, PackParams)
MMFAST_DECLARE_KERNEL(pack_backward, PackParams)
MMFAST_DECLARE_KERNEL(gather_rows, GatherParams)
