// Matrix products of the attention kernels: packed panels and register tiles.
//
// A product runs over units of 32 bits: one float, or a pair of bfloat16 neighbours of the reduction. Panels
// hold B as [reduction units][64 columns]; A is read in place by strides, so one tile serves q k^T, p v, p^T
// dout.
#pragma once
#include <cstdlib>

#include "cpu/simd.h"

#if defined(__AVX2__)
#include <immintrin.h>
// g++ 12 takes the undefined sources of its own unmasked AVX-512 intrinsics for a mistake.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

namespace mmfast {
namespace MMFAST_ISA {
namespace {

constexpr int kPanel = 64;                                // columns of a panel
constexpr int kGroup = 16;                                // columns computed or left out together
constexpr int kRows = 6;                                  // rows of a register tile
constexpr int kVecs = MMFAST_VECTOR_BYTES == 64 ? 4 : 2;  // vectors of a register tile
// Steps for one turn of the loop. Two loads and six broadcasts for 12 multiply-adds of narrow vectors leave
// the decoder little time for anything else.
constexpr int kUnroll = MMFAST_VECTOR_BYTES == 64 ? 1 : 4;

// x - 0 is x for every x, so the compiler drops it; 0 + x is not.
MMFAST_INLINE vf broadcast(float x) {
  return x - vf{};
}

struct FloatUnits {
  using Unit = float;
  static constexpr int kPack = 1;  // elements of a unit
  using Vector = vf;
  MMFAST_INLINE vf load_unit(const float* p) { return broadcast(*p); }
  MMFAST_INLINE vf load_units(const float* p) { return load(p); }
  MMFAST_INLINE vf multiply_add(vf acc, vf a, vf b) { return acc + a * b; }
};

#if defined(__AVX512BF16__)
struct PairUnits {
  using Unit = uint32_t;
  static constexpr int kPack = 2;
  using Vector = __m512i;
  MMFAST_INLINE __m512i load_unit(const uint32_t* p) {
    uint32_t x;
    std::memcpy(&x, p, 4);
    return _mm512_set1_epi32(int(x));
  }
  MMFAST_INLINE __m512i load_units(const uint32_t* p) { return _mm512_loadu_si512(p); }
  MMFAST_INLINE vf multiply_add(vf acc, __m512i a, __m512i b) {
    return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
  }
};

// kLanes units from two rows of the reduction.
MMFAST_INLINE void store_pair(uint32_t* units, vf first, vf second) {
  alignas(64) static constexpr uint16_t kOrder[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                      21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                      11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
  _mm512_storeu_si512(units, _mm512_permutexvar_epi16(_mm512_load_si512(kOrder), both));
}
#endif

// What happens to a tile of sums: c = factor * sum, c += sum, or c = c * alpha[row] + sum.
enum class Store { set, add, rescale };

// Cache lines of memory that a product fetches, one with each of its first n steps.
struct Fetch {
  const char* const* lines;
  int64_t n;
};

struct Epilogue {
  Store store;
  float factor;
  const float* alpha;
  Fetch fetch = {nullptr, 0};
  float* highest = nullptr;  // with `set`: [rows][kLanes], raised to the maximum of each lane
};

template <class Units, int R, int V, bool fetch>
__attribute__((noinline)) void tile(const typename Units::Unit* a, int64_t a_row, int64_t a_step,
                                    const typename Units::Unit* b, int64_t n, float* c, int64_t c_row,
                                    const Epilogue& epilogue) {
  using Unit = typename Units::Unit;
  vf sum[R][V] = {};
  int64_t row[R];  // bytes
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) row[r] = r * a_row * int64_t(sizeof(Unit));
  auto step = [&](int64_t k) __attribute__((always_inline)) {
    typename Units::Vector column[V];
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) column[j] = Units::load_units(b + k * kPanel + j * kLanes);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      const char* first = reinterpret_cast<const char*>(a) + row[r];
      const typename Units::Vector x = Units::load_unit(reinterpret_cast<const Unit*>(first) + k);
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) sum[r][j] = Units::multiply_add(sum[r][j], x, column[j]);
    }
  };
  int64_t i = 0;
  if constexpr (fetch) {
    for (; i < epilogue.fetch.n; ++i, a += a_step, b += kPanel) {
      step(0);
      __builtin_prefetch(epilogue.fetch.lines[i]);
    }
  }
  if (kUnroll > 1 && a_step == 1) {
    for (; i + kUnroll <= n; i += kUnroll, a += kUnroll, b += kUnroll * kPanel) {
      // Opaque, or the compiler keeps a pointer for each row and step, and spills them.
      asm("" : "+r"(a), "+r"(b));
#pragma GCC unroll 12
      for (int r = 1; r < R; ++r) asm("" : "+r"(row[r]));
#pragma GCC unroll 4
      for (int k = 0; k < kUnroll; ++k) step(k);
    }
  }
  for (; i < n; ++i, a += a_step, b += kPanel) step(0);
  switch (epilogue.store) {
    case Store::set: {
      const vf factor = broadcast(epilogue.factor);
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int j = 0; j < V; ++j) {
          sum[r][j] = sum[r][j] * factor;
          store(c + r * c_row + j * kLanes, sum[r][j]);
        }
      if (!epilogue.highest) break;
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) {
        vf highest = load(epilogue.highest + r * kLanes);
#pragma GCC unroll 4
        for (int j = 0; j < V; ++j) highest = vmax(highest, sum[r][j]);
        store(epilogue.highest + r * kLanes, highest);
      }
      break;
    }
    case Store::add:
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int j = 0; j < V; ++j) {
          float* p = c + r * c_row + j * kLanes;
          store(p, load(p) + sum[r][j]);
        }
      break;
    case Store::rescale:
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) {
        const vf alpha = broadcast(epilogue.alpha[r]);
#pragma GCC unroll 4
        for (int j = 0; j < V; ++j) {
          float* p = c + r * c_row + j * kLanes;
          store(p, load(p) * alpha + sum[r][j]);
        }
      }
      break;
  }
}

