// Device memory of one plan: what lies where, and the few questions about a problem that both the plan and the run ask.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/device.h"
#include "cuda/params.h"
#include "format/selection.h"
#include "thriftattn/attention.h"
#include "thriftattn/cuda.h"

namespace thriftattn::cuda {

inline int64_t max_pages(const Problem& p) { return std::max<int64_t>(1, pages_for(p.max_s_kv)); }
inline int64_t units(const Problem& p) { return int64_t{p.b} * p.h_kv; }
inline int row_stride(const Problem& p) {
  return static_cast<int>(round_up(std::max<int64_t>(1, p.max_s_q) * (p.h_q / p.h_kv), 4));
}
// Query blocks of one sequence in a prefill, at most.
inline int max_blocks(const Problem& p) { return static_cast<int>(p.max_s_q / kPageTokens + 2); }
inline int tier_words(const Problem& p) { return static_cast<int>((max_pages(p) + 15) / 16); }

inline bool has_fp4(const CacheConfig& c) { return c.storage != Storage::high_only; }
inline bool all_high(const CacheConfig& c) { return c.storage == Storage::high_only || c.storage == Storage::dual; }
// Whether some page may be read in another tier than the rest.
inline bool promotes(const Method& m) {
  return m.rest != Tier::fp16 && (ranks(m) || m.force.sink > 0 || m.force.diagonal || m.force.previous > 0);
}
// Whether a decode step learns which pages to promote by reading all of them in FP4 first.
inline bool by_mass(const Problem& p) {
  return p.phase == Phase::decode && p.method.policy == Policy::fp4_mass && ranks(p.method) && promotes(p.method);
}
// Whether that reading is part of the result, out of which the promoted pages are then exchanged. Where the rest is not
// read in FP4, the chosen pages are attended to in a second reading.
inline bool exchanges(const Problem& p) { return by_mass(p) && p.method.rest == Tier::fp4; }

// Parts of a page whose softmax sums are kept apart (DecodeParams): halves of the pages read in FP4 serve a ranking by
// them, eighths of all pages whoever asks for the mass of forced ones too.
inline int mass_parts(const Problem& p) { return p.stats || weighs_pages(p.method.budget) ? 8 : 2; }

// Offsets in the workspace's one allocation; kAbsent = the plan has no use for it. params.h gives the shapes.
struct WorkspaceLayout {
  static constexpr int64_t kAbsent = -1;
  // decode
  int64_t score = kAbsent, q_norm = kAbsent;
  int64_t order = kAbsent, counts = kAbsent;
  int64_t page_mass = kAbsent, row_mass_high = kAbsent, state_ml = kAbsent, state_o = kAbsent;
  int64_t partials = kAbsent, tickets = kAbsent;
  // prefill
  int64_t tiers = kAbsent, block_counts = kAbsent, scratch = kAbsent;
  // Problem::stats: lse and q of the last run, [rows, h_q] and [h_q, rows, d]
  int64_t lse = kAbsent, q = kAbsent;
  int64_t bytes = 0, mass_bytes = 0;  // of all, of page_mass
};

// `config` of a decode step, `scratch_bytes` of a prefill.
WorkspaceLayout workspace_layout(const Problem& problem, const DecodeConfig& config, int64_t scratch_bytes);

// Hidden as in state.h.
struct __attribute__((visibility("hidden"))) Workspace::State {
  Plan plan;  // that this was made for
  int device = 0;
  DecodeConfig config{};
  WorkspaceLayout at;
  DeviceMemory memory;
  bool given = false;  // the lists, or tiers, are a caller's: leave them
  // Of the last run, for stats.
  int layer = 0;
  DType q_dtype = DType::f32;

  template <class T>
  T* pointer(int64_t offset) const {
    return offset == WorkspaceLayout::kAbsent ? nullptr : reinterpret_cast<T*>(memory.data() + offset);
  }
  Lists lists() const {
    return {.max_pages = static_cast<int>(max_pages(plan.problem)),
            .order = pointer<uint32_t>(at.order),
            .counts = pointer<int32_t>(at.counts),
            .given = given};
  }
};

// Whether plan, workspace, cache and the batch of the cache go together.
Status check_call(const Workspace::State& workspace, const Plan& plan, const Cache* cache);

}  // namespace thriftattn::cuda
