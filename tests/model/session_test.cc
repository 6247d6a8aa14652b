// Whole models: golden logits of Hugging Face Transformers, and the identities of a session.
#include "model/session.h"

#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

namespace thriftattn::model {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;

constexpr int64_t kVocab = 300;
const char* const kVariants[] = {"f32-tied", "bf16-llama3", "f16-linear"};

std::string folder(const std::string& variant) { return THRIFTATTN_SOURCE_DIR "/tests/data/tiny-llama-" + variant; }

struct Golden {
  std::vector<int32_t> tokens;
  std::vector<float> logits;            // [tokens / 2, vocab], rows 1, 3, 5, ...: everything in float32
  std::vector<float> logits_f16_cache;  // the same with keys and values rounded to FP16
};

Golden golden(const std::string& variant) {
  Golden g;
  g.tokens = Json::parse(std::ifstream(folder(variant) + "/golden.json"))["tokens"].get<std::vector<int32_t>>();
  const auto read = [&](const char* name) {
    std::vector<float> out(g.tokens.size() / 2 * kVocab);
    const auto bytes = static_cast<std::streamsize>(out.size() * sizeof(float));
    std::ifstream file(folder(variant) + "/" + name, std::ios::binary);
    EXPECT_TRUE(file.read(reinterpret_cast<char*>(out.data()), bytes)) << name;
    return out;
  };
  g.logits = read("logits.bin");
  g.logits_f16_cache = read("logits_f16_cache.bin");
  return g;
}

std::vector<float> odd_rows(const std::vector<float>& logits) {
  std::vector<float> out;
  for (size_t at = kVocab; at < logits.size(); at += 2 * kVocab) {
    out.insert(out.end(), logits.begin() + static_cast<int64_t>(at),
               logits.begin() + static_cast<int64_t>(at) + kVocab);
  }
  return out;
}

double distance(const std::vector<float>& a, const std::vector<float>& b) {
  if (a.size() != b.size()) return INFINITY;
  double worst = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    const double error = std::abs(double{a[i]} - b[i]);
    worst = error <= worst ? worst : error;  // NaN counts
  }
  return worst;
}

// A tiny model with threads of its own.
struct Tiny {
  explicit Tiny(const std::string& variant, Compute compute = Compute::f32, int threads = 2) : pool(threads) {
    auto loaded = Model::load(folder(variant), compute, pool);
    EXPECT_TRUE(loaded.ok()) << loaded.status().message();
    model = std::make_unique<Model>(std::move(*loaded));
  }
  Session session(const std::string& method, SessionOptions options = {}) {
    auto s = Session::create(*model, *parse_method(method), options, pool);
    EXPECT_TRUE(s.ok()) << s.status().message();
    return std::move(*s);
  }
  ThreadPool pool;
  std::unique_ptr<Model> model;
};

// Feeds `tokens` to a sequence in steps of `step` and returns all logits.
std::vector<float> feed(Session& session, SeqId seq, std::span<const int32_t> tokens, Phase phase, int64_t step) {
  std::vector<float> out;
  for (size_t from = 0; from < tokens.size(); from += step) {
    int64_t expected = 0;
    const auto sink = [&](int64_t first, int64_t rows, const float* logits) {
      EXPECT_EQ(first, expected);
      expected += rows;
      out.insert(out.end(), logits, logits + rows * session.vocab());
    };
    const Status status = session.forward(seq, tokens.subspan(from, std::min<size_t>(step, tokens.size() - from)),
                                          phase, LogitRows::all, sink);
    EXPECT_TRUE(status.ok()) << status.message();
  }
  return out;
}
std::vector<float> one_shot(Session& session, std::span<const int32_t> tokens) {
  return feed(session, session.new_sequence(), tokens, Phase::prefill, std::ssize(tokens));
}

// The cache rounds K and V to FP16, a relative 5e-4, which moves these logits (|logit| up to 5) by up to 3.6e-3: the
// difference of the two golden files.
constexpr double kFp16Cache = 5e-3;
// Two ways through the same roundings: they differ where F32 noise crosses a rounding boundary of the cache.
constexpr double kSameRoundings = 1e-3;

