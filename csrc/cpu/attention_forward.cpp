// Attention, forward. out = softmax(rule(softcap(scale * q k^T))) v over packed samples, with online softmax
// over chunks of keys (Milakov and Gimelshein 2018; Dao, FlashAttention-2, arXiv 2307.08691).
//
// One item is a range of query rows of one sample and one key head: it packs the keys it can see once, into
// panels that stay in the second-level cache, and all query heads of the group run over them. Where the
// queries are few, that would cost as much as the products: then scores are computed transposed, with keys in
// place.
#include "cpu/attention_tiles.h"
#include "cpu/isa.h"

namespace mmfast {
namespace MMFAST_ISA {
namespace {

constexpr int kBlockRows = 48;                  // their scores stay in the second-level cache
constexpr int kChunkPanels = 8;                 // keys between two rescalings: 512
constexpr int kScores = kChunkPanels * kPanel;  // columns of a block's scores
constexpr int64_t kPackedBytes = 512 * 1024;    // packed keys and values of an item at a time
static_assert(kFewKeys * kPanel <= kBlockRows * kScores && kFewRows <= kScores && 2 * kPanel <= kFewKeys);
using ForwardMask = BlockMask<kBlockRows, kChunkPanels>;

template <class Units>
struct Buffers {
  using Unit = typename Units::Unit;
  Unit *keys, *values;  // [panels][dim units][64]; [ceil(dim / 64)][keys / pack][64]
  Unit* queries;        // [kBlockRows][dim units], where q cannot be read in place
  Unit* scratch;
  float* scores;               // [kBlockRows][kScores]; probabilities replace them in place
  float* highest;              // [kBlockRows][kLanes]: of the scores that need no mask
  float *out, *maximum, *sum;  // per virtual row of the item
  float *lse, *factor;         // per row that is whole: log-sum-exp, and 1 / sum
  float* alpha;                // per row of a block, or of a panel of few queries
  uint8_t* started;            // per tile: out holds something
  TileSummary* summaries;
  KeyBounds* bounds;
  uint32_t* bounds_set;
  bool* packed;
  ForwardMask* mask;
  const char **lines_of_keys, **lines_of_values, **lines_of_rows;

