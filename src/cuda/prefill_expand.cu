// FP4 pages as 16-bit records, for the flash kernel of a prefill.
//
//   codes, scales, mean --masks, one FMA a plane--> FP32 --rounded once--> 16-bit record in scratch
//   tail record --zeros for tokens that do not exist--> 16-bit record in scratch
//
// Word order makes this a move of registers: 16 bytes of codes of a lane are 4 x 16 bytes of the record, at the same
// lane of 4 of its items. At d = 128 a page of one head takes 9216 bytes in (twice that with the second plane) and
// 32768 bytes out (twice): bound by memory, 1/100 of the attention at 8k tokens and less beyond. Codes, scales and
// exponents are exact; what is rounded to FP16 (2^-11) is a key with its mean, and a value of two planes.
#include <cuda_fp16.h>

#include <algorithm>

#include "cuda/prefill.cuh"

namespace thriftattn::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;

struct Expand {
  LayerCache cache;
  Batch batch;
  Shape shape;
  ExpandedPages to;
  int strips;  // blocks that share the pages of one (sequence, KV head)
};

// The two values of fragment register `a` (0..3) of a word of codes, times 2^-14.
template <int a>
__device__ float2 unpack(uint32_t word) {
  constexpr uint32_t kMask = 0x8E008E00;
  uint32_t x;
  if constexpr (a == 0) x = word;
  if constexpr (a == 1) x = word << 3;
  if constexpr (a == 2) x = (word & 0x40384038) * 66;
  if constexpr (a == 3) x = (word & 0x20072007) * 516;
  x &= kMask;
  return __half22float2(reinterpret_cast<const __half2&>(x));
}

// Rounded once; what rounding the scales brought beyond FP16's largest value stays there, NaN stays NaN.
__device__ uint32_t pack(float2 x) {
  uint32_t r;
  asm("cvt.rn.satfinite.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(x.y), "f"(x.x));
  return r;
}

__device__ float2 fma(float2 x, float s, float2 y) { return {fmaf(x.x, s, y.x), fmaf(x.y, s, y.y)}; }

// What one lane has of 32 channels x 32 tokens of one plane.
struct Codes {
  uint32_t word[4];
  float scale[2][4];  // [k 0-7 or k 8-15 of the fragments, rows / 8], with the page's exponent
};

__device__ Codes load_codes(const uint8_t* codes, const uint8_t* scales, int columns, Fp4Format format, int exponent,
                            int block, int lane) {
  Codes c;
  const uint4 w = __ldcs(reinterpret_cast<const uint4*>(codes + block * 512 + lane * 16));
  c.word[0] = w.x, c.word[1] = w.y, c.word[2] = w.z, c.word[3] = w.w;
  const float unit = pow2(14 - exponent);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint32_t s = *reinterpret_cast<const uint32_t*>(scales + (lane / 4 * 2 + half) * (columns / 8) + block * 4);
#pragma unroll
    for (int i = 0; i < 4; ++i) c.scale[half][i] = decode_scale(format, static_cast<uint8_t>(s >> (8 * i))) * unit;
  }
  return c;
}

// x += the lane's K values of 8 tokens, item `i` of the four: [channels 8j + {0..7}, or 16 more].
template <int i>
__device__ void add_k(const Codes& c, float2 (&x)[2][2]) {
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const uint32_t w = c.word[i / 2 * 2 + j];
    x[j][0] = fma(unpack<i % 2>(w), c.scale[0][i], x[j][0]);
    x[j][1] = fma(unpack<2 + i % 2>(w), c.scale[1][i], x[j][1]);
  }
}

// x += the lane's V values of 8 tokens, item `i` of the four: [channels 16 cm + {0..7}, or 8 more].
template <int i>
__device__ void add_v(const Codes& c, float2 (&x)[2][2]) {
#pragma unroll
  for (int cm = 0; cm < 2; ++cm) {
    const uint32_t w = c.word[cm * 2 + i % 2];
    x[cm][0] = fma(unpack<i / 2 * 2>(w), c.scale[i / 2][cm * 2], x[cm][0]);
    x[cm][1] = fma(unpack<i / 2 * 2 + 1>(w), c.scale[i / 2][cm * 2 + 1], x[cm][1]);
  }
}