template <class Units, int V, bool fetch>
MMFAST_INLINE void tile_rows(int rows, const typename Units::Unit* a, int64_t a_row, int64_t a_step,
                             const typename Units::Unit* b, int64_t n, float* c, int64_t c_row,
                             const Epilogue& e) {
  switch (rows) {
    case 6:
      return tile<Units, 6, V, fetch>(a, a_row, a_step, b, n, c, c_row, e);
    case 5:
      return tile<Units, 5, V, fetch>(a, a_row, a_step, b, n, c, c_row, e);
    case 4:
      return tile<Units, 4, V, fetch>(a, a_row, a_step, b, n, c, c_row, e);
    case 3:
      return tile<Units, 3, V, fetch>(a, a_row, a_step, b, n, c, c_row, e);
    case 2:
      return tile<Units, 2, V, fetch>(a, a_row, a_step, b, n, c, c_row, e);
    default:
      return tile<Units, 1, V, fetch>(a, a_row, a_step, b, n, c, c_row, e);
  }
}

// As many rows as the registers hold where a tile is at most two vectors wide, or else kRows.
constexpr int tall_rows(int groups) {
  return MMFAST_VECTOR_BYTES == 64 && groups <= 2 ? 2 * kRows : kRows;
}

template <class Units, bool fetch>
void multiply_groups(int rows, int groups, const typename Units::Unit* a, int64_t a_row, int64_t a_step,
                     const typename Units::Unit* b, int64_t n, float* c, int64_t c_row, const Epilogue& e) {
#if MMFAST_VECTOR_BYTES == 64
  switch (groups) {
    case 4:
      return tile_rows<Units, 4, fetch>(rows, a, a_row, a_step, b, n, c, c_row, e);
    case 3:
      return tile_rows<Units, 3, fetch>(rows, a, a_row, a_step, b, n, c, c_row, e);
    case 2:
      return tile_rows<Units, 2, fetch>(rows, a, a_row, a_step, b, n, c, c_row, e);
    default:
      return tile_rows<Units, 1, fetch>(rows, a, a_row, a_step, b, n, c, c_row, e);
  }
#else
  tile_rows<Units, kVecs, fetch>(rows, a, a_row, a_step, b, n, c, c_row, e);
  for (int j = kVecs * kLanes; j < groups * kGroup; j += kVecs * kLanes)
    tile_rows<Units, kVecs, false>(rows, a, a_row, a_step, b + j, n, c + j, c_row, e);
#endif
}

