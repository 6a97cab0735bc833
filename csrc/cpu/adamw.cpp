#include "adamw.h"

#include "cpu/states.h"
#if defined(__AVX2__)
#include "cpu/adamw_pairs.h"
#endif

namespace lowp {
namespace LOWP_ISA {
namespace {

// Loshchilov and Hutter, "Decoupled weight decay regularization", ICLR 2019, algorithm 2: with a
// coupled decay Adam, else AdamW.
// Scalars are taken by value: behind a reference they could alias what is written, and the loop
// would not become a vector loop. v_max is only touched with kAmsgrad.
template <bool kAmsgrad>
void update(const AdamWArgs a, const AdamWScalars s, const float* g, float* p, float* m, float* v,
            float* v_max, int n) {
  const float sign = a.maximize ? -a.inv_scale : a.inv_scale, coupled = a.coupled_decay;
  for (int i = 0; i < n; ++i) {
    const float own = g[i] * sign;
    const float grad = coupled != 0.0f ? own + p[i] * coupled : own;
    const float first = canonical_nan(m[i] + (grad - m[i]) * a.one_minus_beta1);
    const float second = canonical_nan(v[i] + (grad * grad - v[i]) * a.one_minus_beta2);
    float used = second;
    if (kAmsgrad) {
      used = second > v_max[i] || second != second ? second : v_max[i];
      v_max[i] = used;
    }
    const float denominator = sqrtf(used) * s.inv_sqrt_bc2 + a.eps;
    p[i] = canonical_nan(p[i] * a.decay - (first / denominator) * s.step_size);
    m[i] = first;
    v[i] = second;
  }
}

__attribute__((noinline)) void update_run(const AdamWArgs& a, int64_t index, const Run& r) {
  const AdamWTensor& t = a.tensors[index];
  float p[kRun], g[kRun], m[kRun], v[kRun], v_max[kRun];
  const MasterWeight master = master_of(a.masters, index);
  load_weight(t.param, t.param_type, master, r, p);
  load_floats(t.grad, Float(t.grad_type), r.begin, r.n, g);
  load_signed(t.exp_avg, t.exp_avg_scale, t.state_type, r, m);
  load_squares(t.exp_avg_sq, t.exp_avg_sq_scale, t.state_type, r, v);
  const bool amsgrad = t.max_exp_avg_sq != nullptr;
  if (amsgrad) load_floats(t.max_exp_avg_sq, Float(t.max_type), r.begin, r.n, v_max);
  const auto step = amsgrad ? update<true> : update<false>;
  step(a, a.scalars[index], g, p, m, v, v_max, r.n);

  RunDraws draws(a.seed, t, r);
  store_weight(p, draws.of_weight(a.rounding, master), t.param_type, master, r, t.param);
  store_signed(m, draws.of(a.state_rounding, 1, t.state_type), t.state_type, r, t.exp_avg,
               t.exp_avg_scale);
  store_squares(v, draws.of(a.state_rounding, 2, t.state_type), t.state_type, r, t.exp_avg_sq,
                t.exp_avg_sq_scale);
  if (amsgrad) {
    store_any(v_max, draws.of(a.state_rounding, 3, t.max_type), t.max_type, r, t.max_exp_avg_sq);
  }
}

}  // namespace

void adamw(const AdamWArgs& a) {
  const auto shape = [&](int64_t index) { return shape_of(a.tensors[index]); };
  for_each_span_of(a.count, shape, a.threads, [&](int64_t index, int64_t from, int64_t to) {
    const auto plain = [&](const Run& r) { update_run(a, index, r); };
    const Shape s = shape(index);
#if defined(__AVX2__)
    if (AdamWSpan(a, index, from, to).update(plain)) return;
#endif
    for (int64_t i = from; i < to; ++i) plain(run_at(i, s.rows, s.cols, s.codes));
  });
}

}  // namespace LOWP_ISA
}  // namespace lowp
