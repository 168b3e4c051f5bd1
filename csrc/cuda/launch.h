// The only way to launch a kernel. Nothing here waits for the device or allocates.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace mmfast {

// Launches `kernel` with its parameters by value. `op` names the launcher in errors.
template <class Params>
void launch(void (*kernel)(Params), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
            const Params& params, const char* op = __builtin_FUNCTION()) {
  static_assert(sizeof(Params) <= 4096, "an argument block holds 4096 bytes");
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  auto check = [&](cudaError_t error, const char* what) {
    if (error == cudaSuccess) return;
    cudaGetLastError();  // or the next call of this thread would report it again
    throw std::runtime_error(std::string(op) + ": " + what + ": " + cudaGetErrorString(error));
  };
  constexpr size_t kWithoutAsking = 48 << 10;
  if (shared_bytes > kWithoutAsking) {
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                               cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes)),
          "its shared memory is more than this GPU has");
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  check(cudaLaunchKernelEx(&config, kernel, params), "the kernel was not launched");
}

}  // namespace mmfast
