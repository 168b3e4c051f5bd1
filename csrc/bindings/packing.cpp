#include "cpu/packing.h"

#include <cstring>
#include <vector>

#include "bindings/binding.h"

namespace mmfast {
namespace {

// One thread per 64 KiB at most: below that starting a thread costs more than it saves.
int threads_for(int64_t bytes) {
  const int64_t useful = bytes / (64 << 10) + 1;
  const int64_t threads = num_threads();
  return int(useful < threads ? useful : threads);
}

void check_rows(const char* op, const char* name, const TensorView& t, DType dtype, int64_t rows,
                int64_t dim) {
  check_tensor(op, name, t, dtype, 2);
  check_size(op, name, t, 0, rows);
  check_size(op, name, t, 1, dim);
  check_last_contiguous(op, name, t);
}

void check_vector(const char* op, const char* name, const TensorView& t, DType dtype, int64_t size) {
  if (!t.present()) return;
  check_tensor(op, name, t, dtype, 1);
  check_size(op, name, t, 0, size);
  check_contiguous(op, name, t);
}

struct PackArguments {
  TensorView source, modality, position, type, weight, bias;
  std::vector<TensorView> tables;
  std::vector<int64_t> table_first;  // tables[table_first[m]:table_first[m + 1]] belong to part m
  std::vector<std::string> names;
  int norm;
};

// What forward and backward share: everything but tokens, x and gradients.
PackParams shared_params(const char* op, const PackArguments& a, DType dtype, int64_t rows, int64_t dim,
                         const std::vector<int64_t>& sizes) {
  PackParams p{};
  p.dtype = dtype;
  p.param_dtype = dtype;
  for (const TensorView* t : {&a.type, &a.weight, &a.bias})
    if (t->present()) p.param_dtype = t->dtype;
  for (const TensorView& t : a.tables) p.param_dtype = t.dtype;
  check(dtype == DType::f32 || dtype == DType::bf16, op, ": tokens have dtype ", name_of(dtype),
        "; expected float32 or bfloat16");
  check(p.param_dtype == dtype || p.param_dtype == DType::f32, op, ": embeddings and norm have dtype ",
        name_of(p.param_dtype), "; expected the tokens' dtype or float32");
  const int64_t parts = int64_t(sizes.size());
  check(parts >= 1 && parts <= PackParams::kMaxParts && int64_t(a.names.size()) == parts &&
            int64_t(a.table_first.size()) == parts + 1,
        op, ": expected 1 to ", PackParams::kMaxParts, " parts with a name each, got ", parts);
  check(a.norm >= 0 && a.norm <= 2, op, ": unknown norm");
  p.rows = rows;
  p.dim = dim;
  p.parts = int(parts);
  p.norm = Norm(a.norm);
  check_vector(op, "source", a.source, DType::i64, rows);
  check_vector(op, "modality", a.modality, DType::u8, rows);
  check(a.source.present() && a.modality.present(), op, ": source and modality must be given");
  p.source = a.source.ptr<int64_t>();
  p.modality = a.modality.ptr<uint8_t>();
  if (a.position.present()) {
    check_tensor(op, "position", a.position, DType::i32, 2);
    check_size(op, "position", a.position, 0, rows);
    check_contiguous(op, "position", a.position);
    p.position = a.position.ptr<int32_t>();
    p.axes = int(a.position.size[1]);
  }
  if (a.type.present()) {
    check_rows(op, "type_embedding", a.type, p.param_dtype, parts, dim);
    check_contiguous(op, "type_embedding", a.type);
    p.type = a.type.data;
  }
  check_vector(op, "norm's weight", a.weight, p.param_dtype, dim);
  check_vector(op, "norm's bias", a.bias, p.param_dtype, dim);
  p.weight = a.weight.data;
  p.bias = a.bias.data;

  int64_t first = 0;
  for (int64_t m = 0; m < parts; ++m) {
    PackPart& part = p.part[m];
    part.first = first;
    part.rows = sizes[m];
    first += sizes[m];
    const int64_t begin = a.table_first[m], end = a.table_first[m + 1];
    check(begin >= 0 && begin <= end && end <= int64_t(a.tables.size()) && end - begin <= PackPart::kMaxAxes,
          op, ": position_embedding has ", end - begin, " tables for one part; expected at most ",
          PackPart::kMaxAxes);
    part.tables = int(end - begin);
    check(part.tables <= p.axes, op, ": position_embedding[", a.names[m], "] has ", part.tables,
          " tables, but positions have ", p.axes, " axes");
    for (int i = 0; i < part.tables; ++i) {
      const TensorView& table = a.tables[begin + i];
      check_rows(op, "position_embedding", table, p.param_dtype, table.size[0], dim);
      part.table[i] = table.data;
      part.table_stride[i] = table.stride[0];
      part.table_rows[i] = table.size[0];
    }
  }
  check(first == rows, op, ": the parts have ", first, " rows, source has ", rows);
  for (int64_t t = 0; t < rows; ++t) {
    // Comparisons alone: a call of check() for every row takes longer than packing it.
    const int m = p.modality[t];
    if (m >= parts) fail(op, ": modality[", t, "] is ", m, "; expected less than ", parts);
    const PackPart& part = p.part[m];
    if (p.source[t] < part.first || p.source[t] >= part.first + part.rows)
      fail(op, ": source[", t, "] is ", p.source[t], ", outside part ", a.names[m]);
    for (int i = 0; i < part.tables; ++i) {
      const int32_t n = p.position[t * p.axes + i];
      if (n < 0 || n >= part.table_rows[i])
        fail(op, ": position_embedding[", a.names[m], "]: position ", n, " of row ", p.source[t] - part.first,
             " on axis ", i, " is outside the table of ", part.table_rows[i],
             " rows; use a longer table or smaller positions");
    }
  }
  return p;
}

// Fills the layout of a packed batch: each item of `order` (samples, part, item), or by default item b of
// every part in sample b. False where the arguments do not fit together, so that the caller explains it.
bool pack_layout(const std::vector<TensorView>& lengths, const std::vector<int64_t>& sizes,
                 const TensorView& samples, const TensorView& part, const TensorView& item,
                 const TensorView& cu_seqlens, const TensorView& source, const TensorView& place,
                 const TensorView& modality, const TensorView& slot) {
  const char* op = "pack";
  const int64_t parts = int64_t(lengths.size()), batch = cu_seqlens.size[0] - 1, rows = source.size[0];
  check_vector(op, "cu_seqlens", cu_seqlens, DType::i32, batch + 1);
  check_vector(op, "source", source, DType::i64, rows);
  check_vector(op, "place", place, DType::i32, rows);
  check_vector(op, "modality", modality, DType::u8, rows);
  check_vector(op, "slot", slot, DType::i32, rows);
  // Row of the concatenated parts at which an item begins, for all items behind each other.
  std::vector<int64_t> begin{0}, first_item{0};
  for (int64_t p = 0; p < parts; ++p) {
    const TensorView& mine = lengths[p];
    check_vector(op, "item_lengths", mine, mine.dtype == DType::i32 ? DType::i32 : DType::i64, mine.size[0]);
    const int64_t first = begin.back();
    for (int64_t i = 0; i < mine.size[0]; ++i) {
      const int64_t n = mine.dtype == DType::i32 ? mine.ptr<int32_t>()[i] : mine.ptr<int64_t>()[i];
      if (n < 0 || n > sizes[p]) return false;
      begin.push_back(begin.back() + n);
    }
    if (begin.back() - first != sizes[p]) return false;
    first_item.push_back(int64_t(begin.size()) - 1);
  }
  const int64_t items = first_item.back();
  if (begin.back() != rows) return false;
  int64_t row = 0, slots = 0;
  auto add = [&](int64_t p, int64_t i) {
    const int64_t from = begin[first_item[p] + i], n = begin[first_item[p] + i + 1] - from;
    for (int64_t k = 0; k < n; ++k, ++row) {
      source.ptr<int64_t>()[row] = from + k;
      place.ptr<int32_t>()[row] = int32_t(k);
      modality.ptr<uint8_t>()[row] = uint8_t(p);
      slot.ptr<int32_t>()[row] = int32_t(slots);
    }
    ++slots;
  };
  cu_seqlens.ptr<int32_t>()[0] = 0;
  if (!samples.present()) {
    for (int64_t p = 0; p < parts; ++p)
      if (lengths[p].size[0] != batch) return false;
    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t p = 0; p < parts; ++p) add(p, b);
      cu_seqlens.ptr<int32_t>()[b + 1] = int32_t(row);
    }
    return true;
  }
  check_vector(op, "order.samples", samples, DType::i32, batch);
  check_vector(op, "order.part", part, DType::u8, items);
  check_vector(op, "order.item", item, DType::i32, items);
  std::vector<bool> used(size_t(items), false);
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t n = samples.ptr<int32_t>()[b];
    if (n < 0 || n > items - slots) return false;
    for (const int64_t end = slots + n; slots < end;) {
      const int64_t p = part.ptr<uint8_t>()[slots], i = item.ptr<int32_t>()[slots];
      if (p >= parts || i < 0 || i >= lengths[p].size[0] || bool(used[first_item[p] + i])) return false;
      used[first_item[p] + i] = true;
      add(p, i);
    }
    cu_seqlens.ptr<int32_t>()[b + 1] = int32_t(row);
  }
  return slots == items;
}

