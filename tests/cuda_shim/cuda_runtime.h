// CUDA C++ for g++, as far as csrc/cuda uses it: every thread of a block is a fibre on the CPU (fibres.h).
// Stands in for CUDA's header of this name, and for what nvcc declares by itself.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "fibres.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __grid_constant__
#define __constant__ static
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
// Blocks run one after the other, so one copy serves all; what a block leaves is poisoned before the next.
#define __shared__ static __attribute__((section("mmfast_shared")))

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct uint3 {
  unsigned x, y, z;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) {
  return {x, y};
}
inline float4 make_float4(float x, float y, float z, float w) {
  return {x, y, z, w};
}
inline uint2 make_uint2(unsigned x, unsigned y) {
  return {x, y};
}
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) {
  return {x, y, z, w};
}

extern uint3 threadIdx, blockIdx;  // of the fibre that runs
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

// Synchronisation. All threads of a block, or all named lanes of a warp, must meet at the same line of
// source.

#define SHIM_AT const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(SHIM_AT) {
  shim::barrier({"__syncthreads", file, line}, 0, shim::Vote::none);
}
inline int __syncthreads_or(int predicate, SHIM_AT) {
  return shim::barrier({"__syncthreads_or", file, line}, predicate, shim::Vote::any);
}
inline int __syncthreads_and(int predicate, SHIM_AT) {
  return shim::barrier({"__syncthreads_and", file, line}, predicate, shim::Vote::all);
}
inline int __syncthreads_count(int predicate, SHIM_AT) {
  return shim::barrier({"__syncthreads_count", file, line}, predicate, shim::Vote::count);
}

inline void __syncwarp(unsigned mask = 0xffffffffu, SHIM_AT) {
  shim::meet({"__syncwarp", file, line}, mask, nullptr, [](void* const*) {});
}

namespace shim {
template <class T>
struct Shuffle {
  T give, take;
  int source;  // lane, or one outside the segment: the lane's own number
};

template <class T, class F>
T shuffle(Site site, unsigned mask, T value, int width, F source_of) {
  const int lane = int(lane_number());
  check(width > 0 && width <= 32 && (width & (width - 1)) == 0, site,
        "the width is no power of two up to 32");
  const int first = lane / width * width;
  Shuffle<T> mine{value, value, source_of(lane - first, width)};
  mine.source = mine.source < 0 || mine.source >= width ? lane : first + mine.source;
  meet(site, mask, &mine, [&](void* const* lanes) {
    for (int i = 0; i < 32; ++i) {
      if (!lanes[i]) continue;
      auto* to = static_cast<Shuffle<T>*>(lanes[i]);
      check(lanes[to->source], site, "a lane reads from a lane that the mask does not name");
      to->take = static_cast<Shuffle<T>*>(lanes[to->source])->give;
    }
  });
  return mine.take;
}

// mask of the lanes whose predicate holds
inline unsigned ballot(Site site, unsigned mask, bool predicate) {
  struct Slot {
    bool predicate;
    unsigned result;
  } mine{predicate, 0};
  meet(site, mask, &mine, [](void* const* lanes) {
    unsigned bits = 0;
    for (int i = 0; i < 32; ++i)
      if (lanes[i]) bits |= unsigned(static_cast<Slot*>(lanes[i])->predicate) << i;
    for (int i = 0; i < 32; ++i)
      if (lanes[i]) static_cast<Slot*>(lanes[i])->result = bits;
  });
  return mine.result;
}
}  // namespace shim

template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32, SHIM_AT) {
  return shim::shuffle<T>({"__shfl_sync", file, line}, mask, value, width,
                          [=](int, int w) { return lane & (w - 1); });
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, SHIM_AT) {
  return shim::shuffle<T>({"__shfl_xor_sync", file, line}, mask, value, width,
                          [=](int i, int) { return i ^ bits; });
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32, SHIM_AT) {
  return shim::shuffle<T>({"__shfl_down_sync", file, line}, mask, value, width,
                          [=](int i, int) { return i + int(by); });
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32, SHIM_AT) {
  return shim::shuffle<T>({"__shfl_up_sync", file, line}, mask, value, width,
                          [=](int i, int) { return i - int(by); });
}
inline unsigned __ballot_sync(unsigned mask, int predicate, SHIM_AT) {
  return shim::ballot({"__ballot_sync", file, line}, mask, predicate != 0);
}
inline int __any_sync(unsigned mask, int predicate, SHIM_AT) {
  return shim::ballot({"__any_sync", file, line}, mask, predicate != 0) != 0;
}
inline int __all_sync(unsigned mask, int predicate, SHIM_AT) {
  return shim::ballot({"__all_sync", file, line}, mask, predicate == 0) == 0;
}

// Fibres give way at synchronisation only, so that plain operations are atomic.

inline void __threadfence() {}
inline void __threadfence_block() {}
template <class T>
T atomicAdd(T* p, T value) {
  static_assert(std::is_integral_v<T>, "the order of additions would decide the bits");
  const T before = *p;
  *p = before + value;
  return before;
}
template <class T>
T atomicMax(T* p, T value) {
  const T before = *p;
  *p = std::max(before, value);
  return before;
}
template <class T>
T atomicExch(T* p, T value) {
  return std::exchange(*p, value);
}

template <class T>
T __ldg(const T* p) {
  return *p;
}

// Maths

using std::max;
using std::min;
inline float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline unsigned __float_as_uint(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float rsqrtf(float x) {
  return 1 / std::sqrt(x);
}
inline float __fdividef(float x, float y) {
  return x / y;
}
inline int __popc(unsigned x) {
  return __builtin_popcount(x);
}
inline int __clz(int x) {
  return x ? __builtin_clz(unsigned(x)) : 32;
}
inline int __ffs(int x) {
  return __builtin_ffs(x);
}

// The runtime: one device, whose memory is the CPU's. Limits are those of sm_90.

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
using cudaStream_t = void*;
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess             ? "no error"
         : error == cudaErrorInvalidValue ? "invalid argument"
                                          : "invalid configuration";
}
inline cudaError_t cudaGetLastError() {
  return cudaSuccess;
}
inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int bytes) {
  return shim::allow_shared(kernel, bytes) ? cudaSuccess : cudaErrorInvalidValue;
}

template <class Params>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params),
                               const Params& params) {
  const shim::Shape shape{{config->gridDim.x, config->gridDim.y, config->gridDim.z},
                          {config->blockDim.x, config->blockDim.y, config->blockDim.z},
                          config->dynamicSmemBytes};
  if (!shim::can_launch(reinterpret_cast<const void*>(kernel), shape)) return cudaErrorInvalidConfiguration;
  shim::run(shape, [&] { kernel(params); });
  return cudaSuccess;
}
