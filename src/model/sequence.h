// One sequence that a model reads, wherever the model runs: all that eval and generate ask of a processor or a GPU.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "model/schedule.h"
#include "model/session.h"
#include "thriftattn/attention.h"
#include "thriftattn/status.h"

namespace thriftattn::model {

// What a step of n tokens is asked for; empty = not wanted.
struct Wanted {
  std::span<const int32_t> targets = {};  // [n]: the tokens that should follow, each below the vocabulary's size, and
  std::span<float> losses = {};           // [n]: -ln of the probability that the model gave them, in nats
  std::span<float> logits = {};           // [vocab], of the last token
};

class Sequence {
 public:
  virtual ~Sequence() = default;

  // Appends `tokens`, as Session::forward does, and refuses what it refuses.
  virtual Status read(std::span<const int32_t> tokens, Phase phase, const Wanted& wanted, const Advance& advance) = 0;

  virtual int64_t length() const = 0;
  // The plan of a phase, or why there is none.
  virtual const Result<Plan>& plan(Phase phase) const = 0;
  // Sums over all steps and layers.
  virtual Stats stats() const = 0;
  virtual int64_t cache_bytes() const = 0;

  virtual Status save(const std::string& path) const = 0;
  // Begins with what was saved, of which `prompt` must be a continuation: afterwards length() tokens of the prompt have
  // been read, a multiple of 64 and fewer than all, so that reading on equals reading at once.
  virtual Status resume(const std::string& path, std::span<const int32_t> prompt) = 0;
};

// A new sequence on this processor, with a session of its own. Keeps references to `model` and `pool`.
Result<std::unique_ptr<Sequence>> open_sequence(const Model& model, const Schedule& schedule,
                                                const SessionOptions& options, ThreadPool& pool);

}  // namespace thriftattn::model
