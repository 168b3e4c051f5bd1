// Numbers of a storage type as float32 and back, 16 bytes at a time where V of them fill as many.
#pragma once
#include "cuda/ptx.h"

namespace mmfast {

// Numbers at p, a multiple of 16 bytes unless V is 1.
template <class T, int V>
__device__ __forceinline__ void read(const T* p, float (&x)[V]) {
  constexpr int kEach = 16 / sizeof(T);
  if constexpr (V == 1) {
    x[0] = to_float(*p);
  } else {
    static_assert(V % kEach == 0);
#pragma unroll
    for (int i = 0; i < V / kEach; ++i) {
      const Vector16 v = load16(p + i * kEach);
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        if constexpr (sizeof(T) == 4)
          x[i * kEach + j] = __uint_as_float(v.word[j]);
        else
          x[i * kEach + j] = to_float(T{uint16_t(v.word[j / 2] >> (16 * (j % 2)))});
      }
    }
  }
}

template <class T, int V>
__device__ __forceinline__ void write(T* p, const float (&x)[V]) {
  constexpr int kEach = 16 / sizeof(T);
  if constexpr (V == 1) {
    *p = from_float<T>(x[0]);
  } else {
    static_assert(V % kEach == 0);
#pragma unroll
    for (int i = 0; i < V / kEach; ++i) {
      Vector16 v;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if constexpr (sizeof(T) == 4)
          v.word[j] = __float_as_uint(x[i * kEach + j]);
        else
          v.word[j] = pack2<T>(x[i * kEach + 2 * j], x[i * kEach + 2 * j + 1]);
      }
      store16(p + i * kEach, v);
    }
  }
}

}  // namespace mmfast
