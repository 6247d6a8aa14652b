#include "model/config.h"

#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <fstream>
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

// As Hugging Face's generate() takes it.
TEST(ModelConfig, GenerationConfigSaysWhatEndsAText) {
  namespace fs = std::filesystem;
  const fs::path dir = fs::path(testing::TempDir()) / "config_generation";
  fs::create_directories(dir);
  Json json = llama();
  json["eos_token_id"] = 7;
  std::ofstream(dir / "config.json") << json;
  const auto eos = [&](const char* generation) {
    std::ofstream(dir / "generation_config.json") << generation;
    const auto c = ModelConfig::load(dir.string());
    return c.ok() ? testing::PrintToString(c->eos) : c.status().message();
  };
  EXPECT_EQ(testing::PrintToString(ModelConfig::load(dir.string())->eos), "{ 7 }");
  EXPECT_EQ(eos(R"({"eos_token_id": [3, 4]})"), "{ 3, 4 }");
  EXPECT_EQ(eos(R"({"eos_token_id": 5})"), "{ 5 }");
  EXPECT_EQ(eos("{}"), "{ 7 }");
  EXPECT_NE(eos(R"({"eos_token_id": 4096})").find("generation_config.json: eos_token_id 4096"), std::string::npos);
  EXPECT_NE(eos("[").find("generation_config.json"), std::string::npos);
  fs::remove_all(dir);
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
  expect_error(with("hidden_act", "gelu"), {"gelu", "silu", "gelu_pytorch_tanh"});
  for (const char* name : {"Gemma3ForConditionalGeneration", "Mistral3ForConditionalGeneration", "GemmaForCausalLM"}) {
    expect_error(with("architectures", {name}), {name, "Gemma3ForCausalLM", "GptOssForCausalLM"});
  }
  for (const char* type : {"dynamic", "longrope", "mrope"}) {
    expect_error(with("rope_scaling", {{"rope_type", type}, {"factor", 4.0}}), {"rope_type", type, "llama3", "yarn"});
  }
  expect_error(with("rope_scaling", {{"rope_type", "yarn"}}), {"factor", "missing"});
  expect_error(with("rope_scaling", {{"rope_type", "linear"}}), {"factor", "missing"});
  expect_error(with("partial_rotary_factor", 0.5), {"partial_rotary_factor", "0.5"});
  expect_error(with("quantization_config", {{"quant_method", "awq"}}), {"awq", "BF16"});
  expect_error(with("quantization_config", {{"quant_method", "mxfp4"}}), {"mxfp4", "BF16"});
  expect_error(with("layer_types", std::vector<std::string>(8, "sliding_attention")), {"sliding_window"});
  expect_error(with("num_key_value_heads", 3), {"num_key_value_heads", "3", "4"});
}

// A config of `architecture` with what its family needs beyond Llama.
Json config_of(const std::string& architecture) {
  Json json = llama();
  json["architectures"] = {architecture};
  json["sliding_window"] = 40;
  if (architecture.starts_with("Gemma")) {
    json["query_pre_attn_scalar"] = 144;
    json["attn_logit_softcapping"] = nullptr;
    json["final_logit_softcapping"] = 30.0;
  }
  if (architecture == "GptOssForCausalLM" || architecture == "Ministral3ForCausalLM") {
    json["rope_parameters"] = {{"rope_type", "yarn"},
                               {"factor", 4.0},
                               {"original_max_position_embeddings", 64},
                               {"llama_4_scaling_beta", 0.1}};
  }
  if (architecture == "GptOssForCausalLM") {
    json["num_local_experts"] = 8;
    json["num_experts_per_tok"] = 2;
  }
  return json;
}

