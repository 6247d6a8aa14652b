// Products of FP4 planes with 16-bit integers, where the codes stay integers: E2M1 doubled is one of 0, +-1, +-2, +-3,
// +-4, +-6, +-8, +-12. Included once per target by decode.cc.
//
//   64 bytes = 128 codes --4 byte lookups--> 4 registers of int16 pairs --dot with pairs of x in all lanes--> int32
//   int32 sum of 16 depths --to float, times the scale of its lane--> float sum
//
// One unpacking serves all rows of x. The sums of a scale group are exact, so that every target gives the same numbers
// up to the order of the float sums. Per 256 codes and four rows, AVX-512 with VNNI takes 32 dot products, 8 lookups, 6
// shifts, 4 conversions and 4 FMAs, and 4 for a scale: 58 on the two ports that Intel has for them, 74 instructions in
// all, a fifth of what turning the codes into floats takes. x in one 16-bit piece or in two 8-bit ones costs the same
// number of dot products (vpdpwssd takes half as many codes as vpdpbusd); one piece needs no joining and no correction
// of a bias.
#if defined(THRIFTATTN_CPU_CODES_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef THRIFTATTN_CPU_CODES_INL_H_
#undef THRIFTATTN_CPU_CODES_INL_H_
#else
#define THRIFTATTN_CPU_CODES_INL_H_
#endif

#include <hwy/highway.h>

#include <algorithm>

#include "cpu/tile-inl.h"
#include "format/page_layout.h"