// c [rows <= 6][16 * groups] from a [rows][n] and b [n][16 * groups], groups <= 4.
template <class Units>
void multiply(int rows, int groups, const typename Units::Unit* a, int64_t a_row, int64_t a_step,
              const typename Units::Unit* b, int64_t n, float* c, int64_t c_row, const Epilogue& e) {
  if (e.fetch.n > 0) return multiply_groups<Units, true>(rows, groups, a, a_row, a_step, b, n, c, c_row, e);
  multiply_groups<Units, false>(rows, groups, a, a_row, a_step, b, n, c, c_row, e);
}

// multiply() for up to tall_rows(groups) rows.
template <class Units>
void multiply_tall(int rows, int groups, const typename Units::Unit* a, int64_t a_row, int64_t a_step,
                   const typename Units::Unit* b, int64_t n, float* c, int64_t c_row, const Epilogue& e) {
  if constexpr (MMFAST_VECTOR_BYTES == 64) {
    if (rows == 2 * kRows) {
      auto run = groups == 2 ? tile<Units, 2 * kRows, 2, false> : tile<Units, 2 * kRows, 1, false>;
      if (e.fetch.n > 0)
        run = groups == 2 ? tile<Units, 2 * kRows, 2, true> : tile<Units, 2 * kRows, 1, true>;
      return run(a, a_row, a_step, b, n, c, c_row, e);
    }
    if (rows > kRows) {
      multiply<Units>(kRows, groups, a, a_row, a_step, b, n, c, c_row, e);
      return multiply<Units>(rows - kRows, groups, a + kRows * a_row, a_row, a_step, b, n, c + kRows * c_row,
                             c_row, e);
    }
  }
  multiply<Units>(rows, groups, a, a_row, a_step, b, n, c, c_row, e);
}

// Rows of q, k, v or dout of one head as they lie in memory.
template <class T>
struct Rows {
  const T* data;
  int64_t stride;
};

// The cache lines of rows that are read later, fetched one by one in the steps of products that run
// meanwhile. All at once they would wait for memory, and every load after them.
class Lines {
 public:
  explicit Lines(const char** room) : line_(room) {}

  template <class T>
  void add(const Rows<T>& rows, int64_t n, int64_t dim) {
    for (int64_t r = 0; r < n; ++r) {
      const auto begin = reinterpret_cast<uintptr_t>(rows.data + r * rows.stride);
      const uintptr_t end = begin + uintptr_t(dim) * sizeof(T);
      for (uintptr_t line = begin & ~uintptr_t(63); line < end; line += 64)
        line_[count_++] = reinterpret_cast<const char*>(line);
    }
  }

  // The next n, or as many as are left.
  Fetch take(int64_t n) {
    const char* const* first = line_ + taken_;
    n = n < count_ - taken_ ? n : count_ - taken_;
    taken_ += n;
    return {first, n};
  }

  int64_t left() const { return count_ - taken_; }

  // Fetches what products have not.
  void rest() {
    for (; taken_ < count_; ++taken_) __builtin_prefetch(line_[taken_]);
  }

 private:
  const char** line_;
  int64_t count_ = 0, taken_ = 0;
};

MMFAST_INLINE int64_t round_up(int64_t x, int64_t multiple) {
  return (x + multiple - 1) / multiple * multiple;
}

template <class T>
MMFAST_INLINE vf load_columns(const T* row, int64_t column, int64_t dim) {
  return column + kLanes <= dim ? load(row + column) : load_tail(row + column, int(dim - column));
}

// Rows of one head lie far apart, where no hardware prefetcher follows.
template <class T>
MMFAST_INLINE void prefetch_row(const T* row, int64_t dim) {
  const char* line = reinterpret_cast<const char*>(row);
  for (int64_t i = 0; i < dim * int64_t(sizeof(T)); i += 64) __builtin_prefetch(line + i);
}