TEST(ModelConfig, EveryArchitectureImpliesWhatItsFileDoesNotSay) {
  EXPECT_EQ(architecture_names().size(), 9);
  for (const std::string& name : architecture_names()) {
    const auto c = parse(config_of(name));
    ASSERT_TRUE(c.ok()) << c.status().message();
    EXPECT_EQ(c->architecture, name);
    ASSERT_EQ(c->windows.size(), 8) << name;
    const bool gemma = name.starts_with("Gemma"), oss = name.starts_with("Gpt"), gemma3 = name.starts_with("Gemma3");
    EXPECT_EQ(c->qkv_bias, name.starts_with("Qwen2") || oss) << name;
    EXPECT_EQ(c->o_bias, oss) << name;
    EXPECT_EQ(c->qk_norm, name.starts_with("Qwen3") || gemma3) << name;
    EXPECT_EQ(c->norm_offset, gemma ? 1 : 0) << name;
    EXPECT_EQ(c->output_norms, gemma) << name;
    EXPECT_EQ(c->embedding_scale, gemma ? 16 : 1) << name;
    EXPECT_EQ(c->tied_embeddings, gemma) << name;
    EXPECT_EQ(c->activation, gemma ? Activation::gelu_tanh : Activation::silu) << name;
    EXPECT_EQ(c->logit_softcap, gemma ? 30 : 0) << name;
    EXPECT_DOUBLE_EQ(c->sm_scale, gemma ? 1.0 / 12 : 1 / std::sqrt(static_cast<double>(c->d))) << name;
    EXPECT_EQ(c->local_rope.has_value(), gemma3) << name;
    EXPECT_EQ(c->temperature_beta, name.starts_with("Ministral3") ? 0.1 : 0) << name;
    EXPECT_EQ(c->sinks, oss) << name;
    EXPECT_EQ(c->experts, oss ? 8 : 0) << name;
    EXPECT_EQ(c->rope.theta, oss ? 150000 : gemma3 ? 1e6 : 10000) << name;
  }
}

TEST(ModelConfig, WindowsFollowTheArchitecturesPattern) {
  const auto windows = [](const Json& json) {
    const auto c = parse(json);
    EXPECT_TRUE(c.ok()) << c.status().message();
    return c.ok() ? c->windows : std::vector<int64_t>();
  };
  using Windows = std::vector<int64_t>;
  const Windows none(8, 0), all(8, 40);
  EXPECT_EQ(windows(config_of("LlamaForCausalLM")), none);
  EXPECT_EQ(windows(config_of("MistralForCausalLM")), all);
  EXPECT_EQ(windows(config_of("MinistralForCausalLM")), all);
  EXPECT_EQ(windows(config_of("Gemma2ForCausalLM")), (Windows{40, 0, 40, 0, 40, 0, 40, 0}));
  EXPECT_EQ(windows(config_of("GptOssForCausalLM")), (Windows{40, 0, 40, 0, 40, 0, 40, 0}));
  Json gemma = config_of("Gemma3ForCausalLM"), mistral = config_of("MistralForCausalLM"),
       qwen = config_of("Qwen2ForCausalLM");
  EXPECT_EQ(windows(gemma), (Windows{40, 40, 40, 40, 40, 0, 40, 40}));
  gemma["sliding_window_pattern"] = 3;
  EXPECT_EQ(windows(gemma), (Windows{40, 40, 0, 40, 40, 0, 40, 40}));
  mistral["sliding_window"] = nullptr;
  EXPECT_EQ(windows(mistral), none);
  EXPECT_EQ(windows(qwen), none);
  qwen["use_sliding_window"] = true;
  expect_error(qwen, {"max_window_layers", "missing"});
  qwen["max_window_layers"] = 6;
  EXPECT_EQ(windows(qwen), (Windows{0, 0, 0, 0, 0, 0, 40, 40}));
  Json types = std::vector<std::string>(8, "full_attention");
  types[3] = "sliding_attention";
  qwen["layer_types"] = types;
  EXPECT_EQ(windows(qwen), (Windows{0, 0, 0, 40, 0, 0, 0, 0}));

  types[5] = "chunked_attention";
  qwen["layer_types"] = types;
  expect_error(qwen, {"layer_types", "chunked_attention", "full_attention and sliding_attention"});
  qwen["layer_types"] = {"full_attention"};
  expect_error(qwen, {"layer_types", "num_hidden_layers 8"});
  Json mixed = config_of("MistralForCausalLM");
  mixed["layer_types"] = std::vector<std::string>(8, "full_attention");
  expect_error(mixed, {"layer_types", "full_attention", "MistralForCausalLM"});
}

