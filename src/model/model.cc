#include "model/model.h"

#include <fmt/format.h>

#include <dnnl.hpp>
#include <exception>
#include <set>
#include <utility>

#include "model/weights.h"

namespace thriftattn::model {
namespace {

// Builds weights from the tensors of a checkpoint by their Hugging Face names, and keeps account of those it has read.
class Loader {
 public:
  Loader(const Safetensors& files, Compute compute, ThreadPool& pool) : files_(files), compute_(compute), pool_(pool) {}

  Result<Tensor> tensor(const std::string& name, const std::vector<int64_t>& shape) {
    read_.insert(name);
    return files_.find(name, shape);
  }

  Status vector(const std::string& name, int64_t n, std::vector<float>* out) {
    THRIFTATTN_ASSIGN_OR_RETURN(values, tensor(name, {n}));
    out->resize(n);
    values.read(0, n, out->data());
    return {};
  }

  Status norm(const std::string& name, int64_t n, double offset, std::vector<float>* out) {
    THRIFTATTN_RETURN_IF_ERROR(vector(name + ".weight", n, out));
    if (offset != 0) {
      for (float& weight : *out) weight += static_cast<float>(offset);
    }
    return {};
  }

  // One product of several projections that read the same input: (name, outputs) of each.
  Status linear(const std::vector<std::pair<std::string, int64_t>>& parts, int64_t inputs, bool bias, Linear* out) {
    std::vector<Tensor> weights, biases;
    for (const auto& [name, outputs] : parts) {
      THRIFTATTN_ASSIGN_OR_RETURN(weight, tensor(name + ".weight", {outputs, inputs}));
      weights.push_back(std::move(weight));
      if (!bias) continue;
      THRIFTATTN_ASSIGN_OR_RETURN(b, tensor(name + ".bias", {outputs}));
      biases.push_back(std::move(b));
    }
    THRIFTATTN_ASSIGN_OR_RETURN(linear, Linear::create(weights, biases, compute_, pool_));
    *out = std::move(linear);
    return {};
  }

  Status experts(const std::string& at, const ModelConfig& c, Experts* out) {
    THRIFTATTN_RETURN_IF_ERROR(linear({{at + "router", c.experts}}, c.hidden, true, &out->router));
    out->all.resize(c.experts);
    // All experts in one tensor: [experts, inputs, outputs].
    const auto read = [&](const char* name, int64_t inputs, int64_t outputs, Linear Expert::*part) -> Status {
      const std::string full = at + "experts." + name;
      if (files_.contains(full + "_blocks")) {
        return unsupported(fmt::format("{}: MXFP4 weights are not supported: F32, F16 and BF16 are", full));
      }
      THRIFTATTN_ASSIGN_OR_RETURN(weights, tensor(full, {c.experts, inputs, outputs}));
      THRIFTATTN_ASSIGN_OR_RETURN(biases, tensor(full + "_bias", {c.experts, outputs}));
      for (int e = 0; e < c.experts; ++e) {
        const Tensor weight = weights.at(e), bias = biases.at(e);
        THRIFTATTN_ASSIGN_OR_RETURN(linear, Linear::create({&weight, 1}, {&bias, 1}, compute_, pool_, Rows::inputs));
        out->all[e].*part = std::move(linear);
      }
      return {};
    };
    THRIFTATTN_RETURN_IF_ERROR(read("gate_up_proj", c.hidden, 2 * c.intermediate, &Expert::gate_up));
    return read("down_proj", c.intermediate, c.hidden, &Expert::down);
  }

  Status layer(const ModelConfig& c, int i, LayerWeights* w) {
    const std::string at = fmt::format("model.layers.{}.", i), attention = at + "self_attn.", mlp = at + "mlp.";
    const auto norm_of_hidden = [&](const char* name, std::vector<float>* out) {
      return norm(at + name, c.hidden, c.norm_offset, out);
    };
    THRIFTATTN_RETURN_IF_ERROR(norm_of_hidden("input_layernorm", &w->attention_norm));
    if (c.output_norms) {
      THRIFTATTN_RETURN_IF_ERROR(norm_of_hidden("post_attention_layernorm", &w->attention_output_norm));
      THRIFTATTN_RETURN_IF_ERROR(norm_of_hidden("pre_feedforward_layernorm", &w->mlp_norm));
      THRIFTATTN_RETURN_IF_ERROR(norm_of_hidden("post_feedforward_layernorm", &w->mlp_output_norm));
    } else {
      THRIFTATTN_RETURN_IF_ERROR(norm_of_hidden("post_attention_layernorm", &w->mlp_norm));
    }
    if (c.qk_norm) {
      THRIFTATTN_RETURN_IF_ERROR(norm(attention + "q_norm", c.d, c.norm_offset, &w->q_norm));
      THRIFTATTN_RETURN_IF_ERROR(norm(attention + "k_norm", c.d, c.norm_offset, &w->k_norm));
    }
    if (c.sinks) THRIFTATTN_RETURN_IF_ERROR(vector(attention + "sinks", c.h_q, &w->sinks));
    const int64_t q = int64_t{c.h_q} * c.d, k = int64_t{c.h_kv} * c.d, v = int64_t{c.h_kv} * c.d_v;
    THRIFTATTN_RETURN_IF_ERROR(linear({{attention + "q_proj", q}, {attention + "k_proj", k}, {attention + "v_proj", v}},
                                      c.hidden, c.qkv_bias, &w->qkv));
    THRIFTATTN_RETURN_IF_ERROR(linear({{attention + "o_proj", c.hidden}}, int64_t{c.h_q} * c.d_v, c.o_bias, &w->o));
    if (c.experts > 0) return experts(mlp, c, &w->experts);
    THRIFTATTN_RETURN_IF_ERROR(linear({{mlp + "gate_proj", c.intermediate}, {mlp + "up_proj", c.intermediate}},
                                      c.hidden, c.mlp_bias, &w->gate_up));
    return linear({{mlp + "down_proj", c.hidden}}, c.intermediate, c.mlp_bias, &w->down);
  }