void pack_forward_binding(const std::vector<TensorView>& tokens, const PackArguments& a, double eps,
                          const TensorView& x, const TensorView& mean, const TensorView& rstd) {
  const char* op = "pack";
  check(!tokens.empty() && x.ndim == 2, op, ": expected at least one part");
  const int64_t rows = x.size[0], dim = x.size[1];
  std::vector<int64_t> sizes;
  for (const TensorView& t : tokens) {
    check_rows(op, "tokens", t, x.dtype, t.size[0], dim);
    sizes.push_back(t.size[0]);
  }
  PackParams p = shared_params(op, a, x.dtype, rows, dim, sizes);
  for (size_t m = 0; m < tokens.size(); ++m) {
    p.part[m].tokens = tokens[m].data;
    p.part[m].stride = tokens[m].stride[0];
  }
  check_rows(op, "x", x, x.dtype, rows, dim);
  check_contiguous(op, "x", x);
  if (p.norm != Norm::none) check_vector(op, "rstd", rstd, DType::f32, rows);
  if (p.norm == Norm::layer) check_vector(op, "mean", mean, DType::f32, rows);
  check((p.norm == Norm::none || rstd.present()) && (p.norm != Norm::layer || mean.present()), op,
        ": statistics are missing");
  p.eps = float(eps);
  p.x = x.data;
  p.mean = mean.ptr<float>();
  p.rstd = rstd.ptr<float>();
  const int64_t bytes = rows * dim * size_of(x.dtype);
  p.stream = bytes > streamed_bytes();
  p.threads = threads_for(bytes);
  py::gil_scoped_release nogil;
  pack_forward(p);
}

