// The bytes of a page and the counting of budgets, apart from any kernel.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "format/page_codec.h"
#include "format/page_layout.h"
#include "format/selection.h"
#include "oracle/pages.h"

namespace thriftattn {
namespace {

TEST(PlaneLayout, EveryCodeAndScaleHasAPlaceOfItsOwnAndNoByteIsWasted) {
  for (Fp4Format format : {Fp4Format::nvfp4, Fp4Format::mxfp4}) {
    for (const auto& [depth, lanes] : {std::pair{64, 64}, {128, 64}, {64, 128}, {128, 128}, {96, 96}}) {
      const PlaneLayout plane{depth, lanes, block_size(format)};
      std::set<std::pair<int64_t, int>> codes;
      std::set<int64_t> scales;
      for (int r = 0; r < depth; ++r) {
        for (int lane = 0; lane < lanes; ++lane) {
          const int64_t at = plane.code_offset(r, lane), scale = plane.scale_offset(r, lane);
          const int shift = PlaneLayout::code_shift(r);
          ASSERT_TRUE(at >= 0 && at < plane.code_bytes() && (shift == 0 || shift == 4));
          ASSERT_TRUE(codes.insert({at, shift}).second) << r << ", " << lane;
          ASSERT_TRUE(scale >= 0 && scale < plane.scale_bytes());
          ASSERT_EQ(scale, plane.scale_offset(r / plane.group * plane.group, lane));
          scales.insert(scale);
        }
      }
      EXPECT_EQ(static_cast<int64_t>(codes.size()), 2 * plane.code_bytes());
      EXPECT_EQ(static_cast<int64_t>(scales.size()), plane.scale_bytes());
    }
  }
}

// One page of one head through encode_page and decode_page, against the oracle's page of the same tokens.
void expect_page_like_oracle(CacheConfig config, float magnitude, const std::string& what) {
  std::mt19937 random(3);
  std::normal_distribution<float> normal;
  config.mean = config.min_max = config.variance = true;
  const PageLayout layout = page_layout(config.d, config.d_v, config.format, true, true, true);
  std::vector<float> k, v;
  for (int i = 0; i < kPageTokens * config.d; ++i)
    k.push_back(magnitude * (normal(random) + (i % config.d == 5 ? 8.0f : 0.0f)));
  for (int i = 0; i < kPageTokens * config.d_v; ++i) v.push_back(magnitude * normal(random));

  oracle::Input input;
  input.k = k.data();
  input.v = v.data();
  input.s_kv = kPageTokens;
  input.d = config.d;
  input.d_v = config.d_v;
  input.high_dtype = config.high_dtype;
  input.method.storage = config.storage;
  input.method.format = config.format;
  input.method.scales = config.scales;
  input.method.centring = config.centring;
  input.method.page_scale = config.page_scale;
  const oracle::Page want = oracle::build_heads(input)[0].pages[0];

  std::vector<uint16_t> high(static_cast<size_t>(layout.high_bytes / 2));
  for (int t = 0; t < kPageTokens; ++t) {
    for (int c = 0; c < config.d; ++c) {
      high[static_cast<size_t>(layout.high_k_at(t, c))] =
          high_encode(config.high_dtype, k[static_cast<size_t>(t * config.d + c)]);
    }
    for (int c = 0; c < config.d_v; ++c) {
      high[static_cast<size_t>(layout.high_v_at(t, c))] =
          high_encode(config.high_dtype, v[static_cast<size_t>(t * config.d_v + c)]);
    }
  }
  // Poison: every byte of a record is written by the encoder.
  std::vector<uint8_t> fp4(static_cast<size_t>(layout.fp4_bytes), 0xff), residual(fp4),
      summary(static_cast<size_t>(layout.summary_bytes), 0xff);
  encode_page(config, layout, high.data(), fp4.data(), residual.data(), summary.data());

  const auto* mean = reinterpret_cast<const uint16_t*>(summary.data() + layout.mean);
  const auto* low = reinterpret_cast<const uint16_t*>(summary.data() + layout.min);
  const auto* top = reinterpret_cast<const uint16_t*>(summary.data() + layout.max);
  const auto* variance = reinterpret_cast<const float*>(summary.data() + layout.variance);
  for (size_t c = 0; c < static_cast<size_t>(config.d); ++c) {
    ASSERT_EQ(high_decode(config.high_dtype, mean[c]), want.k_mean[c]) << what;
    ASSERT_EQ(high_decode(config.high_dtype, low[c]), want.k_min[c]) << what;
    ASSERT_EQ(high_decode(config.high_dtype, top[c]), want.k_max[c]) << what;
    ASSERT_FLOAT_EQ(variance[c], static_cast<float>(want.k_variance[c])) << what;
  }
  PageSummary facts;
  std::copy_n(summary.data(), sizeof(facts), reinterpret_cast<uint8_t*>(&facts));
  EXPECT_NEAR(facts.eps_k, want.eps_k, 1e-5 * want.eps_k) << what;
  EXPECT_NEAR(facts.eps_v, want.eps_v, 1e-5 * want.eps_v) << what;
  EXPECT_NEAR(facts.v_norm, want.v_norm, 1e-5 * want.v_norm) << what;

  for (const bool both : {false, true}) {
    if (both && config.storage != Storage::residual) continue;
    std::vector<float> got_k(k.size()), got_v(v.size());
    decode_page(config, layout, fp4.data(), both ? residual.data() : nullptr, summary.data(), got_k.data(),
                got_v.data());
    const auto& want_k = both ? want.k_fp4x2 : want.k_fp4;
    const auto& want_v = both ? want.v_fp4x2 : want.v_fp4;
    for (size_t i = 0; i < k.size(); ++i) {
      const size_t t = i / static_cast<size_t>(config.d), c = i % static_cast<size_t>(config.d);
      // The decoder adds mean and planes in FP32; one plane without a mean is exact.
      const double exact = want.k_centre[c] + want_k[i], got = got_k[c * kPageTokens + t];
      if (config.centring || both) {
        ASSERT_NEAR(got, exact, 1e-6 * (std::fabs(want.k_centre[c]) + std::fabs(want_k[i]) + 1e-30)) << what;
      } else {
        ASSERT_EQ(got, exact) << what;
      }
    }
    for (size_t i = 0; i < v.size(); ++i) {
      if (both) {
        ASSERT_NEAR(got_v[i], want_v[i], 1e-6 * std::fabs(want_v[i])) << what;
      } else {
        ASSERT_EQ(got_v[i], want_v[i]) << what;
      }
    }
  }
}

TEST(PageCodec, EqualsTheOracleInEveryForm) {
  for (Storage storage : {Storage::residual, Storage::dual}) {
    for (Fp4Format format : {Fp4Format::nvfp4, Fp4Format::mxfp4}) {
      for (Scales scales : {Scales::six, Scales::four_over_six}) {
        for (const bool centring : {true, false}) {
          for (const bool page_scale : {true, false}) {
            for (const float magnitude : {1.0f, 1e-3f, 500.0f, 1e-6f}) {
              CacheConfig config;
              config.storage = storage;
              config.format = format;
              config.scales = scales;
              config.centring = centring;
              config.page_scale = page_scale;
              config.d = 64;
              config.d_v = 128;
              expect_page_like_oracle(config, magnitude, to_string(format) + " x " + std::to_string(magnitude));
              config.high_dtype = DType::bf16;
              expect_page_like_oracle(config, magnitude, to_string(format) + " bf16 x " + std::to_string(magnitude));
            }
          }
        }
      }
    }
  }
}

BlockPages block_of(int64_t visible, int64_t total) { return {0, visible, visible, visible, total}; }

TEST(Budget, PaperSolvesItsEquation) {
  // One k for all rows: sum over i of min(k, i + 1) = f n (n + 1) / 2. Rounding k moves the sum by at most half a row.
  for (int64_t n : {1, 2, 7, 20, 64, 255, 1000}) {
    for (double f : {0.01, 0.05, 0.2, 0.5, 0.9, 1.0}) {
      const int64_t k = budget_pages({Budget::Kind::paper, f}, block_of(n, n), 0, true);
      ASSERT_GE(k, 1);
      ASSERT_LE(k, n);
      const auto pairs = [n](double width) {
        double sum = 0;
        for (int64_t i = 0; i < n; ++i) sum += std::min(width, static_cast<double>(i + 1));
        return sum;
      };
      const double want = f * static_cast<double>(n * (n + 1)) / 2, width = static_cast<double>(k);
      EXPECT_TRUE(k == 1 || pairs(width - 0.501) <= want) << n << " " << f;
      EXPECT_TRUE(k == n || pairs(width + 0.501) + 0.5 >= want) << n << " " << f;
    }
  }
  EXPECT_EQ(budget_pages({Budget::Kind::paper, 0.05}, block_of(100, 100), 0, false), 5);
  EXPECT_EQ(budget_pages({Budget::Kind::paper, 0.05}, block_of(2, 100), 0, false), 2) << "never more than are visible";
}

TEST(Budget, CountsByHand) {
  const auto pages = [](Budget::Kind kind, double value, int64_t n, int64_t forced) {
    return budget_pages({kind, value}, block_of(n, 1000), forced, true);
  };
  EXPECT_EQ(pages(Budget::Kind::fraction, 0.05, 9, 0), 0);
  EXPECT_EQ(pages(Budget::Kind::fraction, 0.05, 10, 0), 1);
  EXPECT_EQ(pages(Budget::Kind::fraction, 0.05, 29, 0), 1);
  EXPECT_EQ(pages(Budget::Kind::fraction, 0.05, 30, 0), 2);
  EXPECT_EQ(pages(Budget::Kind::fraction, 0.05, 30, 3), 3);
  EXPECT_EQ(pages(Budget::Kind::fraction, 1, 30, 3), 30);
  EXPECT_EQ(pages(Budget::Kind::fraction, 0, 30, 3), 3);
  EXPECT_EQ(pages(Budget::Kind::top_k, 16, 10, 0), 10);
  EXPECT_EQ(pages(Budget::Kind::top_k, 16, 100, 0), 16);
  EXPECT_EQ(pages(Budget::Kind::per64, 0, 63, 0), 1);
  EXPECT_EQ(pages(Budget::Kind::per64, 0, 128, 0), 2);
  EXPECT_EQ(pages(Budget::Kind::per64, 0, 0, 0), 0);
}

}  // namespace
}  // namespace thriftattn
