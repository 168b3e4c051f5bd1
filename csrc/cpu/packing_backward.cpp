// Gradients of packing. With y = (s - mean) rstd and g = dx weight, s being a row's sum before the norm:
//   ds = (g - avg(g) - y avg(g y)) rstd;  dweight = sum of dx y;  dbias = sum of dx;
//   ds goes to the row's token, and is summed over the rows of a type, and over those of a table's position.
// Rows are visited by part and by position on the first axis, so that the sum of a table's row stays in the
// first-level cache, and the batch is read once. Further axes read it once more each.
#include <omp.h>

#include "cpu/packing_sums.h"

namespace mmfast {
namespace MMFAST_ISA {
namespace {

MMFAST_INLINE void add_to(float* p, vf v) {
  store(p, load(p) + v);
}

// Sums of one chunk of rows, each null where it is not wanted. `before` is of a bucket that began in an
// earlier chunk, `after` of one that began in this chunk and goes on in the next.
struct Partials {
  float *weight, *bias, *type, *before, *after;
};

// Writes the sum of a bucket to its row of the table.
template <typename P>
MMFAST_INLINE void write_table(const PackParams& p, const Buckets& buckets, int64_t bucket,
                               const float* sum) {
  const int m = buckets.part(bucket);
  if (!p.part[m].tables || !p.part[m].dtable[0]) return;
  P* out = static_cast<P*>(p.part[m].dtable[0]) + buckets.table_row(bucket, m) * p.dim;
  for_each_vector(p.dim,
                  [&](int64_t i, int n) MMFAST_INLINE_LAMBDA { set<false>(out + i, load(sum + i), n); });
}

// A row passes two stages: its averages, and its gradient before the norm. One loop over the columns does
// them for two neighbouring rows: stores to memory then mix evenly with loads from it, and no row waits for
// its averages.
template <typename T, typename P, bool kStream>
class Backward {
 public:
  // averages [rows, 2]: of g and of g y, kept for the tables of further axes, or null.
  Backward(const PackParams& p, const Constants& c, const Buckets& buckets, float* averages, float* scratch)
      : p_(p), c_(c), buckets_(buckets), averages_(averages), scratch_(scratch) {}

  static int64_t scratch_size(int64_t dim) { return 4 * padded(dim); }

  // Rows [begin, end) of the buckets' order.
  void run(int64_t begin, int64_t end, const Partials& partial) {
    if (p_.norm == Norm::none) {
      for (int64_t i = begin; i < end; ++i) {
        copy(buckets_.row(i));
        close(i, begin, end, partial);
      }
      return;
    }
    for (int64_t i = begin; i < end; ++i) {
      const int64_t bucket = buckets_.of(buckets_.row(i));
      if (i == begin || i == buckets_.begin(bucket)) common_sum<T, P>(p_, c_, buckets_.row(i), base());
      if (i == begin) {
        read<false>(i, end, partial);
      } else {
        read<true>(i, end, partial);
        close(i - 1, begin, end, partial);
      }
    }
    if (begin == end) return;
    for_each_group<4>(p_.dim,
                      [&](auto count, int64_t j, int n) MMFAST_INLINE_LAMBDA { write(count, j, n, row_); });
    close(end - 1, begin, end, partial);
  }

 private:
  // Where a row's gradient before the norm goes, each null where it is not wanted, and its factors:
  // rstd, and the averages of g and of g y times rstd.
  struct Target {
    T* tokens;
    float* sum;
    float rstd, g, gy;
  };

  const PackParams& p_;
  const Constants& c_;
  const Buckets& buckets_;
  float *averages_, *scratch_;  // scratch: y and g of a row, and the sum of a bucket, zero where one begins
  Target row_;                  // whose y and g are in scratch

  float* sum() const { return scratch_ + 2 * c_.stride; }
  float* base() const { return scratch_ + 3 * c_.stride; }
  const T* gradient(int64_t t) const { return static_cast<const T*>(p_.x) + t * p_.x_stride; }

  Target target(int64_t t) const {
    const PackPart& part = p_.part[p_.modality[t]];
    T* tokens = part.dtokens ? static_cast<T*>(part.dtokens) + (p_.source[t] - part.first) * p_.dim : nullptr;
    return {tokens, p_.dtype_embedding || (part.tables && part.dtable[0]) ? sum() : nullptr, 1.0f, 0.0f,
            0.0f};
  }