void expect_golden(const std::string& variant, const std::vector<float>& logits, const Golden& g) {
  const double exact = distance(odd_rows(logits), g.logits), rounded = distance(odd_rows(logits), g.logits_f16_cache);
  std::printf("%s: largest difference to float32 %.2g, to float32 with an FP16 cache %.2g\n", variant.c_str(), exact,
              rounded);
  EXPECT_LT(exact, kFp16Cache) << variant;
  EXPECT_LT(rounded, kSameRoundings) << variant;
}

TEST(GoldenLogits, PrefillEqualsTransformers) {
  for (const char* variant : kVariants) {
    Tiny tiny(variant);
    Session session = tiny.session("fp16");
    const Golden g = golden(variant);
    expect_golden(variant, one_shot(session, g.tokens), g);
  }
}

TEST(GoldenLogits, DecodeTokenByTokenEqualsTransformers) {
  for (const char* variant : kVariants) {
    Tiny tiny(variant);
    Session session = tiny.session("fp16");
    const Golden g = golden(variant);
    expect_golden(variant, feed(session, session.new_sequence(), g.tokens, Phase::decode, 1), g);
  }
}

TEST(GoldenLogits, Bf16ProductsStayNear) {
  if (!has_native_bf16()) GTEST_SKIP() << "no native BF16 here";
  for (const char* variant : kVariants) {
    Tiny tiny(variant, Compute::bf16);
    Session session = tiny.session("fp16");
    const Golden g = golden(variant);
    const auto logits = odd_rows(one_shot(session, g.tokens));
    double squares = 0;
    for (size_t i = 0; i < logits.size(); ++i) squares += std::pow(logits[i] - g.logits[i], 2);
    EXPECT_LT(std::sqrt(squares / static_cast<double>(logits.size())), 0.05) << variant;  // logits: about 1.2
  }
}

TEST(GoldenLogits, EveryRopeFormMatters) {
  // The tolerance would be worthless if logits did not depend on what the variants change.
  const Golden g = golden("bf16-llama3");
  const fs::path copy = fs::path(testing::TempDir()) / "rope_form";
  fs::remove_all(copy);
  fs::copy(folder("bf16-llama3"), copy, fs::copy_options::recursive);
  Json config = Json::parse(std::ifstream(copy / "config.json"));
  config["rope_parameters"] = {{"rope_type", "default"}, {"rope_theta", 10000.0}};
  std::ofstream(copy / "config.json") << config;
  ThreadPool pool(2);
  const auto model = Model::load(copy.string(), Compute::f32, pool);
  ASSERT_TRUE(model.ok()) << model.status().message();
  auto session = Session::create(*model, *parse_method("fp16"), {}, pool);
  ASSERT_TRUE(session.ok());
  EXPECT_GT(distance(odd_rows(one_shot(*session, g.tokens)), g.logits), 10 * kFp16Cache);
  fs::remove_all(copy);
}

TEST(Session, ChunkedAndOneShotPrefillAgree) {
  Tiny tiny("f32-tied");
  Session session = tiny.session("fp16");
  const Golden g = golden("f32-tied");
  const auto whole = one_shot(session, g.tokens);
  for (const int64_t step : {16, 64, 100}) {
    EXPECT_LT(distance(feed(session, session.new_sequence(), g.tokens, Phase::prefill, step), whole), kSameRoundings)
        << step;
  }
  for (const int64_t step : {5, 16}) {
    EXPECT_LT(distance(feed(session, session.new_sequence(), g.tokens, Phase::decode, step), whole), kSameRoundings)
        << step;
  }
}

TEST(Session, ThreadsDoNotChangeTheLogits) {
  const Golden g = golden("f32-tied");
  std::vector<float> logits[2];
  for (int i = 0; i < 2; ++i) {
    Tiny tiny("f32-tied", Compute::f32, 1 + 2 * i);
    Session session = tiny.session("thrift");
    logits[i] = one_shot(session, g.tokens);
  }
  EXPECT_EQ(logits[0], logits[1]);
}

