// The number formats, once, for every host instruction set and for nvcc: what a code, a scale and a block mean.
// docs/design.md, section 2, is normative. All encoders round to nearest, ties to the even code, in FP32; they assume
// the default floating-point environment and that the compiler does not contract a*b+c (see CMakeLists.txt).
//
//   f16, bf16   IEEE binary16 and bfloat16; overflow goes to infinity, NaN stays NaN
//   e4m3        OCP FP8 E4M3: no infinity, largest value 448, NaN is 0x7f
//   e2m1        FP4: 0, 0.5, 1, 1.5, 2, 3, 4, 6 with the sign in bit 3
//   e8m0        a power of two 2^(byte - 127); 255 is NaN
//   NVFP4       E2M1 codes, one E4M3 scale (never negative) per 16 values
//   MXFP4       E2M1 codes, one E8M0 scale per 32 values
#pragma once

#include <bit>
#include <cstdint>

#include "thriftattn/method.h"

#ifdef __CUDACC__
#define THRIFTATTN_HD __host__ __device__
#else
#define THRIFTATTN_HD
#endif

namespace thriftattn {

inline constexpr int kMaxBlockSize = 32;
inline constexpr float kE4m3Max = 448.0f;
inline constexpr float kE2m1Max = 6.0f;
inline constexpr int kPageExponentMax = 100;  // |page exponent| at most: 448 * 6 * 2^100 and 2^-10 * 2^-100 stay normal

THRIFTATTN_HD constexpr uint32_t bits_of(float x) { return std::bit_cast<uint32_t>(x); }
THRIFTATTN_HD constexpr float float_of(uint32_t bits) { return std::bit_cast<float>(bits); }

// 2^e, exact; e in [-127, 127].
THRIFTATTN_HD constexpr float pow2(int e) {
  return float_of(e > -127 ? static_cast<uint32_t>(e + 127) << 23 : 0x00400000u);
}

// --- 16 bit
// -----------------------------------------------------------------------------------------------------------

THRIFTATTN_HD constexpr uint16_t f16_encode(float x) {
  const uint32_t sign = (bits_of(x) >> 16) & 0x8000u;
  const uint32_t a = bits_of(x) & 0x7fffffffu;
  uint32_t h = 0;
  if (a > 0x7f800000u) {
    h = 0x7e00u | ((a >> 13) & 0x3ffu);  // NaN, made quiet, keeps the payload that fits
  } else if (a >= 0x477ff000u) {         // 65520, half-way between 65504 and 2^16
    h = 0x7c00u;
  } else if (a < 0x38800000u) {  // below 2^-14: adding 0.5 leaves a multiple of 2^-24, the subnormals' unit
    h = bits_of(float_of(a) + 0.5f) - bits_of(0.5f);
  } else {
    h = (a + 0xfffu + ((a >> 13) & 1u) - (112u << 23)) >> 13;
  }
  return static_cast<uint16_t>(sign | h);
}

THRIFTATTN_HD constexpr float f16_decode(uint16_t h) {
  const uint32_t sign = (h & 0x8000u) << 16;
  const uint32_t a = h & 0x7fffu;
  if (a < 0x400u) return float_of(sign | bits_of(static_cast<float>(a) * 0x1p-24f));
  if (a >= 0x7c00u) return float_of(sign | 0x7f800000u | ((a & 0x3ffu) << 13));
  return float_of(sign | ((a << 13) + (112u << 23)));
}

THRIFTATTN_HD constexpr uint16_t bf16_encode(float x) {
  const uint32_t u = bits_of(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((u >> 16) | 0x40u);
  return static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

THRIFTATTN_HD constexpr float bf16_decode(uint16_t h) { return float_of(static_cast<uint32_t>(h) << 16); }

// --- 8 bit
// ------------------------------------------------------------------------------------------------------------

// Saturates to +-448, infinities too. NaN gives +-NaN.
THRIFTATTN_HD constexpr uint8_t e4m3_encode(float x) {
  const uint32_t sign = (bits_of(x) >> 24) & 0x80u;
  const uint32_t a = bits_of(x) & 0x7fffffffu;
  uint32_t c = 0;
  if (a > 0x7f800000u) {
    c = 0x7fu;
  } else if (a >= bits_of(kE4m3Max)) {
    c = 0x7eu;
  } else if (a < 0x3c800000u) {  // below 2^-6: adding 2^14 leaves a multiple of 2^-9, the subnormals' unit
    c = bits_of(float_of(a) + 0x1p14f) - bits_of(0x1p14f);
  } else {
    c = (a + 0x7ffffu + ((a >> 20) & 1u) - (120u << 23)) >> 20;
  }
  return static_cast<uint8_t>(sign | c);
}

THRIFTATTN_HD constexpr float e4m3_decode(uint8_t c) {
  const uint32_t sign = (c & 0x80u) << 24;
  const uint32_t a = c & 0x7fu;
  if (a < 8u) return float_of(sign | bits_of(static_cast<float>(a) * 0x1p-9f));
  if (a == 0x7fu) return float_of(sign | 0x7fc00000u);
  return float_of(sign | ((a << 20) + (120u << 23)));
}

// The byte of 2^exponent; the exponent saturates to [-127, 127].
THRIFTATTN_HD constexpr uint8_t e8m0_encode_exponent(int exponent) {
  return static_cast<uint8_t>((exponent < -127 ? -127 : exponent > 127 ? 127 : exponent) + 127);
}

THRIFTATTN_HD constexpr float e8m0_decode(uint8_t c) { return c == 255 ? float_of(0x7fc00000u) : pow2(c - 127); }

// --- 4 bit
// ------------------------------------------------------------------------------------------------------------

// Saturates to +-6. There is no NaN: it gives +-0, and a block that holds one has a NaN scale instead.
THRIFTATTN_HD constexpr uint8_t e2m1_encode(float x) {
  const float a = float_of(bits_of(x) & 0x7fffffffu);
  // One comparison per midpoint; a tie goes up only where the code above is even.
  const int code = (a > 0.25f) + (a >= 0.75f) + (a > 1.25f) + (a >= 1.75f) + (a > 2.5f) + (a >= 3.5f) + (a > 5.0f);
  return static_cast<uint8_t>(((bits_of(x) >> 28) & 8u) | static_cast<uint32_t>(code));
}

// Reads the low four bits.
THRIFTATTN_HD constexpr float e2m1_decode(uint8_t code) {
  const uint32_t sign = (code & 8u) << 28;
  const uint32_t a = code & 7u;
  if (a < 2u) return float_of(sign | (a * bits_of(0.5f)));
  return float_of(sign | ((a << 22) + (126u << 23)));
}

// --- blocks
// -----------------------------------------------------------------------------------------------------------

// Values that share one scale.
THRIFTATTN_HD constexpr int block_size(Fp4Format format) { return format == Fp4Format::nvfp4 ? 16 : 32; }

THRIFTATTN_HD constexpr float decode_scale(Fp4Format format, uint8_t scale) {
  return format == Fp4Format::nvfp4 ? e4m3_decode(scale) : e8m0_decode(scale);
}

// The exponent e of the power of two by which a page is multiplied before it is encoded (and by 2^-e after it is
// decoded): the largest with amax * 2^e <= 448 * 6, or 448 * 4 under 4over6 so that both candidates are in range;
// clamped to +-kPageExponentMax. 0 where there is nothing to scale: amax = 0, and MXFP4, whose scales have the range.
THRIFTATTN_HD constexpr int page_exponent(float amax, Fp4Format format, Scales scales) {
  if (format == Fp4Format::mxfp4 || amax == 0.0f) return 0;
  const uint32_t limit = bits_of(scales == Scales::six ? kE4m3Max * 6.0f : kE4m3Max * 4.0f);
  const uint32_t a = bits_of(amax) & 0x7fffffffu;
  const bool mantissa_above = (a & 0x7fffffu) > (limit & 0x7fffffu);
  const int e = static_cast<int>(limit >> 23) - static_cast<int>(a >> 23) - (mantissa_above ? 1 : 0);
  return e < -kPageExponentMax ? -kPageExponentMax : e > kPageExponentMax ? kPageExponentMax : e;
}

namespace codecs_detail {

// max |x|; a NaN among x wins, because NaN is the largest bit pattern.
THRIFTATTN_HD constexpr float block_amax(const float* x, int n) {
  uint32_t amax = 0;
  for (int i = 0; i < n; ++i) {
    const uint32_t a = bits_of(x[i]) & 0x7fffffffu;
    amax = a > amax ? a : amax;
  }
  return float_of(amax);
}

THRIFTATTN_HD constexpr void encode_nvfp4_codes(const float* x, float scale, uint8_t* codes) {
  for (int i = 0; i < 16; ++i) codes[i] = scale > 0.0f ? e2m1_encode(x[i] / scale) : uint8_t{0};
}

// Sum of squared errors. In double and in order, because 4over6 decides by it and every backend must agree.
THRIFTATTN_HD constexpr double nvfp4_squared_error(const float* x, float scale, const uint8_t* codes) {
  double sum = 0;
  for (int i = 0; i < 16; ++i) {
    const double error = static_cast<double>(x[i]) - static_cast<double>(e2m1_decode(codes[i]) * scale);
#ifdef __CUDA_ARCH__
    sum = __dadd_rn(sum, __dmul_rn(error, error));
#else
    sum += error * error;
#endif
  }
  return sum;
}

THRIFTATTN_HD constexpr uint8_t encode_nvfp4_block(Scales scales, const float* x, uint8_t* codes) {
  const float amax = block_amax(x, 16);
  const uint8_t six = e4m3_encode(amax / 6.0f);
  encode_nvfp4_codes(x, e4m3_decode(six), codes);
  if (scales == Scales::six || amax != amax) return six;
  const uint8_t four = e4m3_encode(amax / 4.0f);
  uint8_t codes_four[16] = {};
  encode_nvfp4_codes(x, e4m3_decode(four), codes_four);
  if (nvfp4_squared_error(x, e4m3_decode(six), codes) <= nvfp4_squared_error(x, e4m3_decode(four), codes_four)) {
    return six;
  }
  for (int i = 0; i < 16; ++i) codes[i] = codes_four[i];
  return four;
}

THRIFTATTN_HD constexpr uint8_t encode_mxfp4_block(const float* x, uint8_t* codes) {
  const float amax = block_amax(x, 32);
  if (!(amax > 0.0f)) {
    for (int i = 0; i < 32; ++i) codes[i] = 0;
    return amax != amax ? uint8_t{255} : uint8_t{0};
  }
  // The exponent field is floor(log2(amax)) + 127; E2M1's largest power of two is 2^2. The field of a subnormal is
  // wrong, and its scale is the smallest all the same.
  const uint8_t scale = e8m0_encode_exponent(static_cast<int>(bits_of(amax) >> 23) - 127 - 2);
  const float inverse = pow2(127 - scale);
  for (int i = 0; i < 32; ++i) codes[i] = e2m1_encode(x[i] * inverse);
  return scale;
}

}  // namespace codecs_detail

// Encodes x[block_size(format)], already multiplied by the page scale, into one code (0..15) per byte of `codes` and
// returns the scale byte. 4over6 concerns NVFP4 only. A NaN in x makes the scale NaN; infinities saturate.
THRIFTATTN_HD constexpr uint8_t encode_block(Fp4Format format, Scales scales, const float* x, uint8_t* codes) {
  return format == Fp4Format::nvfp4 ? codecs_detail::encode_nvfp4_block(scales, x, codes)
                                    : codecs_detail::encode_mxfp4_block(x, codes);
}

}  // namespace thriftattn
