#include "model/checkpoint.h"

#include <fmt/format.h>

#include <set>
#include <utility>

namespace thriftattn::model {
namespace {

// Finds the tensors of a checkpoint by their Hugging Face names, and keeps account of those it has found.
class Finder {
 public:
  Finder(const Safetensors& files, const ModelConfig& config) : files_(files), c_(config) {}

  Status tensor(const std::string& name, const std::vector<int64_t>& shape, Tensor* out) {
    found_.insert(name);
    THRIFTATTN_ASSIGN_OR_RETURN(tensor, files_.find(name, shape));
    *out = std::move(tensor);
    return {};
  }

  // (name, outputs) of each part.
  Status projection(const std::vector<std::pair<std::string, int64_t>>& parts, int64_t inputs, bool bias,
                    Projection* out) {
    for (const auto& [name, outputs] : parts) {
      THRIFTATTN_RETURN_IF_ERROR(tensor(name + ".weight", {outputs, inputs}, &out->weights.emplace_back()));
      if (bias) THRIFTATTN_RETURN_IF_ERROR(tensor(name + ".bias", {outputs}, &out->biases.emplace_back()));
    }
    return {};
  }

  // All experts in one tensor.
  Status experts(const std::string& name, int64_t inputs, int64_t outputs, Tensor* weights, Tensor* biases) {
    if (files_.contains(name + "_blocks")) {
      return unsupported(fmt::format("{}: MXFP4 weights are not supported: F32, F16 and BF16 are", name));
    }
    THRIFTATTN_RETURN_IF_ERROR(tensor(name, {c_.experts, inputs, outputs}, weights));
    return tensor(name + "_bias", {c_.experts, outputs}, biases);
  }

  Status layer(int i, LayerTensors* out) {
    const std::string at = fmt::format("model.layers.{}.", i), attention = at + "self_attn.", mlp = at + "mlp.";
    const auto norm_of_hidden = [&](const char* name, Tensor* norm) {
      return tensor(at + name + ".weight", {c_.hidden}, norm);
    };
    THRIFTATTN_RETURN_IF_ERROR(norm_of_hidden("input_layernorm", &out->attention_norm));
    if (c_.output_norms) {
      THRIFTATTN_RETURN_IF_ERROR(norm_of_hidden("post_attention_layernorm", &out->attention_output_norm.emplace()));
      THRIFTATTN_RETURN_IF_ERROR(norm_of_hidden("pre_feedforward_layernorm", &out->mlp_norm));
      THRIFTATTN_RETURN_IF_ERROR(norm_of_hidden("post_feedforward_layernorm", &out->mlp_output_norm.emplace()));
    } else {
      THRIFTATTN_RETURN_IF_ERROR(norm_of_hidden("post_attention_layernorm", &out->mlp_norm));
    }
    if (c_.qk_norm) {
      THRIFTATTN_RETURN_IF_ERROR(tensor(attention + "q_norm.weight", {c_.d}, &out->q_norm.emplace()));
      THRIFTATTN_RETURN_IF_ERROR(tensor(attention + "k_norm.weight", {c_.d}, &out->k_norm.emplace()));
    }
    if (c_.sinks) THRIFTATTN_RETURN_IF_ERROR(tensor(attention + "sinks", {c_.h_q}, &out->sinks.emplace()));
    const int64_t q = int64_t{c_.h_q} * c_.d, k = int64_t{c_.h_kv} * c_.d, v = int64_t{c_.h_kv} * c_.d_v;
    THRIFTATTN_RETURN_IF_ERROR(
        projection({{attention + "q_proj", q}, {attention + "k_proj", k}, {attention + "v_proj", v}}, c_.hidden,
                   c_.qkv_bias, &out->qkv));
    THRIFTATTN_RETURN_IF_ERROR(
        projection({{attention + "o_proj", c_.hidden}}, int64_t{c_.h_q} * c_.d_v, c_.o_bias, &out->o));
    if (c_.experts > 0) {
      THRIFTATTN_RETURN_IF_ERROR(projection({{mlp + "router", c_.experts}}, c_.hidden, true, &out->router));
      THRIFTATTN_RETURN_IF_ERROR(experts(mlp + "experts.gate_up_proj", c_.hidden, 2 * c_.intermediate,
                                         &out->gate_up_experts, &out->gate_up_biases));
      return experts(mlp + "experts.down_proj", c_.intermediate, c_.hidden, &out->down_experts, &out->down_biases);
    }
    THRIFTATTN_RETURN_IF_ERROR(projection({{mlp + "gate_proj", c_.intermediate}, {mlp + "up_proj", c_.intermediate}},
                                          c_.hidden, c_.mlp_bias, &out->gate_up));
    return projection({{mlp + "down_proj", c_.hidden}}, c_.intermediate, c_.mlp_bias, &out->down);
  }

  // A tensor of the model that nothing has asked for.
  Status check_all_found() const {
    for (const auto& [name, tensor] : files_.tensors()) {
      if (!name.starts_with("model.") && !name.starts_with("lm_head.")) continue;
      if (found_.contains(name) || name.ends_with("rotary_emb.inv_freq")) continue;
      if (name == "lm_head.weight" && c_.tied_embeddings) continue;  // the same once more
      const std::string what = name.starts_with(fmt::format("model.layers.{}.", c_.layers))
                                   ? fmt::format("config.json says num_hidden_layers {}", c_.layers)
                               : name.ends_with(".bias")
                                   ? "config.json says that there is no bias"
                                   : fmt::format("{} by its config.json has no such tensor", c_.architecture);
      return data_loss(fmt::format("{}: tensor {}: {}", tensor.file, name, what));
    }
    return {};
  }

 private:
  const Safetensors& files_;
  const ModelConfig& c_;
  std::set<std::string> found_;
};

}  // namespace

Result<Checkpoint> Checkpoint::open(const std::string& dir) {
  Checkpoint out;
  THRIFTATTN_ASSIGN_OR_RETURN(config, ModelConfig::load(dir));
  out.config = std::move(config);
  THRIFTATTN_ASSIGN_OR_RETURN(files, Safetensors::open(dir));
  out.files = std::move(files);
  const ModelConfig& c = out.config;
  Finder finder(out.files, c);
  THRIFTATTN_RETURN_IF_ERROR(finder.tensor("model.embed_tokens.weight", {c.vocab, c.hidden}, &out.embedding));
  for (int i = 0; i < c.layers; ++i) THRIFTATTN_RETURN_IF_ERROR(finder.layer(i, &out.layers.emplace_back()));
  THRIFTATTN_RETURN_IF_ERROR(finder.tensor("model.norm.weight", {c.hidden}, &out.norm));
  const char* head = c.tied_embeddings ? "model.embed_tokens" : "lm_head";
  THRIFTATTN_RETURN_IF_ERROR(finder.projection({{head, c.vocab}}, c.hidden, false, &out.logits));
  THRIFTATTN_RETURN_IF_ERROR(finder.check_all_found());
  return out;
}

std::vector<float> values(const Tensor& tensor, double offset) {
  std::vector<float> out(tensor.elements());
  tensor.read(0, tensor.elements(), out.data());
  if (offset != 0) {
    for (float& value : out) value += static_cast<float>(offset);
  }
  return out;
}

}  // namespace thriftattn::model
