#include "report.h"

#include <fmt/format.h>
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <thread>

#include "model/config.h"

namespace thriftattn::cli {
namespace {

using Json = nlohmann::ordered_json;

// The FP4-only method that differs from `method` by its promotions alone.
Result<Method> fp4_like(const Method& method) {
  Result<Method> like = parse_method("fp4");
  if (!like.ok()) return like;
  like->arithmetic = method.arithmetic;
  like->centring = method.centring;
  like->page_scale = method.page_scale;
  like->format = method.format;
  like->scales = method.scales;
  like->p_quant = method.p_quant;
  return like;
}

// The row that runs `method` everywhere, whatever it is called; added as a reference when there is none. `shape` says
// how many layers and heads there are.
int find_or_add(std::vector<Row>* rows, const Method& method, const model::Schedule& shape) {
  const auto choices = options(method);
  for (size_t i = 0; i < rows->size(); ++i) {
    const Row& row = (*rows)[i];
    if (!row.from_file && options(row.schedule.methods[0]) == choices) return static_cast<int>(i);
  }
  Row row;
  row.name = to_string(method);
  row.schedule = model::Schedule::uniform(method, shape.layers, shape.h_kv);
  row.reference = true;
  rows->push_back(std::move(row));
  return static_cast<int>(rows->size()) - 1;
}

std::optional<double> recovered(const std::optional<double>& delta, const std::optional<double>& reference) {
  if (!delta || !reference || !(*reference > 0)) return std::nullopt;
  return 1 - *delta / *reference;
}

// The three comparisons of one column of figures: `at(row)` is the text's figures or the mean's.
template <class At>
void compare_column(Report* report, At at) {
  const double fp16 = at(report->rows[report->fp16]).nll;
  for (Row& row : report->rows) at(row).delta_nll = at(row).nll - fp16;
  for (Row& row : report->rows) {
    Figures& figures = at(row);
    if (row.fp4 >= 0) figures.recovery = recovered(figures.delta_nll, at(report->rows[row.fp4]).delta_nll);
    if (row.like >= 0) figures.recovery_like = recovered(figures.delta_nll, at(report->rows[row.like]).delta_nll);
  }
}

// Every text counts alike, however many tokens it has.
Figures mean_of(const std::vector<Figures>& texts) {
  Figures mean;
  const double share = 1.0 / static_cast<double>(texts.size());
  for (const Figures& text : texts) {
    mean.tokens += text.tokens;
    mean.nll += share * text.nll;
    mean.share_promoted += share * text.share_promoted;
    mean.kv_bytes_per_token += share * text.kv_bytes_per_token;
    mean.seconds += share * text.seconds;
    if (text.exact) mean.exact = mean.exact.value_or(0) + share * *text.exact;
  }
  // Positions can be averaged where all texts have the same ones.
  const auto same = [&](const Figures& text) {
    return std::equal(text.nll_by_position.begin(), text.nll_by_position.end(), texts[0].nll_by_position.begin(),
                      texts[0].nll_by_position.end(),
                      [](const Bucket& a, const Bucket& b) { return a.from == b.from && a.to == b.to; });
  };
  if (std::all_of(texts.begin(), texts.end(), same)) {
    mean.nll_by_position = texts[0].nll_by_position;
    for (size_t i = 0; i < mean.nll_by_position.size(); ++i) {
      mean.nll_by_position[i].nll = 0;
      for (const Figures& text : texts) mean.nll_by_position[i].nll += share * text.nll_by_position[i].nll;
    }
  }
  return mean;
}

Json number(const std::optional<double>& value) { return value ? Json(*value) : Json(nullptr); }

// One value per key; where the phases differ, {"prefill": ..., "decode": ...}.
Json options_json(const ResolvedOptions& options) {
  Json object = Json::object();
  for (const auto& [key, value] : options.prefill.empty() ? options.decode : options.prefill) object[key] = value;
  if (options.prefill.empty()) return object;
  for (const auto& [key, value] : options.decode) {
    if (object[key] != Json(value)) object[key] = {{"prefill", object[key]}, {"decode", value}};
  }
  return object;
}

// The distinct methods, and which of them each KV head of each layer runs.
Json schedule_json(const model::Schedule& schedule) {
  Json object = {{"methods", Json::array()}, {"index", Json::array()}};
  for (const Method& method : schedule.methods) object["methods"].push_back(to_string(method));
  for (int layer = 0; layer < schedule.layers; ++layer) {
    const auto begin = schedule.index.begin() + int64_t{layer} * schedule.h_kv;
    object["index"].push_back(std::vector<int>(begin, begin + schedule.h_kv));
  }
  return object;
}

Json figures_json(const Report& report, const Row& row, const Figures& figures, const std::string* text) {
  Json object;
  if (text) object["text"] = *text;
  object["method"] = row.name;
  object["reference"] = row.reference;
  object["options"] = options_json(row.options);
  if (row.from_file) object["schedule"] = schedule_json(row.schedule);
  object["tokens"] = figures.tokens;
  object["nll"] = figures.nll;
  object["delta_nll"] = number(figures.delta_nll);
  object["recovery"] = number(figures.recovery);
  object["recovery_like"] = number(figures.recovery_like);
  object["share_promoted"] = figures.share_promoted;
  object["kv_bytes_per_token"] = figures.kv_bytes_per_token;
  object["seconds"] = figures.seconds;
  if (report.questions) {
    object["answer_nll"] = figures.nll;
    object["exact"] = number(figures.exact);
  }
  object["nll_by_position"] = Json::array();
  for (const Bucket& bucket : figures.nll_by_position) {
    object["nll_by_position"].push_back({{"from", bucket.from}, {"to", bucket.to}, {"nll", bucket.nll}});
  }
  return object;
}

std::string percent(const std::optional<double>& value) { return value ? fmt::format("{:.1f}", 100 * *value) : "-"; }

template <class At>
std::string block(const Report& report, At at) {
  std::vector<std::vector<std::string>> lines{{"method", report.questions ? "answer NLL" : "NLL", "dNLL"}};
  if (report.questions) lines[0].push_back("exact %");
  for (const char* head : {"recovery %", "like %", "promoted %", "KV B/token", "seconds"}) lines[0].push_back(head);
  for (const Row& row : report.rows) {
    const Figures& figures = at(row);
    std::vector<std::string> line{row.name + (row.reference ? " *" : ""), fmt::format("{:.4f}", figures.nll),
                                  fmt::format("{:+.4f}", *figures.delta_nll)};
    if (report.questions) line.push_back(percent(figures.exact));
    line.push_back(percent(figures.recovery));
    line.push_back(percent(figures.recovery_like));
    line.push_back(fmt::format("{:.1f}", 100 * figures.share_promoted));
    line.push_back(fmt::format("{:.0f}", figures.kv_bytes_per_token));
    line.push_back(fmt::format("{:.1f}", figures.seconds));
    lines.push_back(std::move(line));
  }
  return align(lines);
}

std::string cpu_name() {
  std::ifstream info("/proc/cpuinfo");
  for (std::string line; std::getline(info, line);) {
    const size_t colon = line.find(": ");
    if (line.rfind("model name", 0) == 0 && colon != std::string::npos) return line.substr(colon + 2);
  }
#if defined(__aarch64__)
  return "aarch64";  // Linux names no model there
#else
  return "unknown";
#endif
}

// A file, or a name for one: what a rename may replace. Pipes and devices are written to as they are.
bool is_plain(const std::string& path) {
  std::error_code error;
  const auto status = std::filesystem::status(path, error);
  return !std::filesystem::exists(status) || std::filesystem::is_regular_file(status);
}

// What is written first, to be renamed to `path`.
std::string part_of(const std::string& path) {
  return is_plain(path) ? fmt::format("{}.{}.part", path, getpid()) : path;
}

}  // namespace

std::string one_line(std::string text) {
  std::replace_if(
      text.begin(), text.end(), [](unsigned char c) { return c < 0x20 || c == 0x7f; }, ' ');
  return text;
}

std::string align(const std::vector<std::vector<std::string>>& lines) {
  std::vector<size_t> width(lines[0].size());
  for (const auto& line : lines) {
    for (size_t i = 0; i < line.size(); ++i) width[i] = std::max(width[i], line[i].size());
  }
  std::string out;
  for (const auto& line : lines) {
    out += fmt::format("{:<{}}", line[0], width[0]);
    for (size_t i = 1; i < line.size(); ++i) out += fmt::format("  {:>{}}", line[i], width[i]);
    out += '\n';
  }
  return out;
}

MachineInfo machine_info() {
  MachineInfo machine;
  machine.cpu = cpu_name();
  machine.cores = static_cast<int>(std::thread::hardware_concurrency());
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof(allowed), &allowed) == 0) machine.cores = CPU_COUNT(&allowed);
#if defined(__clang__)
  machine.compiler = fmt::format("clang {}.{}.{}", __clang_major__, __clang_minor__, __clang_patchlevel__);
