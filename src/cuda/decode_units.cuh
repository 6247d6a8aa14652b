// What one CTA of a decode step reads: units, their items, and the CTA's share of all of them.
//
// A unit (sequence, KV head) is read once for each tile of its rows; "unit" below means one of those readings. It is a
// list of items, each as much as one copy brings: 8 tokens in 16 bit, 32 tokens in FP4, or 32 tokens in both planes. In
// order:
//
//   attend     tail, pages in fp16 | pages in fp4x2 | pages in fp4
//   exchange   pages in fp16 | pages in fp4x2 | all of these and those in none once more in fp4, to be taken out
//   again      tail, pages in fp16 | pages in fp4x2 | all pages, in fp4 but for these and those in none
//
// An exchange may also read pages in fp4x2 once for both (DecodeConfig::exchanges_at_once).
//
// Items weigh what they bring in bytes, 8 : 18 : 9 whatever d is, but those in two planes half as much again where
// there are many for a CTA: it is so much later. A unit weighs something in itself, before its items. The weights of
// all units, one after another, are cut into equal parts, one for each CTA, which takes the items that begin in its
// part: a unit may be cut anywhere and a CTA may hold many units. Every CTA adds up the same weights.
#pragma once

#include <cstdint>

#include "cuda/params.h"
#include "format/selection.h"

namespace thriftattn::cuda {

enum class Pass : int { attend, exchange, again };  // again: attend's items once more, where an exchange cancelled

struct DecodeArgs {
  DecodeParams p;
  int columns, tiles;
  bool exchanges_at_once;
  Pass pass;
  float score_scale, softcap;  // sm_scale and softcap times log2 e
  float code_scale;            // score_scale of products with codes
  int mass_shift;              // log2 of a part's tokens in p.page_mass, which is null but where the pass keeps masses
  uint32_t mass_stride;        // from a unit's to the next one's there
  double per_tile, per_head, per_cta;  // 1 / tiles, 1 / h_kv, 1 / CTAs
};

// n / d, of 0 <= n < 2^50 by per_d = 1.0 / d, and of 0 <= n < 2^20 in floats: exact, as rounding moves the quotient by
// less than half of 1 / d. An integer division has four times the instructions, which cost most where they run once.
template <class Int>
__device__ Int quotient(Int n, double per_d) {
  return static_cast<Int>((static_cast<double>(n) + 0.5) * per_d);
}
__device__ inline int quotient_of_small(int n, int d) {
  return static_cast<int>(__fdividef(static_cast<float>(n) + 0.5f, static_cast<float>(d)));
}

__device__ inline bool keeps_eighths(const DecodeArgs& args) { return args.mass_shift == 3; }

inline constexpr int kHighWeight = 8, kPlanesWeight = 27, kFewPlanesWeight = 18, kFp4Weight = 9;
inline constexpr int kUnitWeight = 480;  // q, merge and results take a CTA as long as four or five items for every warp
inline constexpr int kPageItems = kPageTokens / kItemTokens, kHighPageItems = kPageTokens / kHighItemTokens;

struct Items {
  int high = 0, planes = 0, fp4 = 0;  // in 16 bit, in fp4x2, in fp4
  bool few_planes = false;            // of an exchange that reads each for itself, and the first planes besides

  __device__ int planes_weight() const { return few_planes ? kFewPlanesWeight : kPlanesWeight; }
  __device__ int weight() const {
    return kUnitWeight + high * kHighWeight + planes * planes_weight() + fp4 * kFp4Weight;
  }
  __device__ int count() const { return high + planes + fp4; }
  // How many items begin before `at`, which lies in the unit.
  __device__ int before(int64_t at) const {
    const int w = static_cast<int>(at) - kUnitWeight;
    const auto begun = [](int w, int each) { return (max(0, w) + each - 1) / each; };
    const int w_planes = w - high * kHighWeight, w_fp4 = w_planes - planes * planes_weight();
    // Divisions by constants: this runs before a CTA's first copy.
    return min(high, begun(w, kHighWeight)) +
           min(planes, few_planes ? begun(w_planes, kFewPlanesWeight) : begun(w_planes, kPlanesWeight)) +
           min(fp4, begun(w_fp4, kFp4Weight));
  }
};

struct Unit {
  int index;           // sequence * h_kv + head
  int sequence, head;  // head: KV head
  int slot;
  int first_token;      // row of q and out of the sequence's first token
  int first_row, rows;  // of the tile, among the unit's rows; rows may be 0
  int s_q, s_kv;
  int first_page, full;  // full pages that some row sees: [first_page, full)
  int fp16, fp4x2, fp4;  // promoted pages by tier
  int promoted, tail_items;
  Items items;