void pack_backward_binding(const TensorView& dx, const std::vector<TensorView>& tokens,
                           const PackArguments& a, const TensorView& mean, const TensorView& rstd,
                           const std::vector<TensorView>& dtokens, const TensorView& dtype_embedding,
                           const std::vector<TensorView>& dtables, const TensorView& dweight,
                           const TensorView& dbias, const std::vector<int64_t>& sizes) {
  const char* op = "pack_backward";
  check(dx.present() && dx.ndim == 2, op, ": the gradient of x must be [T, D]");
  const int64_t rows = dx.size[0], dim = dx.size[1];
  PackParams p = shared_params(op, a, dx.dtype, rows, dim, sizes);
  check_rows(op, "the gradient of x", dx, dx.dtype, rows, dim);
  check(dtokens.size() == sizes.size() && dtables.size() == a.tables.size(), op, ": gradients are missing");
  check(p.norm == Norm::none || tokens.size() == sizes.size(), op, ": tokens are missing");
  for (int m = 0; m < p.parts; ++m) {
    PackPart& part = p.part[m];
    if (p.norm != Norm::none) {
      check_rows(op, "tokens", tokens[m], dx.dtype, sizes[m], dim);
      part.tokens = tokens[m].data;
      part.stride = tokens[m].stride[0];
    }
    if (dtokens[m].present()) {
      check_rows(op, "the gradient of tokens", dtokens[m], dx.dtype, sizes[m], dim);
      check_contiguous(op, "the gradient of tokens", dtokens[m]);
      part.dtokens = dtokens[m].data;
    }
    for (int i = 0; i < part.tables; ++i) {
      const TensorView& dtable = dtables[a.table_first[m] + i];
      if (!dtable.present()) continue;
      check_rows(op, "the gradient of position_embedding", dtable, p.param_dtype, part.table_rows[i], dim);
      check_contiguous(op, "the gradient of position_embedding", dtable);
      part.dtable[i] = dtable.data;
    }
  }
  if (p.norm != Norm::none) check_vector(op, "rstd", rstd, DType::f32, rows);
  if (p.norm == Norm::layer) check_vector(op, "mean", mean, DType::f32, rows);
  check((p.norm == Norm::none || rstd.present()) && (p.norm != Norm::layer || mean.present()), op,
        ": statistics are missing");
  if (dtype_embedding.present()) {
    check_rows(op, "the gradient of type_embedding", dtype_embedding, p.param_dtype, p.parts, dim);
    check_contiguous(op, "the gradient of type_embedding", dtype_embedding);
  }
  check_vector(op, "the gradient of norm's weight", dweight, p.param_dtype, dim);
  check_vector(op, "the gradient of norm's bias", dbias, p.param_dtype, dim);
  p.x = dx.data;
  p.x_stride = dx.stride[0];
  p.mean = mean.ptr<float>();
  p.rstd = rstd.ptr<float>();
  p.dtype_embedding = dtype_embedding.data;
  p.dweight = dweight.data;
  p.dbias = dbias.data;
  const int64_t bytes = rows * dim * size_of(dx.dtype);
  p.stream = bytes > streamed_bytes();
  p.threads = threads_for(bytes);
  py::gil_scoped_release nogil;
  pack_backward(p);
}

