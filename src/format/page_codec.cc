#include "format/page_codec.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace thriftattn {
namespace {

float amax(const float* x, int64_t n) {
  float a = 0;
  for (int64_t i = 0; i < n; ++i) a = std::max(a, std::abs(x[i]));
  return a;
}

// Encodes x [depth, lanes] (rows of `stride` floats; rows and lanes beyond those given count as zero) and replaces it
// by its error x - dec(x). Returns the page exponent.
int encode_plane(const CacheConfig& config, const PlaneLayout& plane, int rows, int lanes, float* x, uint8_t* codes,
                 uint8_t* scales) {
  const int exponent =
      config.page_scale ? page_exponent(amax(x, static_cast<int64_t>(rows) * lanes), config.format, config.scales) : 0;
  const float up = pow2(exponent), down = pow2(-exponent);
  std::memset(codes, 0, plane.code_bytes());
  std::memset(scales, 0, plane.scale_bytes());
  float block[kMaxBlockSize];
  uint8_t block_codes[kMaxBlockSize];
  for (int lane = 0; lane < lanes; ++lane) {
    for (int r0 = 0; r0 < rows; r0 += plane.group) {
      const int n = std::min(plane.group, rows - r0);
      for (int i = 0; i < plane.group; ++i) block[i] = i < n ? x[(r0 + i) * lanes + lane] * up : 0.0f;
      const uint8_t scale = encode_block(config.format, config.scales, block, block_codes);
      scales[plane.scale_offset(r0, lane)] = scale;
      const float s = decode_scale(config.format, scale) * down;
      for (int i = 0; i < n; ++i) {
        const int r = r0 + i;
        codes[plane.code_offset(r, lane)] |= static_cast<uint8_t>(block_codes[i] << PlaneLayout::code_shift(r));
        x[r * lanes + lane] -= e2m1_decode(block_codes[i]) * s;
      }
    }
  }
  return exponent;
}

void decode_plane(const CacheConfig& config, const PlaneLayout& plane, int rows, int lanes, int exponent,
                  const uint8_t* codes, const uint8_t* scales, float* sum) {
  const float down = pow2(-exponent);
  for (int r = 0; r < rows; ++r)
    for (int lane = 0; lane < lanes; ++lane) {
      const uint8_t code = (codes[plane.code_offset(r, lane)] >> PlaneLayout::code_shift(r)) & 15;
      const float s = decode_scale(config.format, scales[plane.scale_offset(r, lane)]) * down;
      sum[r * lanes + lane] += e2m1_decode(code) * s;
    }
}

// Of x [rows, lanes], rows or channels of one matrix. The squares of a group (those that share a scale) are summed in
// FP32 in order; the groups' sums in double, by lane modulo 16 and in the order of the codes (16-lane column by
// column); the 16 sums in order. So registers that hold a cell's lanes give the same bits. Normative.
float rms_over_tokens(const float* x, int rows, int lanes, int group) {
  double sum[16] = {};
  for (int column = 0; column < lanes; column += 16)
    for (int r0 = 0; r0 < rows; r0 += group)
      for (int j = 0; j < 16; ++j) {
        float squares = 0;
        for (int r = r0; r < std::min(r0 + group, rows); ++r) {
          const float value = x[r * lanes + column + j];
          squares += value * value;
        }
        sum[j] += squares;
      }
  double total = 0;
  for (const double s : sum) total += s;
  return static_cast<float>(std::sqrt(total / kPageTokens));
}

void summarise(const CacheConfig& config, const PageLayout& layout, const float* k, uint8_t* summary) {
  auto* mean = reinterpret_cast<uint16_t*>(summary + layout.mean);
  auto* min = reinterpret_cast<uint16_t*>(summary + layout.min);
  auto* max = reinterpret_cast<uint16_t*>(summary + layout.max);
  auto* variance = reinterpret_cast<float*>(summary + layout.variance);
  for (int c = 0; c < layout.d; ++c) {
    const float* row = k + c * kPageTokens;
    float sum = 0;  // over tokens 0..63 in order: normative
    for (int t = 0; t < kPageTokens; ++t) sum += row[t];
    if (layout.mean) mean[c] = high_encode(config.high_dtype, sum * (1.0f / kPageTokens));
    if (layout.min) min[c] = high_encode(config.high_dtype, *std::min_element(row, row + kPageTokens));
    if (layout.max) max[c] = high_encode(config.high_dtype, *std::max_element(row, row + kPageTokens));
    if (layout.variance) {
      double squares = 0, exact = 0;
      for (int t = 0; t < kPageTokens; ++t) exact += row[t];
      exact /= kPageTokens;
      for (int t = 0; t < kPageTokens; ++t) squares += (row[t] - exact) * (row[t] - exact);
      variance[c] = static_cast<float>(squares / kPageTokens);
    }
  }
}

}  // namespace

