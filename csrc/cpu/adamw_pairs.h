// AdamW by pairs of vectors, from AVX2 on: everything between loads and stores stays in registers.
#pragma once
#include "cpu/pairs.h"
#include "cpu/states.h"

namespace lowp {
namespace LOWP_ISA {

struct AdamWFactors {
  explicit AdamWFactors(const AdamWArgs& a, const AdamWScalars& s)
      : sign(a.maximize ? -a.inv_scale : a.inv_scale),
        coupled(a.coupled_decay),
        fresh1(a.one_minus_beta1),
        fresh2(a.one_minus_beta2),
        inv_sqrt_bc2(s.inv_sqrt_bc2),
        eps(a.eps),
        decay(a.decay),
        step_size(s.step_size) {}
  const float sign, coupled, fresh1, fresh2, inv_sqrt_bc2, eps, decay, step_size;
};

struct AdamWPair {
  Pair p, m, v, root;
};

// The formula of adamw.cpp. check: gets the squares added of what was computed.
static inline void update_lanes(const AdamWFactors& f, Vec g, Vec& p, Vec& m, Vec& v, Vec& root,
                                Vec& check) {
  Vec grad = g * f.sign;
  if (f.coupled != 0.0f) grad += p * f.coupled;
  m = m + (grad - m) * f.fresh1;
  v = v + (grad * grad - v) * f.fresh2;
  root = square_root(v);
  p = p * f.decay - (m / (root * f.inv_sqrt_bc2 + f.eps)) * f.step_size;
  check = multiply_add(v, v, multiply_add(m, m, multiply_add(p, p, check)));
}

// What is drawn for a run: weights (role 0), moments (1 and 2), or null.
class AdamWDraws {
 public:
  AdamWDraws(const AdamWArgs& a, const AdamWTensor& t, const Run& r) {
    const bool weight = a.rounding == Rounding::stochastic && t.param_type != int64_t(Float::fp32);
    const bool state =
        a.state_rounding == Rounding::stochastic && t.state_type != int64_t(State::fp32);
    PhiloxKey key{a.seed, static_cast<uint32_t>(t.step), static_cast<uint32_t>(t.id), 0};
    const int64_t element = t.offset + r.begin;
    if (weight && state) {
      p = draws_.fill<3>(key, element, r.n);
      m = p + draws_.stride();
    } else if (weight) {
      p = draws_.fill<1>(key, element, r.n);
    } else if (state) {
      key.role = 1;
      m = draws_.fill<2>(key, element, r.n);
    }
    if (state) v = m + draws_.stride();
  }
  AdamWDraws(const AdamWDraws&) = delete;

  const uint16_t *p = nullptr, *m = nullptr, *v = nullptr;

 private:
  RoleDraws<3> draws_;
};

static inline const uint16_t* after(const uint16_t* draws, int i) {
  return draws == nullptr ? nullptr : draws + i;
}

// States of floats. Elements that became special, or near to it, go to plain(run).
template <class Plain>
static inline void update_floats(const AdamWArgs& a, const AdamWScalars& scalars,
                                 const AdamWTensor& t, const Run& r, const Plain& plain) {
  const AdamWFactors f(a, scalars);
  const AdamWDraws draws(a, t, r);
  const Float param = Float(t.param_type), state = Float(t.state_type), grad = Float(t.grad_type);
  int i = 0;
  for (; i + kPair <= r.n; i += kPair) {
    const int64_t at = r.begin + i;
    const Pair g = load_pair(t.grad, grad, at);
    Pair p = load_pair(t.param, param, at), m = load_pair(t.exp_avg, state, at);
    Pair v = load_pair(t.exp_avg_sq, state, at), root;
    Vec check = all(1.0f);
    update_lanes(f, g.even, p.even, m.even, v.even, root.even, check);
    update_lanes(f, g.odd, p.odd, m.odd, v.odd, root.odd, check);
    if (!is_finite(check)) {
      plain(Run{at, 0, kPair});
      continue;
    }
    store_pair(p, after(draws.p, i), param, at, t.param);
    store_pair(m, after(draws.m, i), state, at, t.exp_avg);
    store_pair(v, after(draws.v, i), state, at, t.exp_avg_sq);
  }
  if (i < r.n) plain(Run{r.begin + i, 0, r.n - i});
}

}  // namespace LOWP_ISA
}  // namespace lowp
