// The kernels of a product, and which of them takes it: wgmma on sm_90a where its copy engine can
// read the operands, else mma.sync.
#pragma once
#include "cuda/ops.h"

namespace lowp {
namespace cuda {

// True once it has been launched; false: it cannot take the operands.
bool wgmma_bf16(const Place& place, const ProductArgs& p);
bool wgmma_fp16(const Place& place, const ProductArgs& p);
bool wgmma_scaled_mm(const Place& place, const ScaledMmArgs& p);

// True if it wrote row_sums: where the rows of both operands are adjacent, as wgrad's are.
bool mma_product(const Place& place, const ProductArgs& p, float* row_sums);
void mma_scaled_mm(const Place& place, const ScaledMmArgs& p);

}  // namespace cuda
}  // namespace lowp
