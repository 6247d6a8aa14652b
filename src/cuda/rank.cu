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
// digits of the cut. Shared memory: 43 KB of query rows, in whose
// place keys stand later, and 6 KB.
#include "cuda/choose.cuh"
#include "cuda/launch.cuh"
#include "cuda/mma.cuh"
#include "cuda/page_scores.cuh"

namespace thriftattn::cuda {
namespace {

#ifndef RANK_THREADS
#define RANK_THREADS 1024
#endif
constexpr int kThreads = RANK_THREADS, kWarps = kThreads / 32;
constexpr int kPagesOfCta = 128;                                      // at least, where there are as many
constexpr int kTileRows = 80;                                         // of 128 channels
constexpr int kTileBytes = (kTileRows * 128 + 3 * kMaxChannels) * 4;  // rows are read by fours

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

// One thread finds it for all: it takes many steps and few results.
__device__ void find_unit(const RankArgs& a, UnitPlace& at) {
  const int i = static_cast<int>(blockIdx.z);
  at.g = static_cast<int>(blockIdx.y);
  at.u = static_cast<int64_t>(i) * a.shape.h_kv + at.g;
  at.slot = a.batch.slot[i];
  at.s_q = a.batch.s_q[i];
  at.first_row = a.batch.first_row[i];
  const int s_kv = a.cache.s_kv[at.slot], released = a.cache.released[at.slot];
  const BlockPages block = block_pages(s_kv - at.s_q, s_kv - 1, s_kv, {a.shape.causal, a.shape.window});
  at.pages = candidates(block, a.how.force, a.cache, released);
  const int n = at.pages.end - at.pages.first;
  at.ctas = max(1, min(static_cast<int>(gridDim.x), (n + kPagesOfCta - 1) / kPagesOfCta));
  const int each = (n + at.ctas - 1) / at.ctas;
  at.first = min(at.pages.end, at.pages.first + static_cast<int>(blockIdx.x) * each);
  at.end = min(at.pages.end, at.first + each);
}

// True in the CTA of a unit that comes last; it sees what the others wrote.
__device__ bool comes_last(int32_t* ticket, int ctas, bool& last) {
  __syncthreads();
  if (ctas == 1) return true;
  if (threadIdx.x == 0) {
    int before;
    asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], 1;" : "=r"(before) : "l"(ticket) : "memory");
    last = before == ctas - 1;
    if (last) *ticket = 0;
  }
  __syncthreads();
  return last;
}

// By the scores of all of the unit's pages.
__device__ void choose_and_list(const RankArgs& a, const UnitPlace& at, float q_norm, uint32_t* keys,
                                ChooseShared<kThreads>& s) {
  float* score = a.score + at.u * a.cache.max_pages + at.pages.first;
  const Cut cut = choose(a.how, at.pages, score, keys, q_norm, summaries_of(a.cache, at.slot, at.g), s);
  write_lists(a.how, at.pages, cut, keys, a.lists, at.u, s);
}

struct RankShared {
  float norm[kTileRows];
  bool finite[kTileRows], valid[kTileRows];  // of rows / whether a head has a finite row
  bool last;
  ChooseShared<kThreads> choose;
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

template <class Product, int kPages, int kSteps, class Prepare>
__device__ void score_pages(const RankArgs& a, const UnitPlace& at, const Tile<kSteps>& tile, const Uses& use,
                            const RankShared& s, const Prepare& prepare) {
  const float scale = a.shape.sm_scale, log2_scale = scale * 1.44269504f;
  float best[kPages];
#pragma unroll
  for (float& x : best) x = -INFINITY;
  for_each_product<Product, kPages>(
      summaries_of(a.cache, at.slot, at.g), a.cache.canonical, scale, at.first, at.end, tile, use.rows, prepare,
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

// Products of all rows of the unit with the summaries of the CTA's pages, as many heads at a time as the tile holds.
// Returns the norm of the longest mean row.
template <int kSteps>
__device__ float rank_pages(const RankArgs& a, const UnitPlace& at, const Tile<kSteps>& tile, RankShared& s) {
  constexpr int kPages = RANK_THREADS == 1024 ? 2 / kSteps + (kSteps == 4) : 4 / kSteps;  // at once
  const int s_q = at.s_q, group = a.shape.group;
  const int room = kTileRows * 128 / Tile<kSteps>::kStride / (s_q + (s_q > 1));
  const Policy policy = a.how.ranks ? a.how.policy : Policy::none;
  float* score = a.how.ranks ? a.score + at.u * a.cache.max_pages : nullptr;
  float q_norm = 0;
  bool any_valid = false;
  for (int h0 = 0; h0 < group; h0 += room) {
    const int heads = min(room, group - h0), rows = heads * s_q, means = s_q > 1 ? rows : 0;
    const Tile<kSteps> mean_rows{tile.q + means * Tile<kSteps>::kStride};
    bool loaded = false;
    const auto prepare = [&] {
      if (loaded) return;
      __syncthreads();  // the heads before are done with
      load_heads(a, at, h0, heads, tile, s);
      loaded = true;
    };
    const Uses scores{heads, 0, 0, heads, nullptr, score, h0 == 0};
    if (a.q_mean) {
      const bool rank = policy == Policy::block_mean;
      float* q_mean = a.q_mean + at.u * a.cache.max_pages * a.row_stride + h0 * s_q;
      const Uses products{rank ? means + heads : rows, rows, means, heads, q_mean, rank ? score : nullptr, h0 == 0};
      score_pages<MeanProduct, kPages>(a, at, tile, products, s, prepare);
    } else if (policy == Policy::block_mean) {
      score_pages<MeanProduct, kPages>(a, at, mean_rows, scores, s, prepare);
    }
    if (policy == Policy::quest) score_pages<QuestProduct, 1>(a, at, mean_rows, scores, s, prepare);
    if (policy == Policy::second_moment) score_pages<MomentProduct, 1>(a, at, mean_rows, scores, s, prepare);
    prepare();  // where nothing was multiplied
    for (int h = 0; h < heads; ++h) {
      any_valid |= s.valid[h];
      if (s.valid[h]) q_norm = fmaxf(q_norm, s.norm[h]);
    }
  }
  if (policy == Policy::recent)
    for (int p = at.first + static_cast<int>(threadIdx.x); p < at.end; p += kThreads)
      score[p] = any_valid ? static_cast<float>(p - at.pages.first) : -INFINITY;
  return q_norm;
}

template <int kSteps>
__global__ __launch_bounds__(kThreads, 1) void rank_kernel(const __grid_constant__ RankArgs a) {
  __shared__ RankShared s;
  __shared__ UnitPlace at;
  extern __shared__ float memory[];  // rows of q, then keys
  let_next_kernel_start();
  wait_for_previous_kernel();
  if (threadIdx.x == 0) find_unit(a, at);
  __syncthreads();
  if (static_cast<int>(blockIdx.x) >= at.ctas) return;
  float q_norm = 0;
  if (at.s_q > 0) q_norm = rank_pages(a, at, Tile<kSteps>{memory}, s);
  if (a.q_norm && blockIdx.x == 0 && threadIdx.x == 0) a.q_norm[at.u] = q_norm;
  if (!a.write_lists) return;
  if (at.s_q == 0) {
    if (threadIdx.x < 8) a.lists.counts[at.u * 8 + threadIdx.x] = 0;
  } else if (!a.how.ranks) {
    if (static_cast<int>(blockIdx.x) == at.ctas - 1) write_lists(a.how, at.pages, {}, nullptr, a.lists, at.u, s.choose);
  } else if (comes_last(a.ticket + at.u, at.ctas, s.last)) {
    choose_and_list(a, at, q_norm, reinterpret_cast<uint32_t*>(memory), s.choose);
  }
}

// --- by mass

struct MassArgs {
  RankArgs rank;
  const float* state_ml;
  const float2* page_mass;
  int mass_parts;
};

// Eight lanes have a page: as many as there are heads take a head each, the others its other parts.
__global__ __launch_bounds__(kThreads, 1) void mass_kernel(const __grid_constant__ MassArgs args) {
  __shared__ ChooseShared<kThreads> s;
  __shared__ UnitPlace at;
  __shared__ bool last;
  extern __shared__ uint32_t keys[];
  let_next_kernel_start();
  wait_for_previous_kernel();
  const RankArgs& a = args.rank;
  if (threadIdx.x == 0) find_unit(a, at);
  __syncthreads();
  if (static_cast<int>(blockIdx.x) >= at.ctas) return;
  if (at.s_q == 0) {
    if (threadIdx.x < 8) a.lists.counts[at.u * 8 + threadIdx.x] = 0;
    return;
  }
  const int group = a.shape.group, heads = group > 4 ? 8 : group > 2 ? 4 : group;  // at once
  const int lane = lane_id() % 8, head = lane % heads, part = lane / heads;
  const bool of_all = a.how.budget.kind == Budget::Kind::mass || a.how.budget.kind == Budget::Kind::tolerance;
  const float* weight = a.row_weight + at.u * a.row_stride;
  const float* state = args.state_ml + at.u * a.row_stride * 4;
  for (int p0 = at.first; p0 < at.end; p0 += kThreads / 8) {
    const int page = p0 + static_cast<int>(threadIdx.x) / 8;
    const bool wanted = page < at.end && (of_all || !at.pages.forced(page));
    const float2* mass = args.page_mass + (at.u * a.cache.max_pages + page) * args.mass_parts * a.row_stride;
    float best = 0;
    for (int h = head; h - head < group; h += heads) {
      float share = 0;
      for (int r = h * at.s_q; wanted && h < group && r < (h + 1) * at.s_q; ++r) {
        const float m = state[4 * r], factor = __fdividef(weight[r], state[4 * r + 1]);
        float of_row = 0;
        for (int i = part; i < args.mass_parts; i += 8 / heads) {
          const float2 ml = mass[i * a.row_stride + r];
          if (ml.y != 0) of_row = fmaf(ml.y, exp2_fast(ml.x - m), of_row);
        }
        if (factor > 0) share = fmaf(factor, of_row, share);
      }
      for (int i = heads; i < 8; i *= 2) share += __shfl_xor_sync(kAll, share, i);
      best = fmaxf(best, share);
    }
    for (int i = 1; i < heads; i *= 2) best = fmaxf(best, __shfl_xor_sync(kAll, best, i));
    if (wanted && lane == 0) a.score[at.u * a.cache.max_pages + page] = best;
  }
  if (comes_last(a.ticket + at.u, at.ctas, last)) choose_and_list(a, at, a.q_norm[at.u], keys, s);
}

// How the CTAs of a step's units are launched: as many for a unit as its pages keep busy, and together no more than run
// at once; shared memory for the rows of q and, in their place, for the keys of the pages that a unit sees.
struct Launch {
  dim3 grid;
  int key_bytes;
};
cudaError_t launch_of(const RankParams& p, Launch& launch) {
  int device = 0, multiprocessors = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  if (const cudaError_t error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
      error != cudaSuccess)
    return error;
  const int64_t in_window = p.shape.window > 0 ? (p.shape.window + p.shape.max_s_q) / kPageTokens + 2 : INT64_MAX;
  const int64_t pages = std::min<int64_t>(in_window, p.cache.max_pages);
  const int64_t units = static_cast<int64_t>(p.batch.b) * p.shape.h_kv;
  const int64_t busy = std::max<int64_t>(1, (pages + kPagesOfCta - 1) / kPagesOfCta);
  launch.grid = {static_cast<unsigned>(std::clamp<int64_t>(multiprocessors / units, 1, busy)),
                 static_cast<unsigned>(p.shape.h_kv), static_cast<unsigned>(p.batch.b)};
  launch.key_bytes = static_cast<int>(pages) * 4;
  return cudaSuccess;
}

RankArgs rank_args(const RankParams& p) {
  return {p.cache,        p.batch,      p.shape,  p.q,     choosing(p.method, p.shape, false),
          !p.lists_given, p.row_stride, p.q_mean, p.score, p.q_norm,
          p.row_weight,   p.ticket,     p.lists};
}

}  // namespace

cudaError_t launch_rank(const RankParams& params, cudaStream_t stream) {
  if (params.batch.b == 0) return cudaSuccess;
  RankArgs args = rank_args(params);
  if (params.lists_given || params.method.policy == Policy::fp4_mass) args.how.ranks = false;
  Launch launch;
  if (const cudaError_t error = launch_of(params, launch); error != cudaSuccess) return error;
  return launch_early(params.shape.d <= 128 ? rank_kernel<2> : rank_kernel<4>, launch.grid, kThreads,
                      std::max(kTileBytes, args.how.ranks ? launch.key_bytes : 0), stream, args);
}

cudaError_t launch_choose_by_mass(const MassParams& params, cudaStream_t stream) {
  if (params.rank.batch.b == 0) return cudaSuccess;
  Launch launch;
  if (const cudaError_t error = launch_of(params.rank, launch); error != cudaSuccess) return error;
  const MassArgs args = {rank_args(params.rank), params.state_ml, params.page_mass, params.mass_parts};
  return launch_early(mass_kernel, launch.grid, kThreads, launch.key_bytes, stream, args);
}

}  // namespace thriftattn::cuda
