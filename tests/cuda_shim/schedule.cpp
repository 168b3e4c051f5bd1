// What csrc/include/mmfast/attention_schedule.h says, for tests to compare with brute force.
#include "mmfast/attention_schedule.h"

#include "bindings/attention.h"

namespace mmfast {
namespace {

using Fields = std::vector<TensorView>;

// (sample, first row of the segment, first virtual row in it, extent, valid) of each tile that owns rows.
std::vector<std::array<int64_t, 5>> tiles(const Fields& fields, int64_t total, int group) {
  const LayoutView layout = attention::layout_of("tiles", "q", total, fields);
  std::vector<std::array<int64_t, 5>> found;
  for (int64_t i = 0; i < most_tiles(total, layout.batch, group); ++i) {
    const SampleTile t = find_tile(layout, group, i);
    if (t.extent > 0) found.push_back({t.sample, t.begin, t.first, t.extent, t.valid});
  }
  return found;
}

// (row, rows, column, columns, kind) of each pair of tiles of one sample.
std::vector<std::array<int64_t, 5>> kinds(const Fields& fields_q, int64_t total_q, const Fields& fields_k,
                                          int64_t total_k, const std::vector<int64_t>& rules, int left,
                                          int right) {
  const LayoutView q = attention::layout_of("kinds", "q", total_q, fields_q);
  const LayoutView k = attention::layout_of("kinds", "k", total_k, fields_k);
  Mask mask{};
  for (size_t i = 0; i < rules.size() && i < kMaxModalities; ++i) mask.rules[i] = rules[i];
  mask.window_left = left;
  mask.window_right = right;
  std::vector<std::array<int64_t, 5>> found;
  for (int64_t b = 0; b < q.batch; ++b) {
    const SampleRows rows = sample_rows(q, b, 1), columns = sample_rows(k, b, 1);
    for (int i = 0; i < rows.tiles(); ++i) {
      for (int j = 0; j < columns.tiles(); ++j) {
        const SampleTile a = rows.tile(i), c = columns.tile(j);
        const TileKind kind = classify(mask, summarize(q, a, 1, 0, 1), summarize(k, c, 1, 0, 1));
        found.push_back({a.begin + a.first, a.valid, c.begin + c.first, c.valid, kind});
      }
    }
  }
  return found;
}

}  // namespace

PYBIND11_MODULE(_schedule, m) {
  m.def("tiles", &tiles);
  m.def("kinds", &kinds);
  m.def("share", [](int count, int part, int parts) {
    const TileRange share = share_of(count, part, parts);
    return std::array<int, 2>{share.begin, share.end};
  });
}

}  // namespace mmfast
