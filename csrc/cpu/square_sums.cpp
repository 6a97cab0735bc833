#include "square_sums.h"

#include <vector>

#include "cpu/states.h"
#include "cpu/sums.h"

namespace lowp {
namespace LOWP_ISA {

// The sums of runs of kRun elements, added in order.
void square_sums(const SquareSumsArgs& a) {
  std::vector<int64_t> first(static_cast<size_t>(a.count) + 1, 0);  // number of t's first run
  for (int64_t t = 0; t < a.count; ++t) {
    first[t + 1] = first[t] + runs_of(1, a.tensors[t].numel, false);
  }
  std::vector<double> sums(static_cast<size_t>(first[a.count]));
  const auto shape_of = [&](int64_t t) { return Shape{1, a.tensors[t].numel, false}; };
  for_each_run_of(a.count, shape_of, a.threads, [&](int64_t t, const Run& r) {
    float x[kRun];
    load_floats(a.tensors[t].data, Float(a.tensors[t].type), r.begin, r.n, x);
    sums[first[t] + r.begin / kRun] = square_sum(x, r.n);
  });
  for (int64_t t = 0; t < a.count; ++t) {
    double total = 0.0;
    for (int64_t i = first[t]; i < first[t + 1]; ++i) total += sums[i];
    a.sums[t] = total;
  }
}

}  // namespace LOWP_ISA
}  // namespace lowp
