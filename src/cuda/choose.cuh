// Choosing the pages of one query block by one CTA, from scores that stand in memory (global or shared): what
// src/cpu/select.cc does on a CPU.
//
//   scores -> [shares -> contributions] -> keys, in shared memory -> histogram, the bin of the last page taken, its few
//   pages in order -> Cut -> tiers
//
// A key is an unsigned integer that orders as the scores do; that of a forced page is 0, which takes no part. The range
// of the keys is cut into 255 bins, all but the bin in which the budget ends drop out, and so on until so few pages are
// left that each can count those before it: with scores of attention one histogram does. The result is a Cut, which
// says of any page by its key whether it is taken: whoever writes the result goes through the pages in their order,
// without a sort. Budgets of mass and of error weigh a page by its share in units of 2^-31; all sums that a cut hangs
// on are sums of integers, so the same scores give the same pages, whatever the order of threads.
//
// What binds it is latency: three barriers, and some hundred instructions for four pages of a thread. 2048 pages take
// 512 threads of an H100 5 us: scores 1.0, range 0.4, bins 1.1, pages of the bin and cut 0.9, order 1.4.
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
  uint32_t key;
  int page_limit;

  THRIFTATTN_HD static constexpr Cut none() { return {UINT32_MAX, 0}; }  // no score has this key
  THRIFTATTN_HD static constexpr Cut all() { return {0, 0}; }
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

THRIFTATTN_HD inline bool is_taken(const Cut& cut, int page, uint32_t key) {
  return key > cut.key || (key == cut.key && page < cut.page_limit);
}

