// Scores of a panel of columns: statistics, losses and gradients from the products of rows. Formulas:
// mmfast/reference/contrastive.py.
#pragma once
#include <cmath>

#include "cpu/attention_gemm.h"
#include "mmfast/contrastive.h"

namespace mmfast {
namespace MMFAST_ISA {
namespace {

constexpr float kMasked = -3e38f;  // finite, so that differences of masked scores are numbers
constexpr float kInfinite = __builtin_inff();
constexpr int kPanelVecs = kPanel / kLanes;

MMFAST_INLINE int64_t min64(int64_t a, int64_t b) {
  return a < b ? a : b;
}

struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

// log(1 + t) for t in [0, 1]; relative error 2e-7, so that small t stay what they are.
MMFAST_INLINE vf log1p_unit(vf t) {
  vf p = splat(5.23269409e-3f);
  p = p * t + splat(-2.95052398e-2f);
  p = p * t + splat(7.82259554e-2f);
  p = p * t + splat(-1.36632457e-1f);
  p = p * t + splat(1.91060066e-1f);
  p = p * t + splat(-2.48429820e-1f);
  p = p * t + splat(3.33190978e-1f);
  p = p * t + splat(-4.99994934e-1f);
  p = p * t + splat(9.99999940e-1f);
  return p * t;
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

// Statistics of rows and of columns of factor * s, s [rows][64].
void statistics(const float* s, float factor, int64_t rows, Online* row, Online* column) {
  const vf f = splat(factor);
  vf peaks[kPanelVecs];
  for (vf& peak : peaks) peak = splat(kMasked);
  for (int64_t r = 0; r < rows; ++r) {
    vf value[kPanelVecs];
    for (int v = 0; v < kPanelVecs; ++v) {
      value[v] = load(s + r * kPanel + v * kLanes) * f;
      peaks[v] = vmax(peaks[v], value[v]);
    }
    vf peak = value[0];
    for (int v = 1; v < kPanelVecs; ++v) peak = vmax(peak, value[v]);
    const vf next = join(row[r], peak);
    for (int v = 0; v < kPanelVecs; ++v) row[r].total += exp_approx(value[v] - next);
  }
  for (int v = 0; v < kPanelVecs; ++v) {
    const vf next = join(column[v], peaks[v]);
    vf total = splat(0.0f);
    for (int64_t r = 0; r < rows; ++r) total += exp_approx(load(s + r * kPanel + v * kLanes) * f - next);
    column[v].total += total;
  }
}

// -log sigmoid(z) of positive pairs, -log sigmoid(-z) of the others, of one vector.
MMFAST_INLINE vf sigmoid_cost(vf z, vf e) {
  return vmax(splat(0.0f), z) + log1p_unit(e);
}

void sigmoid_losses(const ContrastiveParams& p, const Columns& at, const float* s, int64_t first,
                    int64_t rows, Online* row) {
  for (int64_t r = 0; r < rows; ++r) {
    const int positive = at.positive(p, first + r);
    for (int v = 0; v < kPanelVecs; ++v) {
      const vf z = load(s + r * kPanel + v * kLanes) * splat(p.scale) + splat(p.bias);
      const vf cost = sigmoid_cost(select(at.index(v) == positive, -z, z), exp_approx(-vabs(z)));
      row[r].total += at.needs_mask() ? select(at.counts(p, first + r, v), cost, splat(0.0f)) : cost;
    }
  }
}

// Logarithm of the sum of partial statistics (peak, total) at a given stride.
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

struct Totals {
  double dscale = 0, dbias = 0, loss = 0;
};

// What the gradients of a panel's scores need of its columns.
struct ColumnTerms {
  vf log[kPanelVecs], up[kPanelVecs];  // log-sum-exp and its gradient

  ColumnTerms(const ContrastiveParams& p, const Columns& at) {
    if (p.sigmoid) return;
    float logs[kPanel], ups[kPanel];
    for (int k = 0; k < kPanel; ++k) {
      logs[k] = k < at.valid ? p.column[at.begin + k] : -kMasked;
      ups[k] = k < at.valid ? p.grad_column[at.begin + k] : 0.0f;
    }
    for (int v = 0; v < kPanelVecs; ++v) {
      log[v] = load(logs + v * kLanes);
      up[v] = load(ups + v * kLanes);
    }
  }
};

// And of a row. Copies, as the compiler must take every store for a change of p.
struct RowTerms {
  vf log, up, scale, bias;

  RowTerms(const ContrastiveParams& p, int64_t i)
      : log(splat(p.sigmoid ? 0.0f : p.row[i])),
        up(splat(p.grad_row[i])),
        scale(splat(p.scale)),
        bias(splat(p.bias)) {}
};

struct Sums {
  vf scale = {}, bias = {}, loss = {};
};

// Gradient of the products s of row i with vector v of a panel; `special`: some pair of the panel is positive
// or does not count. Adds to the sums over pairs.
template <bool sigmoid, bool special>
MMFAST_INLINE vf score_gradient(const ContrastiveParams& p, const Columns& at, const ColumnTerms& columns,
                                const RowTerms& row, int64_t i, int v, vf s, Sums& sums) {
  const vi positive = special ? at.index(v) == at.positive(p, i) : vi{};
  const vf z = s * row.scale + row.bias;
  vf g, cost = {};
  if constexpr (sigmoid) {
    const vf e = exp_approx(-vabs(z));
    const vf large = splat(1.0f) / (splat(1.0f) + e), small = e * large;
    const vi above = z > splat(0.0f);
    g = select(above, large, small);
    if constexpr (special) g = select(positive, -select(above, small, large), g);
    g *= row.up;
    cost = row.up * sigmoid_cost(special ? select(positive, -z, z) : z, e);
  } else {
    g = row.up * exp_approx(z - row.log) + columns.up[v] * exp_approx(z - columns.log[v]);
    if constexpr (special) g += select(positive, splat(p.grad_diagonal[i]), splat(0.0f));
  }
  if constexpr (special) {
    const vi counts = at.counts(p, i, v);
    g = select(counts, g, splat(0.0f));
    s = select(counts, s, splat(0.0f));  // products of columns that do not exist are not written
    cost = select(counts, cost, splat(0.0f));
  }
  sums.scale += g * s;
  sums.bias += g;
  sums.loss += cost;
  return g * row.scale;
}

// Gradients of a block of products, in the forms that the two products with them read.
template <class Units>
struct ScoreGradients {
  using Unit = typename Units::Unit;
  float* s;     // float: [rows][ld]
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

// Some rows of a panel, at its column `column`, from products [rows][64]; row 0 of the block is `first`.
template <class Units, bool sigmoid, bool special>
void gradients_of_rows(const ContrastiveParams& p, const Columns& at, const ColumnTerms& columns,
                       const float* products, const ScoreGradients<Units>& g, Range rows, int64_t first,
                       int64_t column, Totals& totals) {
  constexpr int64_t kAhead = 32;
  Sums sums;
  for (int64_t i = rows.begin; i < rows.end; i += Units::kPack) {
    const int64_t r = i - first;
    const int here = int(min64(Units::kPack, rows.end - i));
    // Kept products come from memory.
    for (int64_t k = 0; k < Units::kPack * kPanel; k += 16)
      __builtin_prefetch(products + (r + kAhead) * kPanel + k, 0, 0);
    const RowTerms terms[] = {RowTerms(p, i), RowTerms(p, i + here - 1)};
    for (int v = 0; v < kPanelVecs; ++v) {
      vf out[Units::kPack] = {};
      for (int k = 0; k < here; ++k)
        out[k] = score_gradient<sigmoid, special>(p, at, columns, terms[k], i + k, v,
                                                  load(products + (r + k) * kPanel + v * kLanes), sums);
      const int64_t c = column + v * kLanes;
      if constexpr (Units::kPack == 1) {
        store(g.s + r * g.ld + c, out[0]);
      } else {
#if defined(__AVX512BF16__)
        const __m256i low = (__m256i)_mm512_cvtneps_pbh((__m512)out[0]);
        const __m256i high = (__m256i)_mm512_cvtneps_pbh((__m512)out[1]);
        _mm256_storeu_si256((__m256i*)(g.pairs + r * (g.ld / 2) + c / 2), low);
        _mm256_storeu_si256((__m256i*)(g.pairs + (r + 1) * (g.ld / 2) + c / 2), high);
        _mm512_storeu_si512(
            g.cross + r / 2 * g.ld + c,
            _mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16)));
#endif
      }
    }
  }
  totals.dscale += sum(sums.scale);
  totals.dbias += sum(sums.bias);
  totals.loss += sum(sums.loss);
}

template <class Units, bool sigmoid>
void gradients_of_panel(const ContrastiveParams& p, const Columns& at, const float* products,
                        const ScoreGradients<Units>& g, Range rows, int64_t column, Totals& totals) {
  constexpr int64_t kFew = 16;  // rows between two sums in double
  const ColumnTerms columns(p, at);
  for (int64_t i = rows.begin; i < rows.end; i += kFew) {
    const Range few{i, min64(i + kFew, rows.end)};
    const bool diagonal = few.begin + p.offset < at.begin + kPanel && few.end + p.offset > at.begin;
    const auto gradients = at.needs_mask() || diagonal ? gradients_of_rows<Units, sigmoid, true>
                                                       : gradients_of_rows<Units, sigmoid, false>;
    gradients(p, at, columns, products, g, few, rows.begin, column, totals);
  }
}

}  // namespace
}  // namespace MMFAST_ISA
}  // namespace mmfast
