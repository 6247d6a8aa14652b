#include "bench_run.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>

#include "system.h"

namespace thriftattn::cli {
namespace {

using Clock = std::chrono::steady_clock;

double milliseconds_since(Clock::time_point begin) {
  return std::chrono::duration<double, std::milli>(Clock::now() - begin).count();
}

double median(std::vector<double> times) {
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

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

bool ranks_by_summaries(Policy policy) {
  return policy == Policy::block_mean || policy == Policy::quest || policy == Policy::second_moment;
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
  BenchRow made(bench, method);
  const bool append = made.is("append"), prefill = made.is("prefill");
  Timing& row = made.row_;
  row.s_kv = s_kv;
  row.s_q = std::min(s_kv, o.s_q > 0 ? o.s_q : prefill || append ? 512 : 1);
  row.method = to_string(method);

  CacheConfig config = CacheConfig::for_method(method, 1, o.h_kv, o.d, o.d);
  Problem problem;
  problem.phase = prefill ? Phase::prefill : Phase::decode;
  problem.b = o.batch;
  problem.max_s_q = append ? 1 : row.s_q;
  problem.max_s_kv = s_kv;
  problem.h_q = o.h_q;
  problem.h_kv = o.h_kv;
  problem.d = problem.d_v = o.d;
  problem.method = method;
  problem.compute = o.compute == "bf16" ? DType::bf16 : DType::f32;
  problem.cache = config;
  THRIFTATTN_RETURN_IF_ERROR(plan(problem, bench->machine).status());  // before a cache of this shape is made
  THRIFTATTN_ASSIGN_OR_RETURN(per_token, stored_per_token(config));
  made.layer_bytes_ = per_token * static_cast<double>(s_kv) * o.batch;
  const double room = 0.5 * static_cast<double>(memory().available);
  const double wanted =
      std::min(std::ceil(bench->cold_bytes() / made.layer_bytes_), std::floor(room / std::max(made.layer_bytes_, 1.0)));
  config.layers = append ? 1 : static_cast<int>(std::clamp(wanted, 1.0, 64.0));
  problem.cache = made.config_ = config;
  THRIFTATTN_ASSIGN_OR_RETURN(chosen, plan(problem, bench->machine));
  row.target = append ? "best" : chosen.target;  // no plan chooses an append's
  row.layers = config.layers;
  const Method& resolved = chosen.problem.method;
  if (made.is("rank") && (resolved.policy == Policy::none || resolved.budget.kind == Budget::Kind::all)) {
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
  const int64_t step = std::min(row_.s_kv, times ? row_.s_q : 2048);
  if (!cache_) {
    THRIFTATTN_ASSIGN_OR_RETURN(made, KvCache::create(config_));
    cache_ = std::move(made);
  } else {
    for (const SeqId seq : seqs_) THRIFTATTN_RETURN_IF_ERROR(cache_->free(seq));
  }
  KvCache& cache = *cache_;
  std::vector<float> k, v;
  seqs_.clear();
  for (int b = 0; b < o.batch; ++b) {
    seqs_.push_back(cache.new_sequence());
    for (int64_t t = 0; t < row_.s_kv; t += step) {
      const int64_t n = std::min(step, row_.s_kv - t);
      bench_->inputs.rows(Input::key, b, t, n, bench_->pool, &k);
      bench_->inputs.rows(Input::value, b, t, n, bench_->pool, &v);
      for (int layer = 0; layer < config_.layers; ++layer) {
        const auto begin = Clock::now();
        THRIFTATTN_RETURN_IF_ERROR(cache.append(seqs_[b], layer, view(k.data(), n, o.h_kv, o.d),
                                                view(v.data(), n, o.h_kv, o.d), *bench_->pool));
        THRIFTATTN_RETURN_IF_ERROR(cache.settle(seqs_[b], layer));
        if (times && n == step) times->push_back(milliseconds_since(begin));
      }
      if (!bench_->progress->update((b + static_cast<double>(t) / static_cast<double>(row_.s_kv)) / o.batch)) {
        return Status(Code::cancelled, "cancelled");
      }
    }
  }
  return {};
}

Status BenchRow::prepare() {
  if (is("append") || cache_) return {};
  const BenchOptions& o = bench_->options;
  bench_->progress->begin(fmt::format("{}, {} tokens: filling {} layers", row_.method, row_.s_kv, config_.layers));
  THRIFTATTN_RETURN_IF_ERROR(fill(nullptr));
  THRIFTATTN_ASSIGN_OR_RETURN(workspace, Workspace::create(*plan_));
  workspace_ = std::move(workspace);
  if (q_.empty()) {
    std::vector<float> one;
    for (int b = 0; b < o.batch; ++b) {
      bench_->inputs.rows(Input::query, b, row_.s_kv - row_.s_q, row_.s_q, bench_->pool, &one);
      q_.insert(q_.end(), one.begin(), one.end());
    }
    out_.resize(q_.size());
  }
  return checked_ ? Status() : check();
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
  args.q = view(q_.data(), o.batch * row_.s_q, o.h_q, o.d);
  args.out = mutable_view(out_.data(), o.batch * row_.s_q, o.h_q, o.d);
  return args;
}

// Query blocks of one sequence and head: in prefill 64 rows at absolute positions, a decode step is one.
int64_t BenchRow::query_blocks() const {
  if (!is("prefill")) return 1;
  return (row_.s_kv - 1) / kPageTokens - (row_.s_kv - row_.s_q) / kPageTokens + 1;
}

// Compares sampled rows with the definition. What is read in 16 bit alone must agree, over the pages that were read
// where the others are skipped; FP4 has an error, not any. Reported is the error to attention over everything.
Status BenchRow::check() {
  const BenchOptions& o = bench_->options;
  const Method& method = plan_->problem.method;
  const bool all = method.budget.kind == Budget::Kind::all, prefill = is("prefill");
  Selection selection;
  if (!all) {
    THRIFTATTN_ASSIGN_OR_RETURN(chosen, select(*plan_, *workspace_, *bench_->pool, args()));
    selection = std::move(chosen);
  }
  const int64_t blocks = query_blocks(), heads = prefill ? o.h_q : o.h_kv, full = row_.s_kv / kPageTokens;
  if (!all && std::ssize(selection.first) != o.batch * heads * blocks + 1) {
    return data_loss(fmt::format("{} over {} tokens: a selection of {} query blocks, {} are right", row_.method,
                                 row_.s_kv, selection.first.size() - 1, o.batch * heads * blocks));
  }
  THRIFTATTN_RETURN_IF_ERROR(run(*plan_, *workspace_, *bench_->pool, args()));

  const bool sparse = !all && method.rest == Tier::none;
  constexpr int kSamples = 8;
  struct Sum {
    double error = 0, norm = 0, some_error = 0, some_norm = 0;
  };
  std::array<Sum, kSamples> sums;
  bench_->pool->parallel_for(kSamples, [&](int64_t i, int) {
    const int64_t seq = i % o.batch, r = (i * 977) % row_.s_q, head = (i * 5) % o.h_q;
    const int64_t at = ((seq * row_.s_q + r) * o.h_q + head) * o.d, position = row_.s_kv - row_.s_q + r;
    std::vector<bool> reads(full, !sparse);
    if (sparse) {
      const int64_t block = prefill ? position / kPageTokens - (row_.s_kv - row_.s_q) / kPageTokens : 0;
      const int64_t b = (seq * heads + (prefill ? head : head / (o.h_q / o.h_kv))) * blocks + block;
      for (int64_t p = selection.first[b]; p < selection.first[b + 1]; ++p) reads[selection.pages[p].page] = true;
    }
    const Inputs::Row want = bench_->inputs.attention(
        &q_[at], seq, position + 1, static_cast<int>(head),
        [&](int64_t token) { return token / kPageTokens >= full || reads[token / kPageTokens]; });
    for (int64_t c = 0; c < o.d; ++c) {
      sums[i].error += std::pow(out_[at + c] - want.all[c], 2);
      sums[i].norm += std::pow(want.all[c], 2);
      sums[i].some_error += std::pow(out_[at + c] - want.some[c], 2);
      sums[i].some_norm += std::pow(want.some[c], 2);
    }
  });
  Sum sum;
  for (const Sum& s : sums) {
    sum.error += s.error;
    sum.norm += s.norm;
    sum.some_error += s.some_error;
    sum.some_norm += s.some_norm;
  }
  row_.rel_err = std::sqrt(sum.error / sum.norm);
  const double error = std::sqrt(sum.some_error / sum.some_norm);
  const bool exact = method.rest != Tier::fp4 && std::none_of(selection.pages.begin(), selection.pages.end(),
                                                              [](const Promoted& p) { return p.tier != Tier::fp16; });
  // An output of zeros has an error of 1. MXFP4, whose scales are powers of two, errs by half where Q and P are in it.
  const double rounded = o.compute == "bf16" ? 2e-2 : 2e-3;  // q, k, v and p each to 8 bits, or K and V to 11
  const double limit = exact ? rounded : method.format == Fp4Format::mxfp4 ? 0.8 : 0.5;
  if (!(error <= limit)) {
    return data_loss(fmt::format("{} over {} tokens is wrong: relative error {:.2e}, at most {} is right", row_.method,
                                 row_.s_kv, error, limit));
  }
  count(selection, cache_->bytes());
  checked_ = true;
  return {};
}

// What must be read: every full page in its tier, the tail in 16 bit, summaries where something is computed from them,
// q, and out written; each once, whatever the kernel does. Prefill, whose query blocks choose for themselves, counts a
// page in the tiers that blocks read it in, by their shares. Codes that rank a page and are then left alone for its 16
// bit are not counted, so that a share of the bandwidth is never too large.
void BenchRow::count(const Selection& selection, const MemoryUse& use) {
  const BenchOptions& o = bench_->options;
  const Method& method = plan_->problem.method;
  const bool prefill = is("prefill"), rank = is("rank");
  const int64_t full = row_.s_kv / kPageTokens, offset = row_.s_kv - row_.s_q;
  const double pages = static_cast<double>(full) * o.batch * o.h_kv;  // of all heads
  const double layers = config_.layers, width = static_cast<double>(o.d) * o.h_q * o.batch;

  double seen = 0;  // (query block, page) pairs of the blocks of one selection
  for (int64_t i = 0; i < query_blocks(); ++i) {
    seen += static_cast<double>(prefill ? std::min(offset / kPageTokens + i + 1, full) : full);
  }
  seen *= static_cast<double>(o.batch) * (prefill ? o.h_q : o.h_kv);
  std::array<double, 4> share = {};  // of the pages, by tier
  for (const Promoted& p : selection.pages) share[static_cast<int>(p.tier)] += 1 / seen;
  const double promoted = share[0] + share[1] + share[2] + share[3];
  share[static_cast<int>(method.budget.kind == Budget::Kind::all ? Tier::fp16 : method.rest)] += 1 - promoted;

  const double high = 4.0 * kPageTokens * o.d;  // bytes of a page and head, K and V
  const double codes = pages > 0 ? static_cast<double>(use.codes) / layers / pages : 0;
  const double residual = pages > 0 ? static_cast<double>(use.residual) / layers / pages : 0;
  const double summaries =
      method.rest == Tier::fp4 || ranks_by_summaries(method.policy) ? static_cast<double>(use.summaries) / layers : 0;
  const double tail = static_cast<double>(row_.s_kv % kPageTokens) * o.batch * 4.0 * o.h_kv * o.d;
  const auto in_tier = [&](Tier t) { return share[static_cast<int>(t)] * pages; };
  const bool by_codes = method.policy == Policy::fp4_mass;
  if (rank) {
    if (by_codes) row_.bytes = pages * codes / 2 + tail / 2 + (method.centring ? summaries : 0);
    if (ranks_by_summaries(method.policy)) row_.bytes = summaries;
    if (method.policy == Policy::oracle) row_.bytes = (residual > 0 ? codes + residual : high) * pages / 2 + tail / 2;
    row_.bytes += 4.0 * width * static_cast<double>(row_.s_q);
  } else {
    row_.bytes = in_tier(Tier::fp16) * high + in_tier(Tier::fp4x2) * (codes + residual) + in_tier(Tier::fp4) * codes +
                 (by_codes ? in_tier(Tier::none) * codes / 2 : 0) + tail + summaries +
                 8.0 * width * static_cast<double>(row_.s_q);
  }
  // Pairs of a row and a key it reads, 2 d multiplications and additions for the score and as many for the value.
  const double pairs =
      static_cast<double>(row_.s_q) * (static_cast<double>(row_.s_kv) - (static_cast<double>(row_.s_q) - 1) / 2);
  const bool by_keys = by_codes || method.policy == Policy::oracle;
  if (rank) {
    row_.flops = 2 * width * (by_keys ? pairs : ranks_by_summaries(method.policy) ? pairs / kPageTokens : 0);
  } else {
    row_.flops = 4 * width * pairs * (pages > 0 ? 1 - share[static_cast<int>(Tier::none)] : 1);
  }
  row_.cold = bench_->last_level > 0 && static_cast<double>(use.total()) >= bench_->cold_bytes();
  evict_ = row_.cold && row_.bytes * layers < bench_->cold_bytes();
}

// What was appended, read back.
Status BenchRow::check_appended() {
  const BenchOptions& o = bench_->options;
  const MemoryUse use = cache_->bytes();
  const double share = static_cast<double>(row_.s_q) / static_cast<double>(row_.s_kv) / o.batch;
  // F32 in, the stored forms out.
  row_.bytes = 8.0 * static_cast<double>(row_.s_q) * o.h_kv * o.d + static_cast<double>(use.total()) * share;
  const int64_t tokens = std::min<int64_t>(row_.s_kv, 16384), width = static_cast<int64_t>(o.h_kv) * o.d;
  std::vector<float> k(tokens * width), v(k.size()), want(o.d);
  double error = 0, norm = 0;
  for (const int64_t first : {int64_t{0}, row_.s_kv - tokens}) {  // both ends
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
  row_.rel_err = std::sqrt(error / norm);
  checked_ = true;
  if (row_.rel_err <= 0.3) return {};
  return data_loss(
      fmt::format("{}: what was appended reads back with relative error {:.2e}", row_.method, row_.rel_err));
}

Status BenchRow::measure() {
  std::vector<double> times;
  if (is("append")) {
    bench_->progress->begin(fmt::format("{}, {} tokens: appending", row_.method, row_.s_kv));
    THRIFTATTN_RETURN_IF_ERROR(fill(&fresh_times_));
    row_.fresh = median(fresh_times_);
    if (!checked_) THRIFTATTN_RETURN_IF_ERROR(check_appended());
    THRIFTATTN_RETURN_IF_ERROR(fill(&times));
    release();
  } else {
    const int reps = bench_->options.reps;
    bench_->progress->begin(fmt::format("{}, {} tokens: {} repetitions", row_.method, row_.s_kv, reps));
    AttendArgs a = args();
    for (int rep = 0; rep <= reps; ++rep) {
      a.layer = static_cast<int>(turn_++ % config_.layers);
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
  row_.by_round.push_back(median(times));
  times_.insert(times_.end(), times.begin(), times.end());
  return {};
}

Timing BenchRow::timing() const {
  Timing row = row_;
  row.median = median(times_);
  row.least = *std::min_element(times_.begin(), times_.end());
  row.most = *std::max_element(times_.begin(), times_.end());
  return row;
}

}  // namespace thriftattn::cli
