// mmfast._cpu: the CPU kernels behind pybind11.
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "bindings/binding.h"
#include "cpu/ceiling.h"
#include "mmfast/mask.h"
#include "mmfast/rng.h"

namespace mmfast {
namespace {

constexpr const char* kIsaNames[] = {"scalar", "avx2", "avx512", "avx512_bf16"};

Isa best_isa() {
#if defined(MMFAST_HAS_AVX512_BF16)
  __builtin_cpu_init();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (avx512 && avx2 && __builtin_cpu_supports("avx512bf16")) return Isa::avx512_bf16;
  if (avx512 && avx2) return Isa::avx512;
  if (avx2) return Isa::avx2;
#endif
  return Isa::scalar;
}

Isa chosen_isa = Isa::scalar;

void set_isa(const std::string& name) {
  for (int i = 0; i < 4; ++i) {
    if (name != kIsaNames[i]) continue;
    check(i <= int(best_isa()), "MMFAST_CPU_ISA: ", name, " cannot run on this machine; the best it has is ",
          kIsaNames[int(best_isa())]);
    chosen_isa = Isa(i);
    return;
  }
  fail("MMFAST_CPU_ISA: ", name, " is unknown; expected scalar, avx2, avx512 or avx512_bf16");
}

}  // namespace

Isa current_isa() {
  return chosen_isa;
}

int64_t streamed_bytes() {
  static const int64_t cache = [] {
    // sysconf may count the caches of the whole chip, of which a core reaches only its own.
    long kib = 0;
    if (std::FILE* file = std::fopen("/sys/devices/system/cpu/cpu0/cache/index3/size", "r")) {
      if (std::fscanf(file, "%ldK", &kib) != 1) kib = 0;
      std::fclose(file);
    }
    const int64_t bytes = kib > 0 ? int64_t(kib) << 10 : int64_t(sysconf(_SC_LEVEL3_CACHE_SIZE));
    return bytes > 0 ? bytes : int64_t(32) << 20;
  }();
  return cache / 2;
}

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "CPU kernels of mmfast";
  chosen_isa = best_isa();
  if (const char* name = std::getenv("MMFAST_CPU_ISA")) {
    if (*name) set_isa(name);
  }
  m.def("isa", [] { return kIsaNames[int(chosen_isa)]; });
  m.def("best_isa", [] { return kIsaNames[int(best_isa())]; });
  m.def("set_isa", &set_isa);
  m.def("streamed_bytes", &streamed_bytes);
  // For tests: the shared maths of csrc/include against its Python definitions.
  m.def("classify_tile", [](const std::vector<int64_t>& rules, int left, int right,
                            const std::array<int64_t, 5>& q, const std::array<int64_t, 5>& k) {
    Mask mask{};
    for (size_t i = 0; i < rules.size() && i < kMaxModalities; ++i) mask.rules[i] = rules[i];
    mask.window_left = left;
    mask.window_right = right;
    auto summary = [](const std::array<int64_t, 5>& s) {
      return TileSummary{uint32_t(s[0]), int32_t(s[1]), int32_t(s[2]), int32_t(s[3]), int32_t(s[4])};
    };
    return int(classify(mask, summary(q), summary(k)));
  });
  m.def("philox", [](uint64_t seed, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
    const Philox4 r = philox(seed, c0, c1, c2, c3);
    return std::array<uint32_t, 4>{r.x, r.y, r.z, r.w};
  });
  // For benchmarks: does rounds of multiply-adds on registers in every thread, and returns their number.
  m.def("multiply_adds", [](bool bf16, int64_t rounds) {
    double flops = 0;
    CeilingParams params{bf16, rounds, num_threads(), &flops};
    py::gil_scoped_release release;
    multiply_adds(params);
    return flops;
  });
  bind_attention(m);
  bind_rotary(m);
  bind_packing(m);
  bind_perturbation(m);
  bind_contrastive(m);
}

}  // namespace mmfast
