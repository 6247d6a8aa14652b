// The loops that only a target knows how to run fast, as one table of functions per instruction set. kernels.cc holds
// their single generic body.
#pragma once

#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "format/params.h"
#include "format/selection.h"

namespace thriftattn::cpu {

inline constexpr float kMinusInf = -std::numeric_limits<float>::infinity();
inline constexpr float kLog2e = 1.44269504088896341f;

// Tile memory of one thread: one page decoded to float, in each tier that some head reads, and the scores against it.
struct Tiles {
  float* k[4];   // by Tier: [d, 64]
  float* v[4];   // by Tier: [64, d_v]
  float* p;      // [rows, 64], scores, then probabilities
  float* p4;     // [rows, 64], quantised probabilities (mma4)
  char* matrix;  // memory for matrix tiles (amx.h), where the target has them; else null
};

// Online softmax of some rows, in units of log2: the unnormalised output is sum 2^(s - m) v.
struct SoftmaxState {
  float* m;       // [rows], -inf where nothing was seen
  float* l;       // [rows], sum of 2^(s - m)
  float* l_high;  // [rows], the part of l read in a tier above fp4
  float* o;       // [rows, d_v]
};

inline constexpr int kMaxHeadsPerTask = 4;

// Some query heads of one KV head, `rows` rows of each, over a range of pages. Row r of head h is h * rows + r.
struct BlockTask {
  const PageLayout* layout;
  const Method* method;
  DType high_dtype;
  Fp4Format format;  // of the planes that the cache holds
  bool centring;
  bool mma4;
  float sm_scale, softcap;  // softcap 0 = none

  const PageRef* pages;          // of the sequence
  int64_t first_page, end_page;  // to read, tail included
  int64_t s_kv;
  int64_t first_position;  // of row 0; row r stands at first_position + r % period
  int period;
  Mask mask;
  Tier rest;  // of the full pages that are not promoted

  int heads, rows;
  const float* q;   // [heads * rows, d]
  const float* q4;  // the same quantised and decoded again; mma4 only

  std::span<const Promoted> promoted[kMaxHeadsPerTask];  // by head; ascending pages
  SoftmaxState state;

  // Score-first: [heads * rows, score_stride], the scaled log2 scores of page p at column (p - score_page) * 64; null
  // where scores are not kept.
  float* scores;
  int64_t score_stride, score_page;
  // log2 of each page's sum of 2^s: [heads * rows, page_stride] at column p; null where not wanted.
  float* page_log2;
  int64_t page_stride;
};

struct Kernels {
  const char* target;
  // Adds the pages of the task to its softmax state. Where scores are kept, pages read in fp4 take them from there.
  void (*attend)(const BlockTask& task, Tiles& tiles);
  // Scores every page of the task, K only, each in its tier; fills `page_log2`, and `scores` where they are kept.
  void (*score)(const BlockTask& task, Tiles& tiles);
  // score[p] for p in [0, n) of the policies that rank before reading: block_mean, quest, second_moment.
  void (*rank)(Policy policy, const PageLayout& layout, DType high_dtype, const float* q_mean, float sm_scale,
               const PageRef* pages, int64_t n, float* score);
  // q4 = dec(enc(q)) of `rows` rows of d channels in the method's format (mma4).
  void (*quantize_rows)(const Method& method, int64_t rows, int d, const float* q, float* q4);
};

// The table of one target of targets(), or of one that runs where it is forced alone; null for any other name.
const Kernels* kernels_for(const std::string& target);

}  // namespace thriftattn::cpu
