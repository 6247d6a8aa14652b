// The kernels for d = d_v = 128.
#include "cuda/decode_kernel.cuh"

namespace thriftattn::cuda {

const void* decode_kernel_d128(int columns) {
  if (columns == 4) return reinterpret_cast<const void*>(decode_kernel<128, 4>);
  if (columns == 8) return reinterpret_cast<const void*>(decode_kernel<128, 8>);
  return reinterpret_cast<const void*>(decode_kernel<128, 16>);
}

}  // namespace thriftattn::cuda
