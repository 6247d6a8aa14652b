// The end of a unit: states of warps to one of the CTA, states of CTAs to the rows' results.
//
//   warps: m, l -> shared -> common m -> o scaled -> shared -> summed
//   one CTA holds the whole unit:   -> results
//   several:                        -> partials in memory, a ticket; who draws the last one adds them all -> results
//
// All sums run in one order whoever does them, so results are the same bits every time. Results of a row are out and
// lse; or, for fp4_mass, its state; or, after an exchange, what that state becomes with what was exchanged.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "cuda/decode_rows.cuh"

namespace thriftattn::cuda {

struct RowSum {
  float m, l, l_high;
};

// Below this share of what a row's sum was, an exchange has taken out too much for floats to say what stays.
inline constexpr float kCancelled = 0x1p-10f;

// What the CTA that found it leaves in a unit's ticket.
__device__ inline int32_t cancelled_ticket(int cta) { return -1 - cta; }

// Shared memory of the merge, floats: sums [warps or CTAs][columns][3], totals [columns][3], weights [columns][2], o
// [warps][columns][row].
struct MergeLayout {
  int totals, weights, o, row, floats;
};
THRIFTATTN_HD constexpr MergeLayout merge_layout(int warps, int columns, int dv, int blocks) {
  MergeLayout l{};
  l.totals = (warps > blocks ? warps : blocks) * columns * 3;
  l.weights = l.totals + columns * 3;
  l.o = static_cast<int>(round_up(l.weights + columns * 2, 4));
  l.row = dv + 8;  // so that the four rows that lanes write at once fall into different banks
  l.floats = l.o + warps * columns * l.row;
  return l;
}

// A CTA's partial states, two of them: of the unit that was cut at its begin, and of the one cut at its end. Floats:
// o [columns][dv], then sums [columns][3]; a multiple of 4.
THRIFTATTN_HD constexpr int partial_floats(int columns, int dv) { return columns * dv + columns * 3; }

template <class Rows>
class Merge {
 public:
  __device__ Merge(const DecodeArgs& args, const MergeLayout& layout, float* shared)
      : args_(args), layout_(layout), shared_(shared) {}

  // By the whole CTA, which has read the items of a segment. Where an exchange cancelled, so that the unit's rows have
  // to be read again, the unit's ticket and the CTA's share say so.
  __device__ void finish(Rows& rows, const Segment& segment, Share& share) {
    const int warp = threadIdx.x / 32, columns = Rows::kColumns, dv = outputs();
    rows.add_lanes();
    if (rows.speaks_for_rows())
#pragma unroll
      for (int r = 0; r < Rows::kRows; ++r)
        sums()[warp * columns + rows.row(r)] = {rows.m[r], rows.l[r], rows.l_high[r]};
    __syncthreads();
    add_sums(blockDim.x / 32, [&](int i, int row) { return sums()[i * columns + row]; });
    __syncthreads();
    float factor[Rows::kRows];
#pragma unroll
    for (int r = 0; r < Rows::kRows; ++r) factor[r] = exp2_fast(rows.m[r] - totals()[rows.row(r)].m) * kCodeScale;
    float* own = o(warp);
    rows.each_output(
        [&](int r, int channel, float value) { own[rows.row(r) * row_stride() + channel] = value * factor[r]; });
    __syncthreads();

    const bool cut = segment.cut_begin || segment.cut_end;
    float* partial = cut ? partial_of(blockIdx.x, segment.cut_begin) : nullptr;
    bool cancelled = false;
    // Sums over warps; of a unit that was cut twice in its last CTA, where warps then hold sums over CTAs.
#pragma unroll 1
    while (true) {
      if (const int row = static_cast<int>(threadIdx.x - blockDim.x) + 32;  // the last warp has the least to add
          partial == nullptr && row >= 0 && row < segment.unit.rows)
        cancelled = finish_row(segment.unit, segment.pass, row);
#pragma unroll 1
      for (int i = 2 * threadIdx.x; i < columns * dv; i += 2 * blockDim.x) {
        float* from = o(0) + i / dv * row_stride() + i % dv;
        float2 sum = *reinterpret_cast<const float2*>(from);
#pragma unroll 4
        for (int w = 1; w < blockDim.x / 32; ++w) {
          const float2 x = *reinterpret_cast<const float2*>(from + w * columns * row_stride());
          sum.x += x.x, sum.y += x.y;
        }
        *reinterpret_cast<float2*>(partial == nullptr ? from : partial + i) = sum;
      }
      if (partial == nullptr) break;
      if (threadIdx.x < columns) reinterpret_cast<RowSum*>(partial + columns * dv)[threadIdx.x] = totals()[threadIdx.x];
      const int first = segment.cut_begin ? share.cta_of(items_begin(segment.unit, segment.begin)) : blockIdx.x;
      const int last = segment.cut_end ? share.cta_of(segment.next() - 1) : blockIdx.x;
      if (!draw_ticket(args_.p.tickets + segment.number, last - first + 1)) return;
      gather_partials(first, last - first + 1);
      partial = nullptr;
    }
    cancelled = __syncthreads_or(cancelled);
    write_rows(segment.unit, segment.pass);
    if (args_.p.promote == Promote::forced && threadIdx.x == 0) put_counts(segment.unit);
    if (cancelled && threadIdx.x == 0) {
      args_.p.tickets[segment.number] = cancelled_ticket(blockIdx.x);
      share.cancelled_end = segment.number + 1;
    }
    __syncthreads();
  }

