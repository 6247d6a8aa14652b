// The forward pass on a GPU, over the weights of a DeviceModel.
#pragma once

#include <memory>

#include "model/cuda/device_model.h"
#include "model/cuda/weights.h"
#include "thriftattn/attention.h"

namespace thriftattn::model::gpu {

// What a batch refers to.
struct ModelParts {
  const ModelConfig& config;
  Compute compute;
  const Machine& machine;  // with its GPU
  const Weights& weights;
};

Result<std::unique_ptr<DeviceBatch>> open_batch(const ModelParts& model, const Schedule& schedule,
                                                const SessionOptions& options, int size);

}  // namespace thriftattn::model::gpu
