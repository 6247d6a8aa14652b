// Attention of query blocks of 64 rows over pages of mixed tiers, instruction family `warp` (mma.sync m16n8k16, FP16
// with FP32 sums).
//
//   16-bit records (the cache's own, or expanded) --bulk copy--> ring of pages in shared memory
//   q --once, times a power of two--> FP16 fragments in shared memory
//   q, K --mma--> s (FP32) --mask, soft-cap, exp2--> p (FP16) --mma with V--> o (FP32) --> out, lse
//
// A block of threads takes up to four units of one KV head. A unit is a query block of one query head: 64 rows that
// read every page in one tier. So K and V come from L2 once for 256 rows. The ring is filled with the forms of a page
// that some unit reads, page by page; a warp whose unit does not read a form leaves it at once, and since every unit
// reads each page in one form only, warps differ by what the ring can hold and all have the same work.
// The warp that is last to leave a page refills its place, so nobody waits to fill and no warp is set apart for it.
//
// Records are in the order of fragments (DeviceLayout): the A operand of decode's products is the B operand here, and
// every access to shared memory is 16 bytes a lane, contiguous. A warp has 32 rows (16 where d > 128, for registers),
// so that each fragment of K or V serves two products: with 16 rows shared memory would bind. Per page and warp at d =
// 128: 256 mma, 80 loads of 512 bytes, 64 exp2 a lane. Bound by mma.sync, which has half the rate of wgmma on sm_90;
// one warp's softmax runs beside the other one's products on each scheduler, and the exps of 16 tokens beside the
// products of those before.
//
// The maximum is lazy: the reference that is subtracted moves only where p would pass 2^14. It starts 2^6 below the
// first maximum's p, so that FP16 keeps p down to 2^-31 of it. The row sum is that of p before rounding.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <limits>
#include <type_traits>

#include "cuda/prefill.cuh"

namespace thriftattn::cuda {
namespace {

constexpr int kMaxWarps = 8, kMaxStages = 4, kMaxUnits = 4;
constexpr int kWindow = 32;           // pages that are looked up at once
constexpr uint32_t kHigh = 1u << 31;  // in Entry::readers: this form counts as above fp4
constexpr int kEnd = -1;              // in Entry::page
constexpr int kNotFinite = -128;      // an exponent of q
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kUnseen = -1e30f;        // the reference of a row that has seen nothing
constexpr float kRoom = 14, kBelow = 6;  // log2 of the largest p, and of the first maximum's
constexpr float kLog2e = 1.44269504088896340736f, kLn2 = 0.69314718055994530942f;

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

// One form of one page, for the units (bits) that read it.
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

// The front of shared memory; then the ring, then the fragments of q.
struct alignas(128) Control {
  uint64_t full[kMaxStages];   // a page has come
  uint64_t empty[kMaxStages];  // all warps have left it
  int2 entry[kMaxStages];      // its page, and the units that read it, as in Entry
  Work work;
  // The next entries: `next` of `count`, then the pages from `window_page`.
  int next, count, window_page;
  int refills;  // done
  Entry window[3 * kWindow];
  float l_high[32 * kMaxWarps][4];
};

template <int D>
struct Tile {
  static constexpr int kRowTiles = D <= 128 ? 2 : 1;  // of 16 rows, of a warp
  static constexpr int kRows = 16 * kRowTiles;
  static constexpr int kUnitWarps = kPageTokens / kRows;
  static constexpr ExpandedPage kPage = expanded_page(D, D);
  static constexpr int kQBytes = kRows * D * 2;  // of a warp
};

// --- instructions

__device__ uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

__device__ uint4 load_shared(uint32_t at) {
  uint4 x;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "r"(at));
  return x;
}

__device__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ uint32_t pack(float low, float high) {
  const __half2 h = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(h);
}

__device__ int load_acquire(const int& x) {
  int y;
  asm volatile("ld.acquire.cta.shared.s32 %0, [%1];" : "=r"(y) : "r"(shared_address(&x)) : "memory");
  return y;
}

__device__ void store_release(int& x, int y) {
  asm volatile("st.release.cta.shared.s32 [%0], %1;" ::"r"(shared_address(&x)), "r"(y) : "memory");
}

__device__ void init_barrier(uint64_t& barrier, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(&barrier)), "r"(arrivals) : "memory");
}

