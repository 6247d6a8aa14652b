// A cache, attention-like tokens and one call over them: what the attention tests share.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <ostream>
#include <random>
#include <string>
#include <vector>

#include "oracle/oracle.h"
#include "thriftattn/attention.h"
#include "thriftattn/cache.h"
#include "thriftattn/method.h"

namespace thriftattn::testing {

struct Shape {
  int h_q = 4, h_kv = 2, d = 64, d_v = 64;
};
inline std::ostream& operator<<(std::ostream& out, const Shape& s) {
  return out << s.h_q << "/" << s.h_kv << " heads of " << s.d << "/" << s.d_v;
}

// A sequence: queries, keys and values of all its tokens.
struct Tokens {
  Shape shape;
  int64_t s = 0;
  std::vector<float> q;  // [s, h_q, d]
  std::vector<float> k;  // [s, h_kv, d]
  std::vector<float> v;  // [s, h_kv, d_v]

  float* q_at(int64_t t) { return &q[static_cast<size_t>(t * shape.h_q * shape.d)]; }
  float* k_at(int64_t t) { return &k[static_cast<size_t>(t * shape.h_kv * shape.d)]; }
  float* v_at(int64_t t) { return &v[static_cast<size_t>(t * shape.h_kv * shape.d_v)]; }
  View k_view(int64_t first, int64_t n) const {
    return view(k.data() + first * shape.h_kv * shape.d, n, shape.h_kv, shape.d);
  }
  View v_view(int64_t first, int64_t n) const {
    return view(v.data() + first * shape.h_kv * shape.d_v, n, shape.h_kv, shape.d_v);
  }
  View q_view(int64_t first, int64_t n) const {
    return view(q.data() + first * shape.h_q * shape.d, n, shape.h_q, shape.d);
  }
};

// Inputs that look like attention: token 0 is a sink that every query leans to and whose value is small, two key
// channels are outliers with a slowly drifting mean, one value channel is loud, every seventh query is peaked on one
// earlier key.
inline Tokens attention_like(const Shape& shape, int64_t s, uint32_t seed = 1) {
  Tokens x{shape, s, {}, {}, {}};
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  const int d = shape.d, group = shape.h_q / shape.h_kv;
  std::vector<float> lean;
  for (int i = 0; i < d; ++i) lean.push_back(normal(random));
  for (int64_t t = 0; t < s; ++t) {
    const float drift = 0.5f * std::sin(static_cast<float>(t) / 100);
    for (int h = 0; h < shape.h_kv; ++h) {
      for (int c = 0; c < d; ++c) {
        const float outlier = c == 5 ? 6 + drift : c == d - 3 ? -4 - drift : 0;
        x.k.push_back(outlier + 0.8f * normal(random) + (t == 0 ? 2 * lean[static_cast<size_t>(c)] : 0.0f));
      }
      for (int c = 0; c < shape.d_v; ++c)
        x.v.push_back((c == 7 ? 6.0f : 1.0f) * (t == 0 ? 0.05f : 1.0f) * normal(random));
    }
    for (int h = 0; h < shape.h_q; ++h) {
      const int64_t target = static_cast<int64_t>(random() % static_cast<uint64_t>(t + 1));
      for (int c = 0; c < d; ++c) {
        const float key = x.k[static_cast<size_t>((target * shape.h_kv + h / group) * d + c)];
        const float calm = 0.8f * normal(random) + 0.6f * lean[static_cast<size_t>(c)];
        x.q.push_back(t % 7 == 3 ? 1.2f * key : calm);
      }
    }
  }
  return x;
}

// The instruction sets of this machine that do everything; BF16 products, which serve prefill alone, have
// bf16_products_test.cc.
inline std::vector<std::string> register_targets() {
  std::vector<std::string> names = Machine::here(1).targets;
  for (const char* bf16 : {"AMX", "AVX3_BF16"}) std::erase(names, bf16);
  return names;
}

inline ThreadPool& pool() {
  static ThreadPool threads(2);
  return threads;
}

inline Method method(const std::string& spec) {
  auto parsed = parse_method(spec);
  EXPECT_TRUE(parsed.ok()) << parsed.status().message();
  return parsed.ok() ? *parsed : Method{};
}

#define ASSERT_OK(expression)                                     \
  do {                                                            \
    const ::thriftattn::Status status_of_call = (expression);     \
    ASSERT_TRUE(status_of_call.ok()) << status_of_call.message(); \
  } while (0)
#define EXPECT_OK(expression)                                     \
  do {                                                            \
    const ::thriftattn::Status status_of_call = (expression);     \
    EXPECT_TRUE(status_of_call.ok()) << status_of_call.message(); \
  } while (0)

// How the last tokens of a sequence are asked: in one go, in a chunk, one token, a verify step.
struct Step {
  const char* name;
  Phase phase;
  int64_t rows;
};
inline std::ostream& operator<<(std::ostream& out, const Step& step) { return out << step.name; }

struct Call {
  Phase phase = Phase::prefill;
  bool causal = true;
  int64_t window = 0;
  float softcap = 0;
  float sm_scale = 0;
  bool sinks = false;  // learned ones, of the order of the scores
  bool stats = false;
  const Selection* given = nullptr;
  int threads = 2;
  int splits = 0;  // 0 = as planned
  DType compute = DType::f32;
  std::string target;  // "" = the best
};

struct Ran {
  Plan plan;
  std::vector<float> out, lse;
  Stats stats;
};

// A cache of one layer with one sequence, for one method.
class Session {
 public:
  Session(const Method& m, const Tokens& tokens, DType high = DType::f16) : method_(m), tokens_(tokens) {
    CacheConfig config = CacheConfig::for_method(m, 1, tokens.shape.h_kv, tokens.shape.d, tokens.shape.d_v);
    config.high_dtype = high;
    auto made = KvCache::create(config);
    EXPECT_TRUE(made.ok()) << made.status().message();
    cache_.emplace(std::move(*made));
    seq_ = cache_->new_sequence();
    for (int h = 0; h < tokens.shape.h_q; ++h) sinks_.push_back(3.0f - 1.5f * static_cast<float>(h));
  }

