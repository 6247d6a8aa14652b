// Which pages one query block may promote, how many, and in which tier: the arithmetic of policies and budgets, for
// every backend. Compiled by nvcc too.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "format/page_layout.h"
#include "thriftattn/method.h"

namespace thriftattn {

// A query block as selection sees it. Pages are counted from the start of the sequence; only full pages count.
struct BlockPages {
  int64_t first_visible = 0;   // the block sees the full pages [first_visible, visible): the candidates
  int64_t visible = 0;         // (never below first_visible)
  int64_t first_diagonal = 0;  // pages that hold a row of the block: [first_diagonal, end_diagonal), tail included
  int64_t end_diagonal = 0;
  int64_t total = 0;  // full pages of the sequence: the paper's n

  THRIFTATTN_HD int64_t n() const { return visible - first_visible; }
};

// Which keys a row sees: none after it where causal, those less than `window` positions away where there is a window.
struct Mask {
  bool causal = true;
  int64_t window = 0;  // 0 = none

  // The first token that the row at `position` sees, and the one after the last, of s_kv; none where end <= first.
  THRIFTATTN_HD int64_t first_token(int64_t position) const {
    return window > 0 ? std::max<int64_t>(0, position - window + 1) : 0;
  }
  THRIFTATTN_HD int64_t end_token(int64_t position, int64_t s_kv) const {
    const int64_t end = causal ? position + 1 : window > 0 ? position + window : s_kv;
    return std::clamp<int64_t>(end, 0, s_kv);
  }
};

// The block of the rows at absolute positions [first, last], in a sequence of s_kv tokens.
THRIFTATTN_HD inline BlockPages block_pages(int64_t first, int64_t last, int64_t s_kv, Mask mask) {
  const int64_t full = s_kv / kPageTokens;
  BlockPages b;
  b.total = full;
  b.visible = std::min(full, pages_for(mask.end_token(last, s_kv)));
  b.first_visible = std::min(b.visible, mask.first_token(first) / kPageTokens);
  b.first_diagonal = std::max<int64_t>(first, 0) / kPageTokens;
  b.end_diagonal = last < 0 ? 0 : last / kPageTokens + 1;
  return b;
}

// The pages promoted whatever their rank: of those visible, the ones before sink_end and those of [first, end).
struct ForcedPages {
  int64_t sink_end = 0, first = 0, end = 0;

  THRIFTATTN_HD bool has(int64_t page) const { return page < sink_end || (page >= first && page < end); }
  THRIFTATTN_HD int64_t count(const BlockPages& b) const {
    const int64_t sink = std::clamp(sink_end, b.first_visible, b.visible);
    const int64_t from = std::max(std::clamp(first, b.first_visible, b.visible), sink);
    return sink - b.first_visible + std::max<int64_t>(0, std::clamp(end, b.first_visible, b.visible) - from);
  }
  template <class F>
  void for_each(const BlockPages& b, const F& f) const {
    for (int64_t p = b.first_visible; p < std::min(sink_end, b.visible); ++p) f(p);
    for (int64_t p = std::max({first, sink_end, b.first_visible}); p < std::min(end, b.visible); ++p) f(p);
  }
};
THRIFTATTN_HD inline ForcedPages forced_pages(const Force& force, const BlockPages& b) {
  return {force.sink, b.first_diagonal - force.previous, force.diagonal ? b.end_diagonal : b.first_diagonal};
}
inline bool is_forced(const Force& force, const BlockPages& b, int64_t page) {
  return forced_pages(force, b).has(page);
}

// The tier in which a forced page is read: 16 bit where that form is stored, else the second plane, else as the rest.
THRIFTATTN_HD inline Tier forced_tier(Tier rest, bool high, bool residual) {
  return high ? Tier::fp16 : residual ? Tier::fp4x2 : rest;
}

// False where the forced pages are all that is promoted, so that nothing needs a rank.
inline bool ranks(const Method& m) {
  return m.policy != Policy::none && m.budget.kind != Budget::Kind::all &&
         !(m.budget.kind == Budget::Kind::fraction && m.budget.value == 0);
}

// One page's part of the error estimate (docs/design.md, section 2); q_norm is |mean row of q|.
THRIFTATTN_HD inline float error_contribution(const PageSummary& facts, float share, float sm_scale, float q_norm) {
  return share * (std::abs(sm_scale) * q_norm * facts.eps_k * facts.v_norm + facts.eps_v);
}

// Whether a budget weighs pages by their shares of the mass, those of forced ones too, instead of counting them.
THRIFTATTN_HD inline bool weighs_pages(const Budget& budget) {
  return budget.kind == Budget::Kind::mass || budget.kind == Budget::Kind::tolerance;
}

// Pages to promote by count, forced ones included; of a budget that weighs pages only `forced`.
THRIFTATTN_HD inline int64_t budget_pages(const Budget& budget, const BlockPages& b, int64_t forced,
                                          bool one_k_for_all_rows) {
  const double n = static_cast<double>(b.n()), total = static_cast<double>(b.total), f = budget.value;
  const auto round = [](double x) { return static_cast<int64_t>(std::floor(x + 0.5)); };
  int64_t k = 0;
  switch (budget.kind) {
    case Budget::Kind::fraction:
      k = round(f * n);
      break;
    case Budget::Kind::paper:
      // One k for all rows of a causal prefill: sum over i of min(k, i + 1) = f n (n + 1) / 2.
      k = one_k_for_all_rows
              ? round((2 * total + 1 - std::sqrt((2 * total + 1) * (2 * total + 1) - 4 * f * total * (total + 1))) / 2)
              : round(f * total);
      k = std::clamp<int64_t>(k, 1, std::max<int64_t>(b.total, 1));
      break;
    case Budget::Kind::top_k:
      k = static_cast<int64_t>(f);
      break;
    case Budget::Kind::per64:
      k = std::max<int64_t>(1, b.n() / 64);
      break;
    case Budget::Kind::all:
    case Budget::Kind::mass:
    case Budget::Kind::tolerance:
      break;
  }
  return std::min(std::max(k, forced), b.n());
}

}  // namespace thriftattn
