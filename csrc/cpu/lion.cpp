#include "lion.h"

#include "cpu/states.h"
#if defined(__AVX2__)
#include "cpu/momentum_pairs.h"
#endif

namespace lowp {
namespace LOWP_ISA {
namespace {

// Chen et al., "Symbolic discovery of optimization algorithms", NeurIPS 2023, algorithm 2.
// Scalars are values, so that the loop becomes a vector loop; a NaN keeps itself as its sign.
void update(const LionArgs a, const float* __restrict g, float* __restrict p, float* __restrict m,
            int n) {
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

#if defined(__AVX2__)
// The same of a vector, of values that are not special.
struct Rule {
  explicit Rule(const LionArgs& a)
      : sign(a.maximize ? -a.inv_scale : a.inv_scale),
        beta1(a.beta1),
        fresh1(a.one_minus_beta1),
        beta2(a.beta2),
        fresh2(a.one_minus_beta2),
        decay(a.decay),
        lr(all(a.lr)) {}

  __attribute__((always_inline)) void operator()(Vec g, Vec& m, Vec& p) const {
    const Vec grad = g * sign, none = all(0.0f);
    const Vec mean = m * beta1 + grad * fresh1;
    const Vec up = mean > none ? lr : none;
    p = p * decay - (mean < none ? -lr : up);
    m = m * beta2 + grad * fresh2;
  }

  const float sign, beta1, fresh1, beta2, fresh2, decay;
  const Vec lr;
};
#endif

__attribute__((noinline)) void update_run(const LionArgs& a, int64_t index, const Run& r) {
  const SgdTensor& t = a.tensors[index];
  float p[kRun], g[kRun], m[kRun];
  const MasterWeight master = master_of(a.masters, index);
  load_weight(t.param, t.param_type, master, r, p);
  load_floats(t.grad, Float(t.grad_type), r.begin, r.n, g);
  load_signed(t.momentum, t.momentum_scale, t.state_type, r, m);
  update(a, g, p, m, r.n);

  RunDraws draws(a.seed, t, r);
  store_weight(p, draws.of_weight(a.rounding, master), t.param_type, master, r, t.param);
  store_signed(m, draws.of(a.state_rounding, 1, t.state_type), t.state_type, r, t.momentum,
               t.momentum_scale);
}

}  // namespace

void lion(const LionArgs& a) {
  const auto shape = [&](int64_t index) { return shape_of(a.tensors[index]); };
  for_each_span_of(a.count, shape, a.threads, [&](int64_t index, int64_t from, int64_t to) {
    const auto plain = [&](const Run& r) { update_run(a, index, r); };
    const Shape s = shape(index);
#if defined(__AVX2__)
    if (update_momentum_span(a, index, from, to, Rule(a), plain)) return;
#endif
    for (int64_t i = from; i < to; ++i) plain(run_at(i, s.rows, s.cols, s.codes));
  });
}

}  // namespace LOWP_ISA
}  // namespace lowp
