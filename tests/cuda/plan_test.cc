// What the CUDA backend serves and what it refuses: plan looks at no device, so a table says it, on any machine.
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "attention/problem.h"
#include "cuda/workspace.h"

namespace thriftattn::testing {
namespace {

Gpu hopper() { return {0, "some Hopper", 90, 132, 232448, int64_t{50} << 20, int64_t{80} << 30}; }
Gpu ada() { return {0, "some Ada", 89, 142, 101376, int64_t{96} << 20, int64_t{48} << 30}; }
Machine machine_of(const Gpu& gpu) {
  Machine machine;
  machine.gpu = gpu;
  return machine;
}
const Machine kHopper = machine_of(hopper());

Problem problem_of(const std::string& spec, Phase phase = Phase::decode) {
  return problem_for(spec, phase, {32, 8, 128, 128}, 131072);
}

TEST(CudaPlan, NamesTheKernelAndTheOrderOfRanking) {
  const struct {
    const char* spec;
    Phase phase;
    const char* kernel;
    Policy policy;
  } rows[] = {
      {"fp16", Phase::decode, "decode_warp", Policy::none},
      {"fp16", Phase::prefill, "prefill_warp", Policy::none},
      {"fp4", Phase::decode, "decode_warp", Policy::none},
      {"fp4", Phase::prefill, "prefill_warp", Policy::none},
      {"thrift", Phase::decode, "decode_warp_exchange", Policy::fp4_mass},
      {"thrift", Phase::prefill, "prefill_warp", Policy::block_mean},
      {"thrift:storage=dual", Phase::decode, "decode_warp_exchange", Policy::fp4_mass},
      {"thrift:budget=0", Phase::decode, "decode_warp", Policy::fp4_mass},
      {"thrift:policy=block_mean", Phase::decode, "decode_warp", Policy::block_mean},
      {"thrift:policy=fp4_mass,rest=none", Phase::decode, "decode_warp_score_first", Policy::fp4_mass},
      {"topk", Phase::decode, "decode_warp", Policy::block_mean},
      {"quest", Phase::prefill, "prefill_warp", Policy::quest},
      {"window", Phase::decode, "decode_warp", Policy::recent},
  };
  for (const auto& row : rows) {
    const auto planned = plan(problem_of(row.spec, row.phase), kHopper);
    ASSERT_TRUE(planned.ok()) << row.spec << ": " << planned.status().message();
    EXPECT_EQ(planned->backend, "cuda");
    EXPECT_EQ(planned->target, "sm_90");
    EXPECT_EQ(planned->kernel, row.kernel) << row.spec;
    EXPECT_EQ(planned->problem.method.policy, row.policy) << row.spec;
    EXPECT_EQ(planned->problem.method.arithmetic, Arithmetic::kv4) << row.spec;
    EXPECT_GT(planned->rows_per_tile, 0);
    EXPECT_GE(planned->splits, 1);
    EXPECT_GT(planned->workspace_bytes, 0) << row.spec;
    ASSERT_EQ(planned->refused.size(), 1u) << "the CPU says that the plan is for a GPU";
    EXPECT_NE(to_string(*planned).find(row.kernel), std::string::npos);
  }
}

TEST(CudaPlan, IsPure) {
  for (const Phase phase : {Phase::prefill, Phase::decode}) {
    const auto a = plan(problem_of("thrift", phase), kHopper), b = plan(problem_of("thrift", phase), kHopper);
    ASSERT_TRUE(a.ok() && b.ok());
    EXPECT_EQ(to_string(*a), to_string(*b));
  }
}

TEST(CudaPlan, AMachineWithoutAGpuPlansForTheCpu) {
  const auto planned = plan(problem_of("thrift"), Machine::here(1));
  ASSERT_TRUE(planned.ok()) << planned.status().message();
  EXPECT_EQ(planned->backend, "cpu");
}

TEST(CudaPlan, ServesEveryShapeOfTheCpu) {
  for (const int d : {16, 64, 80, 96, 112, 128, 192, 256})
    for (const int d_v : {d, 128})
      for (const int group : {1, 2, 3, 4, 7, 8, 16})
        for (const int64_t s_q : {1, 2, 5, 16})
          for (const char* spec : {"fp16", "fp4", "thrift", "thrift:policy=quest,storage=dual", "topk"}) {
            Problem p = problem_for(spec, Phase::decode, {group * 8, 8, d, d_v}, 131072);
            p.max_s_q = s_q;
            for (const Gpu& gpu : {hopper(), ada()}) {
              const auto planned = plan(p, machine_of(gpu));
              ASSERT_TRUE(planned.ok()) << planned.status().message();
              const cuda::DecodeConfig config = cuda::decode_config(planned->problem, gpu);
              EXPECT_LE(config.shared_bytes, gpu.shared_bytes) << to_string(*planned);
              EXPECT_GE(config.d_bucket, std::max(d, d_v)) << to_string(*planned);
            }
          }
}

// A prefill may report each row's mass above FP4 as well, for which a warp keeps a sum a row beside q.
TEST(CudaPlan, APrefillFitsIntoSharedMemory) {
  for (const int d : {16, 64, 80, 128, 192, 256})
    for (const int d_v : {d, 128})
      for (const Gpu& gpu : {hopper(), ada()}) {
        EXPECT_TRUE(plan(problem_for("thrift", Phase::prefill, {32, 8, d, d_v}, 131072), machine_of(gpu)).ok());
        for (const bool row_mass_high : {false, true}) {
          const cuda::PrefillConfig c = cuda::prefill_config(device_layout(d, d_v), row_mass_high, gpu.shared_bytes);
          EXPECT_LE(c.shared_bytes, gpu.shared_bytes) << d << "/" << d_v << " on " << gpu.name;
          EXPECT_GE(c.units, 1);
          EXPECT_GE(c.stages, 2) << "one page is read while the next is loaded";
        }
      }
}

TEST(CudaPlan, MemoryGrowsWithWhatTheProblemNeeds) {
  const auto bytes = [](const std::string& spec, auto change) {
    Problem p = problem_of(spec);
    change(p);
    const auto planned = plan(p, kHopper);
    EXPECT_TRUE(planned.ok()) << planned.status().message();
    return planned.ok() ? planned->workspace_bytes : 0;
  };
  const auto same = [](Problem&) {};
  EXPECT_LT(bytes("fp4", same), bytes("thrift", same)) << "page masses and states";
  EXPECT_LT(bytes("thrift:policy=block_mean", same), bytes("thrift", same));
  EXPECT_LT(bytes("thrift", same), bytes("thrift", [](Problem& p) { p.stats = true; }));
  EXPECT_LT(bytes("thrift", same), bytes("thrift", [](Problem& p) { p.b = 4; }));
  EXPECT_LT(bytes("thrift", same), bytes("thrift", [](Problem& p) { p.max_s_q = 8; }));
  EXPECT_LT(bytes("thrift", same), int64_t{16} << 20) << "of 131,072 tokens";
}

TEST(CudaPlan, PiecesOfAWorkspaceDoNotOverlap) {
  for (const char* spec : {"fp16", "fp4", "thrift", "thrift:policy=block_mean", "topk"})
    for (const bool stats : {false, true}) {
      Problem p = problem_of(spec);
      p.stats = stats;
      const auto planned = plan(p, kHopper);
      ASSERT_TRUE(planned.ok()) << planned.status().message();
      const cuda::WorkspaceLayout l =
          cuda::workspace_layout(planned->problem, cuda::decode_config(planned->problem, hopper()), 0);
      std::vector<int64_t> offsets;
      for (const int64_t at : {l.score, l.q_norm, l.order, l.counts, l.page_mass, l.row_mass_high, l.state_ml,
                               l.state_o, l.partials, l.tickets, l.lse, l.q})
        if (at != cuda::WorkspaceLayout::kAbsent) offsets.push_back(at);
      std::sort(offsets.begin(), offsets.end());
      EXPECT_EQ(std::adjacent_find(offsets.begin(), offsets.end()), offsets.end()) << spec;
      for (const int64_t at : offsets) EXPECT_EQ(at % 256, 0) << spec;
      EXPECT_LT(offsets.back(), l.bytes);
      EXPECT_EQ(l.bytes, planned->workspace_bytes);
    }
}

TEST(CudaPlan, RefusalsNameTheValueAndWhatIsSupported) {
  const auto refused = [](const std::string& spec, Phase phase, auto change, const Machine& machine,
                          const std::vector<std::string>& words) {
    Problem p = problem_of(spec, phase);
    change(p);
    expect_refusal(p, machine, words);
  };
  const auto same = [](Problem&) {};
  Gpu volta = hopper();
  volta.name = "some Volta";
  volta.compute_capability = 70;
  refused("thrift", Phase::decode, same, machine_of(volta), {"cuda: ", "some Volta", "7.0", "8.0 and later"});
  for (const Phase phase : {Phase::decode, Phase::prefill}) {
    refused("thrift:arithmetic=mma8", phase, same, kHopper, {"arithmetic=mma8", "kv4"});
    refused("paper", phase, same, kHopper, {"arithmetic=mma4", "kv4"});
    refused("thrift:policy=oracle", phase, same, kHopper, {"policy=oracle", "block_mean", "fp4_mass"});
    refused("thrift", phase, [](Problem& p) { p.cache.high_dtype = DType::bf16; }, kHopper, {"high_dtype=bf16", "f16"});
    refused("thrift", phase, [](Problem& p) { p.cache.storage_by_head.assign(4 * 8, Storage::residual); }, kHopper,
            {"storage_by_head"});
    refused("thrift", phase, [](Problem& p) { p.max_s_kv = 16384 * 64 + 1; }, kHopper, {"max_s_kv 1048577", "1048576"});
    refused("fp16", phase, [](Problem& p) { p.cache.storage = Storage::residual; }, kHopper,
            {"fp16", "storage=residual", "dual"});
  }
  refused("thrift", Phase::prefill, [](Problem& p) { p.stats = true; }, kHopper, {"stats", "decode"});
  refused("thrift", Phase::decode, [](Problem& p) { p.max_s_q = 17; }, kHopper, {"max_s_q 17"});
  Gpu small = ada();
  small.shared_bytes = 16384;
  for (const Phase phase : {Phase::decode, Phase::prefill})
    refused("thrift", phase, same, machine_of(small), {"head_dim 128", "shared memory", "some Ada", "16384"});
}

}  // namespace
}  // namespace thriftattn::testing
