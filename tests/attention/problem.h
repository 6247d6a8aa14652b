// Problems that plan is asked about, and what it says where it refuses: both backends' plan tests share them.
#pragma once

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "attention/session.h"

namespace thriftattn::testing {

// Of one layer in four, with a cache made for the method.
inline Problem problem_for(const std::string& spec, Phase phase, const Shape& shape, int64_t max_s_kv) {
  Problem p;
  p.phase = phase;
  p.max_s_q = phase == Phase::decode ? 1 : 512;
  p.max_s_kv = max_s_kv;
  p.h_q = shape.h_q;
  p.h_kv = shape.h_kv;
  p.d = shape.d;
  p.d_v = shape.d_v;
  p.method = method(spec);
  p.cache = CacheConfig::for_method(p.method, 4, shape.h_kv, shape.d, shape.d_v);
  return p;
}

// The refusal is one line that has all of `words`.
inline void expect_refusal(const Problem& problem, const Machine& machine, const std::vector<std::string>& words) {
  const auto planned = plan(problem, machine);
  ASSERT_FALSE(planned.ok()) << words[0];
  const std::string& message = planned.status().message();
  for (const std::string& word : words) EXPECT_NE(message.find(word), std::string::npos) << word << " in: " << message;
  EXPECT_EQ(message.find('\n'), std::string::npos) << message;
}

}  // namespace thriftattn::testing