__device__ void arrive(uint64_t& barrier) {
  asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared.b64 state, [%0];\n}" ::"r"(shared_address(&barrier))
               : "memory");
}

__device__ void wait(uint64_t& barrier, uint32_t phase) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define THRIFTATTN_MBARRIER_WAIT "mbarrier.test_wait"
#else
#define THRIFTATTN_MBARRIER_WAIT "mbarrier.try_wait"
#endif
  asm volatile(
      "{\n.reg .pred p;\n"
      "WAIT%=:\n" THRIFTATTN_MBARRIER_WAIT
      ".parity.shared.b64 p, [%0], %1;\n@!p bra WAIT%=;\n}" ::"r"(shared_address(&barrier)),
      "r"(phase)
      : "memory");
#undef THRIFTATTN_MBARRIER_WAIT
}

// --- the ring

// Arrivals that complete a fill: one lane's, or where there is no bulk copy all lanes'.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kFillers = 32;
#else
constexpr int kFillers = 1;
#endif

// Lists the forms of the next pages that are read, a page per lane.
__device__ void look_up(const Attend& a, Control& c, int lane) {
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
__device__ void copy_to_ring(uint32_t to, const uint8_t* from, int bytes, int all_bytes, uint64_t& barrier, int lane) {
  const uint32_t at = shared_address(&barrier);
#if __CUDA_ARCH__ >= 900
  if (lane == 0) {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(at), "r"(all_bytes) : "memory");
  }
  __syncwarp();
  if (bytes > 0)
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(at)
                 : "memory");
#else
  for (int i = 0; i < 32; ++i) {  // one lane's piece after the other, all lanes at it
    const uint32_t piece = __shfl_sync(~0u, to, i);
    const uint8_t* source = reinterpret_cast<const uint8_t*>(__shfl_sync(~0u, reinterpret_cast<uint64_t>(from), i));
    const int end = __shfl_sync(~0u, bytes, i);
    for (int b = lane * 16; b < end; b += 512)
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(piece + b), "l"(source + b) : "memory");
  }
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(at) : "memory");
#endif
}

// Fills a free place of the ring with the next entry, or with the end. One warp.
template <int D>
__device__ void fill(const Attend& a, Control& c, uint8_t* ring, int stage, int lane) {
  while (c.next == c.count && c.window_page < c.work.end_page) look_up(a, c, lane);
  const bool end = c.next == c.count;
  const Entry entry = end ? Entry{nullptr, kEnd, 0} : c.window[c.next];
  __syncwarp();
  if (lane == 0) {
    c.entry[stage] = {entry.page, static_cast<int>(entry.readers)};
    if (!end) ++c.next;
  }
  __syncwarp();
  const int dk = a.cache.layout.dk, dv = a.cache.layout.dv;
  const uint32_t to = shared_address(ring + stage * Tile<D>::kPage.bytes);
  if (end) {
    copy_to_ring(to, nullptr, 0, 0, c.full[stage], lane);
  } else if (dk == D && dv == D) {
    constexpr int kBytes = Tile<D>::kPage.bytes;
    copy_to_ring(to, entry.page_at, lane == 0 ? kBytes : 0, kBytes, c.full[stage], lane);
  } else {  // each item to where it stands with D channels; the rest of the ring is zero
    const ExpandedPage from = expanded_page(dk, dv);
    const bool is_k = lane < 8, is_v = lane >= 8 && lane < 12;
    copy_to_ring(to + (is_k ? lane * Tile<D>::kPage.k_item : Tile<D>::kPage.v + (lane - 8) * Tile<D>::kPage.v_item),
                 entry.page_at + (is_k ? lane * from.k_item : from.v + (lane - 8) * from.v_item),
                 is_k   ? from.k_item
                 : is_v ? from.v_item
                        : 0,
                 from.bytes, c.full[stage], lane);
  }
}

