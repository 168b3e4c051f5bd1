// How attention divides its work. Depends on shapes only, never on the number of threads, so that every sum
// has one order. Host code, compiled once: for the binding, not for kernel files.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "mmfast/attention.h"

namespace mmfast {

constexpr int64_t kEnoughItems = 16;  // from here on no smaller ones are made
constexpr int64_t kMaxParts = 8;      // bounds the private dQ of split samples

struct AttentionPlan {
  std::vector<AttentionItem> items;
  std::vector<int32_t> parts;
  int32_t max_parts = 1;
};

// Longest first, so that no thread begins a long item last.
inline void sort_items(AttentionPlan& plan, const LayoutView& other) {
  auto cost = [&](const AttentionItem& item) { return (item.end - item.begin) * other.length(item.sample); };
  std::stable_sort(plan.items.begin(), plan.items.end(),
                   [&](const AttentionItem& a, const AttentionItem& b) { return cost(a) > cost(b); });
}

inline AttentionPlan plan_forward(const AttentionParams& p) {
  const int64_t group = p.heads / p.heads_k;
  // Rows of an item, a multiple of the kernels' blocks. Each item packs its keys again, which many rows must
  // pay for.
  int64_t most = 768;
  auto items = [&] {
    int64_t count = 0;
    for (int64_t b = 0; b < p.layout_q.batch; ++b) count += (p.layout_q.length(b) * group + most - 1) / most;
    return count * p.heads_k;
  };
  while (most > 192 && items() < kEnoughItems) most /= 2;
  AttentionPlan plan;
  for (int64_t b = 0; b < p.layout_q.batch; ++b) {
    const int64_t rows = p.layout_q.length(b) * group;
    for (int64_t begin = 0; begin < rows; begin += most)
      plan.items.push_back({int32_t(b), 0, begin, std::min(begin + most, rows)});
  }
  sort_items(plan, p.layout_k);
  return plan;
}

inline AttentionPlan plan_backward(const AttentionParams& p) {
  AttentionPlan plan;
  plan.parts.assign(size_t(p.layout_k.batch), 1);
  const int64_t together = std::max<int64_t>(p.layout_k.batch * p.heads_k, 1);
  for (int64_t b = 0; b < p.layout_k.batch; ++b) {
    const int64_t keys = p.layout_k.length(b);
    if (!keys || !p.layout_q.length(b)) continue;
    // Every part adds a pass over dq: few items are worth short parts, more of them only long ones.
    auto parts = [&](int64_t items, int64_t shortest) {
      return std::min({kMaxParts, (items + together - 1) / together, (keys + shortest - 1) / shortest});
    };
    const int64_t wanted = std::max(parts(kEnoughItems / 2, 256), parts(kEnoughItems, 1024));
    const int64_t step = ((keys + wanted - 1) / wanted + 63) / 64 * 64;
    int32_t part = 0;
    for (int64_t begin = 0; begin < keys; begin += step)
      plan.items.push_back({int32_t(b), part++, begin, std::min(begin + step, keys)});
    plan.parts[size_t(b)] = part;
    plan.max_parts = std::max(plan.max_parts, part);
  }
  sort_items(plan, p.layout_q);
  return plan;
}

}  // namespace mmfast
