// Products of FP4 planes with 16-bit integers, where the codes stay integers: E2M1 doubled is one of 0, +-1, +-2, +-3,
// +-4, +-6, +-8, +-12. Included once per target by decode.cc.
//
//   64 bytes = 128 codes --byte lookups--> registers of integers --dot with x in all lanes--> int32
//   int32 sum of 16 depths --to float, times the scale of its lane--> float sum
//
// One unpacking serves all rows of x. The sums of a scale group are exact, so that every target gives the same numbers
// up to the order of the float sums. With VNNI codes are bytes and x is two limbs of 8 bits: per 256 codes and four
// rows 32 dot products, 4 that join the limbs, 4 lookups, 2 shifts, 4 conversions and 4 FMAs, and 4 for a scale: 54 on
// the two ports that Intel has for them, where the time goes; a fifth of what turning the codes into floats takes.
// Codes in words and x in one limb take as many dot products and no joining, but twice the lookups and three times the
// shifts: 58 there, and what the other targets do.
#if defined(THRIFTATTN_CPU_CODES_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef THRIFTATTN_CPU_CODES_INL_H_
#undef THRIFTATTN_CPU_CODES_INL_H_
#else
#define THRIFTATTN_CPU_CODES_INL_H_
#endif

#include <hwy/highway.h>

#include <algorithm>
#include <cstddef>
#include <cstring>

#include "cpu/kernels.h"
#include "cpu/tile-inl.h"
#include "format/page_layout.h"

HWY_BEFORE_NAMESPACE();
namespace thriftattn::cpu {
namespace HWY_NAMESPACE {

using DI16 = hn::Repartition<int16_t, DI>;
using VI = hn::Vec<DI>;
using VI16 = hn::Vec<DI16>;
using VU = hn::Vec<DU>;

// x is rounded to integers of at most this: 127 * 256, so that both limbs are signed bytes.
inline constexpr int kMostX = 32512;

// x stands in cells of 16 depths and four rows, padded: [rows / 4][depth / 16] cells, so that a product finds all of
// one at fixed distances from one pointer.
inline constexpr int kCellRows = 4;

// --- the leaf: what a target does to codes and to x

#if HWY_TARGET == HWY_AVX3_DL

inline constexpr float kCodeUnit = 2;  // what a lookup gives is the value times this

// Dot products of bytes take one operand without a sign: codes, as their doubles plus 12. What that adds to the sums of
// a cell is where they start.
struct Cell {
  int8_t high[4][kCellRows][4], low[4][kCellRows][4];  // [four depths, row]: x = 256 high + low
  int32_t high_start[kCellRows], low_start[kCellRows];
};
inline constexpr int kBias = 12;

// Registers in a struct of their own: an array that a function fills costs a seventh of the product's speed with
// g++ 12.
struct Unpacked {
  HWY_INLINE Unpacked() {}  // written out, because the compiler's own lacks the target's attributes
  HWY_INLINE Unpacked(VI a, VI b) : four{a, b} {}
  VI four[2];  // depths 0 to 3 and 4 to 7 of eight, a lane's side by side
};

// A byte lookup reads the low six bits of a byte: the table stands there four times, so the upper two, of the next
// code, are ignored.
HWY_INLINE Unpacked unpack(VU codes) {
  HWY_ALIGN static constexpr uint8_t kTwice[64] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0,
                                                   12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0,
                                                   12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0,
                                                   12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};
  const __m512i table = _mm512_load_si512(kTwice);
  asm("" : "+v"(codes.raw));  // loaded once: g++ would load them again for the shift
  const auto lookup = [table](VU x) HWY_ATTR { return VI{_mm512_permutexvar_epi8(x.raw, table)}; };
  return {lookup(codes), lookup(hn::ShiftRight<4>(codes))};
}

// sum + the products of the four bytes of each lane of `codes` with those at x. Highway's name of this target implies
// VNNI, its list of compiler options does not.
HWY_INLINE VI dot(VI sum, VI codes, const int8_t (&x)[4]) {
  asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum.raw) : "v"(codes.raw), "m"(x));
  return sum;
}

