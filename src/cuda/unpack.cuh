// FP4 codes and their scales, as format/device_layout.h orders them, to what the products take.
#pragma once

#include <cstdint>

#include "cuda/mma.cuh"
#include "format/codecs.h"

namespace thriftattn::cuda {

inline constexpr float kCodeScale = 16384.0f;  // an unpacked code is 2^-14 times what it means

struct Fragment {
  uint32_t a[4];
};

// 6 AND and 3 shifts or products for 8 codes: device_layout.h says where their bits are.
__device__ inline Fragment unpack_codes(uint32_t w) {
  constexpr uint32_t kMask = 0x8e008e00u;
  return {w & kMask, (w << 3) & kMask, ((w & 0x40384038u) * 66u) & kMask, ((w & 0x20072007u) * 516u) & kMask};
}

// Four E4M3 scales.
__device__ inline void e4m3_scales(uint32_t x, float (&scale)[4]) {
#if __CUDA_ARCH__ >= 890
  uint32_t low, high;
  asm("{.reg .b16 a, b;\n mov.b32 {a, b}, %2;\n cvt.rn.f16x2.e4m3x2 %0, a;\n cvt.rn.f16x2.e4m3x2 %1, b;}"
      : "=r"(low), "=r"(high)
      : "r"(x));
  const float2 first = unpack_half2(low), second = unpack_half2(high);
  scale[0] = first.x, scale[1] = first.y, scale[2] = second.x, scale[3] = second.y;
#else
  // The byte's seven low bits stand for the same number in a half, but for the bias: 2^8. NaN (0x7f) has to be made.
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t b = x >> 8 * i & 0x7fu;
    scale[i] =
        b == 0x7fu ? float_of(0x7fc00000u) : 256.0f * __half2float(__ushort_as_half(static_cast<uint16_t>(b << 7)));
  }
#endif
}

// Four E8M0 scales. 0 means 2^-127, which nothing is lost by taking for 0, and 255 NaN.
__device__ inline void e8m0_scales(uint32_t x, float (&scale)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t b = x >> 8 * i & 0xffu;
    scale[i] = float_of(b == 255 ? 0x7fc00000u : b << 23);
  }
}

// A word of scales: rows g and g+8 of one tile of 16 rows, and of the next.
template <bool kMxfp4>
__device__ void unpack_scales(uint32_t word, float (&scale)[4]) {
  if constexpr (kMxfp4)
    e8m0_scales(word, scale);
  else
    e4m3_scales(word, scale);
}

}  // namespace thriftattn::cuda