// --- rows of the caller

// n channels (2, 4 or 8) of a row.
template <class T, int n>
struct alignas(n * sizeof(T) > 16 ? 16 : n * sizeof(T)) Channels {
  T x[n];
};

template <class T, int n>
__device__ void store(T* to, const float (&x)[n]) {
  Channels<T, n> c;
#pragma unroll
  for (int i = 0; i < n; ++i) c.x[i] = static_cast<T>(x[i]);
  if (reinterpret_cast<uintptr_t>(to) % alignof(Channels<T, n>) == 0) {
    *reinterpret_cast<Channels<T, n>*>(to) = c;
  } else {
#pragma unroll
    for (int i = 0; i < n; ++i) to[i] = c.x[i];
  }
}

// Calls f with the data of rows of whatever type.
template <class Pointer, class F>
__device__ void with_type(const Rows<Pointer>& rows, const F& f) {
  constexpr bool kConst = std::is_same_v<Pointer, const void*>;
  const auto as = [&]<class T>() { f(static_cast<std::conditional_t<kConst, const T*, T*>>(rows.data)); };
  if (rows.dtype == DType::f32) return as.template operator()<float>();
  if (rows.dtype == DType::f16) return as.template operator()<__half>();
  as.template operator()<__nv_bfloat16>();
}

// --- one warp: rows of a unit

template <int D>
struct Warp {
  static constexpr int kRowTiles = Tile<D>::kRowTiles, kRows = 2 * kRowTiles;  // kRows: of a lane; r = 2 mt + half
  static constexpr int kChannelBlocks = D / 32;
  static constexpr int kTokens = 32, kTiles = kTokens / 8;  // half a page
  using Scores = float[kRowTiles][kTiles][4];

  const Attend& a;
  const int lane;
  const uint32_t q;           // the lane's part of its first fragment in shared memory
  float* const l_high;        // [kRows], in shared memory: of a lane, where somebody asks for it
  const int position, s_kv;   // of its first row, tokens of the sequence
  const Visible seen_by_all;  // tokens that all rows see
  int exponents = 0;  // of q, a byte for a row: it was multiplied by 2^-exponent; kNotFinite where it has NaN or Inf
  float reference[kRows], l[kRows];
  float o[kRowTiles][D / 8][4];

  __device__ Warp(const Attend& attend, int lane_, uint32_t q_, float* l_high_, int position_, int tokens)
      : a(attend),
        lane(lane_),
        q(q_),
        l_high(l_high_),
        position(position_),
        s_kv(tokens),
        seen_by_all{visible(attend.shape, position_ + 16 * kRowTiles - 1, tokens).first,
                    visible(attend.shape, position_, tokens).end} {}

  // Of a row's scores, to log2.
  __device__ float scale(int r) const { return a.scale * pow2(exponent(r)); }
  __device__ int exponent(int r) const { return static_cast<int8_t>(exponents >> (8 * r)); }
  __device__ int row(int r) const { return r / 2 * 16 + r % 2 * 8 + lane / 4; }

