#include "model/schedule.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

namespace thriftattn::model {
namespace {

Schedule parsed(const std::string& json, int layers = 8, int h_kv = 2) {
  auto schedule = Schedule::parse(json, "s.json", layers, h_kv);
  EXPECT_TRUE(schedule.ok()) << schedule.status().message();
  return schedule.ok() ? *schedule : Schedule{};
}

Method method(const char* spec) { return *parse_method(spec); }

TEST(Schedule, LaterRulesWin) {
  const Schedule s = parsed(R"({"default": "thrift", "rules": [
      {"layers": "0-5", "method": "fp16"},
      {"layers": [1, "3-4"], "kv_heads": [1], "method": "thrift:budget=0.1"},
      {"layers": 4, "method": "fp4"},
      {"kv_heads": "0-0", "layers": 7, "method": "fp16"}]})");
  for (int layer = 0; layer < 8; ++layer) {
    for (int head = 0; head < 2; ++head) {
      const char* want = layer == 4                                ? "fp4"
                         : head == 1 && (layer == 1 || layer == 3) ? "thrift:budget=0.1"
                         : layer <= 5 || (layer == 7 && head == 0) ? "fp16"
                                                                   : "thrift";
      EXPECT_EQ(s.at(layer, head), method(want)) << layer << " " << head;
    }
  }
}

TEST(Schedule, GroupsCoverEveryHeadOnceInAscendingOrder) {
  const Schedule s = parsed(R"({"default": "thrift", "rules": [{"layers": [0], "kv_heads": [3, 1], "method": "fp16"},
                                {"layers": 0, "kv_heads": 3, "method": "fp16"}]})",
                            2, 4);
  const auto groups = s.groups(0);
  ASSERT_EQ(groups.size(), 2u);
  for (const auto& group : groups) {
    EXPECT_EQ(group.kv_heads, group.method.name == "fp16" ? (std::vector<int>{1, 3}) : (std::vector<int>{0, 2}));
  }
  ASSERT_EQ(s.groups(1).size(), 1u);
  EXPECT_EQ(s.groups(1)[0].kv_heads, (std::vector<int>{0, 1, 2, 3}));
}

TEST(Schedule, MethodsThatNoHeadRunsLeaveNoTrace) {
  const Schedule s = parsed(R"({"default": "paper-fp4", "rules": [{"method": "fp16"}, {"method": "thrift"}]})");
  EXPECT_EQ(s, Schedule::uniform(method("thrift"), 8, 2));
}

TEST(Schedule, OneLineNamesEveryChoice) {
  EXPECT_EQ(to_string(parsed(R"({"default": "thrift:budget=0.1"})")), "thrift:budget=0.1");
  EXPECT_EQ(to_string(parsed(R"({"default": "thrift", "rules": [{"layers": 1, "kv_heads": 1, "method": "fp16"}]})", 3)),
            "thrift | fp16: 0,0 0,1 0,0");
}

TEST(Schedule, TheCacheOfOneMethodIsThatMethods) {
  for (const char* spec : {"fp16", "fp4", "thrift", "paper", "quest", "thrift:policy=second_moment,storage=dual"}) {
    const auto config = Schedule::uniform(method(spec), 8, 2).cache_config(128, 64);
    ASSERT_TRUE(config.ok()) << config.status().message();
    EXPECT_EQ(*config, CacheConfig::for_method(method(spec), 8, 2, 128, 64)) << spec;
  }
}

TEST(Schedule, TheCacheKeepsWhatEveryMethodNeeds) {
  const Schedule s = parsed(R"({"default": "fp4:scales=4over6", "rules": [
      {"layers": 0, "method": "quest:force=sink:3"},
      {"layers": 1, "kv_heads": 1, "method": "thrift:scales=4over6,policy=second_moment,recent=5"}]})",
                            2, 2);
  const auto config = s.cache_config(128, 128);
  ASSERT_TRUE(config.ok()) << config.status().message();
  EXPECT_EQ(config->storage_by_head,
            (std::vector<Storage>{Storage::high_only, Storage::high_only, Storage::fp4_only, Storage::residual}));
  EXPECT_EQ(config->scales, Scales::four_over_six);
  EXPECT_TRUE(config->centring);
  EXPECT_TRUE(config->mean);
  EXPECT_TRUE(config->min_max);
  EXPECT_TRUE(config->variance);
  EXPECT_EQ(config->sink, 3);
  EXPECT_EQ(config->recent, 5);
  for (int layer = 0; layer < 2; ++layer) {
    for (int head = 0; head < 2; ++head) EXPECT_EQ(config->storage_at(layer, head), s.at(layer, head).storage);
  }
}