// Rows of x as bytes: any trailing dimensions, contiguous.
int64_t row_bytes(const char* name, const TensorView& t) {
  check(t.present() && t.device == Device::cpu && t.ndim >= 1, "gather_rows: ", name,
        " must be a CPU tensor [T, ...]");
  int64_t n = 1;
  for (int i = t.ndim - 1; i >= 1; --i) {
    check(t.size[i] == 1 || t.stride[i] == n || t.numel() == 0, "gather_rows: ", name,
          " is not contiguous in its rows");
    n *= t.size[i];
  }
  return n * size_of(t.dtype);
}

void fill_with(std::vector<char>& row, DType dtype, double value) {
  auto repeat = [&](auto typed) {
    for (size_t i = 0; i < row.size(); i += sizeof typed) std::memcpy(&row[i], &typed, sizeof typed);
  };
  switch (dtype) {
    case DType::f32:
      return repeat(float(value));
    case DType::f64:
      return repeat(value);
    case DType::u8:
      return repeat(uint8_t(int64_t(value)));
    case DType::i32:
      return repeat(int32_t(value));
    case DType::i64:
      return repeat(int64_t(value));
    case DType::bf16: {
      const float f = float(value);
      uint32_t bits;
      std::memcpy(&bits, &f, 4);
      const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
      return repeat(uint16_t(nan ? 0x7fc0 : (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16));
    }
    default:
      check(value == 0, "gather_rows: float16 can be filled with zeros only");
      return repeat(uint16_t(0));
  }
}

// out[i] = row index[i] of the concatenation of xs, or value where index[i] is negative.
void gather_binding(const std::vector<TensorView>& xs, const TensorView& index, double value,
                    const TensorView& out) {
  const char* op = "gather_rows";
  GatherParams p{};
  p.bytes = row_bytes("out", out);
  check(out.size[0] <= 1 || out.stride[0] * size_of(out.dtype) == p.bytes, op, ": out is not contiguous");
  check_vector(op, "index", index, DType::i64, out.size[0]);
  check(index.present(), op, ": index must be given");
  std::vector<GatherSource> sources;
  int64_t rows = 0;
  for (const TensorView& x : xs) {
    check(row_bytes("x", x) == p.bytes && x.dtype == out.dtype, op, ": x and out have different rows");
    sources.push_back({x.ptr<char>(), x.stride[0] * size_of(x.dtype), rows});
    rows += x.size[0];
  }
  p.source = sources.data();
  p.sources = int64_t(sources.size());
  p.out = out.ptr<char>();
  p.index = index.ptr<int64_t>();
  p.rows = out.size[0];
  for (int64_t i = 0; i < p.rows; ++i)
    if (p.index[i] >= rows) fail(op, ": index[", i, "] is ", p.index[i], ", but x has ", rows, " rows");
  std::vector<char> fill(size_t(p.bytes));
  fill_with(fill, out.dtype, value);
  p.fill = fill.data();
  p.stream = p.rows * p.bytes > streamed_bytes();
  p.threads = threads_for(p.rows * p.bytes);
  py::gil_scoped_release nogil;
  gather_rows(p);
}

// Row index[i] of the concatenation of outs = x[i], rows that no index names are zero: the inverse index
// first, then a gather into each.
void scatter_binding(const TensorView& x, const TensorView& index, const std::vector<TensorView>& outs) {
  check(x.present() && x.ndim >= 1, "scatter_rows: x must be [T, ...]");
  check_vector("scatter_rows", "index", index, DType::i64, x.size[0]);
  check(index.present(), "scatter_rows: index must be given");
  int64_t rows = 0;
  for (const TensorView& out : outs) {
    check(out.present() && out.ndim >= 1, "scatter_rows: an output must be [T, ...]");
    rows += out.size[0];
  }
  std::vector<int64_t> inverse(size_t(rows), -1);
  for (int64_t i = 0; i < x.size[0]; ++i) {
    const int64_t row = index.ptr<int64_t>()[i];
    if (row >= rows) fail("scatter_rows: index[", i, "] is ", row, ", but the output has ", rows, " rows");
    if (row >= 0) inverse[size_t(row)] = i;
  }
  TensorView view = index;
  view.data = inverse.data();
  view.stride[0] = 1;
  for (const TensorView& out : outs) {
    view.size[0] = out.size[0];
    gather_binding({x}, view, 0, out);
    view.data = view.ptr<int64_t>() + out.size[0];
  }
}

}  // namespace