  // A tensor of the model that nothing has read: without it the model would run without a word, as another one.
  Status check_all_read(const ModelConfig& c) const {
    for (const auto& [name, tensor] : files_.tensors()) {
      if (!name.starts_with("model.") && !name.starts_with("lm_head.")) continue;
      if (read_.contains(name) || name.ends_with("rotary_emb.inv_freq")) continue;
      if (name == "lm_head.weight" && c.tied_embeddings) continue;  // the same once more
      const std::string what = name.starts_with(fmt::format("model.layers.{}.", c.layers))
                                   ? fmt::format("config.json says num_hidden_layers {}", c.layers)
                               : name.ends_with(".bias")
                                   ? "config.json says that there is no bias"
                                   : fmt::format("{} by its config.json has no such tensor", c.architecture);
      return data_loss(fmt::format("{}: tensor {}: {}", tensor.file, name, what));
    }
    return {};
  }

 private:
  const Safetensors& files_;
  Compute compute_;
  ThreadPool& pool_;
  std::set<std::string> read_;
};

Result<Weights> load_weights(const std::string& dir, const ModelConfig& c, Compute compute, ThreadPool& pool) {
  THRIFTATTN_ASSIGN_OR_RETURN(files, Safetensors::open(dir));
  Loader loader(files, compute, pool);
  Weights w;
  THRIFTATTN_ASSIGN_OR_RETURN(embedding, loader.tensor("model.embed_tokens.weight", {c.vocab, c.hidden}));
  w.embedding = std::move(embedding);
  for (int i = 0; i < c.layers; ++i) THRIFTATTN_RETURN_IF_ERROR(loader.layer(c, i, &w.layers.emplace_back()));
  THRIFTATTN_RETURN_IF_ERROR(loader.norm("model.norm", c.hidden, c.norm_offset, &w.norm));
  const char* head = c.tied_embeddings ? "model.embed_tokens" : "lm_head";
  THRIFTATTN_RETURN_IF_ERROR(loader.linear({{head, c.vocab}}, c.hidden, false, &w.logits));
  THRIFTATTN_RETURN_IF_ERROR(loader.check_all_read(c));
  w.files = std::move(files);
  return w;
}

}  // namespace

std::string to_string(Compute compute) { return compute == Compute::bf16 ? "bf16" : "f32"; }

bool has_native_bf16() {
  const dnnl::cpu_isa isa = dnnl::get_effective_cpu_isa();
  return isa == dnnl::cpu_isa::avx512_core_bf16 || isa == dnnl::cpu_isa::avx512_core_amx;
}

std::string product_isa() {
  switch (dnnl::get_effective_cpu_isa()) {
    case dnnl::cpu_isa::avx512_core_amx:
      return "avx512_core_amx";
    case dnnl::cpu_isa::avx512_core_bf16:
      return "avx512_core_bf16";
    case dnnl::cpu_isa::avx512_core_vnni:
      return "avx512_core_vnni";
    case dnnl::cpu_isa::avx512_core:
      return "avx512_core";
    case dnnl::cpu_isa::avx2_vnni:
      return "avx2_vnni";
    case dnnl::cpu_isa::avx2:
      return "avx2";
    case dnnl::cpu_isa::avx:
      return "avx";
    case dnnl::cpu_isa::sse41:
      return "sse41";
    default:
      return "its reference code";
  }
}

Model::Model(ModelConfig config, Compute compute, std::unique_ptr<const Weights> weights)
    : config_(std::move(config)), compute_(compute), weights_(std::move(weights)) {}
Model::Model(Model&&) noexcept = default;
Model& Model::operator=(Model&&) noexcept = default;
Model::~Model() = default;

Result<Model> Model::load(const std::string& dir, Compute compute, ThreadPool& pool) {
  if (compute == Compute::bf16 && !has_native_bf16()) {
    return unsupported("compute bf16 is not supported on this processor (no AVX512_BF16, no AMX_BF16): f32 is");
  }
  try {
    THRIFTATTN_ASSIGN_OR_RETURN(config, ModelConfig::load(dir));
    THRIFTATTN_ASSIGN_OR_RETURN(weights, load_weights(dir, config, compute, pool));
    return Model(std::move(config), compute, std::make_unique<const Weights>(std::move(weights)));
  } catch (const std::exception& e) {
    return Status(Code::out_of_memory, fmt::format("cannot load {}: {}", dir, e.what()));
  }
}

}  // namespace thriftattn::model