__device__ void store(uint8_t* record, int64_t at, const float2 (&x)[2][2]) {
  __stcs(reinterpret_cast<uint4*>(record + at), make_uint4(pack(x[0][0]), pack(x[0][1]), pack(x[1][0]), pack(x[1][1])));
}

template <int i, bool kIsK>
__device__ void expand_item(const DeviceLayout& l, const Codes& first, bool two, const Codes& second,
                            const float2 (&start)[2][2], int item, int64_t at, uint8_t* fp4, uint8_t* fp4x2) {
  float2 x[2][2] = {{start[0][0], start[0][1]}, {start[1][0], start[1][1]}};
  at += static_cast<int64_t>(item * (kItemTokens / kHighItemTokens) + i) * l.high_item_bytes;
  kIsK ? add_k<i>(first, x) : add_v<i>(first, x);
  store(fp4, at, x);
  if (!two) return;
  kIsK ? add_k<i>(second, x) : add_v<i>(second, x);
  store(fp4x2, at, x);
}

// One warp: 32 channels of K or V of 32 tokens.
template <bool kIsK>
__device__ void expand_block(const LayerCache& cache, const Shape& shape, const uint8_t* plane, const uint8_t* residual,
                             const uint8_t* summary, int item, int block, int lane, uint8_t* fp4, uint8_t* fp4x2) {
  const DeviceLayout& l = cache.layout;
  const int codes = item * l.item_bytes + (kIsK ? 0 : l.v_codes);
  const int scales = item * l.item_bytes + (kIsK ? l.k_scales : l.v_scales), columns = kIsK ? l.dk : l.dv;
  const PageSummary& facts = *reinterpret_cast<const PageSummary*>(summary);
  const Codes first = load_codes(plane + codes, plane + scales, columns, cache.format,
                                 kIsK ? facts.k_exponent[0] : facts.v_exponent[0], block, lane);
  Codes second{};
  if (residual)
    second = load_codes(residual + codes, residual + scales, columns, cache.format,
                        kIsK ? facts.k_exponent[1] : facts.v_exponent[1], block, lane);
  float2 start[2][2] = {};
  if (kIsK && cache.centring) {
    const __half* mean = reinterpret_cast<const __half*>(summary + cache.canonical.mean);
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int channel = block * 32 + half * 16 + j * 8 + lane % 4 * 2;
        if (channel < shape.d) start[j][half] = __half22float2(*reinterpret_cast<const __half2*>(mean + channel));
      }
  }
  const bool two = residual;
  const int64_t at = (kIsK ? 0 : l.high_v) + block * 512 + lane * 16;
  expand_item<0, kIsK>(l, first, two, second, start, item, at, fp4, fp4x2);
  expand_item<1, kIsK>(l, first, two, second, start, item, at, fp4, fp4x2);
  expand_item<2, kIsK>(l, first, two, second, start, item, at, fp4, fp4x2);
  expand_item<3, kIsK>(l, first, two, second, start, item, at, fp4, fp4x2);
}

// Keeps the first `tokens` tokens of a 16-bit record.
__device__ void copy_tail(const DeviceLayout& l, const uint8_t* from, int tokens, uint8_t* to) {
  const int chunks = l.high_item_bytes / 16;
  for (int i = threadIdx.x; i < chunks * (kPageTokens / kHighItemTokens); i += kThreads) {
    const int item = i / chunks, at = i % chunks * 16, lane = i % 32;
    uint4 x = reinterpret_cast<const uint4*>(from)[i];
    const int left = tokens - item * kHighItemTokens;
    // K: a lane has one token; V: two, in each word.
    const int kept = at < l.high_v ? (lane / 4 < left ? 2 : 0) : left - lane % 4 * 2;
    const uint32_t mask = kept <= 0 ? 0u : kept == 1 ? 0xffffu : 0xffffffffu;
    x.x &= mask, x.y &= mask, x.z &= mask, x.w &= mask;
    reinterpret_cast<uint4*>(to)[i] = x;
  }
}

