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
  enum class Scaling : uint8_t { none, linear, llama3, yarn };
  Scaling scaling = Scaling::none;
  double theta = 10000;
  double factor = 1;                                 // linear, llama3, yarn: frequencies are divided by it
  double low_freq_factor = 1, high_freq_factor = 4;  // llama3: turns within the original context, between which ...
  double beta_slow = 1, beta_fast = 32;              // yarn: ... the same, and between which ...
  int64_t original_max_positions = 0;                // ... the division fades in
  bool truncate = true;                              // yarn: the fade begins and ends at whole channels
  double attention_factor = 1;                       // yarn: cosines and sines are multiplied by it
};

// f in the MLP's f(gate) * up; gelu_tanh is GELU by its approximation with tanh.
enum class Activation : uint8_t { silu, gelu_tanh };

struct ModelConfig {
  std::string architecture;  // e.g. "LlamaForCausalLM"
  int64_t hidden = 0;        // channels of a hidden state
  int64_t intermediate = 0;  // channels of the MLP, of one expert where there are several
  int layers = 0;
  int h_q = 0, h_kv = 0;  // query and KV heads; h_q is a multiple of h_kv
  int d = 0, d_v = 0;     // channels of a key head and of a value head; d is even
  int64_t vocab = 0;
  int64_t max_positions = 0;
  double norm_eps = 0;
  double norm_offset = 0;        // is added to the weights of all RMS norms
  bool output_norms = false;     // an RMS norm of what attention and MLP give, before it is added to the hidden state
  double embedding_scale = 1;    // multiplies embeddings on their way in
  bool tied_embeddings = false;  // the logits use the embedding's weights
  double logit_softcap = 0;      // logits x become cap * tanh(x / cap); 0 = they stay

  // Attention.
  RopeConfig rope;
  std::optional<RopeConfig> local_rope;  // of the layers with a window, where it differs
  std::vector<int64_t> windows;          // [layers], keys that a row sees, its own being the last; 0 = all
  double sm_scale = 0;
  double attention_softcap = 0;  // Problem::softcap
  double temperature_beta = 0;  // queries at position i grow by 1 + beta ln(1 + floor(i / rope.original_max_positions))
  bool sinks = false;           // a learned logit per query head
  bool qkv_bias = false, o_bias = false;
  bool qk_norm = false;  // an RMS norm per query and key head before RoPE

  // MLP.
  Activation activation = Activation::silu;
  bool mlp_bias = false;
  int experts = 0, experts_per_token = 0;  // 0 = one MLP for all tokens; see model/experts.h
  double swiglu_limit = 0, swiglu_alpha = 0;

  std::optional<int32_t> bos;
  std::vector<int32_t> eos;

  bool is_eos(int32_t token) const { return std::find(eos.begin(), eos.end(), token) != eos.end(); }

  // Reads `dir`/config.json as Hugging Face writes it; where there is a generation_config.json with eos_token_id, eos
  // is that. Errors name the key, its value and what is supported.
  static Result<ModelConfig> load(const std::string& dir);
  // The same from the text of a config.json; `source` names it in errors.
  static Result<ModelConfig> parse(std::string_view json, const std::string& source);
};

// The values of `architectures` that `load` knows.
std::vector<std::string> architecture_names();

}  // namespace thriftattn::model
