// Softmax of one query row over pages read in given tiers: shared by attention and by the policies that need scores.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "oracle/oracle.h"
#include "oracle/pages.h"

namespace thriftattn::oracle {

inline int64_t full_pages(const Input& input) { return input.s_kv / kPageTokens; }
inline int64_t position(const Input& input, int64_t row) { return input.s_kv - input.s_q + row; }
inline int64_t visible_tokens(const Input& input, int64_t row) {
  return input.causal ? position(input, row) + 1 : input.s_kv;  // <= 0: none
}

// Scores of one row, [visible tokens], -inf for tokens of pages in Tier::none. `tiers` names the tier of every full
// page that the row can see; the tail is always read in 16 bit.
std::vector<double> row_scores(const Input& input, const Head& head, int query_head, int64_t row,
                               std::span<const Tier> tiers);

// exp(score - max) of every token and their sum; all zero where nothing is visible.
struct Softmax {
  double max = 0, sum = 0;
  std::vector<double> p;
};
Softmax softmax(const std::vector<double>& scores);

// Share of the softmax mass of every full page and, last, of the tail.
std::vector<double> page_shares(const Input& input, const Softmax& row);

}  // namespace thriftattn::oracle