#else
  machine.compiler = fmt::format("gcc {}.{}.{}", __GNUC__, __GNUC_MINOR__, __GNUC_PATCHLEVEL__);
#endif
  return machine;
}

Result<model::Schedule> parse_schedule(const std::string& spec, const std::string& dir) {
  std::optional<Method> method;
  if (!spec.starts_with('@')) {
    THRIFTATTN_ASSIGN_OR_RETURN(parsed, parse_method(spec));
    method = std::move(parsed);
  }
  THRIFTATTN_ASSIGN_OR_RETURN(config, model::ModelConfig::load(dir));
  if (method) return model::Schedule::uniform(*method, config.layers, config.h_kv);
  return model::Schedule::load(spec.substr(1), config.layers, config.h_kv);
}

Status set_rows(const std::vector<std::string>& specs, Report* report) {
  for (const std::string& spec : specs) {
    THRIFTATTN_ASSIGN_OR_RETURN(schedule, parse_schedule(spec, report->model));
    if (!spec.starts_with('@')) {
      report->rows[find_or_add(&report->rows, schedule.methods[0], schedule)].reference = false;
    } else if (std::none_of(report->rows.begin(), report->rows.end(), [&](const Row& r) { return r.name == spec; })) {
      Row row;
      row.name = spec;
      row.schedule = std::move(schedule);
      row.from_file = true;
      report->rows.push_back(std::move(row));
    }
  }
  THRIFTATTN_ASSIGN_OR_RETURN(fp16, parse_schedule("fp16", report->model));
  THRIFTATTN_ASSIGN_OR_RETURN(paper_fp4, parse_method("paper-fp4"));
  report->fp16 = find_or_add(&report->rows, fp16.methods[0], fp16);
  for (size_t i = 0; i < report->rows.size(); ++i) {  // grows: a reference refers to itself
    std::vector<Method> likes;                        // distinct
    for (const Method& method : report->rows[i].schedule.methods) {
      if (method.rest != Tier::fp4) continue;
      THRIFTATTN_ASSIGN_OR_RETURN(like, fp4_like(method));
      if (std::find(likes.begin(), likes.end(), like) == likes.end()) likes.push_back(std::move(like));
    }
    if (likes.empty()) continue;
    const int fp4_row = find_or_add(&report->rows, paper_fp4, fp16);
    const int like_row = likes.size() == 1 ? find_or_add(&report->rows, likes[0], fp16) : -1;
    report->rows[i].fp4 = fp4_row;
    report->rows[i].like = like_row;
  }
  return {};
}

