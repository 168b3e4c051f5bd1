// What the forward and the backward kernel of packing share: the sum of a row's token and embeddings. Include
// inside kernel files only; internal linkage (see isa.h).
#pragma once
#include <cstring>

#include "cpu/rows.h"
#include "mmfast/packing.h"

namespace mmfast {
namespace MMFAST_ISA {
namespace {

// Norm weight, bias and type embedding in float32, converted once for a call, in rows padded with zeros. An
// absent weight is ones, an absent bias zeros: cheaper than asking in every loop.
class Constants {
 public:
  const float *weight, *bias, *type = nullptr;
  int64_t stride;

  template <typename P>
  Constants(const PackParams& p, const P*) : stride(padded(p.dim)) {
    const int64_t types = p.type ? p.parts : 0;
    memory_ = allocate((2 + types) * stride);
    weight = copy(static_cast<const P*>(p.weight), 1.0f, memory_, p.dim);
    bias = copy(static_cast<const P*>(p.bias), 0.0f, memory_ + stride, p.dim);
    for (int64_t m = 0; m < types; ++m)
      copy(static_cast<const P*>(p.type) + m * p.dim, 0.0f, memory_ + (2 + m) * stride, p.dim);
    if (types) type = memory_ + 2 * stride;
  }
  Constants(const Constants&) = delete;
  ~Constants() { release(memory_); }

 private:
  float* memory_;

  template <typename P>
  const float* copy(const P* from, float absent, float* to, int64_t dim) const {
    for (int64_t i = 0; i < stride; ++i) to[i] = i >= dim ? 0.0f : from ? to_float(from[i]) : absent;
    return to;
  }
};

// The cache lines of four vectors.
template <typename E>
MMFAST_INLINE void prefetch(const E* p) {
  for (int64_t line = 0; line < 4 * kLanes; line += int64_t(64 / sizeof(E))) __builtin_prefetch(p + line);
}

// What is added up for one row.
template <typename T, typename P>
struct Row {
  const T* tokens;
  const float* type = nullptr;
  const P* table[PackPart::kMaxAxes];
  int tables = 0;

  __attribute__((always_inline)) Row(const PackParams& p, const Constants& c, int64_t t) {
    const PackPart& part = p.part[p.modality[t]];
    tokens =
        part.tokens ? static_cast<const T*>(part.tokens) + (p.source[t] - part.first) * part.stride : nullptr;
    if (c.type) type = c.type + p.modality[t] * c.stride;
    for (int a = 0; a < part.tables; ++a)
      table[tables++] =
          static_cast<const P*>(part.table[a]) + p.position[t * p.axes + a] * part.table_stride[a];
  }

  // body(Count<4>, i, kLanes, sums) for four vectors at a time, then body(Count<1>, i, n, sums) for the rest
  // of the columns [begin, end). What `ahead` needs is fetched meanwhile.
  template <typename Body>
  __attribute__((always_inline)) void for_each_sum(int64_t begin, int64_t end, const Row& ahead,
                                                   Body body) const {
    if (type && tables == 1 && ahead.tables == 1)
      for_each_sum_of<true>(begin, end, ahead, body);
    else
      for_each_sum_of<false>(begin, end, ahead, body);
  }

 private:
  // kUsual: there is a type and one table, so that the loop need not ask.
  template <bool kUsual, typename Body>
  __attribute__((always_inline)) void for_each_sum_of(int64_t begin, int64_t end, const Row& ahead,
                                                      Body body) const {
    const int tables = kUsual ? 1 : this->tables, tables_ahead = kUsual ? 1 : ahead.tables;
    int64_t i = begin;
    for (; i + 4 * kLanes <= end; i += 4 * kLanes) {
      vf v[4];
      for (int k = 0; k < 4; ++k) v[k] = load(tokens + i + k * kLanes);
      prefetch(ahead.tokens + i);
      for (int a = 0; a < tables_ahead; ++a) prefetch(ahead.table[a] + i);
      if (kUsual || type)
        for (int k = 0; k < 4; ++k) v[k] += load(type + i + k * kLanes);
      for (int a = 0; a < tables; ++a)
        for (int k = 0; k < 4; ++k) v[k] += load(table[a] + i + k * kLanes);
      body(Count<4>(), i, kLanes, v);
    }
    for (; i < end; i += kLanes) {
      const int n = end - i < kLanes ? int(end - i) : kLanes;
      vf v[1] = {get(tokens + i, n)};
      if (type) v[0] += get(type + i, n);
      for (int a = 0; a < tables; ++a) v[0] += get(table[a] + i, n);
      body(Count<1>(), i, n, v);
    }
  }
};

}  // namespace
}  // namespace MMFAST_ISA
}  // namespace mmfast
