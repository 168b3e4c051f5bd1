// mmfast._cpu: the CPU kernels behind pybind11.
#include <unistd.h>

#include <cstdlib>
#include <cstring>

#include "bindings/binding.h"
#include "cpu/ceiling.h"
#include "mmfast/mask.h"
#include "mmfast/rng.h"

namespace mmfast {
namespace {

constexpr const char* kIsaNames[] = {"scalar", "avx2", "avx512", "avx512_bf16"};

Isa best_isa() {
#if defined(MMFAST_HAS_AVX512_BF16)
  __builtin_cpu_init();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (avx512 && avx2 && __builtin_cpu_supports("avx512bf16")) return Isa::avx512_bf16;
  if (avx512 && avx2) return Isa::avx512;
  if (avx2) return Isa::avx2;
#endif
  return Isa::scalar;
}

Isa chosen_isa = Isa::scalar;

void set_isa(const std::string& name) {
  for (int i = 0; i < 4; ++i) {
    if (name != kIsaNames[i]) continue;
    check(i <= int(best_isa()), "MMFAST_CPU_ISA: ", name, " cannot run on this machine; the best it has is ",
          kIsaNames[int(best_isa())]);
    chosen_isa = Isa(i);
    return;
  }
  fail("MMFAST_CPU_ISA: ", name, " is unknown; expected scalar, avx2, avx512 or avx512_bf16");
}

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

Isa current_isa() {
  return chosen_isa;
}

int num_threads() {
  const long n = PyLong_AsLong(steal(PyObject_CallNoArgs(torch().get_num_threads)).ptr());
  return n < 1 ? 1 : int(n);
}

int64_t streamed_bytes() {
  static const long cache = sysconf(_SC_LEVEL3_CACHE_SIZE);
  return (cache > 0 ? int64_t(cache) : int64_t(32) << 20) / 2;
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

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "CPU kernels of mmfast";
  chosen_isa = best_isa();
  if (const char* name = std::getenv("MMFAST_CPU_ISA")) {
    if (*name) set_isa(name);
  }
  m.def("isa", [] { return kIsaNames[int(chosen_isa)]; });
  m.def("best_isa", [] { return kIsaNames[int(best_isa())]; });
  m.def("set_isa", &set_isa);
  // For tests: the shared maths of csrc/include against its Python definitions.
  m.def("classify_tile", [](const std::vector<int64_t>& rules, int left, int right,
                            const std::array<int64_t, 5>& q, const std::array<int64_t, 5>& k) {
    Mask mask{};
    for (size_t i = 0; i < rules.size() && i < kMaxModalities; ++i) mask.rules[i] = rules[i];
    mask.window_left = left;
    mask.window_right = right;
    auto summary = [](const std::array<int64_t, 5>& s) {
      return TileSummary{uint32_t(s[0]), int32_t(s[1]), int32_t(s[2]), int32_t(s[3]), int32_t(s[4])};
    };
    return int(classify(mask, summary(q), summary(k)));
  });
  m.def("philox", [](uint64_t seed, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
    const Philox4 r = philox(seed, c0, c1, c2, c3);
    return std::array<uint32_t, 4>{r.x, r.y, r.z, r.w};
  });
  // For benchmarks: does rounds of multiply-adds on registers in every thread, and returns their number.
  m.def("multiply_adds", [](bool bf16, int64_t rounds) {
    double flops = 0;
    CeilingParams params{bf16, rounds, num_threads(), &flops};
    py::gil_scoped_release release;
    multiply_adds(params);
    return flops;
  });
  bind_attention(m);
  bind_rotary(m);
  bind_packing(m);
  bind_perturbation(m);
  bind_contrastive(m);
}

}  // namespace mmfast