void leave_out(Report* report, size_t row) {
  const auto gone = static_cast<int>(row);
  report->rows.erase(report->rows.begin() + gone);
  const auto shift = [gone](int& index) { index = index == gone ? -1 : index > gone ? index - 1 : index; };
  shift(report->fp16);
  for (Row& other : report->rows) {
    for (int* index : {&other.fp4, &other.like, &other.twin}) shift(*index);
  }
}

void compare(Report* report) {
  for (Row& row : report->rows) row.mean = mean_of(row.texts);
  for (size_t t = 0; t < report->texts.size(); ++t) {
    compare_column(
        report, [t](auto& row) -> auto& { return row.texts[t]; });
  }
  compare_column(
      report, [](auto& row) -> auto& { return row.mean; });
}

std::string table(const Report& report) {
  const MachineInfo& machine = report.machine;
  std::string out = report.model;
  if (report.context) out += fmt::format(", context {}", *report.context);
  if (report.decode_chunk) out += fmt::format(" in steps of {}", report.decode_chunk);
  if (report.prefill) out += fmt::format(", contexts read by {}", *report.prefill);
  const std::string where =
      machine.gpu.empty() ? fmt::format("{} threads on {}", machine.threads, machine.cpu) : machine.gpu;
  out += fmt::format("; {} products, {} attention, {}\n", machine.compute, machine.target, where);
  for (size_t t = 0; t < report.texts.size(); ++t) {
    out += fmt::format("\n{}\n", report.texts[t]) +
           block(report, [t](const Row& row) -> const Figures& { return row.texts[t]; });
  }
  if (report.texts.size() > 1) {
    out += fmt::format("\nmean of {} texts\n", report.texts.size()) +
           block(report, [](const Row& row) -> const Figures& { return row.mean; });
  }
  const bool references = std::any_of(report.rows.begin(), report.rows.end(), [](const Row& r) { return r.reference; });
  out += "\nNLL: mean loss in nats per token; dNLL: what it exceeds fp16 by; promoted: of (query block, page) pairs\n";
  out += "recovery: share of the loss of paper-fp4 given back; like: of the loss of an fp4 of the same arithmetic\n";
  if (references) out += "* reference, run for comparison\n";
  return out;
}

