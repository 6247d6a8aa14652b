// Which pages a method promotes: candidates, forced pages, the policies' estimates, the budgets.
#include <algorithm>
#include <cmath>
#include <numeric>

#include "oracle/codecs.h"
#include "oracle/oracle.h"
#include "oracle/rows.h"

namespace thriftattn::oracle {

namespace {

int64_t floor_page(int64_t token) {
  return token >= 0 ? token / kPageTokens : -((-token + kPageTokens - 1) / kPageTokens);
}

// The tier in which a storage keeps every page, for ranked promotions.
Tier stored_tier(Storage storage) {
  switch (storage) {
    case Storage::high_only:
    case Storage::dual:
    case Storage::offload:
      return Tier::fp16;
    case Storage::residual:
    case Storage::compact:
      return Tier::fp4x2;
    case Storage::fp4_only:
      break;
  }
  return Tier::none;
}

bool has_16_bit(const Input& input, int64_t page) {
  if (stored_tier(input.method.storage) == Tier::fp16) return true;
  const int64_t before = input.s_kv - input.appended;
  const int64_t recent = std::max({input.method.recent, input.method.force.previous + 1, 2});
  const bool is_sink = page < std::max(1, input.method.force.sink);
  const bool was_recent = page < before / kPageTokens && page >= before / kPageTokens - recent;
  const bool just_filled = (page + 1) * kPageTokens > before;
  return is_sink || was_recent || just_filled;
}

Policy resolved_policy(const Input& input) {
  if (input.method.policy != Policy::automatic) return input.method.policy;
  const bool has_fp4 = input.method.storage != Storage::high_only;
  return input.phase == Phase::decode && has_fp4 ? Policy::fp4_mass : Policy::block_mean;
}

struct Heads {
  int kv, first, end;  // KV head; query heads [first, end) that select together
};
Heads heads_of(const Input& input, const QueryBlock& block) {
  const int group = input.h_q / input.h_kv;
  if (input.phase == Phase::prefill) return {block.head / group, block.head, block.head + 1};
  return {block.head, block.head * group, (block.head + 1) * group};
}

std::vector<double> mean_query(const Input& input, const QueryBlock& block, int query_head) {
  std::vector<double> mean(static_cast<size_t>(input.d), 0.0);
  for (int64_t r = block.first_row; r < block.end_row; ++r) {
    for (int c = 0; c < input.d; ++c)
      mean[static_cast<size_t>(c)] += input.q[(r * input.h_q + query_head) * input.d + c];
  }
  for (double& value : mean) value /= static_cast<double>(block.end_row - block.first_row);
  return mean;
}

double norm(const std::vector<double>& x) { return std::sqrt(std::inner_product(x.begin(), x.end(), x.begin(), 0.0)); }

std::vector<bool> forced_pages(const Input& input, const QueryBlock& block) {
  const Force& force = input.method.force;
  const int64_t first = floor_page(position(input, block.first_row));
  const int64_t last = floor_page(position(input, block.end_row - 1));
  std::vector<bool> forced(static_cast<size_t>(block.pages), false);
  for (int64_t j = block.first_page; j < block.pages; ++j) {
    const bool diagonal = force.diagonal && j >= first && j <= last;
    const bool previous = j < first && j >= first - force.previous;
    forced[static_cast<size_t>(j)] = j < force.sink || diagonal || previous;
  }
  return forced;
}

// The tier in which a forced page is read.
Tier forced_tier(const Input& input, int64_t page) {
  return has_16_bit(input, page) ? Tier::fp16 : stored_tier(input.method.storage);
}

// A score from the block's mean row and what a page's summaries say.
double summary_score(const Input& input, Policy policy, const std::vector<double>& q, const Page& page) {
  double sum = 0, spread = 0;
  for (size_t c = 0; c < q.size(); ++c) {
    sum += policy == Policy::quest ? std::max(q[c] * page.k_min[c], q[c] * page.k_max[c]) : q[c] * page.k_mean[c];
    spread += q[c] * q[c] * page.k_variance[c];
  }
  const double s = input.sm_scale;
  return policy == Policy::second_moment ? s * sum + 0.5 * s * s * spread : s * sum;
}

// The tiers in which fp4_mass and oracle read the pages to weigh them.
std::vector<Tier> weighing_tiers(const Input& input, Policy policy, const std::vector<bool>& forced) {
  std::vector<Tier> tiers;
  for (size_t j = 0; j < forced.size(); ++j) {
    const int64_t page = static_cast<int64_t>(j);
    Tier tier = Tier::fp4;
    if (policy == Policy::oracle || forced[j]) tier = forced_tier(input, page);
    tiers.push_back(tier == Tier::none ? Tier::fp4 : tier);
  }
  return tiers;
}

// Mean over the block's rows of the softmax share of every page.
std::vector<double> mass_scores(const Input& input, const Head& head, const QueryBlock& block, int query_head,
                                const std::vector<Tier>& tiers) {
  std::vector<double> mean(static_cast<size_t>(block.pages), 0.0);
  for (int64_t r = block.first_row; r < block.end_row; ++r) {
    const auto shares =
        page_shares(input, softmax(row_scores(input, head, query_head, r, tiers), sink_of(input, query_head)));
    for (size_t j = 0; j < mean.size(); ++j)
      mean[j] += shares[j] / static_cast<double>(block.end_row - block.first_row);
  }
  return mean;
}

Estimate estimate(const Input& input, const std::vector<Head>& heads, const QueryBlock& block) {
  const Policy policy = resolved_policy(input);
  const Heads group = heads_of(input, block);
  const Head& head = heads[static_cast<size_t>(group.kv)];
  const size_t n = static_cast<size_t>(block.pages);
  Estimate e;
  e.first_page = block.first_page;
  e.forced = forced_pages(input, block);
  const size_t first = static_cast<size_t>(block.first_page);
  e.score.assign(n, -INFINITY);
  if (policy == Policy::none) std::fill(e.score.begin() + block.first_page, e.score.end(), 0.0);
  double q_norm = 0;
  const bool weighs = policy == Policy::fp4_mass || policy == Policy::oracle;
  for (int h = group.first; h < group.end && policy != Policy::none; ++h) {
    const std::vector<double> q = mean_query(input, block, h);
    q_norm = std::max(q_norm, norm(q));
    std::vector<double> scores(n);
    if (weighs) {
      scores = mass_scores(input, head, block, h, weighing_tiers(input, policy, e.forced));
    } else {
      for (size_t j = 0; j < n; ++j) {
        scores[j] = policy == Policy::recent ? static_cast<double>(j) : summary_score(input, policy, q, head.pages[j]);
      }
    }
    for (size_t j = first; j < n; ++j) e.score[j] = std::max(e.score[j], scores[j]);
  }
  std::vector<double> logits;  // a soft-cap bends what a page's score is worth, not which is larger
  for (double score : e.score) logits.push_back(capped(input, score));
  for (size_t j = 0; j < first; ++j) logits[j] = -INFINITY;
  const Softmax soft = softmax(logits);
  const double total = std::accumulate(e.score.begin() + block.first_page, e.score.end(), 0.0);
  for (size_t j = 0; j < n; ++j) {
    const Page& page = head.pages[j];
    const double share = weighs ? (total > 0 ? e.score[j] / total : 0.0) : soft.p[j] / soft.sum;
    e.share.push_back(j < first ? 0.0 : share);
    const double per_mass = std::fabs(input.sm_scale) * q_norm * page.eps_k * page.v_norm + page.eps_v;
    e.contribution.push_back(e.share[j] * per_mass);
  }
  return e;
}

int64_t round_half_up(double x) { return static_cast<int64_t>(std::floor(x + 0.5)); }

// Pages to promote, forced ones included, where the budget is a number.
int64_t budget_pages(const Input& input, int64_t n, int64_t forced) {
  const Budget& budget = input.method.budget;
  const int64_t all = full_pages(input);
  int64_t k = 0;
  switch (budget.kind) {
    case Budget::Kind::fraction:
      k = round_half_up(budget.value * static_cast<double>(n));
      break;
    case Budget::Kind::paper: {
      const double f = budget.value, pages = static_cast<double>(all), b = 2 * pages + 1;
      const bool triangle = input.phase == Phase::prefill && input.causal;
      k = round_half_up(triangle ? (b - std::sqrt(b * b - 4 * f * pages * (pages + 1))) / 2 : f * pages);
      k = std::min(std::clamp<int64_t>(k, 1, std::max<int64_t>(all, 1)), n);
      break;
    }
    case Budget::Kind::top_k:
      k = std::min(static_cast<int64_t>(budget.value), n);
      break;
    case Budget::Kind::per64:
      k = std::min(std::max<int64_t>(n / 64, 1), n);
      break;
    case Budget::Kind::all:
    case Budget::Kind::mass:
    case Budget::Kind::tolerance:
      break;
  }
  return std::max(k, forced);
}

// Forced pages first, then by rank, as far as the budget goes.
std::vector<int64_t> chosen_pages(const Input& input, const Estimate& e) {
  const Budget& budget = input.method.budget;
  const int64_t n = static_cast<int64_t>(e.score.size()) - e.first_page;
  const auto& rank = budget.kind == Budget::Kind::tolerance ? e.contribution : e.score;
  std::vector<int64_t> order(static_cast<size_t>(n));
  std::iota(order.begin(), order.end(), e.first_page);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    const size_t i = static_cast<size_t>(a), j = static_cast<size_t>(b);
    if (e.forced[i] != e.forced[j]) return static_cast<bool>(e.forced[i]);
    return !e.forced[i] && rank[i] > rank[j];
  });
  const int64_t forced = std::count(e.forced.begin(), e.forced.end(), true);
  const int64_t k = budget_pages(input, n, forced);
  double share = 0, left = std::accumulate(e.contribution.begin(), e.contribution.end(), 0.0);
  std::vector<int64_t> chosen;
  for (int64_t page : order) {
    const size_t j = static_cast<size_t>(page);
    bool enough = static_cast<int64_t>(chosen.size()) >= k;
    if (budget.kind == Budget::Kind::mass) enough = share >= budget.value;
    if (budget.kind == Budget::Kind::tolerance) enough = left < budget.value;
    if (enough && !e.forced[j]) break;
    chosen.push_back(page);
    share += e.share[j];
    left -= e.contribution[j];
  }
  std::sort(chosen.begin(), chosen.end());
  return chosen;
}

}  // namespace

