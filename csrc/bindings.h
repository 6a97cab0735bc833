// How Python's arguments become the kernels': pointers are integers, small structs are tuples of
// their fields, which cost a small call less than objects.
#pragma once
#include <pybind11/pybind11.h>

#include <tuple>

#include "linear.h"
#include "numerics/philox.h"

namespace lowp {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

using Release = pybind11::call_guard<pybind11::gil_scoped_release>;

}  // namespace lowp

namespace pybind11 {
namespace detail {

template <>
struct type_caster<lowp::PhiloxKey> {
  PYBIND11_TYPE_CASTER(lowp::PhiloxKey, const_name("tuple[seed, step, tensor, role]"));

  bool load(handle source, bool convert) {
    using Fields = std::tuple<uint64_t, uint32_t, uint32_t, uint32_t>;
    make_caster<Fields> fields;
    if (!fields.load(source, convert)) return false;
    const auto [seed, step, tensor, role] = cast_op<Fields>(fields);
    value = {seed, step, tensor, role};
    return true;
  }
};

template <>
struct type_caster<lowp::Epilogue> {
  PYBIND11_TYPE_CASTER(lowp::Epilogue,
                       const_name("tuple[bias, bias_type, activation, y, y_type, preact, "
                                  "preact_type, backward]"));

  bool load(handle source, bool convert) {
    using namespace lowp;
    using Fields = std::tuple<uintptr_t, int, int, uintptr_t, int, uintptr_t, int, bool>;
    make_caster<Fields> fields;
    if (!fields.load(source, convert)) return false;
    const auto [bias, bias_type, activation, y, y_type, preact, preact_type, backward] =
        cast_op<Fields>(fields);
    value = {lowp::pointer<const void>(bias),
             Float(bias_type),
             Activation(activation),
             lowp::pointer<void>(y),
             Float(y_type),
             lowp::pointer<void>(preact),
             Float(preact_type),
             backward};
    return true;
  }
};

}  // namespace detail
}  // namespace pybind11
