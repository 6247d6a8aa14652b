// Choosing the pages of one query block by one CTA, from scores that stand in memory (global or shared): what
// src/cpu/select.cc does on a CPU.
//
//   scores -> [shares -> contributions] -> keys, in registers -> histogram, the bin of the last page taken, its few
//   pages in order -> Cut -> tiers
//
// A key is an unsigned integer that orders as the scores do. The range of the keys is cut into 256 bins, all but the
// bin in which the budget ends drop out, and so on until so few pages are left that each can count those before it:
// with scores of attention one histogram does. The result is a Cut, which says of any page by its key whether it is
// taken, so that pages keep their places and nothing is sorted. Budgets of mass and of error weigh a page by its share
// in units of 2^-31; all sums that a cut hangs on are sums of integers, so the same scores give the same pages,
// whatever the order of threads.
//
// What binds it is latency: six barriers, and the instructions between them, of which a page costs some 70.
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

inline constexpr uint32_t kUnseenKey = 0, kForcedKey = 1;  // below any score's

// Taken are the pages whose key is larger than `key`, and of those with this key the ones before page_limit.
struct Cut {
  uint32_t key;
  int page_limit;

  THRIFTATTN_HD static constexpr Cut none() { return {UINT32_MAX, 0}; }  // no score has this key
  THRIFTATTN_HD static constexpr Cut all() { return {kForcedKey, 0}; }
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

