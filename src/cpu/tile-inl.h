// What a target does to one page or one tile of numbers: decode it, multiply it, exponentiate it. Included once per
// target by kernels.cc.
#if defined(THRIFTATTN_CPU_TILE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef THRIFTATTN_CPU_TILE_INL_H_
#undef THRIFTATTN_CPU_TILE_INL_H_
#else
#define THRIFTATTN_CPU_TILE_INL_H_
#endif

#include <hwy/highway.h>

#include <algorithm>
#include <cstring>

#include "format/page_layout.h"
#include "thriftattn/tensor.h"

HWY_BEFORE_NAMESPACE();
namespace thriftattn::cpu {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

// Floats of one register. A cell of the page layout has 16 lanes, so longer registers are not used whole.
using DF = hn::CappedTag<float, 16>;
using DI = hn::Rebind<int32_t, DF>;
using DU = hn::Rebind<uint32_t, DF>;
using DU8 = hn::Repartition<uint8_t, DU>;
using VF = hn::Vec<DF>;

// --- decoding

// The scales of N lanes, times `factor`.
inline VF load_scales(Fp4Format format, const uint8_t* scales, float factor) {
  const DF df;
  const DU du;
  const hn::Rebind<uint8_t, DF> du8;
  const auto u = hn::PromoteTo(du, hn::LoadU(du8, scales));
  VF s;
  if (format == Fp4Format::nvfp4) {  // E4M3: move the fields into place and correct the bias; subnormals are u * 2^-9
    const VF normal = hn::BitCast(df, hn::Add(hn::ShiftLeft<20>(u), hn::Set(du, 120u << 23)));
    const VF subnormal = hn::Mul(hn::ConvertTo(df, hn::BitCast(DI(), u)), hn::Set(df, 0x1p-9f));
    s = hn::IfThenElse(hn::Lt(subnormal, hn::Set(df, 0x1p-6f)), subnormal, normal);
  } else {  // E8M0; byte 0 goes with zero codes only, and reads as 0
    s = hn::BitCast(df, hn::ShiftLeft<23>(u));
  }
  return hn::Mul(s, hn::Set(df, factor));
}

enum class Start { zero, rows, sum };  // what decoded values are added to: nothing, start[r], what `out` holds

// out[r, lane] = start + dec(code[r, lane]) * scale * 2^-exponent, for `rows` rows of plane.lanes floats.
template <Start kStart>
void decode_plane(const PlaneLayout& plane, Fp4Format format, int rows, int exponent, const uint8_t* codes,
                  const uint8_t* scales, const float* start, float* out) {
  const DF df;
  const DI di;
  const DU du;
  const DU8 du8;
  const int n = static_cast<int>(hn::Lanes(df));
  // E2M1 doubled is an integer, so one byte lookup decodes it.
  HWY_ALIGN static constexpr uint8_t kTwice[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, 255, 254, 253, 252, 250, 248, 244};
  const auto table = hn::LoadDup128(du8, kTwice);
  const auto low = hn::Set(du8, 15);
  const float factor = 0.5f * pow2(-exponent);
  for (int lane = 0; lane < plane.lanes; lane += n) {
    VF scale = hn::Zero(df);
    for (int r0 = 0; r0 < rows; r0 += 8) {
      if (r0 % plane.group == 0) scale = load_scales(format, scales + plane.scale_offset(r0, lane), factor);
      const auto x = hn::LoadU(du, reinterpret_cast<const uint32_t*>(codes + plane.code_offset(r0, lane)));
      const auto first = hn::BitCast(di, hn::TableLookupBytes(table, hn::And(hn::BitCast(du8, x), low)));
      const auto second =
          hn::BitCast(di, hn::TableLookupBytes(table, hn::And(hn::BitCast(du8, hn::ShiftRight<4>(x)), low)));
      const auto put = [&](int r, auto code) HWY_ATTR {
        float* to = out + static_cast<int64_t>(r) * plane.lanes + lane;
        const VF c = hn::ConvertTo(df, code);
        if constexpr (kStart == Start::zero) {
          hn::StoreU(hn::Mul(c, scale), df, to);
        } else if constexpr (kStart == Start::rows) {
          hn::StoreU(hn::MulAdd(c, scale, hn::Set(df, start[r])), df, to);
        } else {
          hn::StoreU(hn::MulAdd(c, scale, hn::LoadU(df, to)), df, to);
        }
      };
      put(r0 + 0, hn::ShiftRight<24>(hn::ShiftLeft<24>(first)));
      put(r0 + 1, hn::ShiftRight<24>(hn::ShiftLeft<16>(first)));
      put(r0 + 2, hn::ShiftRight<24>(hn::ShiftLeft<8>(first)));
      put(r0 + 3, hn::ShiftRight<24>(first));
      put(r0 + 4, hn::ShiftRight<24>(hn::ShiftLeft<24>(second)));
      put(r0 + 5, hn::ShiftRight<24>(hn::ShiftLeft<16>(second)));
      put(r0 + 6, hn::ShiftRight<24>(hn::ShiftLeft<8>(second)));
      put(r0 + 7, hn::ShiftRight<24>(second));
    }
  }
}

inline VF load_high(DType type, const uint16_t* from) {
  const DF df;
  if (type == DType::bf16) {
    const hn::Rebind<uint16_t, DF> du16;
    return hn::BitCast(df, hn::ShiftLeft<16>(hn::PromoteTo(DU(), hn::LoadU(du16, from))));
  }
  const hn::Rebind<hwy::float16_t, DF> df16;
  return hn::PromoteTo(df, hn::LoadU(df16, reinterpret_cast<const hwy::float16_t*>(from)));
}

// n 16-bit values to float; n is a multiple of 16.
inline void decode_high(DType type, const uint16_t* from, int64_t n, float* to) {
  const DF df;
  for (int64_t i = 0; i < n; i += static_cast<int64_t>(hn::Lanes(df)))
    hn::StoreU(load_high(type, from + i), df, to + i);
}

// --- products

// Memory that is needed next, brought into L2 while a product works: into L1 would take the places of its own misses.
struct Ahead {
  const uint8_t* at = nullptr;
  int64_t bytes = 0;
  const uint8_t* also = nullptr;  // for a product of codes: as many bytes from here on as it reads, besides
  HWY_INLINE void touch(int64_t offset) const {
    if (offset < bytes) __builtin_prefetch(at + offset, 0, 2);
  }
  HWY_INLINE void touch_all() const {
    for (int64_t offset = 0; offset < bytes; offset += 64) touch(offset);
  }
};

// What the right-hand side of a product is made of, and how a word of the left one, told to all lanes, meets it.
struct Floats {
  using T = float;
  static constexpr int kDepths = 1;  // of a word
  static HWY_INLINE VF load(const T* from) { return hn::LoadU(DF(), from); }
  static HWY_INLINE VF multiply_add(VF x, VF row, VF sum) { return hn::MulAdd(x, row, sum); }
};
template <DType kType>
struct High : Floats {
  using T = uint16_t;
  static HWY_INLINE VF load(const T* from) { return load_high(kType, from); }
};

#if HWY_TARGET == HWY_AVX3_DL
// Both sides are pairs of BF16, of two consecutive depths, in the place of a float: half as many depths of words.
// Highway 1.0.3 has no target with AVX512-BF16; only what has_avx512_bf16() allows may call this.
struct Pairs : Floats {
  static constexpr int kDepths = 2;
  static HWY_INLINE VF multiply_add(VF x, VF row, VF sum) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum.raw) : "v"(x.raw), "v"(row.raw));
    return sum;
  }
  // The lanes of `low`, then those of `high`, rounded to nearest, ties to even.
  static HWY_INLINE VF round(VF low, VF high) {
    VF both;
    asm("vcvtne2ps2bf16 %1, %2, %0" : "=v"(both.raw) : "v"(low.raw), "v"(high.raw));
    return both;
  }
  // Each lane of `first` beside that of `second`.
  static HWY_INLINE VF round_lanes(VF first, VF second) {
    HWY_ALIGN static constexpr uint16_t kOrder[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i both = _mm512_castps_si512(round(first, second).raw);
    return VF{_mm512_castsi512_ps(_mm512_permutexvar_epi16(_mm512_load_si512(kOrder), both))};
  }
};
#endif