 private:
  __device__ int outputs() const {  // channels of V, a constant where the rows are made for it
    if constexpr (Rows::kExactSize) return Rows::kMaxOutputs / Rows::kColumns;
    return layout_.row - 8;
  }
  __device__ int row_stride() const { return outputs() + 8; }
  __device__ RowSum* sums() const { return reinterpret_cast<RowSum*>(shared_); }
  __device__ RowSum* totals() const { return reinterpret_cast<RowSum*>(shared_ + layout_.totals); }
  __device__ float* weights() const { return shared_ + layout_.weights; }
  __device__ float* o(int warp) const { return shared_ + layout_.o + warp * Rows::kColumns * row_stride(); }

  // totals of n sums, a warp for each row.
  template <class Sum>
  __device__ void add_sums(int n, const Sum& sum_of) const {
    const int lane = threadIdx.x % 32, columns = Rows::kColumns;
#pragma unroll 1
    for (int row = threadIdx.x / 32; row < columns; row += blockDim.x / 32) {
      RowSum sum{kNothing, 0, 0};
#pragma unroll 1
      for (int i = lane; i < n; i += 32) {
        const RowSum x = sum_of(i, row);
        sums()[i * columns + row] = x;
        sum.m = fmaxf(sum.m, x.m);
      }
#pragma unroll
      for (int step = 1; step < 32; step *= 2) sum.m = fmaxf(sum.m, __shfl_xor_sync(~0u, sum.m, step));
#pragma unroll 1
      for (int i = lane; i < n; i += 32) {
        const RowSum x = sums()[i * columns + row];
        const float factor = exp2_fast(x.m - sum.m);
        sum.l += factor * x.l;
        sum.l_high += factor * x.l_high;
      }
#pragma unroll
      for (int step = 1; step < 32; step *= 2) {
        sum.l += __shfl_xor_sync(~0u, sum.l, step);
        sum.l_high += __shfl_xor_sync(~0u, sum.l_high, step);
      }
      if (lane == 0) totals()[row] = sum;
    }
  }

  __device__ float* partial_of(int cta, bool at_begin) const {
    return static_cast<float*>(args_.p.partials) +
           (int64_t{2} * cta + (at_begin ? 0 : 1)) * partial_floats(Rows::kColumns, outputs());
  }

  // True in the CTA that is the last of `ctas` to come. It sees what the others wrote before they came.
  __device__ static bool draw_ticket(int32_t* ticket, int ctas) {
    __syncthreads();
    bool is_last = false;
    if (threadIdx.x == 0) {
      int before;
      asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], 1;" : "=r"(before) : "l"(ticket) : "memory");
      is_last = before == ctas - 1;
      if (is_last) *ticket = 0;
    }
    return __syncthreads_or(is_last);
  }

  // The partials of a unit that lies in `ctas` CTAs from `first`: totals of their sums, and to each warp's o the sum of
  // every warps-th of theirs.
  __device__ void gather_partials(int first, int ctas) const {
    const int columns = Rows::kColumns, dv = outputs(), warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const auto partial = [&](int i) { return partial_of(first + i, i > 0); };
    // A lane has 4 channels at [128 c + 4 lane] of [columns][dv]. The loads of a warp's first partial are under way
    // while the totals are made, those of the next while one is added.
    constexpr int kLoads = Rows::kMaxOutputs / 128;
    const auto at = [&](int c) { return 128 * c + 4 * static_cast<int>(threadIdx.x % 32); };
    float4 x[kLoads] = {};
    const auto load = [&](int i) {
#pragma unroll
      for (int c = 0; c < kLoads; ++c)
        if (i < ctas && at(c) < columns * dv) x[c] = __ldcg(reinterpret_cast<const float4*>(partial(i) + at(c)));
    };
    load(warp);
    add_sums(ctas, [&](int i, int row) -> RowSum {
      const RowSum* from = reinterpret_cast<const RowSum*>(partial(i) + columns * dv) + row;
      return {__ldcg(&from->m), __ldcg(&from->l), __ldcg(&from->l_high)};
    });
    __syncthreads();
    float4 sum[kLoads] = {};
#pragma unroll 1
    for (int i = warp; i < ctas; i += warps) {
      float4 now[kLoads];
#pragma unroll
      for (int c = 0; c < kLoads; ++c) now[c] = x[c];
      load(i + warps);
#pragma unroll
      for (int c = 0; c < kLoads; ++c) {
        if (at(c) >= columns * dv) break;
        const float factor = exp2_fast(sums()[i * columns + at(c) / dv].m - totals()[at(c) / dv].m);
        sum[c].x += factor * now[c].x, sum[c].y += factor * now[c].y;
        sum[c].z += factor * now[c].z, sum[c].w += factor * now[c].w;
      }
    }
#pragma unroll
    for (int c = 0; c < kLoads; ++c)
      if (at(c) < columns * dv) *reinterpret_cast<float4*>(o(warp) + at(c) / dv * row_stride() + at(c) % dv) = sum[c];
    __syncthreads();
  }

