// Ranking the pages of a decode or verify step, and choosing among them.
//
//   launch_rank            q, summaries -> q_mean (every row's part of its scores)
//                                       -> score (the policy's, of the mean row of a head, the largest of a unit's
//                                       heads)
//                                       -> lists, by the last CTA of a unit to finish
//   launch_choose_by_mass  page masses and states that attend left -> score (shares of the softmax) -> lists, likewise
//
// A unit's pages are dealt to several CTAs, contiguously: at least kPagesOfCta each, so that one sequence fills the
// GPU, and no more CTAs than run at once. Binds on DRAM with many sequences (a summary is 272 bytes at d = 128, 3 % of
// what attend reads); with one, on the latency of some ten dependent steps: tables, q and summaries, the ticket, the
// digits of the cut. Shared memory: 43 KB of query rows, 5 KB of choosing.
#include "cuda/choose.cuh"
#include "cuda/launch.cuh"
#include "cuda/mma.cuh"
#include "cuda/page_scores.cuh"

namespace thriftattn::cuda {
namespace {

constexpr int kPagesOfCta = 128;  // at least, where there are as many
constexpr int kTileRows = 80;     // of 128 channels

struct RankArgs {
  LayerCache cache;
  Batch batch;
  Shape shape;
  Rows<const void*> q;
  Choosing how;  // how.ranks: by summaries, here
  bool write_lists;
  int row_stride;
  float *q_mean, *score, *q_norm, *row_weight;
  int32_t* ticket;
  Lists lists;
};

// A unit as the CTAs that share it see it.
struct UnitPlace {
  int64_t u, first_row;
  int slot, g, s_q;
  Candidates pages;
  int ctas, first, end;  // this CTA takes the pages [first, end)
};

__device__ UnitPlace unit_place(const RankArgs& a, int pages_of_cta) {
  UnitPlace at;
  at.u = blockIdx.y;
  const int i = static_cast<int>(at.u) / a.shape.h_kv;
  at.g = static_cast<int>(at.u) % a.shape.h_kv;
  at.slot = a.batch.slot[i];
  at.s_q = a.batch.s_q[i];
  at.first_row = a.batch.first_row[i];
  const int s_kv = a.cache.s_kv[at.slot], released = a.cache.released[at.slot];
  const BlockPages block = block_pages(s_kv - at.s_q, s_kv - 1, s_kv, {a.shape.causal, a.shape.window});
  at.pages = candidates(block, a.how.force, a.cache, released);
  const int n = at.pages.end - at.pages.first;
  at.ctas = max(1, min(static_cast<int>(gridDim.x), (n + pages_of_cta - 1) / pages_of_cta));
  const int each = (n + at.ctas - 1) / at.ctas;
  at.first = min(at.pages.end, at.pages.first + static_cast<int>(blockIdx.x) * each);
  at.end = min(at.pages.end, at.first + each);
  return at;
}

// True in the CTA of a unit that comes last; it sees what the others wrote.
__device__ bool comes_last(int32_t* ticket, int ctas, bool& last) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(ticket, 1) == ctas - 1;
    if (last) *ticket = 0;
    __threadfence();
  }
  __syncthreads();
  return last;
}

struct RankShared {
  float q[kTileRows * 128 + 3 * kMaxChannels];  // rows are read by fours
  float norm[kTileRows];
  bool finite[kTileRows], valid[kTileRows];  // of rows / whether a head has a finite row
  bool last;
  ChooseShared choose;
};

