// Products of query rows with the summaries of pages, by one CTA: rows wait in shared memory in float, summaries come
// from global memory once for every tile of rows.
//
//   q --RowInWarp--> Tile [rows, d]
//   summaries: 8 lanes a page, 8 channels of 64 a lane --Product--> sums of 4 rows at a time --reduce_four--> emit
//
// A warp has 4 kPages pages at once, all loads of which are under way together: DRAM binds, or its latency where there
// are few pages. An FMA for each row and channel, a conversion for each channel and 4 rows.
#pragma once

#include <cuda_fp16.h>

#include "cuda/choose.cuh"

namespace thriftattn::cuda {

// --- rows

// Rows in shared memory, 64 kSteps channels each, those beyond d zero. Channels stand so that 8 lanes, each with 8
// channels of 64, read 128 bytes without a conflict.
template <int kSteps>
struct Tile {
  static constexpr int kStride = 64 * kSteps;
  float* q;

  __device__ float& at(int row, int c) const {
    return q[row * kStride + c / 64 * 64 + c % 8 / 4 * 32 + c % 64 / 8 * 4 + c % 4];
  }
  // Four channels of the lane: half `half` of its 8 in the 64 channels from 64 step on.
  __device__ float4 four(int row, int step, int half) const {
    return *reinterpret_cast<const float4*>(q + row * kStride + step * 64 + half * 32 + lane_id() % 8 * 4);
  }
};

// A row's channels in the registers of a warp: lane + 32 i.
template <int kSteps>
struct RowInWarp {
  float x[2 * kSteps];

  __device__ void load(const Rows<const void*>& q, int64_t row, int head, int d) {
    const int64_t at = row * q.row_stride + head * q.head_stride;
    if (q.dtype == DType::f32) {
#pragma unroll
      for (int i = 0; i < 2 * kSteps; ++i)
        x[i] = channel(i) < d ? static_cast<const float*>(q.data)[at + channel(i)] : 0;
      return;
    }
    uint16_t bits[2 * kSteps];  // all loads under way before the first is used
#pragma unroll
    for (int i = 0; i < 2 * kSteps; ++i)
      bits[i] = channel(i) < d ? static_cast<const uint16_t*>(q.data)[at + channel(i)] : 0;
#pragma unroll
    for (int i = 0; i < 2 * kSteps; ++i)
      x[i] = q.dtype == DType::f16 ? __half2float(__ushort_as_half(bits[i])) : bf16_decode(bits[i]);
  }
  __device__ static int channel(int i) { return lane_id() + 32 * i; }
  // Whether the row is free of NaN and Inf; the same in all lanes.
  __device__ bool finite() const {
    bool all = true;
#pragma unroll
    for (int i = 0; i < 2 * kSteps; ++i) all &= (bits_of(x[i]) & 0x7f800000u) != 0x7f800000u;
    return __all_sync(kAll, all);
  }
};

// The norm of row `row` of a tile; the same in all lanes of the warp.
template <int kSteps>
__device__ float row_norm(const Tile<kSteps>& tile, int row) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < 2 * kSteps; ++i) {
    const float x = tile.q[row * Tile<kSteps>::kStride + lane_id() + 32 * i];
    sum = fmaf(x, x, sum);
  }
  for (int i = 16; i > 0; i /= 2) sum += __shfl_xor_sync(kAll, sum, i);
  return sqrtf(sum);
}

// --- products

__device__ inline float4 floats_of(uint2 halves) {
  const float2 a = __half22float2(*reinterpret_cast<const __half2*>(&halves.x));
  const float2 b = __half22float2(*reinterpret_cast<const __half2*>(&halves.y));
  return {a.x, a.y, b.x, b.y};
}
__device__ inline uint2 half_of(const uint4& x, int half) { return half ? uint2{x.z, x.w} : uint2{x.x, x.y}; }

// What a policy sums over channels, before sm_scale. load() reads the lane's 8 channels from `c` on of a record,
// part() prepares 4 of them, add() is one channel of one row.
struct MeanProduct {
  uint4 mean;
  struct Part {
    float mean[4];
  };

  __device__ void load(const uint8_t* record, const PageLayout& layout, int c) {
    mean = *reinterpret_cast<const uint4*>(record + layout.mean + 2 * c);
  }
  __device__ void clear() { mean = {}; }
  __device__ Part part(int half, float) const {
    const float4 m = floats_of(half_of(mean, half));
    return {{m.x, m.y, m.z, m.w}};
  }
  __device__ static float add(float sum, float q, const Part& p, int i) { return fmaf(q, p.mean[i], sum); }
};

struct QuestProduct {
  uint4 low, high;
  struct Part {
    float low[4], high[4];
  };

  __device__ void load(const uint8_t* record, const PageLayout& layout, int c) {
    low = *reinterpret_cast<const uint4*>(record + layout.min + 2 * c);
    high = *reinterpret_cast<const uint4*>(record + layout.max + 2 * c);
  }
  __device__ void clear() { low = high = {}; }
  __device__ Part part(int half, float) const {
    const float4 a = floats_of(half_of(low, half)), b = floats_of(half_of(high, half));
    return {{a.x, a.y, a.z, a.w}, {b.x, b.y, b.z, b.w}};
  }
  __device__ static float add(float sum, float q, const Part& p, int i) {
    return sum + fmaxf(q * p.low[i], q * p.high[i]);
  }
};

