// Ranking and choosing of a prefill on the GPU against the CPU's selection over the same cache.
#include "cuda/rank_world.h"

namespace thriftattn::testing::ranking {
namespace {

// --- prefill

void expect_prefill(const Scene& scene) {
  std::ostringstream text;
  text << scene;
  const std::string what = text.str();
  World w(scene);
  const DeviceBatch on(w);
  cuda::PrefillParams p = {};
  p.cache = on.cache;
  p.batch = on.batch;
  p.shape = on.shape;
  p.method = w.chosen();
  p.q = on.q_rows;
  p.max_blocks = static_cast<int>(w.max_s_q() / kPageTokens + 2);
  p.tier_words = (on.cache.max_pages + 15) / 16;
  const int heads = scene.shape.h_q;
  const size_t blocks = scene.growths.size() * static_cast<size_t>(heads * p.max_blocks);
  const OnDevice<uint32_t> tiers(blocks * static_cast<size_t>(p.tier_words));
  const OnDevice<int32_t> counts(blocks * 2);
  p.tiers = tiers.get();
  p.counts = counts.get();
  ASSERT_CUDA(cuda::launch_rank_prefill(p, nullptr)) << what;
  ASSERT_CUDA(cudaDeviceSynchronize()) << what;
  const std::vector<uint32_t> words = tiers.read();
  const std::vector<int32_t> count = counts.read();
  ASSERT_CUDA(cuda::launch_rank_prefill(p, nullptr)) << what;
  ASSERT_CUDA(cudaDeviceSynchronize()) << what;
  EXPECT_EQ(words, tiers.read()) << what << ": a second run differs";

  const Selection want = w.select_on_cpu();
  size_t next = 0;
  for (size_t i = 0; i < scene.growths.size(); ++i)
    for (int h = 0; h < heads; ++h) {
      const Growth& g = scene.growths[i];
      const int64_t n = query_blocks(Phase::prefill, g.s_q, g.s_kv());
      for (int64_t b = 0; b < n; ++b, ++next) {
        const std::string here =
            what + ", sequence " + std::to_string(i) + ", head " + std::to_string(h) + ", block " + std::to_string(b);
        const int64_t page = floor_page(g.settled) + b, first = std::max(page * kPageTokens, g.settled);
        const int64_t end = std::min((page + 1) * kPageTokens, g.s_kv());
        const Facts f = facts_of(w, i, h / w.group(), h, 1, w.first_row(i) + first - g.settled, end - first, first);
        const size_t at =
            (i * static_cast<size_t>(heads) + static_cast<size_t>(h)) * static_cast<size_t>(p.max_blocks) +
            static_cast<size_t>(b);
        std::vector<Promoted> got;
        for (int32_t j = 0; j < p.tier_words * 16; ++j) {
          const auto tier = static_cast<Tier>(
              words[at * static_cast<size_t>(p.tier_words) + static_cast<size_t>(j / 16)] >> j % 16 * 2 & 3);
          if (j < f.block.first_visible || j >= f.block.visible) {
            ASSERT_EQ(tier, Tier::none) << here << ": page " << j << " is not seen";
          } else if (tier != w.chosen().rest) {
            got.push_back({j, tier});
          }
        }
        expect_same(
            got, {want.pages.data() + want.first[next], static_cast<size_t>(want.first[next + 1] - want.first[next])},
            f, here);
        EXPECT_EQ(count[at * 2], static_cast<int32_t>(got.size())) << here;
      }
    }
}

TEST(CudaRankPrefill, ChoosesAsTheCpu) {
  SKIP_WITHOUT_GPU();
  const std::vector<Growth> growths = {{0, 1}, {0, 63}, {0, 64}, {0, 65}, {130, 200}, {64, 0}, {0, 1500}, {1000, 129}};
  for (const char* method :
       {"thrift", "thrift:budget=0.3,storage=dual", "thrift:force=none,budget=0.2", "thrift:budget=paper:0.2",
        "thrift:budget=top_k:3", "thrift:budget=per64", "thrift:budget=0", "thrift:storage=fp4_only",
        "thrift:budget=mass:0.6", "thrift:budget=tolerance:0.05", "quest", "topk:budget=0.4", "window", "fp4", "fp16",
        "thrift:policy=second_moment,budget=0.2", "paper:arithmetic=kv4"})
    expect_prefill({.method = method, .phase = Phase::prefill, .growths = growths});
}

TEST(CudaRankPrefill, WindowsMasksTypesHeadSizesAndNan) {
  SKIP_WITHOUT_GPU();
  const std::vector<Growth> growths = {{0, 700}, {333, 200}};
  for (const char* method : {"thrift:budget=0.3", "quest", "thrift:policy=second_moment,budget=paper:0.3"})
    for (const int64_t window : {0, 100, 300})
      for (const bool causal : {true, false}) {
        expect_prefill({.method = method,
                        .phase = Phase::prefill,
                        .window = window,
                        .causal = causal,
                        .q_dtype = DType::f16,
                        .growths = growths});
        expect_prefill({.method = method,
                        .phase = Phase::prefill,
                        .shape = {6, 2, 80, 16},
                        .window = window,
                        .causal = causal,
                        .q_dtype = DType::bf16,
                        .growths = growths,
                        .poison_rows = true});
        expect_prefill({.method = method,
                        .phase = Phase::prefill,
                        .shape = {20, 1, 256, 16},
                        .window = window,
                        .causal = causal,
                        .growths = growths});
      }
}

}  // namespace
}  // namespace thriftattn::testing::ranking