  void lay_out(Arena& arena, int64_t dim, int64_t panels, int64_t rows) {
    const int64_t units = dim / Units::kPack, wide = round_up(dim, kPanel), narrow = round_up(dim, kGroup);
    keys = arena.take<Unit>(panels * units * kPanel);
    values = arena.take<Unit>(panels * kPanel / Units::kPack * wide);
    queries = arena.take<Unit>(kBlockRows * dim);
    scratch = arena.take<Unit>((kGroup + 1) * dim);
    scores = arena.take<float>(kBlockRows * kScores);
    highest = arena.take<float>(kBlockRows * kLanes);
    out = arena.take<float>(rows * narrow);
    maximum = arena.take<float>(round_up(rows, kGroup));
    sum = arena.take<float>(round_up(rows, kGroup));
    lse = arena.take<float>(round_up(rows, kGroup));
    factor = arena.take<float>(round_up(rows, kGroup));
    alpha = arena.take<float>(kBlockRows > kPanel ? kBlockRows : kPanel);
    started = arena.take<uint8_t>(rows / kRows + 1);
    summaries = arena.take<TileSummary>(panels);
    bounds = arena.take<KeyBounds>(panels * kMaxModalities);
    bounds_set = arena.take<uint32_t>(panels);
    packed = arena.take<bool>(panels);
    mask = arena.take<ForwardMask>(1);
    lines_of_keys = arena.take<const char*>(room_of<Units>(kFewKeys, dim));
    lines_of_values = arena.take<const char*>(room_of<Units>(kFewKeys, dim));
    lines_of_rows = arena.take<const char*>(room_of<Units>(2 * kBlockRows, dim));
  }
};

// Softcap of one row's scores, which come in units of the cap. Returns the maximum of each lane over the
// panels that need no mask.
vf cap_row(float* s, const Span* spans, int panels, float factor) {
  vf highest = broadcast(-kInfinity);
  for (int p = 0; p < panels; ++p)
    for (int j = p * kPanel + spans[p].begin * kGroup; j < p * kPanel + spans[p].end * kGroup; j += kLanes) {
      const vf x = tanh_score(load(s + j)) * broadcast(factor);
      store(s + j, x);
      if (spans[p].full) highest = vmax(highest, x);
    }
  return highest;
}

// Masks the scores of one row's mixed panels and returns the maximum of each lane; `highest` is that of the
// others.
MMFAST_INLINE vf mask_row(float* s, const Span* spans, const ForwardMask& mask, int first, int panels,
                          int row, vf highest) {
  for (int p = first; p < panels; ++p) {
    if (spans[p].full) continue;
    float* panel = s + p * kPanel;
    const uint64_t bits = mask.bits[p][row];
    for (int j = spans[p].begin * kGroup; j < spans[p].end * kGroup; j += kLanes) {
      const vf x = select(lanes_of(bits, j), load(panel + j), broadcast(-kInfinity));
      store(panel + j, x);
      highest = vmax(highest, x);
    }
  }
  return highest;
}

struct Dropout {
  uint64_t seed;
  uint32_t head, sample, row, key;
  float p;
};

MMFAST_INLINE void store_weights(float* row, int j, vf x) {
  store(row + j, x);
}
MMFAST_INLINE void store_weights(uint32_t* row, int j, vf x) {
  store(reinterpret_cast<bf16*>(row) + j, x);
}

// 2^(factor * (score - maximum)), 1 where both are equal. The factor is 1 for bfloat16, and there a
// multiply-add leaves the additions to others.
template <class Units>
MMFAST_INLINE vf weight_of(vf score, vf factor, vf maximum) {
  return exp2_approx<Units::kPack == 2>(Units::kPack == 2 ? score * factor - maximum
                                                          : (score - maximum) * factor);
}

// Replaces one row's scores by weights, as units of the next product, and returns the sum of each lane.
template <class Units, bool drop>
MMFAST_INLINE vf weigh_row(float* s, const Span* spans, int first, int panels, float scale, float maximum,
                           const Dropout& dropout) {
  auto* weights = reinterpret_cast<typename Units::Unit*>(s);
  const vf factor = broadcast(scale), highest = broadcast(maximum);
  vf total = {};
  for (int p = first; p < panels; ++p) {
    const int end = p * kPanel + spans[p].end * kGroup;
    [[maybe_unused]] uint64_t stays = 0;
    if constexpr (drop) {
      if (spans[p].end)
        stays = kept(dropout.seed, dropout.head, dropout.sample, dropout.row,
                     dropout.key + uint32_t(p * kPanel), dropout.p);
    }
    for (int j = p * kPanel + spans[p].begin * kGroup; j < end; j += kLanes) {
      vf x = weight_of<Units>(load(s + j), factor, highest);
      total = total + x;
      if constexpr (drop) {
        x = select(lanes_of(stays, j - p * kPanel), x * broadcast(1.0f / (1.0f - dropout.p)), vf{});
      }
      store_weights(weights, j, x);
    }
  }
  return total;
}

template <class Units, class T>
struct Forward {
  using Unit = typename Units::Unit;
  const AttentionParams& p;
  const AttentionItem& item;
  const int head_k;
  const Buffers<Units>& w;
  const bool is_trivial;
  const int64_t capacity;  // keys packed at a time
  const ScoreScale scale = score_scale<Units>(p);
  const int group = p.heads / p.heads_k;
  const int64_t units = p.dim / Units::kPack;
  const int64_t narrow = round_up(p.dim, kGroup);
  const int64_t q0 = p.layout_q.begin(item.sample), k0 = p.layout_k.begin(item.sample);
  const int64_t keys = p.layout_k.length(item.sample);
  const Side side_q = side_of(p.layout_q, item.sample), side_k = side_of(p.layout_k, item.sample);
  int64_t base = 0;      // the row whose sums are the first of w.out
  Lines later{nullptr};  // keys and values that are packed next

