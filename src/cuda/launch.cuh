// Launching a kernel that may begin before the one ahead of it on the stream has ended (programmatic dependent launch;
// before sm_90 an ordinary one). mma.cuh has what such a kernel calls: wait_for_previous_kernel, let_next_kernel_start.
#pragma once

#include <cuda_runtime_api.h>

namespace thriftattn::cuda {

// `parameters` point to the kernel's, as for cudaLaunchKernel.
inline cudaError_t launch_early(const void* kernel, dim3 grid, dim3 block, int shared_bytes, cudaStream_t stream,
                                void** parameters) {
  int device = 0, major = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  if (const cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
      error != cudaSuccess)
    return error;
  if (const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
      error != cudaSuccess)
    return error;
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
