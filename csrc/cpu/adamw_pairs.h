// AdamW by pairs of vectors, from AVX2 on: everything between loads and stores stays in registers.
#pragma once
#include "cpu/pairs.h"
#include "cpu/states.h"

namespace lowp {
namespace LOWP_ISA {

constexpr int kStep = kGroups * kDrawsPerCall;  // elements at a time, as many as draws are made
constexpr int kPairs = kStep / kPair;

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

// The formula of adamw.cpp, but for the last line: gives first / denominator.
static inline Vec update_moments(const AdamWFactors& f, Vec g, Vec p, Vec& m, Vec& v, Vec& root) {
  Vec grad = g * f.sign;
  if (f.coupled != 0.0f) grad += p * f.coupled;
  m = m + (grad - m) * f.fresh1;
  v = v + (grad * grad - v) * f.fresh2;
  root = square_root(v);
  return m / (root * f.inv_sqrt_bc2 + f.eps);
}

static inline Vec add_squares(Vec p, Vec m, Vec v, Vec sum) {
  return multiply_add(v, v, multiply_add(m, m, multiply_add(p, p, sum)));
}

// What is drawn of a run, by a format each of weights (role 0) and moments (roles 1 and 2).
template <class Param, class Moment>
class AdamWDraws : public DrawStream<Param::drawn + 2 * Moment::drawn> {
 public:
  AdamWDraws(const AdamWArgs& a, const AdamWTensor& t, const Run& r)
      : DrawStream<Param::drawn + 2 * Moment::drawn>(
            PhiloxKey{a.seed, static_cast<uint32_t>(t.step), static_cast<uint32_t>(t.id),
                      Param::drawn ? 0u : 1u},
            t.offset + r.begin) {}
  const uint16_t* of_param(int i) const { return this->of(0, i); }
  const uint16_t* of_exp_avg(int i) const { return this->of(Param::drawn, i); }
  const uint16_t* of_exp_avg_sq(int i) const { return this->of(Param::drawn + 1, i); }
};

// States of floats. Elements that became special, or near to it, go to plain(run).
template <class Param, class Moment, class Plain>
static inline void update_floats(Param param, Moment moment, const AdamWArgs& a,
                                 const AdamWScalars& scalars, const AdamWTensor t, const Run r,
                                 const Plain& plain) {
  const AdamWFactors f(a, scalars);
  const Float grad = Float(t.grad_type);
  AdamWDraws<Param, Moment> draws(a, t, r);
  int i = 0;
  for (; i + kStep <= r.n; i += kStep) {
    const int64_t begin = r.begin + i;
    Pair p[kPairs], m[kPairs], v[kPairs], quotient[kPairs];
#pragma GCC unroll 2
    for (int k = 0; k < kPairs; ++k) {
      const int64_t at = begin + k * kPair;
      prefetch_pair(t.grad, grad == Float::fp32 ? 4 : 2, at);
      prefetch_pair(t.param, Param::size, at);
      prefetch_pair(t.exp_avg, Moment::size, at);
      prefetch_pair(t.exp_avg_sq, Moment::size, at);
      const Pair g = load_pair(t.grad, grad, at);
      p[k] = load_pair<Param::type>(t.param, at);
      m[k] = load_pair<Moment::type>(t.exp_avg, at);
      v[k] = load_pair<Moment::type>(t.exp_avg_sq, at);
      Vec root;
      quotient[k].even = update_moments(f, g.even, p[k].even, m[k].even, v[k].even, root);
      quotient[k].odd = update_moments(f, g.odd, p[k].odd, m[k].odd, v[k].odd, root);
    }
    draws.advance(i);
    Vec check = all(1.0f);
#pragma GCC unroll 2
    for (int k = 0; k < kPairs; ++k) {
      p[k].even = p[k].even * f.decay - quotient[k].even * f.step_size;
      p[k].odd = p[k].odd * f.decay - quotient[k].odd * f.step_size;
      check = add_squares(p[k].even, m[k].even, v[k].even, check);
      check = add_squares(p[k].odd, m[k].odd, v[k].odd, check);
    }
    if (!is_finite(check)) {
      plain(Run{begin, 0, kStep});
      continue;
    }
#pragma GCC unroll 2
    for (int k = 0; k < kPairs; ++k) {
      const int of = i + k * kPair;
      const int64_t at = r.begin + of;
      store_pair(param, p[k], draws.of_param(of), t.param, at);
      store_pair(moment, m[k], draws.of_exp_avg(of), t.exp_avg, at);
      store_pair(moment, v[k], draws.of_exp_avg_sq(of), t.exp_avg_sq, at);
    }
  }
  if (i < r.n) plain(Run{r.begin + i, 0, r.n - i});
}

template <class Plain>
static inline void update_pairs(const AdamWArgs& a, const AdamWScalars& scalars,
                                const AdamWTensor& t, const Run& r, const Plain& plain) {
  const uint64_t first = static_cast<uint64_t>(t.offset + r.begin) / kDrawsPerCall;
  if (!is_one_stretch(first, kRun / kDrawsPerCall + 2 * kGroups)) return plain(r);
  with_format(Float(t.param_type), a.rounding == Rounding::stochastic, [&](auto param) {
    with_format(Float(t.state_type), a.state_rounding == Rounding::stochastic,
                [&](auto moment) { update_floats(param, moment, a, scalars, t, r, plain); });
  });
}

}  // namespace LOWP_ISA
}  // namespace lowp
