// Every method against the oracle of the same arithmetic: which pages are promoted, what comes out, what is reported.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "attention/agreement.h"
#include "oracle/pages.h"

namespace thriftattn::testing {
namespace {

void expect_stats(const Ran& ran, const oracle::Input& input, const oracle::Output& want, const std::string& what) {
  const Stats& stats = ran.stats;
  int64_t pairs = 0;
  for (const oracle::QueryBlock& block : oracle::query_blocks(input)) pairs += block.pages - block.first_page;
  if (input.phase == Phase::decode) pairs *= input.h_q / input.h_kv;  // one selection for all heads of a group
  EXPECT_EQ(stats.pairs, pairs) << what;
  const auto group = static_cast<size_t>(input.phase == Phase::decode ? input.h_q / input.h_kv : 1);
  EXPECT_EQ(static_cast<size_t>(stats.promoted), stats.selection.pages.size() * group) << what;
  const double error = on_integers(input) ? kIntegerError : kFp32Error;
  EXPECT_NEAR(stats.mass_above_fp4, want.mass_above_fp4, error) << what;
  ASSERT_GE(stats.page_mass.size(), want.page_mass.size()) << what;
  for (size_t i = 0; i < want.page_mass.size(); ++i) EXPECT_NEAR(stats.page_mass[i], want.page_mass[i], error) << what;
  if (input.method.storage != Storage::high_only) {
    EXPECT_NEAR(stats.error_estimate, want.error_estimate, 1e-4 * want.error_estimate + 1e-12) << what;
  }
}

// Appends in two steps, so that pages of every kind exist: released, recent, just filled, the tail.
void expect_agreement(const std::string& spec, const Tokens& tokens, int64_t before, int64_t rows, Call call,
                      DType high = DType::f16) {
  const std::string what = spec + (call.phase == Phase::decode ? " decode " : " prefill ") + std::to_string(rows) +
                           "/" + std::to_string(before + rows) + (call.causal ? "" : " not causal") + " window " +
                           std::to_string(call.window) + " softcap " + std::to_string(call.softcap) +
                           (call.sinks ? " sinks" : "") + " d " + std::to_string(tokens.shape.d) + "/" +
                           std::to_string(tokens.shape.d_v);
  SCOPED_TRACE(what);
  Session session(method(spec), tokens, high);
  session.append(before);
  session.settle();
  session.append(rows);
  const oracle::Input input = session.oracle_input(rows, call);
  const Selection selected = session.selection(rows, call);
  ASSERT_FALSE(::testing::Test::HasFatalFailure());
  expect_same_selection(selected, input, what);
  call.stats = true;
  const Ran ran = session.attend(rows, call);
  ASSERT_FALSE(::testing::Test::HasFatalFailure());
  EXPECT_EQ(ran.stats.selection.first, selected.first) << what;
  EXPECT_EQ(ran.stats.selection.pages, selected.pages) << what;
  const oracle::Output want = oracle::attend(input, selected);
  expect_output(ran, want, tokens, input, what);
  expect_stats(ran, input, want, what);
}

const char* const kPolicies[] = {"none",          "auto",     "block_mean", "quest",
                                 "second_moment", "fp4_mass", "recent",     "oracle"};
const char* const kBudgets[] = {"0", "0.3", "paper:0.3", "top_k:4", "per64", "mass:0.9", "tolerance:0.05"};
const char* const kStorages[] = {"high_only", "dual", "residual", "fp4_only"};
const char* const kForms[] = {"format=nvfp4", "format=nvfp4,scales=4over6", "format=mxfp4"};
const char* const kForces[] = {"force=none", "force=sink:1+diagonal+previous:1", "force=sink:2+previous:2"};

// Every policy x budget x storage, under forms, arithmetic, force, centring and page scale that rotate so that each
// meets each. What the grammar refuses is left out.
void expect_agreement_of_all(Phase phase) {
  const Tokens tokens = attention_like({4, 2, 64, 64}, 64 * 7 + 23, 3);
  std::mt19937 random(phase == Phase::prefill ? 1 : 2);
  const auto one_of = [&](const auto& words) { return std::string(words[random() % std::size(words)]); };
  int ran = 0;
  for (const char* policy : kPolicies) {
    if (phase == Phase::prefill && policy == std::string("fp4_mass")) continue;
    for (const char* budget : kBudgets) {
      for (const char* storage : kStorages) {
        const bool fp4 = storage != std::string("high_only");
        std::string spec = std::string("thrift:policy=") + policy + ",budget=" + budget + ",storage=" + storage;
        spec += "," + one_of(kForms) + "," + one_of(kForces);
        spec += fp4 ? "" : ",rest=none";
        spec += random() % 2 ? ",arithmetic=kv4" : ",arithmetic=mma4";
        spec += random() % 3 ? "" : ",centring=off";
        spec += random() % 3 ? "" : ",page_scale=off";
        if (!parse_method(spec).ok()) continue;
        Call call;
        call.phase = phase;
        call.causal = random() % 4 != 0;
        if (random() % 3 == 0) call.window = 20 + static_cast<int64_t>(random() % 300);
        if (random() % 3 == 0) call.softcap = 3;
        call.sinks = random() % 3 == 0;
        const int64_t rows = phase == Phase::decode ? 1 + static_cast<int64_t>(random() % 4) : 90;
        expect_agreement(spec, tokens, tokens.s - 90, rows, call);
        if (::testing::Test::HasFailure()) return;
        ++ran;
      }
    }
  }
  EXPECT_GT(ran, 120);
}

TEST(OracleAgreement, EveryPolicyBudgetAndStorageInPrefill) { expect_agreement_of_all(Phase::prefill); }
TEST(OracleAgreement, EveryPolicyBudgetAndStorageInDecode) { expect_agreement_of_all(Phase::decode); }

TEST(OracleAgreement, EveryFormScaleStorageAndArithmetic) {
  const Tokens tokens = attention_like({2, 1, 64, 64}, 64 * 5 + 40, 4);
  for (const char* storage : {"dual", "residual", "fp4_only"}) {
    for (const char* form : kForms) {
      for (const char* arithmetic : {"arithmetic=kv4", "arithmetic=mma4"}) {
        for (const char* centring : {"on", "off"}) {
          for (const char* page_scale : {"on", "off"}) {
            const std::string spec = std::string("thrift:budget=0.4,storage=") + storage + "," + form + "," +
                                     arithmetic + ",centring=" + centring + ",page_scale=" + page_scale;
            Call call;
            expect_agreement(spec, tokens, 290, 70, call);
            call.phase = Phase::decode;
            expect_agreement(spec, tokens, 357, 3, call);
            if (HasFailure()) return;
          }
        }
      }
    }
  }
}

TEST(OracleAgreement, NamedMethodsAtEveryHeadDimensionAndGroup) {
  const Shape shapes[] = {{1, 1, 64, 64}, {6, 2, 128, 128}, {8, 1, 64, 128}, {3, 3, 128, 64}, {16, 1, 64, 64}};
  for (const Shape& shape : shapes) {
    const Tokens tokens = attention_like(shape, 64 * 4 + 31, 5);
    for (const std::string& name : method_names()) {
      Call call;
      expect_agreement(name, tokens, 130, 157, call);
      call.phase = Phase::decode;
      expect_agreement(name, tokens, tokens.s - 1, 1, call);
      expect_agreement(name, tokens, tokens.s - 16, 16, call);
      if (HasFailure()) return;
    }
  }
}

// The masks that models have, and none.
struct MaskCase {
  int64_t window;
  float softcap;
  bool sinks;
};
constexpr MaskCase kMasks[] = {{0, 0, false},  {100, 0, false}, {0, 4, false},  {0, 0, true},
                               {64, 3, false}, {130, 0, true},  {33, 2.5, true}};

class EveryMaskPhaseAndFormat : public ::testing::TestWithParam<Shape> {};

TEST_P(EveryMaskPhaseAndFormat, AgreesWithTheOracle) {
  const Tokens tokens = attention_like(GetParam(), 64 * 4 + 21, 100);
  for (const MaskCase& mask : kMasks) {
    for (const char* form : kForms) {
      for (const char* arithmetic : {"kv4", "mma4"}) {
        for (const DType high : {DType::f16, DType::bf16}) {
          const std::string spec = std::string("thrift:budget=0.4,") + form + ",arithmetic=" + arithmetic;
          Call call;
          call.window = mask.window;
          call.softcap = mask.softcap;
          call.sinks = mask.sinks;
          expect_agreement(spec, tokens, 210, 67, call, high);
          call.phase = Phase::decode;
          expect_agreement(spec, tokens, tokens.s - 1, 1, call, high);
          if (HasFailure()) return;
        }
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(HeadDims, EveryMaskPhaseAndFormat,
                         ::testing::Values(Shape{4, 2, 64, 64}, Shape{2, 1, 80, 80}, Shape{2, 1, 96, 96},
                                           Shape{2, 2, 128, 128}, Shape{2, 1, 192, 192}, Shape{2, 1, 256, 256},
                                           Shape{2, 1, 192, 128}, Shape{2, 1, 16, 48}),
                         [](const auto& shape) {
                           return "d" + std::to_string(shape.param.d) + "_dv" + std::to_string(shape.param.d_v);
                         });

TEST(OracleAgreement, EveryMethodUnderEveryMask) {
  const Tokens tokens = attention_like({4, 2, 64, 80}, 64 * 6 + 11, 200);
  for (const MaskCase& mask : kMasks) {
    for (const std::string& name : method_names()) {
      for (const bool causal : {true, false}) {
        Call call;
        call.causal = causal;
        call.window = mask.window;
        call.softcap = mask.softcap;
        call.sinks = mask.sinks;
        expect_agreement(name, tokens, 200, 195, call);
        call.phase = Phase::decode;
        expect_agreement(name, tokens, tokens.s - 1, 1, call);
        expect_agreement(name, tokens, tokens.s - 9, 9, call);
        if (HasFailure()) return;
      }
    }
  }
}

TEST(OracleAgreement, AnyScoreScale) {
  const Tokens tokens = attention_like({2, 1, 64, 64}, 300, 13);
  for (const float scale : {1e-6f, 0.02f, 1.0f, -0.1f}) {
    for (const float softcap : {0.0f, 20.0f}) {
      for (const char* spec :
           {"fp16", "thrift", "thrift:policy=second_moment,budget=mass:0.7", "quest", "thrift:budget=tolerance:0.02"}) {
        Call call;
        call.sm_scale = scale;
        call.softcap = softcap;
        expect_agreement(spec, tokens, 200, 100, call);
        call.phase = Phase::decode;
        expect_agreement(spec, tokens, 299, 1, call);
        if (HasFailure()) return;
      }
    }
  }
}

TEST(OracleAgreement, AwkwardLengths) {
  for (int64_t s : {1, 63, 64, 65, 127, 128, 129, 191, 333}) {
    const Tokens tokens = attention_like({2, 1, 64, 64}, s, static_cast<uint32_t>(s));
    for (const char* spec : {"fp16", "fp4", "thrift", "paper", "topk"}) {
      for (const bool causal : {true, false}) {
        Call call;
        call.causal = causal;
        for (int64_t rows : {s, std::min<int64_t>(s, 65), std::min<int64_t>(s, 2)}) {
          expect_agreement(spec, tokens, s - rows, rows, call);
        }
        call.phase = Phase::decode;
        for (int64_t rows : {int64_t{1}, std::min<int64_t>(s, 16)}) {
          expect_agreement(spec, tokens, s - rows, rows, call);
        }
        if (HasFailure()) return;
      }
    }
  }
}

TEST(OracleAgreement, Bf16Cache) {
  Tokens tokens = attention_like({2, 1, 64, 64}, 300, 9);
  for (float& v : tokens.v) v *= 1e6f;  // beyond FP16
  for (const char* spec : {"fp16", "fp4", "thrift", "thrift:storage=dual,format=mxfp4"}) {
    Call call;
    expect_agreement(spec, tokens, 200, 100, call, DType::bf16);
    call.phase = Phase::decode;
    expect_agreement(spec, tokens, 299, 1, call, DType::bf16);
  }
}

TEST(OracleAgreement, ConstantPScale) {
  const Tokens tokens = attention_like({2, 1, 64, 64}, 300, 10);
  for (const char* spec : {"paper:p_quant=constant", "fp4:arithmetic=mma4,p_quant=constant"}) {
    Call call;
    expect_agreement(spec, tokens, 200, 100, call);
    call.phase = Phase::decode;
    expect_agreement(spec, tokens, 299, 1, call);
  }
}

TEST(OracleAgreement, NegativeScoresAreRankedToo) {
  Tokens tokens = attention_like({4, 2, 64, 64}, 64 * 8, 12);
  for (size_t i = 0; i < tokens.k.size(); ++i) tokens.k[i] = std::fabs(tokens.k[i]);
  for (float& q : tokens.q) q = -std::fabs(q) - 0.1f;
  for (const char* policy : {"block_mean", "quest", "second_moment"}) {
    for (const Phase phase : {Phase::prefill, Phase::decode}) {
      Call call;
      call.phase = phase;
      expect_agreement(std::string("thrift:force=none,budget=0.3,policy=") + policy, tokens, 64 * 8 - 10, 10, call);
    }
  }
}

TEST(Select, EqualScoresGoToTheLowerPage) {
  Tokens tokens = attention_like({4, 2, 64, 64}, 64 * 8);
  std::fill(tokens.k.begin(), tokens.k.end(), 0.0f);
  for (const char* policy : {"block_mean", "quest", "second_moment", "fp4_mass", "oracle"}) {
    for (const Phase phase : {Phase::prefill, Phase::decode}) {
      if (phase == Phase::prefill && policy == std::string("fp4_mass")) continue;
      Session session(method(std::string("thrift:force=none,budget=top_k:3,policy=") + policy), tokens);
      session.append(tokens.s);
      Call call;
      call.phase = phase;
      const Selection got = session.selection(1, call);
      ASSERT_EQ(got.first.size(), phase == Phase::prefill ? 5u : 3u);
      for (size_t b = 0; b + 1 < got.first.size(); ++b) {
        ASSERT_EQ(got.first[b + 1] - got.first[b], 3) << policy;
        for (int32_t i = 0; i < 3; ++i) EXPECT_EQ(got.pages[b * 3 + static_cast<size_t>(i)].page, i) << policy;
      }
    }
  }
}

TEST(Stats, CountThePromotionsThatTheStorageCouldNotServe) {
  const Tokens tokens = attention_like({4, 2, 64, 64}, 64 * 8);
  Session session(method("thrift:storage=fp4_only,force=none,policy=block_mean,budget=top_k:3"), tokens);
  session.append(tokens.s);
  Call call;
  const Ran prefill = session.attend(64 * 8, call);
  EXPECT_EQ(prefill.stats.pairs, 4 * 36);
  EXPECT_EQ(prefill.stats.promoted, 0);
  EXPECT_EQ(prefill.stats.wanted_not_stored, 4 * (1 + 2 + 6 * 3));
  call.phase = Phase::decode;
  const Ran decode = session.attend(1, call);
  EXPECT_EQ(decode.stats.wanted_not_stored, 4 * 3);
  EXPECT_EQ(decode.stats.promoted, 0);
}

TEST(Stats, AForcedPageReadIn16BitLikeTheRestIsNotMissing) {
  const Tokens tokens = attention_like({4, 2, 64, 64}, 64 * 3);
  Session session(method("fp16:force=sink:1"), tokens);
  session.append(tokens.s);
  EXPECT_EQ(session.attend(1).stats.wanted_not_stored, 0);
}

// The yardstick for kFp32Error: the kernel must not be worse than twice a plain FP32 loop.
TEST(OracleAgreement, Fp32LoopIsNoMoreThanTwiceAsGood) {
  const Tokens tokens = attention_like({2, 1, 128, 128}, 1200, 11);
  Session session(method("fp16"), tokens);
  session.append(tokens.s);
  const int64_t rows = 64;
  const oracle::Input in = session.oracle_input(rows);
  const oracle::Output want = oracle::attend(in, oracle::select(in));
  std::vector<float> k(tokens.k.size()), v(tokens.v.size());
  ASSERT_OK(session.cache().read(session.seq(), 0, 0, mutable_view(k.data(), tokens.s, 1, 128),
                                 mutable_view(v.data(), tokens.s, 1, 128)));
  std::vector<float> loop;
  for (int64_t r = 0; r < rows; ++r) {
    for (int h = 0; h < 2; ++h) {
      const float* q = in.q + (r * 2 + h) * 128;
      std::vector<float> s, out(128, 0.0f);
      float top = -INFINITY, sum = 0;
      for (int64_t t = 0; t <= tokens.s - rows + r; ++t) {
        float dot = 0;
        for (int c = 0; c < 128; ++c) dot += q[c] * k[static_cast<size_t>(t * 128 + c)];
        s.push_back(dot * static_cast<float>(in.sm_scale));
        top = std::max(top, s.back());
      }
      for (float& x : s) sum += x = std::exp(x - top);
      for (size_t t = 0; t < s.size(); ++t) {
        for (size_t c = 0; c < 128; ++c) out[c] += s[t] / sum * v[t * 128 + c];
      }
      loop.insert(loop.end(), out.begin(), out.end());
    }
  }
  const double plain = distance(loop, want.out, tokens), ours = distance(session.attend(rows).out, want.out, tokens);
  RecordProperty("plain", std::to_string(plain));
  RecordProperty("ours", std::to_string(ours));
  EXPECT_LE(ours, 2 * plain) << "plain FP32 loop: " << plain << ", kernel: " << ours;
  EXPECT_LE(plain, kFp32Error);
}

// Attention of one row over FP4 pages and a tail, q rounded to 16 bits of its largest element and e^(s - the page's
// largest s) to 15 bits, all else in double precision.
std::vector<double> plain_integers(const oracle::Input& in, const oracle::Head& head, int64_t row, int h) {
  const float* q = in.q + (row * in.h_q + h) * in.d;
  float largest = 0;
  for (int c = 0; c < in.d; ++c) largest = std::max(largest, std::fabs(q[c]));
  std::vector<double> q16, out(static_cast<size_t>(in.d_v));
  for (int c = 0; c < in.d; ++c) q16.push_back(std::nearbyint(q[c] / largest * 32512.0) * largest / 32512.0);
  const auto pages = static_cast<int64_t>(head.pages.size()), visible = in.s_kv - in.s_q + row + 1;
  double top = -INFINITY, sum = 0;
  for (int64_t p = 0; p * kPageTokens < visible; ++p) {
    const int64_t tokens = std::min<int64_t>(kPageTokens, visible - p * kPageTokens);
    const auto value = [&](const std::vector<double>& x, int64_t t, int width, int c) {
      return x[static_cast<size_t>(t * width + c)];
    };
    std::vector<double> s(static_cast<size_t>(tokens));
    for (int64_t t = 0; t < tokens; ++t) {
      double dot = 0;
      for (int c = 0; c < in.d; ++c) {
        const auto i = static_cast<size_t>(c);
        if (p < pages) {
          const oracle::Page& page = head.pages[static_cast<size_t>(p)];
          dot += q[c] * page.k_centre[i] + q16[i] * value(page.k_fp4, t, in.d, c);
        } else {
          dot += q[c] * value(head.k, p * kPageTokens + t, in.d, c);
        }
      }
      s[static_cast<size_t>(t)] = dot * in.sm_scale;
    }
    const double m = *std::max_element(s.begin(), s.end()), m_new = std::max(top, m);
    const double shrink = std::exp(top - m_new), weight = std::exp(m - m_new);
    sum *= shrink;
    for (double& x : out) x *= shrink;
    top = m_new;
    for (int64_t t = 0; t < tokens; ++t) {
      const double e = std::exp(s[static_cast<size_t>(t)] - m), e15 = std::nearbyint(e * 32512.0) / 32512.0;
      sum += weight * e;
      for (int c = 0; c < in.d_v; ++c)
        out[static_cast<size_t>(c)] +=
            weight * (p < pages ? e15 * value(head.pages[static_cast<size_t>(p)].v_fp4, t, in.d_v, c)
                                : e * value(head.v, p * kPageTokens + t, in.d_v, c));
    }
  }
  for (double& x : out) x /= sum;
  return out;
}

// The yardstick for kIntegerError: the kernel must not be worse than twice a plain loop that rounds as it does.
TEST(OracleAgreement, IntegersAgainstAPlainLoopOfTheSameRoundings) {
  for (const Shape& shape : {Shape{4, 1, 64, 64}, Shape{8, 2, 128, 128}, Shape{3, 1, 80, 96}, Shape{16, 1, 256, 64}}) {
    for (const char* spec : {"fp4", "fp4:format=mxfp4", "fp4:centring=off"}) {
      const Tokens tokens = attention_like(shape, 64 * 6 + 20, 2);
      Session session(method(spec), tokens);
      session.append(tokens.s - 5);
      session.settle();
      session.append(5);
      Call call;
      call.phase = Phase::decode;
      const oracle::Input in = session.oracle_input(5, call);
      ASSERT_TRUE(on_integers(in));
      const Ran ran = session.attend(5, call);
      const std::vector<oracle::Head> heads = oracle::build_heads(in);
      std::vector<float> loop;
      for (int64_t r = 0; r < 5; ++r)
        for (int h = 0; h < shape.h_q; ++h)
          for (double x : plain_integers(in, heads[static_cast<size_t>(h / (shape.h_q / shape.h_kv))], r, h))
            loop.push_back(static_cast<float>(x));
      const oracle::Output want = oracle::attend(in, promote_none(in));
      const double plain = distance(loop, want.out, tokens), ours = distance(ran.out, want.out, tokens);
      EXPECT_LE(ours, 2 * plain) << shape << " " << spec << ": plain loop " << plain << ", kernel " << ours;
      EXPECT_LE(plain, kIntegerError);
      EXPECT_LE(distance(ran.out, std::vector<double>(loop.begin(), loop.end()), tokens), kFp32Error)
          << shape << " " << spec;
    }
  }
}

// Tokens whose last one asks, and whose FP4 scores of page 5 the caller then makes too high.
Tokens exchange_tokens() { return attention_like({2, 1, 64, 64}, 64 * 12 + 9, 6); }
float alternating(int c) { return c % 2 ? 1.0f : -1.0f; }
const char* const kExchangeOfOnePage[] = {"thrift:force=none,budget=top_k:1",
                                          "thrift:storage=dual,force=none,budget=top_k:1"};

// The last token's step, which exchanges what it promotes, against the oracle under the same selection.
void expect_exchange(const std::string& spec, const Tokens& tokens, const std::string& what, Selection* selected) {
  Session session(method(spec), tokens);
  session.append(tokens.s - 1);
  session.settle();
  session.append(1);
  Call call;
  call.phase = Phase::decode;
  call.stats = true;
  const Ran ran = session.attend(1, call);
  ASSERT_EQ(ran.plan.kernel, "decode_exchange");
  const oracle::Input in = session.oracle_input(1, call);
  expect_output(ran, oracle::attend(in, ran.stats.selection), tokens, in, what);
  *selected = ran.stats.selection;
}

// FP4 scores far above the true ones: what fp4_mass takes out again is then most of the sum, and FP32 would have lost
// the rest (run.cc, cancelled).
TEST(OracleAgreement, ExchangesPagesWhoseFp4ScoresWereFarTooHigh) {
  for (const char* spec : kExchangeOfOnePage) {
    Tokens tokens = exchange_tokens();
    // Page 5 holds one key along the query, whose elements lie just above the middle between two codes: FP4 makes it a
    // fifth larger, and its score is in the hundreds.
    float* q = tokens.q_at(tokens.s - 1);
    for (int c = 0; c < 64; ++c) {
      q[c] = q[64 + c] = 12 * alternating(c);
      for (int64_t t = 5 * 64; t < 6 * 64; ++t)
        tokens.k_at(t)[c] = t == 5 * 64 + 7 ? alternating(c) * (c % 16 ? 5.2f : 6.0f) : 0;
    }
    for (int64_t t = 0; t < tokens.s; ++t)  // and everything else scores as much as that key truly does
      if (t / 64 != 5)
        for (int c = 0; c < 64; ++c) tokens.k_at(t)[c] = alternating(c) * 5.0f;
    Selection selected;
    expect_exchange(spec, tokens, spec, &selected);
    ASSERT_EQ(selected.pages.size(), 1u);
    EXPECT_EQ(selected.pages[0].page, 5);
  }
}

// The same, by so little that nothing would be lost of a sum but of products that are made once for both planes.
TEST(OracleAgreement, ExchangesPagesWhoseFp4ScoresWereSomewhatTooHigh) {
  for (const char* spec : kExchangeOfOnePage)
    for (const float size : {0.6f, 0.7f, 0.9f, 1.0f, 1.06f})
      for (const float spread : {0.05f, 0.1f, 0.15f, 0.35f}) {
        Tokens tokens = exchange_tokens();
        std::mt19937 random(3);
        std::uniform_real_distribution<float> up_to(0, spread);
        float* q = tokens.q_at(tokens.s - 1);
        for (int c = 0; c < 64; ++c) q[c] = q[64 + c] = size * alternating(c);
        for (int64_t t = 0; t < tokens.s; ++t)
          for (int c = 0; c < 64; ++c) tokens.k_at(t)[c] = alternating(c) * 4.2f;
        // Page 5: keys along the query that FP4 makes larger, and as many against it, so that their mean is 0.
        for (int64_t t = 5 * 64; t < 5 * 64 + 32; ++t) {
          const float along = t % 32 == 7 ? 1.0f : 1.0f - up_to(random);
          for (int c = 0; c < 64; ++c) {
            tokens.k_at(t)[c] = along * alternating(c) * (c % 16 ? 5.2f : 6.0f);
            tokens.k_at(t + 32)[c] = -tokens.k_at(t)[c];
          }
        }
        Selection selected;
        expect_exchange(spec, tokens, std::string(spec) + " " + std::to_string(size) + " " + std::to_string(spread),
                        &selected);
        if (HasFatalFailure()) return;
      }
}

TEST(OracleAgreement, EstimatesTheErrorOfPagesThatAreGivenInFp4) {
  const Tokens tokens = attention_like({4, 2, 64, 64}, 64 * 9 + 5, 8);
  for (const char* spec : {"thrift", "thrift:rest=none,policy=block_mean"})
    for (const Phase phase : {Phase::decode, Phase::prefill}) {
      Session session(method(spec), tokens);
      session.append(tokens.s - 3);
      session.settle();
      session.append(3);
      Call call;
      call.phase = phase;
      call.stats = true;
      const oracle::Input in = session.oracle_input(3, call);
      Selection given;
      given.first = {0};
      for (const oracle::QueryBlock& block : oracle::query_blocks(in)) {
        for (const auto& [page, tier] : {std::pair{1, Tier::fp4}, {3, Tier::fp4x2}, {4, Tier::fp4}})
          if (page < block.pages) given.pages.push_back({page, tier});
        given.first.push_back(std::ssize(given.pages));
      }
      call.given = &given;
      const Ran ran = session.attend(3, call);
      const oracle::Output want = oracle::attend(in, given);
      EXPECT_GT(want.error_estimate, 0) << spec;
      expect_output(ran, want, tokens, in, spec);
      EXPECT_NEAR(ran.stats.error_estimate, want.error_estimate, 1e-4 * want.error_estimate + 1e-12) << spec;
    }
}

}  // namespace
}  // namespace thriftattn::testing