// c[R, NV * lanes] (+)= a[R, depth] b[depth, NV * lanes], all of c in registers.
template <class B, int R, int NV>
HWY_INLINE void multiply_registers(int64_t depth, const float* HWY_RESTRICT a, int64_t a_stride,
                                   const typename B::T* HWY_RESTRICT b, int64_t b_stride, float* HWY_RESTRICT c,
                                   int64_t c_stride, bool accumulate, const Ahead& ahead, int64_t ahead_at) {
  const DF df;
  const int64_t n = static_cast<int64_t>(hn::Lanes(df));
  VF sum[R][NV];
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < NV; ++j) sum[r][j] = accumulate ? hn::LoadU(df, c + r * c_stride + j * n) : hn::Zero(df);
  for (int64_t k = 0; k < depth; ++k) {
    VF row[NV];
    for (int j = 0; j < NV; ++j) row[j] = B::load(b + k * b_stride + j * n);
    if (ahead.bytes > 0) {
      const int64_t at = ahead_at + k * b_stride * static_cast<int64_t>(sizeof(typename B::T));
      for (int64_t e = 0; e < NV * n * static_cast<int64_t>(sizeof(typename B::T)); e += 64) ahead.touch(at + e);
    }
    for (int r = 0; r < R; ++r) {
      const VF x = hn::Set(df, a[r * a_stride + k]);
      for (int j = 0; j < NV; ++j) sum[r][j] = B::multiply_add(x, row[j], sum[r][j]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < NV; ++j) hn::StoreU(sum[r][j], df, c + r * c_stride + j * n);
}

// The same for any number of rows.
template <class B, int NV>
void multiply_columns(int64_t rows, int64_t depth, const float* a, int64_t a_stride, const typename B::T* b,
                      int64_t b_stride, float* c, int64_t c_stride, bool accumulate, Ahead ahead, int64_t ahead_at) {
  constexpr int kRows = 6;
  int64_t r = 0;
  for (; r + kRows <= rows; r += kRows) {
    multiply_registers<B, kRows, NV>(depth, a + r * a_stride, a_stride, b, b_stride, c + r * c_stride, c_stride,
                                     accumulate, ahead, ahead_at);
    ahead = {};
  }
  a += r * a_stride;
  c += r * c_stride;
  const auto rest = [&]<int R>() {
    multiply_registers<B, R, NV>(depth, a, a_stride, b, b_stride, c, c_stride, accumulate, ahead, ahead_at);
  };
  switch (rows - r) {
    case 5:
      return rest.template operator()<5>();
    case 4:
      return rest.template operator()<4>();
    case 3:
      return rest.template operator()<3>();
    case 2:
      return rest.template operator()<2>();
    case 1:
      return rest.template operator()<1>();
    default:
      return;
  }
}

// c[rows, columns] (+)= a[rows, depth] b[depth, columns], depth in words; columns is a multiple of 16. `ahead` is as
// large as b.
template <class B = Floats>
void multiply(int64_t rows, int64_t depth, int64_t columns, const float* a, int64_t a_stride, const typename B::T* b,
              int64_t b_stride, float* c, int64_t c_stride, bool accumulate, const Ahead& ahead = {}) {
  // 6 x 4 accumulators, 4 rows of b and a broadcast fit 32 registers; 6 x 2 fit 16.
  constexpr int kVectors = HWY_MAX_BYTES >= 64 ? 4 : 2;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(DF())), step = kVectors * lanes;
  const auto at = [](int64_t column) { return column * static_cast<int64_t>(sizeof(typename B::T)); };
  int64_t j = 0;
  for (; j + step <= columns; j += step)
    multiply_columns<B, kVectors>(rows, depth, a, a_stride, b + j, b_stride, c + j, c_stride, accumulate, ahead, at(j));
  for (; j < columns; j += lanes)
    multiply_columns<B, 1>(rows, depth, a, a_stride, b + j, b_stride, c + j, c_stride, accumulate, ahead, at(j));
}

