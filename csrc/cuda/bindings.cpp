// What Python can call on CUDA devices: one entry an op, pointers as integers, no logic.
// The tests build this file, and the kernels that are bodies for host and device, without CUDA.
#include "bindings.h"

#include "cuda/ops.h"

namespace py = pybind11;
using namespace lowp;

#ifdef LOWP_HOST_BUILD
namespace lowp {
namespace cuda {
void define_host(py::module_& m);  // tests/cuda_host/products.cpp
}
}  // namespace lowp
#endif

namespace {

template <class Tensor>
void define_table(py::module_& m, const char* name) {
  using Table = cuda::UpdateTable<Tensor>;
  py::class_<Table>(m, name, py::module_local())
      .def(py::init([](uintptr_t tensors, uintptr_t steps, uintptr_t first_run, uintptr_t scalars,
                       uintptr_t shared, uintptr_t masters, int64_t count, int64_t runs) {
        return Table{pointer<Tensor>(tensors),
                     pointer<float* const>(steps),
                     pointer<const int64_t>(first_run),
                     pointer<AdamWScalars>(scalars),
                     pointer<cuda::UpdateScalars>(shared),
                     pointer<const MasterWeight>(masters),
                     count,
                     runs};
      }));
}

template <class Tensor>
void define_runs(py::module_& m, const char* name) {
  using Table = cuda::RunTable<Tensor>;
  py::class_<Table>(m, name, py::module_local())
      .def(py::init([](uintptr_t tensors, uintptr_t first_run, int64_t count, int64_t runs) {
        return Table{pointer<const Tensor>(tensors), pointer<const int64_t>(first_run), count,
                     runs};
      }));
}

void define_types(py::module_& m) {
  py::class_<cuda::Place>(m, "Place", py::module_local())
      .def(py::init([](int device, uintptr_t stream) { return cuda::Place{device, stream}; }));
  py::class_<cuda::UpdateClock>(m, "UpdateClock", py::module_local())
      .def(py::init([](double lr, uintptr_t lr_pointer, double weight_decay, double beta1,
                       double beta2, uintptr_t grad_scale, uintptr_t found_inf) {
        return cuda::UpdateClock{lr,
                                 pointer<const double>(lr_pointer),
                                 weight_decay,
                                 beta1,
                                 beta2,
                                 pointer<const float>(grad_scale),
                                 pointer<const float>(found_inf)};
      }));
  define_table<AdamWTensor>(m, "AdamWTable");
  define_table<SgdTensor>(m, "SgdTable");
  py::class_<cuda::AdafactorTable>(m, "AdafactorTable", py::module_local())
      .def(py::init([](uintptr_t tensors, uintptr_t steps, uintptr_t first_run, uintptr_t first_row,
                       uintptr_t first_piece, uintptr_t first_matrix, uintptr_t masters,
                       uintptr_t states, uintptr_t weight_sums, uintptr_t direction_sums,
                       uintptr_t means, int64_t count) {
        return cuda::AdafactorTable{pointer<AdafactorTensor>(tensors),
                                    pointer<float* const>(steps),
                                    pointer<const int64_t>(first_run),
                                    pointer<const int64_t>(first_row),
                                    pointer<const int64_t>(first_piece),
                                    pointer<const int64_t>(first_matrix),
                                    pointer<const MasterWeight>(masters),
                                    pointer<cuda::AdafactorState>(states),
                                    pointer<double>(weight_sums),
                                    pointer<double>(direction_sums),
                                    pointer<float>(means),
                                    count};
      }));
  define_runs<AccumulateTensor>(m, "AccumulateTable");
  define_runs<FloatTensor>(m, "FloatTable");
}

void define_products(py::module_& m) {
  m.def(
      "product",
      [](const cuda::Place& place, uintptr_t a, int a_type, int64_t a_row_stride,
         int64_t a_k_stride, uintptr_t b, int b_type, int64_t b_row_stride, int64_t b_k_stride,
         int64_t M, int64_t N, int64_t K, const Epilogue& epilogue, uintptr_t row_sums) {
        const Operand left{pointer<const void>(a), Float(a_type), a_row_stride, a_k_stride};
        const Operand right{pointer<const void>(b), Float(b_type), b_row_stride, b_k_stride};
        return cuda::product(place, {left, right, M, N, K, epilogue, 0}, pointer<float>(row_sums));
      },
      Release());
  m.def(
      "scaled_mm",
      [](const cuda::Place& place, uintptr_t a, int64_t a_row_stride, uintptr_t b,
         int64_t b_row_stride, int64_t M, int64_t N, int64_t K, uintptr_t row_scale,
         int64_t row_scale_stride, uintptr_t col_scale, int64_t col_scale_stride,
         const Epilogue& epilogue) {
        cuda::scaled_mm(
            place, {pointer<const int8_t>(a), a_row_stride, 1, pointer<const int8_t>(b),
                    b_row_stride, 1, M, N, K, pointer<const float>(row_scale), row_scale_stride,
                    pointer<const float>(col_scale), col_scale_stride, epilogue, 0});
      },
      Release());
  m.def(
      "transpose_codes",
      [](const cuda::Place& place, uintptr_t x, int64_t M, int64_t N, uintptr_t y) {
        cuda::transpose_codes(place, pointer<const int8_t>(x), M, N, pointer<int8_t>(y));
      },
      Release());
  m.def(
      "linear_epilogue",
      [](const cuda::Place& place, uintptr_t sums, int64_t M, int64_t N, const Epilogue& epilogue) {
        cuda::linear_epilogue(place, {pointer<const float>(sums), M, N, epilogue, 0});
      },
      Release());
}

void define_quantization(py::module_& m) {
  m.def(
      "quantize",
      [](const cuda::Place& place, uintptr_t x, int x_type, int64_t rows, int64_t cols,
         int granularity, int64_t block, int rounding, const PhiloxKey& key, uintptr_t step,
         int64_t offset, uintptr_t codes, uintptr_t scale, uintptr_t workspace) {
        cuda::quantize(
            place,
            {pointer<const void>(x), Float(x_type), rows, cols, Granularity(granularity), block,
             Rounding(rounding), key, offset, pointer<int8_t>(codes), pointer<float>(scale), 0},
            pointer<const int64_t>(step), pointer<uint32_t>(workspace));
      },
      Release());
  m.def(
      "quantize_row_col",
      [](const cuda::Place& place, uintptr_t x, int x_type, int64_t rows, int64_t cols,
         int rounding, const PhiloxKey& row_key, const PhiloxKey& col_key, uintptr_t step,
         int64_t offset, uintptr_t row_codes, uintptr_t row_scale, uintptr_t col_codes,
         uintptr_t col_scale, uintptr_t workspace) {
        cuda::quantize_row_col(
            place,
            {pointer<const void>(x), Float(x_type), rows, cols, Rounding(rounding), row_key,
             col_key, offset, pointer<int8_t>(row_codes), pointer<float>(row_scale),
             pointer<int8_t>(col_codes), pointer<float>(col_scale), 0},
            pointer<const int64_t>(step), pointer<uint32_t>(workspace));
      },
      Release());
  m.def(
      "dequantize",
      [](const cuda::Place& place, uintptr_t codes, uintptr_t scale, int64_t rows, int64_t cols,
         int granularity, int64_t block, uintptr_t y, int y_type) {
        cuda::dequantize(place,
                         {pointer<const int8_t>(codes), pointer<const float>(scale), rows, cols,
                          Granularity(granularity), block, pointer<void>(y), Float(y_type), 0});
      },
      Release());
}

}  // namespace

