// The kernels for d = d_v = 128.
#include "cuda/decode_kernel.cuh"

namespace thriftattn::cuda {

namespace {

template <bool kMxfp4>
const void* kernel_for(int columns) {
  if (columns == 4) return reinterpret_cast<const void*>(decode_kernel<128, 4, kMxfp4>);
  if (columns == 8) return reinterpret_cast<const void*>(decode_kernel<128, 8, kMxfp4>);
  return reinterpret_cast<const void*>(decode_kernel<128, 16, kMxfp4>);
}

}  // namespace

const void* decode_kernel_d128(int columns, Fp4Format format) {
  return format == Fp4Format::mxfp4 ? kernel_for<true>(columns) : kernel_for<false>(columns);
}

}  // namespace thriftattn::cuda
