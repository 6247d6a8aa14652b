#include "model/cuda/device_model.h"

#include <fmt/format.h>

#include <utility>

#include "model/cuda/device_batch.h"
#include "model/cuda/kernels.h"
#include "model/cuda/weights.h"
#include "thriftattn/cuda.h"

namespace thriftattn::model {
namespace {

class LoadedModel : public DeviceModel {
 public:
  LoadedModel(ModelConfig config, Compute compute, Machine machine, gpu::Weights weights)
      : config_(std::move(config)), compute_(compute), machine_(std::move(machine)), weights_(std::move(weights)) {}

  const ModelConfig& config() const override { return config_; }
  Compute compute() const override { return compute_; }
  const Gpu& gpu() const override { return *machine_.gpu; }
  int64_t weight_bytes() const override { return weights_.bytes; }

  Result<std::unique_ptr<DeviceBatch>> open(const Schedule& schedule, const SessionOptions& options,
                                            int size) const override {
    return gpu::open_batch({config_, compute_, machine_, weights_}, schedule, options, size);
  }

 private:
  ModelConfig config_;
  Compute compute_;
  Machine machine_;
  gpu::Weights weights_;
};

Status check_served(const ModelConfig& c) {
  if (c.experts > 0) return unsupported(fmt::format("{}: a mixture of experts is not served on a GPU", c.architecture));
  if (c.hidden > gpu::kMaxHidden) {
    return unsupported(fmt::format("hidden_size {} is not served on a GPU: up to {} is", c.hidden, gpu::kMaxHidden));
  }
  return {};
}

// `make` gives the weights, with the GPU current.
template <class Make>
Result<std::unique_ptr<DeviceModel>> make_model(const ModelConfig& config, Compute compute, int device,
                                                const Make& make) {
  THRIFTATTN_RETURN_IF_ERROR(check_served(config));
  THRIFTATTN_ASSIGN_OR_RETURN(machine, cuda::machine(device));
  const gpu::CurrentDevice current(device);
  THRIFTATTN_ASSIGN_OR_RETURN(weights, make());
  return std::unique_ptr<DeviceModel>(
      std::make_unique<LoadedModel>(config, compute, std::move(machine), std::move(weights)));
}

}  // namespace

Result<std::unique_ptr<DeviceModel>> DeviceModel::load(const std::string& dir, Compute compute, int device) {
  THRIFTATTN_ASSIGN_OR_RETURN(checkpoint, Checkpoint::open(dir));
  return make_model(checkpoint.config, compute, device, [&] { return gpu::upload(checkpoint, compute); });
}

Result<std::unique_ptr<DeviceModel>> DeviceModel::random(const ModelConfig& config, Compute compute, int device,
                                                         uint64_t seed) {
  return make_model(config, compute, device, [&] { return gpu::draw(config, compute, seed); });
}

}  // namespace thriftattn::model
