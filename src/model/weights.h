// The weights of a model in the form that the forward pass uses.
#pragma once

#include <vector>

#include "model/linear.h"
#include "model/safetensors.h"

namespace thriftattn::model {

struct LayerWeights {
  std::vector<float> attention_norm, mlp_norm;  // [hidden]
  std::vector<float> q_norm, k_norm;            // [d]; empty without qk_norm
  Linear qkv;                                   // hidden -> h_q*d + h_kv*d + h_kv*d_v
  Linear o;                                     // h_q*d_v -> hidden
  Linear gate_up;                               // hidden -> 2*intermediate
  Linear down;                                  // intermediate -> hidden
};

struct Weights {
  Safetensors files;  // keeps `embedding` mapped
  Tensor embedding;   // [vocab, hidden]
  std::vector<LayerWeights> layers;
  std::vector<float> norm;  // [hidden]
  Linear logits;            // hidden -> vocab
};

}  // namespace thriftattn::model