// One row as units, with zeros up to a whole group.
MMFAST_INLINE void copy_row(const float* row, int64_t dim, float* out) {
  std::memcpy(out, row, dim * 4);
}
MMFAST_INLINE void copy_row(const bf16* row, int64_t dim, float* out) {
  for (int64_t d = 0; d < dim; d += 4) {
    for (int j = 0; j < 4; ++j) out[d + j] = to_float(row[d + j]);
  }
}
MMFAST_INLINE void copy_row(const bf16* row, int64_t dim, uint32_t* out) {
  std::memcpy(out, row, dim * 2);
}

// out[d * 64 + j] = rows[j][d] for 16 rows.
template <class Unit>
MMFAST_INLINE void transpose_group(const Unit* const* rows, int64_t units, Unit* out) {
#if defined(__AVX512F__)
  // Lane b of x[i] is row 4 b + i, so that 4 x 4 transposes within lanes leave the rows in order.
  for (int64_t d = 0; d < units; d += 4) {
    __m512 x[4];
    for (int i = 0; i < 4; ++i) {
      auto quarter = [&](int b) { return _mm_loadu_ps(reinterpret_cast<const float*>(rows[4 * b + i] + d)); };
      x[i] = _mm512_castps128_ps512(quarter(0));
      x[i] = _mm512_insertf32x4(x[i], quarter(1), 1);
      x[i] = _mm512_insertf32x4(x[i], quarter(2), 2);
      x[i] = _mm512_insertf32x4(x[i], quarter(3), 3);
    }
    const __m512d a = _mm512_castps_pd(_mm512_unpacklo_ps(x[0], x[1]));
    const __m512d b = _mm512_castps_pd(_mm512_unpackhi_ps(x[0], x[1]));
    const __m512d c = _mm512_castps_pd(_mm512_unpacklo_ps(x[2], x[3]));
    const __m512d e = _mm512_castps_pd(_mm512_unpackhi_ps(x[2], x[3]));
    _mm512_storeu_pd(out + d * kPanel, _mm512_unpacklo_pd(a, c));
    _mm512_storeu_pd(out + (d + 1) * kPanel, _mm512_unpackhi_pd(a, c));
    _mm512_storeu_pd(out + (d + 2) * kPanel, _mm512_unpacklo_pd(b, e));
    _mm512_storeu_pd(out + (d + 3) * kPanel, _mm512_unpackhi_pd(b, e));
  }
#elif defined(__AVX2__)
  // The same by eight rows.
  for (int64_t d = 0; d < units; d += 4) {
    for (int j = 0; j < kGroup; j += 8) {
      __m256 x[4];
      for (int i = 0; i < 4; ++i) {
        const float *low = rows[j + i] + d, *high = rows[j + 4 + i] + d;
        x[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(low)), _mm_loadu_ps(high), 1);
      }
      const __m256d a = _mm256_castps_pd(_mm256_unpacklo_ps(x[0], x[1]));
      const __m256d b = _mm256_castps_pd(_mm256_unpackhi_ps(x[0], x[1]));
      const __m256d c = _mm256_castps_pd(_mm256_unpacklo_ps(x[2], x[3]));
      const __m256d e = _mm256_castps_pd(_mm256_unpackhi_ps(x[2], x[3]));
      double* to = reinterpret_cast<double*>(out + d * kPanel + j);
      _mm256_storeu_pd(to, _mm256_unpacklo_pd(a, c));
      _mm256_storeu_pd(to + kPanel / 2, _mm256_unpackhi_pd(a, c));
      _mm256_storeu_pd(to + kPanel, _mm256_unpacklo_pd(b, e));
      _mm256_storeu_pd(to + kPanel / 2 * 3, _mm256_unpackhi_pd(b, e));
    }
  }
#else
  for (int64_t d = 0; d < units; ++d)
    for (int j = 0; j < kGroup; ++j) out[d * kPanel + j] = rows[j][d];
#endif
}

