// The kernels of a product, and which of them takes it: wgmma on sm_90a where its copy engine can
// read the operands, else mma.sync.
#pragma once
#include "cuda/ops.h"

namespace lowp {
namespace cuda {

// Whether a product can sum a's rows on its way: where the rows of both operands are adjacent, as
// wgrad's are. Only then `row_sums` may be other than null.
static inline bool can_sum_rows(const ProductArgs& p) {
  return p.a.k_stride != 1 && p.b.k_stride != 1;
}

// True once it has been launched; false: it cannot take the operands.
bool wgmma_bf16(const Place& place, const ProductArgs& p, float* row_sums);
bool wgmma_fp16(const Place& place, const ProductArgs& p, float* row_sums);
bool wgmma_scaled_mm(const Place& place, const ScaledMmArgs& p);

void mma_product(const Place& place, const ProductArgs& p, float* row_sums);
void mma_scaled_mm(const Place& place, const ScaledMmArgs& p);

}  // namespace cuda
}  // namespace lowp
