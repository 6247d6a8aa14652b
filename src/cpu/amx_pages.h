// A page's K or V to right operands of matrix tiles. Included by amx.cc alone, below its choice of instruction sets.
//
// Both are a matrix [depth, lanes] (src/format/page_layout.h). The tiles of 16 lanes stand one after another, those of
// a lane block by depth; a tile is [16 pairs of depths, 16 lanes, 2] of BF16. Depths keep their order. An FP4 plane
// takes 8 instructions per 32 values, 16 bit 6, both bound by the vector units: about 1000 and 800 cycles for 64 x 128.
#pragma once

namespace thriftattn::cpu {
namespace {

// The tile rows of lane block `lane / 16`, one after another; depths r and r + 1 stand at 32 * r.
inline char* lane_block(char* tiles, int depth_tiles, int lane) { return tiles + lane / 16 * depth_tiles * kTileBytes; }

// Depths [rows, 32 * depth_tiles) become zero; rows is even.
inline void clear_depths(int rows, int depth_tiles, int lanes, char* tiles) {
  for (int lane = 0; lane < lanes; lane += 16)
    for (int r = rows; r < 32 * depth_tiles; r += 2)
      _mm512_storeu_si512(lane_block(tiles, depth_tiles, lane) + 32 * r, _mm512_setzero_si512());
}

// a and b, one depth each, to pairs, rounded to nearest, ties to even.
inline __m512i round_pairs(__m512 a, __m512 b) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(order, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b, a)));
}
// The same where both are BF16 already.
inline __m512i exact_pairs(__m512 a, __m512 b) {
  const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000));
  constexpr int kFirstOrSecondAndThird = 0xf8;
  return _mm512_ternarylogic_epi32(_mm512_srli_epi32(_mm512_castps_si512(a), 16), _mm512_castps_si512(b), high,
                                   kFirstOrSecondAndThird);
}

inline __m512 load_high(DType type, const uint16_t* from) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return type == DType::bf16 ? _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))
                             : _mm512_cvtph_ps(bits);
}

// A 16-bit matrix, of which the first `rows` depths exist.
inline void unpack_high(DType type, const uint16_t* from, int rows, int lanes, int depth_tiles, char* tiles) {
  for (int lane = 0; lane < lanes; lane += 16) {
    const uint16_t* x = from + lane;
    char* to = lane_block(tiles, depth_tiles, lane);
    for (int r = 0; r + 1 < rows; r += 2, x += 2 * lanes, to += 64)
      _mm512_storeu_si512(to, round_pairs(load_high(type, x), load_high(type, x + lanes)));
    if (rows % 2) _mm512_storeu_si512(to, round_pairs(load_high(type, x), _mm512_setzero_ps()));
  }
  clear_depths((rows + 1) / 2 * 2, depth_tiles, lanes, tiles);
}

// One FP4 plane of a record.
struct Plane {
  const uint8_t *codes, *scales;
  float factor;  // 2^-page exponent
};

inline __m512 load_scales(Fp4Format format, const uint8_t* scales, float factor) {
  const __m512i u = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(scales)));
  __m512 s;
  if (format == Fp4Format::nvfp4) {  // E4M3: move the fields into place and correct the bias; subnormals are u * 2^-9
    const __m512i normal = _mm512_add_epi32(_mm512_slli_epi32(u, 20), _mm512_set1_epi32(120 << 23));
    const __m512 subnormal = _mm512_mul_ps(_mm512_cvtepi32_ps(u), _mm512_set1_ps(0x1p-9f));
    s = _mm512_mask_mov_ps(_mm512_castsi512_ps(normal), _mm512_cmplt_epi32_mask(u, _mm512_set1_epi32(8)), subnormal);
  } else {  // E8M0; byte 0 goes with zero codes only, and reads as 0
    s = _mm512_castsi512_ps(_mm512_slli_epi32(u, 23));
  }
  return _mm512_mul_ps(s, _mm512_set1_ps(factor));
}

