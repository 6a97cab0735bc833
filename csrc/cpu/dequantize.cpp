#include "dequantize.h"

#include "cpu/floats.h"
#include "cpu/parallel.h"

namespace lowp {
namespace LOWP_ISA {
namespace {

constexpr int64_t kGrain = 16384;  // elements

// y[begin .. begin+n): one scale for all (stride 0) or one each (stride 1).
template <int kStride>
void decode(const DequantizeArgs& a, int64_t begin, int n, const float* scale) {
  float y[kRun];
  for (int i = 0; i < n; ++i) y[i] = static_cast<float>(a.codes[begin + i]) * scale[i * kStride];
  store_floats(y, n, a.y_type, a.y, begin);
}

}  // namespace

void dequantize(const DequantizeArgs& a) {
  const bool per_column = a.granularity == Granularity::column;
  const int64_t block = a.granularity == Granularity::block ? a.block : a.cols;
  const int64_t blocks = block > 0 ? (a.cols + block - 1) / block : 0;
  const int64_t grain = a.cols >= kGrain ? 1 : kGrain / (a.cols > 0 ? a.cols : 1);
  parallel_for(a.rows, grain, a.threads, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      for (int64_t b = 0; b < blocks; ++b) {
        const int64_t last = (b + 1) * block < a.cols ? (b + 1) * block : a.cols;
        for (int64_t c = b * block; c < last; c += kRun) {
          const int n = static_cast<int>(last - c < kRun ? last - c : kRun);
          if (per_column) {
            decode<1>(a, r * a.cols + c, n, a.scale + c);
          } else {
            const bool whole = a.granularity == Granularity::tensor;
            decode<0>(a, r * a.cols + c, n, a.scale + (whole ? 0 : r * blocks + b));
          }
        }
      }
    }
  });
}

}  // namespace LOWP_ISA
}  // namespace lowp
