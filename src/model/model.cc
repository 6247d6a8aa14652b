#include "model/model.h"

#include <fmt/format.h>

#include <dnnl.hpp>
#include <exception>
#include <utility>

#include "model/checkpoint.h"
#include "model/weights.h"

namespace thriftattn::model {
namespace {

// The weights of a checkpoint as this processor multiplies by them.
Result<Weights> load_weights(Checkpoint checkpoint, Compute compute, ThreadPool& pool) {
  const ModelConfig& c = checkpoint.config;
  const auto linear = [&](const Projection& from, Linear* out) -> Status {
    THRIFTATTN_ASSIGN_OR_RETURN(made, Linear::create(from.weights, from.biases, compute, pool));
    *out = std::move(made);
    return {};
  };
  const auto norm = [&](const Tensor& from) { return values(from, c.norm_offset); };
  const auto norm_if_there = [&](const std::optional<Tensor>& from) {
    return from ? norm(*from) : std::vector<float>();
  };
  Weights w;
  for (const LayerTensors& from : checkpoint.layers) {
    LayerWeights& l = w.layers.emplace_back();
    l.attention_norm = norm(from.attention_norm);
    l.mlp_norm = norm(from.mlp_norm);
    l.attention_output_norm = norm_if_there(from.attention_output_norm);
    l.mlp_output_norm = norm_if_there(from.mlp_output_norm);
    l.q_norm = norm_if_there(from.q_norm);
    l.k_norm = norm_if_there(from.k_norm);
    if (from.sinks) l.sinks = values(*from.sinks);
    THRIFTATTN_RETURN_IF_ERROR(linear(from.qkv, &l.qkv));
    THRIFTATTN_RETURN_IF_ERROR(linear(from.o, &l.o));
    if (c.experts == 0) {
      THRIFTATTN_RETURN_IF_ERROR(linear(from.gate_up, &l.gate_up));
      THRIFTATTN_RETURN_IF_ERROR(linear(from.down, &l.down));
      continue;
    }
    THRIFTATTN_RETURN_IF_ERROR(linear(from.router, &l.experts.router));
    const auto expert = [&](const Tensor& weights, const Tensor& biases, int e, Linear* out) -> Status {
      const Tensor weight = weights.at(e), bias = biases.at(e);
      THRIFTATTN_ASSIGN_OR_RETURN(made, Linear::create({&weight, 1}, {&bias, 1}, compute, pool, Rows::inputs));
      *out = std::move(made);
      return {};
    };
    l.experts.all.resize(c.experts);
    for (int e = 0; e < c.experts; ++e) {
      Expert& to = l.experts.all[e];
      THRIFTATTN_RETURN_IF_ERROR(expert(from.gate_up_experts, from.gate_up_biases, e, &to.gate_up));
      THRIFTATTN_RETURN_IF_ERROR(expert(from.down_experts, from.down_biases, e, &to.down));
    }
  }
  w.norm = norm(checkpoint.norm);
  THRIFTATTN_RETURN_IF_ERROR(linear(checkpoint.logits, &w.logits));
  w.embedding = std::move(checkpoint.embedding);
  w.files = std::move(checkpoint.files);
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
    THRIFTATTN_ASSIGN_OR_RETURN(checkpoint, Checkpoint::open(dir));
    ModelConfig config = checkpoint.config;
    THRIFTATTN_ASSIGN_OR_RETURN(weights, load_weights(std::move(checkpoint), compute, pool));
    return Model(std::move(config), compute, std::make_unique<const Weights>(std::move(weights)));
  } catch (const std::exception& e) {
    return Status(Code::out_of_memory, fmt::format("cannot load {}: {}", dir, e.what()));
  }
}

}  // namespace thriftattn::model
