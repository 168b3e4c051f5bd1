// What the forward and the backward kernel of packing share: the sum of a row's token and embeddings, and the
// order of rows by position. Include inside kernel files only; internal linkage (see isa.h).
#pragma once
#include <omp.h>

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

// What is added up for one row: tokens + (type + table of the first axis) + tables of further axes.
template <typename T, typename P>
struct Row {
  const T* tokens;
  const float* type;
  const P *first = nullptr, *further[PackPart::kMaxAxes];
  int count = 0;  // of further tables

  // base: the sum of the row's type and its table on the first axis, or null, for it to be made here.
  __attribute__((always_inline)) Row(const PackParams& p, const Constants& c, int64_t t,
                                     const float* base = nullptr) {
    const PackPart& part = p.part[p.modality[t]];
    auto table = [&](int a) {
      return static_cast<const P*>(part.table[a]) + p.position[t * p.axes + a] * part.table_stride[a];
    };
    tokens =
        part.tokens ? static_cast<const T*>(part.tokens) + (p.source[t] - part.first) * part.stride : nullptr;
    type = base ? base : c.type ? c.type + p.modality[t] * c.stride : nullptr;
    if (part.tables && !base) first = table(0);
    for (int a = 1; a < part.tables; ++a) further[count++] = table(a);
  }

  // body(Count<4>, i, kLanes, sums) for four vectors at a time, then body(Count<1>, i, n, sums) for the rest
  // of the columns [begin, end). What `ahead` needs is fetched meanwhile.
  template <typename Body>
  __attribute__((always_inline)) void for_each_sum(int64_t begin, int64_t end, const Row& ahead,
                                                   Body body) const {
    const bool usual = type && !count && !ahead.count;
    if (usual && first && ahead.first)
      for_each_sum_of<true, true>(begin, end, ahead, body);
    else if (usual && !first && !ahead.first)
      for_each_sum_of<true, false>(begin, end, ahead, body);
    else
      for_each_sum_of<false, false>(begin, end, ahead, body);
  }

 private:
  // kUsual: there is a type and no further axis, and kFirst says whether there is a first, so that the loop
  // need not ask.
  template <bool kUsual, bool kFirst, typename Body>
  __attribute__((always_inline)) void for_each_sum_of(int64_t begin, int64_t end, const Row& ahead,
                                                      Body body) const {
    const bool typed = kUsual || type, placed = kUsual ? kFirst : first != nullptr;
    auto sum = [&](int64_t i, int n) MMFAST_INLINE_LAMBDA {
      vf v = get(tokens + i, n);
      if (typed && placed)
        v += get(type + i, n) + get(first + i, n);
      else if (typed)
        v += get(type + i, n);
      else if (placed)
        v += get(first + i, n);
      for (int a = 0; a < count && !kUsual; ++a) v += get(further[a] + i, n);
      return v;
    };
    int64_t i = begin;
    for (; i + 4 * kLanes <= end; i += 4 * kLanes) {
      vf v[4];
      for (int k = 0; k < 4; ++k) v[k] = sum(i + k * kLanes, kLanes);
      fetch<false>(ahead.tokens + i, 4 * kLanes);
      if (kUsual ? kFirst : ahead.first != nullptr) fetch<false>(ahead.first + i, 4 * kLanes);
      for (int a = 0; a < ahead.count && !kUsual; ++a) fetch<false>(ahead.further[a] + i, 4 * kLanes);
      body(Count<4>(), i, kLanes, v);
    }
    for (; i < end; i += kLanes) {
      const int n = end - i < kLanes ? int(end - i) : kLanes;
      const vf v[1] = {sum(i, n)};
      body(Count<1>(), i, n, v);
    }
  }
};

// Rows by bucket, in each in their order. A bucket is a position on the first axis of a part that has a
// table, or else a part.
class Buckets {
 public:
  explicit Buckets(const PackParams& p) : p_(p) {
    for (int m = 0; m < p.parts; ++m) {
      first_[m] = count_;
      has_table_[m] = p.part[m].tables;
      count_ += has_table_[m] ? p.part[m].table_rows[0] : 1;
    }
    begin_ = new int64_t[count_ + 1];
    order_ = new int64_t[p.rows];
    // Each thread counts its rows by bucket, then knows where the next one goes. Threads that have fewer rows
    // than there are buckets would only clear memory; no cache line belongs to two of them.
    const int64_t useful = p.rows / (count_ + 1) + 1, stride = count_ + 8;
    const int team = int(useful < p.threads ? useful : p.threads);
    int64_t* places = new int64_t[team * stride]();
#pragma omp parallel num_threads(team)
    {
      const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
      const int64_t end = p.rows * (thread + 1) / threads;
      int64_t* mine = places + thread * stride;
      for (int64_t t = p.rows * thread / threads; t < end; ++t) ++mine[of(t)];
#pragma omp barrier
#pragma omp single
      {
        int64_t total = 0;
        for (int64_t n = 0; n < count_; ++n) {
          begin_[n] = total;
          for (int64_t i = 0; i < threads; ++i) {
            const int64_t rows = places[i * stride + n];
            places[i * stride + n] = total;
            total += rows;
          }
        }
        begin_[count_] = total;
      }
      for (int64_t t = p.rows * thread / threads; t < end; ++t) order_[mine[of(t)]++] = t;
    }
    delete[] places;
  }
  Buckets(const Buckets&) = delete;
  ~Buckets() {
    delete[] begin_;
    delete[] order_;
  }

  int64_t of(int64_t t) const {
    const int m = p_.modality[t];
    return first_[m] + (has_table_[m] ? p_.position[t * p_.axes] : 0);
  }
  int64_t count() const { return count_; }
  int64_t begin(int64_t n) const { return begin_[n]; }
  int64_t row(int64_t i) const { return order_[i]; }
  int part(int64_t n) const {
    int m = 0;
    while (m + 1 < p_.parts && first_[m + 1] <= n) ++m;
    return m;
  }
  // The bucket's row of its part's table.
  int64_t table_row(int64_t n, int m) const { return n - first_[m]; }

 private:
  const PackParams& p_;
  int64_t first_[PackParams::kMaxParts], count_ = 0;
  bool has_table_[PackParams::kMaxParts];
  int64_t *begin_, *order_;
};

// Sets base [stride] to what the rows of a bucket have in common, of which row t is one: their type and their
// table row of the first axis. The table's next row, which the next bucket is likely to need, is fetched
// meanwhile.
template <typename T, typename P>
MMFAST_INLINE void common_sum(const PackParams& p, const Constants& c, int64_t t, float* base) {
  const Row<T, P> row(p, c, t);
  const int64_t stride = p.part[p.modality[t]].table_stride[0];
  for_each_vector(p.dim, [&](int64_t i, int n) MMFAST_INLINE_LAMBDA {
    vf v = row.type ? load(row.type + i) : splat(0);
    if (row.first) {
      v += get(row.first + i, n);
      __builtin_prefetch(row.first + stride + i);
    }
    store(base + i, v);
  });
}

}  // namespace
}  // namespace MMFAST_ISA
}  // namespace mmfast