  // Tokens that every row sees: [first_common, end_common). An item within needs no mask.
  int first_common, end_common;

  // The forced pages, [first_page, sink_end) and [near_first, near_end), and those that have lost their 16-bit form;
  // left out by an attend that reads lists.
  int sink_end, near_first, near_end;
  int lost_first, lost_end;

  __device__ bool forced(int page) const { return page < sink_end || (page >= near_first && page < near_end); }
  __device__ int forced_without_high() const {
    return max(0, min(sink_end, lost_end) - max(first_page, lost_first)) +
           max(0, min(near_end, lost_end) - max(near_first, lost_first));
  }
};

// The forced pages in order are six runs: of the sink pages, then of the near ones, those before the pages without a
// 16-bit form, those among them, and those behind.
inline constexpr int kForcedRuns = 6;
struct ForcedRun {
  int first, end;
  bool high;  // they have a 16-bit form

  __device__ int count() const { return max(end - first, 0); }
};
__device__ inline ForcedRun forced_run(const Unit& u, int k) {
  const bool sink = k < kForcedRuns / 2;
  const int first = sink ? u.first_page : u.near_first, end = sink ? u.sink_end : u.near_end;
  if (k % 3 == 0) return {first, min(end, u.lost_first), true};
  if (k % 3 == 1) return {max(first, u.lost_first), min(end, u.lost_end), false};
  return {max(first, u.lost_end), end, true};
}

// The tokens that row r of s_q sees: [first, end).
struct Seen {
  int first, end;
};
__device__ inline Seen seen_by(const Shape& shape, int s_q, int s_kv, int r) {
  const int position = s_kv - s_q + r, window = static_cast<int>(min(shape.window, int64_t{1} << 30));
  const int first = window > 0 ? position - window + 1 : 0;
  const int end = shape.causal ? position + 1 : window > 0 ? position + window : s_kv;
  return {max(first, 0), min(max(end, 0), s_kv)};
}

__device__ inline Unit unit_at(const DecodeArgs& args, Pass pass, int number) {
  const DecodeParams& p = args.p;
  Unit u;
  u.index = quotient(number, args.per_tile);
  u.sequence = quotient(u.index, args.per_head);
  u.head = u.index - u.sequence * p.shape.h_kv;
  // All of this is under way at once; a CTA that begins late waits for it longest. Where sequences are not in their
  // slots' order their lengths are asked for again.
  int4 counts{};
  int in_none = 0;
  if (p.promote == Promote::listed) {
    counts = *reinterpret_cast<const int4*>(p.lists.counts + int64_t{8} * u.index);
    in_none = p.lists.counts[int64_t{8} * u.index + 4];
  }
  u.slot = p.batch.slot[u.sequence];
  u.s_q = p.batch.s_q[u.sequence];
  u.first_token = p.batch.first_row[u.sequence];
  u.s_kv = p.cache.s_kv[u.sequence];
  int released = p.cache.all_high ? 0 : p.cache.released[u.sequence];
  if (u.slot != u.sequence) {
    u.s_kv = p.cache.s_kv[u.slot];
    if (!p.cache.all_high) released = p.cache.released[u.slot];
  }
  u.first_row = (number - u.index * args.tiles) * args.columns;
  u.rows = max(0, min(args.columns, p.shape.group * u.s_q - u.first_row));
  u.full = u.s_kv / kPageTokens;
  const Seen oldest = seen_by(p.shape, u.s_q, u.s_kv, 0), newest = seen_by(p.shape, u.s_q, u.s_kv, u.s_q - 1);
  u.first_page = min(oldest.first / kPageTokens, u.full);
  u.first_common = newest.first;
  u.end_common = oldest.end;

  if (p.promote == Promote::forced || pass == Pass::exchange) {
    const ForcedPages forced =
        forced_pages(p.force, block_pages(u.s_kv - u.s_q, u.s_kv - 1, u.s_kv, {p.shape.causal, p.shape.window}));
    const auto seen = [&u](int64_t page, int from) {
      return static_cast<int>(max(min(page, int64_t{u.full}), int64_t{from}));
    };
    u.sink_end = seen(forced.sink_end, u.first_page);
    u.near_first = seen(forced.first, u.sink_end);
    u.near_end = seen(forced.end, u.near_first);
    u.lost_first = p.cache.all_high ? u.full : p.cache.sink;
    u.lost_end = p.cache.all_high ? u.full : max(p.cache.sink, released);
  }

  u.fp16 = counts.y, u.fp4x2 = counts.z, u.fp4 = counts.w;
  if (p.promote == Promote::forced) {
    const int lost = u.forced_without_high();
    u.fp16 = u.sink_end - u.first_page + u.near_end - u.near_first - lost;
    if (p.cache.residual != nullptr) u.fp4x2 = lost;
  }
  u.promoted = u.fp16 + u.fp4x2 + u.fp4 + in_none;

  const bool reads_tail = pass != Pass::exchange;
  u.tail_items = reads_tail ? (u.s_kv % kPageTokens + kHighItemTokens - 1) / kHighItemTokens : 0;
  if (u.rows == 0) return u;
  const int rest = reads_tail ? u.full - u.first_page - u.promoted : 0;
  const bool high_rest = p.shape.rest == Tier::fp16;
  u.items.high = u.tail_items + kHighPageItems * (u.fp16 + (high_rest ? rest : 0));
  u.items.planes = kPageItems * u.fp4x2;
  u.items.few_planes = pass == Pass::exchange && !args.exchanges_at_once;
  u.items.fp4 = kPageItems * (pass == Pass::exchange      ? u.fp16 + (u.items.few_planes ? u.fp4x2 : 0) + in_none
                              : pass == Pass::again       ? u.full - u.first_page
                              : p.shape.rest == Tier::fp4 ? u.fp4 + rest
                                                          : u.fp4);
  return u;
}

// One item: its first token, the tier to read it in (none: nothing to do) and whether fp4 is to be taken out; where its
// record lies (of the first plane, for fp4x2), its page's summary and, where its scores start from it, k_mean; each or
// null.
struct Item {
  static constexpr uint32_t kTakenOut = 4;