PYBIND11_MODULE(LOWP_MODULE, m) {
  m.doc() = "CUDA kernels of lowp: plain device pointers and a stream in, nothing returned.";
  m.attr("source_hash") = LOWP_SOURCE_HASH;
  m.attr("compiler") = LOWP_COMPILER;
  m.attr("archs") = LOWP_ARCHS;
#ifdef LOWP_HOST_BUILD
  cuda::define_host(m);
#endif
  define_types(m);
  define_products(m);
  define_quantization(m);
  m.def(
      "bias_grad",
      [](const cuda::Place& place, uintptr_t dy, int dy_type, int64_t M, int64_t N, uintptr_t db,
         uintptr_t partial) {
        const BiasGradArgs args{
            pointer<const void>(dy), Float(dy_type), M, N, pointer<float>(db), 0};
        cuda::bias_grad(place, args, pointer<float>(partial));
      },
      Release());
  m.def(
      "activation_grad",
      [](const cuda::Place& place, uintptr_t dy, int dy_type, uintptr_t preact, int preact_type,
         int64_t numel, int activation, uintptr_t dz) {
        cuda::activation_grad(
            place, {pointer<const void>(dy), Float(dy_type), pointer<const void>(preact),
                    Float(preact_type), numel, Activation(activation), pointer<void>(dz), 0});
      },
      Release());
  m.def(
      "adamw",
      [](const cuda::Place& place, const cuda::UpdateClock& clock,
         const cuda::UpdateTable<AdamWTensor>& table, float one_minus_beta1, float one_minus_beta2,
         float eps, bool maximize, int rounding, int state_rounding, uint64_t seed,
         float coupled_decay) {
        cuda::adamw(
            place,
            {nullptr, nullptr, 0, one_minus_beta1, one_minus_beta2, eps, 0.0f, 0.0f, maximize,
             Rounding(rounding), Rounding(state_rounding), seed, 0, coupled_decay, nullptr},
            clock, table);
      },
      Release());
  m.def(
      "sgd",
      [](const cuda::Place& place, const cuda::UpdateClock& clock,
         const cuda::UpdateTable<SgdTensor>& table, float momentum, float one_minus_dampening,
         float weight_decay, bool nesterov, bool maximize, int rounding, int state_rounding,
         uint64_t seed) {
        cuda::sgd(place,
                  {nullptr, 0, 0.0f, momentum, one_minus_dampening, weight_decay, 0.0f, nesterov,
                   maximize, Rounding(rounding), Rounding(state_rounding), seed, 0, nullptr},
                  clock, table);
      },
      Release());
  m.def(
      "lion",
      [](const cuda::Place& place, const cuda::UpdateClock& clock,
         const cuda::UpdateTable<SgdTensor>& table, float beta1, float one_minus_beta1, float beta2,
         float one_minus_beta2, bool maximize, int rounding, int state_rounding, uint64_t seed) {
        cuda::lion(place,
                   {nullptr, 0, 0.0f, beta1, one_minus_beta1, beta2, one_minus_beta2, 0.0f, 0.0f,
                    maximize, Rounding(rounding), Rounding(state_rounding), seed, 0, nullptr},
                   clock, table);
      },
      Release());
  m.def(
      "muon_momentum",
      [](const cuda::Place& place, const cuda::UpdateClock& clock,
         const cuda::UpdateTable<SgdTensor>& table, float momentum, float one_minus_momentum,
         bool nesterov, bool maximize, int state_rounding, uint64_t seed) {
        cuda::muon_momentum(place,
                            {nullptr, 0, momentum, one_minus_momentum, 0.0f, nesterov, maximize,
                             Rounding(state_rounding), seed, 0},
                            clock, table);
      },
      Release());
  m.def(
      "muon_step",
      [](const cuda::Place& place, const cuda::UpdateClock& clock,
         const cuda::UpdateTable<SgdTensor>& table, int adjustment, int rounding, uint64_t seed) {
        cuda::muon_step(place, {nullptr, nullptr, 0, 0.0f, Rounding(rounding), seed, 0, nullptr},
                        Adjustment(adjustment), clock, table);
      },
      Release());
  m.def(
      "accumulate",
      [](const cuda::Place& place, const cuda::RunTable<AccumulateTensor>& table, int rounding,
         uint64_t seed, uintptr_t step) {
        cuda::accumulate(place, {nullptr, 0, Rounding(rounding), seed, 0},
                         pointer<const int64_t>(step), table);
      },
      Release());
  m.def(
      "square_sums",
      [](const cuda::Place& place, const cuda::RunTable<FloatTensor>& table, uintptr_t partial,
         uintptr_t sums) {
        cuda::square_sums(place, table, pointer<double>(partial), pointer<double>(sums));
      },
      Release());
  m.def(
      "adafactor",
      [](const cuda::Place& place, const cuda::UpdateClock& clock,
         const cuda::AdafactorTable& table, double beta2_decay, float eps1, double eps2, double d,
         bool maximize, int rounding, uint64_t seed, int64_t runs, int64_t rows, int64_t pieces,
         int64_t matrices) {
        cuda::adafactor(place,
                        {nullptr, nullptr, 0, eps1, eps2, d, 0.0f, 0.0f, maximize,
                         Rounding(rounding), seed, 0, nullptr},
                        beta2_decay, clock, table, runs, rows, pieces, matrices);
      },
      Release());
  m.def(
      "upload",
      [](const cuda::Place& place, uintptr_t bytes, int64_t size, uintptr_t target) {
        cuda::upload(place, pointer<const void>(bytes), size, pointer<void>(target));
      },
      Release());
}
