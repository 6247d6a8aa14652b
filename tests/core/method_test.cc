#include "thriftattn/method.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <vector>

namespace thriftattn {
namespace {

// Every option written out, as one spec.
std::string full_spec(const Method& method) {
  std::string spec = method.name;
  char separator = ':';
  for (const auto& [key, value] : options(method)) {
    spec += separator + key + "=" + value;
    separator = ',';
  }
  return spec;
}

const char* const kSpecs[] = {
    "thrift:budget=0.02,storage=dual",
    "thrift:budget=0",
    "thrift:budget=0.1",
    "thrift:budget=1",
    "thrift:budget=paper:0.05",
    "thrift:budget=top_k:16",
    "thrift:budget=per64",
    "thrift:budget=mass:0.95",
    "thrift:budget=tolerance:0.001",
    "thrift:budget=tolerance:1e-09",
    "thrift:policy=quest",
    "thrift:policy=second_moment",
    "thrift:policy=block_mean",
    "thrift:policy=fp4_mass",
    "thrift:policy=recent",
    "thrift:policy=oracle",
    "thrift:rest=none",
    "thrift:force=none",
    "thrift:force=sink:2",
    "thrift:force=diagonal",
    "thrift:force=sink:4+previous:3",
    "thrift:centring=off,page_scale=off",
    "thrift:arithmetic=kv4",
    "thrift:arithmetic=mma4,p_quant=constant",
    "thrift:storage=fp4_only",
    "thrift:format=mxfp4",
    "thrift:scales=4over6",
    "thrift:recent=8",
    "topk:budget=top_k:3,force=none",
    "window:recent=5",
    "fp4:arithmetic=mma8",
};

TEST(Method, EveryNameParsesToItselfAndPrintsAsItself) {
  ASSERT_EQ(method_names(),
            (std::vector<std::string>{"fp16", "fp4", "thrift", "paper-fp4", "paper", "topk", "quest", "window"}));
  for (const std::string& name : method_names()) {
    const auto method = parse_method(name);
    ASSERT_TRUE(method.ok()) << method.status().message();
    EXPECT_EQ(method->name, name);
    EXPECT_EQ(to_string(*method), name);
  }
}

TEST(Method, TableOfTheDesign) {
  const Force usual{1, true, 1};
  const Method fp16 = *parse_method("fp16"), fp4 = *parse_method("fp4"), thrift = *parse_method("thrift");
  EXPECT_EQ(fp16.budget.kind, Budget::Kind::all);
  EXPECT_EQ(fp16.rest, Tier::fp16);
  EXPECT_EQ(fp16.storage, Storage::high_only);
  EXPECT_EQ(fp4.policy, Policy::none);
  EXPECT_EQ(fp4.budget, (Budget{Budget::Kind::fraction, 0}));
  EXPECT_EQ(fp4.force, Force{});
  EXPECT_TRUE(fp4.centring && fp4.page_scale);
  EXPECT_EQ(fp4.storage, Storage::fp4_only);
  EXPECT_EQ(thrift.policy, Policy::automatic);
  EXPECT_EQ(thrift.budget, (Budget{Budget::Kind::fraction, 0.05}));
  EXPECT_EQ(thrift.rest, Tier::fp4);
  EXPECT_EQ(thrift.force, usual);
  EXPECT_TRUE(thrift.centring && thrift.page_scale);
  EXPECT_EQ(thrift.arithmetic, Arithmetic::automatic);
  EXPECT_EQ(thrift.storage, Storage::residual);
  for (const char* name : {"paper-fp4", "paper"}) {
    const Method paper = *parse_method(name);
    EXPECT_FALSE(paper.centring || paper.page_scale) << name;
    EXPECT_EQ(paper.arithmetic, Arithmetic::mma4);
    EXPECT_EQ(paper.force, Force{});
  }
  EXPECT_EQ(parse_method("paper-fp4")->budget, fp4.budget);
  EXPECT_EQ(parse_method("paper-fp4")->storage, Storage::fp4_only);
  EXPECT_EQ(parse_method("paper")->policy, Policy::block_mean);
  EXPECT_EQ(parse_method("paper")->budget, (Budget{Budget::Kind::paper, 0.05}));
  EXPECT_EQ(parse_method("paper")->storage, Storage::dual);
  const std::pair<const char*, Policy> skipping[] = {
      {"topk", Policy::block_mean}, {"quest", Policy::quest}, {"window", Policy::recent}};
  for (const auto& [name, policy] : skipping) {
    const Method method = *parse_method(name);
    EXPECT_EQ(method.policy, policy);
    EXPECT_EQ(method.rest, Tier::none);
    EXPECT_EQ(method.budget, thrift.budget);
    EXPECT_EQ(method.force, usual);
    EXPECT_EQ(method.storage, Storage::high_only);
  }
}

TEST(Method, EverySpecComesBackFromItsOptionsAndFromItsShortestForm) {
  std::vector<std::string> specs(std::begin(kSpecs), std::end(kSpecs));
  for (const std::string& name : method_names()) specs.push_back(name);
  for (const std::string& spec : specs) {
    const auto method = parse_method(spec);
    ASSERT_TRUE(method.ok()) << method.status().message();
    for (const std::string& again : {full_spec(*method), to_string(*method)}) {
      const auto back = parse_method(again);
      ASSERT_TRUE(back.ok()) << spec << " -> " << again << ": " << back.status().message();
      EXPECT_TRUE(*back == *method) << spec << " -> " << again;
    }
    EXPECT_EQ(to_string(*method), spec);
  }
}

TEST(Method, DefaultsNeedNotBeWritten) {
  EXPECT_EQ(to_string(*parse_method("thrift:storage=residual,budget=0.050")), "thrift");
  EXPECT_EQ(*parse_method("thrift:force=sink+diagonal+previous"), *parse_method("thrift"));
}

TEST(Method, TheRecentWindowCoversForcedPages) {
  EXPECT_EQ(parse_method("thrift:force=previous:5")->recent, 6);
  EXPECT_EQ(parse_method("thrift:recent=0")->recent, 2);
  EXPECT_EQ(parse_method("thrift:recent=9")->recent, 9);
}

struct Refused {
  const char* spec;
  std::vector<const char*> words;  // the message names them all
};

TEST(Method, ErrorsNameTheValueAndWhatIsSupported) {
  const Refused refused[] = {
      {"", {"''", "thrift", "paper-fp4"}},
      {"Thrift", {"'Thrift'", "fp16, fp4, thrift"}},
      {"thrift:bugdet=1", {"'bugdet'", "budget", "force", "p_quant", "recent"}},
      {"thrift:budget", {"'budget'", "key=value"}},
      {"thrift:", {"key=value"}},
      {"thrift:budget=0.1,", {"key=value"}},
      {"thrift:budget=0.1,budget=0.2", {"'budget'", "twice"}},
      {"thrift:policy=best", {"policy=best", "block_mean", "fp4_mass"}},
      {"thrift:budget=1.5", {"1.5", "[0, 1]"}},
      {"thrift:budget=-0.1", {"-0.1", "[0, 1]"}},
      {"thrift:budget=nan", {"nan", "[0, 1]"}},
      {"thrift:budget=", {"budget=", "[0, 1]"}},
      {"thrift:budget=5%", {"5%", "[0, 1]"}},
      {"thrift:budget=mass:2", {"mass:2", "mass:P"}},
      {"thrift:budget=paper:-1", {"paper:-1", "paper:F"}},
      {"thrift:budget=tolerance:-1", {"tolerance:-1"}},
      {"thrift:budget=top_k:-1", {"top_k:-1", "top_k:K"}},
      {"thrift:budget=top_k:1.5", {"top_k:1.5", "top_k:K"}},
      {"thrift:budget=topk:3", {"topk:3", "top_k:K"}},
      {"thrift:rest=fp8", {"rest=fp8", "none, fp4, fp16"}},
      {"thrift:force=tail", {"'tail'", "sink:N", "diagonal", "previous:N"}},
      {"thrift:force=sink:-1", {"sink:-1"}},
      {"thrift:force=", {"force="}},
      {"thrift:centring=yes", {"centring=yes", "on, off"}},
      {"thrift:page_scale=1", {"page_scale=1", "on, off"}},
      {"thrift:arithmetic=fp8", {"arithmetic=fp8", "kv4"}},
      {"thrift:storage=full", {"storage=full", "residual"}},
      {"thrift:storage=compact", {"storage=compact", "residual"}},
      {"thrift:format=fp4", {"format=fp4", "nvfp4, mxfp4"}},
      {"thrift:scales=4", {"scales=4", "4over6"}},
      {"thrift:p_quant=none", {"p_quant=none", "two_level"}},
      {"thrift:recent=-1", {"recent=-1"}},
      // Contradictions name both sides.
      {"thrift:storage=high_only", {"rest=fp4", "storage=high_only"}},
      {"topk:policy=fp4_mass", {"policy=fp4_mass", "storage=high_only"}},
      {"thrift:policy=recent,budget=mass:0.5", {"policy=recent", "budget=mass:0.5"}},
      {"thrift:policy=recent,budget=tolerance:0.5", {"policy=recent", "budget=tolerance:0.5"}},
      {"fp4:budget=0.1", {"policy=none", "budget=0.1"}},
      {"fp4:budget=per64", {"policy=none", "budget=per64"}},
      {"fp4:budget=all", {"budget=all", "rest=fp4"}},
      {"thrift:rest=fp16", {"rest=fp16", "budget=0.05"}},
      {"topk:budget=tolerance:0.1", {"budget=tolerance:0.1", "storage=high_only"}},
  };
  for (const Refused& each : refused) {
    const auto method = parse_method(each.spec);
    ASSERT_FALSE(method.ok()) << each.spec;
    const std::string& message = method.status().message();
    EXPECT_EQ(method.status().code(), Code::invalid_argument);
    EXPECT_EQ(message.find('\n'), std::string::npos);
    for (const char* word : each.words) {
      EXPECT_NE(message.find(word), std::string::npos) << "'" << each.spec << "': no '" << word << "' in: " << message;
    }
  }
}

TEST(Method, OptionsListEveryKeyOnce) {
  std::vector<std::string> keys;
  for (const auto& [key, value] : options(*parse_method("thrift"))) keys.push_back(key);
  std::vector<std::string> unique = keys;
  std::sort(unique.begin(), unique.end());
  unique.erase(std::unique(unique.begin(), unique.end()), unique.end());
  EXPECT_EQ(unique.size(), keys.size());
  EXPECT_EQ(keys.size(), 12u);
}

TEST(Method, HighTierIsWhatTheStorageKeepsOfEveryPage) {
  EXPECT_EQ(high_tier(Storage::high_only), Tier::fp16);
  EXPECT_EQ(high_tier(Storage::dual), Tier::fp16);
  EXPECT_EQ(high_tier(Storage::residual), Tier::fp4x2);
  EXPECT_EQ(high_tier(Storage::fp4_only), Tier::none);
}

}  // namespace
}  // namespace thriftattn
