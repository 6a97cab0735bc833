// AdamW by pairs of vectors, from AVX2 on: everything between loads and stores stays in registers.
#pragma once
#include "cpu/code_pairs.h"
#include "cpu/step_pairs.h"

namespace lowp {
namespace LOWP_ISA {

struct AdamWFactors {
  AdamWFactors(const AdamWArgs& a, const AdamWScalars& s, const MasterWeight& master)
      : sign(a.maximize ? -a.inv_scale : a.inv_scale),
        coupled(a.coupled_decay),
        fresh1(a.one_minus_beta1),
        fresh2(a.one_minus_beta2),
        inv_sqrt_bc2(s.inv_sqrt_bc2),
        eps(a.eps),
        decay(a.decay),
        step_size(s.step_size),
        rest(master.data) {}
  const float sign, coupled, fresh1, fresh2, inv_sqrt_bc2, eps, decay, step_size;
  void* const rest;  // what the master adds to the weights
};

// The formula of adamw.cpp from the gradient to the root, and the rest of it.
__attribute__((always_inline)) static inline void update_moments(const AdamWFactors& f, Vec grad,
                                                                 Vec& m, Vec& v, Vec& root) {
  m = m + (grad - m) * f.fresh1;
  v = v + (grad * grad - v) * f.fresh2;
  root = square_root(v);
}

__attribute__((always_inline)) static inline void update_weights(const AdamWFactors& f, Vec m,
                                                                 Vec root, Vec& p) {
  p = p * f.decay - m / (root * f.inv_sqrt_bc2 + f.eps) * f.step_size;
}

// The weight last, as it is late. A second moment below zero has no root, so the weight tells of
// it.
__attribute__((always_inline)) static inline Vec add_squares(Vec p, Vec m, Vec v) {
  return multiply_add(p, p, multiply_add(m, m, v));
}

struct AdamWStep {
  Pair p[kPairs], m[kPairs], v[kPairs], root[kPairs];
};

// The elements from `begin` on, whose moments are in the step, as far as the roots.
template <class Param>
__attribute__((always_inline)) static inline void begin_step(Param param, const AdamWFactors& f,
                                                             const AdamWTensor& t, int64_t begin,
                                                             AdamWStep& s) {
  const Float type = Float(t.grad_type);
  prefetch_step(t.grad, type == Float::fp32 ? 4 : 2, begin);
  prefetch_step(t.param, Param::size, begin);
  Pair g[kPairs];
  load_step(t.grad, type, begin, g);
#pragma GCC unroll 2
  for (int k = 0; k < kPairs; ++k) {
    s.p[k] = load_weights(param, t.param, f.rest, begin + k * kPair);
  }
  if (f.sign != 1.0f) {
#pragma GCC unroll 2
    for (int k = 0; k < kPairs; ++k) g[k] = {g[k].even * f.sign, g[k].odd * f.sign};
  }
  if (f.coupled != 0.0f) {
#pragma GCC unroll 2
    for (int k = 0; k < kPairs; ++k) {
      g[k] = {g[k].even + s.p[k].even * f.coupled, g[k].odd + s.p[k].odd * f.coupled};
    }
  }
#pragma GCC unroll 2
  for (int k = 0; k < kPairs; ++k) {
    update_moments(f, g[k].even, s.m[k].even, s.v[k].even, s.root[k].even);
    update_moments(f, g[k].odd, s.m[k].odd, s.v[k].odd, s.root[k].odd);
    stay(s.root[k]);
  }
}

// The rest. What is between both keeps the machine busy while it makes roots, and then while it
// divides: the one unit for both is to get its work in two parts.
__attribute__((always_inline)) static inline void finish_step(const AdamWFactors& f, AdamWStep& s) {
#pragma GCC unroll 2
  for (int k = 0; k < kPairs; ++k) {
    stay(s.root[k]);
    update_weights(f, s.m[k].even, s.root[k].even, s.p[k].even);
    update_weights(f, s.m[k].odd, s.root[k].odd, s.p[k].odd);
  }
}

// What is_small tells special values by.
__attribute__((always_inline)) static inline Vec sum_squares(const AdamWStep& s) {
  Vec sum[kPairs];
#pragma GCC unroll 2
  for (int k = 0; k < kPairs; ++k) {
    sum[k] = add_squares(s.p[k].even, s.m[k].even, s.v[k].even) +
             add_squares(s.p[k].odd, s.m[k].odd, s.v[k].odd);
  }
  return kPairs == 2 ? sum[0] + sum[kPairs - 1] : sum[0];
}

// What is drawn of a tensor from element `begin` on: for weights (role 0) and moments (1 and 2).
template <bool kParam, bool kMoments>
class AdamWDraws : public DrawStream<kParam + 2 * kMoments> {
 public:
  AdamWDraws(uint64_t seed, const AdamWTensor& t, int64_t begin)
      : DrawStream<kParam + 2 * kMoments>(PhiloxKey{seed, static_cast<uint32_t>(t.step),
                                                    static_cast<uint32_t>(t.id), kParam ? 0u : 1u},
                                          t.offset + begin) {}
  const uint16_t* of_param(int i) const { return this->of(0, i); }
  const uint16_t* of_exp_avg(int i) const { return this->of(kParam, i); }
  const uint16_t* of_exp_avg_sq(int i) const { return this->of(kParam + 1, i); }
};

// Elements begin .. end-1 with states of floats. Steps of which a value became special, or near to
// it, go to plain(run).
template <class Param, class Moment, class Plain>
static inline void update_floats(Param param, Moment moment, const AdamWFactors f, uint64_t seed,
                                 const AdamWTensor t, int64_t begin, int64_t end,
                                 const Plain& plain) {
  AdamWDraws<Param::drawn, Moment::drawn> draws(seed, t, begin);
  int64_t at = begin;
  for (; at + kStep <= end; at += kStep) {
    prefetch_step(t.exp_avg, Moment::size, at);
    prefetch_step(t.exp_avg_sq, Moment::size, at);
    AdamWStep s;
    load_step<Moment::type>(t.exp_avg, at, s.m);
    load_step<Moment::type>(t.exp_avg_sq, at, s.v);
    begin_step(param, f, t, at, s);
    draws.advance();
    finish_step(f, s);
    if (__builtin_expect(!is_small(sum_squares(s)), false)) {
      plain(Run{at, 0, kStep});
      continue;
    }
#pragma GCC unroll 2
    for (int k = 0; k < kPairs; ++k) {
      const int i = k * kPair;
      store_weights(param, s.p[k], draws.of_param(i), t.param, f.rest, at + i);
      store_pair(moment, s.m[k], draws.of_exp_avg(i), t.exp_avg, at + i);
      store_pair(moment, s.v[k], draws.of_exp_avg_sq(i), t.exp_avg_sq, at + i);
    }
  }
  if (at < end) plain(Run{at, 0, static_cast<int>(end - at)});
}

// States of codes. The scale of a block is known when all of it is updated, so it is stored while
// the next block is updated, a step of each in turn.
template <class Param, bool kDrawn>
class AdamWCodes {
 public:
  AdamWCodes(const AdamWFactors& f, uint64_t seed, const AdamWTensor& t, int64_t begin)
      : f_(f), t_(t), draws_(seed, t, begin) {}

