// thriftattn bench attention: kernels beside their floor.
//
// Before anything is timed, sampled rows of the result are compared with attention in double precision over the
// unquantised keys and values. Every repetition reads another layer of the cache; all layers hold the same, and
// together they exceed four times the last-level cache where memory allows. What the machine can do is measured before,
// between and after, since machines have phases of minutes; --rounds spreads them over all methods alike.
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <memory>
#include <nlohmann/json.hpp>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "bench_run.h"
#include "commands.h"
#include "cuda/bench_gpu.h"
#include "input.h"
#include "progress.h"
#include "rates.h"
#include "report.h"
#include "system.h"

namespace thriftattn::cli {
namespace {

using Json = nlohmann::ordered_json;

double mean(const std::vector<double>& values) {
  return std::accumulate(values.begin(), values.end(), 0.0) / static_cast<double>(values.size());
}

std::string spread(const std::vector<double>& values, int digits) {
  const auto [low, high] = std::minmax_element(values.begin(), values.end());
  return fmt::format("{:.{}f} ({:.{}f} to {:.{}f})", mean(values), digits, *low, digits, *high, digits);
}

// Times the rows of one length, methods in turn in every round. Their caches stay filled from round to round where
// memory holds them all; otherwise each is filled again.
Status run_rounds(const Bench& bench, std::span<BenchRow> rows, Rates* rates) {
  const double needed = std::accumulate(rows.begin(), rows.end(), 0.0,
                                        [](double sum, const BenchRow& row) { return sum + row.cache_bytes(); });
  const bool keep = bench.options.rounds > 1 && needed <= 0.5 * static_cast<double>(memory().available);
  for (int round = 0; round < bench.options.rounds; ++round) {
    for (BenchRow& row : rows) {
      THRIFTATTN_RETURN_IF_ERROR(row.prepare());
      THRIFTATTN_RETURN_IF_ERROR(row.measure());
      if (!keep) row.release();
    }
    bench.progress->begin("measuring the machine");
    THRIFTATTN_RETURN_IF_ERROR(rates->measure());
  }
  for (BenchRow& row : rows) row.release();
  return {};
}

Json machine_json(const Bench& bench, const Rates& rates) {
  const MachineInfo info = machine_info();
  return {{"cpu", info.cpu},
          {"cores", info.cores},
          {"threads", bench.pool->size()},
          {"compiler", info.compiler},
          {"last_level_cache", bench.last_level},
          {"read_gb_per_s", mean(rates.read())},
          {"read_gb_per_s_samples", rates.read()},
          {"read_buffer", rates.read_bytes()},
          {"matrix_gflops", mean(rates.matrix())},
          {"matrix_gflops_samples", rates.matrix()},
          {"matrix_compute", bench.options.compute}};
}

Json row_json(const Bench& bench, const Timing& r, double read_gb, double gflops) {
  const BenchOptions& o = bench.options;
  const double gb = r.bytes / r.median / 1e6, gf = r.flops / r.median / 1e6;
  Json row{{"phase", o.phase},
           {"s_q", r.s_q},
           {"s_kv", r.s_kv},
           {"batch", o.batch},
           {"h_q", o.h_q},
           {"h_kv", o.h_kv},
           {"d", o.d},
           {"compute", o.compute},
           {"method", r.method},
           {"target", r.target},
           {"threads", bench.pool->size()},
           {"ms_median", r.median},
           {"ms_min", r.least},
           {"ms_max", r.most},
           {"ms_by_round", r.by_round},
           {"bytes", r.bytes},
           {"flops", r.flops},
           {"gb_per_s", gb},
           {"pct_of_read_bandwidth", 100 * gb / read_gb},
           {"pct_of_matrix_peak", 100 * gf / gflops},
           {"rel_err", r.rel_err},
           {"layers", r.layers},
           {"cold", r.cold}};
  if (o.phase == "append") row["ms_fresh"] = r.fresh;
  return row;
}

std::string table(const Bench& bench, const Rates& rates, std::span<const Timing> rows) {
  const BenchOptions& o = bench.options;
  const bool append = o.phase == "append";
  const double read_gb = mean(rates.read()), gflops = mean(rates.matrix());
  std::string text = fmt::format("{}, batch {}, {} query and {} KV heads of {}; {} threads on {}\n", o.phase, o.batch,
                                 o.h_q, o.h_kv, o.d, bench.pool->size(), machine_info().cpu);
  text += fmt::format("measured here {} times: reading {} GB/s over {:.1f} GB, {} products {} GFLOP/s\n\n",
                      rates.read().size(), spread(rates.read(), 1), static_cast<double>(rates.read_bytes()) / 1e9,
                      o.compute == "bf16" ? "BF16" : "F32", spread(rates.matrix(), 0));
  std::vector<std::vector<std::string>> lines{
      {"method", "s_q", "s_kv", "target", "ms", "min", "max", "MB", "GB/s", "% of read"}};
  const auto more = [&lines](std::vector<std::string> cells) {
    for (std::string& cell : cells) lines.back().push_back(std::move(cell));
  };
  more(append ? std::vector<std::string>{"fresh ms", "rel err"}
              : std::vector<std::string>{"GFLOP/s", "% of matrix", "rel err"});
  bool warm = false;
  for (const Timing& r : rows) {
    const double gb = r.bytes / r.median / 1e6, gf = r.flops / r.median / 1e6;
    const bool star = !r.cold && !append;
    warm |= star;
    lines.push_back({r.method + (star ? " *" : ""), fmt::format("{}", r.s_q), fmt::format("{}", r.s_kv), r.target,
                     fmt::format("{:.3f}", r.median), fmt::format("{:.3f}", r.least), fmt::format("{:.3f}", r.most),
                     fmt::format("{:.1f}", r.bytes / 1e6), fmt::format("{:.1f}", gb),
                     fmt::format("{:.1f}", 100 * gb / read_gb)});
    if (append) {
      more({fmt::format("{:.3f}", r.fresh)});
    } else {
      more({fmt::format("{:.1f}", gf), fmt::format("{:.1f}", 100 * gf / gflops)});
    }
    more({fmt::format("{:.1e}", r.rel_err)});
  }
  text += align(lines);
  text += fmt::format("\nms: median of {}{}; {}\n", o.rounds > 1 ? fmt::format("--rounds {} of ", o.rounds) : "",
                      append ? "all appends of s_q tokens, to records that a freed sequence gave back"
                             : fmt::format("--reps {}", o.reps),
                      append ? "fresh ms: the same on memory\nthat the system has just given; MB: what must be read "
                               "and written; rel err: of "
                               "the keys read back"
                             : "MB: what the problem must read; rel err: of sampled rows to attention in double");
  if (warm) text += "* the caches it rotates over are not four times the last-level cache: parts of them stay in it\n";
  return text;
}

}  // namespace

Status bench_attention(const BenchOptions& o) {
  THRIFTATTN_RETURN_IF_ERROR(check_writable(o.json, {}));
  if (o.s_q > kMaxDecodeRows && (o.phase == "decode" || o.phase == "rank")) {
    return invalid_argument(fmt::format("--s-q {}: phase {} takes up to {} rows: prefill and append take more", o.s_q,
                                        o.phase, kMaxDecodeRows));
  }
  std::vector<Method> methods;
  for (const std::string& spec : o.methods) {
    THRIFTATTN_ASSIGN_OR_RETURN(method, one_method(spec));
    methods.push_back(method);
  }
  if (o.h_q % o.h_kv != 0) return invalid_argument(fmt::format("h_q {} is not a multiple of h_kv {}", o.h_q, o.h_kv));
  THRIFTATTN_ASSIGN_OR_RETURN(gpu, parse_device(o.device));
  if (gpu) {
    if (!o.target.empty())
      return invalid_argument(
          fmt::format("--target {}: instruction sets are the CPU's, not of --device {}", o.target, o.device));
    return bench_attention_gpu(o, *gpu);
  }
  ThreadPool pool(o.threads);
  Machine machine = Machine::here(pool.size());
  if (!o.target.empty()) {
    if (o.phase == "append") {
      return invalid_argument(
          fmt::format("--target {}: phase append runs on the best instruction set alone", o.target));
    }
    if (std::find(machine.targets.begin(), machine.targets.end(), o.target) == machine.targets.end()) {
      return invalid_argument(
          fmt::format("target '{}' does not run here: {} do", o.target, fmt::join(machine.targets, ", ")));
    }
    machine.targets = {o.target};
  }
  int64_t last_level = 0;
  for (const CpuCache& c : cpu_caches()) last_level = std::max(last_level, c.bytes);

  Progress progress;
  Bench bench{o, machine, &pool, &progress, Inputs(o.h_q, o.h_kv, o.d), last_level, {}};
  std::vector<BenchRow> rows;  // lengths one after another
  for (const int64_t s_kv : o.s_kv) {
    for (const Method& method : methods) {
      THRIFTATTN_ASSIGN_OR_RETURN(row, BenchRow::create(&bench, method, s_kv));
      rows.push_back(std::move(row));
    }
  }
  progress.begin("measuring the machine");
  Rates rates(&pool, o.compute == "bf16" ? model::Compute::bf16 : model::Compute::f32);
  THRIFTATTN_RETURN_IF_ERROR(rates.measure());
  for (size_t i = 0; i < rows.size(); i += methods.size()) {
    THRIFTATTN_RETURN_IF_ERROR(run_rounds(bench, std::span(rows).subspan(i, methods.size()), &rates));
  }
  progress.clear();

  std::vector<Timing> timings;
  Json json{{"schema", "thriftattn.bench/1"}, {"version", THRIFTATTN_VERSION}};
  json["machine"] = machine_json(bench, rates);
  json["rounds"] = o.rounds;
  json["reps"] = o.reps;
  for (const BenchRow& row : rows) {
    timings.push_back(row.timing());
    json["rows"].push_back(row_json(bench, timings.back(), mean(rates.read()), mean(rates.matrix())));
  }
  if (o.json == "-") {
    fmt::print("{}\n", json.dump(1));
    return {};
  }
  if (!o.json.empty()) THRIFTATTN_RETURN_IF_ERROR(write_atomically(o.json, json.dump(1) + "\n"));
  fmt::print("{}", table(bench, rates, timings));
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
  command
      ->add_option("--s-q", o->s_q,
                   "rows of a prefill, tokens of an append: default 512; decode and rank: up to 16, default 1")
      ->check(tokens);
  command->add_option("--batch", o->batch, "sequences")->check(CLI::Range(1, 4096))->capture_default_str();
  command->add_option("--h-q", o->h_q, "query heads")->check(CLI::Range(1, 4096))->capture_default_str();
  command->add_option("--h-kv", o->h_kv, "KV heads")->check(CLI::Range(1, 1024))->capture_default_str();
  command->add_option("--d", o->d, "channels of a head")->check(CLI::Range(1, 4096))->capture_default_str();
  const CLI::Option* method =
      command->add_option("--method", o->methods, "name[:key=value,...]; rank: thrift alone")->capture_default_str();
  command->add_option("--device", o->device, "cpu, or cuda or cuda:N: a GPU")->capture_default_str();
  command->add_option("--threads", o->threads, "0 = all processors")->check(CLI::Range(0, 1024))->capture_default_str();
  command->add_option("--target", o->target, "instruction set, as doctor lists them; default the best");
  command
      ->add_option("--compute", o->compute, "f32, or bf16: prefill may round q, k, v and p, as matrix tiles (AMX) need")
      ->check(CLI::IsMember({"f32", "bf16"}))
      ->capture_default_str();
  command->add_option("--reps", o->reps, "repetitions of all phases but append")
      ->check(CLI::Range(1, 10000))
      ->capture_default_str();
  command
      ->add_option("--rounds", o->rounds, "repeat all methods so many times, in turn: slow phases then meet all alike")
      ->check(CLI::Range(1, 1000))
      ->capture_default_str();
  add_json(command, &o->json);
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