TEST(Session, ForksContinueIndependently) {
  Tiny tiny("f32-tied");
  Session session = tiny.session("thrift");
  const Golden g = golden("f32-tied");
  const std::span<const int32_t> tokens(g.tokens), context = tokens.first(140), rest = tokens.subspan(140);
  const SeqId seq = session.new_sequence();
  feed(session, seq, context, Phase::prefill, 140);
  const auto fork = session.fork(seq);
  ASSERT_TRUE(fork.ok()) << fork.status().message();
  const std::vector<int32_t> other(rest.rbegin(), rest.rend());
  const auto of_other = feed(session, *fork, other, Phase::decode, 1);
  const auto of_rest = feed(session, seq, rest, Phase::decode, 1);
  ASSERT_TRUE(session.free(*fork).ok());
  EXPECT_EQ(session.length(*fork), -1);

  Session fresh = tiny.session("thrift");
  const SeqId again = fresh.new_sequence();
  feed(fresh, again, context, Phase::prefill, 140);
  EXPECT_EQ(feed(fresh, again, rest, Phase::decode, 1), of_rest);
  EXPECT_NE(of_other, of_rest);
}

TEST(Session, ACopiedContextContinuesLikeItsOwn) {
  Tiny tiny("f32-tied");
  const Golden g = golden("f32-tied");
  const std::span<const int32_t> tokens(g.tokens), context = tokens.first(140), rest = tokens.subspan(140);
  Session reader = tiny.session("fp16");
  const SeqId read = reader.new_sequence();
  feed(reader, read, context, Phase::prefill, 140);
  const auto expected = feed(reader, *reader.fork(read), rest, Phase::decode, 1);
  for (const char* method : {"fp16", "thrift:budget=1,storage=dual"}) {
    Session session = tiny.session(method);
    const auto copy = session.copy_from(reader, read);
    ASSERT_TRUE(copy.ok()) << copy.status().message();
    EXPECT_EQ(session.length(*copy), 140);
    EXPECT_LT(distance(feed(session, *copy, rest, Phase::decode, 1), expected), kSameRoundings) << method;
  }
  Session encoded = tiny.session("fp4");
  EXPECT_TRUE(encoded.copy_from(reader, read).ok());
  EXPECT_EQ(reader.copy_from(encoded, 0).status().code(), Code::unsupported);
  EXPECT_EQ(encoded.copy_from(reader, 99).status().code(), Code::not_found);
}

TEST(Session, ThePrefillMethodReadsTheContextAndTheMethodTheRest) {
  Tiny tiny("f32-tied");
  const Golden g = golden("f32-tied");
  Session fp16 = tiny.session("fp16"), fp4 = tiny.session("fp4");
  Session mixed = tiny.session("fp4", {.prefill_method = *parse_method("fp16")});
  const auto expected = one_shot(fp16, g.tokens), coarse = one_shot(fp4, g.tokens), got = one_shot(mixed, g.tokens);
  EXPECT_LT(distance(got, expected), kSameRoundings);
  EXPECT_GT(distance(coarse, expected), 10 * kSameRoundings);  // so that the line above says something
}

TEST(Session, LogitRowsChooseWhatTheSinkSees) {
  Tiny tiny("f32-tied");
  Session session = tiny.session("fp16");
  const Golden g = golden("f32-tied");
  const auto all = one_shot(session, g.tokens);
  int64_t calls = 0;
  std::vector<float> last;
  const auto sink = [&](int64_t first, int64_t rows, const float* logits) {
    ++calls;
    EXPECT_EQ(first, std::ssize(g.tokens) - 1);
    EXPECT_EQ(rows, 1);
    last.assign(logits, logits + kVocab);
  };
  ASSERT_TRUE(session.forward(session.new_sequence(), g.tokens, Phase::prefill, LogitRows::none, sink).ok());
  EXPECT_EQ(calls, 0);
  ASSERT_TRUE(session.forward(session.new_sequence(), g.tokens, Phase::prefill, LogitRows::last, sink).ok());
  EXPECT_EQ(calls, 1);
  EXPECT_LT(distance(last, {all.end() - kVocab, all.end()}), 1e-5);
}

