// What forward and backward share about a block of queries and a chunk of keys: which cells exist, and the
// maths of one score.
#pragma once
#include <cmath>
#include <cstdlib>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

#include "cpu/attention_gemm.h"
#include "cpu/philox.h"
#include "mmfast/attention.h"

namespace mmfast {
namespace MMFAST_ISA {
namespace {

constexpr int kFewRows = 128;  // queries up to which keys are read in place, and scores are [keys][queries]
constexpr int kFewKeys = 128;  // keys whose scores stay in the first-level cache then

// Into as many chunks of at most `most` as n needs, all of about the same size, a multiple of `multiple`.
inline int64_t even_chunk(int64_t n, int64_t most, int64_t multiple) {
  const int64_t chunks = (n + most - 1) / most;
  return chunks ? round_up((n + chunks - 1) / chunks, multiple) : 0;
}
// Room for the cache lines of that many rows.
template <class Units>
constexpr int64_t room_of(int64_t rows, int64_t dim) {
  return rows * ((dim * 4 / Units::kPack + 63) / 64 + 1);
}

constexpr float kLog2e = 1.44269504f;
constexpr float kInfinity = __builtin_inff();

// Memory of one thread, kept between calls: fresh pages would cost more than the work on short batches.
struct Workspace {
  char* data = nullptr;
  size_t size = 0;
  ~Workspace() { std::free(data); }
  char* reserve(size_t bytes) {
    if (bytes > size) {
      std::free(data);
      data = static_cast<char*>(std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096));
      size = data ? bytes : 0;
    }
    return data;
  }
};

// Hands out parts of a workspace; without one it only counts.
struct Arena {
  char* base = nullptr;
  size_t used = 0;
  template <class T>
  T* take(int64_t n) {
    T* p = base ? reinterpret_cast<T*>(base + used) : nullptr;
    const size_t bytes = size_t(n) * sizeof(T);
    // An odd number of cache lines between buffers keeps them out of each other's cache sets.
    const size_t taken = (bytes + 63) / 64 * 64 + 64;
#if defined(__SANITIZE_ADDRESS__)
    if (base) {
      __asan_unpoison_memory_region(p, bytes);
      __asan_poison_memory_region(base + used + bytes, taken - bytes);
    }
#endif
    used += taken;
    return p;
  }
};

// One side of one sample.
struct Side {
  const uint8_t* modality;  // or null
  const int32_t* time;      // or null
  int32_t start;            // position of row 0