  // Rows of q, each times a power of two that brings its largest element to 2^8, so that FP16 holds any of them. A lane
  // loads neighbouring channels, some rows at once. Channels 32i + 8j + {0, 1} + 2t and 16 more are in fragment 2i + j.
  // Rows outside [first, s_kv) are zero.
  __device__ void load_q(int first, int64_t first_row, int head) {
    constexpr int kChannels = D / 32, kAtOnce = 8;
    const int channel = lane * kChannels;
    with_type(a.q, [&]<class T>(const T* data) {
      using Some = Channels<T, kChannels>;
      data += first_row * a.q.row_stride + head * a.q.head_stride + channel;
      const bool aligned =
          (reinterpret_cast<uintptr_t>(data) | static_cast<uintptr_t>(a.q.row_stride) * sizeof(T)) % alignof(Some) == 0;
#pragma unroll 1
      for (int from = 0; from < 16 * kRowTiles; from += kAtOnce) {
        Some x[kAtOnce] = {};
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          const int p = position + from + i;
          if (p < first || p >= s_kv || channel >= a.shape.d) continue;
          const T* at = data + static_cast<int64_t>(p - first) * a.q.row_stride;
          if (aligned) {
            x[i] = *reinterpret_cast<const Some*>(at);
          } else {
#pragma unroll
            for (int c = 0; c < kChannels; ++c) x[i].x[c] = at[c];
          }
        }
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          float row[kChannels];
#pragma unroll
          for (int c = 0; c < kChannels; ++c) row[c] = static_cast<float>(x[i].x[c]);
          keep_q(from + i, channel, row);
        }
      }
    });
    __syncwarp();
  }

  template <int n>
  __device__ void keep_q(int row, int channel, const float (&x)[n]) {
    uint32_t largest = 0;  // by bits, where NaN is the largest
#pragma unroll
    for (int i = 0; i < n; ++i) largest = max(largest, bits_of(x[i]) & 0x7fffffffu);
    largest = __reduce_max_sync(~0u, largest);
    const bool finite = largest < 0x7f800000u;
    const int e = largest == 0 ? 0 : max(-90, min(120, static_cast<int>(largest >> 23) - 127 - 8));
    const float factor = !finite ? 0 : a.shape.sm_scale < 0 ? -pow2(-e) : pow2(-e);
    if (lane / 4 == row % 8) exponents |= ((finite ? e : kNotFinite) & 0xff) << (row / 8 * 8);
#pragma unroll
    for (int i = 0; i < n; i += 2) {
      const int ch = channel + i, fragment = ch / 32 * 2 + ch % 16 / 8, half = ch % 32 / 16;
      const uint32_t packed = finite ? pack(x[i] * factor, x[i + 1] * factor) : 0u;
      const uint32_t to = q - lane * 16 + (fragment * kRowTiles + row / 16) * 512 + (row % 8 * 4 + ch % 8 / 2) * 16 +
                          (half * 2 + row % 16 / 8) * 4;
      asm volatile("st.shared.b32 [%0], %1;" ::"r"(to), "r"(packed) : "memory");
    }
  }

  __device__ void start(int head) {
    const float sink = a.sinks ? a.sinks[head] * kLog2e : kUnseen;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      reference[r] = fmaxf(sink, kUnseen);
      l[r] = sink > kUnseen && lane % 4 == 0 ? 1.0f : 0.0f;  // a sum is that of four lanes
      if (a.row_mass_high) l_high[r] = l[r];
    }
#pragma unroll
    for (int mt = 0; mt < kRowTiles; ++mt)
