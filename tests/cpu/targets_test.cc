// Every instruction set that this machine runs computes the same attention.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "attention/agreement.h"
#include "cpu/kernels.h"

namespace thriftattn::testing {
namespace {

class Target : public ::testing::TestWithParam<std::string> {};
INSTANTIATE_TEST_SUITE_P(Cpu, Target, ::testing::ValuesIn(register_targets()),
                         [](const auto& target) { return target.param; });

TEST_P(Target, AgreesWithTheOracle) {
  // Head sizes that fill a step of registers and that do not, under masks that meet them here and there.
  const Shape shapes[] = {{4, 2, 64, 64}, {3, 1, 128, 128}, {8, 1, 64, 128}, {2, 1, 80, 96}, {2, 1, 256, 16}};
  for (const Shape& shape : shapes) {
    const Tokens tokens = attention_like(shape, 64 * 4 + 37, 6);
    for (const char* spec : {"fp16", "fp4", "fp4:format=mxfp4", "fp4:scales=4over6,centring=off", "thrift",
                             "thrift:storage=dual", "quest", "thrift:policy=second_moment"}) {
      for (const auto& [phase, rows] :
           {std::pair{Phase::prefill, 100}, std::pair{Phase::decode, 1}, std::pair{Phase::decode, 5}}) {
        Session session(method(spec), tokens);
        session.append(tokens.s - rows);
        session.settle();
        session.append(rows);
        Call call;
        call.phase = phase;
        call.stats = true;
        call.window = shape.d_v == 96 ? 110 : 0;
        call.softcap = shape.d == 80 ? 5.0f : 0.0f;
        call.sinks = shape.d == 256;
        call.target = GetParam();
        const Ran ran = session.attend(rows, call);
        ASSERT_EQ(ran.plan.target, GetParam());
        const oracle::Input input = session.oracle_input(rows, call);
        expect_output(ran, oracle::attend(input, ran.stats.selection), tokens, input, spec);
      }
    }
  }
}

TEST_P(Target, KthLargestIsWhatASortPutsThere) {
  std::mt19937 random(3);
  for (const int64_t n : {1, 2, 15, 16, 17, 63, 200, 2048}) {
    std::vector<float> x(static_cast<size_t>(n)), sorted;
    std::vector<int32_t> scratch(x.size());
    for (int kind = 0; kind < 4; ++kind) {
      for (float& value : x) {
        const float some = static_cast<float>(static_cast<int>(random() % 2001) - 1000);
        value = kind == 0   ? some * 1e-30f
                : kind == 1 ? std::round(some / 400)
                : kind == 2 ? -std::exp(some / 100)
                            : some;
        if (kind == 3 && random() % 3 == 0) value = random() % 2 ? -INFINITY : INFINITY;
        if (kind == 3 && random() % 5 == 0) value = random() % 2 ? -0.0f : 0.0f;
      }
      sorted = x;
      std::sort(sorted.begin(), sorted.end(), std::greater<>());
      for (const int64_t k : {int64_t{1}, (n + 19) / 20, (n + 1) / 2, n})
        EXPECT_EQ(cpu::kernels_for(GetParam())->kth_largest(x.data(), n, k, scratch.data()),
                  sorted[static_cast<size_t>(k - 1)])
            << "kind " << kind << ", " << k << " of " << n;
    }
  }
}

// Quantised q and p may fall on the other side of a rounding border now and then, and then differ by a code.
TEST_P(Target, AgreesWithTheOracleInMma4) {
  const Tokens tokens = attention_like({4, 2, 64, 64}, 64 * 4 + 37, 7);
  for (const char* spec :
       {"paper-fp4", "fp4:arithmetic=mma4", "fp4:arithmetic=mma4,format=mxfp4", "paper-fp4:p_quant=constant"}) {
    Session session(method(spec), tokens);
    session.append(tokens.s);
    Call call;
    call.target = GetParam();
    const Ran ran = session.attend(100, call);
    const oracle::Input input = session.oracle_input(100, call);
    const oracle::Output want = oracle::attend(input, promote_none(input));
    EXPECT_LE(distance(ran.out, want.out, tokens), 0.03) << spec;
    size_t far = 0;
    for (size_t i = 0; i < want.out.size(); ++i) far += std::fabs(ran.out[i] - want.out[i]) > 10 * kFp32Error;
    EXPECT_LE(far, want.out.size() / 50) << spec;
  }
}

TEST_P(Target, ChoosesTheSamePagesAsTheFirstTarget) {
  const Tokens tokens = attention_like({4, 2, 64, 64}, 64 * 9, 8);
  for (const char* spec :
       {"thrift:budget=0.4", "thrift:policy=quest,budget=0.4", "thrift:policy=second_moment,budget=0.4"}) {
    for (const Phase phase : {Phase::prefill, Phase::decode}) {
      Session session(method(spec), tokens);
      session.append(tokens.s);
      Call first, here;
      first.phase = here.phase = phase;
      here.target = GetParam();
      const int64_t rows = phase == Phase::prefill ? 200 : 2;
      const Selection a = session.selection(rows, first), b = session.selection(rows, here);
      EXPECT_EQ(a.first, b.first) << spec;
      EXPECT_EQ(a.pages, b.pages) << spec;
    }
  }
}

}  // namespace
}  // namespace thriftattn::testing
