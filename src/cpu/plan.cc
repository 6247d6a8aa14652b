// What the CPU backend serves, and how: kernel, target, tile, splits and the memory for them.
#include <fmt/format.h>

#include <algorithm>

#include "cpu/backend.h"
#include "cpu/kernels.h"
#include "cpu/scratch.h"

namespace thriftattn::cpu {

namespace {

// Why a target that this machine runs does not serve the problem; empty where it does.
std::string passed_over(const Problem& p, const std::string& target) {
  if (!in_bf16(target)) return {};
  if (p.phase != Phase::prefill) return "its BF16 products serve prefill alone";
  if (p.method.arithmetic != Arithmetic::kv4)
    return fmt::format("its BF16 products serve arithmetic=kv4, not {}", to_string(p.method.arithmetic));
  if (p.compute == DType::f32) return "compute=f32 forbids products of BF16 factors, which compute=bf16 allows";
  return {};
}

// The best target of the machine that serves the problem; null where none does.
const std::string* choose_target(const Problem& p, const Machine& machine) {
  for (const std::string& target : machine.targets)
    if (passed_over(p, target).empty()) return &target;
  return nullptr;
}

}  // namespace

std::string refusal(const Problem& p, const Machine& machine) {
  if (machine.gpu) return "the plan is for a GPU";
  if (machine.targets.empty()) return "no instruction set to run on";
  const std::string* target = choose_target(p, machine);
  if (!target) return fmt::format("target {}: {}", machine.targets.front(), passed_over(p, machine.targets.front()));
  if (!kernels_for(*target)) return fmt::format("target {} is not compiled in or not run by this machine", *target);
  if (p.method.arithmetic == Arithmetic::mma8) return "arithmetic=mma8 has no CPU kernel: kv4 and mma4 have";
  if (p.method.p_quant == PQuant::constant && p.method.arithmetic != Arithmetic::mma4)
    return "p_quant=constant is a variant of arithmetic=mma4";
  return {};
}

void plan(const Machine& machine, Plan& plan) {
  const Problem& p = plan.problem;
  const int group = p.h_q / p.h_kv;
  const int64_t pages = max_pages(p);
  const bool mma4 = p.method.arithmetic == Arithmetic::mma4;
  plan.backend = "cpu";
  plan.target = *choose_target(p, machine);
  for (const std::string& target : machine.targets) {
    if (target == plan.target) break;
    if (p.phase == Phase::prefill) plan.refused.push_back({target, passed_over(p, target)});
  }
  plan.threads = machine.threads;
  plan.splits = 1;
  const int64_t tiles = int64_t{3} * 64 * (p.d + p.d_v);
  const int64_t masses = (scores_first(p) || p.stats) ? 2 * pages : 0;
  const auto row_floats = [&](int64_t rows) { return rows * (p.d * (mma4 ? 2 : 1) + p.d_v + 4 + masses); };
  int64_t floats = 0;
  if (p.phase == Phase::prefill) {
    plan.kernel = is_matrix(plan.target) ? "prefill_matrix_tiles" : "prefill_tiles";
    plan.rows_per_tile = kPageTokens;
    floats = machine.threads * (tiles + 2 * kPageTokens * kPageTokens + row_floats(heads_per_task(p) * kPageTokens) +
                                heads_per_task(p) * pages * 9);
  } else {
    plan.kernel = !(scores_first(p) && ranks(p.method)) ? "decode_one_pass"
                  : exchanges(p)                        ? "decode_exchange"
                                                        : "decode_score_first";
    plan.rows_per_tile = static_cast<int>(group * p.max_s_q);
    // Four tasks per thread level out their lengths, if each has 32 pages: a state to merge, which is cold, and a first
    // page that nobody asked for cost as much as two or three. Fewer only where threads would have nothing to do. The
    // constant p scale depends on the running maximum, so it must see the pages in one order.
    const int64_t walks = p.b * head_groups(p.h_kv), units = int64_t{p.b} * p.h_kv;
    const auto ranges = [&](int64_t tasks, int64_t of_pages) {
      return std::min((tasks + walks - 1) / walks, std::max<int64_t>(1, pages / of_pages));
    };
    if (p.method.p_quant != PQuant::constant)
      plan.splits = static_cast<int>(std::max(ranges(4 * machine.threads, 32), ranges(machine.threads, 8)));
    if (machine.threads == 1) plan.splits = 1;
    const int64_t rows = plan.rows_per_tile,
                  integers = on_integers(p) ? cells_bytes(p, rows) / 4 + Rows::padded(rows) + rows * p.d : 0;
    if (mma4) floats = machine.threads * (tiles + rows * 2 * kPageTokens);
    if (on_integers(p) && p.cache.centring) floats += units * pages * round_up(rows, 4);
    const int64_t means = scores_first(p) ? 0 : int64_t{group} * p.d;
    floats += units * (row_floats(rows) + integers + means + pages * (exchanges(p) ? 11 : 9) +
                       (plan.splits - 1) * rows * (p.d + p.d_v + 4));
  }
  plan.workspace_bytes = floats * int64_t{sizeof(float)} + machine.threads * matrix_bytes(plan.target, p);
}

std::shared_ptr<Scratch> make_scratch(const Plan& plan) {
  const Problem& p = plan.problem;
  auto scratch = std::make_shared<Scratch>();
  const bool mma4 = p.method.arithmetic == Arithmetic::mma4;
  for (int w = 0; w < plan.threads; ++w) {
    const bool tiles = p.phase == Phase::prefill || mma4;
    scratch->workers.emplace_back(tiles ? plan.rows_per_tile : 0, tiles ? p.d : 0, tiles ? p.d_v : 0,
                                  matrix_bytes(plan.target, p));
    if (p.phase == Phase::prefill) {
      scratch->rows.emplace_back(int64_t{heads_per_task(p)} * kPageTokens, p.d, p.d_v, mma4,
                                 scores_first(p) || p.stats ? max_pages(p) : 0);
      scratch->choices.emplace_back(heads_per_task(p), Choice(max_pages(p)));
    }
  }
  if (p.phase == Phase::prefill) {
    const int64_t steps = (p.h_q / p.h_kv + heads_per_task(p) - 1) / heads_per_task(p);
    scratch->tasks.reserve(p.b * p.h_kv * steps * (p.max_s_q / kPageTokens + 2));
  }
  if (p.phase == Phase::decode)
    for (int64_t u = 0; u < int64_t{p.b} * p.h_kv; ++u)
      scratch->units.emplace_back(p, plan.rows_per_tile, plan.splits, mma4);
  return scratch;
}

}  // namespace thriftattn::cpu
