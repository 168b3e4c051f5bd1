// Vectors of float32 in the compiler's own vector types: portable, and as wide as the instruction set allows.
// Include inside kernel files only; everything has internal linkage (see isa.h).
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#define MMFAST_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define MMFAST_VECTOR_BYTES 32
#else
#define MMFAST_VECTOR_BYTES 16
#endif

#if defined(__AVX2__)
#include <immintrin.h>
// g++ 12 takes the undefined sources of its own unmasked AVX-512 intrinsics for a mistake.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

namespace mmfast {
namespace MMFAST_ISA {
namespace {

constexpr int kLanes = MMFAST_VECTOR_BYTES / 4;

typedef float vf __attribute__((vector_size(MMFAST_VECTOR_BYTES)));
typedef int32_t vi __attribute__((vector_size(MMFAST_VECTOR_BYTES)));
typedef uint32_t vu __attribute__((vector_size(MMFAST_VECTOR_BYTES)));
typedef uint16_t vh __attribute__((vector_size(MMFAST_VECTOR_BYTES / 2)));

// Storage of a bfloat16: the upper half of a float32.
struct bf16 {
  uint16_t bits;
};

#define MMFAST_INLINE static inline __attribute__((always_inline))

MMFAST_INLINE vf splat(float x) {
  return vf{} + x;
}

MMFAST_INLINE float to_float(float x) {
  return x;
}
MMFAST_INLINE float to_float(bf16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

// Round to nearest even; NaN stays NaN.
MMFAST_INLINE bf16 to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {uint16_t((bits >> 16) | 0x40)};
  return {uint16_t((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16)};
}

MMFAST_INLINE void store_one(float* p, float x) {
  *p = x;
}
MMFAST_INLINE void store_one(bf16* p, float x) {
  *p = to_bf16(x);
}

MMFAST_INLINE vf load(const float* p) {
  vf v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
MMFAST_INLINE void store(float* p, vf v) {
  std::memcpy(p, &v, sizeof v);
}

// The conversions are intrinsics because GCC splits __builtin_convertvector into two halves and joins them
// again.
MMFAST_INLINE vf load(const bf16* p) {
#if defined(__AVX512F__)
  return (vf)((vu)_mm512_maskz_cvtepu16_epi32(0xffff, _mm256_loadu_si256((const __m256i*)p)) << 16);
#elif defined(__AVX2__)
  return (vf)((vu)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)) << 16);
#else
  vh half;
  std::memcpy(&half, p, sizeof half);
  const vu bits = __builtin_convertvector(half, vu) << 16;
  return (vf)bits;
#endif
}
MMFAST_INLINE void store(bf16* p, vf v) {
#if defined(__AVX512BF16__)
  const __m256bh half = _mm512_cvtneps_pbh((__m512)v);
  std::memcpy(p, &half, sizeof half);
#else
  const vu bits = (vu)v;
  const vu rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  const vu bits16 = (v != v ? bits | 0x400000u : rounded) >> 16;
#if defined(__AVX512F__)
  const vh half = (vh)_mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)bits16);  // without mask GCC 12 warns
#elif defined(__AVX2__)
  const __m128i half =
      _mm_packus_epi32(_mm256_castsi256_si128((__m256i)bits16), _mm256_extracti128_si256((__m256i)bits16, 1));
#else
  const vh half = __builtin_convertvector(bits16, vh);
#endif
  std::memcpy(p, &half, sizeof half);
#endif
}

// The first n < kLanes elements; the others are zero, and are not stored.
template <typename T>
MMFAST_INLINE vf load_tail(const T* p, int n) {
  T buffer[kLanes] = {};
  std::memcpy(buffer, p, n * sizeof(T));
  return load(buffer);
}
template <typename T>
MMFAST_INLINE void store_tail(T* p, vf v, int n) {
  T buffer[kLanes];
  store(buffer, v);
  std::memcpy(p, buffer, n * sizeof(T));
}

MMFAST_INLINE vf select(vi condition, vf a, vf b) {
  return condition ? a : b;
}
// The second operand where one is NaN. GCC makes two instructions of the comparison where a mask or a load
// can be folded into the second.
MMFAST_INLINE vf vmax(vf a, vf b) {
#if defined(__AVX512F__)
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}
MMFAST_INLINE vf vmin(vf a, vf b) {
#if defined(__AVX512F__)
  return (vf)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (vf)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return a < b ? a : b;
#endif
}
MMFAST_INLINE vf vabs(vf a) {
  return (vf)((vu)a & 0x7fffffffu);
}

// Sums and maxima over lanes in a fixed tree order, so that results do not depend on how a compiler orders
// them.
MMFAST_INLINE float sum(vf v) {
#if defined(__AVX512F__) && defined(__has_builtin) && __has_builtin(__builtin_shufflevector)
  // The same order as below, in registers.
  v += __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
  v += __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3);
  v += __builtin_shufflevector(v, v, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1);
  v += __builtin_shufflevector(v, v, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0);
  return v[0];
#else
  float lane[kLanes];
  std::memcpy(lane, &v, sizeof v);
  for (int step = kLanes / 2; step > 0; step /= 2)
    for (int i = 0; i < step; ++i) lane[i] += lane[i + step];
  return lane[0];
#endif
}
MMFAST_INLINE float max_lane(vf v) {
  float lane[kLanes];
  std::memcpy(lane, &v, sizeof v);
  for (int step = kLanes / 2; step > 0; step /= 2)
    for (int i = 0; i < step; ++i) lane[i] = lane[i] > lane[i + step] ? lane[i] : lane[i + step];
  return lane[0];
}

