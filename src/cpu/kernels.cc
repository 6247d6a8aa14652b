// Attention of some rows over some pages, portable SIMD; one body for prefill, decode and verify steps.
//
//   page records --decode--> K tile [d, 64], V tile [64, d_v] (float, L2)
//   q --multiply by K tile--> scores [rows, 64] --mask, scale, exp2--> p --multiply by V tile--> o [rows, d_v]
//
// A page is decoded once per tier for all rows of the task: the query heads of one KV head read it together. Scores and
// p never leave L1. With 64 rows per head the two products take 2 x 64 x 64 x 128 multiply-adds, about four fifths of
// the time, and bind on FMA throughput; decoding an FP4 page takes about 6 instructions per register, a tenth. With few
// rows (decode) the decoding binds.
//
// Arithmetic kv4: everything in FP32 on exactly decoded K and V; or, where products take pairs of BF16 (target
// AVX3_BF16), q, K, V and p rounded once each, two depths in the place of one float, an FP4 page's mean apart. mma4: q
// and p are quantised as well and decoded again, so that the products are those of FP4 tensor cores up to the order of
// summation; q.k_mean stays unquantised.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/kernels.cc"
#include <hwy/foreach_target.h>  // NOLINT: must come before highway.h

#include <hwy/highway.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/block.h"
#include "cpu/kernels.h"
#include "cpu/scores-inl.h"
#include "cpu/tile-inl.h"

