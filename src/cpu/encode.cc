// Rows into a page and a full page into its stored forms, portable SIMD; one body for every format.
//
//   k, v of the caller --convert, check the range--> 16-bit record (K transposed 8 x 8) and K's rows (16 bit, L1/L2)
//   K's rows --over tokens--> sum, min, max --> mean, summaries, K's largest |k - mean|
//   record --cell by cell--> x - mean --> scale, codes, error --> the error's plane the same way
//
// Every input value is read once from memory; a page's 16-bit record, 32 KiB at d = 128, is then in L1 and L2. What the
// bytes mean is defined by encode_page (format/page_codec.cc), and each step here is the same IEEE operation on the same
// values in the same order, sixteen at a time: the results are equal bit for bit on every target. With two planes about
// 60 instructions and two divisions a register of values bind; with none, the memory does.
//
// Memory of a task, on its stack: K's rows 32 KiB and the errors of one matrix 64 KiB at most; at d = 128 half of each.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/encode.cc"
#include <hwy/foreach_target.h>  // NOLINT: must come before highway.h

#include <hwy/highway.h>

#include <algorithm>
#include <bit>
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

// Sums, in the order of the plane's codes, of the squares of what stands in each lane of a cell. A float's square is
// exact in double, so it does not matter whether the product is fused.
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
  HWY_INLINE void add(VF x) {
    const VD l = low_half(x), h = high_half(x);
    low = hn::MulAdd(l, l, low);
    high = hn::MulAdd(h, h, high);
  }
  void store() const {
    hn::Store(low, DD(), at);
    hn::Store(high, DD(), at + hn::Lanes(DD()));
  }
};

// Summaries of K from its rows; fills in the mean that the planes are centred by (0 without centring) and returns the
// largest |k - mean|: rounding keeps the order, so that the smallest and the largest k of a channel tell.
float summarise_k(const CacheConfig& config, const PageLayout& layout, const uint16_t* rows, uint8_t* summary,
                  float* centre) {
  const DF df;
  const DU du;
  const DType type = config.high_dtype;
  HWY_ALIGN float low[kMaxChannels], top[kMaxChannels];
  uint16_t mean[kMaxChannels];
  VU largest = hn::Zero(du);
  constexpr int kTogether = 2;  // of the sums in order, so that one need not wait for itself
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
        min[j] = hn::IfThenElse(hn::Lt(x, min[j]), x, min[j]);  // of -0 and 0 the first, as the definition has it
        max[j] = hn::IfThenElse(hn::Lt(max[j], x), x, max[j]);
      }
    for (int j = 0; j < kTogether; ++j) {
      hn::StoreU(min[j], df, low + at[j]);
      hn::StoreU(max[j], df, top + at[j]);
      store_high(type, hn::Mul(sum[j], hn::Set(df, 1.0f / kPageTokens)), mean + at[j]);
      const VF m = config.centring ? load_high(type, mean + at[j]) : hn::Zero(df);
      hn::StoreU(m, df, centre + at[j]);
      for (const VF end : {min[j], max[j]})
        largest = hn::Max(largest, hn::And(bits(hn::Sub(end, m)), hn::Set(du, kAbs)));
    }
  }
  if (layout.mean) std::memcpy(summary + layout.mean, mean, layout.d * sizeof(uint16_t));
  for (int c = 0; c < layout.d; c += lanes()) {
    if (layout.min)
      store_high(type, hn::LoadU(df, low + c), reinterpret_cast<uint16_t*>(summary + layout.min) + c);
    if (layout.max)
      store_high(type, hn::LoadU(df, top + c), reinterpret_cast<uint16_t*>(summary + layout.max) + c);
  }
  return hn::GetLane(hn::MaxOfLanes(df, from_bits(largest)));
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

// |V|: its squares and its largest value.
float measure_v(DType type, const PlaneLayout& plane, const uint16_t* v, Squares& squares) {
  VU largest = hn::Zero(DU());
  for (int lane = 0; lane < plane.lanes; lane += lanes()) {
    LaneSquares sums(squares, lane);
    for (int r = 0; r < plane.depth; ++r) {
      const VF x = load_high(type, v + r * plane.lanes + lane);
      largest = hn::Max(largest, hn::And(bits(x), hn::Set(DU(), kAbs)));
      sums.add(x);
    }
    sums.store();
  }
  return hn::GetLane(hn::MaxOfLanes(DF(), from_bits(largest)));
}

// --- planes

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
  const VU normal = hn::ShiftRight<20>(hn::Sub(hn::Add(a, hn::Add(odd, hn::Set(du, 0x7ffff))), hn::Set(du, 120u << 23)));
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
  return {hn::BitCast(du, byte), from_bits(value),
          hn::VecFromMask(du, hn::RebindMask(du, hn::Gt(amax, hn::Zero(df))))};
}

// N values of the E2M1 grid.
struct Rounded {
  VU code;  // 0..7, without the sign
  VF abs;   // decoded
};