// 2^x for x <= 127; 0 for -inf, NaN for NaN. Below -126 it is 0 or gradually 0. Relative error 8e-8; `coarse`
// allows 3e-6, for what becomes a bfloat16.
template <bool coarse = false>
MMFAST_INLINE vf exp2_approx(vf x) {
#if defined(__AVX512F__)
  const vf f = (vf)_mm512_reduce_ps((__m512)x, 9);  // x - floor(x); 0 for -inf
  vf p;
  if constexpr (coarse) {
    p = splat(1.3426704e-2f);
    p = p * f + splat(5.2242436e-2f);
    p = p * f + splat(2.4128023e-1f);
    p = p * f + splat(6.9304484e-1f);
  } else {
    p = splat(2.1565985e-4f);
    p = p * f + splat(1.2482288e-3f);
    p = p * f + splat(9.6737752e-3f);
    p = p * f + splat(5.5486184e-2f);
    p = p * f + splat(2.4022909e-1f);
    p = p * f + splat(6.9314706e-1f);
  }
  p = p * f + splat(1.0f);
  return (vf)_mm512_scalef_ps((__m512)p, (__m512)x);  // p * 2^floor(x)
#else
  const vf clamped = vmax(splat(-127.0f), x);
  // 1.5 * 2^23 + 127: rounds to an integer, whose biased exponent it leaves in the low bits; 0 for -127.
  const vf shifted = clamped + splat(12583039.0f);
  const vf f = clamped - (shifted - splat(12583039.0f));  // in [-0.5, 0.5]
  vf p = splat(1.5353362e-4f);
  p = p * f + splat(1.3398874e-3f);
  p = p * f + splat(9.6184370e-3f);
  p = p * f + splat(5.5503324e-2f);
  p = p * f + splat(2.4022648e-1f);
  p = p * f + splat(6.9314720e-1f);
  p = p * f + splat(1.0f);
  return p * (vf)((vu)shifted << 23);
#endif
}

// Natural logarithm of a positive, normal x, NaN for NaN; relative error 2e-7. Others give any number.
MMFAST_INLINE vf log_approx(vf x) {
  // x = 2^exponent * (1 + f), with 1 + f from sqrt(1/2) to sqrt(2).
  const vi exponent = (vi)((vu)x - 0x3f3504f3u) >> 23;
  const vf f = (vf)((vu)x - ((vu)exponent << 23)) - splat(1.0f);
  vf p = splat(8.7004013e-2f);
  p = p * f + splat(-1.4266932e-1f);
  p = p * f + splat(1.4914508e-1f);
  p = p * f + splat(-1.6577652e-1f);
  p = p * f + splat(1.9963101e-1f);
  p = p * f + splat(-2.5001335e-1f);
  p = p * f + splat(3.3333910e-1f);
  p = p * f + splat(-0.5f);
  const vf log = __builtin_convertvector(exponent, vf) * splat(0.69314718f) + (p * (f * f) + f);
  return select(x != x, x, log);
}

MMFAST_INLINE vf exp_approx(vf x) {
  return exp2_approx(x * splat(1.44269504f));
}

}  // namespace
}  // namespace MMFAST_ISA
}  // namespace mmfast
