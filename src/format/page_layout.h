// The bytes of a page, for every backend and for saved caches: each offset is defined here and nowhere else.
//
// One (layer, KV head, page) owns up to four records, each from a pool of its own:
//   fp4       [K codes][K scales][V codes][V scales]          the first plane
//   residual  the same bytes                                  the second plane: what the first one got wrong
//   high      [K: d x 64 of 16 bit][V: 64 x d_v of 16 bit]    all of a tail page
//   summary   PageSummary, then mean[d] of 16 bit, then min[d], max[d] of 16 bit, then variance[d] of f32, as
//   configured
//
// K and V are both seen as a matrix [depth, lanes] whose products run over depth: K is [d, 64 tokens] (a score sums
// over channels), V is [64 tokens, d_v] (an output sums over tokens). So K stands transposed, scales run along depth in
// both, and one loop serves both. Lanes are what a SIMD register holds.
#pragma once

#include <cstdint>

#include "format/codecs.h"
#include "thriftattn/method.h"

namespace thriftattn {

inline constexpr int kMaxChannels = 256;  // of a head, K or V: what fixed buffers are sized for

THRIFTATTN_HD constexpr int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// Pages that `tokens` tokens stand in, the tail included.
THRIFTATTN_HD constexpr int64_t pages_for(int64_t tokens) { return (tokens + kPageTokens - 1) / kPageTokens; }

// Codes and scales of one [depth, lanes] matrix. Codes stand in cells of 16 depths x 16 lanes = 128 bytes, cells of one
// 16-lane column one after another. In a cell, word `lane` of half i (64 bytes, 8 depths) holds the codes of its lane:
// byte e has depth 8i + e in its low nibble and depth 8i + 4 + e in its high one. A 16-lane register load thus brings 8
// depths of 16 lanes, and 4 depths at a time form the 4-byte operands of integer dot products.
struct PlaneLayout {
  int depth = 0;  // a multiple of 32; channels beyond d hold zero codes
  int lanes = 0;  // a multiple of 16
  int group = 0;  // depths that share a scale: 16 (nvfp4) or 32 (mxfp4)

  THRIFTATTN_HD constexpr int64_t code_bytes() const { return static_cast<int64_t>(depth) * lanes / 2; }
  THRIFTATTN_HD constexpr int64_t scale_bytes() const { return static_cast<int64_t>(depth) / group * lanes; }
  THRIFTATTN_HD constexpr int64_t bytes() const { return code_bytes() + scale_bytes(); }

  // The byte and the shift (0 or 4) of the code at [r, lane].
  THRIFTATTN_HD constexpr int64_t code_offset(int r, int lane) const {
    const int64_t cell = static_cast<int64_t>(lane / 16) * (depth / 16) + r / 16;
    return cell * 128 + (r % 16) / 8 * 64 + (lane % 16) * 4 + r % 4;
  }
  THRIFTATTN_HD static constexpr int code_shift(int r) { return (r / 4) % 2 * 4; }

  // The scale of the group that holds [r, lane], counted from the first scale.
  THRIFTATTN_HD constexpr int64_t scale_offset(int r, int lane) const {
    return (static_cast<int64_t>(lane / 16) * (depth / group) + r / group) * 16 + lane % 16;
  }
};

// Facts about one full page of one head, at the front of its summary record.
struct PageSummary {
  int8_t k_exponent[2] = {0, 0};  // page scales of K, first and second plane: data was multiplied by 2^exponent
  int8_t v_exponent[2] = {0, 0};
  float eps_k = 0;   // sqrt(mean over tokens of |k - dec k|^2), first plane
  float eps_v = 0;   // the same of v
  float v_norm = 0;  // sqrt(mean over tokens of |v|^2)
};
static_assert(sizeof(PageSummary) == 16, "mean[] follows at 16 bytes");

struct PageLayout {
  int d = 0, d_v = 0;
  PlaneLayout k, v;
  int64_t k_codes = 0, k_scales = 0, v_codes = 0, v_scales = 0;  // offsets in an fp4 or residual record
  int64_t fp4_bytes = 0;
  int64_t high_v = 0;  // offset of V in a high record, in 16-bit elements; K is at 0
  int64_t high_bytes = 0;
  int64_t mean = 0, min = 0, max = 0, variance = 0;  // offsets in a summary record; 0 = not stored
  int64_t summary_bytes = 0;

  // The element of channel c of token t in a high record, in 16-bit elements.
  THRIFTATTN_HD constexpr int64_t high_k_at(int token, int c) const {
    return static_cast<int64_t>(c) * kPageTokens + token;
  }
  THRIFTATTN_HD constexpr int64_t high_v_at(int token, int c) const {
    return high_v + static_cast<int64_t>(token) * d_v + c;
  }
};

// Head sizes that the layout serves, K and V alike.
THRIFTATTN_HD constexpr bool is_head_dim(int64_t d) { return d >= 16 && d <= kMaxChannels && d % 16 == 0; }

THRIFTATTN_HD constexpr PageLayout page_layout(int d, int d_v, Fp4Format format, bool mean, bool min_max,
                                               bool variance) {
  PageLayout l;
  l.d = d;
  l.d_v = d_v;
  const int group = block_size(format);
  l.k = {static_cast<int>(round_up(d, 32)), kPageTokens, group};
  l.v = {kPageTokens, d_v, group};
  l.k_scales = l.k.code_bytes();
  l.v_codes = l.k.bytes();
  l.v_scales = l.v_codes + l.v.code_bytes();
  l.fp4_bytes = l.v_codes + l.v.bytes();
  l.high_v = static_cast<int64_t>(d) * kPageTokens;
  l.high_bytes = 2 * kPageTokens * static_cast<int64_t>(d + d_v);
  int64_t end = sizeof(PageSummary);
  const auto take = [&end](bool stored, int64_t bytes) {
    const int64_t at = stored ? end : 0;
    if (stored) end = round_up(end + bytes, 16);
    return at;
  };
  l.mean = take(mean, 2 * d);
  l.min = take(min_max, 2 * d);
  l.max = take(min_max, 2 * d);
  l.variance = take(variance, 4 * d);
  l.summary_bytes = end;
  return l;
}

// The shape that the kernels are tuned for: every part begins on a cache line.
static_assert(page_layout(128, 128, Fp4Format::nvfp4, true, false, false).fp4_bytes == 9216);
static_assert(page_layout(128, 128, Fp4Format::nvfp4, true, false, false).v_codes % 64 == 0);

}  // namespace thriftattn
