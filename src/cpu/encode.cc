// Rows into a page and a full page into its stored forms, portable SIMD; one body for every format.
//
//   k, v of the caller --convert, check the range--> 16-bit record (K transposed 8 x 8) and K's rows (16 bit)
//   K's rows --over tokens--> mean and summaries
//   record --cell by cell, minus the mean--> tile (float, in the order of the codes) and each group's largest value
//   tile --> scales --> codes, and in the tile's place its error, from which the second plane is made the same way
//
// Every input value is read once from memory, while the page before is encoded; all else, 80 KiB at d = 128, stays in
// L1 and L2. What the bytes mean is defined by encode_page (format/page_codec.cc), and each step here gives the same
// values as its operations in the same order: the results are equal bit for bit on every target. Without FP4 memory
// binds, with it memory and instructions alike: on AVX-512 about 14 a register of values for the first plane and 9 for
// the second.
//
// Memory of a task, on its stack: K's rows 32 KiB, the tile of one matrix 64 KiB at most; at d = 128 half of each.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/encode.cc"
#include <hwy/foreach_target.h>  // NOLINT: must come before highway.h

#include <hwy/highway.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "cpu/encode.h"
#include "cpu/tile-inl.h"

HWY_BEFORE_NAMESPACE();
namespace thriftattn::cpu {
namespace HWY_NAMESPACE {
namespace encode {

using VU = hn::Vec<DU>;
using DHalf = hn::Half<DF>;
using DD = hn::Rebind<double, DHalf>;
using VD = hn::Vec<DD>;
using DU16 = hn::Rebind<uint16_t, DF>;

constexpr uint32_t kAbs = 0x7fffffffu;
constexpr uint32_t kSign = 0x80000000u;

inline int lanes() { return static_cast<int>(hn::Lanes(DF())); }
inline VU bits(VF x) { return hn::BitCast(DU(), x); }
inline VF from_bits(VU x) { return hn::BitCast(DF(), x); }
inline VD low_half(VF x) { return hn::PromoteTo(DD(), hn::LowerHalf(DHalf(), x)); }
inline VD high_half(VF x) { return hn::PromoteTo(DD(), hn::UpperHalf(DHalf(), x)); }

// The larger of two absolute values; so far is >= 0.
HWY_INLINE VF larger_abs(VF so_far, VF x) {
#if HWY_TARGET <= HWY_AVX3
  return VF{_mm512_range_ps(so_far.raw, x.raw, 0b1011)};
#else
  return hn::Max(so_far, hn::Abs(x));
#endif
}

// --- 16 bit

// Rounds N finite floats to the 16-bit form; none may be beyond its range.
HWY_INLINE void store_high(DType type, VF x, uint16_t* to) {
  const DU du;
  if (type == DType::bf16) {
    const VU u = bits(x);
    const VU odd = hn::And(hn::ShiftRight<16>(u), hn::Set(du, 1));
    const VU rounded = hn::ShiftRight<16>(hn::Add(u, hn::Add(odd, hn::Set(du, 0x7fff))));
    return hn::StoreU(hn::DemoteTo(DU16(), hn::BitCast(DI(), rounded)), DU16(), to);
  }
#if HWY_TARGET == HWY_EMU128  // Highway's emulation truncates
  const VU u = bits(x), a = hn::And(u, hn::Set(du, kAbs));
  const VF half = hn::Set(DF(), 0.5f);
  const VU tiny = hn::Sub(bits(hn::Add(from_bits(a), half)), bits(half));
  const VU odd = hn::And(hn::ShiftRight<13>(a), hn::Set(du, 1));
  const VU normal = hn::ShiftRight<13>(hn::Sub(hn::Add(a, hn::Add(odd, hn::Set(du, 0xfff))), hn::Set(du, 112u << 23)));
  const auto small = hn::Lt(hn::BitCast(DI(), a), hn::Set(DI(), 0x38800000));
  const VU h = hn::IfThenElse(hn::RebindMask(du, small), tiny, normal);
  const VU sign = hn::ShiftRight<16>(hn::And(u, hn::Set(du, kSign)));
  hn::StoreU(hn::DemoteTo(DU16(), hn::BitCast(DI(), hn::Or(h, sign))), DU16(), to);
#else
  const hn::Rebind<hwy::float16_t, DF> df16;
  hn::StoreU(hn::DemoteTo(df16, x), df16, reinterpret_cast<hwy::float16_t*>(to));
#endif
}

HWY_INLINE VF load_input(DType type, const void* row, int64_t i) {
  if (type == DType::f32) return hn::LoadU(DF(), static_cast<const float*>(row) + i);
  return load_high(type, static_cast<const uint16_t*>(row) + i);
}

// Rounds rows [first, end) to `to` and returns the largest bits of |x|, NaN and Inf among them.
VU convert_rows(const AppendRows& from, DType high_dtype, int first, int end, int channels, uint16_t* to) {
  VU largest = hn::Zero(DU());
  for (int t = first; t < end; ++t) {
    const char* row = static_cast<const char*>(from.data) + (t - first) * from.row_bytes;
    for (int c = 0; c < channels; c += lanes()) {
      const VF x = load_input(from.dtype, row, c);
      largest = hn::Max(largest, hn::And(bits(x), hn::Set(DU(), kAbs)));
      store_high(high_dtype, x, to + static_cast<int64_t>(t) * channels + c);
    }
  }
  return largest;
}

// 8 rows of 8 values change places with their columns.
HWY_INLINE void transpose8(const uint16_t* from, int64_t from_stride, uint16_t* to, int64_t to_stride) {
  const hn::Full128<uint16_t> d16;
  const hn::Full128<uint32_t> d32;
  const hn::Full128<uint64_t> d64;
  const auto load = [&](int i) HWY_ATTR { return hn::LoadU(d16, from + i * from_stride); };
  const auto r0 = load(0), r1 = load(1), r2 = load(2), r3 = load(3);
  const auto r4 = load(4), r5 = load(5), r6 = load(6), r7 = load(7);
  const auto low = [&](auto a, auto b) HWY_ATTR { return hn::BitCast(d32, hn::InterleaveLower(d16, a, b)); };
  const auto top = [&](auto a, auto b) HWY_ATTR { return hn::BitCast(d32, hn::InterleaveUpper(d16, a, b)); };
  const auto a0 = low(r0, r1), a1 = low(r2, r3), a2 = low(r4, r5), a3 = low(r6, r7);
  const auto b0 = top(r0, r1), b1 = top(r2, r3), b2 = top(r4, r5), b3 = top(r6, r7);
  const auto put = [&](int column, auto x01, auto x23, auto x45, auto x67) HWY_ATTR {
    const auto p = hn::BitCast(d64, hn::InterleaveLower(d32, x01, x23));
    const auto q = hn::BitCast(d64, hn::InterleaveLower(d32, x45, x67));
    const auto r = hn::BitCast(d64, hn::InterleaveUpper(d32, x01, x23));
    const auto s = hn::BitCast(d64, hn::InterleaveUpper(d32, x45, x67));
    const auto store = [&](int at, auto x) HWY_ATTR { hn::StoreU(hn::BitCast(d16, x), d16, to + at * to_stride); };
    store(column + 0, hn::InterleaveLower(d64, p, q));
    store(column + 1, hn::InterleaveUpper(d64, p, q));
    store(column + 2, hn::InterleaveLower(d64, r, s));
    store(column + 3, hn::InterleaveUpper(d64, r, s));
  };
  put(0, a0, a1, a2, a3);
  put(4, b0, b1, b2, b3);
}

// K's rows [first, end) into their record, [d, 64].
void transpose_rows(const uint16_t* rows, int d, int first, int end, uint16_t* k) {
  for (int t = first; t < end;) {
    if (t % 8 == 0 && t + 8 <= end) {
      for (int c = 0; c < d; c += 8) transpose8(rows + t * d + c, d, k + c * kPageTokens + t, kPageTokens);
      t += 8;
    } else {
      for (int c = 0; c < d; ++c) k[c * kPageTokens + t] = rows[t * d + c];
      ++t;
    }
  }
}

// --- summaries

// Sums of squares by lane of a cell, as rms_over_tokens in format/page_codec.cc.
struct Squares {
  HWY_ALIGN double sum[16] = {};

