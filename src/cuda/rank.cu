// Ranking the pages of a decode or verify step, and choosing among them.
//
//   launch_rank            score_kernel   q, summaries -> q_mean (every row's part of its scores), and
//                                         score (the policy's, of the mean row of a head; the largest of a unit's
//                                         heads)
//                          choose_kernel  score -> lists
//   launch_choose_by_mass  mass_kernel    page masses and states that attend left -> score (shares of the softmax)
//                          choose_kernel  likewise
//
// Where nothing is ranked, as before a ranking by mass, a CTA of score_kernel lists the forced pages. A unit's pages
// are dealt to as many CTAs as keep the GPU busy; one CTA chooses for a unit. Each kernel starts early, so that
// choose_kernel has its unit's place and budget by the time that the scores are there.
//
// Binds on DRAM with many sequences (a summary is 272 bytes at d = 128, 3 % of what attend reads), with one on the
// latency of the steps that follow from one another: lengths, tables and q, summaries; then scores, range, bin, lists.
#include "cuda/choose.cuh"
#include "cuda/launch.cuh"
#include "cuda/mma.cuh"
#include "cuda/page_scores.cuh"

namespace thriftattn::cuda {
namespace {

constexpr int kScoreThreads = 256, kMassThreads = 256, kChooseThreads = 1024;
constexpr int kScorePages = 64, kMassPages = kMassThreads / 8;   // that a CTA has at once
constexpr int kTileRows = 80;                                    // of 128 channels
constexpr int kTileFloats = kTileRows * 128 + 3 * kMaxChannels;  // rows are read by fours

struct RankArgs {
  LayerCache cache;
  Batch batch;
  Shape shape;
  Rows<const void*> q;
  Choosing how;  // how.ranks: here, or by the kernel that follows
  bool write_lists;
  int row_stride;
  float *q_mean, *score, *q_norm, *row_weight;
  Lists lists;
};

// The unit of a CTA: KV head blockIdx.y of sequence blockIdx.z. Read past L1, for a kernel that starts early.
struct UnitPlace {
  int64_t u, first_row;
  int slot, g, s_q;
  BlockPages block;
  int first, end;  // the full pages that it sees
};

__device__ UnitPlace unit_place(const RankArgs& a) {
  UnitPlace at;
  at.g = static_cast<int>(blockIdx.y);
  at.u = static_cast<int64_t>(blockIdx.z) * a.shape.h_kv + at.g;
  at.slot = __ldcg(a.batch.slot + blockIdx.z);
  at.s_q = __ldcg(a.batch.s_q + blockIdx.z);
  at.first_row = __ldcg(a.batch.first_row + blockIdx.z);
  const int s_kv = __ldcg(a.cache.s_kv + at.slot);
  at.block = block_pages(s_kv - at.s_q, s_kv - 1, s_kv, {a.shape.causal, a.shape.window});
  at.first = static_cast<int>(at.block.first_visible);
  at.end = static_cast<int>(at.block.visible);
  return at;
}

__device__ Candidates candidates_of(const RankArgs& a, const UnitPlace& at) {
  return candidates(at.block, a.how.force, a.cache, __ldcg(a.cache.released + at.slot));
}

__device__ void write_empty(const Lists& lists, int64_t u) {
  if (threadIdx.x < 8) lists.counts[u * 8 + threadIdx.x] = 0;
}

// --- by summaries

struct ScoreShared {
  float q[kTileFloats];
  float norm[kTileRows];
  bool finite[kTileRows], valid[kTileRows];  // of rows / whether a head has a finite row
  ListShared<kScoreThreads> lists;
};

// Brings the rows of `heads` heads of the group from h0 on into the tile, [heads, s_q], those with NaN or Inf as zeros,
// and where s_q > 1 their means behind them, [heads].
template <int kSteps>
__device__ void load_heads(const RankArgs& a, const UnitPlace& at, int h0, int heads, const Tile<kSteps>& tile,
                           ScoreShared& s) {
  constexpr int kWarps = kScoreThreads / 32;
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
  PageChunks pages;       // the CTA's
};

template <class Product, int kPages, int kSteps, class Prepare>
__device__ void score_pages(const RankArgs& a, const UnitPlace& at, const Tile<kSteps>& tile, const Uses& use,
                            const ScoreShared& s, const Prepare& prepare) {
  const float scale = a.shape.sm_scale, log2_scale = scale * 1.44269504f;
  float best[kPages];
#pragma unroll
  for (float& x : best) x = -INFINITY;
  for_each_product<Product, kPages>(
      summaries_of(a.cache, at.slot, at.g), a.cache.canonical, scale, use.pages, tile, use.rows, prepare,
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
template <int kSteps>
__device__ void rank_pages(const RankArgs& a, const UnitPlace& at, int ctas, ScoreShared& s) {
  constexpr int kPages = 4 / kSteps;  // that a lane has at once
  const Tile<kSteps> tile{s.q};
  const int s_q = at.s_q, group = a.shape.group, t = static_cast<int>(threadIdx.x);
  const PageChunks pages{at.first + static_cast<int>(blockIdx.x) * kScorePages, at.end, kScorePages,
                         ctas * kScorePages};
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
    const Uses scores{heads, 0, 0, heads, nullptr, score, h0 == 0, pages};
    if (a.q_mean) {
      const bool rank = policy == Policy::block_mean;
      float* q_mean = a.q_mean + at.u * a.cache.max_pages * a.row_stride + h0 * s_q;
      const Uses products{rank ? means + heads : rows, rows,    means, heads, q_mean,
                          rank ? score : nullptr,      h0 == 0, pages};
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
    for (int p0 = pages.first; p0 < pages.end; p0 += pages.stride)
      if (t < kScorePages && p0 + t < at.end)
        score[p0 + t] = any_valid ? static_cast<float>(p0 + t - at.first) : -INFINITY;
  if (blockIdx.x == 0 && t == 0) a.q_norm[at.u] = q_norm;
}

template <int kSteps>
__global__ __launch_bounds__(kScoreThreads, 2) void score_kernel(const __grid_constant__ RankArgs a) {
  __shared__ ScoreShared s;
  wait_for_previous_kernel();
  let_next_kernel_start();
  const UnitPlace at = unit_place(a);
  const bool lists_here = a.write_lists && !a.how.ranks;  // by one more CTA
  if (lists_here && blockIdx.x == gridDim.x - 1) {
    if (at.s_q == 0) return write_empty(a.lists, at.u);
    return write_lists(a.how, candidates_of(a, at), Cut::none(), nullptr, a.lists, at.u, s.lists);
  }
  if (at.s_q > 0) rank_pages<kSteps>(a, at, gridDim.x - lists_here, s);
}

// --- by mass

struct MassArgs {
  RankArgs rank;
  const float* state_ml;
  const float2* page_mass;
  int mass_parts;
};

// Eight lanes have a page: as many as there are heads take a head each, the others its other parts.
__global__ __launch_bounds__(kMassThreads) void mass_kernel(const __grid_constant__ MassArgs args) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  const RankArgs& a = args.rank;
  const UnitPlace at = unit_place(a);
  if (at.s_q == 0) return;
  const ForcedPages forced = forced_pages(a.how.force, at.block);
  const int group = a.shape.group, heads = group > 4 ? 8 : group > 2 ? 4 : group;  // at once
  const int lane = lane_id() % 8, head = lane % heads, part = lane / heads;
  const bool of_all = a.how.budget.kind == Budget::Kind::mass || a.how.budget.kind == Budget::Kind::tolerance;
  const float* weight = a.row_weight + at.u * a.row_stride;
  const float* state = args.state_ml + at.u * a.row_stride * 4;
  for (int p0 = at.first + static_cast<int>(blockIdx.x) * kMassPages; p0 < at.end;
       p0 += static_cast<int>(gridDim.x) * kMassPages) {
    const int page = p0 + static_cast<int>(threadIdx.x) / 8;
    const bool wanted = page < at.end && (of_all || !forced.has(page));
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
}

// --- choosing

// Launched after score_kernel or mass_kernel, which let it start once all before them is done: lengths can be read
// before the wait, scores after it.
__global__ __launch_bounds__(kChooseThreads, 1) void choose_kernel(const __grid_constant__ RankArgs a) {
  __shared__ ChooseShared<kChooseThreads> s;
  __shared__ ListShared<kChooseThreads> lists;
  extern __shared__ uint32_t keys[];
  let_next_kernel_start();
  const UnitPlace at = unit_place(a);
  const Candidates pages = candidates_of(a, at);
  if (threadIdx.x == 0) s.need = pages_wanted(a.how, pages);
  wait_for_previous_kernel();
  if (at.s_q == 0) return write_empty(a.lists, at.u);
  float* score = a.score + at.u * a.cache.max_pages + at.first;
  const Cut cut = choose(a.how, pages, score, keys, a.q_norm[at.u], summaries_of(a.cache, at.slot, at.g), s);
  write_lists(a.how, pages, cut, keys, a.lists, at.u, lists);
}

// --- launching

RankArgs rank_args(const RankParams& p) {
  return {p.cache,        p.batch,      p.shape,  p.q,     choosing(p.method, p.shape, false),
          !p.lists_given, p.row_stride, p.q_mean, p.score, p.q_norm,
          p.row_weight,   p.lists};
}

// Full pages that a unit may see, at most.
int64_t most_seen(const RankParams& p) {
  const int64_t in_window = p.shape.window > 0 ? (p.shape.window + p.shape.max_s_q) / kPageTokens + 2 : INT64_MAX;
  return std::min<int64_t>(in_window, p.cache.max_pages);
}

// Launches a kernel with as many CTAs for each unit as its pages keep busy, `more` besides, and together no more than
// `at_once` for each multiprocessor.
template <class Args>
cudaError_t launch_over_pages(void (*kernel)(Args), const RankParams& p, int pages_at_once, int at_once, int more,
                              int threads, cudaStream_t stream, const Args& args) {
  int device = 0, multiprocessors = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  if (const cudaError_t error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
      error != cudaSuccess)
    return error;
  const int64_t units = static_cast<int64_t>(p.batch.b) * p.shape.h_kv;
  const int64_t busy = std::max<int64_t>(1, (most_seen(p) + pages_at_once - 1) / pages_at_once);
  const int64_t ctas = std::clamp<int64_t>(at_once * multiprocessors / units, 1, busy) + more;
  const dim3 grid(static_cast<unsigned>(ctas), static_cast<unsigned>(p.shape.h_kv), static_cast<unsigned>(p.batch.b));
  return launch_early(kernel, grid, threads, 0, stream, args);
}

cudaError_t launch_choose(const RankParams& p, const RankArgs& args, cudaStream_t stream) {
  const dim3 grid(1, static_cast<unsigned>(p.shape.h_kv), static_cast<unsigned>(p.batch.b));
  return launch_early(choose_kernel, grid, kChooseThreads, static_cast<int>(most_seen(p)) * 4, stream, args);
}

}  // namespace

cudaError_t launch_rank(const RankParams& params, cudaStream_t stream) {
  if (params.batch.b == 0) return cudaSuccess;
  RankArgs args = rank_args(params);
  if (params.lists_given || params.method.policy == Policy::fp4_mass) args.how.ranks = false;
  const auto kernel = params.shape.d <= 128 ? score_kernel<2> : score_kernel<4>;
  const int lists = args.write_lists && !args.how.ranks ? 1 : 0;
  if (const cudaError_t error = launch_over_pages(kernel, params, kScorePages, 2, lists, kScoreThreads, stream, args);
      error != cudaSuccess || !args.how.ranks)
    return error;
  return launch_choose(params, args, stream);
}

cudaError_t launch_choose_by_mass(const MassParams& params, cudaStream_t stream) {
  if (params.rank.batch.b == 0) return cudaSuccess;
  const MassArgs args = {rank_args(params.rank), params.state_ml, params.page_mass, params.mass_parts};
  if (const cudaError_t error =
          launch_over_pages(mass_kernel, params.rank, kMassPages, 8, 0, kMassThreads, stream, args);
      error != cudaSuccess)
    return error;
  return launch_choose(params.rank, args.rank, stream);
}

}  // namespace thriftattn::cuda