  // Threads go through them by strips of 32 pages, which begin at multiples of 32.
  THRIFTATTN_HD int base() const { return first / 32 * 32; }
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

// What becomes of one page.
struct Verdict {
  Tier tier;
  bool listed;  // promoted: read in another tier than the rest
  bool wanted;  // and not stored
};
THRIFTATTN_HD inline Verdict judge(const Choosing& how, const Candidates& c, const Cut& cut, int page, uint32_t key) {
  if (key == kUnseenKey) return {Tier::none, false, false};
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

__device__ inline int lane_id() { return static_cast<int>(threadIdx.x) % 32; }
__device__ inline int warp_id() { return static_cast<int>(threadIdx.x) / 32; }
__device__ inline unsigned lanes_before() { return (1u << lane_id()) - 1; }

// How many candidates a budget of a number of pages takes.
__device__ inline uint32_t pages_wanted(const Choosing& how, const Candidates& c) {
  const int64_t forced = forced_pages(how.force, c.block).count(c.block);
  return static_cast<uint32_t>(budget_pages(how.budget, c.block, forced, how.one_k) - forced);
}

// One of the few pages of which one is the last taken: who comes first has the larger `order`.
struct alignas(16) Rival {
  uint64_t order;  // key, then the lower page
  uint32_t weight;
};

template <int kThreads, int kPer>
struct ChooseShared {
  static constexpr int kWarps = kThreads / 32, kRivals = 64;
  uint32_t histogram[256];  // from the top bin down
  uint32_t low[kWarps], high[kWarps], total[kWarps];
  double sums[3][kWarps];
  float top[kWarps];
  uint32_t need;        // weight that is wanted of the candidates
  uint32_t bin, above;  // where the histogram reaches it, and the weight above that bin
  int rivals;           // pages of the bin; the first kRivals of them, in no order:
  Rival rival[kRivals];
  Cut cut;
  uint32_t strips[kPer][kWarps];  // counts
  int wanted;                     // but not stored
};

// The pages of a thread, and what is known of each: its key. Page base + kThreads i + thread is the i-th.
template <int kThreads, int kPer>
struct PageKeys {
  int base, end;
  uint32_t key[kPer];

  __device__ int page(int i) const { return base + i * kThreads + static_cast<int>(threadIdx.x); }
  // False where the CTA has no i-th pages.
  __device__ bool any(int i) const { return base + i * kThreads < end; }

  // Forced pages alone: those of a method that does not rank, or before it has.
  __device__ explicit PageKeys(const Candidates& c) : base(c.base()), end(c.end) {
#pragma unroll
    for (int i = 0; i < kPer; ++i)
      key[i] = page(i) < c.first || page(i) >= end ? kUnseenKey : c.forced(page(i)) ? kForcedKey : kForcedKey + 1;
  }
};

// Numbers what strips of pages count, in the order of pages: before[i] is the sum over the strips before the warp's
// i-th. Returns the sum of all. count is the same in all lanes of a warp.
template <int kThreads, int kPer>
__device__ uint32_t number_strips(const PageKeys<kThreads, kPer>& pages, const uint32_t (&count)[kPer],
                                  uint32_t (&before)[kPer], ChooseShared<kThreads, kPer>& s) {
#pragma unroll
  for (int i = 0; i < kPer; ++i)
    if (pages.any(i) && lane_id() == 0) s.strips[i][warp_id()] = count[i];
  __syncthreads();
  uint32_t all = 0;
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    if (!pages.any(i)) continue;
    const uint32_t x = lane_id() < s.kWarps ? s.strips[i][lane_id()] : 0;
    before[i] = all + __reduce_add_sync(kAll, lane_id() < warp_id() ? x : 0);
    all += __reduce_add_sync(kAll, x);
  }
  return all;
}

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
template <int kThreads, int kPer>
__device__ Weighing weigh(const Choosing& how, const Candidates& c, float* score, float q_norm,
                          const Summaries& summaries, ChooseShared<kThreads, kPer>& s, double& need) {
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

// Finds, with one warp, the bin of the histogram in which the sum from the top reaches `need`.
template <int kThreads, int kPer>
__device__ void find_bin(uint32_t need, ChooseShared<kThreads, kPer>& s) {
  const uint4* from = reinterpret_cast<const uint4*>(s.histogram) + 2 * lane_id();
  const uint4 x = from[0], y = from[1];
  uint32_t sum[8] = {x.x, x.y, x.z, x.w, y.x, y.y, y.z, y.w};  // of the lane's bins up to each
#pragma unroll
  for (int i = 1; i < 8; ++i) sum[i] += sum[i - 1];
  uint32_t to_here = sum[7];
#pragma unroll
  for (int i = 1; i < 32; i *= 2) {
    const uint32_t before = __shfl_up_sync(kAll, to_here, i);
    if (lane_id() >= i) to_here += before;
  }
  const uint32_t before = to_here - sum[7];
  if (before >= need || to_here < need) return;
  uint32_t bin = 8 * lane_id(), above = before;
#pragma unroll
  for (uint32_t of : sum)
    if (before + of < need) {
      ++bin;
      above = before + of;
    }
  s.bin = bin;
  s.above = above;
}

// The smallest and the largest of all threads' keys.
template <int kThreads, int kPer>
__device__ void reduce_range(uint32_t& low, uint32_t& high, ChooseShared<kThreads, kPer>& s) {
  low = __reduce_min_sync(kAll, low);
  high = __reduce_max_sync(kAll, high);
  if (lane_id() == 0) {
    s.low[warp_id()] = low;
    s.high[warp_id()] = high;
  }
  __syncthreads();
  const int w = min(lane_id(), s.kWarps - 1);
  low = __reduce_min_sync(kAll, s.low[w]);
  high = __reduce_max_sync(kAll, s.high[w]);
}

// The first pages of one key, as many as reach `need`.
template <int kThreads, int kPer>
__device__ Cut cut_ties(uint32_t key, uint32_t weight, uint32_t need, const PageKeys<kThreads, kPer>& pages,
                        ChooseShared<kThreads, kPer>& s) {
  const uint32_t ties = (need + weight - 1) / weight;
  uint32_t tie[kPer], count[kPer], before[kPer];
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    tie[i] = __ballot_sync(kAll, pages.key[i] == key);
    count[i] = __popc(tie[i]);
  }
  number_strips(pages, count, before, s);
#pragma unroll
  for (int i = 0; i < kPer; ++i)
    if (pages.any(i) && pages.key[i] == key && before[i] + __popc(tie[i] & lanes_before()) == ties - 1)
      s.cut = {key, pages.page(i) + 1};
  __syncthreads();
  return s.cut;
}

// Chooses by score[page - c.first], which it may overwrite, and sets the pages' keys. Where the budget is a number of
// pages, s.need holds how many candidates to take. The caller puts a barrier before the next use of `s`.
template <int kThreads, int kPer>
__device__ Cut choose(const Choosing& how, const Candidates& c, float* score, float q_norm, const Summaries& summaries,
                      PageKeys<kThreads, kPer>& pages, ChooseShared<kThreads, kPer>& s) {
  const int t = static_cast<int>(threadIdx.x);
  Weighing weighing;
  if (how.budget.kind == Budget::Kind::mass || how.budget.kind == Budget::Kind::tolerance) {
    double need = 0;
    weighing = weigh(how, c, score, q_norm, summaries, s, need);
    if (t == 0) s.need = need > 0 ? static_cast<uint32_t>(fmin(need, 0x1.8p31)) : 0;
  }
  uint32_t low = UINT32_MAX, high = 0, total = 0;
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    if (pages.key[i] <= kForcedKey) continue;
    const float x = score[pages.page(i) - c.first];
    pages.key[i] = key_of(x);
    low = min(low, pages.key[i]);
    high = max(high, pages.key[i]);
    total += weighing.of(x);
  }
  total = __reduce_add_sync(kAll, total);
  if (lane_id() == 0) s.total[warp_id()] = total;
  if (t < 256) s.histogram[t] = 0;
  if (t == 0) s.rivals = 0;
  reduce_range(low, high, s);
  total = __reduce_add_sync(kAll, lane_id() < s.kWarps ? s.total[lane_id()] : 0);
  uint32_t need = s.need;  // of the keys in [low, high]
  if (need == 0) return Cut::none();
  if (total < need || (weighing.form == Weighing::one && total == need)) return Cut::all();

