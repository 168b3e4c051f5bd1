// x[t] = norm(tokens[source[t]] + type[modality[t]] + sum over axes a of table[a][position[t, a]]). Sums in
// float32. A row is summed into a scratch row that stays in the first-level cache, then normalised from
// there: tokens are read once and x is written once.
#include <omp.h>

#include <cmath>
#include <optional>

#include "cpu/packing_sums.h"

namespace mmfast {
namespace MMFAST_ISA {
namespace {

// Lanes from n on become zero.
MMFAST_INLINE vf first_lanes(vf v, int n) {
  if (n == kLanes) return v;
  float lanes[kLanes] = {};
  std::memcpy(lanes, &v, size_t(n) * sizeof(float));
  return load(lanes);
}

// A row passes three stages: its sum, its variance about the mean, its output. One loop over the columns does
// them for three neighbouring rows: loads and stores then mix evenly, and no row waits for a sum over lanes.
template <typename T, typename P, bool kStream, Norm kNorm>
class Forward {
 public:
  // buckets: the order to visit the rows in, or null for the batch's.
  Forward(const PackParams& p, const Constants& c, const Buckets* buckets, float* scratch)
      : p_(p), c_(c), buckets_(buckets), scratch_(scratch) {}

  static int64_t scratch_size(int64_t dim) { return 5 * padded(dim); }

  // Rows at the places [begin, end) of the order.
  void run(int64_t begin, int64_t end) {
    if (kNorm == Norm::none) {
      for (int64_t i = begin; i < end; ++i) {
        T* out = this->out(i);
        open(i, begin);
        T* out_ahead = this->out(next(i, end));
        row(i).for_each_sum(0, p_.dim, row(next(i, end)),
                            [&](auto count, int64_t j, int n, const vf* v) MMFAST_INLINE_LAMBDA {
                              if (!kStream && count.value == 4) fetch<true>(out_ahead + j, 4 * kLanes);
                              put_columns<kStream>(count, out + j, v, n);
                            });
      }
      return;
    }
    for (int64_t i = begin; i < end; ++i) {
      open(i, begin);
      add(i, begin, end);
    }
    if (begin < end) measure(end - 1);
    for (int64_t i = end - 2 < begin ? begin : end - 2; i < end; ++i) finish(i);
  }

 private:
  static constexpr bool kLayer = kNorm == Norm::layer;

  const PackParams& p_;
  const Constants& c_;
  const Buckets* buckets_;
  float* scratch_;                    // three rows, one for what is not wanted, and the base of a bucket
  float sum_[3] = {}, rstd_[3] = {};  // sum: of the values (layer norm) or of their squares (RMS norm)

  int64_t row_at(int64_t i) const { return buckets_ ? buckets_->row(i) : i; }
  Row<T, P> row(int64_t i) const { return Row<T, P>(p_, c_, row_at(i), buckets_ ? base() : nullptr); }
  // The place of the row that is fetched meanwhile.
  int64_t next(int64_t i, int64_t end) const {
    return row_ahead<kStream>(i, end, p_.dim * int64_t(sizeof(T)));
  }
  float* base() const { return scratch_ + 4 * c_.stride; }
  // Before the row at place i: where its bucket begins, sets the base.
  void open(int64_t i, int64_t begin) const {
    if (buckets_ && (i == begin || i == buckets_->begin(buckets_->of(row_at(i)))))
      common_sum<T, P>(p_, c_, row_at(i), base());
  }
  float* scratch(int64_t i) const { return scratch_ + i % 3 * c_.stride; }
  T* out(int64_t i) const { return static_cast<T*>(p_.x) + row_at(i) * p_.dim; }
  float mean(int64_t i) const { return kLayer ? sum_[i % 3] / float(p_.dim) : 0.0f; }

  // The first stage of the row at place i, the second of the row before, the third of the one before that.
  void add(int64_t i, int64_t begin, int64_t end) {
    const int64_t second = i + 2, third = i + 1;  // modulo 3
    float* sums = scratch(i);
    const float *centred = scratch(second), *normed = scratch(third);
    T* out = i - 2 < begin ? reinterpret_cast<T*>(scratch_ + 3 * c_.stride) : this->out(i - 2);
    T* out_ahead = this->out(next(i, end));
    const float centre = mean(second), mean = this->mean(third), rstd = rstd_[third % 3];
    const float *weight = c_.weight, *bias = c_.bias;
    Four total, squares;
    row(i).for_each_sum(
        0, p_.dim, row(next(i, end)), [&](auto count, int64_t j, int n, const vf* v) MMFAST_INLINE_LAMBDA {
          if (!kStream && count.value == 4) fetch<true>(out_ahead + j, 4 * kLanes);
          for (int k = 0; k < count.value; ++k) store(sums + j + k * kLanes, v[k]);
          if (kLayer) {
            for (int k = 0; k < count.value; ++k) {
              const vf c = first_lanes(load(centred + j + k * kLanes) - centre, n);
              total.v[k] += v[k];
              squares.v[k] += c * c;
            }
          } else {
            for (int k = 0; k < count.value; ++k) total.v[k] += v[k] * v[k];
          }
          vf normed_k[count.value];
          for (int k = 0; k < count.value; ++k) {
            const int64_t c = j + k * kLanes;
            normed_k[k] = (load(normed + c) - mean) * rstd * load(weight + c) + load(bias + c);
          }
          put_columns<kStream>(count, out + j, normed_k, n);
        });
    sum_[i % 3] = total.total();
    if (i > begin) keep(i - 1, squares);
  }

