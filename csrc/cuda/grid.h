// Sizes of grids and of groups of threads, from shapes only.
#pragma once
#include "cuda/launch.h"

namespace mmfast {

template <class Params>
using Kernel = void (*)(Params);

// The grid of a kernel whose blocks have `each` of n things.
inline dim3 blocks_of(const char* op, int64_t n, int64_t each, int64_t y = 1) {
  const int64_t blocks = (n + each - 1) / each;
  if (blocks > INT32_MAX)
    throw std::runtime_error(std::string(op) + ": more blocks than one launch can have");
  return dim3(unsigned(blocks), unsigned(y));
}

// Threads for n pieces of work, as many as there are or a whole number of warps.
inline int group_of(int64_t n) {
  if (n > 32) return int((n + 31) / 32 * 32);
  int threads = 1;
  while (threads < n) threads *= 2;
  return threads;
}

}  // namespace mmfast
