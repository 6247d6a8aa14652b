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

// Shared memory of the merge, floats: sums [warps][columns][3], totals [columns][3], weights [columns][2], factors
// [CTAs][columns], o [warps][columns][row].
struct MergeLayout {
  int totals, weights, factors, o, row, floats;
};
THRIFTATTN_HD constexpr MergeLayout merge_layout(int warps, int columns, int dv, int blocks) {
  MergeLayout l{};
  l.totals = warps * columns * 3;
  l.weights = l.totals + columns * 3;
  l.factors = l.weights + columns * 2;
  l.o = l.factors + blocks * columns;
  l.row = dv + 8;  // so that the four rows that lanes write at once fall into different banks
  l.floats = l.o + warps * columns * l.row;
  return l;
}

// A CTA's partial states, two of them: of the unit that was cut at its begin, and of the one cut at its end. Floats:
// sums [columns][3], then o [columns][dv].
THRIFTATTN_HD constexpr int partial_floats(int columns, int dv) { return columns * 3 + columns * dv; }

template <class Rows>
class Merge {
 public:
  __device__ Merge(const DecodeArgs& args, const MergeLayout& layout, float* shared)
      : args_(args), layout_(layout), shared_(shared), dv_(args.p.cache.layout.dv) {}

  // By the whole CTA, which has read the items of a segment. True where an exchange cancelled and the unit's rows have
  // to be read again.
  __device__ bool finish(Rows& rows, const Segment& segment, const Share& share) {
    RowSum* sums = reinterpret_cast<RowSum*>(shared_);
    const int warp = threadIdx.x / 32, warps = blockDim.x / 32, columns = args_.columns;
    rows.add_lanes();
    if (rows.speaks_for_rows())
#pragma unroll
      for (int r = 0; r < Rows::kRows; ++r) sums[warp * columns + rows.row(r)] = {rows.m[r], rows.l[r], rows.l_high[r]};
    __syncthreads();

    float factor[Rows::kRows];
#pragma unroll
    for (int r = 0; r < Rows::kRows; ++r) {
      float m = kNothing;
#pragma unroll 4
      for (int w = 0; w < warps; ++w) m = fmaxf(m, sums[w * columns + rows.row(r)].m);
      factor[r] = exp2_fast(rows.m[r] - m) * kCodeScale;
    }
    float* o = shared_ + layout_.o;
    rows.each_output(dv_, [&](int r, int channel, float value) {
      o[(warp * columns + rows.row(r)) * layout_.row + channel] = value * factor[r];
    });
    if (threadIdx.x < columns)
      totals()[threadIdx.x] = add_sums(warps, [&](int w) { return sums[w * columns + threadIdx.x]; });
    __syncthreads();

    const bool cut = segment.cut_begin || segment.cut_end;
    float* partial = cut ? partial_of(blockIdx.x, segment.cut_begin) : nullptr;
#pragma unroll 1
    for (int i = threadIdx.x; i < columns * dv_; i += blockDim.x) {
      float& at = output(i);
      float sum = at;
#pragma unroll 4
      for (int w = 1; w < warps; ++w) sum += (&at)[w * columns * layout_.row];
      (cut ? partial[3 * columns + i] : at) = sum;
    }
    bool last_to_come = true;
    if (cut) {
      const int first = segment.cut_begin ? share.cta_of(segment.begin) : blockIdx.x;
      const int last = segment.cut_end ? share.cta_of(segment.next() - 1) : blockIdx.x;
      if (threadIdx.x < columns) reinterpret_cast<RowSum*>(partial)[threadIdx.x] = totals()[threadIdx.x];
      last_to_come = draw_ticket(args_.p.tickets + segment.number, last - first + 1);
      if (last_to_come) add_partials(first, last - first + 1);
    }
    return last_to_come && write_results(segment.unit, segment.pass, segment.number);
  }

 private:
  __device__ RowSum* totals() const { return reinterpret_cast<RowSum*>(shared_ + layout_.totals); }
  __device__ float* weights() const { return shared_ + layout_.weights; }
  // Of row i / dv, channel i % dv. The same thread has it from the sum of warps to the result.
  __device__ float& output(int i) const { return shared_[layout_.o + i / dv_ * layout_.row + i % dv_]; }

