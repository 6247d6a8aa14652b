// Whole models on a GPU against the same models on the processor, and the identities of a batch.
//
// With compute f32 both multiply in F32 and hold keys and values in FP16; they differ where the GPU's attention rounds
// q and p to FP16 too (2^-11 each), which two or three layers carry into losses of about 6 nats.
#include "model/cuda/device_model.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>

#include "model/cuda/testing.h"
#include "model/sequence.h"

namespace thriftattn::model::gpu {
namespace {

constexpr double kRounding = 4e-3;  // nats, or logits: q and p in FP16

// tests/data/tiny-*, all but the mixture of experts.
const char* const kModels[] = {"llama-f32-tied", "llama-bf16-llama3", "llama-f16-linear", "qwen2",  "qwen3",
                               "mistral",        "ministral",         "ministral3",       "gemma2", "gemma3"};

std::string folder(const std::string& name) { return THRIFTATTN_SOURCE_DIR "/tests/data/tiny-" + name; }

std::vector<int32_t> some_tokens(int64_t n, int64_t vocab, uint32_t seed = 1) {
  std::mt19937 generator(seed);
  std::vector<int32_t> out(n);
  for (int32_t& token : out) token = static_cast<int32_t>(generator() % vocab);
  return out;
}

double worst(std::span<const float> a, std::span<const float> b) {
  if (a.size() != b.size()) return INFINITY;
  double most = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    const double error = std::abs(double{a[i]} - b[i]);
    most = error <= most ? most : error;  // NaN counts
  }
  return most;
}

class Device : public GpuTest {
 protected:
  static std::unique_ptr<DeviceModel> load(const std::string& name, Compute compute = Compute::f32) {
    auto model = DeviceModel::load(folder(name), compute, 0);
    EXPECT_TRUE(model.ok()) << model.status().message();
    return model.ok() ? std::move(*model) : nullptr;
  }
  static Schedule uniform(const ModelConfig& c, const char* method) {
    return Schedule::uniform(*parse_method(method), c.layers, c.h_kv);
  }
  static std::unique_ptr<DeviceBatch> open(const DeviceModel& model, const char* method, int64_t max_tokens,
                                           int size = 1) {
    auto batch = model.open(uniform(model.config(), method), {.max_tokens = max_tokens}, size);
    EXPECT_TRUE(batch.ok()) << batch.status().message();
    return batch.ok() ? std::move(*batch) : nullptr;
  }
};

// Losses of tokens [1, n) of every sequence, read in steps of `step`.
std::vector<float> losses(Sequence* sequence, std::span<const int32_t> tokens, Phase phase, int64_t step) {
  const int64_t n = std::ssize(tokens) - 1;
  std::vector<float> out(n);
  for (int64_t from = 0; from < n; from += step) {
    const int64_t count = std::min(step, n - from);
    const Status status =
        sequence->read(tokens.subspan(from, count), phase,
                       {tokens.subspan(from + 1, count), std::span(out).subspan(from, count)}, nullptr);
    EXPECT_TRUE(status.ok()) << status.message();
  }
  return out;
}

std::vector<float> last_logits(Sequence* sequence, std::span<const int32_t> tokens, Phase phase, int64_t vocab,
                               int size = 1) {
  std::vector<float> out(vocab * size);
  const Status status = sequence->read(tokens, phase, {.logits = out}, nullptr);
  EXPECT_TRUE(status.ok()) << status.message();
  return out;
}

TEST_F(Device, EveryArchitectureGivesTheProcessorsLossesAndLogits) {
  ThreadPool pool(2);
  for (const char* name : kModels) {
    const auto on_gpu = load(name);
    auto on_cpu = Model::load(folder(name), Compute::f32, pool);
    ASSERT_TRUE(on_gpu && on_cpu.ok());
    const ModelConfig& c = on_gpu->config();
    const auto tokens = some_tokens(200, c.vocab);
    const auto cpu = [&] { return std::move(*open_sequence(*on_cpu, uniform(c, "fp16"), {.max_tokens = 256}, pool)); };
    auto reference = cpu();
    const auto want = losses(reference.get(), tokens, Phase::prefill, 199);
    const auto logits = last_logits(reference.get(), std::span(tokens).last(1), Phase::decode, c.vocab);
    for (const auto& [phase, step] :
         {std::pair{Phase::prefill, 199}, {Phase::prefill, 70}, {Phase::decode, 1}, {Phase::decode, 7}}) {
      const auto batch = open(*on_gpu, "fp16", 256);
      const double of_losses = worst(losses(batch.get(), tokens, phase, step), want);
      const double of_logits =
          worst(last_logits(batch.get(), std::span(tokens).last(1), Phase::decode, c.vocab), logits);
      std::printf("%-18s %s, steps of %3d: losses within %.1e, logits %.1e\n", name,
                  phase == Phase::prefill ? "prefill" : "decode ", step, of_losses, of_logits);
      EXPECT_LE(of_losses, kRounding) << name;
      EXPECT_LE(of_logits, kRounding) << name;
    }
  }
}

TEST_F(Device, Fp4CacheGivesTheProcessorsLosses) {
  ThreadPool pool(2);
  const auto on_gpu = load("llama-f32-tied");
  auto on_cpu = Model::load(folder("llama-f32-tied"), Compute::f32, pool);
  ASSERT_TRUE(on_gpu && on_cpu.ok());
  const ModelConfig& c = on_gpu->config();
  const auto tokens = some_tokens(256, c.vocab);
  for (const char* method : {"fp4", "thrift:budget=0.5", "thrift:storage=dual", "topk"}) {
    for (const Phase phase : {Phase::prefill, Phase::decode}) {
      const int64_t step = phase == Phase::prefill ? 255 : 1;
      const auto want =
          losses(open_sequence(*on_cpu, uniform(c, method), {.max_tokens = 256}, pool)->get(), tokens, phase, step);
      const auto batch = open(*on_gpu, method, 256);
      // A page that FP4 rounds across a code's edge, or another page chosen, is worth more than a rounding.
      EXPECT_LE(worst(losses(batch.get(), tokens, phase, step), want), 10 * kRounding) << method;
      EXPECT_GT(batch->stats().pairs, 0);
    }
  }
}

TEST_F(Device, Bf16ProductsStayWithinTheirRounding) {
  const auto exact = load("llama-bf16-llama3"), rounded = load("llama-bf16-llama3", Compute::bf16);
  ASSERT_TRUE(exact && rounded);
  const auto tokens = some_tokens(200, exact->config().vocab);
  const auto want = losses(open(*exact, "fp16", 256).get(), tokens, Phase::prefill, 199),
             got = losses(open(*rounded, "fp16", 256).get(), tokens, Phase::prefill, 199);
  EXPECT_LE(worst(got, want), 0.2);
  EXPECT_GT(worst(got, want), 0);
}

TEST_F(Device, ReplayedStepsEqualLaunchedOnesBitForBit) {
  const auto model = load("gemma3");
  ASSERT_TRUE(model);
  const int64_t vocab = model->config().vocab;
  const auto tokens = some_tokens(150, vocab);
  const auto launched = open(*model, "thrift:budget=0.5", 200), replayed = open(*model, "thrift:budget=0.5", 200);
  launched->use_graph(false);
  for (DeviceBatch* batch : {launched.get(), replayed.get()})
    last_logits(batch, std::span(tokens).first(100), Phase::prefill, vocab);
  for (int i = 100; i < 150; ++i) {  // across a page's end
    const std::span<const int32_t> token(&tokens[i], 1);
    const auto a = last_logits(launched.get(), token, Phase::decode, vocab),
               b = last_logits(replayed.get(), token, Phase::decode, vocab);
    EXPECT_EQ(std::memcmp(a.data(), b.data(), a.size() * 4), 0) << "step " << i;
  }
}

// Products of more rows add in another order; where that turns the rounding of a key to FP16, or of a code, logits of
// order 1 move by up to 6e-4 (measured).
constexpr double kBatchRounding = 2e-3;

TEST_F(Device, SequencesOfABatchDoNotMeet) {
  constexpr int kSize = 3;
  const auto model = load("qwen3");
  ASSERT_TRUE(model);
  const int64_t vocab = model->config().vocab;
  const auto batch = open(*model, "thrift", 200, kSize);
  std::vector<std::unique_ptr<DeviceBatch>> alone;
  std::vector<std::vector<int32_t>> tokens;
  std::vector<int32_t> together;
  for (int i = 0; i < kSize; ++i) {
    alone.push_back(open(*model, "thrift", 200));
    tokens.push_back(some_tokens(140, vocab, static_cast<uint32_t>(i)));
    together.insert(together.end(), tokens[i].begin(), tokens[i].begin() + 130);
  }
  const auto compare = [&](const std::vector<float>& got, int from, int count, Phase phase) {
    for (int i = 0; i < kSize; ++i) {
      const auto want = last_logits(alone[i].get(), std::span(tokens[i]).subspan(from, count), phase, vocab);
      EXPECT_LE(worst(std::span(got).subspan(i * vocab, vocab), want), kBatchRounding)
          << "sequence " << i << " at " << from;
    }
  };
  compare(last_logits(batch.get(), together, Phase::prefill, vocab, kSize), 0, 130, Phase::prefill);
  for (int at = 130; at < 140; ++at) {
    together.clear();
    for (const auto& of_one : tokens) together.push_back(of_one[at]);
    compare(last_logits(batch.get(), together, Phase::decode, vocab, kSize), at, 1, Phase::decode);
  }
}

TEST_F(Device, GreedyStepsGoOnFromFilledCaches) {
  const auto model = load("llama-bf16-llama3", Compute::bf16);
  ASSERT_TRUE(model);
  const auto batch = open(*model, "thrift", 250, 2);
  ASSERT_TRUE(batch->fill(150, 1).ok());
  EXPECT_EQ(batch->length(), 150);
  const auto times = batch->decode_greedily(100);
  ASSERT_TRUE(times.ok()) << times.status().message();
  EXPECT_EQ(times->size(), 100);
  EXPECT_EQ(batch->length(), 250);
  EXPECT_FALSE(batch->decode_greedily(1).ok());  // no room
}

TEST_F(Device, RefusesWhatItDoesNotServe) {
  const auto experts = DeviceModel::load(folder("gpt-oss"), Compute::f32, 0);
  ASSERT_FALSE(experts.ok());
  EXPECT_EQ(experts.status().message(), "GptOssForCausalLM: a mixture of experts is not served on a GPU");
  EXPECT_EQ(DeviceModel::load(folder("qwen3"), Compute::f32, 99).status().code(), Code::not_found);

  const auto model = load("llama-f32-tied");
  ASSERT_TRUE(model);
  const ModelConfig& c = model->config();
  Schedule heads = uniform(c, "thrift");
  heads.methods.push_back(*parse_method("fp4"));
  heads.index[0] = 1;
  EXPECT_FALSE(model->open(heads, {.max_tokens = 128}, 1).ok());

  const auto batch = open(*model, "thrift", 128);
  const auto tokens = some_tokens(129, c.vocab);
  EXPECT_FALSE(batch->read(tokens, Phase::prefill, {}, nullptr).ok());  // too long
  EXPECT_FALSE(batch->read({}, Phase::prefill, {}, nullptr).ok());
  const int32_t unknown = static_cast<int32_t>(c.vocab);
  EXPECT_FALSE(batch->read({&unknown, 1}, Phase::decode, {}, nullptr).ok());
  EXPECT_TRUE(batch->read(std::span(tokens).first(1), Phase::prefill, {}, nullptr).ok());  // nothing had happened
  EXPECT_FALSE(batch->save("file").ok());
  EXPECT_EQ(batch->read(std::span(tokens).first(100), Phase::prefill, {}, [](double) { return false; }).code(),
            Code::cancelled);
  EXPECT_FALSE(batch->read(std::span(tokens).first(1), Phase::decode, {}, nullptr).ok());  // a step was left half done
}

}  // namespace
}  // namespace thriftattn::model::gpu
