// The pure half of dispatch: what will run, or why nothing can.
#include <fmt/format.h>

#include <cmath>

#include "attention/backends.h"
#include "format/page_layout.h"
#include "thriftattn/attention.h"

namespace thriftattn {
namespace {

// Far beyond any machine, and small enough that sizes computed from them fit int64.
constexpr int kMaxSequences = 4096, kMaxHeads = 4096, kMaxThreads = 1024;
constexpr int64_t kMaxTokens = int64_t{1} << 30;

// What no backend serves, whatever the machine.
Status check(const Problem& p) {
  const auto refuse = [](const char* name, auto value, const char* supported) {
    return invalid_argument(fmt::format("{} {} is not supported: {}", name, value, supported));
  };
  if (p.b < 1 || p.b > kMaxSequences) return refuse("b", p.b, "1 to 4096 are");
  if (p.max_s_q < 0 || p.max_s_q > kMaxTokens) return refuse("max_s_q", p.max_s_q, "0 to 2^30 tokens are");
  if (p.phase == Phase::decode && p.max_s_q > kMaxDecodeRows)
    return refuse("max_s_q", p.max_s_q, "a decode or verify step has at most 16 rows; use the prefill phase for more");
  if (p.max_s_kv < 0 || p.max_s_kv > kMaxTokens) return refuse("max_s_kv", p.max_s_kv, "0 to 2^30 tokens are");
  if (p.h_kv < 1) return refuse("h_kv", p.h_kv, "1 or more");
  if (p.h_q > kMaxHeads) return refuse("h_q", p.h_q, "up to 4096 are");
  if (p.h_q < 1 || p.h_q % p.h_kv != 0)
    return invalid_argument(fmt::format("h_q {} is not a multiple of h_kv {}", p.h_q, p.h_kv));
  if (!is_head_dim(p.d)) return refuse("head_dim", p.d, "multiples of 16 from 16 to 256 are");
  if (!is_head_dim(p.d_v)) return refuse("value head_dim", p.d_v, "multiples of 16 from 16 to 256 are");
  if (!std::isfinite(p.sm_scale)) return refuse("sm_scale", p.sm_scale, "a finite number, or 0 for 1/sqrt(d)");
  if (p.window < 0 || p.window > kMaxTokens) return refuse("window", p.window, "0 (none) to 2^30 tokens are");
  if (!(p.softcap >= 0) || !std::isfinite(p.softcap))
    return refuse("softcap", p.softcap, "0 (none) or a positive number");
  if (p.compute != DType::f32 && p.compute != DType::bf16) return refuse("compute", "f16", "f32 and bf16 are");
  if (p.method.rest == Tier::fp4x2) return refuse("rest", to_string(p.method.rest), "fp4, none and fp16 are");
  const CacheConfig& c = p.cache;
  if (c.h_kv != p.h_kv || c.d != p.d || c.d_v != p.d_v)
    return invalid_argument(
        fmt::format("the cache holds {} heads of {} and {} channels, the problem has {} of {} and {}", c.h_kv, c.d,
                    c.d_v, p.h_kv, p.d, p.d_v));
  return {};
}

}  // namespace

Status check_stored(const Method& m, const CacheConfig& c, Storage storage) {
  const auto missing = [&](const std::string& needs) {
    return invalid_argument(
        fmt::format("method {} needs {}, which this cache (storage={}) does not keep: make it by "
                    "CacheConfig::for_method",
                    to_string(m), needs, to_string(storage)));
  };
  if (m.reads_fp4()) {
    if (storage == Storage::high_only) return missing("FP4 planes");
    if (m.format != c.format) return missing("format=" + to_string(m.format));
    if (m.centring != c.centring) return missing(m.centring ? "centring=on" : "centring=off");
    if (m.page_scale != c.page_scale) return missing(m.page_scale ? "page_scale=on" : "page_scale=off");
    if (m.scales != c.scales) return missing(m.scales == Scales::six ? "scales=6" : "scales=4over6");
  }
  if (m.budget.kind == Budget::Kind::tolerance && storage == Storage::high_only) return missing("FP4 errors");
  const bool ranks = m.policy != Policy::none && m.budget.kind != Budget::Kind::all;
  if (!ranks) return {};
  if (m.storage != storage) return missing("storage=" + to_string(m.storage));
  if ((m.policy == Policy::block_mean || m.policy == Policy::second_moment) && !c.mean) return missing("page means");
  if (m.policy == Policy::quest && !c.min_max) return missing("page minima and maxima");
  if (m.policy == Policy::second_moment && !c.variance) return missing("page variances");
  return {};
}

bool pages_alike(const CacheConfig& a, const CacheConfig& b) {
  return a.h_kv == b.h_kv && a.d == b.d && a.d_v == b.d_v && a.high_dtype == b.high_dtype && a.storage == b.storage &&
         a.storage_by_head == b.storage_by_head && a.format == b.format && a.scales == b.scales &&
         a.centring == b.centring && a.page_scale == b.page_scale && a.mean == b.mean && a.min_max == b.min_max &&
         a.variance == b.variance;
}

bool sizes_alike(const Plan& a, const Plan& b) {
  const Problem &p = a.problem, &q = b.problem;
  return a.backend == b.backend && a.kernel == b.kernel && a.target == b.target && a.rows_per_tile == b.rows_per_tile &&
         a.splits == b.splits && a.threads == b.threads && p.phase == q.phase && p.b == q.b && p.max_s_q == q.max_s_q &&
         p.max_s_kv == q.max_s_kv && p.h_q == q.h_q && p.h_kv == q.h_kv && p.d == q.d && p.d_v == q.d_v &&
         p.stats == q.stats && p.method == q.method && pages_alike(p.cache, q.cache) &&
         a.workspace_bytes == b.workspace_bytes;
}

Result<Plan> plan(const Problem& problem, const Machine& machine) {
  THRIFTATTN_RETURN_IF_ERROR(check(problem));
  if (machine.threads < 1 || machine.threads > kMaxThreads)
    return invalid_argument(fmt::format("{} threads are not supported: 1 to {} are", machine.threads, kMaxThreads));
  Plan plan;
  plan.problem = problem;
  Problem& p = plan.problem;
  if (p.sm_scale == 0) p.sm_scale = 1.0f / std::sqrt(static_cast<float>(p.d));
  if (p.softcap > 0 && !std::isfinite(p.sm_scale / p.softcap))
    return invalid_argument(
        fmt::format("softcap {} is not supported: its ratio to sm_scale {} must be finite", p.softcap, p.sm_scale));
  Method& m = p.method;
  // Where heads differ, those that a call names are checked by it.
  const Storage storage = p.cache.storage_by_head.empty() ? p.cache.storage : m.storage;
  if (m.policy == Policy::automatic)
    m.policy = p.phase == Phase::decode && storage != Storage::high_only ? Policy::fp4_mass : Policy::block_mean;
  if (m.arithmetic == Arithmetic::automatic)
    m.arithmetic = Arithmetic::kv4;  // the CPU's; faster units resolve it otherwise
  if (m.policy == Policy::fp4_mass && p.phase == Phase::prefill)
    return unsupported(
        "policy=fp4_mass serves decode and verify steps, where FP4 scores exist before the choice: "
        "policy=auto ranks by block_mean in prefill");
  THRIFTATTN_RETURN_IF_ERROR(check_stored(m, p.cache, storage));

  for (const Backend& backend : backends()) {
    const std::string reason = backend.refusal(p, machine);
    if (reason.empty()) {
      backend.plan(machine, plan);
      return plan;
    }
    plan.refused.push_back({backend.name, reason});
  }
  std::string reasons;
  for (const Refusal& r : plan.refused)
    reasons += fmt::format("{}{}: {}", reasons.empty() ? "" : "; ", r.backend, r.reason);
  return unsupported(fmt::format("no backend serves method {}: {}", to_string(m), reasons));
}

std::string to_string(const Plan& plan) {
  const Problem& p = plan.problem;
  const char* compute = p.compute == DType::bf16 ? " compute=bf16" : "";
  std::string mask = p.causal ? "" : " not causal";
  if (p.window > 0) mask += fmt::format(" window={}", p.window);
  if (p.softcap > 0) mask += fmt::format(" softcap={}", p.softcap);
  std::string text = fmt::format(
      "{}<{}> d={} d_v={} h_q={} h_kv={} b={} s_q<={} s_kv<={}{} policy={} arithmetic={}{} tile={} splits={} "
      "threads={} "
      "workspace={:.1f} MB",
      plan.kernel, plan.target, p.d, p.d_v, p.h_q, p.h_kv, p.b, p.max_s_q, p.max_s_kv, mask, to_string(p.method.policy),
      to_string(p.method.arithmetic), compute, plan.rows_per_tile, plan.splits, plan.threads,
      static_cast<double>(plan.workspace_bytes) / 1e6);
  for (const Refusal& r : plan.refused) text += fmt::format(" | {}: refused, {}", r.backend, r.reason);
  return text;
}

}  // namespace thriftattn