  float rms_over_tokens() const {
    double total = 0;
    for (const double s : sum) total += s;
    return static_cast<float>(std::sqrt(total / kPageTokens));
  }
};

// The two registers of Squares that N lanes belong to, held over a column of cells.
struct LaneSquares {
  double* at;
  VD low, high;

  LaneSquares(Squares& all, int lane)
      : at(all.sum + lane % 16), low(hn::Load(DD(), at)), high(hn::Load(DD(), at + hn::Lanes(DD()))) {}
  HWY_INLINE void add(VF group) {  // the sums of one group's squares
    low = hn::Add(low, low_half(group));
    high = hn::Add(high, high_half(group));
  }
  void store() const {
    hn::Store(low, DD(), at);
    hn::Store(high, DD(), at + hn::Lanes(DD()));
  }
};

// Summaries of K from its rows; fills in the mean that the planes are centred by, 0 without centring. Extremes are
// looked for where kExtremes.
template <bool kExtremes>
void summarise_k(const CacheConfig& config, const PageLayout& layout, const uint16_t* rows, uint8_t* summary,
                 float* centre) {
  const DF df;
  const DType type = config.high_dtype;
  uint16_t mean[kMaxChannels], low[kMaxChannels], top[kMaxChannels];
  constexpr int kTogether = kExtremes ? 2 : 4;  // of the sums in order, so that one need not wait for itself
  for (int c0 = 0; c0 < layout.d; c0 += kTogether * lanes()) {
    // A last step beyond d takes the last channels again.
    int at[kTogether];
    VF sum[kTogether], min[kTogether], max[kTogether];
    for (int j = 0; j < kTogether; ++j) {
      at[j] = std::min(c0 + j * lanes(), layout.d - lanes());
      sum[j] = hn::Zero(df);
      min[j] = max[j] = load_high(type, rows + at[j]);
    }
    for (int t = 0; t < kPageTokens; ++t)
      for (int j = 0; j < kTogether; ++j) {
        const VF x = load_high(type, rows + t * layout.d + at[j]);
        sum[j] = hn::Add(sum[j], x);
        if constexpr (!kExtremes) continue;
        min[j] = hn::IfThenElse(hn::Lt(x, min[j]), x, min[j]);  // of -0 and 0 the first, as the definition has it
        max[j] = hn::IfThenElse(hn::Lt(max[j], x), x, max[j]);
      }
    for (int j = 0; j < kTogether; ++j) {
      if constexpr (kExtremes) {
        store_high(type, min[j], low + at[j]);
        store_high(type, max[j], top + at[j]);
      }
      store_high(type, hn::Mul(sum[j], hn::Set(df, 1.0f / kPageTokens)), mean + at[j]);
      hn::StoreU(config.centring ? load_high(type, mean + at[j]) : hn::Zero(df), df, centre + at[j]);
    }
  }
  const size_t bytes = layout.d * sizeof(uint16_t);
  if (layout.mean) std::memcpy(summary + layout.mean, mean, bytes);
  if constexpr (kExtremes) {
    std::memcpy(summary + layout.min, low, bytes);
    std::memcpy(summary + layout.max, top, bytes);
  }
}

void summarise_variance(const CacheConfig& config, const PageLayout& layout, const uint16_t* rows, float* variance) {
  const DD dd;
  const VD share = hn::Set(dd, 1.0 / kPageTokens);  // exact, as dividing is
  HWY_ALIGN double squares[16];
  for (int c = 0; c < layout.d; c += lanes()) {
    VD low = hn::Zero(dd), high = hn::Zero(dd);
    for (int t = 0; t < kPageTokens; ++t) {
      const VF x = load_high(config.high_dtype, rows + t * layout.d + c);
      low = hn::Add(low, low_half(x));
      high = hn::Add(high, high_half(x));
    }
    const VD mean_low = hn::Mul(low, share), mean_high = hn::Mul(high, share);
    low = high = hn::Zero(dd);
    for (int t = 0; t < kPageTokens; ++t) {
      const VF x = load_high(config.high_dtype, rows + t * layout.d + c);
      const VD l = hn::Sub(low_half(x), mean_low), h = hn::Sub(high_half(x), mean_high);
      low = hn::Add(low, hn::Mul(l, l));
      high = hn::Add(high, hn::Mul(h, h));
    }
    hn::Store(hn::Mul(low, share), dd, squares);
    hn::Store(hn::Mul(high, share), dd, squares + hn::Lanes(dd));
    for (int i = 0; i < lanes(); ++i) variance[c + i] = static_cast<float>(squares[i]);
  }
}

// --- planes

// One matrix between the record and its codes, in the order of the codes: N lanes of all rows, then the next N.
struct Tile {
  HWY_ALIGN float value[kMaxChannels * kPageTokens];
  HWY_ALIGN float group_amax[kMaxChannels * kPageTokens / 16];  // largest |value| by group
  float amax;                                                   // of all

