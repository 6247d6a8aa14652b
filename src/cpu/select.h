// Choosing the pages of one query block from their scores.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/kernels.h"
#include "format/params.h"
#include "format/selection.h"

namespace thriftattn::cpu {

// Scratch of one choice, sized for the longest sequence.
struct Choice {
  explicit Choice(int64_t max_pages)
      : score(max_pages),
        share(max_pages),
        contribution(max_pages),
        mass(max_pages),
        order(max_pages),
        tier(max_pages),
        promoted(max_pages) {}
  std::vector<float> score;         // of the policy, or its estimated mass where the policy estimates mass itself
  std::vector<float> share;         // estimated share of the softmax mass
  std::vector<float> contribution;  // estimated error of reading the page in fp4
  std::vector<float> mass;          // scratch of the ranking by mass, then of the choice
  std::vector<int32_t> order;       // scratch
  std::vector<Tier> tier;
  std::vector<Promoted> promoted;  // the result: `count` pages, ascending
  int64_t count = 0;
  int64_t wanted_not_stored = 0;

  std::span<const Promoted> result() const { return {promoted.data(), static_cast<size_t>(count)}; }
};

// Marks the forced pages alone, as `promoted`.
void choose_forced(const Method& method, const BlockPages& block, const PageRef* pages, Choice& choice);

// Chooses by choice.score[block.first_visible, block.visible). q_norm is |q_mean|, for the error estimate. Ties go to
// the lower page.
void choose(const Problem& problem, const Kernels& kernels, const BlockPages& block, const PageRef* pages, float q_norm,
            Choice& choice);

}  // namespace thriftattn::cpu
