// Whole models: golden logits of Hugging Face Transformers, and the identities of a session.
#include "model/session.h"

#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>

#include "model/weights.h"

namespace thriftattn::model {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;

constexpr int64_t kVocab = 300;

// Every architecture; tests/data/tiny-*.
const char* const kModels[] = {"llama-f32-tied", "llama-bf16-llama3", "llama-f16-linear", "qwen2",  "qwen3",  "mistral",
                               "ministral",      "ministral3",        "gemma2",           "gemma3", "gpt-oss"};

std::string folder(const std::string& name) { return THRIFTATTN_SOURCE_DIR "/tests/data/tiny-" + name; }

struct Golden {
  std::vector<int32_t> tokens;
  int64_t every = 0;                    // the logits are of rows every - 1, 2 every - 1, ...
  std::vector<float> logits;            // [tokens / every, vocab]: everything in float32
  std::vector<float> logits_f16_cache;  // the same with keys and values rounded to FP16
};

Golden golden(const std::string& name) {
  Golden g;
  const Json json = Json::parse(std::ifstream(folder(name) + "/golden.json"));
  g.tokens = json["tokens"].get<std::vector<int32_t>>();
  g.every = json.value("every", 2);
  const auto read = [&](const char* file_name) {
    std::vector<float> out(g.tokens.size() / g.every * kVocab);
    const auto bytes = static_cast<std::streamsize>(out.size() * sizeof(float));
    std::ifstream file(folder(name) + "/" + file_name, std::ios::binary);
    EXPECT_TRUE(file.read(reinterpret_cast<char*>(out.data()), bytes)) << file_name;
    return out;
  };
  g.logits = read("logits.bin");
  g.logits_f16_cache = read("logits_f16_cache.bin");
  return g;
}

// Rows every - 1, 2 every - 1, ... of `logits`.
std::vector<float> golden_rows(const std::vector<float>& logits, const Golden& g) {
  std::vector<float> out;
  for (size_t end = g.every * kVocab; end <= logits.size(); end += g.every * kVocab) {
    out.insert(out.end(), logits.begin() + static_cast<int64_t>(end) - kVocab,
               logits.begin() + static_cast<int64_t>(end));
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
  explicit Tiny(const std::string& name, Compute compute = Compute::f32, int threads = 2) : pool(threads) {
    auto loaded = Model::load(folder(name), compute, pool);
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

// Attention by its definition, in double precision over keys and values that stay in F32.
class ExactAttention {
 public:
  explicit ExactAttention(const Model& model) : model_(&model) {}

  Status operator()(const LayerStep& step) {
    const ModelConfig& c = model_->config();
    const std::vector<float>& sinks = model_->weights().layers[step.layer].sinks;
    Past& past = past_[{step.seq, step.layer}];
    EXPECT_EQ(std::ssize(past.k), step.past * c.h_kv * c.d);
    for (int64_t i = 0; i < step.k.tokens; ++i) {
      for (int g = 0; g < c.h_kv; ++g) {
        const auto *k = reinterpret_cast<const float*>(step.k.at(i, g)),
                   *v = reinterpret_cast<const float*>(step.v.at(i, g));
        past.k.insert(past.k.end(), k, k + c.d);
        past.v.insert(past.v.end(), v, v + c.d_v);
      }
    }
    for (int64_t i = 0; i < step.q.tokens; ++i) {
      const int64_t position = step.past + i, window = c.windows[step.layer];
      const int64_t first = window ? std::max<int64_t>(0, position - window + 1) : 0;
      for (int h = 0; h < c.h_q; ++h) {
        const int g = h / (c.h_q / c.h_kv);
        const auto* q = reinterpret_cast<const float*>(step.q.at(i, h));
        auto* out = reinterpret_cast<float*>(step.out.at(i, h));
        std::vector<double> scores, sum(c.d_v);
        for (int64_t j = first; j <= position; ++j) {
          double score = 0;
          for (int t = 0; t < c.d; ++t) score += double{q[t]} * past.k[(j * c.h_kv + g) * c.d + t];
          score *= c.sm_scale;
          scores.push_back(c.attention_softcap ? c.attention_softcap * std::tanh(score / c.attention_softcap) : score);
        }
        double l = sinks.empty() ? 0 : std::exp(double{sinks[h]});
        for (int64_t j = first; j <= position; ++j) {
          const double p = std::exp(scores[j - first]);
          l += p;
          for (int t = 0; t < c.d_v; ++t) sum[t] += p * past.v[(j * c.h_kv + g) * c.d_v + t];
        }
        for (int t = 0; t < c.d_v; ++t) out[t] = static_cast<float>(sum[t] / l);
      }
    }
    return {};
  }

 private:
  struct Past {
    std::vector<float> k, v;  // [tokens, h_kv, d], [tokens, h_kv, d_v]
  };
  const Model* model_;
  std::map<std::pair<SeqId, int>, Past> past_;
};

// Both compute in F32: these logits, of order 1, differ by up to 2e-5.
constexpr double kExact = 1e-4;
// The cache rounds K and V to FP16, a relative 5e-4, which moves these logits by up to 5.6e-3: the difference of the
// two golden files.
constexpr double kFp16Cache = 8e-3;
// Two ways through the same roundings: they differ where F32 noise crosses a rounding boundary of the cache; 4e-4.
constexpr double kSameRoundings = 1e-3;

// A prefill of part of the tokens, which ends within a page, and decode steps of one token.
std::vector<float> part_by_part(Session& session, std::span<const int32_t> tokens, int64_t prefilled) {
  const SeqId seq = session.new_sequence();
  auto logits = feed(session, seq, tokens.first(prefilled), Phase::prefill, prefilled);
  const auto rest = feed(session, seq, tokens.subspan(prefilled), Phase::decode, 1);
  logits.insert(logits.end(), rest.begin(), rest.end());
  return logits;
}

TEST(GoldenLogits, WithExactAttentionTheForwardPassEqualsTransformers) {
  for (const char* name : kModels) {
    Tiny tiny(name);
    Session session = tiny.session("fp16", {.attention = ExactAttention(*tiny.model)});
    const Golden g = golden(name);
    const double whole = distance(golden_rows(one_shot(session, g.tokens), g), g.logits);
    const double parts = distance(golden_rows(part_by_part(session, g.tokens, 70), g), g.logits);
    std::printf("%-18s largest difference: prefill %.2g, prefill and decode %.2g\n", name, whole, parts);
    EXPECT_LT(whole, kExact) << name;
    EXPECT_LT(parts, kExact) << name;
  }
}

void expect_golden(const char* name, const char* how, const std::vector<float>& logits, const Golden& g) {
  const double moved = distance(golden_rows(logits, g), g.logits),
               same = distance(golden_rows(logits, g), g.logits_f16_cache);
  std::printf("%-18s %s: largest difference to float32 %.2g, to float32 with an FP16 cache %.2g\n", name, how, moved,
              same);
  EXPECT_LT(moved, kFp16Cache) << name;
  EXPECT_LT(same, kSameRoundings) << name;
}

TEST(GoldenLogits, PrefillEqualsTransformers) {
  for (const char* name : kModels) {
    Tiny tiny(name);
    Session session = tiny.session("fp16");
    const Golden g = golden(name);
    expect_golden(name, "prefill", one_shot(session, g.tokens), g);
  }
}

TEST(GoldenLogits, DecodeTokenByTokenEqualsTransformers) {
  for (const char* name : kModels) {
    Tiny tiny(name);
    Session session = tiny.session("fp16");
    const Golden g = golden(name);
    expect_golden(name, "decode", feed(session, session.new_sequence(), g.tokens, Phase::decode, 1), g);
    expect_golden(name, "prefill and decode", part_by_part(session, g.tokens, 70), g);
  }
}

TEST(GoldenLogits, Bf16ProductsStayNear) {
  if (!has_native_bf16()) GTEST_SKIP() << "no native BF16 here";
  for (const char* name : kModels) {
    Tiny tiny(name, Compute::bf16);
    Session session = tiny.session("fp16");
    const Golden g = golden(name);
    const auto logits = golden_rows(one_shot(session, g.tokens), g);
    double squares = 0;
    for (size_t i = 0; i < logits.size(); ++i) squares += std::pow(logits[i] - g.logits[i], 2);
    const double error = std::sqrt(squares / static_cast<double>(logits.size()));
    std::printf("%-18s root of the mean squared difference: %.2g\n", name, error);
    EXPECT_LT(error, 0.05) << name;  // logits: about 1.2
  }
}

// The tolerance would be worthless if logits did not depend on what the architectures differ in.
TEST(GoldenLogits, EveryChoiceOfAnArchitectureMatters) {
  struct Change {
    const char* folder;
    Json patch;  // of config.json
  };
  const Json nothing = nullptr;
  const Change changes[] = {
      {"llama-bf16-llama3", {{"rope_parameters", {{"rope_type", "default"}}}}},
      {"qwen2", {{"use_sliding_window", false}, {"layer_types", nothing}}},
      {"qwen2", {{"sliding_window", 41}}},
      {"mistral", {{"sliding_window", nothing}}},
      {"mistral", {{"sliding_window", 39}}},
      {"ministral", {{"layer_types", {"sliding_attention", "sliding_attention", "full_attention"}}}},
      {"ministral", {{"rope_parameters", {{"rope_type", "linear"}}}}},
      {"ministral", {{"rope_parameters", {{"attention_factor", 1.0}}}}},
      {"ministral3", {{"rope_parameters", {{"mscale_all_dim", 1.0}}}}},
      {"ministral3", {{"rope_parameters", {{"beta_fast", 32.0}}}}},
      {"ministral3", {{"rope_parameters", {{"beta_slow", 1.0}}}}},
      {"ministral3", {{"rope_parameters", {{"llama_4_scaling_beta", 0.0}}}}},
      {"gemma2", {{"attn_logit_softcapping", nothing}}},
      {"gemma2", {{"final_logit_softcapping", nothing}}},
      {"gemma2", {{"query_pre_attn_scalar", 64}}},
      {"gemma2", {{"hidden_activation", "silu"}}},
      {"gemma3", {{"rope_parameters", {{"full_attention", {{"factor", 1.0}}}}}}},
      {"gemma3", {{"rope_parameters", {{"sliding_attention", {{"rope_theta", 1e6}}}}}}},
      {"gpt-oss", {{"rope_parameters", {{"truncate", true}}}}},
      {"gpt-oss", {{"swiglu_limit", 7.0}}},
      {"gpt-oss", {{"num_experts_per_tok", 3}}},
  };
  const fs::path copy = fs::path(testing::TempDir()) / "changed_model";
  ThreadPool pool(2);
  for (const Change& change : changes) {
    fs::remove_all(copy);
    fs::copy(folder(change.folder), copy, fs::copy_options::recursive);
    Json config = Json::parse(std::ifstream(copy / "config.json"));
    config.merge_patch(change.patch);
    for (const auto& [key, value] : change.patch.items()) {
      if (value.is_null()) config[key] = nullptr;  // a patch would drop the key
    }
    std::ofstream(copy / "config.json") << config;
    const Golden g = golden(change.folder);
    const auto model = Model::load(copy.string(), Compute::f32, pool);
    ASSERT_TRUE(model.ok()) << model.status().message();
    auto session = Session::create(*model, *parse_method("fp16"), {.attention = ExactAttention(*model)}, pool);
    ASSERT_TRUE(session.ok()) << session.status().message();
    EXPECT_GT(distance(golden_rows(one_shot(*session, g.tokens), g), g.logits), 1e-2)
        << change.folder << " " << change.patch;
  }
  fs::remove_all(copy);
}

TEST(Session, ChunkedAndOneShotPrefillAgree) {
  Tiny tiny("llama-f32-tied");
  Session session = tiny.session("fp16");
  const Golden g = golden("llama-f32-tied");
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

TEST(Session, LayersOfBothKindsReadThroughEveryMethod) {
  for (const char* name : {"ministral", "gemma2", "gemma3", "gpt-oss"}) {
    Tiny tiny(name);
    const Golden g = golden(name);
    Session reference = tiny.session("fp16");
    const auto expected = one_shot(reference, g.tokens);
    // Of two full pages, the first is a sink and the second the previous one: all are promoted.
    for (const char* method : {"thrift:budget=1,storage=dual", "thrift", "quest", "window"}) {
      Session session = tiny.session(method);
      EXPECT_LT(distance(part_by_part(session, g.tokens, 70), expected), kSameRoundings) << name << " " << method;
    }
    Session coarse = tiny.session("fp4");
    EXPECT_GT(distance(part_by_part(coarse, g.tokens, 70), expected), 10 * kSameRoundings) << name;
    for (const int64_t step : {16, 100}) {
      EXPECT_LT(distance(feed(reference, reference.new_sequence(), g.tokens, Phase::prefill, step), expected),
                kSameRoundings)
          << name << " " << step;
    }
  }
}

TEST(Session, AWindowThatHoldsTheWholeContextIsNone) {
  Tiny tiny("mistral");
  const Golden g = golden("mistral");
  const std::span<const int32_t> tokens = std::span<const int32_t>(g.tokens).first(40);
  Session narrow = tiny.session("fp16", {.max_tokens = 40}), wide = tiny.session("fp16", {.max_tokens = 41});
  EXPECT_EQ(narrow.plan(Phase::prefill)->problem.window, 0);
  EXPECT_EQ(wide.plan(Phase::prefill)->problem.window, 40);
  EXPECT_LT(distance(one_shot(narrow, tokens), one_shot(wide, tokens)), 1e-5);
}

TEST(Session, ThreadsDoNotChangeTheLogits) {
  const Golden g = golden("llama-f32-tied");
  std::vector<float> logits[2];
  for (int i = 0; i < 2; ++i) {
    Tiny tiny("llama-f32-tied", Compute::f32, 1 + 2 * i);
    Session session = tiny.session("thrift");
    logits[i] = one_shot(session, g.tokens);
  }
  EXPECT_EQ(logits[0], logits[1]);
}

TEST(Session, ForksContinueIndependently) {
  Tiny tiny("llama-f32-tied");
  Session session = tiny.session("thrift");
  const Golden g = golden("llama-f32-tied");
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
  Tiny tiny("llama-f32-tied");
  const Golden g = golden("llama-f32-tied");
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
  Tiny tiny("llama-f32-tied");
  const Golden g = golden("llama-f32-tied");
  Session fp16 = tiny.session("fp16"), fp4 = tiny.session("fp4");
  Session mixed = tiny.session("fp4", {.prefill_method = *parse_method("fp16")});
  const auto expected = one_shot(fp16, g.tokens), coarse = one_shot(fp4, g.tokens), got = one_shot(mixed, g.tokens);
  EXPECT_LT(distance(got, expected), kSameRoundings);
  EXPECT_GT(distance(coarse, expected), 10 * kSameRoundings);  // so that the line above says something
}

// Promoting everything reads the same keys and values as fp16, by another route: heads may do either.
TEST(Session, HeadsRunTheMethodOfTheirSchedule) {
  const Golden g = golden("llama-f32-tied");
  Tiny tiny("llama-f32-tied");
  const ModelConfig& c = tiny.model->config();
  const auto logits = [&](const std::string& rules) {
    const auto schedule =
        Schedule::parse(R"({"default": "fp16", "rules": [)" + rules + "]}", "s.json", c.layers, c.h_kv);
    EXPECT_TRUE(schedule.ok()) << schedule.status().message();
    auto session = Session::create(*tiny.model, *schedule, {}, tiny.pool);
    EXPECT_TRUE(session.ok()) << session.status().message();
    const SeqId seq = session->new_sequence();
    std::vector<float> out = feed(*session, seq, g.tokens, Phase::decode, 4);
    EXPECT_EQ(session->cache().config().storage_by_head.empty(), schedule->methods.size() == 1);
    return out;
  };
  ASSERT_GT(c.h_kv, 1);
  Session fp16 = tiny.session("fp16"), fp4 = tiny.session("fp4");
  const auto all_16 = feed(fp16, fp16.new_sequence(), g.tokens, Phase::decode, 4);
  const auto all_4 = feed(fp4, fp4.new_sequence(), g.tokens, Phase::decode, 4);
  EXPECT_EQ(logits(""), all_16);
  EXPECT_EQ(logits(R"({"method": "fp4"})"), all_4);
  const double loss = distance(all_4, all_16);
  const std::string promoted = R"("method": "thrift:budget=1,storage=dual"})";
  for (const char* where : {R"({"kv_heads": 0, )", R"({"kv_heads": 1, )", R"({"layers": 0, )", R"({"layers": 1, )"}) {
    EXPECT_LT(distance(logits(where + promoted), all_16), loss / 20) << where;
    const auto mixed = logits(std::string(where) + R"("method": "fp4"})");
    EXPECT_GT(distance(mixed, all_16), loss / 20) << where;
    EXPECT_GT(distance(mixed, all_4), loss / 20) << where;
  }
}

TEST(Session, PairsReadIn16BitCountAsPromoted) {
  const Golden g = golden("llama-f32-tied");
  Tiny tiny("llama-f32-tied");
  Session fp16 = tiny.session("fp16"), fp4 = tiny.session("fp4");
  for (Session* s : {&fp16, &fp4}) one_shot(*s, g.tokens);
  EXPECT_GT(fp16.stats().pairs, 0);
  EXPECT_EQ(fp16.stats().promoted, fp16.stats().pairs);
  EXPECT_EQ(fp4.stats().pairs, fp16.stats().pairs);
  EXPECT_EQ(fp4.stats().promoted, 0);
}

TEST(Session, ASchedulesShapeIsTheModels) {
  Tiny tiny("llama-f32-tied");
  const ModelConfig& c = tiny.model->config();
  const Method method = *parse_method("thrift");
  for (const Schedule& other :
       {Schedule::uniform(method, c.layers + 1, c.h_kv), Schedule::uniform(method, c.layers, 1)}) {
    const auto session = Session::create(*tiny.model, other, {}, tiny.pool);
    ASSERT_FALSE(session.ok());
    EXPECT_NE(session.status().message().find("schedule"), std::string::npos) << session.status().message();
  }
}

TEST(Session, LogitRowsChooseWhatTheSinkSees) {
  Tiny tiny("llama-f32-tied");
  Session session = tiny.session("fp16");
  const Golden g = golden("llama-f32-tied");
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
  Tiny tiny("llama-f32-tied");
  Session session = tiny.session("fp16");
  const Golden g = golden("llama-f32-tied");
  const SeqId seq = session.new_sequence();
  std::vector<double> fractions;
  const auto advance = [&](double fraction) { return fractions.push_back(fraction), false; };
  EXPECT_EQ(session.forward(seq, g.tokens, Phase::prefill, LogitRows::none, nullptr, advance).code(), Code::cancelled);
  EXPECT_EQ(fractions, std::vector<double>{0.5});
  EXPECT_TRUE(session.free(seq).ok());
  EXPECT_EQ(one_shot(session, g.tokens).size(), g.tokens.size() * kVocab);
}

TEST(Session, AfterAStepThatFailedASequenceCanOnlyBeFreed) {
  Tiny tiny("llama-f32-tied");
  const Golden g = golden("llama-f32-tied");
  const auto path = std::filesystem::temp_directory_path() / "thriftattn_failed_step";
  std::filesystem::remove(path);
  for (const double stop : {0.5, 1.0}) {  // in its middle; when all layers hold the tokens already
    Session session = tiny.session("fp16"), other = tiny.session("fp16");
    const SeqId seq = session.new_sequence();
    const auto forward = [&](const Advance& advance) {
      return session.forward(seq, std::span(g.tokens).first(80), Phase::prefill, LogitRows::none, nullptr, advance);
    };
    ASSERT_TRUE(forward(nullptr).ok());
    EXPECT_EQ(forward([&](double done) { return done < stop; }).code(), Code::cancelled);
    const int64_t length = session.length(seq);
    for (const Status& status : {forward(nullptr), session.fork(seq).status(), session.truncate(seq, length),
                                 session.save(seq, path), other.copy_from(session, seq).status()}) {
      EXPECT_EQ(status.code(), Code::invalid_argument);
      EXPECT_NE(status.message().find("can only be freed"), std::string::npos) << status.message();
    }
    EXPECT_EQ(session.length(seq), length);
    EXPECT_FALSE(std::filesystem::exists(path));
    EXPECT_TRUE(session.free(seq).ok());
  }
}

TEST(Session, StepsThatDoNotFitAreRefusedAndAppendNothing) {
  Tiny tiny("llama-f32-tied");
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
  const auto load_with = [&](const char* key, const Json& value, const char* name = "llama-f32-tied") {
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
    EXPECT_NE(load_with(key, false, "llama-bf16-llama3").find("proj.bias: config.json says"), std::string::npos) << key;
    EXPECT_EQ(load_with(key, true, "llama-bf16-llama3"), "") << key;
  }
  EXPECT_NE(load_with("num_hidden_layers", 1).find("num_hidden_layers 1"), std::string::npos);
  EXPECT_NE(load_with("vocab_size", 301).find("embed_tokens"), std::string::npos);
  EXPECT_EQ(load_with("vocab_size", 300), "");
  EXPECT_EQ(Model::load("/nonexistent", Compute::f32, pool).status().code(), Code::not_found);
}

// Adds a tensor of one F32 to the only safetensors file of a folder.
void add_tensor(const fs::path& dir, const std::string& name) {
  std::ifstream in(dir / "model.safetensors", std::ios::binary);
  uint64_t bytes = 0;
  in.read(reinterpret_cast<char*>(&bytes), 8);
  std::string text(bytes, ' ');
  in.read(text.data(), static_cast<std::streamsize>(bytes));
  std::string data((std::istreambuf_iterator<char>(in)), std::istreambuf_iterator<char>());
  Json header = Json::parse(text);
  header[name] = {{"dtype", "F32"}, {"shape", {1}}, {"data_offsets", {data.size(), data.size() + 4}}};
  text = header.dump();
  bytes = text.size();
  std::ofstream out(dir / "model.safetensors", std::ios::binary);
  out.write(reinterpret_cast<const char*>(&bytes), 8);
  out << text << data << std::string(4, '\0');
}

TEST(Model, TensorsThatNothingReadsAreRefused) {
  ThreadPool pool(1);
  const fs::path copy = fs::path(testing::TempDir()) / "extra_tensor";
  const auto load_with = [&](const char* name, const std::string& tensor) {
    fs::remove_all(copy);
    fs::copy(folder(name), copy, fs::copy_options::recursive);
    add_tensor(copy, tensor);
    const auto model = Model::load(copy.string(), Compute::f32, pool);
    fs::remove_all(copy);
    return model.ok() ? std::string() : model.status().message();
  };
  const auto has = [](const std::string& text, const std::string& part) {
    EXPECT_NE(text.find(part), std::string::npos) << text;
  };
  has(load_with("llama-f32-tied", "model.layers.0.self_attn.q_norm.weight"),
      "model.layers.0.self_attn.q_norm.weight: LlamaForCausalLM");
  has(load_with("mistral", "model.layers.1.self_attn.q_proj.bias"), "there is no bias");
  has(load_with("qwen3", "model.layers.2.input_layernorm.weight"), "num_hidden_layers 2");
  has(load_with("gpt-oss", "model.layers.1.mlp.experts.down_proj_blocks"), "MXFP4 weights are not supported: F32");
  EXPECT_EQ(load_with("mistral", "model.layers.0.self_attn.rotary_emb.inv_freq"), "");
  EXPECT_EQ(load_with("mistral", "lm_head.weight"), "");  // its embeddings are tied
  EXPECT_EQ(load_with("mistral", "score.weight"), "");    // of another head
}

}  // namespace
}  // namespace thriftattn::model
