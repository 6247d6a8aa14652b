#include "model/config.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <cmath>
#include <limits>

#include "model/json_file.h"

namespace thriftattn::model {
namespace {

enum class Bias : uint8_t { never, always, if_said, unless_denied };

// Which layers have the sliding window, where config.json has one.
enum class Windows : uint8_t {
  never,
  all,
  by_layer,          // layer_types says; without that key all but every `full_every`-th
  by_layer_if_used,  // where use_sliding_window: layer_types says; without that key those from max_window_layers on
};

// What an architecture's name implies: what config.json does not say, and its defaults. A new model of the family is a
// row.
struct Architecture {
  const char* name;
  Bias qkv_bias = Bias::never, o_bias = Bias::never, mlp_bias = Bias::never;
  bool qk_norm = false;
  Windows windows = Windows::never;
  int full_every = 0;  // 0 = none
  int head_dim = 0;    // 0 = hidden_size / num_attention_heads
  double rope_theta = 10000;
  double local_rope_theta = 0;     // of layers with a window; 0 = the same rope everywhere
  bool scaled_rope = false;        // without rope_parameters it would be another model
  bool temperature = false;        // llama_4_scaling_beta
  bool gemma = false;              // 1 + w in norms, norms of outputs, scaled embeddings, query_pre_attn_scalar
  bool attention_softcap = false;  // attn_logit_softcapping, of Gemma
  bool gpt_oss = false;            // learned sinks, experts
};
constexpr Architecture kArchitectures[] = {
    {.name = "LlamaForCausalLM", .qkv_bias = Bias::if_said, .o_bias = Bias::if_said, .mlp_bias = Bias::if_said},
    {.name = "Qwen2ForCausalLM", .qkv_bias = Bias::always, .windows = Windows::by_layer_if_used},
    {.name = "Qwen3ForCausalLM",
     .qkv_bias = Bias::if_said,
     .o_bias = Bias::if_said,
     .qk_norm = true,
     .windows = Windows::by_layer_if_used,
     .head_dim = 128},
    {.name = "MistralForCausalLM", .windows = Windows::all},
    {.name = "MinistralForCausalLM", .windows = Windows::by_layer},
    {.name = "Ministral3ForCausalLM",
     .windows = Windows::all,
     .head_dim = 128,
     .scaled_rope = true,
     .temperature = true},
    {.name = "Gemma2ForCausalLM",
     .qkv_bias = Bias::if_said,
     .o_bias = Bias::if_said,
     .windows = Windows::by_layer,
     .full_every = 2,
     .head_dim = 256,
     .gemma = true,
     .attention_softcap = true},
    {.name = "Gemma3ForCausalLM",
     .qkv_bias = Bias::if_said,
     .o_bias = Bias::if_said,
     .qk_norm = true,
     .windows = Windows::by_layer,
     .full_every = 6,
     .head_dim = 256,
     .rope_theta = 1e6,
     .local_rope_theta = 1e4,
     .gemma = true},
    {.name = "GptOssForCausalLM",
     .qkv_bias = Bias::unless_denied,
     .o_bias = Bias::unless_denied,
     .windows = Windows::by_layer,
     .full_every = 2,
     .head_dim = 64,
     .rope_theta = 150000,
     .scaled_rope = true,
     .gpt_oss = true},
};

// Reads members of one object and keeps the first error; later reads then give their defaults.
class Reader {
 public:
  Reader(const Json& json, std::string source) : json_(json), source_(std::move(source)) {}

  // An integer in [low, high]; required unless there is a default.
  int64_t integer(const char* key, int64_t low, int64_t high, std::optional<int64_t> otherwise = {}) {
    const Json& value = member(json_, key);
    if (value.is_null()) return missing(key, otherwise, low);
    const bool fits = value.is_number_integer() &&
                      !(value.is_number_unsigned() && value.get<uint64_t>() > std::numeric_limits<int64_t>::max());
    if (!fits || value.get<int64_t>() < low || value.get<int64_t>() > high) {
      return fail(key, value, fmt::format("an integer from {} to {} is supported", low, high)), low;
    }
    return value.get<int64_t>();
  }

