// What fp4_mass says of a page: the share of a row's softmax that its FP4 scores give it, in the mean over the rows of
// a head, the largest of a unit's heads. By one thread for a page, from what attend has left.
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

// mass: of the page, [parts, row_stride].
__device__ inline float mass_score(const float* mass, int parts, int row_stride, const RowShare* row, int rows,
                                   int s_q) {
  float of_head = 0, best = 0;
  int next_head = s_q;
#pragma unroll 1
  for (int r = 0; r < rows; r += 4) {
    float of_row[4] = {};
#pragma unroll 2
    for (int part = 0; part < parts; ++part) {
      const float4 x = *reinterpret_cast<const float4*>(mass + part * row_stride + r);
      const float of_part[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
      for (int e = 0; e < 4; ++e)
        if (of_part[e] == of_part[e]) of_row[e] += exp2_fast(of_part[e] - row[r + e].m);
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (r + e >= rows) break;
      if (row[r + e].factor > 0) of_head = fmaf(row[r + e].factor, of_row[e], of_head);
      if (r + e + 1 != next_head) continue;
      best = fmaxf(best, of_head);
      of_head = 0;
      next_head += s_q;
    }
  }
  return best;
}

}  // namespace thriftattn::cuda