  template <class Plain>
  void update(const Run& r, const Plain& plain) {
    if (r.n % kStep != 0) {
      finish();
      return plain(r);
    }
    const int8_t* const exp_avg = static_cast<const int8_t*>(t_.exp_avg) + r.begin;
    const uint8_t* const exp_avg_sq = static_cast<const uint8_t*>(t_.exp_avg_sq) + r.begin;
    const float m_scale = t_.exp_avg_scale[r.block], v_scale = t_.exp_avg_sq_scale[r.block];
    Kept* const kept = kept_[current_];
    Vec check = all(0.0f);
    Vec m_most = all(0.0f), root_most = all(0.0f);
    for (int i = 0; i < r.n; i += kStep) {
      AdamWStep s;
      prefetch_step(exp_avg, 1, i);
      prefetch_step(exp_avg_sq, 1, i);
#pragma GCC unroll 2
      for (int k = 0; k < kPairs; ++k) {
        s.m[k] = load_signed_codes(exp_avg + i + k * kPair, m_scale);
        s.v[k] = load_square_codes(exp_avg_sq + i + k * kPair, v_scale);
      }
      begin_step(Param{}, f_, t_, r.begin + i, s);
      const bool stores = stored_ < last_.n;
      if (stores) draws_.advance();
      finish_step(f_, s);
#pragma GCC unroll 2
      for (int k = 0; k < kPairs; ++k) {
        check = multiply_add(s.p[k].even, s.p[k].even, check);
        check = multiply_add(s.p[k].odd, s.p[k].odd, check);
        m_most = greatest_magnitude(greatest_magnitude(m_most, s.m[k].even), s.m[k].odd);
        root_most =
            greatest_magnitude(greatest_magnitude(root_most, s.root[k].even), s.root[k].odd);
        kept[i / kPair + k] = {s.p[k], s.m[k], s.root[k]};
      }
      if (stores) store_step();
    }
    finish();
    const float m_amax = state_scale(greatest_of(as_bits(m_most)));
    const float root_amax = state_scale(greatest_of(as_bits(root_most)));
    if (!is_small(check) || !Quotient::takes(m_amax) || !Quotient::takes(root_amax)) {
      return plain(r);
    }
    t_.exp_avg_scale[r.block] = m_amax;
    t_.exp_avg_sq_scale[r.block] = root_amax;
    m_quotient_ = Quotient(m_amax);
    root_quotient_ = Quotient(root_amax);
    last_ = r;
    stored_ = 0;
    current_ ^= 1;
    draws_.start(t_.offset + r.begin);
  }

