// What config.json says of a model: its architecture as data.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "thriftattn/status.h"

namespace thriftattn::model {

// Rotary position embedding, halves layout: channel c of a head turns with channel c + d/2.
struct RopeConfig {
  enum class Scaling : uint8_t { none, linear, llama3 };
  Scaling scaling = Scaling::none;
  double theta = 10000;
  double factor = 1;                                 // linear, llama3: frequencies are divided by it
  double low_freq_factor = 1, high_freq_factor = 4;  // llama3: wavelengths, in original contexts, between which ...
  int64_t original_max_positions = 0;                // ... the division fades in
};

struct ModelConfig {
  std::string architecture;  // e.g. "LlamaForCausalLM"
  int64_t hidden = 0;        // channels of a hidden state
  int64_t intermediate = 0;  // channels of the MLP
  int layers = 0;
  int h_q = 0, h_kv = 0;  // query and KV heads; h_q is a multiple of h_kv
  int d = 0, d_v = 0;     // channels of a key head and of a value head; d is even
  int64_t vocab = 0;
  int64_t max_positions = 0;
  RopeConfig rope;
  double norm_eps = 0;
  bool tied_embeddings = false;  // the logits use the embedding's weights
  bool qkv_bias = false, o_bias = false, mlp_bias = false;
  bool qk_norm = false;  // an RMS norm per query and key head before RoPE
  std::optional<int32_t> bos;
  std::vector<int32_t> eos;

  bool is_eos(int32_t token) const { return std::find(eos.begin(), eos.end(), token) != eos.end(); }

  // Reads `dir`/config.json as Hugging Face writes it. Errors name the key, its value and what is supported.
  static Result<ModelConfig> load(const std::string& dir);
  // The same from the text of a config.json; `source` names it in errors.
  static Result<ModelConfig> parse(std::string_view json, const std::string& source);
};

// The values of `architectures` that `load` knows.
std::vector<std::string> architecture_names();

}  // namespace thriftattn::model
