// Attention of the few rows of a decode or verify step over a range of pages, for all KV heads of a sequence.
//
//   K codes --integer products with q in 16 bit--> scores [rows, 64], from q.k_mean on --mask, exp2--> e in [0, 1]
//   e, in 15 bits --integer products with V codes--> o [rows, d_v]
//
// An fp4x2 page runs the same loop over both planes; a 16-bit page is multiplied in FP32, its values converted as they
// are loaded. Pages come nearly in the order in which they lie in memory, that of all KV heads of a page before the
// next: a few pages of one head, whose state and q then stay in L1, and the same of the next head.
//
// What binds it: an FP4 page of d = 128 is 9216 bytes and, for four rows, about 4,400 vector instructions, of which
// 2048 are integer dot products. These take longer than the bytes, the more so where another thread shares the core;
// prefetching the next record while this one is multiplied is what lets them overlap. A 16-bit page is 32 KB and 10,000
// instructions: memory binds.
//
// A page is a softmax of its own, with its own maximum, that is merged into the row's state: what it adds does not
// depend on what was read before. So a page can be taken out of a state again, up to the rounding of p: that is how
// fp4_mass exchanges FP4 pages for promoted ones once their masses are known (docs/decisions/exchange.md).
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/decode.cc"
#include <hwy/foreach_target.h>  // NOLINT: must come before highway.h

#include <hwy/highway.h>

#include <algorithm>
#include <cmath>

#include "cpu/codes-inl.h"
#include "cpu/kernels.h"
#include "cpu/scores-inl.h"
#include "cpu/tile-inl.h"

