// The rows of a step into the pages of one layer; pages that fill are encoded. One launch.
//
//   k, v of the caller --16 bit--> tile [depth, lanes] of floats in shared memory --> items of the 16-bit record
//   where the step fills the page:
//     the record's earlier tokens --> tile
//     K alone: tile --over tokens--> mean, min, max, variance --> summary; tile minus mean
//     tile --> page exponent --> scales, codes --> fp4 record; what they got wrong stays in the tile
//     tile --> the same once more --> residual record
//
// A block takes K or V of one page and head; both are [depth, lanes] as in format/page_layout.h, K [dk, 64 tokens], V
// [64 tokens, dv], so that one body serves both. A thread encodes one group of depths of one lane at a time. Bytes are
// those of encode_page (format/page_codec.cc) in the device's order, for every sum stands in its order; this file is
// compiled without fused multiply-add.
//
// Shared memory of a block: tile, pairs of codes, a float for each group: 42 KB at d = 128, 82 KB at 256. What binds: a
// step of one token is a chain of three trips to memory, and where a page fills three more through shared memory; a
// prompt is bound by instructions, some 70 for a value with two planes.
#include <cuda_fp16.h>

#include "cuda/params.h"
#include "format/codecs.h"

namespace thriftattn::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kPad = 4;  // floats after each row of the tile: no two lanes of an access below meet in a bank
static_assert(kMaxChannels <= kThreads, "a thread summarises one channel");

// One matrix of one page and head.
struct Tile {
  bool is_v;
  int channels;       // that hold data; multiples of 32 are stored
  int depth, lanes;   // padded
  int stride;         // floats from one depth to the next
  float* values;      // [depth, stride]
  uint8_t* codes;     // [depth / 2, lanes], two depths a byte, the even one in the low nibble
  float* group_sums;  // [groups, lanes]

  __device__ float& at(int token, int channel) const {
    return values[is_v ? token * stride + channel : channel * stride + token];
  }
  __device__ int padded_channels() const { return is_v ? lanes : depth; }
};

__host__ __device__ constexpr int shared_bytes(int depth, int lanes) {
  return depth * (lanes + kPad) * 4 + depth * lanes / 2 + depth / 16 * lanes * 4;
}

// Four values from `at` on, an element index.
__device__ float4 load4(const void* data, DType dtype, int64_t at, bool aligned) {
  if (dtype == DType::f32) {
    const float* x = static_cast<const float*>(data) + at;
    return aligned ? *reinterpret_cast<const float4*>(x) : float4{x[0], x[1], x[2], x[3]};
  }
  const uint16_t* x = static_cast<const uint16_t*>(data) + at;
  const ushort4 bits = aligned ? *reinterpret_cast<const ushort4*>(x) : ushort4{x[0], x[1], x[2], x[3]};
  if (dtype == DType::bf16) return {bf16_decode(bits.x), bf16_decode(bits.y), bf16_decode(bits.z), bf16_decode(bits.w)};
  return {__half2float(__ushort_as_half(bits.x)), __half2float(__ushort_as_half(bits.y)),
          __half2float(__ushort_as_half(bits.z)), __half2float(__ushort_as_half(bits.w))};
}

// The value that the 16-bit form keeps of x: what it cannot hold becomes NaN, never an infinity, which a softmax would
// take for a score.
__device__ float to_high(float x, bool& good) {
  const float high = __half2float(__float2half_rn(x));
  const bool finite = (bits_of(high) & 0x7fffffffu) < 0x7f800000u;
  good &= finite;
  return finite ? high : float_of(0x7fc00000u);
}

