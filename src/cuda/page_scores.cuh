// Products of query rows with the summaries of pages, by one CTA: rows wait in shared memory, summaries come from
// global memory once for every batch of rows.
//
//   q -> RowInWarp -> Planes: two FP16 planes, which together have 22 bits of a row -> for_each_mean_product -> sums
//                  -> Tile: floats                                                 -> for_each_product      -> sums
//
// q . k_mean is what every centred step needs of every row, so it runs on tensor cores: 16 pages, 4 rows in both planes
// and 16 channels at a time, 8 instructions for 128 channels where FMAs would be 256. `quest` and `second_moment` need
// other products, of mean rows alone: FMAs, 8 lanes a page. Either way a warp has many loads under way; DRAM binds, or
// its latency where there are few pages.
#pragma once

#include <cuda_fp16.h>

#include "cuda/choose.cuh"
#include "cuda/mma.cuh"

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
  __device__ void load(const Tile<kSteps>& tile, int row) {
#pragma unroll
    for (int i = 0; i < 2 * kSteps; ++i) x[i] = tile.at(row, channel(i));
  }
  __device__ static int channel(int i) { return lane_id() + 32 * i; }
  // Whether the row is free of NaN and Inf; the same in all lanes.
  __device__ bool finite() const {
    bool all = true;
#pragma unroll
    for (int i = 0; i < 2 * kSteps; ++i) all &= (bits_of(x[i]) & 0x7f800000u) != 0x7f800000u;
    return __all_sync(kAll, all);
  }
  __device__ void clear() {
#pragma unroll
    for (float& value : x) value = 0;
  }
  __device__ void add(const RowInWarp& other) {
#pragma unroll
    for (int i = 0; i < 2 * kSteps; ++i) x[i] += other.x[i];
  }
  __device__ void divide(float by) {
#pragma unroll
    for (float& value : x) value /= by;
  }
  __device__ float norm() const {
    float sum = 0;
#pragma unroll
    for (float value : x) sum = fmaf(value, value, sum);
    for (int i = 16; i > 0; i /= 2) sum += __shfl_xor_sync(kAll, sum, i);
    return sqrtf(sum);
  }
};

// Rows in shared memory for the B operand, in tiles of 8 columns: 4 rows, each times a power of two that brings its
// largest element to [2^8, 2^9), rounded to FP16, and the same 4 rows' remainders. A row's stride keeps the reads of
// 8 lanes apart.
template <int kSteps>
struct Planes {
  static constexpr int kStride = 64 * kSteps + 32;
  __half* q;

  static constexpr int bytes(int rows) { return (rows + 3) / 4 * 8 * kStride * 2; }
  // Returns by what products of the row must be multiplied.
  __device__ float write(int row, const RowInWarp<kSteps>& from) const {
    uint32_t largest = 0;
#pragma unroll
    for (float x : from.x) largest = max(largest, bits_of(x) & 0x7fffffffu);
    const int exponent = static_cast<int>(__reduce_max_sync(kAll, largest) >> 23) - 127;
    const float up = pow2(min(8 - exponent, 120));
    __half* high = q + (row / 4 * 8 + row % 4) * kStride;
#pragma unroll
    for (int i = 0; i < 2 * kSteps; ++i) {
      const float x = from.x[i] * up;
      const __half rounded = __float2half_rn(x);
      high[from.channel(i)] = rounded;
      high[4 * kStride + from.channel(i)] = __float2half_rn(x - __half2float(rounded));
    }
    return 1.0f / up;
  }
};

// --- products

__device__ inline float4 floats_of(uint2 halves) {
  const float2 a = __half22float2(*reinterpret_cast<const __half2*>(&halves.x));
  const float2 b = __half22float2(*reinterpret_cast<const __half2*>(&halves.y));
  return {a.x, a.y, b.x, b.y};
}
__device__ inline uint2 half_of(const uint4& x, int half) { return half ? uint2{x.z, x.w} : uint2{x.x, x.y}; }

// What a policy sums over channels, before sm_scale. load() reads the lane's 8 channels from `c` on of a record,
// part() prepares 4 of them, add() is one channel of one row.
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

// Both functions go through pages with all warps of the CTA: emit(page, row, sum) for every row of a page, then
// done(page). Both are called in all lanes, with the lane's page and row, which may lie beyond the last ones.
// prepare(), called once by all threads, brings the rows while the first summaries are under way.