#pragma unroll
      for (int n = 0; n < D / 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) o[mt][n][e] = 0;
  }

  // s = q K^T of 32 tokens, whose first K is at `at`.
  __device__ void scores(uint32_t at, Scores& s) const {
#pragma unroll
    for (int i = 0; i < kChannelBlocks; ++i) {
      uint32_t x[2][kRowTiles][4];
#pragma unroll
      for (int j = 0; j < 2; ++j)
#pragma unroll
        for (int mt = 0; mt < kRowTiles; ++mt) {
          const uint4 f = load_shared(q + ((i * 2 + j) * kRowTiles + mt) * 512);
          x[j][mt][0] = f.x, x[j][mt][1] = f.y, x[j][mt][2] = f.z, x[j][mt][3] = f.w;
        }
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        const uint4 k = load_shared(at + n * Tile<D>::kPage.k_item + i * 512);
#pragma unroll
        for (int mt = 0; mt < kRowTiles; ++mt) {
          if (i == 0) s[mt][n][0] = s[mt][n][1] = s[mt][n][2] = s[mt][n][3] = 0;
          mma(s[mt][n], x[0][mt], k.x, k.y);
        }
#pragma unroll
        for (int mt = 0; mt < kRowTiles; ++mt) mma(s[mt][n], x[1][mt], k.z, k.w);
      }
    }
  }

  __device__ void hide(int token, Scores& s) const {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const Visible v = visible(a.shape, position + row(r), s_kv);
      const int first = v.first - token - lane % 4 * 2, end = v.end - token - lane % 4 * 2;
#pragma unroll
      for (int n = 0; n < kTiles; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e)
          if (n * 8 + e < first || n * 8 + e >= end) s[r / 2][n][r % 2 * 2 + e] = -INFINITY;
    }
  }

  // Scores become cap * tanh(score / cap), still to be scaled.
  __device__ void cap(Scores& s) const {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      int e = exponent(r);
      asm volatile("" : "+r"(e));  // what follows is not worth registers from page to page
      const float to = a.to_cap * pow2(e), from = a.from_cap * pow2(-e);
#pragma unroll
      for (int n = 0; n < kTiles; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& x = s[r / 2][n][r % 2 * 2 + i];
          x = from - 2 * from * reciprocal(1 + exp2_approx(x * to));  // tanh y = 1 - 2 / (1 + e^2y): 2^-23 of the cap
        }
    }
  }

  __device__ void raise(int r, float to) {
    const float shrink = exp2_approx(reference[r] - to);
    reference[r] = to;
    l[r] *= shrink;
    if (a.row_mass_high) l_high[r] *= shrink;
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
      o[r / 2][n][r % 2 * 2] *= shrink;
      o[r / 2][n][r % 2 * 2 + 1] *= shrink;
    }
  }

  // Scores of 32 tokens as the mask leaves them, and references under which their p fit FP16.
  __device__ void settle(Scores& s, int token) {
    if (a.shape.softcap > 0) cap(s);
    if (token < seen_by_all.first || token + kTokens > seen_by_all.end) hide(token, s);
    float top[kRows];
    bool passes = false;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      top[r] = s[r / 2][0][r % 2 * 2];
#pragma unroll
      for (int n = 0; n < kTiles; ++n)
        top[r] = fmaxf(top[r], fmaxf(s[r / 2][n][r % 2 * 2], s[r / 2][n][r % 2 * 2 + 1]));
      top[r] *= scale(r);
      passes |= top[r] > reference[r] + kRoom;
    }
    if (!__any_sync(~0u, passes)) return;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      top[r] = fmaxf(top[r], __shfl_xor_sync(~0u, top[r], 1));
      top[r] = fmaxf(top[r], __shfl_xor_sync(~0u, top[r], 2));
      if (top[r] > reference[r] + kRoom) raise(r, top[r] - kBelow);
    }
  }

  // o += p V of 32 tokens, whose first V is at `at`; p = 2^(s - reference) of the second 16 tokens is made beside the
  // products of the first.
  __device__ void values(uint32_t at, Scores& s, float (&sum)[kRows]) {
    constexpr int kParts = 2 * kRowTiles;  // of the p of 16 tokens: (8 tokens, tile of 16 rows)
    uint32_t p[kTokens / 16][kRowTiles][4];
    const auto make_p = [&](int i, int part) {
      const int mt = part / 2, n = part % 2;
      float(&x)[4] = s[mt][i * 2 + n];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        x[e] = exp2_approx(fmaf(x[e], scale(mt * 2 + e / 2), -reference[mt * 2 + e / 2]));
        sum[mt * 2 + e / 2] += x[e];
      }
      p[i][mt][n * 2] = pack(x[0], x[1]);
      p[i][mt][n * 2 + 1] = pack(x[2], x[3]);
    };
#pragma unroll
    for (int part = 0; part < kParts; ++part) make_p(0, part);
#pragma unroll
    for (int i = 0; i < kTokens / 16; ++i)
