// Attention, backward. With p = exp(s - lse), delta = rowsum(dout * out), dp = dout v^T and ds = p * (dp -
// delta): dv = p^T dout, dq = scale * ds k, dk = scale * ds^T q (Dao, FlashAttention-2, arXiv 2307.08691,
// algorithm 2).
//
// One item is a range of keys of one sample and one key head, with all queries of the group: dk and dv belong
// to it alone, and dq too unless the sample is split into parts, whose private sums are added in order
// afterwards. Where the queries are few, keys and values are read in place and scores are computed
// transposed.
#include "cpu/attention_tiles.h"
#include "cpu/isa.h"

namespace mmfast {
namespace MMFAST_ISA {
namespace {

constexpr int kBlockRows = 48;
constexpr int kChunkPanels = 4;
constexpr int kScores = kChunkPanels * kPanel;
using BackwardMask = BlockMask<kBlockRows, kChunkPanels>;

template <class Units>
struct Buffers {
  using Unit = typename Units::Unit;
  Unit *keys_t, *values_t;    // [panels][dim units][64]: k^T and v^T
  Unit* keys;                 // [ceil(dim / 64)][keys / pack][64]
  Unit *queries, *douts;      // [kBlockRows][dim units], where they cannot be read in place
  Unit *queries_b, *douts_b;  // [ceil(dim / 64)][kBlockRows / pack][64]; of few queries kFewRows
  Unit* scratch;
  float *p, *ds;         // [kBlockRows][kScores]: scores and dp, then p and ds as A of p^T dout and ds^T q
  Unit* ds_rows;         // [kBlockRows][kScores / pack]: ds as A of ds k; floats need no copy
  float *dk, *dv;        // [kScores][narrow]
  float *lse, *lse_low;  // per virtual row: lse in units of log2 (inf where empty) and what its rounding lost
  float* delta;          // per virtual row: scale * rowsum(dout * out)
  float* dq;             // [virtual rows][narrow]
  uint8_t* started;      // per tile of rows: dq holds something
  TileSummary* summaries;
  KeyBounds* bounds;
  uint32_t* bounds_set;
  BackwardMask* mask;
  const char **lines_of_values, **lines_of_keys;  // of few queries
  const char** lines_of_rows;

  void lay_out(Arena& arena, int64_t dim, int64_t rows) {
    const int64_t units = dim / Units::kPack, wide = round_up(dim, kPanel), narrow = round_up(dim, kGroup);
    keys_t = arena.take<Unit>(kScores * units);
    values_t = arena.take<Unit>(kScores * units);
    keys = arena.take<Unit>(kScores / Units::kPack * wide);
    queries = arena.take<Unit>(kBlockRows * dim);
    douts = arena.take<Unit>(kBlockRows * dim);
    queries_b = arena.take<Unit>(kFewRows / Units::kPack * wide);
    douts_b = arena.take<Unit>(kFewRows / Units::kPack * wide);
    scratch = arena.take<Unit>((kGroup + 1) * dim);
    p = arena.take<float>(kBlockRows * kScores);
    ds = arena.take<float>(kBlockRows * kScores);
    ds_rows = Units::kPack == 1 ? reinterpret_cast<Unit*>(ds) : arena.take<Unit>(kBlockRows * kScores / 2);
    dk = arena.take<float>(kScores * narrow);
    dv = arena.take<float>(kScores * narrow);
    lse = arena.take<float>(rows + kGroup);
    lse_low = arena.take<float>(rows + kGroup);
    delta = arena.take<float>(rows + kGroup);
    dq = arena.take<float>(rows * narrow);
    started = arena.take<uint8_t>(rows / kRows + 1);
    summaries = arena.take<TileSummary>(kChunkPanels);
    bounds = arena.take<KeyBounds>(kChunkPanels * kMaxModalities);
    bounds_set = arena.take<uint32_t>(kChunkPanels);
    mask = arena.take<BackwardMask>(1);
    lines_of_values = arena.take<const char*>(room_of<Units>(kFewKeys, dim));
    lines_of_keys = arena.take<const char*>(room_of<Units>(kFewKeys, dim));
    lines_of_rows = arena.take<const char*>(room_of<Units>(kScores + 2 * kBlockRows, dim));
  }
};

// A row of p and ds as both products want them: pairs of rows for the transposed ones.
MMFAST_INLINE void store_pair(float* rows, int64_t stride, int j, vf first, vf second, bool both) {
  store(rows + j, first);
  if (both) store(rows + stride + j, second);
}

template <class Units, class T>
struct Backward {
  using Unit = typename Units::Unit;
  const AttentionParams& p;
  const AttentionItem& item;
  const int head_k;
  const Buffers<Units>& w;
  const bool is_trivial;
  const ScoreScale scale = score_scale<Units>(p);
  const int group = p.heads / p.heads_k;
  const int64_t units = p.dim / Units::kPack;
  const int64_t narrow = round_up(p.dim, kGroup);
  const int64_t q0 = p.layout_q.begin(item.sample), k0 = p.layout_k.begin(item.sample);
  const int64_t rows_all = p.layout_q.length(item.sample) * group;
  const Side side_q = side_of(p.layout_q, item.sample), side_k = side_of(p.layout_k, item.sample);