// Tokens [first, last) of the page from the caller's rows, of which `row` is the first token's. A warp takes 8 tokens x
// 16 channels at a time. False where a value is beyond 16 bit.
__device__ bool load_rows(const Tile& tile, const Rows<const void*>& rows, int head, int64_t row, int first, int last) {
  const int element = rows.dtype == DType::f32 ? 4 : 2;
  const bool aligned =
      (reinterpret_cast<uint64_t>(rows.data) | static_cast<uint64_t>((rows.row_stride | rows.head_stride) * element)) %
          (4 * element) ==
      0;
  const int blocks = tile.padded_channels() / 16, lane = threadIdx.x % 32;
  bool good = true;
  for (int item = threadIdx.x / 32; item < (last - first + 7) / 8 * blocks; item += kWarps) {
    const int token = first + item / blocks * 8 + lane % 8, channel = item % blocks * 16 + lane / 8 * 4;
    if (token >= last) continue;
    float4 x = {0, 0, 0, 0};
    if (channel < tile.channels)
      x = load4(rows.data, rows.dtype, (row + token - first) * rows.row_stride + head * rows.head_stride + channel,
                aligned);
    tile.at(token, channel) = to_high(x.x, good);
    tile.at(token, channel + 1) = to_high(x.y, good);
    tile.at(token, channel + 2) = to_high(x.z, good);
    tile.at(token, channel + 3) = to_high(x.w, good);
  }
  return good;
}

// The 16 bytes of a 16-bit item that one lane of a reading warp holds, and the tile's elements in it: K has 8 channels
// of one token there, V 4 channels of two.
struct HighChunk {
  int64_t offset;  // in the record
  int token, channel;
  bool is_v;

  __device__ HighChunk(const DeviceLayout& layout, const Tile& tile, int index) : is_v(tile.is_v) {
    const int per_item = tile.padded_channels(), item = index / per_item, lane = index % 32;
    const int block = index % per_item / 32 * 32;
    token = is_v ? lane % 4 * 2 : lane / 4;
    channel = block + (is_v ? lane / 4 : lane % 4 * 2);
    offset = item * int64_t{layout.high_item_bytes} +
             (is_v ? layout.high_v_at(channel, token) : layout.high_k(channel, token));
    token += item * kHighItemTokens;
  }
  __device__ int token_at(int e) const { return token + (is_v ? e % 2 : 0); }
  __device__ int channel_at(int e) const {
    return channel + (is_v ? e / 4 * 16 + e / 2 % 2 * 8 : e / 4 * 8 + e / 2 % 2 * 16 + e % 2);
  }
};

// Tokens [first, last) of the tile into the record, and zeros after them up to the end of their item.
__device__ void store_high(const Tile& tile, const DeviceLayout& layout, int first, int last, uint8_t* record) {
  const int per_item = tile.padded_channels();
  const int begin = first / kHighItemTokens * per_item, end = (last + kHighItemTokens - 1) / kHighItemTokens * per_item;
  for (int index = begin + threadIdx.x; index < end; index += kThreads) {
    const HighChunk chunk(layout, tile, index);
    if (chunk.token_at(1) < first) continue;
    uint16_t x[8];
#pragma unroll
    for (int e = 0; e < 8; ++e)
      x[e] = chunk.token_at(e) < last
                 ? __half_as_ushort(__float2half_rn(tile.at(chunk.token_at(e), chunk.channel_at(e))))
                 : uint16_t{0};
    if (chunk.token < first) {  // the even token of these pairs was there before
#pragma unroll
      for (int e = 1; e < 8; e += 2) *reinterpret_cast<uint16_t*>(record + chunk.offset + 2 * e) = x[e];
      continue;
    }
    *reinterpret_cast<uint4*>(record + chunk.offset) = {x[0] | uint32_t{x[1]} << 16, x[2] | uint32_t{x[3]} << 16,
                                                        x[4] | uint32_t{x[5]} << 16, x[6] | uint32_t{x[7]} << 16};
  }
}

// Tokens [0, end) of the record into the tile.
__device__ void load_high(const Tile& tile, const DeviceLayout& layout, const uint8_t* record, int end) {
  const int count = (end + kHighItemTokens - 1) / kHighItemTokens * tile.padded_channels();
  for (int index = threadIdx.x; index < count; index += kThreads) {
    const HighChunk chunk(layout, tile, index);
    const uint4 words = *reinterpret_cast<const uint4*>(record + chunk.offset);
    const uint32_t x[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int e = 0; e < 8; ++e)
      if (chunk.token_at(e) < end)
        tile.at(chunk.token_at(e), chunk.channel_at(e)) =
            __half2float(__ushort_as_half(static_cast<uint16_t>(x[e / 2] >> e % 2 * 16)));
  }
}

