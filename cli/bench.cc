// thriftattn bench attention: kernels beside their floor.
//
// Keys, values and queries are made by rule from (sequence, token, head), so that the reference can make any of them
// again and no copy beside the cache is needed. Before anything is timed, sampled rows of the result are compared with
// attention in double precision over the unquantised keys and values. Every repetition reads another layer of the
// cache; all layers hold the same, and together they exceed four times the last-level cache where memory allows.
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "commands.h"
#include "input.h"
#include "model/linear.h"
#include "progress.h"
#include "report.h"
#include "system.h"
#include "thriftattn/attention.h"

namespace thriftattn::cli {
namespace {

using Clock = std::chrono::steady_clock;
using Json = nlohmann::ordered_json;

double milliseconds_since(Clock::time_point begin) {
  return std::chrono::duration<double, std::milli>(Clock::now() - begin).count();
}

// --- inputs

enum class Input : uint64_t { query, key, value };

uint64_t mix(uint64_t x) {  // splitmix64
  x += 0x9e3779b97f4a7c15;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return x ^ (x >> 31);
}

// d channels of one head of one token, about normal. Keys have an outlier channel and the first token is a sink, as in
// models; a query leans towards the sink and towards one token, so that rows are peaked.
void make_row(Input what, int64_t seq, int64_t token, int64_t head, int64_t d, float* out) {
  uint64_t state = mix(mix(mix(static_cast<uint64_t>(what) + 1) + seq) + token) + head;
  for (int64_t c = 0; c < d; ++c) {
    state = mix(state);
    int sum = 0;  // of four uniform 16-bit numbers
    for (int i = 0; i < 4; ++i) sum += static_cast<int16_t>(state >> (16 * i));
    out[c] = static_cast<float>(sum) / 37837.0f;
  }
  if (what == Input::key) {
    out[5 % d] += 6;
    if (token == 0) out[0] += 8;
  }
  if (what == Input::query) out[0] += 2;
}

void make_rows(Input what, int64_t seq, int64_t first, int64_t tokens, int64_t heads, int64_t d, ThreadPool* pool,
               std::vector<float>* out) {
  out->resize(tokens * heads * d);
  pool->parallel_for(tokens, [&](int64_t t, int) {
    for (int64_t h = 0; h < heads; ++h) make_row(what, seq, first + t, h, d, &(*out)[(t * heads + h) * d]);
  });
}

// Attention of one query row over keys [0, visible) in double precision, as its definition reads.
std::vector<double> reference(const float* q, int64_t seq, int64_t visible, int64_t kv_head, int64_t d) {
  std::vector<float> row(d);
  std::vector<double> scores(visible), out(d);
  double largest = -INFINITY, sum = 0;
  for (int64_t t = 0; t < visible; ++t) {
    make_row(Input::key, seq, t, kv_head, d, row.data());
    double dot = 0;
    for (int64_t c = 0; c < d; ++c) dot += static_cast<double>(q[c]) * row[c];
    scores[t] = dot / std::sqrt(static_cast<double>(d));
    largest = std::max(largest, scores[t]);
  }
  for (int64_t t = 0; t < visible; ++t) {
    const double weight = std::exp(scores[t] - largest);
    sum += weight;
    make_row(Input::value, seq, t, kv_head, d, row.data());
    for (int64_t c = 0; c < d; ++c) out[c] += weight * row[c];
  }
  for (double& value : out) value /= sum;
  return out;
}

// --- what the machine can do

// Bytes read per second by all threads from a buffer that no cache holds.
Result<double> read_rate(ThreadPool* pool, int64_t bytes) {
  const int64_t tasks = 64 * pool->size(), words = bytes / 8 / tasks;
  std::unique_ptr<uint64_t[]> buffer(new (std::nothrow) uint64_t[words * tasks]);
  if (!buffer) return Status(Code::out_of_memory, fmt::format("no {} bytes left to measure reading with", bytes));
  pool->parallel_for(tasks, [&](int64_t i, int) { std::fill_n(&buffer[i * words], words, 1); });
  std::vector<uint64_t> sums(tasks);
  double best = 0;
  for (int rep = 0; rep < 5; ++rep) {
    const auto begin = Clock::now();
    pool->parallel_for(tasks, [&](int64_t i, int) {
      uint64_t sum[8] = {};
      const uint64_t* p = &buffer[i * words];
      for (int64_t w = 0; w + 8 <= words; w += 8) {
        for (int k = 0; k < 8; ++k) sum[k] += p[w + k];
      }
      for (const uint64_t s : sum) sums[i] += s;
    });
    best = std::max(best, static_cast<double>(words * tasks * 8) / milliseconds_since(begin) / 1e6);
  }
  if (sums[0] == 0) return data_loss("the buffer to measure reading with lost its content");
  return best;
}

// GFLOP/s of oneDNN's F32 product: what this processor's FMA units give to well-made code.
Result<double> matrix_rate(ThreadPool* pool) {
  const int64_t n = 2048, rows = 1024;
  const std::vector<float> w(n * n, 0.5f), x(rows * n, 0.25f);
  model::Tensor tensor;
  tensor.name = "bench";
  tensor.dtype_name = "F32";
  tensor.shape = {n, n};
  tensor.data = reinterpret_cast<const unsigned char*>(w.data());
  tensor.bytes = n * n * 4;
  THRIFTATTN_ASSIGN_OR_RETURN(product, model::Linear::create({&tensor, 1}, {}, model::Compute::f32, *pool));
  std::vector<float> y(rows * n);
  double best = 0;
  for (int rep = 0; rep < 5; ++rep) {
    const auto begin = Clock::now();
    THRIFTATTN_RETURN_IF_ERROR(product.apply(x.data(), rows, y.data(), *pool));
    best = std::max(best, 2.0 * static_cast<double>(rows * n * n) / milliseconds_since(begin) / 1e6);
  }
  return best;
}

// --- one row of the table

struct Timing {
  int64_t s_q = 0, s_kv = 0;
  std::string method, target;
  double median = 0, least = 0, most = 0;  // milliseconds
  double bytes = 0, flops = 0;             // of the problem, whatever the kernel does
  double rel_err = 0;
  int layers = 1;     // copies of the cache that were rotated over
  bool cold = false;  // together beyond four times the last-level cache
};

void take_times(std::vector<double> times, Timing* row) {
  std::sort(times.begin(), times.end());
  row->median = times[times.size() / 2];
  row->least = times.front();
  row->most = times.back();
}

struct Bench {
  const BenchOptions& options;
  Machine machine;
  ThreadPool* pool;
  int64_t last_level = 0;  // bytes of the last-level cache; 0 = unknown
  Progress* progress;

