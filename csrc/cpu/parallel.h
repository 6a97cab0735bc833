// Splits a range over OpenMP threads. Included inside every instruction set's translation unit, so
// everything here has internal linkage.
#pragma once
#include <omp.h>
#include <stdint.h>

namespace lowp {

// Set in the child of a fork: its OpenMP pool is gone and the first parallel region would wait for
// it for ever, so the child runs serially.
extern bool g_forked_child;

namespace LOWP_ISA {

// body(begin, end) over disjoint ranges that cover 0 .. n-1; each holds at least `grain` items but
// for the last. Which thread takes which range never changes a result.
template <class Body>
static inline __attribute__((always_inline)) void parallel_for(int64_t n, int64_t grain,
                                                               int threads, const Body& body) {
  if (n <= 0) return;
  const int64_t most = (n + grain - 1) / grain;
  const int64_t team = most < threads ? most : threads;
  if (team <= 1 || g_forked_child) {
    body(int64_t{0}, n);
    return;
  }
#pragma omp parallel num_threads(static_cast<int>(team))
  {
    const int64_t rank = omp_get_thread_num(), size = omp_get_num_threads();
    const int64_t each = n / size, extra = n % size;
    const int64_t begin = rank * each + (rank < extra ? rank : extra);
    const int64_t end = begin + each + (rank < extra ? 1 : 0);
    if (begin < end) body(begin, end);
  }
}

}  // namespace LOWP_ISA
}  // namespace lowp
