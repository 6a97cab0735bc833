// The one way onto the device: guarded, on the given stream, checked, and named in the error.
#pragma once
#include <cuda_runtime.h>

#include "cuda/ops.h"

namespace lowp {
namespace cuda {

struct Grid {
  dim3 blocks, threads;
  size_t shared = 0;  // bytes of dynamic shared memory
  dim3 cluster{1, 1, 1};
};

// Makes a device current, and the one before again at the end.
class DeviceGuard {
 public:
  DeviceGuard(const char* op, int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
};

// Throws std::runtime_error with the op's name unless status is cudaSuccess.
void check(const char* op, cudaError_t status);

void launch_raw(const char* op, const Place& place, const void* kernel, const Grid& grid,
                void** parameters);

template <class... Parameters>
void launch(const char* op, const Place& place, void (*kernel)(Parameters...), const Grid& grid,
            Parameters... parameters) {
  void* pointers[] = {&parameters...};
  launch_raw(op, place, reinterpret_cast<const void*>(kernel), grid, pointers);
}

struct Capability {
  int major, minor, processors;
};
Capability capability(const char* op, int device);  // asked for once a device

}  // namespace cuda
}  // namespace lowp