  const T* row_of(const HeadsView& x, int64_t r) const {
    const int64_t row = item.begin + r;
    return rows_of<T>(x, q0 + row / group, head_k * group + row % group).data;
  }

  // next: what this thread probably runs next.
  void run(const Forward& next) {
    if (is_trivial && item.end - item.begin <= kFewRows && keys_in_place()) return few_queries(next);
    const int64_t rows = item.end - item.begin;
    std::memset(w.started, 0, rows / kRows + 1);
    for (int64_t r = 0; r < rows; ++r) w.maximum[r] = -kInfinity, w.sum[r] = 0;
    for (int64_t key = 0; key < keys; key += capacity) {
      const int64_t end = key + capacity < keys ? key + capacity : keys;
      summarize_keys(key, end);
      for (int64_t r = 0; r < rows; r += kBlockRows) {
        const int n = rows - r < kBlockRows ? int(rows - r) : kBlockRows;
        if (keys <= capacity) base = r;  // no other block is begun before this one is finished
        block(r, n, key, end, next);
        if (end == keys) finish(r, n);
      }
    }
    if (keys == 0) finish(0, int(rows));
  }

  void summarize_keys(int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; j += kPanel) {
      const int64_t panel = (j - begin) / kPanel;
      w.packed[panel] = false;
      w.bounds_set[panel] = 0;
      if (!is_trivial) w.summaries[panel] = summarize(side_k, j, j + kPanel < end ? j + kPanel : end);
    }
  }

  // Packs a panel of the keys begin to end, before it is first seen. Products then fetch the next one.
  void pack(int64_t panel, int64_t begin, int64_t end, const Forward& next) {
    if (w.packed[panel]) return;
    w.packed[panel] = true;
    const int64_t j = begin + panel * kPanel, after = j + kPanel;
    const int n = end < after ? int(end - j) : kPanel;
    const Rows<T> k = rows_of<T>(p.k, k0 + j, head_k), v = rows_of<T>(p.v, k0 + j, head_k);
    pack_panel<Units>(k, n, p.dim, w.keys + panel * units * kPanel, w.scratch);
    pack_rows_of<Units, T>([&](int64_t i) { return v.data + i * v.stride; }, n, p.dim,
                           capacity / Units::kPack, w.values + panel * kPanel / Units::kPack * kPanel);
    later = Lines(w.lines_of_keys);
    if (after < keys)
      add_panel(later, after);
    else
      next.add_panel(later, 0);
  }

  void add_panel(Lines& lines, int64_t key) const {
    add_rows(lines, p.k, key, kPanel);
    add_rows(lines, p.v, key, kPanel);
  }

  // Up to n keys or values from `key` on.
  void add_rows(Lines& lines, const HeadsView& x, int64_t key, int64_t n) const {
    lines.add(rows_of<T>(x, k0 + key, head_k), n < keys - key ? n : keys - key, p.dim);
  }

  bool keys_in_place() const {
    return sizeof(T) * Units::kPack == sizeof(Unit) && p.k.row % Units::kPack == 0 && p.dropout_p == 0;
  }

