#include "cuda/states.h"

namespace lowp {
namespace cuda {
namespace {

// Sutskever et al., "On the importance of initialization and momentum in deep learning", ICML 2013,
// with the momentum as torch defines it.
struct SgdBody {
  struct Args {
    SgdArgs a;
    UpdateTable<SgdTensor> table;
  };
  static constexpr int kLanes = kRunLanes, kMaxima = 1;
  struct Lane {
    float momentum[16];
    uint32_t maxima[1];
  };

  static LOWP_HD_MEMBER void load(const Args& args, int64_t group, int lane, Lane& mine) {
    const Run r = run_at(args.table, group);
    const SgdTensor& t = args.table.tensors[r.tensor];
    const Span s = span_of<16>(r.begin + lane * 16, r.begin, r.end);
    if (t.step == 0 || s.to == 0) return;
    const bool codes = t.state_type == int64_t(State::codes), has_momentum = t.momentum != nullptr;
    float p[16], g[16];
    const MasterWeight master = args.table.master_of(r.tensor);
    load_weight(t.param, t.param_type, master, s, p);
    load_floats<16>(t.grad, Float(t.grad_type), s, vector_aligned(t.grad, s), g);
    if (has_momentum) {
      const float scale = codes ? t.momentum_scale[r.block] : 0.0f;
      load_signed(t.momentum, scale, t.state_type, s, mine.momentum);
    }
    update(args.a, *args.table.shared, has_momentum, t.step == 1, g, p, mine.momentum);
    store_weight(p, args.a.rounding == Rounding::stochastic, noise_of(args.a.seed, t, s),
                 t.param_type, master, s, t.param);
    if (codes && has_momentum) mine.maxima[0] = amax_inside(mine.momentum, s);
  }

  static LOWP_HD_MEMBER void update(const SgdArgs& a, const UpdateScalars& shared,
                                    bool has_momentum, bool first, const float* g, float* p,
                                    float* buf) {
    const float sign = a.maximize ? -shared.inv_scale : shared.inv_scale;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      float d = g[i] * sign;
      d = a.weight_decay != 0.0f ? d + p[i] * a.weight_decay : d;
      if (has_momentum) {
        const float b = canonical_nan(first ? d : buf[i] * a.momentum + d * a.one_minus_dampening);
        buf[i] = b;
        d = a.nesterov ? d + b * a.momentum : b;
      }
      p[i] = canonical_nan(p[i] - d * shared.lr);
    }
  }

  static LOWP_HD_MEMBER void store(const Args& args, int64_t group, int lane, Lane& mine) {
    const Run r = run_at(args.table, group);
    const SgdTensor& t = args.table.tensors[r.tensor];
    const Span s = span_of<16>(r.begin + lane * 16, r.begin, r.end);
    if (t.step == 0 || s.to == 0 || t.momentum == nullptr) return;
    store_state<true>(mine.momentum, args.a.state_rounding == Rounding::stochastic,
                      noise_of(args.a.seed, t, s), 1, t.state_type, mine.maxima[0], lane == 0, s,
                      t.momentum, t.momentum_scale + r.block);
  }
};

}  // namespace

void sgd(const Place& place, const SgdArgs& a, const UpdateClock& clock,
         const UpdateTable<SgdTensor>& table) {
  launch_groups<Clock<SgdTensor>>("sgd", place, {clock, table}, table.count);
  launch_groups<SgdBody>("sgd", place, {a, table}, table.runs);
}

}  // namespace cuda
}  // namespace lowp
