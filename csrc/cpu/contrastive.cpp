// Contrastive losses: tiles of scores are made, used and forgotten. Formulas:
// mmfast/reference/contrastive.py.
//
// Rows and columns are cut into `parts` chunks each, by shape alone. Forward: chunk pairs are independent,
// and leave partial statistics that are joined in order. Backward: in turn p, row chunk r meets column chunk
// (r + p) % parts, so that no two pairs of a turn write the same gradient rows. So results do not depend on
// the number of threads.
#include "mmfast/contrastive.h"

#include <cmath>
#include <cstdlib>

#include "cpu/attention_gemm.h"
#include "cpu/isa.h"

namespace mmfast {
namespace MMFAST_ISA {
namespace {

constexpr int kForwardRows = 96;    // rows whose scores against a panel stay in the first cache
constexpr int kBackwardRows = 256;  // rows and columns of a backward block
constexpr int kBackwardColumns = 512;
constexpr int64_t kPad = 16;       // keeps rows of scores off one set of the cache
constexpr float kMasked = -3e38f;  // finite, so that differences of masked scores are numbers
constexpr float kInfinite = __builtin_inff();
constexpr int kPanelVecs = kPanel / kLanes;

MMFAST_INLINE int64_t min64(int64_t a, int64_t b) {
  return a < b ? a : b;
}

int64_t parts_of(const ContrastiveParams& p) {
  const int64_t larger = p.n > p.m ? p.n : p.m;
  if (larger < 128) return 1;
  return larger < 1024 ? 2 : min64(larger / 512, 16);
}

// Threads that are worth waking for so many products.
int threads_of(const ContrastiveParams& p, int64_t most) {
  const int64_t work = 1 + (p.n * p.m >> 10) * p.dim / 4096;
  return int(min64(min64(p.threads, most), work));
}

struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

// Chunk i of `parts`, of whole panels.
Range chunk(int64_t i, int64_t parts, int64_t total) {
  const int64_t size = round_up((total + parts - 1) / parts, kPanel);
  return {min64(i * size, total), min64((i + 1) * size, total)};
}

// Chunks that are not empty: rounding to panels may leave none for the last ones.
int64_t used_parts(int64_t parts, int64_t total) {
  int64_t used = 0;
  while (used < parts && chunk(used, parts, total).size() > 0) ++used;
  return used;
}

template <typename T>
T* allocate(int64_t count) {
  return static_cast<T*>(std::aligned_alloc(64, round_up((count + kPanel) * int64_t(sizeof(T)), 64)));
}

// log(1 + t) for t in [0, 1] by the series of 2 atanh(t / (2 + t)): exact for small t too.
MMFAST_INLINE vf log1p_unit(vf t) {
  const vf s = t / (t + splat(2.0f)), z = s * s;
  vf p = splat(1.0f / 15);
  p = p * z + splat(1.0f / 13);
  p = p * z + splat(1.0f / 11);
  p = p * z + splat(1.0f / 9);
  p = p * z + splat(1.0f / 7);
  p = p * z + splat(1.0f / 5);
  p = p * z + splat(1.0f / 3);
  p = p * z + splat(1.0f);
  return (s + s) * p;
}

// One panel of columns: which exist, which a row leaves out, which is its positive one.
struct Columns {
  int64_t begin;
  int valid;
  int32_t ids[kPanel];
  bool with_ids;

  Columns(const ContrastiveParams& p, int64_t first, int64_t end) : begin(first) {
    valid = int(min64(kPanel, end - first));
    with_ids = p.ids_x != nullptr;
    if (with_ids) {
      std::memset(ids, 0, sizeof ids);
      std::memcpy(ids, p.ids_y + first, valid * sizeof(int32_t));
    }
  }

  // Column of row i's positive pair in this panel, or -1.
  int positive(const ContrastiveParams& p, int64_t i) const {
    const int64_t column = i + p.offset - begin;
    return column >= 0 && column < valid ? int(column) : -1;
  }

  vi index(int v) const {
    int32_t lane[kLanes];
    for (int i = 0; i < kLanes; ++i) lane[i] = v * kLanes + i;
    vi out;
    std::memcpy(&out, lane, sizeof out);
    return out;
  }