  int modality_of(int64_t row) const { return modality ? modality[row] : 0; }
  int32_t time_of(int64_t row) const { return time ? time[row] : int32_t(start + row); }
};

inline Side side_of(const LayoutView& layout, int64_t sample) {
  const int64_t begin = layout.begin(sample);
  return {layout.modality ? layout.modality + begin : nullptr, layout.time ? layout.time + begin : nullptr,
          layout.first_position(sample)};
}

// Made again for every head: together with the classification 0.6% of the time of a forward pass at most.
inline TileSummary summarize(const Side& side, int64_t begin, int64_t end) {
  TileSummary s;
  s.position_min = int32_t(side.start + begin);
  s.position_max = int32_t(side.start + end - 1);
  s.modalities = 1;
  if (side.modality) {
    s.modalities = 0;
    for (int64_t i = begin; i < end; ++i) s.modalities |= 1u << side.modality[i];
  }
  s.time_min = s.position_min;
  s.time_max = s.position_max;
  if (side.time) {
    s.time_min = s.time_max = side.time[begin];
    for (int64_t i = begin + 1; i < end; ++i) {
      const int32_t t = side.time[i];
      s.time_min = t < s.time_min ? t : s.time_min;
      s.time_max = t > s.time_max ? t : s.time_max;
    }
  }
  return s;
}

// Every rule is an interval of query times: key j is visible to a query of the modality when
// low[j] <= time_q <= high[j].
struct KeyBounds {
  int32_t low[kPanel], high[kPanel];
};

inline void set_bounds(KeyBounds& bounds, const Mask& mask, int modality_q, const Side& keys, int64_t begin,
                       int n) {
  for (int j = 0; j < kPanel; ++j) {
    int32_t low = INT32_MAX, high = INT32_MIN;
    if (j < n) {
      const int32_t t = keys.time_of(begin + j);
      switch (rule_of(mask, modality_q, keys.modality_of(begin + j))) {
        case kFull:
          low = INT32_MIN, high = INT32_MAX;
          break;
        case kCausal:
          low = t, high = INT32_MAX;
          break;
        case kPast:
          if (t < INT32_MAX) low = t + 1, high = INT32_MAX;
          break;
        case kSame:
          low = high = t;
          break;
        default:
          break;
      }
    }
    bounds.low[j] = low;
    bounds.high[j] = high;
  }
}

// Bit j: key j of the panel is within the query's time.
inline uint64_t visible_bits(const KeyBounds& bounds, int32_t time_q) {
  uint64_t bits = 0;
#if defined(__AVX512F__)
  const __m512i t = _mm512_set1_epi32(time_q);
  for (int j = 0; j < kPanel; j += 16) {
    const __mmask16 low = _mm512_cmple_epi32_mask(_mm512_loadu_si512(bounds.low + j), t);
    const __mmask16 both = _mm512_mask_cmple_epi32_mask(low, t, _mm512_loadu_si512(bounds.high + j));
    bits |= uint64_t(both) << j;
  }
#elif defined(__AVX2__)
  const __m256i t = _mm256_set1_epi32(time_q);
  for (int j = 0; j < kPanel; j += 8) {
    const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bounds.low + j));
    const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bounds.high + j));
    const __m256i outside = _mm256_or_si256(_mm256_cmpgt_epi32(low, t), _mm256_cmpgt_epi32(t, high));
    bits |= uint64_t(0xff & ~_mm256_movemask_ps(_mm256_castsi256_ps(outside))) << j;
  }
#else
  for (int j = 0; j < kPanel; ++j) bits |= uint64_t(bounds.low[j] <= time_q && time_q <= bounds.high[j]) << j;
#endif
  return bits;
}

// Bit j: lane j is true.
MMFAST_INLINE uint64_t lane_bits(vi condition) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)condition);
#elif defined(__AVX2__)
  return uint64_t(_mm256_movemask_ps((__m256)condition));
#else
  uint64_t bits = 0;
  for (int j = 0; j < kLanes; ++j) bits |= uint64_t(condition[j] & 1) << j;
  return bits;
#endif
}

// The lanes whose bits from `column` on are set.
MMFAST_INLINE vi lanes_of(uint64_t bits, int column) {
  vi lane;
  for (int j = 0; j < kLanes; ++j) lane[j] = 1 << j;
  return ((int32_t(bits >> column) + vi{}) & lane) != 0;
}

inline uint64_t first_bits(int64_t n) {
  return n >= 64 ? ~uint64_t(0) : n <= 0 ? 0 : (uint64_t(1) << n) - 1;
}

// Columns of a panel that the window leaves to the query at position_q; the panel's key 0 is at position_k.
inline uint64_t window_bits(const Mask& mask, int64_t position_q, int64_t position_k) {
  uint64_t bits = ~uint64_t(0);
  if (mask.window_left >= 0) bits &= ~first_bits(position_q - mask.window_left - position_k);
  if (mask.window_right >= 0) bits &= first_bits(position_q + mask.window_right + 1 - position_k);
  return bits;
}

// Which part of a panel a tile of rows computes: groups begin to end of 16 columns; `full` when every cell of
// them is visible to every row.
struct Span {
  uint8_t begin, end;
  bool full;
};

inline Span span_of(uint64_t any, uint64_t all) {
  if (!any) return {0, 0, false};
  const int begin = __builtin_ctzll(any) / kGroup;
  const int end = (63 - __builtin_clzll(any)) / kGroup + 1;
  const uint64_t groups = first_bits(end * kGroup) & ~first_bits(begin * kGroup);
  return {uint8_t(begin), uint8_t(end), (all & groups) == groups};
}

