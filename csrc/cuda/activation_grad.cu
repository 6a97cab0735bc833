#include "cuda/groups.h"

namespace lowp {
namespace cuda {
namespace {

template <Activation kind>
struct Gradient {
  struct Args {
    ActivationGradArgs a;
    bool aligned;
  };
  static constexpr int kLanes = 1, kMaxima = 0;
  struct Lane {
    float dy[16], z[16];
  };

  static LOWP_HD_MEMBER void load(const Args& args, int64_t group, int, Lane& mine) {
    const ActivationGradArgs& a = args.a;
    const Span s = span_of<16>(group * 16, 0, a.numel);
    load_floats<16>(a.dy, a.dy_type, s, args.aligned, mine.dy);
    load_floats<16>(a.preact, a.preact_type, s, args.aligned, mine.z);
  }

  static LOWP_HD_MEMBER void store(const Args& args, int64_t group, int, Lane& mine) {
    const ActivationGradArgs& a = args.a;
#pragma unroll
    for (int i = 0; i < 16; ++i) mine.dy[i] = activation_gradient<kind>(mine.dy[i], mine.z[i]);
    const Span s = span_of<16>(group * 16, 0, a.numel);
    store_floats<16>(mine.dy, nullptr, a.dy_type, s, args.aligned, a.dz);
  }
};

template <Activation kind>
void run(const Place& place, const ActivationGradArgs& a) {
  const bool aligned = is_aligned(a.dy) && is_aligned(a.preact) && is_aligned(a.dz);
  launch_groups<Gradient<kind>>("activation_grad", place, {a, aligned}, (a.numel + 15) / 16);
}

}  // namespace

void activation_grad(const Place& place, const ActivationGradArgs& a) {
  switch (a.activation) {
    case Activation::relu: return run<Activation::relu>(place, a);
    case Activation::gelu: return run<Activation::gelu>(place, a);
    case Activation::gelu_tanh: return run<Activation::gelu_tanh>(place, a);
    case Activation::silu: return run<Activation::silu>(place, a);
    default: return run<Activation::none>(place, a);
  }
}

}  // namespace cuda
}  // namespace lowp
