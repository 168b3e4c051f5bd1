#include "bindings/packing.h"

#include "cpu/isa.h"

MMFAST_DECLARE_KERNEL(pack_forward, PackParams)
MMFAST_DECLARE_KERNEL(pack_backward, PackParams)
MMFAST_DECLARE_KERNEL(check_rows, PackRowsParams)
MMFAST_DECLARE_KERNEL(gather_rows, GatherParams)

namespace mmfast {

using packing::Views;

namespace {

// One thread per 64 KiB at most: below that starting a thread costs more than it saves.
int threads_for(int64_t bytes) {
  const int64_t useful = bytes / (64 << 10) + 1;
  const int64_t threads = num_threads();
  return int(useful < threads ? useful : threads);
}

// Fills the layout of a packed batch: each item of `order` (samples, part, item), or by default item b of
// every part in sample b. False where the arguments do not fit together, so that the caller explains it.
bool pack_layout(const std::vector<TensorView>& lengths, const std::vector<int64_t>& sizes,
                 const TensorView& samples, const TensorView& part, const TensorView& item,
                 const TensorView& cu_seqlens, const TensorView& source, const TensorView& place,
                 const TensorView& modality, const TensorView& slot) {
  const char* op = "pack";
  const int64_t parts = int64_t(lengths.size()), batch = cu_seqlens.size[0] - 1, rows = source.size[0];
  packing::check_vector(op, "cu_seqlens", cu_seqlens, DType::i32, batch + 1);
  packing::check_vector(op, "source", source, DType::i64, rows);
  packing::check_vector(op, "place", place, DType::i32, rows);
  packing::check_vector(op, "modality", modality, DType::u8, rows);
  packing::check_vector(op, "slot", slot, DType::i32, rows);
  // Row of the concatenated parts at which an item begins, for all items behind each other.
  std::vector<int64_t> begin{0}, first_item{0};
  for (int64_t p = 0; p < parts; ++p) {
    const TensorView& mine = lengths[p];
    packing::check_vector(op, "item_lengths", mine, mine.dtype == DType::i32 ? DType::i32 : DType::i64,
                          mine.size[0]);
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
    int64_t* source_of = source.ptr<int64_t>() + row;
    int32_t *place_of = place.ptr<int32_t>() + row, *slot_of = slot.ptr<int32_t>() + row;
    std::fill_n(modality.ptr<uint8_t>() + row, n, uint8_t(p));
    for (int64_t k = 0, number = slots; k < n; ++k) {
      source_of[k] = from + k;
      place_of[k] = int32_t(k);
      slot_of[k] = int32_t(number);
    }
    row += n;
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
  packing::check_vector(op, "order.samples", samples, DType::i32, batch);
  packing::check_vector(op, "order.part", part, DType::u8, items);
  packing::check_vector(op, "order.item", item, DType::i32, items);
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

// Fields of the CPU's parameters, for an output of so many bytes.
template <class Params>
void set_threads(Params& p, int64_t bytes) {
  p.stream = bytes > streamed_bytes();
  p.threads = threads_for(bytes);
}

// Says which row of x comes from outside its part, or which position lies outside its table.
[[noreturn]] void refuse_rows(const char* op, const std::vector<std::string>& names, const PackParams& p) {
  for (int64_t t = 0; t < p.rows; ++t) {
    const int m = p.modality[t];
    check(m < p.parts, op, ": modality[", t, "] is ", m, "; expected less than ", p.parts);
    const PackPart& part = p.part[m];
    check(p.source[t] >= part.first && p.source[t] < part.first + part.rows, op, ": source[", t, "] is ",
          p.source[t], ", outside part ", names[m]);
    for (int i = 0; i < part.tables; ++i) {
      const int32_t n = p.position[t * p.axes + i];
      check(n >= 0 && n < part.table_rows[i], op, ": position_embedding[", names[m], "]: position ", n,
            " of row ", p.source[t] - part.first, " on axis ", i, " is outside the table of ",
            part.table_rows[i], " rows; use a longer table or smaller positions");
    }
  }
  fail(op, ": source, modality or position changed during the call");
}

// Runs a kernel after a look at what its rows name.
template <class Kernel>
void run(const char* op, const std::vector<std::string>& names, PackParams& p, Kernel kernel) {
  set_threads(p, p.rows * p.dim * size_of(p.dtype));
  bool valid = true;
  {
    py::gil_scoped_release nogil;
    check_rows({&p, &valid});
    if (valid) kernel(p);
  }
  if (!valid) refuse_rows(op, names, p);
}

// written: bytes of all outputs of the call that this is part of, 0: of this one.
void gather(const Views& xs, const TensorView& index, double value, const TensorView& out,
            int64_t written = 0) {
  packing::Gathering call(xs, index, value, out);
  GatherParams& p = call.params;
  set_threads(p, p.rows * p.bytes);
  p.stream = std::max(written, p.rows * p.bytes) > streamed_bytes();
  py::gil_scoped_release nogil;
  gather_rows(p);
}

// Row index[i] of the concatenation of outs = x[i], rows that no index names are zero: the inverse index
// first, then a gather into each.
void scatter_binding(const TensorView& x, const TensorView& index, const Views& outs) {
  check(x.present() && x.ndim >= 1, "scatter_rows: x must be [T, ...]");
  packing::check_vector("scatter_rows", "index", index, DType::i64, x.size[0]);
  check(index.present(), "scatter_rows: index must be given");
  int64_t rows = 0, bytes = 0;
  for (const TensorView& out : outs) {
    check(out.present() && out.ndim >= 1, "scatter_rows: an output must be [T, ...]");
    rows += out.size[0];
    bytes += out.numel() * size_of(out.dtype);
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
    gather({x}, view, 0, out, bytes);
    view.data = view.ptr<int64_t>() + out.size[0];
  }
}

}  // namespace

void bind_packing(py::module_& m) {
  m.def("pack_forward", [](const Views& tokens, const TensorView& source, const TensorView& modality,
                           const TensorView& position, const TensorView& type, const Views& tables,
                           const std::vector<int64_t>& table_first, const std::vector<std::string>& names,
                           int norm, const TensorView& weight, const TensorView& bias, double eps,
                           const TensorView& x, const TensorView& mean, const TensorView& rstd) {
    PackParams p = packing::forward_params(
        tokens, {source, modality, position, type, weight, bias, tables, table_first, names, norm}, eps, x,
        mean, rstd);
    run("pack", names, p, pack_forward);
  });
  m.def("pack_backward",
        [](const TensorView& dx, const Views& tokens, const TensorView& source, const TensorView& modality,
           const TensorView& position, const TensorView& type, const Views& tables,
           const std::vector<int64_t>& table_first, const std::vector<std::string>& names, int norm,
           const TensorView& weight, const TensorView& bias, const TensorView& mean, const TensorView& rstd,
           const Views& dtokens, const TensorView& dtype_embedding, const Views& dtables,
           const TensorView& dweight, const TensorView& dbias, const std::vector<int64_t>& sizes) {
          PackParams p = packing::backward_params(
              dx, tokens, {source, modality, position, type, weight, bias, tables, table_first, names, norm},
              mean, rstd, {dtokens, dtype_embedding, dtables, dweight, dbias}, sizes);
          run("pack_backward", names, p, pack_backward);
        });
  m.def("pack_layout", &pack_layout);
  m.def("gather_rows", [](const Views& xs, const TensorView& index, double value, const TensorView& out) {
    gather(xs, index, value, out);
  });
  m.def("scatter_rows", &scatter_binding);
}

}  // namespace mmfast