#pragma unroll
      for (int n = 0; n < D / 16; ++n) {
        const uint4 v = load_shared(at + i * Tile<D>::kPage.v_item + n * 512);
#pragma unroll
        for (int mt = 0; mt < kRowTiles; ++mt) mma(o[mt][n * 2], p[i][mt], v.x, v.y);
#pragma unroll
        for (int mt = 0; mt < kRowTiles; ++mt) mma(o[mt][n * 2 + 1], p[i][mt], v.z, v.w);
        if (i + 1 < kTokens / 16)
#pragma unroll
          for (int part = n * kParts / (D / 16); part < (n + 1) * kParts / (D / 16); ++part) make_p(i + 1, part);
      }
  }

  // A page in the ring; at: the lane's part of the first fragment. `high`: it counts as above fp4. By halves, so that
  // there are registers for fragments under way.
  __device__ void attend(uint32_t at, int page, bool high) {
#pragma unroll 1
    for (int half = 0; half < kPageTokens / kTokens; ++half) {
      Scores s;
      scores(at + half * kTiles * Tile<D>::kPage.k_item, s);
      settle(s, page * kPageTokens + half * kTokens);
      float sum[kRows] = {};
      values(at + Tile<D>::kPage.v + half * (kTokens / 16) * Tile<D>::kPage.v_item, s, sum);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        l[r] += sum[r];
        if (high && a.row_mass_high) l_high[r] += sum[r];
      }
    }
  }

  // Writes 8 rows at a time by way of the place of q, so that a row's channels go out together: tiles of 8 channels, 32
  // bytes, tile n of row i at n ^ i.
  __device__ void finish(int first, int64_t first_row, int head) {
    const uint32_t eight_rows = q - lane * 16;
    __syncwarp();
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float inverse = finish_row(r, first, first_row, head);
#pragma unroll
      for (int n = 0; n < D / 8; ++n)
        asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(eight_rows + lane / 4 * D * 4 + (n ^ lane / 4) * 32 +
                                                              lane % 4 * 8),
                     "f"(o[r / 2][n][r % 2 * 2] * inverse), "f"(o[r / 2][n][r % 2 * 2 + 1] * inverse)
                     : "memory");
      __syncwarp();
      with_type(a.out, [&](auto* data) {
#pragma unroll 1
        for (int i = lane; i < 8 * D / 4; i += 32) {
          const int of_eight = i / (D / 4), channel = i % (D / 4) * 4, p = position + r * 8 + of_eight;
          if (p < first || p >= s_kv || channel >= a.shape.d_v) continue;
          const uint4 x = load_shared(eight_rows + of_eight * D * 4 + (channel / 8 ^ of_eight) * 32 + channel % 8 * 4);
          store(data + (first_row + (p - first)) * a.out.row_stride + head * a.out.head_stride + channel,
                {__uint_as_float(x.x), __uint_as_float(x.y), __uint_as_float(x.z), __uint_as_float(x.w)});
        }
      });
      __syncwarp();
    }
  }

  // Writes what there is one of for a row; returns the factor of its output.
  __device__ float finish_row(int r, int first, int64_t first_row, int head) const {
    const auto sum_of_four = [](float x) {
      x += __shfl_xor_sync(~0u, x, 1);
      return x + __shfl_xor_sync(~0u, x, 2);
    };
    const float mass = sum_of_four(l[r]), high = a.row_mass_high ? sum_of_four(l_high[r]) : 0;
    const bool finite = exponent(r) != kNotFinite;
    const int p = position + row(r);
    if (p >= first && p < s_kv && lane % 4 == 0) {
      const int64_t to = (first_row + (p - first)) * a.shape.h_q + head;
      if (a.lse) a.lse[to] = !finite ? kNaN : mass == 0 ? -INFINITY : (reference[r] + __log2f(mass)) * kLn2;
      if (a.row_mass_high) a.row_mass_high[to] = finite && mass > 0 ? high / mass : 0.0f;
    }
    return !finite ? kNaN : mass == 0 ? 0.0f : 1 / mass;
  }
};