  // Where all keys of the sample are in one chunk, float32 adds rowsum(p * (dp - delta)) to delta: errors of
  // dp that a row's keys share then cancel, which matters where it sees few.
  const bool exact_delta = Units::kPack == 1 && sizeof(T) == 4 && item.begin == 0 &&
                           item.end == p.layout_k.length(item.sample) && item.end <= kScores;

  const T* row_of(const HeadsView& x, int64_t row) const {
    return rows_of<T>(x, q0 + row / group, head_k * group + row % group).data;
  }

  // next: what this thread probably runs next.
  void run(const Backward& next) {
    std::memset(w.started, 0, rows_all / kRows + 1);
    if (is_few()) {
      prepare(0, rows_all);
      few_queries(next);
      return finish_queries();
    }
    for (int64_t key = item.begin; key < item.end; key += kScores) {
      const int n = item.end - key < kScores ? int(item.end - key) : kScores;
      chunk(key, n);
    }
    finish_queries();
  }

  void prepare(int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const float lse = p.lse[(head_k * group + r % group) * p.layout_q.total + q0 + r / group];
      const double log2 = double(lse) * 1.4426950408889634;
      w.lse[r] = lse == -kInfinity ? kInfinity : float(log2);
      w.lse_low[r] = lse == -kInfinity ? 0 : float(log2 - double(float(log2)));
    }
    for (int64_t r = begin; r < end; r += kGroup) deltas(r, end - r < kGroup ? int(end - r) : kGroup);
  }

  // rowsum(dout * out) in the order of the products dout v^T, so that dp - delta is exactly 0 for a row that
  // sees one key.
  void deltas(int64_t r, int rows) {
    Unit *out = w.queries_b, *dout = w.douts_b;  // not packed yet
    pack_group<Units, T>([&](int i) { return row_of(p.out, r + i); }, rows, p.dim, out, w.scratch);
    pack_group<Units, T>([&](int i) { return row_of(p.dout, r + i); }, rows, p.dim, dout, w.scratch);
    for (int j = 0; j < kGroup; j += kLanes) {
      vf sum = {};
      for (int64_t d = 0; d < units; ++d)
        sum = Units::multiply_add(sum, Units::load_units(dout + d * kPanel + j),
                                  Units::load_units(out + d * kPanel + j));
      sum = sum * broadcast(p.scale);
      if (j + kLanes <= rows)
        store(w.delta + r + j, sum);
      else if (j < rows)
        store_tail(w.delta + r + j, sum, rows - j);
    }
  }

  bool is_few() const {
    return is_trivial && rows_all <= kFewRows && sizeof(T) * Units::kPack == sizeof(Unit) &&
           p.dropout_p == 0 && p.softcap == 0 && p.k.row % Units::kPack == 0 && p.v.row % Units::kPack == 0;
  }