TEST(ModelConfig, WhatAFamilyNeedsMustBeThere) {
  const auto without = [](const char* architecture, const char* key) {
    Json json = config_of(architecture);
    json.erase(key);
    expect_error(json, {key, "missing"});
  };
  without("MistralForCausalLM", "sliding_window");  // null would be none
  without("Gemma2ForCausalLM", "attn_logit_softcapping");
  without("Gemma2ForCausalLM", "final_logit_softcapping");
  without("Gemma3ForCausalLM", "query_pre_attn_scalar");
  without("GptOssForCausalLM", "num_local_experts");
  without("GptOssForCausalLM", "rope_parameters");
  without("Ministral3ForCausalLM", "rope_parameters");
  for (const char* architecture : {"Gemma2ForCausalLM", "Gemma3ForCausalLM", "GptOssForCausalLM"}) {
    Json json = config_of(architecture);
    json["sliding_window"] = nullptr;
    expect_error(json, {"sliding_window", "missing"});
  }
  Json json = config_of("Gemma3ForCausalLM");
  json["attn_logit_softcapping"] = 50.0;
  expect_error(json, {"attn_logit_softcapping", "50", "null"});
  json = config_of("Gemma3ForCausalLM");
  json["use_bidirectional_attention"] = true;
  expect_error(json, {"use_bidirectional_attention", "false"});
  json = config_of("GptOssForCausalLM");
  json["num_experts_per_tok"] = 9;
  expect_error(json, {"num_experts_per_tok", "9", "8"});
  json["num_experts_per_tok"] = 2;
  json["hidden_act"] = "gelu_pytorch_tanh";
  expect_error(json, {"hidden_act", "gelu_pytorch_tanh", "silu"});
}

TEST(ModelConfig, LocalAndGlobalRopeInBothSpellings) {
  Json old_form = config_of("Gemma3ForCausalLM"), new_form = old_form;
  old_form["rope_theta"] = 5e5;
  old_form["rope_local_base_freq"] = 2e4;
  old_form["rope_scaling"] = {{"rope_type", "linear"}, {"factor", 8.0}};
  new_form["rope_parameters"] = {{"full_attention", {{"rope_type", "linear"}, {"factor", 8.0}, {"rope_theta", 5e5}}},
                                 {"sliding_attention", {{"rope_type", "default"}, {"rope_theta", 2e4}}}};
  for (const Json& json : {old_form, new_form}) {
    const auto c = parse(json);
    ASSERT_TRUE(c.ok()) << c.status().message();
    EXPECT_EQ(c->rope.scaling, RopeConfig::Scaling::linear);
    EXPECT_EQ(c->rope.theta, 5e5);
    EXPECT_EQ(c->rope.factor, 8);
    EXPECT_EQ(c->local_rope->scaling, RopeConfig::Scaling::none);
    EXPECT_EQ(c->local_rope->theta, 2e4);
  }
  Json one_rope = llama();
  one_rope["rope_parameters"] = new_form["rope_parameters"];
  expect_error(one_rope, {"rope_parameters", "one rope", "LlamaForCausalLM"});
  new_form["rope_parameters"] = {{"rope_type", "default"}, {"rope_theta", 5e5}};
  expect_error(new_form, {"rope_parameters", "full_attention", "sliding_attention"});
}

TEST(ModelConfig, YarnTakesItsSharpnessFromWhatIsSaid) {
  Json json = llama();
  json["rope_scaling"] = {{"type", "yarn"}, {"factor", 4.0}, {"original_max_position_embeddings", 8192}};
  Json& scaling = json["rope_scaling"];
  const double fitted = 0.1 * std::log(4.0) + 1;
  EXPECT_DOUBLE_EQ(parse(json)->rope.attention_factor, fitted);
  EXPECT_EQ(parse(json)->rope.beta_fast, 32);
  EXPECT_EQ(parse(json)->rope.beta_slow, 1);
  EXPECT_TRUE(parse(json)->rope.truncate);
  scaling["mscale"] = 1.0;
  EXPECT_DOUBLE_EQ(parse(json)->rope.attention_factor, fitted);  // of one alone nothing follows
  scaling["mscale_all_dim"] = 0.5;
  EXPECT_DOUBLE_EQ(parse(json)->rope.attention_factor, fitted / (0.05 * std::log(4.0) + 1));
  scaling["attention_factor"] = 1.25;
  EXPECT_EQ(parse(json)->rope.attention_factor, 1.25);
  scaling["factor"] = 0;
  expect_error(json, {"factor", "0"});
  scaling["factor"] = std::exp(20 / 1.5);
  scaling["mscale_all_dim"] = -0.9;  // a negative sharpness
  expect_error(json, {"mscale_all_dim", "-0.9"});
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