// The values of nibble `kNibble` of every lane, unscaled.
template <int kNibble>
__m512 decode_nibble(__m512i codes) {
  const __m512 values = _mm512_set_ps(-6, -4, -3, -2, -1.5f, -1, -0.5f, -0.0f, 6, 4, 3, 2, 1.5f, 1, 0.5f, 0);
  return _mm512_permutexvar_ps(_mm512_srli_epi32(codes, 4 * kNibble), values);
}

// `rows` depths of one plane, exact in BF16, or of the sum of two, rounded.
template <bool kTwo>
void unpack_planes(const PlaneLayout& layout, Fp4Format format, int rows, const Plane* planes, int depth_tiles,
                   char* tiles) {
  for (int lane = 0; lane < layout.lanes; lane += 16) {
    char* to = lane_block(tiles, depth_tiles, lane);
    __m512 scale[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    for (int r = 0; r < rows; r += 8, to += 256) {
      __m512i codes[2];
      for (int i = 0; i < (kTwo ? 2 : 1); ++i) {
        if (r % layout.group == 0)
          scale[i] = load_scales(format, planes[i].scales + layout.scale_offset(r, lane), planes[i].factor);
        codes[i] = _mm512_loadu_si512(planes[i].codes + layout.code_offset(0, lane) + 8 * r);
      }
      const auto value = [&](auto nibble) {  // byte e of a lane holds depth e in its low nibble, e + 4 in its high one
        __m512 x = _mm512_mul_ps(decode_nibble<nibble.value>(codes[0]), scale[0]);
        if constexpr (kTwo) x = _mm512_fmadd_ps(decode_nibble<nibble.value>(codes[1]), scale[1], x);
        return x;
      };
      const auto put = [&](int pair, auto first, auto second) {
        const __m512 a = value(first), b = value(second);
        _mm512_storeu_si512(to + 64 * pair, kTwo ? round_pairs(a, b) : exact_pairs(a, b));
      };
      put(0, std::integral_constant<int, 0>(), std::integral_constant<int, 2>());
      put(1, std::integral_constant<int, 4>(), std::integral_constant<int, 6>());
      put(2, std::integral_constant<int, 1>(), std::integral_constant<int, 3>());
      put(3, std::integral_constant<int, 5>(), std::integral_constant<int, 7>());
    }
  }
  clear_depths(rows, depth_tiles, layout.lanes, tiles);
}

inline void unpack_fp4(const PlaneLayout& layout, Fp4Format format, int rows, Tier tier, const PageRef& page,
                       int64_t codes, int64_t scales, const int8_t* exponents, int depth_tiles, char* tiles) {
  Plane planes[2] = {{page.fp4 + codes, page.fp4 + scales, pow2(-exponents[0])}, {}};
  if (tier == Tier::fp4) return unpack_planes<false>(layout, format, rows, planes, depth_tiles, tiles);
  planes[1] = {page.residual + codes, page.residual + scales, pow2(-exponents[1])};
  unpack_planes<true>(layout, format, rows, planes, depth_tiles, tiles);
}

// The mean of an FP4 page is kept apart.
inline void unpack_k(const BlockTask& t, const PageRef& page, Tier tier, int depth_tiles, char* tiles) {
  const PageLayout& l = *t.layout;
  if (tier == Tier::fp16) return unpack_high(t.high_dtype, page.high, l.d, kPageTokens, depth_tiles, tiles);
  const PageSummary facts = summary_of(page);
  unpack_fp4(l.k, t.format, l.d, tier, page, l.k_codes, l.k_scales, facts.k_exponent, depth_tiles, tiles);
}

// Tokens that do not exist are zero: what a record holds there may be anything, and 0 * NaN is NaN.
inline void unpack_v(const BlockTask& t, const PageRef& page, Tier tier, int tokens, int depth_tiles, char* tiles) {
  const PageLayout& l = *t.layout;
  if (tier == Tier::fp16) return unpack_high(t.high_dtype, page.high + l.high_v, tokens, l.d_v, depth_tiles, tiles);
  const PageSummary facts = summary_of(page);
  unpack_fp4(l.v, t.format, kPageTokens, tier, page, l.v_codes, l.v_scales, facts.v_exponent, depth_tiles, tiles);
}

}  // namespace
}  // namespace thriftattn::cpu
