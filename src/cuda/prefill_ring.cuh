// The ring of a block of threads of the prefill: what is in it, in which order it comes, how it is filled. prefill.cu
// says why it is so.
#pragma once

#include "cuda/mbarrier.cuh"
#include "cuda/prefill.cuh"

namespace thriftattn::cuda::prefill {

inline constexpr int kMaxWarps = 8, kMaxStages = 4, kMaxUnits = 4;
inline constexpr int kWindow = 32;           // pages that are looked up at once
inline constexpr uint32_t kHigh = 1u << 31;  // in Entry::readers: this form counts as above fp4
inline constexpr int kEnd = -1;              // in Control::entry, for a token: nothing comes any more

struct Attend {
  LayerCache cache;
  Batch batch;
  Shape shape;
  Rows<const void*> q;
  Rows<void*> out;
  float* lse;
  const float* sinks;
  float* row_mass_high;
  const uint32_t* tiers;
  int max_blocks, tier_words;
  ExpandedPages expanded;
  float scale;             // |sm_scale| in log2
  float to_cap, from_cap;  // 2 |sm_scale| / cap in log2, cap / |sm_scale|
  int units, stages;       // units of a block of threads, pages of its ring
};

// One form of one page, for the units (bits) that read it. In Control::entry: its first token instead of the page.
struct Entry {
  const uint8_t* page_at;
  int page;
  uint32_t readers;
};

// What a block of threads works on.
struct Work {
  int sequence, g, s_kv;
  int first;                         // position of the step's first row
  int first_block;                   // of query block 0
  int first_unit, units;             // of the KV head's: unit u is query block u / group, head u % group of the group
  int first_page, end_page;          // some row sees; tail included
  const uint32_t* tiers[kMaxUnits];  // of a unit; null where there is none
  uint32_t tail_readers;             // a bit for every unit that sees the tail
};

// The front of shared memory; then the ring, the fragments of q, and l_high where somebody asks for it.
struct alignas(128) Control {
  uint64_t full[kMaxStages];   // a page has come
  uint64_t empty[kMaxStages];  // all lanes have left it
  uint64_t refilled;           // the next refill may begin
  int2 entry[kMaxStages];      // its first token, and the units that read it
  Work work;
  // What comes next: from `token` of the page on, of entry `next` of `count`; then the pages from `window_page`.
  int next, token, count, window_page;
  Entry window[3 * kWindow];
};

template <int D>
struct Tile {
  static constexpr int kRowTiles = D <= 128 ? 2 : 1;  // of 16 rows, of a warp
  static constexpr int kRows = 16 * kRowTiles;
  static constexpr int kUnitWarps = kPageTokens / kRows;
  static constexpr int kTokens = D <= 128 ? 64 : 32;  // of a place of the ring: K of them, then V
  static constexpr ExpandedPage kPage = expanded_page(D, D);
  static constexpr int kV = kTokens * 2 * D, kPlaceBytes = 2 * kV;
  static constexpr int kQBytes = kRows * D * 2;  // of a warp
};

// --- the ring

// Arrivals that complete a fill: one lane's, or where there is no bulk copy all lanes' and lane 0's once more.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kFillers = 33;
#else
constexpr int kFillers = 1;
#endif

// Lists the forms of the next pages that are read, a page per lane.
__device__ inline void look_up(const Attend& a, Control& c, int lane) {
  const Work& w = c.work;
  const int page = c.window_page + lane;
  const bool full = page < w.s_kv / kPageTokens;
  uint32_t readers[3] = {};  // of fp4, fp4x2, fp16
  if (page < w.end_page && !full) readers[2] = w.tail_readers;
#pragma unroll
  for (int u = 0; u < kMaxUnits; ++u) {
    const bool exists = page < w.end_page && full && w.tiers[u];
    const uint32_t tier = exists ? w.tiers[u][page / 16] >> (page % 16 * 2) & 3 : 0;
#pragma unroll
    for (int i = 0; i < 3; ++i) readers[i] |= (tier == i + 1 ? 1u : 0u) << u;
  }
  uint32_t listed[3];
#pragma unroll
  for (int i = 0; i < 3; ++i) listed[i] = __ballot_sync(~0u, readers[i] != 0);
  int at = 0;
#pragma unroll
  for (int i = 0; i < 3; ++i) at += __popc(listed[i] & ((1u << lane) - 1));
  if (readers[0]) c.window[at++] = {a.expanded.fp4_at(w.sequence, w.g, page), page, readers[0]};
  if (readers[1]) c.window[at++] = {a.expanded.fp4x2_at(w.sequence, w.g, page), page, readers[1] | kHigh};
  if (readers[2])
    c.window[at] = {full ? a.expanded.fp16_at(w.sequence, w.g, page) : a.expanded.tail_at(w.sequence, w.g), page,
                    readers[2] | kHigh};
  __syncwarp();
  if (lane == 0) {
    c.next = 0;
    c.count = __popc(listed[0]) + __popc(listed[1]) + __popc(listed[2]);
    c.window_page += kWindow;
  }
  __syncwarp();
}

// Copies `bytes`, a multiple of 16, of every lane that has some, and arrives at the barrier when all are there.
__device__ inline void copy_to_ring(uint32_t to, const uint8_t* from, int bytes, int all_bytes, uint32_t barrier,
                                    int lane) {
#if __CUDA_ARCH__ >= 900
  if (lane == 0) arrive_expecting(barrier, all_bytes);
  __syncwarp();
  if (bytes > 0) copy_bulk(to, from, bytes, barrier);
#else
  for (int i = 0; i < 32; ++i) {  // one lane's piece after the other, all lanes at it
    const uint32_t piece = __shfl_sync(~0u, to, i);
    const uint8_t* source = reinterpret_cast<const uint8_t*>(__shfl_sync(~0u, reinterpret_cast<uint64_t>(from), i));
    const int end = __shfl_sync(~0u, bytes, i);
    for (int b = lane * 16; b < end; b += 512) copy_async<16>(piece + b, source + b);
  }
  arrive_after_copies(barrier);
  if (lane == 0) arrive(barrier);  // what it wrote about the entry by itself
#endif
}

// Fills a free place of the ring with what comes next, or with the end. One warp.
template <int D>
__device__ void fill(const Attend& a, Control& c, uint8_t* ring, int stage, int lane) {
  using T = Tile<D>;
  while (c.next == c.count && c.window_page < c.work.end_page) look_up(a, c, lane);
  const bool end = c.next == c.count;
  const Entry entry = end ? Entry{nullptr, kEnd, 0} : c.window[c.next];
  const int token = c.token;
  __syncwarp();
  if (lane == 0) {
    c.entry[stage] = {end ? kEnd : entry.page * kPageTokens + token, static_cast<int>(entry.readers)};
    if (!end) {
      c.token = (token + T::kTokens) % kPageTokens;
      c.next += c.token == 0;
    }
  }
  __syncwarp();
  const int dk = a.cache.layout.dk, dv = a.cache.layout.dv;
  const uint32_t full = shared_address(&c.full[stage]), to = shared_address(ring + stage * T::kPlaceBytes);
  if (end) {
    copy_to_ring(to, nullptr, 0, 0, full, lane);
  } else if (dk == D && dv == D) {
    copy_to_ring(to + lane * T::kV, entry.page_at + lane * T::kPage.v + token * 2 * D, lane < 2 ? T::kV : 0, 2 * T::kV,
                 full, lane);
  } else {  // each item to where it stands with D channels; the rest of the ring is zero
    const ExpandedPage from = expanded_page(dk, dv);
    constexpr int kItems = T::kTokens / 8;
    const bool is_k = lane < kItems, is_v = !is_k && lane < kItems + T::kTokens / 16;
    const int item = is_k ? lane : lane - kItems;
    copy_to_ring(to + (is_k ? item * T::kPage.k_item : T::kV + item * T::kPage.v_item),
                 entry.page_at + (is_k ? (token / 8 + item) * from.k_item : from.v + (token / 16 + item) * from.v_item),
                 is_k   ? from.k_item
                 : is_v ? from.v_item
                        : 0,
                 T::kTokens * 2 * (dk + dv), full, lane);
  }
}

}  // namespace thriftattn::cuda::prefill
