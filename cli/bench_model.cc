// thriftattn bench model: decode steps of a whole model on a GPU, from the tokens of a step to those of the next.
//
// The weights may be drawn, since their values cost no time, and so is the cache's content: keys and values are drawn
// and appended layer by layer, as DeviceBatch::fill says, because a prefill of the whole context would take minutes.
// Every step is one replay of a CUDA graph over one token more. Methods run one after another and give their memory
// back, in
// --rounds rounds, so that slow phases of the machine meet all alike.
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "commands.h"
#include "input.h"
#include "model/cuda/device_model.h"
#include "progress.h"
#include "report.h"
#include "runner.h"

namespace thriftattn::cli {
namespace {

using Json = nlohmann::ordered_json;

constexpr int64_t kFillStep = 1024;  // tokens of one sequence that are appended at once
constexpr int kWarmSteps = 3;        // launched, captured, replayed

// config.json of the models that can be drawn.
const std::map<std::string, const char*> kShapes = {
    {"llama3-8b", R"({"architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336,
                      "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
                      "vocab_size": 128256, "max_position_embeddings": 131072, "rms_norm_eps": 1e-05,
                      "hidden_act": "silu", "rope_theta": 500000.0})"},
};

// What one method took.
struct Timing {
  std::string method;
  model::Schedule schedule;
  std::string refused;                  // why it did not run; empty where it did
  Plan plan;                            // of a decode step
  std::vector<double> times, by_round;  // milliseconds of steps; medians
  int64_t cache_bytes = 0, activation_bytes = 0;
  double share_promoted = 0;

