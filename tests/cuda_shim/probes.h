// What the kernels of probes.cu take.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>

namespace mmfast {

enum class Fault : int {
  none,
  waits_for_one_of_two,
  no_barrier,
  barrier_in_a_branch,
  barrier_beside_a_shuffle,
  shuffle_with_an_ended_lane,
  shuffle_from_outside_the_mask,
  lane_outside_its_mask,
  shuffles_of_two_lines,
  copy_behind_shared_memory,
  copy_from_an_odd_address,
  copy_not_awaited,
  matrix_outside_shared_memory,
  write_behind_shared_memory,
  store_to_an_odd_address,
};

struct ProbeParams {
  const void* a = nullptr;
  const void* b = nullptr;
  float* c = nullptr;
  int64_t rows = 0;
  bool transposed = false;
  Fault fault = Fault::none;
};

void probe(const std::string& name, const ProbeParams& p, const unsigned (&grid)[3],
           const unsigned (&block_of)[2], size_t shared);

}  // namespace mmfast