// What becomes of one page: of a forced one, and of another.
struct Verdict {
  Tier tier;
  bool listed;  // promoted: read in another tier than the rest
  bool wanted;  // and not stored
};
THRIFTATTN_HD inline Verdict if_forced(const Choosing& how, bool residual, bool has_high) {
  const Tier tier = forced_tier(how.rest, has_high, residual);
  return {tier, tier != how.rest, tier == how.rest && tier != Tier::fp16};
}
THRIFTATTN_HD inline Verdict if_not_forced(const Choosing& how, bool taken) {
  const bool stored = how.high != Tier::none;
  return {taken && stored ? how.high : how.rest, taken && stored, taken && !stored};
}
THRIFTATTN_HD inline Verdict judge(const Choosing& how, const Candidates& c, const Cut& cut, int page, uint32_t key) {
  return key == kForcedKey ? if_forced(how, c.residual, c.has_high(page))
                           : if_not_forced(how, is_taken(cut, page, key));
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

template <int kThreads>
struct ChooseShared {
  static constexpr int kWarps = kThreads / 32, kRivals = 64;
  uint32_t histogram[256];  // from the top bin down
  uint32_t low[kWarps], high[kWarps], total[kWarps];
  double sums[3][kWarps];
  float top[kWarps];
  uint32_t need;  // weight that is wanted of the candidates
  int rivals;     // pages of the bin in which it is reached; the first kRivals of them, in no order:
  Rival rival[kRivals];
  Cut cut;
};

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

// The bin of the histogram in which the sum from the top reaches `need`, which all of it does, and the sum above that
// bin. By every warp for itself: no barrier has to follow.
struct Bin {
  uint32_t index, above;
};
template <int kThreads>
__device__ Bin find_bin(uint32_t need, const ChooseShared<kThreads>& s) {
  const int lane = lane_id();
  const uint4* from = reinterpret_cast<const uint4*>(s.histogram) + 2 * lane;
  const uint4 x = from[0], y = from[1];
  const uint32_t bins[8] = {x.x, x.y, x.z, x.w, y.x, y.y, y.z, y.w};
  const uint32_t sum = x.x + x.y + x.z + x.w + y.x + y.y + y.z + y.w;
  uint32_t to_here = sum;
#pragma unroll
  for (int i = 1; i < 32; i *= 2) {
    const uint32_t before = __shfl_up_sync(kAll, to_here, i);
    if (lane >= i) to_here += before;
  }
  Bin bin = {static_cast<uint32_t>(8 * lane), to_here - sum};
  bool before = true;
#pragma unroll
  for (int i = 0; i < 7; ++i) {
    before = before && bin.above + bins[i] < need;
    if (!before) continue;
    bin.above += bins[i];
    ++bin.index;
  }
  const int found = __ffs(__ballot_sync(kAll, to_here >= need)) - 1;
  return {__shfl_sync(kAll, bin.index, found), __shfl_sync(kAll, bin.above, found)};
}

// The smallest and the largest of all threads' keys.
template <int kThreads>
__device__ void reduce_range(uint32_t& low, uint32_t& high, ChooseShared<kThreads>& s) {
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

// The last rival taken where `need` is wanted of them. By every warp for itself.
template <int kThreads>
__device__ Cut cut_among_rivals(uint32_t need, int rivals, const Candidates& c, const ChooseShared<kThreads>& s) {
#pragma unroll 1
  for (int first = 0; first < rivals; first += 32) {
    const Rival mine = s.rival[min(first + lane_id(), rivals - 1)];
    uint32_t before = 0;
#pragma unroll 4
    for (int i = 0; i < rivals; ++i) before += s.rival[i].order > mine.order ? s.rival[i].weight : 0;
    const unsigned last = __ballot_sync(kAll, before < need && need <= before + mine.weight);
    if (last == 0) continue;
    const int lane = __ffs(last) - 1;
    const uint32_t key = static_cast<uint32_t>(mine.order >> 32), index = kAll - static_cast<uint32_t>(mine.order);
    return {__shfl_sync(kAll, key, lane), c.first + static_cast<int>(__shfl_sync(kAll, index, lane)) + 1};
  }
  return Cut::none();  // not reached: together the rivals reach `need`
}

// The first pages of one key, as many as reach `need`; they are more than there are rivals.
template <int kThreads>
__device__ Cut cut_ties(uint32_t key, uint32_t weight, uint32_t need, const Candidates& c, const uint32_t* keys,
                        ChooseShared<kThreads>& s) {
  const int ties = static_cast<int>((need + weight - 1) / weight), n = c.end - c.first;
  if (warp_id() == 0) {
    int seen = 0;
#pragma unroll 1
    for (int first = 0; seen < ties && first < n; first += 32) {
      const int i = first + lane_id();
      const bool tie = i < n && keys[i] == key;
      const unsigned all = __ballot_sync(kAll, tie);
      if (tie && seen + __popc(all & lanes_before()) == ties - 1) s.cut = {key, c.first + i + 1};
      seen += __popc(all);
    }
  }
  __syncthreads();
  return s.cut;
}

// Chooses by score[i] of page c.first + i, which it may overwrite, and leaves the pages' keys, which may take the
// scores' place; keys are at a multiple of 16 bytes, and they and `bins`, a byte a page, have room for a multiple of
// four pages. s.need holds how many candidates to take, where the budget is a number of pages. The caller puts a
// barrier before the next use of `s`. (The method ranks.) kMayWeigh: whether its budget may weigh pages.
template <bool kMayWeigh, int kThreads>
__device__ Cut choose(const Choosing& how, const Candidates& c, float* score, uint32_t* keys, uint32_t* bins,
                      float q_norm, const Summaries& summaries, ChooseShared<kThreads>& s) {
  const int n = c.end - c.first, t = static_cast<int>(threadIdx.x);
  Weighing weigh_page;
  if (kMayWeigh && weighs_pages(how.budget)) {
    double need = 0;
    weigh_page = weigh(how, c, score, q_norm, summaries, s, need);
    if (t == 0) s.need = need > 0 ? static_cast<uint32_t>(fmin(need, 0x1.8p31)) : 0;
  }
  const bool by_count = !kMayWeigh || weigh_page.form == Weighing::one;
  const auto weight_of = [&](uint32_t key) { return by_count ? 1 : weigh_page.of(score_of(key)); };
  uint32_t low = UINT32_MAX, high = 0, total = 0;  // low: minus one, so that the key of forced pages is the largest
#pragma unroll 1
  for (int i0 = t; i0 < n; i0 += 4 * kThreads) {
    float x[4];  // under way at once
#pragma unroll
    for (int k = 0; k < 4; ++k) x[k] = i0 + k * kThreads < n ? score[i0 + k * kThreads] : 0;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int i = i0 + k * kThreads;
      const uint32_t key = i >= n || c.forced(c.first + i) ? kForcedKey : key_of(x[k]);
      low = min(low, key - 1);
      high = max(high, key);
      total += key != kForcedKey;
      if (i < n) keys[i] = key;
    }
  }
  if (t < (4 - n % 4) % 4) keys[n + t] = kForcedKey;
  if (!by_count) {
    total = 0;
#pragma unroll 1
    for (int i = t; i < n; i += kThreads) total += keys[i] == kForcedKey ? 0 : weight_of(keys[i]);
  }
  total = __reduce_add_sync(kAll, total);
  if (lane_id() == 0) s.total[warp_id()] = total;
  for (int i = t; i < 256; i += kThreads) s.histogram[i] = 0;
  if (t == 0) s.rivals = 0;
  reduce_range(low, high, s);
  ++low;
  total = __reduce_add_sync(kAll, lane_id() < s.kWarps ? s.total[lane_id()] : 0);
  uint32_t need = s.need;  // of the keys in [low, high]
  if (need == 0) return Cut::none();
  if (total < need || (by_count && total == need)) return Cut::all();

  while (low < high) {
    // Bins of equal width in score, or in key, where that is not finite or the scores are shares: most are tiny, and
    // the keys of positive numbers go with their logarithms. Pages outside the range are in none.
    constexpr uint32_t kLast = 254, kNone = 255;
    const float bottom = score_of(low), scale = __fdividef(kLast + 0.9f, score_of(high) - bottom);
    const bool by_score = bottom < 0 && scale > 0 && scale < INFINITY;
    const int shift = max(0, 24 - __clz(static_cast<int>(high - low)));
    const auto bin_of = [&](uint32_t key) {
      const uint32_t by_value = __float2uint_rz((score_of(key) - bottom) * scale), by_key = (key - low) >> shift;
      return key - low <= high - low ? kLast - min(by_score ? by_value : by_key, kLast) : kNone;
    };
#pragma unroll 1
    for (int i = 4 * t; i < n; i += 4 * kThreads) {
      const uint4 four = *reinterpret_cast<const uint4*>(keys + i);
      const uint32_t key[4] = {four.x, four.y, four.z, four.w};
      uint32_t bin[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) bin[k] = bin_of(key[k]);
      bins[i / 4] = bin[0] | bin[1] << 8 | bin[2] << 16 | bin[3] << 24;
#pragma unroll
      for (int k = 0; k < 4; ++k)
        if (by_count && bin[k] != kNone) atomicAdd(&s.histogram[bin[k]], 1u);
    }
    if (!by_count)
#pragma unroll 1
      for (int i = t; i < n; i += kThreads)
        if (const uint32_t bin = bin_of(keys[i]); bin != kNone) atomicAdd(&s.histogram[bin], weight_of(keys[i]));
    __syncthreads();
    const Bin bin = find_bin(need, s);
#pragma unroll 1
    for (int i = 4 * t; i < n; i += 4 * kThreads) {
      uint32_t in_bin = __vseteq4(bins[i / 4], bin.index * 0x01010101);
#pragma unroll 1
      for (; in_bin != 0; in_bin &= in_bin - 1) {  // a bit in the byte of each such page
        const int page = i + (__ffs(static_cast<int>(in_bin)) - 1) / 8, at = atomicAdd(&s.rivals, 1);
        if (at < s.kRivals) s.rival[at] = {uint64_t{keys[page]} << 32 | (kAll - page), 1};
      }
    }
    need -= bin.above;
    __syncthreads();
    const int rivals = s.rivals;
    if (rivals <= s.kRivals) {
      if (!by_count) {
        if (t < rivals) s.rival[t].weight = weight_of(static_cast<uint32_t>(s.rival[t].order >> 32));
        __syncthreads();
      }
      return cut_among_rivals(need, rivals, c, s);
    }
    uint32_t low_left = UINT32_MAX, high_left = 0;
#pragma unroll 1
    for (int i = t; i < n; i += kThreads) {
      if (reinterpret_cast<const uint8_t*>(bins)[i] != bin.index) continue;
      low_left = min(low_left, keys[i]);
      high_left = max(high_left, keys[i]);
    }
    for (int i = t; i < 256; i += kThreads) s.histogram[i] = 0;
    reduce_range(low_left, high_left, s);
    if (t == 0) s.rivals = 0;
    low = low_left;
    high = high_left;
  }
  return cut_ties(low, weight_of(low), need, c, keys, s);
}

template <int kThreads>
struct ListShared {
  uint32_t counts[kThreads / 32];  // of a warp's pages: in fp16, and 65536 times those in fp4x2
  int wanted[kThreads / 32];       // of a warp's pages: but not stored
};

// Writes the order and counts of unit u. Each warp goes through pages of its own, four neighbours a lane, first
// counting, then writing. Keys become tiers.
template <int kThreads>
__device__ void write_lists(const Choosing& how, const Candidates& c, const Cut& cut, uint32_t* keys,
                            const Lists& lists, int64_t u, ListShared<kThreads>& s) {
  constexpr int kWarps = kThreads / 32, kStrip = 128;
  constexpr uint32_t kHigh = static_cast<uint32_t>(Tier::fp16), kPair = static_cast<uint32_t>(Tier::fp4x2);
  const int n = c.end - c.first, strips = (n + kStrip - 1) / kStrip, per_warp = (strips + kWarps - 1) / kWarps;
  const int first = warp_id() * per_warp * kStrip + 4 * lane_id();
  const int end = min((n + 3) / 4 * 4, (warp_id() + 1) * per_warp * kStrip);
  const auto count_of = [](uint32_t tier) { return (tier == kHigh ? 1u : 0u) + (tier == kPair ? 65536u : 0u); };
  // Verdicts do not depend on the page: the tier of one that is listed, and 4 where it is wanted and not stored.
  const auto noted = [](const Verdict& v) {
    return (v.listed ? static_cast<uint32_t>(v.tier) : 0) | (v.wanted ? 4u : 0u);
  };
  const uint32_t if_kept = noted(if_forced(how, c.residual, true)), if_lost = noted(if_forced(how, c.residual, false));
  const uint32_t if_taken = noted(if_not_forced(how, true));
  uint32_t count = 0;
  int wanted = 0;
#pragma unroll 1
  for (int i = first; i < end; i += kStrip) {
    uint4* at = reinterpret_cast<uint4*>(keys + i);
    const uint32_t key[4] = {at->x, at->y, at->z, at->w};
    uint32_t tier[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int page = c.first + i + k;
      const bool forced = key[k] == kForcedKey && i + k < n;
      const uint32_t verdict = forced                        ? (c.has_high(page) ? if_kept : if_lost)
                               : is_taken(cut, page, key[k]) ? if_taken
                                                             : 0;
      tier[k] = verdict & 3;
      wanted += static_cast<int>(verdict >> 2);
      count += count_of(tier[k]);
    }
    *at = {tier[0], tier[1], tier[2], tier[3]};
  }
  count = __reduce_add_sync(kAll, count);
  wanted = __reduce_add_sync(kAll, wanted);
  if (lane_id() == 0) {
    s.counts[warp_id()] = count;
    s.wanted[warp_id()] = wanted;
  }
  __syncthreads();
  const uint32_t of_warp = lane_id() < kWarps ? s.counts[lane_id()] : 0;
  uint32_t before = __reduce_add_sync(kAll, lane_id() < warp_id() ? of_warp : 0);
  const uint32_t all = __reduce_add_sync(kAll, of_warp), highs_in_all = all & 0xffff, pairs_in_all = all >> 16;
  uint32_t* order = lists.order + u * lists.max_pages;
  const int strips_here = (end - first + 4 * lane_id() + kStrip - 1) / kStrip;
#pragma unroll 1
  for (int strip = 0; strip < strips_here; ++strip) {
    const int i = first + strip * kStrip;
    uint4 tiers = {};
    if (i < end) tiers = *reinterpret_cast<const uint4*>(keys + i);
    const uint32_t tier[4] = {tiers.x, tiers.y, tiers.z, tiers.w};
    const uint32_t mine = count_of(tier[0]) + count_of(tier[1]) + count_of(tier[2]) + count_of(tier[3]);
    uint32_t to_here = mine;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const uint32_t other = __shfl_up_sync(kAll, to_here, step);
      if (lane_id() >= step) to_here += other;
    }
    uint32_t at = before + to_here - mine;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const uint32_t highs_before = at & 0xffff, pairs_before = at >> 16;
      const uint32_t others_before = static_cast<uint32_t>(i + k) - highs_before - pairs_before;
      const uint32_t place = tier[k] == kHigh ? highs_before
                             : tier[k] != 0   ? highs_in_all + pairs_before
                                              : highs_in_all + pairs_in_all + others_before;
      const uint32_t tier_read = tier[k] != 0 ? tier[k] : static_cast<uint32_t>(how.rest);
      if (i + k < n && (tier[k] != 0 || !lists.promoted_alone))
        order[place] = static_cast<uint32_t>(c.first + i + k) * 4 + tier_read;
      at += count_of(tier[k]);
    }
    before += __shfl_sync(kAll, to_here, 31);
  }
  if (warp_id() == 0) {
    const int all_wanted = __reduce_add_sync(kAll, lane_id() < kWarps ? s.wanted[lane_id()] : 0);
    const int high = static_cast<int>(highs_in_all), pairs = static_cast<int>(pairs_in_all);
    int4* counts = reinterpret_cast<int4*>(lists.counts + u * 8);
    if (lane_id() == 0) counts[0] = {high + pairs, high, pairs, 0};
    if (lane_id() == 1) counts[1] = {0, all_wanted, 0, 0};
  }
}

#endif  // __CUDACC__

}  // namespace thriftattn::cuda
