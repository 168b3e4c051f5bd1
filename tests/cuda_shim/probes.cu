// Small kernels whose results are known, and kernels with a fault each: what tests/test_cuda_shim.py runs.
#include "probes.h"

#include "cuda/launch.h"
#include "cuda/ptx.h"

namespace mmfast {
namespace {

constexpr int kPitch = 24;  // elements from row to row in shared memory
constexpr unsigned kAll = 0xffffffffu;

// c [16, 16] = a [16, 16] b, by one warp. b is [16, 16] by rows, or transposed [n, k].
template <class T>
__global__ void product(const __grid_constant__ ProbeParams p) {
  T* shared_a = reinterpret_cast<T*>(shared_memory());
  T* shared_b = shared_a + 16 * kPitch;
  const int lane = threadIdx.x;
  {
    const int row = lane / 2, column = lane % 2 * 8;
    const bool valid = row < p.rows;
    cp_async_16(shared_a + row * kPitch + column, static_cast<const T*>(p.a) + row * 16 + column, valid);
    cp_async_commit();
    cp_async_16(shared_b + row * kPitch + column, static_cast<const T*>(p.b) + row * 16 + column, true);
    cp_async_commit();
  }
  if (p.fault == Fault::waits_for_one_of_two)
    cp_async_wait<1>();
  else
    cp_async_wait<0>();
  __syncwarp();
  const int i = lane / 8, j = lane % 8;
  uint32_t a[4], b[4];
  ldmatrix_x4(a, shared_a + (j + 8 * (i % 2)) * kPitch + 8 * (i / 2));
  if (p.transposed)
    ldmatrix_x4(b, shared_b + (j + 8 * (i / 2)) * kPitch + 8 * (i % 2));
  else
    ldmatrix_x4_trans(b, shared_b + (j + 8 * (i % 2)) * kPitch + 8 * (i / 2));
  float low[4] = {}, high[4] = {};
  mma_16816<T>(low, a, {b[0], b[1]});
  mma_16816<T>(high, a, {b[2], b[3]});
  for (int k = 0; k < 4; ++k) {
    const int row = lane / 4 + 8 * (k / 2), column = 2 * (lane % 4) + k % 2;
    p.c[row * 16 + column] = low[k];
    p.c[row * 16 + column + 8] = high[k];
  }
  cp_async_wait<0>();
}

// c [rows, 32]: what each shuffle and vote gives lane by lane.
__global__ void warp(const __grid_constant__ ProbeParams p) {
  const int lane = threadIdx.x % 32;
  const float x = static_cast<const float*>(p.a)[lane];
  auto put = [&](int row, double value) { p.c[row * 32 + lane] = float(value); };
  put(0, __shfl_xor_sync(kAll, x, 5));
  put(1, __shfl_sync(kAll, x, 7));
  put(2, __shfl_down_sync(kAll, x, 3));
  put(3, __shfl_up_sync(kAll, x, 3));
  put(4, __shfl_down_sync(kAll, x, 3, 8));
  put(5, __shfl_sync(kAll, double(x), lane + 1, 4));
  put(6, __ballot_sync(kAll, lane % 3 == 0) >> 8);
  put(7, __any_sync(kAll, lane == 9) + 2 * __all_sync(kAll, lane != 9) + 4 * __all_sync(kAll, lane < 32));
  if (lane < 8) put(8, __shfl_xor_sync(0xffu, x, 1));
}

// c[i] = a[n - 1 - i] through shared memory, and the block's votes.
__global__ void block(const __grid_constant__ ProbeParams p) {
  __shared__ float values[256];
  float* dynamic = reinterpret_cast<float*>(shared_memory());
  const int n = blockDim.x * blockDim.y, i = threadIdx.x + threadIdx.y * blockDim.x;
  const int first = (blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z)) * (n + 1);
  values[i] = static_cast<const float*>(p.a)[i];
  if (p.fault != Fault::no_barrier) __syncthreads();
  dynamic[i] = values[n - 1 - i];
  __syncthreads();
  p.c[first + i] = dynamic[i];
  const int count = __syncthreads_count(i % 5 == 0);
  const int any = __syncthreads_or(i == 3), all = __syncthreads_and(i != 3);
  if (i == 0) p.c[first + n] = float(count + 1000 * any + 2000 * all);
}

// c [3, n]: a as bfloat16, as float16, and both packed, all as numbers again; the bits of b as float16 and
// bfloat16.
__global__ void convert(const __grid_constant__ ProbeParams p) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, n = p.rows;
  if (i >= n) return;
  const float x = static_cast<const float*>(p.a)[i];
  const uint16_t bits = static_cast<const uint16_t*>(p.b)[i];
  p.c[i] = to_float(from_float<bf16>(x));
  p.c[n + i] = to_float(from_float<f16>(x));
  const uint32_t both = pack2<f16>(1.0f, x);
  p.c[2 * n + i] = (both & 0xffff) == 0x3c00 ? to_float(f16{uint16_t(both >> 16)}) : -1.0f;
  p.c[3 * n + i] = to_float(f16{bits});
  p.c[4 * n + i] = to_float(bf16{bits});
}

__global__ void faulty(const __grid_constant__ ProbeParams p) {
  const int i = threadIdx.x;
  char* shared = shared_memory();
  uint32_t r[4];
  switch (p.fault) {
    case Fault::barrier_in_a_branch:
      if (i < 32)
        __syncthreads();
      else
        __syncthreads();
      break;
    case Fault::barrier_beside_a_shuffle:
      if (i % 2)
        __syncthreads();
      else
        __shfl_xor_sync(kAll, i, 2);
      break;
    case Fault::shuffle_with_an_ended_lane:
      if (i % 32 == 31) return;
      __shfl_xor_sync(kAll, i, 1);
      break;
    case Fault::shuffle_from_outside_the_mask:
      if (i < 16) __shfl_sync(0xffffu, i, 20);
      break;
    case Fault::lane_outside_its_mask:
      __syncwarp(0xffffu);
      break;
    case Fault::shuffles_of_two_lines:
      if (i % 2)
        __shfl_xor_sync(kAll, i, 1);
      else
        __shfl_xor_sync(kAll, i, 1);
      break;
    case Fault::copy_behind_shared_memory:
      cp_async_16(shared + 1024 - 8, p.a, true);
      break;
    case Fault::copy_from_an_odd_address:
      cp_async_16(shared, static_cast<const char*>(p.a) + 4, true);
      break;
    case Fault::copy_not_awaited:
      cp_async_16(shared + 16 * i, p.a, true);
      cp_async_commit();
      break;
    case Fault::matrix_outside_shared_memory:
      ldmatrix_x4(r, p.a);
      break;
    case Fault::write_behind_shared_memory:
      if (i == 0) shared[1024 + 64] = 1;
      break;
    case Fault::store_to_an_odd_address:
      store16(static_cast<float*>(p.c) + 1, Vector16{});
      break;
    default:
      break;
  }
}

using Kernel = void (*)(ProbeParams);

}  // namespace

void probe(const std::string& name, const ProbeParams& p, const unsigned (&grid)[3],
           const unsigned (&block_of)[2], size_t shared) {
  const Kernel kernel = name == "product bf16"  ? Kernel(product<bf16>)
                        : name == "product f16" ? Kernel(product<f16>)
                        : name == "warp"        ? Kernel(warp)
                        : name == "block"       ? Kernel(block)
                        : name == "convert"     ? Kernel(convert)
                                                : Kernel(faulty);
  launch(kernel, dim3(grid[0], grid[1], grid[2]), dim3(block_of[0], block_of[1]), shared, nullptr, p);
}

}  // namespace mmfast
