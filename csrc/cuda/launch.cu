#include "cuda/launch.h"

#include <map>
#include <mutex>
#include <stdexcept>
#include <string>

namespace lowp {
namespace cuda {

void check(const char* op, cudaError_t status) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // an error that is thrown must not be found again by the next op
  throw std::runtime_error(std::string("lowp::") + op + ": CUDA error " +
                           cudaGetErrorName(status) + ": " + cudaGetErrorString(status));
}

DeviceGuard::DeviceGuard(const char* op, int device) {
  check(op, cudaGetDevice(&before_));
  if (before_ == device) return;
  check(op, cudaSetDevice(device));
}

DeviceGuard::~DeviceGuard() { cudaSetDevice(before_); }

void launch_raw(const char* op, const Place& place, const void* kernel, const Grid& grid,
                void** parameters) {
  if (grid.blocks.x == 0 || grid.blocks.y == 0) return;
  const DeviceGuard guard(op, place.device);
  constexpr size_t kWithoutAsking = 48 * 1024;  // bytes of shared memory
  if (grid.shared > kWithoutAsking) {
    check(op, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   static_cast<int>(grid.shared)));
  }
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {grid.cluster.x, grid.cluster.y, grid.cluster.z};
  const bool clustered = grid.cluster.x * grid.cluster.y * grid.cluster.z > 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid.blocks;
  config.blockDim = grid.threads;
  config.dynamicSmemBytes = grid.shared;
  config.stream = reinterpret_cast<cudaStream_t>(place.stream);
  config.attrs = &cluster;
  config.numAttrs = clustered ? 1 : 0;
  check(op, cudaLaunchKernelExC(&config, kernel, parameters));
}

Capability capability(const char* op, int device) {
  static std::mutex mutex;
  static std::map<int, Capability> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(device);
  if (found != known.end()) return found->second;
  Capability c = {};
  check(op, cudaDeviceGetAttribute(&c.major, cudaDevAttrComputeCapabilityMajor, device));
  check(op, cudaDeviceGetAttribute(&c.minor, cudaDevAttrComputeCapabilityMinor, device));
  check(op, cudaDeviceGetAttribute(&c.processors, cudaDevAttrMultiProcessorCount, device));
  known[device] = c;
  return c;
}

}  // namespace cuda
}  // namespace lowp
