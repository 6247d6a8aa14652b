// Attention of the few rows of a decode or verify step over a range of pages, for all KV heads of a sequence.
//
//   K codes --integer products with q in 16 bit--> scores [rows, 64], from q.k_mean on --mask, exp2--> e in [0, 1]
//   e, in 15 bits --integer products with V codes--> o [rows, d_v]
//
// An fp4x2 page runs the same loop over both planes; a 16-bit page is multiplied in FP32, its values converted as they
// are loaded. q is scaled beforehand, so that products are scores in units of log2. Pages are read in turns: the keys
// of eight pages of one head, each with its softmax, then their values; then those of the next head, whose records lie
// beside them.
//
// What binds it: an FP4 page of d = 128 is 9216 bytes and, for four rows, about 4,200 vector instructions, of which
// 2048 are integer dot products. These take longer than the bytes, the more so where another thread shares the core;
// prefetching the records of products to come is what lets them overlap. A 16-bit page is 32 KB and 10,000
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

// What is brought near while a product works: K or V of a page, in each plane, or the 16-bit form in the place of the
// first.
struct Part {
  Ahead plane[2];
};

Part part_of(const BlockTask& t, int64_t p, Tier tier, bool values) {
  const PageRef& page = t.pages[p];
  const PageLayout& l = *t.layout;
  Part part;
  if (tier == Tier::none) return part;
  if (tier == Tier::fp16) {
    const auto* high = reinterpret_cast<const uint8_t*>(page.high);
    part.plane[0] = values ? Ahead{high + 2 * l.high_v, l.high_bytes - 2 * l.high_v} : Ahead{high, 2 * l.high_v};
    return part;
  }
  for (int plane = 0; plane < (tier == Tier::fp4x2 ? 2 : 1); ++plane) {
    const uint8_t* record = plane_of(page, plane);
    part.plane[plane] =
        values ? Ahead{record + l.v_codes, l.fp4_bytes - l.v_codes} : Ahead{record + l.k_codes, l.v_codes - l.k_codes};
  }
  return part;
}

// s[n, 64] = products of rows [first, first + n) with one plane of a page's keys, plus start[n], or plus s where start
// is null.
void add_plane_scores(const BlockTask& t, const PageRef& page, int plane, int first, int n, const float* start,
                      const Ahead& ahead, float* s) {
  const PageLayout& l = *t.layout;
  const float unit = scale_unit(t.format) / kCodeUnit * pow2(-summary_of(page).k_exponent[plane]);
  float factor[kRows];
  for (int r = 0; r < kRows; ++r) factor[r] = t.q_unit[first + r] * unit;
  const Cell* q = static_cast<const Cell*>(t.q_cells) + first / kCellRows * (l.k.depth / 16);
  add_product(l.k, t.format, plane_of(page, plane) + l.k_codes, n, q, factor, start, s, ahead);
}

// s[n, 64] = scores of rows [first, first + n) by the first plane of page p's keys and their mean.
void first_plane_scores(const BlockTask& t, int64_t p, int first, int n, const Ahead& ahead, float* s) {
  static constexpr float kNone[kRows] = {};
  add_plane_scores(t, t.pages[p], 0, first, n, t.starts ? t.starts + p * t.start_stride + first : kNone, ahead, s);
}

// s[n, 64] = scores of rows [first, first + n) with the keys of page p.
void score_rows(const BlockTask& t, int64_t p, Tier tier, int first, int n, const Part& ahead, float* s) {
  const PageLayout& l = *t.layout;
  const PageRef& page = t.pages[p];
  if (tier == Tier::fp16) {
    const float* q = t.q + static_cast<int64_t>(first) * l.d;
    if (t.high_dtype == DType::f16) {
      multiply<High<DType::f16>>(n, l.d, kPageTokens, q, l.d, page.high, kPageTokens, s, kPageTokens, false,
                                 ahead.plane[0]);
    } else {
      multiply<High<DType::bf16>>(n, l.d, kPageTokens, q, l.d, page.high, kPageTokens, s, kPageTokens, false,
                                  ahead.plane[0]);
    }
    return;
  }
  first_plane_scores(t, p, first, n, ahead.plane[0], s);
  if (tier == Tier::fp4x2) {
    add_plane_scores(t, page, 1, first, n, nullptr, ahead.plane[1], s);
  } else {
    ahead.plane[1].touch_all();
  }
}