// AMD has one place a cycle for dot products and FMAs, and others for shifts and sums; Intel two for all of them.
inline const bool kJoinsApart = (__builtin_cpu_init(), __builtin_cpu_is("amd"));

// 256 high + low, where |high| <= 16 * 12 * 127 < 2^15: of each lane's two words the upper one is only the sign.
HWY_INLINE VI join_limbs(VI high, VI low) {
  if (kJoinsApart) return hn::Add(hn::ShiftLeft<8>(high), low);
  asm("vpdpwssd %2, %1, %0" : "+v"(low.raw) : "v"(high.raw), "v"(hn::Set(DI(), 256).raw));
  return low;
}

// sum[r][c] = the sums over one cell of codes * x, for R rows of x and C registers of lanes whose codes begin at at[c].
// `rows_stride` cells lie between fours of rows.
template <int R, int C>
HWY_INLINE void multiply_cell(const uint8_t* codes, const int64_t (&at)[C], const Cell* x, int64_t rows_stride,
                              const uint8_t* next, const uint8_t* also, VI (&sum)[R][C]) {
  VI low[R][C];
  for (int r = 0; r < R; ++r) {
    const Cell& cell = x[r / kCellRows * rows_stride];
    for (int c = 0; c < C; ++c) {
      sum[r][c] = hn::Set(DI(), cell.high_start[r % kCellRows]);
      low[r][c] = hn::Set(DI(), cell.low_start[r % kCellRows]);
    }
  }
  for (int half = 0; half < 2; ++half) {
    Unpacked u[C];
    for (int c = 0; c < C; ++c) {
      __builtin_prefetch(next + at[c] + half * 64, 0, 2);
      if (also) __builtin_prefetch(also + at[c] + half * 64, 0, 2);
      u[c] = unpack(hn::LoadU(DU(), reinterpret_cast<const uint32_t*>(codes + at[c] + half * 64)));
    }
    for (int j = 0; j < 2; ++j) {
      for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c)
          sum[r][c] = dot(sum[r][c], u[c].four[j], x[r / kCellRows * rows_stride].high[half * 2 + j][r % kCellRows]);
      for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c)
          low[r][c] = dot(low[r][c], u[c].four[j], x[r / kCellRows * rows_stride].low[half * 2 + j][r % kCellRows]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) sum[r][c] = join_limbs(sum[r][c], low[r][c]);
}

// Four rows of some depths, from the first of a cell on: here a register of a row is all 16. |x| <= kMostX.
HWY_INLINE void put_rows(const VI (&x)[kCellRows], Cell& cell, int /*first*/) {
  const __m512i a = _mm512_packs_epi32(x[0].raw, x[1].raw), b = _mm512_packs_epi32(x[2].raw, x[3].raw);
  const auto upper = [](__m512i w)
                         HWY_ATTR { return _mm512_srai_epi16(_mm512_add_epi16(w, _mm512_set1_epi16(128)), 8); };
  const auto lower = [](__m512i w) HWY_ATTR { return _mm512_and_si512(w, _mm512_set1_epi16(255)); };
  // 128 bits have four depths, row after row.
  const __m512i high = _mm512_packs_epi16(upper(a), upper(b)), low = _mm512_packus_epi16(lower(a), lower(b));
  _mm512_storeu_si512(cell.high, high);
  _mm512_storeu_si512(cell.low, low);
  const auto sums = [](__m512i limb) HWY_ATTR {  // of a row's depths, times kBias: [0 to 3 and 8 to 11][row], ...
    __m512i sum = _mm512_setzero_si512();
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(_mm512_set1_epi8(kBias)), "v"(limb));
    return _mm256_add_epi32(_mm512_castsi512_si256(sum), _mm512_extracti64x4_epi64(sum, 1));
  };
  const __m256i h = sums(high), l = sums(low);
  const __m256i starts = _mm256_add_epi32(_mm256_permute2x128_si256(h, l, 0x20), _mm256_permute2x128_si256(h, l, 0x31));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(cell.high_start), _mm256_sub_epi32(_mm256_setzero_si256(), starts));
}
static_assert(offsetof(Cell, low_start) == offsetof(Cell, high_start) + sizeof(Cell::high_start));