  // All queries of the item, at most kFewRows, see all keys: scores are [keys][64 queries], with keys as A
  // and the queries' panels as B, and softmax runs down their columns.
  void few_queries(const Forward& next) {
    const int rows = int(item.end - item.begin);
    for (int r = 0; r < rows; r += kGroup) {
      pack_group<Units, T>([&](int i) { return row_of(p.q, r + i); }, rows - r < kGroup ? rows - r : kGroup,
                           p.dim, w.keys + r / kPanel * units * kPanel + r % kPanel, w.scratch);
      for (int i = 0; i < kGroup; i += kLanes) {
        store(w.maximum + r + i, broadcast(-kInfinity));
        store(w.sum + r + i, vf{});
      }
    }
    std::memset(w.started, keys > 0, rows / kRows + 1);
    const int64_t step = few_keys();
    for (int64_t key = 0; key < keys; key += step) {
      const int n = int(keys - key < step ? keys - key : step);
      const int64_t steps = (n + Units::kPack - 1) / Units::kPack;
      const Rows<T> k = rows_of<T>(p.k, k0 + key, head_k), v = rows_of<T>(p.v, k0 + key, head_k);
      Lines values(w.lines_of_values);
      later = Lines(w.lines_of_keys);
      add_rows(values, p.v, key, n);
      if (key + n < keys)
        add_rows(later, p.k, key + n, step);
      else
        next.add_rows(later, p.k, 0, next.few_keys());
      for (int r = 0; r < rows; r += kPanel) {
        const int width = rows - r < kPanel ? rows - r : kPanel;
        multiply_in_place<Units>(k, p.dim, w.keys + r * units, int(round_up(width, kGroup)) / kGroup, n,
                                 scale.product, w.scores, values);
        if (r == 0)
          pack_rows_of<Units, T>([&](int64_t i) { return v.data + i * v.stride; }, n, p.dim,
                                 capacity / Units::kPack, w.values);
        for (int j = 0; j < width; j += kLanes) weigh_columns(j, r, n);
        if (key + n == keys) complete(r, width);
        const Store kind = key == 0 ? Store::set : Store::rescale;
        for (int i = 0; i < width; i += kRows) {
          const int height = width - i < kRows ? width - i : kRows;
          for (int64_t d = 0; d < p.dim; d += kPanel)
            multiply<Units>(height, int(narrow - d < kPanel ? narrow - d : kPanel) / kGroup,
                            reinterpret_cast<const Unit*>(w.scores) + i, 1, kPanel,
                            w.values + d * (capacity / Units::kPack), steps, w.out + (r + i) * narrow + d,
                            narrow, {kind, 1.0f, w.alpha + i, later.take(steps)});
          if (key + n == keys) write(r + i, height);
        }
      }
      later.rest();
    }
    if (keys == 0) finish(0, rows);
  }

  // Keys between two rescalings of few queries.
  int64_t few_keys() const {
    return even_chunk(keys, kFewKeys < capacity ? kFewKeys : capacity, Units::kPack);
  }

  // Replaces the scores of the queries of one vector by weights, as units of the next product.
  void weigh_columns(int column, int r, int n) {
    float* const begin = w.scores + column;
    float* const end = begin + n * kPanel;
    if (p.softcap > 0)
      for (float* s = begin; s < end; s += kPanel) store(s, tanh_score(load(s)) * broadcast(scale.cap));
    vf highest = broadcast(-kInfinity), other = highest;
    for (float* s = begin; s < end - kPanel; s += 2 * kPanel) {
      highest = vmax(highest, load(s));
      other = vmax(other, load(s + kPanel));
    }
    if (n % 2) highest = vmax(highest, load(end - kPanel));
    const vf before = load(w.maximum + r + column), factor = broadcast(scale.log2);
    const vf maximum = vmax(before, vmax(highest, other));
    const vf shift = select(maximum == broadcast(-kInfinity), vf{}, maximum);
    auto weight = [&](const float* s) { return weight_of<Units>(load(s), factor, shift); };
    vf total = {}, odd = {};
    Unit* units_of = reinterpret_cast<Unit*>(begin);
    for (float* s = begin; s < end; s += 2 * kPanel) {
      const bool pair = s + kPanel < end;
      const vf first = weight(s), second = pair ? weight(s + kPanel) : vf{};
      total = total + first;
      odd = odd + second;
      if constexpr (Units::kPack == 1) {
        store(s, first);
        if (pair) store(s + kPanel, second);
      } else {
        store_pair(units_of, first, second);
        units_of += kPanel;
      }
    }
    const vf alpha = exp2_approx((before - shift) * factor);
    store(w.alpha + column, alpha);
    store(w.sum + r + column, load(w.sum + r + column) * alpha + (total + odd));
    store(w.maximum + r + column, maximum);
  }