  static int64_t at(const PlaneLayout& plane, int r, int lane) {
    return static_cast<int64_t>(lane) * plane.depth + static_cast<int64_t>(r) * lanes();
  }
  static int64_t group_at(const PlaneLayout& plane, int r, int lane) {
    return static_cast<int64_t>(lane) * (plane.depth / plane.group) + static_cast<int64_t>(r / plane.group) * lanes();
  }
};

// Fills a tile with load(r, lane), N lanes each, and adds their squares to `squares`, unless that is null.
template <class Load>
void fill_tile(const PlaneLayout& plane, int rows, Load load, Squares* squares, Tile& tile) {
  const DF df;
  Squares unused;
  VF largest = hn::Zero(df);
  for (int lane = 0; lane < plane.lanes; lane += lanes()) {
    LaneSquares sums(squares ? *squares : unused, lane);
    for (int r0 = 0; r0 < rows; r0 += plane.group) {
      VF amax = hn::Zero(df), sum = hn::Zero(df);
      for (int r = r0; r < std::min(r0 + plane.group, rows); ++r) {
        const VF x = load(r, lane);
        hn::Store(x, df, tile.value + Tile::at(plane, r, lane));
        amax = larger_abs(amax, x);
        if (squares) sum = hn::Add(sum, hn::Mul(x, x));
      }
      if (squares) sums.add(sum);
      hn::Store(amax, df, tile.group_amax + Tile::group_at(plane, r0, lane));
      largest = hn::Max(largest, amax);
    }
    sums.store();
  }
  tile.amax = hn::GetLane(hn::MaxOfLanes(df, largest));
}

// The scales of N groups.
struct GroupScales {
  VU byte;
  VF value;  // decoded
  VU code;   // all bits where the groups have codes other than 0, no bits where they have not: scale 0 or NaN
};

// s = e4m3(amax / divisor), as e4m3_encode and e4m3_decode.
HWY_INLINE GroupScales nvfp4_scales(VF amax, float divisor) {
  const DF df;
  const DI di;
  const DU du;
  const VF s = hn::Div(amax, hn::Set(df, divisor));
  const VU a = bits(s);
  const VF magic = hn::Set(df, 0x1p14f);
  const VU tiny = hn::Sub(bits(hn::Add(s, magic)), bits(magic));
  const VU odd = hn::And(hn::ShiftRight<20>(a), hn::Set(du, 1));
  const VU normal =
      hn::ShiftRight<20>(hn::Sub(hn::Add(a, hn::Add(odd, hn::Set(du, 0x7ffff))), hn::Set(du, 120u << 23)));
  const auto ai = hn::BitCast(di, a);
  const auto when = [&](auto mask) HWY_ATTR { return hn::RebindMask(du, mask); };
  VU c = hn::IfThenElse(when(hn::Lt(ai, hn::Set(di, 0x3c800000))), tiny, normal);
  c = hn::IfThenElse(when(hn::Gt(ai, hn::Set(di, static_cast<int32_t>(bits_of(kE4m3Max)) - 1))), hn::Set(du, 0x7e), c);
  c = hn::IfThenElse(when(hn::Gt(ai, hn::Set(di, 0x7f800000))), hn::Set(du, 0x7f), c);
  const auto ci = hn::BitCast(di, c);
  const VF subnormal = hn::Mul(hn::ConvertTo(df, ci), hn::Set(df, 0x1p-9f));
  VF value = from_bits(hn::Add(hn::ShiftLeft<20>(c), hn::Set(du, 120u << 23)));
  value = hn::IfThenElse(hn::RebindMask(df, hn::Lt(ci, hn::Set(di, 8))), subnormal, value);
  value = hn::IfThenElse(hn::RebindMask(df, hn::Eq(ci, hn::Set(di, 0x7f))), from_bits(hn::Set(du, 0x7fc00000)), value);
  return {c, value, hn::VecFromMask(du, when(hn::Gt(value, hn::Zero(df))))};
}

// As encode_mxfp4_block and e8m0_decode.
HWY_INLINE GroupScales mxfp4_scales(VF amax) {
  const DF df;
  const DI di;
  const DU du;
  const auto field = hn::BitCast(di, hn::ShiftRight<23>(bits(amax)));
  const auto nan = hn::Gt(hn::BitCast(di, bits(amax)), hn::Set(di, 0x7f800000));
  auto byte = hn::Max(hn::Sub(field, hn::Set(di, 2)), hn::Zero(di));
  VU value = hn::ShiftLeft<23>(hn::BitCast(du, byte));
  value = hn::IfThenElse(hn::RebindMask(du, hn::Eq(byte, hn::Zero(di))), hn::Set(du, 0x00400000), value);
  value = hn::IfThenElse(hn::RebindMask(du, nan), hn::Set(du, 0x7fc00000), value);
  byte = hn::IfThenElse(nan, hn::Set(di, 255), byte);
  return {hn::BitCast(du, byte), from_bits(value), hn::VecFromMask(du, hn::RebindMask(du, hn::Gt(amax, hn::Zero(df))))};
}

// What values are divided by: a float below 1 / scale and what is missing, both greater than 0, so that a quotient has
// its dividend's sign, -0 too; both 0 where the scale is 0.
struct Divisor {
  VF scale;
  VF high, low;

