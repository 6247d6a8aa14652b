// The pages that a prefill reads, in the one form that its flash kernel takes.
//
//   tiers --which forms of a page some query block reads-->
//   codes, scales, mean --masks, one FMA a plane--> FP32 --rounded once--> expanded page, tier fp4 or fp4x2
//   16-bit record --V regrouped, zeros for tokens that do not exist--> expanded page, tier fp16 or tail
//
// The orders of words make this a move of registers: 16 bytes of codes of a lane are 4 x 16 bytes of an expanded page.
// At d = 128 a page of one head is 9216 bytes of codes (twice that for fp4x2), or 32768 of 16 bit, and becomes 32768
// bytes: bound by memory, less than 1/100 of the attention from 8k tokens on. Codes, scales and exponents are exact;
// rounded to FP16 (2^-11) are a key with its mean, and two planes added.
#include <cuda_fp16.h>

#include <algorithm>

#include "cuda/prefill.cuh"
#include "cuda/unpack.cuh"

namespace thriftattn::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kMaxPages = 4;  // of a block of threads; a power of two up to 16

struct Expand {
  LayerCache cache;
  Batch batch;
  int h_q, group, d;
  const uint32_t* tiers;
  int max_blocks, tier_words;
  int pages;  // of a block of threads
  ExpandedPages to;
};

// Rounded once; what rounding up the scales brought beyond FP16's largest value becomes that, NaN stays NaN.
__device__ uint32_t pack(float2 x) {
  uint32_t r;
  asm("cvt.rn.satfinite.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(x.y), "f"(x.x));
  return r;
}

__device__ float2 fma(float2 x, float s, float2 y) { return {fmaf(x.x, s, y.x), fmaf(x.y, s, y.y)}; }

// What a lane has of 32 channels x 32 tokens: two values at [token / 8][x][y]. For K these are channels 16 y + 8 x + 2t
// and its neighbour, of token lane / 4; for V tokens 2t and its neighbour, of channel 16 x + 8 y + lane / 4.
struct Values {
  float2 at[4][2][2];
};

// x += codes, in the words of `codes` and the bytes of `scales` of one plane's item. columns: dk or dv.
template <bool kIsK>
__device__ void add_plane(const uint8_t* codes, const uint8_t* scales, int columns, Fp4Format format, int exponent,
                          int block, int lane, Values& x) {
  const uint4 w = __ldcs(reinterpret_cast<const uint4*>(codes + block * 512 + lane * 16));
  const Fragment fragment[4] = {unpack_codes(w.x), unpack_codes(w.y), unpack_codes(w.z), unpack_codes(w.w)};
  const float unit = kCodeScale * pow2(-exponent);
#pragma unroll
  for (int half = 0; half < 2; ++half) {  // k 0-7 of the fragments, k 8-15
    const uint32_t s = *reinterpret_cast<const uint32_t*>(scales + (lane / 4 * 2 + half) * (columns / 8) + block * 4);
    float scale[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) scale[i] = decode_scale(format, static_cast<uint8_t>(s >> (8 * i))) * unit;
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < 2; ++j)
#pragma unroll
        for (int a = 0; a < 2; ++a) {
          const float2 value = unpack_half2(fragment[i * 2 + j].a[half * 2 + a]);
          float2& to = kIsK ? x.at[i * 2 + a][j][half] : x.at[half * 2 + j][i][a];
          to = fma(value, scale[i * 2 + a], to);
        }
  }
}

template <bool kIsK>
__device__ void store(const ExpandedPage& form, const uint32_t (&x)[4][2][2], uint8_t* page, int item, int block,
                      int lane) {
  page += lane * 16;
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (kIsK)
      *reinterpret_cast<uint4*>(page + (item * 4 + i) * form.k_item + block * 512) =
          make_uint4(x[i][0][0], x[i][0][1], x[i][1][0], x[i][1][1]);
    else
      *reinterpret_cast<uint4*>(page + form.v + (item * 2 + i / 2) * form.v_item + (block * 2 + i % 2) * 512) =
          make_uint4(x[i / 2 * 2][i % 2][0], x[i / 2 * 2 + 1][i % 2][0], x[i / 2 * 2][i % 2][1],
                     x[i / 2 * 2 + 1][i % 2][1]);
}

