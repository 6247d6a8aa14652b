// thriftattn doctor: what this machine has, which kernels a problem gets here, and what each storage costs.
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <CLI/CLI.hpp>
#include <cstdio>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "commands.h"
#include "input.h"
#include "model/model.h"
#include "report.h"
#include "system.h"
#include "thriftattn/attention.h"

namespace thriftattn::cli {
namespace {

using Json = nlohmann::ordered_json;

constexpr const char* kStorages[] = {"high_only", "dual", "residual", "fp4_only"};

// Bytes of a cache of one layer that holds `tokens` tokens.
Result<int64_t> bytes_held(const CacheConfig& config, int64_t tokens) {
  THRIFTATTN_ASSIGN_OR_RETURN(cache, KvCache::create(config));
  ThreadPool pool(1);
  const SeqId seq = cache.new_sequence();
  const int64_t step = kPageTokens;
  const std::vector<float> zeros(step * config.h_kv * std::max(config.d, config.d_v));
  for (int64_t t = 0; t < tokens; t += step) {
    THRIFTATTN_RETURN_IF_ERROR(cache.append(seq, 0, view(zeros.data(), step, config.h_kv, config.d),
                                            view(zeros.data(), step, config.h_kv, config.d_v), pool));
    THRIFTATTN_RETURN_IF_ERROR(cache.settle(seq, 0));
  }
  return cache.bytes().total();
}

struct Cost {
  std::string storage;
  double per_token = 0;  // bytes of a token more, all layers
  int64_t total = 0;     // bytes at s_kv tokens, all layers
};

// Measured on two small caches: from a few pages on, each page more takes the same.
Result<Cost> cost_of(const char* storage, const DoctorOptions& o) {
  const char* name = std::string_view(storage) == "fp4_only" ? "fp4" : "thrift";
  THRIFTATTN_ASSIGN_OR_RETURN(
      method,
      parse_method(std::string_view(storage) == "high_only" ? "fp16" : fmt::format("{}:storage={}", name, storage)));
  const CacheConfig config = CacheConfig::for_method(method, 1, o.h_kv, o.d, o.d);
  const int64_t few = 16 * kPageTokens, more = 32 * kPageTokens;
  THRIFTATTN_ASSIGN_OR_RETURN(a, bytes_held(config, few));
  THRIFTATTN_ASSIGN_OR_RETURN(b, bytes_held(config, more));
  Cost cost;
  cost.storage = storage;
  cost.per_token = static_cast<double>(b - a) / static_cast<double>(more - few) * o.layers;
  cost.total =
      static_cast<int64_t>(static_cast<double>(a) * o.layers + cost.per_token * static_cast<double>(o.s_kv - few));
  return cost;
}

double gib(int64_t bytes) { return static_cast<double>(bytes) / (1 << 30); }

}  // namespace

Status doctor(const DoctorOptions& o) {
  THRIFTATTN_ASSIGN_OR_RETURN(method, one_method(o.method));
  const MachineInfo info = machine_info();
  const int threads = ThreadPool(o.threads).size();
  const Machine machine = Machine::here(threads);
  const std::vector<CpuCache> caches = cpu_caches();
  const std::vector<std::string> features = cpu_features();
  const Memory held = memory();

  Problem problem;
  problem.b = o.batch;
  problem.max_s_kv = o.s_kv;
  problem.h_q = o.h_q;
  problem.h_kv = o.h_kv;
  problem.d = problem.d_v = o.d;
  problem.method = method;
  problem.cache = CacheConfig::for_method(method, 1, o.h_kv, o.d, o.d);
  std::vector<std::pair<const char*, Result<Plan>>> plans;
  for (const Phase phase : {Phase::prefill, Phase::decode}) {
    problem.phase = phase;
    problem.max_s_q = phase == Phase::prefill ? o.s_kv : 1;
    plans.emplace_back(phase == Phase::prefill ? "prefill" : "decode", plan(problem, machine));
  }
  for (const auto& [name, chosen] : plans) {  // nonsense is the user's error; what only no backend serves is shown
    if (!chosen.ok() && chosen.status().code() == Code::invalid_argument) return chosen.status();
  }
  std::vector<Cost> costs;
  for (const char* storage : kStorages) {
    THRIFTATTN_ASSIGN_OR_RETURN(cost, cost_of(storage, o));
    costs.push_back(std::move(cost));
  }

  if (o.json) {
    Json json{{"schema", "thriftattn.doctor/1"}, {"version", THRIFTATTN_VERSION}};
    json["machine"] = {{"cpu", info.cpu},
                       {"cores", info.cores},
                       {"threads", threads},
                       {"compiler", info.compiler},
                       {"features", features},
                       {"targets", machine.targets},
                       {"products", model::product_isa()},
                       {"native_bf16", model::has_native_bf16()},
                       {"memory_total", held.total},
                       {"memory_available", held.available}};
    json["machine"]["caches"] = Json::array();
    for (const CpuCache& c : caches) {
      json["machine"]["caches"].push_back({{"level", c.level}, {"type", c.type}, {"bytes", c.bytes}});
    }
    json["problem"] = {{"method", to_string(method)},
                       {"batch", o.batch},
                       {"h_q", o.h_q},
                       {"h_kv", o.h_kv},
                       {"d", o.d},
                       {"s_kv", o.s_kv},
                       {"layers", o.layers}};
    for (const auto& [name, chosen] : plans) {
      Json& row = json["plans"][name];
      if (!chosen.ok()) {
        row = {{"refused", chosen.status().message()}};
        continue;
      }
      row = {{"backend", chosen->backend}, {"kernel", chosen->kernel},   {"target", chosen->target},
             {"splits", chosen->splits},   {"threads", chosen->threads}, {"workspace_bytes", chosen->workspace_bytes},
             {"refused", Json::array()}};
      for (const Refusal& r : chosen->refused) row["refused"].push_back({{"backend", r.backend}, {"reason", r.reason}});
    }
    for (const Cost& c : costs) {
      json["storage"].push_back({{"storage", c.storage}, {"bytes_per_token", c.per_token}, {"bytes", c.total}});
    }
    fmt::print("{}\n", json.dump(1));
    return {};
  }

  std::string cache_text;
  for (const CpuCache& c : caches) {
    if (c.type != "Instruction")
      cache_text += fmt::format("{}L{} {} KiB", cache_text.empty() ? "" : ", ", c.level, c.bytes >> 10);
  }
  fmt::print("cpu       {}: {} cores, {} threads used\n", info.cpu, info.cores, threads);
  fmt::print("caches    {}\n", cache_text.empty() ? "unknown" : cache_text);
  fmt::print("has       {}\n", fmt::join(features, " "));
  fmt::print("memory    {:.1f} GiB, {:.1f} available\n", gib(held.total), gib(held.available));
  fmt::print("attention backend cpu, instruction sets {} (best first)\n", fmt::join(machine.targets, " "));
  fmt::print("products  oneDNN with {}, {} by default; built by {}\n\n", model::product_isa(),
             model::has_native_bf16() ? "bf16" : "f32", info.compiler);
  fmt::print("{}, batch {}, {} query and {} KV heads of {}, {} tokens:\n", to_string(method), o.batch, o.h_q, o.h_kv,
             o.d, o.s_kv);
  for (const auto& [name, chosen] : plans) {
    fmt::print("  {:8}{}\n", name, chosen.ok() ? to_string(*chosen) : "refused: " + chosen.status().message());
  }
  fmt::print("\n");
  std::vector<std::vector<std::string>> lines{
      {"storage", "bytes per token", fmt::format("GiB at {} tokens, {} layers", o.s_kv, o.layers), "of high_only"}};
  for (const Cost& c : costs) {
    lines.push_back({c.storage, fmt::format("{:.0f}", c.per_token), fmt::format("{:.3f}", gib(c.total)),
                     fmt::format("{:.2f}", c.per_token / costs[0].per_token)});
  }
  fmt::print("{}", align(lines));
  return {};
}

Command add_doctor(CLI::App* app) {
  auto o = std::make_shared<DoctorOptions>();
  CLI::App* command = app->add_subcommand("doctor", "what this machine has, and what would run on it");
  command->add_option("--method", o->method, "name[:key=value,...]")->capture_default_str();
  command->add_option("--h-q", o->h_q, "query heads")->check(CLI::Range(1, 4096))->capture_default_str();
  command->add_option("--h-kv", o->h_kv, "KV heads")->check(CLI::Range(1, 1024))->capture_default_str();
  command->add_option("--d", o->d, "channels of a head")->check(CLI::Range(1, 4096))->capture_default_str();
  command->add_option("--s-kv", o->s_kv, "tokens of a sequence")
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 30))
      ->capture_default_str();
  command->add_option("--layers", o->layers, "of the model, for the size of its cache")
      ->check(CLI::Range(1, 4096))
      ->capture_default_str();
  command->add_option("--batch", o->batch, "sequences")->check(CLI::Range(1, 4096))->capture_default_str();
  command->add_option("--threads", o->threads, "0 = all processors")->check(CLI::Range(0, 1024))->capture_default_str();
  command->add_flag("--json", o->json, "as JSON on stdout");
  command->footer("Example: thriftattn doctor --h-q 32 --h-kv 8 --d 128 --s-kv 131072 --method thrift");
  return {command, [o] { return doctor(*o); }};
}

}  // namespace thriftattn::cli
