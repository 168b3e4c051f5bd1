// Rows of several tensors, gathered as bytes, and inverted indices, by which scattering is gathering.
#include "cuda/grid.h"
#include "cuda/ptx.h"
#include "mmfast/packing.h"

namespace mmfast {
namespace cuda {
namespace {

struct Gather {
  static constexpr int kMaxSources = PackParams::kMaxParts;
  GatherSource source[kMaxSources];
  int sources;
  int64_t source_rows;
  char* out;
  const int64_t* index;
  int64_t rows, bytes;
  Vector16 fill;  // repeated
};

template <class Piece>
__device__ __forceinline__ Piece piece_at(const char* p) {
  if constexpr (sizeof(Piece) == 16)
    return load16(p);
  else
    return *reinterpret_cast<const Piece*>(p);
}

template <class Piece>
__device__ __forceinline__ void put_piece(char* p, const Piece& x) {
  if constexpr (sizeof(Piece) == 16)
    store16(p, x);
  else
    *reinterpret_cast<Piece*>(p) = x;
}

constexpr int kPieces = 4;  // on their way at once
constexpr int kBlock = 256;

template <class Piece>
__global__ void __launch_bounds__(kBlock) gather_kernel(const __grid_constant__ Gather g) {
  constexpr int64_t kSize = sizeof(Piece);
  const int64_t i = int64_t(blockIdx.x) * blockDim.y + threadIdx.y, step = blockDim.x * kSize;
  if (i >= g.rows) return;
  const int64_t row = g.index[i];
  char* out = g.out + i * g.bytes;
  const char* from = nullptr;
  if (row >= 0 && row < g.source_rows) {
    int k = g.sources - 1;
    while (row < g.source[k].first) --k;
    from = g.source[k].x + (row - g.source[k].first) * g.source[k].stride;
  }
  for (int64_t at = threadIdx.x * kSize; at < g.bytes; at += kPieces * step) {
    Piece x[kPieces];
#pragma unroll
    for (int j = 0; j < kPieces; ++j) {
      const int64_t here = at + j * step;
      if (here >= g.bytes) continue;
      if (from)
        x[j] = piece_at<Piece>(from + here);
      else
        memcpy(&x[j], reinterpret_cast<const char*>(&g.fill) + here % 16, kSize);
    }
#pragma unroll
    for (int j = 0; j < kPieces; ++j)
      if (at + j * step < g.bytes) put_piece(out + at + j * step, x[j]);
  }
}

struct Inversion {
  const int64_t* index;  // [rows]
  int64_t rows;
  int64_t* inverse;  // [size]
  int64_t size;
};

__global__ void __launch_bounds__(kBlock) invert_kernel(const __grid_constant__ Inversion p) {
  const int64_t i = int64_t(blockIdx.x) * kBlock + threadIdx.x;
  if (i >= p.rows) return;
  const int64_t row = p.index[i];
  if (row >= 0 && row < p.size) p.inverse[row] = i;
}

}  // namespace

void gather_rows(const GatherParams& p, void* stream) {
  const char* op = "gather_rows";
  if (p.bytes == 0) return;
  if (p.sources > Gather::kMaxSources) {
    throw std::runtime_error(std::string(op) + ": rows of " + std::to_string(p.sources) +
                             " tensors; at most " + std::to_string(Gather::kMaxSources) + " are supported");
  }
  Gather g{};
  g.sources = int(p.sources);
  g.source_rows = p.source_rows;
  g.out = p.out;
  g.index = p.index;
  g.rows = p.rows;
  g.bytes = p.bytes;
  // All rows begin at multiples of the largest power of two that divides this.
  uintptr_t all = reinterpret_cast<uintptr_t>(p.out) | uintptr_t(p.bytes);
  for (int k = 0; k < g.sources; ++k) {
    g.source[k] = p.source[k];
    all |= reinterpret_cast<uintptr_t>(p.source[k].x) | uintptr_t(p.source[k].stride);
  }
  for (int64_t j = 0; j < 16; ++j) reinterpret_cast<char*>(&g.fill)[j] = p.fill[j % p.bytes];
  const int64_t size = all % 16 == 0 ? 16 : all % 4 == 0 ? 4 : all % 2 == 0 ? 2 : 1;
  const Kernel<Gather> kernel = size == 16  ? gather_kernel<Vector16>
                                : size == 4 ? gather_kernel<uint32_t>
                                : size == 2 ? gather_kernel<uint16_t>
                                            : gather_kernel<uint8_t>;
  const int64_t each = kPieces * size, pieces = (p.bytes + each - 1) / each;
  const int group = group_of(pieces < kBlock ? pieces : kBlock);
  const dim3 block(unsigned(group), unsigned(kBlock / group));
  launch(kernel, blocks_of(op, p.rows, block.y), block, 0, stream, g, op);
}

void invert_rows(const int64_t* index, int64_t rows, int64_t* inverse, int64_t size, void* stream) {
  const char* op = "scatter_rows";
  launch(invert_kernel, blocks_of(op, rows, kBlock), dim3(kBlock), 0, stream,
         Inversion{index, rows, inverse, size}, op);
}

}  // namespace cuda
}  // namespace mmfast