TEST(Session, CancellingStopsBetweenLayers) {
  Tiny tiny("f32-tied");
  Session session = tiny.session("fp16");
  const Golden g = golden("f32-tied");
  const SeqId seq = session.new_sequence();
  std::vector<double> fractions;
  const auto advance = [&](double fraction) { return fractions.push_back(fraction), false; };
  EXPECT_EQ(session.forward(seq, g.tokens, Phase::prefill, LogitRows::none, nullptr, advance).code(), Code::cancelled);
  EXPECT_EQ(fractions, std::vector<double>{0.5});
  EXPECT_TRUE(session.free(seq).ok());
  EXPECT_EQ(one_shot(session, g.tokens).size(), g.tokens.size() * kVocab);
}

TEST(Session, StepsThatDoNotFitAreRefusedAndAppendNothing) {
  Tiny tiny("f32-tied");
  Session session = tiny.session("fp16", {.max_tokens = 100, .max_step = 50});
  const SeqId seq = session.new_sequence();
  const std::vector<int32_t> tokens(200, 5);
  const auto forward = [&](SeqId s, std::span<const int32_t> t, Phase phase) {
    return session.forward(s, t, phase, LogitRows::none, nullptr);
  };
  const std::span<const int32_t> all(tokens);
  EXPECT_EQ(forward(seq, {}, Phase::prefill).code(), Code::invalid_argument);
  EXPECT_NE(forward(seq, all.first(51), Phase::prefill).message().find("51"), std::string::npos);
  EXPECT_NE(forward(seq, all.first(17), Phase::decode).message().find("17"), std::string::npos);
  EXPECT_EQ(forward(99, all.first(1), Phase::decode).code(), Code::not_found);
  for (const int32_t bad : {-1, 300}) {
    EXPECT_NE(forward(seq, {&bad, 1}, Phase::decode).message().find(std::to_string(bad)), std::string::npos);
  }
  EXPECT_EQ(session.length(seq), 0);
  ASSERT_TRUE(forward(seq, all.first(50), Phase::prefill).ok());
  ASSERT_TRUE(forward(seq, all.first(45), Phase::prefill).ok());
  EXPECT_NE(forward(seq, all.first(6), Phase::decode).message().find("100"), std::string::npos);
  EXPECT_EQ(session.length(seq), 95);
  EXPECT_FALSE(
      Session::create(*tiny.model, *parse_method("fp16"), {.max_tokens = 257}, tiny.pool).ok());  // 256 positions
}

TEST(Model, CheckpointsThatDoNotFitTheirConfigAreRefusedByTensor) {
  ThreadPool pool(1);
  const fs::path copy = fs::path(testing::TempDir()) / "bad_model";
  const auto load_with = [&](const char* key, const Json& value, const char* name = "f32-tied") {
    fs::remove_all(copy);
    fs::copy(folder(name), copy, fs::copy_options::recursive);
    Json config = Json::parse(std::ifstream(copy / "config.json"));
    config[key] = value;
    std::ofstream(copy / "config.json") << config;
    const auto model = Model::load(copy.string(), Compute::f32, pool);
    fs::remove_all(copy);
    return model.ok() ? std::string() : model.status().message();
  };
  EXPECT_NE(load_with("intermediate_size", 65).find("gate_proj.weight: shape [64, 32]"), std::string::npos);
  EXPECT_NE(load_with("num_hidden_layers", 3).find("model.layers.2."), std::string::npos);
  EXPECT_NE(load_with("tie_word_embeddings", false).find("lm_head.weight is missing"), std::string::npos);
  EXPECT_NE(load_with("attention_bias", true).find("q_proj.bias is missing"), std::string::npos);
  for (const char* key : {"attention_bias", "mlp_bias"}) {
    EXPECT_NE(load_with(key, false, "bf16-llama3").find("proj.bias: config.json says"), std::string::npos) << key;
    EXPECT_EQ(load_with(key, true, "bf16-llama3"), "") << key;
  }
  EXPECT_NE(load_with("num_hidden_layers", 1).find("num_hidden_layers 1"), std::string::npos);
  EXPECT_NE(load_with("vocab_size", 301).find("embed_tokens"), std::string::npos);
  EXPECT_EQ(load_with("vocab_size", 300), "");
  EXPECT_EQ(Model::load("/nonexistent", Compute::f32, pool).status().code(), Code::not_found);
}

}  // namespace
}  // namespace thriftattn::model