// The largest of the block's values; every thread calls it.
__device__ uint32_t block_max(uint32_t x) {
  __shared__ uint32_t largest[kWarps];
  x = __reduce_max_sync(~0u, x);
  __syncthreads();  // who reads the last call's
  if (threadIdx.x % 32 == 0) largest[threadIdx.x / 32] = x;
  __syncthreads();
  for (int w = 0; w < kWarps; ++w) x = max(x, largest[w]);
  return x;
}

__device__ uint32_t abs_bits(float x) { return bits_of(x) & 0x7fffffffu; }

// Summarises K, [dk, 64], and takes the mean away. Returns the largest |value| of what stays, as bits.
__device__ uint32_t summarise(const Tile& tile, const PageLayout& layout, bool centring, uint8_t* summary) {
  uint32_t largest = 0;
  const int c = threadIdx.x;
  if (c < layout.d) {
    auto* row = reinterpret_cast<float4*>(tile.values + c * tile.stride);
    float sum = 0, low = tile.at(0, c), top = low;
    const auto see = [&](float x) {
      sum += x;
      low = x < low ? x : low;
      top = top < x ? x : top;
    };
#pragma unroll 4
    for (int t = 0; t < kPageTokens / 4; ++t) {
      const float4 x = row[t];
      see(x.x), see(x.y), see(x.z), see(x.w);
    }
    const __half mean = __float2half_rn(sum * (1.0f / kPageTokens));
    const auto half_at = [&](int64_t offset) { return reinterpret_cast<__half*>(summary + offset) + c; };
    if (layout.mean) *half_at(layout.mean) = mean;
    if (layout.min) *half_at(layout.min) = __float2half_rn(low);
    if (layout.max) *half_at(layout.max) = __float2half_rn(top);
    if (layout.variance) {
      double squares = 0, exact = 0;
#pragma unroll 4
      for (int t = 0; t < kPageTokens; ++t) exact += static_cast<double>(tile.at(t, c));
      exact /= kPageTokens;
#pragma unroll 4
      for (int t = 0; t < kPageTokens; ++t) {
        const double from_mean = static_cast<double>(tile.at(t, c)) - exact;
        squares += from_mean * from_mean;
      }
      reinterpret_cast<float*>(summary + layout.variance)[c] = static_cast<float>(squares / kPageTokens);
    }
    const float m = centring ? __half2float(mean) : 0.0f;
#pragma unroll 4
    for (int t = 0; t < kPageTokens / 4; ++t) {
      float4 x = row[t];
      x = {x.x - m, x.y - m, x.z - m, x.w - m};
      row[t] = x;
      largest = max(max(max(largest, abs_bits(x.x)), max(abs_bits(x.y), abs_bits(x.z))), abs_bits(x.w));
    }
  }
  return largest;
}

// Square root of the mean over tokens of the sum of group_sums, in the order that rms_over_tokens in page_codec.cc
// makes law. The first warp calls it; its lanes get the result.
__device__ float rms_over_tokens(const Tile& tile, int groups) {
  double sum = 0;
  if (threadIdx.x < 16)
    for (int column = 0; column < tile.lanes; column += 16)
      for (int g = 0; g < groups; ++g)
        sum += static_cast<double>(tile.group_sums[g * tile.lanes + column + threadIdx.x]);
  double total = 0;
  for (int j = 0; j < 16; ++j) total += __shfl_sync(~0u, sum, j);
  return static_cast<float>(sqrt(total / kPageTokens));
}

// The tile's values as they are: squares of each group, and the largest |value|, as bits.
template <int kGroup>
__device__ uint32_t measure(const Tile& tile) {
  uint32_t largest = 0;
  for (int index = threadIdx.x; index < tile.depth / kGroup * tile.lanes; index += kThreads) {
    const float* x = tile.values + index / tile.lanes * kGroup * tile.stride + index % tile.lanes;
    float squares = 0;
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      const float value = x[i * tile.stride];
      squares += value * value;
      largest = max(largest, abs_bits(value));
    }
    tile.group_sums[index] = squares;
  }
  return largest;
}