// The softmax of one page for up to kRows rows, and how it is merged with others.
struct PageSoftmax {
  HWY_ALIGN float m[16], l[16];  // its maximum, and the sum of e = 2^(s - m)
  HWY_ALIGN float weight[16];    // what e counts in the state
  Tier tier = Tier::none;
  float sign = 1;  // -1 where the page is taken out

  PageSoftmax() {
    std::fill_n(m, 16, kMinusInf);
    std::fill_n(l, 16, 0.0f);
  }
};

// The scores s[n, 64] of page p become e, of at least 2^-125: what is hidden is as good as none, and as an integer
// none.
void page_softmax(const BlockTask& t, int64_t p, int first, int n, float* s, PageSoftmax& page) {
  const DF df;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(df));
  if (t.softcap > 0 || !sees_all(t, p)) finish_scores(t, p, first, n, s);
  for (int r0 = 0; r0 < n; r0 += 4) {
    const int rows = std::min(4, n - r0);
    VF most[4], sum[4];
    for (int r = 0; r < 4; ++r) {
      const float* x = s + (r0 + std::min(r, rows - 1)) * kPageTokens;
      most[r] = hn::LoadU(df, x);
      for (int64_t i = lanes; i < kPageTokens; i += lanes) most[r] = hn::Max(most[r], hn::LoadU(df, x + i));
    }
    float m[4], l[4];
    reduce_four(most, Larger(), m);
    for (int r = 0; r < 4; ++r) sum[r] = hn::Zero(df);
    for (int r = 0; r < rows; ++r) {
      float* x = s + (r0 + r) * kPageTokens;
      const VF top = hn::Set(df, m[r] == kMinusInf ? 0.0f : m[r]);
      for (int64_t i = 0; i < kPageTokens; i += lanes) {
        const VF e = exp2_clamped(hn::Sub(hn::LoadU(df, x + i), top));
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

// Moves the state of rows [first, first + n) to a maximum that holds for the pages too, adds their sums, and finds
// their weights.
void merge_sums(const BlockTask& t, int first, int n, std::span<PageSoftmax> pages) {
  const DF df;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(df));
  const SoftmaxState& state = t.state;
  const VF lowest = hn::Set(df, -1e30f);    // in the place of -inf, which less itself is no number
  HWY_ALIGN float shrink[16];               // by what all that was read before is multiplied
  for (int64_t i = 0; i < n; i += lanes) {  // the state has room for whole registers
    const int64_t at = first + i;
    const VF old = hn::LoadU(df, state.m + at);
    VF m = old;
    for (const PageSoftmax& page : pages) m = hn::Max(m, hn::Load(df, page.m + i));
    const VF top = hn::Max(m, lowest);
    const VF a = hn::AllTrue(df, hn::Eq(old, m)) ? hn::Set(df, 1.0f) : exp2_negative(hn::Sub(old, top));
    VF l = hn::Mul(hn::LoadU(df, state.l + at), a), l_high = hn::Mul(hn::LoadU(df, state.l_high + at), a);
    for (PageSoftmax& page : pages) {
      const VF weight = hn::Mul(exp2_negative(hn::Sub(hn::Load(df, page.m + i), top)), hn::Set(df, page.sign));
      const VF sum = hn::Mul(weight, hn::Load(df, page.l + i));
      hn::Store(weight, df, page.weight + i);
      l = hn::Add(l, sum);
      if (page.tier > Tier::fp4) l_high = hn::Add(l_high, sum);
    }
    hn::Store(a, df, shrink + i);
    hn::StoreU(m, df, state.m + at);
    hn::StoreU(l, df, state.l + at);
    hn::StoreU(l_high, df, state.l_high + at);
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
  const float unit = scale_unit(t.format) / kCodeUnit / kMostX * pow2(-summary_of(page).v_exponent[plane]);
  constexpr int kCells = kPageTokens / 16;
  HWY_ALIGN Cell cells[kRows / kCellRows * kCells];
  float factor[kRows];
  for (int r = 0; r < padded_rows(n); ++r) factor[r] = r < n ? weight[r] * unit : 0.0f;
  for (int r = 0; r < n; r += kCellRows)
    pack_rows(e + r * kPageTokens, std::min(n - r, kCellRows), kPageTokens, cells + r / kCellRows * kCells);
  add_product(l.v, t.format, plane_of(page, plane) + l.v_codes, n, cells, factor, nullptr,
              t.state.o + static_cast<int64_t>(first) * l.d_v, ahead);
}

// o[rows] += weight * e V of page p.
void add_values(const BlockTask& t, int64_t p, Tier tier, int first, int n, float* e, const float* weight,
                const Part& ahead) {
  const PageLayout& l = *t.layout;
  const PageRef& page = t.pages[p];
  float* o = t.state.o + static_cast<int64_t>(first) * l.d_v;
  if (tier == Tier::fp16) {
    const int64_t tokens = std::min<int64_t>(kPageTokens, t.s_kv - p * kPageTokens);  // what follows may be NaN
    for (int r = 0; r < n; ++r)
      for (int i = 0; i < kPageTokens; ++i) e[r * kPageTokens + i] *= weight[r];
    const uint16_t* v = page.high + l.high_v;
    if (t.high_dtype == DType::f16) {
      multiply<High<DType::f16>>(n, tokens, l.d_v, e, kPageTokens, v, l.d_v, o, l.d_v, true, ahead.plane[0]);
    } else {
      multiply<High<DType::bf16>>(n, tokens, l.d_v, e, kPageTokens, v, l.d_v, o, l.d_v, true, ahead.plane[0]);
    }
    return;
  }
  add_plane_values(t, page, 0, first, n, e, weight, ahead.plane[0]);
  if (tier == Tier::fp4x2) {
    add_plane_values(t, page, 1, first, n, e, weight, ahead.plane[1]);
  } else {
    ahead.plane[1].touch_all();
  }
}

// Some pages of one task, read together: the task's state and rows stay in L1, and the state moves once for all of
// them. The softmax of each follows its scores, so that there is no long time in which nothing is brought near.
struct Turn {
  static constexpr int64_t kMost = 8;
  const BlockTask* task = nullptr;
  int64_t first = 0, n = 0;
  Tier tier[kMost];
  bool large = false;            // whether some page takes more memory than codes do
  uint8_t asked[2][kMost] = {};  // pieces of keys and of values that were asked for before their turn

  bool in_fp4(int64_t i) const { return i < n && (tier[i] == Tier::fp4 || tier[i] == Tier::fp4x2); }
  Part part(int64_t i, bool values) const {
    if (i >= n) return {};
    Part whole = part_of(*task, first + i, tier[i], values);
    if (asked[values][i] > 0) {
      Ahead& most = whole.plane[large_plane(i)];
      const int64_t done = asked[values][i] * piece_bytes(i, values);
      most = {most.at + done, most.bytes - done};
    }
    return whole;
  }
  // A part in 16 bit is four times as large as codes, one in two planes twice: what of it is asked for beforehand, by a
  // product that asks for its own part too. Null where there is nothing.
  const uint8_t* piece(int64_t i, bool values) {
    if (i >= n || asked[values][i] == (tier[i] == Tier::fp16 ? 3 : tier[i] == Tier::fp4x2 ? 1 : 0)) return nullptr;
    const Ahead most = part_of(*task, first + i, tier[i], values).plane[large_plane(i)];
    return most.at + asked[values][i]++ * piece_bytes(i, values);
  }
  int large_plane(int64_t i) const { return tier[i] == Tier::fp16 ? 0 : 1; }
  int64_t piece_bytes(int64_t i, bool values) const {
    const PageLayout& l = *task->layout;
    if (tier[i] != Tier::fp16) return (values ? l.v : l.k).code_bytes();
    return (values ? l.high_bytes - 2 * l.high_v : 2 * l.high_v) / 4;
  }
  // What is wanted of the summary of page i: the exponents at its front and the mean that follows.
  Ahead summary(int64_t i) const {
    if (!in_fp4(i)) return {};
    const bool with_mean = task->starts && !task->starts_known;
    return {task->pages[first + i].summary, with_mean ? task->layout->mean + 2 * int64_t{task->layout->d} : 64};
  }

  // starts of the pages that are read in FP4.
  void make_starts() const {
    if (!task->starts || task->starts_known) return;
    const uint16_t* mean[kMost];  // an even number of places, so that the last one may stand twice
    float* to[kMost];
    int64_t count = 0;
    for (int64_t i = 0; i < n; ++i) {
      if (!in_fp4(i)) continue;
      mean[count] = mean_of(*task, task->pages[first + i]);
      to[count++] = task->starts + (first + i) * task->start_stride;
    }
    if (count % 2 == 1) mean[count] = mean[count - 1], to[count] = to[count - 1];
    const int d = task->layout->d;
    for (int64_t i = 0; i < count; i += 2)
      for (int r = 0; r < task->rows; r += 4)
        dot_four<2>(task->q + static_cast<int64_t>(r) * d, std::min(4, task->rows - r), task->high_dtype,
                    {mean[i], mean[i + 1]}, d, {to[i] + r, to[i + 1] + r});
  }
};

// What is read next is brought near this many products ahead, of a third of a microsecond each: one is too late for
// DRAM, more than three are no faster.
constexpr int64_t kLead = 3;

// Adds the pages of a turn to its task's state; or fills page_m and page_l of them alone.
template <bool kScoresAlone>
void read_turn(Turn& turn, Turn& next) {
  const BlockTask& t = *turn.task;
  // What the k-th product from the first of this turn on brings near: a later one's part, of what is larger than codes
  // the last piece, and in FP4 an earlier piece of one that is read later still. All at once would be more than can be
  // had in the time of a product.
  constexpr int64_t kParts = kScoresAlone ? 1 : 2;
  const bool large = turn.large || next.large;
  const auto ahead_of = [&](int64_t k, bool in_fp4) HWY_ATTR {
    const int64_t j = k + kLead;
    const auto piece = [&](int64_t i) HWY_ATTR {
      return i < kParts * turn.n ? turn.piece(i % turn.n, i >= turn.n) : next.piece(i - kParts * turn.n, false);
    };
    Part part = j < turn.n            ? turn.part(j, false)
                : j < kParts * turn.n ? turn.part(j - turn.n, true)
                                      : next.part(j - kParts * turn.n, false);
    const uint8_t*& also = part.plane[0].also;
    for (int64_t later = j + 1; large && in_fp4 && later <= j + 3 && !also; ++later) also = piece(later);
    return part;
  };
  HWY_ALIGN float s[Turn::kMost * kRows * kPageTokens];
  turn.make_starts();
  for (int first = 0; first < t.rows; first += kRows) {
    const int n = std::min(kRows, t.rows - first);
    const int64_t of_page = int64_t{padded_rows(n)} * kPageTokens;
    PageSoftmax pages[Turn::kMost];
    for (int64_t i = 0; i < turn.n; ++i) {
      if (first == 0) next.summary(i).touch_all();
      const Part ahead = ahead_of(i, turn.in_fp4(i));
      pages[i].tier = turn.tier[i];
      if (turn.tier[i] != Tier::none) {
        score_rows(t, turn.first + i, turn.tier[i], first, n, ahead, s + i * of_page);
        page_softmax(t, turn.first + i, first, n, s + i * of_page, pages[i]);
      } else if (t.page_m) {
        for (int r = first; r < first + n; ++r) t.page_m[r * t.page_stride + turn.first + i] = kMinusInf;
      }
    }
    if (kScoresAlone) continue;
    merge_sums(t, first, n, {pages, static_cast<size_t>(turn.n)});
    for (int64_t i = 0; i < turn.n; ++i) {
      const Part ahead = ahead_of(turn.n + i, turn.in_fp4(i));
      if (turn.tier[i] != Tier::none)
        add_values(t, turn.first + i, turn.tier[i], first, n, s + i * of_page, pages[i].weight, ahead);
    }
  }
}

// Reads every page of the tasks, a turn of each after another. The tasks have one range of pages.
template <bool kScoresAlone>
void walk(std::span<const BlockTask> tasks) {
  constexpr int64_t kReferences = Turn::kMost * static_cast<int64_t>(sizeof(PageRef));
  TierCursor cursors[kMaxHeadsPerWalk];
  for (size_t h = 0; h < tasks.size(); ++h) cursors[h].promoted = tasks[h].promoted[0];
  const int64_t end = tasks[0].end_page;
  int64_t first = tasks[0].first_page;
  size_t h = 0;
  const auto following = [&] {
    Turn turn;
    if (first >= end) return turn;
    turn.task = &tasks[h];
    turn.first = first;
    turn.n = std::min(Turn::kMost, end - first);
    for (int64_t i = 0; i < turn.n; ++i) {
      const int64_t p = first + i;
      turn.tier[i] = (p + 1) * kPageTokens > tasks[h].s_kv ? Tier::fp16 : cursors[h].at(p, tasks[h].rest);
      turn.large |= turn.tier[i] > Tier::fp4;
    }
    if (++h == tasks.size()) h = 0, first += Turn::kMost;
    // Where the pages of the turn after lie is asked for a turn ahead too.
    if (first < end) Ahead{reinterpret_cast<const uint8_t*>(tasks[h].pages + first), kReferences}.touch_all();
    return turn;
  };
  for (Turn turn = following(), next; turn.n > 0; turn = next) {
    next = following();
    read_turn<kScoresAlone>(turn, next);
  }
}

void decode(std::span<const BlockTask> tasks) { walk<false>(tasks); }
void decode_scores(std::span<const BlockTask> tasks) { walk<true>(tasks); }

// Takes pages out of the state as they were read in fp4, and adds them in their tier; at most kExchanged of them, which
// `next` follow.
constexpr size_t kExchanged = Turn::kMost / 2;
void exchange_turn(const BlockTask& t, std::span<const Promoted> pages, std::span<const Promoted> next) {
  HWY_ALIGN float s[2 * kExchanged * kRows * kPageTokens];  // of page i as it was read at 2i, as it is to be at 2i + 1
  BlockTask unreported = t;
  unreported.page_m = unreported.page_l = nullptr;
  // K or V of the i-th page from pages[0] on: its first plane, and what it is to be read in besides.
  const auto part = [&](size_t i, bool values) {
    const std::span<const Promoted> from = i < pages.size() ? pages : next;
    if (i >= pages.size()) i -= pages.size();
    if (i >= from.size()) return Part{};
    const Part first = part_of(t, from[i].page, Tier::fp4, values);
    const Part other = part_of(t, from[i].page, from[i].tier, values);
    return Part{{first.plane[0], other.plane[from[i].tier == Tier::fp4x2 ? 1 : 0]}};
  };
  for (const Promoted& page : next.first(std::min(next.size(), kExchanged))) {
    Ahead{t.pages[page.page].summary, 64}.touch_all();
    if (t.starts) __builtin_prefetch(t.starts + page.page * t.start_stride, 0, 2);
  }
  for (size_t i = kExchanged; i < std::min(next.size(), 2 * kExchanged); ++i)
    __builtin_prefetch(&t.pages[next[i].page], 0, 2);
  for (int first = 0; first < t.rows; first += kRows) {
    const int n = std::min(kRows, t.rows - first);
    const int64_t of_page = int64_t{padded_rows(n)} * kPageTokens;
    PageSoftmax sums[2 * kExchanged];
    for (size_t i = 0; i < pages.size(); ++i) {
      const auto [p, tier] = pages[i];
      float *low = s + 2 * i * of_page, *high = low + of_page;
      const size_t j = i + 1;  // the next page is brought near: two products ahead
      const Part ahead = j < pages.size() ? part(j, false) : part(j - pages.size(), true);
      sums[2 * i].tier = Tier::fp4, sums[2 * i].sign = -1;
      sums[2 * i + 1].tier = tier;
      score_rows(t, p, Tier::fp4, first, n, {{ahead.plane[0]}}, low);
      if (tier == Tier::fp4x2) std::copy_n(low, of_page, high);
      page_softmax(unreported, p, first, n, low, sums[2 * i]);
      if (tier == Tier::fp4x2) {
        add_plane_scores(t, t.pages[p], 1, first, n, nullptr, ahead.plane[1], high);
      } else {
        score_rows(t, p, tier, first, n, {{ahead.plane[1]}}, high);
      }
      page_softmax(t, p, first, n, high, sums[2 * i + 1]);
    }
    merge_sums(t, first, n, {sums, 2 * pages.size()});
    for (size_t i = 0; i < pages.size(); ++i) {
      const auto [p, tier] = pages[i];
      float *low = s + 2 * i * of_page, *high = low + of_page;
      float *out = sums[2 * i].weight, *in = sums[2 * i + 1].weight;
      const size_t j = i + 1;  // the next page is brought near: two products ahead
      const Part ahead = part(j, j < pages.size());
      if (tier != Tier::fp4x2) {
        add_values(t, p, Tier::fp4, first, n, low, out, {{ahead.plane[0]}});
        add_values(t, p, tier, first, n, high, in, {{ahead.plane[1]}});
        continue;
      }
      // Both read the first plane: once, with the difference of what they weigh.
      add_plane_values(t, t.pages[p], 1, first, n, high, in, ahead.plane[1]);
      for (int r = 0; r < n; ++r) {
        const float most = std::max(-out[r], in[r]);
        const float from_low = most > 0 ? out[r] / most : 0.0f, from_high = most > 0 ? in[r] / most : 0.0f;
        for (int k = r * kPageTokens; k < (r + 1) * kPageTokens; ++k) low[k] = low[k] * from_low + high[k] * from_high;
        out[r] = most;
      }
      add_plane_values(t, t.pages[p], 0, first, n, low, out, ahead.plane[0]);
    }
  }
}

void exchange(const BlockTask& t) {
  std::span<const Promoted> pages = t.promoted[0];
  while (!pages.empty()) {
    const size_t n = std::min(pages.size(), kExchanged);
    exchange_turn(t, pages.first(n), pages.subspan(n));
    pages = pages.subspan(n);
  }
}

void quantize_q(const PageLayout& layout, int rows, const float* q, void* q_cells, float* q_unit) {
  const DF df;
  const int lanes = static_cast<int>(hn::Lanes(df)), d = layout.d, depth = layout.k.depth;
  auto* to = static_cast<Cell*>(q_cells);
  for (int first = 0; first < (rows + kRows - 1) / kRows * kRows; first += kCellRows, to += depth / 16) {
    HWY_ALIGN float e[kCellRows * (kMaxChannels + 16)] = {};
    for (int r = 0; r < kCellRows; ++r) {
      q_unit[first + r] = 0;
      if (first + r >= rows) continue;
      const float* x = q + static_cast<int64_t>(first + r) * d;
      VF most = hn::Zero(df);
      for (int c = 0; c < d; c += lanes) most = hn::Max(most, hn::Abs(hn::LoadU(df, x + c)));
      const float largest = hn::GetLane(hn::MaxOfLanes(df, most));
      if (largest < 1e-30f) continue;  // its reciprocal would overflow, its scores are zero in FP32
      q_unit[first + r] = largest / kMostX;
      for (int c = 0; c < d; c += lanes)
        hn::StoreU(hn::Div(hn::LoadU(df, x + c), hn::Set(df, largest)), df, e + r * depth + c);
    }
    pack_rows(e, kCellRows, depth, to);
  }
}

// share[p] += weight * page_l[p] 2^page_m[p] / the sum of that over all n pages and of 2^sink.
void add_shares(const float* page_m, const float* page_l, int64_t n, float sink, float weight, float* scratch,
                float* share) {
  const DF df;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(df));
  VF most = hn::Set(df, sink);
  int64_t p = 0;
  for (; p + lanes <= n; p += lanes) most = hn::Max(most, hn::LoadU(df, page_m + p));
  float top = hn::GetLane(hn::MaxOfLanes(df, most));
  for (; p < n; ++p) top = std::max(top, page_m[p]);
  if (top == kMinusInf) return;
  const VF vtop = hn::Set(df, top);
  double total = std::exp2(sink - top);
  for (p = 0; p + lanes <= n; p += lanes) {  // a page that is not seen has any page_l
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
