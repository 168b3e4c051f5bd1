// How the CUDA attention kernels divide packed rows into tiles, from shapes that the host knows: nobody waits
// for the lengths on the device. Host and device share it.
//
// Rows are virtual: (row of the sample, head in the group), so that the heads of a group fill a tile of
// queries together; keys have a group of one. A tile is kTileRows virtual rows of one segment: the rows
// before the first sample, each sample, the rows after the last one. Segment s begins at row b(s) and owns
// the tiles from b(s) * group / kTileRows + s on: no prefix sum, every row in exactly one tile.
#pragma once
#include "mmfast/layout.h"
#include "mmfast/mask.h"

#if defined(__CUDACC__)
#define MMFAST_MEMBER __host__ __device__ __forceinline__
#else
#define MMFAST_MEMBER
#endif

namespace mmfast {

constexpr int kTileRows = 64;
constexpr int64_t kMostVirtualRows = INT32_MAX - kTileRows;  // of a tensor, so that 32 bits count them

// Most tiles that there can be.
MMFAST_HOST_DEVICE int64_t most_tiles(int64_t rows, int64_t batch, int group) {
  return rows * group / kTileRows + batch + 2;
}

// First row of a segment; never outside the tensor, whatever cu_seqlens holds.
MMFAST_HOST_DEVICE int64_t segment_begin(const LayoutView& layout, int64_t segment) {
  if (segment <= 0) return 0;
  if (segment > layout.batch + 1) return layout.total;
  const int64_t row = layout.cu_seqlens[segment - 1];
  return row < 0 ? 0 : row > layout.total ? layout.total : row;
}

// Rows of a sample that exist.
MMFAST_HOST_DEVICE int64_t rows_used(const LayoutView& layout, int64_t sample) {
  const int64_t owned = segment_begin(layout, sample + 2) - segment_begin(layout, sample + 1);
  const int64_t used = layout.seqused ? int64_t(layout.seqused[sample]) : owned;
  const int64_t least = used < owned ? used : owned;
  return least < 0 ? 0 : least;
}

MMFAST_HOST_DEVICE int64_t first_tile(const LayoutView& layout, int64_t sample, int group) {
  return segment_begin(layout, sample + 1) * group / kTileRows + sample + 1;
}

struct SampleTile {
  int64_t sample;  // outside of samples nothing is valid
  int64_t begin;   // the segment's first row in the tensor
  int first;       // virtual row in the segment of the tile's first row
  int extent;      // virtual rows that the tile owns; none: the tile is not needed
  int valid;       // of them, those that exist
};

MMFAST_HOST_DEVICE SampleTile find_tile(const LayoutView& layout, int group, int64_t tile) {
  int64_t low = 0, high = layout.batch + 1;  // the last segment that begins no later than the tile
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (segment_begin(layout, middle) * group / kTileRows + middle <= tile)
      low = middle;
    else
      high = middle - 1;
  }
  SampleTile t;
  t.sample = low - 1;
  t.begin = segment_begin(layout, low);
  t.first = int(tile - (t.begin * group / kTileRows + low)) * kTileRows;
  auto inside = [&](int64_t rows) {
    const int64_t n = rows * group - t.first;
    return n < 0 ? 0 : n > kTileRows ? kTileRows : int(n);
  };
  t.extent = inside(segment_begin(layout, low + 1) - t.begin);
  t.valid = low >= 1 && low <= layout.batch ? inside(rows_used(layout, t.sample)) : 0;
  return t;
}

// The virtual rows of one sample that exist.
struct SampleRows {
  int64_t sample, begin;
  int count;

  MMFAST_MEMBER int tiles() const { return (count + kTileRows - 1) / kTileRows; }
  MMFAST_MEMBER SampleTile tile(int i) const {
    const int first = i * kTileRows, left = count - first;
    const int valid = left < kTileRows ? left : kTileRows;
    return {sample, begin, first, valid, valid};
  }
};

MMFAST_HOST_DEVICE SampleRows sample_rows(const LayoutView& layout, int64_t sample, int group) {
  return {sample, segment_begin(layout, sample + 1), int(rows_used(layout, sample) * group)};
}

// The share of `part` in some tiles.
struct TileRange {
  int begin, end;
};
MMFAST_HOST_DEVICE TileRange share_of(int tiles, int part, int parts) {
  const int share = (tiles + parts - 1) / parts;
  const int begin = part * share < tiles ? part * share : tiles;
  return {begin, begin + share < tiles ? begin + share : tiles};
}

MMFAST_HOST_DEVICE int32_t position_of(const LayoutView& layout, int64_t sample, int64_t row) {
  return int32_t((layout.start ? layout.start[sample] : 0) + row);
}
MMFAST_HOST_DEVICE int32_t time_of(const LayoutView& layout, int64_t sample, int64_t begin, int64_t row) {
  return layout.time ? layout.time[begin + row] : position_of(layout, sample, row);
}
MMFAST_HOST_DEVICE int modality_of(const LayoutView& layout, int64_t begin, int64_t row) {
  return layout.modality ? layout.modality[begin + row] & (kMaxModalities - 1) : 0;
}

MMFAST_HOST_DEVICE TileSummary merge(const TileSummary& a, const TileSummary& b) {
  if (!a.modalities) return b;
  if (!b.modalities) return a;
  auto less = [](int32_t x, int32_t y) { return x < y ? x : y; };
  auto more = [](int32_t x, int32_t y) { return x < y ? y : x; };
  return {a.modalities | b.modalities, less(a.time_min, b.time_min), more(a.time_max, b.time_max),
          less(a.position_min, b.position_min), more(a.position_max, b.position_max)};
}

// Of a tile's rows, every `step`-th from `offset` on; no modality where there is none.
MMFAST_HOST_DEVICE TileSummary summarize(const LayoutView& layout, const SampleTile& tile, int group,
                                         int offset, int step) {
  TileSummary s{};
  if (!tile.valid) return s;
  const int last = (tile.first + tile.valid - 1) / group;
  for (int row = tile.first / group + offset; row <= last; row += step) {
    const int32_t time = time_of(layout, tile.sample, tile.begin, row);
    const int32_t position = position_of(layout, tile.sample, row);
    s = merge(s, {1u << modality_of(layout, tile.begin, row), time, time, position, position});
  }
  return s;
}

// Whether every row sees every row of its sample, so that tiles need no summaries.
inline bool sees_all(const Mask& mask, bool modalities) {
  int64_t full = 0;
  for (int n = 0; n < kMaxModalities; ++n) full |= int64_t(kFull) << (3 * n);
  bool all = mask.window_left < 0 && mask.window_right < 0;
  for (int m = 0; m < kMaxModalities; ++m) all &= mask.rules[m] == full;
  return all ||
         (!modalities && mask.window_left < 0 && mask.window_right < 0 && rule_of(mask, 0, 0) == kFull);
}

}  // namespace mmfast
