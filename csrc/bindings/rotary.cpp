#include "cpu/rotary.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "bindings/binding.h"
#include "mmfast/layout.h"

namespace mmfast {
namespace {

void check_heads(const char* name, const TensorView& t, DType dtype, int64_t rows, int64_t heads,
                 int64_t dim) {
  check_tensor("rotary", name, t, dtype, 3);
  check_size("rotary", name, t, 0, rows);
  check_size("rotary", name, t, 1, heads);
  check_size("rotary", name, t, 2, dim);
  check_last_contiguous("rotary", name, t);
}

const float* check_weight(const char* name, const TensorView& t, int64_t dim) {
  if (!t.present()) return nullptr;
  check_tensor("rotary", name, t, DType::f32, 1);
  check_size("rotary", name, t, 0, dim);
  check_contiguous("rotary", name, t);
  return t.ptr<float>();
}

// One call turns one or two tensors that share a layout. Without grads it is the forward pass.
void rotary_binding(const std::vector<TensorView>& x, const std::vector<TensorView>& grads,
                    const std::vector<TensorView>& out, const std::vector<TensorView>& weights,
                    const std::vector<TensorView>& dweights, const TensorView& cu_seqlens,
                    const TensorView& seqused, const TensorView& start, const TensorView& position,
                    double base, const std::vector<int64_t>& sections, bool norm, double eps,
                    bool interleaved) {
  const char* op = "rotary";
  const size_t sides = x.size();
  const bool backward = !grads.empty();
  check(sides >= 1 && sides <= 2 && out.size() == sides && weights.size() == sides &&
            (!backward || (grads.size() == sides && dweights.size() == sides)),
        op, ": expected one or two tensors");
  check(x[0].ndim == 3, op, ": q and k must be [T, H, D]");
  RotaryParams p{};
  p.dtype = x[0].dtype;
  p.rows = x[0].size[0];
  p.dim = x[0].size[2];
  check(p.dtype == DType::f32 || p.dtype == DType::bf16, op, ": dtype ", name_of(p.dtype),
        "; expected float32 or bfloat16");
  check(p.dim >= 2 && p.dim % 2 == 0, op, ": D is ", p.dim, "; it must be even");
  check(base > 0, op, ": base is ", base, "; it must be positive");
  int64_t bytes = 0;
  p.sides = int(sides);
  for (size_t i = 0; i < sides; ++i) {
    RotarySide& side = p.side[i];
    side.heads = x[i].size[1];
    check_heads("x", x[i], p.dtype, p.rows, side.heads, p.dim);
    check_heads("out", out[i], p.dtype, p.rows, side.heads, p.dim);
    check_contiguous(op, "out", out[i]);
    side.x = x[i].data;
    side.out = out[i].data;
    side.weight = check_weight("weight", weights[i], p.dim);
    for (int d = 0; d < 2; ++d) side.x_stride[d] = x[i].stride[d];
    if (backward) {
      check_heads("the gradient", grads[i], p.dtype, p.rows, side.heads, p.dim);
      side.grad = grads[i].data;
      for (int d = 0; d < 2; ++d) side.grad_stride[d] = grads[i].stride[d];
      side.dweight = const_cast<float*>(check_weight("the gradient of weight", dweights[i], p.dim));
    }
    bytes += p.rows * side.heads * p.dim * (p.dtype == DType::f32 ? 4 : 2);
  }

  const LayoutView layout =
      check_layout(op, "", p.rows, cu_seqlens, seqused, TensorView{}, TensorView{}, start);
  const int64_t half = p.dim / 2;
  check(sections.size() >= 1 && sections.size() <= 3, op, ": sections must hold 1 to 3 numbers");
  int64_t total = 0;
  p.axes = int(sections.size());
  for (int a = 0; a < p.axes; ++a) {
    check(sections[a] >= 0, op, ": sections must not be negative");
    total += sections[a];
  }
  check(total == half, op, ": sections add up to ", total, "; expected D / 2 = ", half);
  std::vector<uint8_t> inside(size_t(p.rows), 0);
  std::vector<int32_t> own;
  if (position.present()) {
    check_tensor(op, "position", position, DType::i32, 2);
    check_size(op, "position", position, 0, p.rows);
    check_size(op, "position", position, 1, p.axes);
    check_contiguous(op, "position", position);
    p.position = position.ptr<int32_t>();
  } else {
    own.resize(size_t(p.rows * p.axes));
    p.position = own.data();
  }
  for (int64_t b = 0; b < layout.batch; ++b) {
    for (int64_t i = 0; i < layout.length(b); ++i) {
      const int64_t t = layout.begin(b) + i;
      inside[size_t(t)] = 1;
      for (int a = 0; a < p.axes && !own.empty(); ++a)
        own[size_t(t * p.axes + a)] = int32_t(layout.first_position(b) + i);
    }
  }
  p.inside = inside.data();
  std::vector<double> frequency(size_t(3 * half), 0.0);
  for (int64_t j = 0, a = 0, end = sections[0]; j < half; ++j) {
    while (j == end) end += sections[size_t(++a)];
    frequency[size_t(a * half + j)] =
        std::pow(base, -2.0 * double(j) / double(p.dim)) * (2 / 3.141592653589793);
  }
  p.frequency = frequency.data();
  p.norm = norm;
  p.eps = float(eps);
  p.interleaved = interleaved;
  p.stream = bytes > streamed_bytes();
  p.threads = int(std::min<int64_t>(num_threads(), bytes / (64 << 10) + 1));
  py::gil_scoped_release nogil;
  backward ? rotary_backward(p) : rotary_forward(p);
}

}  // namespace

void bind_rotary(py::module_& m) {
  m.def("rotary", &rotary_binding);
}

}  // namespace mmfast
