#include "bindings/packing.h"

#include "cpu/isa.h"

MMFAST_DECLARE_KERNEL(pack_forward, PackParams)
MMFAST_DECLARE_KERNEL(pack_backward, PackParams)
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

// Fields of the CPU's parameters, for an output of so many bytes.
template <class Params>
void set_threads(Params& p, int64_t bytes) {
  p.stream = bytes > streamed_bytes();
  p.threads = threads_for(bytes);
}

void gather(const Views& xs, const TensorView& index, double value, const TensorView& out) {
  packing::Gathering call(xs, index, value, out);
  GatherParams& p = call.params;
  set_threads(p, p.rows * p.bytes);
  py::gil_scoped_release nogil;
  gather_rows(p);
}

// Row index[i] of the concatenation of outs = x[i], rows that no index names are zero: the inverse index
// first, then a gather into each.
void scatter_binding(const TensorView& x, const TensorView& index, const Views& outs) {
  check(x.present() && x.ndim >= 1, "scatter_rows: x must be [T, ...]");
  packing::check_vector("scatter_rows", "index", index, DType::i64, x.size[0]);
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
    gather({x}, view, 0, out);
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
    set_threads(p, p.rows * p.dim * size_of(p.dtype));
    py::gil_scoped_release nogil;
    pack_forward(p);
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
          set_threads(p, p.rows * p.dim * size_of(p.dtype));
          py::gil_scoped_release nogil;
          pack_backward(p);
        });
  m.def("gather_rows", &gather);
  m.def("scatter_rows", &scatter_binding);
}

}  // namespace mmfast
