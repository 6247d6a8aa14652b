#include "model/plans.h"

#include <fmt/format.h>

#include <algorithm>
#include <utility>

namespace thriftattn::model {
namespace {

// `problem` has all but the windows and the methods.
PhasePlans plan_layers(const ModelConfig& c, const Schedule& schedule, Problem problem, const Machine& machine) {
  PhasePlans out;
  std::vector<std::pair<int64_t, Method>> kinds;  // window and method of the plans
  for (int layer = 0; layer < c.layers; ++layer) {
    const int64_t window = c.windows[layer];
    problem.window = window < problem.max_s_kv ? window : 0;  // a window that holds everything is none
    std::vector<Part> parts;
    for (Schedule::Group& group : schedule.groups(layer)) {
      problem.method = group.method;
      const std::pair kind(problem.window, group.method);
      const auto i = static_cast<size_t>(std::find(kinds.begin(), kinds.end(), kind) - kinds.begin());
      if (i == kinds.size()) {
        kinds.push_back(kind);
        out.plans.push_back(thriftattn::plan(problem, machine));
      }
      const bool all = std::ssize(group.kv_heads) == c.h_kv;
      parts.push_back({i, all ? std::vector<int>() : std::move(group.kv_heads)});
    }
    out.layers.push_back(std::move(parts));
  }
  return out;
}

}  // namespace

const Result<Plan>& PhasePlans::first_or_refused() const {
  const auto refused = std::find_if(plans.begin(), plans.end(), [](const Result<Plan>& plan) { return !plan.ok(); });
  return refused == plans.end() ? plans.front() : *refused;
}

Result<SessionPlan> plan_session(const ModelConfig& c, const Schedule& schedule, const SessionOptions& options,
                                 Compute compute, const Machine& machine, int b) {
  if (schedule.layers != c.layers || schedule.h_kv != c.h_kv) {
    return invalid_argument(fmt::format("a schedule for {} layers of {} KV heads, the model has {} of {}",
                                        schedule.layers, schedule.h_kv, c.layers, c.h_kv));
  }
  SessionPlan out;
  out.schedule = schedule;
  out.prefill_schedule =
      options.prefill_method ? Schedule::uniform(*options.prefill_method, c.layers, c.h_kv) : schedule;
  out.max_tokens = options.max_tokens ? options.max_tokens : c.max_positions;
  if (out.max_tokens < 1 || out.max_tokens > c.max_positions) {
    return invalid_argument(
        fmt::format("max_tokens {} is not supported: the model has {} positions", out.max_tokens, c.max_positions));
  }
  out.max_step = options.max_step ? options.max_step : out.max_tokens;
  if (out.max_step < 1 || out.max_step > out.max_tokens) {
    return invalid_argument(
        fmt::format("max_step {} is not supported: 1 to max_tokens {} are", out.max_step, out.max_tokens));
  }
  const int64_t most = std::min<int64_t>(out.max_step, kMaxDecodeRows);
  out.max_decode = options.max_decode ? options.max_decode : most;
  if (out.max_decode < 1 || out.max_decode > most) {
    return invalid_argument(fmt::format("max_decode {} is not supported: 1 to {} are", out.max_decode, most));
  }
  THRIFTATTN_ASSIGN_OR_RETURN(cache, schedule.cache_config(c.d, c.d_v));
  THRIFTATTN_ASSIGN_OR_RETURN(prefill_needs, out.prefill_schedule.cache_config(c.d, c.d_v));
  out.cache = std::move(cache);
  out.cache.mean |= prefill_needs.mean;
  out.cache.min_max |= prefill_needs.min_max;
  out.cache.variance |= prefill_needs.variance;
  out.cache.max_bytes = options.max_cache_bytes;

  Problem problem;
  problem.b = b;
  problem.max_s_kv = out.max_tokens;
  problem.h_q = c.h_q;
  problem.h_kv = c.h_kv;
  problem.d = c.d;
  problem.d_v = c.d_v;
  problem.sm_scale = static_cast<float>(c.sm_scale);
  problem.softcap = static_cast<float>(c.attention_softcap);
  problem.cache = out.cache;
  problem.stats = options.collect_stats;
  problem.compute = compute == Compute::bf16 ? DType::bf16 : DType::f32;
  const auto plan_phase = [&](Phase phase, const Schedule& of_phase, int64_t max_rows) {
    problem.phase = phase;
    problem.max_s_q = max_rows;
    return plan_layers(c, of_phase, problem, machine);
  };
  out.prefill = plan_phase(Phase::prefill, out.prefill_schedule, out.max_step);
  out.decode = plan_phase(Phase::decode, schedule, out.max_decode);
  if (!out.prefill.first_or_refused().ok() && !out.decode.first_or_refused().ok() && !options.attention)
    return out.prefill.first_or_refused().status();
  return out;
}

}  // namespace thriftattn::model