// Every rule FULL and no window: only the ends of samples are mixed.
inline bool trivial(const Mask& mask) {
  if (mask.window_left >= 0 || mask.window_right >= 0) return false;
  for (int m = 0; m < kMaxModalities; ++m)
    for (int n = 0; n < kMaxModalities; ++n)
      if (rule_of(mask, m, n) != kFull) return false;
  return true;
}

// The mask of a block of up to kBlockRows virtual rows and a chunk of panels.
template <int kBlockRows, int kChunkPanels>
struct BlockMask {
  static constexpr int kTiles = kBlockRows / kRows;
  uint64_t bits[kChunkPanels][kBlockRows];
  Span spans[kTiles][kChunkPanels];
  TileKind kinds[kChunkPanels];  // of the whole block
  bool masked[kChunkPanels];     // bits are set

  // Returns whether anything is visible. `cache` holds bounds of [panel][modality], `cached` which are there.
  bool set(const Mask& mask, bool is_trivial, const Side& queries, int64_t row_begin, int rows, int group,
           const Side& keys, int64_t key_begin, int64_t keys_end, int panels,
           const TileSummary* key_summaries, KeyBounds* cache, uint32_t* cached) {
    const int64_t first = row_begin / group, last = (row_begin + rows - 1) / group;
    TileSummary block{};
    if (!is_trivial) block = summarize(queries, first, last + 1);
    bool some = false;
    for (int p = 0; p < panels; ++p) {
      const int64_t k0 = key_begin + p * kPanel;
      const int n = keys_end - k0 < kPanel ? int(keys_end - k0) : kPanel;
      kinds[p] = is_trivial ? kFullTile : classify(mask, block, key_summaries[p]);
      masked[p] = false;
      if (kinds[p] == kSkip) {
        for (int t = 0; t * kRows < rows; ++t) spans[t][p] = {0, 0, false};
        continue;
      }
      some = true;
      const uint64_t inside = first_bits(n);
      if (kinds[p] == kFullTile) {
        if (n < kPanel) {
          masked[p] = true;
          for (int r = 0; r < rows; ++r) bits[p][r] = inside;
        }
        const Span span = span_of(inside, inside);
        for (int t = 0; t * kRows < rows; ++t) spans[t][p] = span;
        continue;
      }
      masked[p] = true;
      int64_t row = -1;
      uint64_t seen = 0;
      for (int r = 0; r < rows; ++r) {
        const int64_t i = (row_begin + r) / group;
        if (i != row) {
          row = i;
          const int m = queries.modality_of(i);
          KeyBounds& bounds = cache[p * kMaxModalities + m];
          if (!((cached[p] >> m) & 1)) {
            set_bounds(bounds, mask, m, keys, k0, n);
            cached[p] |= 1u << m;
          }
          seen = visible_bits(bounds, queries.time_of(i)) & inside &
                 window_bits(mask, int64_t(queries.start) + i, int64_t(keys.start) + k0);
        }
        bits[p][r] = seen;
      }
      for (int t = 0; t * kRows < rows; ++t) {
        uint64_t any = 0, all = ~uint64_t(0);
        for (int r = t * kRows; r < rows && r < (t + 1) * kRows; ++r) any |= bits[p][r], all &= bits[p][r];
        spans[t][p] = span_of(any, all);
      }
    }
    return some;
  }
};

// tanh, relative error of a few units in the last place also near 0.
MMFAST_INLINE vf tanh_score(vf x) {
  const vf magnitude = vmin(vabs(x), broadcast(9.1f));
  const vf e = exp2_approx(magnitude * broadcast(2 * kLog2e));
  const vf large = broadcast(1.0f) - broadcast(2.0f) / (e + broadcast(1.0f));
  // Continued fraction x / (1 + x^2 / (3 + x^2 / (5 + ...))), which needs seven terms below 1.
  const vf s = magnitude * magnitude;
  vf d = broadcast(13.0f);
  d = broadcast(11.0f) + s / d;
  d = broadcast(9.0f) + s / d;
  d = broadcast(7.0f) + s / d;
  d = broadcast(5.0f) + s / d;
  d = broadcast(3.0f) + s / d;
  d = broadcast(1.0f) + s / d;
  const vf small = magnitude / d;
  const vf result = select(magnitude < broadcast(1.0f), small, large);
  const vf sign = (vf)((vu)x & 0x80000000u);
  return select(x != x, x, (vf)((vu)result | (vu)sign));
}

