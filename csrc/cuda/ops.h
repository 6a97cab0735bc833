// Every op on a CUDA device: where it runs, its arguments (csrc/<op>.h, whose `threads` mean
// nothing here) and what only a device needs. All pointers are of the device; nothing waits for it.
#pragma once
#include "accumulate.h"
#include "activation_grad.h"
#include "adafactor.h"
#include "adamw.h"
#include "bias_grad.h"
#include "dequantize.h"
#include "linear.h"
#include "lion.h"
#include "muon.h"
#include "quantize.h"
#include "scaled_mm.h"
#include "sgd.h"
#include "square_sums.h"

namespace lowp {
namespace cuda {

struct Place {
  int device;
  uintptr_t stream;  // a cudaStream_t
};

// step: where the key's step lies on the device, or null. workspace: one word for a tensor, cols
// for columns, cols + rows for quantize_row_col, all zeros; null otherwise.
void quantize(const Place& place, const QuantizeArgs& args, const int64_t* step,
              uint32_t* workspace);
void quantize_row_col(const Place& place, const QuantizeRowColArgs& args, const int64_t* step,
                      uint32_t* workspace);
void dequantize(const Place& place, const DequantizeArgs& args);
void activation_grad(const Place& place, const ActivationGradArgs& args);

// partial: [ceil(M / 64), N]
void bias_grad(const Place& place, const BiasGradArgs& args, float* partial);

// row_sums: [M], the sums of a's rows in bias_grad's order, or null. True if they were written: not
// every kernel has them.
bool product(const Place& place, const ProductArgs& args, float* row_sums);
void linear_epilogue(const Place& place, const EpilogueArgs& args);
void scaled_mm(const Place& place, const ScaledMmArgs& args);

// y[n, m] = x[m, n] of codes
void transpose_codes(const Place& place, const int8_t* x, int64_t M, int64_t N, int8_t* y);

// What the tensors of an update share, and where its scalars come from.
struct UpdateClock {
  double lr;
  const double* lr_pointer;  // instead of lr, or null
  double weight_decay;       // decoupled
  double beta1, beta2;       // 0 where there is none
  const float* grad_scale;   // [1] or null
  const float* found_inf;    // [1] or null: not 0 means that nothing changes
};

// Written on the device before every update.
struct UpdateScalars {
  float lr, inv_scale, decay, unused;
};

// Where the parts of an update lie in the memory that Python fills (lowp/ops/device_table.py).
template <class Tensor>
struct UpdateTable {
  Tensor* tensors;              // [count]; .step is written on the device, 0 for a skipped update
  float* const* steps;          // [count]: the updates applied to each, advanced by one
  const int64_t* first_run;     // [count + 1]: number of the tensor's first run of 256 elements
  AdamWScalars* scalars;        // [count]
  UpdateScalars* shared;        // [1]
  const MasterWeight* masters;  // [count] or null
  int64_t count, runs;

  LOWP_HD_MEMBER MasterWeight master_of(int64_t tensor) const {
    return masters == nullptr ? MasterWeight{nullptr, int64_t(Master::none)} : masters[tensor];
  }
};

// Tensors that are taken in runs, whatever a run is.
template <class Tensor>
struct RunTable {
  const Tensor* tensors;     // [count]
  const int64_t* first_run;  // [count + 1]
  int64_t count, runs;
};

// step: of the draws of all tensors, on the device.
void accumulate(const Place& place, const AccumulateArgs& args, const int64_t* step,
                const RunTable<AccumulateTensor>& table);

// partial: [runs]; sums: [count]
void square_sums(const Place& place, const RunTable<FloatTensor>& table, double* partial,
                 double* sums);

void adamw(const Place& place, const AdamWArgs& args, const UpdateClock& clock,
           const UpdateTable<AdamWTensor>& table);
void lion(const Place& place, const LionArgs& args, const UpdateClock& clock,
          const UpdateTable<SgdTensor>& table);
void sgd(const Place& place, const SgdArgs& args, const UpdateClock& clock,
         const UpdateTable<SgdTensor>& table);

// The momentum counts the steps, which the step then takes; the rates are the clock's.
void muon_momentum(const Place& place, const MuonMomentumArgs& args, const UpdateClock& clock,
                   const UpdateTable<SgdTensor>& table);
void muon_step(const Place& place, const MuonStepArgs& args, Adjustment adjustment,
               const UpdateClock& clock, const UpdateTable<SgdTensor>& table);

// What every kernel of one update knows of one tensor; written on the device before it.
struct AdafactorState {
  double rate;    // min(lr, 1 / sqrt(step))
  float weight;   // step^beta2_decay
  float decay;    // 1 - lr * weight_decay
  float unscale;  // +-1 / grad_scale
  float size;     // what multiplies the direction, once the sums are known
  int64_t step;   // 0 for a skipped update
};

struct AdafactorTable {
  AdafactorTensor* tensors;     // [count]; vectors have no rows, columns or matrices below
  float* const* steps;          // [count]: the updates applied to each, advanced by one
  const int64_t* first_run;     // [count + 1]: number of the tensor's first run of 1024 elements
  const int64_t* first_row;     // [count + 1]: of its first row
  const int64_t* first_piece;   // [count + 1]: of its first 8 columns
  const int64_t* first_matrix;  // [count + 1]: of its first matrix
  const MasterWeight* masters;  // [count] or null
  AdafactorState* states;       // [count]
  double* weight_sums;          // [runs]: of squares, like the next
  double* direction_sums;       // [runs]
  float* means;                 // [matrices]: of the rows' variances
  int64_t count;
};

void adafactor(const Place& place, const AdafactorArgs& args, double beta2_decay,
               const UpdateClock& clock, const AdafactorTable& table, int64_t runs, int64_t rows,
               int64_t pieces, int64_t matrices);

// Copies host bytes by way of kernel parameters, which a captured graph keeps.
void upload(const Place& place, const void* bytes, int64_t size, void* target);

}  // namespace cuda
}  // namespace lowp
