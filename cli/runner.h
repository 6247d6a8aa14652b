// A model ready to run, and what every command does with it.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "commands.h"
#include "model/cuda/device_model.h"
#include "model/model.h"
#include "model/sequence.h"
#include "model/session.h"
#include "model/tokenizer.h"
#include "report.h"
#include "thriftattn/threads.h"

namespace thriftattn::cli {

struct Runner {
  std::unique_ptr<ThreadPool> pool;                  // sessions refer to it and to the model
  std::unique_ptr<model::Model> model;               // on the processor, or ...
  std::unique_ptr<model::DeviceModel> device_model;  // ... on a GPU
  model::Tokenizer tokenizer;

  // Loads the folder. No `compute` given = bf16 where the device has it natively, as every GPU, else f32.
  static Result<Runner> load(const RunOptions& options);

  const model::ModelConfig& config() const { return device_model ? device_model->config() : model->config(); }

  // A new sequence where the model is.
  Result<std::unique_ptr<model::Sequence>> open(const model::Schedule& schedule,
                                                const model::SessionOptions& options) const;

  // What the tokenizer puts in front of a text (config.json's BOS where the tokenizer's files do not say), once, and
  // the tokens of `text`.
  std::vector<int32_t> tokens(const std::string& text) const;

  // Refuses `needed` positions where the model has fewer; `what` names what needs them.
  Status check_positions(int64_t needed, const std::string& what) const;

  // Asks the planner what each row will run with in the phases that take place, before any of them runs: sets the rows'
  // options and twins, and the report's machine. A method that a phase refuses is an error; a reference is left out.
  Status resolve(const model::SessionOptions& options, bool prefill, bool decode, Report* report) const;
};

// Promoted pairs of all pairs; where there are none yet, 1 if all pages would be read in 16 bit.
double share_promoted(const model::Schedule& schedule, int64_t promoted, int64_t pairs);

}  // namespace thriftattn::cli