  bool needs_mask() const { return with_ids || valid < kPanel; }

  // All ones where the pair of row i with column v * kLanes + lane counts.
  vi counts(const ContrastiveParams& p, int64_t i, int v) const {
    const vi column = index(v);
    vi keep = column < valid;
    if (with_ids) {
      vi id;
      std::memcpy(&id, ids + v * kLanes, sizeof id);
      keep &= (id != p.ids_x[i]) | (column == positive(p, i));
    }
    return keep;
  }
};

// Rows of x as units: in place, or converted.
template <class Units, class T>
const typename Units::Unit* as_units(const T* rows, int64_t n, int64_t dim, typename Units::Unit* scratch) {
  using Unit = typename Units::Unit;
  if constexpr (sizeof(T) * Units::kPack == sizeof(Unit)) {
    return reinterpret_cast<const Unit*>(rows);
  } else {
    for (int64_t i = 0; i < n; ++i) copy_row(rows + i * dim, dim, scratch + i * dim);
    return scratch;
  }
}

// A panel of n <= 64 rows, transposed. scratch: 17 * dim units.
template <class Units, class T>
void pack_panel(const T* rows, int n, int64_t dim, typename Units::Unit* out, typename Units::Unit* scratch) {
  for (int j = 0; j < n; j += kGroup)
    pack_group<Units, T>([&](int i) { return rows + (j + i) * dim; }, n - j < kGroup ? n - j : kGroup, dim,
                         out + j, scratch);
}

// out [rows][ld], 64 columns from b: products of rows with one panel.
template <class Units>
void multiply_panel(int64_t rows, int columns, const typename Units::Unit* a, int64_t a_row, int64_t a_step,
                    const typename Units::Unit* panel, int64_t units, float* out, int64_t ld, Store how) {
  const Epilogue epilogue{how, 1.0f, nullptr};
  const int groups = (columns + kGroup - 1) / kGroup;
  for (int64_t r = 0; r < rows; r += kRows)
    multiply<Units>(int(min64(kRows, rows - r)), groups, a + r * a_row, a_row, a_step, panel, units,
                    out + r * ld, ld, epilogue);
}

// Online log-sum-exp, per lane.
struct Online {
  vf peak, total;
};

MMFAST_INLINE vf join(Online& s, vf peak) {
  const vf next = vmax(s.peak, peak);
  s.total *= exp_approx(s.peak - next);
  s.peak = next;
  return next;
}

// Row statistics of scores [rows][64], then those of columns.
void statistics(const float* z, int64_t rows, Online* row, Online* column) {
  for (int64_t r = 0; r < rows; ++r) {
    vf value[kPanelVecs];
    for (int v = 0; v < kPanelVecs; ++v) value[v] = load(z + r * kPanel + v * kLanes);
    vf peak = value[0];
    for (int v = 1; v < kPanelVecs; ++v) peak = vmax(peak, value[v]);
    const vf next = join(row[r], peak);
    for (int v = 0; v < kPanelVecs; ++v) row[r].total += exp_approx(value[v] - next);
  }
  for (int v = 0; v < kPanelVecs; ++v) {
    const float* at = z + v * kLanes;
    vf peak = load(at);
    for (int64_t r = 1; r < rows; ++r) peak = vmax(peak, load(at + r * kPanel));
    const vf next = join(column[v], peak);
    vf total = splat(0.0f);
    for (int64_t r = 0; r < rows; ++r) total += exp_approx(load(at + r * kPanel) - next);
    column[v].total += total;
  }
}

// -log sigmoid(z) of positive pairs, -log sigmoid(-z) of the others, summed per row.
void sigmoid_losses(const ContrastiveParams& p, const Columns& columns, const float* z, int64_t first,
                    int64_t rows, Online* row) {
  for (int64_t r = 0; r < rows; ++r) {
    const int positive = columns.positive(p, first + r);
    for (int v = 0; v < kPanelVecs; ++v) {
      vf value = load(z + r * kPanel + v * kLanes);
      value = select(columns.index(v) == positive, -value, value);
      row[r].total += vmax(splat(0.0f), value) + log1p_unit(exp_approx(-vabs(value)));
    }
  }
}

// Log-sum-exp of partial statistics (peak, total) at a given stride.
float joined(const float* partial, int64_t parts, int64_t stride) {
  float peak = kMasked;
  for (int64_t i = 0; i < parts; ++i) {
    const float next = partial[i * stride];
    if (!(next <= peak)) peak = next;  // NaN wins
  }
  double total = 0;
  for (int64_t i = 0; i < parts; ++i)
    total += partial[i * stride + 1] * std::exp(double(partial[i * stride]) - double(peak));
  return peak <= kMasked ? -kInfinite : float(peak + std::log(total));
}

template <class Units, class T>
void forward_chunk(const ContrastiveParams& p, Range rows, Range columns, float* row_partial,
                   float* column_partial, int64_t parts, typename Units::Unit* panel,
                   typename Units::Unit* pack_scratch, typename Units::Unit* row_scratch, float* z,
                   Online* row) {
  const T* x = static_cast<const T*>(p.x);
  const T* y = static_cast<const T*>(p.y);
  const int64_t units = p.dim / Units::kPack;
  const float initial = p.sigmoid ? 0.0f : kMasked;
  for (int64_t r = 0; r < rows.size(); ++r) row[r] = {splat(initial), splat(0.0f)};
  for (int64_t j = columns.begin; j < columns.end; j += kPanel) {
    const Columns at(p, j, columns.end);
    pack_panel<Units, T>(y + j * p.dim, at.valid, p.dim, panel, pack_scratch);
    Online column[kPanelVecs];
    for (Online& c : column) c = {splat(kMasked), splat(0.0f)};
    for (int64_t i = rows.begin; i < rows.end; i += kForwardRows) {
      const int64_t n = min64(kForwardRows, rows.end - i);
      const auto* a = as_units<Units, T>(x + i * p.dim, n, p.dim, row_scratch);
      multiply_panel<Units>(n, at.valid, a, units, 1, panel, units, z, kPanel, Store::set);
      for (int64_t r = 0; r < n; ++r) {
        float* line = z + r * kPanel;
        if (p.products) {
          float* kept = p.products + (i + r) * round_up(p.m, kPanel) + j;
          std::memcpy(kept, line, at.valid * sizeof(float));
          std::memset(kept + at.valid, 0, (kPanel - at.valid) * sizeof(float));
        }
        for (int v = 0; v < kPanelVecs; ++v) {
          vf value = load(line + v * kLanes) * splat(p.scale) + splat(p.bias);
          if (at.needs_mask()) value = select(at.counts(p, i + r, v), value, splat(kMasked));
          store(line + v * kLanes, value);
        }
        const int positive = at.positive(p, i + r);
        if (positive >= 0 && p.diagonal) p.diagonal[i + r] = line[positive];
      }
      Online* block = row + (i - rows.begin);
      p.sigmoid ? sigmoid_losses(p, at, z, i, n, block) : statistics(z, n, block, column);
    }
    if (p.sigmoid) continue;
    for (int k = 0; k < at.valid; ++k) {
      column_partial[(j + k) * 2 * parts] = column[k / kLanes].peak[k % kLanes];
      column_partial[(j + k) * 2 * parts + 1] = column[k / kLanes].total[k % kLanes];
    }
  }
  for (int64_t r = 0; r < rows.size(); ++r) {
    float* out = row_partial + (rows.begin + r) * 2 * parts;
    if (p.sigmoid) {
      out[1] = sum(row[r].total);
      continue;
    }
    float lanes[2 * kLanes];
    for (int k = 0; k < kLanes; ++k) {
      lanes[2 * k] = row[r].peak[k];
      lanes[2 * k + 1] = row[r].total[k];
    }
    const float lse = joined(lanes, kLanes, 2);
    out[0] = lse == -kInfinite ? kMasked : lse;
    out[1] = 1;
  }
}

template <class Units, class T>
void forward(const ContrastiveParams& p) {
  using Unit = typename Units::Unit;
  const int64_t parts = parts_of(p);
  // Per row and per column, one (peak, total) for each chunk it meets.
  float* row_partial = allocate<float>(p.n * 2 * parts);
  float* column_partial = allocate<float>(p.m * 2 * parts);
  const int64_t longest = chunk(0, parts, p.n).size();
#pragma omp parallel num_threads(threads_of(p, parts* parts))
  {
    Unit* panel = allocate<Unit>(p.dim * kPanel);
    Unit* pack_scratch = allocate<Unit>(17 * p.dim);
    Unit* row_scratch = allocate<Unit>(kForwardRows * p.dim);
    float* z = allocate<float>(kForwardRows * kPanel);
    Online* row = allocate<Online>(longest);
#pragma omp for schedule(dynamic, 1)
    for (int64_t item = 0; item < parts * parts; ++item) {
      const int64_t r = item / parts, c = item % parts;
      forward_chunk<Units, T>(p, chunk(r, parts, p.n), chunk(c, parts, p.m), row_partial + 2 * c,
                              column_partial + 2 * r, parts, panel, pack_scratch, row_scratch, z, row);
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < p.n; ++i) {
      const float* partial = row_partial + i * 2 * parts;
      const int64_t used = used_parts(parts, p.m);
      if (p.sigmoid) {
        double total = 0;
        for (int64_t c = 0; c < used; ++c) total += partial[2 * c + 1];
        p.row[i] = float(total);
      } else {
        p.row[i] = joined(partial, used, 2);
      }
    }
    if (!p.sigmoid) {
#pragma omp for schedule(static)
      for (int64_t j = 0; j < p.m; ++j)
        p.column[j] = joined(column_partial + j * 2 * parts, used_parts(parts, p.n), 2);
    }
    std::free(panel);
    std::free(pack_scratch);
    std::free(row_scratch);
    std::free(z);
    std::free(row);
  }
  std::free(row_partial);
  std::free(column_partial);
}

struct Totals {
  double dscale = 0, dbias = 0, loss = 0;
};

// Gradient of the scores of one row against one panel, from the products s. Returns it unscaled.
// Adds the sigmoid loss to `loss` where it is wanted.
MMFAST_INLINE vf score_gradient(const ContrastiveParams& p, const Columns& at, int64_t i, int v, vf s,
                                vf& loss) {
  const vf z = s * splat(p.scale) + splat(p.bias);
  vf g;
  const vi is_positive = at.index(v) == at.positive(p, i);
  if (p.sigmoid) {
    const vf e = exp_approx(-vabs(z)), large = splat(1.0f) / (splat(1.0f) + e), small = e * large;
    const vi up = z > splat(0.0f);
    if (p.loss) {
      vf cost = vmax(splat(0.0f), select(is_positive, -z, z)) + log1p_unit(e);
      if (at.needs_mask()) cost = select(at.counts(p, i, v), cost, splat(0.0f));
      loss += splat(p.grad_row[i]) * cost;
    }
    g = splat(p.grad_row[i]) * select(is_positive, -select(up, small, large), select(up, large, small));
  } else {
    const int64_t j = at.begin + v * kLanes;
    const int left = int(min64(kLanes, at.begin + at.valid - j));
    if (left <= 0) return splat(0.0f);
    const vf lse = left == kLanes ? load(p.column + j) : load_tail(p.column + j, left);
    const vf up = left == kLanes ? load(p.grad_column + j) : load_tail(p.grad_column + j, left);
    g = splat(p.grad_row[i]) * exp_approx(z - splat(p.row[i])) + up * exp_approx(z - lse);
    g += select(is_positive, splat(p.grad_diagonal[i]), splat(0.0f));
  }
  return at.needs_mask() ? select(at.counts(p, i, v), g, splat(0.0f)) : g;
}

// Gradients of a block of scores, in the forms that the two products read.
template <class Units>
struct ScoreGradients {
  using Unit = typename Units::Unit;
  float* s;     // [rows][ld] products, where they are made here; with FloatUnits the gradients
  Unit* pairs;  // bfloat16: [rows][ld / 2], neighbours in a row
  Unit* cross;  // bfloat16: [rows / 2][ld], neighbours in a column
  int64_t ld;

