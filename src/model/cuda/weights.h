// The weights of a model on a GPU: matrices in the type of its products, everything else in F32.
#pragma once

#include <cstdint>
#include <vector>

#include "model/checkpoint.h"
#include "model/cuda/device.h"
#include "model/cuda/products.h"
#include "model/model.h"
#include "thriftattn/status.h"

namespace thriftattn::model::gpu {

struct LayerWeights {
  const float *attention_norm = nullptr, *mlp_norm = nullptr;                // [hidden], of what they read
  const float *attention_output_norm = nullptr, *mlp_output_norm = nullptr;  // [hidden], of what they give, or null
  const float *q_norm = nullptr, *k_norm = nullptr;                          // [d] or null
  Matrix qkv, o, gate_up, down;
};

struct Weights {
  DType type = DType::f32;          // of the products
  const void* embedding = nullptr;  // [vocab, hidden]
  DType embedding_type = DType::f32;
  std::vector<LayerWeights> layers;
  const float* norm = nullptr;  // [hidden]
  Matrix logits;
  const float *frequencies = nullptr, *local_frequencies = nullptr;  // [d/2], radians per position

  std::vector<DeviceMemory> memory;  // all of the above
  int64_t bytes = 0;
};

// On the current device.
Result<Weights> upload(const Checkpoint& checkpoint, Compute compute);
Result<Weights> draw(const ModelConfig& config, Compute compute, uint64_t seed);

}  // namespace thriftattn::model::gpu
