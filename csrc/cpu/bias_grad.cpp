#include "bias_grad.h"

#include "cpu/codes.h"
#include "cpu/parallel.h"

namespace lowp {
namespace LOWP_ISA {

// Sums of 64 rows first, then the sum of those: an error of (64 + M/64) 2^-24 instead of M 2^-24.
template <class Element>
static void sum_columns(const BiasGradArgs& a) {
  constexpr int64_t kGroup = 64;
  parallel_for(a.N, 128, a.threads, [&](int64_t begin, int64_t end) {
    float group[kRun];
    for (int64_t n = begin; n < end; n += kRun) {
      const int cols = static_cast<int>(end - n < kRun ? end - n : kRun);
      for (int j = 0; j < cols; ++j) a.db[n + j] = 0.0f;
      for (int64_t m = 0; m < a.M; m += kGroup) {
        const int64_t last = m + kGroup < a.M ? m + kGroup : a.M;
        for (int j = 0; j < cols; ++j) group[j] = 0.0f;
        for (int64_t i = m; i < last; ++i) {
          const auto* row = static_cast<const typename Element::Stored*>(a.dy) + i * a.N + n;
          for (int j = 0; j < cols; ++j) group[j] += Element::value(row[j]);
        }
        for (int j = 0; j < cols; ++j) a.db[n + j] += group[j];
      }
    }
  });
}

void bias_grad(const BiasGradArgs& a) {
  with_element(a.dy_type, [&](auto element) { sum_columns<decltype(element)>(a); });
}

}  // namespace LOWP_ISA
}  // namespace lowp