  // A number in (low, high); required unless there is a default.
  double number(const char* key, double low, double high, std::optional<double> otherwise = {}) {
    const Json& value = member(json_, key);
    if (value.is_null()) return missing(key, otherwise, high);
    if (!value.is_number() || !(value.get<double>() > low && value.get<double>() < high)) {
      return fail(key, value, fmt::format("a number between {} and {} is supported", low, high)), high;
    }
    return value.get<double>();
  }

  // A number in (low, high), or null = 0; the key must be there, because what its absence means differs by model.
  double number_or_null(const char* key, double low, double high) {
    return present(key) ? number(key, low, high, 0.0) : 0;
  }
  // The same of integers in [low, high].
  int64_t integer_or_null(const char* key, int64_t low, int64_t high) {
    return present(key) ? integer(key, low, high, 0) : 0;
  }

  bool boolean(const char* key, bool otherwise) {
    const Json& value = member(json_, key);
    if (value.is_null()) return otherwise;
    if (!value.is_boolean()) return fail(key, value, "true or false is supported"), otherwise;
    return value.get<bool>();
  }

  std::string text(const char* key, const char* otherwise) {
    const Json& value = member(json_, key);
    if (value.is_null()) return otherwise;
    if (!value.is_string()) return fail(key, value, "a string is supported"), otherwise;
    return value.get<std::string>();
  }

  // Null, a token id, or a list of them.
  std::vector<int32_t> tokens(const char* key, int64_t vocab) {
    const Json& value = member(json_, key);
    std::vector<int32_t> out;
    const auto add = [&](const Json& id) {
      if (!id.is_number_integer() || id.get<int64_t>() < 0 || id.get<int64_t>() >= vocab) {
        fail(key, id, fmt::format("token ids below vocab_size {} are supported", vocab));
      } else {
        out.push_back(static_cast<int32_t>(id.get<int64_t>()));
      }
    };
    if (value.is_array()) {
      for (const Json& id : value) add(id);
    } else if (!value.is_null()) {
      add(value);
    }
    return out;
  }

  void fail(const char* key, const Json& value, const std::string& supported) {
    if (status_.ok()) {
      status_ = unsupported(fmt::format("{}: {} {} is not supported: {}", source_, key, shown(value), supported));
    }
  }
  const Status& status() const { return status_; }
  const std::string& source() const { return source_; }

 private:
  bool present(const char* key) {
    if (json_.is_object() && json_.contains(key)) return true;
    if (status_.ok()) status_ = data_loss(fmt::format("{}: {} is missing (null means none)", source_, key));
    return false;
  }

  template <class T>
  T missing(const char* key, std::optional<T> otherwise, T placeholder) {
    if (!otherwise && status_.ok()) status_ = data_loss(fmt::format("{}: {} is missing", source_, key));
    return otherwise.value_or(placeholder);
  }

