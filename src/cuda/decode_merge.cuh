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

// Shared memory of the merge, floats: sums [warps][columns], totals [columns], weights [columns][2], then
// o [warps][columns][padded dv], whose room also holds the factors [CTAs][columns] of a merge of partials.
struct MergeLayout {
  int totals, weights, o, row, floats;
};
THRIFTATTN_HD constexpr MergeLayout merge_layout(int warps, int columns, int dv, int blocks) {
  MergeLayout l{};
  l.totals = warps * columns * 3;
  l.weights = l.totals + columns * 3;
  l.o = l.weights + columns * 2;
  l.row = dv + 8;  // so that the four rows that lanes write at once fall into different banks
  const int outputs = warps * columns * l.row, factors = blocks * columns;
  l.floats = l.o + (outputs > factors ? outputs : factors);
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

  // By the whole CTA, which has read items of `unit` (its number among all, its weights from `begin`). True where an
  // exchange cancelled and the unit's rows have to be read again.
  __device__ bool finish(Rows& rows, const Unit& unit, Pass pass, int number, const Share& share, int64_t begin) {
    RowSum* sums = reinterpret_cast<RowSum*>(shared_);
    const int warp = threadIdx.x / 32, warps = blockDim.x / 32, columns = args_.columns;
    rows.add_lanes();
    if (rows.speaks_for_rows())
      for (int r = 0; r < Rows::kRows; ++r)
        sums[warp * columns + rows.row(r)] = {rows.m[r], rows.l[r], rows.l_high[r]};
    __syncthreads();

    float factor[Rows::kRows];
    for (int r = 0; r < Rows::kRows; ++r) {
      float m = kNothing;
      for (int w = 0; w < warps; ++w) m = fmaxf(m, sums[w * columns + rows.row(r)].m);
      factor[r] = exp2_fast(rows.m[r] - m) * kCodeScale;
    }
    float* o = shared_ + layout_.o;
    rows.each_output(dv_, [&](int r, int channel, float value) {
      o[(warp * columns + rows.row(r)) * layout_.row + channel] = value * factor[r];
    });

    const int first = pass == Pass::again ? 0 : share.cta_of(begin);
    const int last = pass == Pass::again ? 0 : share.cta_of(begin + unit.items.last());
    const auto own = [&](int row, int channel) {
      float sum = 0;
      for (int w = 0; w < warps; ++w) sum += o[(w * columns + row) * layout_.row + channel];
      return sum;
    };
    if (threadIdx.x < columns) {
      const int row = threadIdx.x;
      totals()[row] = add_sums(warps, [&](int w) { return sums[w * columns + row]; });
      if (first == last) finish_row(unit, pass, row);
    }
    __syncthreads();
    if (first == last) return write_rows(unit, pass, number, own);
    return finish_cut(unit, pass, number, first, last, begin, own);
  }

 private:
  __device__ RowSum* totals() const { return reinterpret_cast<RowSum*>(shared_ + layout_.totals); }
  __device__ float* weights() const { return shared_ + layout_.weights; }

  template <class At>
  __device__ static RowSum add_sums(int n, const At& at) {
    RowSum sum{kNothing, 0, 0};
    for (int i = 0; i < n; ++i) sum.m = fmaxf(sum.m, at(i).m);
    for (int i = 0; i < n; ++i) {
      const RowSum x = at(i);
      const float factor = exp2_fast(x.m - sum.m);
      sum.l += factor * x.l;
      sum.l_high += factor * x.l_high;
    }
    return sum;
  }

  __device__ float* partial(int cta, bool at_begin) const {
    return static_cast<float*>(args_.p.partials) +
           (int64_t{2} * cta + (at_begin ? 0 : 1)) * partial_floats(args_.columns, dv_);
  }

  // The unit lies in the CTAs [first, last]: leaves this one's state, and merges all where it is the last to come.
  template <class Own>
  __device__ bool finish_cut(const Unit& unit, Pass pass, int number, int first, int last, int64_t begin,
                             const Own& own) {
    const int cta = blockIdx.x, columns = args_.columns, ctas = last - first + 1;
    float* mine = partial(cta, cta != first);
    for (int i = threadIdx.x; i < columns * dv_; i += blockDim.x) mine[3 * columns + i] = own(i / dv_, i % dv_);
    if (threadIdx.x < columns) reinterpret_cast<RowSum*>(mine)[threadIdx.x] = totals()[threadIdx.x];
    __threadfence();
    __syncthreads();
    int32_t* ticket = args_.p.tickets + number;
    bool is_last = false;
    if (threadIdx.x == 0) is_last = atomicAdd(ticket, 1) == ctas - 1;
    if (!__syncthreads_or(is_last)) return false;
    __threadfence();
    if (threadIdx.x == 0) *ticket = 0;

    // Factors of each partial and row, in the room of o: all have read that.
    float* factors = shared_ + layout_.o;
    const auto sum_of = [&](int i, int row) {
      return __ldcg_row(reinterpret_cast<const RowSum*>(partial(first + i, i > 0)) + row);
    };
    const int lane = threadIdx.x % 32;
    for (int row = threadIdx.x / 32; row < columns; row += blockDim.x / 32) {
      float m = kNothing;
      for (int i = lane; i < ctas; i += 32) m = fmaxf(m, sum_of(i, row).m);
      for (int step = 1; step < 32; step *= 2) m = fmaxf(m, __shfl_xor_sync(~0u, m, step));
      RowSum sum{m, 0, 0};
      for (int i = lane; i < ctas; i += 32) {
        const RowSum x = sum_of(i, row);
        const float factor = exp2_fast(x.m - m);
        factors[i * columns + row] = factor;
        sum.l += factor * x.l;
        sum.l_high += factor * x.l_high;
      }
      for (int step = 1; step < 32; step *= 2) {
        sum.l += __shfl_xor_sync(~0u, sum.l, step);
        sum.l_high += __shfl_xor_sync(~0u, sum.l_high, step);
      }
      if (lane == 0) {
        totals()[row] = sum;
        finish_row(unit, pass, row);
      }
    }
    __syncthreads();
    return write_rows(unit, pass, number, [&](int row, int channel) {
      float sum = 0;
#pragma unroll 4
      for (int i = 0; i < ctas; ++i)
        sum += factors[i * columns + row] * __ldcg(partial(first + i, i > 0) + 3 * columns + row * dv_ + channel);
      return sum;
    });
  }

  __device__ static RowSum __ldcg_row(const RowSum* from) {
    return {__ldcg(&from->m), __ldcg(&from->l), __ldcg(&from->l_high)};
  }

  // By one thread: from totals()[row] to what the row's o is multiplied by, weights()[2 row], what the o of the state
  // before an exchange is, [2 row + 1], and the results that are no vectors.
  __device__ void finish_row(const Unit& unit, Pass pass, int row) const {
    if (row >= unit.rows) return;
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
    reinterpret_cast<int*>(shared_)[row] = cancelled;  // in the room of sums: all have read those
    if (pass == Pass::attend && p.state_ml != nullptr) {
      state[0] = sum.m, state[1] = sum.l, state[2] = sum.l_high, state[3] = 0;
    } else {
      const float inverse = sum.l == 0 ? 0 : 1 / sum.l;
      factor *= inverse;
      factor_before *= inverse;
      if (p.lse != nullptr)
        p.lse[at.token * p.shape.h_q + at.head] =
            sum.l == 0 ? -INFINITY : (sum.m + log2f(sum.l)) * 0.6931471805599453f;
      if (p.row_mass_high != nullptr) p.row_mass_high[at.state] = sum.l_high * inverse;
    }
    weights()[2 * row] = factor;
    weights()[2 * row + 1] = factor_before;
  }

  // o(row, channel) is the unit's sum. By the whole CTA, after finish_row of every row.
  template <class O>
  __device__ bool write_rows(const Unit& unit, Pass pass, int number, const O& o) {
    const DecodeParams& p = args_.p;
    const bool to_state = pass == Pass::attend && p.state_ml != nullptr;
    for (int i = threadIdx.x; i < unit.rows * dv_; i += blockDim.x) {
      const int row = i / dv_, channel = i % dv_;
      if (channel >= p.shape.d_v && !to_state) continue;
      const RowPlace at = place(unit, row);
      float value = o(row, channel) * weights()[2 * row];
      float* state = p.state_o + at.state * dv_ + channel;
      if (pass == Pass::exchange) value += weights()[2 * row + 1] * *state;
      if (to_state)
        *state = value;
      else
        store(p.out, at.token * p.out.row_stride + at.head * p.out.head_stride + channel, value);
    }
    bool again = false;
    if (pass == Pass::exchange)
      for (int row = 0; row < unit.rows; ++row) again |= reinterpret_cast<const int*>(shared_)[row] != 0;
    if (again && threadIdx.x == 0) args_.p.tickets[number] = cancelled_ticket(blockIdx.x);
    __syncthreads();
    return again;
  }

  struct RowPlace {
    int64_t token, state;  // row of out and lse; row of states
    int head;              // query head
  };
  __device__ RowPlace place(const Unit& unit, int row) const {
    const int unit_row = unit.first_row + row;
    return {args_.p.batch.first_row[unit.sequence] + unit_row % unit.s_q,
            int64_t{unit.index} * args_.p.row_stride + unit_row,
            unit.head * args_.p.shape.group + unit_row / unit.s_q};
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
