// csrc/cuda/ptx.h for the CPU: the same functions, by the layouts of fragments that the PTX ISA gives.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

namespace mmfast {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

inline float to_float(float x) {
  return x;
}
inline float to_float(bf16 x) {
  return __uint_as_float(uint32_t(x.bits) << 16);
}
inline float to_float(f16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, magnitude = x.bits & 0x7fff;
  if (magnitude >= 0x7c00) return __uint_as_float(sign | 0x7f800000u | (magnitude & 0x3ff) << 13);
  // As a float32 the bits are 2^112 times too small; subnormal numbers come out right as well.
  return std::copysign(__uint_as_float(magnitude << 13) * 0x1p112f, __uint_as_float(sign | 0x3f800000u));
}

template <class T>
T from_float(float x) {
  const uint32_t bits = __float_as_uint(x), sign = bits >> 16 & 0x8000;
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else if constexpr (std::is_same_v<T, bf16>) {
    if (x != x) return {0x7fff};
    return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
  } else {
    if (x != x) return {0x7fff};
    const float magnitude = std::fabs(x);
    if (magnitude >= 65520.0f) return {uint16_t(sign | 0x7c00)};
    if (magnitude < 0x1p-14f) return {uint16_t(sign | uint32_t(std::nearbyintf(magnitude * 0x1p24f)))};
    const uint32_t rebased = (bits & 0x7fffffff) - (112u << 23);
    return {uint16_t(sign | (rebased + 0xfff + (rebased >> 13 & 1)) >> 13)};
  }
}

template <class T>
uint32_t pack2(float low, float high) {
  return from_float<T>(low).bits | uint32_t(from_float<T>(high).bits) << 16;
}

namespace shim_ptx {
struct Product {
  float* d;
  const uint32_t *a, *b;
};

template <class T>
float half_of(uint32_t word, int upper) {
  return to_float(T{uint16_t(upper ? word >> 16 : word)});
}

// Registers of lane t: a holds rows t / 4 and t / 4 + 8, columns 2 (t % 4) + {0, 1} and 8 more; b the same of
// its columns; d rows t / 4 and t / 4 + 8, columns 2 (t % 4) + {0, 1}.
template <class T>
void multiply(void* const* lanes) {
  float a[16][16], b[16][8];
  for (int t = 0; t < 32; ++t) {
    const auto* p = static_cast<const Product*>(lanes[t]);
    const int group = t / 4, pair = 2 * (t % 4);
    for (int h = 0; h < 2; ++h) {
      for (int i = 0; i < 4; ++i) a[group + 8 * (i & 1)][pair + h + 8 * (i >> 1)] = half_of<T>(p->a[i], h);
      for (int i = 0; i < 2; ++i) b[pair + h + 8 * i][group] = half_of<T>(p->b[i], h);
    }
  }
  for (int t = 0; t < 32; ++t) {
    float* d = static_cast<const Product*>(lanes[t])->d;
    for (int i = 0; i < 4; ++i) {
      const int row = t / 4 + 8 * (i >> 1), column = 2 * (t % 4) + (i & 1);
      for (int k = 0; k < 16; ++k) d[i] += a[row][k] * b[k][column];
    }
  }
}

struct Rows {
  uint32_t* r;
  const void* row;
};

template <bool kTransposed>
void load_matrices(void* const* lanes) {
  for (int i = 0; i < 4; ++i) {
    uint16_t m[8][8];
    for (int j = 0; j < 8; ++j) std::memcpy(m[j], static_cast<const Rows*>(lanes[8 * i + j])->row, 16);
    for (int t = 0; t < 32; ++t) {
      const int row = t / 4, pair = 2 * (t % 4);
      const uint32_t low = kTransposed ? m[pair][row] : m[row][pair];
      const uint32_t high = kTransposed ? m[pair + 1][row] : m[row][pair + 1];
      static_cast<const Rows*>(lanes[t])->r[i] = low | high << 16;
    }
  }
}
}  // namespace shim_ptx

template <class T>
void mma_16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], SHIM_AT) {
  static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, f16>);
  shim_ptx::Product mine{d, a, b};
  shim::meet({"mma_16816", file, line}, ~0u, &mine, shim_ptx::multiply<T>);
}

inline void ldmatrix_x4(uint32_t (&r)[4], const void* shared_row, SHIM_AT) {
  shim::check_shared("ldmatrix_x4", shared_row);
  shim_ptx::Rows mine{r, shared_row};
  shim::meet({"ldmatrix_x4", file, line}, ~0u, &mine, shim_ptx::load_matrices<false>);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* shared_row, SHIM_AT) {
  shim::check_shared("ldmatrix_x4_trans", shared_row);
  shim_ptx::Rows mine{r, shared_row};
  shim::meet({"ldmatrix_x4_trans", file, line}, ~0u, &mine, shim_ptx::load_matrices<true>);
}

inline void cp_async_16(void* shared, const void* global, bool valid) {
  shim::copy_later(shared, global, valid);
}
inline void cp_async_commit() {
  shim::commit_copies();
}
template <int N>
void cp_async_wait() {
  shim::wait_for_copies(N);
}

inline char* shared_memory() {
  return shim::shared_memory();
}

inline float exp2_approx(float x) {
  return std::exp2(x);
}

struct alignas(16) Vector16 {
  uint32_t word[4];
};
inline Vector16 load16(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % 16) shim::fail("load16: the address is no multiple of 16 bytes");
  Vector16 v;
  std::memcpy(&v, p, 16);
  return v;
}
inline void store16(void* p, const Vector16& v) {
  if (reinterpret_cast<uintptr_t>(p) % 16) shim::fail("store16: the address is no multiple of 16 bytes");
  std::memcpy(p, &v, 16);
}

}  // namespace mmfast