std::string json(const Report& report) {
  const MachineInfo& machine = report.machine;
  Json object;
  object["schema"] = "thriftattn.eval/1";
  object["version"] = THRIFTATTN_VERSION;
  object["model"] = report.model;
  object["context"] = report.context ? Json(*report.context) : Json(nullptr);
  object["decode_chunk"] = report.decode_chunk ? Json(report.decode_chunk) : Json(nullptr);
  if (report.questions) object["prefill"] = report.prefill ? Json(*report.prefill) : Json("method");
  object["seed"] = report.seed;
  object["machine"] = {{"cpu", machine.cpu},       {"cores", machine.cores},     {"threads", machine.threads},
                       {"target", machine.target}, {"compute", machine.compute}, {"compiler", machine.compiler}};
  if (!machine.gpu.empty()) object["machine"]["gpu"] = machine.gpu;
  object["rows"] = Json::array();
  for (size_t t = 0; t < report.texts.size(); ++t) {
    for (const Row& row : report.rows) {
      object["rows"].push_back(figures_json(report, row, row.texts[t], &report.texts[t]));
    }
  }
  object["mean"] = Json::array();
  for (const Row& row : report.rows) object["mean"].push_back(figures_json(report, row, row.mean, nullptr));
  return object.dump(1, ' ', false, Json::error_handler_t::replace) + "\n";
}

Status check_writable(const std::string& path, const std::vector<std::string>& inputs) {
  if (path.empty() || path == "-") return {};
  std::error_code error;
  for (const std::string& input : inputs) {
    if (std::filesystem::equivalent(path, input, error)) {
      return invalid_argument(fmt::format("cannot write {}: it is one of the inputs", path));
    }
  }
  if (std::filesystem::is_directory(path, error)) {
    return invalid_argument(fmt::format("cannot write {}: it is a folder", path));
  }
  const std::string part = part_of(path);
  bool good = access(path.c_str(), W_OK) == 0;
  if (part != path) {  // the folder's permissions do not tell everything: make the file
    std::FILE* file = std::fopen(part.c_str(), "wb");
    good = file != nullptr;
    if (file) {
      std::fclose(file);
      std::remove(part.c_str());
    }
  }
  return good ? Status() : invalid_argument(fmt::format("cannot write {}: {}", path, std::strerror(errno)));
}

Status write_atomically(const std::string& path, std::string_view content) {
  const std::string part = part_of(path);
  const auto failed = [&] { return Status(Code::io, fmt::format("cannot write {}: {}", path, std::strerror(errno))); };
  std::FILE* file = std::fopen(part.c_str(), "wb");
  if (!file) return failed();
  bool good = std::fwrite(content.data(), 1, content.size(), file) == content.size();
  good = std::fclose(file) == 0 && good;
  if (good && (part == path || std::rename(part.c_str(), path.c_str()) == 0)) return {};
  const Status status = failed();
  if (part != path) std::remove(part.c_str());
  return status;
}

Status publish(const Report& report, const std::string& path) {
  if (path == "-") {
    fmt::print("{}", json(report));
    return {};
  }
  if (!path.empty()) THRIFTATTN_RETURN_IF_ERROR(write_atomically(path, json(report)));
  fmt::print("{}", table(report));
  return {};
}

}  // namespace thriftattn::cli
