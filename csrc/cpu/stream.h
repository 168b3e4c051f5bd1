// Stores that bypass the cache, for outputs larger than it: without them every written line is read first.
// Include inside kernel files only; internal linkage (see isa.h).
#pragma once
#include "cpu/simd.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace mmfast {
namespace MMFAST_ISA {
namespace {

// A stored vector must be aligned to its own size: rows of `bytes` bytes from `base` on are, or are not.
MMFAST_INLINE bool can_stream(const void* base, int64_t bytes) {
#if defined(__AVX2__)
  return (reinterpret_cast<uintptr_t>(base) | uintptr_t(bytes)) % 64 == 0;
#else
  (void)base, (void)bytes;
  return false;
#endif
}

template <bool kStream>
MMFAST_INLINE void put(float* p, vf v) {
#if defined(__AVX512F__)
  if constexpr (kStream) return _mm512_stream_ps(p, (__m512)v);
#elif defined(__AVX2__)
  if constexpr (kStream) return _mm256_stream_ps(p, (__m256)v);
#endif
  store(p, v);
}

template <bool kStream>
MMFAST_INLINE void put(bf16* p, vf v) {
#if defined(__AVX2__)
  if constexpr (kStream) {
    vh half;
    store(reinterpret_cast<bf16*>(&half), v);
#if defined(__AVX512F__)
    return _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)half);
#else
    return _mm_stream_si128(reinterpret_cast<__m128i*>(p), (__m128i)half);
#endif
  }
#endif
  store(p, v);
}

// Before other threads read what was streamed.
MMFAST_INLINE void stream_fence() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

}  // namespace
}  // namespace MMFAST_ISA
}  // namespace mmfast
