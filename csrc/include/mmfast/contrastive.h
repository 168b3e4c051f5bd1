// Contrastive losses over all pairs of two sets of rows; their matrix of products is kept only where asked.
// Formulas: mmfast/reference/contrastive.py.
#pragma once
#include "mmfast/tensor_view.h"

namespace mmfast {

struct ContrastiveParams {
  const void* x = nullptr;  // [n, dim], dim a multiple of 16
  const void* y = nullptr;  // [m, dim]
  const int32_t* ids_x =
      nullptr;  // [n], or null: pairs with equal ids are left out, but for the positive one
  const int32_t* ids_y = nullptr;  // [m], or null
  DType dtype = DType::f32;
  int64_t n = 0, m = 0, dim = 0;
  int64_t offset = 0;  // row i and column i + offset are a positive pair
  bool sigmoid = false;
  float scale = 1, bias = 0;
  int threads = 1;

  float* row = nullptr;       // [n], out: log-sum-exp of a row; sigmoid: its loss
  float* column = nullptr;    // [m], out: log-sum-exp of a column
  float* diagonal = nullptr;  // [n], out: score of the positive pair

  // [ceil(m / 64), kept, 64] of x y^T, panels of 64 columns, or null: forward writes the first rows, as many
  // whole chunks of them as fit into `kept`, and backward reads them instead of computing them again.
  float* products = nullptr;
  int64_t kept = 0;

  const float* grad_row = nullptr;       // [n]
  const float* grad_column = nullptr;    // [m]
  const float* grad_diagonal = nullptr;  // [n]
  float* dx = nullptr;                   // [n, dim], out, or null
  float* dy = nullptr;                   // [m, dim], out, or null
  float* loss = nullptr;                 // [1], out, or null: sigmoid losses times their grad_row, summed
  float* dscale = nullptr;               // [1], out
  float* dbias = nullptr;                // [1], out
};

}  // namespace mmfast
