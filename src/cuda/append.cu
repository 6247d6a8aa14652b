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
// [64 tokens, dv], so that one body serves both. Bytes are those of encode_page (format/page_codec.cc) in the device's
// order: every sum stands in its order, and this file is compiled without fused multiply-add.
//
// A thread encodes 32 depths of one lane, half of the codes of 8 words; the lane 8 further holds the other half.
//
// Shared memory of a block: the tile and a float for each group, 39 KB at d = 128 and 78 KB at 256. What binds: a step
// of one token is a chain of three trips to memory. A prompt is bound by instructions: 140 for a value with two planes,
// of which the planes take 45 and 35 (profiled on sm_90).
#include <cuda_fp16.h>

#include "cuda/launch.cuh"
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
  float* squares[2];  // [lanes / 16, groups, 16], sums over groups: of V as it came, of what the first plane got wrong

  __device__ int at(int token, int channel) const { return is_v ? token * stride + channel : channel * stride + token; }
  __device__ int blocks() const { return (is_v ? lanes : depth) / 32; }  // of 32 channels
};

__host__ __device__ constexpr int tile_floats(int depth, int lanes) { return depth * (lanes + kPad); }
__host__ __device__ constexpr int group_floats(int depth, int lanes) { return depth / 16 * lanes; }
constexpr int shared_bytes(int depth, int lanes) {
  return 4 * (tile_floats(depth, lanes) + 2 * group_floats(depth, lanes));
}

// Pairs (i, j), j in [0, width), row after row from (i0, 0): those that one warp meets, every kWarps-th.
struct Walk {
  int i, j;
  const int width, di, dj;

  __device__ Walk(int i0, int width_)
      : i(i0 + warp() / width_), j(warp() % width_), width(width_), di(kWarps / width_), dj(kWarps % width_) {}
  __device__ static int warp() { return threadIdx.x / 32; }
  __device__ void step() {
    i += di;
    j += dj;
    if (j >= width) ++i, j -= width;
  }
};

// --- 16 bit

__device__ uint32_t pack(float even, float odd) {
  const __half2 halves = __floats2half2_rn(even, odd);
  return __half_as_ushort(__low2half(halves)) | static_cast<uint32_t>(__half_as_ushort(__high2half(halves))) << 16;
}
__device__ float low_half(uint32_t halves) { return __half2float(__ushort_as_half(static_cast<uint16_t>(halves))); }
__device__ float high_half(uint32_t halves) {
  return __half2float(__ushort_as_half(static_cast<uint16_t>(halves >> 16)));
}

// Four elements of a caller's tensor as they stand there, those of 16 bit two a word.
__device__ uint4 load_bits(const void* data, bool is_f32, int64_t at, bool aligned) {
  if (is_f32) {
    const uint32_t* x = static_cast<const uint32_t*>(data) + at;
    return aligned ? *reinterpret_cast<const uint4*>(x) : uint4{x[0], x[1], x[2], x[3]};
  }
  const uint16_t* x = static_cast<const uint16_t*>(data) + at;
  const uint2 bits =
      aligned ? *reinterpret_cast<const uint2*>(x) : uint2{x[0] | uint32_t{x[1]} << 16, x[2] | uint32_t{x[3]} << 16};
  return {bits.x, bits.y, 0, 0};
}

// Bits 0 and 16: which of two halves is beyond the finite. Such a value becomes NaN, never an infinity, which a softmax
// would take for a score.
__device__ uint32_t has_infinity(uint32_t halves) {
  return ((halves & 0x7fff7fffu) + 0x04000400u) >> 15 & 0x00010001u;  // an exponent of all ones carries
}

