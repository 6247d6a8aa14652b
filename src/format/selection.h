// Which pages one query block may promote, and how many: the arithmetic of policies and budgets, for every backend.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "format/page_layout.h"
#include "thriftattn/method.h"

namespace thriftattn {

// False where the forced pages are all that is promoted, so that nothing needs a rank.
inline bool ranks(const Method& m) {
  return m.policy != Policy::none && m.budget.kind != Budget::Kind::all &&
         !(m.budget.kind == Budget::Kind::fraction && m.budget.value == 0);
}

// One page's part of the error estimate (docs/design.md, section 2) where `share` of the mass reads it in FP4.
inline float error_contribution(const PageSummary& facts, float share, float sm_scale, float q_norm) {
  return share * (std::abs(sm_scale) * q_norm * facts.eps_k * facts.v_norm + facts.eps_v);
}

// A query block as selection sees it. Pages are counted from the start of the sequence; only full pages count.
struct BlockPages {
  int64_t first_visible = 0;   // the block sees the full pages [first_visible, visible): the candidates
  int64_t visible = 0;         // (never below first_visible)
  int64_t first_diagonal = 0;  // pages that hold a row of the block: [first_diagonal, end_diagonal), tail included
  int64_t end_diagonal = 0;
  int64_t total = 0;  // full pages of the sequence: the paper's n

  int64_t n() const { return visible - first_visible; }
};

// Which keys a row sees: none after it where causal, those less than `window` positions away where there is a window.
struct Mask {
  bool causal = true;
  int64_t window = 0;  // 0 = none

  // The first token that the row at `position` sees, and the one after the last, of s_kv; none where end <= first.
  int64_t first_token(int64_t position) const { return window > 0 ? std::max<int64_t>(0, position - window + 1) : 0; }
  int64_t end_token(int64_t position, int64_t s_kv) const {
    const int64_t end = causal ? position + 1 : window > 0 ? position + window : s_kv;
    return std::clamp<int64_t>(end, 0, s_kv);
  }
};

// The block of the rows at absolute positions [first, last], in a sequence of s_kv tokens.
inline BlockPages block_pages(int64_t first, int64_t last, int64_t s_kv, Mask mask) {
  const int64_t full = s_kv / kPageTokens;
  BlockPages b;
  b.total = full;
  b.visible = std::min(full, pages_for(mask.end_token(last, s_kv)));
  b.first_visible = std::min(b.visible, mask.first_token(first) / kPageTokens);
  b.first_diagonal = std::max<int64_t>(first, 0) / kPageTokens;
  b.end_diagonal = last < 0 ? 0 : last / kPageTokens + 1;
  return b;
}

// True where `page`, in [first_visible, visible), is promoted whatever its rank.
inline bool is_forced(const Force& force, const BlockPages& b, int64_t page) {
  if (page < force.sink) return true;
  if (force.diagonal && page >= b.first_diagonal && page < b.end_diagonal) return true;
  return page < b.first_diagonal && page >= b.first_diagonal - force.previous;
}

// Pages to promote by count, forced ones included; for mass and tolerance, which depend on the scores, only `forced`.
inline int64_t budget_pages(const Budget& budget, const BlockPages& b, int64_t forced, bool one_k_for_all_rows) {
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
