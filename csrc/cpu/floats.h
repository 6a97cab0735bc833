// Runs of float elements of any type <-> fp32.
// Included inside every instruction set's translation unit.
#pragma once
#include "kernel.h"
#include "numerics/rounding.h"

namespace lowp {
namespace LOWP_ISA {

constexpr int kRun = 1024;  // elements a kernel holds in L1 at a time

// out[i] = fp32(x[begin + i]), i < n
static inline void load_floats(const void* x, Float type, int64_t begin, int n, float* out) {
  if (type == Float::fp32) {
    const float* p = static_cast<const float*>(x) + begin;
    for (int i = 0; i < n; ++i) out[i] = p[i];
  } else if (type == Float::bf16) {
    const uint16_t* p = static_cast<const uint16_t*>(x) + begin;
    for (int i = 0; i < n; ++i) out[i] = bf16_to_float(p[i]);
  } else {
    const uint16_t* p = static_cast<const uint16_t*>(x) + begin;
    for (int i = 0; i < n; ++i) out[i] = fp16_to_float(p[i]);
  }
}

// y[begin + i] = values[i] rounded to nearest once, i < n
static inline void store_floats(const float* values, int n, Float type, void* y, int64_t begin) {
  if (type == Float::fp32) {
    float* p = static_cast<float*>(y) + begin;
    for (int i = 0; i < n; ++i) p[i] = values[i];
  } else if (type == Float::bf16) {
    uint16_t* p = static_cast<uint16_t*>(y) + begin;
    for (int i = 0; i < n; ++i) p[i] = float_to_bf16_rn(values[i]);
  } else {
    uint16_t* p = static_cast<uint16_t*>(y) + begin;
    for (int i = 0; i < n; ++i) p[i] = float_to_fp16_rn(values[i]);
  }
}

// The same with stochastic rounding; draws[i] belongs to values[i]. fp32 is stored as it is.
static inline void store_floats_sr(const float* values, const uint16_t* draws, int n, Float type,
                                   void* y, int64_t begin) {
  if (type == Float::fp32) {
    store_floats(values, n, type, y, begin);
  } else if (type == Float::bf16) {
    uint16_t* p = static_cast<uint16_t*>(y) + begin;
    for (int i = 0; i < n; ++i) p[i] = float_to_bf16_sr(values[i], draws[i]);
  } else {
    uint16_t* p = static_cast<uint16_t*>(y) + begin;
    for (int i = 0; i < n; ++i) p[i] = float_to_fp16_sr(values[i], draws[i]);
  }
}

}  // namespace LOWP_ISA
}  // namespace lowp
