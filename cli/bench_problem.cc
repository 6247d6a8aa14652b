#include "bench_problem.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>

namespace thriftattn::cli {
namespace {

bool ranks_by_summaries(Policy policy) {
  return policy == Policy::block_mean || policy == Policy::quest || policy == Policy::second_moment;
}

}  // namespace

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

BenchProblem::BenchProblem(const BenchOptions* options, const Method& method, int64_t s_kv) : options_(options) {
  const BenchOptions& o = *options;
  const bool append = is("append"), prefill = is("prefill");
  row.s_kv = s_kv;
  row.s_q = std::min(s_kv, o.s_q > 0 ? o.s_q : prefill || append ? 512 : 1);
  row.method = to_string(method);
  problem.phase = prefill ? Phase::prefill : Phase::decode;
  problem.b = o.batch;
  problem.max_s_q = append ? 1 : row.s_q;
  problem.max_s_kv = s_kv;
  problem.h_q = o.h_q;
  problem.h_kv = o.h_kv;
  problem.d = problem.d_v = o.d;
  problem.method = method;
  problem.compute = o.compute == "bf16" ? DType::bf16 : DType::f32;
  problem.cache = CacheConfig::for_method(method, 1, o.h_kv, o.d, o.d);
}

int64_t BenchProblem::query_blocks() const {
  if (!is("prefill")) return 1;
  return (row.s_kv - 1) / kPageTokens - (row.s_kv - row.s_q) / kPageTokens + 1;
}

// Compares sampled rows with the definition. What is read in 16 bit alone must agree, over the pages that were read
// where the others are skipped; FP4 has an error, not any. Reported is the error to attention over everything.
Status BenchProblem::check(const Inputs& inputs, ThreadPool* pool, std::span<const float> q, std::span<const float> out,
                           const Selection& selection) {
  const BenchOptions& o = *options_;
  const Method& method = problem.method;
  const bool all = method.budget.kind == Budget::Kind::all, prefill = is("prefill");
  const int64_t blocks = query_blocks(), heads = prefill ? o.h_q : o.h_kv, full = row.s_kv / kPageTokens;
  if (!all && std::ssize(selection.first) != o.batch * heads * blocks + 1) {
    return data_loss(fmt::format("{} over {} tokens: a selection of {} query blocks, {} are right", row.method,
                                 row.s_kv, selection.first.size() - 1, o.batch * heads * blocks));
  }

  const bool sparse = !all && method.rest == Tier::none;
  constexpr int kSamples = 8;
  struct Sum {
    double error = 0, norm = 0, some_error = 0, some_norm = 0;
  };
  std::array<Sum, kSamples> sums;
  pool->parallel_for(kSamples, [&](int64_t i, int) {
    const int64_t seq = i % o.batch, r = (i * 977) % row.s_q, head = (i * 5) % o.h_q;
    const int64_t at = ((seq * row.s_q + r) * o.h_q + head) * o.d, position = row.s_kv - row.s_q + r;
    std::vector<bool> reads(full, !sparse);
    if (sparse) {
      const int64_t block = prefill ? position / kPageTokens - (row.s_kv - row.s_q) / kPageTokens : 0;
      const int64_t b = (seq * heads + (prefill ? head : head / (o.h_q / o.h_kv))) * blocks + block;
      for (int64_t p = selection.first[b]; p < selection.first[b + 1]; ++p) reads[selection.pages[p].page] = true;
    }
    const Inputs::Row want = inputs.attention(&q[at], seq, position + 1, static_cast<int>(head), [&](int64_t token) {
      return token / kPageTokens >= full || reads[token / kPageTokens];
    });
    for (int64_t c = 0; c < o.d; ++c) {
      sums[i].error += std::pow(out[at + c] - want.all[c], 2);
      sums[i].norm += std::pow(want.all[c], 2);
      sums[i].some_error += std::pow(out[at + c] - want.some[c], 2);
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
  row.rel_err = std::sqrt(sum.error / sum.norm);
  const double error = std::sqrt(sum.some_error / sum.some_norm);
  const bool exact = method.rest != Tier::fp4 && std::none_of(selection.pages.begin(), selection.pages.end(),
                                                              [](const Promoted& p) { return p.tier != Tier::fp16; });
  // An output of zeros has an error of 1. MXFP4, whose scales are powers of two, errs by half where Q and P are in it.
  const double rounded = o.compute == "bf16" ? 2e-2 : 2e-3;  // q, k, v and p each to 8 bits, or K and V to 11
  const double limit = exact ? rounded : method.format == Fp4Format::mxfp4 ? 0.8 : 0.5;
  if (!(error <= limit)) {
    return data_loss(fmt::format("{} over {} tokens is wrong: relative error {:.2e}, at most {} is right", row.method,
                                 row.s_kv, error, limit));
  }
  return {};
}

// What must be read: every full page in its tier, the tail in 16 bit, summaries where something is computed from them,
// q, and out written; each once, whatever the kernel does. Prefill, whose query blocks choose for themselves, counts a
// page in the tiers that blocks read it in, by their shares. Codes that rank a page and are then left alone for its 16
// bit are not counted, so that a share of the bandwidth is never too large.
void BenchProblem::count(const Selection& selection, const MemoryUse& use, int io_bytes) {
  const BenchOptions& o = *options_;
  const Method& method = problem.method;
  const bool prefill = is("prefill"), rank = is("rank");
  const int64_t full = row.s_kv / kPageTokens, offset = row.s_kv - row.s_q;
  const double pages = static_cast<double>(full) * o.batch * o.h_kv;  // of all heads
  const double layers = problem.cache.layers, width = static_cast<double>(o.d) * o.h_q * o.batch;

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
  const double tail = static_cast<double>(row.s_kv % kPageTokens) * o.batch * 4.0 * o.h_kv * o.d;
  const auto in_tier = [&](Tier t) { return share[static_cast<int>(t)] * pages; };
  const bool by_codes = method.policy == Policy::fp4_mass;
  if (rank) {
    if (by_codes) row.bytes = pages * codes / 2 + tail / 2 + (method.centring ? summaries : 0);
    if (ranks_by_summaries(method.policy)) row.bytes = summaries;
    if (method.policy == Policy::oracle) row.bytes = (residual > 0 ? codes + residual : high) * pages / 2 + tail / 2;
    row.bytes += io_bytes * width * static_cast<double>(row.s_q);
  } else {
    row.bytes = in_tier(Tier::fp16) * high + in_tier(Tier::fp4x2) * (codes + residual) + in_tier(Tier::fp4) * codes +
                (by_codes ? in_tier(Tier::none) * codes / 2 : 0) + tail + summaries +
                2.0 * io_bytes * width * static_cast<double>(row.s_q);
  }
  // Pairs of a row and a key it reads, 2 d multiplications and additions for the score and as many for the value.
  const double pairs =
      static_cast<double>(row.s_q) * (static_cast<double>(row.s_kv) - (static_cast<double>(row.s_q) - 1) / 2);
  const bool by_keys = by_codes || method.policy == Policy::oracle;
  if (rank) {
    row.flops = 2 * width * (by_keys ? pairs : ranks_by_summaries(method.policy) ? pairs / kPageTokens : 0);
  } else {
    row.flops = 4 * width * pairs * (pages > 0 ? 1 - share[static_cast<int>(Tier::none)] : 1);
  }
}

}  // namespace thriftattn::cli