// Tokens [first, last) of the page from the caller's rows, of which `row` is the first token's. A warp takes 8 tokens x
// 16 channels at a time, four times before it waits. False where a value is beyond 16 bit.
__device__ bool load_rows(const Tile& tile, const Rows<const void*>& rows, int head, int64_t row, int first, int last) {
  constexpr int kAhead = 4;
  const bool is_f32 = rows.dtype == DType::f32;
  const int element = is_f32 ? 4 : 2;
  const auto address = reinterpret_cast<uint64_t>(rows.data);
  const bool aligned =
      (address | static_cast<uint64_t>((rows.row_stride | rows.head_stride) * element)) % (4 * element) == 0;
  const int lane_token = threadIdx.x % 8, lane_channel = threadIdx.x % 32 / 8 * 4;
  const int64_t from = (row + lane_token) * rows.row_stride + head * rows.head_stride + lane_channel;
  const int step = tile.is_v ? 1 : tile.stride, groups = (last - first + 7) / 8;
  bool good = true;
  for (Walk walk(0, 2 * tile.blocks()); walk.i < groups;) {
    uint4 bits[kAhead];
    int to[kAhead];
#pragma unroll
    for (int n = 0; n < kAhead; ++n, walk.step()) {
      const int token = first + walk.i * 8 + lane_token, channel = walk.j * 16 + lane_channel;
      to[n] = token < last ? tile.at(token, channel) : -1;
      bits[n] = {0, 0, 0, 0};
      if (token < last && channel < tile.channels)
        bits[n] = load_bits(rows.data, is_f32, from + walk.i * 8 * rows.row_stride + walk.j * 16, aligned);
    }
#pragma unroll
    for (int n = 0; n < kAhead; ++n) {
      if (to[n] < 0) continue;
      uint32_t x01 = bits[n].x, x23 = bits[n].y;
      if (is_f32) {
        x01 = pack(float_of(bits[n].x), float_of(bits[n].y));
        x23 = pack(float_of(bits[n].z), float_of(bits[n].w));
      } else if (rows.dtype == DType::bf16) {
        x01 = pack(float_of(bits[n].x << 16), float_of(bits[n].x & 0xffff0000u));
        x23 = pack(float_of(bits[n].y << 16), float_of(bits[n].y & 0xffff0000u));
      }
      if (has_infinity(x01) | has_infinity(x23)) {
        good = false;
        x01 |= has_infinity(x01) * 0x7fffu;
        x23 |= has_infinity(x23) * 0x7fffu;
      }
      float* const values = tile.values + to[n];
      values[0] = low_half(x01);
      values[step] = high_half(x01);
      values[2 * step] = low_half(x23);
      values[3 * step] = high_half(x23);
    }
  }
  return good;
}

// What the lanes of a warp hold of 32 channels of a 16-bit item: 16 bytes each, in which K has 8 channels of one token
// and V 4 channels of two.
struct HighLane {
  int offset;                 // of its bytes in the first 32 channels of an item
  int even, odd;              // the tokens of the values in the low halves, and in the high ones
  int first;                  // place of the first value in the tile, for the first item and its first 32 channels
  int next_item, next_block;  // from there to the others
  int step[3];                // from the first value to the others: value e stands at the sum of the steps of e's bits

  __device__ HighLane(const DeviceLayout& layout, const Tile& tile) {
    const int lane = threadIdx.x % 32, channel = tile.is_v ? lane / 4 : lane % 4 * 2;
    even = tile.is_v ? lane % 4 * 2 : lane / 4;
    odd = even + (tile.is_v ? 1 : 0);
    offset = tile.is_v ? layout.high_v_at(channel, even) : layout.high_k(channel, even);
    first = tile.at(even, channel);
    next_item = tile.at(kHighItemTokens, 0);
    next_block = tile.at(0, 32);
    step[0] = tile.stride;  // the next channel of K, the next token of V
    step[1] = tile.is_v ? 8 : 16 * tile.stride;
    step[2] = tile.is_v ? 16 : 8 * tile.stride;
  }
  // Its bytes in a record; a block of 32 channels takes 512.
  __device__ int64_t bytes(const DeviceLayout& layout, int item, int block) const {
    return int64_t{item} * layout.high_item_bytes + (block * 512 + offset);
  }
  __device__ float& value(const Tile& tile, int item, int block, int e) const {
    return tile.values[first + item * next_item + block * next_block + (e & 1) * step[0] + (e >> 1 & 1) * step[1] +
                       (e >> 2) * step[2]];
  }
};

// Tokens [first, last) of the tile into the record, and zeros after them up to the end of their item.
__device__ void store_high(const Tile& tile, const DeviceLayout& layout, int first, int last, uint8_t* record) {
  const HighLane lane(layout, tile);
  for (Walk walk(first / kHighItemTokens, tile.blocks()); walk.i * kHighItemTokens < last; walk.step()) {
    const int even = walk.i * kHighItemTokens + lane.even, odd = walk.i * kHighItemTokens + lane.odd;
    if (odd < first) continue;
    uint32_t x[4];
#pragma unroll
    for (int w = 0; w < 4; ++w)
      x[w] = pack(even < last ? lane.value(tile, walk.i, walk.j, 2 * w) : 0.0f,
                  odd < last ? lane.value(tile, walk.i, walk.j, 2 * w + 1) : 0.0f);
    uint8_t* const to = record + lane.bytes(layout, walk.i, walk.j);
    if (even < first) {  // these tokens were there before
      for (int w = 0; w < 4; ++w) reinterpret_cast<uint16_t*>(to)[2 * w + 1] = static_cast<uint16_t>(x[w] >> 16);
    } else {
      *reinterpret_cast<uint4*>(to) = {x[0], x[1], x[2], x[3]};
    }
  }
}

