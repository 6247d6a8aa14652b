// The oracle against hand computation: it judges everything else, so its own laws are checked from the outside.
#include "oracle/oracle.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <vector>

namespace thriftattn::oracle {
namespace {

struct Data {
  std::vector<float> q, k, v;
  Input input;
};

Data make(const char* method, int64_t s_q, int64_t s_kv, int h_q = 2, int h_kv = 1, int d = 32) {
  Data data;
  std::mt19937 random(5);
  std::normal_distribution<float> normal;
  const auto fill = [&](std::vector<float>& x, int64_t n) {
    for (int64_t i = 0; i < n; ++i) x.push_back(normal(random));
  };
  fill(data.q, s_q * h_q * d);
  fill(data.k, s_kv * h_kv * d);
  fill(data.v, s_kv * h_kv * d);
  Input& in = data.input;
  in.q = data.q.data();
  in.k = data.k.data();
  in.v = data.v.data();
  in.s_q = s_q;
  in.s_kv = s_kv;
  in.h_q = h_q;
  in.h_kv = h_kv;
  in.d = in.d_v = d;
  in.sm_scale = 1 / std::sqrt(static_cast<double>(d));
  in.method = *parse_method(method);
  in.appended = s_q;
  return data;
}

std::vector<int> pages_of(const Selection& selection, size_t block) {
  std::vector<int> pages;
  for (int64_t i = selection.first[block]; i < selection.first[block + 1]; ++i) {
    pages.push_back(selection.pages[static_cast<size_t>(i)].page);
  }
  return pages;
}

struct MaskCase {
  bool causal;
  int64_t window;
  double softcap;
  bool sinks;
};
const MaskCase kMasks[] = {{true, 0, 0, false},  {false, 0, 0, false},  {true, 20, 0, false}, {true, 200, 0, true},
                           {false, 30, 0, true}, {true, 0, 1.5, false}, {true, 65, 0.7, true}};

TEST(Oracle, Fp16MethodIsSoftmaxAttentionUnderEveryMask) {
  const Data data = make("fp16", 70, 150);
  const std::vector<float> sinks = {0.5f, -2};
  for (const MaskCase& mask : kMasks) {
    Input in = data.input;
    in.high_dtype = DType::f32;  // no rounding at all
    in.causal = mask.causal;
    in.window = mask.window;
    in.softcap = mask.softcap;
    in.sinks = mask.sinks ? sinks.data() : nullptr;
    const Output got = attend(in, select(in));
    double sink_mass = 0;
    for (int64_t r = 0; r < in.s_q; ++r) {
      for (int h = 0; h < in.h_q; ++h) {
        std::vector<double> out(static_cast<size_t>(in.d_v), 0.0);
        const double sink = mask.sinks ? std::exp(static_cast<double>(sinks[static_cast<size_t>(h)])) : 0;
        double sum = sink;
        for (int64_t t = 0; t < in.s_kv; ++t) {
          const int64_t ahead = t - (in.s_kv - in.s_q + r);
          if ((mask.causal && ahead > 0) || (mask.window > 0 && std::abs(ahead) >= mask.window)) continue;
          double score = 0;
          for (int c = 0; c < in.d; ++c) score += in.sm_scale * in.q[(r * in.h_q + h) * in.d + c] * in.k[t * in.d + c];
          if (mask.softcap > 0) score = mask.softcap * std::tanh(score / mask.softcap);
          sum += std::exp(score);
          for (int c = 0; c < in.d_v; ++c) out[static_cast<size_t>(c)] += std::exp(score) * in.v[t * in.d_v + c];
        }
        sink_mass += sink / sum / static_cast<double>(in.s_q * in.h_q);
        ASSERT_NEAR(got.lse[static_cast<size_t>(r * in.h_q + h)], std::log(sum), 1e-12);
        for (int c = 0; c < in.d_v; ++c) {
          const size_t at = static_cast<size_t>((r * in.h_q + h) * in.d_v + c);
          ASSERT_NEAR(got.out[at], out[static_cast<size_t>(c)] / sum, 1e-12);
        }
      }
    }
    EXPECT_NEAR(got.mass_above_fp4, 1.0, 1e-12);
    double mass = 0;
    for (double share : got.page_mass) mass += share;
    EXPECT_NEAR(mass, 1.0 - sink_mass, 1e-12);
  }
}

TEST(OracleSelect, PagesOutsideTheWindowAreNoCandidatesAndCannotBeForced) {
  Data data = make("thrift:budget=0.5", 64, 64 * 10);
  data.input.phase = Phase::decode;
  data.input.s_q = 1;
  data.input.window = 150;  // of the row at 639: tokens 490..639, pages 7, 8 and 9
  const auto blocks = query_blocks(data.input);
  EXPECT_EQ(blocks[0].first_page, 7);
  EXPECT_EQ(blocks[0].pages, 10);
  EXPECT_EQ(pages_of(select(data.input), 0), (std::vector<int>{8, 9}));  // half of three, rounded up: the forced two
  data.input.window = 128;                                               // from token 512 on
  EXPECT_EQ(query_blocks(data.input)[0].first_page, 8);
  data.input.window = 129;
  EXPECT_EQ(query_blocks(data.input)[0].first_page, 7);
}

TEST(Oracle, RowsWithoutAVisibleKeyAreEmpty) {
  const Data data = make("fp4", 5, 3);
  const Output got = attend(data.input, select(data.input));
  for (size_t i = 0; i < 2 * 2; ++i) EXPECT_EQ(got.lse[i], -INFINITY);
  for (size_t i = 0; i < 2 * 2 * 32; ++i) EXPECT_EQ(got.out[i], 0.0);
  EXPECT_TRUE(std::isfinite(got.lse[4]));
}

TEST(Oracle, QueryBlocksStandAtAbsolutePositions) {
  Data data = make("thrift", 100, 230);  // positions 130..229: blocks [130, 192), [192, 230)
  const auto blocks = query_blocks(data.input);
  ASSERT_EQ(blocks.size(), 4u);  // two heads
  EXPECT_EQ(blocks[0].end_row, 62);
  EXPECT_EQ(blocks[0].pages, 3);
  EXPECT_EQ(blocks[1].first_row, 62);
  EXPECT_EQ(blocks[1].pages, 3);  // the tail is no candidate
  EXPECT_EQ(blocks[2].head, 1);
  data.input.phase = Phase::decode;
  ASSERT_EQ(query_blocks(data.input).size(), 1u);  // one KV head, all rows
}

TEST(OracleSelect, ForcedPagesAreSinkDiagonalAndPrevious) {
  Data data = make("thrift:policy=block_mean,budget=0", 64, 64 * 8 + 30);  // rows 478..541: pages 7 and the tail
  EXPECT_EQ(pages_of(select(data.input), 0), (std::vector<int>{0, 6, 7}));
  EXPECT_EQ(pages_of(select(data.input), 1), (std::vector<int>{0, 7}));  // diagonal is the tail, previous is 7
  data.input.phase = Phase::decode;
  EXPECT_EQ(pages_of(select(data.input), 0), (std::vector<int>{0, 6, 7}));
  for (const Promoted& page : select(data.input).pages) EXPECT_EQ(page.tier, Tier::fp16);
}

TEST(OracleSelect, FractionRoundsHalfUpAndCountsForcedPages) {
  // One row, 50 full pages: 0.05 * 50 + 1/2 = 3 pages, two of them forced (sink, previous; the diagonal is the tail).
  Data data = make("thrift:policy=block_mean", 1, 64 * 50 + 1);
  data.input.phase = Phase::decode;
  const Selection three = select(data.input);
  EXPECT_EQ(three.pages.size(), 3u);
  int ranked = 0;
  for (const Promoted& page : three.pages) ranked += page.tier == Tier::fp4x2;
  EXPECT_EQ(ranked, 1);
  data.input.method.budget.value = 0.03;  // floor(2.0)
  EXPECT_EQ(select(data.input).pages.size(), 2u);
  data.input.method.budget.value = 0;  // never below the forced ones
  EXPECT_EQ(select(data.input).pages.size(), 2u);
}

TEST(OracleSelect, PaperBudgetSpendsTheFractionOfTheTriangle) {
  const Data data = make("paper:budget=paper:0.3", 64 * 20, 64 * 20, 1, 1);
  const Selection selection = select(data.input);
  const double pairs = 20 * 21 / 2.0, promoted = static_cast<double>(selection.pages.size());
  EXPECT_NEAR(promoted / pairs, 0.3, 0.05);
  size_t widest = 0;
  for (size_t b = 0; b < 20; ++b) {
    const size_t k = pages_of(selection, b).size();
    widest = std::max(widest, k);
    EXPECT_EQ(k, std::min(widest, b + 1));  // min(k, i + 1)
  }
}

TEST(OracleSelect, MassBudgetStopsAtTheFirstPageThatReachesIt) {
  Data data = make("thrift:policy=oracle,budget=mass:0.7,storage=dual,force=none", 1, 64 * 12);
  data.input.phase = Phase::decode;
  const Estimate e = estimates(data.input)[0];
  double sum = 0, least = 1;
  for (const Promoted& page : select(data.input).pages) {
    sum += e.share[static_cast<size_t>(page.page)];
    least = std::min(least, e.share[static_cast<size_t>(page.page)]);
  }
  EXPECT_GE(sum, 0.7);
  EXPECT_LT(sum - least, 0.7);
}

TEST(OracleSelect, EqualScoresGoToTheLowerPage) {
  Data data = make("topk:budget=top_k:3,force=none", 1, 64 * 9);
  for (float& k : data.k) k = 0;
  EXPECT_EQ(pages_of(select(data.input), 0), (std::vector<int>{0, 1, 2}));
}

TEST(OracleSelect, TheSixteenBitFormExistsForSinkRecentAndJustFilledPages) {
  // A forced page without its 16-bit form is read in the storage's high tier.
  Data data = make("thrift:policy=block_mean,budget=0,force=sink:1+previous:1", 64 * 6, 64 * 10);
  data.input.appended = 64 * 6;  // before: pages 0..3, of which 2 and 3 are recent
  for (const Promoted& page : select(data.input).pages) EXPECT_EQ(page.tier, Tier::fp16) << page.page;
  data.input.appended = 0;  // as if settled: only 0, 8 and 9 keep theirs
  for (const Promoted& page : select(data.input).pages) {
    EXPECT_EQ(page.tier, page.page == 0 || page.page >= 8 ? Tier::fp16 : Tier::fp4x2) << page.page;
  }
}

// Largest difference from exact attention, relative to the largest |v|.
double error(const char* method) {
  Data data = make(method, 64, 64 * 5);
  Data exact = make("fp16", 64, 64 * 5);
  const Output a = attend(data.input, select(data.input)), b = attend(exact.input, select(exact.input));
  double worst = 0;
  for (size_t i = 0; i < a.out.size(); ++i) worst = std::max(worst, std::fabs(a.out[i] - b.out[i]));
  return worst;
}

TEST(Oracle, ErrorsOrderAsTheBitsDo) {
  const double kv4 = error("fp4"), mma8 = error("fp4:arithmetic=mma8"), mma4 = error("fp4:arithmetic=mma4");
  const double x2 = error("thrift:budget=1,force=none");
  EXPECT_GT(kv4, 0.01);
  EXPECT_LT(x2, kv4 / 5);
  EXPECT_GT(mma4, kv4);
  EXPECT_LT(mma8, kv4 * 2);
  EXPECT_LT(mma4, 1.0);
}

TEST(Oracle, ConstantPScaleLosesSmallProbabilities) {
  // Two tokens of one full page matter: one has p = 1, the others p = 0.02 each and together more than half the mass.
  Data data = make("fp4:arithmetic=mma4,page_scale=off,centring=off,p_quant=constant", 1, 64, 1, 1);
  std::fill(data.q.begin(), data.q.end(), 0.0f);
  std::fill(data.k.begin(), data.k.end(), 0.0f);
  std::fill(data.v.begin(), data.v.end(), 6.0f);  // FP4 holds 6 exactly, under scale 1
  data.q[0] = 6;
  data.k[0] = 6;  // token 0, channel 0
  data.input.sm_scale = std::log(50.0) / 36;
  const double constant = attend(data.input, select(data.input)).out[0];
  const double one = 6 * 0.171875;                         // what 1 becomes: code 6 times e4m3(1/6)
  EXPECT_NEAR(constant, 6 * one / (1 + 63 * 0.02), 1e-9);  // only token 0 is left
  data.input.method.p_quant = PQuant::two_level;           // only the 15 tokens that share token 0's scale are lost
  EXPECT_NEAR(attend(data.input, select(data.input)).out[0], 6 * (1 + 48 * 0.02) / (1 + 63 * 0.02), 0.05);
}

TEST(Oracle, ErrorEstimateBoundsTheFirstOrderError) {
  Data data = make("fp4", 1, 64 * 8, 1, 1);
  data.input.phase = Phase::decode;
  Data exact = make("fp16", 1, 64 * 8, 1, 1);
  const Output got = attend(data.input, select(data.input)), want = attend(exact.input, select(exact.input));
  double norm = 0;
  for (size_t c = 0; c < 32; ++c) norm += (got.out[c] - want.out[c]) * (got.out[c] - want.out[c]);
  EXPECT_GT(got.error_estimate, std::sqrt(norm));
  EXPECT_LT(got.error_estimate, 1000 * std::sqrt(norm));
}

}  // namespace
}  // namespace thriftattn::oracle