// out[i] = all lanes of v[i] together, for four registers: fewer steps than one by one.
template <class Op>
HWY_INLINE void reduce_four(const VF* v, const Op& op, float* out) {
  const DF df;
  const hn::Repartition<double, DF> d64;
  const hn::CappedTag<float, 4> block;
  const auto halves = [&](VF a, VF b) HWY_ATTR {
    return hn::BitCast(d64, op(hn::InterleaveLower(df, a, b), hn::InterleaveUpper(df, a, b)));
  };
  const auto first = halves(v[0], v[1]), second = halves(v[2], v[3]);
  const VF blocks = op(hn::BitCast(df, hn::InterleaveLower(d64, first, second)),
                       hn::BitCast(df, hn::InterleaveUpper(d64, first, second)));
  HWY_ALIGN float all[16];
  hn::Store(blocks, df, all);
  auto one = hn::Load(block, all);
  for (size_t i = 4; i < hn::Lanes(df); i += 4) one = op(one, hn::Load(block, all + i));
  hn::StoreU(one, block, out);
}

struct Larger {
  template <class V>
  HWY_INLINE V operator()(V a, V b) const {
    return hn::Max(a, b);
  }
};
struct Sum {
  template <class V>
  HWY_INLINE V operator()(V a, V b) const {
    return hn::Add(a, b);
  }
};