  const Unit* by_row() const {
    if constexpr (Units::kPack == 1) return s;
    return pairs;
  }
  const Unit* by_column() const {
    if constexpr (Units::kPack == 1) return s;
    return cross;
  }
};

template <class Units>
void gradients_of_scores(const ContrastiveParams& p, const ScoreGradients<Units>& g, Range rows,
                         Range columns, Totals& totals) {
  const int64_t stride = p.products ? round_up(p.m, kPanel) : g.ld;
  const float* products = p.products ? p.products + rows.begin * stride + columns.begin : g.s;
  for (int64_t j = columns.begin; j < columns.end; j += kPanel) {
    const Columns at(p, j, columns.end);
    for (int64_t i = rows.begin; i < rows.end; i += Units::kPack) {
      vf scale_sum = splat(0.0f), bias_sum = splat(0.0f), loss_sum = splat(0.0f);
      for (int v = 0; v < kPanelVecs; ++v) {
        const int64_t column = j - columns.begin + v * kLanes;
        vf out[Units::kPack] = {};
        for (int k = 0; k < Units::kPack && i + k < rows.end; ++k) {
          const vf s = load(products + (i + k - rows.begin) * stride + column);
          const vf d = score_gradient(p, at, i + k, v, s, loss_sum);
          // Products of columns that do not exist are not written.
          scale_sum += select((vi)(d != splat(0.0f)), d * s, splat(0.0f));
          bias_sum += d;
          out[k] = d * splat(p.scale);
        }
        const int64_t r = i - rows.begin;
        if constexpr (Units::kPack == 1) {
          store(g.s + r * g.ld + column, out[0]);
        } else {
#if defined(__AVX512BF16__)
          const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)out[0]));
          const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)out[1]));
          _mm512_storeu_si512(g.cross + r / 2 * g.ld + column,
                              _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
          for (int k = 0; k < 2; ++k)
            _mm256_storeu_si256((__m256i*)(g.pairs + (r + k) * (g.ld / 2) + column / 2),
                                (__m256i)_mm512_cvtneps_pbh((__m512)out[k]));
#endif
        }
      }
      totals.dscale += sum(scale_sum);
      totals.dbias += sum(bias_sum);
      if (p.loss) totals.loss += sum(loss_sum);
    }
  }
}

