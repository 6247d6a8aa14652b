#include "model/tokenizer.h"

#include <gtest/gtest.h>

#include <chrono>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

namespace thriftattn::model {
namespace {

using Json = nlohmann::json;
using Ids = std::vector<int32_t>;

Json read_json(const std::string& path) {
  return Json::parse(std::ifstream(std::string(THRIFTATTN_SOURCE_DIR "/") + path));
}

// The smallest tokenizer.json there is: 256 bytes and no merges.
Json plain() {
  Json json = read_json("tests/data/tiny-llama-bf16-llama3/tokenizer.json");
  json["model"]["merges"] = Json::array();
  json["pre_tokenizer"] = {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"use_regex", false}};
  return json;
}

void expect_error(const Json& json, const std::vector<std::string>& words) {
  const auto t = Tokenizer::parse(json.dump(), "tokenizer.json");
  ASSERT_FALSE(t.ok()) << "lacks the error " << testing::PrintToString(words);
  for (const std::string& word : words) {
    EXPECT_NE(t.status().message().find(word), std::string::npos) << t.status().message() << "\nlacks " << word;
  }
  EXPECT_EQ(t.status().message().find('\n'), std::string::npos);
}

TEST(Tokenizer, EmbeddedModelGivesTheReferenceIds) {
  const auto t = Tokenizer::load(THRIFTATTN_SOURCE_DIR "/models/pocket-8m");
  ASSERT_TRUE(t.ok()) << t.status().message();
  const std::pair<std::string, Ids> golden[] = {
      {"", {}},
      {"The special magic number is 4817263.", {482, 998, 1032, 2569, 356, 223, 22, 26, 19, 25, 3860, 21, 16}},
      {"I'll say it's they'D 'twas don'T", {43, 1274, 651, 333, 426, 447, 9, 38, 781, 86, 896, 870, 9, 54}},
      {"a\n\n  b\r\n\tc   ", {67, 299, 223, 274, 204, 201, 200, 69, 598}},
      {"na\u00efve \u4e2d\u6587 \U0001f600",
       {1915, 130, 110, 312, 223, 163, 119, 258, 165, 247, 232, 223, 175, 256, 249, 225}},
      {"<|bos|>x<|eos|><|bo", {0, 90, 1, 30, 94, 2563}},
      {"\u180e\u2019s \u0085\u00a0", {160, 257, 239, 386, 85, 223, 129, 230, 129, 257}},  // U+180E is no white space
  };
  for (const auto& [text, ids] : golden) {
    EXPECT_EQ(t->encode(text), ids) << text;
    EXPECT_EQ(t->decode(ids), text);
  }
  EXPECT_EQ(t->vocab(), 4096);
}

// Prefix space and merges as strings; digits and no prefix space; ignore_merges.
TEST(Tokenizer, EveryDialectGivesTheReferenceIds) {
  for (const char* variant : {"f32-tied", "bf16-llama3", "f16-linear"}) {
    const std::string dir = std::string("tests/data/tiny-llama-") + variant;
    const auto t = Tokenizer::load(std::string(THRIFTATTN_SOURCE_DIR "/") + dir);
    ASSERT_TRUE(t.ok()) << t.status().message();
    const Json file = read_json(dir + "/golden.json");
    for (const Json& golden : file["texts"]) {
      EXPECT_EQ(t->encode(golden["text"].get<std::string>()), golden["ids"].get<Ids>())
          << variant << ": " << golden["text"];
    }
  }
}

// The forms that models have: tests/data/tokenizer-*, scripts/make_golden_tokens.py.
class Form : public testing::TestWithParam<const char*> {
 protected:
  std::string dir() const { return std::string("tests/data/tokenizer-") + GetParam(); }
};
INSTANTIATE_TEST_SUITE_P(Tokenizer, Form,
                         testing::Values("llama3", "qwen", "tekken", "tekken-native", "o200k", "deepseek", "stripping",
                                         "llama2", "metaspace", "gemma"),
                         [](const auto& form) {
                           std::string name = form.param;
                           std::erase(name, '-');
                           return name;
                         });

TEST_P(Form, GivesTheReferenceIds) {
  const auto t = Tokenizer::load(THRIFTATTN_SOURCE_DIR "/" + dir());
  ASSERT_TRUE(t.ok()) << t.status().message();
  const Json file = read_json(dir() + "/golden.json");
  ASSERT_GT(file["texts"].size(), 30u);
  for (const Json& golden : file["texts"]) {
    EXPECT_EQ(t->encode(golden["text"].get<std::string>()), golden["ids"].get<Ids>()) << golden["text"];
  }
  EXPECT_EQ(t->prefix().value_or(Ids{}), file["prefix"].get<Ids>());
}

TEST_P(Form, StreamsGiveWholeCharactersAndTheTextOfTheirTokens) {
  const auto t = Tokenizer::load(THRIFTATTN_SOURCE_DIR "/" + dir());
  ASSERT_TRUE(t.ok()) << t.status().message();
  const Json file = read_json(dir() + "/golden.json");
  for (const Json& golden : file["texts"]) {
    const Ids ids = golden["ids"].get<Ids>();
    TextStream stream(*t);
    std::string out;
    for (const int32_t id : ids) {
      const std::string piece = stream.push(id);
      EXPECT_NO_THROW((void)Json(piece).dump()) << "not UTF-8";  // dump() refuses what is not
      out += piece;
    }
    EXPECT_EQ(out + stream.finish(), t->decode(ids));
  }
}

TEST(Tokenizer, AnyBytesSurviveEncodingAndDecoding) {
  const auto t = Tokenizer::load(THRIFTATTN_SOURCE_DIR "/models/pocket-8m");
  ASSERT_TRUE(t.ok());
  std::string all;
  for (int i = 0; i < 256; ++i) all += static_cast<char>(i);
  for (const std::string& text :
       {all, all + "plain" + all, std::string("ok \xff\xfe ok"), std::string("cut \xe4\xb8")}) {
    EXPECT_EQ(t->decode(t->encode(text)), text);
  }
  EXPECT_EQ(t->bytes(-1), "");
  EXPECT_EQ(t->bytes(4096), "");
}

TEST(Tokenizer, LongWordsTakeNearlyLinearTime) {
  const auto t = Tokenizer::load(THRIFTATTN_SOURCE_DIR "/models/pocket-8m");
  ASSERT_TRUE(t.ok());
  for (const char* unit : {"the", " ", "\n", "!"}) {
    std::string text;
    while (text.size() < 300'000) text += unit;
    const auto begin = std::chrono::steady_clock::now();
    const Ids ids = t->encode(text);
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    EXPECT_EQ(t->decode(ids), text);
    EXPECT_LT(seconds, 10) << unit;  // quadratic time would be hours
  }
}

TEST(Tokenizer, OtherKindsAreRefusedByName) {
  Json json = plain();
  ASSERT_TRUE(Tokenizer::parse(json.dump(), "tokenizer.json").ok());
  json["model"]["type"] = "Unigram";
  expect_error(json, {"Unigram", "BPE"});
  json = plain();
  json["model"]["dropout"] = 0.1;
  expect_error(json, {"dropout", "0.1"});
  json = plain();
  for (const Json& normalizer :
       {Json{{"type", "NFKC"}}, Json{{"type", "Sequence"}, {"normalizers", {{{"type", "NFKC"}}}}}}) {
    json["normalizer"] = normalizer;
    expect_error(json, {"NFKC", "NFC"});
  }
  json["normalizer"] = {{"type", "Replace"}, {"pattern", {{"Regex", "a+"}}}, {"content", "b"}};
  expect_error(json, {"Replace"});
  json = plain();
  json["pre_tokenizer"] = {{"type", "Metaspace"}, {"replacement", "\u2581"}};
  expect_error(json, {"Metaspace", "byte_fallback", "ByteLevel"});
  json["model"]["byte_fallback"] = true;
  expect_error(json, {"Metaspace", "does not split"});
  json["pre_tokenizer"] = nullptr;
  expect_error(json, {"0x00"});  // bytes are tokens here, not <0x00>
  json["pre_tokenizer"] = {{"type", "Whitespace"}};
  expect_error(json, {"Whitespace", "ByteLevel"});
  const auto split = [](const char* behavior, const char* expression) {
    Json sequence = {{"type", "Sequence"}, {"pretokenizers", Json::array({Json(), plain()["pre_tokenizer"]})}};
    sequence["pretokenizers"][0] = {
        {"type", "Split"}, {"pattern", {{"Regex", expression}}}, {"behavior", behavior}, {"invert", false}};
    return sequence;
  };
  json = plain();
  json["pre_tokenizer"] = split("Isolated", "(a");
  expect_error(json, {"(a"});
  json["pre_tokenizer"] = split("MergedWithNext", "a");
  expect_error(json, {"MergedWithNext", "Isolated"});
  json = plain();
  json["post_processor"] = {{"type", "RobertaProcessing"}, {"sep", {"</s>", 2}}, {"cls", {"<s>", 0}}};
  expect_error(json, {"RobertaProcessing", "TemplateProcessing"});
}

// A space is a piece, and what stands between matches is dropped where a pattern removes it.
TEST(Tokenizer, SplitsKeepWhatTheirBehaviorSays) {
  Json json = plain();
  const auto text_of = [&](const char* behavior, bool invert) {
    json["pre_tokenizer"] = {{"type", "Sequence"}, {"pretokenizers", Json::array({Json(), plain()["pre_tokenizer"]})}};
    json["pre_tokenizer"]["pretokenizers"][0] = {
        {"type", "Split"}, {"pattern", {{"String", "."}}}, {"behavior", behavior}, {"invert", invert}};
    const auto t = Tokenizer::parse(json.dump(), "tokenizer.json");
    return t.ok() ? t->decode(t->encode(".a..b.c")) : t.status().message();
  };
  EXPECT_EQ(text_of("Isolated", false), ".a..b.c");
  EXPECT_EQ(text_of("Removed", false), "abc");
  EXPECT_EQ(text_of("Removed", true), "....");
  EXPECT_EQ(text_of("MergedWithPrevious", false), ".a..b.c");
}

// A folder with these files.
class Folder {
 public:
  explicit Folder(std::initializer_list<std::pair<const char*, std::string>> files) {
    std::filesystem::create_directories(path_);
    for (const auto& [name, text] : files) std::ofstream(path_ / name) << text;
  }
  ~Folder() { std::filesystem::remove_all(path_); }
  std::string path() const { return path_.string(); }

 private:
  std::filesystem::path path_ =
      std::filesystem::path(testing::TempDir()) /
      (std::string("tokenizer_") + testing::UnitTest::GetInstance()->current_test_info()->name());
};

// The post-processor; where there is none, tokenizer_config.json; where that is missing too, nobody.
TEST(Tokenizer, ThePostProcessorSaysWhatStandsInFront) {
  const auto prefix = [](const Json& json, const std::string& config) -> std::string {
    const Folder folder = config.empty() ? Folder({{"tokenizer.json", json.dump()}})
                                         : Folder({{"tokenizer.json", json.dump()}, {"tokenizer_config.json", config}});
    const auto t = Tokenizer::load(folder.path());
    if (!t.ok()) return t.status().message();
    return t->prefix() ? testing::PrintToString(*t->prefix()) : "silent";
  };
  const std::string adds = R"({"add_bos_token": true, "bos_token": {"content": "<|bos|>"}})";
  Json json = plain();
  json["post_processor"] = nullptr;
  EXPECT_EQ(prefix(json, ""), "silent");
  EXPECT_EQ(prefix(json, "{}"), "{}");
  EXPECT_EQ(prefix(json, adds), "{ 0 }");
  EXPECT_EQ(prefix(json, R"({"add_bos_token": true, "bos_token": "<|eos|>"})"), "{ 1 }");
  EXPECT_EQ(prefix(json, R"({"add_bos_token": true, "bos_token": null})"), "{}");
  EXPECT_EQ(prefix(json, R"({"add_bos_token": false, "bos_token": "<|bos|>"})"), "{}");
  EXPECT_NE(prefix(json, R"({"add_bos_token": true, "bos_token": "<nobody>"})").find("<nobody>"), std::string::npos);
  json["post_processor"] = {{"type", "ByteLevel"}};
  EXPECT_EQ(prefix(json, adds), "{}");
  Json steps = Json::array({json["post_processor"], Json()});
  steps[1] = Json::parse(R"({"type": "TemplateProcessing",
      "single": [{"SpecialToken": {"id": "<|eos|>", "type_id": 0}}, {"SpecialToken": {"id": "two", "type_id": 0}},
                 {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "<|eos|>", "type_id": 0}}],
      "special_tokens": {"<|eos|>": {"ids": [1]}, "two": {"ids": [2, 0]}}})");
  json["post_processor"] = {{"type", "Sequence"}, {"processors", steps}};
  EXPECT_EQ(prefix(json, adds), "{ 1, 2, 0 }");
  json["post_processor"]["processors"][1]["special_tokens"]["two"]["ids"] = {1 << 20};
  EXPECT_NE(prefix(json, adds).find("1048576"), std::string::npos);
  json["post_processor"]["processors"][1]["special_tokens"].erase("two");
  EXPECT_NE(prefix(json, adds).find("post-processor"), std::string::npos);
}

