// What Python can call: one entry an op, pointers as integers, no logic.
#include "bindings.h"

#include <pybind11/stl.h>

#include "accumulate.h"
#include "activation_grad.h"
#include "adafactor.h"
#include "adamw.h"
#include "bias_grad.h"
#include "dequantize.h"
#include "isa.h"
#include "linear.h"
#include "lion.h"
#include "muon.h"
#include "quantize.h"
#include "quantized_mm.h"
#include "scaled_mm.h"
#include "sgd.h"
#include "square_sums.h"
#include "steps.h"

namespace py = pybind11;
using namespace lowp;

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "CPU kernels of lowp: plain pointers in, nothing returned.";
  m.attr("source_hash") = LOWP_SOURCE_HASH;
  m.attr("compiler") = LOWP_COMPILER;
  m.def("isa", [] { return isa_name(cpu::isa()); });
  m.def("best_isa", [] { return isa_name(cpu::best_isa()); });
  m.def("set_isa", [](const std::string& name) { cpu::set_isa(isa_from_name(name)); });
  m.def("cpu_features", &cpu_features);

  m.def("advance_steps", &advance_steps);

  m.def(
      "product",
      [](uintptr_t a, int a_type, int64_t a_row_stride, int64_t a_k_stride, uintptr_t b, int b_type,
         int64_t b_row_stride, int64_t b_k_stride, int rounded_to, int64_t M, int64_t N, int64_t K,
         const Epilogue& epilogue, int threads) {
        const Operand left{pointer<const void>(a), Float(a_type), a_row_stride, a_k_stride,
                           Float(rounded_to)};
        const Operand right{pointer<const void>(b), Float(b_type), b_row_stride, b_k_stride,
                            Float(rounded_to)};
        cpu::product({left, right, M, N, K, epilogue, threads});
      },
      Release());

  m.def(
      "scaled_mm",
      [](uintptr_t a, int64_t a_row_stride, int64_t a_k_stride, uintptr_t b, int64_t b_row_stride,
         int64_t b_k_stride, int64_t M, int64_t N, int64_t K, uintptr_t row_scale,
         int64_t row_scale_stride, uintptr_t col_scale, int64_t col_scale_stride,
         const Epilogue& epilogue, int threads) {
        cpu::scaled_mm({pointer<const int8_t>(a), a_row_stride, a_k_stride,
                        pointer<const int8_t>(b), b_row_stride, b_k_stride, M, N, K,
                        pointer<const float>(row_scale), row_scale_stride,
                        pointer<const float>(col_scale), col_scale_stride, epilogue, threads});
      },
      Release());

  m.def(
      "quantized_mm",
      [](uintptr_t a, int a_type, int a_granularity, int a_rounding, uint32_t a_role, uintptr_t b,
         int b_type, int b_granularity, int b_rounding, uint32_t b_role, int64_t M, int64_t N,
         int64_t K, bool b_is_turned, uint64_t seed, uint32_t step, uint32_t tensor,
         uintptr_t a_col_codes, uintptr_t a_col_scale, uint32_t a_col_role,
         const Epilogue& epilogue, int threads) {
        const QuantizedOperand left{pointer<const void>(a), Float(a_type),
                                    Granularity(a_granularity), Rounding(a_rounding), a_role};
        const QuantizedOperand right{pointer<const void>(b), Float(b_type),
                                     Granularity(b_granularity), Rounding(b_rounding), b_role};
        cpu::quantized_mm({left, right, M, N, K, b_is_turned, seed, step, tensor,
                           pointer<int8_t>(a_col_codes), pointer<float>(a_col_scale), a_col_role,
                           epilogue, threads});
      },
      Release());

  m.def(
      "linear_epilogue",
      [](uintptr_t sums, int64_t M, int64_t N, const Epilogue& epilogue, int threads) {
        cpu::linear_epilogue({pointer<const float>(sums), M, N, epilogue, threads});
      },
      Release());

  m.def(
      "bias_grad",
      [](uintptr_t dy, int dy_type, int64_t M, int64_t N, uintptr_t db, int threads) {
        cpu::bias_grad(
            {pointer<const void>(dy), Float(dy_type), M, N, pointer<float>(db), threads});
      },
      Release());

  m.def(
      "activation_grad",
      [](uintptr_t dy, int dy_type, uintptr_t preact, int preact_type, int64_t numel,
         int activation, uintptr_t dz, int threads) {
        cpu::activation_grad({pointer<const void>(dy), Float(dy_type), pointer<const void>(preact),
                              Float(preact_type), numel, Activation(activation), pointer<void>(dz),
                              threads});
      },
      Release());

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

  m.def(
      "adamw",
      [](uintptr_t tensors, uintptr_t scalars, int64_t count, float one_minus_beta1,
         float one_minus_beta2, float eps, float decay, float inv_scale, bool maximize,
         int rounding, int state_rounding, uint64_t seed, int threads, float coupled_decay,
         uintptr_t masters) {
        cpu::adamw({pointer<const AdamWTensor>(tensors), pointer<const AdamWScalars>(scalars),
                    count, one_minus_beta1, one_minus_beta2, eps, decay, inv_scale, maximize,
                    Rounding(rounding), Rounding(state_rounding), seed, threads, coupled_decay,
                    pointer<const MasterWeight>(masters)});
      },
      Release());

  m.def(
      "sgd",
      [](uintptr_t tensors, int64_t count, float lr, float momentum, float one_minus_dampening,
         float weight_decay, float inv_scale, bool nesterov, bool maximize, int rounding,
         int state_rounding, uint64_t seed, int threads, uintptr_t masters) {
        cpu::sgd({pointer<const SgdTensor>(tensors), count, lr, momentum, one_minus_dampening,
                  weight_decay, inv_scale, nesterov, maximize, Rounding(rounding),
                  Rounding(state_rounding), seed, threads, pointer<const MasterWeight>(masters)});
      },
      Release());

  m.def(
      "lion",
      [](uintptr_t tensors, int64_t count, float lr, float beta1, float one_minus_beta1,
         float beta2, float one_minus_beta2, float decay, float inv_scale, bool maximize,
         int rounding, int state_rounding, uint64_t seed, int threads, uintptr_t masters) {
        cpu::lion({pointer<const SgdTensor>(tensors), count, lr, beta1, one_minus_beta1, beta2,
                   one_minus_beta2, decay, inv_scale, maximize, Rounding(rounding),
                   Rounding(state_rounding), seed, threads, pointer<const MasterWeight>(masters)});
      },
      Release());

  m.def(
      "adafactor",
      [](uintptr_t tensors, uintptr_t scalars, int64_t count, float eps1, double eps2, double d,
         float decay, float inv_scale, bool maximize, int rounding, uint64_t seed, int threads,
         uintptr_t masters) {
        cpu::adafactor({pointer<const AdafactorTensor>(tensors),
                        pointer<const AdafactorScalars>(scalars), count, eps1, eps2, d, decay,
                        inv_scale, maximize, Rounding(rounding), seed, threads,
                        pointer<const MasterWeight>(masters)});
      },
      Release());

  m.def(
      "muon_momentum",
      [](uintptr_t tensors, int64_t count, float momentum, float one_minus_momentum,
         float inv_scale, bool nesterov, bool maximize, int state_rounding, uint64_t seed,
         int threads) {
        cpu::muon_momentum({pointer<const SgdTensor>(tensors), count, momentum, one_minus_momentum,
                            inv_scale, nesterov, maximize, Rounding(state_rounding), seed,
                            threads});
      },
      Release());

  m.def(
      "muon_step",
      [](uintptr_t tensors, uintptr_t rates, int64_t count, float decay, int rounding,
         uint64_t seed, int threads, uintptr_t masters) {
        cpu::muon_step({pointer<const SgdTensor>(tensors), pointer<const float>(rates), count,
                        decay, Rounding(rounding), seed, threads,
                        pointer<const MasterWeight>(masters)});
      },
      Release());

  m.def(
      "accumulate",
      [](uintptr_t tensors, int64_t count, int rounding, uint64_t seed, int threads) {
        cpu::accumulate(
            {pointer<const AccumulateTensor>(tensors), count, Rounding(rounding), seed, threads});
      },
      Release());

  m.def(
      "square_sums",
      [](uintptr_t tensors, int64_t count, uintptr_t sums, int threads) {
        cpu::square_sums(
            {pointer<const FloatTensor>(tensors), count, pointer<double>(sums), threads});
      },
      Release());
}
