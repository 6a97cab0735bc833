// quantized_mm: the scaled product of the codes of two float matrices.
#pragma once
#include <memory>
#include <new>

#include "quantize.h"
#include "scaled_mm.h"

namespace lowp {

// A float matrix and how its codes are made.
struct QuantizedOperand {
  const void* data;  // contiguous
  Float type;
  Granularity granularity;
  Rounding rounding;
  uint32_t role;  // of its draws
};

struct QuantizedMmArgs {
  QuantizedOperand a;  // [M, K], by row or tensor
  QuantizedOperand b;  // [N, K], by row or tensor; or turned, [K, N], by column or tensor
  int64_t M, N, K;
  bool b_is_turned;
  uint64_t seed;
  uint32_t step, tensor;
  int8_t* a_col_codes;  // [K, M]: a's codes by column, for a product to come
  float* a_col_scale;   // [K], or null where none is to come
  uint32_t a_col_role;
  Epilogue epilogue;
  int threads;
};

namespace cpu {

// Codes and scales that are gone after the product.
class TemporaryCodes {
 public:
  TemporaryCodes(int64_t numel, int64_t scales)
      : codes_(static_cast<int8_t*>(operator new(static_cast<size_t>(numel), kAlign))),
        scale_(new float[static_cast<size_t>(scales)]) {}
  int8_t* codes() const { return codes_.get(); }
  float* scale() const { return scale_.get(); }

 private:
  static constexpr std::align_val_t kAlign{64};  // stores past the caches want whole lines
  struct Free {
    void operator()(void* p) const { operator delete(p, kAlign); }
  };
  std::unique_ptr<int8_t, Free> codes_;
  std::unique_ptr<float[]> scale_;
};

inline void quantized_mm(const QuantizedMmArgs& p) {
  const QuantizedOperand &a = p.a, &b = p.b;
  const auto key_of = [&](uint32_t role) { return PhiloxKey{p.seed, p.step, p.tensor, role}; };
  const TemporaryCodes left(p.M * p.K, p.M + 1), right(p.N * p.K, p.N + 1);
  if (p.a_col_scale != nullptr) {
    quantize_row_col({a.data, a.type, p.M, p.K, a.rounding, key_of(a.role), key_of(p.a_col_role), 0,
                      left.codes(), left.scale(), p.a_col_codes, p.a_col_scale, p.threads});
  } else {
    quantize({a.data, a.type, p.M, p.K, a.granularity, 0, a.rounding, key_of(a.role), 0,
              left.codes(), left.scale(), p.threads});
  }
  const int64_t b_rows = p.b_is_turned ? p.K : p.N, b_cols = p.b_is_turned ? p.N : p.K;
  quantize({b.data, b.type, b_rows, b_cols, b.granularity, 0, b.rounding, key_of(b.role), 0,
            right.codes(), right.scale(), p.threads});
  const auto stride_of = [](Granularity g) { return int64_t{g == Granularity::tensor ? 0 : 1}; };
  scaled_mm({left.codes(), p.K, 1, right.codes(), p.b_is_turned ? 1 : p.K, p.b_is_turned ? p.N : 1,
             p.M, p.N, p.K, left.scale(), stride_of(a.granularity), right.scale(),
             stride_of(b.granularity), p.epilogue, p.threads});
}

}  // namespace cpu
}  // namespace lowp