  // The gradient of a row without a norm.
  void copy(int64_t t) {
    const Target row = target(t);
    const T* dx = gradient(t);
    for_each_group<4>(p_.dim, [&](auto count, int64_t j, int n) MMFAST_INLINE_LAMBDA {
      vf v[count.value];
      for (int k = 0; k < count.value; ++k) v[k] = get(dx + j + k * kLanes, n);
      give(count, j, n, row, v);
    });
  }

  // Columns of the gradient before the norm of the row in scratch.
  template <typename N>
  __attribute__((always_inline)) void write(N count, int64_t j, int n, const Target& row) const {
    const float *y = scratch_ + j, *g = scratch_ + c_.stride + j;
    vf v[count.value];
    for (int k = 0; k < count.value; ++k)
      v[k] = load(g + k * kLanes) * row.rstd - row.g - load(y + k * kLanes) * row.gy;
    give(count, j, n, row, v);
  }

  template <typename N>
  __attribute__((always_inline)) void give(N count, int64_t j, int n, const Target& row, const vf* v) const {
    if (row.tokens) put_columns<kStream>(count, row.tokens + j, v, n);
    if (row.sum)
      for (int k = 0; k < count.value; ++k) add_to(row.sum + j + k * kLanes, v[k]);
  }

  // Reads the row at place i: y and g to scratch, the sums for weight and bias. What the row some way ahead
  // needs is fetched meanwhile, and (kWrite) the row that is in scratch is written.
  template <bool kWrite>
  void read(int64_t i, int64_t end, const Partials& partial) {
    const int64_t t = buckets_.row(i),
                  next = buckets_.row(row_ahead<kStream>(i, end, p_.dim * int64_t(sizeof(T))));
    float *y = scratch_, *g = scratch_ + c_.stride, *dweight = partial.weight, *dbias = partial.bias;
    const float* weight = c_.weight;
    const float rstd = p_.rstd[t], mean = p_.norm == Norm::layer ? p_.mean[t] : 0.0f;
    const T *dx = gradient(t), *dx_ahead = gradient(next);
    T* const out_ahead = kStream ? nullptr : target(next).tokens;
    const Target before = row_;
    Four sum_g, sum_gy;
    Row<T, P>(p_, c_, t, base())
        .for_each_sum(0, p_.dim, Row<T, P>(p_, c_, next, base()),
                      [&](auto count, int64_t j, int n, const vf* v) MMFAST_INLINE_LAMBDA {
                        if (count.value == 4) fetch<false>(dx_ahead + j, 4 * kLanes);
                        if (!kStream && count.value == 4 && out_ahead) fetch<true>(out_ahead + j, 4 * kLanes);
                        if (kWrite) write(count, j, n, before);
                        vf normed[count.value], d[count.value];
                        for (int k = 0; k < count.value; ++k) {
                          const int64_t c = j + k * kLanes;
                          normed[k] = (v[k] - mean) * rstd;
                          d[k] = get(dx + c, n);
                          const vf scaled = d[k] * load(weight + c);
                          store(y + c, normed[k]);
                          store(g + c, scaled);
                          sum_g.v[k] += scaled;
                          sum_gy.v[k] += scaled * normed[k];
                        }
                        if (dweight)
                          for (int k = 0; k < count.value; ++k)
                            add_to(dweight + j + k * kLanes, d[k] * normed[k]);
                        if (dbias)
                          for (int k = 0; k < count.value; ++k) add_to(dbias + j + k * kLanes, d[k]);
                      });
    const float average_g = p_.norm == Norm::layer ? sum_g.total() / float(p_.dim) : 0.0f;
    const float average_gy = sum_gy.total() / float(p_.dim);
    if (averages_) averages_[2 * t] = average_g, averages_[2 * t + 1] = average_gy;
    row_ = target(t);
    row_.rstd = rstd, row_.g = average_g * rstd, row_.gy = average_gy * rstd;
  }