// The midpoints between E2M1's values, times s.
struct Midpoints {
  float at[7];
  __device__ explicit Midpoints(float s)
      : at{0.25f * s, 0.75f * s, 1.25f * s, 1.75f * s, 2.5f * s, 3.5f * s, 5.0f * s} {}
};

// e2m1_encode(x / s) without the division, for s > 0 of 4 significant bits. A midpoint times s is exact. An x beside it
// is at least 2^-24 of itself away, and so is the quotient from the midpoint: more than half of the distance to the
// midpoint's neighbours, so that rounding the quotient moves it neither onto the midpoint nor across.
__device__ uint32_t encode_e2m1(float x, const Midpoints& midpoints) {
  const float(&m)[7] = midpoints.at;
  const float a = fabsf(x);
  const bool b2 = a >= m[3];
  const bool b1 = a >= (b2 ? m[5] : m[1]);
  const bool b0 = a > (b2 ? (b1 ? m[6] : m[4]) : (b1 ? m[2] : m[0]));
  return (bits_of(x) >> 28 & 8u) | (b2 ? 4u : 0u) | (b1 ? 2u : 0u) | (b0 ? 1u : 0u);
}

// Encodes block_size(kFormat) values as encode_block does. Two codes a byte, four bytes a word.
template <Fp4Format kFormat, Scales kScales>
__device__ uint8_t encode_group(const float (&x)[block_size(kFormat)], uint32_t (&codes)[block_size(kFormat) / 8]) {
  constexpr int kGroup = block_size(kFormat);
  const auto pack = [&](auto code_of) {
#pragma unroll
    for (int w = 0; w < kGroup / 8; ++w) {
      codes[w] = 0;
#pragma unroll
      for (int i = 0; i < 8; ++i) codes[w] |= code_of(8 * w + i) << 4 * i;
    }
  };
  if constexpr (kScales == Scales::four_over_six) {
    uint8_t each[kGroup];
    const uint8_t scale = encode_block(kFormat, kScales, x, each);
    pack([&](int i) { return static_cast<uint32_t>(each[i]); });
    return scale;
  }
  uint32_t amax = 0;
#pragma unroll
  for (int i = 0; i < kGroup; ++i) amax = max(amax, abs_bits(x[i]));
  const bool is_nan = amax > 0x7f800000u;
  const uint8_t scale = kFormat == Fp4Format::nvfp4 ? e4m3_encode(float_of(amax) / 6.0f)
                        : is_nan                    ? uint8_t{255}
                        : amax == 0                 ? uint8_t{0}
                                                    : e8m0_encode_exponent(static_cast<int>(amax >> 23) - 127 - 2);
  const float s = decode_scale(kFormat, scale);
  if (amax == 0 || !(s > 0.0f)) {
    pack([](int) { return 0u; });
  } else {
    const Midpoints midpoints(s);
    pack([&](int i) { return encode_e2m1(x[i], midpoints); });
  }
  return scale;
}

// Encodes the tile, multiplied by 2^exponent: codes to tile.codes, scales to the record. With `keep_error` the tile
// then holds what the codes got wrong, and group_sums its squares. Returns the largest |error| as bits.
template <Fp4Format kFormat, Scales kScales>
__device__ uint32_t encode_plane(const Tile& tile, const DeviceLayout& layout, int exponent, bool keep_error,
                                 uint8_t* record) {
  constexpr int kGroup = block_size(kFormat);
  const float up = pow2(exponent), down = pow2(-exponent);
  uint32_t largest = 0;
  for (int index = threadIdx.x; index < tile.depth / kGroup * tile.lanes; index += kThreads) {
    const int r0 = index / tile.lanes * kGroup, lane = index % tile.lanes;
    float* values = tile.values + r0 * tile.stride + lane;
    float x[kGroup];
#pragma unroll
    for (int i = 0; i < kGroup; ++i) x[i] = values[i * tile.stride] * up;
    uint32_t codes[kGroup / 8];
    const uint8_t scale = encode_group<kFormat, kScales>(x, codes);
#pragma unroll
    for (int i = 0; i < kGroup / 2; ++i)
      tile.codes[(r0 / 2 + i) * tile.lanes + lane] = static_cast<uint8_t>(codes[i / 4] >> 8 * (i % 4));
#pragma unroll
    for (int r = r0; r < r0 + kGroup; r += 16) {  // a scale of 32 stands twice
      const int token = tile.is_v ? r : lane, channel = tile.is_v ? lane : r;
      const int at =
          tile.is_v ? layout.v_scale(channel, token % kItemTokens) : layout.k_scale(channel, token % kItemTokens);
      record[token / kItemTokens * int64_t{layout.item_bytes} + at] = scale;
    }
    if (!keep_error) continue;
    const float s = decode_scale(kFormat, scale) * down;
    float squares = 0;
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      const float error = values[i * tile.stride] - e2m1_decode(codes[i / 8] >> 4 * (i % 8) & 15) * s;
      values[i * tile.stride] = error;
      squares += error * error;
      largest = max(largest, abs_bits(error));
    }
    tile.group_sums[index] = squares;
  }
  return largest;
}

