// Philox4x32-10 of kLanes counters at a time; the numbers are those of mmfast/rng.h.
#pragma once
#include "cpu/simd.h"
#include "mmfast/rng.h"
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace mmfast {
namespace MMFAST_ISA {
namespace {

// The upper and lower halves of a * m.
MMFAST_INLINE void multiply_wide(vu a, uint32_t m, vu& high, vu& low) {
#if defined(__AVX512F__)
  // With a zero mask of all ones: g++ 12 warns of an uninitialized operand in the plain forms.
  const __m512i factor = _mm512_set1_epi32(int(m));
  const __m512i even = _mm512_maskz_mul_epu32(0xff, (__m512i)a, factor);
  const __m512i odd = _mm512_maskz_mul_epu32(0xff, _mm512_maskz_srli_epi64(0xff, (__m512i)a, 32), factor);
  high = (vu)_mm512_mask_blend_epi32(0xaaaa, _mm512_maskz_srli_epi64(0xff, even, 32), odd);
  low = (vu)_mm512_mask_blend_epi32(0xaaaa, even, _mm512_maskz_slli_epi64(0xff, odd, 32));
#elif defined(__AVX2__)
  const __m256i factor = _mm256_set1_epi32(int(m));
  const __m256i even = _mm256_mul_epu32((__m256i)a, factor);
  const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64((__m256i)a, 32), factor);
  high = (vu)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
  low = (vu)_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
#else
  for (int j = 0; j < kLanes; ++j) {
    const uint64_t product = uint64_t(a[j]) * m;
    high[j] = uint32_t(product >> 32);
    low[j] = uint32_t(product);
  }
#endif
}

struct PhiloxLanes {
  vu x, y, z, w;
};

MMFAST_INLINE PhiloxLanes philox_lanes(uint64_t seed, vu c0, vu c1, vu c2, vu c3) {
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    vu high0, low0, high1, low1;
    multiply_wide(c0, 0xD2511F53u, high0, low0);
    multiply_wide(c2, 0xCD9E8D57u, high1, low1);
    c0 = high1 ^ c1 ^ k0;
    c2 = high0 ^ c3 ^ k1;
    c1 = low1;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {c0, c1, c2, c3};
}

// Uniform in [0, 1) on a grid of 2^-24.
MMFAST_INLINE vf uniform_lanes(vu bits) {
  return __builtin_convertvector((vi)(bits >> 8), vf) * splat(0x1p-24f);
}

// 0, 1, ... kLanes - 1
MMFAST_INLINE vu lane_numbers() {
  vu lane;
  for (int j = 0; j < kLanes; ++j) lane[j] = uint32_t(j);
  return lane;
}

}  // namespace
}  // namespace MMFAST_ISA
}  // namespace mmfast