// Up to 16 rows, transposed: out[units of dim][64], columns 0 to 15, zero from n on. scratch: 17 * dim units.
template <class Units, class T, class RowOf>
MMFAST_INLINE void pack_group(RowOf row_of, int n, int64_t dim, typename Units::Unit* out,
                              typename Units::Unit* scratch) {
  using Unit = typename Units::Unit;
  constexpr bool in_place = sizeof(T) * Units::kPack == sizeof(Unit);
  const Unit* source[kGroup];
  if (n < kGroup) std::memset(scratch + kGroup * dim, 0, dim * sizeof(Unit));
  for (int i = 0; i < kGroup; ++i) {
    if (i >= n) {
      source[i] = scratch + kGroup * dim;
    } else if (in_place) {
      source[i] = reinterpret_cast<const Unit*>(row_of(i));
    } else {
      copy_row(row_of(i), dim, scratch + i * dim);
      source[i] = scratch + i * dim;
    }
  }
  transpose_group(source, dim / Units::kPack, out);
}

// A panel of n <= 64 rows, transposed: out[units of dim][64]. Columns up to a whole group are zero.
template <class Units, class T>
void pack_panel(Rows<T> rows, int n, int64_t dim, typename Units::Unit* out, typename Units::Unit* scratch) {
  for (int j = 0; j < n; j += kGroup)
    pack_group<Units, T>([&](int i) { return rows.data + (j + i) * rows.stride; },
                         n - j < kGroup ? n - j : kGroup, dim, out + j, scratch);
}

// pack_panel(); meanwhile the same rows of `next`, which are packed afterwards, are fetched.
template <class Units, class T>
void pack_transposed(Rows<T> rows, int n, int64_t dim, typename Units::Unit* out,
                     typename Units::Unit* scratch, Rows<T> next) {
  for (int j = 0; j < n; j += kGroup) {
    for (int i = 0; i < kGroup; ++i) {
      prefetch_row(rows.data + (j + i + kGroup) * rows.stride, dim);
      prefetch_row(next.data + (j + i) * next.stride, dim);
    }
    pack_panel<Units>(Rows<T>{rows.data + j * rows.stride, rows.stride}, n - j < kGroup ? n - j : kGroup, dim,
                      out + j, scratch);
  }
}

#if defined(__AVX512BF16__)
// Units of two rows, the second one zero where there is none; panels of 64 columns lie `panel` units apart.
MMFAST_INLINE void interleave_rows(const bf16* first, const bf16* second, int64_t dim, int64_t panel,
                                   uint32_t* out) {
  alignas(64) static constexpr uint16_t kLow[32] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,
                                                    37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
                                                    11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i low = _mm512_load_si512(kLow), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  for (; dim > 0; dim -= kPanel, first += kPanel, out += panel) {
    for (int d = 0; d < kPanel && d < dim; d += 32) {
      const __mmask32 inside = d + 32 <= dim ? ~uint32_t(0) : (uint32_t(1) << (dim - d)) - 1;
      const __m512i a = _mm512_maskz_loadu_epi16(inside, first + d);
      const __m512i b = second ? _mm512_maskz_loadu_epi16(inside, second + d) : __m512i{};
      _mm512_storeu_si512(out + d, _mm512_permutex2var_epi16(a, low, b));
      if (d + kGroup < dim) _mm512_storeu_si512(out + d + kGroup, _mm512_permutex2var_epi16(a, high, b));
    }
    if (second) second += kPanel;
  }
}
#endif

// n rows as they are: out[ceil(dim / 64)][capacity units][64]; a unit of two rows has the second one zero at
// the end. Columns up to a whole group are zero.
template <class Units, class T, class RowOf>
MMFAST_INLINE void pack_rows_of(RowOf row_of, int64_t n, int64_t dim, int64_t capacity,
                                typename Units::Unit* out) {
  typename Units::Unit* row = out;
  for (int64_t i = 0; i < n; i += Units::kPack, row += kPanel) {
    const T* first = row_of(i);
    if constexpr (Units::kPack == 2) {
      interleave_rows(first, i + 1 < n ? row_of(i + 1) : nullptr, dim, capacity * kPanel, row);
    } else {
      for (int64_t d = 0; d < dim; d += kLanes)
        store(row + d / kPanel * capacity * kPanel + d % kPanel, load_columns(first, d, dim));
      // With vectors narrower than a group, dim may end inside one.
      for (int64_t d = round_up(dim, kLanes); d < round_up(dim, kGroup); ++d)
        row[d / kPanel * capacity * kPanel + d % kPanel] = 0;
    }
  }
}

}  // namespace
}  // namespace MMFAST_ISA
}  // namespace mmfast
