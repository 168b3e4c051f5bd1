// torch tensors by their attributes, for the compiled modules.
#include "bindings/binding.h"

namespace mmfast {
namespace {

// The attributes of torch that every call needs, looked up once.
struct Torch {
  PyObject* dtypes[7];
  PyObject* get_num_threads;
  PyObject *data_ptr, *dtype, *shape, *stride, *is_cpu, *is_cuda;

  Torch() {
    py::module_ torch = py::module_::import("torch");
    const char* names[] = {"float32", "float64", "float16", "bfloat16", "uint8", "int32", "int64"};
    for (int i = 0; i < 7; ++i) dtypes[i] = py::object(torch.attr(names[i])).release().ptr();
    get_num_threads = py::object(torch.attr("get_num_threads")).release().ptr();
    data_ptr = PyUnicode_InternFromString("data_ptr");
    dtype = PyUnicode_InternFromString("dtype");
    shape = PyUnicode_InternFromString("shape");
    stride = PyUnicode_InternFromString("stride");
    is_cpu = PyUnicode_InternFromString("is_cpu");
    is_cuda = PyUnicode_InternFromString("is_cuda");
  }
};

const Torch& torch() {
  static const Torch instance;
  return instance;
}

py::object steal(PyObject* object) {
  if (!object) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(object);
}

void read_sizes(const py::object& tuple, int64_t* out, int expected) {
  PyObject* sizes = tuple.ptr();
  check(PyTuple_Check(sizes) && PyTuple_GET_SIZE(sizes) == expected,
        "mmfast: a tensor's sizes and strides disagree");
  for (int i = 0; i < expected; ++i) out[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(sizes, i));
}

}  // namespace

int num_threads() {
  const long n = PyLong_AsLong(steal(PyObject_CallNoArgs(torch().get_num_threads)).ptr());
  return n < 1 ? 1 : int(n);
}

TensorView view_of(py::handle tensor) {
  TensorView view;
  if (tensor.is_none()) return view;
  const Torch& names = torch();
  PyObject* t = tensor.ptr();
  const py::object shape = steal(PyObject_GetAttr(t, names.shape));
  check(PyTuple_Check(shape.ptr()), "mmfast: expected a torch.Tensor or None");
  const Py_ssize_t ndim = PyTuple_GET_SIZE(shape.ptr());
  check(ndim <= TensorView::kMaxDims, "mmfast: a tensor has ", ndim, " dimensions; at most ",
        TensorView::kMaxDims, " are supported");
  view.ndim = int(ndim);
  read_sizes(shape, view.size, view.ndim);
  read_sizes(steal(PyObject_CallMethodNoArgs(t, names.stride)), view.stride, view.ndim);
  const py::object dtype = steal(PyObject_GetAttr(t, names.dtype));
  for (int i = 0; i < 7; ++i) {
    if (dtype.ptr() == names.dtypes[i]) view.dtype = DType(i);
  }
  view.device = steal(PyObject_GetAttr(t, names.is_cpu)).ptr() == Py_True    ? Device::cpu
                : steal(PyObject_GetAttr(t, names.is_cuda)).ptr() == Py_True ? Device::cuda
                                                                             : Device::other;
  view.data = PyLong_AsVoidPtr(steal(PyObject_CallMethodNoArgs(t, names.data_ptr)).ptr());
  if (PyErr_Occurred()) throw py::error_already_set();
  return view;
}

}  // namespace mmfast