  double median() const { return median_of(times); }
  static double median_of(std::vector<double> values) {
    std::sort(values.begin(), values.end());
    const size_t n = values.size();
    return n == 0 ? 0 : (values[(n - 1) / 2] + values[n / 2]) / 2;
  }
};

// One round of one method: fills a cache, then decodes. What does not fit in the GPU's memory is told, not an error.
Status measure(const BenchModelOptions& o, const model::DeviceModel& model, Timing* t) {
  model::SessionOptions options;
  options.max_tokens = o.context + kWarmSteps + o.steps;
  options.max_step = std::min(kFillStep, o.context);
  options.max_decode = 1;
  const auto batch = model.open(t->schedule, options, o.batch);
  Status status = batch.status();
  if (status.ok()) status = (*batch)->plan(Phase::decode).status();
  if (status.ok()) status = (*batch)->fill(o.context, o.seed);
  if (status.ok()) status = (*batch)->decode_greedily(kWarmSteps).status();
  if (status.code() == Code::out_of_memory || status.code() == Code::unsupported) {
    t->refused = status.message();
    return {};
  }
  THRIFTATTN_RETURN_IF_ERROR(status);
  THRIFTATTN_ASSIGN_OR_RETURN(times, (*batch)->decode_greedily(o.steps));
  t->times.insert(t->times.end(), times.begin(), times.end());
  t->by_round.push_back(Timing::median_of({times.begin(), times.end()}));
  t->plan = *(*batch)->plan(Phase::decode);
  t->cache_bytes = (*batch)->cache_bytes();
  t->activation_bytes = (*batch)->activation_bytes();
  const Stats stats = (*batch)->stats();
  t->share_promoted = share_promoted(t->schedule, stats.promoted, stats.pairs);
  return {};
}

Result<std::unique_ptr<model::DeviceModel>> make_model(const BenchModelOptions& o) {
  THRIFTATTN_ASSIGN_OR_RETURN(gpu, parse_device(o.device));
  if (!gpu) return unsupported("--device cpu is not supported by bench model: cuda and cuda:N are");
  const model::Compute compute = o.compute == "f32" ? model::Compute::f32 : model::Compute::bf16;
  if (!o.model.empty()) return model::DeviceModel::load(o.model, compute, *gpu);
  THRIFTATTN_ASSIGN_OR_RETURN(config, model::ModelConfig::parse(kShapes.at(o.shape), o.shape));
  config.max_positions = std::max(config.max_positions, o.context + kWarmSteps + o.steps);
  return model::DeviceModel::random(config, compute, *gpu, o.seed);
}

std::string content() {
  return fmt::format("keys normal(0, 1) with every {}th channel moved by {}, values normal(0, 1)",
                     model::DeviceBatch::kOutlierEvery, model::DeviceBatch::kOutlierShift);
}

Json to_json(const BenchModelOptions& o, const model::DeviceModel& model, const std::vector<Timing>& rows) {
  const MachineInfo info = machine_info();
  const Gpu& gpu = model.gpu();
  Json json{{"schema", "thriftattn.bench/1"}, {"version", THRIFTATTN_VERSION}};
  json["machine"] = {{"gpu", gpu.name},
                     {"compute_capability", gpu.compute_capability},
                     {"multiprocessors", gpu.multiprocessors},
                     {"memory", gpu.memory_bytes},
                     {"cpu", info.cpu},
                     {"compiler", info.compiler}};
  json["model"] = {{"name", o.model.empty() ? o.shape : o.model},
                   {"weights", o.model.empty() ? "random" : "checkpoint"},
                   {"weight_bytes", model.weight_bytes()},
                   {"compute", to_string(model.compute())}};
  json["cache_content"] = content();
  json["rounds"] = o.rounds;
  json["steps"] = o.steps;
  for (const Timing& t : rows) {
    Json row{{"phase", "model"}, {"s_kv", o.context}, {"batch", o.batch}, {"method", t.method}};
    if (!t.refused.empty()) {
      row["refused"] = t.refused;
    } else {
      const auto [low, high] = std::minmax_element(t.times.begin(), t.times.end());
      row["kernel"] = t.plan.kernel;
      row["target"] = t.plan.target;
      row["ms_median"] = t.median();
      row["ms_min"] = *low;
      row["ms_max"] = *high;
      row["ms_by_round"] = t.by_round;
      row["tokens_per_s"] = 1e3 * o.batch / t.median();
      row["cache_bytes"] = t.cache_bytes;
      row["activation_bytes"] = t.activation_bytes;
      row["share_promoted"] = t.share_promoted;
    }
    json["rows"].push_back(std::move(row));
  }
  return json;
}

std::string to_table(const BenchModelOptions& o, const model::DeviceModel& model, const std::vector<Timing>& rows) {
  const auto gb = [](int64_t bytes) { return fmt::format("{:.2f}", static_cast<double>(bytes) / 1e9); };
  std::string text =
      fmt::format("{}{}, {} weights of {} GB, batch {}, {} tokens in the cache; {}\n",
                  o.model.empty() ? o.shape : o.model, o.model.empty() ? ", random" : "", to_string(model.compute()),
                  gb(model.weight_bytes()), o.batch, o.context, model.gpu().name);
  text += fmt::format("the cache's content is drawn: {}\n\n", content());
  std::vector<std::vector<std::string>> lines{
      {"method", "ms per step", "min", "max", "tokens/s", "of the first", "promoted %", "cache GB", "other GB"}};
  std::string refused;
  const double first = rows[0].median();
  for (const Timing& t : rows) {
    if (!t.refused.empty()) {
      refused += fmt::format("{} did not run: {}\n", t.method, t.refused);
      continue;
    }
    const auto [low, high] = std::minmax_element(t.times.begin(), t.times.end());
    lines.push_back({t.method, fmt::format("{:.3f}", t.median()), fmt::format("{:.3f}", *low),
                     fmt::format("{:.3f}", *high), fmt::format("{:.1f}", 1e3 * o.batch / t.median()),
                     first > 0 ? fmt::format("{:.2f}x", first / t.median()) : "-",
                     fmt::format("{:.1f}", 100 * t.share_promoted), gb(t.cache_bytes), gb(t.activation_bytes)});
  }
  return text + align(lines) + refused +
         fmt::format("\nms: median of {} steps{}, each one replay of a CUDA graph: embedding, layers, logits, argmax\n",
                     o.steps, o.rounds > 1 ? fmt::format(" in each of {} rounds", o.rounds) : "");
}

Status bench_model(const BenchModelOptions& o) {
  if (o.model.empty() == o.shape.empty()) return invalid_argument("bench model needs --model or --shape, one of them");
  if (!o.shape.empty() && !o.random_weights) {
    return invalid_argument("--shape needs --random-weights: a shape has no others");
  }
  THRIFTATTN_RETURN_IF_ERROR(check_writable(o.json, {}));
  std::vector<Method> methods;
  for (const std::string& spec : o.methods) {
    THRIFTATTN_ASSIGN_OR_RETURN(method, one_method(spec));
    methods.push_back(method);
  }
  Progress progress;
  progress.begin("making the model");
  THRIFTATTN_ASSIGN_OR_RETURN(model, make_model(o));
  const model::ModelConfig& c = model->config();
  std::vector<Timing> rows;
  for (const Method& method : methods) {
    Timing& row = rows.emplace_back();
    row.method = to_string(method);
    row.schedule = model::Schedule::uniform(method, c.layers, c.h_kv);
  }
  for (int round = 0; round < o.rounds; ++round) {
    for (Timing& row : rows) {
      if (!row.refused.empty()) continue;
      progress.begin(fmt::format("{}, round {} of {}", row.method, round + 1, o.rounds));
      THRIFTATTN_RETURN_IF_ERROR(measure(o, *model, &row));
    }
  }
  progress.clear();
  const Json json = to_json(o, *model, rows);
  if (o.json == "-") {
    fmt::print("{}\n", json.dump(1));
    return {};
  }
  if (!o.json.empty()) THRIFTATTN_RETURN_IF_ERROR(write_atomically(o.json, json.dump(1) + "\n"));
  fmt::print("{}", to_table(o, *model, rows));
  return {};
}

}  // namespace

