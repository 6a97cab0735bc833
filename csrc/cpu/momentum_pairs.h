// Optimizers with one moment of floats, SGD and Lion, by pairs of vectors, from AVX2 on.
#pragma once
#include "cpu/step_pairs.h"
#include "sgd.h"

namespace lowp {
namespace LOWP_ISA {

// Elements begin .. end-1. rule(g, m, p) updates the moment and the weight of a vector. Steps of
// which a value became special, or near to it, go to plain(run).
template <class Param, class Moment, class Rule, class Plain>
static inline void update_momentum(Param param, Moment moment, const Rule rule, uint64_t seed,
                                   const SgdTensor t, void* const rest, int64_t begin, int64_t end,
                                   const Plain& plain) {
  const PhiloxKey key{seed, static_cast<uint32_t>(t.step), static_cast<uint32_t>(t.id),
                      Param::drawn ? 0u : 1u};
  DrawStream<Param::drawn + Moment::drawn> draws(key, t.offset + begin);
  const Float type = Float(t.grad_type);
  int64_t at = begin;
  for (; at + kStep <= end; at += kStep) {
    prefetch_step(t.grad, type == Float::fp32 ? 4 : 2, at);
    prefetch_step(t.param, Param::size, at);
    prefetch_step(t.momentum, Moment::size, at);
    Pair g[kPairs], m[kPairs], p[kPairs];
    load_step(t.grad, type, at, g);
    load_step<Moment::type>(t.momentum, at, m);
    draws.advance();
    Vec squares = all(0.0f);
#pragma GCC unroll 2
    for (int k = 0; k < kPairs; ++k) {
      p[k] = load_weights(param, t.param, rest, at + k * kPair);
      rule(g[k].even, m[k].even, p[k].even);
      rule(g[k].odd, m[k].odd, p[k].odd);
      squares = multiply_add(m[k].even, m[k].even, multiply_add(p[k].even, p[k].even, squares));
      squares = multiply_add(m[k].odd, m[k].odd, multiply_add(p[k].odd, p[k].odd, squares));
    }
    if (__builtin_expect(!is_small(squares), false)) {
      plain(Run{at, 0, kStep});
      continue;
    }
#pragma GCC unroll 2
    for (int k = 0; k < kPairs; ++k) {
      const int i = k * kPair;
      store_weights(param, p[k], draws.of(0, i), t.param, rest, at + i);
      store_pair(moment, m[k], draws.of(Param::drawn, i), t.momentum, at + i);
    }
  }
  if (at < end) plain(Run{at, 0, static_cast<int>(end - at)});
}

// Runs from .. to-1 of tensor `index`. False, and nothing is done, where the plain loop is needed.
template <class Args, class Rule, class Plain>
static inline bool update_momentum_span(const Args& a, int64_t index, int64_t from, int64_t to,
                                        const Rule& rule, const Plain& plain) {
  const SgdTensor& t = a.tensors[index];
  if (t.momentum == nullptr || t.state_type == int64_t(State::codes)) return false;
  const MasterWeight master = master_of(a.masters, index);
  const Run last = run_at(to - 1, t.rows, t.cols, false);
  const int64_t begin = run_at(from, t.rows, t.cols, false).begin, end = last.begin + last.n;
  if (!in_one_stretch(t.offset + begin, t.offset + end + 2 * kStep)) return false;
  const bool drawn = a.rounding == Rounding::stochastic;
  const bool state_drawn = a.state_rounding == Rounding::stochastic;
  return with_weights(Float(t.param_type), master.kind, drawn, [&](auto param) {
    with_format(Float(t.state_type), state_drawn, [&](auto moment) {
      update_momentum(param, moment, rule, a.seed, t, master.data, begin, end, plain);
    });
  });
}

}  // namespace LOWP_ISA
}  // namespace lowp