  // What can be said of forced pages afterwards, of which there is no list.
  __device__ void put_counts(const Unit& unit) const {
    const DecodeParams& p = args_.p;
    int4* counts = reinterpret_cast<int4*>(p.lists.counts + int64_t{8} * unit.index);
    counts[0] = {unit.promoted, unit.fp16, unit.fp4x2, 0};
    counts[1] = {0, unit.forced_without_high() - unit.fp4x2, p.cache.released[unit.slot], 0};
  }

  // From o(0), the unit's sums, to what is wanted of them, after finish_row of every row.
  __device__ void write_rows(const Unit& unit, Pass pass) const {
    const DecodeParams& p = args_.p;
    const bool to_state = pass == Pass::attend && p.state_ml != nullptr;
    const int dv = outputs();
#pragma unroll 1
    for (int i = 2 * threadIdx.x; i < unit.rows * dv; i += 2 * blockDim.x) {
      const int row = i / dv, channel = i % dv;
      if (channel >= p.shape.d_v && !to_state) continue;
      const RowPlace at = place(unit, row);
      float2 value = *reinterpret_cast<const float2*>(o(0) + row * row_stride() + channel);
      value.x *= weights()[2 * row], value.y *= weights()[2 * row];
      float2* state = reinterpret_cast<float2*>(p.state_o + at.state * dv + channel);
      if (pass == Pass::exchange) {
        const float2 before = *state;
        value.x += weights()[2 * row + 1] * before.x, value.y += weights()[2 * row + 1] * before.y;
      }
      if (to_state) {
        *state = value;
      } else {
        const int64_t to = at.token * p.out.row_stride + at.head * p.out.head_stride + channel;
        store(p.out, to, value.x);
        store(p.out, to + 1, value.y);
      }
    }
  }

  // By one thread: what the row's o is multiplied by, weights()[2 row], and what the o of its state before an exchange
  // is, [2 row + 1]; and the results that are no vectors. True where an exchange cancelled.
  __device__ bool finish_row(const Unit& unit, Pass pass, int row) const {
    const DecodeParams& p = args_.p;
    const RowPlace at = place(unit, row);
    RowSum sum = totals()[row];
    float* state = p.state_ml + 4 * at.state;
    float factor = 1, factor_before = 0;
    const auto join = [&](float m, float l, float l_high) {  // the factor of what joins
      const float next = fmaxf(sum.m, m), other = exp2_fast(m - next), own = exp2_fast(sum.m - next);
      sum = {next, sum.l * own + l * other, sum.l_high * own + l_high * other};
      factor *= own;
      return other;
    };
    bool cancelled = false;
    if (pass == Pass::exchange) {
      factor_before = join(state[0], state[1], state[2]);
      cancelled = sum.l < kCancelled * factor_before * state[1];
    } else if (p.sinks != nullptr) {
      join(p.sinks[at.head] * kLog2E, 1, 1);
    }
    if (pass == Pass::attend && p.state_ml != nullptr) {
      state[0] = sum.m, state[1] = sum.l, state[2] = sum.l_high, state[3] = 0;
    } else {
      const float inverse = sum.l == 0 ? 0 : reciprocal_fast(sum.l);
      factor *= inverse;
      factor_before *= inverse;
      if (p.lse != nullptr)
        p.lse[at.token * p.shape.h_q + at.head] = sum.l == 0 ? -INFINITY : (sum.m + log2f(sum.l)) * 0.6931471805599453f;
      if (p.row_mass_high != nullptr) p.row_mass_high[at.state] = sum.l_high * inverse;
    }
    weights()[2 * row] = factor;
    weights()[2 * row + 1] = factor_before;
    return cancelled;
  }

  struct RowPlace {
    int64_t token, state;  // row of out and lse; row of states
    int head;              // query head
  };
  __device__ RowPlace place(const Unit& unit, int row) const {
    const int unit_row = unit.first_row + row, of_group = quotient_of_small(unit_row, unit.s_q);
    return {unit.first_token + unit_row - of_group * unit.s_q, int64_t{unit.index} * args_.p.row_stride + unit_row,
            unit.head * args_.p.shape.group + of_group};
  }

  __device__ static void store(const thriftattn::cuda::Rows<void*>& out, int64_t i, float value) {
    if (out.dtype == DType::f32)
      static_cast<float*>(out.data)[i] = value;
    else if (out.dtype == DType::f16)
      static_cast<__half*>(out.data)[i] = __float2half_rn(value);
    else
      static_cast<__nv_bfloat16*>(out.data)[i] = __float2bfloat16_rn(value);
  }

  const DecodeArgs& args_;
  const MergeLayout layout_;
  float* shared_;
};

}  // namespace thriftattn::cuda
