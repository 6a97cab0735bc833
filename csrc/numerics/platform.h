// What every header of numerics/ stands on: one function qualifier for host and device, and bit casts.
#pragma once
#include <stdint.h>
#include <string.h>

#ifdef __CUDACC__
#define LOWP_HD static __host__ __device__ __forceinline__
#else
#define LOWP_HD static inline __attribute__((always_inline))
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

}  // namespace lowp
