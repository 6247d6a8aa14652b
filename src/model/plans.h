// What a session runs with, wherever it runs: its limits, the cache that its methods need and a plan for every layer.
#pragma once

#include <cstdint>
#include <vector>

#include "model/config.h"
#include "model/schedule.h"
#include "model/session.h"
#include "thriftattn/attention.h"
#include "thriftattn/cache.h"
#include "thriftattn/status.h"

namespace thriftattn::model {

// The KV heads of a layer that run under one plan.
struct Part {
  size_t plan;                // of PhasePlans::plans
  std::vector<int> kv_heads;  // empty = all
};

// Everything of a phase: its distinct plans, and which of them each layer runs.
struct PhasePlans {
  std::vector<Result<Plan>> plans;
  std::vector<std::vector<Part>> layers;

  // The first layer's plan, or the first that is refused.
  const Result<Plan>& first_or_refused() const;
};

struct SessionPlan {
  Schedule schedule, prefill_schedule;
  int64_t max_tokens = 0, max_step = 0, max_decode = 0;
  CacheConfig cache;
  PhasePlans prefill, decode;

  int64_t most(Phase phase) const { return phase == Phase::decode ? max_decode : max_step; }  // tokens of one step
  const PhasePlans& of(Phase phase) const { return phase == Phase::decode ? decode : prefill; }
};

// Plans for `b` sequences at once on `machine`. Refused: a schedule of another model, limits that the model does not
// have, and methods that no backend serves in either phase, unless options.attention replaces them.
Result<SessionPlan> plan_session(const ModelConfig& config, const Schedule& schedule, const SessionOptions& options,
                                 Compute compute, const Machine& machine, int b = 1);

}  // namespace thriftattn::model