// |x| / s rounded to E2M1, ties to the even code; 0 where `abs_mask` is 0. From 2^e on (e = 0 below 2 too) the grid's
// step is 2^(e - 1), and |x| / s = k steps has the code k + 2e. The sum with 2^(e + 22) + 6 steps rounds to whole steps:
// its fraction is then k + 6 and its exponent field e + 149, so that fraction + 2 * field = code + 304, a multiple of 8.
HWY_INLINE Rounded round_e2m1(VF x, VF s, VU abs_mask) {
  const DF df;
  const DU du;
  VF q = from_bits(hn::And(bits(hn::Div(x, s)), abs_mask));
  q = hn::Min(q, hn::Set(df, kE2m1Max));
  const VU power = hn::And(bits(hn::Max(q, hn::Set(df, 1.0f))), hn::Set(du, 0x7f800000));
  const VF big = from_bits(hn::Add(power, hn::Set(du, (22u << 23) + 6)));
  const VF sum = hn::Add(q, big);
  return {hn::And(hn::Add(bits(sum), hn::ShiftRight<22>(bits(sum))), hn::Set(du, 7)), hn::Sub(sum, big)};
}

// The squared error of 16 rows of x * up under given scales: in double and in order, as nvfp4_squared_error.
HWY_INLINE void squared_error(const float* x, VF up, const GroupScales& s, VD& low, VD& high) {
  const VU abs_mask = hn::And(s.code, hn::Set(DU(), kAbs));
  low = high = hn::Zero(DD());
  for (int i = 0; i < 16; ++i) {
    const VF y = hn::Mul(hn::Load(DF(), x + i * lanes()), up);
    const VF decoded = hn::Mul(round_e2m1(y, s.value, abs_mask).abs, s.value);
    const VF a = hn::Abs(y);  // both have y's sign
    const VD l = hn::Sub(low_half(a), low_half(decoded)), h = hn::Sub(high_half(a), high_half(decoded));
    low = hn::Add(low, hn::Mul(l, l));
    high = hn::Add(high, hn::Mul(h, h));
  }
}