// Memory of one thread of the backward pass.
template <class Units>
struct BackwardScratch {
  using Unit = typename Units::Unit;
  Unit *y_transposed, *y_rows, *x_rows, *pack, *rows;
  ScoreGradients<Units> g;

  explicit BackwardScratch(int64_t dim) {
    const int64_t panels = round_up(dim, kPanel);
    y_transposed = allocate<Unit>(kBackwardColumns * dim);
    y_rows = allocate<Unit>(kBackwardColumns * panels);
    x_rows = allocate<Unit>(kBackwardRows * panels);
    pack = allocate<Unit>(17 * dim);
    rows = allocate<Unit>(kBackwardRows * dim);
    g.ld = kBackwardColumns + kPad;
    g.s = allocate<float>(kBackwardRows * g.ld);
    g.pairs = g.cross = nullptr;
    if (Units::kPack == 2) {
      g.pairs = allocate<Unit>(kBackwardRows * g.ld / 2);
      g.cross = allocate<Unit>(kBackwardRows / 2 * g.ld);
    }
  }
  ~BackwardScratch() {
    void* all[] = {y_transposed, y_rows, x_rows, pack, rows, g.s, g.pairs, g.cross};
    for (void* p : all) std::free(p);
  }
};

// out [rows][dim] += a b, b packed as rows: [dim / 64][capacity][64].
template <class Units>
void add_product(int64_t rows, const typename Units::Unit* a, int64_t a_row, int64_t a_step,
                 const typename Units::Unit* b, int64_t units, int64_t capacity, int64_t dim, float* out) {
  for (int64_t d = 0; d < dim; d += kPanel)
    multiply_panel<Units>(rows, int(min64(kPanel, dim - d)), a, a_row, a_step, b + d * capacity, units,
                          out + d, dim, Store::add);
}

