// The identities that hold whatever the numbers are, each for a given selection (docs/design.md, section 6).
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "attention/session.h"

namespace thriftattn::testing {
namespace {

// Two FP32 results of the same sums in another order.
constexpr double kReordered = 5e-6;

const Step kSteps[] = {{"prefill", Phase::prefill, 500},
                       {"chunk", Phase::prefill, 77},
                       {"decode", Phase::decode, 1},
                       {"verify2", Phase::decode, 2},
                       {"verify16", Phase::decode, 16}};
constexpr int64_t kTokens = 500;

// Head sizes and masks: every one of either, not every pair.
struct Setting {
  const char* name;
  int d, d_v;
  int64_t window;
  float softcap;
  bool sinks;
};
std::ostream& operator<<(std::ostream& out, const Setting& setting) { return out << setting.name; }
const Setting kSettings[] = {
    {"d64", 64, 64, 0, 0, false},
    {"d64_window", 64, 64, 100, 0, false},
    {"d64_softcap", 64, 64, 0, 4, false},
    {"d64_sinks", 64, 64, 0, 0, true},
    {"d80_window_softcap_sinks", 80, 80, 90, 3, true},
    {"d96_window", 96, 96, 200, 0, false},
    {"d128", 128, 128, 0, 0, false},
    {"d192_dv128_sinks", 192, 128, 0, 0, true},
    {"d192_softcap", 192, 192, 0, 4, false},
    {"d256_window_softcap", 256, 256, 130, 4, false},
};
Call masked(const Setting& setting) {
  Call c;
  c.window = setting.window;
  c.softcap = setting.softcap;
  c.sinks = setting.sinks;
  return c;
}

class Identity : public ::testing::TestWithParam<std::tuple<Step, Setting>> {
 protected:
  // A session that appended everything, the last rows as a step of their own.
  Session session(const std::string& spec, const Tokens& tokens) const {
    Session s(method(spec), tokens);
    s.append(tokens.s - rows());
    s.settle();
    s.append(rows());
    return s;
  }
  Call call() const {
    Call c = masked(setting());
    c.phase = phase();
    return c;
  }
  Call given(const Selection& selection) const {
    Call c = call();
    c.given = &selection;
    return c;
  }
  int64_t rows() const { return std::get<0>(GetParam()).rows; }
  Phase phase() const { return std::get<0>(GetParam()).phase; }
  const Setting& setting() const { return std::get<1>(GetParam()); }
  Shape shape() const { return {4, 2, setting().d, setting().d_v}; }
  size_t d_v() const { return static_cast<size_t>(setting().d_v); }
  Tokens tokens_ = attention_like(shape(), kTokens);
};
INSTANTIATE_TEST_SUITE_P(Steps, Identity,
                         ::testing::Combine(::testing::ValuesIn(kSteps), ::testing::ValuesIn(kSettings)),
                         [](const auto& test) {
                           return std::string(std::get<0>(test.param).name) + "_" + std::get<1>(test.param).name;
                         });

TEST_P(Identity, PromoteAllIsFp16BitForBit) {
  for (const char* spec : {"thrift:storage=dual", "thrift:storage=dual,arithmetic=mma4", "paper:policy=quest",
                           "topk:budget=0.1", "thrift:storage=dual,format=mxfp4"}) {
    Session promoted = session(spec, tokens_), fp16 = session("fp16", tokens_);
    const Selection all = promote_all(promoted.oracle_input(rows(), call()), Tier::fp16);
    const Ran a = promoted.attend(rows(), given(all)), b = fp16.attend(rows(), call());
    if (phase() == Phase::decode && a.plan.problem.method.arithmetic == Arithmetic::mma4) {  // a kernel of its own
      EXPECT_LE(distance(a.out, b.out, tokens_), kReordered) << spec;
      for (size_t i = 0; i < a.lse.size(); ++i)  // up to 17: scores in FP32, summed in another order
        EXPECT_NEAR(a.lse[i], b.lse[i], 1e-6 * std::max(10.0f, std::abs(b.lse[i]))) << spec;
      continue;
    }
    EXPECT_EQ(a.out, b.out) << spec;
    EXPECT_EQ(a.lse, b.lse) << spec;
  }
}

TEST_P(Identity, ABudgetOfOnePromotesAll) {
  Session promoted = session("thrift:storage=dual,budget=1", tokens_), fp16 = session("fp16", tokens_);
  EXPECT_LE(distance(promoted.attend(rows(), call()).out, fp16.attend(rows(), call()).out, tokens_), kReordered);
}

TEST_P(Identity, PromoteNoneIsFp4BitForBit) {
  const std::pair<const char*, const char*> pairs[] = {{"thrift", "fp4"},
                                                       {"thrift:storage=dual,format=mxfp4", "fp4:format=mxfp4"},
                                                       {"paper", "paper-fp4"},
                                                       {"thrift:arithmetic=mma4", "fp4:arithmetic=mma4"}};
  for (const auto& [promoting, plain] : pairs) {
    Session thrift = session(promoting, tokens_), fp4 = session(plain, tokens_);
    const Selection none = promote_none(thrift.oracle_input(rows(), call()));
    const Ran a = thrift.attend(rows(), given(none)), b = fp4.attend(rows(), call());
    EXPECT_EQ(a.out, b.out) << promoting;
    EXPECT_EQ(a.lse, b.lse) << promoting;
  }
}

TEST_P(Identity, Fp4DiffersFromFp16) {  // else the two above would say nothing
  Session fp4 = session("fp4", tokens_), fp16 = session("fp16", tokens_);
  EXPECT_GT(distance(fp4.attend(rows(), call()).out, fp16.attend(rows(), call()).out, tokens_), 1e-3);
}

// out = merge(attend(promoted), attend(rest)). The tail, which every call reads, is in both; so the parts are made on
// a sequence of whole pages.
TEST_P(Identity, FusedIsTheMergeOfPromotedAndRest) {
  const Tokens tokens = attention_like(shape(), 64 * 8, 2);
  for (const char* spec :
       {"thrift", "thrift:storage=dual", "thrift:arithmetic=mma4", "thrift:storage=dual,format=mxfp4"}) {
    const int64_t n_rows = std::min(rows(), tokens.s);
    Session fused(method(spec), tokens);
    fused.append(tokens.s);
    const oracle::Input in = fused.oracle_input(n_rows, call());
    const Tier high = high_tier(method(spec).storage);
    const Selection some = random_selection(in, {high, Tier::fp16});
    // The promoted pages alone: everything else skipped. The rest alone: the promoted ones skipped.
    Selection promoted_only, rest_only;
    promoted_only.first.push_back(0);
    rest_only = some;
    for (Promoted& p : rest_only.pages) p.tier = Tier::none;
    const auto blocks = oracle::query_blocks(in);
    for (size_t b = 0; b < blocks.size(); ++b) {
      for (auto j = static_cast<int32_t>(blocks[b].first_page), i = 0; j < blocks[b].pages; ++j) {
        const int64_t at = some.first[b] + i;
        const bool is_promoted = at < some.first[b + 1] && some.pages[static_cast<size_t>(at)].page == j;
        promoted_only.pages.push_back({j, is_promoted ? some.pages[static_cast<size_t>(at)].tier : Tier::none});
        i += is_promoted;
      }
      promoted_only.first.push_back(static_cast<int64_t>(promoted_only.pages.size()));
    }
    Call without_sinks = given(rest_only);
    without_sinks.sinks = false;  // a sink initialises exactly one state
    const Ran whole = fused.attend(n_rows, given(some)), top = fused.attend(n_rows, given(promoted_only)),
              rest = fused.attend(n_rows, without_sinks);
    std::vector<double> merged(whole.out.size());
    size_t both = 0;
    for (size_t row = 0; row < whole.lse.size(); ++row) {
      const double a = top.lse[row], b = rest.lse[row], m = std::max(a, b);
      const double wa = std::exp(a - m), wb = std::exp(b - m);
      both += std::isfinite(a) && std::isfinite(b);
      ASSERT_NEAR(whole.lse[row], m + std::log(wa + wb), 1e-5) << spec;
      for (size_t i = row * d_v(); i < (row + 1) * d_v(); ++i) {
        merged[i] = (wa * top.out[i] + wb * rest.out[i]) / (wa + wb);
      }
    }
    EXPECT_GT(both, whole.lse.size() / 2);
    EXPECT_LE(distance(whole.out, merged, tokens), kReordered) << spec;
  }
}

TEST_P(Identity, PagesMayLieAnywhereInMemory) {
  for (const char* spec : {"thrift", "fp16", "thrift:storage=fp4_only"}) {
    Session tidy = session(spec, tokens_);
    Session shuffled(method(spec), tokens_);
    // Sequences that interleave and are freed leave holes, which the pages of ours then fill out of order.
    KvCache& cache = shuffled.cache();
    const Tokens noise = attention_like(shape(), 64 * 4, 99);
    std::vector<SeqId> others;
    for (int i = 0; i < 6; ++i) others.push_back(cache.new_sequence());
    for (int64_t page = 0; page < 4; ++page) {
      for (SeqId other : others) {
        ASSERT_OK(cache.append(other, 0, noise.k_view(page * 64, 64), noise.v_view(page * 64, 64), pool()));
        ASSERT_OK(cache.settle(other, 0));
      }
    }
    for (int i : {4, 0, 3, 1}) ASSERT_OK(cache.free(others[static_cast<size_t>(i)]));
    shuffled.append(tokens_.s - rows());
    shuffled.settle();
    shuffled.append(rows());
    const Ran a = tidy.attend(rows(), call()), b = shuffled.attend(rows(), call());
    EXPECT_EQ(a.out, b.out) << spec;
    EXPECT_EQ(a.lse, b.lse) << spec;
  }
}

TEST_P(Identity, TokenWiseEqualsBulkAppend) {
  for (const char* spec : {"thrift", "fp16", "fp4:format=mxfp4", "paper"}) {
    Session bulk = session(spec, tokens_), single(method(spec), tokens_);
    while (single.length() < tokens_.s - rows()) {
      single.append(1);
      single.settle();
    }
    single.append(rows());
    EXPECT_EQ(bulk.attend(rows(), call()).out, single.attend(rows(), call()).out) << spec;
  }
}

TEST_P(Identity, RepeatedHeadsEqualGroupedHeads) {
  // Each KV head copied for each of its query heads. With a given selection in decode, one list per KV head.
  Tokens wide = tokens_;
  wide.shape.h_kv = wide.shape.h_q;
  const auto repeat = [&](const std::vector<float>& x, int channels) {
    std::vector<float> out;
    for (int64_t t = 0; t < tokens_.s; ++t) {
      for (int h = 0; h < 4; ++h) {
        const auto from = x.begin() + (t * 2 + h / 2) * channels;
        out.insert(out.end(), from, from + channels);
      }
    }
    return out;
  };
  wide.k = repeat(tokens_.k, setting().d);
  wide.v = repeat(tokens_.v, setting().d_v);
  for (const char* spec : {"thrift", "fp4:arithmetic=mma4", "fp16"}) {
    Session grouped = session(spec, tokens_), repeated = session(spec, wide);
    const Selection some = spec == std::string("thrift")
                               ? random_selection(grouped.oracle_input(rows(), call()), {Tier::fp4x2})
                               : promote_none(grouped.oracle_input(rows(), call()));
    Selection each = some;
    if (phase() == Phase::decode) {
      each = {{0}, {}};
      for (size_t h = 0; h < 4; ++h) {
        each.pages.insert(each.pages.end(), some.pages.begin() + some.first[h / 2],
                          some.pages.begin() + some.first[h / 2 + 1]);
        each.first.push_back(static_cast<int64_t>(each.pages.size()));
      }
    }
    const Ran a = grouped.attend(rows(), given(some)), b = repeated.attend(rows(), given(each));
    EXPECT_LE(distance(a.out, b.out, tokens_), kReordered) << spec;
  }
}

TEST(Splits, TheirNumberOnlyReordersSums) {
  for (const Setting& setting : kSettings) {
    SCOPED_TRACE(setting.name);
    const Tokens tokens = attention_like({4, 2, setting.d, setting.d_v}, kTokens);
    for (const char* spec : {"thrift", "thrift:policy=block_mean", "fp16", "topk"}) {
      for (int64_t rows : {1, 2, 16}) {
        Session s(method(spec), tokens);
        s.append(tokens.s);
        Call call = masked(setting);
        call.phase = Phase::decode;
        call.splits = 1;
        const Ran whole = s.attend(rows, call);
        for (int splits : {2, 3, 5, 8, 50}) {  // 50: more than there are pages
          call.splits = splits;
          const Ran parts = s.attend(rows, call);
          EXPECT_EQ(parts.plan.splits, splits);
          EXPECT_LE(distance(parts.out, whole.out, tokens), kReordered) << spec << ", " << splits;
          for (size_t i = 0; i < whole.lse.size(); ++i) EXPECT_NEAR(parts.lse[i], whole.lse[i], 1e-5);
        }
      }
    }
  }
}

TEST_P(Identity, ARerunAndTheNumberOfThreadsChangeNoBit) {
  for (const char* spec : {"thrift", "thrift:policy=block_mean,arithmetic=mma4", "fp16", "quest"}) {
    Session s = session(spec, tokens_);
    Call plain = call();
    plain.splits = phase() == Phase::decode ? 3 : 0;
    plain.stats = true;
    const Ran first = s.attend(rows(), plain);
    for (int threads : {2, 5}) {
      Call again = plain;
      again.threads = threads;
      const Ran second = s.attend(rows(), again);
      EXPECT_EQ(first.out, second.out) << spec << ", planned for " << threads;
      EXPECT_EQ(first.lse, second.lse);
      EXPECT_EQ(first.stats.page_mass, second.stats.page_mass);
      EXPECT_EQ(first.stats.selection.pages, second.stats.selection.pages);
    }
  }
}

TEST_P(Identity, StatsDoNotChangeTheResult) {
  for (const char* spec : {"thrift", "topk"}) {
    Session s = session(spec, tokens_);
    Call with = call();
    with.stats = true;
    EXPECT_EQ(s.attend(rows(), call()).out, s.attend(rows(), with).out) << spec;
  }
}

TEST_P(Identity, NanAndInfInQStayInTheirRow) {
  for (const char* spec : {"thrift", "thrift:policy=block_mean", "fp16", "paper", "quest"}) {
    Tokens dirty = tokens_;
    const int64_t bad = tokens_.s - rows() + rows() / 2;  // one row, head 1; the others of the block must not see it
    const size_t bad_row = static_cast<size_t>(rows() / 2 * 4 + 1);
    for (const float poison : {std::nanf(""), -INFINITY}) {
      dirty.q_at(bad)[setting().d + 9] = poison;
      Session clean = session(spec, tokens_), session_of_dirty = session(spec, dirty);
      const bool ranks = std::string(spec) != "fp16";
      const Selection some = promote_none(clean.oracle_input(rows(), call()));
      const Call fixed = ranks ? given(some) : call();
      const Ran want = clean.attend(rows(), fixed), got = session_of_dirty.attend(rows(), fixed);
      for (size_t row = 0; row < got.lse.size(); ++row) {
        for (size_t i = row * d_v(); i < (row + 1) * d_v(); ++i) {
          if (row == bad_row) {
            ASSERT_TRUE(std::isnan(got.out[i])) << spec;
          } else {
            ASSERT_EQ(got.out[i], want.out[i]) << spec << ", row " << row;
          }
        }
      }
      // Left to itself, the selection may differ, but every other row is still a number.
      const Ran free = session_of_dirty.attend(rows(), call());
      for (size_t row = 0; row < free.lse.size(); ++row) {
        ASSERT_EQ(std::isfinite(free.lse[row]), row != bad_row) << spec;
        ASSERT_EQ(std::isfinite(free.out[row * d_v()]), row != bad_row) << spec;
      }
    }
  }
}

// --- laws between calls
// -----------------------------------------------------------------------------------------------

// Attends to the whole sequence in chunks, each after its own append, and returns all outputs.
Ran in_chunks(const std::string& spec, const Tokens& tokens, const std::vector<int64_t>& chunks, Phase phase,
              Call call = {}) {
  Session session(method(spec), tokens);
  Ran all;
  size_t next = 0;
  while (session.length() < tokens.s) {
    const int64_t rows = std::min(chunks[next++ % chunks.size()], tokens.s - session.length());
    session.append(rows);
    call.phase = phase;
    const Ran ran = session.attend(rows, call);
    session.settle();
    all.out.insert(all.out.end(), ran.out.begin(), ran.out.end());
    all.lse.insert(all.lse.end(), ran.lse.begin(), ran.lse.end());
    all.stats.pairs += ran.stats.pairs;
    all.stats.promoted += ran.stats.promoted;
  }
  return all;
}

TEST(Chunks, OfWholeBlocksEqualOneShotBitForBit) {
  for (const Setting& setting : kSettings) {
    SCOPED_TRACE(setting.name);
    const Tokens tokens = attention_like({4, 2, setting.d, setting.d_v}, 64 * 7 + 11);
    for (const char* spec : {"thrift", "thrift:storage=dual", "thrift:arithmetic=mma4",
                             "thrift:policy=quest,budget=0.4", "fp16", "topk", "fp4", "thrift:force=none,budget=0.3"}) {
      const Ran one = in_chunks(spec, tokens, {tokens.s}, Phase::prefill, masked(setting));
      for (const std::vector<int64_t>& chunks : {std::vector<int64_t>{64}, {128, 64}, {192}}) {
        // A method that reads the tail in 16 bit and the full page in FP4 sees no difference here, because every chunk
        // ends on a page border.
        const Ran many = in_chunks(spec, tokens, chunks, Phase::prefill, masked(setting));
        EXPECT_EQ(one.out, many.out) << spec << ", chunks of " << chunks[0];
        EXPECT_EQ(one.lse, many.lse) << spec;
        EXPECT_EQ(one.stats.promoted, many.stats.promoted) << spec;
      }
    }
  }
}

TEST(Chunks, OfAnySizeEqualOneShotInFp16) {
  for (const Setting& setting : kSettings) {
    SCOPED_TRACE(setting.name);
    const Tokens tokens = attention_like({4, 2, setting.d, setting.d_v}, 300);
    const Ran one = in_chunks("fp16", tokens, {tokens.s}, Phase::prefill, masked(setting));
    for (const std::vector<int64_t>& chunks : {std::vector<int64_t>{1}, {7, 100}, {63, 65}, {299}}) {
      const Ran many = in_chunks("fp16", tokens, chunks, Phase::prefill, masked(setting));
      EXPECT_LE(distance(many.out, one.out, tokens), kReordered);
    }
  }
}

TEST(Chunks, OfAnySizeEqualOneShotWhereForcedPagesCoverTheDiagonal) {
  // The forced diagonal is read in 16 bit whether it is a tail or a full page, so with budget=0 no chunking shows.
  const Tokens tokens = attention_like({4, 2, 64, 64}, 333);
  for (const char* spec : {"thrift:budget=0", "thrift:budget=0,storage=fp4_only", "thrift:budget=0,storage=dual"}) {
    const Ran one = in_chunks(spec, tokens, {tokens.s}, Phase::prefill);
    for (const std::vector<int64_t>& chunks : {std::vector<int64_t>{1}, {7, 100}, {63, 65}, {200}}) {
      EXPECT_LE(distance(in_chunks(spec, tokens, chunks, Phase::prefill).out, one.out, tokens), kReordered)
          << spec << ", chunks of " << chunks[0];
    }
  }
}

TEST(Chunks, PrefillAndDecodeSpendTheSameBudget) {
  // Fraction budgets depend on position alone: the pages promoted for a row are as many in either phase.
  const Tokens tokens = attention_like({2, 2, 64, 64}, 64 * 9, 4);
  for (const char* spec : {"thrift:budget=0.5", "thrift:budget=0.05", "thrift:budget=0.3,force=none",
                           "thrift:policy=quest,budget=top_k:3", "thrift:budget=0"}) {
    Session prefill(method(spec), tokens);
    prefill.append(tokens.s);
    const oracle::Input in = prefill.oracle_input(tokens.s);
    const Selection blocks = prefill.selection(tokens.s);
    Session decode(method(spec), tokens);
    for (int64_t t = 0; t < tokens.s; ++t) {
      decode.append(1);
      Call call;
      call.phase = Phase::decode;
      const bool last_of_page = t % 64 == 63;
      if (last_of_page) {
        const Selection step = decode.selection(1, call);
        for (size_t h = 0; h < 2; ++h) {
          const size_t block = h * 9 + static_cast<size_t>(t / 64);
          EXPECT_EQ(step.first[h + 1] - step.first[h], blocks.first[block + 1] - blocks.first[block])
              << spec << " " << t;
        }
      }
      decode.settle();
    }
    EXPECT_EQ(oracle::query_blocks(in).size(), 18u);
  }
}

TEST(Chunks, DecodeTokenByTokenEqualsPrefillInFp16) {
  for (const Setting& setting : kSettings) {
    SCOPED_TRACE(setting.name);
    const Tokens tokens = attention_like({4, 2, setting.d, setting.d_v}, 200);
    const Ran prefill = in_chunks("fp16", tokens, {tokens.s}, Phase::prefill, masked(setting));
    for (int64_t step : {1, 5, 16}) {
      const Ran decode = in_chunks("fp16", tokens, {step}, Phase::decode, masked(setting));
      EXPECT_LE(distance(decode.out, prefill.out, tokens), kReordered);
    }
  }
}

TEST(Chunks, AVerifyStepEqualsItsRowsOneByOneForAGivenSelection) {
  for (const Setting& setting : kSettings) {
    SCOPED_TRACE(setting.name);
    const Tokens tokens = attention_like({4, 2, setting.d, setting.d_v}, 64 * 6 + 30);
    for (const char* spec : {"thrift:storage=dual", "fp4", "fp16"}) {
      Session session(method(spec), tokens);
      session.append(tokens.s);
      Call call = masked(setting);
      call.phase = Phase::decode;
      const Selection none = promote_none(session.oracle_input(16, call));
      if (spec != std::string("fp16")) call.given = &none;
      const Ran verify = session.attend(16, call), last = session.attend(1, call);
      const std::vector<float> row(verify.out.end() - 4 * setting.d_v, verify.out.end());
      EXPECT_LE(distance(row, last.out, tokens), kReordered) << spec;
    }
  }
}

TEST(Batch, SequencesOfAnyLengthEqualEachAlone) {
  const Shape shape{4, 2, 64, 64};
  for (const Setting& setting : {kSettings[0], kSettings[1], kSettings[2], kSettings[3]}) {
    SCOPED_TRACE(setting.name);
    const std::vector<float> sinks = {3.0f, 1.5f, 0.0f, -1.5f};  // as a Session's
    for (const char* spec : {"thrift", "fp16", "paper", "topk"}) {
      for (const Phase phase : {Phase::prefill, Phase::decode}) {
        const std::vector<int64_t> lengths = {300, 1, 64, 0, 129, 500}, rows = {10, 1, 2, 0, 16, 3};
        const CacheConfig config = CacheConfig::for_method(method(spec), 1, 2, 64, 64);
        auto cache = KvCache::create(config);
        ASSERT_TRUE(cache.ok());
        std::vector<Tokens> all;
        std::vector<SeqId> seqs;
        std::vector<float> q, expected;
        for (size_t i = 0; i < lengths.size(); ++i) {
          all.push_back(attention_like(shape, std::max<int64_t>(lengths[i], 1), static_cast<uint32_t>(i)));
          seqs.push_back(cache->new_sequence());
          ASSERT_OK(cache->append(seqs[i], 0, all[i].k_view(0, lengths[i]), all[i].v_view(0, lengths[i]), pool()));
          const float* from = all[i].q.data() + (lengths[i] - rows[i]) * 4 * 64;
          q.insert(q.end(), from, from + rows[i] * 4 * 64);
          if (rows[i] == 0) continue;
          Session alone(method(spec), all[i]);
          alone.append(lengths[i]);
          Call call = masked(setting);
          call.phase = phase;
          call.splits = phase == Phase::decode ? 2 : 0;
          const Ran ran = alone.attend(rows[i], call);
          expected.insert(expected.end(), ran.out.begin(), ran.out.end());
        }
        Problem problem;
        problem.phase = phase;
        problem.b = static_cast<int>(lengths.size());
        problem.max_s_q = 16;
        problem.max_s_kv = 640;
        problem.h_q = 4;
        problem.h_kv = 2;
        problem.d = problem.d_v = 64;
        problem.window = setting.window;
        problem.softcap = setting.softcap;
        problem.method = method(spec);
        problem.cache = config;
        auto planned = plan(problem, Machine::here(2));
        ASSERT_TRUE(planned.ok()) << planned.status().message();
        if (phase == Phase::decode) planned->splits = 2;
        auto workspace = Workspace::create(*planned);
        ASSERT_TRUE(workspace.ok());
        std::vector<float> out(q.size(), NAN);
        AttendArgs args;
        args.cache = &*cache;
        args.seqs = seqs;
        args.s_q = rows;
        args.q = view(q.data(), 32, 4, 64);
        args.out = mutable_view(out.data(), 32, 4, 64);
        args.sinks = setting.sinks ? sinks.data() : nullptr;
        ASSERT_OK(run(*planned, *workspace, pool(), args));
        // A plan for longer sequences may cut them elsewhere: the same sums in another order.
        EXPECT_LE(distance(out, expected, all[0]), 3 * kReordered) << spec;
      }
    }
  }
}

TEST(Empty, RowsWithoutKeysGiveZeroAndMinusInfinity) {
  // A sequence of no tokens at all.
  const Tokens tokens = attention_like({2, 1, 64, 64}, 4);
  for (const char* spec : {"thrift", "fp16", "topk"}) {
    for (const Phase phase : {Phase::prefill, Phase::decode}) {
      for (const bool causal : {true, false}) {
        Session session(method(spec), tokens);
        Problem problem = session.problem(3, {});
        problem.phase = phase;
        problem.causal = causal;
        problem.max_s_kv = 0;
        auto planned = plan(problem, Machine::here(2));
        ASSERT_TRUE(planned.ok()) << planned.status().message();
        auto workspace = Workspace::create(*planned);
        ASSERT_TRUE(workspace.ok());
        std::vector<float> out(3 * 2 * 64, NAN), lse(3 * 2, NAN);
        const SeqId seq = session.seq();
        const int64_t s_q = 3;
        AttendArgs args;
        args.cache = &session.cache();
        args.seqs = {&seq, 1};
        args.s_q = {&s_q, 1};
        args.q = tokens.q_view(0, 3);
        args.out = mutable_view(out.data(), 3, 2, 64);
        args.lse = lse.data();
        ASSERT_OK(run(*planned, *workspace, pool(), args));
        for (float x : out) ASSERT_EQ(x, 0.0f) << spec;
        for (float x : lse) ASSERT_EQ(x, -INFINITY) << spec;
      }
    }
  }
}

// A sequence without rows has no query block, wherever it stands in the batch.
TEST(Empty, SequencesWithoutRowsHaveNoBlockInTheSelection) {
  const Shape shape{4, 2, 64, 64};
  const Tokens tokens = attention_like(shape, 300);
  for (const Phase phase : {Phase::prefill, Phase::decode}) {
    Session session(method("thrift"), tokens);
    session.append(300);
    Problem problem = session.problem(1, {});
    problem.phase = phase;
    problem.b = 3;
    problem.stats = true;
    auto planned = plan(problem, Machine::here(2));
    ASSERT_TRUE(planned.ok()) << planned.status().message();
    auto workspace = Workspace::create(*planned);
    ASSERT_TRUE(workspace.ok());
    const std::vector<SeqId> seqs(3, session.seq());
    std::vector<float> out(4 * 64);
    Stats stats;
    for (const std::vector<int64_t>& rows : {std::vector<int64_t>{0, 1, 0}, {0, 0, 0}}) {  // the second finds old stats
      const int64_t all = rows[1];
      AttendArgs args;
      args.cache = &session.cache();
      args.seqs = seqs;
      args.s_q = rows;
      args.q = tokens.q_view(299, all);
      args.out = mutable_view(out.data(), all, 4, 64);
      args.stats = &stats;
      ASSERT_OK(run(*planned, *workspace, pool(), args));
      const size_t blocks = static_cast<size_t>(all) * (phase == Phase::prefill ? 4 : 2);
      EXPECT_EQ(stats.selection.first.size(), blocks + 1);
      EXPECT_EQ(stats.selection.pages.empty(), all == 0);
      EXPECT_EQ(stats.mass_above_fp4 > 0, all > 0);
      auto selected = select(*planned, *workspace, pool(), args);
      ASSERT_TRUE(selected.ok()) << selected.status().message();
      EXPECT_EQ(selected->first, stats.selection.first);
      EXPECT_EQ(selected->pages, stats.selection.pages);
      args.given = &*selected;
      EXPECT_OK(run(*planned, *workspace, pool(), args));
    }
  }
}

TEST(Empty, RowsBeforeTheFirstTokenSeeNothing) {
  // 5 rows over 3 tokens: the first two stand before the sequence.
  const Tokens tokens = attention_like({2, 1, 64, 64}, 5);
  for (const Phase phase : {Phase::prefill, Phase::decode}) {
    Session session(method("thrift"), tokens);
    session.append(3);
    Problem problem = session.problem(5, {});
    problem.phase = phase;
    auto planned = plan(problem, Machine::here(2));
    ASSERT_TRUE(planned.ok());
    auto workspace = Workspace::create(*planned);
    ASSERT_TRUE(workspace.ok());
    std::vector<float> out(5 * 2 * 64, NAN), lse(5 * 2, NAN);
    const SeqId seq = session.seq();
    const int64_t s_q = 5;
    AttendArgs args;
    args.cache = &session.cache();
    args.seqs = {&seq, 1};
    args.s_q = {&s_q, 1};
    args.q = tokens.q_view(0, 5);
    args.out = mutable_view(out.data(), 5, 2, 64);
    args.lse = lse.data();
    ASSERT_OK(run(*planned, *workspace, pool(), args));
    for (size_t row = 0; row < 10; ++row) {
      EXPECT_EQ(std::isfinite(lse[row]), row >= 4) << row;
      if (row < 4) {
        EXPECT_EQ(out[row * 64], 0.0f);
      }
    }
  }
}

}  // namespace
}  // namespace thriftattn::testing
