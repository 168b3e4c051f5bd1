// A packed layout as kernels see it: which rows belong to which sample, with modality and time per row.
#pragma once
#include "mmfast/check.h"
#include "mmfast/tensor_view.h"

namespace mmfast {

struct LayoutView {
  const int32_t* cu_seqlens = nullptr;  // [batch + 1]
  const int32_t* seqused = nullptr;     // [batch], or null: all rows of a sample exist
  const uint8_t* modality = nullptr;    // [total], or null: modality 0 everywhere
  const int32_t* time = nullptr;        // [total], or null: a row's position
  const int32_t* start = nullptr;       // [batch], or null: samples begin at position 0
  int64_t batch = 0;
  int64_t total = 0;

  int64_t begin(int64_t b) const { return cu_seqlens[b]; }
  int64_t length(int64_t b) const { return seqused ? seqused[b] : cu_seqlens[b + 1] - cu_seqlens[b]; }
  int32_t first_position(int64_t b) const { return start ? start[b] : 0; }
};

// Checks what a kernel relies on before it touches memory: dtypes, sizes, and where the host can read them
// the values of cu_seqlens, seqused and modality.
inline LayoutView check_layout(const char* op, const char* side, int64_t total, const TensorView& cu_seqlens,
                               const TensorView& seqused, const TensorView& modality, const TensorView& time,
                               const TensorView& start) {
  const std::string suffix = std::string("_") + side;
  auto field = [&](const char* name, const TensorView& t, DType dtype, int64_t size) {
    if (!t.present()) return;
    const std::string full = name + suffix;
    check_tensor(op, full.c_str(), t, dtype, 1);
    check_size(op, full.c_str(), t, 0, size);
    check_contiguous(op, full.c_str(), t);
  };
  check(cu_seqlens.present() && cu_seqlens.ndim == 1 && cu_seqlens.size[0] >= 1, op, ": cu_seqlens", suffix,
        " must be int32 [B + 1]");
  const int64_t batch = cu_seqlens.size[0] - 1;
  field("cu_seqlens", cu_seqlens, DType::i32, batch + 1);
  field("seqused", seqused, DType::i32, batch);
  field("modality", modality, DType::u8, total);
  field("time", time, DType::i32, total);
  field("start", start, DType::i32, batch);

  LayoutView layout;
  layout.cu_seqlens = cu_seqlens.ptr<int32_t>();
  layout.seqused = seqused.ptr<int32_t>();
  layout.modality = modality.ptr<uint8_t>();
  layout.time = time.ptr<int32_t>();
  layout.start = start.ptr<int32_t>();
  layout.batch = batch;
  layout.total = total;
  if (!kHostReads) return layout;
  check(layout.cu_seqlens[0] >= 0, op, ": cu_seqlens", suffix, "[0] is ", layout.cu_seqlens[0],
        "; expected a row number, usually 0");
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t length = int64_t(layout.cu_seqlens[b + 1]) - layout.cu_seqlens[b];
    check(length >= 0, op, ": cu_seqlens", suffix, " decreases at sample ", b, " (", layout.cu_seqlens[b],
          " to ", layout.cu_seqlens[b + 1], "); it must be the cumulative sum of the lengths");
    check(!layout.seqused || (layout.seqused[b] >= 0 && layout.seqused[b] <= length), op, ": seqused", suffix,
          "[", b, "] is ", layout.seqused ? layout.seqused[b] : 0, "; expected 0 to the sample's length ",
          length);
  }
  check(layout.cu_seqlens[batch] <= total, op, ": cu_seqlens", suffix, " ends at row ",
        layout.cu_seqlens[batch], ", but the tokens have ", total, " rows");
  if (layout.modality) {
    for (int64_t t = 0; t < total; ++t) {
      check(layout.modality[t] < 16, op, ": modality", suffix, "[", t, "] is ", int(layout.modality[t]),
            "; expected at most 15");
    }
  }
  return layout;
}

}  // namespace mmfast