#else

inline constexpr float kCodeUnit = 512;  // byte lookups put the doubled code into the high half of a word

// Words in the order of pairs, two depths of one row that a lookup puts into one lane: (0, 2) or (1, 3) of four; those
// of 16 depths stand in the order (0, 2), (4, 6), (8, 10), (12, 14), (1, 3), ...
struct Cell {
  int16_t pair[8][kCellRows][2];
};

struct Unpacked {
  HWY_INLINE Unpacked() {}
  HWY_INLINE Unpacked(VI16 a, VI16 b, VI16 c, VI16 d) : pair{a, b, c, d} {}
  VI16 pair[4];  // depths (0, 2), (1, 3), (4, 6), (5, 7) of eight
};

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

// sum + the products of both words of each lane of `a` with those at x. 16 depths of |word| <= 3072 and |x| <= kMostX
// stay below 2^31.
HWY_INLINE VI dot(VI sum, VI16 a, const int16_t (&x)[2]) {
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

// As above.
template <int R, int C>
HWY_INLINE void multiply_cell(const uint8_t* codes, const int64_t (&at)[C], const Cell* x, int64_t rows_stride,
                              const uint8_t* next, const uint8_t* also, VI (&sum)[R][C]) {
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) sum[r][c] = hn::Zero(DI());
  for (int half = 0; half < 2; ++half) {
    Unpacked u[C];
    for (int c = 0; c < C; ++c) {
      __builtin_prefetch(next + at[c] + half * 64, 0, 2);
      if (also) __builtin_prefetch(also + at[c] + half * 64, 0, 2);
      u[c] = unpack(hn::LoadU(DU(), reinterpret_cast<const uint32_t*>(codes + at[c] + half * 64)));
    }
    for (int j = 0; j < 4; ++j)
      for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c)
          sum[r][c] = dot(sum[r][c], u[c].pair[j],
                          x[r / kCellRows * rows_stride].pair[j % 2 * 4 + half * 2 + j / 2][r % kCellRows]);
  }
}

