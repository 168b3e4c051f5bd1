// Packing: rows of several parts into one sequence, with embeddings and norm, in one pass; rows gathered.
// Formulas: mmfast/reference/packing.py.
#pragma once
#include <cstdint>

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
  int tables;                      // position tables: one for each of the first axes
  const void* table[kMaxAxes];     // [table_rows, dim]
  void* dtable[kMaxAxes];          // [table_rows, dim] contiguous, or null
  int64_t table_stride[kMaxAxes];  // elements from a row of table to the next
  int64_t table_rows[kMaxAxes];
};

struct PackParams {
  static constexpr int kMaxParts = 16;
  DType dtype;        // of tokens, x and their gradients
  DType param_dtype;  // of embeddings, weight, bias and their gradients: dtype or float32
  int64_t rows, dim;
  int parts;
  PackPart part[kMaxParts];  // [parts]
  const int64_t* source;     // [rows], row in the concatenated parts
  const uint8_t* modality;   // [rows], part of each row
  const int32_t* position;   // [rows, axes], or null
  int axes;
  const void* type;  // [parts, dim], or null
  Norm norm;
  const void *weight, *bias;  // [dim], or null
  float eps;
  void* x;                // [rows, dim] contiguous; backward: the gradient of x, read only
  int64_t x_stride;       // elements from a row of the gradient of x to the next; backward only
  float* mean;            // [rows], layer norm only
  float* rstd;            // [rows], any norm
  void* dtype_embedding;  // [parts, dim], or null
  void *dweight, *dbias;  // [dim], or null
  bool stream;            // CPU: the output is larger than the cache
  int threads;            // CPU
};

// Sets *valid to whether every row of x names a part, a row of it, and positions inside the part's tables.
struct PackRowsParams {
  const PackParams* pack;
  bool* valid;
};

// Consecutive rows of the concatenation that a gather reads from.
struct GatherSource {
  const char* x;   // rows of `bytes` bytes
  int64_t stride;  // bytes from row to row
  int64_t first;   // row of the concatenation at which x begins
};

// out[i] = concatenation[index[i]], or the fill pattern where index[i] is negative. Rows are bytes.
struct GatherParams {
  const GatherSource* source;  // [sources] by their first rows, on the host
  int64_t sources;
  int64_t source_rows;   // of the concatenation
  char* out;             // [rows, bytes] contiguous
  const int64_t* index;  // [rows]
  int64_t rows, bytes;
  const char* fill;  // [bytes], on the host
  bool stream;       // CPU: the output is larger than the cache
  int threads;       // CPU
};

namespace cuda {

constexpr int64_t kMaxDim = 8192;  // a row is held in the registers of one block

// Rows in the order in which the gradient reads them: by part, within a part by the rows of one axis' tables.
struct PackOrder {
  int axis = -1;                   // whose tables' gradients are added up, or -1: none
  const int64_t* order = nullptr;  // [rows], place in that order -> row of x; entries outside x are skipped
  const int32_t* key = nullptr;    // [rows], sorted numbers of pack_keys(), or null where axis is -1
  int32_t chunk_rows = 1;          // rows whose sums are taken by one group of threads
  float* workspace = nullptr;  // [sums, chunks, dim]: a sum for each of dweight, dbias and dtype_embedding
                               // that is wanted, two more where there are keys; chunks of each part
};

// `stream` is a cudaStream_t. The kernels run after what was queued there; nothing waits for them.
void pack_forward(const PackParams& p, void* stream);

// Gradients that are not null. With several axes each takes a call; all others belong to one of them.
void pack_backward(const PackParams& p, const PackOrder& order, void* stream);

// Threads of a backward pass that have one row together.
int pack_threads(int64_t dim);

// key[t], int32 [rows]: which row of which part's table of the axis row t adds to; ascending by part.
void pack_keys(const PackParams& p, int axis, int32_t* key, void* stream);

// A row whose index is not in the concatenation is filled too.
void gather_rows(const GatherParams& p, void* stream);

// inverse[index[i]] = i where 0 <= index[i] < size; other entries stay as they are.
void invert_rows(const int64_t* index, int64_t rows, int64_t* inverse, int64_t size, void* stream);

}  // namespace cuda
}  // namespace mmfast
