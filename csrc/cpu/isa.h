// One source, compiled once per instruction set, chosen at run time.
//
// A kernel file puts everything into `namespace mmfast::MMFAST_ISA` and its helpers into an anonymous
// namespace there. Nothing with external linkage may be emitted outside that namespace (no std containers, no
// shared inline functions that do not inline): the linker would keep one copy for all instruction sets, and
// an older machine would crash. tests/test_packaging.py looks for such symbols.
#pragma once

namespace mmfast {

enum class Isa : int { scalar = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3 };

Isa current_isa();

}  // namespace mmfast

// Declares `void name(const Params&)` for every compiled instruction set, and `mmfast::name`, which calls the
// right one.
#if defined(MMFAST_HAS_AVX512_BF16)
#define MMFAST_DECLARE_KERNEL(name, Params)       \
  namespace mmfast {                              \
  namespace scalar {                              \
  void name(const Params&);                       \
  }                                               \
  namespace avx2 {                                \
  void name(const Params&);                       \
  }                                               \
  namespace avx512 {                              \
  void name(const Params&);                       \
  }                                               \
  namespace avx512_bf16 {                         \
  void name(const Params&);                       \
  }                                               \
  static inline void name(const Params& params) { \
    switch (current_isa()) {                      \
      case Isa::avx512_bf16:                      \
        return avx512_bf16::name(params);         \
      case Isa::avx512:                           \
        return avx512::name(params);              \
      case Isa::avx2:                             \
        return avx2::name(params);                \
      default:                                    \
        return scalar::name(params);              \
    }                                             \
  }                                               \
  }
#else
#define MMFAST_DECLARE_KERNEL(name, Params)       \
  namespace mmfast {                              \
  namespace scalar {                              \
  void name(const Params&);                       \
  }                                               \
  static inline void name(const Params& params) { \
    return scalar::name(params);                  \
  }                                               \
  }
#endif
