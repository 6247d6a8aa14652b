// The kernels between a layer's products, and the products, against what the processor computes.
#include "model/cuda/kernels.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>

#include "model/cuda/products.h"
#include "model/cuda/testing.h"
#include "model/layers.h"
#include "model/nll.h"

namespace thriftattn::model::gpu {
namespace {

using Floats = std::vector<float>;

Floats noise(int64_t n, int seed, float scale = 1) {
  std::mt19937 generator(static_cast<uint32_t>(seed));
  std::normal_distribution<float> normal(0, scale);
  Floats out(n);
  for (float& x : out) x = normal(generator);
  return out;
}

float to_bf16(float x) { return from_bf16(bf16_bits(x)); }

class Kernels : public GpuTest {
 protected:
  ThreadPool pool{2};
};

// Within `bound` of the larger of 1 and the value.
void expect_near(const Floats& got, const Floats& want, double bound) {
  ASSERT_EQ(got.size(), want.size());
  double worst = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    const double error = std::abs(double{got[i]} - want[i]) / std::max(1.0, std::abs(double{want[i]}));
    worst = error <= worst ? worst : error;  // NaN counts
  }
  EXPECT_LE(worst, bound);
}

TEST_F(Kernels, EmbedGathersRowsOfEveryType) {
  constexpr int64_t kVocab = 9, kHidden = 77;
  const Floats table = noise(kVocab * kHidden, 1);
  const std::vector<int32_t> tokens = {3, 0, 8, 3};
  for (const DType type : {DType::f32, DType::f16, DType::bf16}) {
    const auto on_device = device_copy(table);
    const auto typed = device_room(kVocab * kHidden * size_of(type));
    const auto ids = device_copy(tokens), x = device_copy(Floats(tokens.size() * kHidden));
    ASSERT_EQ(convert(on_device.data(), DType::f32, typed.data(), type, kVocab * kHidden, nullptr), cudaSuccess);
    ASSERT_EQ(embed(typed.data(), type, kHidden, as<int32_t>(ids), 4, 2.5f, as<float>(x), nullptr), cudaSuccess);
    Floats want;
    for (const int32_t token : tokens) {
      for (int64_t c = 0; c < kHidden; ++c) want.push_back(2.5f * table[token * kHidden + c]);
    }
    expect_near(host_floats(x, std::ssize(want)), want, type == DType::f32 ? 0 : type == DType::f16 ? 1e-3 : 1e-2);
  }
}

TEST_F(Kernels, AddNormIsAnAddAndANorm) {
  constexpr int64_t kRows = 5;
  for (const int64_t hidden : {32, 77, 256, 4096, 8192}) {
    for (const bool output_norm : {false, true}) {
      const Floats x = noise(kRows * hidden, 1), y = noise(kRows * hidden, 2, 3), weight = noise(hidden, 3),
                   y_weight = noise(hidden, 4);
      Floats sum = y, want(x.size());
      if (output_norm) rms_norm(y.data(), kRows, 1, hidden, hidden, y_weight.data(), 1e-5, sum.data(), pool);
      add(sum.data(), x.data(), kRows, hidden, pool);
      rms_norm(sum.data(), kRows, 1, hidden, hidden, weight.data(), 1e-5, want.data(), pool);
      const auto dx = device_copy(x), dy = device_copy(y), dw = device_copy(weight), dyw = device_copy(y_weight),
                 out = device_copy(Floats(x.size()));
      AddNorm a{as<float>(dx), as<float>(dy), output_norm ? as<float>(dyw) : nullptr,
                as<float>(dw), out.data(),    DType::f32,
                kRows,         hidden,        hidden,
                1e-5f};
      ASSERT_EQ(add_norm(a, nullptr), cudaSuccess);
      expect_near(host_floats(out, std::ssize(want)), want, 2e-6);
      expect_near(host_floats(dx, std::ssize(sum)), sum, 1e-6);
      a.y = nullptr;
      a.type = DType::bf16;
      ASSERT_EQ(add_norm(a, nullptr), cudaSuccess);  // the sum again, as BF16
      expect_near(host_bf16(out, std::ssize(want)), want, 4.1e-3);
    }
  }
}

TEST_F(Kernels, TurnQkNormsTurnsAndGrowsHeadsInPlace) {
  constexpr int kHq = 4, kHkv = 2, kSq = 3, kB = 2, kRows = kSq * kB;
  const std::vector<int32_t> past = {70, 131000};
  for (const int d : {32, 80, 128, 256}) {
    for (const bool norms : {false, true}) {
      const double beta = norms ? 0.1 : 0, factor = 1.25;
      const int64_t q_width = kHq * d, k_width = kHkv * d, stride = q_width + 2 * k_width;
      const Floats qkv = noise(kRows * stride, 1), q_norm = noise(d, 2), k_norm = noise(d, 3);
      RopeConfig config;
      config.theta = 500000;
      const Floats frequencies = rope_frequencies(config, d);
      Floats want = qkv;
      if (norms) {
        rms_norm(want.data(), kRows, kHq, d, stride, q_norm.data(), 1e-6, want.data(), pool);
        rms_norm(want.data() + q_width, kRows, kHkv, d, stride, k_norm.data(), 1e-6, want.data() + q_width, pool);
      }
      for (int i = 0; i < kB; ++i) {
        RopeAngles angles;
        float* rows = want.data() + i * kSq * stride;
        rope_angles(frequencies, factor, past[i], kSq, &angles, pool);
        rope(angles, rows, kSq, kHq + kHkv, d, stride, pool);
        if (beta != 0) grow_by_position(beta, 64, past[i], rows, kSq, q_width, stride, pool);
      }
      const auto x = device_copy(qkv), qn = device_copy(q_norm), kn = device_copy(k_norm), f = device_copy(frequencies),
                 p = device_copy(past);
      ASSERT_EQ(turn_qk({as<float>(x),
                         kRows,
                         stride,
                         kHq,
                         kHkv,
                         d,
                         norms ? as<float>(qn) : nullptr,
                         norms ? as<float>(kn) : nullptr,
                         1e-6f,
                         as<float>(f),
                         static_cast<float>(factor),
                         beta,
                         64,
                         {as<int32_t>(p), kSq}},
                        nullptr),
                cudaSuccess);
      expect_near(host_floats(x, std::ssize(want)), want, 2e-6);
    }
  }
}

TEST_F(Kernels, GateMultiplyFollowsTheProcessorForAnyGate) {
  constexpr int64_t kRows = 3, kChannels = 77;
  Floats gate_up = noise(kRows * 2 * kChannels, 1);
  gate_up[0] = 1000;
  gate_up[1] = -1000;
  gate_up[2] = 0;
  const auto x = device_copy(gate_up), y = device_copy(Floats(kRows * kChannels));
  for (const Activation f : {Activation::silu, Activation::gelu_tanh}) {
    Floats want(kRows * kChannels);
    gate_multiply(f, gate_up.data(), kRows, kChannels, want.data(), pool);
    ASSERT_EQ(gate_multiply(f, as<float>(x), kRows, kChannels, y.data(), DType::f32, nullptr), cudaSuccess);
    expect_near(host_floats(y, std::ssize(want)), want, 1e-6);
    ASSERT_EQ(gate_multiply(f, as<float>(x), kRows, kChannels, y.data(), DType::bf16, nullptr), cudaSuccess);
    expect_near(host_bf16(y, std::ssize(want)), want, 4.1e-3);
  }
}

TEST_F(Kernels, ScoreCapsAndGivesLossesAndTheLowestOfTheBest) {
  constexpr int64_t kRows = 4;
  for (const int64_t vocab : {1, 300, 4096, 128256}) {
    Floats logits = noise(kRows * vocab, 5, 4);
    if (vocab > 200) logits[100] = logits[200] = 50;  // equal
    std::vector<int32_t> targets;
    for (int64_t i = 0; i < kRows; ++i) targets.push_back(static_cast<int32_t>((i * 7919) % vocab));
    for (const float cap : {0.0f, 30.0f}) {
      Floats capped = logits, losses(kRows);
      if (cap != 0) soft_cap(cap, capped.data(), kRows, vocab, pool);
      nll(capped.data(), vocab, targets, losses, pool);
      const auto x = device_copy(logits), t = device_copy(targets), l = device_copy(Floats(kRows)),
                 best = device_copy(std::vector<int32_t>(kRows));
      ASSERT_EQ(score({as<float>(x), kRows, vocab, cap, as<int32_t>(t), as<float>(l), as<int32_t>(best)}, nullptr),
                cudaSuccess);
      expect_near(host_floats(l, kRows), losses, 2e-6);
      const Floats got = host_floats(x, std::ssize(capped));
      expect_near(got, capped, 1e-6);
      const auto chosen = host_copy<int32_t>(best, kRows);
      for (int64_t i = 0; i < kRows; ++i) EXPECT_EQ(chosen[i], argmax(got.data() + i * vocab, vocab));
    }
  }
}

TEST_F(Kernels, FillNormalHasTheMomentsItPromises) {
  constexpr int64_t kN = 1 << 20;
  const auto room = device_room(kN * 4);
  ASSERT_EQ(fill_normal(room.data(), DType::f32, kN, 2, 7, 32, 6, nullptr), cudaSuccess);
  const Floats x = host_floats(room, kN);
  double sum = 0, squares = 0, moved = 0;
  for (int64_t i = 0; i < kN; ++i) {
    if (i % 32 == 0) {
      moved += x[i];
    } else {
      sum += x[i];
      squares += double{x[i]} * x[i];
    }
  }
  const double others = kN * 31.0 / 32;
  EXPECT_NEAR(moved / (kN / 32.0), 6, 0.05);
  EXPECT_NEAR(sum / others, 0, 0.01);
  EXPECT_NEAR(squares / others, 4, 0.03);
}

// y = x W^T + bias in double, over what the product reads.
TEST_F(Kernels, ProductsMatchTheirDefinition) {
  auto products = Products::create();
  ASSERT_TRUE(products.ok()) << products.status().message();
  for (const DType type : {DType::f32, DType::bf16}) {
    for (const auto& [rows, inputs, outputs, with_bias] :
         {std::tuple{1, 32, 48, true}, {7, 256, 1024, false}, {300, 704, 256, true}, {4, 4096, 300, false}}) {
      const bool rounded = type == DType::bf16;
      Floats x = noise(rows * inputs, 1), w = noise(outputs * inputs, 2), bias = noise(outputs, 3);
      if (rounded) std::transform(x.begin(), x.end(), x.begin(), to_bf16);
      if (rounded) std::transform(w.begin(), w.end(), w.begin(), to_bf16);
      Floats want(rows * outputs);
      for (int r = 0; r < rows; ++r) {
        for (int o = 0; o < outputs; ++o) {
          double sum = with_bias ? bias[o] : 0;
          for (int c = 0; c < inputs; ++c) sum += double{x[r * inputs + c]} * w[o * inputs + c];
          want[r * outputs + o] = static_cast<float>(sum);
        }
      }
      const auto to_device = [&](const Floats& from) {
        return rounded ? device_copy(bf16_bits(from)) : device_copy(from);
      };
      const auto dx = to_device(x), dw = to_device(w), db = device_copy(bias), y = device_copy(want);
      ASSERT_EQ(cudaMemset(y.data(), 0xff, want.size() * 4), cudaSuccess);
      const Matrix matrix{dw.data(), with_bias ? as<float>(db) : nullptr, inputs, outputs, type};
      const Status status = products->multiply(matrix, dx.data(), rows, as<float>(y), nullptr);
      ASSERT_TRUE(status.ok()) << status.message();
      // Sums of `inputs` terms in F32: TF32, with 2^-11 per factor, would be far outside.
      const Floats got = host_floats(y, std::ssize(want));
      double worst = 0;
      for (size_t i = 0; i < got.size(); ++i) worst = std::max(worst, std::abs(double{got[i]} - want[i]));
      EXPECT_LE(worst, 2e-6 * std::sqrt(inputs) * 8) << rows << " x " << inputs << " x " << outputs;
    }
  }
}

}  // namespace
}  // namespace thriftattn::model::gpu
