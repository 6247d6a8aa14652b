#include "model/config.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <string>

namespace thriftattn::model {
namespace {

using Json = nlohmann::json;

Json llama() {
  return {{"architectures", {"LlamaForCausalLM"}},
          {"hidden_size", 256},
          {"intermediate_size", 704},
          {"num_hidden_layers", 8},
          {"num_attention_heads", 4},
          {"num_key_value_heads", 2},
          {"vocab_size", 4096},
          {"max_position_embeddings", 32768},
          {"rms_norm_eps", 1e-5}};
}

Result<ModelConfig> parse(const Json& json) { return ModelConfig::parse(json.dump(), "config.json"); }

// Expects an error that holds every one of `words`.
void expect_error(const Json& json, const std::vector<std::string>& words) {
  const auto config = parse(json);
  ASSERT_FALSE(config.ok()) << json;
  for (const std::string& word : words) {
    EXPECT_NE(config.status().message().find(word), std::string::npos)
        << config.status().message() << "\nlacks " << word;
  }
  EXPECT_EQ(config.status().message().find('\n'), std::string::npos);
}

TEST(ModelConfig, EmbeddedModelReadsAsItsFileSays) {
  const auto c = ModelConfig::load(THRIFTATTN_SOURCE_DIR "/models/pocket-8m");
  ASSERT_TRUE(c.ok()) << c.status().message();
  EXPECT_EQ(c->hidden, 256);
  EXPECT_EQ(c->layers, 8);
  EXPECT_EQ(c->h_q, 4);
  EXPECT_EQ(c->h_kv, 2);
  EXPECT_EQ(c->d, 128);  // head_dim, not hidden / heads
  EXPECT_EQ(c->rope.theta, 500000.0);
  EXPECT_TRUE(c->tied_embeddings);
  EXPECT_EQ(c->bos, 0);
  EXPECT_TRUE(c->is_eos(1));
  EXPECT_FALSE(c->is_eos(0));
}

TEST(ModelConfig, AbsentKeysTakeTheirDefaults) {
  Json json = llama();
  json.erase("num_key_value_heads");
  const auto c = parse(json);
  ASSERT_TRUE(c.ok()) << c.status().message();
  EXPECT_EQ(c->h_kv, 4);
  EXPECT_EQ(c->d, 64);
  EXPECT_EQ(c->rope.theta, 10000.0);
  EXPECT_EQ(c->rope.scaling, RopeConfig::Scaling::none);
  EXPECT_FALSE(c->tied_embeddings);
  EXPECT_FALSE(c->bos.has_value());
  EXPECT_TRUE(c->eos.empty());
}

TEST(ModelConfig, BothSpellingsOfRopeMeanTheSame) {
  const Json scaling = {
      {"factor", 8.0}, {"low_freq_factor", 1.0}, {"high_freq_factor", 4.0}, {"original_max_position_embeddings", 8192}};
  Json old_form = llama(), new_form = llama();
  old_form["rope_theta"] = 5e5;
  old_form["rope_scaling"] = scaling;
  old_form["rope_scaling"]["rope_type"] = "llama3";
  new_form["rope_parameters"] = old_form["rope_scaling"];
  new_form["rope_parameters"]["rope_theta"] = 5e5;
  for (const Json& json : {old_form, new_form}) {
    const auto c = parse(json);
    ASSERT_TRUE(c.ok()) << c.status().message();
    EXPECT_EQ(c->rope.scaling, RopeConfig::Scaling::llama3);
    EXPECT_EQ(c->rope.theta, 5e5);
    EXPECT_EQ(c->rope.factor, 8.0);
    EXPECT_EQ(c->rope.original_max_positions, 8192);
  }
}

TEST(ModelConfig, EveryRequiredKeyIsNamedWhenItIsMissing) {
  for (const char* key : {"architectures", "hidden_size", "intermediate_size", "num_hidden_layers",
                          "num_attention_heads", "vocab_size", "max_position_embeddings", "rms_norm_eps"}) {
    Json json = llama();
    json.erase(key);
    expect_error(json, {key, "missing", "config.json"});
  }
}

TEST(ModelConfig, WhatIsNotSupportedIsNamedBesideWhatIs) {
  const auto with = [](const char* key, const Json& value) {
    Json json = llama();
    json[key] = value;
    return json;
  };
  expect_error(with("architectures", {"MambaForCausalLM"}), {"MambaForCausalLM", "LlamaForCausalLM"});
  expect_error(with("hidden_act", "gelu"), {"gelu", "silu"});
  expect_error(with("rope_scaling", {{"rope_type", "yarn"}, {"factor", 4.0}}), {"yarn", "llama3"});
  expect_error(with("rope_scaling", {{"rope_type", "linear"}}), {"factor", "missing"});
  expect_error(with("partial_rotary_factor", 0.5), {"partial_rotary_factor", "0.5"});
  expect_error(with("quantization_config", {{"quant_method", "awq"}}), {"awq", "BF16"});
  expect_error(with("num_key_value_heads", 3), {"num_key_value_heads", "3", "4"});
}

TEST(ModelConfig, LyingValuesAreRefused) {
  for (const Json& bad :
       {Json(-1), Json(0), Json(1e300), Json(2.5), Json("8"), Json(Json::array()), Json(UINT64_MAX)}) {
    for (const char* key : {"hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"}) {
      Json json = llama();
      json[key] = bad;
      expect_error(json, {key});
    }
  }
  Json json = llama();
  json["eos_token_id"] = {1, 4096};
  expect_error(json, {"eos_token_id", "4096"});
  json = llama();
  json["head_dim"] = 65;
  expect_error(json, {"head_dim", "65"});
  for (const char* text : {"", "[]", "null", "{", "{\"architectures\": 3}", "\xff\xfe"}) {
    EXPECT_FALSE(ModelConfig::parse(text, "config.json").ok()) << text;
  }
  // A million levels: neither reading nor reporting may recurse.
  std::string text = llama().dump();
  const std::string deep = std::string(1'000'000, '[') + std::string(1'000'000, ']');
  text.replace(text.find("256"), 3, deep);
  EXPECT_FALSE(ModelConfig::parse(text, "config.json").ok());
  EXPECT_EQ(ModelConfig::load("/nonexistent").status().code(), Code::not_found);
}

}  // namespace
}  // namespace thriftattn::model
