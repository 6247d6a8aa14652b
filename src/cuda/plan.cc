// What the CUDA backend serves, and how: kernel, target, tile, splits and the memory for them. Pure: asks no device.
#include <fmt/format.h>

#include <algorithm>
#include <cstdlib>

#include "cuda/backend.h"
#include "cuda/workspace.h"

namespace thriftattn::cuda {
namespace {

// The order of ranking is exact up to so many pages, 1M tokens.
constexpr int64_t kMaxPages = 16384;
constexpr int kOldest = 80;  // compute capability: mma.sync m16n8k16, cp.async

std::string storage_refusal(const Problem& p) {
  const CacheConfig& c = p.cache;
  if (!c.storage_by_head.empty()) return "storage_by_head has no form on a GPU: one storage for all heads has";
  if (c.high_dtype != DType::f16) return "high_dtype=bf16 has no form on a GPU: f16 has";
  if (c.storage == Storage::compact || c.storage == Storage::offload)
    return fmt::format("storage={} has no form on a GPU: high_only, dual, residual and fp4_only have",
                       to_string(c.storage));
  if (p.method.rest == Tier::fp16 && !all_high(c))
    return fmt::format("method {} reads every page in 16 bit, which storage={} does not keep: high_only and dual do",
                       to_string(p.method), to_string(c.storage));
  return {};
}

}  // namespace

std::string refusal(const Problem& p, const Machine& machine) {
  if (!machine.gpu) return "no GPU is named";
  const Gpu& gpu = *machine.gpu;
  if (gpu.compute_capability < kOldest)
    return fmt::format("{} has compute capability {}.{}: 8.0 and later are served", gpu.name,
                       gpu.compute_capability / 10, gpu.compute_capability % 10);
  const Method& m = p.method;
  if (m.arithmetic != Arithmetic::kv4)
    return fmt::format("arithmetic={} has no CUDA kernel: kv4 has", to_string(m.arithmetic));
  if (m.p_quant == PQuant::constant) return "p_quant=constant is a variant of arithmetic=mma4";
  if (m.policy == Policy::oracle)
    return "policy=oracle has no CUDA kernel: block_mean, quest, second_moment, fp4_mass and recent have";
  if (std::string reason = storage_refusal(p); !reason.empty()) return reason;
  if (max_pages(p) > kMaxPages)
    return fmt::format("max_s_kv {} is not served: up to {} tokens are", p.max_s_kv, kMaxPages * kPageTokens);
  if (p.phase == Phase::prefill && p.stats)
    return "stats of a prefill are not kept on a GPU: those of decode and verify steps are";
  const int64_t shared_bytes =
      p.phase == Phase::prefill
          ? std::max<int64_t>(prefill_config(device_layout(p.d, p.d_v), false, gpu.shared_bytes).shared_bytes,
                              rank_prefill_shared_bytes(p))
          : decode_config(p, gpu).shared_bytes;
  if (shared_bytes > gpu.shared_bytes)
    return fmt::format("head_dim {} and max_s_kv {} take {} bytes of shared memory, of which {} has {}",
                       std::max(p.d, p.d_v), p.max_s_kv, shared_bytes, gpu.name, gpu.shared_bytes);
  return {};
}

WorkspaceLayout workspace_layout(const Problem& p, const DecodeConfig& config, int64_t scratch_bytes) {
  WorkspaceLayout l;
  const auto take = [&l](int64_t& at, int64_t bytes) {
    at = l.bytes;
    l.bytes += round_up(bytes, 256);
  };
  if (p.phase == Phase::prefill) {
    const int64_t blocks = int64_t{p.b} * p.h_q * max_blocks(p);
    take(l.tiers, blocks * tier_words(p) * 4);
    take(l.block_counts, blocks * 2 * 4);
    take(l.scratch, scratch_bytes);
    return l;
  }
  const int64_t n = units(p), rows = n * row_stride(p), pages = n * max_pages(p), of_rows = rows * max_pages(p);
  // What must be zero before the first run comes first.
  take(l.counts, n * 8 * 4);
  take(l.tickets, n * std::max(1, config.tiles) * 4);
  take(l.order, pages * 4);
  if (!by_mass(p)) take(l.score, pages * 4);
  take(l.q_norm, n * 4);
  if (by_mass(p) || p.stats) {
    l.mass_bytes = of_rows * mass_parts(p) * 4;
    take(l.page_mass, l.mass_bytes);
  }
  if (by_mass(p)) {
    take(l.state_ml, rows * 4 * 4);
    take(l.state_o, rows * device_layout(p.d, p.d_v).dv * 4);
  }
  take(l.partials, decode_partial_bytes(p, config));
  if (p.stats) {
    const int64_t q_rows = p.b * p.max_s_q * p.h_q;
    take(l.row_mass_high, rows * 4);
    take(l.lse, q_rows * 4);
    take(l.q, q_rows * p.d * 4);
  }
  return l;
}

void plan(const Machine& machine, Plan& plan) {
  const Problem& p = plan.problem;
  const Gpu& gpu = *machine.gpu;
  plan.backend = "cuda";
  plan.target = fmt::format("sm_{}", gpu.compute_capability);
  plan.threads = machine.threads;
  if (p.phase == Phase::prefill) {
    plan.kernel = "prefill_warp";
    plan.rows_per_tile = kPageTokens;
    plan.workspace_bytes = workspace_layout(p, {}, prefill_scratch_bytes(p, gpu)).bytes;
    return;
  }
  const DecodeConfig config = decode_config(p, gpu);
  plan.kernel = exchanges(p) ? "decode_warp_exchange" : by_mass(p) ? "decode_warp_score_first" : "decode_warp";
  plan.rows_per_tile = config.columns;
  plan.splits = config.blocks;
  plan.workspace_bytes = workspace_layout(p, config, 0).bytes;
}

}  // namespace thriftattn::cuda
