// Heads that differ: calls for some of them, caches that store each in its own way, sinks.
#include <gtest/gtest.h>

#include <cfloat>
#include <cmath>
#include <string>
#include <vector>

#include "attention/session.h"

namespace thriftattn::testing {
namespace {

constexpr Shape kShape{4, 2, 64, 80};

// One call over a cache of some layers, for the KV heads named.
struct HeadCall {
  const KvCache* cache;
  SeqId seq;
  int layer = 0;
  std::string spec;
  std::vector<int> kv_heads;
  Phase phase = Phase::decode;
  int64_t rows = 1;
  const float* sinks = nullptr;
  bool stats = false;
};

struct Answer {
  Status status;
  std::vector<float> out, lse;
  Stats stats;
};

Answer ask(const HeadCall& call, const Tokens& tokens) {
  Problem p;
  p.phase = call.phase;
  p.max_s_q = call.rows;
  p.max_s_kv = tokens.s;
  p.h_q = kShape.h_q;
  p.h_kv = kShape.h_kv;
  p.d = kShape.d;
  p.d_v = kShape.d_v;
  p.method = method(call.spec);
  p.cache = call.cache->config();
  p.stats = call.stats;
  Answer answer;
  auto planned = plan(p, Machine::here(2));
  answer.status = planned.status();
  if (!planned.ok()) return answer;
  if (call.phase == Phase::decode) planned->splits = 2;
  auto workspace = Workspace::create(*planned);
  EXPECT_TRUE(workspace.ok());
  const auto all = static_cast<size_t>(call.rows * kShape.h_q);
  answer.out.assign(all * kShape.d_v, NAN);
  answer.lse.assign(all, NAN);
  AttendArgs args;
  args.cache = call.cache;
  args.layer = call.layer;
  args.seqs = {&call.seq, 1};
  args.s_q = {&call.rows, 1};
  args.kv_heads = call.kv_heads;
  args.sinks = call.sinks;
  args.q = tokens.q_view(call.cache->length(call.seq) - call.rows, call.rows);
  args.out = mutable_view(answer.out.data(), call.rows, kShape.h_q, kShape.d_v);
  args.lse = answer.lse.data();
  args.stats = &answer.stats;
  answer.status = run(*planned, *workspace, pool(), args);
  return answer;
}

// The cache that `specs` of one (layer, KV head) after another need together: all of one FP4 form.
CacheConfig config_of(const std::vector<std::string>& specs) {
  CacheConfig config = CacheConfig::for_method(method("thrift"), static_cast<int>(specs.size()) / kShape.h_kv,
                                               kShape.h_kv, kShape.d, kShape.d_v);
  for (const std::string& spec : specs) config.storage_by_head.push_back(method(spec).storage);
  return config;
}

void append_and_settle(KvCache& cache, SeqId seq, const Tokens& tokens, int64_t count) {
  const int64_t from = cache.length(seq);
  for (int layer = 0; layer < cache.config().layers; ++layer) {
    ASSERT_OK(cache.append(seq, layer, tokens.k_view(from, count), tokens.v_view(from, count), pool()));
    ASSERT_OK(cache.settle(seq, layer));
  }
}

// Row by row of one KV head: equal, bit for bit.
void expect_same_head(const Answer& a, const Answer& b, int kv_head, const std::string& what) {
  ASSERT_TRUE(a.status.ok()) << what << ": " << a.status.message();
  ASSERT_TRUE(b.status.ok()) << what << ": " << b.status.message();
  const int group = kShape.h_q / kShape.h_kv;
  for (size_t row = 0; row < a.lse.size(); ++row) {
    if (static_cast<int>(row) % kShape.h_q / group != kv_head) continue;
    ASSERT_EQ(a.lse[row], b.lse[row]) << what;
    for (size_t c = 0; c < kShape.d_v; ++c) ASSERT_EQ(a.out[row * kShape.d_v + c], b.out[row * kShape.d_v + c]) << what;
  }
}

TEST(KvHeads, ThoseOfACallAreAsInACallForAllAndTheOthersAreLeftAlone) {
  const Tokens tokens = attention_like(kShape, 500);
  for (const std::string spec : {"thrift", "thrift:policy=block_mean", "fp16", "paper"}) {
    auto cache = KvCache::create(CacheConfig::for_method(method(spec), 1, kShape.h_kv, kShape.d, kShape.d_v));
    ASSERT_TRUE(cache.ok());
    const SeqId seq = cache->new_sequence();
    append_and_settle(*cache, seq, tokens, tokens.s);
    for (const Phase phase : {Phase::prefill, Phase::decode}) {
      HeadCall call{&*cache, seq, 0, spec, {}, phase, phase == Phase::prefill ? 100 : 3};
      call.stats = true;
      const Answer all = ask(call, tokens);
      double mass = 0;
      int64_t pairs = 0;
      for (int head = 0; head < kShape.h_kv; ++head) {
        call.kv_heads = {head};
        const Answer one = ask(call, tokens);
        expect_same_head(one, all, head, spec);
        for (size_t row = 0; row < one.lse.size(); ++row)
          EXPECT_EQ(std::isnan(one.lse[row]), static_cast<int>(row) % kShape.h_q / 2 != head);
        EXPECT_EQ(one.stats.selection.first.size(), all.stats.selection.first.size());
        mass += one.stats.mass_above_fp4 / kShape.h_kv;
        pairs += one.stats.pairs;
      }
      EXPECT_NEAR(mass, all.stats.mass_above_fp4, 1e-12);  // a mean over the heads computed
      EXPECT_EQ(pairs, all.stats.pairs);
    }
  }
}

TEST(KvHeads, AreRefusedOutOfOrderAndOutOfRange) {
  const Tokens tokens = attention_like(kShape, 100);
  auto cache = KvCache::create(CacheConfig::for_method(method("thrift"), 1, kShape.h_kv, kShape.d, kShape.d_v));
  ASSERT_TRUE(cache.ok());
  const SeqId seq = cache->new_sequence();
  append_and_settle(*cache, seq, tokens, tokens.s);
  for (const std::vector<int>& heads : {std::vector<int>{1, 0}, {0, 0}, {2}, {-1}}) {
    const Answer answer = ask({&*cache, seq, 0, "thrift", heads}, tokens);
    EXPECT_EQ(answer.status.code(), Code::invalid_argument);
    EXPECT_NE(answer.status.message().find(std::to_string(heads.back())), std::string::npos) << answer.status.message();
  }
}

TEST(StorageByHead, EveryHeadIsAsInACacheOfItsOwnStorage) {
  const Tokens tokens = attention_like(kShape, 64 * 9 + 20);
  const std::vector<std::string> specs = {"fp16", "thrift", "thrift:storage=dual", "fp4", "thrift",
                                          "fp16", "fp4",    "thrift:storage=dual"};
  auto mixed = KvCache::create(config_of(specs));
  ASSERT_TRUE(mixed.ok()) << mixed.status().message();
  const SeqId seq = mixed->new_sequence();
  append_and_settle(*mixed, seq, tokens, 400);
  auto forked = mixed->fork(seq);
  ASSERT_TRUE(forked.ok());
  append_and_settle(*mixed, seq, tokens, tokens.s - 400);
  append_and_settle(*mixed, *forked, tokens, 100);
  ASSERT_OK(mixed->truncate(*forked, 450));  // into a page of the window: exact for all
  append_and_settle(*mixed, *forked, tokens, 77);
  for (size_t i = 0; i < specs.size(); ++i) {
    const int layer = static_cast<int>(i) / kShape.h_kv, head = static_cast<int>(i) % kShape.h_kv;
    auto plain = KvCache::create(CacheConfig::for_method(method(specs[i]), 1, kShape.h_kv, kShape.d, kShape.d_v));
    ASSERT_TRUE(plain.ok());
    for (const SeqId which : {seq, *forked}) {
      const SeqId alone = plain->new_sequence();
      append_and_settle(*plain, alone, tokens, 400);
      append_and_settle(*plain, alone, tokens, mixed->length(which) - 400);
      for (const Phase phase : {Phase::prefill, Phase::decode}) {
        const int64_t rows = phase == Phase::prefill ? 130 : 2;
        const Answer a = ask({&*mixed, which, layer, specs[i], {head}, phase, rows}, tokens);
        const Answer b = ask({&*plain, alone, 0, specs[i], {}, phase, rows}, tokens);
        // A forced page is read in the best form stored: that the fork was cut and grown again does not show.
        expect_same_head(a, b, head, specs[i] + (phase == Phase::prefill ? " prefill" : " decode"));
      }
    }
  }
  ASSERT_OK(mixed->free(seq));
  ASSERT_OK(mixed->free(*forked));
  EXPECT_EQ(mixed->bytes().total(), 0);
}

TEST(StorageByHead, BytesAreThoseOfEachHeadsStorage) {
  const Tokens tokens = attention_like(kShape, 64 * 12);
  const std::vector<std::string> specs = {"fp16", "thrift"};
  auto mixed = KvCache::create(config_of(specs));
  ASSERT_TRUE(mixed.ok());
  append_and_settle(*mixed, mixed->new_sequence(), tokens, tokens.s);
  const int64_t full = 12, high = 64 * 2 * (kShape.d + kShape.d_v);
  const MemoryUse use = mixed->bytes();
  EXPECT_EQ(use.high, (full + 1 + 2) * high);  // all pages of one head, sink and window of the other
  EXPECT_GT(use.codes, 0);
  EXPECT_EQ(use.codes, use.residual);
  auto thrift = KvCache::create(CacheConfig::for_method(method("thrift"), 1, kShape.h_kv, kShape.d, kShape.d_v));
  ASSERT_TRUE(thrift.ok());
  append_and_settle(*thrift, thrift->new_sequence(), tokens, tokens.s);
  EXPECT_EQ(thrift->bytes().codes, 2 * use.codes);
}

TEST(StorageByHead, AMethodThatReadsWhatAHeadDoesNotKeepIsRefused) {
  const Tokens tokens = attention_like(kShape, 200);
  auto mixed = KvCache::create(config_of({"fp16", "thrift"}));
  ASSERT_TRUE(mixed.ok());
  const SeqId seq = mixed->new_sequence();
  append_and_settle(*mixed, seq, tokens, tokens.s);
  EXPECT_TRUE(ask({&*mixed, seq, 0, "thrift", {1}}, tokens).status.ok());
  for (const std::vector<int>& heads : {std::vector<int>{0}, {}}) {
    const Answer answer = ask({&*mixed, seq, 0, "thrift", heads}, tokens);
    EXPECT_EQ(answer.status.code(), Code::invalid_argument);
    for (const char* word : {"KV head 0", "high_only", "FP4 planes"})
      EXPECT_NE(answer.status.message().find(word), std::string::npos) << answer.status.message();
  }
}

TEST(StorageByHead, MustNameEveryHeadOfEveryLayer) {
  CacheConfig config = config_of({"fp16", "thrift"});
  config.layers = 2;
  const auto cache = KvCache::create(config);
  ASSERT_FALSE(cache.ok());
  EXPECT_NE(cache.status().message().find("2 x 2"), std::string::npos) << cache.status().message();
}

// A method that drops the rest has no say in how FP4 is written: what the cache holds is read as the cache's.
TEST(Formats, PromotedPagesAreReadInTheCachesOwn) {
  const Tokens tokens = attention_like(kShape, 64 * 12);
  for (const std::string format : {"nvfp4", "mxfp4"}) {
    const CacheConfig config = CacheConfig::for_method(method("thrift:policy=block_mean,format=" + format), 1,
                                                       kShape.h_kv, kShape.d, kShape.d_v);
    auto cache = KvCache::create(config);
    ASSERT_TRUE(cache.ok());
    const SeqId seq = cache->new_sequence();
    append_and_settle(*cache, seq, tokens, tokens.s);
    const std::string spec = "topk:storage=residual,budget=0.9";
    const Answer as_named = ask({&*cache, seq, 0, spec + ",format=" + format, {}}, tokens);
    for (const std::string other : {"nvfp4", "mxfp4"}) {
      const Answer answer = ask({&*cache, seq, 0, spec + ",format=" + other, {}}, tokens);
      for (int head = 0; head < kShape.h_kv; ++head) expect_same_head(answer, as_named, head, format + " as " + other);
    }
  }
}

TEST(Sinks, MustBeFinite) {
  const Tokens tokens = attention_like(kShape, 100);
  auto cache = KvCache::create(CacheConfig::for_method(method("thrift"), 1, kShape.h_kv, kShape.d, kShape.d_v));
  ASSERT_TRUE(cache.ok());
  const SeqId seq = cache->new_sequence();
  append_and_settle(*cache, seq, tokens, tokens.s);
  for (const float bad : {NAN, INFINITY, -INFINITY}) {
    const float sinks[4] = {0, 1, bad, 2};
    HeadCall call{&*cache, seq, 0, "thrift", {}};
    call.sinks = sinks;
    const Answer answer = ask(call, tokens);
    EXPECT_EQ(answer.status.code(), Code::invalid_argument);
    EXPECT_NE(answer.status.message().find("head 2"), std::string::npos) << answer.status.message();
  }
}

TEST(Sinks, ThatNoScoreIsAsLowAsAreNone) {
  const Tokens tokens = attention_like(kShape, 300);
  for (const char* spec : {"thrift", "thrift:arithmetic=mma4,policy=block_mean", "thrift:policy=block_mean"})
    for (const Phase phase : {Phase::decode, Phase::prefill}) {
      auto cache = KvCache::create(CacheConfig::for_method(method(spec), 1, kShape.h_kv, kShape.d, kShape.d_v));
      ASSERT_TRUE(cache.ok());
      const SeqId seq = cache->new_sequence();
      append_and_settle(*cache, seq, tokens, tokens.s);
      HeadCall call{&*cache, seq, 0, spec, {}, phase, phase == Phase::decode ? 1 : 70};
      const Answer none = ask(call, tokens);
      ASSERT_OK(none.status);
      for (const float low : {-3e30f, -2e38f, -FLT_MAX}) {
        const float sinks[4] = {low, low, low, low};
        call.sinks = sinks;
        const Answer answer = ask(call, tokens);
        ASSERT_OK(answer.status);
        EXPECT_EQ(answer.lse, none.lse) << call.spec << " " << low;
        EXPECT_EQ(answer.out, none.out) << call.spec << " " << low;
      }
    }
}

// A workspace has room for what a cache of its plan keeps of a page.
TEST(Workspaces, ServeNoCacheThatKeepsSomethingElse) {
  const Tokens tokens = attention_like(kShape, 300);
  const Method window = method("window:storage=residual");
  std::vector<Plan> plans;
  std::vector<KvCache> caches;
  for (const bool centring : {true, false}) {
    CacheConfig config = CacheConfig::for_method(window, 1, kShape.h_kv, kShape.d, kShape.d_v);
    config.centring = centring;
    config.mean = true;
    auto cache = KvCache::create(config);
    ASSERT_TRUE(cache.ok());
    Problem p;
    p.phase = Phase::decode;
    p.max_s_kv = tokens.s;
    p.h_q = kShape.h_q, p.h_kv = kShape.h_kv, p.d = kShape.d, p.d_v = kShape.d_v;
    p.method = window;
    p.cache = config;
    auto planned = plan(p, Machine::here(2));
    ASSERT_TRUE(planned.ok()) << planned.status().message();
    plans.push_back(*planned);
    caches.push_back(std::move(*cache));
  }
  for (int of = 0; of < 2; ++of) {
    const SeqId seq = caches[of].new_sequence();
    append_and_settle(caches[of], seq, tokens, tokens.s);
    auto own = Workspace::create(plans[of]), other = Workspace::create(plans[1 - of]);
    ASSERT_TRUE(own.ok() && other.ok());
    std::vector<float> out(static_cast<size_t>(kShape.h_q * kShape.d_v));
    const int64_t s_q = 1;
    AttendArgs args;
    args.cache = &caches[of];
    args.seqs = {&seq, 1};
    args.s_q = {&s_q, 1};
    args.q = tokens.q_view(tokens.s - 1, 1);
    args.out = mutable_view(out.data(), 1, kShape.h_q, kShape.d_v);
    EXPECT_OK(run(plans[of], *own, pool(), args));
    EXPECT_EQ(run(plans[of], *other, pool(), args).code(), Code::invalid_argument);
  }
}

TEST(Sinks, AreAllThatRowsWithoutAKeySee) {
  const Tokens tokens = attention_like(kShape, 10);
  auto cache = KvCache::create(CacheConfig::for_method(method("thrift"), 1, kShape.h_kv, kShape.d, kShape.d_v));
  ASSERT_TRUE(cache.ok());
  const SeqId seq = cache->new_sequence();
  Problem p;
  p.phase = Phase::decode;
  p.h_q = kShape.h_q;
  p.h_kv = kShape.h_kv;
  p.d = kShape.d;
  p.d_v = kShape.d_v;
  p.method = method("thrift");
  p.cache = cache->config();
  auto planned = plan(p, Machine::here(1));
  ASSERT_TRUE(planned.ok());
  auto workspace = Workspace::create(*planned);
  ASSERT_TRUE(workspace.ok());
  const float sinks[4] = {0.5f, -3, 7, 0};
  std::vector<float> out(4 * kShape.d_v, NAN), lse(4, NAN);
  const int64_t s_q = 1;
  AttendArgs args;
  args.cache = &*cache;
  args.seqs = {&seq, 1};
  args.s_q = {&s_q, 1};
  args.q = tokens.q_view(0, 1);
  args.out = mutable_view(out.data(), 1, 4, kShape.d_v);
  args.lse = lse.data();
  args.sinks = sinks;
  ThreadPool one(1);
  ASSERT_OK(run(*planned, *workspace, one, args));
  for (size_t h = 0; h < 4; ++h) EXPECT_NEAR(lse[h], sinks[h], 1e-6);
  for (float x : out) EXPECT_EQ(x, 0.0f);
}

}  // namespace
}  // namespace thriftattn::testing