  Result<Timing> run(const Method& method, int64_t s_kv);

 private:
  Status fill(KvCache* cache, std::span<const SeqId> seqs, int64_t s_kv, std::vector<double>* times);
  Status check(const Timing& row, const Method& method, std::span<const float> q, std::span<const float> out,
               double* rel_err) const;
};

// Appends s_kv tokens of every sequence to every layer; the milliseconds of each full step.
Status Bench::fill(KvCache* cache, std::span<const SeqId> seqs, int64_t s_kv, std::vector<double>* times) {
  const BenchOptions& o = options;
  const int64_t step = std::min(s_kv, o.s_q > 0 ? o.s_q : 512);
  std::vector<float> k, v;
  for (size_t s = 0; s < seqs.size(); ++s) {
    for (int64_t t = 0; t < s_kv; t += step) {
      const int64_t n = std::min(step, s_kv - t);
      make_rows(Input::key, static_cast<int64_t>(s), t, n, o.h_kv, o.d, pool, &k);
      make_rows(Input::value, static_cast<int64_t>(s), t, n, o.h_kv, o.d, pool, &v);
      for (int layer = 0; layer < cache->config().layers; ++layer) {
        const auto begin = Clock::now();
        THRIFTATTN_RETURN_IF_ERROR(
            cache->append(seqs[s], layer, view(k.data(), n, o.h_kv, o.d), view(v.data(), n, o.h_kv, o.d), *pool));
        THRIFTATTN_RETURN_IF_ERROR(cache->settle(seqs[s], layer));
        if (times && n == step) times->push_back(milliseconds_since(begin));
      }
      if (!progress->update(static_cast<double>(t) / static_cast<double>(s_kv))) {
        return Status(Code::cancelled, "cancelled");
      }
    }
  }
  return {};
}

// Compares sampled rows with the definition. What is read in 16 bit alone must agree; FP4 has an error, not any.
Status Bench::check(const Timing& row, const Method& method, std::span<const float> q, std::span<const float> out,
                    double* rel_err) const {
  const BenchOptions& o = options;
  double error = 0, norm = 0;
  for (int64_t sample = 0; sample < 8; ++sample) {
    const int64_t seq = sample % o.batch, r = (sample * 977) % row.s_q, head = (sample * 5) % o.h_q;
    const int64_t at = ((seq * row.s_q + r) * o.h_q + head) * o.d;
    const auto want = reference(&q[at], seq, row.s_kv - row.s_q + r + 1, head / (o.h_q / o.h_kv), o.d);
    for (int64_t c = 0; c < o.d; ++c) {
      error += (out[at + c] - want[c]) * (out[at + c] - want[c]);
      norm += want[c] * want[c];
    }
  }
  *rel_err = std::sqrt(error / norm);
  const bool sparse = method.rest == Tier::none && method.budget.kind != Budget::Kind::all;
  const double exact = o.compute == "bf16" ? 2e-2 : 2e-3;
  const double limit = method.budget.kind == Budget::Kind::all ? exact : sparse ? INFINITY : 0.5;
  if (*rel_err <= limit) return {};
  return data_loss(fmt::format("{} over {} tokens is wrong: relative error {:.2e}, at most {} is right",
                               to_string(method), row.s_kv, *rel_err, limit));
}

Result<Timing> Bench::run(const Method& method, int64_t s_kv) {
  const BenchOptions& o = options;
  const bool prefill = o.phase == "prefill", append = o.phase == "append", rank = o.phase == "rank";
  Timing row;
  row.s_kv = s_kv;
  row.s_q = prefill || append ? std::min(s_kv, o.s_q > 0 ? o.s_q : 512) : 1;
  row.method = to_string(method);

  // One layer tells what a layer takes; then as many as exceed the last-level cache four times.
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
  THRIFTATTN_ASSIGN_OR_RETURN(chosen, plan(problem, machine));
  row.target = chosen.target;
  const Method& resolved = chosen.problem.method;
  if (rank && (resolved.policy == Policy::none || resolved.budget.kind == Budget::Kind::all)) {
    return invalid_argument(fmt::format("method {} ranks no pages: it has nothing to time in phase rank", row.method));
  }
  const double rough = 4.0 * static_cast<double>(o.batch * s_kv) * o.h_kv * o.d;  // of a layer in 16 bit
  const double wanted = 4.0 * static_cast<double>(last_level), room = 0.5 * static_cast<double>(memory().available);
  config.layers = static_cast<int>(
      std::clamp(std::min(std::ceil(4 * wanted / rough), std::floor(room / (1.5 * rough))), 1.0, append ? 1.0 : 64.0));
  problem.cache = config;
  THRIFTATTN_ASSIGN_OR_RETURN(p, plan(problem, machine));

  progress->begin(fmt::format("{}, {} tokens: filling {} layers", row.method, s_kv, config.layers));
  THRIFTATTN_ASSIGN_OR_RETURN(cache, KvCache::create(config));
  std::vector<SeqId> seqs;
  for (int b = 0; b < o.batch; ++b) seqs.push_back(cache.new_sequence());
  std::vector<double> times;
  THRIFTATTN_RETURN_IF_ERROR(fill(&cache, seqs, s_kv, append ? &times : nullptr));
  const MemoryUse use = cache.bytes();
  const double layers = config.layers, total = static_cast<double>(use.total());
  row.layers = config.layers;
  row.cold = last_level > 0 && total >= wanted;
  const double width = static_cast<double>(o.d) * o.h_q * o.batch;

  if (append) {
    take_times(std::move(times), &row);
    const double share = static_cast<double>(row.s_q) / static_cast<double>(s_kv) / o.batch;
    row.bytes = 8.0 * static_cast<double>(row.s_q) * o.h_kv * o.d + total * share;  // F32 in, the stored forms out
    std::vector<float> k(s_kv * o.h_kv * o.d), v(k.size()), want(o.d);
    THRIFTATTN_RETURN_IF_ERROR(cache.read(seqs[0], 0, 0, mutable_view(k.data(), s_kv, o.h_kv, o.d),
                                          mutable_view(v.data(), s_kv, o.h_kv, o.d)));
    double error = 0, norm = 0;
    for (int64_t t = 0; t < s_kv; ++t) {
      make_row(Input::key, 0, t, 0, o.d, want.data());
      for (int64_t c = 0; c < o.d; ++c) {
        error += std::pow(k[t * o.h_kv * o.d + c] - want[c], 2);
        norm += std::pow(want[c], 2);
      }
    }
    row.rel_err = std::sqrt(error / norm);
    if (row.rel_err <= 0.3) return row;
    return data_loss(
        fmt::format("{}: what was appended reads back with relative error {:.2e}", row.method, row.rel_err));
  }

  THRIFTATTN_ASSIGN_OR_RETURN(workspace, Workspace::create(p));
  std::vector<float> q, one;
  for (int b = 0; b < o.batch; ++b) {
    make_rows(Input::query, b, s_kv - row.s_q, row.s_q, o.h_q, o.d, pool, &one);
    q.insert(q.end(), one.begin(), one.end());
  }
  std::vector<float> out(q.size());
  const std::vector<int64_t> s_q(o.batch, row.s_q);
  Stats stats;
  AttendArgs args;
  args.cache = &cache;
  args.seqs = seqs;
  args.s_q = s_q;
  args.q = view(q.data(), o.batch * row.s_q, o.h_q, o.d);
  args.out = mutable_view(out.data(), o.batch * row.s_q, o.h_q, o.d);
  args.stats = &stats;
  THRIFTATTN_RETURN_IF_ERROR(thriftattn::run(p, workspace, *pool, args));
  THRIFTATTN_RETURN_IF_ERROR(check(row, resolved, q, out, &row.rel_err));
  args.stats = nullptr;
  progress->begin(fmt::format("{}, {} tokens: {} repetitions", row.method, s_kv, o.reps));
  for (int rep = 0; rep <= o.reps; ++rep) {
    args.layer = rep % config.layers;
    const auto begin = Clock::now();
    if (rank) {
      THRIFTATTN_ASSIGN_OR_RETURN(selection, select(p, workspace, *pool, args));
      if (selection.first.empty()) return data_loss("a selection has no blocks");
    } else {
      THRIFTATTN_RETURN_IF_ERROR(thriftattn::run(p, workspace, *pool, args));
    }
    if (rep > 0) times.push_back(milliseconds_since(begin));  // the first one faults pages in
    if (!progress->update(rep / (o.reps + 1.0))) return Status(Code::cancelled, "cancelled");
  }
  take_times(std::move(times), &row);

  // What must be read: every full page in its tier, the tail in 16 bit, q in and out; prefill reads it once, whatever
  // the kernel does. Forced pages are read in 16 bit where they are stored so.
  const double sequences = o.batch, pages = static_cast<double>(s_kv / kPageTokens) * sequences;
  const double token = 4.0 * o.h_kv * o.d;                                               // K and V in 16 bit
  const double codes = pages > 0 ? static_cast<double>(use.codes) / layers / pages : 0;  // of a page, as the next one
  const double residual = pages > 0 ? static_cast<double>(use.residual) / layers / pages : 0;
  const double summaries = static_cast<double>(use.summaries) / layers;
  const bool fp4 = resolved.rest == Tier::fp4;
  double promoted = stats.pairs ? pages * static_cast<double>(stats.promoted) / static_cast<double>(stats.pairs) : 0;
  if (resolved.budget.kind == Budget::Kind::all) promoted = pages;
  const bool whole = resolved.storage == Storage::high_only || resolved.storage == Storage::dual;
  const double high =
      whole ? promoted : std::min(promoted, sequences * (resolved.force.sink + resolved.force.previous));
  if (rank) {
    row.bytes = resolved.policy == Policy::fp4_mass ? pages * codes / 2 : summaries;
  } else {
    row.bytes = high * kPageTokens * token + (promoted - high) * (codes + residual) +
                (fp4 ? (pages - promoted) * codes : 0) + static_cast<double>(s_kv % kPageTokens) * sequences * token +
                summaries;
  }
  row.bytes += 8.0 * width * static_cast<double>(row.s_q);
  // Pairs of a row and a key it sees, 2 d multiplications and additions for the score and as many for the value.
  const double seen =
      static_cast<double>(row.s_q) * (static_cast<double>(s_kv) - (static_cast<double>(row.s_q) - 1) / 2);
  const double ranked = resolved.policy == Policy::fp4_mass ? seen : seen / kPageTokens;
  row.flops = rank ? 2 * width * ranked : 4 * width * seen;
  return row;
}

}  // namespace

Status bench_attention(const BenchOptions& o) {
  THRIFTATTN_RETURN_IF_ERROR(check_writable(o.json, {}));
  const bool appended = o.phase == "append";
  if (o.s_q > 0 && !appended && o.phase != "prefill") {
    return invalid_argument(
        fmt::format("--s-q {}: phase {} takes one row: prefill and append take more", o.s_q, o.phase));
  }
  std::vector<Method> methods;
  for (const std::string& spec : o.methods) {
    THRIFTATTN_ASSIGN_OR_RETURN(method, one_method(spec));
    methods.push_back(method);
  }
  if (o.h_q % o.h_kv != 0) return invalid_argument(fmt::format("h_q {} is not a multiple of h_kv {}", o.h_q, o.h_kv));
  ThreadPool pool(o.threads);
  Machine machine = Machine::here(pool.size());
  if (!o.target.empty()) {
    if (std::find(machine.targets.begin(), machine.targets.end(), o.target) == machine.targets.end()) {
      return invalid_argument(
          fmt::format("target '{}' does not run here: {} do", o.target, fmt::join(machine.targets, ", ")));
    }
    machine.targets = {o.target};
  }
  int64_t last_level = 0;
  for (const CpuCache& c : cpu_caches()) last_level = std::max(last_level, c.bytes);

  Progress progress;
  progress.begin("measuring the machine");
  const int64_t buffer = std::min(int64_t{2} << 30, memory().available / 4);
  THRIFTATTN_ASSIGN_OR_RETURN(read_gb, read_rate(&pool, buffer));
  THRIFTATTN_ASSIGN_OR_RETURN(gflops, matrix_rate(&pool));
  Bench bench{o, machine, &pool, last_level, &progress};
  std::vector<Timing> rows;
  for (const int64_t s_kv : o.s_kv) {
    for (const Method& method : methods) {
      THRIFTATTN_ASSIGN_OR_RETURN(row, bench.run(method, s_kv));
      rows.push_back(std::move(row));
    }
  }
  progress.clear();

  const MachineInfo info = machine_info();
  Json json{{"schema", "thriftattn.bench/1"}, {"version", THRIFTATTN_VERSION}};
  json["machine"] = {{"cpu", info.cpu},
                     {"cores", info.cores},
                     {"threads", pool.size()},
                     {"compiler", info.compiler},
                     {"last_level_cache", last_level},
                     {"read_gb_per_s", read_gb},
                     {"read_buffer", buffer},
                     {"matrix_gflops", gflops}};
  std::string text = fmt::format("{}, batch {}, {} query and {} KV heads of {}; {} threads on {}\n", o.phase, o.batch,
                                 o.h_q, o.h_kv, o.d, pool.size(), info.cpu);
  text += fmt::format("measured here: reading {:.1f} GB/s over {:.1f} GB, F32 products {:.0f} GFLOP/s\n\n", read_gb,
                      static_cast<double>(buffer) / 1e9, gflops);
  std::vector<std::vector<std::string>> lines{{"method", "s_q", "s_kv", "target", "ms", "min", "max", "MB", "GB/s",
                                               "% of read", "GFLOP/s", "% of matrix", "rel err"}};
  bool warm = false;
  for (const Timing& r : rows) {
    const double gb = r.bytes / r.median / 1e6, gf = r.flops / r.median / 1e6;
    json["rows"].push_back({{"phase", o.phase},
                            {"s_q", r.s_q},
                            {"s_kv", r.s_kv},
                            {"batch", o.batch},
                            {"h_q", o.h_q},
                            {"h_kv", o.h_kv},
                            {"d", o.d},
                            {"method", r.method},
                            {"target", r.target},
                            {"threads", pool.size()},
                            {"ms_median", r.median},
                            {"ms_min", r.least},
                            {"ms_max", r.most},
                            {"bytes", r.bytes},
                            {"flops", r.flops},
                            {"gb_per_s", gb},
                            {"pct_of_read_bandwidth", 100 * gb / read_gb},
                            {"pct_of_matrix_peak", 100 * gf / gflops},
                            {"rel_err", r.rel_err},
                            {"layers", r.layers},
                            {"cold", r.cold}});
    warm |= !r.cold && !appended;
    lines.push_back({r.method + (r.cold || appended ? "" : " *"), fmt::format("{}", r.s_q), fmt::format("{}", r.s_kv),
                     r.target, fmt::format("{:.3f}", r.median), fmt::format("{:.3f}", r.least),
                     fmt::format("{:.3f}", r.most), fmt::format("{:.1f}", r.bytes / 1e6), fmt::format("{:.1f}", gb),
                     fmt::format("{:.1f}", 100 * gb / read_gb), appended ? "-" : fmt::format("{:.1f}", gf),
                     appended ? "-" : fmt::format("{:.1f}", 100 * gf / gflops), fmt::format("{:.1e}", r.rel_err)});
  }
  text += align(lines);
  text +=
      fmt::format("\nms: median of {}; {}\n", appended ? "all appends of s_q tokens" : fmt::format("--reps {}", o.reps),
                  appended ? "MB: what must be read and written; rel err: of the keys read back"
                           : "MB: what the problem must read; rel err: of sampled rows to attention in double");
  if (warm) text += "* the caches it rotates over are not four times the last-level cache: parts of them stay in it\n";
  if (o.json == "-") {
    fmt::print("{}\n", json.dump(1));
    return {};
  }
  if (!o.json.empty()) THRIFTATTN_RETURN_IF_ERROR(write_atomically(o.json, json.dump(1) + "\n"));
  fmt::print("{}", text);
  return {};
}

Command add_bench(CLI::App* app) {
  auto o = std::make_shared<BenchOptions>();
  CLI::App* bench = app->add_subcommand("bench", "how long it takes, beside what the machine could do");
  bench->require_subcommand(1);
  CLI::App* command = bench->add_subcommand("attention", "attention over a cache");
  const auto tokens = CLI::Range(int64_t{1}, int64_t{1} << 24);
  command->add_option("--phase", o->phase, "decode, prefill, append or rank (the selection alone)")
      ->check(CLI::IsMember({"decode", "prefill", "append", "rank"}))
      ->capture_default_str();
  command->add_option("--s-kv", o->s_kv, "tokens of a sequence")->check(tokens)->capture_default_str();
  command->add_option("--s-q", o->s_q, "rows of a prefill, tokens of an append, up to --s-kv; default 512")
      ->check(tokens);
  command->add_option("--batch", o->batch, "sequences")->check(CLI::Range(1, 4096))->capture_default_str();
  command->add_option("--h-q", o->h_q, "query heads")->check(CLI::Range(1, 4096))->capture_default_str();
  command->add_option("--h-kv", o->h_kv, "KV heads")->check(CLI::Range(1, 1024))->capture_default_str();
  command->add_option("--d", o->d, "channels of a head")->check(CLI::Range(1, 4096))->capture_default_str();
  const CLI::Option* method =
      command->add_option("--method", o->methods, "name[:key=value,...]; rank: thrift alone")->capture_default_str();
  command->add_option("--threads", o->threads, "0 = all processors")->check(CLI::Range(0, 1024))->capture_default_str();
  command->add_option("--target", o->target, "instruction set, as doctor lists them; default the best");
  command
      ->add_option("--compute", o->compute, "f32, or bf16: prefill may round q, k, v and p, as matrix tiles (AMX) need")
      ->check(CLI::IsMember({"f32", "bf16"}))
      ->capture_default_str();
  command->add_option("--reps", o->reps, "repetitions of all phases but append")
      ->check(CLI::Range(1, 10000))
      ->capture_default_str();
  command->add_option("--json", o->json, "write all figures to this file; - = to stdout, instead of the table");
  command->footer(
      "Example: thriftattn bench attention --phase decode --s-kv 16384 131072 --method fp16 fp4 thrift --json "
      "out.json");
  bench->footer("Example: thriftattn bench attention --phase decode --s-kv 16384");
  return {command, [o, method] {
            if (method->empty() && o->phase == "rank") o->methods = {"thrift"};
            return bench_attention(*o);
          }};
}

}  // namespace thriftattn::cli