  const Json& json_;
  std::string source_;
  Status status_;
};

// One rope from `parameters`, the object at `key`; `theta` and `top`, the whole file, have what it may lack.
Result<RopeConfig> parse_rope(const Json& parameters, const std::string& key, double theta, const Json& top,
                              const std::string& source, int64_t max_positions) {
  Reader whole(top, source), in(parameters, fmt::format("{}: {}", source, key));
  if (!parameters.is_null() && !parameters.is_object()) whole.fail(key.c_str(), parameters, "an object or null is");
  RopeConfig rope;
  rope.theta = in.number("rope_theta", 1, 1e12, theta);
  for (Reader* reader : {&whole, &in}) {
    const double partial = reader->number("partial_rotary_factor", 0, 2, 1.0);
    if (partial != 1) reader->fail("partial_rotary_factor", partial, "1 is");
  }
  const char* original = "original_max_position_embeddings";
  rope.original_max_positions =
      whole.integer(original, 1, int64_t{1} << 40, in.integer(original, 1, int64_t{1} << 40, max_positions));
  const std::string type = in.text("rope_type", in.text("type", "default").c_str());
  if (type == "linear") {
    rope.scaling = RopeConfig::Scaling::linear;
  } else if (type == "llama3") {
    rope.scaling = RopeConfig::Scaling::llama3;
    rope.low_freq_factor = in.number("low_freq_factor", 0, 1e6);
    rope.high_freq_factor = in.number("high_freq_factor", 0, 1e6);
    if (in.status().ok() && rope.high_freq_factor <= rope.low_freq_factor) {
      in.fail("high_freq_factor", rope.high_freq_factor,
              fmt::format("values above low_freq_factor {} are", rope.low_freq_factor));
    }
  } else if (type == "yarn") {
    rope.scaling = RopeConfig::Scaling::yarn;
    rope.beta_slow = in.number("beta_slow", 0, 1e6, 1.0);
    rope.beta_fast = in.number("beta_fast", 0, 1e6, 32.0);
    rope.truncate = in.boolean("truncate", true);
  } else if (type != "default") {
    in.fail("rope_type", type, "default, linear, llama3 and yarn are");
  }
  if (rope.scaling != RopeConfig::Scaling::none) rope.factor = in.number("factor", 0, 1e6);
  if (rope.scaling == RopeConfig::Scaling::yarn) {
    // How much attention scores must grow to stay as sharp over a longer context, by the paper's fit.
    const auto sharpness = [&](double m) { return rope.factor <= 1 ? 1 : 0.1 * m * std::log(rope.factor) + 1; };
    const double m = in.number("mscale", -1, 1e6, 0.0), of_all = in.number("mscale_all_dim", -1, 1e6, 0.0);
    const double fitted = m != 0 && of_all != 0 ? sharpness(m) / sharpness(of_all) : sharpness(1);
    if (!(fitted > 0 && std::isfinite(fitted))) in.fail("mscale_all_dim", of_all, "0 or more is");
    rope.attention_factor = in.number("attention_factor", 0, 1e6, fitted);
  }
  THRIFTATTN_RETURN_IF_ERROR(whole.status());
  THRIFTATTN_RETURN_IF_ERROR(in.status());
  return rope;
}

// RoPE in the forms that config.json has had: `rope_theta` (and `rope_local_base_freq`) beside an optional
// `rope_scaling`, or all together in `rope_parameters`, there once or by layer type.
Status parse_ropes(const Json& json, const Architecture& row, const std::string& source, ModelConfig* c) {
  Reader top(json, source);
  const Json& together = member(json, "rope_parameters");
  const double theta = top.number("rope_theta", 1, 1e12, row.rope_theta);
  const double local_theta = top.number("rope_local_base_freq", 1, 1e12, row.local_rope_theta);
  THRIFTATTN_RETURN_IF_ERROR(top.status());
  const auto rope = [&](const Json& parameters, const char* key, double base) {
    return parse_rope(parameters, key, base, json, source, c->max_positions);
  };
  const Json &global = member(together, "full_attention"), &local = member(together, "sliding_attention");
  if (row.local_rope_theta != 0 && together.is_object()) {
    if (!global.is_object() || !local.is_object()) {
      top.fail("rope_parameters", together, "an object for full_attention and one for sliding_attention are");
      return top.status();
    }
    THRIFTATTN_ASSIGN_OR_RETURN(of_all, rope(global, "rope_parameters.full_attention", theta));
    THRIFTATTN_ASSIGN_OR_RETURN(of_local, rope(local, "rope_parameters.sliding_attention", local_theta));
    c->rope = of_all;
    c->local_rope = of_local;
    return {};
  }
  if (!global.is_null() || !local.is_null()) {
    top.fail("rope_parameters", together, fmt::format("one rope for all layers of {} is", row.name));
    return top.status();
  }
  const char* key = together.is_null() ? "rope_scaling" : "rope_parameters";
  if (row.scaled_rope && member(json, key).is_null()) {
    return data_loss(fmt::format("{}: rope_parameters or rope_scaling is missing", source));
  }
  THRIFTATTN_ASSIGN_OR_RETURN(of_all, rope(member(json, key), key, theta));
  c->rope = of_all;
  if (row.local_rope_theta != 0) c->local_rope = RopeConfig{.theta = local_theta};
  if (row.temperature) {
    Reader in(member(json, key), fmt::format("{}: {}", source, key));
    c->temperature_beta = in.number("llama_4_scaling_beta", -1, 1e6);
    return in.status();
  }
  return {};
}

// Which layers see everything and which a window.
Status parse_windows(const Json& json, const Architecture& row, const std::string& source, ModelConfig* c) {
  Reader in(json, source);
  c->windows.assign(c->layers, 0);
  const bool if_used = row.windows == Windows::by_layer_if_used;
  int64_t window = 0;
  if (row.windows != Windows::never && (!if_used || in.boolean("use_sliding_window", false))) {
    constexpr int64_t kMost = int64_t{1} << 40;
    // Layers that alternate need one; the rest may do without.
    window =
        row.full_every > 0 ? in.integer("sliding_window", 1, kMost) : in.integer_or_null("sliding_window", 1, kMost);
  }
  int64_t every = row.full_every, first = 0;
  if (if_used && window != 0) first = in.integer("max_window_layers", 0, 1 << 20);
  if (row.local_rope_theta != 0) every = in.integer("sliding_window_pattern", 1, 1 << 20, every);
  for (int64_t i = first; i < c->layers; ++i) {
    if (every == 0 || (i + 1) % every != 0) c->windows[i] = window;
  }

  const Json& types = member(json, "layer_types");
  if (types.is_null()) return in.status();
  if (!types.is_array() || std::ssize(types) != c->layers) {
    in.fail("layer_types", types, fmt::format("a list of num_hidden_layers {} words is", c->layers));
    return in.status();
  }
  for (int i = 0; i < c->layers; ++i) {
    const bool sliding = types[i] == "sliding_attention";
    if (!sliding && types[i] != "full_attention") {
      in.fail("layer_types", types[i], "full_attention and sliding_attention are");
    } else if (sliding && window == 0) {
      in.fail("layer_types", types[i], "full_attention is, because the model has no sliding_window");
    } else if (row.windows == Windows::all && !sliding && window != 0) {
      in.fail("layer_types", types[i], fmt::format("all layers of {} have the sliding_window", row.name));
    }
    c->windows[i] = sliding ? window : 0;
  }
  return in.status();
}

Result<const Architecture*> find_architecture(const Json& json, const std::string& source) {
  const Json& names = member(json, "architectures");
  if (names.is_null()) return data_loss(fmt::format("{}: architectures is missing", source));
  if (names.is_array() && names.size() == 1 && names[0].is_string()) {
    for (const Architecture& row : kArchitectures) {
      if (names[0].get<std::string>() == row.name) return &row;
    }
  }
  return unsupported(fmt::format("{}: architectures {} is not supported: {} are", source, shown(names),
                                 fmt::join(architecture_names(), ", ")));
}

}  // namespace

std::vector<std::string> architecture_names() {
  std::vector<std::string> names;
  for (const Architecture& row : kArchitectures) names.emplace_back(row.name);
  return names;
}

Result<ModelConfig> ModelConfig::parse(std::string_view text, const std::string& source) {
  THRIFTATTN_ASSIGN_OR_RETURN(json, parse_object(text, source));
  THRIFTATTN_ASSIGN_OR_RETURN(row, find_architecture(json, source));

  Reader in(json, source);
  ModelConfig c;
  c.architecture = row->name;
  c.hidden = in.integer("hidden_size", 1, 1 << 20);
  c.intermediate = in.integer("intermediate_size", 1, 1 << 22);
  c.layers = static_cast<int>(in.integer("num_hidden_layers", 1, 4096));
  c.h_q = static_cast<int>(in.integer("num_attention_heads", 1, 4096));
  c.h_kv = static_cast<int>(in.integer("num_key_value_heads", 1, 4096, c.h_q));
  c.vocab = in.integer("vocab_size", 1, 1 << 24);
  c.max_positions = in.integer("max_position_embeddings", 1, int64_t{1} << 40);
  c.norm_eps = in.number("rms_norm_eps", 0, 1);
  c.tied_embeddings = in.boolean("tie_word_embeddings", row->gemma);
  THRIFTATTN_RETURN_IF_ERROR(in.status());

  if (c.h_q % c.h_kv != 0) {
    in.fail("num_key_value_heads", c.h_kv, fmt::format("divisors of num_attention_heads {} are", c.h_q));
  }
  if (row->head_dim == 0 && member(json, "head_dim").is_null() && c.hidden % c.h_q != 0) {
    in.fail("hidden_size", c.hidden, fmt::format("multiples of num_attention_heads {} are, or a head_dim", c.h_q));
  }
  c.d = c.d_v = static_cast<int>(in.integer("head_dim", 2, 4096, row->head_dim ? row->head_dim : c.hidden / c.h_q));
  if (c.d % 2 != 0) in.fail("head_dim", c.d, "even numbers are");
  c.sm_scale = 1 / std::sqrt(row->gemma ? in.number("query_pre_attn_scalar", 0, 1e6) : c.d);

  const auto biased = [&](Bias bias, const char* key) {
    return bias == Bias::always || (bias != Bias::never && in.boolean(key, bias == Bias::unless_denied));
  };
  c.qkv_bias = biased(row->qkv_bias, "attention_bias");
  c.o_bias = biased(row->o_bias, "attention_bias");
  c.mlp_bias = biased(row->mlp_bias, "mlp_bias");
  c.qk_norm = row->qk_norm;
  if (row->gemma) {
    c.norm_offset = 1;
    c.output_norms = true;
    c.embedding_scale = std::sqrt(static_cast<double>(c.hidden));
    c.logit_softcap = in.number_or_null("final_logit_softcapping", 0, 1e6);
    if (in.boolean("use_bidirectional_attention", false)) in.fail("use_bidirectional_attention", true, "false is");
    if (row->attention_softcap) {
      c.attention_softcap = in.number_or_null("attn_logit_softcapping", 0, 1e6);
    } else if (const Json& cap = member(json, "attn_logit_softcapping"); !cap.is_null()) {
      in.fail("attn_logit_softcapping", cap, "null is");
    }
  }
  if (row->gpt_oss) {
    c.sinks = true;
    c.experts = static_cast<int>(in.integer("num_local_experts", 1, 4096));
    c.experts_per_token = static_cast<int>(in.integer("num_experts_per_tok", 1, c.experts));
    c.swiglu_limit = in.number("swiglu_limit", 0, 1e6, 7.0);
    c.swiglu_alpha = in.number("swiglu_alpha", 0, 1e6, 1.702);
  }

  const char* act = row->gemma ? "hidden_activation" : "hidden_act";
  const std::string activation = in.text(act, row->gemma ? "gelu_pytorch_tanh" : "silu");
  if (activation == "gelu_pytorch_tanh" && !row->gpt_oss) {
    c.activation = Activation::gelu_tanh;
  } else if (activation != "silu") {
    in.fail(act, activation, row->gpt_oss ? "silu is" : "silu and gelu_pytorch_tanh are");
  }
  if (const Json& quantization = member(json, "quantization_config"); !quantization.is_null()) {
    in.fail("quantization_config", member(quantization, "quant_method"), "weights in F32, F16 or BF16 are");
  }
  if (const auto bos = in.tokens("bos_token_id", c.vocab); !bos.empty()) c.bos = bos[0];
  c.eos = in.tokens("eos_token_id", c.vocab);
  THRIFTATTN_RETURN_IF_ERROR(in.status());
  THRIFTATTN_RETURN_IF_ERROR(parse_ropes(json, *row, source, &c));
  THRIFTATTN_RETURN_IF_ERROR(parse_windows(json, *row, source, &c));
  return c;
}

Result<ModelConfig> ModelConfig::load(const std::string& dir) {
  const std::string path = dir + "/config.json";
  THRIFTATTN_ASSIGN_OR_RETURN(text, read_file(path));
  THRIFTATTN_ASSIGN_OR_RETURN(config, parse(text, path));
  const std::string generation_path = dir + "/generation_config.json";
  if (std::error_code error; std::filesystem::exists(generation_path, error)) {
    THRIFTATTN_ASSIGN_OR_RETURN(generation_text, read_file(generation_path));
    THRIFTATTN_ASSIGN_OR_RETURN(generation, parse_object(generation_text, generation_path));
    Reader in(generation, generation_path);
    const auto eos = in.tokens("eos_token_id", config.vocab);
    THRIFTATTN_RETURN_IF_ERROR(in.status());
    if (!eos.empty()) config.eos = eos;
  }
  return config;
}

}  // namespace thriftattn::model
