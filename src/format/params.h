// What a backend is given for one run: plain structs over the caller's memory and the cache's records.
#pragma once

#include <cstdint>
#include <cstring>
#include <span>

#include "format/page_layout.h"
#include "thriftattn/attention.h"

namespace thriftattn {

// The records of one page as one (layer, KV head) sees it; null = that form is not stored.
struct PageRef {
  const uint8_t* fp4;
  const uint8_t* residual;
  const uint16_t* high;
  const uint8_t* summary;
};

inline PageSummary summary_of(const PageRef& page) {
  PageSummary facts;
  std::memcpy(&facts, page.summary, sizeof(facts));
  return facts;
}

struct SequenceCall {
  int64_t s_q = 0, s_kv = 0;
  int64_t first_row = 0;           // of its rows in q and out
  const PageRef* pages = nullptr;  // [h_kv, page_stride], tail included
  int64_t page_stride = 0;
  int64_t first_block = 0;  // of its query blocks in a Selection
};

struct AttentionCall {
  const Problem* problem = nullptr;  // resolved
  const PageLayout* layout = nullptr;
  std::span<const SequenceCall> sequences;
  std::span<const int> kv_heads;     // to compute, ascending; never empty
  View q;                            // [sum s_q, h_q, d]
  MutableView out;                   // [sum s_q, h_q, d_v]
  float* lse = nullptr;              // [sum s_q, h_q] or null
  const float* sinks = nullptr;      // [h_q] or null
  const Selection* given = nullptr;  // or null: select
  bool select_only = false;          // fill stats->selection and nothing else
  Stats* stats = nullptr;            // or null
};

// Query blocks of one sequence and head: positions s_kv - s_q .. s_kv - 1 cut at multiples of 64 in prefill, one block
// in a decode step.
THRIFTATTN_HD inline int64_t floor_page(int64_t position) {
  return position >= 0 ? position / kPageTokens : -((-position + kPageTokens - 1) / kPageTokens);
}
THRIFTATTN_HD inline int64_t query_blocks(Phase phase, int64_t s_q, int64_t s_kv) {
  if (s_q == 0) return 0;
  return phase == Phase::decode ? 1 : floor_page(s_kv - 1) - floor_page(s_kv - s_q) + 1;
}

}  // namespace thriftattn
