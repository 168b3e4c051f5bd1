// Numbers of a storage type as float32 and back, 16 bytes at a time where V of them fill as many.
#pragma once
#include "cuda/ptx.h"

namespace mmfast {

// V numbers as they are stored; zeros at first.
template <class T, int V>
struct Stored {
  static constexpr int kEach = 16 / sizeof(T), kVectors = V / kEach;
  static_assert(V % kEach == 0);
  Vector16 vector[kVectors] = {};

  __device__ __forceinline__ void load(const T* p) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) vector[i] = load16(p + i * kEach);
  }
  __device__ __forceinline__ float operator[](int i) const {
    const uint32_t word = vector[i / kEach].word[i % kEach * sizeof(T) / 4];
    if constexpr (sizeof(T) == 4)
      return __uint_as_float(word);
    else
      return to_float(T{uint16_t(word >> (16 * (i % 2)))});
  }
};

template <class T>
struct Stored<T, 1> {
  T number = {};

  __device__ __forceinline__ void load(const T* p) { number = *p; }
  __device__ __forceinline__ float operator[](int) const { return to_float(number); }
};

// Numbers at p, a multiple of 16 bytes unless V is 1.
template <class T, int V>
__device__ __forceinline__ void read(const T* p, float (&x)[V]) {
  Stored<T, V> stored;
  stored.load(p);
#pragma unroll
  for (int i = 0; i < V; ++i) x[i] = stored[i];
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
