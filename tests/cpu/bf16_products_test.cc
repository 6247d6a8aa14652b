// Prefill with factors in BF16: on pairs (AVX3_BF16) and on emulated matrix tiles on any machine with AVX512-BF16, and
// on AMX where it is.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "attention/session.h"
#include "cpu/amx.h"
#include "cpu/backend.h"
#include "cpu/scratch.h"
#include "format/codecs.h"
#include "oracle/pages.h"

namespace thriftattn::testing {
namespace {

std::vector<std::string> bf16_targets() {
  std::vector<std::string> names = cpu::forced_targets();
  for (const std::string& target : cpu::targets())
    if (target == "AMX" || target == "AVX3_BF16") names.push_back(target);
  return names;
}

float bf16(double x) { return bf16_decode(bf16_encode(static_cast<float>(x))); }

constexpr float kLog2e = 1.44269504088896341f;

struct Plain {
  std::vector<float> out;
  std::vector<double> lse;
};

// Attention as a plain loop in the same arithmetic: q, k, v and p rounded to BF16, sums in FP32, l the sum of the
// rounded p, an FP4 page's mean apart in FP32. Matrix tiles round q times its scale, pairs q itself.
Plain plain_loop(const oracle::Input& in, const Selection& selection, bool scale_first) {
  const std::vector<oracle::Head> heads = oracle::build_heads(in);
  Plain plain;
  plain.out.resize(static_cast<size_t>(in.s_q * in.h_q * in.d_v));
  plain.lse.resize(static_cast<size_t>(in.s_q * in.h_q));
  const std::vector<oracle::QueryBlock> blocks = oracle::query_blocks(in);
  const auto d = static_cast<size_t>(in.d), d_v = static_cast<size_t>(in.d_v);
  for (size_t b = 0; b < blocks.size(); ++b) {
    const oracle::Head& head = heads[static_cast<size_t>(blocks[b].head / (in.h_q / in.h_kv))];
    std::vector<Tier> tiers(head.pages.size() + 1,
                            in.method.budget.kind == Budget::Kind::all ? Tier::fp16 : in.method.rest);
    for (int64_t i = selection.first[b]; i < selection.first[b + 1]; ++i)
      tiers[static_cast<size_t>(selection.pages[static_cast<size_t>(i)].page)] =
          selection.pages[static_cast<size_t>(i)].tier;
    for (int64_t r = blocks[b].first_row; r < blocks[b].end_row; ++r) {
      const int64_t position = in.s_kv - in.s_q + r;
      const auto sm_scale = static_cast<float>(in.sm_scale), softcap = static_cast<float>(in.softcap);
      const float scale = softcap > 0 ? sm_scale / softcap : sm_scale * kLog2e;
      std::vector<float> q(in.q + (r * in.h_q + blocks[b].head) * in.d,
                           in.q + (r * in.h_q + blocks[b].head + 1) * in.d);
      for (float& x : q) x *= scale_first ? scale : 1.0f;
      std::vector<float> s, out(d_v, 0.0f);
      std::vector<std::vector<float>> v;
      for (int64_t t = 0; t < in.s_kv; ++t) {
        if (in.causal && t > position) continue;
        if (in.window > 0 && std::abs(position - t) >= in.window) continue;
        const size_t page = static_cast<size_t>(t / kPageTokens), token = static_cast<size_t>(t % kPageTokens);
        const bool full = page < head.pages.size();
        const Tier tier = full ? tiers[page] : Tier::fp16;
        if (tier == Tier::none) continue;
        float dot = 0;
        for (size_t c = 0; c < d; ++c) {
          if (tier == Tier::fp16) {
            dot += bf16(q[c]) * bf16(head.k[static_cast<size_t>(t) * d + c]);
            continue;
          }
          const oracle::Page& x = head.pages[page];
          const double k = (tier == Tier::fp4 ? x.k_fp4 : x.k_fp4x2)[token * d + c];
          dot += bf16(q[c]) * bf16(k) + q[c] * static_cast<float>(x.k_centre[c]);
        }
        if (!scale_first) dot *= scale;
        s.push_back(softcap > 0 ? softcap * kLog2e * std::tanh(dot) : dot);
        std::vector<float> value(d_v);
        for (size_t c = 0; c < d_v; ++c)
          value[c] = bf16(tier == Tier::fp16  ? head.v[static_cast<size_t>(t) * d_v + c]
                          : tier == Tier::fp4 ? head.pages[page].v_fp4[token * d_v + c]
                                              : head.pages[page].v_fp4x2[token * d_v + c]);
        v.push_back(value);
      }
      const float sink = in.sinks ? in.sinks[blocks[b].head] * kLog2e : -INFINITY;
      float top = sink, sum = 0;
      for (const float x : s) top = std::max(top, x);
      if (in.sinks) sum = std::exp2(sink - top);
      for (size_t t = 0; t < s.size(); ++t) {
        const float p = bf16(std::exp2(s[t] - top));
        sum += p;
        for (size_t c = 0; c < d_v; ++c) out[c] += p * v[t][c];
      }
      const auto row = static_cast<size_t>(r * in.h_q + blocks[b].head);
      for (size_t c = 0; c < d_v; ++c) plain.out[row * d_v + c] = sum > 0 ? out[c] / sum : 0;
      plain.lse[row] = sum > 0 ? static_cast<double>((top + std::log2(sum)) / kLog2e) : -INFINITY;
    }
  }
  return plain;
}

double largest(const std::vector<double>& a, const std::vector<double>& b) {
  double worst = 0;
  for (size_t i = 0; i < a.size(); ++i) worst = a[i] == b[i] ? worst : std::max(worst, std::fabs(a[i] - b[i]));
  return worst;
}

class Bf16Products : public ::testing::TestWithParam<std::string> {
 protected:
  Call call() const {
    Call c;
    c.target = GetParam();
    c.compute = DType::bf16;
    return c;
  }
};
GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(Bf16Products);
INSTANTIATE_TEST_SUITE_P(Cpu, Bf16Products, ::testing::ValuesIn(bf16_targets()),
                         [](const auto& target) { return target.param; });

double root_mean_square(const std::vector<float>& a, const std::vector<double>& b) {
  double sum = 0;
  for (size_t i = 0; i < b.size(); ++i) sum += (a[i] - b[i]) * (a[i] - b[i]);
  return std::sqrt(sum / static_cast<double>(b.size()));
}

// The error to double precision stays below twice that of the plain loop; the largest single one, which is a matter of
// luck, below three times.
void expect_agreement(const std::string& spec, const Tokens& tokens, int64_t rows, const Call& call,
                      DType high = DType::f16) {
  SCOPED_TRACE(spec + ", rows " + std::to_string(rows) + " of " + std::to_string(tokens.s) + ", d " +
               std::to_string(tokens.shape.d) + "/" + std::to_string(tokens.shape.d_v) + ", heads " +
               std::to_string(tokens.shape.h_q) + "/" + std::to_string(tokens.shape.h_kv) +
               (call.causal ? "" : ", not causal") + ", window " + std::to_string(call.window) + ", softcap " +
               std::to_string(call.softcap) + (call.sinks ? ", sinks" : ""));
  Session session(method(spec), tokens, high);
  session.append(tokens.s - rows);
  session.settle();
  session.append(rows);
  const Ran ran = session.attend(rows, call);
  ASSERT_FALSE(::testing::Test::HasFatalFailure());
  ASSERT_EQ(ran.plan.target, call.target);
  ASSERT_EQ(ran.plan.kernel, call.target == "AVX3_BF16" ? "prefill_tiles" : "prefill_matrix_tiles");
  const oracle::Input input = session.oracle_input(rows, call);
  const oracle::Output want = oracle::attend(input, ran.stats.selection);
  const Plain plain = plain_loop(input, ran.stats.selection, call.target != "AVX3_BF16");
  EXPECT_LE(root_mean_square(ran.out, want.out), 2 * root_mean_square(plain.out, want.out) + 1e-5);
  EXPECT_LE(distance(ran.out, want.out, tokens), 3 * distance(plain.out, want.out, tokens) + 1e-5);
  const std::vector<double> lse(ran.lse.begin(), ran.lse.end());
  // The p of a row that are all alike round alike, and l with them.
  EXPECT_LE(largest(lse, want.lse), 2 * largest(plain.lse, want.lse) + 0x1p-9);
  EXPECT_NEAR(ran.stats.mass_above_fp4, want.mass_above_fp4, 0.02);
  for (size_t i = 0; i < want.page_mass.size(); ++i) EXPECT_NEAR(ran.stats.page_mass[i], want.page_mass[i], 0.02);
}

const char* const kSpecs[] = {"fp16",
                              "fp4",
                              "fp4:format=mxfp4",
                              "fp4:scales=4over6,centring=off",
                              "thrift:budget=0.4",
                              "thrift:storage=dual,budget=0.4",
                              "thrift:format=mxfp4,page_scale=off,budget=0.4",
                              "quest:budget=0.4",
                              "thrift:policy=oracle,budget=0.3"};

TEST_P(Bf16Products, AgreeWithTheOracleAsWellAsAPlainBf16Loop) {
  const Shape shapes[] = {{4, 2, 64, 64}, {3, 1, 128, 128}, {1, 1, 16, 48},   {8, 1, 64, 128},
                          {6, 1, 80, 96}, {2, 1, 256, 16},  {2, 1, 192, 112}, {5, 1, 48, 256}};
  for (const Shape& shape : shapes) {
    const Tokens tokens = attention_like(shape, 64 * 6 + 37, 6);
    for (const char* spec : kSpecs) {
      Call c = call();
      c.stats = true;
      c.window = shape.d_v == 96 ? 110 : 0;
      c.softcap = shape.d == 80 || shape.d == 16 ? 5.0f : 0.0f;
      c.sinks = shape.d == 256 || shape.d == 16;
      expect_agreement(spec, tokens, 150, c);
      if (HasFailure()) return;
    }
  }
}

TEST_P(Bf16Products, AgreeUnderEveryMask) {
  const Tokens tokens = attention_like({4, 2, 64, 80}, 64 * 5 + 11, 21);
  for (const bool causal : {true, false})
    for (const int64_t window : {0, 33, 64, 130})
      for (const float softcap : {0.0f, 2.5f})
        for (const bool sinks : {false, true})
          for (const DType high : {DType::f16, DType::bf16}) {
            Call c = call();
            c.stats = true;
            c.causal = causal;
            c.window = window;
            c.softcap = softcap;
            c.sinks = sinks;
            for (const char* spec : {"thrift:budget=0.4", "fp16"}) expect_agreement(spec, tokens, 130, c, high);
            if (HasFailure()) return;
          }
}

// More pages than one window of the kernel, so that means and steps are taken several times over.
TEST_P(Bf16Products, AgreeOverManyPages) {
  const Tokens tokens = attention_like({2, 1, 32, 32}, 64 * 37 + 5, 22);
  for (const char* spec : {"fp16", "thrift", "quest:budget=0.2"}) {
    Call c = call();
    c.stats = true;
    expect_agreement(spec, tokens, 70, c);
  }
}

TEST_P(Bf16Products, AgreeAtAwkwardLengths) {
  for (const int64_t s : {1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129, 191, 333}) {
    const Tokens tokens = attention_like({2, 1, 64, 64}, s, static_cast<uint32_t>(s));
    for (const char* spec : {"fp16", "fp4", "thrift", "topk"})
      for (const bool causal : {true, false})
        for (const int64_t rows : {s, std::min<int64_t>(s, 65), std::min<int64_t>(s, 2)}) {
          Call c = call();
          c.stats = true;
          c.causal = causal;
          expect_agreement(spec, tokens, rows, c);
          if (HasFailure()) return;
        }
  }
}

TEST_P(Bf16Products, AgreeAtAnyScoreScale) {
  const Tokens tokens = attention_like({2, 1, 64, 64}, 300, 13);
  for (const float scale : {1e-6f, 0.02f, 1.0f, -0.1f, 12.0f})  // the last: p below any float
    for (const float softcap : {0.0f, 20.0f})
      for (const char* spec : {"fp16", "thrift"}) {
        Call c = call();
        c.stats = true;
        c.sm_scale = scale;
        c.softcap = softcap;
        expect_agreement(spec, tokens, 100, c);
      }
}

// Rows whose largest score rises late and far make m rise within a step and between steps.
TEST_P(Bf16Products, AgreeWhereScoresRise) {
  Tokens tokens = attention_like({2, 1, 64, 64}, 64 * 9 + 3, 14);
  for (int64_t t = 0; t < tokens.s; ++t)
    for (int c = 0; c < 64; ++c) tokens.k_at(t)[c] *= 0.05f + 0.004f * static_cast<float>(t);
  for (const char* spec : {"fp16", "fp4", "thrift"}) {
    Call c = call();
    c.stats = true;
    expect_agreement(spec, tokens, 100, c);
    c.sinks = true;
    expect_agreement(spec, tokens, 100, c);
  }
}

// --- identities, bit for bit

Selection some_pages(const oracle::Input& input, Tier tier) {
  Selection selection;
  selection.first.push_back(0);
  uint32_t random = 1;
  for (const oracle::QueryBlock& block : oracle::query_blocks(input)) {
    for (auto j = static_cast<int32_t>(block.first_page); j < block.pages; ++j)
      if ((random = random * 1664525 + 1013904223) >> 30 == 0) selection.pages.push_back({j, tier});
    selection.first.push_back(static_cast<int64_t>(selection.pages.size()));
  }
  return selection;
}

TEST_P(Bf16Products, PromoteAllIsFp16AndPromoteNoneIsFp4) {
  for (const Shape& shape : {Shape{4, 2, 64, 64}, Shape{3, 1, 80, 96}}) {
    const Tokens tokens = attention_like(shape, 500);
    for (const int64_t rows : {500, 77}) {
      Call c = call();
      Session dual(method("thrift:storage=dual"), tokens), fp16(method("fp16"), tokens), fp4(method("fp4"), tokens);
      for (Session* session : {&dual, &fp16, &fp4}) session->append(500);
      const Selection all = promote_all(dual.oracle_input(rows, c), Tier::fp16);
      const Selection none = promote_none(dual.oracle_input(rows, c));
      c.given = &all;
      const Ran promoted = dual.attend(rows, c);
      c.given = &none;
      const Ran rest = dual.attend(rows, c);
      c.given = nullptr;
      EXPECT_EQ(promoted.out, fp16.attend(rows, c).out);
      EXPECT_EQ(rest.out, fp4.attend(rows, c).out);
      EXPECT_NE(rest.out, promoted.out);
    }
  }
}

TEST_P(Bf16Products, NeitherStatsNorThreadsNorARerunChangeABit) {
  const Tokens tokens = attention_like({4, 2, 64, 64}, 500);
  for (const char* spec : {"thrift", "fp16", "quest"}) {
    Session session(method(spec), tokens);
    session.append(500);
    Call c = call();
    const Ran first = session.attend(300, c), again = session.attend(300, c);
    c.stats = true;
    const Ran counted = session.attend(300, c);
    EXPECT_EQ(first.out, again.out) << spec;
    EXPECT_EQ(first.out, counted.out) << spec;
    EXPECT_EQ(first.lse, counted.lse) << spec;
  }
}

TEST_P(Bf16Products, GroupedHeadsAreRepeatedHeads) {
  const Tokens tokens = attention_like({6, 1, 64, 80}, 300);  // two tasks of 4 and 2 heads; six of one
  Tokens wide = tokens;
  wide.shape.h_kv = 6;
  wide.k.clear();
  wide.v.clear();
  for (int64_t t = 0; t < tokens.s; ++t)
    for (int h = 0; h < 6; ++h) {
      wide.k.insert(wide.k.end(), tokens.k.begin() + t * 64, tokens.k.begin() + (t + 1) * 64);
      wide.v.insert(wide.v.end(), tokens.v.begin() + t * 80, tokens.v.begin() + (t + 1) * 80);
    }
  Session grouped(method("thrift"), tokens), repeated(method("thrift"), wide);
  grouped.append(300);
  repeated.append(300);
  Call c = call();
  const Selection some = some_pages(grouped.oracle_input(200, c), Tier::fp4x2);
  c.given = &some;
  EXPECT_EQ(grouped.attend(200, c).out, repeated.attend(200, c).out);
}

TEST_P(Bf16Products, ChunksOfWholeBlocksAreOneShot) {
  for (const Shape& shape : {Shape{4, 2, 64, 64}, Shape{2, 1, 96, 128}}) {
    const Tokens tokens = attention_like(shape, 64 * 7 + 11);
    for (const char* spec : {"thrift", "thrift:storage=dual", "fp16", "topk", "fp4"}) {
      Call c = call();
      c.window = shape.d == 96 ? 150 : 0;
      const auto in_chunks = [&](int64_t chunk) {
        Session session(method(spec), tokens);
        std::vector<float> out;
        while (session.length() < tokens.s) {
          const int64_t rows = std::min(chunk, tokens.s - session.length());
          session.append(rows);
          const Ran ran = session.attend(rows, c);
          session.settle();
          out.insert(out.end(), ran.out.begin(), ran.out.end());
        }
        return out;
      };
      const std::vector<float> one = in_chunks(tokens.s);
      for (const int64_t chunk : {64, 192}) EXPECT_EQ(one, in_chunks(chunk)) << spec << ", chunks of " << chunk;
    }
  }
}

TEST_P(Bf16Products, NanAndInfInQStayInTheirRow) {
  const Tokens tokens = attention_like({4, 2, 64, 64}, 300);
  for (const float poison : {std::nanf(""), -INFINITY}) {
    Tokens dirty = tokens;
    dirty.q_at(200)[64 + 9] = poison;  // head 1
    for (const char* spec : {"thrift", "fp16"}) {
      Session clean(method(spec), tokens), poisoned(method(spec), dirty);
      clean.append(300);
      poisoned.append(300);
      Call c = call();
      const Selection none = promote_none(clean.oracle_input(300, c));
      c.given = std::string(spec) == "thrift" ? &none : nullptr;
      const Ran want = clean.attend(300, c), got = poisoned.attend(300, c);
      for (size_t row = 0; row < got.lse.size(); ++row)
        for (size_t i = row * 64; i < (row + 1) * 64; ++i) {
          if (row == 200 * 4 + 1) {
            ASSERT_TRUE(std::isnan(got.out[i])) << spec;
          } else {
            ASSERT_EQ(got.out[i], want.out[i]) << spec << ", row " << row;
          }
        }
    }
  }
}

TEST_P(Bf16Products, RowsWithoutKeysGiveZero) {
  const Tokens tokens = attention_like({2, 1, 64, 64}, 100);
  Session session(method("fp16"), tokens);
  session.append(40);
  Call c = call();
  c.window = 5;
  const Ran ran = session.attend(40, c);
  for (const float x : ran.out) ASSERT_TRUE(std::isfinite(x));
  for (const float x : ran.lse) ASSERT_TRUE(std::isfinite(x));
}

// Straight to the kernel: rows of one head beyond a group of 64 and a batch of 256, in two page ranges one after the
// other, as a verify step would ask.
TEST_P(Bf16Products, AnyNumberOfRowsIsItsPartsOneByOne) {
  const cpu::Kernels* kernels = cpu::kernels_for(GetParam());
  ASSERT_NE(kernels, nullptr);
  constexpr int kD = 48, kDv = 32, kRows = 333;
  constexpr int64_t kTokens = 5 * 64 + 9;
  const PageLayout layout = page_layout(kD, kDv, Fp4Format::nvfp4, false, false, false);
  const Method fp16 = method("fp16");
  std::mt19937 random(5);
  std::normal_distribution<float> normal;
  std::vector<uint16_t> high(static_cast<size_t>(6 * layout.high_bytes / 2));
  for (uint16_t& x : high) x = f16_encode(normal(random));
  std::vector<float> q(kRows * kD);
  for (float& x : q) x = 2 * normal(random);
  std::vector<PageRef> pages;
  for (int64_t p = 0; p < 6; ++p) pages.push_back({nullptr, nullptr, high.data() + p * layout.high_bytes / 2, nullptr});
  Problem problem;
  problem.h_q = cpu::kMaxHeadsPerTask;
  problem.h_kv = 1;
  problem.d = kD;
  problem.d_v = kDv;
  // Twice what a task of a plan needs, which has 256 rows.
  cpu::Worker worker(kRows, kD, kDv, 2 * cpu::matrix_bytes(GetParam(), problem));
  struct State {
    std::vector<float> m = std::vector<float>(kRows, -INFINITY), l = std::vector<float>(kRows), l_high = l,
                       o = std::vector<float>(kRows * kDv);
  };
  const auto attend = [&](State& state, int first, int rows, int64_t first_page, int64_t end_page) {
    cpu::BlockTask t{};
    t.layout = &layout;
    t.method = &fp16;
    t.high_dtype = DType::f16;
    t.sm_scale = 0.2f;
    t.pages = pages.data();
    t.first_page = first_page;
    t.end_page = end_page;
    t.s_kv = kTokens;
    t.first_position = kTokens - 16;
    t.period = 16;  // rows of several heads, 16 positions each; parts begin at multiples of it
    t.mask = {true, 200};
    t.rest = Tier::fp16;
    t.heads = 1;
    t.rows = rows;
    t.q = q.data() + first * kD;
    t.state = {&state.m[static_cast<size_t>(first)], &state.l[static_cast<size_t>(first)],
               &state.l_high[static_cast<size_t>(first)], &state.o[static_cast<size_t>(first * kDv)]};
    kernels->attend(t, worker.tiles);
  };
  State whole, parts;
  attend(whole, 0, kRows, 0, 3);
  attend(whole, 0, kRows, 3, 6);
  for (int first = 0; first < kRows; first += 48) attend(parts, first, std::min(48, kRows - first), 0, 6);
  EXPECT_EQ(whole.m, parts.m);
  for (size_t r = 0; r < kRows; ++r) {
    EXPECT_NEAR(whole.l[r], parts.l[r], 1e-6f * parts.l[r]);  // its sixteen sums meet after each range
    EXPECT_GT(whole.l[r], 0);
  }
  EXPECT_EQ(whole.o, parts.o);
}

// --- who gets them

TEST_P(Bf16Products, AreRefusedWhereTheyDoNotServe) {
  const Tokens tokens = attention_like({2, 1, 64, 64}, 100);
  const auto refusal = [&](const char* spec, Phase phase, DType compute) {
    Session session(method(spec), tokens);
    session.append(100);
    Call c = call();
    c.phase = phase;
    c.compute = compute;
    Machine machine{2, {GetParam()}};
    const auto planned = plan(session.problem(1, c), machine);
    return planned.ok() ? std::string("none") : planned.status().message();
  };
  EXPECT_EQ(refusal("fp16", Phase::prefill, DType::bf16), "none");
  EXPECT_NE(refusal("fp16", Phase::prefill, DType::f32).find("compute=f32"), std::string::npos);
  EXPECT_NE(refusal("paper", Phase::prefill, DType::bf16).find("arithmetic=kv4"), std::string::npos);
  EXPECT_NE(refusal("fp16", Phase::decode, DType::bf16).find("prefill"), std::string::npos);
  EXPECT_NE(refusal("fp16", Phase::prefill, DType::f16).find("compute f16 is not supported"), std::string::npos);
}

TEST_P(Bf16Products, ArePassedOverForTheNextTargetAndThePlanSaysSo) {
  const Tokens tokens = attention_like({2, 1, 64, 64}, 100);
  Session session(method("fp16"), tokens);
  session.append(100);
  const std::string next = Machine::here(1).targets.back();
  const Machine machine{2, {GetParam(), next}};
  const auto planned = plan(session.problem(100, {}), machine);
  ASSERT_TRUE(planned.ok());
  EXPECT_EQ(planned->target, next);
  EXPECT_NE(to_string(*planned).find(GetParam() + ": refused, compute=f32"), std::string::npos);
  const auto allowed = plan(session.problem(100, call()), machine);
  ASSERT_TRUE(allowed.ok());
  EXPECT_EQ(allowed->target, GetParam());
  EXPECT_NE(to_string(*allowed).find("compute=bf16"), std::string::npos);
  EXPECT_GT(allowed->workspace_bytes, planned->workspace_bytes);
}

TEST(Targets, TheEmulationIsNeverListed) {
  for (const std::string& target : cpu::targets()) EXPECT_EQ(target.find("EMULATED"), std::string::npos);
}

}  // namespace
}  // namespace thriftattn::testing
