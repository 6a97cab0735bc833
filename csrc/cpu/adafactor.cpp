#include "adafactor.h"

#include <vector>

#include "cpu/states.h"
#include "cpu/sums.h"

namespace lowp {
namespace LOWP_ISA {
namespace {

// Shazeer and Stern, "Adafactor: adaptive learning rates with sublinear memory cost", ICML 2018,
// algorithms 4 and 5. Sums are fp64 and of one order, so that neither threads nor instruction sets
// change a bit.
class Update {
 public:
  Update(const AdafactorArgs& a, int64_t index)
      : a_(a), t_(a.tensors[index]), scalars_(a.scalars[index]),
        master_(master_of(a.masters, index)), numel_(t_.batch * t_.rows * t_.cols),
        sums_(static_cast<size_t>(runs_of(1, numel_, false))) {}

  void run() {
    const double size = static_cast<double>(numel_);
    const double rms = sqrt(sum_runs([&](const Run& r) {
      float p[kRun];
      load_weight(t_.param, t_.param_type, master_, r, p);
      return square_sum(p, r.n);
    })) / sqrt(size);
    const double alpha = (rms > a_.eps2 ? rms : a_.eps2) * scalars_.rate;
    if (t_.variance == nullptr) {
      rows();
      columns();
      means();
    }
    const double norm = sqrt(sum_runs([&](const Run& r) {
      float u[kRun];
      direction(r, u, nullptr);
      return square_sum(u, r.n);
    }));
    const double cut = norm / (sqrt(size) * a_.d);
    apply(static_cast<float>(alpha / (cut > 1.0 ? cut : 1.0)));
  }

 private:
  template <class Sum>
  double sum_runs(const Sum& sum) {
    const int64_t runs = static_cast<int64_t>(sums_.size());
    parallel_for(runs, 8, a_.threads, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) sums_[i] = sum(run_at(i, 1, numel_, false));
    });
    double total = 0.0;
    for (int64_t i = 0; i < runs; ++i) total += sums_[i];
    return total;
  }

  void load_grad(int64_t begin, int n, float* g) const {
    const float sign = a_.maximize ? -a_.inv_scale : a_.inv_scale;
    load_floats(t_.grad, Float(t_.grad_type), begin, n, g);
    for (int i = 0; i < n; ++i) g[i] *= sign;
  }

  float moved(float mean, double fresh) const {
    const float weight = static_cast<float>(scalars_.one_minus_beta2);
    return canonical_nan(mean + (static_cast<float>(fresh) - mean) * weight);
  }

  void rows() {
    parallel_for(t_.batch * t_.rows, 1 + 8192 / t_.cols, a_.threads, [&](int64_t from, int64_t to) {
      for (int64_t row = from; row < to; ++row) {
        double lanes[kLanes] = {};
        for (int64_t c = 0; c < t_.cols; c += kRun) {
          float g[kRun];
          const int n = static_cast<int>(t_.cols - c < kRun ? t_.cols - c : kRun);
          load_grad(row * t_.cols + c, n, g);
          add_squares(g, n, lanes);
        }
        t_.row_var[row] = moved(t_.row_var[row], lane_sum(lanes) / static_cast<double>(t_.cols));
      }
    });
  }

  void columns() {
    constexpr int kTile = 256;
    const int64_t tiles = (t_.cols + kTile - 1) / kTile;
    parallel_for(t_.batch * tiles, 1, a_.threads, [&](int64_t from, int64_t to) {
      for (int64_t i = from; i < to; ++i) {
        const int64_t b = i / tiles, c = i % tiles * kTile;
        const int n = static_cast<int>(t_.cols - c < kTile ? t_.cols - c : kTile);
        double sum[kTile] = {};
        for (int64_t r = 0; r < t_.rows; ++r) {
          float g[kTile];
          load_grad((b * t_.rows + r) * t_.cols + c, n, g);
          for (int j = 0; j < n; ++j) {
            const double d = g[j];
            sum[j] += d * d;
          }
        }
        float* var = t_.col_var + b * t_.cols + c;
        for (int j = 0; j < n; ++j) var[j] = moved(var[j], sum[j] / static_cast<double>(t_.rows));
      }
    });
  }

  void means() {  // of the rows' variances, one a matrix
    means_.resize(static_cast<size_t>(t_.batch));
    for (int64_t b = 0; b < t_.batch; ++b) {
      double lanes[kLanes] = {};
      for (int64_t r = 0; r < t_.rows; ++r) lanes[r % kLanes] += t_.row_var[b * t_.rows + r];
      const float mean = static_cast<float>(lane_sum(lanes) / static_cast<double>(t_.rows));
      means_[b] = mean < a_.eps1 ? a_.eps1 : mean;
    }
  }

  // u = g / sqrt(estimate) of a run, which may span rows; a vector's new one goes to `variance`.
  void direction(const Run& r, float* u, float* variance) const {
    const float least = a_.eps1 * a_.eps1;
    load_grad(r.begin, r.n, u);
    if (t_.variance != nullptr) {
      const float weight = static_cast<float>(scalars_.one_minus_beta2);
      for (int i = 0; i < r.n; ++i) {
        const float old = t_.variance[r.begin + i];
        const float v = canonical_nan(old + (u[i] * u[i] - old) * weight);
        if (variance != nullptr) variance[i] = v;
        u[i] = u[i] / sqrtf(v < least ? least : v);
      }
      return;
    }
    for (int i = 0; i < r.n;) {
      const int64_t row = (r.begin + i) / t_.cols, c = (r.begin + i) % t_.cols, b = row / t_.rows;
      const int n = static_cast<int>(t_.cols - c < r.n - i ? t_.cols - c : r.n - i);
      const float* var = t_.col_var + b * t_.cols + c;
      const float row_var = t_.row_var[row], mean = means_[b];
      for (int j = 0; j < n; ++j) {
        const float v = row_var * var[j] / mean;
        u[i + j] = u[i + j] / sqrtf(v < least ? least : v);
      }
      i += n;
    }
  }

  void apply(float scale) {
    parallel_for(static_cast<int64_t>(sums_.size()), 8, a_.threads, [&](int64_t from, int64_t to) {
      for (int64_t i = from; i < to; ++i) {
        const Run r = run_at(i, 1, numel_, false);
        float p[kRun], u[kRun], variance[kRun];
        load_weight(t_.param, t_.param_type, master_, r, p);
        direction(r, u, variance);
        const int n = r.n;
        const float decay = a_.decay;
        for (int j = 0; j < n; ++j) p[j] = canonical_nan(p[j] * decay - u[j] * scale);
        RunDraws draws(a_.seed, t_, r);
        store_weight(p, draws.of_weight(a_.rounding, master_), t_.param_type, master_, r, t_.param);
        if (t_.variance != nullptr) {
          store_floats(variance, n, Float::fp32, t_.variance, r.begin);
        }
      }
    });
  }

  const AdafactorArgs& a_;
  const AdafactorTensor& t_;
  const AdafactorScalars& scalars_;
  const MasterWeight master_;
  const int64_t numel_;
  std::vector<double> sums_;  // one a run
  std::vector<float> means_;
};

}  // namespace

void adafactor(const AdafactorArgs& a) {
  for (int64_t i = 0; i < a.count; ++i) Update(a, i).run();
}

}  // namespace LOWP_ISA
}  // namespace lowp
