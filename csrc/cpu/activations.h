// The activation of a run-time value as a constant, so that a loop over elements holds only its
// own. Included inside every instruction set's translation unit.
#pragma once
#include <type_traits>

#include "numerics/activation.h"

namespace lowp {
namespace LOWP_ISA {

// body(std::integral_constant of the activation)
template <class Body>
static inline void with_activation(Activation activation, const Body& body) {
  switch (activation) {
    case Activation::relu:
      return body(std::integral_constant<Activation, Activation::relu>{});
    case Activation::gelu:
      return body(std::integral_constant<Activation, Activation::gelu>{});
    case Activation::gelu_tanh:
      return body(std::integral_constant<Activation, Activation::gelu_tanh>{});
    case Activation::silu:
      return body(std::integral_constant<Activation, Activation::silu>{});
    default:
      return body(std::integral_constant<Activation, Activation::none>{});
  }
}

}  // namespace LOWP_ISA
}  // namespace lowp