  // All queries, at most kFewRows, see all keys: scores and dp are [keys][64 queries], with keys and values
  // in place as A and the queries' panels as B, and what is per query goes by vectors.
  void few_queries(const Backward& next) {
    const int rows = int(rows_all);
    for (int r = 0; r < rows; r += kGroup) {
      const int n = rows - r < kGroup ? rows - r : kGroup;
      const int64_t panel = r / kPanel * units * kPanel + r % kPanel;
      pack_group<Units, T>([&](int i) { return row_of(p.q, r + i); }, n, p.dim, w.keys_t + panel, w.scratch);
      pack_group<Units, T>([&](int i) { return row_of(p.dout, r + i); }, n, p.dim, w.values_t + panel,
                           w.scratch);
      for (int i = n; i < kGroup; ++i) w.lse[r + i] = kInfinity, w.lse_low[r + i] = w.delta[r + i] = 0;
    }
    pack_rows_of<Units, T>([&](int64_t i) { return row_of(p.q, i); }, rows, p.dim, kFewRows / Units::kPack,
                           w.queries_b);
    pack_rows_of<Units, T>([&](int64_t i) { return row_of(p.dout, i); }, rows, p.dim, kFewRows / Units::kPack,
                           w.douts_b);
    const int64_t step = few_keys();
    for (int64_t key = item.begin; key < item.end; key += step)
      few_chunk(key, int(item.end - key < step ? item.end - key : step), rows, next);
    std::memset(w.started, 1, rows / kRows + 1);
  }

  int64_t few_keys() const { return even_chunk(item.end - item.begin, kFewKeys, Units::kPack); }

  // Up to n rows of the item from `key` on.
  void add_rows(Lines& lines, const HeadsView& x, int64_t key, int64_t n) const {
    lines.add(rows_of<T>(x, k0 + key, head_k), n < item.end - key ? n : item.end - key, p.dim);
  }

  void few_chunk(int64_t key, int n, int rows, const Backward& next) {
    const bool first = key == item.begin;
    const Rows<T> k = rows_of<T>(p.k, k0 + key, head_k), v = rows_of<T>(p.v, k0 + key, head_k);
    Lines values(w.lines_of_values), later(w.lines_of_keys);
    add_rows(values, p.v, key, n);
    if (key + n < item.end)
      add_rows(later, p.k, key + n, n);
    else
      next.add_rows(later, p.k, next.item.begin, next.few_keys());
    for (int r = 0; r < rows; r += kPanel) {
      const int width = rows - r < kPanel ? rows - r : kPanel, groups = int(round_up(width, kGroup)) / kGroup;
      multiply_in_place<Units>(k, p.dim, w.keys_t + r * units, groups, n, scale.product, w.p, values);
      multiply_in_place<Units>(v, p.dim, w.values_t + r * units, groups, n, p.scale, w.ds, later);
      if (r == 0)
        pack_rows_of<Units, T>([&](int64_t i) { return k.data + i * k.stride; }, n, p.dim,
                               kScores / Units::kPack, w.keys);
      for (int j = 0; j < width; j += kLanes)
        weigh_columns(j, r, n, first && key + n == p.layout_k.length(item.sample));
      const bool last = r + kPanel >= rows;
      const int64_t at = r / Units::kPack * kPanel;
      key_gradients(w.p, w.douts_b + at, width, key, n, r > 0, last, w.dv, p.dv);
      key_gradients(w.ds, w.queries_b + at, width, key, n, r > 0, last, w.dk, p.dk);
      const int64_t steps = (n + Units::kPack - 1) / Units::kPack;
      for (int i = 0; i < width; i += kRows)
        for (int64_t d = 0; d < p.dim; d += kPanel)
          multiply<Units>(width - i < kRows ? width - i : kRows,
                          int(narrow - d < kPanel ? narrow - d : kPanel) / kGroup, w.ds_rows + i, 1, kPanel,
                          w.keys + d * (kScores / Units::kPack), steps, w.dq + (r + i) * narrow + d, narrow,
                          {first ? Store::set : Store::add, 1.0f, nullptr, later.take(steps)});
    }
    later.rest();
  }