  // The queries of virtual rows r on, as rows of units.
  Rows<Unit> queries(int64_t r, int rows) {
    constexpr bool in_place = sizeof(T) * Units::kPack == sizeof(Unit);
    if (in_place && group == 1 && p.q.row % Units::kPack == 0) {
      const Rows<T> q = rows_of<T>(p.q, q0 + item.begin + r, head_k);
      return {reinterpret_cast<const Unit*>(q.data), q.stride / Units::kPack};
    }
    for (int i = 0; i < rows; ++i) copy_row(row_of(p.q, r + i), p.dim, w.queries + i * units);
    return {w.queries, units};
  }

  // The rows of x of the block of queries at r, which lie too far apart for the hardware to fetch them.
  void add_block(Lines& lines, const HeadsView& x, int64_t r) const {
    const int64_t after = r + kBlockRows, rows = item.end - item.begin;
    for (; r < after && r < rows; ++r) lines.add(Rows<T>{row_of(x, r), 0}, 1, p.dim);
  }

  void block(int64_t r, int rows, int64_t begin, int64_t end, const Forward& next) {
    Rows<Unit> q{};
    for (int64_t key = begin; key < end; key += kScores) {
      const int panels = int((end - key < kScores ? end - key : kScores) + kPanel - 1) / kPanel;
      const int64_t first = (key - begin) / kPanel;
      ForwardMask& mask = *w.mask;
      if (!mask.set(p.mask, is_trivial, side_q, item.begin + r, rows, group, side_k, key, end, panels,
                    w.summaries + first, w.bounds + first * kMaxModalities, w.bounds_set + first))
        continue;
      Lines lines(w.lines_of_rows);
      if (!q.data) {
        q = queries(r, rows);
        if (end == keys) add_block(lines, p.out, r);
        if (item.begin + r + rows < item.end)
          add_block(lines, p.q, r + rows);
        else
          next.add_block(lines, p.q, 0);
      }
      for (int i = 0; i < rows; ++i) store(w.highest + i * kLanes, broadcast(-kInfinity));
      for (int c = 0; c < panels; ++c) {
        if (mask.kinds[c] != kSkip) pack(first + c, begin, end, next);
        const Unit* panel = w.keys + (first + c) * units * kPanel;
        for (int t = 0; t * kRows < rows; ++t) {
          const Span span = mask.spans[t][c];
          if (span.begin == span.end) continue;
          multiply<Units>(rows - t * kRows < kRows ? rows - t * kRows : kRows, span.end - span.begin,
                          q.data + t * kRows * q.stride, q.stride, 1, panel + span.begin * kGroup, units,
                          w.scores + t * kRows * kScores + c * kPanel + span.begin * kGroup, kScores,
                          {Store::set, scale.product, nullptr, later.take(units),
                           span.full && p.softcap == 0 ? w.highest + t * kRows * kLanes : nullptr});
        }
      }
      for (int t = 0; t * kRows < rows; ++t) weigh(t, r, rows, key, panels);
      const int64_t share = lines.left() * kRows / rows + 1;
      for (int t = 0; t * kRows < rows; ++t)
        accumulate(t, r, rows, (key - begin) / Units::kPack,
                   int((end - key + Units::kPack - 1) / Units::kPack), panels, lines, share);
      lines.rest();
    }
  }

