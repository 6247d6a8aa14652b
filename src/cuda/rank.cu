// Ranking the pages of a decode or verify step, and choosing among them.
//
//   launch_rank            score_kernel   q, summaries -> score (the policy's, of the mean row of a head; the largest
//                                         of a unit's heads)
//                          choose_kernel  score -> lists
//   launch_choose_by_mass  choose_kernel  page masses and states that attend left -> shares of the softmax -> lists
//
// Scores of a unit's pages are dealt to as many CTAs as keep the GPU busy; one CTA chooses for a unit. Before a kernel
// waits for the one ahead it does all that needs no result of that: lengths, tables and summaries come from the cache's
// kernels, none of which lets another start before its own end. (Summaries that the step's append may just have written
// are waited for.) It also rehearses what follows, on blank rows and without results: code that runs once costs mostly
// the fetching of its instructions.
//
// Binds on DRAM with many sequences (a summary is 272 bytes at d = 128, 3 % of what attend reads), with one on the
// latency of the steps that follow from one another: q, products; then scores, range, bin, lists.
#include <utility>

#include "cuda/choose.cuh"
#include "cuda/launch.cuh"
#include "cuda/mass_scores.cuh"
#include "cuda/mma.cuh"
#include "cuda/page_scores.cuh"

namespace thriftattn::cuda {
namespace {

constexpr int kScoreThreads = 256;
constexpr int kScorePages = 128;  // that a CTA has at once
constexpr int kMeans = 16;        // heads that a CTA has at once

struct RankArgs {
  LayerCache cache;
  Batch batch;
  Shape shape;
  Rows<const void*> q;
  Choosing how;
  int row_stride;
  float *score, *q_norm;
  Lists lists;
};

// The unit of a CTA: KV head blockIdx.y of sequence blockIdx.z. Read past L1, for a kernel that starts early.
struct UnitPlace {
  int64_t u, first_row;
  int slot, g, s_q;
  BlockPages block;
  int first, end;  // the full pages that it sees
  bool filled;     // some of them by this step
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
  at.filled = at.end > (s_kv - at.s_q) / kPageTokens;
  return at;
}

__device__ Candidates candidates_of(const RankArgs& a, const UnitPlace& at) {
  return candidates(at.block, a.how.force, a.cache, __ldcg(a.cache.released + at.slot));
}

// --- by summaries

template <int kSteps>
struct ScoreShared {
  float scale[kMeans];  // of products of a head's mean row
  float norm[kMeans];   // of the row
  bool valid[kMeans];   // whether the head has a row without NaN and Inf
  uint16_t blank[64 * kSteps];
};

// The rows of a unit in q.
struct QueryRows {
  Rows<const void*> q;
  int64_t first;
  int count, head;  // head: the first of the group
};

// The mean rows of some heads in dynamic shared memory, as planes and as floats.
template <int kSteps>
struct MeanRows {
  Planes<kSteps> planes;
  Tile<kSteps> floats;

  static constexpr int bytes() {
    return Planes<kSteps>::bytes(kMeans) + kMeans * Tile<kSteps>::kStride * static_cast<int>(sizeof(float));
  }
  __device__ explicit MeanRows(uint8_t* memory)
      : planes{reinterpret_cast<__half*>(memory)},
        floats{reinterpret_cast<float*>(memory + Planes<kSteps>::bytes(kMeans))} {}
};

// Whether somebody asks for q_norm.
__device__ bool measures(const RankArgs& a) { return a.how.budget.kind == Budget::Kind::tolerance; }

// Brings the mean rows of the `heads` heads of the group from h0 on, a warp for each head, of those without NaN and
// Inf.
template <int kSteps>
__device__ void load_means(const RankArgs& a, const QueryRows& rows, int h0, int heads, const MeanRows<kSteps>& to,
                           ScoreShared<kSteps>& s) {
#pragma unroll 1
  for (int h = warp_id(); h < heads; h += kScoreThreads / 32) {
    RowInWarp<kSteps> mean, row, next;
    mean.clear();
    int count = 0;
    // The next row is under way while one is added. Several at once would take less time where there are many, but
    // their code more where there is one.
#pragma unroll 1
    for (int r = 0; r <= rows.count; ++r) {
      if (r < rows.count) next.load(rows.q, rows.first + r, rows.head + h0 + h, a.shape.d);
      if (r > 0 && row.finite()) {
        ++count;
        mean.add(row);
      }
      row = next;
    }
    if (count > 1) mean.divide(static_cast<float>(count));
    const float scale = to.planes.write(h, mean);
    if (a.how.policy != Policy::block_mean)
#pragma unroll
      for (int i = 0; i < 2 * kSteps; ++i) to.floats.at(h, mean.channel(i)) = mean.x[i];
    const float norm = measures(a) ? mean.norm() : 0.0f;
    if (lane_id() == 0) {
      s.scale[h] = scale;
      s.valid[h] = count > 0;
      s.norm[h] = norm;
    }
  }
  __syncthreads();
}

// The largest of a page's scores, of the heads that a lane sees, then of all.
template <int kSteps>
struct Best {
  const ScoreShared<kSteps>& s;
  float* score;      // of page 0
  bool first_heads;  // of the group: the score starts here
  int end;           // pages
  float best = -INFINITY;

