// The pieces of the forward pass against their definitions in double precision.
#include "model/layers.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <random>

#include "model/linear.h"
#include "model/nll.h"
#include "model/sampling.h"

namespace thriftattn::model {
namespace {

std::vector<float> noise(int64_t n, int seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  std::vector<float> out(n);
  for (float& x : out) x = normal(generator);
  return out;
}

Tensor tensor(const std::vector<float>& data, std::vector<int64_t> shape) {
  Tensor t;
  t.dtype_name = "F32";
  t.shape = std::move(shape);
  t.data = reinterpret_cast<const unsigned char*>(data.data());
  t.bytes = std::ssize(data) * 4;
  return t;
}

constexpr int64_t kOdd = 77;  // no multiple of any register

TEST(Layers, RmsNormFollowsItsDefinition) {
  ThreadPool pool(2);
  const auto x = noise(3 * kOdd, 1), weight = noise(kOdd, 2);
  std::vector<float> y(x.size());
  rms_norm(x.data(), 3, 1, kOdd, kOdd, weight.data(), 1e-5, y.data(), pool);
  for (int64_t row = 0; row < 3; ++row) {
    double squares = 0;
    for (int64_t c = 0; c < kOdd; ++c) squares += std::pow(x[row * kOdd + c], 2);
    for (int64_t c = 0; c < kOdd; ++c) {
      EXPECT_NEAR(y[row * kOdd + c], x[row * kOdd + c] / std::sqrt(squares / kOdd + 1e-5) * weight[c], 1e-5);
    }
  }
}

TEST(Layers, SiluMultiplyFollowsItsDefinitionForAnyGate) {
  ThreadPool pool(1);
  auto x = noise(2 * kOdd, 3);
  x[0] = 1000;
  x[1] = -1000;
  x[2] = 0;
  std::vector<float> y(kOdd);
  gate_multiply(Activation::silu, x.data(), 1, kOdd, y.data(), pool);
  for (int64_t c = 0; c < kOdd; ++c) {
    const double want = x[c] / (1 + std::exp(-double{x[c]})) * x[kOdd + c];
    EXPECT_NEAR(y[c], want, 1e-6 + 1e-6 * std::abs(want)) << x[c];
  }
}

TEST(Layers, RopeTurnsPairsByThePositionsAngle) {
  ThreadPool pool(2);
  const int d = 64, heads = 2, rows = 70, stride = heads * d + 5;
  const auto x = noise(rows * stride, 4);
  auto y = x;
  RopeAngles angles;
  const auto frequencies = rope_frequencies({.theta = 10000}, d);
  rope_angles(frequencies, 1, 100, rows, &angles, pool);
  rope(angles, y.data(), rows, heads, d, stride, pool);
  for (int row = 0; row < rows; ++row) {
    for (int h = 0; h < heads; ++h) {
      for (int c = 0; c < d / 2; ++c) {
        const double angle = (100 + row) * std::pow(10000.0, -2.0 * c / d);
        const double a = x[row * stride + h * d + c], b = x[row * stride + h * d + c + d / 2];
        EXPECT_NEAR(y[row * stride + h * d + c], a * std::cos(angle) - b * std::sin(angle), 1e-4);
        EXPECT_NEAR(y[row * stride + h * d + c + d / 2], b * std::cos(angle) + a * std::sin(angle), 1e-4);
      }
    }
    for (int c = heads * d; c < stride; ++c) EXPECT_EQ(y[row * stride + c], x[row * stride + c]);
  }
}

TEST(Layers, Llama3ScalingKeepsFastAndStretchesSlowChannels) {
  RopeConfig scaled{
      .scaling = RopeConfig::Scaling::llama3, .theta = 500000, .factor = 8, .original_max_positions = 8192};
  const auto plain = rope_frequencies({.theta = 500000}, 128), f = rope_frequencies(scaled, 128);
  EXPECT_EQ(f.front(), plain.front());
  EXPECT_FLOAT_EQ(f.back(), plain.back() / 8);
  int between = 0;
  for (int c = 0; c < 64; ++c) {
    EXPECT_LE(f[c], plain[c]);
    EXPECT_GE(f[c], plain[c] / 8 * 0.999f);
    between += f[c] < plain[c] * 0.999f && f[c] > plain[c] / 8 * 1.001f;
  }
  EXPECT_GT(between, 0);
}

TEST(Linear, StackedWeightsAndBiasesMultiplyAsOneMatrix) {
  ThreadPool pool(2);
  const int64_t inputs = 70, rows = 300, parts[] = {40, 260, 33};  // across panels and tiles, none of them full
  std::vector<std::vector<float>> data;
  std::vector<Tensor> weights, biases;
  for (int i = 0; i < 3; ++i) data.push_back(noise(parts[i] * inputs, 10 + i));
  for (int i = 0; i < 3; ++i) data.push_back(noise(parts[i], 20 + i));
  for (int i = 0; i < 3; ++i) weights.push_back(tensor(data[i], {parts[i], inputs}));
  for (int i = 0; i < 3; ++i) biases.push_back(tensor(data[3 + i], {parts[i]}));
  const auto x = noise(rows * inputs, 30);
  for (const Compute compute : {Compute::f32, Compute::bf16}) {
    if (compute == Compute::bf16 && !has_native_bf16()) continue;
    const auto linear = Linear::create(weights, biases, compute, pool);
    ASSERT_TRUE(linear.ok()) << linear.status().message();
    ASSERT_EQ(linear->outputs(), 333);
    for (const int64_t n : {int64_t{1}, int64_t{5}, rows}) {
      std::vector<float> y(n * 333, std::numeric_limits<float>::quiet_NaN());
      ASSERT_TRUE(linear->apply(x.data(), n, y.data(), pool).ok());
      double worst = 0;
      for (int64_t row = 0; row < n; ++row) {
        int64_t column = 0;
        for (int part = 0; part < 3; ++part) {
          for (int64_t j = 0; j < parts[part]; ++j, ++column) {
            double want = data[3 + part][j];
            for (int64_t c = 0; c < inputs; ++c) want += double{x[row * inputs + c]} * data[part][j * inputs + c];
            const double error = std::abs(y[row * 333 + column] - want);
            worst = error <= worst ? worst : error;  // NaN counts
          }
        }
      }
      EXPECT_LT(worst, compute == Compute::f32 ? 3e-5 : 0.25) << n << " rows";  // |y| is about 8
    }
  }
}

TEST(Linear, ThreadsDoNotChangeTheResult) {
  const auto w = noise(600 * 130, 1), x = noise(700 * 130, 2);
  const Tensor weights[] = {tensor(w, {600, 130})};
  std::vector<float> results[2];
  for (int i = 0; i < 2; ++i) {
    ThreadPool pool(1 + 2 * i);
    const auto linear = Linear::create(weights, {}, Compute::f32, pool);
    ASSERT_TRUE(linear.ok());
    results[i].resize(700 * 600);
    ASSERT_TRUE(linear->apply(x.data(), 700, results[i].data(), pool).ok());
  }
  EXPECT_EQ(results[0], results[1]);
}

TEST(Nll, FollowsItsDefinitionAtAnyScale) {
  ThreadPool pool(2);
  const int64_t vocab = 1003, rows = 40;
  auto logits = noise(rows * vocab, 5);
  for (int64_t i = 0; i < vocab; ++i) logits[i] = logits[i] * 30 + 1000;  // would overflow without the maximum
  std::vector<int32_t> targets(rows);
  for (int64_t i = 0; i < rows; ++i) targets[i] = static_cast<int32_t>(i * 25);
  std::vector<float> losses(rows);
  nll(logits.data(), vocab, targets, losses, pool);
  for (int64_t i = 0; i < rows; ++i) {
    const float* row = &logits[i * vocab];
    double sum = 0;
    for (int64_t j = 0; j < vocab; ++j) sum += std::exp(double{row[j]} - row[targets[i]]);
    EXPECT_NEAR(losses[i], std::log(sum), 1e-4);
  }
}

TEST(Nll, BestIsTheLowestOfEqualsAndItsLead) {
  const float row[] = {1, 5, 5, -2, 4};
  EXPECT_EQ(best(row, 5).token, 1);
  EXPECT_EQ(best(row, 5).lead, 0);
  EXPECT_EQ(best(row + 2, 3).token, 0);
  EXPECT_EQ(best(row + 2, 3).lead, 1);
}

TEST(Sampler, GreedyTakesTheArgmax) {
  const float row[] = {0, 3, 2};
  Sampler sampler(0, 1, 7);
  for (int i = 0; i < 5; ++i) EXPECT_EQ(sampler.pick(row, 3), 1);
}

TEST(Sampler, FrequenciesFollowTheProbabilities) {
  const float row[] = {std::log(0.5f), std::log(0.3f), std::log(0.2f)};
  const auto frequencies = [&](double temperature, double top_p) {
    Sampler sampler(temperature, top_p, 1);
    std::vector<double> counts(3);
    for (int i = 0; i < 20000; ++i) counts[sampler.pick(row, 3)] += 1.0 / 20000;
    return counts;
  };
  const auto all = frequencies(1, 1), cut = frequencies(1, 0.7), cold = frequencies(0.5, 1);
  EXPECT_NEAR(all[0], 0.5, 0.02);
  EXPECT_NEAR(all[2], 0.2, 0.02);
  EXPECT_NEAR(cut[0], 0.5 / 0.8, 0.02);  // 0.5 + 0.3 reach 0.7
  EXPECT_EQ(cut[2], 0);
  EXPECT_NEAR(cold[0], 0.25 / 0.38, 0.02);
}

TEST(Sampler, TheSameSeedDrawsTheSameTokens) {
  const auto row = noise(100, 9);
  Sampler a(1, 0.9, 5), b(1, 0.9, 5), c(1, 0.9, 6);
  std::vector<int32_t> of_a, of_b, of_c;
  for (int i = 0; i < 50; ++i) {
    of_a.push_back(a.pick(row.data(), 100));
    of_b.push_back(b.pick(row.data(), 100));
    of_c.push_back(c.pick(row.data(), 100));
  }
  EXPECT_EQ(of_a, of_b);
  EXPECT_NE(of_a, of_c);
}

}  // namespace
}  // namespace thriftattn::model