// Brings the rows of `heads` heads of the group from h0 on into the tile, [heads, s_q], those with NaN or Inf as zeros,
// and where s_q > 1 their means behind them, [heads].
template <int kSteps>
__device__ void load_heads(const RankArgs& a, const UnitPlace& at, int h0, int heads, const Tile<kSteps>& tile,
                           RankShared& s) {
  const int s_q = at.s_q;
  for (int r = warp_id(); r < heads * s_q; r += kWarps) {
    RowInWarp<kSteps> row;
    row.load(a.q, at.first_row + r % s_q, at.g * a.shape.group + h0 + r / s_q, a.shape.d);
    const bool finite = row.finite();
#pragma unroll
    for (int i = 0; i < 2 * kSteps; ++i) tile.at(r, lane_id() + 32 * i) = finite ? row.x[i] : 0.0f;
    if (lane_id() == 0) s.finite[r] = finite;
  }
  __syncthreads();
  const int means = s_q > 1 ? heads * s_q : 0;
  for (int h = warp_id(); h < heads; h += kWarps) {
    const bool finite = lane_id() < s_q && s.finite[h * s_q + lane_id()];
    const int count = __popc(__ballot_sync(kAll, finite));
    if (s_q > 1)
#pragma unroll
      for (int i = 0; i < 2 * kSteps; ++i) {
        const int c = lane_id() + 32 * i;
        float sum = 0;
        for (int r = 0; r < s_q; ++r) sum += tile.at(h * s_q + r, c);
        tile.at(means + h, c) = count > 0 ? sum / static_cast<float>(count) : 0.0f;
      }
    __syncwarp();
    const float norm = row_norm(tile, means + h);
    if (lane_id() == 0) {
      s.valid[h] = count > 0;
      s.norm[h] = norm;
    }
    if (a.row_weight && blockIdx.x == 0 && lane_id() < s_q)
      a.row_weight[at.u * a.row_stride + (h0 + h) * s_q + lane_id()] = finite ? 1.0f / static_cast<float>(count) : 0.0f;
  }
  __syncthreads();
}

// What products of a tile's rows are for: the first q_rows go to q_mean, `heads` rows from `means` on are means of
// heads and count for the score.
struct Uses {
  int rows, q_rows, means, heads;
  float *q_mean, *score;  // of page 0 and the first row of the tile; null where not wanted
  bool first_heads;       // of the group: the score starts here
};

template <class Product, int kSteps>
__device__ void score_pages(const RankArgs& a, const UnitPlace& at, const Tile<kSteps>& tile, const Uses& use,
                            const RankShared& s) {
  const float scale = a.shape.sm_scale, log2_scale = scale * 1.44269504f;
  float best[kPagesAtOnce<Product, kSteps>];
#pragma unroll
  for (float& x : best) x = -INFINITY;
  for_each_product<Product>(
      summaries_of(a.cache, at.slot, at.g), a.cache.canonical, scale, at.first, at.end, tile, use.rows,
      [&](int k, int page, int row, float sum) {
        if (row < use.q_rows && page < at.end && lane_id() % 2 == 0)
          use.q_mean[static_cast<int64_t>(page) * a.row_stride + row] = sum * log2_scale;
        const int h = row - use.means;
        if (h >= 0 && h < use.heads && s.valid[h]) best[k] = fmaxf(best[k], sum * scale);
      },
      [&](int k, int page) {
        for (int i = 2; i < 8; i *= 2) best[k] = fmaxf(best[k], __shfl_xor_sync(kAll, best[k], i));
        if (use.score && page < at.end && lane_id() % 8 == 0)
          use.score[page] = use.first_heads ? best[k] : fmaxf(use.score[page], best[k]);
        best[k] = -INFINITY;
      });
}