  HWY_INLINE explicit Divisor(VF s) : scale(s) {
    const DF df;
    const VF one = hn::Set(df, 1.0f);
    const auto any = hn::Gt(s, hn::Zero(df));
    high = hn::IfThenElseZero(any, from_bits(hn::Sub(bits(hn::Div(one, s)), hn::Set(DU(), 1))));
    low = hn::Mul(hn::NegMulAdd(high, s, one), high);
  }
  HWY_INLINE Divisor(VF s, VF h, VF l) : scale(s), high(h), low(l) {}
};

// x / scale, x finite, as near as the choice of a code needs it, with the sign of x; 0 where the scale is 0.
//
// Codes change at |x| / scale = m for 7 midpoints m of 3 bits or fewer, and a scale has 4, so that m * scale is a
// float. high + low differs from 1 / scale by less than 2^-40 of it, so that the sum below, before its one rounding,
// differs from the quotient by less than 2^-39. If |x| is m * scale, the rounding restores m. If it is another float,
// it differs from that one by a unit of its last place at least, and then |x| / scale from m by more than half a unit
// of m (by 1/15 more, or 2^-28 of m, at least): the rounded quotient lies on the same side of m as the exact one, and
// so does the rounded sum. So all three choose the same code.
HWY_INLINE VF divide(VF x, const Divisor& by) {
#if HWY_TARGET == HWY_EMU128  // no fused products
  return hn::IfThenElseZero(hn::Gt(by.high, hn::Zero(DF())), hn::Div(x, by.scale));
#else
  return hn::MulAdd(x, by.high, hn::Mul(x, by.low));
#endif
}

// N values of the E2M1 grid.
struct Rounded {
  VU code;  // in the low three bits; the others are anything
  VF abs;   // decoded
};

// Rounds q >= 0 to E2M1, ties to the even code. From 2^e on (e = 0 below 2 too) the grid's step is 2^(e - 1), and q of
// k steps has the code k + 2e. The sum with 2^(e + 22) + 6 steps rounds to whole steps: its fraction is then k + 6 and
// its exponent field e + 149, so that fraction + 2 * field = code + 304, and 304 is a multiple of 8.
HWY_INLINE Rounded round_e2m1(VF q) {
  const DF df;
  const DU du;
  const VF six = hn::Set(df, kE2m1Max);
#if HWY_ARCH_X86
  q = hn::Min(q, six);  // of a NaN: 6
#else
  q = hn::IfThenElse(hn::Lt(q, six), q, six);
#endif
  const VU power = hn::And(bits(hn::Max(q, hn::Set(df, 1.0f))), hn::Set(du, 0x7f800000));
  const VF big = from_bits(hn::Add(power, hn::Set(du, (22u << 23) + 6)));
  const VF sum = hn::Add(q, big);
  return {hn::Add(bits(sum), hn::ShiftRight<22>(bits(sum))), hn::Sub(sum, big)};
}

// A value's code and what it stands for.
struct Coded {
  VU nibble;  // in the low four bits; on AVX-512 the others are anything
  VF dec;     // decoded without its scale
};

#if HWY_TARGET <= HWY_AVX3
// As round_e2m1, sign and all. The quotient rounded down, -6 to 6, picks what is added to it from a register, modulo
// 16: a power of two large enough that the sum's last place is the grid's step there, plus as many steps as bring the
// code, its sign included, into the last four bits.
struct Rounding {
  VF table;
  VF six, tiny;
  HWY_INLINE Rounding() {
    HWY_ALIGN static constexpr float kAdded[16] = {0x1p22f,
                                                   0x1p22f,
                                                   0x1p23f + 2,
                                                   0x1p23f + 2,
                                                   0x1p24f + 8,
                                                   0x1p24f + 8,
                                                   0x1p24f + 8,
                                                   0,
                                                   0,
                                                   0,  // 0 to 6
                                                   -0x1p24f - 24,
                                                   -0x1p24f - 24,
                                                   -0x1p23f - 10,
                                                   -0x1p23f - 10,
                                                   -0x1p22f - 4,
                                                   -0x1p22f - 4};  // -6 to -1
    table = hn::Load(DF(), kAdded);
    six = hn::Set(DF(), kE2m1Max);
    tiny = hn::Set(DF(), 0x1p-126f);
  }
  HWY_INLINE Coded operator()(VF value, const Divisor& by) const {
    auto q =
        _mm512_range_ps(divide(value, by).raw, six.raw, 0b0010);  // the smaller absolute value, the first one's sign
    q = _mm512_range_ps(q, tiny.raw, 0b0011);                     // the larger one: -0 must be below 0
    const auto down = _mm512_cvt_roundps_epi32(q, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    const auto added = _mm512_permutexvar_ps(down, table.raw);
    const auto sum = _mm512_add_ps(q, added);
    return {VU{_mm512_castps_si512(sum)}, VF{_mm512_sub_ps(added, sum)}};
  }
  // value - dec * scale; +0 where the two are equal. dec is held negated: a zero of either sign then ends as the
  // definition has it.
  static HWY_INLINE VF error(VF value, const Coded& coded, VF scale) { return hn::MulAdd(coded.dec, scale, value); }
};
#else
struct Rounding {
  HWY_INLINE Coded operator()(VF value, const Divisor& by) const {
    const VU sign = hn::And(bits(value), hn::Set(DU(), kSign));
    const Rounded rounded = round_e2m1(divide(hn::Abs(value), by));
    return {hn::OrAnd(hn::ShiftRight<28>(sign), rounded.code, hn::Set(DU(), 7)),
            from_bits(hn::Or(bits(rounded.abs), sign))};
  }
  static HWY_INLINE VF error(VF value, const Coded& coded, VF scale) { return hn::NegMulAdd(coded.dec, scale, value); }
};
#endif

// The codes of 8 rows of N lanes, given in order, as the layout packs them.
struct Word {
#if HWY_TARGET <= HWY_AVX3_DL
  VU half[2];  // bytes of rows 0 to 3 and 4 to 7
  HWY_INLINE Word() : half{hn::Zero(DU()), hn::Zero(DU())} {}
  template <int kRow>
  HWY_INLINE void add(VU nibble) {
    half[kRow / 4] = VU{_mm512_shrdi_epi32(half[kRow / 4].raw, nibble.raw, 8)};
  }
  HWY_INLINE VU get() const {
    const VU low = hn::Set(DU(), 0x0f0f0f0fu);
    return hn::OrAnd(hn::AndNot(low, hn::ShiftLeft<4>(half[1])), half[0], low);
  }
#else
  VU all;
  HWY_INLINE Word() : all(hn::Zero(DU())) {}
  template <int kRow>
  HWY_INLINE void add(VU nibble) {
    constexpr int kShift = kRow % 4 * 8 + kRow / 4 * 4;
#if HWY_TARGET <= HWY_AVX3
    nibble = hn::And(nibble, hn::Set(DU(), 15));
#endif
    all = hn::Or(all, hn::ShiftLeft<kShift>(nibble));
  }
  HWY_INLINE VU get() const { return all; }
#endif
};

// The squared error of 16 rows of x * up under given scales: in double and in order, as nvfp4_squared_error.
HWY_INLINE void squared_error(const float* x, VF up, VF scale, VD& low, VD& high) {
  const Divisor by(scale);
  low = high = hn::Zero(DD());
  for (int i = 0; i < 16; ++i) {
    const VF a = hn::Mul(hn::Abs(hn::Load(DF(), x + i * lanes())), up);
    const VF decoded = hn::Mul(round_e2m1(divide(a, by)).abs, scale);
    const VD l = hn::Sub(low_half(a), low_half(decoded)), h = hn::Sub(high_half(a), high_half(decoded));
    low = hn::Add(low, hn::Mul(l, l));
    high = hn::Add(high, hn::Mul(h, h));
  }
}

HWY_INLINE GroupScales choose_scales(const CacheConfig& config, const float* x, VF amax, VF up) {
  amax = hn::Mul(amax, up);
  if (config.format == Fp4Format::mxfp4) return mxfp4_scales(amax);
  const GroupScales six = nvfp4_scales(amax, 6.0f);
  if (config.scales == Scales::six) return six;
  const GroupScales four = nvfp4_scales(amax, 4.0f);
  VD six_low, six_high, four_low, four_high;
  squared_error(x, up, six.value, six_low, six_high);
  squared_error(x, up, four.value, four_low, four_high);
  const DD dd;
  HWY_ALIGN double greater[16];  // 1 where 4 is better; a NaN keeps 6
  const VD one = hn::Set(dd, 1.0);
  hn::Store(hn::IfThenElseZero(hn::Gt(six_low, four_low), one), dd, greater);
  hn::Store(hn::IfThenElseZero(hn::Gt(six_high, four_high), one), dd, greater + hn::Lanes(dd));
  HWY_ALIGN float chosen[16];
  for (int i = 0; i < lanes(); ++i) chosen[i] = static_cast<float>(greater[i]);
  const auto better = hn::Gt(hn::Load(DF(), chosen), hn::Zero(DF()));
  const auto better_u = hn::RebindMask(DU(), better);
  return {hn::IfThenElse(better_u, four.byte, six.byte), hn::IfThenElse(better, four.value, six.value),
          hn::IfThenElse(better_u, four.code, six.code)};
}

// What the next append reads and writes, brought into L2 by equal steps while this page is encoded, one for every 8
// rows of codes: without it memory waits while this computes, and this while memory answers.
class NextAppend {
 public:
  explicit NextAppend(const PageAppend& a) {
    if (!a.next || !a.fp4) return;
    const PageLayout& layout = *a.layout;
    const PageAppend& next = *a.next;
    add_rows(next.k, layout.d, next.end - next.first);
    add_rows(next.v, layout.d_v, next.end - next.first);
    add_record(next.high, layout.high_bytes);
    add_record(next.fp4, layout.fp4_bytes);
    add_record(next.residual, layout.fp4_bytes);
    const auto steps = [](const PlaneLayout& plane, int rows) { return (rows + 7) / 8 * (plane.lanes / lanes()); };
    const int64_t all = (steps(layout.k, layout.d) + steps(layout.v, kPageTokens)) * (a.residual ? 2 : 1);
    lines_a_step_ = (lines_ + all - 1) / all;
    enter();
  }