// tile.codes into the words of a record: 16 bytes a lane of each 32 x 32 codes.
__device__ void store_codes(const Tile& tile, const DeviceLayout& layout, uint8_t* record) {
  const int tiles_across = tile.lanes / 32;
  for (int index = threadIdx.x; index < tile.depth / 32 * tile.lanes; index += kThreads) {
    const int r0 = index / 32 / tiles_across * 32 + index % 4 * 2,
              lane0 = index / 32 % tiles_across * 32 + index % 32 / 4;
    uint32_t words[4];
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      words[w] = 0;
#pragma unroll
      for (int a = 0; a < 4; ++a) {
        const int r = r0 + w % 2 * 8 + a / 2 * 16, lane = lane0 + w / 2 * 16 + a % 2 * 8;
        const uint32_t pair = tile.codes[r / 2 * tile.lanes + lane];
        const uint32_t both = (pair & 0xfu) | (pair & 0xf0u) << 12;
        const CodePlace place = tile.is_v ? layout.v_code(a % 2 * 8, a / 2 * 16) : layout.k_code(a / 2 * 16, a % 2 * 8);
        words[w] |= (both & 0x00070007u) << place.magnitude | (both >> 3 & 0x00010001u) << place.sign;
      }
    }
    const int token = tile.is_v ? r0 : lane0, channel = tile.is_v ? lane0 : r0;
    const int at =
        tile.is_v ? layout.v_code(channel, token % kItemTokens).word : layout.k_code(channel, token % kItemTokens).word;
    *reinterpret_cast<uint4*>(record + token / kItemTokens * int64_t{layout.item_bytes} + at) = {words[0], words[1],
                                                                                                 words[2], words[3]};
  }
}

// A full page in the tile into its records; each may be null, as in encode_page.
template <Fp4Format kFormat, Scales kScales>
__device__ void encode_page(const Tile& tile, const AppendParams& p, uint8_t* fp4, uint8_t* residual,
                            uint8_t* summary) {
  constexpr int kGroup = block_size(kFormat);
  const LayerCache& cache = p.cache;
  const int groups = tile.depth / kGroup;
  auto* facts = reinterpret_cast<PageSummary*>(summary);
  uint32_t largest;
  if (tile.is_v) {
    largest = measure<kGroup>(tile);
    __syncthreads();
    if (threadIdx.x < 32) {
      const float norm = rms_over_tokens(tile, groups);
      if (threadIdx.x == 0) facts->v_norm = norm;
    }
  } else {
    largest = summarise(tile, cache.canonical, fp4 && cache.centring, summary);
  }
  int8_t exponents[2] = {0, 0};
  float eps = 0;
  uint8_t* const planes[2] = {fp4, residual};
#pragma unroll
  for (int plane = 0; plane < 2; ++plane) {
    if (!planes[plane]) break;
    const float amax = float_of(block_max(largest));
    const int exponent = p.page_scale ? page_exponent(amax, kFormat, kScales) : 0;
    exponents[plane] = static_cast<int8_t>(exponent);
    largest = encode_plane<kFormat, kScales>(tile, cache.layout, exponent, plane == 0, planes[plane]);
    __syncthreads();
    store_codes(tile, cache.layout, planes[plane]);
    if (plane == 0 && threadIdx.x < 32) eps = rms_over_tokens(tile, groups);
  }
  if (threadIdx.x == 0) {
    int8_t* const to = tile.is_v ? facts->v_exponent : facts->k_exponent;
    to[0] = exponents[0];
    to[1] = exponents[1];
    (tile.is_v ? facts->eps_v : facts->eps_k) = eps;
  }
}

