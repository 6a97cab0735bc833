#include "cuda/states.h"

namespace lowp {
namespace cuda {
namespace {

// Loshchilov and Hutter, "Decoupled weight decay regularization", ICLR 2019, algorithm 2:
// with a coupled decay Adam, else AdamW.
struct AdamWBody {
  struct Args {
    AdamWArgs a;
    UpdateTable<AdamWTensor> table;
  };
  static constexpr int kLanes = kRunLanes, kMaxima = 2;
  struct Lane {
    float m[16], root[16];  // the moments; root is that of v where states are codes, else v
    uint32_t maxima[2];
  };

  static LOWP_HD_MEMBER void load(const Args& args, int64_t group, int lane, Lane& mine) {
    const Run r = run_at(args.table, group);
    const AdamWTensor& t = args.table.tensors[r.tensor];
    const Span s = span_of<16>(r.begin + lane * 16, r.begin, r.end);
    if (t.step == 0 || s.to == 0) return;
    const bool codes = t.state_type == int64_t(State::codes);
    float p[16], g[16];
    const MasterWeight master = args.table.master_of(r.tensor);
    load_weight(t.param, t.param_type, master, s, p);
    load_floats<16>(t.grad, Float(t.grad_type), s, vector_aligned(t.grad, s), g);
    load_signed(t.exp_avg, codes ? t.exp_avg_scale[r.block] : 0.0f, t.state_type, s, mine.m);
    load_squares(t.exp_avg_sq, codes ? t.exp_avg_sq_scale[r.block] : 0.0f, t.state_type, s,
                 mine.root);
    const bool amsgrad = t.max_exp_avg_sq != nullptr;
    float v_max[16];
    if (amsgrad) {
      load_floats<16>(t.max_exp_avg_sq, Float(t.max_type), s, vector_aligned(t.max_exp_avg_sq, s),
                      v_max);
    }
    update(args.a, *args.table.shared, args.table.scalars[r.tensor], amsgrad, g, p, mine.m,
           mine.root, v_max);
    const StateNoise noise = noise_of(args.a.seed, t, s);
    const bool stochastic = args.a.state_rounding == Rounding::stochastic;
    store_weight(p, args.a.rounding == Rounding::stochastic, noise, t.param_type, master, s,
                 t.param);
    if (amsgrad) store_any(v_max, stochastic, noise, 3, t.max_type, s, t.max_exp_avg_sq);
    if (!codes) return;
#pragma unroll
    for (int i = 0; i < 16; ++i) mine.root[i] = sqrtf(mine.root[i]);
    mine.maxima[0] = amax_inside(mine.m, s);
    mine.maxima[1] = amax_inside(mine.root, s);
  }

  static LOWP_HD_MEMBER void update(const AdamWArgs& a, const UpdateScalars& shared,
                                    const AdamWScalars& scalars, bool amsgrad, const float* g,
                                    float* p, float* m, float* v, float* v_max) {
    const float sign = a.maximize ? -shared.inv_scale : shared.inv_scale;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const float own = g[i] * sign;
      const float grad = a.coupled_decay != 0.0f ? own + p[i] * a.coupled_decay : own;
      const float first = canonical_nan(m[i] + (grad - m[i]) * a.one_minus_beta1);
      const float second = canonical_nan(v[i] + (grad * grad - v[i]) * a.one_minus_beta2);
      float used = second;
      if (amsgrad) {
        used = second > v_max[i] || second != second ? second : v_max[i];
        v_max[i] = used;
      }
      const float denominator = sqrtf(used) * scalars.inv_sqrt_bc2 + a.eps;
      p[i] = canonical_nan(p[i] * shared.decay - (first / denominator) * scalars.step_size);
      m[i] = first;
      v[i] = second;
    }
  }

  static LOWP_HD_MEMBER void store(const Args& args, int64_t group, int lane, Lane& mine) {
    const Run r = run_at(args.table, group);
    const AdamWTensor& t = args.table.tensors[r.tensor];
    const Span s = span_of<16>(r.begin + lane * 16, r.begin, r.end);
    if (t.step == 0 || s.to == 0) return;
    const StateNoise noise = noise_of(args.a.seed, t, s);
    const bool stochastic = args.a.state_rounding == Rounding::stochastic;
    store_state<true>(mine.m, stochastic, noise, 1, t.state_type, mine.maxima[0], lane == 0, s,
                      t.exp_avg, t.exp_avg_scale + r.block);
    store_state<false>(mine.root, stochastic, noise, 2, t.state_type, mine.maxima[1], lane == 0, s,
                       t.exp_avg_sq, t.exp_avg_sq_scale + r.block);
  }
};

}  // namespace

void adamw(const Place& place, const AdamWArgs& a, const UpdateClock& clock,
           const UpdateTable<AdamWTensor>& table) {
  launch_groups<Clock<AdamWTensor>>("adamw", place, {clock, table}, table.count);
  launch_groups<AdamWBody>("adamw", place, {a, table}, table.runs);
}

}  // namespace cuda
}  // namespace lowp
