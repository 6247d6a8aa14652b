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
  const ForcedPages forced = forced_pages(method.force, block);
  c.wanted_not_stored = 0;
  std::fill(c.tier.begin() + block.first_visible, c.tier.begin() + block.visible, method.rest);
  forced.for_each(block, [&](int64_t p) {
    c.tier[p] = forced_tier(method.rest, pages[p].high != nullptr, pages[p].residual != nullptr);
    c.wanted_not_stored += c.tier[p] != Tier::fp16 && c.tier[p] == method.rest;
  });
  return forced.count(block);
}

}  // namespace

void choose_forced(const Method& method, const BlockPages& block, const PageRef* pages, Choice& c) {
  mark_forced(method, block, pages, c);
  collect(method, block, c);
}

void choose(const Problem& problem, const Kernels& kernels, const BlockPages& block, const PageRef* pages, float q_norm,
            Choice& c) {
  const Method& m = problem.method;
  const int64_t first = block.first_visible, end_page = block.visible;
  const int64_t forced = mark_forced(m, block, pages, c);
  const Tier high = high_tier(m.storage);
  const bool by_mass = m.budget.kind == Budget::Kind::mass, by_error = m.budget.kind == Budget::Kind::tolerance;
  if (weighs_pages(m.budget)) estimate_shares(problem, block, c);
  if (by_error)
    for (int64_t p = first; p < end_page; ++p)
      c.contribution[p] = error_contribution(summary_of(pages[p]), c.share[p], problem.sm_scale, q_norm);

  float* key = by_error ? c.contribution.data() : c.score.data();
  for (int64_t p = first; p < end_page; ++p)  // what compares with nothing has no order that a choice could keep to
    if (std::isnan(key[p])) key[p] = -INFINITY;
  const auto promote = [&](int64_t page) {
    if (high == Tier::none) {
      ++c.wanted_not_stored;
    } else {
      c.tier[page] = high;
    }
  };
  if (weighs_pages(m.budget)) {
    int64_t n = 0;
    for (int64_t p = first; p < end_page; ++p)
      if (!is_forced(m.force, block, p)) c.order[n++] = static_cast<int32_t>(p);
    std::sort(c.order.begin(), c.order.begin() + n,
              [key](int32_t a, int32_t b) { return key[a] > key[b] || (key[a] == key[b] && a < b); });
    const float* weight = by_mass ? c.share.data() : c.contribution.data();
    double taken = 0, left = 0;
    for (int64_t p = first; p < end_page; ++p) (is_forced(m.force, block, p) ? taken : left) += weight[p];
    const auto enough = [&] { return by_mass ? taken >= m.budget.value : left < m.budget.value; };
    for (int64_t i = 0; i < n && !enough(); ++i) {
      taken += weight[c.order[i]];
      left -= weight[c.order[i]];
      promote(c.order[i]);
    }
  } else {
    const bool one_k = problem.phase == Phase::prefill && problem.causal;
    const int64_t take = std::min(block.n() - forced, budget_pages(m.budget, block, forced, one_k) - forced);
    if (take > 0) {
      std::copy(key + first, key + end_page, c.mass.begin() + first);
      forced_pages(m.force, block).for_each(block, [&](int64_t p) { c.mass[p] = -INFINITY; });  // no candidates
      const float last = kernels.kth_largest(&c.mass[first], block.n(), take, c.order.data());
      int64_t equal = take;  // of those that equal the last one, what the larger ones leave
      for (int64_t p = first; p < end_page; ++p) equal -= c.mass[p] > last;
      for (int64_t p = first; p < end_page; ++p)
        if (key[p] >= last && !is_forced(m.force, block, p) && (key[p] > last || equal-- > 0)) promote(p);
    }
  }
  collect(m, block, c);
}

}  // namespace thriftattn::cpu