  uint32_t word = 0;  // first token | kTakenOut | tier
  const uint8_t* record = nullptr;
  const uint8_t* summary = nullptr;
  const uint8_t* mean = nullptr;

  __device__ static Tier tier(uint32_t word) { return static_cast<Tier>(word & 3); }
  __device__ static bool taken_out(uint32_t word) { return word & kTakenOut; }
  // Above them are bits of notes: a sequence has no more than 2^20 tokens.
  __device__ static int token(uint32_t word) { return static_cast<int>(word & 0x1ffffff8u); }
};

// Whether a list has the page in another tier than fp4.
__device__ inline bool is_listed_apart(const DecodeParams& p, const Unit& u, int page) {
  const uint32_t* order = p.lists.order + int64_t{u.index} * p.lists.max_pages;
  const int above = u.fp16 + u.fp4x2;
  bool found = false;
#pragma unroll 1
  for (int n = 0; n < u.promoted; ++n)
    found |= (n < above || n >= above + u.fp4) && static_cast<int>(order[n] >> 2) == page;
  return found;
}

// The n-th full page that is seen in the order of reading: promoted ones by tier, then the others.
__device__ inline int page_at(const DecodeParams& p, const Unit& u, int n) {
  if (p.promote == Promote::listed)
    return static_cast<int>(p.lists.order[int64_t{u.index} * p.lists.max_pages + n] >> 2);
  if (n >= u.promoted) {
    int page = u.first_page + n - u.promoted;
#pragma unroll 1
    for (int k = 0; k < kForcedRuns && u.promoted > 0; ++k) {
      const ForcedRun run = forced_run(u, k);
      if ((run.high || u.fp4x2 > 0) && page >= run.first) page += run.count();
    }
    return page;
  }
  const bool high = n < u.fp16;
  if (!high) n -= u.fp16;
  int page = u.first_page + n;
#pragma unroll 1
  for (int k = 0; k < kForcedRuns; ++k) {
    const ForcedRun run = forced_run(u, k);
    if (run.high != high) continue;
    page = run.first + n;
    if (n < run.count()) break;
    n -= run.count();
  }
  return page;
}

// Item i of a unit.
__device__ inline Item item_at(const DecodeArgs& args, Pass pass, const Unit& u, int i) {
  const DecodeParams& p = args.p;
  Tier tier = Tier::fp16;
  int n = -1, part = i;  // of the page in the order of reading, none for the tail; of the item in its page
  if (i >= u.items.high + u.items.planes) {
    i -= u.items.high + u.items.planes;
    tier = Tier::fp4, n = i / kPageItems, part = i % kPageItems;
    const int above = u.fp16 + u.fp4x2;
    if (pass == Pass::attend)
      n += n < u.fp4 ? above : u.promoted - u.fp4;
    else if (pass == Pass::exchange && n >= (u.items.few_planes ? above : u.fp16))
      n += u.fp4 + (u.items.few_planes ? 0 : u.fp4x2);
  } else if (i >= u.items.high) {
    i -= u.items.high;
    tier = Tier::fp4x2, n = u.fp16 + i / kPageItems, part = i % kPageItems;
  } else if (i >= u.tail_items) {
    i -= u.tail_items;
    n = i / kHighPageItems, part = i % kHighPageItems;
    if (n >= u.fp16) n += u.promoted - u.fp16;
  }
  const bool is_high = tier == Tier::fp16;
  const bool by_number = pass == Pass::again && tier == Tier::fp4;  // lists may hold the promoted pages alone
  const int page = n < 0 ? u.full : by_number ? u.first_page + n : page_at(p, u, n);
  Item item;
  item.word = static_cast<uint32_t>(page * kPageTokens + part * (is_high ? kHighItemTokens : kItemTokens));
  if (by_number && is_listed_apart(p, u, page)) return item;
  if (pass == Pass::exchange) {
    if (u.forced(page)) return item;
    if (tier == Tier::fp4 || (tier == Tier::fp4x2 && !u.items.few_planes)) item.word |= Item::kTakenOut;
  }
  item.word |= static_cast<uint32_t>(tier);

  const LayerCache& cache = p.cache;
  const int32_t* table = cache.block_table + int64_t{u.slot} * cache.max_pages;
  const auto record_of = [&](int64_t n) { return n * cache.h_kv + u.head; };
  const int page_id = table[page];
  if (is_high) {
    item.record = cache.high + record_of(cache.high_record(u.slot, page, page_id)) * cache.layout.high_bytes +
                  part * cache.layout.high_item_bytes;
  } else {
    item.record = cache.fp4 + record_of(page_id) * cache.layout.fp4_bytes + part * cache.layout.item_bytes;
  }
  // A tail has no summary yet: it borrows the exponent of V of the page before.
  if (cache.summary != nullptr && (page < u.full || page > 0))
    item.summary = cache.summary + record_of(page < u.full ? page_id : table[page - 1]) * cache.canonical.summary_bytes;
  if (cache.centring && !is_high) item.mean = item.summary + cache.canonical.mean;
  return item;
}

// --- shares

// Weights [begin, end) of all, one of equal parts of `part`.
struct Share {
  int64_t begin, end, part;
  int cancelled_end;  // behind the last unit whose exchange cancelled here

