// The kernels for every other d and d_v, up to 256.
#include "cuda/decode_kernel.cuh"

namespace thriftattn::cuda {

const void* decode_kernel_d256(int columns) {
  if (columns == 4) return reinterpret_cast<const void*>(decode_kernel<256, 4>);
  return reinterpret_cast<const void*>(decode_kernel<256, 8>);
}

}  // namespace thriftattn::cuda
