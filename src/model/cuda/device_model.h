// A model whose weights, cache and activations live on an NVIDIA GPU. What it computes is what Model and Session do on
// the processor, except that attention reads q, k and v in 16 bit or less (thriftattn/cuda.h).
//
//   auto model = DeviceModel::load(dir, Compute::bf16, 0);
//   auto batch = (*model)->open(schedule, {.max_tokens = 16384}, 1);
//   (*batch)->read(prompt, Phase::prefill, {.logits = logits}, nullptr);
//
// In a build without CUDA nothing can be made, and the error says so.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "model/config.h"
#include "model/model.h"
#include "model/schedule.h"
#include "model/sequence.h"
#include "model/session.h"
#include "thriftattn/attention.h"
#include "thriftattn/status.h"

namespace thriftattn::model {

// `size()` sequences that take every step together: tokens, targets and losses of a step of n tokens are [size, n], one
// sequence after another, logits [size, vocab]. Losses and logits of one step are wanted together only where n is 1.
// Steps of one token in Phase::decode are captured in a CUDA graph, whose replays give what launches gave, bit for bit.
// Stats of those steps take the last layer under each plan for all that it serves.
class DeviceBatch : public Sequence {
 public:
  virtual int size() const = 0;
  virtual int64_t activation_bytes() const = 0;  // device memory beside the cache, scratch memory of attention included

  // Off: decode steps are launched kernel by kernel, as profilers and tests want them.
  virtual void use_graph(bool on) = 0;

  // For benchmarks: appends `tokens` keys and values to every sequence and layer that are drawn, not computed. Values
  // are normal; keys are too, and every kOutlierEvery-th channel is moved by kOutlierShift.
  static constexpr int kOutlierEvery = 32;
  static constexpr float kOutlierShift = 6;
  virtual Status fill(int64_t tokens, uint64_t seed) = 0;

  // Takes `steps` steps, each reading the tokens that the last one found most likely, without waiting in between.
  // Milliseconds of every step.
  virtual Result<std::vector<float>> decode_greedily(int steps) = 0;
};

class DeviceModel {
 public:
  // Loads a Hugging Face folder to GPU `device`. Refused: mixtures of experts.
  static Result<std::unique_ptr<DeviceModel>> load(const std::string& dir, Compute compute, int device);
  // The same architecture with normal weights of deviation 0.02 and norms of 1.
  static Result<std::unique_ptr<DeviceModel>> random(const ModelConfig& config, Compute compute, int device,
                                                     uint64_t seed);
  virtual ~DeviceModel() = default;

  virtual const ModelConfig& config() const = 0;
  virtual Compute compute() const = 0;
  virtual const Gpu& gpu() const = 0;
  virtual int64_t weight_bytes() const = 0;

  // `size` empty sequences with a cache of their own. Refused: what a Session refuses, schedules that split a layer's
  // KV heads, and replaced attention. Keeps a reference to the model.
  virtual Result<std::unique_ptr<DeviceBatch>> open(const Schedule& schedule, const SessionOptions& options,
                                                    int size) const = 0;
};

}  // namespace thriftattn::model
