#include "dequantize.h"

#include <immintrin.h>

#include <type_traits>

#include "cpu/floats.h"
#include "cpu/pages.h"
#include "cpu/parallel.h"
#if defined(__AVX2__)
#include "cpu/decode_vectors.h"
#endif

namespace lowp {
namespace LOWP_ISA {
namespace {

constexpr int64_t kGrain = 16384;  // elements

// y[begin .. begin+n), n <= kRun: one scale for all (stride 0) or one each (stride 1).
template <Float kType, int kStride>
void decode(const DequantizeArgs& a, int64_t begin, int n, const float* scale, bool around) {
  int done = 0;
#if defined(__AVX2__)
  using Stored = std::conditional_t<kType == Float::fp32, float, uint16_t>;
  Stored* const y = static_cast<Stored*>(a.y) + begin;
  const bool finite = (float_bits(*scale) & 0x7FFFFFFFu) < 0x7F800000u;
  if (kStride == 1 || finite) {
    done = n - n % kDecoded;
    const bool past = around && reinterpret_cast<uintptr_t>(y) % 64 == 0;
    decode_vectors<kType, kStride>(a.codes + begin, scale, done, y, past);
  }
#endif
  float rest[kRun];
  for (int i = done; i < n; ++i) {
    rest[i - done] = static_cast<float>(a.codes[begin + i]) * scale[i * kStride];
  }
  store_floats(rest, n - done, kType, a.y, begin + done);
}

template <Float kType>
void dequantize_to(const DequantizeArgs& a) {
  const bool per_column = a.granularity == Granularity::column;
  const int64_t block = a.granularity == Granularity::block ? a.block : a.cols;
  const int64_t blocks = block > 0 ? (a.cols + block - 1) / block : 0;
  const int64_t grain = a.cols >= kGrain ? 1 : kGrain / (a.cols > 0 ? a.cols : 1);
  const int64_t row_bytes = a.cols * (kType == Float::fp32 ? 4 : 2);
  const bool around = a.rows * row_bytes >= kAround;
  const FreshPages pages(a.y, a.rows * row_bytes);
  parallel_for(a.rows, grain, a.threads, [&](int64_t begin, int64_t end) {
    pages.map(begin * row_bytes, end * row_bytes);
    for (int64_t r = begin; r < end; ++r) {
      for (int64_t b = 0; b < blocks; ++b) {
        const int64_t last = (b + 1) * block < a.cols ? (b + 1) * block : a.cols;
        for (int64_t c = b * block; c < last; c += kRun) {
          const int n = static_cast<int>(last - c < kRun ? last - c : kRun);
          const int64_t first = r * a.cols + c;
          if (per_column) {
            decode<kType, 1>(a, first, n, a.scale + c, around);
          } else {
            const bool whole = a.granularity == Granularity::tensor;
            decode<kType, 0>(a, first, n, a.scale + (whole ? 0 : r * blocks + b), around);
          }
        }
      }
    }
    if (around) _mm_sfence();
  });
}

}  // namespace

void dequantize(const DequantizeArgs& a) {
  switch (a.y_type) {
    case Float::fp32:
      return dequantize_to<Float::fp32>(a);
    case Float::bf16:
      return dequantize_to<Float::bf16>(a);
    default:
      return dequantize_to<Float::fp16>(a);
  }
}

}  // namespace LOWP_ISA
}  // namespace lowp