  // Stores what is left of the last block.
  void finish() {
    while (stored_ < last_.n) {
      draws_.advance();
      store_step();
    }
  }

 private:
  struct Kept {
    Pair p, m, root;
  };

  // The next step of the last block, by the draws made last.
  __attribute__((always_inline)) void store_step() {
    const Bits nearest = Bits{} + 0x80008000u;
    const int64_t begin = last_.begin + stored_;
    CodePair codes[kPairs];
#pragma GCC unroll 2
    for (int k = 0; k < kPairs; ++k) {
      const int i = k * kPair;
      const Kept& kept = kept_[current_ ^ 1][stored_ / kPair + k];
      codes[k] = encode_pair(kept.m, m_quotient_,
                             kDrawn ? load_bits(draws_.of_exp_avg(i)) : nearest, kept.root,
                             root_quotient_, kDrawn ? load_bits(draws_.of_exp_avg_sq(i)) : nearest);
      store_weights(Param{}, kept.p, draws_.of_param(i), t_.param, f_.rest, begin + i);
    }
    store_signed_bytes(static_cast<int8_t*>(t_.exp_avg) + begin, codes[0].exp_avg,
                       codes[1].exp_avg);
    store_unsigned_bytes(static_cast<uint8_t*>(t_.exp_avg_sq) + begin, codes[0].root,
                         codes[1].root);
    stored_ += kStep;
  }

  const AdamWFactors f_;
  const AdamWTensor t_;
  AdamWDraws<Param::drawn, kDrawn> draws_;
  Kept kept_[2][kStateBlock / kPair];  // of the block that is updated, and of the last
  int current_ = 0;
  Run last_{0, 0, 0};
  int stored_ = 0;  // elements of the last block
  Quotient m_quotient_{0.0f}, root_quotient_{0.0f};
};

// Runs from .. to-1 of a tensor.
class AdamWSpan {
 public:
  AdamWSpan(const AdamWArgs& a, int64_t index, int64_t from, int64_t to)
      : a_(a), t_(a.tensors[index]), index_(index), from_(from), to_(to) {}

  // False, and nothing is done, where the plain loop is needed for all.
  template <class Plain>
  bool update(const Plain& plain) const {
    const MasterWeight master = master_of(a_.masters, index_);
    const Run first = run(from_), last = run(to_ - 1);
    const int64_t begin = first.begin, end = last.begin + last.n;
    if (t_.max_exp_avg_sq != nullptr ||
        !in_one_stretch(t_.offset + begin, t_.offset + end + 2 * kStep)) {
      return false;
    }
    const AdamWFactors f(a_, a_.scalars[index_], master);
    const bool drawn = a_.state_rounding == Rounding::stochastic;
    const bool weights_drawn = a_.rounding == Rounding::stochastic;
    return with_weights(Float(t_.param_type), master.kind, weights_drawn, [&](auto param) {
      using Param = decltype(param);
      if (t_.state_type == int64_t(State::codes)) {
        return drawn ? update_codes<Param, true>(f, begin, plain)
                     : update_codes<Param, false>(f, begin, plain);
      }
      with_format(Float(t_.state_type), drawn, [&](auto moment) {
        update_floats(param, moment, f, a_.seed, t_, begin, end, plain);
      });
    });
  }

 private:
  Run run(int64_t i) const { return run_at(i, t_.rows, t_.cols, shape_of(t_).codes); }

  template <class Param, bool kDrawn, class Plain>
  void update_codes(const AdamWFactors& f, int64_t begin, const Plain& plain) const {
    AdamWCodes<Param, kDrawn> codes(f, a_.seed, t_, begin);
    for (int64_t i = from_; i < to_; ++i) codes.update(run(i), plain);
    codes.finish();
  }

  const AdamWArgs& a_;
  const AdamWTensor& t_;
  const int64_t index_, from_, to_;
};

}  // namespace LOWP_ISA
}  // namespace lowp