HWY_BEFORE_NAMESPACE();
namespace thriftattn::cpu {
namespace HWY_NAMESPACE {

constexpr int kRows = kMaxProductRows;

const uint8_t* plane_of(const PageRef& page, int plane) { return plane == 0 ? page.fp4 : page.residual; }

// Where the parts of a page lie that is read next: of each plane, or of the 16-bit form in the place of the first.
struct Next {
  Ahead k[2], v[2], mean;
};

Next next_page(const BlockTask& t, int64_t p, Tier tier) {
  const PageRef& page = t.pages[p];
  const PageLayout& l = *t.layout;
  Next next;
  if (tier == Tier::none) return next;
  if (tier == Tier::fp16) {
    const auto* high = reinterpret_cast<const uint8_t*>(page.high);
    next.k[0] = {high, 2 * l.high_v};
    next.v[0] = {high + 2 * l.high_v, l.high_bytes - 2 * l.high_v};
    return next;
  }
  for (int plane = 0; plane < (tier == Tier::fp4x2 ? 2 : 1); ++plane) {
    const uint8_t* record = plane_of(page, plane);
    next.k[plane] = {record + l.k_codes, l.v_codes - l.k_codes};
    next.v[plane] = {record + l.v_codes, l.fp4_bytes - l.v_codes};
  }
  next.mean = {page.summary, l.summary_bytes};
  return next;
}

// start[r] = q[r] . mean, in FP32, for n rows; up to three more are written.
void mean_starts(const BlockTask& t, const uint16_t* mean, int first, int n, float* start) {
  for (int r0 = 0; r0 < n; r0 += 4)
    dot_four(t.q + static_cast<int64_t>(first + r0) * t.layout->d, std::min(4, n - r0), t.high_dtype, mean, t.layout->d,
             start + r0);
}

// s[n, 64] = products of rows [first, first + n) with one plane of a page's keys, plus start[n], or plus s where start
// is null.
void add_plane_scores(const BlockTask& t, const PageRef& page, int plane, int first, int n, const float* start,
                      const Ahead& ahead, float* s) {
  const PageLayout& l = *t.layout;
  const float unit = scale_unit(t.format) / kCodeUnit * pow2(-summary_of(page).k_exponent[plane]);
  float factor[kRows];
  for (int r = 0; r < kRows; ++r) factor[r] = t.q_unit[first + r] * unit;
  add_product(l.k, t.format, plane_of(page, plane) + l.k_codes, n, t.q16 + static_cast<int64_t>(first) * l.k.depth,
              factor, start, s, ahead);
}

// s[n, 64] = products of rows [first, first + n) with the first plane of a page's keys and with their mean.
void first_plane_scores(const BlockTask& t, const PageRef& page, int first, int n, const Next& next, float* s) {
  next.mean.touch_all();
  float start[kRows] = {};
  if (t.centring) mean_starts(t, mean_of(t, page), first, n, start);
  add_plane_scores(t, page, 0, first, n, start, next.k[0], s);
}

// s[n, 64] = products of rows [first, first + n) with the keys of page p.
void score_rows(const BlockTask& t, int64_t p, Tier tier, int first, int n, const Next& next, float* s) {
  const PageLayout& l = *t.layout;
  const PageRef& page = t.pages[p];
  if (tier == Tier::fp16) {
    const float* q = t.q + static_cast<int64_t>(first) * l.d;
    if (t.high_dtype == DType::f16) {
      multiply<High<DType::f16>>(n, l.d, kPageTokens, q, l.d, page.high, kPageTokens, s, kPageTokens, false, next.k[0]);
    } else {
      multiply<High<DType::bf16>>(n, l.d, kPageTokens, q, l.d, page.high, kPageTokens, s, kPageTokens, false,
                                  next.k[0]);
    }
    return;
  }
  first_plane_scores(t, page, first, n, next, s);
  if (tier == Tier::fp4x2) {
    add_plane_scores(t, page, 1, first, n, nullptr, next.k[1], s);
  } else {
    next.k[1].touch_all();
  }
}

// The softmax of one page for up to kRows rows: its maximum, and the sum of e = 2^(s - m).
struct PageSoftmax {
  HWY_ALIGN float m[16], l[16];
};

// The products s[n, 64] of page p become e.
void page_softmax(const BlockTask& t, int64_t p, int first, int n, float* s, PageSoftmax& page) {
  const DF df;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(df));
  VF scale = hn::Set(df, t.sm_scale * kLog2e);
  if (t.softcap > 0 || !sees_all(t, p)) {
    finish_scores(t, p, first, n, s);
    scale = hn::Set(df, 1.0f);
  }
  for (int i = 0; i < 16; i += static_cast<int>(lanes)) {
    hn::Store(hn::Set(df, kMinusInf), df, page.m + i);
    hn::Store(hn::Zero(df), df, page.l + i);
  }
  for (int r0 = 0; r0 < n; r0 += 4) {
    const int rows = std::min(4, n - r0);
    VF most[4], sum[4];
    for (int r = 0; r < 4; ++r) {
      const float* x = s + (r0 + std::min(r, rows - 1)) * kPageTokens;
      most[r] = hn::Mul(hn::LoadU(df, x), scale);
      for (int64_t i = lanes; i < kPageTokens; i += lanes)
        most[r] = hn::Max(most[r], hn::Mul(hn::LoadU(df, x + i), scale));
    }
    float m[4], l[4];
    reduce_four(most, Larger(), m);
    for (int r = 0; r < 4; ++r) sum[r] = hn::Zero(df);
    for (int r = 0; r < rows; ++r) {
      float* x = s + (r0 + r) * kPageTokens;
      const VF top = hn::Set(df, m[r] == kMinusInf ? 0.0f : m[r]);
      for (int64_t i = 0; i < kPageTokens; i += lanes) {
        const VF e = exp2_negative(hn::MulSub(hn::LoadU(df, x + i), scale, top));
        hn::StoreU(e, df, x + i);
        sum[r] = hn::Add(sum[r], e);
      }
    }
    reduce_four(sum, Sum(), l);
    for (int r = 0; r < rows; ++r) {
      page.m[r0 + r] = m[r];
      page.l[r0 + r] = l[r];
      if (!t.page_m) continue;
      t.page_m[(first + r0 + r) * t.page_stride + p] = m[r];
      t.page_l[(first + r0 + r) * t.page_stride + p] = l[r];
    }
  }
}

// Moves the state of rows [first, first + n) to a maximum that holds for the page too, and adds the page's sums `sign`
// times. weight[r] is what the page's e count there, and shrink[r] by what everything before was multiplied.
void merge_sums(const BlockTask& t, Tier tier, int first, int n, float sign, const PageSoftmax& page, float* weight,
                float* shrink) {
  const DF df;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(df));
  const SoftmaxState& state = t.state;
  const VF lowest = hn::Set(df, -1e30f);    // in the place of -inf, which less itself is no number
  for (int64_t i = 0; i < n; i += lanes) {  // the state has room for whole registers
    const int64_t at = first + i;
    const VF old = hn::LoadU(df, state.m + at), here = hn::Load(df, page.m + i), m = hn::Max(old, here);
    const VF top = hn::Max(m, lowest);
    const VF a = hn::AllTrue(df, hn::Ge(old, here)) ? hn::Set(df, 1.0f) : exp2_negative(hn::Sub(old, top));
    const VF b = hn::Mul(exp2_negative(hn::Sub(here, top)), hn::Set(df, sign));
    const VF sum = hn::Mul(b, hn::Load(df, page.l + i));
    hn::Store(a, df, shrink + i);
    hn::Store(b, df, weight + i);
    hn::StoreU(m, df, state.m + at);
    hn::StoreU(hn::MulAdd(hn::LoadU(df, state.l + at), a, sum), df, state.l + at);
    const VF high = hn::Mul(hn::LoadU(df, state.l_high + at), a);
    hn::StoreU(tier > Tier::fp4 ? hn::Add(high, sum) : high, df, state.l_high + at);
  }
  for (int r = 0; r < n; ++r) {
    if (shrink[r] == 1.0f) continue;
    const VF v = hn::Set(df, shrink[r]);
    float* o = state.o + static_cast<int64_t>(first + r) * t.layout->d_v;
    for (int64_t c = 0; c < t.layout->d_v; c += lanes) hn::StoreU(hn::Mul(hn::LoadU(df, o + c), v), df, o + c);
  }
}