TEST(Tokenizer, AChatTemplateIsSeenWhereverItLies) {
  const std::string json = plain().dump();
  const auto seen = [](const Folder& folder) { return Tokenizer::load(folder.path())->has_chat_template(); };
  EXPECT_FALSE(seen(Folder({{"tokenizer.json", json}, {"tokenizer_config.json", "{}"}})));
  EXPECT_TRUE(seen(Folder({{"tokenizer.json", json}, {"tokenizer_config.json", R"({"chat_template": "{{x}}"})"}})));
  EXPECT_TRUE(seen(Folder({{"tokenizer.json", json}, {"chat_template.jinja", "{{x}}"}})));
}

TEST(Tokenizer, LyingFilesAreRefused) {
  Json json = plain();
  json["model"]["merges"] = Json::array({"a"});
  expect_error(json, {"merge"});
  json["model"]["merges"] = Json::array({Json::array({"a", "zz"})});
  expect_error(json, {"merge", "zz"});
  json = plain();
  json["model"]["vocab"].erase("a");
  expect_error(json, {"0x61"});
  for (const Json& id : {Json(-1), Json(int64_t{1} << 40), Json("x")}) {
    json = plain();
    json["model"]["vocab"]["a"] = id;
    expect_error(json, {"a"});
  }
  json = plain();
  json["added_tokens"][0]["content"] = "";
  expect_error(json, {"added token"});
  for (const char* text : {"", "[]", "{}", "{\"model\": 3}", "{\"model\": {\"type\": \"BPE\"}}"}) {
    EXPECT_FALSE(Tokenizer::parse(text, "tokenizer.json").ok()) << text;
  }
  EXPECT_EQ(Tokenizer::load("/nonexistent").status().code(), Code::not_found);
}