  // The statistics of a row. Two passes: the sum of squares alone loses digits where the mean is large.
  __attribute__((always_inline)) void keep(int64_t i, const Four& squares) {
    const int64_t t = row_at(i);
    if (kLayer) p_.mean[t] = mean(i);
    const float variance = (kLayer ? squares.total() : sum_[i % 3]) / float(p_.dim);
    rstd_[i % 3] = p_.rstd[t] = 1.0f / std::sqrt(variance + p_.eps);
  }

  void measure(int64_t i) {
    const float* sums = scratch(i);
    const float centre = mean(i);
    Four squares;
    for_each_vector_in_four(p_.dim, [&](int64_t j, int n, int k) MMFAST_INLINE_LAMBDA {
      const vf c = first_lanes(load(sums + j) - centre, n);
      squares.v[k] += c * c;
    });
    keep(i, squares);
  }

  void finish(int64_t i) {
    const float *sums = scratch(i), *weight = c_.weight, *bias = c_.bias;
    const float mean = this->mean(i), rstd = rstd_[i % 3];
    T* out = this->out(i);
    for_each_vector(p_.dim, [&](int64_t j, int n) MMFAST_INLINE_LAMBDA {
      set<kStream>(out + j, (load(sums + j) - mean) * rstd * load(weight + j) + load(bias + j), n);
    });
  }
};

// Whether to visit rows by position: where the tables leave the second-level cache between two items that use
// them, and a row of them is used several times.
template <typename P>
bool by_position(const PackParams& p) {
  constexpr int64_t kKept = 640 << 10;  // of a second-level cache of 1 MiB, beside the rows
  int64_t rows = 0;
  for (int m = 0; m < p.parts; ++m)
    if (p.part[m].tables) rows += p.part[m].table_rows[0];
  return rows * p.dim * int64_t(sizeof(P)) > kKept && p.rows > 4 * rows;
}

template <typename T, typename P, bool kStream, Norm kNorm>
void forward(const PackParams& p) {
  const Constants constants(p, static_cast<const P*>(nullptr));
  const std::optional<Buckets> buckets =
      by_position<P>(p) ? std::optional<Buckets>(std::in_place, p) : std::nullopt;
  const Scratch scratch(p.threads, Forward<T, P, kStream, kNorm>::scratch_size(p.dim));
#pragma omp parallel num_threads(p.threads)
  {
    const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
    Forward<T, P, kStream, kNorm> rows(p, constants, buckets ? &*buckets : nullptr, scratch.of(thread));
    rows.run(p.rows * thread / threads, p.rows * (thread + 1) / threads);
    if (kStream) stream_fence();
  }
}

template <typename T, typename P, bool kStream>
void forward(const PackParams& p) {
  if (p.norm == Norm::none) return forward<T, P, kStream, Norm::none>(p);
  if (p.norm == Norm::rms) return forward<T, P, kStream, Norm::rms>(p);
  forward<T, P, kStream, Norm::layer>(p);
}

template <typename T, typename P>
void forward(const PackParams& p) {
  p.stream&& can_stream(p.x, p.dim * int64_t(sizeof(T))) ? forward<T, P, true>(p) : forward<T, P, false>(p);
}

bool valid_rows(const PackParams& p, int64_t begin, int64_t end) {
  bool valid = true;
  for (int64_t t = begin; t < end; ++t) {
    const int m = p.modality[t];
    if (m >= p.parts) return false;
    const PackPart& part = p.part[m];
    valid &= uint64_t(p.source[t]) - uint64_t(part.first) < uint64_t(part.rows);
    for (int a = 0; a < part.tables; ++a)
      valid &= uint64_t(int64_t(p.position[t * p.axes + a])) < uint64_t(part.table_rows[a]);
  }
  return valid;
}

template <bool kStream>
MMFAST_INLINE void copy_row(char* out, const char* from, int64_t bytes) {
  if constexpr (kStream) {
    for (int64_t i = 0; i < bytes; i += 4 * kLanes)
      put<true>(reinterpret_cast<float*>(out + i), load(reinterpret_cast<const float*>(from + i)));
  } else {
    std::memcpy(out, from, size_t(bytes));
  }
}

template <bool kStream>
void gather(const GatherParams& p) {
#pragma omp parallel num_threads(p.threads)
  {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < p.rows; ++i) {
      const char* from = p.fill;
      if (const int64_t row = p.index[i]; row >= 0) {
        const GatherSource* source = p.source + p.sources - 1;
        while (row < source->first) --source;
        from = source->x + (row - source->first) * source->stride;
      }
      copy_row<kStream>(p.out + i * p.bytes, from, p.bytes);
    }
    if (kStream) stream_fence();
  }
}

}  // namespace

void pack_forward(const PackParams& p) {
  if (p.dtype == DType::f32) return forward<float, float>(p);
  if (p.param_dtype == DType::f32) return forward<bf16, float>(p);
  forward<bf16, bf16>(p);
}
void check_rows(const PackRowsParams& p) {
  bool valid = true;
#pragma omp parallel num_threads(p.pack->threads) reduction(&& : valid)
  {
    const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads(), rows = p.pack->rows;
    valid = valid_rows(*p.pack, rows * thread / threads, rows * (thread + 1) / threads);
  }
  *p.valid = valid;
}
void gather_rows(const GatherParams& p) {
  p.stream&& can_stream(p.out, p.bytes) ? gather<true>(p) : gather<false>(p);
}

}  // namespace MMFAST_ISA
}  // namespace mmfast