// o[rows] += weight * e V of one plane of a page; |e| <= 1.
void add_plane_values(const BlockTask& t, const PageRef& page, int plane, int first, int n, const float* e,
                      const float* weight, const Ahead& ahead) {
  const PageLayout& l = *t.layout;
  const float unit = scale_unit(t.format) / kCodeUnit / 32767.0f * pow2(-summary_of(page).v_exponent[plane]);
  HWY_ALIGN int16_t words[kRows * kPageTokens];
  float factor[kRows];
  for (int r = 0; r < padded_rows(n); ++r) factor[r] = r < n ? weight[r] * unit : 0.0f;
  for (int r = 0; r < n; r += kPairRows)
    pack_rows(e + r * kPageTokens, std::min(n - r, kPairRows), words + r * kPageTokens);
  add_product(l.v, t.format, plane_of(page, plane) + l.v_codes, n, words, factor, nullptr,
              t.state.o + static_cast<int64_t>(first) * l.d_v, ahead);
}

// o[rows] += weight * e V of page p.
void add_values(const BlockTask& t, int64_t p, Tier tier, int first, int n, float* e, float* weight, const Next& next) {
  const PageLayout& l = *t.layout;
  const PageRef& page = t.pages[p];
  float* o = t.state.o + static_cast<int64_t>(first) * l.d_v;
  if (tier == Tier::fp16) {
    const int64_t tokens = std::min<int64_t>(kPageTokens, t.s_kv - p * kPageTokens);  // what follows may be NaN
    for (int r = 0; r < n; ++r)
      for (int i = 0; i < kPageTokens; ++i) e[r * kPageTokens + i] *= weight[r];
    const uint16_t* v = page.high + l.high_v;
    if (t.high_dtype == DType::f16) {
      multiply<High<DType::f16>>(n, tokens, l.d_v, e, kPageTokens, v, l.d_v, o, l.d_v, true, next.v[0]);
    } else {
      multiply<High<DType::bf16>>(n, tokens, l.d_v, e, kPageTokens, v, l.d_v, o, l.d_v, true, next.v[0]);
    }
    return;
  }
  add_plane_values(t, page, 0, first, n, e, weight, next.v[0]);
  if (tier == Tier::fp4x2) {
    add_plane_values(t, page, 1, first, n, e, weight, next.v[1]);
  } else {
    next.v[1].touch_all();
  }
}

// Adds page p, read in `tier`, to the state of all rows.
void attend_page(const BlockTask& t, int64_t p, Tier tier, const Next& next) {
  HWY_ALIGN float s[kRows * kPageTokens];
  HWY_ALIGN float weight[16], shrink[16];
  PageSoftmax page;
  for (int first = 0; first < t.rows; first += kRows) {
    const int n = std::min(kRows, t.rows - first);
    score_rows(t, p, tier, first, n, next, s);
    page_softmax(t, p, first, n, s, page);
    merge_sums(t, tier, first, n, 1.0f, page, weight, shrink);
    add_values(t, p, tier, first, n, s, weight, next);
  }
}