HWY_INLINE GroupScales choose_scales(const CacheConfig& config, const float* x, VF amax, VF up) {
  if (config.format == Fp4Format::mxfp4) return mxfp4_scales(amax);
  const GroupScales six = nvfp4_scales(amax, 6.0f);
  if (config.scales == Scales::six) return six;
  const GroupScales four = nvfp4_scales(amax, 4.0f);
  VD six_low, six_high, four_low, four_high;
  squared_error(x, up, six, six_low, six_high);
  squared_error(x, up, four, four_low, four_high);
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

// Where the errors of one matrix stand between its planes: as they are encoded, N lanes by N lanes.
inline float* error_at(float* errors, const PlaneLayout& plane, int r, int lane) {
  return errors + static_cast<int64_t>(lane) * plane.depth + static_cast<int64_t>(r) * lanes();
}

// Encodes `rows` rows of a plane, load(r, lane) each, times 2^exponent. Leaves their errors in `errors` and returns the
// largest of them, unless it is null; adds their squares to `squares`, unless that is null.
template <class Load>
float encode_plane(const CacheConfig& config, const PlaneLayout& plane, int rows, int exponent, Load load,
                   uint8_t* codes, uint8_t* scales, float* errors, Squares* squares) {
  const DF df;
  const DU du;
  const int n = lanes();
  const VF up = hn::Set(df, pow2(exponent)), down = hn::Set(df, pow2(-exponent));
  if (rows < plane.depth) {  // padding
    std::memset(codes, 0, plane.code_bytes());
    std::memset(scales, 0, plane.scale_bytes());
  }
  HWY_ALIGN float x[kMaxBlockSize * 16];
  Squares unused;
  VU largest = hn::Zero(du);
  for (int lane = 0; lane < plane.lanes; lane += n) {
    LaneSquares sums(squares ? *squares : unused, lane);
    for (int r0 = 0; r0 < rows; r0 += plane.group) {
      const int height = std::min(plane.group, rows - r0);  // 16 or 32
      VU amax = hn::Zero(du);
      for (int i = 0; i < height; ++i) {
        const VF value = load(r0 + i, lane);
        hn::Store(value, df, x + i * n);
        amax = hn::Max(amax, hn::And(bits(value), hn::Set(du, kAbs)));
      }
      const GroupScales s = choose_scales(config, x, hn::Mul(from_bits(amax), up), up);
      hn::StoreU(hn::DemoteTo(hn::Rebind<uint8_t, DF>(), hn::BitCast(DI(), s.byte)), hn::Rebind<uint8_t, DF>(),
                 scales + plane.scale_offset(r0, lane));
      const VU abs_mask = hn::And(s.code, hn::Set(du, kAbs)), sign_mask = hn::And(s.code, hn::Set(du, kSign));
      const VF step = hn::Mul(s.value, down);
      for (int i = 0; i < height; i += 8) {
        VU word = hn::Zero(du);
        const auto encode_row = [&](auto shift) HWY_ATTR {
          constexpr int kShift = decltype(shift)::value;
          constexpr int kRow = kShift % 8 / 4 * 4 + kShift / 8;
          const VF value = hn::Load(df, x + (i + kRow) * n);
          const Rounded rounded = round_e2m1(hn::Mul(value, up), s.value, abs_mask);
          const VU sign = hn::And(bits(value), sign_mask);
          word = hn::Or(word, hn::ShiftLeft<kShift>(hn::Or(rounded.code, hn::ShiftRight<28>(sign))));
          const VF decoded = from_bits(hn::Or(bits(rounded.abs), sign));
          const VF error = hn::Sub(value, hn::Mul(decoded, step));
          if (squares) sums.add(error);
          if (errors) {
            largest = hn::Max(largest, hn::And(bits(error), hn::Set(du, kAbs)));
            hn::Store(error, df, error_at(errors, plane, r0 + i + kRow, lane));
          }
        };
        encode_row(std::integral_constant<int, 0>());
        encode_row(std::integral_constant<int, 8>());
        encode_row(std::integral_constant<int, 16>());
        encode_row(std::integral_constant<int, 24>());
        encode_row(std::integral_constant<int, 4>());
        encode_row(std::integral_constant<int, 12>());
        encode_row(std::integral_constant<int, 20>());
        encode_row(std::integral_constant<int, 28>());
        hn::StoreU(word, du, reinterpret_cast<uint32_t*>(codes + plane.code_offset(r0 + i, lane)));
      }
    }
    sums.store();
  }
  return hn::GetLane(hn::MaxOfLanes(df, from_bits(largest)));
}

// One matrix of a page in one plane or two; null = not stored. `amax` is the largest |value| of load.
template <class Load>
float encode_matrix(const CacheConfig& config, const PlaneLayout& plane, int rows, float amax, Load load,
                    uint8_t* const codes[2], uint8_t* const scales[2], float* errors, int8_t exponents[2]) {
  const auto exponent_of = [&](float largest) {
    return config.page_scale ? page_exponent(largest, config.format, config.scales) : 0;
  };
  Squares squares;
  const int first = exponent_of(amax);
  exponents[0] = static_cast<int8_t>(first);
  float* kept = codes[1] ? errors : nullptr;
  const float largest = encode_plane(config, plane, rows, first, load, codes[0], scales[0], kept, &squares);
  if (codes[1]) {
    const auto load_error = [&](int r, int lane) HWY_ATTR { return hn::Load(DF(), error_at(errors, plane, r, lane)); };
    const int second = exponent_of(largest);
    exponents[1] = static_cast<int8_t>(second);
    encode_plane(config, plane, rows, second, load_error, codes[1], scales[1], nullptr, nullptr);
  }
  return squares.rms_over_tokens();
}

// encode_page, of a record whose K rows are at hand.
void encode(const PageAppend& a, const uint16_t* rows) {
  const CacheConfig& config = *a.config;
  const PageLayout& layout = *a.layout;
  const DType type = config.high_dtype;
  const uint16_t* v = a.high + layout.high_v;
  HWY_ALIGN float centre[kMaxChannels];
  PageSummary facts;
  const float k_amax = summarise_k(config, layout, rows, a.summary, centre);
  if (layout.variance)
    summarise_variance(config, layout, rows, reinterpret_cast<float*>(a.summary + layout.variance));
  Squares v_squares;
  const float v_amax = measure_v(type, layout.v, v, v_squares);
  facts.v_norm = v_squares.rms_over_tokens();
  if (a.fp4) {
    HWY_ALIGN float errors[kMaxChannels * kPageTokens];
    const auto load_k = [&](int r, int lane) HWY_ATTR {
      return hn::Sub(load_high(type, a.high + r * kPageTokens + lane), hn::Set(DF(), centre[r]));
    };
    const auto load_v = [&](int r, int lane) HWY_ATTR { return load_high(type, v + r * layout.d_v + lane); };
    const auto at = [&](uint8_t* plane, int64_t offset) { return plane ? plane + offset : nullptr; };
    uint8_t* const k_codes[2] = {a.fp4 + layout.k_codes, at(a.residual, layout.k_codes)};
    uint8_t* const k_scales[2] = {a.fp4 + layout.k_scales, at(a.residual, layout.k_scales)};
    uint8_t* const v_codes[2] = {a.fp4 + layout.v_codes, at(a.residual, layout.v_codes)};
    uint8_t* const v_scales[2] = {a.fp4 + layout.v_scales, at(a.residual, layout.v_scales)};
    facts.eps_k = encode_matrix(config, layout.k, layout.d, k_amax, load_k, k_codes, k_scales, errors, facts.k_exponent);
    facts.eps_v =
        encode_matrix(config, layout.v, kPageTokens, v_amax, load_v, v_codes, v_scales, errors, facts.v_exponent);
  }
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
    for (int c = 0; c < layout.d; c += 8) transpose8(a.high + c * kPageTokens + t, kPageTokens, rows + t * layout.d + c, layout.d);
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
