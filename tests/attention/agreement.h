// What it means that a kernel and the oracle agree.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "attention/session.h"

namespace thriftattn::testing {

// Pages whose ranks differ by less than this, relative to the largest score, may be exchanged.
inline constexpr double kTie = 1e-5, kIntegerTie = 2e-4;

// FP32 kernels: exp2 of scores of a few tens, sums over some hundred tokens; the straightforward FP32 loop of
// oracle_agreement_test.cc stays under a third of it.
inline constexpr double kFp32Error = 1e-5;

// Decode steps that read FP4 as integers: q and p in 16 bits. IntegersAgainstHalfPrecision in oracle_agreement_test.cc
// is their yardstick; lse errs by a rounding of q times the score.
inline constexpr double kIntegerError = 1e-4, kIntegerLseError = 3e-5;

inline bool on_integers(const oracle::Input& input) {
  return input.phase == Phase::decode && input.method.arithmetic != Arithmetic::mma4 &&
         input.method.storage != Storage::high_only;
}

// Where the kernel's selection and the oracle's differ, only near-ties may be the reason.
inline void expect_same_selection(const Selection& got, const oracle::Input& input, const std::string& what,
                                  double tie) {
  const Selection want = oracle::select(input);
  if (got.first == want.first && got.pages == want.pages) return;
  const std::vector<oracle::Estimate> estimates = oracle::estimates(input);
  ASSERT_EQ(got.first.size(), want.first.size()) << what;
  for (size_t b = 0; b + 1 < want.first.size(); ++b) {
    const auto pages = [b](const Selection& s) {
      return std::vector<Promoted>(s.pages.begin() + s.first[b], s.pages.begin() + s.first[b + 1]);
    };
    const std::vector<Promoted> ours = pages(got), theirs = pages(want);
    if (ours == theirs) continue;
    const bool by_error = input.method.budget.kind == Budget::Kind::tolerance;
    const auto& rank = by_error ? estimates[b].contribution : estimates[b].score;
    double largest = 0;
    for (double r : rank) largest = std::isfinite(r) ? std::max(largest, std::fabs(r)) : largest;
    // The weakest page that the oracle promotes by rank; every page exchanged must be as weak or as strong as it.
    double border = INFINITY;
    for (const Promoted& p : theirs) {
      const size_t j = static_cast<size_t>(p.page);
      if (!estimates[b].forced[j]) border = std::min(border, rank[j]);
    }
    EXPECT_EQ(ours.size(), theirs.size()) << what << ", block " << b;
    std::string list;
    for (const auto& [a, c] : {std::pair{&ours, &theirs}, std::pair{&theirs, &ours}}) {
      list += list.empty() ? "got" : ", oracle";
      for (const Promoted& p : *a) {
        list.append(" ").append(std::to_string(p.page)).append(":").append(to_string(p.tier));
        const bool in_both = std::find(c->begin(), c->end(), p) != c->end();
        if (in_both || std::fabs(rank[static_cast<size_t>(p.page)] - border) <= tie * largest) continue;
        ADD_FAILURE() << what << ", block " << b << ": page " << p.page << " " << to_string(p.tier)
                      << (a == &ours ? " is promoted, not by the oracle" : " is promoted by the oracle only")
                      << "; score " << rank[static_cast<size_t>(p.page)] << ", border " << border;
      }
    }
    if (::testing::Test::HasNonfatalFailure()) FAIL() << what << ", block " << b << ": " << list;
  }
}

inline void expect_same_selection(const Selection& got, const oracle::Input& input, const std::string& what) {
  expect_same_selection(got, input, what, on_integers(input) ? kIntegerTie : kTie);
}

// In mma4 a p next to a rounding border may fall on either side of it, because FP32 and double disagree on p: one code
// of one token, rarely. Most elements must be as near as in kv4, all within what some codes can do.
inline void expect_output(const Ran& ran, const oracle::Output& want, const Tokens& tokens, const oracle::Input& input,
                          const std::string& what) {
  const bool integers = on_integers(input);
  const double lse_error = integers ? kIntegerLseError : 1e-5;
  for (size_t i = 0; i < want.lse.size(); ++i) {
    if (std::isinf(want.lse[i])) {
      EXPECT_EQ(ran.lse[i], want.lse[i]) << what;
    } else {
      EXPECT_NEAR(ran.lse[i], want.lse[i], lse_error * std::max(1.0, std::fabs(want.lse[i]))) << what << ", row " << i;
    }
  }
  if (input.method.arithmetic != Arithmetic::mma4) {
    EXPECT_LE(distance(ran.out, want.out, tokens), integers ? kIntegerError : kFp32Error) << what;
    return;
  }
  EXPECT_LE(distance(ran.out, want.out, tokens), 0.03) << what;
  size_t far = 0;
  for (size_t i = 0; i < want.out.size(); ++i) far += std::fabs(ran.out[i] - want.out[i]) > 10 * kFp32Error;
  EXPECT_LE(static_cast<double>(far), 0.02 * static_cast<double>(want.out.size()) + 64) << what;
}

}  // namespace thriftattn::testing
