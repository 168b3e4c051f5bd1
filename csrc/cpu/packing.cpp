// x[t] = norm(tokens[source[t]] + type[modality[t]] + sum over axes a of table[a][position[t, a]]), and
// backward. Sums in float32. A row is summed into a scratch row that stays in the first-level cache, then
// normalised from there: tokens are read once and x is written once.
#include "mmfast/packing.h"

#include <omp.h>

#include <cmath>
#include <cstring>

#include "cpu/rows.h"

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

// How far ahead of its use a row is fetched: enough to hide the memory behind it, few enough to stay in the
// first-level cache.
constexpr int64_t kAheadBytes = 6 << 10;

// The row to fetch while row t of [begin, end) is worked on, `bytes` of it.
MMFAST_INLINE int64_t row_ahead(int64_t t, int64_t end, int64_t bytes) {
  const int64_t rows = kAheadBytes / (bytes + 1), next = t + (rows < 1 ? 1 : rows);
  return next < end ? next : end - 1;
}

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

// A number that the compiler knows.
template <int kValue>
struct Count {
  static constexpr int value = kValue;
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
    int64_t i = begin;
    for (; i + 4 * kLanes <= end; i += 4 * kLanes) {
      vf v[4];
      for (int k = 0; k < 4; ++k) v[k] = load(tokens + i + k * kLanes);
      prefetch(ahead.tokens + i);
      for (int a = 0; a < ahead.tables; ++a) prefetch(ahead.table[a] + i);
      if (type)
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

// A row passes three stages: its sum, its variance about the mean, its output. One loop over the columns does
// them for three neighbouring rows: loads and stores then mix evenly, and no row waits for a sum over lanes.
template <typename T, typename P, bool kStream>
class Forward {
 public:
  Forward(const PackParams& p, const Constants& c, float* scratch) : p_(p), c_(c), scratch_(scratch) {}

  static int64_t scratch_size(int64_t dim) { return 4 * padded(dim); }

  void run(int64_t begin, int64_t end) {
    if (p_.norm == Norm::none) {
      for (int64_t t = begin; t < end; ++t) {
        T* out = this->out(t);
        Row<T, P>(p_, c_, t).for_each_sum(
            0, p_.dim, ahead(t, end), [&](auto count, int64_t i, int n, const vf* v) MMFAST_INLINE_LAMBDA {
              for (int k = 0; k < count.value; ++k) set<kStream>(out + i + k * kLanes, v[k], n);
            });
      }
      return;
    }
    for (int64_t t = begin; t < end; ++t) add(t, begin, end);
    if (begin < end) measure(end - 1);
    for (int64_t t = end - 2 < begin ? begin : end - 2; t < end; ++t) finish(t);
  }

 private:
  const PackParams& p_;
  const Constants& c_;
  float* scratch_;                    // three rows, and one for what is not wanted
  float sum_[3] = {}, rstd_[3] = {};  // sum: of the values (layer norm) or of their squares (RMS norm)

  float* scratch(int64_t t) const { return scratch_ + t % 3 * c_.stride; }
  T* out(int64_t t) const { return static_cast<T*>(p_.x) + t * p_.dim; }
  Row<T, P> ahead(int64_t t, int64_t end) const {
    return Row<T, P>(p_, c_, row_ahead(t, end, p_.dim * int64_t(sizeof(T))));
  }
  float mean(int64_t t) const { return p_.norm == Norm::layer ? sum_[t % 3] / float(p_.dim) : 0.0f; }

  // The first stage of row t, the second of the row before, the third of the one before that.
  void add(int64_t t, int64_t begin, int64_t end) {
    const int64_t second = t + 2, third = t + 1;  // modulo 3
    float* row = scratch(t);
    const float *centred = scratch(second), *normed = scratch(third);
    T* out = t - 2 < begin ? reinterpret_cast<T*>(scratch_ + 3 * c_.stride) : this->out(t - 2);
    const float centre = mean(second), mean = this->mean(third), rstd = rstd_[third % 3];
    const float *weight = c_.weight, *bias = c_.bias;
    const bool layer = p_.norm == Norm::layer;
    Four total, squares;
    Row<T, P>(p_, c_, t).for_each_sum(
        0, p_.dim, ahead(t, end), [&](auto count, int64_t i, int n, const vf* v) MMFAST_INLINE_LAMBDA {
          for (int k = 0; k < count.value; ++k) store(row + i + k * kLanes, v[k]);
          if (layer) {
            for (int k = 0; k < count.value; ++k) {
              const vf c = first_lanes(load(centred + i + k * kLanes) - centre, n);
              total.v[k] += v[k];
              squares.v[k] += c * c;
            }
          } else {
            for (int k = 0; k < count.value; ++k) total.v[k] += v[k] * v[k];
          }
          for (int k = 0; k < count.value; ++k) {
            const int64_t j = i + k * kLanes;
            set<kStream>(out + j, (load(normed + j) - mean) * rstd * load(weight + j) + load(bias + j), n);
          }
        });
    sum_[t % 3] = total.total();
    if (t > begin) keep(t - 1, squares);
  }

  // The statistics of a row. Two passes: the sum of squares alone loses digits where the mean is large.
  __attribute__((always_inline)) void keep(int64_t t, const Four& squares) {
    const bool layer = p_.norm == Norm::layer;
    if (layer) p_.mean[t] = mean(t);
    const float variance = (layer ? squares.total() : sum_[t % 3]) / float(p_.dim);
    rstd_[t % 3] = p_.rstd[t] = 1.0f / std::sqrt(variance + p_.eps);
  }

  void measure(int64_t t) {
    const float* row = scratch(t);
    const float centre = mean(t);
    Four squares;
    for_each_vector_in_four(p_.dim, [&](int64_t i, int n, int k) MMFAST_INLINE_LAMBDA {
      const vf c = first_lanes(load(row + i) - centre, n);
      squares.v[k] += c * c;
    });
    keep(t, squares);
  }

  void finish(int64_t t) {
    const float *row = scratch(t), *weight = c_.weight, *bias = c_.bias;
    const float mean = this->mean(t), rstd = rstd_[t % 3];
    T* out = this->out(t);
    for_each_vector(p_.dim, [&](int64_t i, int n) MMFAST_INLINE_LAMBDA {
      set<kStream>(out + i, (load(row + i) - mean) * rstd * load(weight + i) + load(bias + i), n);
    });
  }
};

template <typename T, typename P, bool kStream>
void forward(const PackParams& p) {
  const Constants constants(p, static_cast<const P*>(nullptr));
  const int64_t size = Forward<T, P, kStream>::scratch_size(p.dim);
  float* scratch = allocate(p.threads * size);
#pragma omp parallel num_threads(p.threads)
  {
    const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
    std::memset(scratch + thread * size, 0, size_t(size) * sizeof(float));
    Forward<T, P, kStream> rows(p, constants, scratch + thread * size);
    rows.run(p.rows * thread / threads, p.rows * (thread + 1) / threads);
    if (kStream) stream_fence();
  }
  release(scratch);
}

MMFAST_INLINE void add_to(float* p, vf v) {
  store(p, load(p) + v);
}

// Partial sums of one chunk, each null where it is not wanted.
struct Partials {
  float *weight, *bias, *type;
};

// A row passes two stages: the sums over its columns, its gradient. One loop does them for two neighbours.
template <typename T, typename P, bool kStream>
class Backward {
 public:
  // coefficients [rows, 2]: dx = (g - a - normed * b) * rstd, kept for the position tables.
  Backward(const PackParams& p, const Constants& c, float* coefficients, float* scratch)
      : p_(p), c_(c), coefficients_(coefficients), scratch_(scratch) {}

  static int64_t scratch_size(int64_t dim) { return 4 * padded(dim); }

  void run(int64_t begin, int64_t end, const Partials& partial) {
    if (p_.norm == Norm::none) {
      for (int64_t t = begin; t < end; ++t) {
        const T* dx = gradient(t);
        Output(*this, t, partial).write_all(p_.dim, [&](int64_t i, int n) MMFAST_INLINE_LAMBDA {
          return get(dx + i, n);
        });
      }
      return;
    }
    for (int64_t t = begin; t < end; ++t) add(t, begin, end, partial);
    if (begin == end) return;
    const Output output(*this, end - 1, partial);
    output.write_all(p_.dim, [&](int64_t i, int) MMFAST_INLINE_LAMBDA { return output.at(i); });
  }

 private:
  const PackParams& p_;
  const Constants& c_;
  float *coefficients_, *scratch_;

  // The second stage of a row.
  struct Output {
    T* out = nullptr;
    float* type = nullptr;
    const float *normed, *scaled;
    float a = 0, b = 0, rstd = 0;

    __attribute__((always_inline)) Output(const Backward& rows, int64_t t, const Partials& partial) {
      const PackParams& p = rows.p_;
      const PackPart& part = p.part[p.modality[t]];
      if (part.dtokens) out = static_cast<T*>(part.dtokens) + (p.source[t] - part.first) * p.dim;
      if (partial.type) type = partial.type + p.modality[t] * rows.c_.stride;
      normed = rows.scratch(t);
      scaled = normed + rows.c_.stride;
      if (p.norm == Norm::none) return;
      a = rows.coefficients_[2 * t];
      b = rows.coefficients_[2 * t + 1];
      rstd = p.rstd[t];
    }
    __attribute__((always_inline)) bool wanted() const { return out || type; }
    __attribute__((always_inline)) vf at(int64_t i) const {
      return (load(scaled + i) - a - load(normed + i) * b) * rstd;
    }
    template <typename N, typename Value>
    __attribute__((always_inline)) void write(N count, int64_t i, int n, Value value) const {
      vf v[count.value];
      for (int k = 0; k < count.value; ++k) v[k] = value(i + k * kLanes, n);
      if (out)
        for (int k = 0; k < count.value; ++k) set<kStream>(out + i + k * kLanes, v[k], n);
      if (type)
        for (int k = 0; k < count.value; ++k) add_to(type + i + k * kLanes, v[k]);
    }
    // All columns.
    template <typename Value>
    __attribute__((always_inline)) void write_all(int64_t dim, Value value) const {
      if (!wanted()) return;
      int64_t i = 0;
      for (; i + 4 * kLanes <= dim; i += 4 * kLanes) write(Count<4>(), i, kLanes, value);
      for (; i < dim; i += kLanes) write(Count<1>(), i, dim - i < kLanes ? int(dim - i) : kLanes, value);
    }
  };

  float* scratch(int64_t t) const { return scratch_ + t % 2 * 2 * c_.stride; }
  const T* gradient(int64_t t) const { return static_cast<const T*>(p_.x) + t * p_.x_stride; }

  // The first stage of row t and the second of the row before.
  void add(int64_t t, int64_t begin, int64_t end, const Partials& partial) {
    float *normed = scratch(t), *scaled = normed + c_.stride;
    float *dweight = partial.weight, *dbias = partial.bias;
    const float* weight = c_.weight;
    const float rstd = p_.rstd[t], mean = p_.norm == Norm::layer ? p_.mean[t] : 0.0f;
    const T* dx = gradient(t);
    const int64_t next = row_ahead(t, end, p_.dim * int64_t(sizeof(T)));
    const Row<T, P> ahead(p_, c_, next);
    const T* dx_ahead = gradient(next);
    Output output(*this, t > begin ? t - 1 : t, partial);
    if (t == begin) output.out = nullptr, output.type = nullptr;
    const bool wanted = output.wanted();
    Four sum_scaled, sum_product;
    Row<T, P>(p_, c_, t).for_each_sum(
        0, p_.dim, ahead, [&](auto count, int64_t i, int n, const vf* v) MMFAST_INLINE_LAMBDA {
          if (count.value == 4) prefetch(dx_ahead + i);
          vf y[count.value], d[count.value];
          for (int k = 0; k < count.value; ++k) {
            const int64_t j = i + k * kLanes;
            y[k] = (v[k] - mean) * rstd;
            d[k] = get(dx + j, n);
            const vf g = d[k] * load(weight + j);
            store(normed + j, y[k]);
            store(scaled + j, g);
            sum_scaled.v[k] += g;
            sum_product.v[k] += g * y[k];
          }
          if (dweight)
            for (int k = 0; k < count.value; ++k) add_to(dweight + i + k * kLanes, d[k] * y[k]);
          if (dbias)
            for (int k = 0; k < count.value; ++k) add_to(dbias + i + k * kLanes, d[k]);
          if (wanted)
            output.write(count, i, n, [&](int64_t j, int) MMFAST_INLINE_LAMBDA { return output.at(j); });
        });
    coefficients_[2 * t] = p_.norm == Norm::layer ? sum_scaled.total() / float(p_.dim) : 0.0f;
    coefficients_[2 * t + 1] = sum_product.total() / float(p_.dim);
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
void add_gradient(const PackParams& p, const Constants& c, const float* coefficients, int64_t t,
                  int64_t first, int64_t width, int64_t next, float* total) {
  const T* dx = static_cast<const T*>(p.x) + t * p.x_stride;
  const T* dx_ahead = static_cast<const T*>(p.x) + next * p.x_stride;
  if (p.norm == Norm::none) {
    for_each_vector(
        width, [=](int64_t i, int n) MMFAST_INLINE_LAMBDA { add_to(total + i, get(dx + first + i, n)); });
    return;
  }
  const float rstd = p.rstd[t], mean = p.norm == Norm::layer ? p.mean[t] : 0.0f;
  const float a = coefficients[2 * t], b = coefficients[2 * t + 1];
  const float* weight = c.weight;
  Row<T, P>(p, c, t).for_each_sum(first, first + width, Row<T, P>(p, c, next),
                                  [=](auto count, int64_t i, int n, const vf* v) MMFAST_INLINE_LAMBDA {
                                    if (count.value == 4) prefetch(dx_ahead + i);
                                    for (int k = 0; k < count.value; ++k) {
                                      const int64_t j = i + k * kLanes;
                                      const vf g = get(dx + j, n) * load(weight + j);
                                      add_to(total + (j - first), (g - a - (v[k] - mean) * rstd * b) * rstd);
                                    }
                                  });
}

// Gradient of one position table: rows are bucketed by position (stable), then each table row adds its own
// rows in order. Blocks of columns give work to all threads where a table is short.
template <typename T, typename P>
void table_backward(const PackParams& p, const Constants& c, const float* coefficients, int which, int axis) {
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
      const int64_t next = member[row_ahead(m, part.rows, width * int64_t(sizeof(T)))];
      add_gradient<T, P>(p, c, coefficients, member[m], first, width, next, total);
    }
    for_each_vector(width, [&](int64_t i, int k) MMFAST_INLINE_LAMBDA {
      set<false>(out + n * dim + first + i, load(total + i), k);
    });
  }
  delete[] member;
  delete[] end;
}

template <typename T, typename P, bool kStream>
void backward(const PackParams& p) {
  const Constants constants(p, static_cast<const P*>(nullptr));
  const int64_t stride = constants.stride, chunks = chunks_of(p.rows);
  const bool want_weight = p.dweight, want_bias = p.dbias, want_type = p.dtype_embedding;
  const int64_t chunk_stride = stride * (want_weight + want_bias + (want_type ? p.parts : 0));
  const int64_t size = Backward<T, P, kStream>::scratch_size(p.dim);
  float* partials = allocate(chunks * chunk_stride + 1);
  float* scratch = allocate(p.threads * size);
  float* coefficients = p.norm == Norm::none ? nullptr : allocate(2 * p.rows + 1);
#pragma omp parallel num_threads(p.threads)
  {
    Backward<T, P, kStream> rows(p, constants, coefficients, scratch + omp_get_thread_num() * size);
#pragma omp for schedule(static)
    for (int64_t c = 0; c < chunks; ++c) {
      float* base = partials + c * chunk_stride;
      if (chunk_stride) std::memset(base, 0, size_t(chunk_stride) * sizeof(float));
      const Partials partial{want_weight ? base : nullptr, want_bias ? base + want_weight * stride : nullptr,
                             want_type ? base + (want_weight + want_bias) * stride : nullptr};
      rows.run(p.rows * c / chunks, p.rows * (c + 1) / chunks, partial);
    }
    if (kStream) stream_fence();
  }
  if (want_weight) reduce<P>(partials, chunk_stride, chunks, p.dweight, p.dim, p.threads);
  if (want_bias) reduce<P>(partials + want_weight * stride, chunk_stride, chunks, p.dbias, p.dim, p.threads);
  for (int m = 0; want_type && m < p.parts; ++m) {
    reduce<P>(partials + (want_weight + want_bias + m) * stride, chunk_stride, chunks,
              static_cast<P*>(p.dtype_embedding) + m * p.dim, p.dim, p.threads);
  }
  release(scratch);
  release(partials);
  for (int m = 0; m < p.parts; ++m) {
    for (int a = 0; a < p.part[m].tables; ++a)
      if (p.part[m].dtable[a]) table_backward<T, P>(p, constants, coefficients, m, a);
  }
  if (coefficients) release(coefficients);
}

template <typename T, typename P>
void dispatch_stream(const PackParams& p, bool is_forward) {
  bool stream = p.stream;
  if (is_forward) {
    stream = stream && can_stream(p.x, p.dim * int64_t(sizeof(T)));
    return stream ? forward<T, P, true>(p) : forward<T, P, false>(p);
  }
  for (int m = 0; m < p.parts; ++m)
    stream = stream && can_stream(p.part[m].dtokens, p.dim * int64_t(sizeof(T)));
  return stream ? backward<T, P, true>(p) : backward<T, P, false>(p);
}

void dispatch(const PackParams& p, bool is_forward) {
  if (p.dtype == DType::f32) return dispatch_stream<float, float>(p, is_forward);
  if (p.param_dtype == DType::f32) return dispatch_stream<bf16, float>(p, is_forward);
  return dispatch_stream<bf16, bf16>(p, is_forward);
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
  dispatch(p, true);
}
void pack_backward(const PackParams& p) {
  dispatch(p, false);
}
void gather_rows(const GatherParams& p) {
  p.stream&& can_stream(p.out, p.bytes) ? gather<true>(p) : gather<false>(p);
}

}  // namespace MMFAST_ISA
}  // namespace mmfast
