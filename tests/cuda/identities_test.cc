// The identities of docs/design.md, section 6, on a GPU: each holds whatever the numbers are, for a given selection.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "cuda/session.h"

namespace thriftattn::testing {
namespace {

// The same pages walked in another order: p is rounded to FP16 against another running maximum.
constexpr double kReordered = 3e-4;

const Setting kSettings[] = {
    {"d128", 8, 2, 128, 128, 0, 0, false},
    {"d64_window", 4, 2, 64, 64, 100, 0, false},
    {"d80_window_softcap_sinks", 4, 2, 80, 80, 90, 3, true},
    {"d128_group8_sinks", 16, 2, 128, 128, 0, 0, true},
    {"d256_softcap", 4, 2, 256, 256, 0, 4, false},
};
const Step kSteps[] = {{"prefill", Phase::prefill, 500},
                       {"chunk", Phase::prefill, 77},
                       {"decode", Phase::decode, 1},
                       {"verify5", Phase::decode, 5},
                       {"verify16", Phase::decode, 16}};
constexpr int64_t kTokens = 500;

class GpuIdentity : public ::testing::TestWithParam<std::tuple<Step, Setting>> {
 protected:
  void SetUp() override { SKIP_WITHOUT_GPU(); }
  int64_t rows() const { return std::get<0>(GetParam()).rows; }
  Phase phase() const { return std::get<0>(GetParam()).phase; }
  const Setting& setting() const { return std::get<1>(GetParam()); }
  Shape shape() const { return {setting().h_q, setting().h_kv, setting().d, setting().d_v}; }
  size_t d_v() const { return static_cast<size_t>(setting().d_v); }
  Call call() const { return call_of(setting(), phase()); }
  Call given(const Selection& selection) const {
    Call c = call();
    c.given = &selection;
    return c;
  }
  GpuSession session(const std::string& spec, const Tokens& tokens) const {
    GpuSession s(method(spec), tokens);
    s.append(tokens.s - rows());
    s.end_step();
    s.append(rows());
    return s;
  }
  // What the oracle would be asked; its query blocks are those of a selection.
  oracle::Input input(const Tokens& tokens) const {
    oracle::Input in;
    in.s_q = rows();
    in.s_kv = tokens.s;
    in.h_q = tokens.shape.h_q;
    in.h_kv = tokens.shape.h_kv;
    in.d = tokens.shape.d;
    in.d_v = tokens.shape.d_v;
    in.window = setting().window;
    in.phase = phase();
    return in;
  }
  Tokens tokens_ = attention_like(shape(), kTokens);
};
INSTANTIATE_TEST_SUITE_P(Steps, GpuIdentity,
                         ::testing::Combine(::testing::ValuesIn(kSteps), ::testing::ValuesIn(kSettings)),
                         [](const auto& test) {
                           return std::string(std::get<0>(test.param).name) + "_" + std::get<1>(test.param).name;
                         });

TEST_P(GpuIdentity, PromoteAllIsFp16) {
  const Selection all = promote_all(input(tokens_), Tier::fp16);
  const Ran want = session("fp16", tokens_).attend(call());
  for (const char* spec : {"thrift:storage=dual", "topk:budget=0.1", "thrift:storage=dual,format=mxfp4"}) {
    const Ran got = session(spec, tokens_).attend(given(all));
    EXPECT_LE(distance(got.out, want.out, tokens_), kReordered) << spec;
    for (size_t i = 0; i < want.lse.size(); ++i) ASSERT_NEAR(got.lse[i], want.lse[i], 1e-4) << spec;
  }
  EXPECT_LE(distance(session("thrift:storage=dual,budget=1", tokens_).attend(call()).out, want.out, tokens_),
            kReordered);
}

TEST_P(GpuIdentity, PromoteNoneIsFp4BitForBit) {
  const std::pair<const char*, const char*> pairs[] = {{"thrift", "fp4"},
                                                       {"thrift:storage=dual,format=mxfp4", "fp4:format=mxfp4"},
                                                       {"thrift:centring=off", "fp4:centring=off"}};
  const Selection none = promote_none(input(tokens_));
  for (const auto& [promoting, plain] : pairs) {
    const Ran a = session(promoting, tokens_).attend(given(none)), b = session(plain, tokens_).attend(call());
    EXPECT_EQ(a.out, b.out) << promoting;
    EXPECT_EQ(a.lse, b.lse) << promoting;
  }
  // Else the two identities above would say nothing.
  EXPECT_GT(distance(session("fp4", tokens_).attend(call()).out, session("fp16", tokens_).attend(call()).out, tokens_),
            1e-3);
}

// out = merge(attend(promoted), attend(rest)), on whole pages, because every call reads the tail.
TEST_P(GpuIdentity, FusedIsTheMergeOfPromotedAndRest) {
  const Tokens tokens = attention_like(shape(), 64 * 8, 2);
  for (const char* spec : {"thrift", "thrift:storage=dual", "thrift:storage=dual,format=mxfp4"}) {
    GpuSession fused = session(spec, tokens);
    const oracle::Input in = input(tokens);
    const Selection some = random_selection(in, {high_tier(method(spec).storage)});
    Selection promoted_only, rest_only = some;
    promoted_only.first.push_back(0);
    for (Promoted& p : rest_only.pages) p.tier = Tier::none;
    const auto blocks = oracle::query_blocks(in);
    for (size_t b = 0; b < blocks.size(); ++b) {
      for (auto j = static_cast<int32_t>(blocks[b].first_page), i = 0; j < blocks[b].pages; ++j) {
        const int64_t at = some.first[b] + i;
        const bool is_promoted = at < some.first[b + 1] && some.pages[static_cast<size_t>(at)].page == j;
        promoted_only.pages.push_back({j, is_promoted ? some.pages[static_cast<size_t>(at)].tier : Tier::none});
        i += is_promoted;
      }
      promoted_only.first.push_back(static_cast<int64_t>(promoted_only.pages.size()));
    }
    Call without_sinks = given(rest_only);
    without_sinks.sinks = false;  // a sink initialises exactly one state
    const Ran whole = fused.attend(given(some)), top = fused.attend(given(promoted_only)),
              rest = fused.attend(without_sinks);
    std::vector<double> merged(whole.out.size());
    for (size_t row = 0; row < whole.lse.size(); ++row) {
      const double a = top.lse[row], b = rest.lse[row], m = std::max(a, b);
      const double wa = std::exp(a - m), wb = std::exp(b - m);
      ASSERT_NEAR(whole.lse[row], m + std::log(wa + wb), 1e-4) << spec;
      for (size_t i = row * d_v(); i < (row + 1) * d_v(); ++i)
        merged[i] = (wa * top.out[i] + wb * rest.out[i]) / (wa + wb);
    }
    EXPECT_LE(distance(whole.out, merged, tokens), kReordered) << spec;
  }
}

TEST_P(GpuIdentity, PagesMayLieAnywhereInMemory) {
  const Tokens noise = attention_like(shape(), 64 * 4, 99);
  for (const char* spec : {"thrift", "fp16", "thrift:storage=fp4_only"}) {
    GpuSession tidy = session(spec, tokens_);
    // Pages given back in another order than they were taken are then taken in that one.
    GpuSession shuffled(method(spec), {&tokens_, &noise, &noise}, kTokens);
    shuffled.append({0, 256, 190});
    shuffled.end_step();
    shuffled.start_over({0, 2, 1});
    shuffled.append(tokens_.s - rows());
    shuffled.end_step();
    shuffled.append(rows());
    const Ran a = tidy.attend(call()), b = shuffled.attend(call());
    EXPECT_EQ(a.out, b.out) << spec;
    EXPECT_EQ(a.lse, b.lse) << spec;
  }
}

TEST_P(GpuIdentity, RepeatedHeadsEqualGroupedHeads) {
  const int h_q = setting().h_q, h_kv = setting().h_kv, group = h_q / h_kv;
  Tokens wide = tokens_;
  wide.shape.h_kv = h_q;
  const auto repeat = [&](const std::vector<float>& x, int channels) {
    std::vector<float> out;
    for (int64_t t = 0; t < tokens_.s; ++t)
      for (int h = 0; h < h_q; ++h) {
        const auto from = x.begin() + (t * h_kv + h / group) * channels;
        out.insert(out.end(), from, from + channels);
      }
    return out;
  };
  wide.k = repeat(tokens_.k, setting().d);
  wide.v = repeat(tokens_.v, setting().d_v);
  for (const char* spec : {"thrift", "fp16"}) {
    const Selection some =
        spec == std::string("thrift") ? random_selection(input(tokens_), {Tier::fp4x2}) : promote_none(input(tokens_));
    Selection each = some;
    if (phase() == Phase::decode) {
      each = {{0}, {}};
      for (int h = 0; h < h_q; ++h) {
        each.pages.insert(each.pages.end(), some.pages.begin() + some.first[h / group],
                          some.pages.begin() + some.first[h / group + 1]);
        each.first.push_back(static_cast<int64_t>(each.pages.size()));
      }
    }
    const Ran a = session(spec, tokens_).attend(given(some)), b = session(spec, wide).attend(given(each));
    EXPECT_LE(distance(a.out, b.out, tokens_), kReordered) << spec;
  }
}

TEST_P(GpuIdentity, ARerunChangesNoBit) {
  for (const char* spec : {"thrift", "thrift:policy=block_mean", "fp16", "quest"}) {
    GpuSession s = session(spec, tokens_);
    const Ran first = s.attend(call());
    for (int i = 0; i < 3; ++i) {
      const Ran again = s.attend(call());
      ASSERT_EQ(first.out, again.out) << spec;
      ASSERT_EQ(first.lse, again.lse) << spec;
      ASSERT_EQ(first.stats.selection.pages, again.stats.selection.pages) << spec;
    }
  }
}

TEST_P(GpuIdentity, TheNumberOfSplitsOnlyReordersSums) {
  if (phase() == Phase::prefill) return;
  for (const char* spec : {"thrift", "thrift:policy=block_mean", "fp16", "topk"}) {
    GpuSession s = session(spec, tokens_);
    Call one = call();
    one.splits = 1;
    const Ran whole = s.attend(one);
    for (const int splits : {2, 3, 8, 50, 300}) {
      Call many = call();
      many.splits = splits;
      many.given = &whole.stats.selection;
      const Ran parts = s.attend(many);
      EXPECT_LE(distance(parts.out, whole.out, tokens_), kReordered) << spec << ", " << splits;
      for (size_t i = 0; i < whole.lse.size(); ++i) ASSERT_NEAR(parts.lse[i], whole.lse[i], 1e-3) << spec;
    }
  }
}

TEST(GpuChunks, TokenWiseEqualsBulkAppend) {
  SKIP_WITHOUT_GPU();
  for (const Setting& setting : {kSettings[0], kSettings[2]}) {
    const Tokens tokens = attention_like({setting.h_q, setting.h_kv, setting.d, setting.d_v}, 150);
    for (const char* spec : {"thrift", "fp16", "fp4:format=mxfp4", "topk"}) {
      GpuSession bulk(method(spec), tokens), single(method(spec), tokens);
      bulk.append(tokens.s - 1);
      bulk.end_step();
      bulk.append(1);
      for (int64_t t = 0; t < tokens.s; ++t) {
        if (t > 0) single.end_step();
        single.append(1);
      }
      for (const Phase phase : {Phase::decode, Phase::prefill}) {
        Call call;
        call.phase = phase;
        EXPECT_EQ(bulk.attend(call).out, single.attend(call).out) << setting.name << ", " << spec;
      }
    }
  }
}

TEST(GpuChunks, OfWholeBlocksEqualOneShotBitForBit) {
  SKIP_WITHOUT_GPU();
  for (const Setting& setting : kSettings) {
    const Tokens tokens = attention_like({setting.h_q, setting.h_kv, setting.d, setting.d_v}, 64 * 7 + 11);
    for (const char* spec : {"thrift", "thrift:storage=dual", "fp16", "topk", "fp4"}) {
      const auto in_chunks = [&](int64_t chunk) {
        GpuSession session(method(spec), tokens);
        Ran all;
        while (session.length() < tokens.s) {
          session.append(std::min(chunk, tokens.s - session.length()));
          Call call;
          call.window = setting.window;
          call.softcap = setting.softcap;
          call.sinks = setting.sinks;
          const Ran ran = session.attend(call);
          session.end_step();
          all.out.insert(all.out.end(), ran.out.begin(), ran.out.end());
          all.lse.insert(all.lse.end(), ran.lse.begin(), ran.lse.end());
        }
        return all;
      };
      const Ran one = in_chunks(tokens.s);
      for (const int64_t chunk : {64, 192}) {
        const Ran many = in_chunks(chunk);
        EXPECT_EQ(one.out, many.out) << setting.name << ", " << spec << ", chunks of " << chunk;
        EXPECT_EQ(one.lse, many.lse) << setting.name << ", " << spec;
      }
    }
  }
}

// --- whole steps in a CUDA graph

TEST(GpuGraph, StepsReplayedWhileTheSequenceGrowsEqualEagerOnes) {
  SKIP_WITHOUT_GPU();
  const Shape shape{8, 2, 128, 128};
  constexpr int64_t kBefore = 250, kReplays = 80;  // over two page borders
  const Tokens a = attention_like(shape, kBefore + kReplays, 1), b = attention_like(shape, 70 + kReplays, 2);
  for (const char* spec : {"thrift", "thrift:policy=block_mean", "fp4", "fp16", "topk"}) {
    GpuSession eager(method(spec), {&a, &b}), replayed(method(spec), {&a, &b});
    for (GpuSession* s : {&eager, &replayed}) {
      s->append({kBefore, 70});
      s->end_step();
    }
    Call call;
    call.phase = Phase::decode;
    GpuSession::Replay step(&replayed, call);
    for (int64_t i = 0; i < kReplays; ++i) {
      eager.append({1, 1});
      const Ran want = eager.attend(call);
      eager.end_step();
      const Ran got = step.run();
      ASSERT_EQ(got.out, want.out) << spec << ", step " << i;
      ASSERT_EQ(got.lse, want.lse) << spec << ", step " << i;
    }
  }
}

}  // namespace
}  // namespace thriftattn::testing
