#include "cuda/sums.h"

namespace lowp {
namespace cuda {
namespace {

// Shazeer and Stern, "Adafactor: adaptive learning rates with sublinear memory cost", ICML 2018,
// algorithms 4 and 5: one launch a stage for all tensors. One thread takes each sum, whose order is
// the contract's.
struct StageArgs {
  AdafactorArgs a;
  double beta2_decay;
  UpdateClock clock;
  AdafactorTable table;
};

struct Stage {  // what all stages are
  using Args = StageArgs;
  static constexpr int kLanes = 1, kMaxima = 0;
  struct Lane {};
  static LOWP_HD_MEMBER void load(const Args&, int64_t, int, Lane&) {}
};

// step^exponent by IEEE operations of one order (lowp/reference/adafactor.py).
LOWP_HD double power_of(double step, double exponent) {
  int power;
  double mantissa = frexp(step, &power);
  if (mantissa < 0.70710678118654757) {
    mantissa = mantissa * 2.0;
    power -= 1;
  }
  const double s = (mantissa - 1.0) / (mantissa + 1.0), z = s * s;
  double series = 0.0;
  for (int n = 21; n > 0; n -= 2) series = series * z + 1.0 / n;
  const double y = exponent * (power + s * series * 2.8853900817779268);  // 2 / ln 2
  const double whole = floor(y + 0.5), f = (y - whole) * 0.69314718055994529;
  double result = 1.0;
  for (int n = 13; n > 0; --n) result = result * f / n + 1.0;
  return ldexp(result, static_cast<int>(whole));
}

struct Scalars : Stage {
  static LOWP_HD_MEMBER void store(const Args& args, int64_t i, int, Lane&) {
    const UpdateClock& c = args.clock;
    AdafactorState& state = args.table.states[i];
    state.step = 0;
    if (c.found_inf != nullptr && *c.found_inf != 0.0f) return;
    const float now = *args.table.steps[i] + 1.0f;
    *args.table.steps[i] = now;
    state.step = static_cast<int64_t>(now);
    const double lr = c.lr_pointer != nullptr ? *c.lr_pointer : c.lr,
                 rate = 1.0 / sqrt(double{now});
    const double scale = c.grad_scale != nullptr ? *c.grad_scale : 1.0;
    state.rate = rate < lr ? rate : lr;
    state.weight = static_cast<float>(power_of(now, args.beta2_decay));
    state.decay = static_cast<float>(1.0 - lr * c.weight_decay);
    state.unscale = static_cast<float>(args.a.maximize ? -1.0 / scale : 1.0 / scale);
  }
};

LOWP_HD float moved(float mean, double fresh, float weight) {
  return canonical_nan(mean + (static_cast<float>(fresh) - mean) * weight);
}

template <int kSize>
LOWP_HD void load_grad(const AdafactorTensor& t, float unscale, const Span& s, float* g) {
  load_floats<kSize>(t.grad, Float(t.grad_type), s, is_aligned(t.grad) && s.begin % kSize == 0, g);
#pragma unroll
  for (int i = 0; i < kSize; ++i) g[i] = g[i] * unscale;
}

struct RowMeans : Stage {
  static LOWP_HD_MEMBER void store(const Args& args, int64_t group, int, Lane&) {
    const int64_t tensor = tensor_of(args.table.first_row, args.table.count, group);
    const AdafactorTensor& t = args.table.tensors[tensor];
    const AdafactorState& state = args.table.states[tensor];
    if (state.step == 0) return;
    const int64_t row = group - args.table.first_row[tensor], end = (row + 1) * t.cols;
    double lanes[kSumLanes] = {};
    for (int64_t at = row * t.cols; at < end; at += kSumLanes) {
      float g[kSumLanes];
      load_grad<kSumLanes>(t, state.unscale, span_of<kSumLanes>(at, at, end), g);
      add_squares(g, lanes);
    }
    const double fresh = lane_sum(lanes) / static_cast<double>(t.cols);
    t.row_var[row] = moved(t.row_var[row], fresh, state.weight);
  }
};

struct ColumnMeans : Stage {
  static LOWP_HD_MEMBER void store(const Args& args, int64_t group, int, Lane&) {
    const int64_t tensor = tensor_of(args.table.first_piece, args.table.count, group);
    const AdafactorTensor& t = args.table.tensors[tensor];
    const AdafactorState& state = args.table.states[tensor];
    if (state.step == 0) return;
    const Quotient q = divide_index(group - args.table.first_piece[tensor], (t.cols + 7) / 8);
    const int64_t first = q.quotient * t.rows * t.cols + q.remainder * 8;  // of the first row
    const Span columns = span_of<8>(q.remainder * 8, 0, t.cols);
    double sums[8] = {};
#pragma unroll 4
    for (int64_t row = 0; row < t.rows; ++row) {
      float g[8];
      load_grad<8>(t, state.unscale, {first + row * t.cols, columns.from, columns.to}, g);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const double d = g[i];
        sums[i] = sums[i] + d * d;
      }
    }
    const Span s{q.quotient * t.cols + columns.begin, columns.from, columns.to};
    const bool aligned = is_aligned(t.col_var) && s.begin % 8 == 0;
    float var[8];
    load_floats<8>(t.col_var, Float::fp32, s, aligned, var);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      var[i] = moved(var[i], sums[i] / static_cast<double>(t.rows), state.weight);
    }
    store_floats<8>(var, nullptr, Float::fp32, s, aligned, t.col_var);
  }
};

struct MatrixMeans : Stage {  // of the rows' variances
  static LOWP_HD_MEMBER void store(const Args& args, int64_t group, int, Lane&) {
    const int64_t tensor = tensor_of(args.table.first_matrix, args.table.count, group);
    const AdafactorTensor& t = args.table.tensors[tensor];
    if (args.table.states[tensor].step == 0) return;
    const int64_t first = (group - args.table.first_matrix[tensor]) * t.rows;
    double lanes[kSumLanes] = {};
    for (int64_t row = first; row < first + t.rows; row += kSumLanes) {
      const Span s = span_of<kSumLanes>(row, row, first + t.rows);
      float x[kSumLanes];
      load_floats<kSumLanes>(t.row_var, Float::fp32, s, vector_aligned(t.row_var, s), x);
#pragma unroll
      for (int i = 0; i < kSumLanes; ++i) lanes[i] = lanes[i] + double{x[i]};
    }
    const float mean = static_cast<float>(lane_sum(lanes) / static_cast<double>(t.rows));
    args.table.means[group] = mean < args.a.eps1 ? args.a.eps1 : mean;
  }
};

// u = g / sqrt(the second moment), 0 outside of the span; v: that moment.
LOWP_HD void direction(const StageArgs& args, int64_t tensor, const Span& s, float* u, float* v) {
  const AdafactorTensor& t = args.table.tensors[tensor];
  const AdafactorState& state = args.table.states[tensor];
  const float least = args.a.eps1 * args.a.eps1;
  load_grad<16>(t, state.unscale, s, u);
  if (t.variance != nullptr) {
    load_floats<16>(t.variance, Float::fp32, s, vector_aligned(t.variance, s), v);
#pragma unroll
    for (int i = 0; i < 16; ++i) v[i] = canonical_nan(v[i] + (u[i] * u[i] - v[i]) * state.weight);
  } else {
    const float* means = args.table.means + args.table.first_matrix[tensor];
    const Quotient q = divide_index(s.begin, t.cols);
    int64_t row = q.quotient, c = q.remainder, matrix = divide_index(row, t.rows).quotient;
    const Span columns{matrix * t.cols + c, s.from, s.to};
    if (c + 16 <= t.cols) {
      load_floats<16>(t.col_var, Float::fp32, columns, vector_aligned(t.col_var, columns), v);
      const float row_var = t.row_var[row], mean = means[matrix];
#pragma unroll
      for (int i = 0; i < 16; ++i) v[i] = row_var * v[i] / mean;
    } else {
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        v[i] = 1.0f;
        if (!s.holds(i)) continue;
        v[i] = t.row_var[row] * t.col_var[matrix * t.cols + c] / means[matrix];
        if (++c < t.cols) continue;
        c = 0;
        matrix = divide_index(++row, t.rows).quotient;
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    u[i] = s.holds(i) ? u[i] / sqrtf(v[i] < least ? least : v[i]) : 0.0f;
  }
}

LOWP_HD MasterWeight master_of(const AdafactorTable& table, int64_t tensor) {
  return table.masters == nullptr ? MasterWeight{nullptr, int64_t(Master::none)}
                                  : table.masters[tensor];
}

struct Norms : Stage {  // of the weights and of the directions, a run each
  static LOWP_HD_MEMBER void store(const Args& args, int64_t group, int, Lane&) {
    const int64_t tensor = tensor_of(args.table.first_run, args.table.count, group);
    const AdafactorTensor& t = args.table.tensors[tensor];
    if (args.table.states[tensor].step == 0) return;
    const Run r =
        flat_run(tensor, group - args.table.first_run[tensor], kSumRun, t.batch * t.rows * t.cols);
    const MasterWeight master = master_of(args.table, tensor);
    double weights[kSumLanes] = {};
    for (int64_t at = r.begin; at < r.end; at += kSumLanes) {
      float p[kSumLanes];
      load_weight(t.param, t.param_type, master, span_of<kSumLanes>(at, r.begin, r.end), p);
      add_squares(p, weights);
    }
    args.table.weight_sums[group] = lane_sum(weights);
    double lanes[kSumLanes] = {};
    for (int64_t at = r.begin; at < r.end; at += kSumLanes) {
      float u[kSumLanes], v[kSumLanes];
      direction(args, tensor, span_of<kSumLanes>(at, r.begin, r.end), u, v);
      add_squares(u, lanes);
    }
    args.table.direction_sums[group] = lane_sum(lanes);
  }
};

struct Sizes : Stage {  // how far each tensor moves
  static LOWP_HD_MEMBER void store(const Args& args, int64_t i, int, Lane&) {
    const AdafactorTensor& t = args.table.tensors[i];
    AdafactorState& state = args.table.states[i];
    const int64_t first = args.table.first_run[i], last = args.table.first_run[i + 1];
    if (state.step == 0 || first == last) return;
    const double root = sqrt(static_cast<double>(t.batch * t.rows * t.cols));
    const double rms = sqrt(run_sum(args.table.weight_sums, first, last)) / root;
    const double alpha = (rms > args.a.eps2 ? rms : args.a.eps2) * state.rate;
    const double cut = sqrt(run_sum(args.table.direction_sums, first, last)) / (root * args.a.d);
    state.size = static_cast<float>(alpha / (cut > 1.0 ? cut : 1.0));
  }
};

struct Move : Stage {
  static constexpr int kLanes = kRunLanes, kPieces = static_cast<int>(kSumRun) / kStateBlock;

  static LOWP_HD_MEMBER void store(const Args& args, int64_t group, int lane, Lane&) {
    const int64_t tensor = tensor_of(args.table.first_run, args.table.count, group / kPieces);
    const AdafactorTensor& t = args.table.tensors[tensor];
    const AdafactorState& state = args.table.states[tensor];
    const Run r = flat_run(tensor, group - args.table.first_run[tensor] * kPieces, kStateBlock,
                           t.batch * t.rows * t.cols);
    const Span s = span_of<16>(r.begin + lane * 16, r.begin, r.end);
    if (state.step == 0 || s.to <= 0) return;
    const MasterWeight master = master_of(args.table, tensor);
    float p[16], u[16], v[16];
    load_weight(t.param, t.param_type, master, s, p);
    direction(args, tensor, s, u, v);
#pragma unroll
    for (int i = 0; i < 16; ++i) p[i] = canonical_nan(p[i] * state.decay - u[i] * state.size);
    StateNoise noise = noise_of(args.a.seed, t, s);
    noise.step = static_cast<uint32_t>(state.step);
    store_weight(p, args.a.rounding == Rounding::stochastic, noise, t.param_type, master, s,
                 t.param);
    if (t.variance != nullptr) {
      store_floats<16>(v, nullptr, Float::fp32, s, vector_aligned(t.variance, s), t.variance);
    }
  }
};

}  // namespace

void adafactor(const Place& place, const AdafactorArgs& a, double beta2_decay,
               const UpdateClock& clock, const AdafactorTable& table, int64_t runs, int64_t rows,
               int64_t pieces, int64_t matrices) {
  const StageArgs args{a, beta2_decay, clock, table};
  launch_groups<Scalars>("adafactor", place, args, table.count);
  launch_groups<RowMeans>("adafactor", place, args, rows);
  launch_groups<ColumnMeans>("adafactor", place, args, pieces);
  launch_groups<MatrixMeans>("adafactor", place, args, matrices);
  launch_groups<Norms>("adafactor", place, args, runs);
  launch_groups<Sizes>("adafactor", place, args, table.count);
  launch_groups<Move>("adafactor", place, args, runs * Move::kPieces);
}

}  // namespace cuda
}  // namespace lowp