// Sums over k_mean, 16 pages a warp. A page belongs to the lanes of one g = lane / 4 with the same t / 2, t = lane % 4.
template <int kSteps, class Prepare, class Emit, class Done>
__device__ void for_each_mean_product(const Summaries& summaries, const PageLayout& layout, const PageChunks& pages,
                                      Planes<kSteps> planes, int rows, const Prepare& prepare, const Emit& emit,
                                      const Done& done) {
  const int of_warp = warp_id() * 16, at_once = static_cast<int>(blockDim.x) / 2;
  const int g = lane_id() / 4, t = lane_id() % 4;
  bool prepared = false;
  for (int start = pages.first; start < pages.end || !prepared; start += pages.stride)
    for (int p0 = start + of_warp; p0 < min(pages.end, start + pages.chunk) || !prepared; p0 += at_once) {
      int id[2];
      uint4 mean[2][2 * kSteps];  // channels 32 i + 8 t and on, of pages g and g + 8
#pragma unroll
      for (int k = 0; k < 2; ++k) id[k] = p0 + g + 8 * k < pages.end ? summaries.table[p0 + g + 8 * k] : -1;
#pragma unroll
      for (int k = 0; k < 2; ++k)
#pragma unroll
        for (int i = 0; i < 2 * kSteps; ++i) {
          const int c = 32 * i + 8 * t;
          mean[k][i] = {};
          if (id[k] >= 0 && c < layout.d)
            mean[k][i] = *reinterpret_cast<const uint4*>(summaries.record(id[k]) + layout.mean + 2 * c);
        }
      if (!prepared) prepare();
      prepared = true;
      const int page = p0 + g + t / 2 * 8;
#pragma unroll 1
      for (int row = 0; row < rows; row += 4) {
        float sum[4] = {};
        const __half* q = planes.q + (2 * row + g) * planes.kStride + 8 * t;
#pragma unroll
        for (int i = 0; i < 2 * kSteps; ++i) {
          const uint4 b = *reinterpret_cast<const uint4*>(q + 32 * i);
          mma_16x8x16(sum, mean[0][i].x, mean[1][i].x, mean[0][i].y, mean[1][i].y, b.x, b.y);
          mma_16x8x16(sum, mean[0][i].z, mean[1][i].z, mean[0][i].w, mean[1][i].w, b.z, b.w);
        }
#pragma unroll
        for (float& x : sum) x += __shfl_xor_sync(kAll, x, 2);  // both planes
        emit(page, row + 2 * (t % 2), t < 2 ? sum[0] : sum[2]);
        emit(page, row + 2 * (t % 2) + 1, t < 2 ? sum[1] : sum[3]);
      }
      done(page);
    }
}

// Sums of another product, 4 pages a warp: a page belongs to 8 lanes, pairs of which get the same row.
template <class Product, int kSteps, class Prepare, class Emit, class Done>
__device__ void for_each_product(const Summaries& summaries, const PageLayout& layout, float sm_scale,
                                 const PageChunks& pages, Tile<kSteps> tile, int rows, const Prepare& prepare,
                                 const Emit& emit, const Done& done) {
  const int of_warp = warp_id() * 4, at_once = static_cast<int>(blockDim.x) / 8;
  bool prepared = false;
  for (int start = pages.first; start < pages.end || !prepared; start += pages.stride)
    for (int p0 = start + of_warp; p0 < min(pages.end, start + pages.chunk) || !prepared; p0 += at_once) {
      const int page = p0 + lane_id() / 8, id = page < pages.end ? summaries.table[page] : -1;
      Product x[kSteps];
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        const int c = 64 * step + lane_id() % 8 * 8;
        if (id >= 0 && c < layout.d)
          x[step].load(summaries.record(id), layout, c);
        else
          x[step].clear();
      }
      if (!prepared) prepare();
      prepared = true;
#pragma unroll 1
      for (int row = 0; row < rows; row += 4) {
        float sum[4] = {};
#pragma unroll
        for (int step = 0; step < kSteps; ++step)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const typename Product::Part part = x[step].part(half, sm_scale);
#pragma unroll
            for (int r = 0; r < 4; ++r) {
              const float4 q = tile.four(row + r, step, half);
              sum[r] = Product::add(sum[r], q.x, part, 0);
              sum[r] = Product::add(sum[r], q.y, part, 1);
              sum[r] = Product::add(sum[r], q.z, part, 2);
              sum[r] = Product::add(sum[r], q.w, part, 3);
            }
          }
        emit(page, row + lane_id() / 2 % 4, reduce_four(sum));
      }
      done(page);
    }
}

}  // namespace thriftattn::cuda
