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

// Two E4M3 scales, in the low 16 bits of x.
__device__ inline float2 e4m3_scales(uint32_t x) {
#if __CUDA_ARCH__ >= 890
  uint32_t y;
  asm("{.reg .b16 s;\n cvt.u16.u32 s, %1;\n cvt.rn.f16x2.e4m3x2 %0, s;}" : "=r"(y) : "r"(x));
  return unpack_half2(y);
#else
  // The byte's seven low bits stand for the same number in a half, but for the bias: 2^8. NaN (0x7f) has to be made.
  const auto scale = [](uint32_t b) {
    return b == 0x7fu ? float_of(0x7fc00000u) : 256.0f * __half2float(__ushort_as_half(static_cast<uint16_t>(b << 7)));
  };
  return {scale(x & 0x7fu), scale(x >> 8 & 0x7fu)};
#endif
}

// Two E8M0 scales. 0 means 2^-127, which nothing is lost by taking for 0, and 255 NaN.
__device__ inline float2 e8m0_scales(uint32_t x) {
  const auto scale = [](uint32_t b) { return float_of(b == 255 ? 0x7fc00000u : b << 23); };
  return {scale(x & 0xffu), scale(x >> 8 & 0xffu)};
}

// Both pairs of a word: rows g and g+8 of one tile of 16 rows, and of the next.
template <bool kMxfp4>
__device__ void unpack_scales(uint32_t word, float (&scale)[4]) {
  const float2 first = kMxfp4 ? e8m0_scales(word) : e4m3_scales(word);
  const float2 second = kMxfp4 ? e8m0_scales(word >> 16) : e4m3_scales(word >> 16);
  scale[0] = first.x, scale[1] = first.y, scale[2] = second.x, scale[3] = second.y;
}

}  // namespace thriftattn::cuda
