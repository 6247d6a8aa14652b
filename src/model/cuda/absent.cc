// What a build without CUDA says of models on a GPU: what the library says of GPUs.
#include "model/cuda/device_model.h"
#include "thriftattn/cuda.h"

namespace thriftattn::model {

Result<std::unique_ptr<DeviceModel>> DeviceModel::load(const std::string&, Compute, int device) {
  return cuda::machine(device).status();
}
Result<std::unique_ptr<DeviceModel>> DeviceModel::random(const ModelConfig&, Compute, int device, uint64_t) {
  return cuda::machine(device).status();
}

}  // namespace thriftattn::model
