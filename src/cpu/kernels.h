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
  char* matrix;  // where products take BF16: memory for matrix tiles (amx.h), or q in pairs [rows, d / 2]; else null
};

// Online softmax of some rows, in units of log2: the unnormalised output is sum 2^(s - m) v.
struct SoftmaxState {
  float* m;       // [rows], -inf where nothing was seen
  float* l;       // [rows], sum of 2^(s - m)
  float* l_high;  // [rows], the part of l read in a tier above fp4
  float* o;       // [rows, d_v]
};

inline constexpr int kMaxHeadsPerTask = 4;

// The target whose prefill multiplies pairs of BF16; all else is AVX3_DL's.
inline constexpr const char* kBf16Pairs = "AVX3_BF16";

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

  // The softmax of each page: the sum of 2^s is page_l * 2^page_m; page_m is -inf where no token is seen, and page_l is
  // anything then. [heads * rows, page_stride] at column p; null where not wanted.
  float *page_m, *page_l;
  int64_t page_stride;

  // Decode steps in kv4: q as integers of 16 bits, rows padded to a multiple of 8 by zeros; row r is these * q_unit[r].
  const void* q_cells;  // as the target packs them
  const float* q_unit;  // [rows]

  // There too, q.k_mean where scores start from it: of page p and row r at [p * start_stride + r]. attend and score
  // leave it of the pages that they read in FP4, unless it is known before.
  float* starts;
  int64_t start_stride;  // rows, rounded up to fours
  bool starts_known;
};

// What the integers of four rows and 16 channels of q take at most, as a target packs them.
inline constexpr int64_t kCellBytes = 160;

inline constexpr int kMaxHeadsPerWalk = 16;

// Decode and verify steps in kv4 (decode.cc). A task has one KV head (heads = 1) and all rows of its group; the arrays
// of its state have room for 16 rows more, o for rows up to a multiple of 8. The tasks of one call, at most
// kMaxHeadsPerWalk, have one range of pages, and their records lie side by side.
struct DecodeKernels {
  const char* target;
  // Adds the pages of the tasks to their states.
  void (*attend)(std::span<const BlockTask> tasks);
  // Fills page_m and page_l alone; reads no V.
  void (*score)(std::span<const BlockTask> tasks);
  // In a state that has read the promoted pages of the task in its rest: takes them out and adds them in their tier.
  void (*exchange)(const BlockTask& task);
  // q [rows, d] to BlockTask::q_cells and q_unit.
  void (*quantize_q)(const PageLayout& layout, int rows, const float* q, void* q_cells, float* q_unit);
  // share[p] += weight * (the softmax mass of page p among n pages and a sink's logit, in units of log2).
  void (*add_shares)(const float* page_m, const float* page_l, int64_t n, float sink, float weight, float* scratch,
                     float* share);
};

// The query heads of one KV head that rank its pages.
struct RankTask {
  const float* q_mean;  // [heads, d]
  int heads;            // 0 = none has a row to rank by: all scores are -inf
  const PageRef* pages;
  float* score;     // [pages]
  float* products;  // where not null and the policy is not quest: q_mean.k_mean of page p and head h at [p * heads
                    // rounded up to fours + h]
};

struct Kernels {
  const char* target;
  // Adds the pages of the task to its softmax state.
  void (*attend)(const BlockTask& task, Tiles& tiles);
  // The same with factors in BF16, kv4 only, as attend_amx rounds them, but that q is rounded without its scale; null
  // where the target has no such instructions.
  void (*attend_bf16)(const BlockTask& task, Tiles& tiles);
  // Scores every page of the task, K only, each in its tier; fills page_m and page_l.
  void (*score)(const BlockTask& task, Tiles& tiles);
  // score[p] for p in [first, end) of the policies that rank before reading, block_mean, quest and second_moment: the
  // largest of a task's heads. The summaries of the tasks lie side by side.
  void (*rank)(Policy policy, const PageLayout& layout, DType high_dtype, float sm_scale,
               std::span<const RankTask> tasks, int64_t first, int64_t end);
  // The k-th largest of n numbers, 1 <= k <= n, none of them NaN; scratch has room for n.
  float (*kth_largest)(const float* x, int64_t n, int64_t k, int32_t* scratch);
  // q4 = dec(enc(q)) of `rows` rows of d channels in the method's format (mma4).
  void (*quantize_rows)(const Method& method, int64_t rows, int d, const float* q, float* q4);
  DecodeKernels decode;
};

// One table per target that Highway knows, in the order of targets().
const std::vector<DecodeKernels>& all_decode_kernels();

// The table of one target of targets(), or of one that runs where it is forced alone; null for any other name.
const Kernels* kernels_for(const std::string& target);

}  // namespace thriftattn::cpu
