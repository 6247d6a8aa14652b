// Ranking and choosing pages for a prefill: one CTA for a query block of 64 rows of one KV head.
//
//   q of a block --mean over its rows--> one row for each query head of the group
//   summaries    --products-----------> scores [heads, pages seen], in shared memory
//   scores       --choose, head by head--> tiers, 2 bits a page
//
// So summaries are read once for all heads of a group, out of L2, and nothing but tiers and counts is written. Of a
// causal prefill the last blocks, which see most pages, start first. Binds on the latency of L2; all in all some per
// cent of attention's time or less: q is read once, and a page costs a block d products for each head where attention
// takes 2 * 64 * 64 * d.
#include "cuda/choose.cuh"
#include "cuda/launch.cuh"
#include "cuda/mma.cuh"
#include "cuda/page_scores.cuh"
#include "format/params.h"

namespace thriftattn::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kHeads = 16;             // at once, at most
constexpr int kScoreBytes = 40 << 10;  // of a CTA, where one head's scores need no more

struct PrefillRankArgs {
  LayerCache cache;
  Batch batch;
  Shape shape;
  Rows<const void*> q;
  Choosing how;
  int max_blocks, tier_words;
  int heads_at_once, max_seen;  // heads whose scores shared memory holds; pages that a block sees, at most
  uint32_t* tiers;
  int32_t* counts;
};

struct PrefillRankShared {
  ChooseShared<kThreads> choose;
  int finite_rows[kWarps];
  float scale[kHeads], norm[kHeads];  // of a head's mean row: of its products, and its length
  int counts[kWarps][2];
};

// The mean row of one query head over the rows [first, first + count) of q, into row `to` of the tile; returns how many
// rows without NaN and Inf it is of. `partial` is [kWarps, stride].
template <int kSteps>
__device__ int average(const Rows<const void*>& q, int64_t first, int count, int head, int d, const Tile<kSteps>& tile,
                       int to, float* partial, PrefillRankShared& s) {
  constexpr int kAtOnce = 4, kStride = Tile<kSteps>::kStride;
  float sum[2 * kSteps] = {};
  int finite = 0;
  for (int r0 = warp_id(); r0 < count; r0 += kWarps * kAtOnce) {
    RowInWarp<kSteps> row[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) row[i].load(q, first + min(r0 + i * kWarps, count - 1), head, d);
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (!row[i].finite() || r0 + i * kWarps >= count) continue;
      ++finite;
#pragma unroll
      for (int c = 0; c < 2 * kSteps; ++c) sum[c] += row[i].x[c];
    }
  }
#pragma unroll
  for (int c = 0; c < 2 * kSteps; ++c) partial[warp_id() * kStride + lane_id() + 32 * c] = sum[c];
  if (lane_id() == 0) s.finite_rows[warp_id()] = finite;
  __syncthreads();
  finite = 0;
  for (int w = 0; w < kWarps; ++w) finite += s.finite_rows[w];
  for (int c = static_cast<int>(threadIdx.x); c < kStride; c += kThreads) {
    float x = 0;
    for (int w = 0; w < kWarps; ++w) x += partial[w * kStride + c];
    tile.at(to, c) = finite > 0 ? x / static_cast<float>(finite) : 0.0f;
  }
  __syncthreads();
  return finite;
}

// Writes the tiers of all pages and the counts of one block and head.
__device__ void write_tiers(const PrefillRankArgs& a, const Candidates& c, const Cut& cut, const uint32_t* keys,
                            int64_t at, PrefillRankShared& s) {
  uint32_t* words = a.tiers + at * a.tier_words;
  int promoted = 0, wanted = 0;
  for (int w = 2 * warp_id(); w < a.tier_words; w += 2 * kWarps) {
    const int page = w * 16 + lane_id();
    Verdict v = {Tier::none, false, false};
    if (page >= c.first && page < c.end)
      v = judge(a.how, c, cut, page, keys ? keys[page - c.first] : c.forced(page) ? kForcedKey : 1);
    promoted += __popc(__ballot_sync(kAll, v.listed));
    wanted += __popc(__ballot_sync(kAll, v.wanted));
    const uint32_t code = static_cast<uint32_t>(v.tier) << lane_id() % 16 * 2;
    const uint32_t low = __reduce_or_sync(kAll, lane_id() < 16 ? code : 0);
    const uint32_t high = __reduce_or_sync(kAll, lane_id() < 16 ? 0 : code);
    if (lane_id() < 2 && w + lane_id() < a.tier_words) words[w + lane_id()] = lane_id() ? high : low;
  }
  if (lane_id() == 0) {
    s.counts[warp_id()][0] = promoted;
    s.counts[warp_id()][1] = wanted;
  }
  __syncthreads();
  if (threadIdx.x < 2) {
    int sum = 0;
    for (int w = 0; w < kWarps; ++w) sum += s.counts[w][threadIdx.x];
    a.counts[at * 2 + threadIdx.x] = sum;
  }
}

