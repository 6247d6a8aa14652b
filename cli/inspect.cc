// thriftattn inspect: what a checkpoint or a saved cache is. Headers are read, weights and pages are not.
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <CLI/CLI.hpp>
#include <cstdio>
#include <filesystem>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>

#include "commands.h"
#include "model/config.h"
#include "model/safetensors.h"
#include "model/tokenizer.h"
#include "report.h"
#include "thriftattn/cache.h"

namespace thriftattn::cli {
namespace {

using Json = nlohmann::ordered_json;

// Key and value as a table shows them; JSON keeps the types.
void print(const Json& object) {
  std::string out;
  for (const auto& [key, value] : object.items()) {
    if (key == "schema" || key == "list" || value.is_null()) continue;
    out += fmt::format("{:<16}{}\n", key, value.is_string() ? one_line(value.get<std::string>()) : value.dump());
  }
  fmt::print("{}", out);
}

Json inspect_config(const model::ModelConfig& c) {
  return {{"architecture", c.architecture},
          {"layers", c.layers},
          {"hidden", c.hidden},
          {"intermediate", c.intermediate},
          {"h_q", c.h_q},
          {"h_kv", c.h_kv},
          {"d", c.d},
          {"vocab", c.vocab},
          {"max_positions", c.max_positions},
          {"tied_embeddings", c.tied_embeddings}};
}

Status inspect_folder(const InspectOptions& options) {
  Json json{{"schema", "thriftattn.inspect/1"}, {"kind", "checkpoint"}, {"path", options.path}};
  Status why;  // the first reason that it cannot be run
  int failures = 0;
  const auto refused = [&](const Status& status) {
    if (++failures == 1) why = status;
  };
  if (const auto config = model::ModelConfig::load(options.path); config.ok()) {
    json.update(inspect_config(*config));
  } else {
    refused(config.status());
  }
  if (const auto files = model::Safetensors::open(options.path); files.ok()) {
    std::map<std::string, int64_t> dtypes;
    int64_t parameters = 0, bytes = 0;
    json["tensors"] = files->tensors().size();
    for (const auto& [name, t] : files->tensors()) {
      int64_t elements = 1;
      for (const int64_t n : t.shape) elements *= n;
      ++dtypes[t.dtype_name];
      parameters += elements;
      bytes += t.bytes;
      if (options.tensors) {
        json["list"].push_back({{"name", name}, {"dtype", t.dtype_name}, {"shape", t.shape}, {"bytes", t.bytes}});
      }
    }
    json["parameters"] = parameters;
    json["bytes"] = bytes;
    json["dtypes"] = dtypes;
  } else {
    refused(files.status());
  }
  if (const auto tokenizer = model::Tokenizer::load(options.path); tokenizer.ok()) {
    json["tokenizer"] = {
        {"kind", "BPE"}, {"tokens", tokenizer->vocab()}, {"chat_template", tokenizer->has_chat_template()}};
  } else {
    refused(tokenizer.status());
  }
  if (failures == 3) return why;  // no part of a checkpoint is there
  json["readable"] = why.ok();
  if (!why.ok()) json["refused"] = why.message();
  if (options.json) {
    fmt::print("{}\n", json.dump(1, ' ', false, Json::error_handler_t::replace));
    return {};
  }
  print(json);
  if (json.contains("list")) {
    std::vector<std::vector<std::string>> lines{{"tensor", "dtype", "shape", "bytes"}};
    for (const Json& t : json["list"]) {
      lines.push_back({one_line(t["name"].get<std::string>()), one_line(t["dtype"].get<std::string>()),
                       model::shape_to_string(t["shape"].get<std::vector<int64_t>>()), t["bytes"].dump()});
    }
    fmt::print("\n{}", align(lines));
  }
  return {};
}

Status inspect_cache(const InspectOptions& options) {
  THRIFTATTN_ASSIGN_OR_RETURN(saved, inspect_saved(options.path));
  const CacheConfig& c = saved.config;
  Json json{{"schema", "thriftattn.inspect/1"},
            {"kind", "saved cache"},
            {"path", options.path},
            {"version", saved.version},
            {"tokens", saved.tokens},
            {"layers", c.layers},
            {"h_kv", c.h_kv},
            {"d", c.d},
            {"d_v", c.d_v},
            {"storage", c.storage_by_head.empty() ? to_string(c.storage) : "by head"},
            {"format", to_string(c.format)},
            {"high_dtype", c.high_dtype == DType::f16 ? "f16" : "bf16"},
            {"file_bytes", saved.file_bytes},
            {"cache_bytes", saved.bytes.total()},
            {"metadata", saved.metadata}};
  if (options.json) {
    fmt::print("{}\n", json.dump(1, ' ', false, Json::error_handler_t::replace));
    return {};
  }
  // What `generate` put beside the pages, its text's tokens left out; of what others put there, how much it is.
  const Json metadata = Json::parse(saved.metadata, nullptr, false);
  json["metadata"] = saved.metadata.empty() ? Json() : Json(fmt::format("{} bytes", saved.metadata.size()));
  for (const char* key : {"model", "compute", "method", "prefill"}) {
    if (metadata.is_object() && metadata.contains(key) && metadata[key].is_string()) json[key] = metadata[key];
  }
  print(json);
  return {};
}

}  // namespace

Status inspect(const InspectOptions& options) {
  std::error_code error;
  if (!std::filesystem::exists(options.path, error)) {
    return not_found(fmt::format("{}: no such file or folder", options.path));
  }
  if (std::filesystem::is_directory(options.path, error)) return inspect_folder(options);
  if (options.path.ends_with(".json") || options.path.ends_with(".safetensors")) {
    return invalid_argument(fmt::format("{}: a checkpoint is named by its folder", options.path));
  }
  if (options.tensors) {
    return invalid_argument(fmt::format("{}: --tensors lists those of a checkpoint's folder", options.path));
  }
  return inspect_cache(options);
}

Command add_inspect(CLI::App* app) {
  auto options = std::make_shared<InspectOptions>();
  CLI::App* command = app->add_subcommand("inspect", "what a checkpoint or a saved cache is");
  command->add_option("path", options->path, "a model's folder, or a file that --save-cache wrote")->required();
  command->add_flag("--tensors", options->tensors, "list a checkpoint's tensors");
  command->add_flag("--json", options->json, "as JSON on stdout");
  command->footer("Example: thriftattn inspect models/pocket-8m --tensors");
  return {command, [options] { return inspect(*options); }};
}

}  // namespace thriftattn::cli
