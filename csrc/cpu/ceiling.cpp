#include "cpu/ceiling.h"

#include "cpu/simd.h"

namespace mmfast {
namespace MMFAST_ISA {
namespace {

// Independent chains: more than latency times units, fewer than half of the registers of any instruction set.
constexpr int kChains = kLanes == 16 ? 14 : kLanes == 8 ? 12 : 8;

template <bool kBf16>
float chains(int64_t rounds) {
  vf sums[kChains];
  for (int i = 0; i < kChains; ++i) sums[i] = splat(1.0f + 0.01f * float(i));
  vf a = splat(0.999f), b = splat(1e-3f);
  asm volatile("" : "+m"(a), "+m"(b));  // unknown to the compiler
  for (int64_t r = 0; r < rounds; ++r) {
    for (int i = 0; i < kChains; ++i) {
#if defined(__AVX512BF16__)
      if constexpr (kBf16) {
        sums[i] = (vf)_mm512_dpbf16_ps((__m512)sums[i], (__m512bh)a, (__m512bh)b);
        continue;
      }
#endif
      sums[i] = sums[i] * a + b;
    }
  }
  vf total = sums[0];
  for (int i = 1; i < kChains; ++i) total += sums[i];
  return sum(total);
}

}  // namespace

void multiply_adds(const CeilingParams& p) {
  double done = 0, sink = 0;
#pragma omp parallel for num_threads(p.threads) schedule(static, 1) reduction(+ : done, sink)
  for (int t = 0; t < p.threads; ++t) {
    sink += p.bf16 ? chains<true>(p.rounds) : chains<false>(p.rounds);
    done += 2.0 * kChains * kLanes * double(p.rounds);
  }
#if defined(__AVX512BF16__)
  if (p.bf16) done *= 2;
#endif
  *p.flops = sink == 12345.0 ? 0 : done;  // the sums must not be optimised away
}

}  // namespace MMFAST_ISA
}  // namespace mmfast