// The last query blocks come first: they see most pages. False where there is nothing to do.
__device__ bool find_work(const Attend& a, int chunks, Work& w) {
  const int heads = a.batch.b * a.shape.h_kv, group = a.shape.group;
  const int chunk = chunks - 1 - static_cast<int>(blockIdx.x) / heads, head = static_cast<int>(blockIdx.x) % heads;
  w.sequence = head / a.shape.h_kv;
  w.g = head % a.shape.h_kv;
  const int s_q = a.batch.s_q[w.sequence];
  w.s_kv = a.cache.s_kv[a.batch.slot[w.sequence]];
  w.first = w.s_kv - s_q;
  const QueryBlocks blocks = query_blocks(s_q, w.s_kv);
  w.first_block = blocks.first_position;
  w.first_unit = chunk * a.units;
  w.units = min(a.units, blocks.count * group - w.first_unit);
  if (w.units <= 0) return false;
  const auto last_of = [&](int u) {
    return min(w.first_block + (w.first_unit + u) / group * kPageTokens + kPageTokens, w.s_kv) - 1;
  };
  const int row = max(w.first_block + w.first_unit / group * kPageTokens, w.first);
  w.first_page = visible(a.shape, row, w.s_kv).first / kPageTokens;
  w.end_page = static_cast<int>(pages_for(visible(a.shape, last_of(w.units - 1), w.s_kv).end));
  w.tail_readers = 0;
  const int tail = w.s_kv / kPageTokens * kPageTokens;
  for (int u = 0; u < kMaxUnits; ++u) {
    const int unit = w.first_unit + u;
    const int64_t at = (static_cast<int64_t>(w.sequence) * a.shape.h_q + w.g * group + unit % group) * a.max_blocks;
    w.tiers[u] = u < w.units ? a.tiers + (at + unit / group) * a.tier_words : nullptr;
    if (u < w.units && visible(a.shape, last_of(u), w.s_kv).end > tail) w.tail_readers |= 1u << u;
  }
  return true;
}

template <int D>
__global__ void __launch_bounds__(32 * kMaxWarps, 1) attend_kernel(const __grid_constant__ Attend a, int chunks) {
  extern __shared__ __align__(128) uint8_t shared[];
  Control& c = *reinterpret_cast<Control*>(shared);
  uint8_t* ring = shared + sizeof(Control);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = a.units * Tile<D>::kUnitWarps;
  const uint32_t first_fragment = shared_address(ring) + lane * 16;

  if (threadIdx.x == 0) {
    for (int i = 0; i < a.stages; ++i) {
      init_barrier(c.full[i], kFillers);
      init_barrier(c.empty[i], warps);
    }
    Work work;
    if (!find_work(a, chunks, work)) work.units = 0;
    c.work = work;
    c.next = c.count = c.refills = 0;
    c.window_page = work.first_page / kWindow * kWindow;
  }
  if (a.cache.layout.dk != D || a.cache.layout.dv != D)
    for (int i = threadIdx.x * 16; i < a.stages * Tile<D>::kPage.bytes; i += blockDim.x * 16)
      *reinterpret_cast<uint4*>(ring + i) = uint4{};
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
#endif
  __syncthreads();
  const Work& work = c.work;
  if (work.units <= 0) return;
  if (warp == 0)
    for (int i = 0; i < a.stages; ++i) fill<D>(a, c, ring, i, lane);

  const int u = warp / Tile<D>::kUnitWarps, unit = work.first_unit + u,
            head = work.g * a.shape.group + unit % a.shape.group;
  const int block = work.first_block + unit / a.shape.group * kPageTokens;
  const int64_t first_row = a.batch.first_row[work.sequence];
  const uint32_t q = shared_address(ring) + a.stages * Tile<D>::kPage.bytes + warp * Tile<D>::kQBytes;
  Warp<D> rows(a, lane, q + lane * 16, c.l_high[threadIdx.x], block + warp % Tile<D>::kUnitWarps * Tile<D>::kRows,
               work.s_kv);
  const bool exists = u < work.units;
  if (exists) {
    rows.load_q(work.first, first_row, head);
    rows.start(head);
  }
  // Warps take turns to refill: before it leaves page j, warp j % warps waits until all have left page j - lag, which
  // as a rule they have, and fills its place. One refill comes after the other: they share the list of what is next.
  const int lag = max(1, a.stages - 2);
  int stage = 0, turn = warp, refill = warp - lag;
  for (uint32_t phase = 0;;) {
    wait(c.full[stage], phase);
    const int2 entry = c.entry[stage];
    if (entry.x == kEnd) break;
    if (entry.y >> u & 1) rows.attend(first_fragment + stage * Tile<D>::kPage.bytes, entry.x, entry.y < 0);
    if (turn-- == 0) {
      if (refill >= 0) {
        const bool before = stage < lag;
        const int place = before ? stage - lag + a.stages : stage - lag;
        wait(c.empty[place], phase ^ before);
        while (load_acquire(c.refills) != refill) {
        }
        fill<D>(a, c, ring, place, lane);
        __syncwarp();
        if (lane == 0) store_release(c.refills, refill + 1);
      }
      refill += warps;
      turn = warps - 1;
    }
    __syncwarp();
    if (lane == 0) arrive(c.empty[stage]);
    if (++stage == a.stages) {
      stage = 0;
      phase ^= 1;
    }
  }
  if (exists) rows.finish(work.first, first_row, head);
}

