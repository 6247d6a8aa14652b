// What every kernel asks about a BlockTask: which tier a head reads a page in, what its rows see of it.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/kernels.h"

namespace thriftattn::cpu {

// A walk over one head's promoted pages, page by page.
struct TierCursor {
  std::span<const Promoted> promoted;
  size_t next = 0;

  Tier at(int64_t page, Tier rest) {
    while (next < promoted.size() && promoted[next].page < page) ++next;
    return next < promoted.size() && promoted[next].page == page ? promoted[next].tier : rest;
  }
};

inline const uint16_t* mean_of(const BlockTask& t, const PageRef& page) {
  return reinterpret_cast<const uint16_t*>(page.summary + t.layout->mean);
}

// Tokens [first, end) of page `p` that row r sees, counted in the page.
struct Visible {
  int64_t first, end;
};
inline Visible visible_tokens(const BlockTask& t, int64_t p, int r) {
  const int64_t position = t.first_position + r % t.period, page = p * kPageTokens;
  return {std::clamp<int64_t>(t.mask.first_token(position) - page, 0, kPageTokens),
          std::clamp<int64_t>(t.mask.end_token(position, t.s_kv) - page, 0, kPageTokens)};
}

// Whether every row of a task sees every token of page p.
inline bool sees_all(const BlockTask& t, int64_t p) {
  return t.mask.first_token(t.first_position + t.period - 1) <= p * kPageTokens &&
         t.mask.end_token(t.first_position, t.s_kv) >= (p + 1) * kPageTokens;
}

// The tiers in which the heads of a task read page p, and which of them occur.
inline void page_tiers(const BlockTask& t, int64_t p, TierCursor* cursors, Tier* tier, bool* wanted) {
  const bool tail = (p + 1) * kPageTokens > t.s_kv;
  std::fill(wanted, wanted + 4, false);
  for (int h = 0; h < t.heads; ++h) {
    tier[h] = tail ? Tier::fp16 : cursors[h].at(p, t.rest);
    wanted[static_cast<int>(tier[h])] = true;
  }
}

}  // namespace thriftattn::cpu
