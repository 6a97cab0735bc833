#define LOWP_INLINE_DIVISION
#include "cuda/wgmma_linear.h"

namespace lowp {
namespace cuda {

bool wgmma_bf16(const Place& place, const ProductArgs& p, float* row_sums) {
  return wgmma_product_of<cutlass::bfloat16_t>(place, p, row_sums);
}

}  // namespace cuda
}  // namespace lowp
