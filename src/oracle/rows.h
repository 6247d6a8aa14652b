// Softmax of one query row over pages read in given tiers: shared by attention and by the policies that need scores.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <span>
#include <vector>

#include "oracle/oracle.h"
#include "oracle/pages.h"

namespace thriftattn::oracle {

inline int64_t full_pages(const Input& input) { return input.s_kv / kPageTokens; }
inline int64_t position(const Input& input, int64_t row) { return input.s_kv - input.s_q + row; }
// The tokens [first, end) that a row sees; none where end <= first.
inline int64_t first_token(const Input& input, int64_t row) {
  return input.window > 0 ? std::max<int64_t>(0, position(input, row) - input.window + 1) : 0;
}
inline int64_t end_token(const Input& input, int64_t row) {
  if (input.causal) return position(input, row) + 1;
  return input.window > 0 ? std::min(input.s_kv, position(input, row) + input.window) : input.s_kv;
}

// cap * tanh(score / cap); the score itself without a cap.
inline double capped(const Input& input, double score) {
  return input.softcap > 0 ? input.softcap * std::tanh(score / input.softcap) : score;
}

// Scores of one row, [end_token], -inf for tokens outside its window and of pages in Tier::none. `tiers` names the tier
// of every full page that the row can see; the tail is always read in 16 bit.
std::vector<double> row_scores(const Input& input, const Head& head, int query_head, int64_t row,
                               std::span<const Tier> tiers);

// exp(score - max) of every token and their sum, the learned sink's included; all zero where nothing is visible.
struct Softmax {
  double max = 0, sum = 0, sink = 0;  // sink: its part of the sum
  std::vector<double> p;
};
Softmax softmax(const std::vector<double>& scores, double sink = -INFINITY);

// The learned logit of a query head; -inf where there is none.
inline double sink_of(const Input& input, int query_head) {
  return input.sinks ? static_cast<double>(input.sinks[query_head]) : -INFINITY;
}

// Share of the softmax mass of every full page and, last, of the tail.
std::vector<double> page_shares(const Input& input, const Softmax& row);

}  // namespace thriftattn::oracle
