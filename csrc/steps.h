// How often each of an optimizer's tensors was updated.
#pragma once
#include <stdint.h>

#include <vector>

namespace lowp {

// Counts one more update in every step, a float each (some may be the same); the new counts.
inline std::vector<int64_t> advance_steps(const std::vector<uintptr_t>& steps) {
  for (const uintptr_t step : steps) *reinterpret_cast<float*>(step) += 1.0f;
  std::vector<int64_t> counts;
  counts.reserve(steps.size());
  for (const uintptr_t step : steps) {
    counts.push_back(static_cast<int64_t>(*reinterpret_cast<const float*>(step)));
  }
  return counts;
}

}  // namespace lowp
