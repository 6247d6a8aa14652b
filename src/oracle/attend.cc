// Attention by definition, one row at a time.
#include <algorithm>
#include <cmath>

#include "oracle/codecs.h"
#include "oracle/oracle.h"
#include "oracle/rows.h"

namespace thriftattn::oracle {

namespace {

Tier rest_tier(const Method& method) { return method.budget.kind == Budget::Kind::all ? Tier::fp16 : method.rest; }

// Tiers of the pages that one query block can see.
std::vector<Tier> block_tiers(const Input& input, const Selection& selection, size_t block, int64_t pages) {
  std::vector<Tier> tiers(static_cast<size_t>(pages), rest_tier(input.method));
  for (int64_t i = selection.first[block]; i < selection.first[block + 1]; ++i) {
    const Promoted& promoted = selection.pages[static_cast<size_t>(i)];
    tiers[static_cast<size_t>(promoted.page)] = promoted.tier;
  }
  return tiers;
}

const std::vector<double>& value_plane(const Input& input, const Page& page, Tier tier) {
  if (tier == Tier::fp16) return page.v;
  if (tier == Tier::fp4x2) return page.v_fp4x2;
  return input.method.arithmetic == Arithmetic::mma8 ? page.v_fp8 : page.v_fp4;
}

// Replaces the p of one page read in fp4 by what the tensor core multiplies V with. `scores` and `p` are the page's
// visible tokens, p relative to row_max; running_max is the largest score of this and all earlier pages.
void quantise_p(const Method& method, const double* scores, double* p, size_t tokens, double row_max,
                double running_max) {
  const bool constant = method.p_quant == PQuant::constant;
  if (method.arithmetic == Arithmetic::mma4 && !constant) {
    const double page_max = *std::max_element(scores, scores + tokens);
    const double target = method.format == Fp4Format::nvfp4 ? 448.0 * 6.0 : 6.0;
    std::vector<float> scaled(kPageTokens, 0.0f);
    for (size_t t = 0; t < tokens; ++t) scaled[t] = static_cast<float>(std::exp(scores[t] - page_max) * target);
    const std::vector<double> coded = quantise(method.format, Scales::six, 0, scaled);
    for (size_t t = 0; t < tokens; ++t) p[t] = coded[t] / target * std::exp(page_max - row_max);
    return;
  }
  const double one_sixth = round_to(e4m3_values(), 1.0f / 6.0f);
  for (size_t t = 0; t < tokens; ++t) {
    const float relative = static_cast<float>(std::exp(scores[t] - running_max));
    double coded = 0;
    if (method.arithmetic == Arithmetic::mma4) {
      coded = round_to(e2m1_values(), relative / static_cast<float>(one_sixth)) * one_sixth;
    } else {
      coded = round_to(e4m3_values(), relative * 448.0f) / 448.0;
    }
    p[t] = coded * std::exp(running_max - row_max);
  }
}

// out[d_v] of one row.
std::vector<double> weighted_values(const Input& input, const Head& head, const std::vector<double>& scores,
                                    const Softmax& row, double sink, const std::vector<Tier>& tiers) {
  const size_t d_v = static_cast<size_t>(input.d_v);
  const bool quantised = input.method.arithmetic == Arithmetic::mma4 || input.method.arithmetic == Arithmetic::mma8;
  std::vector<double> out(d_v, 0.0), p = row.p;
  double running_max = sink;
  for (size_t first = 0; first < scores.size(); first += kPageTokens) {
    const size_t page = first / kPageTokens, tokens = std::min<size_t>(kPageTokens, scores.size() - first);
    const Tier tier = page < tiers.size() ? tiers[page] : Tier::fp16;
    const double page_max = *std::max_element(&scores[first], &scores[first] + tokens);
    if (page_max == -INFINITY) continue;  // skipped, or outside the row's window
    running_max = std::max(running_max, page_max);
    if (tier == Tier::fp4 && quantised) {
      quantise_p(input.method, &scores[first], &p[first], tokens, row.max, running_max);
    }
    const double* v = page < tiers.size() ? value_plane(input, head.pages[page], tier).data() : &head.v[first * d_v];
    for (size_t t = 0; t < tokens; ++t) {
      for (size_t c = 0; c < d_v; ++c) out[c] += p[first + t] / row.sum * v[t * d_v + c];
    }
  }
  return out;
}

// Error estimate of one query head over one block: mass of every page read in fp4 times what its residual can do.
double block_error(const Input& input, const Head& head, const QueryBlock& block, int query_head,
                   const std::vector<Tier>& tiers, const std::vector<double>& mean_mass) {
  double q_squared = 0;
  for (int c = 0; c < input.d; ++c) {
    double mean = 0;
    for (int64_t r = block.first_row; r < block.end_row; ++r) {
      mean +=
          input.q[(r * input.h_q + query_head) * input.d + c] / static_cast<double>(block.end_row - block.first_row);
    }
    q_squared += mean * mean;
  }
  double error = 0;
  for (size_t j = 0; j < tiers.size(); ++j) {
    const Page& page = head.pages[j];
    if (tiers[j] != Tier::fp4) continue;
    error += mean_mass[j] * (std::fabs(input.sm_scale) * std::sqrt(q_squared) * page.eps_k * page.v_norm + page.eps_v);
  }
  return error;
}

}  // namespace

Output attend(const Input& input, const Selection& selection) {
  const std::vector<Head> heads = build_heads(input);
  const std::vector<QueryBlock> blocks = query_blocks(input);
  const int group = input.h_q / input.h_kv;
  const size_t d_v = static_cast<size_t>(input.d_v), h_q = static_cast<size_t>(input.h_q);
  const size_t pages = static_cast<size_t>((input.s_kv + kPageTokens - 1) / kPageTokens);
  const double rows = static_cast<double>(input.s_q);
  Output result;
  result.out.assign(static_cast<size_t>(input.s_q) * h_q * d_v, 0.0);
  result.lse.assign(static_cast<size_t>(input.s_q) * h_q, -INFINITY);
  result.page_mass.assign(static_cast<size_t>(input.h_kv) * pages, 0.0);
  for (size_t b = 0; b < blocks.size(); ++b) {
    const QueryBlock& block = blocks[b];
    const std::vector<Tier> tiers = block_tiers(input, selection, b, block.pages);
    const bool prefill = input.phase == Phase::prefill;
    const int first_head = prefill ? block.head : block.head * group;
    for (int h = first_head; h < (prefill ? first_head + 1 : first_head + group); ++h) {
      const Head& head = heads[static_cast<size_t>(h / group)];
      const double block_rows = static_cast<double>(block.end_row - block.first_row);
      std::vector<double> mean_mass(static_cast<size_t>(full_pages(input) + 1), 0.0);
      for (int64_t r = block.first_row; r < block.end_row; ++r) {
        const std::vector<double> scores = row_scores(input, head, h, r, tiers);
        const double sink = sink_of(input, h);
        const Softmax row = softmax(scores, sink);
        if (row.sum == 0) continue;
        const size_t at = static_cast<size_t>(r) * h_q + static_cast<size_t>(h);
        const std::vector<double> out = weighted_values(input, head, scores, row, sink, tiers);
        std::copy(out.begin(), out.end(), result.out.begin() + static_cast<int64_t>(at * d_v));
        result.lse[at] = row.max + std::log(row.sum);
        result.mass_above_fp4 += row.sink / row.sum / (rows * input.h_q);  // as exact as 16 bit
        const std::vector<double> shares = page_shares(input, row);
        for (size_t j = 0; j < shares.size(); ++j) {
          mean_mass[j] += shares[j] / block_rows;
          if (j < pages) result.page_mass[static_cast<size_t>(h / group) * pages + j] += shares[j] / (rows * group);
          const bool above = j >= tiers.size() || tiers[j] > Tier::fp4;
          if (above) result.mass_above_fp4 += shares[j] / (rows * input.h_q);
        }
      }
      const double per_head = static_cast<double>(blocks.size()) * (prefill ? 1.0 : group);
      result.error_estimate += block_error(input, head, block, h, tiers, mean_mass) / per_head;
    }
  }
  return result;
}

}  // namespace thriftattn::oracle