  while (low < high) {
    // Bins of equal width in score, or, where that is not finite, in key.
    const float bottom = score_of(low), scale = 255.9f / (score_of(high) - bottom);
    const bool by_score = scale > 0 && scale < INFINITY;
    const int shift = max(0, 24 - __clz(static_cast<int>(high - low)));
    uint32_t bin[kPer];
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      const uint32_t k = pages.key[i];
      const uint32_t up = by_score ? __float2uint_rz((score_of(k) - bottom) * scale) : (k - low) >> shift;
      bin[i] = k < low || k > high ? UINT32_MAX : 255 - min(up, 255u);
      if (bin[i] <= 255) atomicAdd(&s.histogram[bin[i]], weighing.of(score_of(k)));
    }
    __syncthreads();
    if (warp_id() == 0) find_bin(need, s);
    __syncthreads();
    low = UINT32_MAX;
    high = 0;
    const uint32_t last = s.bin;
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      if (bin[i] != last) continue;
      const uint32_t k = pages.key[i];
      low = min(low, k);
      high = max(high, k);
      const int at = atomicAdd(&s.rivals, 1);
      if (at < s.kRivals)
        s.rival[at] = {uint64_t{k} << 32 | (kAll - static_cast<uint32_t>(pages.page(i))), weighing.of(score_of(k))};
    }
    need -= s.above;
    if (t < 256) s.histogram[t] = 0;
    reduce_range(low, high, s);
    const int rivals = s.rivals;
    if (rivals <= s.kRivals) {
      if (t < rivals) {
        const Rival mine = s.rival[t];
        uint32_t before = 0;
#pragma unroll 4
        for (int i = 0; i < rivals; ++i) before += s.rival[i].order > mine.order ? s.rival[i].weight : 0;
        if (before < need && need <= before + mine.weight)
          s.cut = {static_cast<uint32_t>(mine.order >> 32),
                   static_cast<int>(kAll - static_cast<uint32_t>(mine.order)) + 1};
      }
      __syncthreads();
      return s.cut;
    }
    __syncthreads();
    if (t == 0) s.rivals = 0;
  }
  return cut_ties(low, weighing.of(score_of(low)), need, pages, s);
}

// Writes the lists and counts of unit u.
template <int kThreads, int kPer>
__device__ void write_lists(const Choosing& how, const Candidates& c, const Cut& cut,
                            const PageKeys<kThreads, kPer>& pages, const Lists& lists, int64_t u,
                            ChooseShared<kThreads, kPer>& s) {
  if (threadIdx.x == 0) s.wanted = 0;
  __syncthreads();
  Tier tier[kPer];  // of listed pages, none of others
  unsigned highs[kPer], pairs[kPer];
  uint32_t count[kPer], before[kPer];  // of a strip: pages in fp16, and 65536 times those in fp4x2
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    const Verdict v = judge(how, c, cut, pages.page(i), pages.key[i]);
    tier[i] = v.listed ? v.tier : Tier::none;
    highs[i] = __ballot_sync(kAll, tier[i] == Tier::fp16);
    pairs[i] = __ballot_sync(kAll, tier[i] == Tier::fp4x2);
    count[i] = __popc(highs[i]) + (__popc(pairs[i]) << 16);
    if (v.wanted) atomicAdd(&s.wanted, 1);
  }
  const uint32_t all = number_strips(pages, count, before, s);
  uint32_t* by_page = lists.by_page + u * lists.k_max;
  uint32_t* by_tier = lists.by_tier + u * lists.k_max;
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    if (tier[i] == Tier::none) continue;
    const uint32_t highs_before = (before[i] & 0xffff) + __popc(highs[i] & lanes_before());
    const uint32_t pairs_before = (before[i] >> 16) + __popc(pairs[i] & lanes_before());
    const uint32_t entry = static_cast<uint32_t>(pages.page(i)) * 4 + static_cast<uint32_t>(tier[i]);
    by_page[highs_before + pairs_before] = entry;
    by_tier[tier[i] == Tier::fp16 ? highs_before : (all & 0xffff) + pairs_before] = entry;
  }
  if (threadIdx.x == 0) {
    int4* counts = reinterpret_cast<int4*>(lists.counts + u * 8);
    const int high = static_cast<int>(all & 0xffff), planes = static_cast<int>(all >> 16);
    counts[0] = {high + planes, high, planes, 0};
    counts[1] = {0, s.wanted, 0, 0};
  }
}

#endif  // __CUDACC__

}  // namespace thriftattn::cuda
