// Which GPUs there are.
#include <cuda_runtime_api.h>
#include <fmt/format.h>

#include "thriftattn/cuda.h"

namespace thriftattn::cuda {

Result<std::vector<Gpu>> gpus() {
  int count = 0;
  if (const cudaError_t error = cudaGetDeviceCount(&count); error != cudaSuccess)
    return unsupported(fmt::format("no GPU can be used: {}", cudaGetErrorString(error)));
  std::vector<Gpu> all;
  for (int i = 0; i < count; ++i) {
    cudaDeviceProp p;
    if (const cudaError_t error = cudaGetDeviceProperties(&p, i); error != cudaSuccess)
      return unsupported(fmt::format("GPU {} does not answer: {}", i, cudaGetErrorString(error)));
    all.push_back({i, p.name, p.major * 10 + p.minor, p.multiProcessorCount,
                   static_cast<int64_t>(p.sharedMemPerBlockOptin), p.l2CacheSize,
                   static_cast<int64_t>(p.totalGlobalMem)});
  }
  return all;
}

Result<Machine> machine(int index) {
  THRIFTATTN_ASSIGN_OR_RETURN(all, gpus());
  if (index < 0 || index >= std::ssize(all))
    return not_found(fmt::format("GPU {} does not exist: there are {}", index, all.size()));
  Machine machine;
  machine.gpu = all[static_cast<size_t>(index)];
  return machine;
}

}  // namespace thriftattn::cuda