  // Scores and dp of the queries of one vector become p and ds: rows of units, and for bfloat16 ds by pairs
  // of keys too.
  void weigh_columns(int column, int r, int n, bool only_chunk) {
    const vf lse = load(w.lse + r + column), low = load(w.lse_low + r + column);
    vf delta = load(w.delta + r + column), error = {};
    float* const weights = w.p + column;
    float* const slopes = w.ds + column;
    for (int64_t j = 0; j < n * kPanel; j += kPanel) {
      vf s = load(weights + j);
      s = Units::kPack == 1 ? s * broadcast(scale.log2) - lse - low : s - lse;
      const vf x = exp2_approx<Units::kPack == 2>(s);
      error = error + x * (load(slopes + j) - delta);
      store(weights + j, x);
    }
    if (exact_delta && only_chunk) delta = delta + error;
    for (int j = 0; j < n; j += 2) {
      vf x[2] = {}, ds[2] = {};
      for (int i = 0; i < 2 && j + i < n; ++i) {
        x[i] = load(weights + (j + i) * kPanel);
        ds[i] = x[i] * (load(slopes + (j + i) * kPanel) - delta);
      }
      for (int i = 0; i < 2 && j + i < n; ++i) {
        if constexpr (Units::kPack == 1) {
          store(slopes + (j + i) * kPanel, ds[i]);
        } else {
          store(reinterpret_cast<bf16*>(w.p + (j + i) * kPanel) + column, x[i]);
          store(reinterpret_cast<bf16*>(w.ds + (j + i) * kPanel) + column, ds[i]);
        }
      }
      if constexpr (Units::kPack == 2) store_pair(w.ds_rows + j / 2 * kPanel + column, ds[0], ds[1]);
    }
  }

  // sums [n][dim] = a b, or += : a [n][64 queries] is p or ds, b the same queries' rows of dout or q. The
  // last panel of queries writes the sums of a tile of keys at once, so that the next tile runs while memory
  // takes them.
  void key_gradients(const float* a, const Unit* b, int width, int64_t key, int n, bool add, bool last,
                     float* sums, const HeadsView& out) {
    const int64_t steps = (width + Units::kPack - 1) / Units::kPack;
    Lines lines(w.lines_of_values);
    if (last) add_rows(lines, out, key, n);
    for (int j = 0; j < n; j += kRows) {
      const int height = n - j < kRows ? n - j : kRows;
      for (int64_t d = 0; d < p.dim; d += kPanel)
        multiply<Units>(height, int(narrow - d < kPanel ? narrow - d : kPanel) / kGroup,
                        reinterpret_cast<const Unit*>(a + j * kPanel), kPanel, 1,
                        b + d * (kFewRows / Units::kPack), steps, sums + j * narrow + d, narrow,
                        {add ? Store::add : Store::set, 1.0f, nullptr, lines.take(steps)});
      if (last) write_keys(out, sums + j * narrow, key + j, height);
    }
  }

  void chunk(int64_t key, int n) {
    const int panels = (n + kPanel - 1) / kPanel;
    const Rows<T> k = rows_of<T>(p.k, k0 + key, head_k), v = rows_of<T>(p.v, k0 + key, head_k);
    for (int c = 0; c < panels; ++c) {
      const int width = n - c * kPanel < kPanel ? n - c * kPanel : kPanel;
      w.bounds_set[c] = 0;
      if (!is_trivial) w.summaries[c] = summarize(side_k, key + c * kPanel, key + c * kPanel + width);
      pack_transposed<Units>(Rows<T>{k.data + c * kPanel * k.stride, k.stride}, width, p.dim,
                             w.keys_t + c * kPanel * units, w.scratch,
                             Rows<T>{v.data + c * kPanel * v.stride, v.stride});
      pack_transposed<Units>(Rows<T>{v.data + c * kPanel * v.stride, v.stride}, width, p.dim,
                             w.values_t + c * kPanel * units, w.scratch,
                             Rows<T>{v.data + c * kPanel * v.stride, v.stride});
    }
    pack_rows_of<Units, T>([&](int64_t i) { return k.data + i * k.stride; }, n, p.dim, kScores / Units::kPack,
                           w.keys);
    std::memset(w.dk, 0, n * narrow * sizeof(float));
    std::memset(w.dv, 0, n * narrow * sizeof(float));
    for (int64_t r = 0; r < rows_all; r += kBlockRows) {
      const int rows = rows_all - r < kBlockRows ? int(rows_all - r) : kBlockRows;
      if (key == item.begin) prepare(r, r + rows);
      block(r, rows, key, n, panels);
    }
    write_keys(p.dk, w.dk, key, n);
    write_keys(p.dv, w.dv, key, n);
  }

  // The rows of x of the block of queries at r, which lie too far apart for the hardware to fetch them.
  void add_block(Lines& lines, const HeadsView& x, int64_t r) const {
    for (const int64_t end = r + kBlockRows < rows_all ? r + kBlockRows : rows_all; r < end; ++r)
      lines.add(Rows<T>{row_of(x, r), 0}, 1, p.dim);
  }