  template <class At>
  __device__ static RowSum add_sums(int n, const At& at) {
    RowSum sum{kNothing, 0, 0};
#pragma unroll 4
    for (int i = 0; i < n; ++i) sum.m = fmaxf(sum.m, at(i).m);
#pragma unroll 4
    for (int i = 0; i < n; ++i) {
      const RowSum x = at(i);
      const float factor = exp2_fast(x.m - sum.m);
      sum.l += factor * x.l;
      sum.l_high += factor * x.l_high;
    }
    return sum;
  }

  __device__ float* partial_of(int cta, bool at_begin) const {
    return static_cast<float*>(args_.p.partials) +
           (int64_t{2} * cta + (at_begin ? 0 : 1)) * partial_floats(args_.columns, dv_);
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

  // The partials of a unit that lies in `ctas` CTAs from `first`, into totals and outputs.
  __device__ void add_partials(int first, int ctas) {
    const int columns = args_.columns, lane = threadIdx.x % 32;
    float* factors = shared_ + layout_.factors;
    const auto sum_of = [&](int i, int row) {
      return load_sum(reinterpret_cast<const RowSum*>(partial_of(first + i, i > 0)) + row);
    };
#pragma unroll 1
    for (int row = threadIdx.x / 32; row < columns; row += blockDim.x / 32) {
      float m = kNothing;
#pragma unroll 1
      for (int i = lane; i < ctas; i += 32) m = fmaxf(m, sum_of(i, row).m);
#pragma unroll 1
      for (int step = 1; step < 32; step *= 2) m = fmaxf(m, __shfl_xor_sync(~0u, m, step));
      RowSum sum{m, 0, 0};
#pragma unroll 1
      for (int i = lane; i < ctas; i += 32) {
        const RowSum x = sum_of(i, row);
        const float factor = exp2_fast(x.m - m);
        factors[i * columns + row] = factor;
        sum.l += factor * x.l;
        sum.l_high += factor * x.l_high;
      }
#pragma unroll 1
      for (int step = 1; step < 32; step *= 2) {
        sum.l += __shfl_xor_sync(~0u, sum.l, step);
        sum.l_high += __shfl_xor_sync(~0u, sum.l_high, step);
      }
      if (lane == 0) totals()[row] = sum;
    }
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x; i < columns * dv_; i += blockDim.x) {
      const float* from = partial_of(first, true) + 3 * columns + i;
      const int row = i / dv_, stride = 2 * partial_floats(columns, dv_);
      float sum = factors[row] * __ldcg(from + stride / 2);
#pragma unroll 8
      for (int k = 1; k < ctas; ++k) sum += factors[k * columns + row] * __ldcg(from + int64_t{k} * stride);
      output(i) = sum;
    }
  }

  __device__ static RowSum load_sum(const RowSum* from) {
    return {__ldcg(&from->m), __ldcg(&from->l), __ldcg(&from->l_high)};
  }

  // From totals and outputs to what is wanted of them. By the whole CTA; true where an exchange cancelled.
  __device__ bool write_results(const Unit& unit, Pass pass, int number) {
    const DecodeParams& p = args_.p;
    const bool to_state = pass == Pass::attend && p.state_ml != nullptr;
    bool cancelled = false;
    if (threadIdx.x < unit.rows) cancelled = finish_row(unit, pass, threadIdx.x);
    cancelled = __syncthreads_or(cancelled);
#pragma unroll 1
    for (int i = threadIdx.x; i < unit.rows * dv_; i += blockDim.x) {
      const int row = i / dv_, channel = i % dv_;
      if (channel >= p.shape.d_v && !to_state) continue;
      const RowPlace at = place(unit, row);
      float value = output(i) * weights()[2 * row];
      float* state = p.state_o + at.state * dv_ + channel;
      if (pass == Pass::exchange) value += weights()[2 * row + 1] * *state;
      if (to_state)
        *state = value;
      else
        store(p.out, at.token * p.out.row_stride + at.head * p.out.head_stride + channel, value);
    }
    if (cancelled && threadIdx.x == 0) p.tickets[number] = cancelled_ticket(blockIdx.x);
    __syncthreads();
    return cancelled;
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
      const float inverse = sum.l == 0 ? 0 : 1 / sum.l;
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
    const int unit_row = unit.first_row + row;
    return {args_.p.batch.first_row[unit.sequence] + unit_row % unit.s_q,
            int64_t{unit.index} * args_.p.row_stride + unit_row, unit.head * args_.p.shape.group + unit_row / unit.s_q};
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
  const int dv_;
};

}  // namespace thriftattn::cuda