TEST(Tokenizer, LyingTekkenFilesAreRefused) {
  const Json good = read_json("tests/data/tokenizer-tekken-native/tekken.json");
  const auto expect_refusal = [](const Json& json, const char* word) {
    const auto t = Tokenizer::parse_tekken(json.dump(), "tekken.json");
    ASSERT_FALSE(t.ok()) << "lacks the error " << word;
    EXPECT_NE(t.status().message().find(word), std::string::npos) << t.status().message();
  };
  const auto changed = [&](const char* pointer, const Json& value) {
    Json json = good;
    json[Json::json_pointer(pointer)] = value;
    return json;
  };
  Json json = good;
  json.erase("special_tokens");  // as versions before v7
  expect_refusal(json, "special_tokens");
  expect_refusal(changed("/config/pattern", nullptr), "pattern");
  expect_refusal(changed("/config/pattern", "(a"), "(a");
  expect_refusal(changed("/config/default_num_special_tokens", 4), "5 special tokens");
  expect_refusal(changed("/config/default_num_special_tokens", -1), "special tokens");
  expect_refusal(changed("/config/default_num_special_tokens", int64_t{1} << 40), "special tokens");
  expect_refusal(changed("/config/default_vocab_size", 12), "0 are wanted");
  expect_refusal(changed("/config/default_vocab_size", 20), "0x08");
  expect_refusal(changed("/vocab", 3), "vocab");
  expect_refusal(changed("/vocab/7/token_bytes", "AA="), "rank 7");
  expect_refusal(changed("/vocab/7/token_bytes", "A*=="), "rank 7");
  expect_refusal(changed("/vocab/7/rank", 8), "rank 7");
  expect_refusal(changed("/special_tokens/1/rank", 5), "<s>");
  expect_refusal(changed("/special_tokens/1/token_str", ""), "special token");
  EXPECT_FALSE(Tokenizer::parse_tekken("{}", "tekken.json").ok());
}