  // Rows of a block as A: [rows][units].
  Rows<Unit> rows_a(const HeadsView& x, int64_t r, int rows, Unit* copy) {
    constexpr bool in_place = sizeof(T) * Units::kPack == sizeof(Unit);
    if (in_place && group == 1 && x.row % Units::kPack == 0)
      return {reinterpret_cast<const Unit*>(row_of(x, r)), x.row / Units::kPack};
    for (int i = 0; i < rows; ++i) copy_row(row_of(x, r + i), p.dim, copy + i * units);
    return {copy, units};
  }

  void block(int64_t r, int rows, int64_t key, int n, int panels) {
    BackwardMask& mask = *w.mask;
    if (!mask.set(p.mask, is_trivial, side_q, r, rows, group, side_k, key, key + n, panels, w.summaries,
                  w.bounds, w.bounds_set))
      return;
    const Rows<Unit> q = rows_a(p.q, r, rows, w.queries), dout = rows_a(p.dout, r, rows, w.douts);
    pack_rows_of<Units, T>([&](int64_t i) { return row_of(p.q, r + i); }, rows, p.dim,
                           kBlockRows / Units::kPack, w.queries_b);
    pack_rows_of<Units, T>([&](int64_t i) { return row_of(p.dout, r + i); }, rows, p.dim,
                           kBlockRows / Units::kPack, w.douts_b);
    const float keep = p.dropout_p > 0 ? 1 / (1 - p.dropout_p) : 1;
    Lines lines(w.lines_of_rows);
    if (r + rows == rows_all) add_rows(lines, p.dk, key, n);
    add_block(lines, p.q, r + rows);
    if (key == item.begin) add_block(lines, p.out, r + rows);
    scores(q, w.keys_t, w.p, rows, panels, scale.product, lines);
    lines = Lines(w.lines_of_rows);
    if (r + rows == rows_all) add_rows(lines, p.dv, key, n);
    add_block(lines, p.dout, r + rows);
    scores(dout, w.values_t, w.ds, rows, panels, p.scale * keep, lines);
    const bool special = p.softcap > 0 || p.dropout_p > 0;
    for (int i = 0; i < rows && exact_delta; ++i)
      w.delta[r + i] = special ? delta_of<true>(r, i, key, panels) : delta_of<false>(r, i, key, panels);
    for (int i = 0; i < rows; i += 2) {
      if (special)
        weigh<true>(r, i, rows, key, panels);
      else
        weigh<false>(r, i, rows, key, panels);
    }
    transposed(w.p, w.douts_b, w.dv, rows, n, panels);
    transposed(w.ds, w.queries_b, w.dk, rows, n, panels);
    for (int t = 0; t * kRows < rows; ++t) queries(t, r, rows, n, panels);
  }

  // The products fetch all lines, each its share.
  void scores(const Rows<Unit>& a, const Unit* b, float* out, int rows, int panels, float factor,
              Lines lines) {
    Epilogue e{Store::set, factor, nullptr};
    const int64_t share = lines.left() * kRows / (rows * panels) + 1;
    for (int c = 0; c < panels; ++c)
      for (int t = 0; t * kRows < rows; ++t) {
        const Span span = w.mask->spans[t][c];
        if (span.begin == span.end) continue;
        e.fetch = lines.take(share < units ? share : units);
        multiply<Units>(rows - t * kRows < kRows ? rows - t * kRows : kRows, span.end - span.begin,
                        a.data + t * kRows * a.stride, a.stride, 1,
                        b + c * kPanel * units + span.begin * kGroup, units,
                        out + t * kRows * kScores + c * kPanel + span.begin * kGroup, kScores, e);
      }
    lines.rest();
  }

  // Which keys of the panel at `key` dropout leaves to a virtual row.
  uint64_t kept_of(int64_t row, int64_t key) const {
    if (p.dropout_p == 0) return 0;
    return kept(p.seed, uint32_t(head_k * group + row % group), uint32_t(item.sample), uint32_t(row / group),
                uint32_t(key), p.dropout_p);
  }

