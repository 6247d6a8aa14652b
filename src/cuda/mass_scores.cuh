// What fp4_mass says of a page: the share of a row's softmax that its FP4 scores give it, in the mean over the rows of
// a head, the largest of a unit's heads. By one thread for some pages, from what attend has left.
#pragma once

#include "cuda/mma.cuh"
#include "cuda/params.h"

namespace thriftattn::cuda {

// A row's mass 2^x is the share (2^x-m) factor of its head; 0 for rows with NaN or Inf, whose sums are no numbers.
struct RowShare {
  float m, factor;
};

// Of all rows of a unit, [units, row_stride]: by the whole CTA, which then needs a barrier.
__device__ inline void load_row_shares(const float* state_ml, int rows, int s_q, RowShare* to) {
#pragma unroll 1
  for (int r = threadIdx.x; r < rows; r += blockDim.x) {
    int finite = 0;
#pragma unroll 1
    for (int i = r / s_q * s_q, end = i + s_q; i < end; ++i) {
      const float l = state_ml[4 * i + 1];
      finite += l == l;
    }
    const float l = state_ml[4 * r + 1], factor = 1 / (l * static_cast<float>(finite));
    to[r] = {state_ml[4 * r], factor > 0 && factor < INFINITY ? factor : 0.0f};
  }
}

// Of kPages pages at once, so that their loads are under way together. mass: of each, [parts, row_stride].
template <int kPages>
__device__ void mass_scores(const float* const (&mass)[kPages], int parts, int row_stride, const RowShare* row,
                            int rows, int s_q, float (&best)[kPages]) {
  float of_head[kPages] = {};
  int next_head = s_q;
#pragma unroll
  for (int k = 0; k < kPages; ++k) best[k] = 0;
#pragma unroll 1
  for (int r = 0; r < rows; r += 4) {
    float of_row[kPages][4] = {};
#pragma unroll 2
    for (int part = 0; part < parts; ++part)
#pragma unroll
      for (int k = 0; k < kPages; ++k) {
        const float4 x = *reinterpret_cast<const float4*>(mass[k] + part * row_stride + r);
        const float of_part[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
        for (int e = 0; e < 4; ++e)
          if (of_part[e] == of_part[e]) of_row[k][e] += exp2_fast(of_part[e] - row[r + e].m);
      }
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (r + e >= rows) break;
      const bool ends_head = r + e + 1 == next_head;
#pragma unroll
      for (int k = 0; k < kPages; ++k) {
        if (row[r + e].factor > 0) of_head[k] = fmaf(row[r + e].factor, of_row[k][e], of_head[k]);
        if (!ends_head) continue;
        best[k] = fmaxf(best[k], of_head[k]);
        of_head[k] = 0;
      }
      if (ends_head) next_head += s_q;
    }
  }
}

}  // namespace thriftattn::cuda
