// The number formats by definition: every format is the table of its values, rounding is a search for the nearest
// entry, ties to the even code. Slow and obvious; src/format/codecs.h must give the same bits.
#pragma once

#include <cstdint>
#include <vector>

#include "thriftattn/method.h"
#include "thriftattn/tensor.h"

namespace thriftattn::oracle {

// The values of the codes with a clear sign bit, ascending, so that an index is a code. f16 and bf16 end with one
// entry more, the power of two beyond the largest value, which stands for infinity.
const std::vector<double>& f16_values();
const std::vector<double>& bf16_values();
const std::vector<double>& e4m3_values();
const std::vector<double>& e2m1_values();

// The code nearest to |x|, the even one of two that are as near; beyond the last entry, the last. x is not NaN.
int nearest(const std::vector<double>& values, double x);

// x, not NaN, rounded to the format; the sign is kept.
double round_to(const std::vector<double>& values, double x);
double round_to(DType high, double x);

// One encoded block: `size` codes (sign in bit 3) under one scale.
struct Block {
  uint8_t scale = 0;
  std::vector<uint8_t> codes;
  std::vector<double> values;  // decoded
};
int block_size(Fp4Format format);
Block encode_block(Fp4Format format, Scales scales, const float* x);

// Exponent of the page scale; see design.md, section 2.
int page_exponent(double amax, Fp4Format format, Scales scales);

// x[n], padded with zeros to whole blocks, through encode_block after multiplication by 2^exponent: the decoded values,
// divided by it again.
std::vector<double> quantise(Fp4Format format, Scales scales, int exponent, const std::vector<float>& x);

}  // namespace thriftattn::oracle