  // p as softmax left it, p after dropout and dp of kLanes cells of one row, and the slope of the softcap.
  struct Cell {
    vf x, weight, dp, slope;
  };
  template <bool special>
  inline __attribute__((always_inline)) Cell cell(int64_t r, int i, int column, bool masked, uint64_t bits,
                                                  uint64_t kept_bits) {
    const int64_t at = int64_t(i) * kScores + column;
    vf s = load(w.p + at);
    Cell c;
    c.dp = load(w.ds + at);
    c.slope = broadcast(1.0f);
    if constexpr (special) {
      if (p.softcap > 0) {
        s = tanh_score(s);
        c.slope = broadcast(1.0f) - s * s;
        s = s * broadcast(scale.cap);
      }
    }
    if constexpr (Units::kPack == 1)
      s = s * broadcast(scale.log2) - broadcast(w.lse[r + i]) - broadcast(w.lse_low[r + i]);
    else
      s = s - broadcast(w.lse[r + i]);
    c.x = exp2_approx<Units::kPack == 2>(s);
    if (masked) {
      const vi seen = lanes_of(bits, column % kPanel);
      c.x = select(seen, c.x, vf{});
      c.dp = select(seen, c.dp, vf{});  // a hidden key may hold anything
    }
    c.weight = c.x;
    if constexpr (special) {
      if (p.dropout_p > 0) {
        const vi stays = lanes_of(kept_bits, column % kPanel);
        c.dp = select(stays, c.dp, vf{});
        c.weight = select(stays, c.x * broadcast(1.0f / (1.0f - p.dropout_p)), vf{});
      }
    }
    return c;
  }

  template <bool special>
  inline __attribute__((always_inline)) void gradient(int64_t r, int i, int column, bool masked,
                                                      uint64_t bits, uint64_t kept_bits, vf& weight, vf& ds) {
    const Cell c = cell<special>(r, i, column, masked, bits, kept_bits);
    weight = c.weight;
    ds = c.x * (c.dp - broadcast(w.delta[r + i]));
    if constexpr (special) ds = ds * c.slope;
  }

  template <bool special>
  float delta_of(int64_t r, int i, int64_t key, int panels) {
    const Span* spans = w.mask->spans[i / kRows];
    const vf delta = broadcast(w.delta[r + i]);
    vf sum = {};
    for (int c = 0; c < panels; ++c) {
      const bool masked = !spans[c].full;
      const uint64_t stays = special ? kept_of(r + i, key + c * kPanel) : 0;
      for (int j = spans[c].begin * kGroup; j < spans[c].end * kGroup; j += kLanes) {
        const Cell x = cell<special>(r, i, c * kPanel + j, masked, masked ? w.mask->bits[c][i] : 0, stays);
        sum = sum + x.x * (x.dp - delta);
      }
    }
    return w.delta[r + i] + sum_lanes(sum);
  }

  // Two rows of the block: scores and dp become p and ds. Cells that were left out become zeros, because the
  // transposed products run over all rows from the first to the last that sees a key.
  template <bool special>
  void weigh(int64_t r, int i, int rows, int64_t key, int panels) {
    const BackwardMask& mask = *w.mask;
    const Span* spans = mask.spans[i / kRows];
    const bool both = i + 1 < rows;
    for (int c = 0; c < panels; ++c) {
      if (mask.kinds[c] == kSkip) continue;
      const int begin = spans[c].begin * kGroup, end = spans[c].end * kGroup;
      const bool masked = !spans[c].full;
      const bool any = special && begin < end;
      const uint64_t stays[2] = {any ? kept_of(r + i, key + c * kPanel) : 0,
                                 any && both ? kept_of(r + i + 1, key + c * kPanel) : 0};
      for (int j = 0; j < kPanel; j += kLanes) {
        const int column = c * kPanel + j;
        vf weight[2] = {}, ds[2] = {};
        if (begin <= j && j < end) {
          gradient<special>(r, i, column, masked, masked ? mask.bits[c][i] : 0, stays[0], weight[0], ds[0]);
          if (both)
            gradient<special>(r, i + 1, column, masked, masked ? mask.bits[c][i + 1] : 0, stays[1], weight[1],
                              ds[1]);
        }
        if constexpr (Units::kPack == 1) {
          store_pair(w.p + i * kScores, kScores, column, weight[0], weight[1], both);
          store_pair(w.ds + i * kScores, kScores, column, ds[0], ds[1], both);
        } else {
#if defined(__AVX512BF16__)
          store_pair(reinterpret_cast<uint32_t*>(w.p + i * kScores) + column, weight[0], weight[1]);
          store_pair(reinterpret_cast<uint32_t*>(w.ds + i * kScores) + column, ds[0], ds[1]);
          bf16* rows16 = reinterpret_cast<bf16*>(w.ds_rows) + i * kScores + column;
          store(rows16, ds[0]);
          if (both) store(rows16 + kScores, ds[1]);
#endif
        }
      }
    }
  }