  HWY_INLINE void step() {
    for (int64_t i = 0; i < lines_a_step_; ++i) {
      __builtin_prefetch(at_, 0, 2);
      at_ += kLine;
      if (--lines_left_ == 0) next_row();
    }
  }

 private:
  static constexpr int64_t kLine = 64;
  struct Part {
    const char* first;
    int64_t row_bytes;  // from one row to the next
    int64_t row_lines, rows;
  };

  void add(const Part& part) {
    if (!part.first || part.rows == 0) return;
    parts_[count_++] = part;
    lines_ += part.row_lines * part.rows;
  }
  void add_rows(const AppendRows& from, int channels, int rows) {
    const int64_t bytes = int64_t{channels} * size_of(from.dtype);
    add({static_cast<const char*>(from.data), from.row_bytes, (bytes + kLine - 1) / kLine, rows});
  }
  void add_record(const void* record, int64_t bytes) {
    add({static_cast<const char*>(record), 0, (bytes + kLine - 1) / kLine, 1});
  }
  void enter() {
    row_ = at_ = parts_[part_].first;
    lines_left_ = parts_[part_].row_lines;
    rows_left_ = parts_[part_].rows;
  }
  void next_row() {
    if (--rows_left_ > 0) {
      row_ += parts_[part_].row_bytes;
      at_ = row_;
      lines_left_ = parts_[part_].row_lines;
    } else if (++part_ < count_) {
      enter();
    } else {
      lines_a_step_ = 0;
    }
  }