HWY_BEFORE_NAMESPACE();
namespace thriftattn::cpu {
namespace HWY_NAMESPACE {

using DI16 = hn::Repartition<int16_t, DI>;
using VI = hn::Vec<DI>;
using VI16 = hn::Vec<DI16>;
using VU = hn::Vec<DU>;

// --- the leaf: what a target does to codes

// Registers in a struct of their own: an array that a function fills costs a seventh of the product's speed with
// g++ 12.
struct Unpacked {
  HWY_INLINE Unpacked() {}  // written out, because the compiler's own lacks the target's attributes
  HWY_INLINE Unpacked(VI16 a, VI16 b, VI16 c, VI16 d) : pair{a, b, c, d} {}
  VI16 pair[4];  // depths (0, 2), (1, 3), (4, 6), (5, 7) of eight
};

inline constexpr float kCodeUnit = 512;  // byte lookups put the doubled code into the high half of a word

#if HWY_TARGET == HWY_AVX3_DL

// A byte lookup reads the low six bits of a byte: the table stands there four times, so the upper two, of the next
// code, are ignored. A lookup of words would give the word of a code at once, but takes Intel two instructions.
HWY_INLINE Unpacked unpack(VU codes) {
  HWY_ALIGN static constexpr uint8_t kTwice[64] = {0, 1, 2, 3, 4, 6, 8, 12, 0, 255, 254, 253, 252, 250, 248, 244,
                                                   0, 1, 2, 3, 4, 6, 8, 12, 0, 255, 254, 253, 252, 250, 248, 244,
                                                   0, 1, 2, 3, 4, 6, 8, 12, 0, 255, 254, 253, 252, 250, 248, 244,
                                                   0, 1, 2, 3, 4, 6, 8, 12, 0, 255, 254, 253, 252, 250, 248, 244};
  const __m512i table = _mm512_load_si512(kTwice);
  asm("" : "+v"(codes.raw));  // loaded once: g++ would load them again for every shift
  const auto lookup = [table](VU x)
                          HWY_ATTR { return VI16{_mm512_maskz_permutexvar_epi8(0xaaaaaaaaaaaaaaaa, x.raw, table)}; };
  return {lookup(hn::ShiftLeft<8>(codes)), lookup(codes), lookup(hn::ShiftLeft<4>(codes)),
          lookup(hn::ShiftRight<4>(codes))};
}

// sum + the products of both words of each lane of `a` with those at x. 16 depths of |word| <= 3072 and |x| <= 32767
// stay below 2^31.
HWY_INLINE VI dot(VI sum, VI16 a, const int16_t* x) {
  // Highway's name of this target implies VNNI, its list of compiler options does not.
  asm("vpdpwssd %2%{1to16%}, %1, %0" : "+v"(sum.raw) : "v"(a.raw), "m"(*reinterpret_cast<const int16_t(*)[2]>(x)));
  return sum;
}

#else

HWY_INLINE Unpacked unpack(VU codes) {
  HWY_ALIGN static constexpr uint8_t kTwice[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, 255, 254, 253, 252, 250, 248, 244};
  const DU8 du8;
  const DI16 di16;
  const hn::Repartition<uint16_t, DU> du16;
  const auto table = hn::LoadDup128(du8, kTwice);
  const auto nibble = hn::Set(du8, 15);
  const auto high_byte = hn::Set(du16, 0xff00);
  const auto low = hn::BitCast(du16, hn::TableLookupBytes(table, hn::And(hn::BitCast(du8, codes), nibble)));
  const auto high =
      hn::BitCast(du16, hn::TableLookupBytes(table, hn::And(hn::BitCast(du8, hn::ShiftRight<4>(codes)), nibble)));
  return {hn::BitCast(di16, hn::ShiftLeft<8>(low)), hn::BitCast(di16, hn::And(low, high_byte)),
          hn::BitCast(di16, hn::ShiftLeft<8>(high)), hn::BitCast(di16, hn::And(high, high_byte))};
}

HWY_INLINE VI dot(VI sum, VI16 a, const int16_t* x) {
  int32_t pair;
  std::memcpy(&pair, x, sizeof(pair));
  const VI16 both = hn::BitCast(DI16(), hn::Set(DI(), pair));
#if HWY_TARGET <= HWY_AVX2
  VI unused = sum;
  sum = hn::ReorderWidenMulAccumulate(DI(), a, both, sum, unused);
  // Sums of integers may be regrouped, and g++ makes a tree of them whose leaves do not fit the registers.
  asm("" : "+v"(sum.raw));
  return sum;
#else
  VI other = hn::Zero(DI());
  const VI one = hn::ReorderWidenMulAccumulate(DI(), a, both, hn::Zero(DI()), other);
  return hn::Add(sum, hn::RearrangeToOddPlusEven(one, other));
#endif
}

#endif

// --- the scales

// What load_scale_units gives is the scale over this.
inline float scale_unit(Fp4Format format) { return format == Fp4Format::nvfp4 ? 256.0f : 1.0f; }

// E4M3 without its sign is the upper part of an FP16 number whose exponent is biased by 8 more; subnormals too.
HWY_INLINE VF load_scale_units(Fp4Format format, const uint8_t* scales) {
  const DF df;
  if (format == Fp4Format::nvfp4) {
    const hn::Rebind<uint8_t, DF> du8;
    const hn::Rebind<uint16_t, DF> du16;
    const hn::Rebind<hwy::float16_t, DF> df16;
    return hn::PromoteTo(df, hn::BitCast(df16, hn::ShiftLeft<7>(hn::PromoteTo(du16, hn::LoadU(du8, scales)))));
  }
  const hn::Rebind<uint8_t, DF> du8;
  return hn::BitCast(df, hn::ShiftLeft<23>(hn::PromoteTo(DU(), hn::LoadU(du8, scales))));
}

// --- x

// x in words of 16 bits stands in groups of four rows, padded: [rows / 4][depth / 2][4 rows][2], so that a product
// finds its pairs at fixed distances from one pointer. A pair is two depths of one row that a lookup puts into one
// lane: (0, 2) or (1, 3) of four; those of 16 depths stand in the order (0, 2), (4, 6), (8, 10), (12, 14), (1, 3), ...
inline constexpr int kPairRows = 4, kCellWords = 16 * kPairRows;

// Where depth r of a row stands.
inline int64_t word_position(int row, int r, int depth) {
  const int pair = r / 16 * 8 + r % 2 * 4 + r % 16 / 4;
  return int64_t{row / kPairRows} * kPairRows * depth + (pair * kPairRows + row % kPairRows) * 2 + r % 4 / 2;
}

// Rounds e[rows, 64], |e| <= 1, to words, for up to four rows; those missing become the last one.
HWY_INLINE void pack_rows(const float* e, int rows, int16_t* words) {
  const DF df;
  const DI di;
  const hn::Repartition<uint64_t, DI> du64;
  const int64_t n = static_cast<int64_t>(hn::Lanes(df));
  // Added to 1.5 * 2^23, a number below 2^22 is rounded to the lowest bits of the sum.
  const VF unit = hn::Set(df, 32767.0f), rounder = hn::Set(df, 0x1.8p23f);
  const VI low = hn::Set(di, 0xffff);
  const float* row[kPairRows];
  for (int r = 0; r < kPairRows; ++r) row[r] = e + std::min(r, rows - 1) * kPageTokens;
  for (int64_t i = 0; i < kPageTokens; i += n) {
    const auto pairs = [&](int r) HWY_ATTR {  // (0, 2) and (1, 3) of each four in the lower half of 128 bits
      const VI x = hn::BitCast(di, hn::MulAdd(hn::LoadU(df, row[r] + i), unit, rounder));
      return hn::Or(hn::And(x, low), hn::ShiftLeft<16>(hn::Shuffle1032(x)));
    };
    const auto first = hn::BitCast(du64, hn::InterleaveLower(di, pairs(0), pairs(1)));
    const auto last = hn::BitCast(du64, hn::InterleaveLower(di, pairs(2), pairs(3)));
    int16_t* to = words + word_position(0, static_cast<int>(i), kPageTokens);
    hn::StoreU(hn::BitCast(DI16(), hn::InterleaveLower(du64, first, last)), DI16(), to);
    hn::StoreU(hn::BitCast(DI16(), hn::InterleaveUpper(du64, first, last)), DI16(), to + kCellWords / 2);
  }
}

// --- the product

inline constexpr int kMaxProductRows = 8;

// C registers of lanes of R rows of: out[r, lane] = base + factor[r] * sum over depth of code * scale * x[r, depth],
// where base is start[r], or what `out` holds where start is null.
template <int R, int C>
HWY_INLINE void add_product_lanes(const PlaneLayout& plane, Fp4Format format, const uint8_t* codes,
                                  const uint8_t* scales, int lane, const int16_t* x, const float* factor,
                                  const float* start, float* out, const uint8_t* next) {
  const DF df;
  const DI di;
  const DU du;
  const int n = static_cast<int>(hn::Lanes(df));
  const int group_shift = plane.group == 16 ? 0 : 1;  // of cells of 16 depths
  int64_t code_at[C];
  const uint8_t* scale_at[C];
  VF sum[R][C];
  for (int c = 0; c < C; ++c) {
    code_at[c] = plane.code_offset(0, lane + c * n);
    scale_at[c] = scales + plane.scale_offset(0, lane + c * n);
    for (int r = 0; r < R; ++r) sum[r][c] = hn::Zero(df);
  }
  for (int cell = 0; cell < plane.depth / 16; ++cell, x += kCellWords) {
    VI exact[R][C];
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < C; ++c) exact[r][c] = hn::Zero(di);
    for (int half = 0; half < 2; ++half) {
      Unpacked u[C];
      for (int c = 0; c < C; ++c) {
        const int64_t at = code_at[c] + cell * 128 + half * 64;
        __builtin_prefetch(next + at, 0, 2);
        u[c] = unpack(hn::LoadU(du, reinterpret_cast<const uint32_t*>(codes + at)));
      }
      for (int j = 0; j < 4; ++j)
        for (int r = 0; r < R; ++r) {
          const int16_t* pair = x + r / kPairRows * kPairRows * plane.depth +
                                ((j % 2 * 4 + half * 2 + j / 2) * kPairRows + r % kPairRows) * 2;
          for (int c = 0; c < C; ++c) exact[r][c] = dot(exact[r][c], u[c].pair[j], pair);
        }
    }
    for (int c = 0; c < C; ++c) {
      const VF scale = load_scale_units(format, scale_at[c] + (cell >> group_shift) * 16);
      for (int r = 0; r < R; ++r) sum[r][c] = hn::MulAdd(hn::ConvertTo(df, exact[r][c]), scale, sum[r][c]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) {
      float* to = out + static_cast<int64_t>(r) * plane.lanes + lane + c * n;
      const VF base = start ? hn::Set(df, start[r]) : hn::LoadU(df, to);
      hn::StoreU(hn::MulAdd(sum[r][c], hn::Set(df, factor[r]), base), df, to);
    }
}

template <int R>
void add_product_rows(const PlaneLayout& plane, Fp4Format format, const uint8_t* codes, const uint8_t* scales,
                      const int16_t* x, const float* factor, const float* start, float* out, const Ahead& ahead) {
  // As many registers of lanes as leave room for their sums: a broadcast pair of x then serves all of them.
  constexpr int kRegisters = HWY_MAX_BYTES >= 64 ? 8 : 4;
  constexpr int C = R >= kRegisters ? 1 : R * 4 <= kRegisters ? 4 : 2;
  const int n = static_cast<int>(hn::Lanes(DF()));
  const uint8_t* next = ahead.bytes > 0 ? ahead.at : codes;  // never fewer bytes than here
  int lane = 0;
  for (; lane + C * n <= plane.lanes; lane += C * n)
    add_product_lanes<R, C>(plane, format, codes, scales, lane, x, factor, start, out, next);
  for (; lane < plane.lanes; lane += n)
    add_product_lanes<R, 1>(plane, format, codes, scales, lane, x, factor, start, out, next);
  for (int64_t at = plane.code_bytes(); at < ahead.bytes; at += 64) ahead.touch(at);
}

// Rows that a product of `rows` rows computes: the next of 1, 2, 4, 8. Those added must be there in x, factor and out.
inline int padded_rows(int rows) { return rows > 4 ? 8 : rows > 2 ? 4 : rows; }

// out[r, lane] = base + factor[r] * sum over depth of code[depth, lane] * scale * x[r, depth], for padded_rows(rows)
// rows of plane.depth words and plane.lanes floats; base is start[r], or what `out` holds where start is null. `codes`
// are followed by their scales.
inline void add_product(const PlaneLayout& plane, Fp4Format format, const uint8_t* codes, int rows, const int16_t* x,
                        const float* factor, const float* start, float* out, const Ahead& ahead) {
  const uint8_t* scales = codes + plane.code_bytes();
  switch (padded_rows(rows)) {
    case 1:
      return add_product_rows<1>(plane, format, codes, scales, x, factor, start, out, ahead);
    case 2:
      return add_product_rows<2>(plane, format, codes, scales, x, factor, start, out, ahead);
    case 4:
      return add_product_rows<4>(plane, format, codes, scales, x, factor, start, out, ahead);
    default:
      return add_product_rows<8>(plane, format, codes, scales, x, factor, start, out, ahead);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace thriftattn::cpu
HWY_AFTER_NAMESPACE();

#endif  // THRIFTATTN_CPU_CODES_INL_H_