// Products of all rows of the unit with the summaries of the CTA's pages. Returns the norm of the longest mean row.
template <int kSteps>
__device__ float rank_pages(const RankArgs& a, const UnitPlace& at, RankShared& s) {
  const Tile<kSteps> tile{s.q};
  const int s_q = at.s_q, group = a.shape.group;
  const int room = kTileRows * 128 / Tile<kSteps>::kStride / (s_q + (s_q > 1));
  const Policy policy = a.how.policy;
  const bool by_means = a.how.ranks && policy == Policy::block_mean;
  float* score = a.how.ranks ? a.score + at.u * a.cache.max_pages : nullptr;
  float q_norm = 0;
  bool any_valid = false;
  for (int h0 = 0; h0 < group; h0 += room) {
    const int heads = min(room, group - h0), means = s_q > 1 ? heads * s_q : 0;
    __syncthreads();  // of the heads before
    load_heads(a, at, h0, heads, tile, s);
    for (int h = 0; h < heads; ++h) {
      any_valid |= s.valid[h];
      if (s.valid[h]) q_norm = fmaxf(q_norm, s.norm[h]);
    }
    float* q_mean = a.q_mean ? a.q_mean + at.u * a.cache.max_pages * a.row_stride + h0 * s_q : nullptr;
    const Tile<kSteps> mean_rows{tile.q + means * Tile<kSteps>::kStride};
    const Uses scores{heads, 0, 0, heads, nullptr, score, h0 == 0};
    if (q_mean) {
      const Uses products{by_means ? means + heads : heads * s_q,
                          heads * s_q,
                          means,
                          heads,
                          q_mean,
                          by_means ? score : nullptr,
                          h0 == 0};
      score_pages<MeanProduct>(a, at, tile, products, s);
    } else if (by_means) {
      score_pages<MeanProduct>(a, at, mean_rows, scores, s);
    }
    if (a.how.ranks && policy == Policy::quest) score_pages<QuestProduct>(a, at, mean_rows, scores, s);
    if (a.how.ranks && policy == Policy::second_moment) score_pages<MomentProduct>(a, at, mean_rows, scores, s);
  }
  if (a.how.ranks && policy == Policy::recent)
    for (int p = at.first + static_cast<int>(threadIdx.x); p < at.end; p += kThreads)
      score[p] = any_valid ? static_cast<float>(p - at.pages.first) : -INFINITY;
  return q_norm;
}

template <int kSteps>
__global__ __launch_bounds__(kThreads, 2) void rank_kernel(const __grid_constant__ RankArgs a) {
  __shared__ RankShared s;
  let_next_kernel_start();
  wait_for_previous_kernel();
  const UnitPlace at = unit_place(a, kPagesOfCta);
  if (static_cast<int>(blockIdx.x) >= at.ctas) return;
  float q_norm = 0;
  if (at.s_q > 0) q_norm = rank_pages<kSteps>(a, at, s);
  if (a.q_norm && blockIdx.x == 0 && threadIdx.x == 0) a.q_norm[at.u] = q_norm;
  if (!a.write_lists) return;
  float* score = a.score + at.u * a.cache.max_pages + at.pages.first;
  if (at.s_q == 0) {
    if (threadIdx.x < 8) a.lists.counts[at.u * 8 + threadIdx.x] = 0;
  } else if (!a.how.ranks) {
    if (static_cast<int>(blockIdx.x) == at.ctas - 1) write_lists(a.how, at.pages, {}, score, a.lists, at.u, s.choose);
  } else if (comes_last(a.ticket + at.u, at.ctas, s.last)) {
    const Summaries summaries = summaries_of(a.cache, at.slot, at.g);
    const Cut cut = choose(a.how, at.pages, score, q_norm, summaries, s.choose);
    write_lists(a.how, at.pages, cut, score, a.lists, at.u, s.choose);
  }
}

// --- by mass

struct MassArgs {
  RankArgs rank;
  const float* state_ml;
  const float2* page_mass;
  int mass_parts;
};

// A row's softmax sum as a power of two, and its weight in the mean over its head.
struct RowFacts {
  float log2_sum, weight;
};