  Part parts_[5];
  int count_ = 0, part_ = 0;
  int64_t lines_ = 0, lines_a_step_ = 0;  // a step brings nothing once all are there
  const char *row_ = nullptr, *at_ = nullptr;
  int64_t lines_left_ = 0, rows_left_ = 0;
};

enum class Keep { nothing, squares, squares_and_errors };  // of the errors

// Encodes a tile of which `rows` rows are given and returns the page exponent. Adds the squares of the errors to
// `squares`; leaves the errors in the tile in place of its values.
template <Keep kKeep>
int encode_plane(const CacheConfig& config, const PlaneLayout& plane, int rows, Tile& tile, uint8_t* codes,
                 uint8_t* scales, Squares& squares, NextAppend& next) {
  const DF df;
  const DU du;
  const int n = lanes(), groups = (rows + plane.group - 1) / plane.group;
  const int exponent = config.page_scale ? page_exponent(tile.amax, config.format, config.scales) : 0;
  const VF up = hn::Set(df, pow2(exponent)), down = hn::Set(df, pow2(-exponent));
  if (rows < plane.depth) {  // padding
    std::memset(codes, 0, plane.code_bytes());
    std::memset(scales, 0, plane.scale_bytes());
  }
  constexpr int kMaxGroups = kMaxChannels / 16;
  HWY_ALIGN float steps[kMaxGroups * 16], high[kMaxGroups * 16], low[kMaxGroups * 16];
  HWY_ALIGN uint32_t masks[kMaxGroups * 16];
  const Rounding rounding;
  VF largest = hn::Zero(df);
  for (int lane = 0; lane < plane.lanes; lane += n) {
    float* amax = tile.group_amax + Tile::group_at(plane, 0, lane);
    for (int g = 0; g < groups; ++g) {  // apart from the codes, so that no code waits for its scale
      const float* x = tile.value + Tile::at(plane, g * plane.group, lane);
      const GroupScales s = choose_scales(config, x, hn::Load(df, amax + g * n), up);
      const hn::Rebind<uint8_t, DF> du8;
      hn::StoreU(hn::DemoteTo(du8, hn::BitCast(DI(), s.byte)), du8, scales + plane.scale_offset(g * plane.group, lane));
      const Divisor by(s.value);
      // Groups without codes read as +0 whatever their values' signs; a negative scale lets the error of -0 be -0.
      const VU no_codes = hn::AndNot(s.code, hn::Set(du, kSign));
      hn::Store(from_bits(hn::Or(bits(hn::Mul(s.value, down)), no_codes)), df, steps + g * n);
      hn::Store(hn::Mul(by.high, up), df, high + g * n);
      hn::Store(hn::Mul(by.low, up), df, low + g * n);
      hn::Store(s.code, du, masks + g * n);
    }
    LaneSquares sums(squares, lane);
    for (int g = 0; g < groups; ++g) {
      const Divisor step(hn::Load(df, steps + g * n), hn::Load(df, high + g * n), hn::Load(df, low + g * n));
      const VU mask = hn::Load(du, masks + g * n);
      VF error_amax = hn::Zero(df), sum = hn::Zero(df);
      for (int r0 = g * plane.group; r0 < std::min((g + 1) * plane.group, rows); r0 += 8) {
        float* x = tile.value + Tile::at(plane, r0, lane);
        Word word;
        const auto encode_row = [&](auto row) HWY_ATTR {
          constexpr int kRow = decltype(row)::value;
          const VF value = hn::Load(df, x + kRow * n);
          const Coded coded = rounding(value, step);
          word.template add<kRow>(coded.nibble);
          if constexpr (kKeep == Keep::nothing) return;
          const VF error = Rounding::error(value, coded, step.scale);
          sum = hn::Add(sum, hn::Mul(error, error));
          if constexpr (kKeep == Keep::squares_and_errors) {
            error_amax = larger_abs(error_amax, error);
            hn::Store(error, df, x + kRow * n);
          }
        };
        encode_row(std::integral_constant<int, 0>());
        encode_row(std::integral_constant<int, 1>());
        encode_row(std::integral_constant<int, 2>());
        encode_row(std::integral_constant<int, 3>());
        encode_row(std::integral_constant<int, 4>());
        encode_row(std::integral_constant<int, 5>());
        encode_row(std::integral_constant<int, 6>());
        encode_row(std::integral_constant<int, 7>());
        hn::StoreU(hn::And(word.get(), mask), du, reinterpret_cast<uint32_t*>(codes + plane.code_offset(r0, lane)));
        next.step();
      }
      sums.add(sum);
      hn::Store(error_amax, df, amax + g * n);
      largest = hn::Max(largest, error_amax);
    }
    sums.store();
  }
  tile.amax = hn::GetLane(hn::MaxOfLanes(df, largest));
  return exponent;
}

// One matrix of a page, in its tile, in one plane or two: the second one encodes what the first one left. Returns the
// first one's root mean square error.
float encode_matrix(const CacheConfig& config, const PlaneLayout& plane, int rows, Tile& tile, uint8_t* fp4,
                    uint8_t* residual, int64_t codes, int64_t scales, int8_t exponents[2], NextAppend& next) {
  Squares squares;
  const auto encode_first = residual ? encode_plane<Keep::squares_and_errors> : encode_plane<Keep::squares>;
  exponents[0] = static_cast<int8_t>(encode_first(config, plane, rows, tile, fp4 + codes, fp4 + scales, squares, next));
  const float rms = squares.rms_over_tokens();
  if (residual)
    exponents[1] = static_cast<int8_t>(
        encode_plane<Keep::nothing>(config, plane, rows, tile, residual + codes, residual + scales, squares, next));
  return rms;
}

// encode_page, of a record whose K rows are at hand.
void encode(const PageAppend& a, const uint16_t* rows) {
  const CacheConfig& config = *a.config;
  const PageLayout& layout = *a.layout;
  const DType type = config.high_dtype;
  const uint16_t* v = a.high + layout.high_v;
  HWY_ALIGN float centre[kMaxChannels];
  PageSummary facts;
  const auto summarise = layout.min ? summarise_k<true> : summarise_k<false>;
  summarise(config, layout, rows, a.summary, centre);
  if (layout.variance) summarise_variance(config, layout, rows, reinterpret_cast<float*>(a.summary + layout.variance));
  Tile tile;
  NextAppend next(a);
  if (a.fp4) {
    const auto load_k = [&](int r, int lane) HWY_ATTR {
      return hn::Sub(load_high(type, a.high + r * kPageTokens + lane), hn::Set(DF(), centre[r]));
    };
    fill_tile(layout.k, layout.d, load_k, nullptr, tile);
    if (std::isinf(tile.amax)) {  // BF16 near its end: what follows is for finite values
      encode_page(config, layout, a.high, a.fp4, a.residual, a.summary);
      return;
    }
    facts.eps_k = encode_matrix(config, layout.k, layout.d, tile, a.fp4, a.residual, layout.k_codes, layout.k_scales,
                                facts.k_exponent, next);
  }
  const auto load_v = [&](int r, int lane) HWY_ATTR { return load_high(type, v + r * layout.d_v + lane); };
  Squares v_squares;
  fill_tile(layout.v, kPageTokens, load_v, &v_squares, tile);
  facts.v_norm = v_squares.rms_over_tokens();
  if (a.fp4)
    facts.eps_v = encode_matrix(config, layout.v, kPageTokens, tile, a.fp4, a.residual, layout.v_codes, layout.v_scales,
                                facts.v_exponent, next);
  std::memcpy(a.summary, &facts, sizeof(facts));
}

bool append_rows(const PageAppend& a) {
  const PageLayout& layout = *a.layout;
  const DType type = a.config->high_dtype;
  HWY_ALIGN uint16_t rows[kPageTokens * kMaxChannels];
  const VU k = convert_rows(a.k, type, a.first, a.end, layout.d, rows);
  const VU v = convert_rows(a.v, type, a.first, a.end, layout.d_v, a.high + layout.high_v);
  const float largest = hn::GetLane(hn::MaxOfLanes(DF(), from_bits(hn::Min(hn::Max(k, v), hn::Set(DU(), 0x7f800000)))));
  if (!(largest <= high_limit(type))) return false;
  transpose_rows(rows, layout.d, a.first, a.end, a.high);
  if (!a.summary) return true;
  for (int t = 0; t < a.first; t += 8)  // the page is full: what stands before is read back
    for (int c = 0; c < layout.d; c += 8)
      transpose8(a.high + c * kPageTokens + t, kPageTokens, rows + t * layout.d + c, layout.d);
  encode(a, rows);
  return true;
}

const Encoder* table() {
  static constexpr Encoder kTable = {"", append_rows};
  return &kTable;
}

}  // namespace encode

const Encoder* encoder_table() { return encode::table(); }

}  // namespace HWY_NAMESPACE
}  // namespace thriftattn::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
#include "cpu/backend.h"
#include "cpu/targets.h"

namespace thriftattn::cpu {
namespace {

HWY_EXPORT(encoder_table);

const std::vector<Encoder>& all_encoders() {
  static const std::vector<Encoder> all =
      tables_of_targets<Encoder>([] { return HWY_DYNAMIC_DISPATCH(encoder_table)(); });
  return all;
}

}  // namespace

const Encoder* encoder_for(const std::string& target) {
  for (const Encoder& e : all_encoders())
    if (target == e.target) return &e;
  return nullptr;
}

bool append_rows(const PageAppend& append) { return all_encoders().front().append_rows(append); }

}  // namespace thriftattn::cpu
#endif  // HWY_ONCE