__global__ void __launch_bounds__(kThreads) expand_kernel(const __grid_constant__ Expand e) {
  const LayerCache& cache = e.cache;
  const DeviceLayout& l = cache.layout;
  const int strip = blockIdx.x % e.strips, g = blockIdx.x / e.strips % cache.h_kv,
            sequence = blockIdx.x / e.strips / cache.h_kv;
  const int slot = e.batch.slot[sequence], s_q = e.batch.s_q[sequence], s_kv = cache.s_kv[slot];
  if (s_q == 0) return;
  const int32_t* table = cache.block_table + static_cast<int64_t>(slot) * cache.max_pages;
  const int full = s_kv / kPageTokens;
  if (strip == 0 && s_kv % kPageTokens > 0) {
    const int64_t record = cache.high_record(slot, full, table[full]) * cache.h_kv + g;
    copy_tail(l, cache.high + record * l.high_bytes, s_kv % kPageTokens, e.to.tail + e.to.tail_at(sequence, g));
  }
  if (!e.to.fp4) return;

  const int first = visible(e.shape, s_kv - s_q, s_kv).first / kPageTokens;
  const int end = min(full, static_cast<int>(pages_for(visible(e.shape, s_kv - 1, s_kv).end)));
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, k_blocks = l.dk / 32, blocks = k_blocks + l.dv / 32;
  for (int page = first + strip; page < end; page += e.strips) {
    const int64_t record = static_cast<int64_t>(table[page]) * cache.h_kv + g;
    const uint8_t* plane = cache.fp4 + record * l.fp4_bytes;
    const uint8_t* residual = e.to.fp4x2 ? cache.residual + record * l.fp4_bytes : nullptr;
    const uint8_t* summary = cache.summary + record * cache.canonical.summary_bytes;
    uint8_t* fp4 = e.to.fp4 + e.to.at(sequence, g, page);
    uint8_t* fp4x2 = e.to.fp4x2 + e.to.at(sequence, g, page);
    for (int i = warp; i < 2 * blocks; i += kWarps) {
      const int item = i / blocks, block = i % blocks;
      if (block < k_blocks)
        expand_block<true>(cache, e.shape, plane, residual, summary, item, block, lane, fp4, fp4x2);
      else
        expand_block<false>(cache, e.shape, plane, residual, summary, item, block - k_blocks, lane, fp4, fp4x2);
    }
  }
}

}  // namespace

int64_t prefill_scratch_bytes(const Problem& problem, const Gpu&) {
  const CacheConfig& c = problem.cache;
  const bool planes = problem.method.rest != Tier::fp16 && c.storage != Storage::high_only;
  const int tiers = planes ? (c.storage == Storage::residual ? 2 : 1) : 0;
  const int64_t pages = round_up(pages_for(problem.max_s_kv), 16);  // those of a word of tiers
  return problem.b * problem.h_kv * (tiers * pages + 1) * device_layout(problem.d, problem.d_v).high_bytes;
}

cudaError_t launch_expand(const PrefillParams& p, cudaStream_t stream) {
  Expand e{p.cache, p.batch, p.shape, expanded_pages(p), 1};
  const int64_t heads = static_cast<int64_t>(p.batch.b) * p.cache.h_kv;
  if (heads == 0) return cudaSuccess;
  constexpr int64_t kBlocks = 4096;  // a few on every multiprocessor of the largest GPUs
  if (e.to.fp4) e.strips = static_cast<int>(std::clamp<int64_t>(kBlocks / heads, 1, e.to.pages));
  expand_kernel<<<static_cast<unsigned>(heads * e.strips), kThreads, 0, stream>>>(e);
  return cudaGetLastError();
}

}  // namespace thriftattn::cuda