// Takes page p out of the state as it was read in fp4, and adds it in `tier`. `next`: the planes that follow;
// `next_high`: the 16-bit form.
void exchange_page(const BlockTask& t, int64_t p, Tier tier, const Next& next, const Next& next_high) {
  HWY_ALIGN float low[kRows * kPageTokens], high[kRows * kPageTokens];
  HWY_ALIGN float low_weight[16], high_weight[16], shrink[16];
  PageSoftmax low_page, high_page;
  BlockTask unreported = t;
  unreported.page_m = unreported.page_l = nullptr;
  for (int first = 0; first < t.rows; first += kRows) {
    const int n = std::min(kRows, t.rows - first);
    if (tier == Tier::fp4x2) {
      first_plane_scores(t, t.pages[p], first, n, next, low);
      std::copy_n(low, padded_rows(n) * kPageTokens, high);
      add_plane_scores(t, t.pages[p], 1, first, n, nullptr, next.k[1], high);
    } else {
      score_rows(t, p, Tier::fp4, first, n, next, low);
      score_rows(t, p, tier, first, n, next_high, high);
    }
    page_softmax(unreported, p, first, n, low, low_page);
    page_softmax(t, p, first, n, high, high_page);
    merge_sums(t, Tier::fp4, first, n, -1.0f, low_page, low_weight, shrink);
    merge_sums(t, tier, first, n, 1.0f, high_page, high_weight, shrink);
    for (int r = 0; r < n; ++r) low_weight[r] *= shrink[r];
    if (tier != Tier::fp4x2) {
      add_values(t, p, Tier::fp4, first, n, low, low_weight, next);
      add_values(t, p, tier, first, n, high, high_weight, next_high);
      continue;
    }
    // Both read the first plane: once, with the difference of what they weigh.
    add_plane_values(t, t.pages[p], 1, first, n, high, high_weight, next.v[1]);
    for (int r = 0; r < n; ++r) {
      const float most = std::max(-low_weight[r], high_weight[r]);
      const float from_low = most > 0 ? low_weight[r] / most : 0.0f,
                  from_high = most > 0 ? high_weight[r] / most : 0.0f;
      for (int i = r * kPageTokens; i < (r + 1) * kPageTokens; ++i) low[i] = low[i] * from_low + high[i] * from_high;
      low_weight[r] = most;
    }
    add_plane_values(t, t.pages[p], 0, first, n, low, low_weight, next.v[0]);
  }
}

// Pages that a walk visits of one task before it turns to the next one: its state and rows then stay in L1.
constexpr int64_t kPagesInTurn = 8;

// Calls visit(task, page, tier, next) for every page of the tasks, some pages of each in turn. The tasks have one range
// of pages.
template <class Visit>
void walk(std::span<const BlockTask> tasks, const Visit& visit) {
  TierCursor cursors[kMaxHeadsPerWalk];
  for (size_t h = 0; h < tasks.size(); ++h) cursors[h].promoted = tasks[h].promoted[0];
  const BlockTask* task = nullptr;  // of the page that is visited once it is known which one follows
  int64_t page = 0;
  Tier tier = Tier::none;
  for (int64_t first = tasks[0].first_page; first < tasks[0].end_page; first += kPagesInTurn)
    for (size_t h = 0; h < tasks.size(); ++h)
      for (int64_t p = first; p < std::min(first + kPagesInTurn, tasks[0].end_page); ++p) {
        const Tier following = (p + 1) * kPageTokens > tasks[h].s_kv ? Tier::fp16 : cursors[h].at(p, tasks[h].rest);
        if (task) visit(*task, page, tier, next_page(tasks[h], p, following));
        task = &tasks[h];
        page = p;
        tier = following;
      }
  if (task) visit(*task, page, tier, Next{});
}

void decode(std::span<const BlockTask> tasks) {
  walk(tasks, [](const BlockTask& t, int64_t p, Tier tier, const Next& next) {
    if (tier != Tier::none) return attend_page(t, p, tier, next);
    for (int r = 0; r < t.rows && t.page_m; ++r) t.page_m[r * t.page_stride + p] = kMinusInf;  // it has no mass
  });
}

