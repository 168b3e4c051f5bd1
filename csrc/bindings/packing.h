// Arguments of packing and gathering, checked and read for the CPU's and the GPU's kernels alike.
#pragma once
#include "mmfast/packing.h"

#include <cmath>
#include <cstring>
#include <vector>

#include "bindings/binding.h"

namespace mmfast {
namespace packing {

using Views = std::vector<TensorView>;

inline void check_rows(const char* op, const char* name, const TensorView& t, DType dtype, int64_t rows,
                       int64_t dim) {
  check_tensor(op, name, t, dtype, 2);
  check_size(op, name, t, 0, rows);
  check_size(op, name, t, 1, dim);
  check_last_contiguous(op, name, t);
}

inline void check_vector(const char* op, const char* name, const TensorView& t, DType dtype, int64_t size) {
  if (!t.present()) return;
  check_tensor(op, name, t, dtype, 1);
  check_size(op, name, t, 0, size);
  check_contiguous(op, name, t);
}

struct PackArguments {
  TensorView source, modality, position, type, weight, bias;
  Views tables;
  std::vector<int64_t> table_first;  // tables[table_first[m]:table_first[m + 1]] belong to part m
  std::vector<std::string> names;
  int norm;
};

// What forward and backward share: everything but tokens, x and gradients.
inline PackParams shared_params(const char* op, const PackArguments& a, DType dtype, int64_t rows,
                                int64_t dim, const std::vector<int64_t>& sizes) {
  PackParams p{};
  p.dtype = dtype;
  p.param_dtype = dtype;
  for (const TensorView* t : {&a.type, &a.weight, &a.bias})
    if (t->present()) p.param_dtype = t->dtype;
  for (const TensorView& t : a.tables) p.param_dtype = t.dtype;
  check(takes(dtype), op, ": tokens have dtype ", name_of(dtype), "; expected ", kDTypes);
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
  return p;
}

inline PackParams forward_params(const Views& tokens, const PackArguments& a, double eps, const TensorView& x,
                                 const TensorView& mean, const TensorView& rstd) {
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
  return p;
}

struct PackGradients {
  Views tokens;
  TensorView type;
  Views tables;
  TensorView weight, bias;
};

inline PackParams backward_params(const TensorView& dx, const Views& tokens, const PackArguments& a,
                                  const TensorView& mean, const TensorView& rstd, const PackGradients& out,
                                  const std::vector<int64_t>& sizes) {
  const char* op = "pack_backward";
  check(dx.present() && dx.ndim == 2, op, ": the gradient of x must be [T, D]");
  const int64_t rows = dx.size[0], dim = dx.size[1];
  PackParams p = shared_params(op, a, dx.dtype, rows, dim, sizes);
  check_rows(op, "the gradient of x", dx, dx.dtype, rows, dim);
  check(out.tokens.size() == sizes.size() && out.tables.size() == a.tables.size(), op,
        ": gradients are missing");
  check(p.norm == Norm::none || tokens.size() == sizes.size(), op, ": tokens are missing");
  for (int m = 0; m < p.parts; ++m) {
    PackPart& part = p.part[m];
    if (p.norm != Norm::none) {
      check_rows(op, "tokens", tokens[m], dx.dtype, sizes[m], dim);
      part.tokens = tokens[m].data;
      part.stride = tokens[m].stride[0];
    }
    if (out.tokens[m].present()) {
      check_rows(op, "the gradient of tokens", out.tokens[m], dx.dtype, sizes[m], dim);
      check_contiguous(op, "the gradient of tokens", out.tokens[m]);
      part.dtokens = out.tokens[m].data;
    }
    for (int i = 0; i < part.tables; ++i) {
      const TensorView& dtable = out.tables[a.table_first[m] + i];
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
  if (out.type.present()) {
    check_rows(op, "the gradient of type_embedding", out.type, p.param_dtype, p.parts, dim);
    check_contiguous(op, "the gradient of type_embedding", out.type);
  }
  check_vector(op, "the gradient of norm's weight", out.weight, p.param_dtype, dim);
  check_vector(op, "the gradient of norm's bias", out.bias, p.param_dtype, dim);
  p.x = dx.data;
  p.x_stride = dx.stride[0];
  p.mean = mean.ptr<float>();
  p.rstd = rstd.ptr<float>();
  p.dtype_embedding = out.type.data;
  p.dweight = out.weight.data;
  p.dbias = out.bias.data;
  return p;
}

// Rows of x as bytes: any trailing dimensions, contiguous.
inline int64_t row_bytes(const char* name, const TensorView& t) {
  check(t.present() && t.ndim >= 1, "gather_rows: ", name, " must be a tensor [T, ...]");
  check_device("gather_rows", name, t);
  int64_t n = 1;
  for (int i = t.ndim - 1; i >= 1; --i) {
    check(t.size[i] == 1 || t.stride[i] == n || t.numel() == 0, "gather_rows: ", name,
          " is not contiguous in its rows");
    n *= t.size[i];
  }
  return n * size_of(t.dtype);
}

// The nearest float16, ties to even.
inline uint16_t half_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint32_t sign = bits >> 16 & 0x8000, rebased = (bits & 0x7fffffffu) - (112u << 23);
  const float magnitude = std::fabs(value);
  if (value != value) return uint16_t(0x7e00);
  if (magnitude >= 65520.0f) return uint16_t(sign | 0x7c00);
  if (magnitude < 0x1p-14f) return uint16_t(sign | uint32_t(std::nearbyint(magnitude * 0x1p24f)));
  return uint16_t(sign | (rebased + 0xfff + (rebased >> 13 & 1)) >> 13);
}

inline void fill_with(std::vector<char>& row, DType dtype, double value) {
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
      return repeat(half_of(float(value)));
  }
}

// out[i] = row index[i] of the concatenation of xs, or value where index[i] is negative.
struct Gathering {
  GatherParams params{};
  std::vector<GatherSource> sources;
  std::vector<char> fill;
  Gathering(const Gathering&) = delete;  // params points into the vectors

  Gathering(const Views& xs, const TensorView& index, double value, const TensorView& out) {
    const char* op = "gather_rows";
    GatherParams& p = params;
    p.bytes = row_bytes("out", out);
    check(out.size[0] <= 1 || out.stride[0] * size_of(out.dtype) == p.bytes, op, ": out is not contiguous");
    check_vector(op, "index", index, DType::i64, out.size[0]);
    check(index.present(), op, ": index must be given");
    for (const TensorView& x : xs) {
      check(row_bytes("x", x) == p.bytes && x.dtype == out.dtype, op, ": x and out have different rows");
      sources.push_back({x.ptr<char>(), x.stride[0] * size_of(x.dtype), p.source_rows});
      p.source_rows += x.size[0];
    }
    p.source = sources.data();
    p.sources = int64_t(sources.size());
    p.out = out.ptr<char>();
    p.index = index.ptr<int64_t>();
    p.rows = out.size[0];
    for (int64_t i = 0; kHostReads && i < p.rows; ++i) {
      if (p.index[i] >= p.source_rows)
        fail(op, ": index[", i, "] is ", p.index[i], ", but x has ", p.source_rows, " rows");
    }
    fill.resize(size_t(p.bytes));
    fill_with(fill, out.dtype, value);
    p.fill = fill.data();
  }
};

}  // namespace packing
}  // namespace mmfast