template <class Units, class T>
void backward_chunk(const ContrastiveParams& p, Range rows, Range columns, BackwardScratch<Units>& w,
                    Totals& totals) {
  const T* x = static_cast<const T*>(p.x);
  const T* y = static_cast<const T*>(p.y);
  constexpr int pack = Units::kPack;
  const int64_t units = p.dim / pack, row_step = w.g.ld / pack;
  for (int64_t j = columns.begin; j < columns.end; j += kBackwardColumns) {
    const Range c{j, min64(j + kBackwardColumns, columns.end)};
    for (int64_t k = 0; !p.products && k < c.size(); k += kPanel)
      pack_panel<Units, T>(y + (j + k) * p.dim, int(min64(kPanel, c.size() - k)), p.dim,
                           w.y_transposed + k * units, w.pack);
    if (p.dx)
      pack_rows_of<Units, T>([&](int64_t k) { return y + (j + k) * p.dim; }, c.size(), p.dim,
                             kBackwardColumns / pack, w.y_rows);
    for (int64_t i = rows.begin; i < rows.end; i += kBackwardRows) {
      const Range r{i, min64(i + kBackwardRows, rows.end)};
      const auto* a = p.products ? nullptr : as_units<Units, T>(x + i * p.dim, r.size(), p.dim, w.rows);
      for (int64_t k = 0; a && k < c.size(); k += kPanel)
        multiply_panel<Units>(r.size(), int(min64(kPanel, c.size() - k)), a, units, 1,
                              w.y_transposed + k * units, units, w.g.s + k, w.g.ld, Store::set);
      gradients_of_scores<Units>(p, w.g, r, c, totals);
      if (p.dx)
        add_product<Units>(r.size(), w.g.by_row(), row_step, 1, w.y_rows, (c.size() + pack - 1) / pack,
                           kBackwardColumns / pack, p.dim, p.dx + i * p.dim);
      if (p.dy) {
        pack_rows_of<Units, T>([&](int64_t k) { return x + (i + k) * p.dim; }, r.size(), p.dim,
                               kBackwardRows / pack, w.x_rows);
        add_product<Units>(c.size(), w.g.by_column(), 1, w.g.ld, w.x_rows, (r.size() + pack - 1) / pack,
                           kBackwardRows / pack, p.dim, p.dy + j * p.dim);
      }
    }
  }
}