  // The scores of a tile of rows become weights. The rows overlap, and what is per row is done by vectors.
  void weigh(int t, int64_t r, int rows, int64_t key, int panels) {
    const Span* spans = w.mask->spans[t];
    int seen = 0;  // the first panel of which something is
    while (seen < panels && spans[seen].begin == spans[seen].end) ++seen;
    while (panels > seen && spans[panels - 1].begin == spans[panels - 1].end) --panels;
    const int height = rows - t * kRows < kRows ? rows - t * kRows : kRows;
    const int64_t first = r + t * kRows;
    float* const tile = w.scores + t * kRows * kScores;
    constexpr int kLanesOfRows = (kRows + kLanes - 1) / kLanes * kLanes;
    float before[kLanesOfRows] = {}, maximum[kLanesOfRows] = {}, shift[kLanesOfRows], alpha[kLanesOfRows];
    vf lanes[kRows];
    for (int i = 0; i < height; ++i) {
      float* const row = tile + i * kScores;
      lanes[i] =
          p.softcap > 0 ? cap_row(row, spans, panels, scale.cap) : load(w.highest + (t * kRows + i) * kLanes);
      lanes[i] = mask_row(row, spans, *w.mask, seen, panels, t * kRows + i, lanes[i]);
    }
    for (int i = 0; i < height; ++i) {
      before[i] = w.maximum[first + i];
      maximum[i] = max_lanes(lanes[i]);
    }
    for (int i = 0; i < kLanesOfRows; i += kLanes) {
      const vf b = load(before + i), m = vmax(load(maximum + i), b);
      const vf d = select(m == broadcast(-kInfinity), vf{}, m);
      store(maximum + i, m);
      store(shift + i, d);
      store(alpha + i, exp2_approx((b - d) * broadcast(scale.log2)));
    }
    for (int i = 0; i < height; ++i) {
      if (p.dropout_p > 0) {
        const int64_t row = item.begin + first + i;
        const Dropout dropout{p.seed,
                              uint32_t(head_k * group + row % group),
                              uint32_t(item.sample),
                              uint32_t(row / group),
                              uint32_t(key),
                              p.dropout_p};
        lanes[i] =
            weigh_row<Units, true>(tile + i * kScores, spans, seen, panels, scale.log2, shift[i], dropout);
      } else {
        lanes[i] = weigh_row<Units, false>(tile + i * kScores, spans, seen, panels, scale.log2, shift[i], {});
      }
    }
    for (int i = 0; i < height; ++i) {
      w.alpha[t * kRows + i] = alpha[i];
      w.sum[first + i] = w.sum[first + i] * alpha[i] + sum_lanes(lanes[i]);
      w.maximum[first + i] = maximum[i];
    }
  }

  // out += weights * v for one tile of rows; neighbouring panels form one product.
  void accumulate(int t, int64_t r, int rows, int64_t first, int left, int panels, Lines& lines,
                  int64_t share) {
    const Span* spans = w.mask->spans[t];
    const int height = rows - t * kRows < kRows ? rows - t * kRows : kRows;
    uint8_t& started = w.started[r / kRows + t];
    bool fresh = true;
    for (int c = 0; c < panels;) {
      if (spans[c].begin == spans[c].end) {
        ++c;
        continue;
      }
      const int begin = (c * kPanel + spans[c].begin * kGroup) / Units::kPack;
      while (c + 1 < panels && spans[c].end * kGroup == kPanel && spans[c + 1].begin == 0 && spans[c + 1].end)
        ++c;
      int end = (c * kPanel + spans[c].end * kGroup) / Units::kPack;
      end = end < left ? end : left;
      ++c;
      Epilogue e{!started ? Store::set : fresh ? Store::rescale : Store::add, 1.0f, w.alpha + t * kRows};
      for (int64_t d = 0; d < p.dim; d += kPanel) {
        const int64_t width = narrow - d < kPanel ? narrow - d : kPanel;
        e.fetch = lines.take(end - begin < share ? end - begin : share);
        multiply<Units>(height, int(width) / kGroup,
                        reinterpret_cast<const Unit*>(w.scores + t * kRows * kScores) + begin, kScores, 1,
                        w.values + d / kPanel * (capacity / Units::kPack) * kPanel + (first + begin) * kPanel,
                        end - begin, w.out + (r + t * kRows - base) * narrow + d, narrow, e);
      }
      started = 1;
      fresh = false;
    }
  }

  void finish(int64_t r, int rows) {
    complete(r, rows);
    write(r, rows);
  }

