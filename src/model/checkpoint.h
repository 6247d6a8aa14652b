// The tensors of a checkpoint by the part that each plays in the model, before a processor or a GPU makes weights of
// them: nothing is copied yet.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "model/config.h"
#include "model/safetensors.h"
#include "thriftattn/status.h"

namespace thriftattn::model {

// One matrix product of several projections that read the same input.
struct Projection {
  std::vector<Tensor> weights;  // each [outputs_i, inputs], one below the other
  std::vector<Tensor> biases;   // each [outputs_i]; as many, or none
};

struct LayerTensors {
  Tensor attention_norm, mlp_norm;                               // [hidden], of what attention and MLP read
  std::optional<Tensor> attention_output_norm, mlp_output_norm;  // [hidden], of what they give; with output_norms
  std::optional<Tensor> q_norm, k_norm;                          // [d]; with qk_norm
  std::optional<Tensor> sinks;                                   // [h_q]; with sinks
  Projection qkv, o;                                             // hidden -> q, k, v of all heads; h_q*d_v -> hidden
  Projection gate_up, down;                                      // without experts
  Projection router;                                             // with experts, as what follows
  Tensor gate_up_experts, gate_up_biases;  // [experts, hidden, 2*intermediate], [experts, 2*intermediate]
  Tensor down_experts, down_biases;        // [experts, intermediate, hidden], [experts, hidden]
};

struct Checkpoint {
  ModelConfig config;
  Safetensors files;  // keeps the tensors mapped
  Tensor embedding;   // [vocab, hidden]
  std::vector<LayerTensors> layers;
  Tensor norm;        // [hidden]
  Projection logits;  // hidden -> vocab; the embedding where they are tied

  // Opens a Hugging Face folder: config.json and one or more safetensors files. Refused: tensors that are missing or of
  // another shape than config.json says, and tensors of the model that have no part in it, without which it would run
  // as another one.
  static Result<Checkpoint> open(const std::string& dir);
};

// The elements of a tensor as floats, each plus `offset`.
std::vector<float> values(const Tensor& tensor, double offset = 0);

}  // namespace thriftattn::model