  KvCache& cache() { return *cache_; }
  SeqId seq() const { return seq_; }
  int64_t length() const { return cache_->length(seq_); }

  // Appends the next `count` tokens.
  void append(int64_t count) {
    const int64_t from = length();
    EXPECT_OK(cache_->append(seq_, 0, tokens_.k_view(from, count), tokens_.v_view(from, count), pool()));
    appended_ = count;
  }
  void settle() {
    EXPECT_OK(cache_->settle(seq_, 0));
    appended_ = 0;
  }

  Problem problem(int64_t rows, const Call& call) const {
    Problem p;
    p.phase = call.phase;
    p.max_s_q = rows;
    p.max_s_kv = std::max<int64_t>(length(), 1);
    p.h_q = tokens_.shape.h_q;
    p.h_kv = tokens_.shape.h_kv;
    p.d = tokens_.shape.d;
    p.d_v = tokens_.shape.d_v;
    p.causal = call.causal;
    p.window = call.window;
    p.softcap = call.softcap;
    p.sm_scale = call.sm_scale;
    p.method = method_;
    p.cache = cache_->config();
    p.stats = call.stats;
    p.compute = call.compute;
    return p;
  }

  // The last `rows` tokens attend to all tokens of the sequence.
  Ran attend(int64_t rows, const Call& call = {}) {
    Ran ran;
    const int64_t s = length();
    run_plan(rows, call, ran, [&](const Plan& plan, Workspace& workspace) {
      const size_t all = static_cast<size_t>(rows * tokens_.shape.h_q);
      ran.out.assign(all * static_cast<size_t>(tokens_.shape.d_v), NAN);  // poison: run must write every element
      ran.lse.assign(all, NAN);
      AttendArgs args = arguments(rows, call);
      args.q = tokens_.q_view(s - rows, rows);
      args.out = mutable_view(ran.out.data(), rows, tokens_.shape.h_q, tokens_.shape.d_v);
      args.lse = ran.lse.data();
      args.given = call.given;
      args.stats = &ran.stats;
      return run(plan, workspace, pool(), args);
    });
    return ran;
  }

  Selection selection(int64_t rows, const Call& call = {}) {
    Ran ran;
    Selection result;
    run_plan(rows, call, ran, [&](const Plan& plan, Workspace& workspace) {
      AttendArgs args = arguments(rows, call);
      args.q = tokens_.q_view(length() - rows, rows);
      auto selected = select(plan, workspace, pool(), args);
      if (selected.ok()) result = *selected;
      return selected.status();
    });
    return result;
  }

