// The modality mask: one rule per (query modality, key modality), and what it says of a whole tile at once.
// Shared by host and device code; the Python side of the same definitions is mmfast/layout.py.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define MMFAST_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define MMFAST_HOST_DEVICE static inline __attribute__((always_inline))
#endif

namespace mmfast {

enum Rule : uint8_t { kNone = 0, kFull = 1, kCausal = 2, kPast = 3, kSame = 4 };

constexpr int kMaxModalities = 16;

struct Mask {
  // rules[m] holds 3 bits per key modality: (rules[m] >> 3 * n) & 7 is the rule of m's queries onto n's keys.
  int64_t rules[kMaxModalities];
  // Visible only where -window_right <= position_q - position_k <= window_left; -1 is unlimited.
  int32_t window_left;
  int32_t window_right;
};

// What a tile of consecutive rows of one sample holds.
struct TileSummary {
  uint32_t modalities;  // bit m: some row has modality m
  int32_t time_min, time_max;
  int32_t position_min, position_max;
};

enum TileKind : uint8_t { kSkip = 0, kPartial = 1, kFullTile = 2 };

MMFAST_HOST_DEVICE Rule rule_of(const Mask& mask, int modality_q, int modality_k) {
  return static_cast<Rule>((mask.rules[modality_q] >> (3 * modality_k)) & 7);
}

MMFAST_HOST_DEVICE bool rule_holds(Rule rule, int32_t time_q, int32_t time_k) {
  switch (rule) {
    case kFull:
      return true;
    case kCausal:
      return time_k <= time_q;
    case kPast:
      return time_k < time_q;
    case kSame:
      return time_k == time_q;
    default:
      return false;
  }
}

MMFAST_HOST_DEVICE bool window_holds(const Mask& mask, int32_t position_q, int32_t position_k) {
  const int64_t distance = int64_t(position_q) - position_k;
  return (mask.window_left < 0 || distance <= mask.window_left) &&
         (mask.window_right < 0 || -distance <= mask.window_right);
}

MMFAST_HOST_DEVICE bool visible(const Mask& mask, int modality_q, int modality_k, int32_t time_q,
                                int32_t time_k, int32_t position_q, int32_t position_k) {
  return rule_holds(rule_of(mask, modality_q, modality_k), time_q, time_k) &&
         window_holds(mask, position_q, position_k);
}

// One rule over two time ranges.
MMFAST_HOST_DEVICE TileKind classify_rule(Rule rule, const TileSummary& q, const TileSummary& k) {
  bool all, some;
  switch (rule) {
    case kFull:
      all = some = true;
      break;
    case kCausal:
      all = k.time_max <= q.time_min;
      some = k.time_min <= q.time_max;
      break;
    case kPast:
      all = k.time_max < q.time_min;
      some = k.time_min < q.time_max;
      break;
    case kSame:
      all = q.time_min == q.time_max && k.time_min == k.time_max && q.time_min == k.time_min;
      some = k.time_min <= q.time_max && q.time_min <= k.time_max;
      break;
    default:
      all = some = false;
  }
  return all ? kFullTile : some ? kPartial : kSkip;
}

// A tile pair of one sample: skipped when nothing can be visible, full when everything is, otherwise partial.
// Conservative: `partial` may turn out to be all or nothing, the other two are exact.
MMFAST_HOST_DEVICE TileKind classify(const Mask& mask, const TileSummary& q, const TileSummary& k) {
  const int64_t nearest = int64_t(q.position_min) - k.position_max;   // least position_q - position_k
  const int64_t farthest = int64_t(q.position_max) - k.position_min;  // greatest
  if (mask.window_left >= 0 && nearest > mask.window_left) return kSkip;
  if (mask.window_right >= 0 && -farthest > mask.window_right) return kSkip;
  const bool window_full = (mask.window_left < 0 || farthest <= mask.window_left) &&
                           (mask.window_right < 0 || -nearest <= mask.window_right);
  bool all = true, some = false;
  for (int m = 0; m < kMaxModalities; ++m) {
    if (!((q.modalities >> m) & 1)) continue;
    for (int n = 0; n < kMaxModalities; ++n) {
      if (!((k.modalities >> n) & 1)) continue;
      const TileKind kind = classify_rule(rule_of(mask, m, n), q, k);
      all &= kind == kFullTile;
      some |= kind != kSkip;
    }
  }
  if (!some) return kSkip;
  return all && window_full ? kFullTile : kPartial;
}

}  // namespace mmfast