template <int kSteps>
__global__ __launch_bounds__(kThreads, 2) void rank_prefill_kernel(const __grid_constant__ PrefillRankArgs a) {
  __shared__ PrefillRankShared s;
  extern __shared__ float memory[];
  let_next_kernel_start();
  wait_for_previous_kernel();
  const int block = a.max_blocks - 1 - static_cast<int>(blockIdx.x), g = static_cast<int>(blockIdx.y);
  const int64_t i = blockIdx.z;
  const int slot = a.batch.slot[i], s_q = a.batch.s_q[i], s_kv = a.cache.s_kv[slot], offset = s_kv - s_q;
  if (block >= query_blocks(Phase::prefill, s_q, s_kv)) return;
  const int page = static_cast<int>(floor_page(offset)) + block;
  const int first = max(page * kPageTokens, offset), end = min((page + 1) * kPageTokens, s_kv);  // positions
  const BlockPages facts = block_pages(first, end - 1, s_kv, {a.shape.causal, a.shape.window});
  const Candidates c = candidates(facts, a.how.force, a.cache, a.cache.released[slot]);
  const Summaries summaries = summaries_of(a.cache, slot, g);
  const int n = c.end - c.first;
  const float scale = a.shape.sm_scale;

  constexpr int kStride = Tile<kSteps>::kStride;
  float* partial = memory;
  const Tile<kSteps> tile{partial + kWarps * kStride};
  const Planes<kSteps> planes{
      reinterpret_cast<__half*>(tile.q + static_cast<int>(round_up(a.heads_at_once, 4)) * kStride)};
  float* scores = reinterpret_cast<float*>(planes.q) + planes.bytes(a.heads_at_once) / 4;
  uint32_t* bins = reinterpret_cast<uint32_t*>(scores + a.heads_at_once * a.max_seen);
  for (int h0 = 0; h0 < a.shape.group; h0 += a.heads_at_once) {
    const int heads = min(a.heads_at_once, a.shape.group - h0);
    unsigned valid = 0;  // heads with a finite row
    if (a.how.ranks) {
      for (int h = 0; h < heads; ++h) {
        const int head = g * a.shape.group + h0 + h;
        const int64_t row = a.batch.first_row[i] + first - offset;
        if (average(a.q, row, end - first, head, a.shape.d, tile, h, partial, s) > 0) valid |= 1u << h;
      }
      for (int h = warp_id(); h < heads; h += kWarps) {
        RowInWarp<kSteps> mean;
        mean.load(tile, h);
        const float planes_scale = planes.write(h, mean), norm = mean.norm();
        if (lane_id() == 0) {
          s.scale[h] = planes_scale;
          s.norm[h] = norm;
        }
      }
      __syncthreads();
      const auto prepare = [] {};
      const auto emit = [&](int p, int row, float sum) {
        if (row < heads && p < c.end)
          scores[row * a.max_seen + p - c.first] = valid >> row & 1 ? sum * scale : -INFINITY;
      };
      const auto emit_mean = [&](int p, int row, float sum) {
        if (row < heads) emit(p, row, sum * s.scale[row]);
      };
      const auto done = [](int) {};
      const PageChunks pages{c.first, c.end, n, n};
      if (a.how.policy == Policy::block_mean)
        for_each_mean_product(summaries, a.cache.canonical, pages, planes, heads, prepare, emit_mean, done);
      if (a.how.policy == Policy::quest)
        for_each_product<QuestProduct>(summaries, a.cache.canonical, scale, pages, tile, heads, prepare, emit, done);
      if (a.how.policy == Policy::second_moment)
        for_each_product<MomentProduct>(summaries, a.cache.canonical, scale, pages, tile, heads, prepare, emit, done);
      if (a.how.policy == Policy::recent)
        for (int h = 0; h < heads; ++h)
          for (int p = static_cast<int>(threadIdx.x); p < n; p += kThreads)
            scores[h * a.max_seen + p] = valid >> h & 1 ? static_cast<float>(p) : -INFINITY;
    }
    for (int h = 0; h < heads; ++h) {
      __syncthreads();  // the scores are there, and the head before is done with s
      float* score = scores + h * a.max_seen;
      uint32_t* keys = a.how.ranks ? reinterpret_cast<uint32_t*>(score) : nullptr;
      Cut cut = Cut::none();
      if (a.how.ranks) {
        const float q_norm = valid >> h & 1 ? s.norm[h] : 0.0f;
        if (threadIdx.x == 0) s.choose.need = pages_wanted(a.how, c);
        cut = choose<true>(a.how, c, score, keys, bins, q_norm, summaries, s.choose);
      }
      const int head = g * a.shape.group + h0 + h;
      write_tiers(a, c, cut, keys, (i * a.shape.h_q + head) * a.max_blocks + block, s);
    }
    __syncthreads();
  }
}