// Tokens [0, end) of the record into the tile.
__device__ void load_high(const Tile& tile, const DeviceLayout& layout, const uint8_t* record, int end) {
  constexpr int kAhead = 4;
  const HighLane lane(layout, tile);
  const int items = (end + kHighItemTokens - 1) / kHighItemTokens;
  for (Walk walk(0, tile.blocks()); walk.i < items;) {
    uint4 words[kAhead];
    Walk ahead = walk;
#pragma unroll
    for (int n = 0; n < kAhead; ++n, ahead.step())
      if (ahead.i < items) words[n] = *reinterpret_cast<const uint4*>(record + lane.bytes(layout, ahead.i, ahead.j));
#pragma unroll
    for (int n = 0; n < kAhead; ++n, walk.step()) {
      const uint32_t x[4] = {words[n].x, words[n].y, words[n].z, words[n].w};
      const bool has_even = walk.i * kHighItemTokens + lane.even < end;
      const bool has_odd = walk.i * kHighItemTokens + lane.odd < end;
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        if (has_even) lane.value(tile, walk.i, walk.j, 2 * w) = low_half(x[w]);
        if (has_odd) lane.value(tile, walk.i, walk.j, 2 * w + 1) = high_half(x[w]);
      }
    }
  }
}

// --- A full page

__device__ uint32_t abs_bits(float x) { return bits_of(x) & 0x7fffffffu; }

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

