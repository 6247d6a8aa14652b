// Plain values in FP4 and back, blocks one after another.
//
//   quantize     a thread reads a block of 16 or 32 values, encodes it as every host does (format/codecs.h), writes a
//                scale and the block's codes, two in a byte
//   dequantize   a thread reads a byte of codes and its scale, writes two values
//
// Encoding is bound by instructions, a division a value (0.9 to 1.4 TB/s read and written on an H100, whose memory
// gives 3.1), decoding by its stores (1.7). What a thread reads of a block lies in one or two lines, which stay in L1
// while it comes back for the next value.
#include <cuda_fp16.h>

#include "cuda/params.h"
#include "format/codecs.h"

namespace thriftattn::cuda {
namespace {

constexpr int kThreads = 256;

int64_t grid_for(int64_t work) { return (work + kThreads - 1) / kThreads; }

__device__ float load(const void* x, DType dtype, int64_t at) {
  if (dtype == DType::f32) return static_cast<const float*>(x)[at];
  const uint16_t bits = static_cast<const uint16_t*>(x)[at];
  return dtype == DType::f16 ? __half2float(__ushort_as_half(bits)) : bf16_decode(bits);
}

template <Fp4Format kFormat>
__global__ void __launch_bounds__(kThreads)
    quantize_kernel(const void* x, DType dtype, Scales rule, int64_t blocks, uint8_t* codes, uint8_t* scales) {
  constexpr int kBlock = block_size(kFormat);
  const int64_t block = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (block >= blocks) return;
  float values[kBlock];
  uint8_t unpacked[kBlock];
#pragma unroll
  for (int i = 0; i < kBlock; ++i) values[i] = load(x, dtype, block * kBlock + i);
  scales[block] = encode_block(kFormat, rule, values, unpacked);
#pragma unroll
  for (int i = 0; i < kBlock / 2; ++i)
    codes[block * (kBlock / 2) + i] = static_cast<uint8_t>(unpacked[2 * i] | unpacked[2 * i + 1] << 4);
}

// Two values stand side by side in x, which is aligned to 8 bytes.
__global__ void __launch_bounds__(kThreads)
    dequantize_kernel(const uint8_t* codes, const uint8_t* scales, Fp4Format format, int64_t bytes, float* x) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= bytes) return;
  const float scale = decode_scale(format, scales[i / (block_size(format) / 2)]);
  const uint8_t pair = codes[i];
  reinterpret_cast<float2*>(x)[i] = {e2m1_decode(pair) * scale, e2m1_decode(pair >> 4) * scale};
}

}  // namespace

cudaError_t launch_quantize(const void* x, DType dtype, int64_t n, Fp4Format format, Scales rule, uint8_t* codes,
                            uint8_t* scales, cudaStream_t stream) {
  if (n == 0) return cudaSuccess;
  const int64_t blocks = n / block_size(format);
  const auto kernel =
      format == Fp4Format::nvfp4 ? quantize_kernel<Fp4Format::nvfp4> : quantize_kernel<Fp4Format::mxfp4>;
  kernel<<<grid_for(blocks), kThreads, 0, stream>>>(x, dtype, rule, blocks, codes, scales);
  return cudaGetLastError();
}

cudaError_t launch_dequantize(const uint8_t* codes, const uint8_t* scales, int64_t n, Fp4Format format, float* x,
                              cudaStream_t stream) {
  if (n == 0) return cudaSuccess;
  dequantize_kernel<<<grid_for(n / 2), kThreads, 0, stream>>>(codes, scales, format, n / 2, x);
  return cudaGetLastError();
}

}  // namespace thriftattn::cuda
