// Memory of one plan on the CPU, and the few questions about a problem that both the plan and the run ask.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/amx.h"
#include "cpu/kernels.h"
#include "cpu/select.h"
#include "format/selection.h"
#include "thriftattn/attention.h"

namespace thriftattn::cpu {

inline int64_t max_pages(const Problem& p) { return pages_for(p.max_s_kv); }
inline int heads_per_task(const Problem& p) { return std::min(kMaxHeadsPerTask, p.h_q / p.h_kv); }

// Policies whose scores come from the attention scores themselves.
inline bool scores_first(const Problem& p) {
  return p.method.policy == Policy::fp4_mass || p.method.policy == Policy::oracle;
}
// Walks over the pages of one sequence: each serves up to kMaxHeadsPerWalk KV heads.
inline int64_t head_groups(int64_t kv_heads) { return (kv_heads + kMaxHeadsPerWalk - 1) / kMaxHeadsPerWalk; }

// Decode steps run on integers, but for the emulation of FP4 tensor cores.
inline bool on_integers(const Problem& p) { return p.method.arithmetic != Arithmetic::mma4; }
// Whether a decode step reads all pages in FP4, learns their masses by that, and exchanges the promoted ones after.
inline bool exchanges(const Problem& p) {
  return on_integers(p) && p.method.policy == Policy::fp4_mass && p.method.rest == Tier::fp4;
}

// Whether a target multiplies on matrix tiles, whether in BF16 at all, and the bytes of Tiles::matrix that it needs.
inline bool is_matrix(const std::string& target) { return target == kAmx || target == kAmxEmulated; }
inline bool in_bf16(const std::string& target) { return is_matrix(target) || target == kBf16Pairs; }
inline int64_t matrix_bytes(const std::string& target, const Problem& p) {
  if (is_matrix(target)) return amx_bytes(p.d, p.d_v);
  return in_bf16(target) ? int64_t{heads_per_task(p)} * kPageTokens * p.d * 2 : 0;
}

// Query rows of one task and what becomes of them.
struct Rows {
  // With room for the registers and the rows of eight that kernels count in.
  static constexpr int64_t kSpare = 16;
  static int64_t padded(int64_t rows) { return round_up(rows, 8); }

  Rows(int64_t rows, int d, int d_v, bool mma4, int64_t page_stride)
      : q(rows * d),
        q4(mma4 ? rows * d : 0),
        finite(rows),
        m(rows + kSpare),
        l(rows + kSpare),
        l_high(rows + kSpare),
        o(padded(rows) * d_v),
        page_m(rows * page_stride),
        page_l(rows * page_stride) {}
  std::vector<float> q, q4;           // [rows, d]; rows with NaN or Inf are zero here
  std::vector<uint8_t> finite;        // [rows]
  std::vector<float> m, l, l_high;    // [rows]
  std::vector<float> o;               // [rows, d_v]
  std::vector<float> page_m, page_l;  // [rows, max pages] or empty: BlockTask says what they hold

  SoftmaxState state() { return {m.data(), l.data(), l_high.data(), o.data()}; }
  void clear(int64_t rows, int d_v) {
    std::fill_n(m.begin(), rows, kMinusInf);
    std::fill_n(l.begin(), rows, 0.0f);
    std::fill_n(l_high.begin(), rows, 0.0f);
    std::fill_n(o.begin(), rows * d_v, 0.0f);
  }
};

// What q takes as integers.
inline int64_t cells_bytes(const Problem& p, int64_t rows) {
  return Rows::padded(rows) / 4 * round_up(p.d, 32) / 16 * kCellBytes;
}

struct Worker {
  Worker(int64_t tile_rows, int d, int d_v, int64_t matrix_bytes)
      : memory((3 * 64) * (d + d_v) + tile_rows * 2 * kPageTokens + matrix_bytes / 4 + 64) {
    float* at = memory.data();
    at += (64 - reinterpret_cast<uintptr_t>(at) % 64) / sizeof(float) % 16;
    for (int f = 1; f < 4; ++f) {
      tiles.k[f] = at;
      at += 64 * d;
      tiles.v[f] = at;
      at += 64 * d_v;
    }
    tiles.k[0] = tiles.v[0] = nullptr;
    tiles.p = at;
    tiles.p4 = at + tile_rows * kPageTokens;
    tiles.matrix = matrix_bytes ? reinterpret_cast<char*>(tiles.p4 + tile_rows * kPageTokens) : nullptr;
  }
  std::vector<float> memory;
  Tiles tiles;
  int64_t pairs = 0, promoted = 0, wanted_not_stored = 0;
};

// One (sequence, KV head) of a decode step.
struct Unit {
  Unit(const Problem& p, int64_t rows, int splits, bool mma4)
      : rows_(rows, p.d, p.d_v, mma4, scores_first(p) || p.stats ? max_pages(p) : 0),
        choice(max_pages(p)),
        exchanged(exchanges(p) ? max_pages(p) : 0),
        mass_before(exchanges(p) ? rows : 0),
        means(scores_first(p) ? 0 : p.h_q / p.h_kv * p.d),
        q(mma4 ? 0 : rows * p.d),
        q_cells(mma4 ? 0 : cells_bytes(p, rows) / int64_t{sizeof(int32_t)}),
        q_unit(mma4 ? 0 : Rows::padded(rows)),
        starts(mma4 || !p.cache.centring ? 0 : max_pages(p) * round_up(rows, 4)) {
    for (int s = 1; s < splits; ++s) partial.emplace_back(rows, 0, p.d_v, false, 0);
  }
  Rows rows_;                 // the first split's state, and the merged one
  std::vector<Rows> partial;  // the other splits'
  Choice choice;
  std::vector<Promoted> exchanged;  // promoted pages that were read in FP4 first
  int64_t exchanged_count = 0;
  std::vector<float> mass_before;  // [rows], log2 of the sum over all pages before the exchange
  std::vector<float> means;        // [mean_heads, d], of the query heads that rank pages
  int mean_heads = 0;
  float q_norm = 0;              // the largest of a mean row
  std::vector<float> q;          // [rows, d], times sm_scale log2 e
  std::vector<int32_t> q_cells;  // the same as integers
  std::vector<float> q_unit;     // [rows]
  std::vector<float> starts;     // [max pages, rows rounded up to fours], as BlockTask says; or empty
  bool starts_known = false;
  BlockPages block;
};

// One task of a prefill: a query block of some query heads of one KV head.
struct PrefillTask {
  int64_t sequence;
  int kv_head, first_head, heads;  // first_head counts from 0 in the group
  int64_t block;
};

struct Scratch {
  std::vector<Worker> workers;
  std::vector<Rows> rows;                    // prefill, by worker
  std::vector<std::vector<Choice>> choices;  // prefill, by worker and head
  std::vector<PrefillTask> tasks;            // prefill
  std::vector<Unit> units;                   // decode
};

}  // namespace thriftattn::cpu