HWY_BEFORE_NAMESPACE();
namespace thriftattn::cpu {
namespace HWY_NAMESPACE {

// An FP4 page's mean is kept out of the tile where it meets another q than the codes do: in mma4 the unquantised one,
// in BF16 the one that is not rounded, and the codes alone are exact there.
template <class B>
bool mean_apart(const BlockTask& t, Tier tier) {
  if (B::kDepths == 2) return t.centring && tier != Tier::fp16;
  return t.mma4 && t.centring && tier == Tier::fp4;
}

// A decoded tile [depth, lanes] as a product by B takes it, in place.
template <class B>
void pack_tile(int64_t depth, int64_t lanes, float* tile) {
  if constexpr (B::kDepths == 2) {
    const DF df;
    float* to = tile;
    for (const float* row = tile; row < tile + depth * lanes; row += 2 * lanes)
      for (int64_t i = 0; i < lanes; i += static_cast<int64_t>(hn::Lanes(df)), to += hn::Lanes(df))
        hn::StoreU(B::round_lanes(hn::LoadU(df, row + i), hn::LoadU(df, row + lanes + i)), df, to);
  }
}

template <class B>
void decode_k(const BlockTask& t, const PageRef& page, Tier tier, float* tile) {
  const PageLayout& l = *t.layout;
  if (tier == Tier::fp16) return decode_high(t.high_dtype, page.high, int64_t{kPageTokens} * l.d, tile);
  const PageSummary facts = summary_of(page);
  if (t.centring && !mean_apart<B>(t, tier)) {
    HWY_ALIGN float mean[kMaxChannels];
    decode_high(t.high_dtype, mean_of(t, page), l.d, mean);
    decode_plane<Start::rows>(l.k, t.format, l.d, facts.k_exponent[0], page.fp4 + l.k_codes, page.fp4 + l.k_scales,
                              mean, tile);
  } else {
    decode_plane<Start::zero>(l.k, t.format, l.d, facts.k_exponent[0], page.fp4 + l.k_codes, page.fp4 + l.k_scales,
                              nullptr, tile);
  }
  if (tier == Tier::fp4x2)
    decode_plane<Start::sum>(l.k, t.format, l.d, facts.k_exponent[1], page.residual + l.k_codes,
                             page.residual + l.k_scales, nullptr, tile);
}

// Rows of tokens that do not exist are zero: what a record holds there may be anything, and 0 * NaN is NaN.
void decode_v(const BlockTask& t, const PageRef& page, Tier tier, int64_t tokens, float* tile) {
  const PageLayout& l = *t.layout;
  if (tier == Tier::fp16) {
    decode_high(t.high_dtype, page.high + l.high_v, tokens * l.d_v, tile);
    std::fill(tile + tokens * l.d_v, tile + int64_t{kPageTokens} * l.d_v, 0.0f);
    return;
  }
  const PageSummary facts = summary_of(page);
  decode_plane<Start::zero>(l.v, t.format, kPageTokens, facts.v_exponent[0], page.fp4 + l.v_codes,
                            page.fp4 + l.v_scales, nullptr, tile);
  if (tier == Tier::fp4x2)
    decode_plane<Start::sum>(l.v, t.format, kPageTokens, facts.v_exponent[1], page.residual + l.v_codes,
                             page.residual + l.v_scales, nullptr, tile);
}

// The left operand of scores [heads * rows, d / kDepths]: q itself, or made of it in `memory`.
template <class B>
const float* pack_q(const BlockTask& t, [[maybe_unused]] char* memory) {
  if constexpr (B::kDepths == 2) {
    const DF df;
    const int64_t n = static_cast<int64_t>(hn::Lanes(df)), d = t.layout->d;
    auto* pairs = reinterpret_cast<float*>(memory);
    for (int64_t r = 0; r < int64_t{t.heads} * t.rows; ++r) {
      const float* q = t.q + r * d;
      for (int64_t c = 0; c < d; c += 2 * n) {
        const bool whole = c + n < d;  // d is a multiple of 16
        const VF both = B::round(hn::LoadU(df, q + c), whole ? hn::LoadU(df, q + c + n) : hn::Zero(df));
        hn::BlendedStore(both, hn::FirstN(df, static_cast<size_t>(whole ? n : n / 2)), df, pairs + (r * d + c) / 2);
      }
    }
    return pairs;
  }
  return t.q;
}

// s[rows, 64] = scaled, masked log2 scores of rows [first, first + rows) against page p; q as pack_q gives it.
template <class B>
void score_tile(const BlockTask& t, int64_t p, Tier tier, const float* q, const float* tile, int first, float* s) {
  const DF df;
  const int64_t n = static_cast<int64_t>(hn::Lanes(df));
  const int d = t.layout->d;
  const bool apart = mean_apart<B>(t, tier);
  for (int r = 0; r < t.rows && apart; r += 4) {
    float start[4];
    const int some = std::min(4, t.rows - r);
    dot_four<1>(t.q + static_cast<int64_t>(first + r) * d, some, t.high_dtype, {mean_of(t, t.pages[p])}, d, {start});
    for (int e = 0; e < some; ++e)
      for (int64_t i = 0; i < kPageTokens; i += n) hn::StoreU(hn::Set(df, start[e]), df, s + (r + e) * kPageTokens + i);
  }
  if (t.mma4 && tier == Tier::fp4) q = t.q4;
  const int words = d / B::kDepths;
  multiply<B>(t.rows, words, kPageTokens, q + static_cast<int64_t>(first) * words, words, tile, kPageTokens, s,
              kPageTokens, apart);
  finish_scores(t, p, 0, t.rows, s);
}

// exponentiate() of a row that a product by B takes next: p in the first words, and the sum of what they hold.
template <class B>
float exponentiate_for(float* row, float m) {
  if constexpr (B::kDepths == 2) {
    const DF df;
    const int64_t n = static_cast<int64_t>(hn::Lanes(df));
    const VF vm = hn::Set(df, m), ones = B::round(hn::Set(df, 1.0f), hn::Set(df, 1.0f));
    VF sum = hn::Zero(df);
    for (int64_t i = 0; i < kPageTokens; i += 2 * n) {
      const VF both = B::round(exp2_negative(hn::Sub(hn::LoadU(df, row + i), vm)),
                               exp2_negative(hn::Sub(hn::LoadU(df, row + i + n), vm)));
      hn::StoreU(both, df, row + i / 2);
      sum = B::multiply_add(both, ones, sum);
    }
    return hn::GetLane(hn::SumOfLanes(df, sum));
  }
  return exponentiate(row, m);
}

// One step of online softmax for rows [first, first + rows): scores s become p, the state moves on.
template <class B>
void softmax_tile(const BlockTask& t, int64_t p, Tier tier, int first, float* s) {
  const DF df;
  const int64_t n = static_cast<int64_t>(hn::Lanes(df));
  const int d_v = t.layout->d_v;
  const SoftmaxState& state = t.state;
  for (int r = 0; r < t.rows; ++r) {
    const int64_t row = first + r;
    float* x = s + r * kPageTokens;
    const float old_m = state.m[row], m = std::max(old_m, row_max(x));
    if (m == kMinusInf) {  // nothing seen yet, and nothing here
      std::fill(x, x + kPageTokens, 0.0f);
      if (t.page_m) t.page_m[row * t.page_stride + p] = kMinusInf;
      continue;
    }
    if (m > old_m && old_m != kMinusInf) {
      const float shrink = std::exp2(old_m - m);
      const VF v = hn::Set(df, shrink);
      float* o = state.o + row * d_v;
      for (int64_t i = 0; i < d_v; i += n) hn::StoreU(hn::Mul(hn::LoadU(df, o + i), v), df, o + i);
      state.l[row] *= shrink;
      state.l_high[row] *= shrink;
    }
    state.m[row] = m;
    const float sum = exponentiate_for<B>(x, m);
    state.l[row] += sum;
    if (tier > Tier::fp4) state.l_high[row] += sum;
    if (t.page_m) {
      t.page_m[row * t.page_stride + p] = m;
      t.page_l[row * t.page_stride + p] = sum;
    }
  }
}

// x rounded to the nearest E2M1 value, ties to the even code; x >= 0.
HWY_INLINE VF round_e2m1(VF x) {
  const DF df;
  const VF step = hn::IfThenElse(hn::Lt(x, hn::Set(df, 2.0f)), hn::Set(df, 0.5f),
                                 hn::IfThenElse(hn::Lt(x, hn::Set(df, 4.0f)), hn::Set(df, 1.0f), hn::Set(df, 2.0f)));
  return hn::Min(hn::Mul(hn::Round(hn::Div(x, step)), step), hn::Set(df, 6.0f));
}

// p4 = dec(enc(p)) of t.rows rows of one page, in two levels: the row's maximum on the page is scaled to the largest
// value that the format reaches, then each group of tokens has its scale. `constant` has one scale for all, as the
// author's.
void quantize_p(const BlockTask& t, const float* p, float* p4) {
  const DF df;
  const int64_t n = static_cast<int64_t>(hn::Lanes(df));
  const bool nvfp4 = t.method->format == Fp4Format::nvfp4;
  const int group = block_size(t.method->format);
  const bool constant = t.method->p_quant == PQuant::constant;
  const float target = nvfp4 ? kE4m3Max * kE2m1Max : kE2m1Max;
  const float constant_scale = e4m3_decode(e4m3_encode(1.0f / 6.0f));
  for (int r = 0; r < t.rows; ++r) {
    const float* x = p + r * kPageTokens;
    float* y = p4 + r * kPageTokens;
    const float top = row_max(x);
    if (!(top > 1e-30f)) {  // below what FP32 can add to a row sum of at least 1, and its reciprocal would overflow
      std::fill(y, y + kPageTokens, 0.0f);
      continue;
    }
    const float up = constant ? 1.0f : target / top, down = constant ? 1.0f : top / target;
    for (int g = 0; g < kPageTokens; g += group) {
      VF largest = hn::Zero(df);
      for (int64_t i = g; i < g + group; i += n) largest = hn::Max(largest, hn::LoadU(df, x + i));
      const float amax = hn::GetLane(hn::MaxOfLanes(df, largest)) * up;
      float scale = constant ? constant_scale : 0.0f;
      if (!constant && amax > 0)
        scale = nvfp4 ? e4m3_decode(e4m3_encode(amax / kE2m1Max))
                      : e8m0_decode(e8m0_encode_exponent(static_cast<int>(bits_of(amax) >> 23) - 127 - 2));
      const VF factor = hn::Set(df, scale > 0 ? up / scale : 0.0f), back = hn::Set(df, scale * down);
      for (int64_t i = g; i < g + group; i += n)
        hn::StoreU(hn::Mul(round_e2m1(hn::Mul(hn::LoadU(df, x + i), factor)), back), df, y + i);
    }
  }
}

template <class B>
void attend(const BlockTask& t, Tiles& tiles) {
  const float* q = pack_q<B>(t, tiles.matrix);
  TierCursor cursors[kMaxHeadsPerTask];
  for (int h = 0; h < t.heads; ++h) cursors[h].promoted = t.promoted[h];
  const int d_v = t.layout->d_v;
  for (int64_t p = t.first_page; p < t.end_page; ++p) {
    Tier tier[kMaxHeadsPerTask];
    bool wanted[4];
    page_tiers(t, p, cursors, tier, wanted);
    for (int h = 0; h < t.heads && t.page_m; ++h) {  // a page that is skipped has no mass
      if (tier[h] != Tier::none) continue;
      for (int r = h * t.rows; r < (h + 1) * t.rows; ++r) t.page_m[r * t.page_stride + p] = kMinusInf;
    }
    for (const Tier form : {Tier::fp4, Tier::fp4x2, Tier::fp16}) {
      const int f = static_cast<int>(form);
      if (!wanted[f]) continue;
      decode_k<B>(t, t.pages[p], form, tiles.k[f]);
      decode_v(t, t.pages[p], form, std::min<int64_t>(kPageTokens, t.s_kv - p * kPageTokens), tiles.v[f]);
      pack_tile<B>(t.layout->d, kPageTokens, tiles.k[f]);
      pack_tile<B>(kPageTokens, d_v, tiles.v[f]);
      for (int h = 0; h < t.heads; ++h) {
        if (tier[h] != form) continue;
        const int first = h * t.rows;
        score_tile<B>(t, p, form, q, tiles.k[f], first, tiles.p);
        softmax_tile<B>(t, p, form, first, tiles.p);
        const float* probabilities = tiles.p;
        if (t.mma4 && form == Tier::fp4) {
          quantize_p(t, tiles.p, tiles.p4);
          probabilities = tiles.p4;
        }
        multiply<B>(t.rows, kPageTokens / B::kDepths, d_v, probabilities, kPageTokens, tiles.v[f], d_v,
                    t.state.o + static_cast<int64_t>(first) * d_v, d_v, true);
      }
    }
  }
}

void score(const BlockTask& t, Tiles& tiles) {
  TierCursor cursors[kMaxHeadsPerTask];
  for (int h = 0; h < t.heads; ++h) cursors[h].promoted = t.promoted[h];
  for (int64_t p = t.first_page; p < t.end_page; ++p) {
    Tier tier[kMaxHeadsPerTask];
    bool wanted[4];
    page_tiers(t, p, cursors, tier, wanted);
    for (const Tier form : {Tier::fp4, Tier::fp4x2, Tier::fp16}) {
      const int f = static_cast<int>(form);
      if (!wanted[f]) continue;
      decode_k<Floats>(t, t.pages[p], form, tiles.k[f]);
      for (int h = 0; h < t.heads; ++h) {
        if (tier[h] != form) continue;
        const int first = h * t.rows;
        score_tile<Floats>(t, p, form, t.q, tiles.k[f], first, tiles.p);
        for (int r = 0; r < t.rows; ++r) {
          float* x = tiles.p + r * kPageTokens;
          const int64_t at = (first + r) * t.page_stride + p;
          t.page_m[at] = row_max(x);
          if (t.page_m[at] != kMinusInf) t.page_l[at] = exponentiate(x, t.page_m[at]);
        }
      }
    }
  }
}

// What `quest` and `second_moment` make of one mean row and a page, before sm_scale; q_dot_mean is known for the
// latter.
float quest_score(const PageLayout& layout, DType type, const float* q, const uint8_t* summary) {
  const DF df;
  const auto* low = reinterpret_cast<const uint16_t*>(summary + layout.min);
  const auto* high = reinterpret_cast<const uint16_t*>(summary + layout.max);
  VF sum = hn::Zero(df);
  for (int c = 0; c < layout.d; c += static_cast<int>(hn::Lanes(df))) {
    const VF x = hn::LoadU(df, q + c);
    sum = hn::Add(sum, hn::Max(hn::Mul(x, load_high(type, low + c)), hn::Mul(x, load_high(type, high + c))));
  }
  return hn::GetLane(hn::SumOfLanes(df, sum));
}
float moment_score(const PageLayout& layout, const float* q, const uint8_t* summary, float sm_scale, float q_dot_mean) {
  const DF df;
  const auto* variance = reinterpret_cast<const float*>(summary + layout.variance);
  VF sum = hn::Zero(df);
  for (int c = 0; c < layout.d; c += static_cast<int>(hn::Lanes(df))) {
    const VF x = hn::LoadU(df, q + c);
    sum = hn::MulAdd(hn::Mul(x, x), hn::LoadU(df, variance + c), sum);
  }
  return q_dot_mean + 0.5f * sm_scale * hn::GetLane(hn::SumOfLanes(df, sum));
}

void rank(Policy policy, const PageLayout& layout, DType high_dtype, float sm_scale, std::span<const RankTask> tasks,
          int64_t first, int64_t end) {
  constexpr int64_t kAhead = 8, kAheadOfThat = 32;     // pages
  constexpr int kPages = HWY_MAX_BYTES >= 64 ? 4 : 2;  // read at once: one loading of q serves them
  const hn::CappedTag<float, 4> four;
  const auto scale = hn::Set(four, sm_scale);
  // Summaries that are wanted next are asked for in the order in which they lie in memory; where they lie, before that.
  int64_t next = first + kAhead, of = 0;
  const auto ask = [&] {
    if (next >= end) return;
    const PageRef* page = tasks[of].pages + next;
    __builtin_prefetch(page + kAheadOfThat, 0, 3);
    Ahead{page->summary, layout.summary_bytes}.touch_all();
    if (++of == std::ssize(tasks)) of = 0, ++next;
  };
  for (int64_t p0 = first; p0 < end; p0 += kPages) {
    const int some_pages = static_cast<int>(std::min<int64_t>(kPages, end - p0));
    for (const RankTask& t : tasks) {
      for (int k = 0; k < kPages; ++k) ask();
      const uint8_t* summary[kPages];
      const uint16_t* mean[kPages];
      float best[kPages];
      for (int k = 0; k < kPages; ++k) {
        summary[k] = t.pages[p0 + std::min(k, some_pages - 1)].summary;
        mean[k] = reinterpret_cast<const uint16_t*>(summary[k] + layout.mean);
        best[k] = kMinusInf;
      }
      for (int h0 = 0; h0 < t.heads; h0 += 4) {
        const float* q = t.q_mean + static_cast<int64_t>(h0) * layout.d;
        const int some = std::min(4, t.heads - h0);
        HWY_ALIGN float of_head[kPages][4];
        float* to[kPages];
        for (int k = 0; k < kPages; ++k) to[k] = of_head[k];
        if (policy != Policy::quest) dot_four(q, some, high_dtype, mean, layout.d, to);
        for (int k = 0; k < some_pages; ++k) {
          if (policy != Policy::quest) {
            const auto x = hn::Load(four, of_head[k]);
            if (t.products) hn::StoreU(x, four, t.products + (p0 + k) * round_up(t.heads, 4) + h0);
            if (policy == Policy::block_mean) {  // a head that is missing stands there as the last one
              best[k] = std::max(best[k], hn::GetLane(hn::MaxOfLanes(four, hn::Mul(x, scale))));
              continue;
            }
          }
          for (int h = 0; h < some; ++h) {
            const float* row = q + static_cast<int64_t>(h) * layout.d;
            const float x = policy == Policy::quest ? quest_score(layout, high_dtype, row, summary[k])
                                                    : moment_score(layout, row, summary[k], sm_scale, of_head[k][h]);
            best[k] = std::max(best[k], sm_scale * x);
          }
        }
      }
      for (int k = 0; k < some_pages; ++k) t.score[p0 + k] = best[k];
    }
  }
}

// Bit by bit of the result: how many are as large as it would be with that bit. As integers, floats are in order once
// those with a sign have their other bits turned.
float kth_largest(const float* x, int64_t n, int64_t k, int32_t* scratch) {
  const DI di;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(di));
  const auto order = [](int32_t bits) { return bits ^ (bits >> 31 & 0x7fffffff); };
  for (int64_t i = 0; i < n; ++i) scratch[i] = order(static_cast<int32_t>(bits_of(x[i])));
  const auto as_large = [&](int32_t bound) HWY_ATTR {
    const auto below = hn::Set(di, bound - 1);
    auto count = hn::Zero(di);  // less one for each
    int64_t i = 0;
    for (; i + lanes <= n; i += lanes)
      count = hn::Add(count, hn::VecFromMask(di, hn::Gt(hn::LoadU(di, scratch + i), below)));
    int64_t found = -int64_t{hn::GetLane(hn::SumOfLanes(di, count))};
    for (; i < n; ++i) found += scratch[i] >= bound;
    return found;
  };
  int32_t found = as_large(0) >= k ? 0 : std::numeric_limits<int32_t>::min();
  for (int bit = 30; bit >= 0; --bit)
    if (const int32_t bound = found | int32_t{1} << bit; as_large(bound) >= k) found = bound;
  return float_of(static_cast<uint32_t>(order(found)));
}

void quantize_rows(const Method& method, int64_t rows, int d, const float* q, float* q4) {
  const int group = block_size(method.format);
  float block[kMaxBlockSize];
  uint8_t codes[kMaxBlockSize];
  for (int64_t r = 0; r < rows; ++r) {
    const float* x = q + r * d;
    float* y = q4 + r * d;
    float amax = 0;
    for (int c = 0; c < d; ++c) amax = std::max(amax, std::abs(x[c]));
    const int exponent = method.page_scale ? page_exponent(amax, method.format, method.scales) : 0;
    for (int c0 = 0; c0 < d; c0 += group) {
      const int n = std::min(group, d - c0);  // the last group of a d that is no multiple of 32 ends in zeros
      for (int i = 0; i < group; ++i) block[i] = i < n ? x[c0 + i] * pow2(exponent) : 0.0f;
      const float scale = decode_scale(method.format, encode_block(method.format, method.scales, block, codes));
      for (int i = 0; i < n; ++i) y[c0 + i] = e2m1_decode(codes[i]) * scale * pow2(-exponent);
    }
  }
}

const Kernels* table() {
#if HWY_TARGET == HWY_AVX3_DL
  constexpr auto attend_bf16 = &attend<Pairs>;
#else
  constexpr void (*attend_bf16)(const BlockTask&, Tiles&) = nullptr;
#endif
  static constexpr Kernels kTable = {"", attend<Floats>, attend_bf16, score, rank, kth_largest, quantize_rows, {}};
  return &kTable;
}

}  // namespace HWY_NAMESPACE
}  // namespace thriftattn::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
#include "cpu/amx.h"
#include "cpu/backend.h"
#include "cpu/targets.h"

