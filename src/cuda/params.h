// What the kernels of this backend are given and leave for one another: plain structs over device memory, and one
// launcher per kernel. A decode step is
//
//   nothing ranked   launch_attend -> out
//   rank first       launch_rank -> lists -> launch_attend -> out
//   fp4_mass         launch_attend -> states, page masses -> launch_choose_by_mass -> lists -> launch_exchange -> out
//
// and a prefill is launch_rank_prefill -> tiers -> launch_expand -> launch_prefill. Launchers check and return the
// launch's error and nothing else; everything is asynchronous on the stream given.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "format/device_layout.h"
#include "format/page_layout.h"
#include "thriftattn/attention.h"
#include "thriftattn/cache.h"

namespace thriftattn::cuda {

// One layer of a cache. A sequence is a slot in [0, max_sequences); its page j has the id block_table[slot, j].
//
// 16-bit records: where all pages keep that form (high_only, dual) a record belongs to the page's id. Otherwise every
// sequence has a ring of ring_pages of them: its first `sink` pages, then the others in turn. Pages [sink, released) of
// a sequence have lost theirs: end_step raises `released` to `recent` full pages before the end, so those that a step
// fills keep theirs while it lasts; a truncate lowers it again, but brings nothing back.
struct LayerCache {
  DeviceLayout layout;
  PageLayout canonical;        // of the summary records
  uint8_t* fp4;                // [pages, h_kv, layout.fp4_bytes]; null for high_only
  uint8_t* residual;           // the same, or null
  uint8_t* high;               // [pages or max_sequences * ring_pages, h_kv, layout.high_bytes]
  uint8_t* summary;            // [pages, h_kv, canonical.summary_bytes], or null
  const int32_t* block_table;  // [max_sequences, max_pages]; entries beyond what is reserved are -1
  const int32_t* s_kv;         // [max_sequences], tokens with those of the step under way
  const int32_t* released;     // [max_sequences], pages; at least sink
  int max_pages, h_kv;
  bool all_high;
  int sink, ring_pages;
  Fp4Format format;
  bool centring;

