#include "cuda/states.h"

namespace lowp {
namespace cuda {
namespace {

// Chen et al., "Symbolic discovery of optimization algorithms", NeurIPS 2023, algorithm 2.
struct LionBody {
  struct Args {
    LionArgs a;
    UpdateTable<SgdTensor> table;
  };
  static constexpr int kLanes = kRunLanes, kMaxima = 1;
  struct Lane {
    float m[16];
    uint32_t maxima[1];
  };

  static LOWP_HD_MEMBER void load(const Args& args, int64_t group, int lane, Lane& mine) {
    const Run r = run_at(args.table, group);
    const SgdTensor& t = args.table.tensors[r.tensor];
    const Span s = span_of<16>(r.begin + lane * 16, r.begin, r.end);
    if (t.step == 0 || s.to == 0) return;
    const bool codes = t.state_type == int64_t(State::codes);
    float p[16], g[16];
    const MasterWeight master = args.table.master_of(r.tensor);
    load_weight(t.param, t.param_type, master, s, p);
    load_floats<16>(t.grad, Float(t.grad_type), s, vector_aligned(t.grad, s), g);
    load_signed(t.momentum, codes ? t.momentum_scale[r.block] : 0.0f, t.state_type, s, mine.m);
    update(args.a, *args.table.shared, g, p, mine.m);
    store_weight(p, args.a.rounding == Rounding::stochastic, noise_of(args.a.seed, t, s),
                 t.param_type, master, s, t.param);
    if (codes) mine.maxima[0] = amax_inside(mine.m, s);
  }

  // A NaN keeps itself as its sign.
  static LOWP_HD_MEMBER void update(const LionArgs& a, const UpdateScalars& shared, const float* g,
                                    float* p, float* m) {
    const float sign = a.maximize ? -shared.inv_scale : shared.inv_scale;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const float grad = g[i] * sign;
      const float mean = m[i] * a.beta1 + grad * a.one_minus_beta1;
      float step = mean > 0.0f ? shared.lr : 0.0f;
      step = mean < 0.0f ? -shared.lr : step;
      step = mean != mean ? mean : step;
      p[i] = canonical_nan(p[i] * shared.decay - step);
      m[i] = canonical_nan(m[i] * a.beta2 + grad * a.one_minus_beta2);
    }
  }

  static LOWP_HD_MEMBER void store(const Args& args, int64_t group, int lane, Lane& mine) {
    const Run r = run_at(args.table, group);
    const SgdTensor& t = args.table.tensors[r.tensor];
    const Span s = span_of<16>(r.begin + lane * 16, r.begin, r.end);
    if (t.step == 0 || s.to == 0) return;
    store_state<true>(mine.m, args.a.state_rounding == Rounding::stochastic,
                      noise_of(args.a.seed, t, s), 1, t.state_type, mine.maxima[0], lane == 0, s,
                      t.momentum, t.momentum_scale + r.block);
  }
};

}  // namespace

void lion(const Place& place, const LionArgs& a, const UpdateClock& clock,
          const UpdateTable<SgdTensor>& table) {
  launch_groups<Clock<SgdTensor>>("lion", place, {clock, table}, table.count);
  launch_groups<LionBody>("lion", place, {a, table}, table.runs);
}

}  // namespace cuda
}  // namespace lowp