  __device__ void see(int h, int heads, float x) {
    if (h >= 0 && h < heads && s.valid[h]) best = fmaxf(best, x);
  }
  // Lanes that differ in the bits of `mask` alone have the same page; the one with none of them set stores.
  __device__ void store(int page, int mask) {
    for (int i = 1; i <= mask; i *= 2)
      if (mask & i) best = fmaxf(best, __shfl_xor_sync(kAll, best, i));
    if (page < end && (lane_id() & mask) == 0) score[page] = first_heads ? best : fmaxf(score[page], best);
    best = -INFINITY;
  }
};

// Scores of the CTA's pages, as many heads at a time as there is room for. A rehearsal has no pages and a blank row.
// kMean: by block_mean, else by another policy: a kernel for each is shorter.
template <int kSteps, bool kMean>
__device__ void rank_pages(const RankArgs& a, const UnitPlace& at, bool rehearsal, const MeanRows<kSteps>& to,
                           ScoreShared<kSteps>& s) {
  const QueryRows rows = rehearsal ? QueryRows{{s.blank, DType::f16, 0, 0}, 0, 1, 0}
                                   : QueryRows{a.q, at.first_row, at.s_q, at.g * a.shape.group};
  const int group = a.shape.group, t = static_cast<int>(threadIdx.x);
  const int end = rehearsal ? 0 : at.end;
  const PageChunks pages{at.first + static_cast<int>(blockIdx.x) * kScorePages, end, kScorePages,
                         static_cast<int>(gridDim.x) * kScorePages};
  const Policy policy = a.how.policy;
  const Summaries summaries = summaries_of(a.cache, at.slot, at.g);
  const float sm_scale = a.shape.sm_scale;
  float* score = a.score + at.u * a.cache.max_pages;
  float q_norm = 0;
  bool any_valid = false;
#pragma unroll 1
  for (int h0 = 0; h0 < group; h0 += kMeans) {
    const int heads = min(kMeans, group - h0);
    bool loaded = false;
    const auto prepare = [&] {
      if (loaded) return;
      if (!rehearsal) wait_for_previous_kernel();  // which may have made q
      __syncthreads();                             // the heads before are done with
      load_means(a, rows, h0, heads, to, s);
      loaded = true;
    };
    if (at.filled && !rehearsal) wait_for_previous_kernel();
    Best<kSteps> best{s, score, h0 == 0, end};
    const auto emit = [&](int, int row, float sum) { best.see(row, heads, sum * sm_scale); };
    const auto emit_mean = [&](int, int row, float sum) {
      if (row < heads) best.see(row, heads, sum * s.scale[row] * sm_scale);
    };
    const auto done = [&](int page) { best.store(page, 7); };
    const auto done_mean = [&](int page) { best.store(page, 1); };
    if constexpr (kMean) {
      for_each_mean_product(summaries, a.cache.canonical, pages, to.planes, heads, prepare, emit_mean, done_mean);
    } else {
      if (policy == Policy::quest)
        for_each_product<QuestProduct>(summaries, a.cache.canonical, sm_scale, pages, to.floats, heads, prepare, emit,
                                       done);
      if (policy == Policy::second_moment)
        for_each_product<MomentProduct>(summaries, a.cache.canonical, sm_scale, pages, to.floats, heads, prepare, emit,
                                        done);
      prepare();  // where nothing was multiplied
    }
    if (policy == Policy::recent || measures(a))
      for (int h = 0; h < heads; ++h) {
        any_valid |= s.valid[h];
        if (s.valid[h]) q_norm = fmaxf(q_norm, s.norm[h]);
      }
  }
  if (policy == Policy::recent)
    for (int p0 = pages.first; p0 < pages.end; p0 += pages.stride)
      if (t < kScorePages && p0 + t < end)
        score[p0 + t] = any_valid ? static_cast<float>(p0 + t - at.first) : -INFINITY;
  if (!rehearsal && measures(a) && blockIdx.x == 0 && t == 0) a.q_norm[at.u] = q_norm;
}

// Two CTAs of 128 registers a thread; for d > 128 one, which then keeps all it has loaded in registers: 7 % of a step.
template <int kSteps, bool kMean>
__global__ __launch_bounds__(kScoreThreads, kSteps == 2 ? 2 : 1) void score_kernel(const __grid_constant__ RankArgs a) {
  __shared__ ScoreShared<kSteps> s;
  extern __shared__ __align__(16) uint8_t memory[];
  let_next_kernel_start();
  const UnitPlace at = unit_place(a);
  if (at.s_q == 0) wait_for_previous_kernel();
  if (threadIdx.x < 64 * kSteps) s.blank[threadIdx.x] = 0;
#pragma unroll 1
  for (int take = 0; take < 2 && at.s_q > 0; ++take)
    rank_pages<kSteps, kMean>(a, at, take == 0, MeanRows<kSteps>(memory), s);
}

// --- choosing

// How fp4_mass knows a page's score: from what attend has left. Null where scores stand in RankArgs::score.
struct Masses {
  const float *state_ml, *page_mass;
  int parts;
};
struct ChooseArgs {
  RankArgs rank;
  Masses masses;
};

// The scores of a unit's pages by their masses, each left by the thread of the page's number modulo all threads. `row`
// has room for row_stride. A rehearsal has one blank row and page for a thread, and leaves nothing.
template <int kThreads>
__device__ void scores_by_mass(const ChooseArgs& args, const UnitPlace& at, const Candidates& pages, bool rehearsal,
                               const float* blank, RowShare* row, float* score) {
  const RankArgs& a = args.rank;
  const bool of_all = weighs_pages(a.how.budget);
  const int rows = rehearsal ? 1 : a.shape.group * at.s_q, s_q = rehearsal ? 1 : at.s_q;
  const int parts = rehearsal ? 1 : args.masses.parts, t = static_cast<int>(threadIdx.x);
  load_row_shares(rehearsal ? blank : args.masses.state_ml + at.u * a.row_stride * 4, rows, s_q, row);
  __syncthreads();
  const float* mass =
      rehearsal ? blank : args.masses.page_mass + (at.u * a.cache.max_pages + pages.first) * parts * a.row_stride;
  const int n = rehearsal ? t + 1 : pages.end - pages.first;
#pragma unroll 1
  for (int i = t; i < n; i += kThreads) {
    // Forced pages may have no masses: what is read there is not used.
    const float* of_page = mass + static_cast<int64_t>(rehearsal ? 0 : i) * parts * a.row_stride;
    const float share = mass_score(of_page, parts, a.row_stride, row, rows, s_q);
    if (!rehearsal && (of_all || !pages.forced(pages.first + i))) score[i] = share;
  }
}

// Lengths are read before the wait, scores after it. A rehearsal would gain nothing here but for masses. What reads the
// lists may start once the cut is known; attention that starts sooner takes longer by more than the launch does
// (docs/performance-gpu.md).
template <bool kByMass, bool kMayWeigh, int kThreads>
__global__ __launch_bounds__(kThreads, 1024 / kThreads) void choose_kernel(const __grid_constant__ ChooseArgs args) {
  __shared__ ChooseShared<kThreads> s;
  __shared__ ListShared<kThreads> lists;
  __shared__ alignas(16) float blank[4];
  extern __shared__ __align__(16) uint8_t memory[];
  const RankArgs& a = args.rank;
  const UnitPlace at = unit_place(a);
  const Candidates pages = candidates_of(a, at);
  RowShare* row = reinterpret_cast<RowShare*>(memory);
  uint32_t* keys = reinterpret_cast<uint32_t*>(row + (kByMass ? a.row_stride : 0));
  uint32_t* bins = keys + round_up(pages.end - pages.first, 4);
  float* score = kByMass ? reinterpret_cast<float*>(keys) : a.score + at.u * a.cache.max_pages + at.first;
  if (threadIdx.x == 0) s.need = pages_wanted(a.how, pages);
  if constexpr (kByMass) {
    if (threadIdx.x < 4) blank[threadIdx.x] = 0;
#pragma unroll 1
    for (int take = 0; take < 2; ++take) {
      const bool rehearsal = take == 0;
      __syncthreads();
      if (!rehearsal) wait_for_previous_kernel();
      if (at.s_q > 0) scores_by_mass<kThreads>(args, at, pages, rehearsal, blank, row, score);
    }
  } else {
    wait_for_previous_kernel();
  }
  if (at.s_q > 0) {
    const Cut cut =
        choose<kMayWeigh>(a.how, pages, score, keys, bins, a.q_norm[at.u], summaries_of(a.cache, at.slot, at.g), s);
    let_next_kernel_start();
    write_lists(a.how, pages, cut, keys, a.lists, at.u, lists);
  } else if (threadIdx.x < 8) {
    a.lists.counts[at.u * 8 + threadIdx.x] = 0;
  }
}

// --- launching

RankArgs rank_args(const RankParams& p) {
  return {p.cache, p.batch, p.shape, p.q, choosing(p.method, p.shape, false), p.row_stride, p.score, p.q_norm, p.lists};
}

// Full pages that a unit may see, at most.
int64_t most_seen(const RankParams& p) {
  const int64_t in_window = p.shape.window > 0 ? (p.shape.window + p.shape.max_s_q) / kPageTokens + 2 : INT64_MAX;
  return std::min<int64_t>(in_window, p.cache.max_pages);
}

using ChooseKernel = void (*)(ChooseArgs);

// By masses, which take longest, a thread has few pages; where there are few pages, threads are few, since barriers
// wait for all of them (docs/performance-gpu.md).
template <bool kByMass, bool kMayWeigh>
std::pair<ChooseKernel, int> choose_kernel_for(int64_t pages) {
  constexpr int kFew = 256, kMany = kByMass ? 1024 : 512;
  if (pages <= (kByMass ? 256 : 128)) return {choose_kernel<kByMass, kMayWeigh, kFew>, kFew};
  return {choose_kernel<kByMass, kMayWeigh, kMany>, kMany};
}

cudaError_t launch_choose(const RankParams& p, const Masses& masses, cudaStream_t stream) {
  const dim3 grid(1, static_cast<unsigned>(p.shape.h_kv), static_cast<unsigned>(p.batch.b));
  const bool by_mass = masses.page_mass != nullptr;
  const int64_t rows = by_mass ? p.row_stride : 0, pages = most_seen(p);
  const int64_t bytes = rows * static_cast<int64_t>(sizeof(RowShare)) + round_up(pages, 4) * 5;
  const bool weighs = weighs_pages(p.method.budget);
  const auto kernel_for = by_mass ? (weighs ? choose_kernel_for<true, true> : choose_kernel_for<true, false>)
                                  : (weighs ? choose_kernel_for<false, true> : choose_kernel_for<false, false>);
  const auto [kernel, threads] = kernel_for(pages);
  return launch_early(kernel, grid, threads, static_cast<int>(bytes), stream, ChooseArgs{rank_args(p), masses});
}

}  // namespace

// A unit's pages are dealt to as many CTAs as they keep busy; all units' together are two for each multiprocessor.
cudaError_t launch_rank(const RankParams& p, cudaStream_t stream) {
  if (p.batch.b == 0) return cudaSuccess;
  int device = 0, multiprocessors = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  if (const cudaError_t error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
      error != cudaSuccess)
    return error;
  const bool wide = p.shape.d > 128, norms = p.method.policy == Policy::fp4_mass;
  const int64_t units = static_cast<int64_t>(p.batch.b) * p.shape.h_kv;
  const int64_t busy = norms ? 1 : std::max<int64_t>(1, (most_seen(p) + kScorePages - 1) / kScorePages);
  const int64_t ctas = std::clamp<int64_t>(2 * multiprocessors / units, 1, busy);
  const dim3 grid(static_cast<unsigned>(ctas), static_cast<unsigned>(p.shape.h_kv), static_cast<unsigned>(p.batch.b));
  const int shared = wide ? MeanRows<4>::bytes() : MeanRows<2>::bytes();
  const bool by_mean = p.method.policy == Policy::block_mean;
  const auto kernel = wide ? (by_mean ? score_kernel<4, true> : score_kernel<4, false>)
                           : (by_mean ? score_kernel<2, true> : score_kernel<2, false>);
  if (const cudaError_t error = launch_early(kernel, grid, kScoreThreads, shared, stream, rank_args(p));
      error != cudaSuccess || norms)
    return error;
  return launch_choose(p, {}, stream);
}

cudaError_t launch_choose_by_mass(const MassParams& p, cudaStream_t stream) {
  if (p.rank.batch.b == 0) return cudaSuccess;
  return launch_choose(p.rank, {p.state_ml, p.page_mass, p.mass_parts}, stream);
}

}  // namespace thriftattn::cuda
