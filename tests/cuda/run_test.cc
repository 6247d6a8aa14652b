// A GPU against the CPU and the oracle: the same tokens in both caches, the same selection read by both, and each
// backend's own selection.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "attention/agreement.h"
#include "cuda/session.h"

namespace thriftattn::testing {
namespace {

// FP16 products: q and p are rounded to 11 bits once, which moves a score by up to 2^-12 of the sum of its terms'
// magnitudes, several times the score where terms cancel, and p by 2^-12 of itself; sums are FP32. `out` in units of
// the largest |v|, lse beside a share of itself. In a prefill the keys and values of an FP4 page are rounded too, mean
// and all, so that the error goes with the outlier channels' part of a score: with sm_scale.
constexpr double kHalfError = 5e-4, kHalfLseError = 2e-3, kHalfLseShare = 4e-4;
constexpr double kExpandedError = 1.5e-2, kExpandedLseShare = 4e-3;  // times sm_scale
// Masses by FP16 scores, relative to the largest.
constexpr double kHalfTie = 2e-3;

// Every head size, group and mask, not every combination.
const Setting kSettings[] = {
    {"d128", 8, 2, 128, 128, 0, 0, false},
    {"d128_window", 8, 2, 128, 128, 100, 0, false},
    {"d128_softcap", 4, 2, 128, 128, 0, 4, false},
    {"d128_sinks", 4, 2, 128, 128, 0, 0, true},
    {"d16", 4, 2, 16, 16, 0, 0, false},
    {"d64_mha", 2, 2, 64, 64, 0, 0, false},
    {"d64_group3_sinks", 6, 2, 64, 64, 0, 0, true},
    {"d80_window_softcap_sinks", 4, 2, 80, 80, 90, 3, true},
    {"d96_group8_window", 16, 2, 96, 96, 200, 0, false},
    {"d192_dv128_sinks", 4, 2, 192, 128, 0, 0, true},
    {"d256_window_softcap", 4, 2, 256, 256, 130, 4, false},
    {"d256_group16", 16, 1, 256, 256, 0, 0, false},
};
const Step kSteps[] = {{"prefill", Phase::prefill, 500},
                       {"chunk", Phase::prefill, 77},
                       {"decode", Phase::decode, 1},
                       {"verify3", Phase::decode, 3},
                       {"verify16", Phase::decode, 16}};
constexpr int64_t kTokens = 500;

// About half of the pages that every block sees, in tiers of which all occur.
Selection random_half(const oracle::Input& input, const std::vector<Tier>& tiers, uint32_t seed = 1) {
  std::mt19937 random(seed);
  Selection selection;
  selection.first.push_back(0);
  for (const oracle::QueryBlock& block : oracle::query_blocks(input)) {
    for (auto j = static_cast<int32_t>(block.first_page); j < block.pages; ++j)
      if (random() % 2) selection.pages.push_back({j, tiers[random() % tiers.size()]});
    selection.first.push_back(static_cast<int64_t>(selection.pages.size()));
  }
  return selection;
}

void expect_near(const Ran& got, const Ran& want, const Tokens& tokens, const std::string& what) {
  const double sm_scale = got.plan.problem.phase == Phase::prefill ? 1 / std::sqrt(tokens.shape.d) : 0;
  EXPECT_LE(distance(got.out, want.out, tokens), std::max(kHalfError, kExpandedError * sm_scale)) << what;
  const double share = std::max(kHalfLseShare, kExpandedLseShare * sm_scale);
  ASSERT_EQ(got.lse.size(), want.lse.size()) << what;
  for (size_t i = 0; i < want.lse.size(); ++i) {
    if (std::isinf(want.lse[i])) {
      ASSERT_EQ(got.lse[i], want.lse[i]) << what << ", row " << i;
    } else {
      ASSERT_NEAR(got.lse[i], want.lse[i], kHalfLseError + share * std::fabs(want.lse[i])) << what << ", row " << i;
    }
  }
}

// One sequence on both, its last rows brought by the step that is asked.
struct Pair {
  Pair(const std::string& spec, const Tokens& tokens, int64_t rows)
      : cpu(method(spec), tokens), gpu(method(spec), tokens) {
    cpu.append(tokens.s - rows);
    cpu.settle();
    cpu.append(rows);
    gpu.append(tokens.s - rows);
    gpu.end_step();
    gpu.append(rows);
  }
  Session cpu;
  GpuSession gpu;
};

class GpuRun : public ::testing::TestWithParam<std::tuple<Step, Setting>> {
 protected:
  void SetUp() override { SKIP_WITHOUT_GPU(); }
  const Step& step() const { return std::get<0>(GetParam()); }
  const Setting& setting() const { return std::get<1>(GetParam()); }
  Call call() const { return call_of(setting(), step().phase); }
  Tokens tokens(int64_t s = kTokens) const {
    return attention_like({setting().h_q, setting().h_kv, setting().d, setting().d_v}, s);
  }
};
INSTANTIATE_TEST_SUITE_P(Steps, GpuRun, ::testing::Combine(::testing::ValuesIn(kSteps), ::testing::ValuesIn(kSettings)),
                         [](const auto& test) {
                           return std::string(std::get<0>(test.param).name) + "_" + std::get<1>(test.param).name;
                         });

TEST_P(GpuRun, ReadsAGivenSelectionAsTheCpuDoes) {
  const Tokens x = tokens();
  const struct {
    const char* spec;
    std::vector<Tier> tiers;
  } rows[] = {{"thrift", {Tier::fp4x2, Tier::fp4, Tier::none}},
              {"thrift:storage=dual", {Tier::fp16, Tier::none}},
              {"thrift:storage=fp4_only", {Tier::fp4, Tier::none}},
              {"thrift:storage=dual,format=mxfp4", {Tier::fp16}},
              {"thrift:format=mxfp4", {Tier::fp4x2}},
              {"thrift:centring=off,page_scale=off", {Tier::fp4x2}},
              {"thrift:scales=4over6", {Tier::fp4x2}},
              {"thrift:rest=none", {Tier::fp4x2, Tier::fp4}},
              {"topk", {Tier::fp16}}};
  for (const auto& row : rows) {
    Pair pair(row.spec, x, step().rows);
    const Selection some = random_half(pair.cpu.oracle_input(step().rows, call()), row.tiers);
    Call given = call();
    given.given = &some;
    expect_near(pair.gpu.attend(given), pair.cpu.attend(step().rows, given), x, row.spec);
  }
}

TEST_P(GpuRun, ChoosesAsTheOracleDoes) {
  const Tokens x = tokens();
  for (const char* spec : {"fp16",
                           "fp4",
                           "thrift",
                           "thrift:budget=0.3",
                           "thrift:storage=dual,budget=0.3",
                           "thrift:storage=fp4_only",
                           "thrift:budget=0",
                           "thrift:policy=block_mean,budget=0.3",
                           "thrift:policy=quest,budget=top_k:3",
                           "thrift:policy=second_moment,budget=per64",
                           "thrift:policy=recent,budget=0.5",
                           "thrift:policy=block_mean,budget=paper:0.2",
                           "thrift:policy=block_mean,budget=mass:0.9",
                           "thrift:policy=block_mean,budget=tolerance:0.01",
                           "thrift:budget=mass:0.9",
                           "thrift:budget=tolerance:0.01",
                           "thrift:force=none,budget=0.2",
                           "thrift:force=sink:1+previous:1",
                           "topk",
                           "quest",
                           "window"}) {
    Pair pair(spec, x, step().rows);
    const oracle::Input in = pair.cpu.oracle_input(step().rows, call());
    const Ran ran = pair.gpu.attend(call());
    oracle::Input resolved = in;
    resolved.method = ran.plan.problem.method;
    const bool by_mass = resolved.method.policy == Policy::fp4_mass;
    expect_same_selection(ran.stats.selection, resolved, spec, by_mass ? kHalfTie : kTie);
    // What it chose is what it read.
    Call given = call();
    given.given = &ran.stats.selection;
    expect_near(ran, pair.cpu.attend(step().rows, given), x, spec);
    if (HasFailure()) return;
  }
}

TEST_P(GpuRun, TakesAndGivesSixteenBitTensors) {
  const Tokens x = tokens();
  for (const DType dtype : {DType::f16, DType::bf16}) {
    Tokens rounded = x;
    for (float& q : rounded.q) q = dtype == DType::f16 ? f16_decode(f16_encode(q)) : bf16_decode(bf16_encode(q));
    Pair pair("thrift:policy=block_mean", rounded, step().rows);
    const Ran exact = pair.gpu.attend(call()), stored = pair.gpu.attend(call(), dtype);
    EXPECT_EQ(stored.lse, exact.lse);
    std::vector<float> want = exact.out;
    for (float& o : want) o = dtype == DType::f16 ? f16_decode(f16_encode(o)) : bf16_decode(bf16_encode(o));
    EXPECT_EQ(stored.out, want);
  }
}

TEST_P(GpuRun, StatsAreTheCpus) {
  if (step().phase == Phase::prefill) return;
  const Tokens x = tokens();
  for (const char* spec : {"fp4", "thrift", "thrift:policy=block_mean", "thrift:storage=fp4_only", "topk"}) {
    Pair pair(spec, x, step().rows);
    Call with = call();
    with.stats = true;
    const Ran got = pair.gpu.attend(with);
    EXPECT_EQ(got.out, pair.gpu.attend(call()).out) << spec << ": stats change nothing";
    with.given = &got.stats.selection;
    const Ran want = pair.cpu.attend(step().rows, with);
    EXPECT_EQ(got.stats.pairs, want.stats.pairs) << spec;
    EXPECT_EQ(got.stats.promoted, want.stats.promoted) << spec;
    EXPECT_NEAR(got.stats.mass_above_fp4, want.stats.mass_above_fp4, 2e-3) << spec;
    EXPECT_NEAR(got.stats.error_estimate, want.stats.error_estimate, 1e-2 * want.stats.error_estimate + 1e-6) << spec;
    ASSERT_EQ(got.stats.page_mass.size(), want.stats.page_mass.size()) << spec;
    for (size_t p = 0; p < want.stats.page_mass.size(); ++p)
      ASSERT_NEAR(got.stats.page_mass[p], want.stats.page_mass[p], 2e-3) << spec << ", page " << p;
  }
}

TEST(GpuLengths, OnPageBordersAndBesideThem) {
  SKIP_WITHOUT_GPU();
  for (const int64_t s : {1, 2, 63, 64, 65, 127, 128, 129, 191, 257}) {
    const Tokens x = attention_like({8, 2, 128, 128}, s, static_cast<uint32_t>(s));
    for (const char* spec : {"fp16", "fp4", "thrift", "thrift:policy=block_mean,storage=dual", "topk"})
      for (const Step& step : {Step{"decode", Phase::decode, 1}, Step{"verify", Phase::decode, std::min<int64_t>(s, 5)},
                               Step{"prefill", Phase::prefill, s}}) {
        Pair pair(spec, x, step.rows);
        Call call;
        call.phase = step.phase;
        const Ran got = pair.gpu.attend(call);
        call.given = &got.stats.selection;
        expect_near(got, pair.cpu.attend(step.rows, call), x,
                    std::string(spec) + ", " + step.name + " at " + std::to_string(s));
      }
  }
}

TEST(GpuLengths, NotCausalRowsSeeWhatComesAfter) {
  SKIP_WITHOUT_GPU();
  const Tokens x = attention_like({8, 2, 128, 128}, 300);
  for (const int64_t window : {0, 90})
    for (const Step& step : {Step{"verify", Phase::decode, 5}, Step{"prefill", Phase::prefill, 130}}) {
      Pair pair("thrift:policy=block_mean", x, step.rows);
      Call call;
      call.phase = step.phase;
      call.causal = false;
      call.window = window;
      const Ran got = pair.gpu.attend(call);
      call.given = &got.stats.selection;
      expect_near(got, pair.cpu.attend(step.rows, call), x, step.name);
    }
}

TEST(GpuBatch, SequencesOfAnyLengthEqualEachAlone) {
  SKIP_WITHOUT_GPU();
  const Shape shape{8, 2, 128, 128};
  const std::vector<int64_t> lengths = {300, 1, 64, 0, 129, 900}, rows = {10, 1, 2, 0, 16, 3};
  std::vector<Tokens> all;
  std::vector<const Tokens*> pointers;
  for (size_t i = 0; i < lengths.size(); ++i)
    all.push_back(attention_like(shape, std::max<int64_t>(1, lengths[i]), static_cast<uint32_t>(i)));
  for (const Tokens& t : all) pointers.push_back(&t);
  for (const char* spec : {"thrift", "thrift:policy=block_mean", "fp16", "fp4", "topk"})
    for (const Phase phase : {Phase::decode, Phase::prefill})
      for (const bool sinks : {false, true}) {
        GpuSession together(method(spec), pointers);
        std::vector<int64_t> before;
        for (size_t i = 0; i < lengths.size(); ++i) before.push_back(lengths[i] - rows[i]);
        together.append(before);
        together.end_step();
        together.append(rows);
        Call call;
        call.phase = phase;
        call.sinks = sinks;
        const Ran got = together.attend(call);
        size_t row = 0;
        for (size_t i = 0; i < lengths.size(); ++i) {
          if (rows[i] == 0) continue;
          Pair alone(spec, all[i], rows[i]);
          const Ran want = alone.gpu.attend(call);
          const size_t n = static_cast<size_t>(rows[i]) * 8;
          Ran part;
          part.plan = got.plan;
          part.out.assign(got.out.begin() + row * 128, got.out.begin() + (row + n) * 128);
          part.lse.assign(got.lse.begin() + row, got.lse.begin() + row + n);
          expect_near(part, want, all[i], std::string(spec) + ", sequence " + std::to_string(i));
          row += n;
        }
        EXPECT_EQ(row, got.lse.size());
      }
}

TEST(GpuBatch, RowsThatSeeNothingGiveZeroAndMinusInfinity) {
  SKIP_WITHOUT_GPU();
  const Tokens x = attention_like({8, 2, 128, 128}, 200);
  for (const char* spec : {"thrift", "fp16"})
    for (const Phase phase : {Phase::decode, Phase::prefill}) {
      // A page beyond the window of every row, and a window of one token.
      Pair pair(spec, x, 3);
      Call call;
      call.phase = phase;
      call.window = 1;
      const Ran got = pair.gpu.attend(call), want = pair.cpu.attend(3, call);
      expect_near(got, want, x, spec);
    }
}

struct Planned {
  Plan plan;
  cuda::Workspace workspace;
};
Planned planned(const Problem& p) {
  auto made = plan(p, *gpu_machine());
  EXPECT_TRUE(made.ok()) << made.status().message();
  auto workspace = cuda::Workspace::create(*made, 0);
  EXPECT_TRUE(workspace.ok()) << workspace.status().message();
  return {*made, std::move(*workspace)};
}

// Expanded pages have room for what a method may read, which a given selection may go beyond.
TEST(GpuPrefill, RefusesTiersThatItHasNoRoomFor) {
  SKIP_WITHOUT_GPU();
  const Tokens x = attention_like({4, 2, 64, 64}, 1000);
  const auto give = [&](const char* stores, const char* reads, const Promoted& page) {
    GpuSession s(method(stores), x);
    s.append(1000);  // all of it keeps its 16-bit form until the step ends
    const SeqId seq = s.seq();
    const int64_t rows = 64;
    EXPECT_OK(s.cache().set_batch({&seq, 1}, {&rows, 1}, s.stream()));
    Call call;
    call.phase = Phase::prefill;
    Problem p = s.problem(call);
    p.max_s_q = rows;
    p.method = method(reads);
    Planned of = planned(p);
    Selection given;
    given.first.assign(1 + 4 * 2, 1);  // two query blocks of four heads, the page for the first one
    given.first[0] = 0;
    given.pages = {page};
    return cuda::give_selection(of.plan, of.workspace, s.cache(), &given, s.stream());
  };
  EXPECT_EQ(give("thrift", "thrift:policy=block_mean", {2, Tier::fp16}).code(), Code::unsupported);
  EXPECT_OK(give("thrift", "thrift:policy=block_mean", {2, Tier::fp4x2}));
  EXPECT_OK(give("thrift", "thrift:policy=block_mean", {0, Tier::fp16}));
  EXPECT_OK(give("thrift", "thrift:policy=block_mean", {13, Tier::fp16}));
  EXPECT_EQ(give("thrift:storage=dual", "fp16", {1, Tier::fp4}).code(), Code::unsupported);
  EXPECT_OK(give("thrift:storage=dual", "thrift:storage=dual,policy=block_mean", {1, Tier::fp16}));
}

TEST(GpuCalls, RefuseAnotherCachesWorkspaceAndAFreedSequence) {
  SKIP_WITHOUT_GPU();
  const Tokens x = attention_like({4, 2, 64, 64}, 300);
  GpuSession small(method("thrift:storage=fp4_only"), x), large(method("thrift:storage=dual"), x);
  Call call;
  call.phase = Phase::prefill;
  const auto problem = [&](const GpuSession& s) {
    Problem p = s.problem(call);
    p.max_s_q = 64;
    p.method = method("fp4");
    return p;
  };
  Planned of_small = planned(problem(small)), of_large = planned(problem(large));
  const SeqId seq = large.seq();
  const int64_t rows = 64;
  ASSERT_OK(large.cache().set_batch({&seq, 1}, {&rows, 1}, large.stream()));
  cuda::AttendArgs args;
  args.cache = &large.cache();
  const Status other = cuda::run(of_large.plan, of_small.workspace, args, large.stream());
  EXPECT_EQ(other.code(), Code::invalid_argument);
  EXPECT_NE(other.message().find("another plan"), std::string::npos) << other.message();
  ASSERT_OK(large.cache().free(seq, large.stream()));
  EXPECT_EQ(cuda::run(of_large.plan, of_large.workspace, args, large.stream()).code(), Code::not_found);
}

TEST(GpuPoison, NanAndInfInQStayInTheirRow) {
  SKIP_WITHOUT_GPU();
  const Tokens clean = attention_like({8, 2, 128, 128}, kTokens);
  for (const Step& step : kSteps)
    for (const char* spec : {"thrift", "thrift:policy=block_mean", "fp16"})
      for (const float poison : {std::nanf(""), -INFINITY}) {
        Tokens dirty = clean;
        const int64_t bad = kTokens - step.rows + step.rows / 2;
        const size_t bad_row = static_cast<size_t>(step.rows / 2 * 8 + 1);
        dirty.q_at(bad)[128 + 9] = poison;
        Pair a(spec, clean, step.rows), b(spec, dirty, step.rows);
        const Selection none = promote_none(a.cpu.oracle_input(step.rows, call_of(kSettings[0], step.phase)));
        Call call;
        call.phase = step.phase;
        if (spec != std::string("fp16")) call.given = &none;
        const Ran want = a.gpu.attend(call), got = b.gpu.attend(call);
        call.given = nullptr;
        const Ran chosen = b.gpu.attend(call);
        for (size_t row = 0; row < got.lse.size(); ++row) {
          ASSERT_EQ(std::isfinite(chosen.lse[row]), row != bad_row) << spec << " " << step.name;
          for (size_t i = row * 128; i < (row + 1) * 128; ++i)
            if (row == bad_row) {
              ASSERT_TRUE(std::isnan(got.out[i])) << spec << " " << step.name;
            } else {
              ASSERT_EQ(got.out[i], want.out[i]) << spec << " " << step.name << ", row " << row;
            }
        }
      }
}

}  // namespace
}  // namespace thriftattn::testing
