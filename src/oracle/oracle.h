// The definitions of docs/design.md, section 2, in double precision and brute force: what every kernel is judged by.
// One sequence at a time. Shares no code with src/format, src/attention or a backend, only the plain structs of the
// public headers.
#pragma once

#include <cstdint>
#include <vector>

#include "thriftattn/attention.h"
#include "thriftattn/method.h"

namespace thriftattn::oracle {

struct Input {
  const float* q = nullptr;  // [s_q, h_q, d]
  const float* k = nullptr;  // [s_kv, h_kv, d], finite; rounded to high_dtype before anything else
  const float* v = nullptr;  // [s_kv, h_kv, d_v]
  int64_t s_q = 0, s_kv = 0;
  int h_q = 1, h_kv = 1, d = 128, d_v = 128;
  bool causal = true;  // row r, at position s_kv - s_q + r, sees no later token
  int64_t window = 0;  // it sees tokens less than so many positions away; 0 = all
  double sm_scale = 1;
  double softcap = 0;            // 0 = none
  const float* sinks = nullptr;  // [h_q] or null
  Phase phase = Phase::prefill;
  Method method;  // arithmetic `automatic` means kv4
  DType high_dtype = DType::f16;
  int64_t appended = 0;  // tokens that the running call appended: the pages they fill have 16-bit copies
};

// A query block of one head: the unit of selection.
struct QueryBlock {
  int head = 0;           // query head in prefill, KV head in decode
  int64_t first_row = 0;  // rows [first_row, end_row)
  int64_t end_row = 0;
  int64_t first_page = 0, pages = 0;  // full pages that it can see: [first_page, pages); `n` is their number
};
std::vector<QueryBlock> query_blocks(const Input& input);  // in the order of Selection

// What a policy thinks of the pages [0, pages) of one query block; those before first_page are no candidates and score
// -inf.
struct Estimate {
  int64_t first_page = 0;
  std::vector<double> score;         // the policy's, of which the largest are promoted
  std::vector<double> share;         // estimated share of the softmax mass
  std::vector<double> contribution;  // estimated error if the page is read in fp4
  std::vector<bool> forced;
};
std::vector<Estimate> estimates(const Input& input);  // one per query block

Selection select(const Input& input);

struct Output {
  std::vector<double> out;        // [s_q, h_q, d_v]
  std::vector<double> lse;        // [s_q, h_q]
  std::vector<double> page_mass;  // [h_kv, ceil(s_kv / 64)], mean over rows and query heads
  double mass_above_fp4 = 0;      // mean over rows and query heads
  double error_estimate = 0;      // mean over query blocks and query heads
};
Output attend(const Input& input, const Selection& selection);

}  // namespace thriftattn::oracle