TEST(Schedule, OneCacheHasOneFormOfFp4) {
  for (const char* other :
       {"thrift:format=mxfp4", "thrift:scales=4over6", "thrift:centring=off", "thrift:page_scale=off"}) {
    const std::string key = std::string(other).substr(7, std::string(other).find('=') - 7);
    const Schedule s = parsed(std::string(R"({"default": "fp16", "rules": [{"layers": 1, "method": "thrift"},
                                              {"layers": 2, "method": ")") +
                              other + R"("}]})");
    const auto config = s.cache_config(128, 128);
    ASSERT_FALSE(config.ok()) << other;
    for (const std::string& word : {std::string("'thrift'"), "'" + to_string(method(other)) + "'", key}) {
      EXPECT_NE(config.status().message().find(word), std::string::npos) << config.status().message();
    }
  }
  // What is stored in 16 bit alone has no such form.
  EXPECT_TRUE(parsed(R"({"default": "thrift", "rules": [{"layers": 0, "method": "topk:format=mxfp4"}]})")
                  .cache_config(128, 128)
                  .ok());
}

TEST(Schedule, ErrorsNameTheFileTheRuleAndTheValue) {
  const struct {
    const char* json;
    std::vector<std::string> words;
  } cases[] = {
      {"[]", {"not a JSON object"}},
      {"{}", {"default", "null"}},
      {R"({"default": 3})", {"default", "3"}},
      {R"({"default": "thirft"})", {"default", "thirft"}},
      {R"({"default": "thrift", "rule": []})", {"\"rule\"", "rules"}},
      {R"({"default": "thrift", "rules": {}})", {"rules"}},
      {R"({"default": "thrift", "rules": ["fp16"]})", {"rules[0]", "fp16"}},
      {R"({"default": "thrift", "rules": [{"method": "fp16"}, {"layers": 0}]})", {"rules[1]", "method"}},
      {R"({"default": "thrift", "rules": [{"method": "fp16:budget=2"}]})", {"rules[0]", "budget"}},
      {R"({"default": "thrift", "rules": [{"method": "fp16", "head": 0}]})", {"rules[0]", "\"head\"", "kv_heads"}},
      {R"({"default": "thrift", "rules": [{"method": "fp16", "layers": 8}]})", {"rules[0]", "layers 8", "0 to 7"}},
      {R"({"default": "thrift", "rules": [{"method": "fp16", "layers": "6-8"}]})", {"rules[0]", "6-8", "0 to 7"}},
      {R"({"default": "thrift", "rules": [{"method": "fp16", "kv_heads": [0, 2]}]})", {"kv_heads 2", "0 to 1"}},
      {R"({"default": "thrift", "rules": [{"method": "fp16", "layers": -1}]})", {"layers -1"}},
      {R"({"default": "thrift", "rules": [{"method": "fp16", "layers": 1.5}]})", {"layers 1.5"}},
      {R"({"default": "thrift", "rules": [{"method": "fp16", "layers": 18446744073709551615}]})", {"layers", "0 to 7"}},
      {R"({"default": "thrift", "rules": [{"method": "fp16", "layers": null}]})", {"layers null"}},
      {R"({"default": "thrift", "rules": [{"method": "fp16", "layers": []}]})", {"layers []", "empty"}},
      {R"({"default": "thrift", "rules": [{"method": "fp16", "layers": [[1]]}]})", {"layers"}},
      {R"({"default": "thrift", "rules": [{"method": "fp16", "layers": "3-1"}]})", {"3-1"}},
      {R"({"default": "thrift", "rules": [{"method": "fp16", "layers": "1-"}]})", {"1-"}},
      {R"({"default": "thrift", "rules": [{"method": "fp16", "layers": "-1"}]})", {"-1"}},
      {R"({"default": "thrift", "rules": [{"method": "fp16", "layers": "1--2"}]})", {"1--2"}},
      {R"({"default": "thrift", "rules": [{"method": "fp16", "layers": ""}]})", {"layers \"\""}},
      {R"({"default": "thrift", "rules": [{"method": "fp16", "layers": "0-1,3"}]})", {"0-1,3"}},
  };
  for (const auto& c : cases) {
    const auto s = Schedule::parse(c.json, "s.json", 8, 2);
    ASSERT_FALSE(s.ok()) << c.json;
    EXPECT_TRUE(s.status().message().starts_with("s.json: ")) << s.status().message();
    EXPECT_EQ(s.status().message().find('\n'), std::string::npos);
    for (const std::string& word : c.words) {
      EXPECT_NE(s.status().message().find(word), std::string::npos) << s.status().message() << "\nlacks " << word;
    }
  }
  EXPECT_EQ(Schedule::load("/nonexistent", 8, 2).status().code(), Code::not_found);
}

}  // namespace
}  // namespace thriftattn::model
