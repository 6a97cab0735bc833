// One operand type's products on sm_90a: the translation units wgmma_bf16.cu and wgmma_fp16.cu
// share this.
#pragma once
#include "cuda/products.h"
#include "cuda/wgmma.h"

namespace lowp {
namespace cuda {

// The layouts of the forward product, of the gradient of its input and of that of its weight.
template <class Element>
bool wgmma_product_of(const Place& place, const ProductArgs& p, float* row_sums) {
  const bool a_along_k = p.a.k_stride == 1, b_along_k = p.b.k_stride == 1;
  const WgmmaOperand a{p.a.data, a_along_k ? p.a.row_stride : p.a.k_stride};
  const WgmmaOperand b{p.b.data, b_along_k ? p.b.row_stride : p.b.k_stride};
  const bool possible = wgmma_takes_sizes(p.M, p.N, p.K) &&
                        wgmma_takes(a.data, a.line, sizeof(Element)) &&
                        wgmma_takes(b.data, b.line, sizeof(Element));
  if (!possible || (!a_along_k && b_along_k)) return false;
  const Finish finish{p.epilogue, p.N, nullptr, 0, nullptr, 0, rows_aligned(p.epilogue, p.N)};
  const int M = static_cast<int>(p.M), N = static_cast<int>(p.N), K = static_cast<int>(p.K);
  if (b_along_k) {
    launch_wgmma_tile<Element, float, true, true>("linear", place, a, b, M, N, K, finish);
  } else if (a_along_k) {
    launch_wgmma_tile<Element, float, true, false>("linear", place, a, b, M, N, K, finish);
  } else if (row_sums == nullptr) {
    launch_wgmma_tile<Element, float, false, false>("linear", place, a, b, M, N, K, finish);
  } else {
    launch_wgmma_tile<Element, float, false, false, true>("linear", place, a, b, M, N, K, finish,
                                                          row_sums);
  }
  return true;
}

}  // namespace cuda
}  // namespace lowp
