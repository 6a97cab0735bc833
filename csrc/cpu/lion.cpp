#include "lion.h"

#include "cpu/states.h"

namespace lowp {
namespace LOWP_ISA {
namespace {

// Chen et al., "Symbolic discovery of optimization algorithms", NeurIPS 2023, algorithm 2.
// Scalars are values, so that the loop becomes a vector loop; a NaN keeps itself as its sign.
void update(const LionArgs a, const float* __restrict g, float* __restrict p,
            float* __restrict m, int n) {
  const float sign = a.maximize ? -a.inv_scale : a.inv_scale;
  for (int i = 0; i < n; ++i) {
    const float grad = g[i] * sign;
    const float mean = m[i] * a.beta1 + grad * a.one_minus_beta1;
    float step = mean > 0.0f ? a.lr : 0.0f;
    step = mean < 0.0f ? -a.lr : step;
    step = mean != mean ? mean : step;
    p[i] = canonical_nan(p[i] * a.decay - step);
    m[i] = canonical_nan(m[i] * a.beta2 + grad * a.one_minus_beta2);
  }
}

}  // namespace

void lion(const LionArgs& a) {
  for_each_run(a.tensors, a.count, a.threads, [&](int64_t index, const Run& r) {
    const SgdTensor& t = a.tensors[index];
    float p[kRun], g[kRun], m[kRun];
    const MasterWeight master = master_of(a.masters, index);
    load_weight(t.param, t.param_type, master, r, p);
    load_floats(t.grad, Float(t.grad_type), r.begin, r.n, g);
    load_signed(t.momentum, t.momentum_scale, t.state_type, r, m);
    update(a, g, p, m, r.n);

    RunDraws draws(a.seed, t, r);
    store_weight(p, draws.of_weight(a.rounding, master), t.param_type, master, r, t.param);
    store_signed(m, draws.of(a.state_rounding, 1, t.state_type), t.state_type, r,
                 t.momentum, t.momentum_scale);
  });
}

}  // namespace LOWP_ISA
}  // namespace lowp