template <class Units, class T>
void backward(const ContrastiveParams& p) {
  const int64_t parts = parts_of(p);
  Totals* partial = new Totals[parts * parts]();
#pragma omp parallel num_threads(threads_of(p, parts))
  {
    BackwardScratch<Units> scratch(p.dim);
    for (int64_t turn = 0; turn < parts; ++turn) {
#pragma omp for schedule(static)
      for (int64_t r = 0; r < parts; ++r) {
        const int64_t c = (r + turn) % parts;
        backward_chunk<Units, T>(p, chunk(r, parts, p.n), chunk(c, parts, p.m), scratch,
                                 partial[r * parts + c]);
      }
    }
  }
  Totals total;
  for (int64_t i = 0; i < parts * parts; ++i) {
    total.dscale += partial[i].dscale;
    total.dbias += partial[i].dbias;
    total.loss += partial[i].loss;
  }
  *p.dscale = float(total.dscale);
  *p.dbias = float(total.dbias);
  if (p.loss) *p.loss = float(total.loss);
  delete[] partial;
}

}  // namespace

void contrastive_forward(const ContrastiveParams& p) {
  if (p.dtype == DType::f32) return forward<FloatUnits, float>(p);
#if defined(__AVX512BF16__)
  forward<PairUnits, bf16>(p);
#else
  forward<FloatUnits, bf16>(p);
#endif
}

void contrastive_backward(const ContrastiveParams& p) {
  if (p.dtype == DType::f32) return backward<FloatUnits, float>(p);
#if defined(__AVX512BF16__)
  backward<PairUnits, bf16>(p);
#else
  backward<FloatUnits, bf16>(p);
#endif
}

}  // namespace MMFAST_ISA
}  // namespace mmfast