void decode_scores(std::span<const BlockTask> tasks) {
  walk(tasks, [](const BlockTask& t, int64_t p, Tier tier, const Next& next) {
    HWY_ALIGN float s[kRows * kPageTokens];
    PageSoftmax page;
    for (int first = 0; first < t.rows && tier != Tier::none; first += kRows) {
      const int n = std::min(kRows, t.rows - first);
      score_rows(t, p, tier, first, n, next, s);
      page_softmax(t, p, first, n, s, page);
    }
  });
}

void exchange(const BlockTask& t) {
  const std::span<const Promoted> pages = t.promoted[0];
  for (size_t i = 0; i < pages.size(); ++i) {
    Next next, next_high;
    if (i + 1 < pages.size()) {
      const auto [page, tier] = pages[i + 1];
      next = next_page(t, page, tier == Tier::fp4x2 ? tier : Tier::fp4);
      if (tier == Tier::fp16) next_high = next_page(t, page, tier);
    }
    exchange_page(t, pages[i].page, pages[i].tier, next, next_high);
  }
}

void quantize_q(const PageLayout& layout, int rows, const float* q, int16_t* q16, float* q_unit) {
  const int depth = layout.k.depth;
  const int padded = (rows + kRows - 1) / kRows * kRows;
  std::fill_n(q16, static_cast<int64_t>(padded) * depth, int16_t{0});
  std::fill_n(q_unit, padded, 0.0f);
  for (int r = 0; r < rows; ++r) {
    const float* x = q + static_cast<int64_t>(r) * layout.d;
    float largest = 0;
    for (int c = 0; c < layout.d; ++c) largest = std::max(largest, std::abs(x[c]));
    if (largest < 1e-30f) continue;  // its reciprocal would overflow, its scores are zero in FP32
    q_unit[r] = largest / 32767.0f;
    for (int c = 0; c < layout.d; ++c)
      q16[word_position(r, c, depth)] = static_cast<int16_t>(std::lrintf(x[c] / largest * 32767.0f));
  }
}

// share[p] += weight * page_l[p] 2^page_m[p] / the sum of that over all n pages and of 2^sink.
void add_shares(const float* page_m, const float* page_l, int64_t n, float sink, float weight, float* scratch,
                float* share) {
  const DF df;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(df));
  float top = sink;
  for (int64_t p = 0; p < n; ++p) top = std::max(top, page_m[p]);
  if (top == kMinusInf) return;
  const VF vtop = hn::Set(df, top);
  double total = std::exp2(sink - top);
  int64_t p = 0;
  for (; p + lanes <= n; p += lanes) {  // a page that is not seen has any page_l
    const VF m = hn::LoadU(df, page_m + p), e = exp2_negative(hn::Sub(m, vtop));
    const VF mass = hn::IfThenElseZero(hn::Ne(e, hn::Zero(df)), hn::Mul(e, hn::LoadU(df, page_l + p)));
    hn::StoreU(mass, df, scratch + p);
    total += static_cast<double>(hn::GetLane(hn::SumOfLanes(df, mass)));
  }
  for (; p < n; ++p) {
    scratch[p] = page_m[p] == kMinusInf ? 0.0f : page_l[p] * std::exp2(page_m[p] - top);
    total += static_cast<double>(scratch[p]);
  }
  const float factor = static_cast<float>(static_cast<double>(weight) / total);
  for (p = 0; p < n; ++p) share[p] += scratch[p] * factor;
}

const DecodeKernels* decode_table() {
  static constexpr DecodeKernels kTable = {"", decode, decode_scores, exchange, quantize_q, add_shares};
  return &kTable;
}

}  // namespace HWY_NAMESPACE
}  // namespace thriftattn::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
#include "cpu/targets.h"

namespace thriftattn::cpu {

HWY_EXPORT(decode_table);

const std::vector<DecodeKernels>& all_decode_kernels() {
  static const auto all = tables_of_targets<DecodeKernels>([] { return HWY_DYNAMIC_DISPATCH(decode_table)(); });
  return all;
}

}  // namespace thriftattn::cpu
#endif  // HWY_ONCE
