#include "bindings/packing.h"

namespace mmfast {

using packing::Views;

namespace {

void* stream_of(uintptr_t stream) {
  return reinterpret_cast<void*>(stream);
}

void check_indices(const char* op, const char* name, const TensorView& t, DType dtype, int64_t size) {
  check(t.present(), op, ": ", name, " must be given");
  packing::check_vector(op, name, t, dtype, size);
}

void gather(const Views& xs, const TensorView& index, double value, const TensorView& out, uintptr_t stream) {
  const packing::Gathering call(xs, index, value, out);
  py::gil_scoped_release nogil;
  cuda::gather_rows(call.params, stream_of(stream));
}

// inverse[index[i]] = i; other entries stay as they are.
void invert(const TensorView& index, const TensorView& inverse, uintptr_t stream) {
  const char* op = "scatter_rows";
  check_indices(op, "index", index, DType::i64, index.numel());
  check_indices(op, "inverse", inverse, DType::i64, inverse.numel());
  cuda::invert_rows(index.ptr<int64_t>(), index.size[0], inverse.ptr<int64_t>(), inverse.size[0],
                    stream_of(stream));
}

}  // namespace

void bind_packing(py::module_& m) {
  m.def("pack_forward",
        [](const Views& tokens, const TensorView& source, const TensorView& modality,
           const TensorView& position, const TensorView& type, const Views& tables,
           const std::vector<int64_t>& table_first, const std::vector<std::string>& names, int norm,
           const TensorView& weight, const TensorView& bias, double eps, const TensorView& x,
           const TensorView& mean, const TensorView& rstd, uintptr_t stream) {
          const PackParams p = packing::forward_params(
              tokens, {source, modality, position, type, weight, bias, tables, table_first, names, norm}, eps,
              x, mean, rstd);
          py::gil_scoped_release nogil;
          cuda::pack_forward(p, stream_of(stream));
        });
  m.def("pack_threads", &cuda::pack_threads);
  m.def("pack_keys",
        [](const TensorView& dx, const Views& tokens, const TensorView& source, const TensorView& modality,
           const TensorView& position, const TensorView& type, const Views& tables,
           const std::vector<int64_t>& table_first, const std::vector<std::string>& names, int norm,
           const TensorView& weight, const TensorView& bias, const TensorView& mean, const TensorView& rstd,
           const Views& dtokens, const TensorView& dtype_embedding, const Views& dtables,
           const TensorView& dweight, const TensorView& dbias, const std::vector<int64_t>& sizes, int axis,
           const TensorView& key, uintptr_t stream) {
          const PackParams p = packing::backward_params(
              dx, tokens, {source, modality, position, type, weight, bias, tables, table_first, names, norm},
              mean, rstd, {dtokens, dtype_embedding, dtables, dweight, dbias}, sizes);
          check(axis >= 0 && axis < p.axes, "pack_backward: there is no axis ", axis);
          check_indices("pack_backward", "key", key, DType::i32, p.rows);
          cuda::pack_keys(p, axis, key.ptr<int32_t>(), stream_of(stream));
        });
  m.def("pack_backward",
        [](const TensorView& dx, const Views& tokens, const TensorView& source, const TensorView& modality,
           const TensorView& position, const TensorView& type, const Views& tables,
           const std::vector<int64_t>& table_first, const std::vector<std::string>& names, int norm,
           const TensorView& weight, const TensorView& bias, const TensorView& mean, const TensorView& rstd,
           const Views& dtokens, const TensorView& dtype_embedding, const Views& dtables,
           const TensorView& dweight, const TensorView& dbias, const std::vector<int64_t>& sizes, int axis,
           const TensorView& order, const TensorView& key, int32_t chunk_rows, const TensorView& workspace,
           uintptr_t stream) {
          const char* op = "pack_backward";
          const PackParams p = packing::backward_params(
              dx, tokens, {source, modality, position, type, weight, bias, tables, table_first, names, norm},
              mean, rstd, {dtokens, dtype_embedding, dtables, dweight, dbias}, sizes);
          check(axis >= -1 && axis < p.axes && (axis >= 0) == key.present(), op, ": axis ", axis,
                " and key disagree");
          check_indices(op, "order", order, DType::i64, p.rows);
          packing::check_vector(op, "key", key, DType::i32, p.rows);
          const int64_t sums = (p.dweight != nullptr) + (p.dbias != nullptr) +
                               (p.dtype_embedding != nullptr) + 2 * key.present();
          check(chunk_rows >= 1, op, ": chunk_rows is ", chunk_rows, "; expected 1 or more");
          int64_t chunks = 0;
          for (const int64_t rows : sizes) chunks += (rows + chunk_rows - 1) / chunk_rows;
          const int64_t needed = sums * chunks * p.dim;
          check_indices(op, "workspace", workspace, DType::f32, workspace.numel());
          check(workspace.size[0] >= needed, op, ": workspace has ", workspace.size[0], " numbers; expected ",
                needed);
          py::gil_scoped_release nogil;
          cuda::pack_backward(
              p, {axis, order.ptr<int64_t>(), key.ptr<int32_t>(), chunk_rows, workspace.ptr<float>()},
              stream_of(stream));
        });
  m.def("gather_rows", &gather);
  m.def("invert_rows", &invert);
}

}  // namespace mmfast
