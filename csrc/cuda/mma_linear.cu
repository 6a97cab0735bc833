#include "cuda/mma.h"
#include "cuda/products.h"

namespace lowp {
namespace cuda {
namespace {

MmaOperand operand(const Operand& x, int64_t rows, int64_t depth) {
  const bool along_k = x.k_stride == 1;
  return {static_cast<const char*>(x.data),
          rows,
          depth,
          x.row_stride,
          x.k_stride,
          lines_aligned(x.data, along_k ? x.row_stride : x.k_stride, 2)};
}

template <class Mma>
void multiply(const Place& place, const ProductArgs& p, float* row_sums) {
  const Finish finish{p.epilogue, p.N, nullptr, 0, nullptr, 0, rows_aligned(p.epilogue, p.N)};
  const MmaArgs args{operand(p.a, p.M, p.K), operand(p.b, p.N, p.K), finish, row_sums, 0, 0};
  const bool a = p.a.k_stride == 1, b = p.b.k_stride == 1;
  if (a && b) return launch_mma<Mma, true, true>("linear", place, args);
  if (a) return launch_mma<Mma, true, false>("linear", place, args);
  if (b) return launch_mma<Mma, false, true>("linear", place, args);
  if (row_sums != nullptr) return launch_mma<Mma, false, false, true>("linear", place, args);
  launch_mma<Mma, false, false>("linear", place, args);
}

}  // namespace

void mma_product(const Place& place, const ProductArgs& p, float* row_sums) {
  if (p.a.type == Float::bf16) return multiply<HalfMma<Float::bf16>>(place, p, row_sums);
  multiply<HalfMma<Float::fp16>>(place, p, row_sums);
}

}  // namespace cuda
}  // namespace lowp