  // out [keys][dim] += a^T b for a = p or ds, b = dout or q.
  void transposed(const float* a, const Unit* b, float* out, int rows, int n, int panels) {
    const Epilogue e{Store::add, 1.0f, nullptr};
    const int tiles = (rows + kRows - 1) / kRows;
    const int capacity = kBlockRows / Units::kPack;
    for (int64_t d = 0; d < p.dim; d += kPanel) {
      const int groups = int(narrow - d < kPanel ? narrow - d : kPanel) / kGroup;
      for (int c = 0; c < panels; ++c) {
        if (w.mask->kinds[c] == kSkip) continue;
        const int width = n - c * kPanel < kPanel ? n - c * kPanel : kPanel;
        for (int j = 0; j < width; j += kRows) {
          const int height = width - j < kRows ? width - j : kRows;
          const int first_group = j / kGroup, last_group = (j + height - 1) / kGroup;
          auto sees = [&](int t) {
            const Span s = w.mask->spans[t][c];
            return s.begin <= last_group && s.end > first_group;
          };
          int first = 0, last = tiles - 1;
          while (first <= last && !sees(first)) ++first;
          while (last >= first && !sees(last)) --last;
          if (first > last) continue;
          const int end = (last + 1) * kRows < rows ? (last + 1) * kRows : rows;
          multiply<Units>(
              height, groups, reinterpret_cast<const Unit*>(a) + first * kRows * kScores + c * kPanel + j, 1,
              Units::kPack * kScores, b + (d / kPanel * capacity + first * kRows / Units::kPack) * kPanel,
              (end - first * kRows + Units::kPack - 1) / Units::kPack, out + (c * kPanel + j) * narrow + d,
              narrow, e);
        }
      }
    }
  }

  // dq of one tile of rows += ds k; neighbouring panels form one product.
  void queries(int t, int64_t r, int rows, int n, int panels) {
    const Span* spans = w.mask->spans[t];
    const int height = rows - t * kRows < kRows ? rows - t * kRows : kRows;
    const int left = (n + Units::kPack - 1) / Units::kPack;
    const int64_t stride = kScores / Units::kPack;
    uint8_t& started = w.started[r / kRows + t];
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
      const Epilogue e{started ? Store::add : Store::set, 1.0f, nullptr};
      for (int64_t d = 0; d < p.dim; d += kPanel) {
        const int64_t width = narrow - d < kPanel ? narrow - d : kPanel;
        multiply<Units>(height, int(width) / kGroup, w.ds_rows + t * kRows * stride + begin, stride, 1,
                        w.keys + (d / kPanel * (kScores / Units::kPack) + begin) * kPanel, end - begin,
                        w.dq + (r + t * kRows) * narrow + d, narrow, e);
      }
      started = 1;
    }
  }

  static void write_row(T* out, const float* acc, int64_t dim) {
    for (int64_t d = 0; d < dim; d += kLanes) {
      const vf x = acc ? load(acc + d) : vf{};
      if (d + kLanes <= dim)
        store(out + d, x);
      else
        store_tail(out + d, x, int(dim - d));
    }
  }

  void write_keys(const HeadsView& x, const float* acc, int64_t key, int n) {
    for (int j = 0; j < n; ++j)
      write_row(static_cast<T*>(x.data) + (k0 + key + j) * x.row + head_k * x.head, acc + j * narrow, p.dim);
  }

