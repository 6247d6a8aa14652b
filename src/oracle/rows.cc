#include "oracle/rows.h"

#include <algorithm>
#include <cmath>

#include "oracle/codecs.h"

namespace thriftattn::oracle {

namespace {

double max_abs(const std::vector<float>& x) {
  double amax = 0;
  for (float value : x) amax = std::max(amax, static_cast<double>(std::fabs(value)));
  return amax;
}

// The query row as the arithmetic's tensor cores read it against an FP4 page.
std::vector<double> quantised_query(const Input& input, const std::vector<float>& q) {
  const Method& m = input.method;
  if (m.arithmetic == Arithmetic::mma4) {
    const int exponent = m.page_scale ? page_exponent(max_abs(q), m.format, m.scales) : 0;
    return quantise(m.format, m.scales, exponent, q);
  }
  std::vector<double> out(q.begin(), q.end());
  if (m.arithmetic == Arithmetic::mma8) {
    const float scale = static_cast<float>(max_abs(q)) / 448.0f;
    for (size_t c = 0; c < q.size(); ++c) {
      out[c] = scale == 0 ? 0.0 : static_cast<double>(scale) * round_to(e4m3_values(), q[c] / scale);
    }
  }
  return out;
}

}  // namespace

std::vector<double> row_scores(const Input& input, const Head& head, int query_head, int64_t row,
                               std::span<const Tier> tiers) {
  const size_t d = static_cast<size_t>(input.d);
  const float* q_row = input.q + (row * input.h_q + query_head) * input.d;
  const std::vector<float> q(q_row, q_row + d);
  const std::vector<double> q_fp4 = quantised_query(input, q);
  std::vector<double> scores;
  for (int64_t t = 0; t < end_token(input, row); ++t) {
    const size_t j = static_cast<size_t>(t / kPageTokens), in_page = static_cast<size_t>(t % kPageTokens) * d;
    const Tier tier = j < tiers.size() ? tiers[j] : Tier::fp16;
    if (tier == Tier::none || t < first_token(input, row)) {
      scores.push_back(-INFINITY);
      continue;
    }
    double dot = 0;
    for (size_t c = 0; c < d; ++c) {
      const double exact = q[c];
      if (tier == Tier::fp16) {
        dot += exact * head.k[static_cast<size_t>(t) * d + c];
      } else if (tier == Tier::fp4x2) {
        dot += exact * (head.pages[j].k_centre[c] + head.pages[j].k_fp4x2[in_page + c]);
      } else {
        const auto& plane = input.method.arithmetic == Arithmetic::mma8 ? head.pages[j].k_fp8 : head.pages[j].k_fp4;
        dot += exact * head.pages[j].k_centre[c] + q_fp4[c] * plane[in_page + c];
      }
    }
    scores.push_back(capped(input, input.sm_scale * dot));
  }
  return scores;
}

Softmax softmax(const std::vector<double>& scores, double sink) {
  Softmax row;
  row.p.assign(scores.size(), 0.0);
  row.max = sink;
  for (double score : scores) row.max = std::max(row.max, score);
  if (row.max == -INFINITY) return row;
  row.sum = row.sink = std::exp(sink - row.max);
  for (size_t t = 0; t < scores.size(); ++t) row.sum += row.p[t] = std::exp(scores[t] - row.max);
  return row;
}

std::vector<double> page_shares(const Input& input, const Softmax& row) {
  std::vector<double> shares(static_cast<size_t>(full_pages(input) + 1), 0.0);
  for (size_t t = 0; t < row.p.size(); ++t) {
    if (row.sum > 0) shares[t / kPageTokens] += row.p[t] / row.sum;
  }
  return shares;
}

}  // namespace thriftattn::oracle
