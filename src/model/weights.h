// The weights of a model in the form that the forward pass uses.
#pragma once

#include <vector>

#include "model/experts.h"
#include "model/linear.h"
#include "model/safetensors.h"

namespace thriftattn::model {

struct LayerWeights {
  std::vector<float> attention_norm, mlp_norm;                // [hidden], of what attention and MLP read
  std::vector<float> attention_output_norm, mlp_output_norm;  // [hidden], of what they give; empty without output_norms
  std::vector<float> q_norm, k_norm;                          // [d]; empty without qk_norm
  std::vector<float> sinks;                                   // [h_q]; empty where there are none
  Linear qkv;                                                 // hidden -> h_q*d + h_kv*d + h_kv*d_v
  Linear o;                                                   // h_q*d_v -> hidden
  Linear gate_up;                                             // hidden -> 2*intermediate
  Linear down;                                                // intermediate -> hidden
  Experts experts;                                            // in place of the two above, where the model has them
};

struct Weights {
  Safetensors files;  // keeps `embedding` mapped
  Tensor embedding;   // [vocab, hidden]
  std::vector<LayerWeights> layers;
  std::vector<float> norm;  // [hidden]
  Linear logits;            // hidden -> vocab
};

}  // namespace thriftattn::model