  void finish_queries() {
    const bool split = p.parts[item.sample] > 1;
    for (int64_t r = 0; r < rows_all; ++r) {
      const float* acc = w.started[r / kRows] ? w.dq + r * narrow : nullptr;
      if (!split) {
        write_row(const_cast<T*>(row_of(p.dq, r)), acc, p.dim);
        continue;
      }
      const int64_t head = head_k * group + r % group;
      float* out = p.dq_parts + ((item.part * p.heads + head) * p.layout_q.total + q0 + r / group) * narrow;
      if (acc)
        std::memcpy(out, acc, narrow * sizeof(float));
      else
        std::memset(out, 0, narrow * sizeof(float));
    }
  }
};

// dq of the rows of one split sample and one head: the parts' sums, in order.
template <class T>
void add_parts(const AttentionParams& p, int64_t sample, int64_t head) {
  const int64_t narrow = round_up(p.dim, kGroup), q0 = p.layout_q.begin(sample);
  for (int64_t i = 0; i < p.layout_q.length(sample); ++i) {
    float* acc = p.dq_parts + (head * p.layout_q.total + q0 + i) * narrow;
    for (int part = 1; part < p.parts[sample]; ++part) {
      const float* other = acc + part * p.heads * p.layout_q.total * narrow;
      for (int64_t d = 0; d < narrow; d += kLanes) store(acc + d, load(acc + d) + load(other + d));
    }
    T* out = static_cast<T*>(p.dq.data) + (q0 + i) * p.dq.row + head * p.dq.head;
    for (int64_t d = 0; d < p.dim; d += kLanes) {
      if (d + kLanes <= p.dim)
        store(out + d, load(acc + d));
      else
        store_tail(out + d, load(acc + d), int(p.dim - d));
    }
  }
}

// Samples without keys or without queries have no item that writes their gradient rows.
template <class T>
void zero_sample(const HeadsView& x, const LayoutView& layout, int64_t sample, int heads, int dim) {
  for (int64_t i = 0; i < layout.length(sample); ++i)
    for (int h = 0; h < heads; ++h)
      std::memset(static_cast<T*>(x.data) + (layout.begin(sample) + i) * x.row + h * x.head, 0,
                  dim * sizeof(T));
}

template <class Units, class T>
void backward_all(const AttentionParams& p) {
  zero_outside<T>(p.layout_q, p.dq, p.heads, p.dim);
  zero_outside<T>(p.layout_k, p.dk, p.heads_k, p.dim);
  zero_outside<T>(p.layout_k, p.dv, p.heads_k, p.dim);
  int64_t longest = 0;
  for (int64_t b = 0; b < p.layout_q.batch; ++b) {
    const int64_t nq = p.layout_q.length(b), nk = p.layout_k.length(b);
    longest = nq > longest ? nq : longest;
    if (!nk) zero_sample<T>(p.dq, p.layout_q, b, p.heads, p.dim);
    if (!nq) zero_sample<T>(p.dk, p.layout_k, b, p.heads_k, p.dim);
    if (!nq) zero_sample<T>(p.dv, p.layout_k, b, p.heads_k, p.dim);
  }
  const int64_t rows = round_up(longest * (p.heads / p.heads_k), kRows);
  const bool is_trivial = trivial(p.mask);
  const int64_t total = p.num_items * p.heads_k, sums = p.dq_parts ? p.layout_q.batch * p.heads : 0;
  auto work = [&] {
    static thread_local Workspace workspace;
    Buffers<Units> buffers;
    Arena count;
    buffers.lay_out(count, p.dim, rows);
    Arena arena{workspace.reserve(count.used), 0};
    buffers.lay_out(arena, p.dim, rows);
    auto backward = [&](int64_t i) {
      return Backward<Units, T>{p, p.items[i / p.heads_k], int(i % p.heads_k), buffers, is_trivial};
    };
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < total; ++i) backward(i).run(backward(i + p.threads < total ? i + p.threads : i));
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < sums; ++i)
      if (p.parts[i / p.heads] > 1) add_parts<T>(p, i / p.heads, i % p.heads);
  };
  if (p.threads == 1) return work();  // a team of one would wake others at each of its barriers
#pragma omp parallel num_threads(p.threads)
  work();
}

}  // namespace

void attention_backward(const AttentionParams& p) {
  if (p.dtype == DType::f32) return backward_all<FloatUnits, float>(p);
#if defined(__AVX512BF16__)
  backward_all<PairUnits, bf16>(p);
#else
  backward_all<FloatUnits, bf16>(p);
#endif
}

}  // namespace MMFAST_ISA
}  // namespace mmfast