  // The CTA that takes what begins at weight w: floats know it but for one.
  __device__ int cta_of(int64_t w) const {
    const int n = static_cast<int>(__fdividef(static_cast<float>(w), static_cast<float>(part)));
    const int64_t begins = n * part;
    return n - (w < begins) + (w >= begins + part);
  }
};

// What a CTA reads of one unit: its items [first, end).
struct Segment {
  Unit unit;
  int number;     // of the unit, among all
  int64_t begin;  // its weight
  int first, end;
  bool cut_begin, cut_end;  // other CTAs have items before or after
  Pass pass;

  __device__ int64_t next() const { return begin + unit.items.weight(); }
};

// Where the items of a unit begin that begins at `begin`; one without items is all weight of its own.
__device__ inline int64_t items_begin(const Unit& unit, int64_t begin) {
  return unit.items.count() > 0 ? begin + kUnitWeight : begin;
}

__device__ inline Segment segment_of(const Unit& unit, Pass pass, int number, int64_t begin, const Share& share) {
  const bool cut_begin = items_begin(unit, begin)<share.begin, cut_end = begin + unit.items.weight()> share.end;
  const int first = cut_begin ? unit.items.before(share.begin - begin) : 0;
  const int end = cut_end ? unit.items.before(share.end - begin) : unit.items.count();
  return {unit, number, begin, first, end, cut_begin, cut_end, pass};
}

// A whole unit, for a pass of its own.
__device__ inline Segment whole_unit(const Unit& unit, Pass pass, int number) {
  return {unit, number, 0, 0, unit.items.count(), false, false, pass};
}

// By one warp: on to the segment after it, in shared memory; false, and no change, where the share has none.
__device__ inline bool next_segment(const DecodeArgs& args, const Share& share, Segment& segment) {
  const int number = segment.number + 1;
  const int64_t begin = segment.next();
  if (segment.pass == Pass::again || begin >= share.end) return false;
  const Unit unit = unit_at(args, segment.pass, number);
  if (items_begin(unit, begin) >= share.end) return false;
  const Segment next = segment_of(unit, segment.pass, number, begin, share);
  __syncwarp();
  if (threadIdx.x % 32 == 0) segment = next;
  __syncwarp();
  return true;
}

// By one warp, from and to shared memory.
__device__ inline void copy_segment(Segment& to, const Segment& from) {
  constexpr int kWords = sizeof(Segment) / 4;
  static_assert(sizeof(Segment) % 4 == 0);
  __syncwarp();  // a lane may have read what is written here
  for (int i = threadIdx.x % 32; i < kWords; i += 32)
    reinterpret_cast<uint32_t*>(&to)[i] = reinterpret_cast<const uint32_t*>(&from)[i];
  __syncwarp();
}

struct Scan {
  uint32_t before, total;
};
// Of one number a thread; sums: room for one of each warp, which may be used again behind another barrier. (The weights
// of as many units as a CTA has threads are below 2^32.)
__device__ inline Scan block_scan(uint32_t x, uint32_t* sums) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  uint32_t up_to = x;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const uint32_t other = __shfl_up_sync(~0u, up_to, step);
    if (lane >= step) up_to += other;
  }
  if (lane == 31) sums[warp] = up_to;
  __syncthreads();
  const uint32_t of_warp = lane < warps ? sums[lane] : 0;
  return {up_to - x + __reduce_add_sync(~0u, lane < warp ? of_warp : 0), __reduce_add_sync(~0u, of_warp)};
}