std::vector<QueryBlock> query_blocks(const Input& input) {
  std::vector<QueryBlock> blocks;
  const int heads = input.phase == Phase::prefill ? input.h_q : input.h_kv;
  for (int h = 0; h < heads; ++h) {
    for (int64_t row = 0; row < input.s_q;) {
      QueryBlock block{h, row, input.s_q, 0};
      if (input.phase == Phase::prefill) {
        const int64_t end = (floor_page(position(input, row)) + 1) * kPageTokens - position(input, 0);
        block.end_row = std::min(end, input.s_q);
      }
      block.pages = std::min(full_pages(input), floor_page(end_token(input, block.end_row - 1) - 1) + 1);
      block.pages = std::max<int64_t>(block.pages, 0);
      block.first_page = std::min(block.pages, floor_page(first_token(input, row)));
      row = block.end_row;
      blocks.push_back(block);
    }
  }
  return blocks;
}

std::vector<Estimate> estimates(const Input& input) {
  const std::vector<Head> heads = build_heads(input);
  std::vector<Estimate> all;
  for (const QueryBlock& block : query_blocks(input)) all.push_back(estimate(input, heads, block));
  return all;
}

Selection select(const Input& input) {
  Selection selection;
  selection.first.push_back(0);
  const bool nothing = input.method.budget.kind == Budget::Kind::all;
  const auto all = nothing ? std::vector<Estimate>(query_blocks(input).size()) : estimates(input);
  for (const Estimate& e : all) {
    for (int64_t page : chosen_pages(input, e)) {
      const bool forced = e.forced[static_cast<size_t>(page)];
      const Tier tier = forced ? forced_tier(input, page) : stored_tier(input.method.storage);
      if (tier != Tier::none) selection.pages.push_back({static_cast<int32_t>(page), tier});
    }
    selection.first.push_back(static_cast<int64_t>(selection.pages.size()));
  }
  return selection;
}

}  // namespace thriftattn::oracle