void encode_page(const CacheConfig& config, const PageLayout& layout, const uint16_t* high, uint8_t* fp4,
                 uint8_t* residual, uint8_t* summary) {
  if (!summary) return;
  const int64_t k_size = static_cast<int64_t>(layout.d) * kPageTokens, v_size = int64_t{kPageTokens} * layout.d_v;
  float values[2 * kMaxChannels * kPageTokens];  // on the stack: an append must not fail half-way
  float *k = values, *v = k + k_size;
  for (int64_t i = 0; i < k_size + v_size; ++i) values[i] = high_decode(config.high_dtype, high[i]);

  PageSummary facts;
  summarise(config, layout, k, summary);
  facts.v_norm = rms_over_tokens(v, kPageTokens, layout.d_v, layout.v.group);
  if (fp4) {
    if (config.centring) {
      const auto* mean = reinterpret_cast<const uint16_t*>(summary + layout.mean);
      for (int c = 0; c < layout.d; ++c) {
        const float m = high_decode(config.high_dtype, mean[c]);
        for (int t = 0; t < kPageTokens; ++t) k[c * kPageTokens + t] -= m;
      }
    }
    uint8_t* planes[2] = {fp4, residual};
    for (int p = 0; p < 2 && planes[p]; ++p) {  // the second plane encodes what the first one left
      facts.k_exponent[p] = static_cast<int8_t>(encode_plane(config, layout.k, layout.d, kPageTokens, k,
                                                             planes[p] + layout.k_codes, planes[p] + layout.k_scales));
      facts.v_exponent[p] = static_cast<int8_t>(encode_plane(config, layout.v, kPageTokens, layout.d_v, v,
                                                             planes[p] + layout.v_codes, planes[p] + layout.v_scales));
      if (p == 0) {
        facts.eps_k = rms_over_tokens(k, layout.d, kPageTokens, layout.k.group);
        facts.eps_v = rms_over_tokens(v, kPageTokens, layout.d_v, layout.v.group);
      }
    }
  }
  std::memcpy(summary, &facts, sizeof(facts));
}

void decode_page(const CacheConfig& config, const PageLayout& layout, const uint8_t* fp4, const uint8_t* residual,
                 const uint8_t* summary, float* k, float* v) {
  PageSummary facts;
  std::memcpy(&facts, summary, sizeof(facts));
  const auto* mean = reinterpret_cast<const uint16_t*>(summary + layout.mean);
  for (int c = 0; c < layout.d; ++c)
    std::fill_n(k + c * kPageTokens, kPageTokens, config.centring ? high_decode(config.high_dtype, mean[c]) : 0.0f);
  std::fill_n(v, int64_t{kPageTokens} * layout.d_v, 0.0f);
  const uint8_t* planes[2] = {fp4, residual};
  for (int p = 0; p < 2 && planes[p]; ++p) {
    decode_plane(config, layout.k, layout.d, kPageTokens, facts.k_exponent[p], planes[p] + layout.k_codes,
                 planes[p] + layout.k_scales, k);
    decode_plane(config, layout.v, kPageTokens, layout.d_v, facts.v_exponent[p], planes[p] + layout.v_codes,
                 planes[p] + layout.v_scales, v);
  }
}

}  // namespace thriftattn
