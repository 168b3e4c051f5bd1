// Attack step and random start. Formulas and sources: mmfast/reference/perturbation.py.
#include "mmfast/perturbation.h"

#include <omp.h>

#include <cmath>

#include "cpu/isa.h"
#include "cpu/philox.h"

namespace mmfast {
namespace MMFAST_ISA {
namespace {

constexpr int64_t kChunk = 256 * kLanes;  // elements summed in float32 (256 a lane) before they join a double
constexpr int64_t kBlock = 65536;         // elements of one unit of work
constexpr int64_t kLine = 64;             // elements that fill whole cache lines

MMFAST_INLINE int64_t min64(int64_t a, int64_t b) {
  return a < b ? a : b;
}

struct Sums {
  double a = 0, b = 0, c = 0;
  float peak = 0;  // largest |g|
};

// f(begin, end, i) for every block i of n elements. A thread has the same blocks each time, and goes through
// them backwards where the end of what it saw last is still in its cache.
template <bool kBackwards, typename F>
void for_blocks(int64_t n, int threads, const F& f) {
  const int64_t blocks = (n + kBlock - 1) / kBlock;
  auto run = [&](int64_t first, int64_t last) {
    for (int64_t k = first; k < last; ++k) {
      const int64_t i = kBackwards ? first + last - 1 - k : k;
      f(i * kBlock, min64(n, (i + 1) * kBlock), i);
    }
  };
  if (threads <= 1 || blocks <= 1) return run(0, blocks);
#pragma omp parallel num_threads(threads)
  {
    const int64_t thread = omp_get_thread_num(), team = omp_get_num_threads();
    run(blocks * thread / team, blocks * (thread + 1) / team);
  }
}

// Sums f(begin, end) over blocks, always in block order: the threads only decide who computes a block.
template <typename F>
Sums reduce(int64_t n, int threads, const F& f) {
  Sums total, few[8];
  const int64_t blocks = (n + kBlock - 1) / kBlock;
  Sums* part = blocks > 8 ? new Sums[blocks] : few;
  for_blocks<false>(n, threads, [&](int64_t begin, int64_t end, int64_t i) { part[i] = f(begin, end); });
  for (int64_t i = 0; i < blocks; ++i) {
    total.a += part[i].a;
    total.b += part[i].b;
    total.c += part[i].c;
    total.peak = total.peak > part[i].peak ? total.peak : part[i].peak;
  }
  if (part != few) delete[] part;
  return total;
}

// f(i, lanes) for every vector of [begin, end); the last one may be short.
template <typename F>
MMFAST_INLINE void for_vectors(int64_t begin, int64_t end, const F& f) {
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) f(i, kLanes);
  if (i < end) f(i, int(end - i));
}

template <typename T>
MMFAST_INLINE vf read(const T* p, int n) {
  return n == kLanes ? load(p) : load_tail(p, n);
}
template <typename T>
MMFAST_INLINE void write(T* p, vf v, int n) {
  if (n == kLanes)
    store(p, v);
  else
    store_tail(p, v, n);
}

// NaN as 0, infinities as the largest finite number.
MMFAST_INLINE vf finite(vf g) {
  const vf top = splat(3.402823466e38f);
  return select(g == g, vmax(vmin(g, top), -top), splat(0.0f));
}

// Clamp that keeps a NaN of v.
MMFAST_INLINE vf within(vf low, vf high, vf v) {
  return vmin(high, vmax(low, v));
}

// A power of two that brings a peak near 1 where its square could over- or underflow, else 1.
float rescale(float peak) {
  if (peak == 0 || (peak > 0x1p-40f && peak < 0x1p40f)) return 1;
  int exponent;
  std::frexp(peak, &exponent);
  exponent = -exponent < 126 ? -exponent : 126;
  return std::ldexp(1.0f, exponent);
}

// Limits are rounded down to the dtype, so that stored values keep them.
float limit_of(float eps, float) {
  return eps;
}
float limit_of(float eps, bf16) {
  uint32_t bits;
  std::memcpy(&bits, &eps, 4);
  bits &= 0xffff0000u;
  std::memcpy(&eps, &bits, 4);
  return eps;
}

// A stretch of consecutive elements that share a norm.
template <typename T>
struct Unit {
  T* delta;
  const T* grad;
  const T* origin;
  T* momentum;
  T* previous;
  int64_t n;
  float step, eps, low, high, decay, blend;
};

struct Coefficients {
  float step = 0;   // L-inf: a
  float keep = 1;   // L2: factor of delta
  float move = 0;   // L2: factor of the scaled gradient
  float scale = 1;  // L2: scale of the gradient
  float last = 1;   // L2 with previous: factor of the last projection
};

// One vector of one unit: delta before, and the bounds around it.
struct Point {
  vf d, low, high;
};

// The step with its projections; with `previous` the blend as well, still to be projected.
template <typename T, bool kL2, bool kBox, bool kPrevious>
MMFAST_INLINE vf moved(const Unit<T>& u, const T* grad, const Coefficients& c, int64_t i, int n, Point& at) {
  const vf d = at.d = read(u.delta + i, n);
  const vf g = read(grad + i, n);
  vf v;
  if constexpr (kL2) {
    v = d * splat(c.keep) + finite(g) * splat(c.scale) * splat(c.move);
  } else {
    const vf a = splat(c.step);
    v = d + select(g > splat(0.0f), a, select(g < splat(0.0f), -a, splat(0.0f)));
    v = within(splat(-u.eps), splat(u.eps), v);
  }
  if constexpr (kBox) {
    const vf x = read(u.origin + i, n);
    at.low = splat(u.low) - x;
    at.high = splat(u.high) - x;
    v = within(at.low, at.high, v);
  }
  if constexpr (kPrevious) {
    v = d + splat(u.blend) * (v - d) + splat(1.0f - u.blend) * (d - read(u.previous + i, n));
  }
  return v;
}

// By value: numbers behind a reference would be read anew after every store.
template <typename T, bool kL2, bool kBox, bool kPrevious>
void apply(Unit<T> u, const T* grad, Coefficients c, int64_t begin, int64_t end) {
  for_vectors(begin, end, [=](int64_t i, int n) __attribute__((always_inline)) {
    Point at;
    vf v = moved<T, kL2, kBox, kPrevious>(u, grad, c, i, n, at);
    if constexpr (kPrevious) {
      v = kL2 ? v * splat(c.last) : within(splat(-u.eps), splat(u.eps), v);
      if constexpr (kBox) v = within(at.low, at.high, v);
      write(u.previous + i, at.d, n);
    }
    write(u.delta + i, v, n);
  });
}

// One accumulator per k, or each addition would wait for the one before.
struct Two {
  vf v[2] = {};
  __attribute__((always_inline)) double total() const { return double(sum(v[0] + v[1])); }
};

// f(i, lanes, k) for every vector of [begin, end), k alternating between 0 and 1.
template <typename F>
MMFAST_INLINE void for_vectors_in_two(int64_t begin, int64_t end, const F& f) {
  int64_t i = begin;
  for (; i + 2 * kLanes <= end; i += 2 * kLanes) {
    f(i, kLanes, 0);
    f(i + kLanes, kLanes, 1);
  }
  for_vectors(i, end, [&](int64_t i, int n) __attribute__((always_inline)) { f(i, n, 0); });
}

// |v|^2 in chunks: a is the sum.
template <typename F>
Sums squares(int64_t begin, int64_t end, const F& value) {
  Sums s;
  for (int64_t at = begin; at < end; at += kChunk) {
    Two vv;
    for_vectors_in_two(at, min64(end, at + kChunk),
                       [&](int64_t i, int n, int k) __attribute__((always_inline)) {
                         const vf v = value(i, n);
                         vv.v[k] += v * v;
                       });
    s.a += vv.total();
  }
  return s;
}

// |g|^2, <d, g>, |d|^2 and max |g| in one pass.
template <typename T>
Sums products(const Unit<T>& u, const T* grad, float scale, int64_t begin, int64_t end) {
  Sums s;
  Two peak;
  const T* delta = u.delta;
  for (int64_t at = begin; at < end; at += kChunk) {
    Two gg, dg, dd;
    for_vectors_in_two(at, min64(end, at + kChunk),
                       [&](int64_t i, int n, int k) __attribute__((always_inline)) {
                         const vf d = read(delta + i, n), g = finite(read(grad + i, n)) * splat(scale);
                         gg.v[k] += g * g;
                         dg.v[k] += d * g;
                         dd.v[k] += d * d;
                         peak.v[k] = vmax(peak.v[k], vabs(g));
                       });
    s.a += gg.total();
    s.b += dg.total();
    s.c += dd.total();
  }
  s.peak = max_lane(vmax(peak.v[0], peak.v[1]));
  return s;
}

template <typename T>
Sums absolute(const T* grad, float scale, int64_t begin, int64_t end) {
  Sums s;
  Two peak;
  for (int64_t at = begin; at < end; at += kChunk) {
    Two total;
    for_vectors_in_two(at, min64(end, at + kChunk),
                       [&](int64_t i, int n, int k) __attribute__((always_inline)) {
                         const vf g = vabs(finite(read(grad + i, n)) * splat(scale));
                         total.v[k] += g;
                         peak.v[k] = vmax(peak.v[k], g);
                       });
    s.a += total.total();
  }
  s.peak = max_lane(vmax(peak.v[0], peak.v[1]));
  return s;
}

// m = decay * m + g / |g|_1
template <typename T>
void update_momentum(const Unit<T>& u, int threads) {
  float scale = 1;
  auto measure = [&](int64_t begin, int64_t end) { return absolute(u.grad, scale, begin, end); };
  Sums s = reduce(u.n, threads, measure);
  scale = rescale(s.peak);
  if (scale != 1) s = reduce(u.n, threads, measure);
  const float inverse = s.a > 0 ? float(1 / s.a) : 0;
  for_blocks<true>(u.n, threads, [&](int64_t begin, int64_t end, int64_t) {
    for_vectors(begin, end, [=](int64_t i, int n) __attribute__((always_inline)) {
      const vf g = finite(read(u.grad + i, n)) * splat(scale);
      write(u.momentum + i, splat(u.decay) * read(u.momentum + i, n) + g * splat(inverse), n);
    });
  });
}

template <typename T, bool kL2, bool kBox, bool kPrevious>
void step_unit(const Unit<T>& u, int threads) {
  const T* grad = u.grad;
  if (u.momentum) {
    update_momentum(u, threads);
    grad = u.momentum;
  }
  Coefficients c;
  c.step = u.step;
  if constexpr (kL2) {
    auto measure = [&](int64_t begin, int64_t end) { return products(u, grad, c.scale, begin, end); };
    Sums s = reduce(u.n, threads, measure);
    c.scale = rescale(s.peak);
    if (c.scale != 1) s = reduce(u.n, threads, measure);
    const double length = std::sqrt(s.a), step = length > 0 ? u.step / length : 0;
    c.move = float(step);
    const double whole = s.c + step * step * s.a, eps = u.eps;
    double square = whole + 2 * step * s.b;
    if (square > eps * eps && square < 1e-3 * whole) {  // cancellation: measure the point itself
      square = reduce(u.n, threads, [&](int64_t begin, int64_t end) {
                 return squares(begin, end, [&](int64_t i, int n) {
                   Point at;
                   return moved<T, true, false, false>(u, grad, c, i, n, at);
                 });
               }).a;
    }
    if (square > eps * eps) {
      c.keep = float(eps / std::sqrt(square));
      c.move = float(step * (eps / std::sqrt(square)));
    }
    if constexpr (kPrevious) {
      const double blended = reduce(u.n, threads, [&](int64_t begin, int64_t end) {
                               return squares(begin, end, [&](int64_t i, int n) {
                                 Point at;
                                 return moved<T, true, kBox, true>(u, grad, c, i, n, at);
                               });
                             }).a;
      if (blended > eps * eps) c.last = float(eps / std::sqrt(blended));
    }
  }
  for_blocks<kL2>(u.n, threads, [&](int64_t begin, int64_t end, int64_t) {
    apply<T, kL2, kBox, kPrevious>(u, grad, c, begin, end);
  });
}

template <typename T>
void step_any(const Unit<T>& u, bool l2, int threads) {
  const bool box = u.origin, previous = u.previous;
  if (l2) {
    if (box)
      previous ? step_unit<T, true, true, true>(u, threads) : step_unit<T, true, true, false>(u, threads);
    else
      previous ? step_unit<T, true, false, true>(u, threads) : step_unit<T, true, false, false>(u, threads);
  } else {
    if (box)
      previous ? step_unit<T, false, true, true>(u, threads) : step_unit<T, false, true, false>(u, threads);
    else
      previous ? step_unit<T, false, false, true>(u, threads) : step_unit<T, false, false, false>(u, threads);
  }
}

template <typename T>
Unit<T> unit_of(const PerturbParams& p, const PerturbTensor& t, int64_t b, int64_t offset, int64_t n) {
  const int64_t at = t.begin(b) + offset;
  Unit<T> u;
  u.delta = static_cast<T*>(t.delta) + at;
  u.grad = static_cast<const T*>(t.grad) + at;
  u.origin = t.origin ? static_cast<const T*>(t.origin) + at : nullptr;
  u.momentum = t.momentum ? static_cast<T*>(t.momentum) + at : nullptr;
  u.previous = t.previous ? static_cast<T*>(t.previous) + at : nullptr;
  u.n = n;
  u.step = t.step_of(b);
  u.eps = p.l2 ? t.eps_of(b) : limit_of(t.eps_of(b), T{});
  u.low = t.low;
  u.high = t.high;
  u.decay = p.decay;
  u.blend = p.blend;
  return u;
}

// Calls f(tensor, sample, offset, n, threads) for all work. Samples are cut anywhere where there are no
// norms, and between tokens where norms are over tokens; else they stay whole, and are shared by the threads
// where there are few.
template <typename F>
void for_pieces(const PerturbParams& p, bool norms, const F& f) {
  int64_t samples = 0, units = 0, elements = 0;
  for (int64_t i = 0; i < p.count; ++i) samples += p.tensors[i].batch;
  int64_t* before = new int64_t[samples + 1];  // elements of the samples before
  int64_t* at = before;
  for (int64_t i = 0; i < p.count; ++i) {
    const PerturbTensor& t = p.tensors[i];
    for (int64_t b = 0; b < t.batch; ++b) {
      *at++ = elements;
      const int64_t n = t.size(b);
      elements += n;
      units += t.token_size ? n / t.token_size : n > 0;
    }
  }
  *at = elements;
  // What begins within the elements [begin, end) of all, where a sample is cut at whole grains.
  auto run = [&](int64_t begin, int64_t end, int shared_by) {
    int64_t s = 0, above = samples;  // s becomes the last sample that begins at `begin` or before
    while (above - s > 1) {
      const int64_t middle = (s + above) / 2;
      (before[middle] <= begin ? s : above) = middle;
    }
    int64_t i = 0, b = s;
    for (; s < samples && before[s] < end; ++s, ++b) {
      for (; b >= p.tensors[i].batch; ++i) b -= p.tensors[i].batch;
      const int64_t n = before[s + 1] - before[s];
      if (n == 0) continue;
      const int64_t grain = !norms ? kLine : p.tensors[i].token_size ? p.tensors[i].token_size : n;
      auto cut = [&](int64_t e) {
        return e <= before[s] ? 0 : min64(n, (e - before[s] + grain - 1) / grain * grain);
      };
      const int64_t from = cut(begin), to = cut(end);
      if (from < to) f(i, b, from, to - from, shared_by);
    }
  };
  // Waking a thread costs more than a few thousand elements.
  const int threads = int(min64(p.threads, 1 + elements / (kBlock / 2)));
  if (threads == 1 || (norms && units < 2 * threads)) {
    run(0, elements, threads);
  } else {
    // A thread begins with the group of its number: a small tensor then lies in its cache in the next call.
    const int64_t groups = threads * ((elements + threads * kBlock - 1) / (threads * kBlock));
    int64_t taken = 0;  // beyond those
#pragma omp parallel num_threads(threads)
    {
      const int64_t team = omp_get_num_threads();
      for (int64_t g = omp_get_thread_num(); g < groups; g += team) {
        run(elements * g / groups, elements * (g + 1) / groups, 1);
#pragma omp atomic capture
        g = taken++;
      }
    }
  }
  delete[] before;
}

template <typename T>
void perturb_all(const PerturbParams& p) {
  bool whole_samples = p.l2;
  for (int64_t i = 0; i < p.count; ++i) whole_samples |= p.tensors[i].momentum != nullptr;
  for_pieces(p, whole_samples, [&](int64_t i, int64_t b, int64_t offset, int64_t n, int threads) {
    const PerturbTensor& t = p.tensors[i];
    const bool tokens = whole_samples && t.token_size;
    const int64_t unit = tokens ? t.token_size : n;
    for (int64_t at = 0; at < n; at += unit) step_any(unit_of<T>(p, t, b, offset + at, unit), p.l2, threads);
  });
}

// Random start

enum Kind : uint32_t { kUniform = 0, kNormal = 1, kRadius = 2 };

// Natural logarithm on (0, 1], relative error below 2e-7 (Cephes' polynomial).
MMFAST_INLINE vf log_unit(vf x) {
  const vi bits = (vi)x;
  vi exponent = ((bits >> 23) & 255) - 126;
  vf m = (vf)((bits & 0x007fffff) | 0x3f000000);  // [0.5, 1)
  const vi small = (vi)(m < splat(0.70710678f));
  exponent += small;  // minus one where small
  m = select(small, m + m, m) - splat(1.0f);
  const vf z = m * m;
  vf p = splat(7.0376836e-2f);
  p = p * m - splat(1.1514610e-1f);
  p = p * m + splat(1.1676998e-1f);
  p = p * m - splat(1.2420140e-1f);
  p = p * m + splat(1.4249322e-1f);
  p = p * m - splat(1.6668057e-1f);
  p = p * m + splat(2.0000714e-1f);
  p = p * m - splat(2.4999993e-1f);
  p = p * m + splat(3.3333331e-1f);
  const vf e = __builtin_convertvector(exponent, vf);
  return m + (p * m * z - splat(0.5f) * z - e * splat(2.12194440e-4f)) + e * splat(0.693359375f);
}

MMFAST_INLINE vf square_root(vf x) {
  float lane[kLanes];
  std::memcpy(lane, &x, sizeof x);
  for (int i = 0; i < kLanes; ++i) lane[i] = __builtin_sqrtf(lane[i]);
  std::memcpy(&x, lane, sizeof x);
  return x;
}

// sine and cosine of 2 pi u, u in [0, 1): reduced to an eighth of a turn around the nearest quarter.
MMFAST_INLINE void sine_cosine(vf u, vf& sine, vf& cosine) {
  const vi quarter = __builtin_convertvector(u * splat(4.0f) + splat(0.5f), vi);
  const vf x = (u - __builtin_convertvector(quarter, vf) * splat(0.25f)) * splat(6.2831853f);
  const vf z = x * x;
  const vf s = ((splat(-1.9515296e-4f) * z + splat(8.3321609e-3f)) * z - splat(1.6666655e-1f)) * z * x + x;
  const vf c = ((splat(2.4433157e-5f) * z - splat(1.3887316e-3f)) * z + splat(4.1666646e-2f)) * z * z -
               splat(0.5f) * z + splat(1.0f);
  const vi odd = (quarter & 1) != 0, negative_s = (quarter & 2) != 0, negative_c = ((quarter + 1) & 2) != 0;
  sine = select(odd, c, s);
  cosine = select(odd, s, c);
  sine = select(negative_s, -sine, sine);
  cosine = select(negative_c, -cosine, cosine);
}

constexpr int kBatch = 4 * kLanes;  // numbers made at a time: one vector of counters

// kBatch numbers from element 4 * block of a sample on.
template <bool kGaussian>
MMFAST_INLINE void numbers(uint64_t seed, int64_t block, uint32_t sample, uint32_t stream, float* out) {
  const vu zero = {}, low = lane_numbers() + uint32_t(block);
  const vu carry = (vu)(low < uint32_t(block));  // all ones: minus one
  const PhiloxLanes r =
      philox_lanes(seed, low, zero + sample, zero + stream, uint32_t(uint64_t(block) >> 32) - carry);
  vf u[4] = {uniform_lanes(r.x), uniform_lanes(r.y), uniform_lanes(r.z), uniform_lanes(r.w)};
  if constexpr (kGaussian) {
    for (int w = 0; w < 4; w += 2) {
      const vf radius = square_root(splat(-2.0f) * log_unit(u[w] + splat(0x1p-24f)));
      vf sine, cosine;
      sine_cosine(u[w + 1], sine, cosine);
      u[w] = radius * cosine;
      u[w + 1] = radius * sine;
    }
  }
  float lanes[4][kLanes];
  std::memcpy(lanes, u, sizeof lanes);
  for (int i = 0; i < kLanes; ++i)
    for (int w = 0; w < 4; ++w) out[4 * i + w] = lanes[w][i];
}

// f(element, value) for the elements [begin, end) of a sample.
template <bool kGaussian, typename F>
MMFAST_INLINE void for_numbers(uint64_t seed, uint32_t sample, uint32_t stream, int64_t begin, int64_t end,
                               const F& f) {
  float value[kBatch];
  for (int64_t at = begin / 4 * 4; at < end; at += kBatch) {
    numbers<kGaussian>(seed, at / 4, sample, stream, value);
    const int64_t from = at < begin ? begin : at, to = min64(end, at + kBatch);
    for (int64_t e = from; e < to; ++e) f(e, value[e - at]);
  }
}

template <typename T>
MMFAST_INLINE void put(const PerturbTensor& t, int64_t at, float value) {
  if (t.origin) {
    const float x = to_float(static_cast<const T*>(t.origin)[at]);
    const float low = t.low - x, high = t.high - x;
    value = value < low ? low : value;
    value = value > high ? high : value;
  }
  store_one(static_cast<T*>(t.delta) + at, value);
}

template <typename T>
void start_all(const PerturbParams& p) {
  for_pieces(p, p.l2, [&](int64_t i, int64_t b, int64_t offset, int64_t n, int threads) {
    const PerturbTensor& t = p.tensors[i];
    const int64_t base = t.begin(b);
    const float eps = t.eps_of(b);
    const uint32_t stream = uint32_t(4 * i), sample = uint32_t(b);
    if (!p.l2) {
      const float limit = limit_of(eps, T{});
      for_numbers<false>(p.seed, sample, stream + kUniform, offset, offset + n, [&](int64_t e, float u) {
        const float v = eps * (2 * u - 1);
        put<T>(t, base + e, v > limit ? limit : v < -limit ? -limit : v);
      });
      return;
    }
    const int64_t unit = t.token_size ? t.token_size : n;
    for (int64_t at = offset; at < offset + n; at += unit) {
      const double square =
          reduce(unit, threads, [&](int64_t begin, int64_t end) {
            Sums s;
            for (int64_t from = begin; from < end; from += kChunk) {
              float total = 0;
              for_numbers<true>(p.seed, sample, stream + kNormal, at + from, at + min64(end, from + kChunk),
                                [&](int64_t, float z) { total += z * z; });
              s.a += total;
            }
            return s;
          }).a;
      const uint64_t token = t.token_size ? uint64_t(at / unit) : 0;
      const Philox4 r = philox(p.seed, uint32_t(token), sample, stream + kRadius, uint32_t(token >> 32));
      const double u = double(uniform_from(r.x)) + 0x1p-24;
      const float factor =
          square > 0 ? float(eps * std::exp(std::log(u) / double(unit)) / std::sqrt(square)) : 0;
      for_blocks<false>(unit, threads, [&](int64_t begin, int64_t end, int64_t) {
        for_numbers<true>(p.seed, sample, stream + kNormal, at + begin, at + end,
                          [&](int64_t e, float z) { put<T>(t, base + e, z * factor); });
      });
    }
  });
}

}  // namespace

void perturb(const PerturbParams& p) {
  p.dtype == DType::bf16 ? perturb_all<bf16>(p) : perturb_all<float>(p);
}

void random_start(const PerturbParams& p) {
  p.dtype == DType::bf16 ? start_all<bf16>(p) : start_all<float>(p);
}

}  // namespace MMFAST_ISA
}  // namespace mmfast
