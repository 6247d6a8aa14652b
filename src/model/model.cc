#include "model/model.h"

#include <fmt/format.h>

#include <dnnl.hpp>
#include <exception>
#include <utility>

#include "model/weights.h"

namespace thriftattn::model {
namespace {

// Builds weights from the tensors of a checkpoint by their Hugging Face names.
class Loader {
 public:
  Loader(const Safetensors& files, Compute compute, ThreadPool& pool) : files_(files), compute_(compute), pool_(pool) {}

  Result<std::vector<float>> vector(const std::string& name, int64_t n) {
    THRIFTATTN_ASSIGN_OR_RETURN(tensor, files_.find(name, {n}));
    std::vector<float> out(n);
    tensor.read(0, n, out.data());
    return out;
  }

  // One product of several projections that read the same input: (name, outputs) of each.
  Result<Linear> linear(const std::vector<std::pair<std::string, int64_t>>& parts, int64_t inputs, bool bias) {
    std::vector<Tensor> weights, biases;
    for (const auto& [name, outputs] : parts) {
      THRIFTATTN_ASSIGN_OR_RETURN(weight, files_.find(name + ".weight", {outputs, inputs}));
      weights.push_back(std::move(weight));
      if (!bias && files_.contains(name + ".bias")) {  // it would run without a word, as another model
        return data_loss(
            fmt::format("{}: tensor {}.bias: config.json says that there is no bias", weights.back().file, name));
      }
      if (!bias) continue;
      THRIFTATTN_ASSIGN_OR_RETURN(b, files_.find(name + ".bias", {outputs}));
      biases.push_back(std::move(b));
    }
    return Linear::create(weights, biases, compute_, pool_);
  }

  Result<LayerWeights> layer(const ModelConfig& c, int i) {
    const std::string at = fmt::format("model.layers.{}.", i), attention = at + "self_attn.", mlp = at + "mlp.";
    LayerWeights w;
    THRIFTATTN_ASSIGN_OR_RETURN(attention_norm, vector(at + "input_layernorm.weight", c.hidden));
    THRIFTATTN_ASSIGN_OR_RETURN(mlp_norm, vector(at + "post_attention_layernorm.weight", c.hidden));
    if (c.qk_norm) {
      THRIFTATTN_ASSIGN_OR_RETURN(q_norm, vector(attention + "q_norm.weight", c.d));
      THRIFTATTN_ASSIGN_OR_RETURN(k_norm, vector(attention + "k_norm.weight", c.d));
      w.q_norm = std::move(q_norm);
      w.k_norm = std::move(k_norm);
    }
    const int64_t q = int64_t{c.h_q} * c.d, k = int64_t{c.h_kv} * c.d, v = int64_t{c.h_kv} * c.d_v;
    THRIFTATTN_ASSIGN_OR_RETURN(
        qkv, linear({{attention + "q_proj", q}, {attention + "k_proj", k}, {attention + "v_proj", v}}, c.hidden,
                    c.qkv_bias));
    THRIFTATTN_ASSIGN_OR_RETURN(o, linear({{attention + "o_proj", c.hidden}}, int64_t{c.h_q} * c.d_v, c.o_bias));
    THRIFTATTN_ASSIGN_OR_RETURN(
        gate_up,
        linear({{mlp + "gate_proj", c.intermediate}, {mlp + "up_proj", c.intermediate}}, c.hidden, c.mlp_bias));
    THRIFTATTN_ASSIGN_OR_RETURN(down, linear({{mlp + "down_proj", c.hidden}}, c.intermediate, c.mlp_bias));
    w.attention_norm = std::move(attention_norm);
    w.mlp_norm = std::move(mlp_norm);
    w.qkv = std::move(qkv);
    w.o = std::move(o);
    w.gate_up = std::move(gate_up);
    w.down = std::move(down);
    return w;
  }

 private:
  const Safetensors& files_;
  Compute compute_;
  ThreadPool& pool_;
};

Result<Weights> load_weights(const std::string& dir, const ModelConfig& c, Compute compute, ThreadPool& pool) {
  THRIFTATTN_ASSIGN_OR_RETURN(files, Safetensors::open(dir));
  Loader loader(files, compute, pool);
  THRIFTATTN_ASSIGN_OR_RETURN(embedding, files.find("model.embed_tokens.weight", {c.vocab, c.hidden}));
  std::vector<LayerWeights> layers;
  for (int i = 0; i < c.layers; ++i) {
    THRIFTATTN_ASSIGN_OR_RETURN(layer, loader.layer(c, i));
    layers.push_back(std::move(layer));
  }
  // Without its last layers a model would run without a word, as another one.
  if (files.contains(fmt::format("model.layers.{}.input_layernorm.weight", c.layers))) {
    return data_loss(fmt::format("{}: the weights have more layers than num_hidden_layers {}", dir, c.layers));
  }
  THRIFTATTN_ASSIGN_OR_RETURN(norm, loader.vector("model.norm.weight", c.hidden));
  const char* head = c.tied_embeddings ? "model.embed_tokens" : "lm_head";
  THRIFTATTN_ASSIGN_OR_RETURN(logits, loader.linear({{head, c.vocab}}, c.hidden, false));
  return Weights{std::move(files), std::move(embedding), std::move(layers), std::move(norm), std::move(logits)};
}

}  // namespace

std::string to_string(Compute compute) { return compute == Compute::bf16 ? "bf16" : "f32"; }

bool has_native_bf16() {
  const dnnl::cpu_isa isa = dnnl::get_effective_cpu_isa();
  return isa == dnnl::cpu_isa::avx512_core_bf16 || isa == dnnl::cpu_isa::avx512_core_amx;
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
