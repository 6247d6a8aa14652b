#include "model/config.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <cmath>
#include <limits>

#include "model/json_file.h"

namespace thriftattn::model {
namespace {

enum class Bias : uint8_t { never, always, as_configured };

// What an architecture's name implies. A new model of the family is a row.
struct Architecture {
  const char* name;
  Bias qkv_bias, o_bias, mlp_bias;
  bool qk_norm;
};
constexpr Architecture kArchitectures[] = {
    {"LlamaForCausalLM", Bias::as_configured, Bias::as_configured, Bias::as_configured, false},
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
  template <class T>
  T missing(const char* key, std::optional<T> otherwise, T placeholder) {
    if (!otherwise && status_.ok()) status_ = data_loss(fmt::format("{}: {} is missing", source_, key));
    return otherwise.value_or(placeholder);
  }

  const Json& json_;
  std::string source_;
  Status status_;
};

// RoPE in both forms that config.json has had: `rope_theta` beside an optional `rope_scaling`, or both together in
// `rope_parameters`.
Result<RopeConfig> parse_rope(const Json& json, const std::string& source, int64_t max_positions) {
  const bool together = member(json, "rope_parameters").is_object();
  const char* key = together ? "rope_parameters" : "rope_scaling";
  const Json& scaling = member(json, key);
  RopeConfig rope;
  Reader top(json, source), in(scaling, fmt::format("{}: {}", source, key));
  if (!scaling.is_null() && !scaling.is_object()) top.fail(key, scaling, "an object or null is");

  const double at_top = top.number("rope_theta", 1, 1e12, 10000.0);
  rope.theta = together ? in.number("rope_theta", 1, 1e12, at_top) : at_top;
  for (Reader* reader : {&top, &in}) {
    const double partial = reader->number("partial_rotary_factor", 0, 2, 1.0);
    if (partial != 1) reader->fail("partial_rotary_factor", partial, "1 is");
  }
  const std::string type = in.text("rope_type", in.text("type", "default").c_str());
  if (type == "linear" || type == "llama3") {
    rope.scaling = type == "linear" ? RopeConfig::Scaling::linear : RopeConfig::Scaling::llama3;
    rope.factor = in.number("factor", 0, 1e6);
    if (type == "llama3") {
      rope.low_freq_factor = in.number("low_freq_factor", 0, 1e6);
      rope.high_freq_factor = in.number("high_freq_factor", 0, 1e6);
      rope.original_max_positions = in.integer("original_max_position_embeddings", 1, int64_t{1} << 40, max_positions);
      if (in.status().ok() && rope.high_freq_factor <= rope.low_freq_factor) {
        in.fail("high_freq_factor", rope.high_freq_factor,
                fmt::format("values above low_freq_factor {} are", rope.low_freq_factor));
      }
    }
  } else if (type != "default") {
    in.fail("rope_type", type, "default, linear and llama3 are");
  }
  THRIFTATTN_RETURN_IF_ERROR(top.status());
  THRIFTATTN_RETURN_IF_ERROR(in.status());
  return rope;
}

Result<const Architecture*> find_architecture(const Json& json, const std::string& source) {
  const Json& names = member(json, "architectures");
  if (names.is_null()) return data_loss(fmt::format("{}: architectures is missing", source));
  if (names.is_array() && names.size() == 1 && names[0].is_string()) {
    for (const Architecture& row : kArchitectures) {
      if (names[0].get<std::string>() == row.name) return &row;
    }
  }
  return unsupported(fmt::format("{}: architectures {} is not supported: {} is", source, shown(names),
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
  c.tied_embeddings = in.boolean("tie_word_embeddings", false);
  THRIFTATTN_RETURN_IF_ERROR(in.status());

  if (c.h_q % c.h_kv != 0) {
    in.fail("num_key_value_heads", c.h_kv, fmt::format("divisors of num_attention_heads {} are", c.h_q));
  }
  if (member(json, "head_dim").is_null() && c.hidden % c.h_q != 0) {
    in.fail("hidden_size", c.hidden, fmt::format("multiples of num_attention_heads {} are, or a head_dim", c.h_q));
  }
  c.d = c.d_v = static_cast<int>(in.integer("head_dim", 2, 4096, c.hidden / c.h_q));
  if (c.d % 2 != 0) in.fail("head_dim", c.d, "even numbers are");

  const bool attention_bias = in.boolean("attention_bias", false), mlp_bias = in.boolean("mlp_bias", false);
  const auto biased = [](Bias bias, bool configured) {
    return bias == Bias::as_configured ? configured : bias == Bias::always;
  };
  c.qkv_bias = biased(row->qkv_bias, attention_bias);
  c.o_bias = biased(row->o_bias, attention_bias);
  c.mlp_bias = biased(row->mlp_bias, mlp_bias);
  c.qk_norm = row->qk_norm;

  const std::string activation = in.text("hidden_act", "silu");
  if (activation != "silu") in.fail("hidden_act", activation, "silu is");
  if (const Json& quantization = member(json, "quantization_config"); !quantization.is_null()) {
    in.fail("quantization_config", member(quantization, "quant_method"), "weights in F32, F16 or BF16 are");
  }
  if (const auto bos = in.tokens("bos_token_id", c.vocab); !bos.empty()) c.bos = bos[0];
  c.eos = in.tokens("eos_token_id", c.vocab);
  THRIFTATTN_RETURN_IF_ERROR(in.status());
  THRIFTATTN_ASSIGN_OR_RETURN(rope, parse_rope(json, source, c.max_positions));
  c.rope = rope;
  return c;
}

Result<ModelConfig> ModelConfig::load(const std::string& dir) {
  const std::string path = dir + "/config.json";
  THRIFTATTN_ASSIGN_OR_RETURN(text, read_file(path));
  return parse(text, path);
}

}  // namespace thriftattn::model