// Summarises K, [dk, 64], and takes the mean away. Returns the largest |value| of what stays, as bits.
__device__ uint32_t summarise(const Tile& tile, const PageLayout& layout, bool centring, uint8_t* summary) {
  uint32_t largest = 0;
  const int c = threadIdx.x;
  if (c < layout.d) {
    auto* row = reinterpret_cast<float4*>(tile.values + c * tile.stride);
    float sum = 0, low = tile.values[tile.at(0, c)], top = low;
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
      for (int t = 0; t < kPageTokens; ++t) exact += static_cast<double>(tile.values[tile.at(t, c)]);
      exact /= kPageTokens;
#pragma unroll 4
      for (int t = 0; t < kPageTokens; ++t) {
        const double from_mean = static_cast<double>(tile.values[tile.at(t, c)]) - exact;
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

// What a thread encodes: depths [depth, depth + 32) of one lane. A warp has 32 lanes side by side; the block's warps go
// through both items of the page and through its blocks of 32 channels.
struct Column {
  int depth, lane;
  float* values;  // depths are tile.stride apart

  __device__ Column(const Tile& tile, int index) {
    const int item = index % 2, block = index / 2;
    depth = (tile.is_v ? item : block) * 32;
    lane = (tile.is_v ? block : item) * 32 + threadIdx.x % 32;
    values = tile.values + depth * tile.stride + lane;
  }
  template <int kGroup>
  __device__ int group(const Tile& tile, int half) const {  // its place in Tile::squares
    return (lane / 16 * (tile.depth / kGroup) + (depth + 16 * half) / kGroup) * 16 + lane % 16;
  }
};

// Square root of the mean over tokens of the sum of `squares`, in the order that rms_over_tokens in page_codec.cc makes
// law. A warp calls it; all its lanes get the result.
__device__ float rms_over_tokens(const float* squares, int groups) {
  double sum = 0;
  if (threadIdx.x % 32 < 16)
#pragma unroll 4
    for (int i = 0; i < groups; ++i) sum += static_cast<double>(squares[i * 16 + threadIdx.x % 32]);
  double total = 0;
#pragma unroll
  for (int j = 0; j < 16; ++j) total += __shfl_sync(~0u, sum, j);
  return static_cast<float>(sqrt(total / kPageTokens));
}

// Squares of the tile's groups as they are; returns the largest |value| as bits.
template <int kGroup>
__device__ uint32_t measure(const Tile& tile) {
  uint32_t largest = 0;
  for (int index = threadIdx.x / 32; index < 2 * tile.blocks(); index += kWarps) {
    const Column column(tile, index);
    float squares = 0;
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      if (i % kGroup == 0) squares = 0;
      const float value = column.values[i * tile.stride];
      squares += value * value;
      largest = max(largest, abs_bits(value));
      if (i % kGroup == kGroup - 1) tile.squares[0][column.group<kGroup>(tile, i / 16)] = squares;
    }
  }
  return largest;
}

// The magnitude of e2m1_encode(x / s) without the division, for s > 0 of 4 significant bits, in bits 11 to 9. The
// midpoints between E2M1's values, times s, are exact. An x beside one is at least 2^-24 of it away, and so is the
// quotient from the midpoint: half of the way to its neighbours at least, and more where half is 2^-24. So the
// quotient's rounding moves it neither onto the midpoint nor across.
__device__ uint32_t magnitude_of(float x, float s) {
  const float a = fabsf(x);
  const bool b2 = a >= 1.75f * s;
  const bool b1 = a >= (b2 ? 3.5f : 0.75f) * s;
  const bool b0 = a > (b2 ? (b1 ? 5.0f : 2.5f) : (b1 ? 1.25f : 0.25f)) * s;
  return (b2 ? 0x800u : 0u) | (b1 ? 0x400u : 0u) | (b0 ? 0x200u : 0u);
}

// The squared error of the group at x under one of 4over6's two scales, summed as the codec does.
__device__ double squared_error(const float (&x)[16], uint8_t scale) {
  const float s = e4m3_decode(scale);
  uint8_t codes[16];
#pragma unroll
  for (int i = 0; i < 16; ++i)
    codes[i] = s > 0.0f ? static_cast<uint8_t>((bits_of(x[i]) >> 28 & 8u) | magnitude_of(x[i], s) >> 9) : uint8_t{0};
  return codecs_detail::nvfp4_squared_error(x, s, codes);
}

// The scale byte that encode_block gives the group at x.
template <Fp4Format kFormat, Scales kScales>
__device__ uint8_t choose_scale(const float (&x)[block_size(kFormat)], uint32_t amax) {
  const bool is_nan = amax > 0x7f800000u;
  if constexpr (kFormat == Fp4Format::mxfp4) {
    if (is_nan) return 255;
    return amax == 0 ? uint8_t{0} : e8m0_encode_exponent(static_cast<int>(amax >> 23) - 127 - 2);
  } else {
    const uint8_t six = e4m3_encode(float_of(amax) / 6.0f);
    if (kScales == Scales::six || is_nan) return six;
    const uint8_t four = e4m3_encode(float_of(amax) / 4.0f);
    return squared_error(x, six) <= squared_error(x, four) ? six : four;
  }
}

// Both codes as FP16 values, 2^-14 times what they mean; the first one in the low half.
__device__ uint32_t encode_pair(float even, float odd, float s) {
  const uint32_t signs = __byte_perm(bits_of(even), bits_of(odd), 0x7632) & 0x80008000u;
  return signs | magnitude_of(even, s) | magnitude_of(odd, s) << 16;
}

// Encodes the tile, multiplied by 2^exponent, into a record. With `keep_error` the tile then holds what the codes got
// wrong, squares[1] its squares; returns the largest |error| as bits.
template <Fp4Format kFormat, Scales kScales>
__device__ uint32_t encode_plane(const Tile& tile, const DeviceLayout& layout, int exponent, bool keep_error,
                                 uint8_t* record) {
  constexpr int kGroup = block_size(kFormat);
  const float up = pow2(exponent), down = pow2(-exponent);
  const auto code_place = [&](int depth, int lane) {
    return tile.is_v ? layout.v_code(lane, depth % kItemTokens) : layout.k_code(depth, lane % kItemTokens);
  };
  // A lane's half of a word: depths below 16, and above.
  const CodePlace quarter[2] = {code_place(0, threadIdx.x % 32), code_place(16, threadIdx.x % 32)};
  uint32_t largest = 0;
#pragma unroll 1
  for (int index = threadIdx.x / 32; index < 2 * tile.blocks(); index += kWarps) {
    const Column column(tile, index);
    uint8_t* const item = record + int64_t{index % 2} * layout.item_bytes;
    uint32_t words[8] = {};
    float x[kGroup], s = 0, squares = 0;
    uint32_t kept = 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float* const values = column.values + 16 * half * tile.stride;
      if (16 * half % kGroup == 0) {
        uint32_t amax = 0;
#pragma unroll
        for (int i = 0; i < kGroup; ++i) {
          x[i] = values[i * tile.stride] * up;
          amax = max(amax, abs_bits(x[i]));
        }
        const uint8_t scale = choose_scale<kFormat, kScales>(x, amax);
        s = decode_scale(kFormat, scale);
        kept = s > 0.0f && amax > 0 ? ~0u : 0u;  // else all codes are 0, without a sign
        squares = 0;
#pragma unroll
        for (int i = 0; i < kGroup; i += 16) {  // a scale of 32 stands twice
          const int depth = column.depth + 16 * half + i;
          item[tile.is_v ? layout.v_scale(column.lane, depth % kItemTokens)
                         : layout.k_scale(depth, column.lane % kItemTokens)] = scale;
        }
      }
#pragma unroll
      for (int i = 0; i < 16; i += 2) {
        const float even = x[(16 * half + i) % kGroup], odd = x[(16 * half + i + 1) % kGroup];
        const uint32_t pair = encode_pair(even, odd, s) & kept;
        words[i / 2] |=
            (pair & 0x0e000e00u) >> (9 - quarter[half].magnitude) | (pair & 0x80008000u) >> (15 - quarter[half].sign);
        if (!keep_error) continue;
        const auto error_of = [&](float value, float code) {
          const float error = (value - code * (s * 0x1p14f)) * down;  // a power of two moves no rounding
          squares += error * error;
          largest = max(largest, abs_bits(error));
          return error;
        };
        values[i * tile.stride] = error_of(even, low_half(pair));
        values[(i + 1) * tile.stride] = error_of(odd, high_half(pair));
      }
      if (keep_error && 16 * (half + 1) % kGroup == 0) tile.squares[1][column.group<kGroup>(tile, half)] = squares;
    }
    // Words 0-3 for the lower lane of two, 4-7 for the other: depths 2t, 2t + 1 and those 16 further, from 0 or from 8.
    const int upper = column.lane / 8 % 2;
    const int word = code_place(column.depth + 8 * upper, column.lane).word;
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      const uint32_t theirs = __shfl_xor_sync(~0u, upper ? words[t] : words[4 + t], 8);
      *reinterpret_cast<uint32_t*>(item + word + 16 * t) = (upper ? words[4 + t] : words[t]) | theirs;
    }
  }
  return largest;
}

