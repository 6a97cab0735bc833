#include "cuda/mma.h"
#include "cuda/products.h"

namespace lowp {
namespace cuda {

void mma_scaled_mm(const Place& place, const ScaledMmArgs& p) {
  const auto operand = [&](const int8_t* data, int64_t rows, int64_t stride) {
    return MmaOperand{reinterpret_cast<const char*>(data), rows, p.K, stride, 1,
                      lines_aligned(data, stride, 1)};
  };
  const Finish finish{p.epilogue,
                      p.N,
                      p.row_scale,
                      p.row_scale_stride,
                      p.col_scale,
                      p.col_scale_stride,
                      rows_aligned(p.epilogue, p.N)};
  launch_mma<CodeMma, true, true>("scaled_mm", place,
                                  {operand(p.a, p.M, p.a_row_stride),
                                   operand(p.b, p.N, p.b_row_stride), finish, nullptr, 0, 0});
}

}  // namespace cuda
}  // namespace lowp
