// The fast codecs against the oracle's tables, bit for bit and, where the space is small, exhaustively.
#include "format/codecs.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "oracle/codecs.h"

namespace thriftattn {
namespace {

// Every finite 16-bit float and infinities, both formats; what lies half-way between neighbours and just beside it
// comes from `around`.
std::vector<float> all_16_bit_values() {
  std::vector<float> values;
  for (uint32_t h = 0; h < 0x10000; ++h) {
    const float bf16 = std::bit_cast<float>(h << 16);
    if (!std::isnan(bf16)) values.push_back(bf16);
    const bool infinite_or_nan = (h & 0x7c00) == 0x7c00;
    if (infinite_or_nan) continue;
    const double half = oracle::f16_values()[h & 0x7fff];
    values.push_back(static_cast<float>(h & 0x8000 ? -half : half));
  }
  return values;
}

// The midpoints between neighbouring values of a table, where rounding decides, and the floats next to them.
std::vector<float> around_midpoints(const std::vector<double>& table) {
  std::vector<float> values;
  for (size_t i = 0; i + 1 < table.size(); ++i) {
    const float middle = static_cast<float>((table[i] + table[i + 1]) / 2);
    for (float x : {middle, std::nextafter(middle, 0.0f), std::nextafter(middle, INFINITY)}) {
      values.push_back(x);
      values.push_back(-x);
    }
  }
  return values;
}

uint32_t oracle_code(const std::vector<double>& table, float x, int sign_bit) {
  return static_cast<uint32_t>(oracle::nearest(table, x)) | (std::signbit(x) ? 1u << sign_bit : 0u);
}

template <class Encode>
void expect_encodes_like_oracle(const std::vector<double>& table, int sign_bit, Encode encode) {
  std::vector<float> inputs = all_16_bit_values();
  const std::vector<float> ties = around_midpoints(table);
  inputs.insert(inputs.end(), ties.begin(), ties.end());
  std::mt19937 random(7);
  for (int i = 0; i < 300000; ++i) {
    const float x = std::bit_cast<float>(static_cast<uint32_t>(random()));
    if (!std::isnan(x)) inputs.push_back(x);
  }
  int64_t wrong = 0;
  for (float x : inputs) {
    const uint32_t want = oracle_code(table, x, sign_bit), got = encode(x);
    if (want != got && ++wrong <= 5) ADD_FAILURE() << x << ": code " << got << ", oracle " << want;
  }
  EXPECT_EQ(wrong, 0) << "of " << inputs.size();
}

TEST(F16, EncodesEveryValueAndEveryTieAsTheTableDoes) {
  expect_encodes_like_oracle(oracle::f16_values(), 15, f16_encode);
}
TEST(Bf16, EncodesEveryValueAndEveryTieAsTheTableDoes) {
  expect_encodes_like_oracle(oracle::bf16_values(), 15, bf16_encode);
}
TEST(E4m3, EncodesEveryValueAndEveryTieAsTheTableDoes) {
  expect_encodes_like_oracle(oracle::e4m3_values(), 7, e4m3_encode);
}
TEST(E2m1, EncodesEveryValueAndEveryTieAsTheTableDoes) {
  expect_encodes_like_oracle(oracle::e2m1_values(), 3, e2m1_encode);
}

TEST(F16, DecodesEveryCodeAndEncodesItBack) {
  for (uint32_t h = 0; h < 0x10000; ++h) {
    const uint16_t code = static_cast<uint16_t>(h);
    const float x = f16_decode(code);
    if ((h & 0x7c00) == 0x7c00) {
      ASSERT_EQ(std::isnan(x), (h & 0x3ff) != 0) << h;
      ASSERT_EQ(std::isinf(x), (h & 0x3ff) == 0) << h;
      ASSERT_EQ(std::isnan(f16_decode(f16_encode(x))), std::isnan(x)) << h;
    } else {
      ASSERT_EQ(x, std::copysign(oracle::f16_values()[h & 0x7fff], h & 0x8000 ? -1.0 : 1.0)) << h;
      ASSERT_EQ(f16_encode(x), code);
    }
    ASSERT_EQ(std::signbit(x), (h & 0x8000) != 0) << h;
  }
}

TEST(Bf16, DecodesEveryCodeAndEncodesItBack) {
  for (uint32_t h = 0; h < 0x10000; ++h) {
    const uint16_t code = static_cast<uint16_t>(h);
    const float x = bf16_decode(code);
    if ((h & 0x7f80) == 0x7f80) {
      ASSERT_EQ(std::isnan(x), (h & 0x7f) != 0) << h;
      ASSERT_EQ(std::isnan(bf16_decode(bf16_encode(x))), std::isnan(x)) << h;
    } else {
      ASSERT_EQ(x, std::copysign(oracle::bf16_values()[h & 0x7fff], h & 0x8000 ? -1.0 : 1.0)) << h;
      ASSERT_EQ(bf16_encode(x), code);
    }
  }
}

TEST(SmallFloats, OverflowIsInfiniteIn16BitAndSaturatesBelow) {
  EXPECT_EQ(f16_encode(65519.996f), 0x7bff);
  EXPECT_EQ(f16_encode(65520.0f), 0x7c00);
  EXPECT_EQ(f16_encode(-INFINITY), 0xfc00);
  EXPECT_EQ(bf16_encode(3.4e38f), 0x7f80);
  EXPECT_EQ(e4m3_encode(1e30f), 0x7e);
  EXPECT_EQ(e4m3_encode(-INFINITY), 0xfe);
  EXPECT_EQ(e2m1_encode(INFINITY), 7);
  EXPECT_EQ(e2m1_encode(-1e30f), 15);
}

TEST(SmallFloats, NanStaysNan) {
  for (float nan : {NAN, -NAN, std::bit_cast<float>(0x7f800001u)}) {
    EXPECT_TRUE(std::isnan(f16_decode(f16_encode(nan))));
    EXPECT_TRUE(std::isnan(bf16_decode(bf16_encode(nan))));
    EXPECT_TRUE(std::isnan(e4m3_decode(e4m3_encode(nan))));
    for (Fp4Format format : {Fp4Format::nvfp4, Fp4Format::mxfp4}) {
      for (Scales scales : {Scales::six, Scales::four_over_six}) {
        float x[kMaxBlockSize] = {1.0f, nan, INFINITY};
        uint8_t codes[kMaxBlockSize];
        EXPECT_TRUE(std::isnan(decode_scale(format, encode_block(format, scales, x, codes))));
      }
    }
  }
}

TEST(Fp4, EveryCodeTimesEveryScaleDecodesAsTheTableSays) {
  for (Fp4Format format : {Fp4Format::nvfp4, Fp4Format::mxfp4}) {
    for (int scale = 0; scale < 256; ++scale) {
      const float got = decode_scale(format, static_cast<uint8_t>(scale));
      double want = format == Fp4Format::mxfp4 ? (scale == 255 ? NAN : std::ldexp(1.0, scale - 127))
                    : (scale & 0x7f) == 0x7f   ? NAN
                                               : oracle::e4m3_values()[static_cast<size_t>(scale & 0x7f)];
      if (format == Fp4Format::nvfp4 && (scale & 0x80)) want = -want;
      ASSERT_EQ(std::isnan(got), std::isnan(want)) << scale;
      if (std::isnan(want)) continue;
      ASSERT_EQ(got, want) << scale;
      for (int code = 0; code < 16; ++code) {
        const float value = e2m1_decode(static_cast<uint8_t>(code));
        ASSERT_EQ(value, std::copysign(oracle::e2m1_values()[static_cast<size_t>(code & 7)], code & 8 ? -1.0 : 1.0));
        ASSERT_EQ(std::signbit(value), (code & 8) != 0);
        const double exact = want * static_cast<double>(value);
        if (std::fabs(exact) < 0x1p128) {
          ASSERT_EQ(value * got, exact) << code << " x " << scale;
        }
      }
    }
  }
}

TEST(Fp4, DequantisedNvfp4IsExactInF16AndBf16) {
  for (int scale = 0; scale < 0x7f; ++scale) {
    for (int code = 0; code < 16; ++code) {
      const float x = e2m1_decode(static_cast<uint8_t>(code)) * e4m3_decode(static_cast<uint8_t>(scale));
      ASSERT_EQ(f16_decode(f16_encode(x)), x);
      ASSERT_EQ(bf16_decode(bf16_encode(x)), x);
    }
  }
}

TEST(E8m0, ExponentsSaturate) {
  for (int e = -300; e <= 300; ++e) {
    const int clamped = e < -127 ? -127 : e > 127 ? 127 : e;
    ASSERT_EQ(e8m0_encode_exponent(e), clamped + 127);
    ASSERT_EQ(e8m0_decode(e8m0_encode_exponent(e)), std::ldexp(1.0, clamped));
  }
}

// Blocks that break encoders: nothing, one outlier, ties, saturation, subnormals, widely mixed magnitudes.
std::vector<std::vector<float>> adversarial_blocks() {
  std::mt19937 random(11);
  std::normal_distribution<float> normal;
  const auto uniform = [&](int count) { return static_cast<int>(random() % static_cast<uint32_t>(count)); };
  std::vector<std::vector<float>> blocks;
  for (int i = 0; i < 40000; ++i) {
    std::vector<float> x(kMaxBlockSize, 0.0f);
    const int kind = i % 10;
    const int exponent = uniform(kind == 8 ? 270 : 40) - (kind == 8 ? 145 : 20);
    for (float& value : x) {
      switch (kind) {
        case 0:  // zeros of both signs
          value = uniform(2) ? 0.0f : -0.0f;
          break;
        case 1:  // attention-like
        case 2:
          value = std::ldexp(normal(random), exponent);
          break;
        case 3:  // on a grid, full of ties
          value = std::ldexp(static_cast<float>(uniform(49) - 24), exponent);
          break;
        case 4:  // around and beyond what NVFP4 can hold
          value = normal(random) * 2688.0f;
          break;
        case 5:  // float subnormals
          value = std::ldexp(normal(random), -130 - uniform(20));
          break;
        case 6:  // magnitudes from E4M3's subnormal scales
          value = std::ldexp(normal(random), -10 + uniform(4));
          break;
        case 7:  // constant
          value = std::ldexp(1.0f, exponent) * (uniform(2) ? 1.0f : -1.0f);
          break;
        case 8:  // any exponent
          value = std::ldexp(normal(random), exponent - uniform(20));
          break;
        default:  // small noise; the outlier follows
          value = normal(random) * 0.01f;
      }
    }
    if (kind == 9) x[static_cast<size_t>(uniform(kMaxBlockSize))] = std::ldexp(normal(random), uniform(12));
    blocks.push_back(x);
  }
  return blocks;
}

TEST(EncodeBlock, EqualsTheOracleBitForBit) {
  struct {
    Fp4Format format;
    Scales scales;
  } const forms[] = {
      {Fp4Format::nvfp4, Scales::six}, {Fp4Format::nvfp4, Scales::four_over_six}, {Fp4Format::mxfp4, Scales::six}};
  const auto blocks = adversarial_blocks();
  for (const auto& form : forms) {
    ASSERT_EQ(block_size(form.format), oracle::block_size(form.format));
    int64_t fours = 0;
    for (size_t b = 0; b < blocks.size(); ++b) {
      uint8_t codes[kMaxBlockSize];
      const uint8_t scale = encode_block(form.format, form.scales, blocks[b].data(), codes);
      const oracle::Block want = oracle::encode_block(form.format, form.scales, blocks[b].data());
      ASSERT_EQ(scale, want.scale) << "block " << b;
      for (size_t i = 0; i < want.codes.size(); ++i) {
        ASSERT_EQ(codes[i], want.codes[i]) << "block " << b << ", x " << blocks[b][i];
        ASSERT_EQ(static_cast<double>(e2m1_decode(codes[i])) * decode_scale(form.format, scale), want.values[i]);
      }
      fours += scale != oracle::encode_block(form.format, Scales::six, blocks[b].data()).scale;
    }
    EXPECT_EQ(fours > 1000, form.scales == Scales::four_over_six) << "4over6 must choose the other scale now and then";
  }
}

TEST(EncodeBlock, FourOverSixNeverHasTheLargerError) {
  for (const auto& x : adversarial_blocks()) {
    double errors[2] = {};
    for (Scales scales : {Scales::six, Scales::four_over_six}) {
      uint8_t codes[kMaxBlockSize];
      const double scale = e4m3_decode(encode_block(Fp4Format::nvfp4, scales, x.data(), codes));
      for (size_t i = 0; i < 16; ++i) {
        const double error = x[i] - scale * e2m1_decode(codes[i]);
        errors[scales == Scales::six ? 0 : 1] += error * error;
      }
    }
    ASSERT_LE(errors[1], errors[0]);
  }
}

TEST(PageExponent, IsTheLargestThatFits) {
  std::mt19937 random(3);
  std::vector<float> amaxes = {0.0f,
                               2688.0f,
                               std::nextafter(2688.0f, 3e3f),
                               1792.0f,
                               std::nextafter(1792.0f, 2e3f),
                               1e-44f,
                               0x1p-126f,
                               65504.0f,
                               3.4e38f,
                               1.0f};
  for (int i = 0; i < 20000; ++i) {
    const float x = std::fabs(std::bit_cast<float>(static_cast<uint32_t>(random())));
    if (std::isfinite(x)) amaxes.push_back(x);
  }
  for (float amax : amaxes) {
    for (Scales scales : {Scales::six, Scales::four_over_six}) {
      ASSERT_EQ(page_exponent(amax, Fp4Format::nvfp4, scales), oracle::page_exponent(amax, Fp4Format::nvfp4, scales))
          << amax;
      ASSERT_EQ(page_exponent(amax, Fp4Format::mxfp4, scales), 0);
    }
  }
  EXPECT_EQ(page_exponent(2688.0f, Fp4Format::nvfp4, Scales::six), 0);
  EXPECT_EQ(page_exponent(1793.0f, Fp4Format::nvfp4, Scales::four_over_six), -1);
}

TEST(Pow2, IsExactOverItsRange) {
  for (int e = -127; e <= 127; ++e) ASSERT_EQ(pow2(e), std::ldexp(1.0, e));
}

// The formats are usable in constant expressions, as layouts and kernels need.
static_assert(f16_decode(f16_encode(-1.5f)) == -1.5f);
static_assert(bf16_decode(bf16_encode(1.0f + 0x1p-8f)) == 1.0f);
static_assert(e4m3_decode(e4m3_encode(449.0f)) == 448.0f);
static_assert(e2m1_decode(e2m1_encode(-5.0f)) == -4.0f);
static_assert(page_exponent(1.0f, Fp4Format::nvfp4, Scales::six) == 11);

}  // namespace
}  // namespace thriftattn