namespace thriftattn::cpu {
namespace {

HWY_EXPORT(table);

struct AllKernels {
  std::vector<Kernels> listed;  // best first
  std::vector<Kernels> forced;  // for tests
};

// BF16 products serve `attend`; all else is what the best registers do.
const AllKernels& all_kernels() {
  static const AllKernels all = [] {
    auto tables = tables_of_targets<Kernels>([] { return HWY_DYNAMIC_DISPATCH(table)(); });
    for (size_t i = 0; i < tables.size(); ++i) tables[i].decode = all_decode_kernels()[i];
    AllKernels found{tables, {}};
    for (const Kernels& k : tables) {
      if (!k.attend_bf16 || !has_avx512_bf16()) continue;
      Kernels pairs = k;
      pairs.attend = k.attend_bf16;
      pairs.target = kBf16Pairs;
      if (has_fast_avx512_bf16()) {
        found.listed.insert(found.listed.begin(), pairs);
      } else {
        found.forced.push_back(pairs);
      }
    }
    Kernels amx = tables.front();
    amx.attend = attend_amx;
    amx.target = kAmx;
    if (has_amx()) found.listed.insert(found.listed.begin(), amx);
    amx.attend = attend_amx_emulated;
    amx.target = kAmxEmulated;
    if (has_avx512_bf16()) found.forced.push_back(amx);
    return found;
  }();
  return all;
}

}  // namespace

std::vector<std::string> targets() {
  std::vector<std::string> names;
  for (const Kernels& k : all_kernels().listed) names.emplace_back(k.target);
  return names;
}

std::vector<std::string> forced_targets() {
  std::vector<std::string> names;
  for (const Kernels& k : all_kernels().forced) names.emplace_back(k.target);
  return names;
}

const Kernels* kernels_for(const std::string& target) {
  for (const auto* kernels : {&all_kernels().listed, &all_kernels().forced})
    for (const Kernels& k : *kernels)
      if (target == k.target) return &k;
  return nullptr;
}

}  // namespace thriftattn::cpu
#endif  // HWY_ONCE