// out[k][r] = q[r] . x[k] for up to four rows of q [rows, d]; all four of each out are written. Two x have twice as
// many sums under way, which wait for one another half as long.
template <int K>
HWY_INLINE void dot_four(const float* q, int rows, DType type, const uint16_t* const (&x)[K], int d,
                         float* const (&out)[K]) {
  const DF df;
  VF sum[K][4];
  for (int k = 0; k < K; ++k)
    for (int r = 0; r < 4; ++r) sum[k][r] = hn::Zero(df);
  const float* row[4];
  for (int r = 0; r < 4; ++r) row[r] = q + static_cast<int64_t>(std::min(r, rows - 1)) * d;  // one too many twice
  for (int c = 0; c < d; c += static_cast<int>(hn::Lanes(df))) {
    VF v[K];
    for (int k = 0; k < K; ++k) v[k] = load_high(type, x[k] + c);
    for (int r = 0; r < 4; ++r) {
      const VF w = hn::LoadU(df, row[r] + c);
      for (int k = 0; k < K; ++k) sum[k][r] = hn::MulAdd(v[k], w, sum[k][r]);
    }
  }
  for (int k = 0; k < K; ++k) reduce_four(sum[k], Sum(), out[k]);
}

// --- exponential

// 2^x for x <= 0, or 2^-125 where x is less than that, -inf too. A polynomial of degree 5 in the fraction, fitted for
// the smallest largest relative error on [-1/2, 1/2], 9.2e-8, with what rounding adds below 2e-7; the integer part goes
// into the exponent field: x + 1.5 * 2^23 has it in its lowest bits.
HWY_INLINE VF exp2_clamped(VF x) {
  const DF df;
  const DI di;
  const VF rounder = hn::Set(df, 0x1.8p23f);
  x = hn::Max(x, hn::Set(df, -125.0f));
  const VF shifted = hn::Add(x, rounder);
  const VF f = hn::Sub(x, hn::Sub(shifted, rounder));
  VF y = hn::Set(df, 0.001326468010889234f);
  y = hn::MulAdd(y, f, hn::Set(df, 0.009671503042595168f));
  y = hn::MulAdd(y, f, hn::Set(df, 0.05550733769309249f));
  y = hn::MulAdd(y, f, hn::Set(df, 0.24022242235903118f));
  y = hn::MulAdd(y, f, hn::Set(df, 0.6931469776543427f));
  y = hn::MulAdd(y, f, hn::Set(df, 1.0f));
  return hn::BitCast(df, hn::Add(hn::BitCast(di, y), hn::ShiftLeft<23>(hn::BitCast(di, shifted))));
}

// The same, but 0 below 2^-125.
HWY_INLINE VF exp2_negative(VF x) {
  const DF df;
  return hn::IfThenElseZero(hn::Ge(x, hn::Set(df, -125.0f)), exp2_clamped(x));
}

}  // namespace HWY_NAMESPACE
}  // namespace thriftattn::cpu
HWY_AFTER_NAMESPACE();

#endif  // THRIFTATTN_CPU_TILE_INL_H_