// Shared memory is what the launch names, beside PrefillRankShared.
struct Config {
  int heads_at_once, max_seen, dynamic_bytes;
};
Config config_of(int64_t max_pages, int64_t window, bool causal, int group, int d) {
  const int64_t in_window = (window + kPageTokens) / kPageTokens * (causal ? 1 : 2) + 2;
  Config c{};
  c.max_seen = static_cast<int>(window > 0 ? std::min(in_window, max_pages) : max_pages);
  c.max_seen = static_cast<int>(round_up(std::max(1, c.max_seen), 4));  // as choose() wants its keys
  const int head_bytes = c.max_seen * static_cast<int>(sizeof(float));
  c.heads_at_once = std::clamp(kScoreBytes / head_bytes, 1, std::min(group, kHeads));
  const int row_bytes = (d > 128 ? 256 : 128) * static_cast<int>(sizeof(float));
  const int plane_bytes = d > 128 ? Planes<4>::bytes(c.heads_at_once) : Planes<2>::bytes(c.heads_at_once);
  c.dynamic_bytes = (kWarps + static_cast<int>(round_up(c.heads_at_once, 4))) * row_bytes + plane_bytes +
                    c.heads_at_once * head_bytes + c.max_seen;
  return c;
}

}  // namespace

int64_t rank_prefill_shared_bytes(const Problem& p) {
  const Config c = config_of(std::max<int64_t>(1, pages_for(p.max_s_kv)), p.window, p.causal, p.h_q / p.h_kv, p.d);
  return c.dynamic_bytes + static_cast<int64_t>(sizeof(PrefillRankShared));
}

cudaError_t launch_rank_prefill(const PrefillParams& p, cudaStream_t stream) {
  if (p.tiers_given || p.batch.b == 0) return cudaSuccess;
  const Config config = config_of(p.cache.max_pages, p.shape.window, p.shape.causal, p.shape.group, p.shape.d);
  const PrefillRankArgs args = {p.cache,
                                p.batch,
                                p.shape,
                                p.q,
                                choosing(p.method, p.shape, p.shape.causal),
                                p.max_blocks,
                                p.tier_words,
                                config.heads_at_once,
                                config.max_seen,
                                p.tiers,
                                p.counts};
  const bool wide = p.shape.d > 128;
  const auto kernel = wide ? rank_prefill_kernel<4> : rank_prefill_kernel<2>;
  const dim3 grid(static_cast<unsigned>(p.max_blocks), static_cast<unsigned>(p.shape.h_kv),
                  static_cast<unsigned>(p.batch.b));
  return launch_early(kernel, grid, kThreads, config.dynamic_bytes, stream, args);
}

}  // namespace thriftattn::cuda