// A full page in the tile into its records; each may be null, as in encode_page.
template <Fp4Format kFormat, Scales kScales>
__device__ void encode_page(const Tile& tile, const AppendParams& p, uint8_t* fp4, uint8_t* residual,
                            uint8_t* summary) {
  constexpr int kGroup = block_size(kFormat);
  const LayerCache& cache = p.cache;
  const int groups = tile.depth / kGroup * (tile.lanes / 16);
  uint32_t largest =
      tile.is_v ? measure<kGroup>(tile) : summarise(tile, cache.canonical, fp4 && cache.centring, summary);
  int8_t exponents[2] = {0, 0};
  uint8_t* const planes[2] = {fp4, residual};
#pragma unroll
  for (int plane = 0; plane < 2; ++plane) {
    if (!planes[plane]) break;
    const float amax = float_of(block_max(largest));
    const int exponent = p.page_scale ? page_exponent(amax, kFormat, kScales) : 0;
    exponents[plane] = static_cast<int8_t>(exponent);
    largest = encode_plane<kFormat, kScales>(tile, cache.layout, exponent, plane == 0, planes[plane]);
  }
  __syncthreads();

  auto* const facts = reinterpret_cast<PageSummary*>(summary);
  const int warp = threadIdx.x / 32;
  if (warp == 0) {
    const float eps = fp4 ? rms_over_tokens(tile.squares[1], groups) : 0.0f;
    if (threadIdx.x == 0) {
      (tile.is_v ? facts->eps_v : facts->eps_k) = eps;
      int8_t* const to = tile.is_v ? facts->v_exponent : facts->k_exponent;
      to[0] = exponents[0];
      to[1] = exponents[1];
    }
  }
  if (warp == 1 && tile.is_v) {
    const float norm = rms_over_tokens(tile.squares[0], groups);
    if (threadIdx.x == 32) facts->v_norm = norm;
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
  tile.squares[0] = tile.values + tile_floats(tile.depth, tile.lanes);
  tile.squares[1] = tile.squares[0] + group_floats(tile.depth, tile.lanes);

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
  if (const cudaError_t error = allow_shared_memory(reinterpret_cast<const void*>(kernel)); error != cudaSuccess)
    return error;
  const dim3 grid(2 * p.cache.h_kv, (p.max_s_q + kPageTokens - 2) / kPageTokens + 1, p.batch.b);
  kernel<<<grid, kThreads, bytes, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace thriftattn::cuda
