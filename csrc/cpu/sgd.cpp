#include "sgd.h"

#include "cpu/states.h"
#if defined(__AVX2__)
#include "cpu/momentum_pairs.h"
#endif

namespace lowp {
namespace LOWP_ISA {
namespace {

// Sutskever et al., "On the importance of initialization and momentum in deep learning", ICML 2013,
// with the momentum as torch defines it. buf: null without momentum. Options are template
// parameters and scalars values, so that the loop becomes a vector loop.
template <bool kMomentum, bool kNesterov>
void update(const SgdArgs a, bool first, const float* __restrict g, float* __restrict p,
            float* __restrict buf, int n) {
  const float sign = a.maximize ? -a.inv_scale : a.inv_scale;
  const float momentum = a.momentum, fresh = a.one_minus_dampening;
  const float weight_decay = a.weight_decay, lr = a.lr;
  for (int i = 0; i < n; ++i) {
    float d = g[i] * sign;
    d = weight_decay != 0.0f ? d + p[i] * weight_decay : d;
    if (kMomentum) {
      const float b = canonical_nan(first ? d : buf[i] * momentum + d * fresh);
      buf[i] = b;
      d = kNesterov ? d + b * momentum : b;
    }
    p[i] = canonical_nan(p[i] - d * lr);
  }
}

#if defined(__AVX2__)
// The same of a vector, of values that are not special.
struct Rule {
  Rule(const SgdArgs& a, bool first)
      : sign(a.maximize ? -a.inv_scale : a.inv_scale),
        momentum(a.momentum),
        fresh(a.one_minus_dampening),
        weight_decay(a.weight_decay),
        lr(a.lr),
        nesterov(a.nesterov),
        first(first) {}

  __attribute__((always_inline)) void operator()(Vec g, Vec& buf, Vec& p) const {
    Vec d = g * sign;
    if (weight_decay != 0.0f) d = d + p * weight_decay;
    buf = first ? d : buf * momentum + d * fresh;
    p = p - (nesterov ? d + buf * momentum : buf) * lr;
  }

  const float sign, momentum, fresh, weight_decay, lr;
  const bool nesterov, first;
};
#endif

__attribute__((noinline)) void update_run(const SgdArgs& a, int64_t index, const Run& r) {
  const SgdTensor& t = a.tensors[index];
  float p[kRun], g[kRun], buf[kRun];
  const bool momentum = t.momentum != nullptr;
  const MasterWeight master = master_of(a.masters, index);
  load_weight(t.param, t.param_type, master, r, p);
  load_floats(t.grad, Float(t.grad_type), r.begin, r.n, g);
  if (momentum) load_signed(t.momentum, t.momentum_scale, t.state_type, r, buf);
  if (!momentum) {
    update<false, false>(a, false, g, p, buf, r.n);
  } else if (a.nesterov) {
    update<true, true>(a, t.step == 1, g, p, buf, r.n);
  } else {
    update<true, false>(a, t.step == 1, g, p, buf, r.n);
  }

  RunDraws draws(a.seed, t, r);
  store_weight(p, draws.of_weight(a.rounding, master), t.param_type, master, r, t.param);
  if (momentum) {
    store_signed(buf, draws.of(a.state_rounding, 1, t.state_type), t.state_type, r, t.momentum,
                 t.momentum_scale);
  }
}

}  // namespace

void sgd(const SgdArgs& a) {
  const auto shape = [&](int64_t index) { return shape_of(a.tensors[index]); };
  for_each_span_of(a.count, shape, a.threads, [&](int64_t index, int64_t from, int64_t to) {
    const auto plain = [&](const Run& r) { update_run(a, index, r); };
    const Shape s = shape(index);
#if defined(__AVX2__)
    const Rule rule(a, a.tensors[index].step == 1);
    if (update_momentum_span(a, index, from, to, rule, plain)) return;
#endif
    for (int64_t i = from; i < to; ++i) plain(run_at(i, s.rows, s.cols, s.codes));
  });
}

}  // namespace LOWP_ISA
}  // namespace lowp
