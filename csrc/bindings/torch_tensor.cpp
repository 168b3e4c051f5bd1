// torch tensors for the compiled modules: by DLPack's exchange API, which is one call, or by their
// attributes.
#include <algorithm>

#include "bindings/binding.h"

namespace mmfast {
namespace {

// The part that is used of DLPack 1.x's ABI (dlpack.h, DLTensor and DLPackExchangeAPI).
struct DLTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};
struct DLExchange {
  uint32_t major, minor;
  void* before;
  void *allocate, *managed_from_object, *managed_to_object;
  int (*tensor_from_object)(void* object, DLTensor* out);  // borrows, does not synchronise; may be null
  void* current_stream;
};

DType dtype_of(const DLTensor& t) {
  enum { kInt = 0, kUnsigned = 1, kFloat = 2, kBfloat = 4 };
  if (t.lanes != 1) return DType::other;
  switch (t.code * 256 + t.bits) {
    case kFloat * 256 + 32:
      return DType::f32;
    case kFloat * 256 + 64:
      return DType::f64;
    case kFloat * 256 + 16:
      return DType::f16;
    case kBfloat * 256 + 16:
      return DType::bf16;
    case kUnsigned * 256 + 8:
      return DType::u8;
    case kInt * 256 + 32:
      return DType::i32;
    case kInt * 256 + 64:
      return DType::i64;
    default:
      return DType::other;
  }
}

// The attributes of torch that every call needs, looked up once.
struct Torch {
  PyObject* dtypes[7];
  PyObject* get_num_threads;
  PyObject *data_ptr, *dtype, *shape, *stride, *is_cpu, *is_cuda;
  PyTypeObject *tensor, *parameter;
  const DLExchange* exchange = nullptr;  // null where this torch has none

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
    tensor = type_of(torch.attr("Tensor"));
    parameter = type_of(torch.attr("nn").attr("Parameter"));
    const py::object capsule = py::getattr(torch.attr("Tensor"), "__dlpack_c_exchange_api__", py::none());
    if (PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) {
      exchange = static_cast<const DLExchange*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
      if (exchange->major != 1 || !exchange->tensor_from_object) exchange = nullptr;
    }
  }

  static PyTypeObject* type_of(const py::object& type) {
    return reinterpret_cast<PyTypeObject*>(py::object(type).release().ptr());
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

// Whether DLPack describes the tensor. Ordinary ones only: it does not ask a subclass what it is.
bool read_exchange(PyObject* t, TensorView& view) {
  const Torch& names = torch();
  if (!names.exchange || (Py_TYPE(t) != names.tensor && Py_TYPE(t) != names.parameter)) return false;
  DLTensor read;
  if (names.exchange->tensor_from_object(t, &read) != 0) {
    PyErr_Clear();
    return false;
  }
  constexpr int kCpu = 1, kCuda = 2;
  if (read.ndim > TensorView::kMaxDims || (read.device_type != kCpu && read.device_type != kCuda))
    return false;
  view.data = static_cast<char*>(read.data) + read.byte_offset;
  view.dtype = dtype_of(read);
  view.device = read.device_type == kCpu ? Device::cpu : Device::cuda;
  view.ndim = read.ndim;
  std::copy_n(read.shape, read.ndim, view.size);
  std::copy_n(read.strides, read.ndim, view.stride);
  return true;
}

}  // namespace

int num_threads() {
  const long n = PyLong_AsLong(steal(PyObject_CallNoArgs(torch().get_num_threads)).ptr());
  return n < 1 ? 1 : int(n);
}

TensorView view_of(py::handle tensor) {
  TensorView view;
  if (tensor.is_none()) return view;
  PyObject* t = tensor.ptr();
  if (read_exchange(t, view)) return view;
  const Torch& names = torch();
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
