// Choosing the pages of one query block by one CTA, from scores that stand in memory (global or shared): what
// src/cpu/select.cc does on a CPU.
//
//   scores -> [shares -> contributions] -> keys, in shared memory -> histograms of 8 bits at a time -> Cut -> tiers
//
// A key is an unsigned integer that orders as the scores do; that of a forced page is 0, which takes no part. The bits
// in which keys differ are looked at from the top, 8 at a time: a histogram, the digit of the last page taken, and keys
// with other digits drop out; three digits decide most choices. The result is a Cut, which says of any page by its key
// whether it is taken: whoever writes the result goes through the pages in their order, without a sort. Budgets of mass
// and of error weigh a page by its share in units of 2^-31; all sums that a cut hangs on are sums of integers, so the
// same scores give the same pages, whatever the order of threads.
//
// What binds it is latency: some 30 instructions for each page and digit over the CTA's warps, two barriers a digit.
#pragma once

#include <algorithm>
#include <climits>
#include <cmath>

#include "cuda/params.h"
#include "format/selection.h"

namespace thriftattn::cuda {

inline constexpr unsigned kAll = 0xffffffffu;  // lanes of a warp

// What a method says of choosing, without its name.
struct Choosing {
  Policy policy;
  Budget budget;
  Force force;
  Tier rest, high;  // `high`: of pages that are promoted for their rank; none where it is not stored
  bool ranks;       // false: the forced pages are all
  bool one_k;       // one k for all rows of a problem (budget=paper)
  float sm_scale, softcap;
};

inline Choosing choosing(const Method& m, const Shape& shape, bool one_k) {
  return {m.policy, m.budget, m.force, m.rest, high_tier(m.storage), ranks(m), one_k, shape.sm_scale, shape.softcap};
}

// Taken are the pages whose key is larger than `key`, and of those with this key the ones before page_limit.
struct Cut {
  uint32_t key = UINT32_MAX;  // larger than any score's: nothing is taken
  int page_limit = 0;

