#include "model/tokenizer.h"

#include <gtest/gtest.h>

#include <chrono>
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
  json["model"]["byte_fallback"] = true;
  expect_error(json, {"byte_fallback"});
  json = plain();
  json["normalizer"] = {{"type", "NFC"}};
  expect_error(json, {"NFC"});
  json = plain();
  json["pre_tokenizer"] = {{"type", "Metaspace"}};
  expect_error(json, {"Metaspace", "ByteLevel"});
  json["pre_tokenizer"] = nullptr;
  expect_error(json, {"null", "ByteLevel"});
  json = plain();
  json["pre_tokenizer"] = {
      {"type", "Sequence"},
      {"pretokenizers",
       {{{"type", "Split"}, {"pattern", {{"Regex", "(a"}}}, {"behavior", "Isolated"}}, json["pre_tokenizer"]}}};
  expect_error(json, {"(a"});
  json = plain();
  json["added_tokens"][0]["lstrip"] = true;
  expect_error(json, {"<|bos|>", "lstrip"});
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
