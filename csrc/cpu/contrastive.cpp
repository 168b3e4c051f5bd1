// Contrastive losses: tiles of scores are made, used and forgotten. Formulas:
// mmfast/reference/contrastive.py.
//
// Rows and columns are cut into `parts` chunks each, by shape alone. Forward: chunk pairs are independent,
// and leave partial statistics that are joined in order. Backward: in turn p, row chunk r meets column chunk
// (r + p) % parts, so that no two pairs of a turn write the same gradient rows. So results do not depend on
// the number of threads.
#include "mmfast/contrastive.h"

#include <cstdlib>

#include "cpu/contrastive_scores.h"
#include "cpu/isa.h"

namespace mmfast {
namespace MMFAST_ISA {
namespace {

constexpr int kForwardRows = 96;    // rows whose scores against a panel stay in the first cache
constexpr int kBackwardRows = 256;  // rows and columns of a backward block
constexpr int kBackwardColumns = 512;
constexpr int64_t kPad = 16;  // keeps rows of scores off one set of the cache

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

// What the next tile reads: it may come from the third cache, later than a tile can wait.
template <class Unit>
MMFAST_INLINE void fetch_rows(const Unit* rows, int64_t stride, int64_t count, int64_t size) {
  for (int64_t r = 0; r < min64(kRows, count); ++r)
    for (int64_t k = 0; k < size; k += 16) __builtin_prefetch(rows + r * stride + k);
}

// out [rows][ld], 64 columns from b: products of rows with one panel.
template <class Units>
void multiply_panel(int64_t rows, int columns, const typename Units::Unit* a, int64_t a_row, int64_t a_step,
                    const typename Units::Unit* panel, int64_t units, float* out, int64_t ld, Store how) {
  const Epilogue epilogue{how, 1.0f, nullptr};
  const int groups = (columns + kGroup - 1) / kGroup;
  for (int64_t r = 0; r < rows; r += kRows) {
    const int64_t next = r + kRows;
    how == Store::add ? fetch_rows(out + next * ld, ld, rows - next, kPanel)
                      : fetch_rows(a + next * a_row, a_row, rows - next, units);
    multiply<Units>(int(min64(kRows, rows - r)), groups, a + r * a_row, a_row, a_step, panel, units,
                    out + r * ld, ld, epilogue);
  }
}

// Products of the first `kept` rows stay, in whole chunks: panels [kept][64], one behind the other.
bool keeps(const ContrastiveParams& p, Range rows) {
  return rows.end <= p.kept;
}

float* kept_products(const ContrastiveParams& p, int64_t i, int64_t j) {
  return p.products + (j / kPanel * p.kept + i) * kPanel;
}

template <class Units, class T>
void forward_chunk(const ContrastiveParams& p, Range rows, Range columns, float* row_partial,
                   float* column_partial, int64_t parts, typename Units::Unit* panel,
                   typename Units::Unit* pack_scratch, typename Units::Unit* row_scratch, float* scratch,
                   Online* row) {
  const T* x = static_cast<const T*>(p.x);
  const T* y = static_cast<const T*>(p.y);
  const int64_t units = p.dim / Units::kPack;
  const float initial = p.sigmoid ? 0.0f : kMasked;
  for (int64_t r = 0; r < rows.size(); ++r) row[r] = {splat(initial), splat(0.0f)};
  for (int64_t j = columns.begin; j < columns.end; j += kPanel) {
    const Columns at(p, j, columns.end);
    pack_panel<Units>(Rows<T>{y + j * p.dim, p.dim}, at.valid, p.dim, panel, pack_scratch);
    Online column[kPanelVecs];
    for (Online& c : column) c = {splat(kMasked), splat(0.0f)};
    for (int64_t i = rows.begin; i < rows.end; i += kForwardRows) {
      const int64_t n = min64(kForwardRows, rows.end - i);
      const auto* a = as_units<Units, T>(x + i * p.dim, n, p.dim, row_scratch);
      float* s = keeps(p, rows) ? kept_products(p, i, j) : scratch;
      multiply_panel<Units>(n, at.valid, a, units, 1, panel, units, s, kPanel, Store::set);
      for (int64_t r = 0; r < n && keeps(p, rows) && at.valid <= kPanel - kGroup; ++r)
        std::memset(s + r * kPanel + at.valid, 0, (kPanel - at.valid) * sizeof(float));
      Online* block = row + (i - rows.begin);
      if (p.sigmoid) {
        sigmoid_losses(p, at, s, i, n, block);
        continue;
      }
      for (int64_t r = 0; r < n; ++r) {
        const int positive = at.positive(p, i + r);
        if (positive >= 0) p.diagonal[i + r] = s[r * kPanel + positive] * p.scale;
      }
      if (at.needs_mask()) {
        for (int64_t r = 0; r < n; ++r) {
          for (int v = 0; v < kPanelVecs; ++v) {
            const int64_t k = r * kPanel + v * kLanes;
            store(scratch + k, select(at.counts(p, i + r, v), load(s + k) * splat(p.scale), splat(kMasked)));
          }
        }
      }
      statistics(at.needs_mask() ? scratch : s, at.needs_mask() ? 1.0f : p.scale, n, block, column);
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
    const float log = joined(lanes, kLanes, 2);
    out[0] = log == -kInfinite ? kMasked : log;
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

// Memory of one thread of the backward pass.
template <class Units>
struct BackwardScratch {
  using Unit = typename Units::Unit;
  Unit *y_transposed, *y_rows, *x_rows, *pack, *rows;
  float* products;  // [rows][64]
  ScoreGradients<Units> g;

  explicit BackwardScratch(int64_t dim) {
    const int64_t panels = round_up(dim, kPanel);
    y_transposed = allocate<Unit>(kBackwardColumns * dim);
    y_rows = allocate<Unit>(kBackwardColumns * panels);
    x_rows = allocate<Unit>(kBackwardRows * panels);
    pack = allocate<Unit>(17 * dim);
    rows = allocate<Unit>(kBackwardRows * dim);
    products = allocate<float>(kBackwardRows * kPanel);
    g = {nullptr, nullptr, nullptr, kBackwardColumns + kPad};
    if (Units::kPack == 1) {
      g.s = allocate<float>(kBackwardRows * g.ld);
    } else {
      g.pairs = allocate<Unit>(kBackwardRows * g.ld / 2);
      g.cross = allocate<Unit>(kBackwardRows / 2 * g.ld);
    }
  }
  ~BackwardScratch() {
    void* all[] = {y_transposed, y_rows, x_rows, pack, rows, products, g.s, g.pairs, g.cross};
    for (void* p : all) std::free(p);
  }
};

// n rows as they are, into panels [dim / 64][capacity][64]. A few rows at a time, so that neither side jumps
// about in memory.
template <class Units, class T>
void pack_rows(const T* rows, int64_t n, int64_t dim, int64_t capacity, typename Units::Unit* out) {
  constexpr int64_t kFew = 32;
  for (int64_t i = 0; i < n; i += kFew) {
    for (int64_t d = 0; d < dim; d += kPanel)
      pack_rows_of<Units, T>([&](int64_t k) { return rows + (i + k) * dim + d; }, min64(kFew, n - i),
                             min64(kPanel, dim - d), capacity,
                             out + d * capacity + i / Units::kPack * kPanel);
  }
}

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
  const bool kept = keeps(p, rows);
  for (int64_t j = columns.begin; j < columns.end; j += kBackwardColumns) {
    const Range c{j, min64(j + kBackwardColumns, columns.end)};
    for (int64_t k = c.begin; !kept && k < c.end; k += kPanel)
      pack_panel<Units>(Rows<T>{y + k * p.dim, p.dim}, int(min64(kPanel, c.end - k)), p.dim,
                        w.y_transposed + (k - j) * units, w.pack);
    if (p.dx) pack_rows<Units, T>(y + j * p.dim, c.size(), p.dim, kBackwardColumns / pack, w.y_rows);
    for (int64_t i = rows.begin; i < rows.end; i += kBackwardRows) {
      const Range r{i, min64(i + kBackwardRows, rows.end)};
      const auto* a = kept ? nullptr : as_units<Units, T>(x + i * p.dim, r.size(), p.dim, w.rows);
      for (int64_t k = c.begin; k < c.end; k += kPanel) {
        const Columns at(p, k, c.end);
        if (a)
          multiply_panel<Units>(r.size(), at.valid, a, units, 1, w.y_transposed + (k - j) * units, units,
                                w.products, kPanel, Store::set);
        const auto gradients = p.sigmoid ? gradients_of_panel<Units, true> : gradients_of_panel<Units, false>;
        gradients(p, at, a ? w.products : kept_products(p, i, k), w.g, r, k - j, totals);
      }
      if (p.dx)
        add_product<Units>(r.size(), w.g.by_row(), row_step, 1, w.y_rows, (c.size() + pack - 1) / pack,
                           kBackwardColumns / pack, p.dim, p.dx + i * p.dim);
      if (p.dy) {
        pack_rows<Units, T>(x + i * p.dim, r.size(), p.dim, kBackwardRows / pack, w.x_rows);
        add_product<Units>(c.size(), w.g.by_column(), 1, w.g.ld, w.x_rows, (r.size() + pack - 1) / pack,
                           kBackwardRows / pack, p.dim, p.dy + j * p.dim);
      }
    }
  }
}

void clear(float* gradient, Range rows, int64_t dim) {
  if (gradient) std::memset(gradient + rows.begin * dim, 0, rows.size() * dim * sizeof(float));
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
        const Range rows = chunk(r, parts, p.n), columns = chunk(c, parts, p.m);
        if (turn == 0) {
          clear(p.dx, rows, p.dim);
          clear(p.dy, columns, p.dim);
        }
        backward_chunk<Units, T>(p, rows, columns, scratch, partial[r * parts + c]);
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
