#include "muon.h"

#include "cpu/states.h"

namespace lowp {
namespace LOWP_ISA {
namespace {

// Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024. x: the gradient,
// then the mean that is orthogonalized. Scalars are values, so that the loop becomes a vector loop.
template <bool kNesterov>
void update(const MuonMomentumArgs a, float* __restrict x, float* __restrict buf, int n) {
  const float sign = a.maximize ? -a.inv_scale : a.inv_scale;
  const float momentum = a.momentum, fresh = a.one_minus_momentum;
  for (int i = 0; i < n; ++i) {
    const float grad = x[i] * sign;
    const float mean = canonical_nan(buf[i] + (grad - buf[i]) * fresh);
    x[i] = kNesterov ? canonical_nan(grad + (mean - grad) * momentum) : mean;
    buf[i] = mean;
  }
}

}  // namespace

void muon_momentum(const MuonMomentumArgs& a) {
  for_each_run(a.tensors, a.count, a.threads, [&](int64_t index, const Run& r) {
    const SgdTensor& t = a.tensors[index];
    float x[kRun], buf[kRun];
    load_floats(t.grad, Float(t.grad_type), r.begin, r.n, x);
    load_signed(t.momentum, t.momentum_scale, t.state_type, r, buf);
    const auto step = a.nesterov ? update<true> : update<false>;
    step(a, x, buf, r.n);
    RunDraws draws(a.seed, t, r);
    store_signed(buf, draws.of(a.state_rounding, 1, t.state_type), t.state_type, r, t.momentum,
                 t.momentum_scale);
    store_floats(x, r.n, Float::fp32, t.param, r.begin);
  });
}

void muon_step(const MuonStepArgs& a) {
  for_each_run(a.tensors, a.count, a.threads, [&](int64_t index, const Run& r) {
    const SgdTensor& t = a.tensors[index];
    const MasterWeight master = master_of(a.masters, index);
    float p[kRun], direction[kRun];
    load_weight(t.param, t.param_type, master, r, p);
    load_floats(t.grad, Float(t.grad_type), r.begin, r.n, direction);
    const int n = r.n;
    const float decay = a.decay, rate = a.rates[index];
    for (int i = 0; i < n; ++i) p[i] = canonical_nan(p[i] * decay - direction[i] * rate);
    RunDraws draws(a.seed, t, r);
    store_weight(p, draws.of_weight(a.rounding, master), t.param_type, master, r, t.param);
  });
}

}  // namespace LOWP_ISA
}  // namespace lowp
