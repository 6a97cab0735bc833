#include "cuda/states.h"

namespace lowp {
namespace cuda {
namespace {

// Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024: before and after
// the products. The tables' tensors are those of csrc/muon.h.
struct MomentumBody {
  struct Args {
    MuonMomentumArgs a;
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
    const bool codes = t.state_type == int64_t(State::codes);
    float x[16];
    load_floats<16>(t.grad, Float(t.grad_type), s, vector_aligned(t.grad, s), x);
    load_signed(t.momentum, codes ? t.momentum_scale[r.block] : 0.0f, t.state_type, s,
                mine.momentum);
    update(args.a, args.table.shared->inv_scale, x, mine.momentum);
    store_floats<16>(x, nullptr, Float::fp32, s, vector_aligned(t.param, s), t.param);
    if (codes) mine.maxima[0] = amax_inside(mine.momentum, s);
  }

  // x: the gradient, then the mean that is made orthogonal.
  static LOWP_HD_MEMBER void update(const MuonMomentumArgs& a, float inv_scale, float* x,
                                    float* momentum) {
    const float sign = a.maximize ? -inv_scale : inv_scale;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const float grad = x[i] * sign;
      const float mean = canonical_nan(momentum[i] + (grad - momentum[i]) * a.one_minus_momentum);
      x[i] = a.nesterov ? canonical_nan(grad + (mean - grad) * a.momentum) : mean;
      momentum[i] = mean;
    }
  }

  static LOWP_HD_MEMBER void store(const Args& args, int64_t group, int lane, Lane& mine) {
    const Run r = run_at(args.table, group);
    const SgdTensor& t = args.table.tensors[r.tensor];
    const Span s = span_of<16>(r.begin + lane * 16, r.begin, r.end);
    if (t.step == 0 || s.to == 0) return;
    store_state<true>(mine.momentum, args.a.state_rounding == Rounding::stochastic,
                      noise_of(args.a.seed, t, s), 1, t.state_type, mine.maxima[0], lane == 0, s,
                      t.momentum, t.momentum_scale + r.block);
  }
};

// What the step of each matrix is, of which the momentum counted the steps.
struct Rates {
  struct Args {
    Adjustment adjustment;
    UpdateClock clock;
    UpdateTable<SgdTensor> table;
  };
  static constexpr int kLanes = 1, kMaxima = 0;
  struct Lane {};

  static LOWP_HD_MEMBER void load(const Args&, int64_t, int, Lane&) {}
  static LOWP_HD_MEMBER void store(const Args& args, int64_t i, int, Lane&) {
    const UpdateClock& c = args.clock;
    SgdTensor& t = args.table.tensors[i];
    const bool skipped = c.found_inf != nullptr && *c.found_inf != 0.0f;
    t.step = skipped ? 0 : static_cast<int64_t>(*args.table.steps[i]);
    const double lr = c.lr_pointer != nullptr ? *c.lr_pointer : c.lr;
    const double rows = static_cast<double>(t.rows), cols = static_cast<double>(t.cols);
    const double rate = args.adjustment == Adjustment::original
                            ? lr * sqrt(rows > cols ? rows / cols : 1.0)
                            : lr * 0.2 * sqrt(rows > cols ? rows : cols);
    args.table.scalars[i].step_size = static_cast<float>(rate);
    if (i == 0) args.table.shared->decay = static_cast<float>(1.0 - lr * c.weight_decay);
  }
};

struct StepBody {
  struct Args {
    MuonStepArgs a;
    UpdateTable<SgdTensor> table;
  };
  static constexpr int kLanes = kRunLanes, kMaxima = 0;
  struct Lane {};

  static LOWP_HD_MEMBER void load(const Args&, int64_t, int, Lane&) {}
  static LOWP_HD_MEMBER void store(const Args& args, int64_t group, int lane, Lane&) {
    const Run r = run_at(args.table, group);
    const SgdTensor& t = args.table.tensors[r.tensor];
    const Span s = span_of<16>(r.begin + lane * 16, r.begin, r.end);
    if (t.step == 0 || s.to == 0) return;
    const MasterWeight master = args.table.master_of(r.tensor);
    float p[16], direction[16];
    load_weight(t.param, t.param_type, master, s, p);
    load_floats<16>(t.grad, Float(t.grad_type), s, vector_aligned(t.grad, s), direction);
    const float decay = args.table.shared->decay, rate = args.table.scalars[r.tensor].step_size;
#pragma unroll
    for (int i = 0; i < 16; ++i) p[i] = canonical_nan(p[i] * decay - direction[i] * rate);
    store_weight(p, args.a.rounding == Rounding::stochastic, noise_of(args.a.seed, t, s),
                 t.param_type, master, s, t.param);
  }
};

}  // namespace

void muon_momentum(const Place& place, const MuonMomentumArgs& a, const UpdateClock& clock,
                   const UpdateTable<SgdTensor>& table) {
  launch_groups<Clock<SgdTensor>>("muon", place, {clock, table}, table.count);
  launch_groups<MomentumBody>("muon", place, {a, table}, table.runs);
}

void muon_step(const Place& place, const MuonStepArgs& a, Adjustment adjustment,
               const UpdateClock& clock, const UpdateTable<SgdTensor>& table) {
  launch_groups<Rates>("muon", place, {adjustment, clock, table}, table.count);
  launch_groups<StepBody>("muon", place, {a, table}, table.runs);
}

}  // namespace cuda
}  // namespace lowp