// The dropout decisions for a panel of keys from `key` on, a multiple of 64: bits of those that stay. Key j
// takes word j % 64 / 16 of the counter (head, sample, row, j / 64 * 16 + j % 16).
inline uint64_t kept(uint64_t seed, uint32_t head, uint32_t sample, uint32_t row, uint32_t key, float p) {
  const vu zero = {};
  uint64_t bits = 0;
  for (int j = 0; j < kGroup; j += kLanes) {
    const vu counter = lane_numbers() + (key / 4 + uint32_t(j));
    const PhiloxLanes r = philox_lanes(seed, zero + head, zero + sample, zero + row, counter);
    const vu words[4] = {r.x, r.y, r.z, r.w};
    for (int w = 0; w < 4; ++w) bits |= lane_bits(uniform_lanes(words[w]) >= splat(p)) << (kGroup * w + j);
  }
  return bits;
}

// Zeroes the rows of a [T, heads, dim] output that belong to no sample.
template <class T>
void zero_outside(const LayoutView& layout, const HeadsView& out, int heads, int dim) {
  auto zero = [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      for (int h = 0; h < heads; ++h)
        std::memset(static_cast<T*>(out.data) + t * out.row + h * out.head, 0, dim * sizeof(T));
  };
  int64_t done = 0;
  for (int64_t b = 0; b < layout.batch; ++b) {
    if (layout.begin(b) > done) zero(done, layout.begin(b));
    done = layout.begin(b) + layout.length(b);
  }
  zero(done, layout.total);
}

// Float scores stay unscaled until the exponential, which keeps differences exact; for bfloat16 the product
// already leaves them in units of log2.
struct ScoreScale {
  float product;  // factor of q k^T: for floats 1, -1, or 0 for a scale of 0; with a softcap scale / softcap
  float cap;      // factor of tanh, where there is a softcap
  float log2;     // factor of the exponent, positive, so that -inf stays -inf; 1 for bfloat16
};
template <class Units>
ScoreScale score_scale(const AttentionParams& p) {
  const bool scaled = Units::kPack == 2;
  const float magnitude = (p.softcap > 0 ? p.softcap : std::fabs(p.scale)) * kLog2e;
  if (p.softcap > 0) return {p.scale / p.softcap, scaled ? magnitude : 1.0f, scaled ? 1.0f : magnitude};
  if (scaled) return {p.scale * kLog2e, 1.0f, 1.0f};
  return {p.scale > 0 ? 1.0f : p.scale < 0 ? -1.0f : 0.0f, 1.0f, magnitude > 0 ? magnitude : 1.0f};
}

MMFAST_INLINE float sum_lanes(vf v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#else
  return sum(v);
#endif
}
MMFAST_INLINE float max_lanes(vf v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)v);
#else
  return max_lane(v);
#endif
}

// out [n][64] = factor * a b, a in place as it lies in memory.
template <class Units, class T>
void multiply_in_place(const Rows<T>& a, int64_t dim, const typename Units::Unit* b, int groups, int n,
                       float factor, float* out, Lines& later) {
  const int height = tall_rows(groups);
  for (int j = 0; j < n; j += height)
    multiply_tall<Units>(n - j < height ? n - j : height, groups,
                         reinterpret_cast<const typename Units::Unit*>(a.data + j * a.stride),
                         a.stride / Units::kPack, 1, b, dim / Units::kPack, out + j * kPanel, kPanel,
                         {Store::set, factor, nullptr, later.take(dim / Units::kPack)});
}

template <class T>
MMFAST_INLINE Rows<T> rows_of(const HeadsView& x, int64_t row, int64_t head) {
  return {static_cast<const T*>(x.data) + row * x.row + head * x.head, x.row};
}

}  // namespace
}  // namespace MMFAST_ISA
}  // namespace mmfast
