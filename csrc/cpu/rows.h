// Loops over the rows of a matrix: vectors with a tail, fixed chunks, scratch memory, and stores that bypass
// the cache, for outputs larger than it. Include inside kernel files only; internal linkage (see isa.h).
#pragma once
#include <new>

#include "cpu/simd.h"

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

// Vectors behind each other.
template <bool kStream, int kCount, typename T>
MMFAST_INLINE void put_group(T* p, const vf* v) {
#if defined(__AVX512BF16__)
  if constexpr (sizeof(T) == 2 && kCount % 2 == 0) {
    for (int k = 0; k < kCount; k += 2) {
      const __m512bh both = _mm512_cvtne2ps_pbh((__m512)v[k + 1], (__m512)v[k]);
      if constexpr (kStream)
        _mm512_stream_si512(reinterpret_cast<__m512i*>(p + k * kLanes), (__m512i)both);
      else
        std::memcpy(p + k * kLanes, &both, sizeof both);
    }
    return;
  }
#endif
  for (int k = 0; k < kCount; ++k) put<kStream>(p + k * kLanes, v[k]);
}

// Before other threads read what was streamed.
MMFAST_INLINE void stream_fence() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

// Rows are cut into a number of chunks that depends on the batch only, so that sums over rows do not depend
// on the number of threads.
constexpr int64_t kMaxChunks = 64;
constexpr int64_t kRowsPerChunk = 32;

MMFAST_INLINE int64_t chunks_of(int64_t rows) {
  const int64_t chunks = (rows + kRowsPerChunk - 1) / kRowsPerChunk;
  return chunks < 1 ? 1 : chunks < kMaxChunks ? chunks : kMaxChunks;
}

MMFAST_INLINE int64_t padded(int64_t dim) {
  return (dim + 15) / 16 * 16;
}

MMFAST_INLINE float* allocate(int64_t n) {
  return static_cast<float*>(::operator new[](size_t(n) * sizeof(float), std::align_val_t(64)));
}
MMFAST_INLINE void release(float* p) {
  ::operator delete[](p, std::align_val_t(64));
}

// Zeroed memory of n floats for each thread, a page away from the next one's: where a thread reads on to the
// end of its memory, the hardware fetches what lies behind it, and would take it from the neighbour's cache.
class Scratch {
 public:
  Scratch(int64_t threads, int64_t n) : stride_((n + 2 * kPage - 1) / kPage * kPage) {
    const size_t bytes = size_t(threads * stride_) * sizeof(float);
    memory_ = static_cast<float*>(::operator new[](bytes, kAlignment));
    std::memset(memory_, 0, bytes);
  }
  Scratch(const Scratch&) = delete;
  ~Scratch() { ::operator delete[](memory_, kAlignment); }

  float* of(int64_t thread) const { return memory_ + thread * stride_; }

 private:
  static constexpr int64_t kPage = 4096 / sizeof(float);
  static constexpr std::align_val_t kAlignment{4096};

  int64_t stride_;
  float* memory_;
};

// The row to fetch while row t of [begin, end) is worked on, `bytes` of it: far enough ahead to hide the
// memory behind it, near enough to stay in the first-level cache, of which the output takes no part where its
// stores bypass it.
template <bool kStream>
MMFAST_INLINE int64_t row_ahead(int64_t t, int64_t end, int64_t bytes) {
  constexpr int64_t kAheadBytes = (kStream ? 12 : 6) << 10;
  const int64_t rows = kAheadBytes / (bytes + 1), next = t + (rows < 1 ? 1 : rows);
  return next < end ? next : end - 1;
}

// Fetches n elements, to be read or to be written.
template <bool kWrite, typename T>
MMFAST_INLINE void fetch(const T* p, int64_t n) {
  for (int64_t i = 0; i < n; i += int64_t(64 / sizeof(T))) __builtin_prefetch(p + i, kWrite);
}

