// The pieces of the forward pass against their definitions in double precision.
#include "model/layers.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <numbers>
#include <random>

#include "model/experts.h"
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

TEST(Layers, GeluMultiplyFollowsItsDefinitionForAnyGate) {
  ThreadPool pool(1);
  auto x = noise(2 * kOdd, 6);
  x[0] = 1000;
  x[1] = -1000;
  x[2] = 0;
  std::vector<float> y(kOdd);
  gate_multiply(Activation::gelu_tanh, x.data(), 1, kOdd, y.data(), pool);
  for (int64_t c = 0; c < kOdd; ++c) {
    const double g = x[c], z = std::sqrt(2 / std::numbers::pi) * (g + 0.044715 * g * g * g);
    const double want = g * (1 + std::tanh(z)) / 2 * x[kOdd + c];
    EXPECT_NEAR(y[c], want, 1e-6 + 1e-6 * std::abs(want)) << x[c];
  }
}

TEST(Layers, ClampedSwigluFollowsItsDefinition) {
  ThreadPool pool(2);
  const int64_t rows = 3;
  auto x = noise(rows * 2 * kOdd, 7);
  for (float& v : x) v *= 3;  // beyond the limit on both sides
  std::vector<float> y(rows * kOdd);
  clamped_swiglu(x.data(), rows, kOdd, 2.5, 1.702, y.data(), pool);
  for (int64_t i = 0; i < rows * kOdd; ++i) {
    const double gate = std::min<double>(x[2 * i], 2.5), up = std::clamp<double>(x[2 * i + 1], -2.5, 2.5);
    const double want = (up + 1) * gate / (1 + std::exp(-1.702 * gate));
    EXPECT_NEAR(y[i], want, 1e-6 + 1e-6 * std::abs(want));
  }
}

TEST(Layers, SoftCapBendsAndKeepsSigns) {
  ThreadPool pool(2);
  auto x = noise(2 * kOdd, 8);
  x[0] = 1e6f;
  x[1] = -1e6f;
  auto y = x;
  soft_cap(1.5, y.data(), 2, kOdd, pool);
  for (int64_t i = 0; i < 2 * kOdd; ++i) EXPECT_NEAR(y[i], 1.5 * std::tanh(double{x[i]} / 1.5), 2e-6) << x[i];
}

