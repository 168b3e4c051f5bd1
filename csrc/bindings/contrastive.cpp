#include "mmfast/contrastive.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "bindings/binding.h"
#include "cpu/isa.h"

MMFAST_DECLARE_KERNEL(contrastive_forward, ContrastiveParams)
MMFAST_DECLARE_KERNEL(contrastive_backward, ContrastiveParams)

namespace mmfast {
namespace {

constexpr const char* kOp = "contrastive_loss";

float* vector_of(const char* name, const TensorView& t, int64_t size) {
  if (!t.present()) return nullptr;
  check_tensor(kOp, name, t, DType::f32, 1);
  check_size(kOp, name, t, 0, size);
  check_contiguous(kOp, name, t);
  return t.ptr<float>();
}

float number_of(const char* name, const TensorView& t, float otherwise) {
  if (!t.present()) return otherwise;
  check(t.device == Device::cpu && t.dtype == DType::f32 && t.numel() == 1, kOp, ": ", name,
        " must be one float32 on the CPU");
  return *t.ptr<float>();
}

const int32_t* ids_of(const char* name, const TensorView& t, int64_t size) {
  if (!t.present()) return nullptr;
  check_tensor(kOp, name, t, DType::i32, 1);
  check_size(kOp, name, t, 0, size);
  check_contiguous(kOp, name, t);
  return t.ptr<int32_t>();
}

ContrastiveParams params_of(const TensorView& x, const TensorView& y, const TensorView& scale,
                            const TensorView& bias, const TensorView& ids_x, const TensorView& ids_y,
                            int64_t offset, bool sigmoid) {
  check(x.dtype == DType::f32 || x.dtype == DType::bf16, kOp, ": x has dtype ", name_of(x.dtype),
        "; expected float32 or bfloat16");
  check_tensor(kOp, "x", x, x.dtype, 2);
  check_tensor(kOp, "y", y, x.dtype, 2);
  check_contiguous(kOp, "x", x);
  check_contiguous(kOp, "y", y);
  check_size(kOp, "y", y, 1, x.size[1]);
  check(x.size[1] % 16 == 0, kOp, ": the kernels take features of a multiple of 16, got ", x.size[1]);
  ContrastiveParams p;
  p.x = x.data;
  p.y = y.data;
  p.dtype = x.dtype;
  p.n = x.size[0];
  p.m = y.size[0];
  p.dim = x.size[1];
  p.offset = offset;
  p.ids_x = ids_of("ids", ids_x, p.n);
  p.ids_y = ids_of("ids", ids_y, p.m);
  check(!p.ids_x == !p.ids_y, kOp, ": ids are needed for rows and columns, or for neither");
  p.sigmoid = sigmoid;
  p.scale = number_of("scale", scale, 1.0f);
  p.bias = number_of("bias", bias, 0.0f);
  p.threads = num_threads();
  return p;
}

// [panels, kept rows, 64], or null.
void take_products(ContrastiveParams& p, const TensorView& t) {
  if (!t.present()) return;
  check_tensor(kOp, "products", t, DType::f32, 3);
  check_size(kOp, "products", t, 0, (p.m + 63) / 64);
  check_size(kOp, "products", t, 2, 64);
  check_contiguous(kOp, "products", t);
  check(t.size[1] <= p.n, kOp, ": products has ", t.size[1], " rows; expected at most ", p.n);
  p.products = t.ptr<float>();
  p.kept = t.size[1];
}

// Asks for pages of 2 MiB: clearing as many small ones would cost a tenth of the forward pass.
void want_large_pages(float* data, int64_t count) {
#if defined(__linux__)
  constexpr uintptr_t kPage = 1 << 21;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const uintptr_t end = reinterpret_cast<uintptr_t>(data + count) / kPage * kPage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)count;
#endif
}

}  // namespace

void bind_contrastive(py::module_& m) {
  m.def("contrastive_forward",
        [](const TensorView& x, const TensorView& y, const TensorView& scale, const TensorView& bias,
           const TensorView& ids_x, const TensorView& ids_y, int64_t offset, bool sigmoid,
           const TensorView& row, const TensorView& column, const TensorView& diagonal,
           const TensorView& products) {
          ContrastiveParams p = params_of(x, y, scale, bias, ids_x, ids_y, offset, sigmoid);
          p.row = vector_of("row", row, p.n);
          p.column = vector_of("column", column, p.m);
          p.diagonal = vector_of("diagonal", diagonal, p.n);
          take_products(p, products);
          if (p.products) want_large_pages(p.products, products.numel());
          check(p.row && (sigmoid || (p.column && p.diagonal)), kOp, ": an output is missing");
          if (p.n == 0) return;
          py::gil_scoped_release release;
          contrastive_forward(p);
        });
  m.def("contrastive_backward",
        [](const TensorView& x, const TensorView& y, const TensorView& scale, const TensorView& bias,
           const TensorView& ids_x, const TensorView& ids_y, int64_t offset, bool sigmoid,
           const TensorView& row, const TensorView& column, const TensorView& products,
           const TensorView& grad_row, const TensorView& grad_column, const TensorView& grad_diagonal,
           const TensorView& dx, const TensorView& dy, const TensorView& dscale, const TensorView& dbias,
           const TensorView& loss) {
          ContrastiveParams p = params_of(x, y, scale, bias, ids_x, ids_y, offset, sigmoid);
          p.row = vector_of("row", row, p.n);
          p.column = vector_of("column", column, p.m);
          take_products(p, products);
          p.grad_row = vector_of("grad_row", grad_row, p.n);
          p.grad_column = vector_of("grad_column", grad_column, p.m);
          p.grad_diagonal = vector_of("grad_diagonal", grad_diagonal, p.n);
          check(p.grad_row && (sigmoid || (p.row && p.column && p.grad_column && p.grad_diagonal)), kOp,
                ": a gradient is missing");
          auto gradient = [&](const char* name, const TensorView& t, int64_t rows) -> float* {
            if (!t.present()) return nullptr;
            check_tensor(kOp, name, t, DType::f32, 2);
            check_size(kOp, name, t, 0, rows);
            check_size(kOp, name, t, 1, p.dim);
            check_contiguous(kOp, name, t);
            return t.ptr<float>();
          };
          p.dx = gradient("dx", dx, p.n);
          p.dy = gradient("dy", dy, p.m);
          p.dscale = vector_of("dscale", dscale, 1);
          p.dbias = vector_of("dbias", dbias, 1);
          p.loss = vector_of("loss", loss, 1);
          check(p.dscale && p.dbias, kOp, ": an output is missing");
          if (p.n == 0) return;
          py::gil_scoped_release release;
          contrastive_backward(p);
        });
}

}  // namespace mmfast
