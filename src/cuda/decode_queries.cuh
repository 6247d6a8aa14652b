// A unit's rows of q in shared memory, and their products with the means of the pages that a warp is about to read.
//
//   q --the CTA, once a unit--> a high plane in FP16, the B operand of all products, and a low one: what rounding left
//   k_mean of 16 pages, the A operand, x both planes --mma, planes added--> q_mean of 16 notes
//
// Both planes together have 22 bits of q, or what is above 2^-25 of it. The reader of a warp's items does this, 16
// items at a time, and not the feed that makes their notes: a feed may be a unit ahead of the rows that are staged.
#pragma once

#include <cstdint>

#include "cuda/decode_feed.cuh"
#include "cuda/mma.cuh"

namespace thriftattn::cuda {

// Elements i and i + 1.
__device__ inline float2 load_pair(const void* data, DType dtype, int64_t i) {
  if (dtype == DType::f32) return {static_cast<const float*>(data)[i], static_cast<const float*>(data)[i + 1]};
  const uint16_t* bits = static_cast<const uint16_t*>(data) + i;
  const uint32_t first = bits[0], second = bits[1];
  if (dtype == DType::bf16) return {float_of(first << 16), float_of(second << 16)};
  return unpack_half2(first | second << 16);
}

// Pairs of one row; rows that are read at once begin in different banks.
THRIFTATTN_HD constexpr int query_stride(int dk) { return dk / 2 + 4; }
THRIFTATTN_HD constexpr int queries_bytes(int columns, int dk) { return 2 * columns * query_stride(dk) * 4; }

// Pairs of halves, [N / 4][2 planes][4 rows][query_stride]: in tiles of 8 columns of B.
template <int N>
struct Queries {
  uint32_t* pairs;
  int dk;

  static constexpr int kTiles = N / 4;

  __device__ const uint32_t* column(int tile, int c) const { return pairs + (8 * tile + c) * query_stride(dk); }
  __device__ uint32_t* row(int r, int plane) const {
    return pairs + (r / 4 * 8 + plane * 4 + r % 4) * query_stride(dk);
  }

  // A tile of the unit's rows, zero where there is no row or channel. By the whole CTA.
  __device__ void load(const DecodeParams& p, const Unit& u) const {
#pragma unroll 1
    for (int i = threadIdx.x; i < N * (dk / 2); i += blockDim.x) {
      const int r = i / (dk / 2), pair = i % (dk / 2), unit_row = u.first_row + r;
      float2 x{0, 0};
      if (r < u.rows && 2 * pair < p.shape.d) {
        const int of_group = quotient_of_small(unit_row, u.s_q), head = u.head * p.shape.group + of_group;
        const int64_t token = u.first_token + unit_row - of_group * u.s_q;
        x = load_pair(p.q.data, p.q.dtype, token * p.q.row_stride + head * p.q.head_stride + 2 * pair);
      }
      // Inf too makes its row NaN; a larger finite number is the largest of 16 bit.
      x.x = fmaf(x.x, 0.0f, fminf(fmaxf(x.x, -65504.0f), 65504.0f));
      x.y = fmaf(x.y, 0.0f, fminf(fmaxf(x.y, -65504.0f), 65504.0f));
      const uint32_t high = pack_half2(x.x, x.y);
      const float2 rounded = unpack_half2(high);
      row(r, 0)[pair] = high;
      row(r, 1)[pair] = pack_half2(x.x - rounded.x, x.y - rounded.y);
    }
  }
};

// Fills q_mean of the kMeans notes from number `first` on, those that have a mean. By one warp.
template <int D, int N, bool kExact>
__device__ void put_means(const DecodeArgs& args, const Queries<N>& queries, Note<N>* notes, uint32_t first) {
  constexpr int kTiles = Queries<N>::kTiles, kAtOnce = 4;  // blocks of 32 channels whose loads are under way
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, d = kExact ? D : args.p.shape.d;
  const uint8_t* mean[2];  // of items g and g + 8
#pragma unroll
  for (int k = 0; k < 2; ++k) mean[k] = notes[(first + g + 8 * k) % kNotes].mean;
  if (!__any_sync(~0u, mean[0] != nullptr || mean[1] != nullptr)) return;
  float sums[kTiles][4] = {};
#pragma unroll 1
  for (int c0 = 0; c0 < queries.dk; c0 += 32 * kAtOnce) {
    uint4 a[kAtOnce][2];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const int c = c0 + 32 * i + 8 * t;
        a[i][k] = mean[k] != nullptr && (kExact || c < d) ? __ldg(reinterpret_cast<const uint4*>(mean[k] + 2 * c))
                                                          : uint4{0, 0, 0, 0};
      }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (!kExact && c0 + 32 * i >= queries.dk) break;
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        const uint4 b = *reinterpret_cast<const uint4*>(queries.column(tile, g) + (c0 + 32 * i + 8 * t) / 2);
        mma_16x8x16(sums[tile], a[i][0].x, a[i][1].x, a[i][0].y, a[i][1].y, b.x, b.y);
        mma_16x8x16(sums[tile], a[i][0].z, a[i][1].z, a[i][0].w, a[i][1].w, b.z, b.w);
      }
    }
  }
  // Lanes t and t ^ 2 hold both planes of rows 2 (t % 2) and on: t < 2 puts those of item g, the others of g + 8.
  const bool lower = t < 2;
  Note<N>& note = notes[(first + g + (lower ? 0 : 8)) % kNotes];
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    const float x =
        (lower ? sums[tile][0] : sums[tile][2]) + __shfl_xor_sync(~0u, lower ? sums[tile][2] : sums[tile][0], 2);
    const float y =
        (lower ? sums[tile][1] : sums[tile][3]) + __shfl_xor_sync(~0u, lower ? sums[tile][3] : sums[tile][1], 2);
    *reinterpret_cast<float2*>(note.q_mean + 4 * tile + 2 * (t % 2)) = {fmaf(x, args.score_scale, kGrid),
                                                                        fmaf(y, args.score_scale, kGrid)};
  }
  __syncwarp();
}

}  // namespace thriftattn::cuda