  // The rows from r on, a multiple of kLanes, have met all their keys.
  void complete(int64_t r, int rows) {
    const double factor = scale.log2 * 0.6931471805599453;
    for (const int64_t end = r + rows; r < end; r += kLanes) {
      const vf sum = load(w.sum + r);
      const vi empty = sum == vf{};
      float log[kLanes], lse[kLanes];
      store(log, log_approx(sum));
      for (int i = 0; i < kLanes; ++i) lse[i] = float(w.maximum[r + i] * factor + log[i]);
      store(w.lse + r, select(empty, broadcast(-kInfinity), load(lse)));
      store(w.factor + r, select(empty, vf{}, broadcast(1.0f) / sum));
    }
  }

  void write(int64_t r, int rows) {
    for (int i = 0; i < rows; ++i) {
      const int64_t row = item.begin + r + i;
      const int head = int(head_k * group + row % group);
      T* out = const_cast<T*>(rows_of<T>(p.out, q0 + row / group, head).data);
      const float* acc = w.out + (r + i - base) * narrow;
      const bool empty = w.lse[r + i] == -kInfinity;
      const vf factor = broadcast(w.factor[r + i]);
      for (int64_t d = 0; d < p.dim; d += kLanes) {
        const vf x = empty ? vf{} : load(acc + d) * factor;
        if (d + kLanes <= p.dim)
          store(out + d, x);
        else
          store_tail(out + d, x, int(p.dim - d));
      }
      p.lse[head * p.layout_q.total + q0 + row / group] = w.lse[r + i];
    }
  }
};

template <class Units, class T>
void forward_all(const AttentionParams& p) {
  zero_outside<T>(p.layout_q, p.out, p.heads, p.dim);
  for (int h = 0; h < p.heads; ++h) {
    int64_t done = 0;
    auto empty = [&](int64_t end) {
      for (; done < end; ++done) p.lse[h * p.layout_q.total + done] = -kInfinity;
    };
    for (int64_t b = 0; b < p.layout_q.batch; ++b) {
      empty(p.layout_q.begin(b));
      done = p.layout_q.begin(b) + p.layout_q.length(b);
    }
    empty(p.layout_q.total);
  }
  int64_t longest = 0, rows = 0;
  for (int64_t b = 0; b < p.layout_k.batch; ++b)
    longest = p.layout_k.length(b) > longest ? p.layout_k.length(b) : longest;
  for (int64_t i = 0; i < p.num_items; ++i)
    rows = p.items[i].end - p.items[i].begin > rows ? p.items[i].end - p.items[i].begin : rows;
  const int64_t panel_bytes = int64_t(kPanel) * 2 * p.dim / Units::kPack * 4;
  int64_t capacity = kPackedBytes / panel_bytes / kChunkPanels * kScores;
  capacity = capacity < kScores ? kScores : capacity;
  if (longest < capacity) capacity = round_up(longest > 0 ? longest : 1, kScores);
  const bool is_trivial = trivial(p.mask);
  const int64_t total = p.num_items * p.heads_k;
  auto work = [&] {
    static thread_local Workspace workspace;
    Buffers<Units> buffers;
    Arena count;
    buffers.lay_out(count, p.dim, capacity / kPanel, rows);
    Arena arena{workspace.reserve(count.used), 0};
    buffers.lay_out(arena, p.dim, capacity / kPanel, rows);
    auto forward = [&](int64_t i) {
      return Forward<Units, T>{p, p.items[i / p.heads_k], int(i % p.heads_k), buffers, is_trivial, capacity};
    };
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < total; ++i) forward(i).run(forward(i + p.threads < total ? i + p.threads : i));
  };
  if (p.threads == 1) return work();  // a team of one would wake others at each of its barriers
#pragma omp parallel num_threads(p.threads)
  work();
}

}  // namespace

void attention_forward(const AttentionParams& p) {
  if (p.dtype == DType::f32) return forward_all<FloatUnits, float>(p);
#if defined(__AVX512BF16__)
  forward_all<PairUnits, bf16>(p);
#else
  forward_all<FloatUnits, bf16>(p);
#endif
}

}  // namespace MMFAST_ISA
}  // namespace mmfast