TEST(TextStream, GivesWholeCharactersOnly) {
  const auto t = Tokenizer::parse(plain().dump(), "tokenizer.json");
  ASSERT_TRUE(t.ok());
  const std::string text = "a\u00e9\u4e2d\U0001f600b";
  TextStream stream(*t);
  std::string out;
  std::vector<size_t> lengths;
  for (const int32_t id : t->encode(text)) {
    const std::string piece = stream.push(id);
    lengths.push_back(piece.size());
    out += piece;
  }
  EXPECT_EQ(out, text);
  EXPECT_EQ(lengths, (std::vector<size_t>{1, 0, 2, 0, 0, 3, 0, 0, 0, 4, 1}));
  EXPECT_EQ(stream.finish(), "");
}

TEST(TextStream, WhatCanNeverBecomeACharacterIsReplaced) {
  const auto t = Tokenizer::parse(plain().dump(), "tokenizer.json");
  ASSERT_TRUE(t.ok());
  const std::string bad = "\xef\xbf\xbd";
  const std::pair<std::string, std::string> cases[] = {
      {"\xff-", bad + "-"},
      {"\x80", bad},
      {"\xe4\xb8-", bad + "-"},           // cut by another character
      {"\xe4\xb8", bad},                  // cut by the end
      {"\xc0\xaf", bad + bad},            // overlong
      {"\xed\xa0\x80", bad + bad + bad},  // a surrogate
      {"\xf4\x90\x80\x80", bad + bad + bad + bad},
  };
  for (const auto& [bytes, want] : cases) {
    TextStream stream(*t);
    std::string out;
    for (const int32_t id : t->encode(bytes)) out += stream.push(id);
    EXPECT_EQ(out + stream.finish(), want);
  }
}

}  // namespace
}  // namespace thriftattn::model
