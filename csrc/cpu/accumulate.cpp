#include "accumulate.h"

#include "cpu/states.h"

namespace lowp {
namespace LOWP_ISA {

void accumulate(const AccumulateArgs& a) {
  constexpr uint32_t kRole = 8;
  const auto shape_of = [&](int64_t t) { return Shape{1, a.tensors[t].numel, false}; };
  for_each_run_of(a.count, shape_of, a.threads, [&](int64_t index, const Run& r) {
    const AccumulateTensor& t = a.tensors[index];
    const int n = r.n;
    float total[kRun], grad[kRun];
    load_floats(t.total, Float(t.total_type), r.begin, n, total);
    load_floats(t.grad, Float(t.grad_type), r.begin, n, grad);
    for (int i = 0; i < n; ++i) total[i] = canonical_nan(total[i] + grad[i]);
    RunDraws draws(a.seed, t, r);
    store_any(total, draws.of(a.rounding, kRole, t.total_type), t.total_type, r, t.total);
  });
}

}  // namespace LOWP_ISA
}  // namespace lowp