  static constexpr Cut all() { return {0, 0}; }
};

// Keys order as scores do: -0 is 0, and NaN, which compares with nothing, is -infinity.
THRIFTATTN_HD inline uint32_t key_of(float score) {
  const uint32_t bits = bits_of(score != score ? -INFINITY : score + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
THRIFTATTN_HD inline float score_of(uint32_t key) { return float_of(key & 0x80000000u ? key & 0x7fffffffu : ~key); }

// The candidates of one query block: the full pages [first, end) that it sees.
struct Candidates {
  BlockPages block;
  int first, end;
  int sink_end, near_first, near_end;  // the forced ones, as ForcedPages says
  int sink, released;                  // 16-bit forms are stored of all pages or of those outside [sink, released)
  bool all_high, residual;

  THRIFTATTN_HD bool forced(int page) const { return page < sink_end || (page >= near_first && page < near_end); }
  THRIFTATTN_HD bool has_high(int page) const { return all_high || page < sink || page >= released; }
};

THRIFTATTN_HD inline Candidates candidates(const BlockPages& block, const Force& force, const LayerCache& cache,
                                           int released) {
  const ForcedPages forced = forced_pages(force, block);
  return {block,
          static_cast<int>(block.first_visible),
          static_cast<int>(block.visible),
          static_cast<int>(forced.sink_end),
          static_cast<int>(forced.first),
          static_cast<int>(forced.end),
          cache.sink,
          released,
          cache.all_high,
          cache.residual != nullptr};
}

inline constexpr uint32_t kForcedKey = 0;  // below any score's

// What becomes of one page.
struct Verdict {
  Tier tier;
  bool listed;  // promoted: read in another tier than the rest
  bool wanted;  // and not stored
};
THRIFTATTN_HD inline Verdict judge(const Choosing& how, const Candidates& c, const Cut& cut, int page, uint32_t key) {
  if (key == kForcedKey) {
    const Tier tier = forced_tier(how.rest, c.has_high(page), c.residual);
    return {tier, tier != how.rest, tier == how.rest && tier != Tier::fp16};
  }
  const bool taken = key > cut.key || (key == cut.key && page < cut.page_limit);
  return {taken && how.high != Tier::none ? how.high : how.rest, taken && how.high != Tier::none,
          taken && how.high == Tier::none};
}

#ifdef __CUDACC__

// The summary records of one sequence and KV head.
struct Summaries {
  const uint8_t* pool;   // of page id 0
  int64_t page_stride;   // bytes
  const int32_t* table;  // [max_pages]

  __device__ const uint8_t* record(int id) const { return pool + id * page_stride; }
};
__device__ inline Summaries summaries_of(const LayerCache& cache, int slot, int kv_head) {
  return {cache.summary + kv_head * cache.canonical.summary_bytes, cache.h_kv * cache.canonical.summary_bytes,
          cache.block_table + static_cast<int64_t>(slot) * cache.max_pages};
}

// The bin of a histogram in which the sum from the top reaches what is needed.
struct Bin {
  uint32_t index, above, in;
};

template <int kThreads>
struct ChooseShared {
  static constexpr int kWarps = kThreads / 32;
  uint32_t histogram[4][256];
  uint32_t low[kWarps], high[kWarps], total[kWarps];
  double sums[3][kWarps];
  float top[kWarps];
  uint32_t need;
  Bin bin;
  int limit;
  int counts[kWarps][3];
};

__device__ inline int lane_id() { return static_cast<int>(threadIdx.x) % 32; }
__device__ inline int warp_id() { return static_cast<int>(threadIdx.x) / 32; }
__device__ inline unsigned lanes_before() { return (1u << lane_id()) - 1; }

// The sum over all threads, in an order that is always the same. `slots` may be used once between two barriers.
template <int kThreads>
__device__ double sum_of_cta(double x, double (&slots)[kThreads / 32]) {
  for (int i = 16; i > 0; i /= 2) x += __shfl_xor_sync(kAll, x, i);
  if (lane_id() == 0) slots[warp_id()] = x;
  __syncthreads();
  double sum = 0;
  for (double of_warp : slots) sum += of_warp;
  return sum;
}

// What a page's being taken counts: one page, or its share of the mass or of the error, in units of 2^-31.
struct Weighing {
  enum Form { one, linear, softmax } form = one;
  float factor = 0, top = 0, softcap = 0;

  __device__ float capped(float score) const { return softcap > 0 ? softcap * tanhf(score / softcap) : score; }
  __device__ float unscaled(float score) const { return form == linear ? score : expf(capped(score) - top); }
  __device__ uint32_t of(float score) const { return form == one ? 1 : __float2uint_rn(factor * unscaled(score)); }
};

// For budgets of mass and tolerance: how pages weigh, and in `need` how much is wanted of the candidates. Under
// tolerance the scores are replaced by the pages' contributions to the error, by which they are then ranked.
template <int kThreads>
__device__ Weighing weigh(const Choosing& how, const Candidates& c, float* score, float q_norm,
                          const Summaries& summaries, ChooseShared<kThreads>& s, double& need) {
  constexpr double kUnits = 0x1p31;
  const int n = c.end - c.first, t = static_cast<int>(threadIdx.x);
  const bool by_mass = how.budget.kind == Budget::Kind::mass;
  Weighing share;
  share.form = how.policy == Policy::fp4_mass ? Weighing::linear : Weighing::softmax;
  share.softcap = how.softcap;
  share.factor = 1;
  if (share.form == Weighing::softmax) {
    float top = -INFINITY;
    for (int i = t; i < n; i += kThreads) top = fmaxf(top, share.capped(score[i]));
    for (int i = 16; i > 0; i /= 2) top = fmaxf(top, __shfl_xor_sync(kAll, top, i));
    if (lane_id() == 0) s.top[warp_id()] = top;
    __syncthreads();
    for (float of_warp : s.top) top = fmaxf(top, of_warp);
    share.top = top;
  }
  double all = 0, of_forced = 0;
  for (int i = t; i < n; i += kThreads) {
    all += share.unscaled(score[i]);
    if (c.forced(c.first + i)) of_forced += share.unscaled(score[i]);
  }
  all = sum_of_cta<kThreads>(all, s.sums[0]);
  of_forced = sum_of_cta<kThreads>(of_forced, s.sums[1]);
  const double each = all > 0 ? 1 / all : 0;
  if (by_mass) {
    share.factor = static_cast<float>(each * kUnits);
    need = ceil((how.budget.value - of_forced * each) * kUnits);
    return share;
  }
  double left = 0;
  for (int i = t; i < n; i += kThreads) {
    const auto& facts = *reinterpret_cast<const PageSummary*>(summaries.record(summaries.table[c.first + i]));
    score[i] = error_contribution(facts, share.unscaled(score[i]) * static_cast<float>(each), how.sm_scale, q_norm);
    if (!c.forced(c.first + i)) left += score[i];
  }
  left = sum_of_cta<kThreads>(left, s.sums[2]);
  // Enough is taken once what is left is below the budget's value.
  need = left < how.budget.value ? 0 : left > 0 ? floor((left - how.budget.value) / left * kUnits) + 1 : 2 * kUnits;
  Weighing contribution;
  contribution.form = Weighing::linear;
  contribution.factor = left > 0 ? static_cast<float>(kUnits / left) : 0.0f;
  return contribution;
}

// Called by one warp; the result is the same in all lanes.
__device__ inline Bin find_bin(const uint32_t (&histogram)[256], uint32_t need) {
  const int lane = lane_id();
  uint32_t bins[8], sum = 0;  // of this lane, from the top: 255 - 8 lane and below
#pragma unroll
  for (int i = 0; i < 8; ++i) sum += bins[i] = histogram[255 - 8 * lane - i];
  uint32_t to_here = sum;
  for (int i = 1; i < 32; i *= 2) {
    const uint32_t x = __shfl_up_sync(kAll, to_here, i);
    if (lane >= i) to_here += x;
  }
  Bin found = {0, 0, 0};
  uint32_t above = to_here - sum;
  const bool here = above < need && need <= to_here;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (above < need && need <= above + bins[i]) found = {255u - 8 * lane - i, above, bins[i]};
    above += bins[i];
  }
  const int source = __ffs(__ballot_sync(kAll, here)) - 1;
  return {__shfl_sync(kAll, found.index, source), __shfl_sync(kAll, found.above, source),
          __shfl_sync(kAll, found.in, source)};
}

// Chooses by score[i] of page c.first + i, which it may overwrite, and leaves the pages' keys, which may take the
// scores' place. The caller puts a barrier before the next use of `s`. (The method ranks.)
template <int kThreads>
__device__ Cut choose(const Choosing& how, const Candidates& c, float* score, uint32_t* keys, float q_norm,
                      const Summaries& summaries, ChooseShared<kThreads>& s) {
  const int n = c.end - c.first, t = static_cast<int>(threadIdx.x);
  Weighing weigh_page;
  if (how.budget.kind == Budget::Kind::mass || how.budget.kind == Budget::Kind::tolerance) {
    double need = 0;
    weigh_page = weigh(how, c, score, q_norm, summaries, s, need);
    if (t == 0) s.need = need > 0 ? static_cast<uint32_t>(fmin(need, 0x1.8p31)) : 0;
  } else if (t == 0) {
    const int64_t forced = forced_pages(how.force, c.block).count(c.block);
    s.need = static_cast<uint32_t>(budget_pages(how.budget, c.block, forced, how.one_k) - forced);
  }

  for (int i = t; i < 4 * 256; i += kThreads) s.histogram[i / 256][i % 256] = 0;
  uint32_t low = UINT32_MAX, high = 0, total = 0;
  for (int i = t; i < n; i += kThreads) {
    const float x = score[i];
    const uint32_t key = c.forced(c.first + i) ? kForcedKey : key_of(x);
    keys[i] = key;
    if (key == kForcedKey) continue;
    low = min(low, key);
    high = max(high, key);
    total += weigh_page.of(x);
  }
  low = __reduce_min_sync(kAll, low);
  high = __reduce_max_sync(kAll, high);
  total = __reduce_add_sync(kAll, total);
  if (lane_id() == 0) {
    s.low[warp_id()] = low;
    s.high[warp_id()] = high;
    s.total[warp_id()] = total;
  }
  __syncthreads();
  total = 0;
  for (int w = 0; w < s.kWarps; ++w) {
    low = min(low, s.low[w]);
    high = max(high, s.high[w]);
    total += s.total[w];
  }
  const uint32_t need = s.need;
  const bool counts = weigh_page.form == Weighing::one;
  if (need == 0) return {};
  if (total < need || (counts && total == need)) return Cut::all();

  int bits = low == high ? 0 : 32 - __clz(static_cast<int>(low ^ high));  // not yet decided
  uint32_t decided = bits == 0 ? kAll : ~(kAll >> (32 - bits));
  uint32_t key = high & decided, above = 0, in = total;
  for (auto* histogram = s.histogram; bits > 0; ++histogram) {
    const int shift = max(bits - 8, 0);
    const uint32_t digits = (1u << (bits - shift)) - 1;
    for (int i = t; i < n; i += kThreads) {
      const uint32_t k = keys[i];
      if ((k & decided) == key && k != kForcedKey)
        atomicAdd(&(*histogram)[(k >> shift) & digits], counts ? 1 : weigh_page.of(score_of(k)));
    }
    __syncthreads();
    if (warp_id() == 0) {
      const Bin bin = find_bin(*histogram, need - above);
      if (lane_id() == 0) s.bin = bin;
    }
    __syncthreads();
    key |= s.bin.index << shift;
    above += s.bin.above;
    in = s.bin.in;
    if (counts && above + in == need) return {key, INT_MAX};  // all that begin with these digits
    bits = shift;
    decided = ~((1u << bits) - 1);
  }
  const uint32_t each = weigh_page.of(score_of(key));
  const int ties = static_cast<int>((need - above + each - 1) / each);
  if (static_cast<uint32_t>(ties) >= in / each) return {key, INT_MAX};
  if (warp_id() == 0) {  // the first `ties` pages with this very key
    int seen = 0;
    for (int first = 0; seen < ties; first += 32) {
      const int i = first + lane_id();
      const bool tie = i < n && keys[i] == key;
      const unsigned all = __ballot_sync(kAll, tie);
      if (tie && seen + __popc(all & lanes_before()) == ties - 1) s.limit = c.first + i + 1;
      seen += __popc(all);
    }
  }
  __syncthreads();
  return {key, s.limit};
}

// Writes the lists and counts of unit u; keys are null where the method does not rank. Each warp goes through pages of
// its own, first counting, then writing.
template <int kThreads>
__device__ void write_lists(const Choosing& how, const Candidates& c, const Cut& cut, const uint32_t* keys,
                            const Lists& lists, int64_t u, ChooseShared<kThreads>& s) {
  enum { fp16, fp4x2, wanted, kinds };
  const int n = c.end - c.first, strips = (n + 31) / 32, per_warp = (strips + s.kWarps - 1) / s.kWarps;
  const int first = warp_id() * per_warp * 32, end = min(n, first + per_warp * 32);
  const auto verdict = [&](int i) {
    if (i >= end) return Verdict{how.rest, false, false};
    const uint32_t key = keys ? keys[i] : c.forced(c.first + i) ? kForcedKey : 1;
    return judge(how, c, cut, c.first + i, key);
  };
  int count[kinds] = {};
  for (int i = first + lane_id(); i - lane_id() < end; i += 32) {
    const Verdict v = verdict(i);
    count[fp16] += __popc(__ballot_sync(kAll, v.listed && v.tier == Tier::fp16));
    count[fp4x2] += __popc(__ballot_sync(kAll, v.listed && v.tier == Tier::fp4x2));
    count[wanted] += __popc(__ballot_sync(kAll, v.wanted));
  }
#pragma unroll
  for (int kind = 0; kind < kinds; ++kind)
    if (lane_id() == 0) s.counts[warp_id()][kind] = count[kind];
  __syncthreads();
  // Sums over warps, one a lane: those before this one, and all.
  int before[kinds], all[kinds];
#pragma unroll
  for (int kind = 0; kind < kinds; ++kind) {
    const int of_warp = lane_id() < s.kWarps ? s.counts[lane_id()][kind] : 0;
    before[kind] = __reduce_add_sync(kAll, lane_id() < warp_id() ? of_warp : 0);
    all[kind] = __reduce_add_sync(kAll, of_warp);
  }
  uint32_t* by_page = lists.by_page + u * lists.k_max;
  uint32_t* by_tier = lists.by_tier + u * lists.k_max;
  for (int i = first + lane_id(); i - lane_id() < end; i += 32) {
    const Verdict v = verdict(i);
    const bool high = v.listed && v.tier == Tier::fp16;
    const unsigned highs = __ballot_sync(kAll, high), pairs = __ballot_sync(kAll, v.listed && !high);
    const int highs_before = before[fp16] + __popc(highs & lanes_before());
    const int pairs_before = before[fp4x2] + __popc(pairs & lanes_before());
    if (v.listed) {
      const uint32_t entry = static_cast<uint32_t>(c.first + i) * 4 + static_cast<uint32_t>(v.tier);
      by_page[highs_before + pairs_before] = entry;
      by_tier[high ? highs_before : all[fp16] + pairs_before] = entry;
    }
    before[fp16] += __popc(highs);
    before[fp4x2] += __popc(pairs);
  }
  if (threadIdx.x == 0) {
    int4* counts = reinterpret_cast<int4*>(lists.counts + u * 8);
    counts[0] = {all[fp16] + all[fp4x2], all[fp16], all[fp4x2], 0};
    counts[1] = {0, all[wanted], 0, 0};
  }
}

#endif  // __CUDACC__

}  // namespace thriftattn::cuda
