// What Python can call: one entry an op, pointers as integers, no logic.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "dequantize.h"
#include "isa.h"
#include "quantize.h"

namespace py = pybind11;
using namespace lowp;

namespace {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

using Release = py::call_guard<py::gil_scoped_release>;

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "CPU kernels of lowp: plain pointers in, nothing returned.";
  m.attr("source_hash") = LOWP_SOURCE_HASH;
  m.attr("compiler") = LOWP_COMPILER;
  m.def("isa", [] { return isa_name(cpu::isa()); });
  m.def("best_isa", [] { return isa_name(cpu::best_isa()); });
  m.def("set_isa", [](const std::string& name) { cpu::set_isa(isa_from_name(name)); });
  m.def("cpu_features", &cpu_features);

  py::class_<PhiloxKey>(m, "PhiloxKey")
      .def(py::init<uint64_t, uint32_t, uint32_t, uint32_t>(), py::arg("seed"), py::arg("step"),
           py::arg("tensor"), py::arg("role"));

  m.def(
      "quantize",
      [](uintptr_t x, int x_type, int64_t rows, int64_t cols, int granularity, int64_t block,
         int rounding, const PhiloxKey& key, int64_t offset, uintptr_t codes, uintptr_t scale,
         int threads) {
        cpu::quantize({pointer<const void>(x), Float(x_type), rows, cols, Granularity(granularity),
                       block, Rounding(rounding), key, offset, pointer<int8_t>(codes),
                       pointer<float>(scale), threads});
      },
      Release());

  m.def(
      "quantize_row_col",
      [](uintptr_t x, int x_type, int64_t rows, int64_t cols, int rounding,
         const PhiloxKey& row_key, const PhiloxKey& col_key, int64_t offset, uintptr_t row_codes,
         uintptr_t row_scale, uintptr_t col_codes, uintptr_t col_scale, int threads) {
        cpu::quantize_row_col({pointer<const void>(x), Float(x_type), rows, cols,
                               Rounding(rounding), row_key, col_key, offset,
                               pointer<int8_t>(row_codes), pointer<float>(row_scale),
                               pointer<int8_t>(col_codes), pointer<float>(col_scale), threads});
      },
      Release());

  m.def(
      "dequantize",
      [](uintptr_t codes, uintptr_t scale, int64_t rows, int64_t cols, int granularity,
         int64_t block, uintptr_t y, int y_type, int threads) {
        cpu::dequantize({pointer<const int8_t>(codes), pointer<const float>(scale), rows, cols,
                         Granularity(granularity), block, pointer<void>(y), Float(y_type),
                         threads});
      },
      Release());
}
