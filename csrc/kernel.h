// How an op's CPU kernel is declared: one function per instruction set, and the one that chooses.
#pragma once
#include <stdint.h>

namespace lowp {

// avx512 has VNNI. avx512_bf16 is another product of floats beside the AVX-512 kernels; with amx the
// products use tiles.
enum class Isa : int { baseline = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3, amx = 4 };

namespace cpu {
Isa isa();           // what runs now
Isa best_isa();      // the best that this machine supports
void set_isa(Isa);   // throws std::invalid_argument when the machine lacks it
}  // namespace cpu

enum class Float : int { fp32 = 0, bf16 = 1, fp16 = 2 };  // element type of a float tensor
enum class Granularity : int { tensor = 0, row = 1, column = 2, block = 3 };
enum class Rounding : int { nearest = 0, stochastic = 1 };

}  // namespace lowp

#define LOWP_CPU_DECLARE(name, Args)             \
  namespace lowp {                               \
  namespace baseline { void name(const Args&); } \
  namespace avx2 { void name(const Args&); }     \
  namespace avx512 { void name(const Args&); }   \
  }

#define LOWP_CPU_KERNEL(name, Args)                \
  LOWP_CPU_DECLARE(name, Args)                     \
  namespace lowp {                                 \
  namespace cpu {                                  \
  inline void name(const Args& args) {             \
    switch (isa()) {                               \
      case Isa::amx:                               \
      case Isa::avx512_bf16:                       \
      case Isa::avx512: return avx512::name(args); \
      case Isa::avx2: return avx2::name(args);     \
      default: return baseline::name(args);        \
    }                                              \
  }                                                \
  }                                                \
  }

// A kernel that is compiled for avx512_bf16 too.
#define LOWP_CPU_BF16_KERNEL(name, Args)                     \
  LOWP_CPU_DECLARE(name, Args)                               \
  namespace lowp {                                           \
  namespace avx512_bf16 { void name(const Args&); }          \
  namespace cpu {                                            \
  inline void name(const Args& args) {                       \
    switch (isa()) {                                         \
      case Isa::amx:                                         \
      case Isa::avx512_bf16: return avx512_bf16::name(args); \
      case Isa::avx512: return avx512::name(args);           \
      case Isa::avx2: return avx2::name(args);               \
      default: return baseline::name(args);                  \
    }                                                        \
  }                                                          \
  }                                                          \
  }
