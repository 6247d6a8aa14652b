// Every instruction set brings rows into pages and encodes full ones as the scalar definition does, byte for byte.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "attention/session.h"
#include "cpu/encode.h"
#include "thriftattn/attention.h"

namespace thriftattn::testing {
namespace {

class EncodeTarget : public ::testing::TestWithParam<std::string> {
 protected:
  const cpu::Encoder& encoder() const { return *cpu::encoder_for(GetParam()); }
};
INSTANTIATE_TEST_SUITE_P(Cpu, EncodeTarget, ::testing::ValuesIn(testing::register_targets()),
                         [](const auto& target) { return target.param; });

struct Records {
  std::vector<uint16_t> high;
  std::vector<uint8_t> fp4, residual, summary;

  explicit Records(const PageLayout& l)
      : high(static_cast<size_t>(l.high_bytes / 2), 0xffff),  // NaN in every form
        fp4(static_cast<size_t>(l.fp4_bytes), 0xff),
        residual(fp4),
        summary(static_cast<size_t>(l.summary_bytes), 0xff) {}
};

PageLayout layout_of(const CacheConfig& c) { return page_layout(c.d, c.d_v, c.format, c.mean, c.min_max, c.variance); }

// Rows of one head among others, whose values are NaN.
struct Rows {
  static constexpr int64_t kHeads = 3;
  DType dtype;
  int channels;
  std::vector<uint8_t> bytes;

