#define LOWP_INLINE_DIVISION
#include "cuda/products.h"
#include "cuda/wgmma.h"

namespace lowp {
namespace cuda {

bool wgmma_scaled_mm(const Place& place, const ScaledMmArgs& p) {
  const WgmmaOperand a{p.a, p.a_row_stride}, b{p.b, p.b_row_stride};
  if (!wgmma_takes_sizes(p.M, p.N, p.K) || !wgmma_takes(a.data, a.line, 1) ||
      !wgmma_takes(b.data, b.line, 1)) {
    return false;
  }
  const Finish finish{p.epilogue, p.N, p.row_scale, p.row_scale_stride, p.col_scale,
                      p.col_scale_stride, rows_aligned(p.epilogue, p.N)};
  launch_wgmma_tile<int8_t, int32_t, true, true>("scaled_mm", place, a, b, static_cast<int>(p.M),
                                                 static_cast<int>(p.N), static_cast<int>(p.K),
                                                 finish);
  return true;
}

}  // namespace cuda
}  // namespace lowp
