#include "oracle/codecs.h"

#include <algorithm>
#include <cmath>

namespace thriftattn::oracle {

namespace {

// Values of the codes [0, codes) of a float with `mantissa` bits, an exponent bias and subnormals.
std::vector<double> float_values(int codes, int mantissa, int bias) {
  std::vector<double> values;
  for (int code = 0; code < codes; ++code) {
    const int exponent = code >> mantissa;
    const int fraction = code & ((1 << mantissa) - 1);
    values.push_back(exponent == 0 ? std::ldexp(fraction, 1 - bias - mantissa)
                                   : std::ldexp(fraction + (1 << mantissa), exponent - bias - mantissa));
  }
  return values;
}

double squared_error(const float* x, const Block& block) {
  double sum = 0;
  for (size_t i = 0; i < block.values.size(); ++i) {
    const double error = x[i] - block.values[i];
    sum += error * error;
  }
  return sum;
}

void append_code(Block& block, float scaled, double scale) {
  const int code = nearest(e2m1_values(), scaled);
  block.codes.push_back(static_cast<uint8_t>(code | (std::signbit(scaled) ? 8 : 0)));
  block.values.push_back(std::copysign(e2m1_values()[static_cast<size_t>(code)] * scale, scaled));
}

Block nvfp4_block(const float* x, float amax, float divisor) {
  Block block;
  block.scale = static_cast<uint8_t>(nearest(e4m3_values(), amax / divisor));
  const double scale = e4m3_values()[block.scale];
  for (int i = 0; i < 16; ++i) append_code(block, scale == 0 ? 0.0f : x[i] / static_cast<float>(scale), scale);
  return block;
}

Block mxfp4_block(const float* x, float amax) {
  Block block;
  if (amax == 0) {
    block.codes.assign(32, 0);
    block.values.assign(32, 0.0);
    return block;
  }
  const int exponent = std::clamp(std::ilogb(amax) - 2, -127, 127);
  block.scale = static_cast<uint8_t>(exponent + 127);
  for (int i = 0; i < 32; ++i) {
    append_code(block, static_cast<float>(std::ldexp(static_cast<double>(x[i]), -exponent)), std::ldexp(1.0, exponent));
  }
  return block;
}

}  // namespace

const std::vector<double>& f16_values() {
  static const std::vector<double> values = float_values(0x7c01, 10, 15);
  return values;
}
const std::vector<double>& bf16_values() {
  static const std::vector<double> values = float_values(0x7f81, 7, 127);
  return values;
}
const std::vector<double>& e4m3_values() {
  static const std::vector<double> values = float_values(0x7f, 3, 7);
  return values;
}
const std::vector<double>& e2m1_values() {
  static const std::vector<double> values = {0, 0.5, 1, 1.5, 2, 3, 4, 6};
  return values;
}

int nearest(const std::vector<double>& values, double x) {
  const double a = std::fabs(x);
  const auto above = std::lower_bound(values.begin(), values.end(), a);
  if (above == values.end()) return static_cast<int>(values.size()) - 1;
  const int code = static_cast<int>(above - values.begin());
  if (code == 0) return 0;
  const double to_above = *above - a, to_below = a - *(above - 1);
  if (to_above == to_below) return code % 2 == 0 ? code : code - 1;
  return to_above < to_below ? code : code - 1;
}

double round_to(const std::vector<double>& values, double x) {
  return std::copysign(values[static_cast<size_t>(nearest(values, x))], x);
}

double round_to(DType high, double x) {
  return high == DType::f32 ? x : round_to(high == DType::f16 ? f16_values() : bf16_values(), x);
}

int block_size(Fp4Format format) { return format == Fp4Format::nvfp4 ? 16 : 32; }

Block encode_block(Fp4Format format, Scales scales, const float* x) {
  float amax = 0;
  for (int i = 0; i < block_size(format); ++i) amax = std::max(amax, std::fabs(x[i]));
  if (format == Fp4Format::mxfp4) return mxfp4_block(x, amax);
  const Block six = nvfp4_block(x, amax, 6.0f);
  if (scales == Scales::six) return six;
  const Block four = nvfp4_block(x, amax, 4.0f);
  return squared_error(x, four) < squared_error(x, six) ? four : six;
}

int page_exponent(double amax, Fp4Format format, Scales scales) {
  if (format == Fp4Format::mxfp4 || amax == 0) return 0;
  const double limit = 448 * (scales == Scales::six ? 6 : 4);
  int exponent = 100;
  while (exponent > -100 && std::ldexp(amax, exponent) > limit) --exponent;
  return exponent;
}

std::vector<double> quantise(Fp4Format format, Scales scales, int exponent, const std::vector<float>& x) {
  const size_t size = static_cast<size_t>(block_size(format));
  std::vector<double> out;
  for (size_t first = 0; first < x.size(); first += size) {
    std::vector<float> scaled(size, 0.0f);
    for (size_t i = first; i < std::min(first + size, x.size()); ++i) {
      scaled[i - first] = static_cast<float>(std::ldexp(static_cast<double>(x[i]), exponent));
    }
    for (double value : encode_block(format, scales, scaled.data()).values) {
      if (out.size() < x.size()) out.push_back(std::ldexp(value, -exponent));
    }
  }
  return out;
}

}  // namespace thriftattn::oracle