// The CTA's share and its first segment, by the whole CTA, into shared memory; false where it has no part: there is
// less to do than CTAs, or all that falls to it is a unit's own weight. Units are weighed as many at a time as there
// are threads, all of them first, then, if there are more, again as far as the CTA's part begins.
__device__ inline bool find_share(const DecodeArgs& args, uint32_t* sums, Share& share, Segment& segment) {
  const int units = args.p.batch.b * args.p.shape.h_kv * args.tiles;
  const int threads = static_cast<int>(blockDim.x);
  int64_t total = 0, before = 0;
  Share mine{};
#pragma unroll 1
  for (int first = 0;;) {
    const int number = first + static_cast<int>(threadIdx.x);
    Unit unit;
    int weight = 0;
    if (number < units) {
      unit = unit_at(args, args.pass, number);
      weight = unit.items.weight();
    }
    if (first > 0 || mine.part != 0) __syncthreads();  // the scan before is done with its sums
    const Scan scan = block_scan(weight, sums);
    if (mine.part == 0) {
      total += scan.total;
      first += threads;
      if (first < units) continue;
      const int64_t least = int64_t{threads} / 32 * kFp4Weight;  // an item for every warp
      mine.part = max(quotient(total + gridDim.x - 1, args.per_cta), least);
      mine.begin = mine.part * blockIdx.x;
      mine.end = min(mine.begin + mine.part, total);
      if (mine.begin >= total) return false;
      first -= threads;
      if (first > 0) {
        first = 0;
        continue;
      }
    }
    const int64_t begin = before + scan.before;
    bool found = false;
    if (begin <= mine.begin && mine.begin < begin + weight) {
      share = mine;
      segment = segment_of(unit, args.pass, number, begin, mine);
      found = items_begin(unit, begin) < mine.end;
    }
    before += scan.total;
    if (before > mine.begin) return __syncthreads_or(found);
    first += threads;
  }
}

}  // namespace thriftattn::cuda