template <int D>
cudaError_t launch(const PrefillParams& p, cudaStream_t stream) {
  int device = 0, shared = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) return error;
  Attend a{};
  a.cache = p.cache;
  a.batch = p.batch;
  a.shape = p.shape;
  a.q = p.q;
  a.out = p.out;
  a.lse = p.lse;
  a.sinks = p.sinks;
  a.row_mass_high = p.row_mass_high;
  a.tiers = p.tiers;
  a.max_blocks = p.max_blocks;
  a.tier_words = p.tier_words;
  a.expanded = expanded_pages(p);
  a.scale = std::abs(p.shape.sm_scale) * kLog2e;
  if (p.shape.softcap > 0) {
    a.to_cap = 2 * a.scale / p.shape.softcap;
    a.from_cap = p.shape.softcap / std::abs(p.shape.sm_scale);
  }
  // As many rows as there are warps for, unless that leaves no room to load a page while another is read.
  const auto pages_beside = [&](int units) {
    return (shared - static_cast<int>(sizeof(Control)) - units * Tile<D>::kUnitWarps * Tile<D>::kQBytes) /
           Tile<D>::kPage.bytes;
  };
  a.units = kMaxWarps / Tile<D>::kUnitWarps;
  while (a.units > 1 && pages_beside(a.units) < 2) a.units /= 2;
  a.stages = std::min(kMaxStages, pages_beside(a.units));
  if (a.stages < 1) return cudaErrorInvalidConfiguration;
  const int warps = a.units * Tile<D>::kUnitWarps;
  const size_t bytes = a.stages * Tile<D>::kPage.bytes + warps * Tile<D>::kQBytes + sizeof(Control);
  error = cudaFuncSetAttribute(attend_kernel<D>, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (error != cudaSuccess) return error;
  const int64_t chunks = (static_cast<int64_t>(p.max_blocks) * p.shape.group + a.units - 1) / a.units;
  const int64_t blocks = chunks * p.batch.b * p.shape.h_kv;
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  attend_kernel<D><<<static_cast<unsigned>(blocks), 32 * warps, bytes, stream>>>(a, static_cast<int>(chunks));
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_prefill(const PrefillParams& p, cudaStream_t stream) {
  const int channels = std::max(p.cache.layout.dk, p.cache.layout.dv);
  return channels <= 64 ? launch<64>(p, stream) : channels <= 128 ? launch<128>(p, stream) : launch<256>(p, stream);
}

}  // namespace thriftattn::cuda