  Rows(DType type, int n, const std::vector<float>& x) : dtype(type), channels(n) {
    bytes.assign(static_cast<size_t>(kPageTokens * row_bytes()), 0xff);
    for (int t = 0; t < kPageTokens; ++t)
      for (int c = 0; c < n; ++c) {
        uint8_t* to = bytes.data() + t * row_bytes() + (n + c) * size_of(type);
        const float value = x[static_cast<size_t>(t * n + c)];
        const uint16_t half = type == DType::f32 ? uint16_t{0} : high_encode(type, value);
        std::memcpy(to, type == DType::f32 ? static_cast<const void*>(&value) : &half,
                    static_cast<size_t>(size_of(type)));
      }
  }
  int64_t row_bytes() const { return kHeads * channels * size_of(dtype); }
  AppendRows from(int first) const {
    return {bytes.data() + first * row_bytes() + channels * size_of(dtype), dtype, row_bytes()};
  }
  float at(int t, int c) const {
    const uint8_t* from = bytes.data() + t * row_bytes() + (channels + c) * size_of(dtype);
    float value;
    uint16_t half;
    std::memcpy(&value, from, sizeof(value));
    std::memcpy(&half, from, sizeof(half));
    return dtype == DType::f32 ? value : high_decode(dtype, half);
  }
};

enum class Planes { none, one, two };

// The page as the definition has it.
Records defined(const CacheConfig& config, const Rows& k, const Rows& v, Planes planes) {
  const PageLayout layout = layout_of(config);
  Records r(layout);
  for (int t = 0; t < kPageTokens; ++t) {
    for (int c = 0; c < config.d; ++c)
      r.high[static_cast<size_t>(layout.high_k_at(t, c))] = high_encode(config.high_dtype, k.at(t, c));
    for (int c = 0; c < config.d_v; ++c)
      r.high[static_cast<size_t>(layout.high_v_at(t, c))] = high_encode(config.high_dtype, v.at(t, c));
  }
  encode_page(config, layout, r.high.data(), planes == Planes::none ? nullptr : r.fp4.data(),
              planes == Planes::two ? r.residual.data() : nullptr, r.summary.data());
  return r;
}

// The page as a target appends it, in steps that end at `ends`.
Records appended(const cpu::Encoder& encoder, const CacheConfig& config, const Rows& k, const Rows& v, Planes planes,
                 const std::vector<int>& ends) {
  const PageLayout layout = layout_of(config);
  Records r(layout);
  int first = 0;
  for (const int end : ends) {
    PageAppend a;
    a.config = &config;
    a.layout = &layout;
    a.k = k.from(first);
    a.v = v.from(first);
    a.first = first;
    a.end = end;
    a.high = r.high.data();
    if (end == kPageTokens) {
      a.fp4 = planes == Planes::none ? nullptr : r.fp4.data();
      a.residual = planes == Planes::two ? r.residual.data() : nullptr;
      a.summary = r.summary.data();
    }
    EXPECT_TRUE(encoder.append_rows(a));
    first = end;
  }
  return r;
}

void expect_same(const PageLayout& l, const Records& got, const Records& want, const std::string& what) {
  for (size_t i = 0; i < want.high.size(); ++i) ASSERT_EQ(got.high[i], want.high[i]) << what << ", 16 bit, " << i;
  for (size_t i = 0; i < want.summary.size(); ++i)
    ASSERT_EQ(got.summary[i], want.summary[i]) << what << ", summary byte " << i << ": mean from " << l.mean << ", min "
                                               << l.min << ", max " << l.max << ", variance " << l.variance;
  const auto planes = [&](const std::vector<uint8_t>& a, const std::vector<uint8_t>& b, const char* name) {
    for (size_t i = 0; i < b.size(); ++i)
      ASSERT_EQ(int{a[i]}, int{b[i]}) << what << ", " << name << " byte " << i << ": K scales from " << l.k_scales
                                      << ", V codes " << l.v_codes << ", V scales " << l.v_scales;
  };
  planes(got.fp4, want.fp4, "plane 1");
  planes(got.residual, want.residual, "plane 2");
}

using Fill = std::function<float(std::mt19937&, int token, int channel)>;

std::vector<float> filled(const Fill& fill, int channels, uint32_t seed) {
  std::mt19937 random(seed);
  std::vector<float> x;
  for (int t = 0; t < kPageTokens; ++t)
    for (int c = 0; c < channels; ++c) x.push_back(fill(random, t, c));
  return x;
}

// Normal values with an outlier channel and a sink.
Fill attention_like(float magnitude) {
  return [magnitude](std::mt19937& random, int t, int c) {
    return magnitude * (std::normal_distribution<float>()(random) + (c == 5 ? 8.0f : 0.0f) + (t == 0 ? 4.0f : 0.0f));
  };
}

struct Data {
  const char* name;
  Fill fill;
};

std::vector<Data> all_data(DType high) {
  std::vector<Data> all = {
      {"attention", attention_like(1)},
      {"small", attention_like(1e-4f)},
      {"large", attention_like(3000)},
      {"zeros", [](std::mt19937&, int, int) { return 0.0f; }},
      {"zeros of both signs", [](std::mt19937&, int t, int c) { return (t * 7 + c) % 3 ? -0.0f : 0.0f; }},
      {"one value", [](std::mt19937&, int t, int c) { return t == 37 && c == 3 ? -2.5f : 0.0f; }},
      {"equal values", [](std::mt19937&, int, int c) { return 0.375f * static_cast<float>(c - 7); }},
      // Quarters up to 6, and 6 itself in every block: quotients that are exact ties, scales that are exact.
      {"ties",
       [](std::mt19937& random, int t, int c) {
         return (t + c) % 8 == 0 ? 6.0f : 0.25f * static_cast<float>(static_cast<int>(random() % 49) - 24);
       }},
      {"all halves below 0.001, subnormal ones too",
       [](std::mt19937& random, int, int) {
         return f16_decode(static_cast<uint16_t>((random() & 0x8000u) | (random() % 0x1400u)));
       }},
      {"every exponent of a half",
       [](std::mt19937& random, int, int) {
         return f16_decode(static_cast<uint16_t>((random() & 0x8000u) | (random() % 0x7c00u)));
       }},
      // Groups whose scale is 0 beside others that set the page's: their zeros keep their signs for the second plane.
      {"groups too small for a scale",
       [](std::mt19937& random, int t, int c) {
         if (t / 16 % 2 == 0 && c / 16 % 2 == 0) return 96.0f;  // exact in one plane
         return random() % 3 == 0 ? -0.0f : 0x1p-20f * static_cast<float>(static_cast<int>(random() % 9) - 4);
       }},
      {"the largest halves", [](std::mt19937& random, int, int) { return random() % 2 ? 65504.0f : -65519.0f; }},
  };
  if (high == DType::bf16) {
    // 2^128 / 1e38 = 3.4: errors of centring stay finite.
    all.push_back({"huge", [](std::mt19937& random, int, int) {
                     return 1e38f * (static_cast<float>(random() % 2001) / 1000 - 1);
                   }});
    all.push_back({"every float of moderate size", [](std::mt19937& random, int, int) {
                     return float_of((static_cast<uint32_t>(random()) & 0x80ffffffu) % 0x7e800000u +
                                     (static_cast<uint32_t>(random()) % 0x7e000000u & 0x7f000000u));
                   }});
    all.push_back({"a mean that is infinite", [](std::mt19937& random, int, int c) {
                     return c == 9 ? 3e38f : static_cast<float>(random() % 101) - 50;
                   }});
    all.push_back({"subnormal floats", [](std::mt19937& random, int, int) {
                     return float_of(static_cast<uint32_t>(random()) & 0x807fffffu);
                   }});
  }
  return all;
}

std::vector<CacheConfig> all_configs(int d, int d_v) {
  std::vector<CacheConfig> all;
  for (const Fp4Format format : {Fp4Format::nvfp4, Fp4Format::mxfp4})
    for (const Scales scales : {Scales::six, Scales::four_over_six})
      for (const bool centring : {true, false})
        for (const bool page_scale : {true, false})
          for (const DType high : {DType::f16, DType::bf16}) {
            if (format == Fp4Format::mxfp4 && (scales != Scales::six || !page_scale)) continue;
            CacheConfig c;
            c.d = d;
            c.d_v = d_v;
            c.format = format;
            c.scales = scales;
            c.centring = centring;
            c.page_scale = page_scale;
            c.high_dtype = high;
            c.mean = c.min_max = c.variance = true;
            all.push_back(c);
          }
  return all;
}

std::string describe(const CacheConfig& c, const char* data) {
  return to_string(c.format) + (c.scales == Scales::six ? " six" : " 4over6") + (c.centring ? " centred" : "") +
         (c.page_scale ? " page scale" : "") + (c.high_dtype == DType::f16 ? " f16 " : " bf16 ") + std::to_string(c.d) +
         "/" + std::to_string(c.d_v) + " " + data;
}

TEST_P(EncodeTarget, EqualsTheDefinitionForEveryFormatAndKindOfValues) {
  for (const CacheConfig& config : all_configs(48, 80))
    for (const Data& data : all_data(config.high_dtype)) {
      const Rows k(DType::f32, config.d, filled(data.fill, config.d, 1));
      const Rows v(DType::f32, config.d_v, filled(data.fill, config.d_v, 2));
      expect_same(layout_of(config), appended(encoder(), config, k, v, Planes::two, {kPageTokens}),
                  defined(config, k, v, Planes::two), describe(config, data.name));
      if (HasFatalFailure()) return;
    }
}

TEST_P(EncodeTarget, EqualsTheDefinitionForEveryHeadSize) {
  for (int d = 16; d <= kMaxChannels; d += 16)
    for (const Fp4Format format : {Fp4Format::nvfp4, Fp4Format::mxfp4}) {
      CacheConfig config;
      config.d = d;
      config.d_v = kMaxChannels + 16 - d;
      config.format = format;
      config.min_max = d % 32 == 0;
      config.variance = d % 64 == 0;
      const Rows k(DType::f32, d, filled(attention_like(2), d, 3));
      const Rows v(DType::f32, config.d_v, filled(attention_like(0.1f), config.d_v, 4));
      for (const Planes planes : {Planes::none, Planes::one, Planes::two}) {
        expect_same(layout_of(config), appended(encoder(), config, k, v, planes, {kPageTokens}),
                    defined(config, k, v, planes), describe(config, "attention"));
        if (HasFatalFailure()) return;
      }
    }
}

TEST_P(EncodeTarget, StepsOfAnyLengthAndRowsOfAnyTypeMakeTheSamePage) {
  std::vector<int> singly;
  for (int t = 1; t <= kPageTokens; ++t) singly.push_back(t);
  for (const DType high : {DType::f16, DType::bf16})
    for (const DType rows : {DType::f32, DType::f16, DType::bf16}) {
      CacheConfig config;
      config.d = 80;
      config.d_v = 32;
      config.high_dtype = high;
      const Rows k(rows, config.d, filled(attention_like(1), config.d, 5));
      const Rows v(rows, config.d_v, filled(attention_like(1), config.d_v, 6));
      const Records want = defined(config, k, v, Planes::two);
      for (const std::vector<int>& ends : {singly, {1, 64}, {63, 64}, {8, 40, 64}, {5, 12, 31, 33, 64}})
        expect_same(layout_of(config), appended(encoder(), config, k, v, Planes::two, ends), want,
                    std::to_string(ends.size()) + " steps");
    }
}

// Only what a step brings is written.
TEST_P(EncodeTarget, RowsOfATailLeaveTheOthersAlone) {
  CacheConfig config;
  config.d = 48;
  config.d_v = 64;
  const PageLayout layout = layout_of(config);
  const Rows k(DType::f32, config.d, filled(attention_like(1), config.d, 7));
  const Rows v(DType::f32, config.d_v, filled(attention_like(1), config.d_v, 8));
  Records r(layout);
  PageAppend a{&config, &layout, k.from(3), v.from(3), 3, 30, r.high.data(), nullptr, nullptr, nullptr};
  ASSERT_TRUE(encoder().append_rows(a));
  for (int t = 0; t < kPageTokens; ++t) {
    const bool brought = t >= 3 && t < 30;
    for (int c = 0; c < config.d; ++c)
      ASSERT_EQ(r.high[static_cast<size_t>(layout.high_k_at(t, c))], brought ? f16_encode(k.at(t, c)) : 0xffff);
    for (int c = 0; c < config.d_v; ++c)
      ASSERT_EQ(r.high[static_cast<size_t>(layout.high_v_at(t, c))], brought ? f16_encode(v.at(t, c)) : 0xffff);
  }
}

TEST_P(EncodeTarget, RefusesWhatSixteenBitsCannotHold) {
  constexpr float kInf = std::numeric_limits<float>::infinity(), kNan = std::numeric_limits<float>::quiet_NaN();
  for (const DType high : {DType::f16, DType::bf16}) {
    CacheConfig config;
    config.d = 16;
    config.d_v = 48;
    config.high_dtype = high;
    const PageLayout layout = layout_of(config);
    const float limit = high_limit(high), beyond = std::nextafter(limit, kInf);
    for (const float value : {limit, -limit, beyond, -beyond, kInf, -kInf, kNan, -kNan})
      for (const bool in_k : {true, false})
        for (const int channel : {0, 7, 15}) {
          std::vector<float> x = filled(attention_like(1), config.d, 9), y = filled(attention_like(1), config.d_v, 9);
          (in_k ? x : y)[static_cast<size_t>(41 * (in_k ? config.d : config.d_v) + channel)] = value;
          const Rows k(DType::f32, config.d, x), v(DType::f32, config.d_v, y);
          Records r(layout);
          PageAppend a{&config, &layout, k.from(0), v.from(0), 0, 64, r.high.data(), nullptr, nullptr, nullptr};
          EXPECT_EQ(encoder().append_rows(a), std::abs(value) <= limit) << value;
        }
  }
}

// Quotients about every rounding border of every scale: K holds one block per (scale, border), its first value fixes
// the scale, the others are the floats about border * scale.
TEST_P(EncodeTarget, RoundsAboutEveryBorderOfEveryScale) {
  CacheConfig config;
  config.d = 16;
  config.d_v = 16;
  config.centring = config.page_scale = false;
  config.high_dtype = DType::bf16;  // 8 bits: border * scale has at most 7, and its neighbours must be floats too
  std::vector<float> k, v;
  const auto flush = [&] {
    const Rows rows_k(DType::f32, 16, k), rows_v(DType::f32, 16, v);
    expect_same(layout_of(config), appended(encoder(), config, rows_k, rows_v, Planes::two, {kPageTokens}),
                defined(config, rows_k, rows_v, Planes::two), "borders");
    k.clear();
    v.clear();
  };
  for (int code = 1; code < 0x7f; ++code)
    for (const float border : {0.25f, 0.75f, 1.25f, 1.75f, 2.5f, 3.5f, 5.0f}) {
      const float scale = e4m3_decode(static_cast<uint8_t>(code));
      for (int i = 0; i < 16; ++i) {
        const float about = bf16_decode(static_cast<uint16_t>(bf16_encode(border * scale) + i / 2 - 4));
        k.push_back(i == 0 ? 6 * scale : i % 2 ? about : -about);
        v.push_back(k.back());
      }
      if (k.size() == 16 * kPageTokens) flush();
      if (HasFatalFailure()) return;
    }
  k.resize(16 * kPageTokens);
  v.resize(16 * kPageTokens);
  flush();
}

}  // namespace
}  // namespace thriftattn::testing
