#include "bench_run.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cmath>

#include "system.h"

namespace thriftattn::cli {
namespace {

using Clock = std::chrono::steady_clock;

double milliseconds_since(Clock::time_point begin) {
  return std::chrono::duration<double, std::milli>(Clock::now() - begin).count();
}

constexpr double kMostLayers = 1024;  // so that a cache of few tokens is not filled for minutes

// Bytes that a token more takes in one layer, measured on a small cache of one head: all heads take the same, and from
// a few pages on each page does.
Result<double> stored_per_token(CacheConfig config) {
  const int64_t few = 16 * kPageTokens, heads = config.h_kv;
  config.layers = config.h_kv = 1;
  THRIFTATTN_ASSIGN_OR_RETURN(cache, KvCache::create(config));
  ThreadPool pool(1);
  const SeqId seq = cache.new_sequence();
  const std::vector<float> zeros(few * std::max(config.d, config.d_v));
  int64_t held[2];
  for (int64_t& bytes : held) {
    THRIFTATTN_RETURN_IF_ERROR(
        cache.append(seq, 0, view(zeros.data(), few, 1, config.d), view(zeros.data(), few, 1, config.d_v), pool));
    THRIFTATTN_RETURN_IF_ERROR(cache.settle(seq, 0));
    bytes = cache.bytes().total();
  }
  return static_cast<double>((held[1] - held[0]) * heads) / static_cast<double>(few);
}

}  // namespace

Status Bench::evict() {
  if (!eviction) {
    THRIFTATTN_ASSIGN_OR_RETURN(made, Eviction::create(pool, static_cast<int64_t>(cold_bytes())));
    eviction = std::move(made);
  }
  eviction->run();
  return {};
}

Result<BenchRow> BenchRow::create(Bench* bench, const Method& method, int64_t s_kv) {
  const BenchOptions& o = bench->options;
  BenchRow made(bench, BenchProblem(&o, method, s_kv));
  const bool append = made.is("append");
  Problem& problem = made.problem_.problem;
  THRIFTATTN_RETURN_IF_ERROR(plan(problem, bench->machine).status());  // before a cache of this shape is made
  THRIFTATTN_ASSIGN_OR_RETURN(per_token, stored_per_token(problem.cache));
  made.layer_bytes_ = per_token * static_cast<double>(s_kv) * o.batch;
  // A step reads every page in the tier of the rest, or less: then a rotation does not make itself cold, see evict_.
  double read_per_token = per_token;
  if (!made.is("rank") && method.rest != Tier::none) {
    CacheConfig read = problem.cache;
    read.storage = method.rest == Tier::fp16 ? Storage::high_only : Storage::fp4_only;
    THRIFTATTN_ASSIGN_OR_RETURN(of_rest, stored_per_token(read));
    read_per_token = std::min(per_token, of_rest);
  }
  const double room = std::floor(0.5 * static_cast<double>(memory().available) / std::max(made.layer_bytes_, 1.0));
  const double wanted = std::ceil(bench->cold_bytes() / (read_per_token * static_cast<double>(s_kv) * o.batch));
  problem.cache.layers = append ? 1 : static_cast<int>(std::clamp(std::min(wanted, room), 1.0, kMostLayers));
  THRIFTATTN_ASSIGN_OR_RETURN(chosen, plan(problem, bench->machine));
  Timing& row = made.row();
  row.target = append ? "best" : chosen.target;  // no plan chooses an append's
  row.layers = problem.cache.layers;
  problem = chosen.problem;
  if (made.is("rank") && (problem.method.policy == Policy::none || problem.method.budget.kind == Budget::Kind::all)) {
    return invalid_argument(fmt::format("method {} ranks no pages: it has nothing to time in phase rank", row.method));
  }
  made.s_q_.assign(o.batch, row.s_q);
  made.plan_ = std::move(chosen);
  return made;
}

// Appends s_kv tokens of every sequence to every layer; the milliseconds of each full step. All layers hold the same.
// Where the cache is there already, its sequences are freed first, and their records used again.
Status BenchRow::fill(std::vector<double>* times) {
  const BenchOptions& o = bench_->options;
  const int64_t step = std::min(row().s_kv, times ? row().s_q : 2048);
  if (!cache_) {
    THRIFTATTN_ASSIGN_OR_RETURN(made, KvCache::create(problem_.problem.cache));
    cache_ = std::move(made);
  } else {
    for (const SeqId seq : seqs_) THRIFTATTN_RETURN_IF_ERROR(cache_->free(seq));
  }
  KvCache& cache = *cache_;
  std::vector<float> k, v;
  seqs_.clear();
  for (int b = 0; b < o.batch; ++b) {
    seqs_.push_back(cache.new_sequence());
    for (int64_t t = 0; t < row().s_kv; t += step) {
      const int64_t n = std::min(step, row().s_kv - t);
      bench_->inputs.rows(Input::key, b, t, n, bench_->pool, &k);
      bench_->inputs.rows(Input::value, b, t, n, bench_->pool, &v);
      for (int layer = 0; layer < layers(); ++layer) {
        const auto begin = Clock::now();
        THRIFTATTN_RETURN_IF_ERROR(cache.append(seqs_[b], layer, view(k.data(), n, o.h_kv, o.d),
                                                view(v.data(), n, o.h_kv, o.d), *bench_->pool));
        THRIFTATTN_RETURN_IF_ERROR(cache.settle(seqs_[b], layer));
        if (times && n == step) times->push_back(milliseconds_since(begin));
      }
      if (!bench_->progress->update((b + static_cast<double>(t) / static_cast<double>(row().s_kv)) / o.batch)) {
        return Status(Code::cancelled, "cancelled");
      }
    }
  }
  return {};
}

Status BenchRow::prepare() {
  if (is("append") || cache_) return {};
  const BenchOptions& o = bench_->options;
  bench_->progress->begin(fmt::format("{}, {} tokens: filling {} layers", row().method, row().s_kv, layers()));
  THRIFTATTN_RETURN_IF_ERROR(fill(nullptr));
  THRIFTATTN_ASSIGN_OR_RETURN(workspace, Workspace::create(*plan_));
  workspace_ = std::move(workspace);
  if (q_.empty()) {
    std::vector<float> one;
    for (int b = 0; b < o.batch; ++b) {
      bench_->inputs.rows(Input::query, b, row().s_kv - row().s_q, row().s_q, bench_->pool, &one);
      q_.insert(q_.end(), one.begin(), one.end());
    }
    out_.resize(q_.size());
  }
  if (!checked_) THRIFTATTN_RETURN_IF_ERROR(check());
  // What filling wrote goes to memory while it is read for the first time; later that would not happen.
  AttendArgs a = args();
  for (; is("decode") && a.layer < layers(); ++a.layer)
    THRIFTATTN_RETURN_IF_ERROR(run(*plan_, *workspace_, *bench_->pool, a));
  return {};
}

void BenchRow::release() {
  cache_.reset();
  workspace_.reset();
}

AttendArgs BenchRow::args() {
  const BenchOptions& o = bench_->options;
  AttendArgs args;
  args.cache = &*cache_;
  args.seqs = seqs_;
  args.s_q = s_q_;
  args.q = view(q_.data(), o.batch * row().s_q, o.h_q, o.d);
  args.out = mutable_view(out_.data(), o.batch * row().s_q, o.h_q, o.d);
  return args;
}

Status BenchRow::check() {
  Selection selection;
  if (problem_.problem.method.budget.kind != Budget::Kind::all) {
    THRIFTATTN_ASSIGN_OR_RETURN(chosen, select(*plan_, *workspace_, *bench_->pool, args()));
    selection = std::move(chosen);
  }
  THRIFTATTN_RETURN_IF_ERROR(run(*plan_, *workspace_, *bench_->pool, args()));
  THRIFTATTN_RETURN_IF_ERROR(problem_.check(bench_->inputs, bench_->pool, q_, out_, selection));
  const MemoryUse use = cache_->bytes();
  problem_.count(selection, use, sizeof(float));
  row().cold = bench_->last_level > 0 && static_cast<double>(use.total()) >= bench_->cold_bytes();
  evict_ = row().cold && row().bytes * layers() < bench_->cold_bytes();
  checked_ = true;
  return {};
}

// What was appended, read back.
Status BenchRow::check_appended() {
  const BenchOptions& o = bench_->options;
  const MemoryUse use = cache_->bytes();
  const double share = static_cast<double>(row().s_q) / static_cast<double>(row().s_kv) / o.batch;
  // F32 in, the stored forms out.
  row().bytes = 8.0 * static_cast<double>(row().s_q) * o.h_kv * o.d + static_cast<double>(use.total()) * share;
  const int64_t tokens = std::min<int64_t>(row().s_kv, 16384), width = static_cast<int64_t>(o.h_kv) * o.d;
  std::vector<float> k(tokens * width), v(k.size()), want(o.d);
  double error = 0, norm = 0;
  for (const int64_t first : {int64_t{0}, row().s_kv - tokens}) {  // both ends
    THRIFTATTN_RETURN_IF_ERROR(cache_->read(seqs_[0], 0, first, mutable_view(k.data(), tokens, o.h_kv, o.d),
                                            mutable_view(v.data(), tokens, o.h_kv, o.d)));
    for (int64_t t = 0; t < tokens; ++t) {
      bench_->inputs.row(Input::key, 0, first + t, 0, want.data());
      for (int64_t c = 0; c < o.d; ++c) {
        error += std::pow(k[t * width + c] - want[c], 2);
        norm += std::pow(want[c], 2);
      }
    }
  }
  row().rel_err = std::sqrt(error / norm);
  checked_ = true;
  if (row().rel_err <= 0.3) return {};
  return data_loss(
      fmt::format("{}: what was appended reads back with relative error {:.2e}", row().method, row().rel_err));
}

Status BenchRow::measure() {
  std::vector<double> times;
  if (is("append")) {
    bench_->progress->begin(fmt::format("{}, {} tokens: appending", row().method, row().s_kv));
    THRIFTATTN_RETURN_IF_ERROR(fill(&fresh_times_));
    row().fresh = median(fresh_times_);
    if (!checked_) THRIFTATTN_RETURN_IF_ERROR(check_appended());
    THRIFTATTN_RETURN_IF_ERROR(fill(&times));
    release();
  } else {
    const int reps = bench_->options.reps;
    bench_->progress->begin(fmt::format("{}, {} tokens: {} repetitions", row().method, row().s_kv, reps));
    AttendArgs a = args();
    for (int rep = 0; rep <= reps; ++rep) {
      a.layer = static_cast<int>(turn_++ % layers());
      if (evict_) THRIFTATTN_RETURN_IF_ERROR(bench_->evict());
      const auto begin = Clock::now();
      if (is("rank")) {
        THRIFTATTN_ASSIGN_OR_RETURN(selection, select(*plan_, *workspace_, *bench_->pool, a));
        if (selection.first.empty()) return data_loss("a selection has no blocks");
      } else {
        THRIFTATTN_RETURN_IF_ERROR(run(*plan_, *workspace_, *bench_->pool, a));
      }
      if (rep > 0) times.push_back(milliseconds_since(begin));  // the first one faults pages in and wakes the machine
      if (!bench_->progress->update(rep / (reps + 1.0))) return Status(Code::cancelled, "cancelled");
    }
  }
  row().by_round.push_back(median(times));
  times_.insert(times_.end(), times.begin(), times.end());
  return {};
}

Timing BenchRow::timing() const {
  Timing row = problem_.row;
  row.median = median(times_);
  row.least = *std::min_element(times_.begin(), times_.end());
  row.most = *std::max_element(times_.begin(), times_.end());
  return row;
}

}  // namespace thriftattn::cli