  // After the row at place i has its gradient: where it is the last of its bucket in [begin, end), hands on
  // the sum.
  void close(int64_t i, int64_t begin, int64_t end, const Partials& partial) {
    const int64_t bucket = buckets_.of(buckets_.row(i));
    if (i + 1 < end && i + 1 < buckets_.begin(bucket + 1)) return;
    float* sum = this->sum();
    if (partial.type) {
      float* type = partial.type + buckets_.part(bucket) * c_.stride;
      for_each_vector(c_.stride,
                      [&](int64_t j, int) MMFAST_INLINE_LAMBDA { add_to(type + j, load(sum + j)); });
    }
    const bool before = buckets_.begin(bucket)<begin, after = buckets_.begin(bucket + 1)> end;
    if (before || after)
      std::memcpy(before ? partial.before : partial.after, sum, size_t(c_.stride) * sizeof(float));
    else
      write_table<P>(p_, buckets_, bucket, sum);
    std::memset(sum, 0, size_t(c_.stride) * sizeof(float));
  }
};

// Adds the chunks' partial sums in order: columns are shared by threads.
template <typename P>
void reduce(const float* partials, int64_t chunk_stride, int64_t chunks, void* out, int64_t dim,
            int threads) {
  P* result = static_cast<P*>(out);
  const int64_t vectors = (dim + kLanes - 1) / kLanes;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t v = 0; v < vectors; ++v) {
    const int64_t i = v * kLanes;
    const int n = dim - i < kLanes ? int(dim - i) : kLanes;
    vf total = splat(0);
    for (int64_t c = 0; c < chunks; ++c) total += load(partials + c * chunk_stride + i);
    set<false>(result + i, total, n);
  }
}

constexpr int64_t kColumns = 256;

// Adds columns [first, first + width) of a row's gradient before the norm to total, computed again in
// float32.
template <typename T, typename P>
void add_gradient(const PackParams& p, const Constants& c, const float* averages, int64_t t, int64_t first,
                  int64_t width, int64_t next, float* total) {
  const T* dx = static_cast<const T*>(p.x) + t * p.x_stride;
  const T* dx_ahead = static_cast<const T*>(p.x) + next * p.x_stride;
  if (p.norm == Norm::none) {
    for_each_vector(
        width, [=](int64_t i, int n) MMFAST_INLINE_LAMBDA { add_to(total + i, get(dx + first + i, n)); });
    return;
  }
  const float rstd = p.rstd[t], mean = p.norm == Norm::layer ? p.mean[t] : 0.0f;
  const float average_g = averages[2 * t], average_gy = averages[2 * t + 1];
  const float* weight = c.weight;
  Row<T, P>(p, c, t).for_each_sum(first, first + width, Row<T, P>(p, c, next),
                                  [=](auto count, int64_t i, int n, const vf* v) MMFAST_INLINE_LAMBDA {
                                    if (count.value == 4) fetch<false>(dx_ahead + i, 4 * kLanes);
                                    for (int k = 0; k < count.value; ++k) {
                                      const int64_t j = i + k * kLanes;
                                      const vf g = get(dx + j, n) * load(weight + j);
                                      add_to(total + (j - first),
                                             (g - average_g - (v[k] - mean) * rstd * average_gy) * rstd);
                                    }
                                  });
}

// Gradient of the table of a further axis: rows are bucketed by position (stable), then each table row adds
// its own rows in order. Blocks of columns give work to all threads where a table is short.
template <typename T, typename P>
void table_backward(const PackParams& p, const Constants& c, const float* averages, int which, int axis) {
  const PackPart& part = p.part[which];
  const int64_t size = part.table_rows[axis], dim = p.dim;
  int64_t* end = new int64_t[size + 1]();
  int64_t* member = new int64_t[part.rows];
  for (int64_t t = 0; t < p.rows; ++t)
    if (p.modality[t] == which) ++end[p.position[t * p.axes + axis] + 1];
  for (int64_t n = 0; n < size; ++n) end[n + 1] += end[n];
  // end[n] is the beginning of bucket n, and moves to its end.
  for (int64_t t = 0; t < p.rows; ++t)
    if (p.modality[t] == which) member[end[p.position[t * p.axes + axis]]++] = t;
  P* out = static_cast<P*>(part.dtable[axis]);
  const int64_t blocks = (dim + kColumns - 1) / kColumns;
#pragma omp parallel for num_threads(p.threads) schedule(dynamic, 8)
  for (int64_t task = 0; task < size * blocks; ++task) {
    const int64_t n = task / blocks, first = task % blocks * kColumns;
    const int64_t width = dim - first < kColumns ? dim - first : kColumns;
    float total[kColumns] = {};
    for (int64_t m = n ? end[n - 1] : 0; m < end[n]; ++m) {
      const int64_t next = member[row_ahead<false>(m, part.rows, width * int64_t(sizeof(T)))];
      add_gradient<T, P>(p, c, averages, member[m], first, width, next, total);
    }
    for_each_vector(width, [&](int64_t i, int k) MMFAST_INLINE_LAMBDA {
      set<false>(out + n * dim + first + i, load(total + i), k);
    });
  }
  delete[] member;
  delete[] end;
}

// Table rows of buckets that no row or more than one chunk has. Partials of chunk c, `before` and then
// `after`, begin at edges + c * chunk_stride.
template <typename P>
void finish_tables(const PackParams& p, const Buckets& buckets, float* edges, int64_t chunk_stride,
                   int64_t chunks, int64_t stride) {
  auto chunk_end = [&](int64_t c) { return p.rows * (c + 1) / chunks; };
  float* zeros = allocate(stride);
  std::memset(zeros, 0, size_t(stride) * sizeof(float));
  int64_t chunk = 0;
  for (int64_t n = 0; n < buckets.count(); ++n) {
    const int64_t begin = buckets.begin(n), end = buckets.begin(n + 1);
    if (begin == end) write_table<P>(p, buckets, n, zeros);
    if (begin == end) continue;
    while (chunk_end(chunk) <= begin) ++chunk;
    if (end <= chunk_end(chunk)) continue;
    float* total = edges + chunk * chunk_stride + stride;
    while (chunk_end(chunk) < end) {
      const float* more = edges + ++chunk * chunk_stride;
      for_each_vector(stride,
                      [&](int64_t i, int) MMFAST_INLINE_LAMBDA { add_to(total + i, load(more + i)); });
    }
    write_table<P>(p, buckets, n, total);
  }
  release(zeros);
}

template <typename T, typename P, bool kStream>
void backward(const PackParams& p) {
  const Constants constants(p, static_cast<const P*>(nullptr));
  const Buckets buckets(p);
  const int64_t stride = constants.stride, chunks = chunks_of(p.rows);
  bool first_axis = false, further_axes = false;
  for (int m = 0; m < p.parts; ++m) {
    for (int a = 0; a < p.part[m].tables; ++a)
      if (p.part[m].dtable[a]) (a ? further_axes : first_axis) = true;
  }
  // Of each chunk: before and after, then weight, bias and types where they are wanted.
  const bool want_weight = p.dweight, want_bias = p.dbias, want_type = p.dtype_embedding;
  const int64_t bias_at = 2 + want_weight, type_at = bias_at + want_bias;
  const int64_t chunk_stride = stride * (type_at + (want_type ? p.parts : 0));
  float* partials = allocate(chunks * chunk_stride);
  const Scratch scratch(p.threads, Backward<T, P, kStream>::scratch_size(p.dim));
  float* averages = further_axes && p.norm != Norm::none ? allocate(2 * p.rows + 1) : nullptr;
#pragma omp parallel num_threads(p.threads)
  {
    Backward<T, P, kStream> rows(p, constants, buckets, averages, scratch.of(omp_get_thread_num()));
#pragma omp for schedule(static)
    for (int64_t c = 0; c < chunks; ++c) {
      float* base = partials + c * chunk_stride;
      std::memset(base, 0, size_t(chunk_stride) * sizeof(float));
      rows.run(p.rows * c / chunks, p.rows * (c + 1) / chunks,
               {want_weight ? base + 2 * stride : nullptr, want_bias ? base + bias_at * stride : nullptr,
                want_type ? base + type_at * stride : nullptr, base, base + stride});
    }
    if (kStream) stream_fence();
  }
  auto reduced = [&](int64_t at, void* out) {
    reduce<P>(partials + at * stride, chunk_stride, chunks, out, p.dim, p.threads);
  };
  if (want_weight) reduced(2, p.dweight);
  if (want_bias) reduced(bias_at, p.dbias);
  for (int m = 0; want_type && m < p.parts; ++m)
    reduced(type_at + m, static_cast<P*>(p.dtype_embedding) + m * p.dim);
  if (first_axis) finish_tables<P>(p, buckets, partials, chunk_stride, chunks, stride);
  release(partials);
  for (int m = 0; m < p.parts; ++m) {
    for (int a = 1; a < p.part[m].tables; ++a)
      if (p.part[m].dtable[a]) table_backward<T, P>(p, constants, averages, m, a);
  }
  if (averages) release(averages);
}

template <typename T, typename P>
void backward(const PackParams& p) {
  bool stream = p.stream;
  for (int m = 0; m < p.parts; ++m)
    stream = stream && can_stream(p.part[m].dtokens, p.dim * int64_t(sizeof(T)));
  stream ? backward<T, P, true>(p) : backward<T, P, false>(p);
}

}  // namespace

void pack_backward(const PackParams& p) {
  if (p.dtype == DType::f32) return backward<float, float>(p);
  if (p.param_dtype == DType::f32) return backward<bf16, float>(p);
  backward<bf16, bf16>(p);
}

}  // namespace MMFAST_ISA
}  // namespace mmfast