template <bool kIsK>
__device__ void store(const ExpandedPage& form, const Values& x, uint8_t* page, int item, int block, int lane) {
  uint32_t packed[4][2][2];
#pragma unroll
  for (int i = 0; i < 16; ++i) packed[i / 4][i / 2 % 2][i % 2] = pack(x.at[i / 4][i / 2 % 2][i % 2]);
  store<kIsK>(form, packed, page, item, block, lane);
}

// One warp's work: 32 channels of K or V of 32 tokens (`item`) of one page.
template <bool kIsK>
struct Part {
  const Expand& e;
  const ExpandedPage& form;
  int item, block, lane;

  // From `record`, the page's of a head, to the forms that are not null.
  __device__ void from_codes(int64_t record, uint8_t* fp4, uint8_t* fp4x2) const {
    const LayerCache& cache = e.cache;
    const DeviceLayout& l = cache.layout;
    const uint8_t* summary = cache.summary + record * cache.canonical.summary_bytes;
    const PageSummary& facts = *reinterpret_cast<const PageSummary*>(summary);
    const int codes = kIsK ? 0 : l.v_codes, scales = kIsK ? l.k_scales : l.v_scales, columns = kIsK ? l.dk : l.dv;
    const int64_t at = record * l.fp4_bytes + item * l.item_bytes;
    Values x{};
    if (kIsK && cache.centring) {
      const __half* mean = reinterpret_cast<const __half*>(summary + cache.canonical.mean);
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        const int channel = block * 32 + i % 2 * 16 + i / 2 % 2 * 8 + lane % 4 * 2;
        if (channel < e.d)
          x.at[i / 4][i / 2 % 2][i % 2] = __half22float2(*reinterpret_cast<const __half2*>(mean + channel));
      }
    }
    add_plane<kIsK>(cache.fp4 + at + codes, cache.fp4 + at + scales, columns, cache.format,
                    kIsK ? facts.k_exponent[0] : facts.v_exponent[0], block, lane, x);
    if (fp4) store<kIsK>(form, x, fp4, item, block, lane);
    if (!fp4x2) return;
    add_plane<kIsK>(cache.residual + at + codes, cache.residual + at + scales, columns, cache.format,
                    kIsK ? facts.k_exponent[1] : facts.v_exponent[1], block, lane, x);
    store<kIsK>(form, x, fp4x2, item, block, lane);
  }

  // The first `tokens` tokens of a 16-bit record.
  __device__ void from_high(const uint8_t* record, int tokens, uint8_t* to) const {
    const DeviceLayout& l = e.cache.layout;
    uint32_t x[4][2][2];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint4 w = __ldcs(reinterpret_cast<const uint4*>(record + (item * 4 + i) * l.high_item_bytes +
                                                            (kIsK ? 0 : l.high_v) + block * 512 + lane * 16));
      const int left = tokens - (item * 4 + i) * kHighItemTokens;  // a word is K of one token, or V of two
      const int kept = kIsK ? (lane / 4 < left ? 2 : 0) : left - lane % 4 * 2;
      const uint32_t mask = kept <= 0 ? 0u : kept == 1 ? 0xffffu : 0xffffffffu;
      x[i][0][0] = w.x & mask, x[i][0][1] = w.y & mask, x[i][1][0] = w.z & mask, x[i][1][1] = w.w & mask;
    }
    store<kIsK>(form, x, to, item, block, lane);
  }
};

// Which forms the query blocks of head g read of pages [page, page + kMaxPages): bit 2i of byte 0, 1 or 2 for fp4,
// fp4x2 or fp16 of page i.
__device__ uint32_t forms_read(const Expand& e, int sequence, int g, int blocks, int page) {
  __shared__ uint32_t forms;
  if (threadIdx.x == 0) forms = 0;
  __syncthreads();
  uint32_t mine = 0;
  for (int i = threadIdx.x; i < e.group * blocks; i += kThreads) {
    const int64_t row = (static_cast<int64_t>(sequence) * e.h_q + g * e.group + i / blocks) * e.max_blocks + i % blocks;
    const uint32_t tiers = e.tiers[row * e.tier_words + page / 16] >> (page % 16 * 2);
    const uint32_t low = tiers & 0x55, high = tiers >> 1 & 0x55;
    mine |= (low & ~high) | (high & ~low) << 8 | (low & high) << 16;
  }
  mine = __reduce_or_sync(~0u, mine);
  if (threadIdx.x % 32 == 0 && mine) atomicOr(&forms, mine);
  __syncthreads();
  return forms;
}