  // The 16-bit record of head 0 of page j, and whether it still holds that page.
  THRIFTATTN_HD int64_t high_record(int slot, int j, int page_id) const {
    return all_high
               ? page_id
               : static_cast<int64_t>(slot) * ring_pages + (j < sink ? j : sink + (j - sink) % (ring_pages - sink));
  }
  THRIFTATTN_HD bool has_high(int j, int released_pages) const { return all_high || j < sink || j >= released_pages; }
};

// The sequences of a step, i in [0, b).
struct Batch {
  int b;
  const int32_t* slot;       // [b]
  const int32_t* s_q;        // [b], tokens that the step brings, and query rows
  const int32_t* first_row;  // [b], of sequence i in q, k, v, out
};

// A tensor [rows, heads, channels] of the caller; strides in elements.
template <class Pointer>
struct Rows {
  Pointer data;
  DType dtype;
  int64_t row_stride, head_stride;
};

struct Shape {
  int h_q, h_kv, group;  // group = h_q / h_kv
  int d, d_v;
  int max_s_q;
  bool causal;
  int64_t window;  // 0 = none
  float sm_scale, softcap;
  Tier rest;  // none, fp4 or fp16
};

// --- decode and verify: a unit is (sequence i, KV head g), u = i * h_kv + g. Its rows are group * s_q of sequence i,
// --- row h * s_q + r for row r of the group's head h, and have room for row_stride = round_up(group * max_s_q, 4).

// Which pages of a unit are promoted. `forced`: those that are whatever their rank, in the tier that format/selection.h
// says, which takes no list.
enum class Promote : int { none, forced, listed };

// The pages of every unit in the order in which they are read, as page * 4 + tier (tier as in enum Tier).
struct Lists {
  int max_pages;
  uint32_t* order;  // [units, max_pages]: the promoted pages, those in fp16 first, then those in fp4x2, then those in
                    // fp4, then those in none; then all others that the unit sees; ascending within
  int32_t* counts;  // [units, 8]: promoted, then in fp16, in fp4x2, in fp4, in none, wanted but not stored,
                    // LayerCache::released as it was (Promote::forced alone), 0
  bool promoted_alone = false;  // the others are left out of `order`, for an exchange, which does not read them
  bool given = false;           // they were there before the step, and need no waiting for
};

// What a unit may see, as format/selection.h's block_pages says, is computed by each kernel from s_kv and s_q.
struct RankParams {
  LayerCache cache;
  Batch batch;
  Shape shape;
  Rows<const void*> q;  // [rows, h_q, d]
  Method method;        // resolved: policy, budget, force, storage
  int row_stride;
  float* score;   // [units, max_pages]: what the policy says of a page, the maximum over the unit's heads
  float* q_norm;  // [units]: norm of the mean row, the maximum over heads, for a budget of tolerance
  Lists lists;
};

// {m, l}: a softmax sum is l * 2^m, and l = 0 where nothing is seen, whatever m is then.
struct DecodeParams {
  LayerCache cache;
  Batch batch;
  Shape shape;
  Rows<const void*> q;  // [rows, h_q, d]
  Rows<void*> out;      // [rows, h_q, d_v]
  float* lse;           // [rows, h_q], natural log, or null
  const float* sinks;   // [h_q] or null
  Promote promote;
  Force force;
  Lists lists;  // forced: counts alone, which are written
  int row_stride;
  // Log2 of softmax sums of parts of pages, or null where not wanted. mass_parts = 2: [units, max_pages, 2,
  // row_stride], the halves of pages read in fp4 or fp4x2. mass_parts = 8: [units, max_pages, 8, row_stride], eighths
  // of every page that is read; a half leaves its sum in the first of its four and NaN, which stands for nothing, in
  // the others. Of pages that are not read, and of eighths without tokens, nothing is written.
  float* page_mass;
  int mass_parts;
  float* row_mass_high;  // [units, row_stride]: share of a row's mass read above fp4, or null
  // fp4_mass: attend leaves its rows' states here instead of writing out; exchange reads them, takes the listed pages
  // that are not forced (attend has read those in their tier) out of them, adds them in their tier, and writes out.
  float* state_ml;   // [units, row_stride, 4]: m, l, l_high, unused
  float* state_o;    // [units, row_stride, dv]
  void* partials;    // decode.cu's own, decode_partial_bytes() of it
  int32_t* tickets;  // [units * config.tiles], zero before and after
};

struct MassParams {
  RankParams rank;         // q_norm is read, of the launch_rank before; lists are filled; score is not used
  const float* state_ml;   // as attend left it: m and l of all that a row sees, a learned sink included
  const float* page_mass;  // as attend left it; of forced pages it is read for budgets of mass and tolerance alone,
  int mass_parts;          // which therefore need 8 parts
};

// Of a method that ranks. For fp4_mass, of which it knows nothing, q_norm alone.
cudaError_t launch_rank(const RankParams& params, cudaStream_t stream);
cudaError_t launch_choose_by_mass(const MassParams& params, cudaStream_t stream);

// How attend and exchange run on a GPU; decode_config is pure.
struct DecodeConfig {
  int d_bucket;  // 128: d = d_v = 128 alone; 256: every other size
  int columns;   // 4, 8 or 16 rows at once
  int tiles;     // of `columns` rows, that one unit's rows fill
  int warps, slots;
  bool exchanges_at_once;  // what a page in fp4x2 was and is from one reading: where a warp has so many that to wait
                           // for it twice costs more than to take longer once
  int shared_bytes;
  int blocks;
};
DecodeConfig decode_config(const Problem& problem, const Gpu& gpu);
int64_t decode_partial_bytes(const Problem& problem, const DecodeConfig& config);
cudaError_t launch_attend(const DecodeParams& params, const DecodeConfig& config, cudaStream_t stream);
cudaError_t launch_exchange(const DecodeParams& params, const DecodeConfig& config, cudaStream_t stream);

// --- prefill: query blocks of 64 rows at absolute positions, selection per query head

// Pages of one sequence that a prefill's scratch has room for in 16 bit: the first `sink`, and as many of the last ones
// as there are others. A method may name no other where not all pages keep that form.
struct HighRoom {
  int sink, pages;
};

struct PrefillParams {
  LayerCache cache;
  Batch batch;
  Shape shape;
  Method method;
  Rows<const void*> q;  // [rows, h_q, d]
  Rows<void*> out;      // [rows, h_q, d_v]
  float* lse;
  const float* sinks;
  int max_blocks;  // query blocks of one sequence, at most
  // Tier of every full page for every query block, 2 bits a page, little end first; the pages of a word that a block
  // does not see are 0 (none). All words are written.
  uint32_t* tiers;  // [b, h_q, max_blocks, tier_words], tier_words = ceil(max_pages / 16)
  int tier_words;
  bool tiers_given;      // an injected selection: rank_prefill leaves tiers alone
  int32_t* counts;       // [b, h_q, max_blocks, 2]: promoted, wanted but not stored
  float* row_mass_high;  // [rows, h_q]: share of a row's mass read above fp4, or null
  HighRoom high_room;    // prefill_high_room() of the problem
  void* scratch;         // prefill_scratch_bytes() of it
};

// What a block of threads of a prefill works on; pure. Where even the least does not fit, its shared_bytes say so.
struct PrefillConfig {
  int units;   // query blocks of query heads of one KV head
  int stages;  // places of the ring, a page or half of one each
  int warps, shared_bytes;
};
PrefillConfig prefill_config(const DeviceLayout& layout, bool row_mass_high, int64_t shared_bytes);

HighRoom prefill_high_room(const Problem& problem);
int64_t prefill_scratch_bytes(const Problem& problem, const Gpu& gpu);
int64_t rank_prefill_shared_bytes(const Problem& problem);
cudaError_t launch_rank_prefill(const PrefillParams& params, cudaStream_t stream);
cudaError_t launch_expand(const PrefillParams& params, cudaStream_t stream);
cudaError_t launch_prefill(const PrefillParams& params, cudaStream_t stream);

// --- the cache

inline constexpr int32_t kNoPages = 1, kNotFinite = 2;  // bits of the faults

struct StepParams {
  Batch batch;
  const int32_t* block_table;  // [max_sequences, max_pages]
  int max_pages, max_tokens, recent;
  int32_t* settled;   // [max_sequences], tokens before the step under way
  int32_t* s_kv;      // [max_sequences], tokens with those of the step; equal to settled between steps
  int32_t* released;  // [max_sequences]
  int32_t* faults;    // [1]
};
cudaError_t launch_begin_step(const StepParams& params, cudaStream_t stream);
cudaError_t launch_end_step(const StepParams& params, cudaStream_t stream);

struct AppendParams {
  LayerCache cache;
  Batch batch;
  const int32_t* settled;  // [max_sequences]; tokens [settled, s_kv) of a sequence are the step's
  Rows<const void*> k, v;  // [rows, h_kv, d], [rows, h_kv, d_v]
  int max_s_q;             // of the batch
  Scales scales;
  bool page_scale;
  int32_t* faults;
};
cudaError_t launch_append(const AppendParams& params, cudaStream_t stream);

// Writes `count` values of the host to the device. They travel as parameters of kernels, which the launch copies: so
// the host's memory is free at once, and nothing waits, as a copy from memory that is not pinned may.
cudaError_t launch_write(int32_t* to, const int32_t* values, int64_t count, cudaStream_t stream);

// Makes `tokens` the length of a sequence, and zero what follows them in their 16-bit items, in all layers.
struct CutParams {
  DeviceLayout layout;
  uint8_t* high;        // of layer 0
  int64_t layer_bytes;  // from one layer to the next
  int64_t record;       // of the cut page's head 0
  int layers, h_kv;
  int slot, tokens, released_pages;
  int32_t *settled, *s_kv, *released;  // [max_sequences]
};
cudaError_t launch_cut(const CutParams& params, cudaStream_t stream);

// Copies 16-bit records of all heads, in all layers, within a cache or from one to another.
struct CopyParams {
  const uint8_t* from;  // [layers, records, record_bytes], of all heads together
  uint8_t* to;
  int64_t from_layer_bytes, to_layer_bytes;  // from one layer to the next
  int64_t record_bytes;
  int layers;
};
struct RecordPair {
  int64_t from, to;
};
cudaError_t launch_copy(const CopyParams& params, const RecordPair* records, int64_t count, cudaStream_t stream);

// Converts records of one layer between a pool and a buffer in canonical order, [count, h_kv], of at most kStagedPages
// pages.
inline constexpr int kStagedPages = 64;
enum class RecordKind : uint8_t { fp4, high, summary };  // fp4: of either plane; summaries are the same in both orders
struct StagedPage {
  int64_t record;  // in the pool
  int tokens;      // that the page holds
};
struct ConvertParams {
  PageLayout canonical;
  DeviceLayout layout;
  RecordKind kind;
  bool to_pool;  // or from it
  uint8_t* pool;
  uint8_t* staged;
  int64_t pool_bytes, staged_bytes;  // of a record of one head
};
cudaError_t launch_convert(const ConvertParams& params, int h_kv, const StagedPage* pages, int count,
                           cudaStream_t stream);

// --- plain values, as thriftattn/cuda.h has them

cudaError_t launch_quantize(const void* x, DType dtype, int64_t n, Fp4Format format, Scales rule, uint8_t* codes,
                            uint8_t* scales, cudaStream_t stream);
cudaError_t launch_dequantize(const uint8_t* codes, const uint8_t* scales, int64_t n, Fp4Format format, float* x,
                              cudaStream_t stream);

}  // namespace thriftattn::cuda
