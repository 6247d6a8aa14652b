// What runs where, and what is refused: plan is pure, so a table says it all.
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "attention/problem.h"

namespace thriftattn::testing {
namespace {

const Machine kMachine{8, register_targets()};  // others are passed over where compute=f32: bf16_products_test.cc

Problem problem_of(const std::string& spec, Phase phase = Phase::prefill) {
  return problem_for(spec, phase, {8, 2, 128, 128}, 16384);
}

TEST(Plan, NamesTheKernelAndResolvesWhatIsAutomatic) {
  const struct {
    const char* spec;
    Phase phase;
    const char* kernel;
    Policy policy;
    Arithmetic arithmetic;
  } rows[] = {
      {"fp16", Phase::prefill, "prefill_tiles", Policy::none, Arithmetic::kv4},
      {"fp16", Phase::decode, "decode_one_pass", Policy::none, Arithmetic::kv4},
      {"fp4", Phase::prefill, "prefill_tiles", Policy::none, Arithmetic::kv4},
      {"fp4", Phase::decode, "decode_one_pass", Policy::none, Arithmetic::kv4},
      {"thrift", Phase::prefill, "prefill_tiles", Policy::block_mean, Arithmetic::kv4},
      {"thrift", Phase::decode, "decode_exchange", Policy::fp4_mass, Arithmetic::kv4},
      {"thrift:policy=block_mean", Phase::decode, "decode_one_pass", Policy::block_mean, Arithmetic::kv4},
      {"thrift:policy=quest", Phase::decode, "decode_one_pass", Policy::quest, Arithmetic::kv4},
      {"thrift:policy=oracle", Phase::decode, "decode_score_first", Policy::oracle, Arithmetic::kv4},
      {"paper", Phase::prefill, "prefill_tiles", Policy::block_mean, Arithmetic::mma4},
      {"paper-fp4", Phase::decode, "decode_one_pass", Policy::none, Arithmetic::mma4},
      {"topk", Phase::decode, "decode_one_pass", Policy::block_mean, Arithmetic::kv4},
      {"topk:policy=auto", Phase::decode, "decode_one_pass", Policy::block_mean, Arithmetic::kv4},
      {"window", Phase::prefill, "prefill_tiles", Policy::recent, Arithmetic::kv4},
  };
  for (const auto& row : rows) {
    const auto planned = plan(problem_of(row.spec, row.phase), kMachine);
    ASSERT_TRUE(planned.ok()) << row.spec << ": " << planned.status().message();
    EXPECT_EQ(planned->backend, "cpu");
    EXPECT_EQ(planned->kernel, row.kernel) << row.spec;
    EXPECT_EQ(planned->problem.method.policy, row.policy) << row.spec;
    EXPECT_EQ(planned->problem.method.arithmetic, row.arithmetic) << row.spec;
    EXPECT_EQ(planned->target, kMachine.targets.front());
    EXPECT_EQ(planned->threads, 8);
    EXPECT_GE(planned->splits, 1);
    EXPECT_GT(planned->rows_per_tile, 0);
    EXPECT_GT(planned->workspace_bytes, 0);
    EXPECT_FLOAT_EQ(planned->problem.sm_scale, 0.088388348f);
  }
}

TEST(Plan, IsPure) {
  for (const Phase phase : {Phase::prefill, Phase::decode}) {
    const Problem p = problem_of("thrift", phase);
    const auto a = plan(p, kMachine), b = plan(p, kMachine);
    ASSERT_TRUE(a.ok() && b.ok());
    EXPECT_EQ(to_string(*a), to_string(*b));
    EXPECT_EQ(a->workspace_bytes, b->workspace_bytes);
  }
}

TEST(Plan, SplitsWhereHeadsAloneDoNotFillTheThreads) {
  Problem p = problem_of("thrift", Phase::decode);
  EXPECT_GE(plan(p, kMachine)->splits * 2, 8) << "two KV heads, eight threads";
  EXPECT_EQ(plan(p, Machine{1, kMachine.targets})->splits, 1);
  p.max_s_kv = 64;
  EXPECT_EQ(plan(p, kMachine)->splits, 1) << "one page";
  p.phase = Phase::prefill;
  EXPECT_EQ(plan(p, kMachine)->splits, 1);
}

TEST(Plan, PrintsWhatItChose) {
  const auto planned = plan(problem_of("thrift", Phase::decode), kMachine);
  ASSERT_TRUE(planned.ok());
  const std::string text = to_string(*planned);
  EXPECT_EQ(text.find('\n'), std::string::npos);
  for (const std::string& word :
       {std::string("decode_exchange"), planned->target, std::string("splits="), std::string("workspace="),
        std::string("fp4_mass"), std::string("kv4"), std::string("d=128")}) {
    EXPECT_NE(text.find(word), std::string::npos) << word << " in: " << text;
  }
}

TEST(Plan, ForcesEveryTargetOfTheMachine) {
  ASSERT_FALSE(kMachine.targets.empty());
  for (const std::string& target : kMachine.targets) {
    const auto planned = plan(problem_of("thrift"), Machine{2, {target}});
    ASSERT_TRUE(planned.ok()) << target;
    EXPECT_EQ(planned->target, target);
    EXPECT_NE(to_string(*planned).find(target), std::string::npos);
  }
}

template <class Change>
void expect_refused(Change change, const std::vector<std::string>& words, Machine machine = kMachine,
                    Phase phase = Phase::prefill, const std::string& spec = "thrift") {
  Problem p = problem_of(spec, phase);
  ASSERT_TRUE(plan(p, kMachine).ok());
  change(p);
  expect_refusal(p, machine, words);
}

TEST(Plan, RefusalsNameTheValueAndWhatIsSupported) {
  expect_refused([](Problem& p) { p.d = p.cache.d = 100; }, {"100", "multiples of 16 from 16 to 256"});
  expect_refused([](Problem& p) { p.d_v = p.cache.d_v = 272; }, {"272", "multiples of 16 from 16 to 256"});
  expect_refused([](Problem& p) { p.h_q = 7; }, {"7", "2"});
  expect_refused([](Problem& p) { p.h_q = 0; }, {"0"});
  expect_refused([](Problem& p) { p.b = 0; }, {"b 0"});
  expect_refused([](Problem& p) { p.max_s_kv = -1; }, {"max_s_kv -1"});
  expect_refused([](Problem& p) { p.max_s_q = 17; }, {"17", "16 rows"}, kMachine, Phase::decode);
  expect_refused([](Problem& p) { p.sm_scale = NAN; }, {"sm_scale", "nan"});
  expect_refused([](Problem& p) { p.d = 64; }, {"64", "128"});
  expect_refused([](Problem& p) { p.window = -1; }, {"window -1", "0"});
  expect_refused([](Problem& p) { p.b = 4097; }, {"b 4097", "4096"});
  expect_refused([](Problem& p) { p.h_q = 4098; }, {"h_q 4098", "4096"});
  expect_refused([](Problem& p) { p.max_s_q = INT64_MAX; }, {"max_s_q", "2^30"});
  expect_refused([](Problem& p) { p.max_s_kv = INT64_MAX; }, {"max_s_kv", "2^30"});
  expect_refused([](Problem& p) { p.window = INT64_MAX; }, {"window", "2^30"});
  expect_refused([](Problem& p) { p.softcap = -2; }, {"softcap -2", "positive"});
  expect_refused([](Problem& p) { p.softcap = NAN; }, {"softcap nan", "positive"});
  expect_refused([](Problem& p) { p.softcap = INFINITY; }, {"softcap inf", "positive"});
  expect_refused([](Problem& p) { p.softcap = 1e-40f; }, {"softcap 1", "finite"});
  expect_refused([](Problem& p) { p.method.rest = Tier::fp4x2; }, {"rest fp4x2", "fp16"});
  expect_refused([](Problem& p) { p.cache.h_kv = 4; }, {"4", "2"});
  expect_refused([](Problem& p) { p.method = method("thrift:arithmetic=mma8"); }, {"cpu", "mma8", "kv4"});
  expect_refused([](Problem& p) { p.method = method("thrift:policy=fp4_mass"); }, {"fp4_mass", "decode"});
  expect_refused([](Problem& p) { p.method = method("thrift:p_quant=constant"); }, {"constant", "mma4"});
  expect_refused([](Problem&) {}, {"AVX9"}, Machine{2, {"AVX9"}});
  expect_refused([](Problem&) {}, {"instruction set"}, Machine{2, {}});
}

TEST(Plan, SizesOfTheLargestProblemFit) {
  for (const Phase phase : {Phase::prefill, Phase::decode}) {
    Problem p;
    p.phase = phase;
    p.b = p.h_q = p.h_kv = 4096;
    p.max_s_q = phase == Phase::decode ? 16 : int64_t{1} << 30;
    p.max_s_kv = p.window = int64_t{1} << 30;
    p.d = p.d_v = 256;
    p.stats = true;
    p.method = method("thrift");
    p.cache = CacheConfig::for_method(p.method, 1, p.h_kv, p.d, p.d_v);
    Machine machine = Machine::here(1024);
    const auto chosen = plan(p, machine);
    ASSERT_TRUE(chosen.ok()) << chosen.status().message();
    EXPECT_GT(chosen->workspace_bytes, 1'000'000'000);
    machine.threads = 1025;
    EXPECT_FALSE(plan(p, machine).ok());
  }
}

TEST(Plan, RefusesACacheThatLacksWhatTheMethodReads) {
  const auto with_cache = [](const std::string& cache_spec) {
    return [cache_spec](Problem& p) { p.cache = CacheConfig::for_method(method(cache_spec), 4, 2, 128, 128); };
  };
  expect_refused(with_cache("fp16"), {"FP4 planes", "high_only"});
  expect_refused(with_cache("thrift:format=mxfp4"), {"format=nvfp4"});
  expect_refused(with_cache("thrift:centring=off"), {"centring=on"});
  expect_refused(with_cache("thrift:page_scale=off"), {"page_scale=on"});
  expect_refused(with_cache("thrift:scales=4over6"), {"scales=6"});
  expect_refused(with_cache("thrift:storage=dual"), {"storage=residual", "dual"});
  expect_refused(with_cache("thrift"), {"minima"}, kMachine, Phase::prefill, "thrift:policy=quest");
  expect_refused(with_cache("thrift"), {"variances"}, kMachine, Phase::prefill, "thrift:policy=second_moment");
  expect_refused(with_cache("fp16"), {"means"}, kMachine, Phase::prefill, "topk");
}

// --- run's own checks
// -------------------------------------------------------------------------------------------------

class RunArguments : public ::testing::Test {
 protected:
  RunArguments() {
    session_.append(150);
    problem_ = session_.problem(4, {});
    plan_ = *plan(problem_, Machine::here(2));
    workspace_.emplace(std::move(*Workspace::create(plan_)));
    args_.cache = &session_.cache();
    args_.seqs = {&seq_, 1};
    args_.s_q = {&s_q_, 1};
    args_.q = tokens_.q_view(146, 4);
    args_.out = mutable_view(out_.data(), 4, 4, 64);
  }
  void expect_refused(const std::vector<std::string>& words) {
    const std::vector<float> before = out_;
    const Status status = run(plan_, *workspace_, pool(), args_);
    ASSERT_FALSE(status.ok()) << words[0];
    for (const std::string& word : words) {
      EXPECT_NE(status.message().find(word), std::string::npos) << word << " in: " << status.message();
    }
    EXPECT_EQ(out_, before) << "nothing is written";
  }
  const Tokens tokens_ = attention_like({4, 2, 64, 64}, 150);
  Session session_{method("thrift"), tokens_};
  Problem problem_;
  Plan plan_;
  std::optional<Workspace> workspace_;
  SeqId seq_ = 0;
  int64_t s_q_ = 4;
  std::vector<float> out_ = std::vector<float>(4 * 4 * 64, -1.0f);
  AttendArgs args_;
};

TEST_F(RunArguments, GoodOnesRun) { EXPECT_OK(run(plan_, *workspace_, pool(), args_)); }
TEST_F(RunArguments, NoCache) {
  args_.cache = nullptr;
  expect_refused({"cache"});
}
TEST_F(RunArguments, AnUnknownSequence) {
  seq_ = 5;
  expect_refused({"5"});
}
TEST_F(RunArguments, AnUnknownLayer) {
  args_.layer = 1;
  expect_refused({"layer 1"});
}
TEST_F(RunArguments, MoreRowsThanPlanned) {
  s_q_ = 5;
  expect_refused({"5", "4"});
}
TEST_F(RunArguments, MoreTokensThanPlanned) {
  problem_.max_s_kv = 100;
  plan_ = *plan(problem_, Machine::here(2));
  workspace_.emplace(std::move(*Workspace::create(plan_)));
  expect_refused({"150", "100"});
}
TEST_F(RunArguments, QOfAnotherShape) {
  args_.q = tokens_.q_view(147, 3);
  expect_refused({"[3, 4, 64]", "[4, 4, 64]"});
}
TEST_F(RunArguments, OutOfAnotherShape) {
  args_.out.heads = 3;
  expect_refused({"out", "[4, 3, 64]"});
}
TEST_F(RunArguments, ACacheOfAnotherConfiguration) {
  Session other(method("thrift:format=mxfp4"), tokens_);
  args_.cache = &other.cache();
  expect_refused({"configuration"});
}
TEST_F(RunArguments, AGivenSelectionThatDoesNotFit) {
  // Four query heads, one block each, pages 0 and 1 full.
  Selection selection{{0, 1, 1, 1, 1}, {{0, Tier::fp4x2}}};
  args_.given = &selection;
  EXPECT_OK(run(plan_, *workspace_, pool(), args_));
  std::fill(out_.begin(), out_.end(), -1.0f);
  selection.pages[0].page = 2;
  expect_refused({"page 2"});
  selection.pages[0].page = -1;
  expect_refused({"-1"});
  selection = {{0, 0}, {}};
  expect_refused({"1 query blocks"});
  selection = {{0, 2, 2, 2, 2}, {{1, Tier::fp16}, {0, Tier::fp16}}};
  expect_refused({"out of order"});
  selection = {{0, 0, 0, 0, 0, 0}, {}};
  expect_refused({"5"});
  selection = {{0, 2, 2, 2, 2}, {{0, Tier::fp16}}};
  expect_refused({"[0, 2)"});
  selection = {{-1, 0, 0, 0, 0}, {{0, Tier::fp16}}};
  expect_refused({"[-1, 0)"});
  selection = {};
  expect_refused({"empty"});
}
TEST_F(RunArguments, AGivenTierThatIsNotStored) {
  Session bare(method("thrift:storage=fp4_only"), tokens_);
  bare.append(150);
  problem_ = bare.problem(4, {});
  plan_ = *plan(problem_, Machine::here(2));
  workspace_.emplace(std::move(*Workspace::create(plan_)));
  args_.cache = &bare.cache();
  Selection selection{{0, 1, 1, 1, 1}, {{0, Tier::fp4x2}}};
  args_.given = &selection;
  expect_refused({"page 0", "fp4x2"});
}

TEST(Workspace, OfAnotherPlanIsRefused) {
  const Tokens tokens = attention_like({4, 2, 64, 64}, 300);
  Session session(method("thrift"), tokens);
  session.append(300);
  Call call;
  call.phase = Phase::decode;
  Problem p = session.problem(1, call);
  const auto small = plan(p, kMachine);
  p.max_s_kv = 3000;
  const auto large = plan(p, kMachine);
  ASSERT_TRUE(small.ok() && large.ok());
  auto workspace = Workspace::create(*small);
  ASSERT_TRUE(workspace.ok());
  std::vector<float> out(4 * 64);
  const SeqId seq = session.seq();
  const int64_t s_q = 1;
  AttendArgs args;
  args.cache = &session.cache();
  args.seqs = {&seq, 1};
  args.s_q = {&s_q, 1};
  args.q = tokens.q_view(299, 1);
  args.out = mutable_view(out.data(), 1, 4, 64);
  ThreadPool threads(kMachine.threads);
  EXPECT_OK(run(*small, *workspace, threads, args));
  const Status refused = run(*large, *workspace, threads, args);
  EXPECT_EQ(refused.code(), Code::invalid_argument);
  EXPECT_NE(refused.message().find("s_kv<=3000"), std::string::npos) << refused.message();
}

}  // namespace
}  // namespace thriftattn::testing
