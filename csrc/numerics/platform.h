// What every header of numerics/ stands on: one function qualifier for host and device, and bit casts.
#pragma once
#include <stdint.h>
#include <string.h>

#ifdef __CUDACC__
#define LOWP_HD static __host__ __device__ __forceinline__
#define LOWP_HD_MEMBER __host__ __device__ __forceinline__
#else
#define LOWP_HD static inline __attribute__((always_inline))
#define LOWP_HD_MEMBER inline __attribute__((always_inline))
#endif

namespace lowp {

LOWP_HD uint32_t float_bits(float x) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(x);
#else
  uint32_t u;
  memcpy(&u, &x, sizeof u);
  return u;
#endif
}

LOWP_HD float bits_float(uint32_t u) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(u);
#else
  float x;
  memcpy(&x, &u, sizeof x);
  return x;
#endif
}

// Every NaN becomes the one of the contract, since machines differ in which payload they pass on.
LOWP_HD float canonical_nan(float x) { return x != x ? bits_float(0x7FC00000u) : x; }

}  // namespace lowp
