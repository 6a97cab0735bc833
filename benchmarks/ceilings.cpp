// What one instruction after the other does at best, on every thread: nothing here touches memory.
// Each function makes `rounds` rounds on each of `threads` threads, and returns the operations
// made.
#include <immintrin.h>
#include <stdint.h>

namespace {

// As wide as the machine's registers: the compiler must not halve what it is to measure.
#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX2__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
typedef float Floats __attribute__((vector_size(kBytes)));
typedef int32_t Ints __attribute__((vector_size(kBytes)));
typedef uint64_t Wide __attribute__((vector_size(kBytes)));

constexpr int kChains = 12;  // independent ones hide the latency, and all fit into the registers

#if defined(__AVX512F__)
#define LOWP_KEEP(x) asm volatile("" : "+v"(x))
#else
#define LOWP_KEEP(x) asm volatile("" : "+x"(x))
#endif

template <class Vector, class Step>
double run(int64_t rounds, int threads, double operations, const Step& step) {
#pragma omp parallel num_threads(threads)
  {
    Vector x[kChains];
#pragma GCC unroll 12
    for (int c = 0; c < kChains; ++c) x[c] = Vector{} + 1;
    for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 12
      for (int c = 0; c < kChains; ++c) {
        x[c] = step(x[c]);
        LOWP_KEEP(x[c]);
      }
    }
  }
  return operations * kChains * static_cast<double>(rounds) * threads;
}

}  // namespace

extern "C" {

// Multiplications and additions of fp32, two an fma.
double fp32(int64_t rounds, int threads) {
  Floats a = Floats{} + 0.5f;
  LOWP_KEEP(a);
  return run<Floats>(rounds, threads, 2.0 * kBytes / 4, [a](Floats x) { return x * a + a; });
}

// Multiplications and additions of 8-bit integers with 32-bit sums; 0 without VNNI.
double int8(int64_t rounds, int threads) {
#if defined(__AVX512VNNI__)
  return run<Ints>(rounds, threads, 2.0 * kBytes, [](Ints x) {
    const __m512i one = _mm512_set1_epi8(1);
    return (Ints)_mm512_dpbusd_epi32((__m512i)x, one, one);
  });
#else
  return 0.0 * rounds * threads;
#endif
}

// Multiplications and additions of bf16 with fp32 sums; 0 without the instruction.
double bf16(int64_t rounds, int threads) {
#if defined(__AVX512BF16__)
  const __m512bh one = (__m512bh)_mm512_set1_epi16(0x3F80);
  return run<Floats>(rounds, threads, 2.0 * kBytes / 2,
                     [one](Floats x) { return (Floats)_mm512_dpbf16_ps((__m512)x, one, one); });
#else
  return 0.0 * rounds * threads;
#endif
}

// IEEE square roots, each with an IEEE division: one unit makes both.
double roots(int64_t rounds, int threads) {
  Floats a = Floats{} + 1.5f;
  LOWP_KEEP(a);
  return run<Floats>(rounds, threads, 1.0 * kBytes / 4, [a](Floats x) {
#if defined(__AVX512F__)
    return a / (Floats)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__)
    return a / (Floats)_mm256_sqrt_ps((__m256)x);
#else
    return a / (Floats)_mm_sqrt_ps((__m128)x);
#endif
  });
}

// 32-bit products of 64 bits, of which Philox makes two a round.
double wide_products(int64_t rounds, int threads) {
  return run<Wide>(rounds, threads, 1.0 * kBytes / 8, [](Wide x) {
#if defined(__AVX512F__)
    return (Wide)_mm512_mul_epu32((__m512i)x, _mm512_set1_epi32(0x2511F53));
#elif defined(__AVX2__)
    return (Wide)_mm256_mul_epu32((__m256i)x, _mm256_set1_epi32(0x2511F53));
#else
    return (Wide)_mm_mul_epu32((__m128i)x, _mm_set1_epi32(0x2511F53));
#endif
  });
}
}
