#include "activation_grad.h"

#include "cpu/activations.h"
#include "cpu/floats.h"
#include "cpu/parallel.h"

namespace lowp {
namespace LOWP_ISA {
namespace {

template <Activation kind>
void run(const ActivationGradArgs& a) {
  parallel_for(a.numel, 4096, a.threads, [&](int64_t begin, int64_t end) {
    float dy[kRun], z[kRun];
    for (int64_t i = begin; i < end; i += kRun) {
      const int n = static_cast<int>(end - i < kRun ? end - i : kRun);
      load_floats(a.dy, a.dy_type, i, n, dy);
      load_floats(a.preact, a.preact_type, i, n, z);
      for (int j = 0; j < n; ++j) dy[j] = activation_gradient<kind>(dy[j], z[j]);
      store_floats(dy, n, a.dy_type, a.dz, i);
    }
  });
}

}  // namespace

void activation_grad(const ActivationGradArgs& a) {
  with_activation(a.activation, [&](auto kind) { run<decltype(kind)::value>(a); });
}

}  // namespace LOWP_ISA
}  // namespace lowp