// q mean + sm_scale / 2 q^2 variance.
struct MomentProduct {
  uint4 mean;
  float4 variance[2];
  struct Part {
    float mean[4], variance[4];
  };

  __device__ void load(const uint8_t* record, const PageLayout& layout, int c) {
    mean = *reinterpret_cast<const uint4*>(record + layout.mean + 2 * c);
    for (int i = 0; i < 2; ++i)
      variance[i] = *reinterpret_cast<const float4*>(record + layout.variance + 4 * c + 16 * i);
  }
  __device__ void clear() {
    mean = {};
    variance[0] = variance[1] = {};
  }
  __device__ Part part(int half, float sm_scale) const {
    const float4 m = floats_of(half_of(mean, half));
    const float4& v = variance[half];
    const float h = 0.5f * sm_scale;
    return {{m.x, m.y, m.z, m.w}, {h * v.x, h * v.y, h * v.z, h * v.w}};
  }
  __device__ static float add(float sum, float q, const Part& p, int i) {
    return fmaf(q, fmaf(q, p.variance[i], p.mean[i]), sum);
  }
};

// Sums four values over 8 lanes; the lane gets that of row lane / 2 % 4.
__device__ inline float reduce_four(const float (&x)[4]) {
  const bool upper = lane_id() & 4, odd = lane_id() & 2;
  const float a = (upper ? x[2] : x[0]) + __shfl_xor_sync(kAll, upper ? x[0] : x[2], 4);
  const float b = (upper ? x[3] : x[1]) + __shfl_xor_sync(kAll, upper ? x[1] : x[3], 4);
  const float sum = (odd ? b : a) + __shfl_xor_sync(kAll, odd ? a : b, 2);
  return sum + __shfl_xor_sync(kAll, sum, 1);
}

// The pages [first, first + chunk), [first + stride, first + stride + chunk), ... before `end`.
struct PageChunks {
  int first, end, chunk, stride;
};

// Goes through pages with all warps of the CTA: emit(k, page, row, sum) for every row of a page, then done(k, page).
// Both are called in all lanes, with the lane's page and row, which may lie beyond the last ones; a page belongs to 8
// lanes, and pairs of them get the same row. k < kPages counts the pages that a lane has at once. prepare(), called
// once by all threads, brings the tile's rows while the first summaries are under way.
template <class Product, int kPages, int kSteps, class Prepare, class Emit, class Done>
__device__ void for_each_product(const Summaries& summaries, const PageLayout& layout, float sm_scale,
                                 const PageChunks& pages, Tile<kSteps> tile, int rows, const Prepare& prepare,
                                 const Emit& emit, const Done& done) {
  const int of_warp = warp_id() * 4 * kPages, at_once = static_cast<int>(blockDim.x) / 32 * 4 * kPages;
  bool prepared = false;
  for (int start = pages.first; start < pages.end || !prepared; start += pages.stride)
    for (int p0 = start + of_warp; p0 < min(pages.end, start + pages.chunk) || !prepared; p0 += at_once) {
      int page[kPages], id[kPages];
      Product x[kPages][kSteps];
#pragma unroll
      for (int k = 0; k < kPages; ++k) {
        page[k] = p0 + 4 * k + lane_id() / 8;
        id[k] = page[k] < pages.end ? summaries.table[page[k]] : -1;
      }
#pragma unroll
      for (int k = 0; k < kPages; ++k)
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
          const int c = 64 * step + lane_id() % 8 * 8;
          if (id[k] >= 0 && c < layout.d)
            x[k][step].load(summaries.record(id[k]), layout, c);
          else
            x[k][step].clear();
        }
      if (!prepared) prepare();
      prepared = true;
      for (int row = 0; row < rows; row += 4) {
        float sum[kPages][4] = {};
#pragma unroll
        for (int step = 0; step < kSteps; ++step)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            float4 q[4];
#pragma unroll
            for (int r = 0; r < 4; ++r) q[r] = tile.four(row + r, step, half);
#pragma unroll
            for (int k = 0; k < kPages; ++k) {
              const typename Product::Part part = x[k][step].part(half, sm_scale);
#pragma unroll
              for (int r = 0; r < 4; ++r) {
                sum[k][r] = Product::add(sum[k][r], q[r].x, part, 0);
                sum[k][r] = Product::add(sum[k][r], q[r].y, part, 1);
                sum[k][r] = Product::add(sum[k][r], q[r].z, part, 2);
                sum[k][r] = Product::add(sum[k][r], q[r].w, part, 3);
              }
            }
          }
#pragma unroll
        for (int k = 0; k < kPages; ++k) emit(k, page[k], row + lane_id() / 2 % 4, reduce_four(sum[k]));
      }
#pragma unroll
      for (int k = 0; k < kPages; ++k) done(k, page[k]);
    }
}

}  // namespace thriftattn::cuda