  // The same call for the oracle.
  oracle::Input oracle_input(int64_t rows, const Call& call = {}) const {
    oracle::Input in;
    in.s_kv = length();
    in.s_q = rows;
    in.q = tokens_.q.data() + (in.s_kv - rows) * tokens_.shape.h_q * tokens_.shape.d;
    in.k = tokens_.k.data();
    in.v = tokens_.v.data();
    in.h_q = tokens_.shape.h_q;
    in.h_kv = tokens_.shape.h_kv;
    in.d = tokens_.shape.d;
    in.d_v = tokens_.shape.d_v;
    in.causal = call.causal;
    in.window = call.window;
    in.softcap = static_cast<double>(call.softcap);
    in.sm_scale = static_cast<double>(call.sm_scale ? call.sm_scale : 1.0f / std::sqrt(static_cast<float>(in.d)));
    in.sinks = call.sinks ? sinks_.data() : nullptr;
    in.phase = call.phase;
    in.method = method_;
    in.high_dtype = cache_->config().high_dtype;
    in.appended = appended_;
    return in;
  }

 private:
  AttendArgs arguments(int64_t rows, const Call& call) {
    s_q_ = rows;
    AttendArgs args;
    args.sinks = call.sinks ? sinks_.data() : nullptr;
    args.cache = &*cache_;
    args.seqs = {&seq_, 1};
    args.s_q = {&s_q_, 1};
    return args;
  }

  template <class Body>
  void run_plan(int64_t rows, const Call& call, Ran& ran, Body body) {
    Machine machine = Machine::here(call.threads);
    if (!call.target.empty()) machine.targets = {call.target};
    auto planned = plan(problem(rows, call), machine);
    ASSERT_TRUE(planned.ok()) << planned.status().message();
    ran.plan = *planned;
    if (call.splits > 0) ran.plan.splits = call.splits;
    auto workspace = Workspace::create(ran.plan);
    ASSERT_TRUE(workspace.ok()) << workspace.status().message();
    ASSERT_OK(body(ran.plan, *workspace));
  }

  Method method_;
  const Tokens& tokens_;
  std::optional<KvCache> cache_;
  SeqId seq_ = 0;
  int64_t s_q_ = 0, appended_ = 0;
  std::vector<float> sinks_;  // [h_q]
};

// Largest |a - b| over the largest |v|; infinite where one of them is not finite.
inline double distance(const std::vector<float>& a, const std::vector<double>& b, const Tokens& tokens) {
  float v_max = 0;
  for (float v : tokens.v) v_max = std::max(v_max, std::fabs(v));
  double worst = a.size() == b.size() ? 0 : INFINITY;
  for (size_t i = 0; i < a.size() && i < b.size(); ++i) {
    const double error = std::fabs(static_cast<double>(a[i]) - b[i]);
    worst = std::isfinite(error) ? std::max(worst, error / static_cast<double>(v_max)) : INFINITY;
  }
  return worst;
}
inline double distance(const std::vector<float>& a, const std::vector<float>& b, const Tokens& tokens) {
  return distance(a, std::vector<double>(b.begin(), b.end()), tokens);
}

// Every full page of every query block, in one tier.
inline Selection promote_all(const oracle::Input& input, Tier tier) {
  Selection selection;
  selection.first.push_back(0);
  for (const oracle::QueryBlock& block : oracle::query_blocks(input)) {
    for (int64_t j = block.first_page; j < block.pages; ++j) selection.pages.push_back({static_cast<int32_t>(j), tier});
    selection.first.push_back(static_cast<int64_t>(selection.pages.size()));
  }
  return selection;
}

inline Selection promote_none(const oracle::Input& input) {
  Selection selection;
  selection.first.assign(oracle::query_blocks(input).size() + 1, 0);
  return selection;
}

// A selection that promotes the first page of each block, not the second, and about a third of the others, in the tiers
// given; otherwise without sense.
inline Selection random_selection(const oracle::Input& input, const std::vector<Tier>& tiers, uint32_t seed = 1) {
  std::mt19937 random(seed);
  Selection selection;
  selection.first.push_back(0);
  for (const oracle::QueryBlock& block : oracle::query_blocks(input)) {
    for (auto j = static_cast<int32_t>(block.first_page); j < block.pages; ++j) {
      const int64_t nth = j - block.first_page;
      if (nth == 0 || (nth > 1 && random() % 3 == 0)) selection.pages.push_back({j, tiers[random() % tiers.size()]});
    }
    selection.first.push_back(static_cast<int64_t>(selection.pages.size()));
  }
  return selection;
}

}  // namespace thriftattn::testing
