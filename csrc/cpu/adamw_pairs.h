// AdamW by pairs of vectors, from AVX2 on: everything between loads and stores stays in registers.
#pragma once
#include "cpu/code_pairs.h"
#include "cpu/pairs.h"
#include "cpu/states.h"

namespace lowp {
namespace LOWP_ISA {

constexpr int kStep = kGroups * kDrawsPerCall;  // elements at a time, as many as draws are made
constexpr int kPairs = kStep / kPair;

// The elements that a loop over steps comes to in 2 KB: the machine's own prefetching starts anew
// in every page, of four tensors at a time.
static inline void prefetch_step(const void* x, int64_t size, int64_t begin) {
  const char* from = static_cast<const char*>(x) + begin * size + 2048;
  for (int64_t i = 0; i < kStep * size; i += 64) __builtin_prefetch(from + i);
}

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

// The formula of adamw.cpp up to first / denominator.
static inline Vec update_moments(const AdamWFactors& f, Vec g, Vec p, Vec& m, Vec& v, Vec& root) {
  Vec grad = g * f.sign;
  if (f.coupled != 0.0f) grad += p * f.coupled;
  m = m + (grad - m) * f.fresh1;
  v = v + (grad * grad - v) * f.fresh2;
  root = square_root(v);
  return m / (root * f.inv_sqrt_bc2 + f.eps);
}

static inline void update_weights(const AdamWFactors& f, Vec quotient, Vec& p) {
  p = p * f.decay - quotient * f.step_size;
}

static inline Vec add_squares(Vec p, Vec m, Vec v, Vec sum) {
  return multiply_add(v, v, multiply_add(m, m, multiply_add(p, p, sum)));
}

struct AdamWStep {
  Pair p[kPairs], m[kPairs], v[kPairs], root[kPairs];
};

// The elements from `begin` on that `load_moments` has put into the step. Meanwhile() is what to do
// while the machine divides. Gives squares added to `check`: not finite where a value is special or
// above 2^64.
template <class Param, class Meanwhile>
static inline Vec update_step(Param, const AdamWFactors& f, const AdamWTensor& t, int64_t begin,
                              AdamWStep& s, const Meanwhile& meanwhile, Vec check) {
  const Float type = Float(t.grad_type);
  prefetch_step(t.grad, type == Float::fp32 ? 4 : 2, begin);
  prefetch_step(t.param, Param::size, begin);
  Pair quotient[kPairs];
#pragma GCC unroll 2
  for (int k = 0; k < kPairs; ++k) {
    const Pair g = load_pair(t.grad, type, begin + k * kPair);
    s.p[k] = load_pair<Param::type>(t.param, begin + k * kPair);
    quotient[k].even =
        update_moments(f, g.even, s.p[k].even, s.m[k].even, s.v[k].even, s.root[k].even);
    quotient[k].odd = update_moments(f, g.odd, s.p[k].odd, s.m[k].odd, s.v[k].odd, s.root[k].odd);
  }
  meanwhile();
#pragma GCC unroll 2
  for (int k = 0; k < kPairs; ++k) {
    update_weights(f, quotient[k].even, s.p[k].even);
    update_weights(f, quotient[k].odd, s.p[k].odd);
    check = add_squares(s.p[k].even, s.m[k].even, s.v[k].even, check);
    check = add_squares(s.p[k].odd, s.m[k].odd, s.v[k].odd, check);
  }
  return check;
}

// What is drawn of a run: for weights (role 0) and moments (roles 1 and 2).
template <bool kParam, bool kMoments>
class AdamWDraws : public DrawStream<kParam + 2 * kMoments> {
 public:
  AdamWDraws(const AdamWArgs& a, const AdamWTensor& t, const Run& r)
      : DrawStream<kParam + 2 * kMoments>(PhiloxKey{a.seed, static_cast<uint32_t>(t.step),
                                                    static_cast<uint32_t>(t.id), kParam ? 0u : 1u},
                                          t.offset + r.begin) {}
  const uint16_t* of_param(int i) const { return this->of(0, i); }
  const uint16_t* of_exp_avg(int i) const { return this->of(kParam, i); }
  const uint16_t* of_exp_avg_sq(int i) const { return this->of(kParam + 1, i); }
};

// States of floats. Elements that became special, or near to it, go to plain(run).
template <class Param, class Moment, class Plain>
static inline void update_floats(Param param, Moment moment, const AdamWArgs& a,
                                 const AdamWScalars& scalars, const AdamWTensor t, const Run r,
                                 const Plain& plain) {
  const AdamWFactors f(a, scalars);
  AdamWDraws<Param::drawn, Moment::drawn> draws(a, t, r);
  int i = 0;
  for (; i + kStep <= r.n; i += kStep) {
    const int64_t begin = r.begin + i;
    prefetch_step(t.exp_avg, Moment::size, begin);
    prefetch_step(t.exp_avg_sq, Moment::size, begin);
    AdamWStep s;
#pragma GCC unroll 2
    for (int k = 0; k < kPairs; ++k) {
      s.m[k] = load_pair<Moment::type>(t.exp_avg, begin + k * kPair);
      s.v[k] = load_pair<Moment::type>(t.exp_avg_sq, begin + k * kPair);
    }
    const Vec check = update_step(param, f, t, begin, s, [&] { draws.advance(i); }, all(1.0f));
    if (!is_finite(check)) {
      plain(Run{begin, 0, kStep});
      continue;
    }
#pragma GCC unroll 2
    for (int k = 0; k < kPairs; ++k) {
      const int of = i + k * kPair;
      const int64_t at = r.begin + of;
      store_pair(param, s.p[k], draws.of_param(of), t.param, at);
      store_pair(moment, s.m[k], draws.of_exp_avg(of), t.exp_avg, at);
      store_pair(moment, s.v[k], draws.of_exp_avg_sq(of), t.exp_avg_sq, at);
    }
  }
  if (i < r.n) plain(Run{r.begin + i, 0, r.n - i});
}

// States of codes, whose scales are known when a whole block is updated.
template <class Param, bool kDrawn, class Plain>
static inline void update_codes(Param param, const AdamWArgs& a, const AdamWScalars& scalars,
                                const AdamWTensor t, const Run r, const Plain& plain) {
  if (r.n % kStep != 0) return plain(r);
  const AdamWFactors f(a, scalars);
  AdamWDraws<Param::drawn, kDrawn> draws(a, t, r);
  int8_t* const exp_avg = static_cast<int8_t*>(t.exp_avg) + r.begin;
  uint8_t* const exp_avg_sq = static_cast<uint8_t*>(t.exp_avg_sq) + r.begin;
  const float m_scale = t.exp_avg_scale[r.block], v_scale = t.exp_avg_sq_scale[r.block];
  AdamWStep steps[kStateBlock / kStep];
  Vec check = all(1.0f);
  Bits m_most{}, root_most{};
  for (int i = 0; i < r.n; i += kStep) {
    AdamWStep s;
    prefetch_step(exp_avg, 1, i);
    prefetch_step(exp_avg_sq, 1, i);
#pragma GCC unroll 2
    for (int k = 0; k < kPairs; ++k) {
      s.m[k] = load_signed_codes(exp_avg + i + k * kPair, m_scale);
      s.v[k] = load_square_codes(exp_avg_sq + i + k * kPair, v_scale);
    }
    check = update_step(param, f, t, r.begin + i, s, [&] { draws.advance(i); }, check);
#pragma GCC unroll 2
    for (int k = 0; k < kPairs; ++k) {
      m_most = greatest(m_most, as_bits(s.m[k].even) & 0x7FFFFFFFu);
      m_most = greatest(m_most, as_bits(s.m[k].odd) & 0x7FFFFFFFu);
      root_most = greatest(root_most, as_bits(s.root[k].even));
      root_most = greatest(root_most, as_bits(s.root[k].odd));
    }
    steps[i / kStep] = s;
  }
  const float m_amax = state_scale(greatest_of(m_most));
  const float root_amax = state_scale(greatest_of(root_most));
  if (!is_finite(check) || !Quotient::takes(m_amax) || !Quotient::takes(root_amax)) {
    return plain(r);
  }
  t.exp_avg_scale[r.block] = m_amax;
  t.exp_avg_sq_scale[r.block] = root_amax;
  const Quotient m_quotient(m_amax), root_quotient(root_amax);
  const Bits nearest = Bits{} + 0x80008000u;
  for (int i = 0; i < r.n; i += kPair) {
    const AdamWStep& s = steps[i / kStep];
    const int k = i % kStep / kPair;
    store_pair(param, s.p[k], draws.of_param(i), t.param, r.begin + i);
    store_signed_codes(s.m[k], m_quotient, kDrawn ? load_bits(draws.of_exp_avg(i)) : nearest,
                       exp_avg + i);
    store_root_codes(s.root[k], root_quotient, kDrawn ? load_bits(draws.of_exp_avg_sq(i)) : nearest,
                     exp_avg_sq + i);
  }
}

template <class Plain>
static inline void update_pairs(const AdamWArgs& a, const AdamWScalars& scalars,
                                const AdamWTensor& t, const Run& r, const Plain& plain) {
  const uint64_t first = static_cast<uint64_t>(t.offset + r.begin) / kDrawsPerCall;
  if (!is_one_stretch(first, kRun / kDrawsPerCall + 2 * kGroups)) return plain(r);
  const bool drawn = a.state_rounding == Rounding::stochastic;
  with_format(Float(t.param_type), a.rounding == Rounding::stochastic, [&](auto param) {
    using Param = decltype(param);
    if (t.state_type != int64_t(State::codes)) {
      with_format(Float(t.state_type), drawn,
                  [&](auto moment) { update_floats(param, moment, a, scalars, t, r, plain); });
    } else if (drawn) {
      update_codes<Param, true>(param, a, scalars, t, r, plain);
    } else {
      update_codes<Param, false>(param, a, scalars, t, r, plain);
    }
  });
}

}  // namespace LOWP_ISA
}  // namespace lowp