Command add_bench_model(CLI::App* app) {
  auto o = std::make_shared<BenchModelOptions>();
  CLI::App* command = app->get_subcommand("bench")->add_subcommand("model", "decode steps of a whole model on a GPU");
  std::vector<std::string> shapes;
  for (const auto& [name, config] : kShapes) shapes.push_back(name);
  const auto count = CLI::Range(1, 1 << 20);
  command->add_option("--shape", o->shape, "a model of this shape, without a checkpoint")->check(CLI::IsMember(shapes));
  command->add_flag("--random-weights", o->random_weights, "draw the weights of --shape");
  command->add_option("--model", o->model, "Hugging Face folder, instead of --shape");
  command->add_option("--context", o->context, "tokens of every sequence before the first step")
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 20))
      ->capture_default_str();
  command->add_option("--batch", o->batch, "sequences")->check(CLI::Range(1, 4096))->capture_default_str();
  command->add_option("--method", o->methods, "name[:key=value,...]")->capture_default_str();
  command->add_option("--compute", o->compute, "type of the model's products")
      ->check(CLI::IsMember({"f32", "bf16"}))
      ->capture_default_str();
  command->add_option("--device", o->device, "cuda or cuda:N")->capture_default_str();
  command->add_option("--steps", o->steps, "of one round and method")->check(count)->capture_default_str();
  command->add_option("--rounds", o->rounds, "over all methods")->check(count)->capture_default_str();
  command->add_option("--seed", o->seed, "of what is drawn")->capture_default_str();
  add_json(command, &o->json);
  command->footer(
      "Example: thriftattn bench model --shape llama3-8b --random-weights --context 131072 --batch 4 --method fp16 "
      "thrift");
  return {command, [o] { return bench_model(*o); }};
}

}  // namespace thriftattn::cli
