#include "cpu/select.h"

#include <algorithm>
#include <cmath>

namespace thriftattn::cpu {
namespace {

// Fills `share`: policies that measure mass have it as their score, the others by a softmax over pages.
void estimate_shares(const Problem& problem, const BlockPages& block, Choice& c) {
  if (block.n() == 0) return;
  double total = 0;
  const Policy policy = problem.method.policy;
  const bool is_mass = policy == Policy::fp4_mass || policy == Policy::oracle;
  const float cap = problem.softcap;  // it bends what a page's score is worth, not which is larger
  const auto capped = [cap](float score) { return cap > 0 ? cap * std::tanh(score / cap) : score; };
  const float top = capped(*std::max_element(c.score.begin() + block.first_visible, c.score.begin() + block.visible));
  for (int64_t p = block.first_visible; p < block.visible; ++p) {
    c.share[p] = is_mass ? c.score[p] : std::exp(capped(c.score[p]) - top);
    total += c.share[p];
  }
  for (int64_t p = block.first_visible; p < block.visible; ++p)
    c.share[p] = total > 0 ? static_cast<float>(c.share[p] / total) : 0.0f;
}

// Turns the marks in choice.tier into the list of promoted pages.
void collect(const Method& method, const BlockPages& block, Choice& c) {
  c.count = 0;
  for (int64_t p = block.first_visible; p < block.visible; ++p)
    if (c.tier[p] != method.rest) c.promoted[c.count++] = {static_cast<int32_t>(p), c.tier[p]};
}

// Marks the forced pages; returns how many there are.
int64_t mark_forced(const Method& method, const BlockPages& block, const PageRef* pages, Choice& c) {
  int64_t forced = 0;
  c.wanted_not_stored = 0;
  for (int64_t p = block.first_visible; p < block.visible; ++p) {
    c.tier[p] = method.rest;
    if (!is_forced(method.force, block, p)) continue;
    ++forced;
    c.tier[p] = forced_tier(method.rest, pages[p].high != nullptr, pages[p].residual != nullptr);
    c.wanted_not_stored += c.tier[p] != Tier::fp16 && c.tier[p] == method.rest;
  }
  return forced;
}

}  // namespace

void choose_forced(const Method& method, const BlockPages& block, const PageRef* pages, Choice& c) {
  mark_forced(method, block, pages, c);
  collect(method, block, c);
}

void choose(const Problem& problem, const BlockPages& block, const PageRef* pages, float q_norm, Choice& c) {
  const Method& m = problem.method;
  const int64_t first = block.first_visible, end_page = block.visible;
  const int64_t forced = mark_forced(m, block, pages, c);
  const Tier high = high_tier(m.storage);
  const bool by_mass = m.budget.kind == Budget::Kind::mass, by_error = m.budget.kind == Budget::Kind::tolerance;
  if (by_mass || by_error) estimate_shares(problem, block, c);
  if (by_error)
    for (int64_t p = first; p < end_page; ++p)
      c.contribution[p] = error_contribution(summary_of(pages[p]), c.share[p], problem.sm_scale, q_norm);

  // Candidates in rank order, as far as the budget may need them.
  int64_t candidates = 0;
  for (int64_t p = first; p < end_page; ++p)
    if (!is_forced(m.force, block, p)) c.order[candidates++] = static_cast<int32_t>(p);
  float* key = by_error ? c.contribution.data() : c.score.data();
  for (int64_t p = first; p < end_page; ++p)  // what compares with nothing has no order that a sort could keep to
    if (std::isnan(key[p])) key[p] = -INFINITY;
  const auto before = [key](int32_t a, int32_t b) { return key[a] > key[b] || (key[a] == key[b] && a < b); };
  const auto begin = c.order.begin(), end = begin + candidates;

  int64_t take = 0;
  if (by_mass || by_error) {
    std::sort(begin, end, before);
    const float* weight = by_mass ? c.share.data() : c.contribution.data();
    double taken = 0, left = 0;
    for (int64_t p = first; p < end_page; ++p) (is_forced(m.force, block, p) ? taken : left) += weight[p];
    const auto enough = [&] { return by_mass ? taken >= m.budget.value : left < m.budget.value; };
    for (; take < candidates && !enough(); ++take) {
      taken += weight[c.order[take]];
      left -= weight[c.order[take]];
    }
  } else {
    const bool one_k = problem.phase == Phase::prefill && problem.causal;
    take = std::min(candidates, budget_pages(m.budget, block, forced, one_k) - forced);
    if (take > 0 && take < candidates) std::nth_element(begin, begin + take - 1, end, before);
  }
  for (int64_t i = 0; i < take; ++i) {
    if (high == Tier::none) {
      ++c.wanted_not_stored;
    } else {
      c.tier[c.order[i]] = high;
    }
  }
  collect(m, block, c);
}

}  // namespace thriftattn::cpu