// Grid: (K and V of every head, pages that a step may touch, sequences).
template <Fp4Format kFormat, Scales kScales>
__global__ void __launch_bounds__(kThreads, 4) append_kernel(const __grid_constant__ AppendParams p) {
  extern __shared__ __align__(16) uint8_t shared[];
  const LayerCache& cache = p.cache;
  const int sequence = blockIdx.z, slot = p.batch.slot[sequence], head = blockIdx.x / 2;
  const int settled = p.settled[slot], s_kv = cache.s_kv[slot];
  const int page = settled / kPageTokens + static_cast<int>(blockIdx.y);
  const int first = max(settled - page * kPageTokens, 0), last = min(s_kv - page * kPageTokens, kPageTokens);
  if (first >= last) return;

  Tile tile;
  tile.is_v = blockIdx.x % 2 != 0;
  tile.channels = tile.is_v ? cache.canonical.d_v : cache.canonical.d;
  tile.depth = tile.is_v ? kPageTokens : cache.layout.dk;
  tile.lanes = tile.is_v ? cache.layout.dv : kPageTokens;
  tile.stride = tile.lanes + kPad;
  tile.values = reinterpret_cast<float*>(shared);
  tile.group_sums = tile.values + tile.depth * tile.stride;
  tile.codes = reinterpret_cast<uint8_t*>(tile.group_sums + tile.depth / 16 * tile.lanes);

  const int id = cache.block_table[int64_t{slot} * cache.max_pages + page];
  const int64_t record = int64_t{id} * cache.h_kv + head;
  uint8_t* const high = cache.high + (cache.high_record(slot, page, id) * cache.h_kv + head) * cache.layout.high_bytes;
  const bool fills = last == kPageTokens && cache.summary;

  const int64_t row = p.batch.first_row[sequence] + (int64_t{page} * kPageTokens + first - settled);
  if (fills) load_high(tile, cache.layout, high, first);
  if (!load_rows(tile, tile.is_v ? p.v : p.k, head, row, first, last)) atomicOr(p.faults, kNotFinite);
  __syncthreads();
  store_high(tile, cache.layout, first, last, high);
  if (!fills) return;
  __syncthreads();
  encode_page<kFormat, kScales>(tile, p, cache.fp4 ? cache.fp4 + record * cache.layout.fp4_bytes : nullptr,
                                cache.residual ? cache.residual + record * cache.layout.fp4_bytes : nullptr,
                                cache.summary + record * cache.canonical.summary_bytes);
}

}  // namespace

cudaError_t launch_append(const AppendParams& p, cudaStream_t stream) {
  if (p.batch.b == 0 || p.max_s_q == 0) return cudaSuccess;
  const auto kernel = p.cache.format == Fp4Format::mxfp4 ? append_kernel<Fp4Format::mxfp4, Scales::six>
                      : p.scales == Scales::six          ? append_kernel<Fp4Format::nvfp4, Scales::six>
                                                         : append_kernel<Fp4Format::nvfp4, Scales::four_over_six>;
  const int k_bytes = shared_bytes(p.cache.layout.dk, kPageTokens),
            v_bytes = shared_bytes(kPageTokens, p.cache.layout.dv);
  const int bytes = k_bytes > v_bytes ? k_bytes : v_bytes;
  if (bytes > 48 * 1024)
    if (const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
        error != cudaSuccess)
      return error;
  const dim3 grid(2 * p.cache.h_kv, (p.max_s_q + kPageTokens - 2) / kPageTokens + 1, p.batch.b);
  kernel<<<grid, kThreads, bytes, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace thriftattn::cuda