__global__ __launch_bounds__(kThreads) void mass_kernel(const __grid_constant__ MassArgs args) {
  __shared__ ChooseShared s;
  __shared__ bool last;
  extern __shared__ RowFacts facts[];  // [row_stride]
  let_next_kernel_start();
  wait_for_previous_kernel();
  const RankArgs& a = args.rank;
  const UnitPlace at = unit_place(a, kThreads);
  if (static_cast<int>(blockIdx.x) >= at.ctas) return;
  if (at.s_q == 0) {
    if (threadIdx.x < 8) a.lists.counts[at.u * 8 + threadIdx.x] = 0;
    return;
  }
  const int64_t first_row = at.u * a.row_stride;
  for (int r = static_cast<int>(threadIdx.x); r < a.shape.group * at.s_q; r += kThreads) {
    const float m = args.state_ml[(first_row + r) * 4], l = args.state_ml[(first_row + r) * 4 + 1];
    facts[r] = {l > 0 ? m + log2f(l) : INFINITY, a.row_weight[first_row + r]};
  }
  __syncthreads();
  float* score = a.score + at.u * a.cache.max_pages;
  const bool of_all = a.how.budget.kind == Budget::Kind::mass || a.how.budget.kind == Budget::Kind::tolerance;
  for (int p = at.first + static_cast<int>(threadIdx.x); p < at.end; p += kThreads) {
    if (!of_all && at.pages.forced(p)) continue;
    const float2* mass = args.page_mass + (at.u * a.cache.max_pages + p) * args.mass_parts * a.row_stride;
    float best = 0;
    for (int h = 0; h < a.shape.group; ++h) {
      float share = 0;
      for (int r = h * at.s_q; r < (h + 1) * at.s_q; ++r) {
        const RowFacts row = facts[r];
        float of_row = 0;
        for (int part = 0; part < args.mass_parts; ++part) {
          const float2 ml = mass[part * a.row_stride + r];
          if (ml.y != 0) of_row = fmaf(ml.y, exp2_fast(ml.x - row.log2_sum), of_row);
        }
        if (row.weight > 0) share = fmaf(row.weight, of_row, share);
      }
      best = fmaxf(best, share);
    }
    score[p] = best;
  }
  if (!comes_last(a.ticket + at.u, at.ctas, last)) return;
  score += at.pages.first;
  const Cut cut = choose(a.how, at.pages, score, a.q_norm[at.u], summaries_of(a.cache, at.slot, at.g), s);
  write_lists(a.how, at.pages, cut, score, a.lists, at.u, s);
}

// CTAs of one unit: as many as its pages keep busy, and together no more than run at once.
cudaError_t ctas_of_unit(const RankParams& p, int pages_of_cta, int& ctas) {
  int device = 0, multiprocessors = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  if (const cudaError_t error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
      error != cudaSuccess)
    return error;
  constexpr int64_t kAtOnce = 4;  // on one multiprocessor
  const int64_t seen = p.shape.window > 0 ? (p.shape.window + p.shape.max_s_q) / kPageTokens + 2 : p.cache.max_pages;
  const int64_t units = static_cast<int64_t>(p.batch.b) * p.shape.h_kv;
  ctas = static_cast<int>(std::clamp<int64_t>(
      kAtOnce * multiprocessors / units, 1,
      std::max<int64_t>(1, (std::min<int64_t>(seen, p.cache.max_pages) + pages_of_cta - 1) / pages_of_cta)));
  return cudaSuccess;
}

RankArgs rank_args(const RankParams& p) {
  return {p.cache,        p.batch,      p.shape,  p.q,     choosing(p.method, p.shape, false),
          !p.lists_given, p.row_stride, p.q_mean, p.score, p.q_norm,
          p.row_weight,   p.ticket,     p.lists};
}

dim3 grid_of(const RankParams& p, int ctas) {
  return {static_cast<unsigned>(ctas), static_cast<unsigned>(p.batch.b * p.shape.h_kv), 1};
}

}  // namespace

cudaError_t launch_rank(const RankParams& params, cudaStream_t stream) {
  if (params.batch.b == 0) return cudaSuccess;
  RankArgs args = rank_args(params);
  if (params.lists_given || params.method.policy == Policy::fp4_mass) args.how.ranks = false;
  int ctas = 0;
  if (const cudaError_t error = ctas_of_unit(params, kPagesOfCta, ctas); error != cudaSuccess) return error;
  return launch_early(params.shape.d <= 128 ? rank_kernel<2> : rank_kernel<4>, grid_of(params, ctas), kThreads, 0,
                      stream, args);
}

cudaError_t launch_choose_by_mass(const MassParams& params, cudaStream_t stream) {
  if (params.rank.batch.b == 0) return cudaSuccess;
  int ctas = 0;
  if (const cudaError_t error = ctas_of_unit(params.rank, kThreads, ctas); error != cudaSuccess) return error;
  const MassArgs args = {rank_args(params.rank), params.state_ml, params.page_mass, params.mass_parts};
  return launch_early(mass_kernel, grid_of(params.rank, ctas), kThreads,
                      params.rank.row_stride * static_cast<int>(sizeof(RowFacts)), stream, args);
}

}  // namespace thriftattn::cuda