// A body that is not inlined passes its vectors through memory, at several times the cost.
#define MMFAST_INLINE_LAMBDA __attribute__((always_inline))

// Calls body(i, n) for every vector of a row; n is kLanes but for the last.
template <typename Body>
MMFAST_INLINE void for_each_vector(int64_t dim, Body body) {
  int64_t i = 0;
  for (; i + kLanes <= dim; i += kLanes) body(i, kLanes);
  if (i < dim) body(i, int(dim - i));
}
// Calls body(i, n, k) with k counting 0 to 3: sums over a row take one accumulator per k, or each addition
// would wait for the one before.
template <typename Body>
MMFAST_INLINE void for_each_vector_in_four(int64_t dim, Body body) {
  int64_t i = 0;
  for (; i + 4 * kLanes <= dim; i += 4 * kLanes) {
    body(i, kLanes, 0);
    body(i + kLanes, kLanes, 1);
    body(i + 2 * kLanes, kLanes, 2);
    body(i + 3 * kLanes, kLanes, 3);
  }
  for (; i + kLanes <= dim; i += kLanes) body(i, kLanes, 0);
  if (i < dim) body(i, int(dim - i), 1);
}

// A number that the compiler knows.
template <int kValue>
struct Count {
  static constexpr int value = kValue;
};

// Calls body(Count<kCount>, i, kLanes) for every kCount vectors of a row, then body(Count<1>, i, n) for the
// rest.
template <int kCount, typename Body>
MMFAST_INLINE void for_each_group(int64_t dim, Body body) {
  int64_t i = 0;
  for (; i + kCount * kLanes <= dim; i += kCount * kLanes) body(Count<kCount>(), i, kLanes);
  for (; i < dim; i += kLanes) body(Count<1>(), i, dim - i < kLanes ? int(dim - i) : kLanes);
}

struct Four {
  vf v[4] = {};
  __attribute__((always_inline)) float total() const { return sum((v[0] + v[1]) + (v[2] + v[3])); }
};

template <typename T>
MMFAST_INLINE vf get(const T* p, int n) {
  return n == kLanes ? load(p) : load_tail(p, n);
}
template <bool kStream, typename T>
MMFAST_INLINE void set(T* p, vf v, int n) {
  if (n == kLanes)
    put<kStream>(p, v);
  else
    store_tail(p, v, n);
}

// Some vectors, or the first n columns of one.
template <bool kStream, typename N, typename T>
MMFAST_INLINE void put_columns(N count, T* p, const vf* v, int n) {
  if constexpr (count.value == 1)
    set<kStream>(p, v[0], n);
  else
    put_group<kStream, count.value>(p, v);
}

// out[k] = the sum over the lanes of v[k].
template <typename N>
MMFAST_INLINE void sum_each(N count, const vf* v, float* out) {
#if defined(__AVX512F__)
  if constexpr (count.value == 4) {
    auto add_halves = [](vf a, vf b) MMFAST_INLINE_LAMBDA {
      return _mm512_unpacklo_ps((__m512)a, (__m512)b) + _mm512_unpackhi_ps((__m512)a, (__m512)b);
    };
    const __m512d ab = (__m512d)add_halves(v[0], v[1]), cd = (__m512d)add_halves(v[2], v[3]);
    const __m512 abcd = (__m512)_mm512_unpacklo_pd(ab, cd) + (__m512)_mm512_unpackhi_pd(ab, cd);
    const __m256 half = _mm512_castps512_ps256(abcd) + (__m256)_mm512_extractf64x4_pd((__m512d)abcd, 1);
    _mm_storeu_ps(out, _mm256_castps256_ps128(half) + _mm256_extractf128_ps(half, 1));
    return;
  }
#endif
  for (int k = 0; k < count.value; ++k) out[k] = sum(v[k]);
}

}  // namespace
}  // namespace MMFAST_ISA
}  // namespace mmfast