void bind_packing(py::module_& m) {
  m.def("pack_forward", [](const std::vector<TensorView>& tokens, const TensorView& source,
                           const TensorView& modality, const TensorView& position, const TensorView& type,
                           const std::vector<TensorView>& tables, const std::vector<int64_t>& table_first,
                           const std::vector<std::string>& names, int norm, const TensorView& weight,
                           const TensorView& bias, double eps, const TensorView& x, const TensorView& mean,
                           const TensorView& rstd) {
    pack_forward_binding(tokens,
                         {source, modality, position, type, weight, bias, tables, table_first, names, norm},
                         eps, x, mean, rstd);
  });
  m.def("pack_backward",
        [](const TensorView& dx, const std::vector<TensorView>& tokens, const TensorView& source,
           const TensorView& modality, const TensorView& position, const TensorView& type,
           const std::vector<TensorView>& tables, const std::vector<int64_t>& table_first,
           const std::vector<std::string>& names, int norm, const TensorView& weight, const TensorView& bias,
           const TensorView& mean, const TensorView& rstd, const std::vector<TensorView>& dtokens,
           const TensorView& dtype_embedding, const std::vector<TensorView>& dtables,
           const TensorView& dweight, const TensorView& dbias, const std::vector<int64_t>& sizes) {
          pack_backward_binding(
              dx, tokens, {source, modality, position, type, weight, bias, tables, table_first, names, norm},
              mean, rstd, dtokens, dtype_embedding, dtables, dweight, dbias, sizes);
        });
  m.def("pack_layout", &pack_layout);
  m.def("gather_rows", &gather_binding);
  m.def("scatter_rows", &scatter_binding);
}

}  // namespace mmfast
