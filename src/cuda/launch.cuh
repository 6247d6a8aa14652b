// Launching a kernel that may begin before the one ahead of it on the stream has ended (programmatic dependent launch;
// before sm_90 an ordinary one). mma.cuh has what such a kernel calls: wait_for_previous_kernel, let_next_kernel_start.
#pragma once

#include <cuda_runtime_api.h>

#include <mutex>
#include <set>
#include <utility>

namespace thriftattn::cuda {

// Lets launches of a kernel on the current GPU have all the dynamic shared memory that there is room for. What is
// allowed belongs to the kernel and not to a launch: were it what one launch needs, another thread's could fail for it.
inline cudaError_t allow_shared_memory(const void* kernel) {
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> allowed;
  int device = 0, most = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  const std::lock_guard lock(mutex);
  if (allowed.contains({kernel, device})) return cudaSuccess;
  cudaFuncAttributes of = {};
  if (const cudaError_t error = cudaFuncGetAttributes(&of, kernel); error != cudaSuccess) return error;
  if (const cudaError_t error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
      error != cudaSuccess)
    return error;
  const int dynamic = most - static_cast<int>(of.sharedSizeBytes);
  if (const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, dynamic);
      error != cudaSuccess)
    return error;
  allowed.emplace(kernel, device);
  return cudaSuccess;
}

// `parameters` point to the kernel's, as for cudaLaunchKernel.
inline cudaError_t launch_early(const void* kernel, dim3 grid, dim3 block, int shared_bytes, cudaStream_t stream,
                                void** parameters) {
  int device = 0, major = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  if (const cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
      error != cudaSuccess)
    return error;
  if (const cudaError_t error = allow_shared_memory(kernel); error != cudaSuccess) return error;
  cudaLaunchAttribute early = {};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = major >= 9 ? 1 : 0;
  return cudaLaunchKernelExC(&config, kernel, parameters);
}

// Kernels of one struct of parameters.
template <class Parameters>
cudaError_t launch_early(void (*kernel)(Parameters), dim3 grid, dim3 block, int shared_bytes, cudaStream_t stream,
                         Parameters parameters) {
  void* pointers[] = {&parameters};
  return launch_early(reinterpret_cast<const void*>(kernel), grid, block, shared_bytes, stream, pointers);
}

}  // namespace thriftattn::cuda
