// Steps of an optimizer over consecutive elements, by pairs of vectors: their loads, and weights
// with what their masters add to them (numerics/master.h, cpu/states.h). Values as in pairs.h,
// neither special nor near to it. Included as pairs.h is.
#pragma once
#include "cpu/pairs.h"
#include "cpu/states.h"

namespace lowp {
namespace LOWP_ISA {

constexpr int kStep = kDrawnStep;  // elements at a time
constexpr int kPairs = kStep / kPair;

// The elements that a loop over steps comes to in 2 KB: the machine's own prefetching starts anew
// in every page, of four tensors at a time.
__attribute__((always_inline)) static inline void prefetch_step(const void* x, int64_t size,
                                                                int64_t begin) {
  const char* from = static_cast<const char*>(x) + begin * size + 2048;
  for (int64_t i = 0; i < kStep * size; i += 64) __builtin_prefetch(from + i);
}

template <Float kType>
__attribute__((always_inline)) static inline void load_step(const void* x, int64_t begin,
                                                            Pair (&step)[kPairs]) {
#pragma GCC unroll 2
  for (int k = 0; k < kPairs; ++k) step[k] = load_pair<kType>(x, begin + k * kPair);
}

__attribute__((always_inline)) static inline void load_step(const void* x, Float type,
                                                            int64_t begin, Pair (&step)[kPairs]) {
  if (type == Float::bf16) return load_step<Float::bf16>(x, begin, step);
  if (type == Float::fp16) return load_step<Float::fp16>(x, begin, step);
  load_step<Float::fp32>(x, begin, step);
}

// The 16 bits that a weight lacks lie in `rest`.
struct WithRemainder : Format<Float::bf16, false> {};

// What rounding to nearest lost lies in `rest`, as bf16.
template <bool kDrawn>
struct WithKahan : Format<Float::bf16, kDrawn> {};

template <class Stored>
__attribute__((always_inline)) static inline Pair load_weights(Stored, const void* param,
                                                               const void*, int64_t begin) {
  return load_pair<Stored::type>(param, begin);
}

__attribute__((always_inline)) static inline Pair load_weights(WithRemainder, const void* param,
                                                               const void* rest, int64_t begin) {
  using Ints = int32_t __attribute__((vector_size(4 * kLanes)));
  const Bits high = load_bits(static_cast<const uint16_t*>(param) + begin);
  const Bits low = load_bits(static_cast<const uint16_t*>(rest) + begin);
  const Ints even = reinterpret_cast<Ints>(low << 16) >> 16,
             odd = reinterpret_cast<Ints>(low) >> 16;
  return {as_floats((high << 16) + reinterpret_cast<Bits>(even)),
          as_floats((high & kept(0xFFFF0000u)) + reinterpret_cast<Bits>(odd))};
}

template <bool kDrawn>
__attribute__((always_inline)) static inline Pair load_weights(WithKahan<kDrawn>, const void* param,
                                                               const void* rest, int64_t begin) {
  const Pair weight = load_pair<Float::bf16>(param, begin);
  const Pair lost = load_pair<Float::bf16>(rest, begin);
  return {weight.even + lost.even, weight.odd + lost.odd};
}

template <class Stored>
__attribute__((always_inline)) static inline void store_weights(Stored stored, Pair x,
                                                                const uint16_t* draws, void* param,
                                                                void*, int64_t begin) {
  store_pair(stored, x, draws, param, begin);
}

__attribute__((always_inline)) static inline void store_weights(WithRemainder, Pair x,
                                                                const uint16_t*, void* param,
                                                                void* rest, int64_t begin) {
  const Bits even = as_bits(x.even), odd = as_bits(x.odd), half = kept(0x8000u);
  const Bits high = upper_halves(even + half, odd + half);
  const Bits low = (even & kept(0xFFFFu)) | odd << 16;
  memcpy(static_cast<uint16_t*>(param) + begin, &high, sizeof high);
  memcpy(static_cast<uint16_t*>(rest) + begin, &low, sizeof low);
}

template <bool kDrawn>
__attribute__((always_inline)) static inline void store_weights(WithKahan<kDrawn> stored, Pair x,
                                                                const uint16_t* draws, void* param,
                                                                void* rest, int64_t begin) {
  store_pair(Format<Float::bf16, false>{}, x, nullptr, param, begin);
  const Pair weight = load_pair<Float::bf16>(param, begin);
  store_pair(stored, {x.even - weight.even, x.odd - weight.odd}, draws, rest, begin);
}

// body(stored) for every way in which the pairs are stored, or false where there is none.
template <class Body>
static inline bool with_weights(Float type, int64_t master, bool drawn, const Body& body) {
  if (master == int64_t(Master::none)) return with_format(type, drawn, body), true;
  if (type != Float::bf16) return false;
  if (master == int64_t(Master::remainder)) return body(WithRemainder{}), true;
  return drawn ? body(WithKahan<true>{}) : body(WithKahan<false>{}), true;
}

}  // namespace LOWP_ISA
}  // namespace lowp