__global__ void __launch_bounds__(kThreads) expand_kernel(const __grid_constant__ Expand e, int chunks) {
  const LayerCache& cache = e.cache;
  const DeviceLayout& l = cache.layout;
  const int chunk = blockIdx.x % chunks, g = blockIdx.x / chunks % cache.h_kv,
            sequence = blockIdx.x / chunks / cache.h_kv;
  const int slot = e.batch.slot[sequence], s_q = e.batch.s_q[sequence], s_kv = cache.s_kv[slot];
  const int first_page = chunk * e.pages, full = s_kv / kPageTokens;
  if (s_q == 0 || first_page * kPageTokens >= s_kv) return;
  const uint32_t forms = forms_read(e, sequence, g, query_blocks(s_q, s_kv).count, first_page);
  const ExpandedPage form = expanded_page(l.dk, l.dv);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, k_blocks = l.dk / 32, blocks = k_blocks + l.dv / 32;
  for (int i = warp; i < e.pages * 2 * blocks; i += kWarps) {
    const int in_chunk = i / (2 * blocks), page = first_page + in_chunk, item = i / blocks % 2, block = i % blocks;
    if (page * kPageTokens >= s_kv) return;
    const bool tail = page == full;
    const uint32_t read = tail ? 1u << 16 : forms >> (2 * in_chunk);
    const int id = cache.block_table[static_cast<int64_t>(slot) * cache.max_pages + page];
    const auto expand = [&](auto part) {
      if (read & 0x101)
        part.from_codes(static_cast<int64_t>(id) * cache.h_kv + g, read & 1 ? e.to.fp4_at(sequence, g, page) : nullptr,
                        read & 0x100 ? e.to.fp4x2_at(sequence, g, page) : nullptr);
      if (read & 0x10000)
        part.from_high(cache.high + (cache.high_record(slot, page, id) * cache.h_kv + g) * l.high_bytes,
                       tail ? s_kv % kPageTokens : kPageTokens,
                       tail ? e.to.tail_at(sequence, g) : e.to.fp16_at(sequence, g, page));
    };
    if (block < k_blocks)
      expand(Part<true>{e, form, item, block, lane});
    else
      expand(Part<false>{e, form, item, block - k_blocks, lane});
  }
}

}  // namespace

HighRoom prefill_high_room(const Problem& problem) {
  const CacheConfig& c = problem.cache;
  const Force& force = problem.method.force;
  const int64_t pages = round_up(pages_for(problem.max_s_kv), 16);
  if (c.storage == Storage::high_only || c.storage == Storage::dual) return {0, static_cast<int>(pages)};
  // While a step lasts all of its pages keep that form, so what the method forces counts, not what the cache keeps.
  const int64_t sink = std::min<int64_t>(std::max<int64_t>(c.sink, force.sink), pages);
  const int64_t near = std::max<int64_t>(c.recent, force.previous) + 2 + pages_for(problem.max_s_q);
  return {static_cast<int>(sink), static_cast<int>(sink + std::min(pages, near))};
}

int64_t prefill_scratch_bytes(const Problem& problem, const Gpu&) {
  const CacheConfig& c = problem.cache;
  const DeviceLayout l = device_layout(problem.d, problem.d_v);
  const int64_t pages = round_up(pages_for(problem.max_s_kv), 16);  // those of a word of tiers
  const bool planes = problem.method.rest != Tier::fp16 && c.storage != Storage::high_only;
  const int64_t expanded = planes ? pages * (c.storage == Storage::residual ? 2 : 1) : 0;
  return (1 + prefill_high_room(problem).pages + expanded) * problem.b * problem.h_kv * expanded_page(l.dk, l.dv).bytes;
}

cudaError_t launch_expand(const PrefillParams& p, cudaStream_t stream) {
  Expand e{p.cache, p.batch,      p.shape.h_q,  p.shape.group, p.shape.d,
           p.tiers, p.max_blocks, p.tier_words, kMaxPages,     expanded_pages(p)};
  // Few pages each, so that a short prefill fills the GPU; not fewer than that takes, since all read the tiers.
  constexpr int64_t kEnough = 1024;
  const int64_t heads = static_cast<int64_t>(p.batch.b) * p.cache.h_kv;
  while (e.pages > 1 && heads * (e.to.pages / e.pages) < kEnough) e.pages /= 2;
  const int chunks = e.to.pages / e.pages;
  const int64_t blocks = heads * chunks;
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  expand_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(e, chunks);
  return cudaGetLastError();
}

}  // namespace thriftattn::cuda