TEST(Layers, RowsGrowByTheirPosition) {
  ThreadPool pool(2);
  const int64_t rows = 70, stride = kOdd + 3;
  const auto x = noise(rows * stride, 9);
  auto y = x;
  grow_by_position(0.3, 32, 100, y.data(), rows, kOdd, stride, pool);
  for (int64_t row = 0; row < rows; ++row) {
    const double growth = 1 + 0.3 * std::log(1 + std::floor(static_cast<double>(100 + row) / 32));
    for (int64_t c = 0; c < stride; ++c) {
      const float was = x[row * stride + c];
      EXPECT_NEAR(y[row * stride + c], c < kOdd ? was * growth : was, 2e-6);
    }
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

TEST(Layers, YarnKeepsFastAndStretchesSlowChannels) {
  RopeConfig scaled{
      .scaling = RopeConfig::Scaling::yarn, .theta = 150000, .factor = 32, .original_max_positions = 4096};
  const int d = 64;
  const auto plain = rope_frequencies({.theta = 150000}, d);
  for (const bool truncate : {true, false}) {
    scaled.truncate = truncate;
    const auto f = rope_frequencies(scaled, d);
    // The paper's ramp over channels, between those that turn 32 times and once within the original context.
    const auto channel = [&](double turns) {
      return d * std::log(4096 / (turns * 2 * std::numbers::pi)) / (2 * std::log(150000.0));
    };
    const double low = truncate ? std::floor(channel(32)) : channel(32),
                 high = truncate ? std::ceil(channel(1)) : channel(1);
    int between = 0;
    for (int c = 0; c < d / 2; ++c) {
      const double divided = std::clamp((c - low) / (high - low), 0.0, 1.0);
      EXPECT_NEAR(f[c], plain[c] * (1 - divided + divided / 32), 1e-6 * plain[c]) << c;
      between += divided > 0 && divided < 1;
    }
    EXPECT_GT(between, 5);
    EXPECT_EQ(f.front(), plain.front());
    EXPECT_FLOAT_EQ(f.back(), plain.back() / 32);
  }
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

TEST(Linear, AWeightStoredByInputsIsTheSameMatrix) {
  ThreadPool pool(2);
  const int64_t inputs = 70, outputs = 333, rows = 5;
  const auto by_output = noise(outputs * inputs, 11), bias = noise(outputs, 12), x = noise(rows * inputs, 13);
  std::vector<float> by_input(by_output.size());
  for (int64_t o = 0; o < outputs; ++o) {
    for (int64_t i = 0; i < inputs; ++i) by_input[i * outputs + o] = by_output[o * inputs + i];
  }
  const Tensor one[] = {tensor(by_output, {outputs, inputs})}, other[] = {tensor(by_input, {inputs, outputs})};
  const Tensor biases[] = {tensor(bias, {outputs})};
  const auto a = Linear::create(one, biases, Compute::f32, pool),
             b = Linear::create(other, biases, Compute::f32, pool, Rows::inputs);
  ASSERT_TRUE(a.ok() && b.ok());
  ASSERT_EQ(b->inputs(), inputs);
  ASSERT_EQ(b->outputs(), outputs);
  std::vector<float> of_a(rows * outputs), of_b(rows * outputs);
  ASSERT_TRUE(a->apply(x.data(), rows, of_a.data(), pool).ok());
  ASSERT_TRUE(b->apply(x.data(), rows, of_b.data(), pool).ok());
  EXPECT_EQ(of_a, of_b);
}

// Experts that give back their index: the output is the mean of the chosen indices by their shares.
TEST(Experts, TheHighestScoresShareATokenByTheirSoftmax) {
  ThreadPool pool(2);
  ModelConfig c;
  c.hidden = 2;
  c.intermediate = 1;
  c.experts = 4;
  c.experts_per_token = 2;
  c.swiglu_limit = 7;
  c.swiglu_alpha = 1.702;
  // The scores of x are (x0, x1, x1, 0).
  const std::vector<float> router = {1, 0, 0, 1, 0, 1, 0, 0}, no_bias(4), nothing(4), zero(2);
  const Tensor router_weight[] = {tensor(router, {4, 2})}, router_bias[] = {tensor(no_bias, {4})};
  Experts experts;
  experts.router = std::move(*Linear::create(router_weight, router_bias, Compute::f32, pool));
  for (int e = 0; e < c.experts; ++e) {
    const std::vector<float> given = {static_cast<float>(e), 1};
    const Tensor up[] = {tensor(nothing, {2, 2})}, up_bias[] = {tensor(zero, {2})};
    const Tensor down[] = {tensor(zero, {1, 2})}, down_bias[] = {tensor(given, {2})};
    experts.all.push_back({std::move(*Linear::create(up, up_bias, Compute::f32, pool, Rows::inputs)),
                           std::move(*Linear::create(down, down_bias, Compute::f32, pool, Rows::inputs))});
  }
  std::vector<float> x;
  for (int i = 0; i < 40; ++i) x.insert(x.end(), {2, 1});  // experts 0 and, of equals, 1
  x.insert(x.end(), {-5, 1});                              // 1 and 2, equally
  x.insert(x.end(), {-5, -1});                             // 3, then 1
  std::vector<float> y(x.size(), std::numeric_limits<float>::quiet_NaN());
  ASSERT_TRUE(apply(experts, c, x.data(), 42, y.data(), pool).ok());
  const double share = 1 / (1 + std::exp(-1.0));
  for (int i = 0; i < 40; ++i) EXPECT_NEAR(y[2 * i], 1 - share, 1e-6);
  EXPECT_NEAR(y[80], 1.5, 1e-6);
  EXPECT_NEAR(y[82], 3 * share + 1 * (1 - share), 1e-6);
  for (int i = 0; i < 42; ++i) EXPECT_NEAR(y[2 * i + 1], 1, 1e-6);  // shares add up
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