// Four rows of some depths, from depth `first` of a cell on.
HWY_INLINE void put_rows(const VI (&x)[kCellRows], Cell& cell, int first) {
  const DI di;
  const hn::Repartition<uint64_t, DI> du64;
  const auto pairs = [&](int r) HWY_ATTR {  // (0, 2) and (1, 3) of each four in the lower half of 128 bits
    return hn::Or(hn::And(x[r], hn::Set(di, 0xffff)), hn::ShiftLeft<16>(hn::Shuffle1032(x[r])));
  };
  const auto one = hn::BitCast(du64, hn::InterleaveLower(di, pairs(0), pairs(1)));
  const auto other = hn::BitCast(du64, hn::InterleaveLower(di, pairs(2), pairs(3)));
  hn::StoreU(hn::BitCast(DI16(), hn::InterleaveLower(du64, one, other)), DI16(), cell.pair[first / 4][0]);
  hn::StoreU(hn::BitCast(DI16(), hn::InterleaveUpper(du64, one, other)), DI16(), cell.pair[4 + first / 4][0]);
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

static_assert(sizeof(Cell) <= kCellBytes);

// Rounds e[rows, columns], |e| <= 1, to cells, for up to four rows; those missing become the last one.
HWY_INLINE void pack_rows(const float* e, int rows, int columns, Cell* cells) {
  const DF df;
  const DI di;
  const int64_t n = static_cast<int64_t>(hn::Lanes(df));
  // Added to 1.5 * 2^23, a number below 2^22 is rounded to the lowest bits of the sum.
  const VF unit = hn::Set(df, static_cast<float>(kMostX)), rounder = hn::Set(df, 0x1.8p23f);
  const VI rounder_bits = hn::BitCast(di, rounder);
  const float* row[kCellRows];
  for (int r = 0; r < kCellRows; ++r) row[r] = e + std::min(r, rows - 1) * columns;
  for (int64_t i = 0; i < columns; i += n) {
    VI x[kCellRows];
    for (int r = 0; r < kCellRows; ++r)
      x[r] = hn::Sub(hn::BitCast(di, hn::MulAdd(hn::LoadU(df, row[r] + i), unit, rounder)), rounder_bits);
    put_rows(x, cells[i / 16], static_cast<int>(i % 16));
  }
}

// --- the product

inline constexpr int kMaxProductRows = 8;

// C registers of lanes of R rows of: out[r, lane] = base + factor[r] * sum over depth of code * scale * x[r, depth],
// where base is start[r], or what `out` holds where start is null.
template <int R, int C>
HWY_INLINE void add_product_lanes(const PlaneLayout& plane, Fp4Format format, const uint8_t* codes,
                                  const uint8_t* scales, int lane, const Cell* x, const float* factor,
                                  const float* start, float* out, const uint8_t* next, const uint8_t* also) {
  const DF df;
  const int n = static_cast<int>(hn::Lanes(df));
  const int group_shift = plane.group == 16 ? 0 : 1;  // of cells of 16 depths
  const int cells = plane.depth / 16;
  int64_t code_at[C];
  const uint8_t* scale_at[C];
  VF sum[R][C];
  for (int c = 0; c < C; ++c) {
    code_at[c] = plane.code_offset(0, lane + c * n);
    scale_at[c] = scales + plane.scale_offset(0, lane + c * n);
    for (int r = 0; r < R; ++r) sum[r][c] = hn::Zero(df);
  }
  for (int cell = 0; cell < cells; ++cell) {
    VI exact[R][C];
    multiply_cell<R, C>(codes, code_at, x + cell, cells, next, also, exact);
    for (int c = 0; c < C; ++c) {
      const VF scale = load_scale_units(format, scale_at[c] + (cell >> group_shift) * 16);
      for (int r = 0; r < R; ++r) sum[r][c] = hn::MulAdd(hn::ConvertTo(df, exact[r][c]), scale, sum[r][c]);
      code_at[c] += 128;
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
                      const Cell* x, const float* factor, const float* start, float* out, const Ahead& ahead) {
  // As many registers of lanes as leave room for their sums: a broadcast pair of x then serves all of them.
  constexpr int kRegisters = HWY_MAX_BYTES >= 64 ? 8 : 4;
  constexpr int C = R >= kRegisters ? 1 : R * 4 <= kRegisters ? 4 : 2;
  const int n = static_cast<int>(hn::Lanes(DF()));
  const uint8_t* next = ahead.bytes > 0 ? ahead.at : codes;  // never fewer bytes than here
  int lane = 0;
  for (; lane + C * n <= plane.lanes; lane += C * n)
    add_product_lanes<R, C>(plane, format, codes, scales, lane, x, factor, start, out, next, ahead.also);
  for (; lane < plane.lanes; lane += n)
    add_product_lanes<R, 1>(plane, format, codes, scales, lane, x, factor, start, out, next, ahead.also);
  for (int64_t at = plane.code_bytes(); at < ahead.bytes; at += 64) ahead.touch(at);
}

// Rows that a product of `rows` rows computes: the next of 1, 2, 4, 8. Those added must be there in x, factor and out.
inline int padded_rows(int rows) { return rows > 4 ? 8 : rows > 2 ? 4 : rows; }

// out[r, lane] = base + factor[r] * sum over depth of code[depth, lane] * scale * x[r, depth], for padded_rows(rows)
// rows of plane.depth values and plane.lanes floats; base is start[r], or what `out` holds where start is null. `codes`
// are followed by their scales.
inline void add_product(const PlaneLayout& plane, Fp4Format format, const uint8_t* codes, int rows, const Cell* x,
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
