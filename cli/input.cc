#include "input.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <utility>

namespace thriftattn::cli {
namespace {

using Json = nlohmann::json;

// The string at `key`, or why there is none.
Result<std::string> text_at(const Json& object, const char* key) {
  if (!object.is_object()) return invalid_argument(fmt::format("{} where an object is wanted", object.type_name()));
  const auto found = object.find(key);
  if (found == object.end()) return invalid_argument(fmt::format("no \"{}\"", key));
  if (!found->is_string()) {
    return invalid_argument(fmt::format("\"{}\" is {}, a string is wanted", key, found->type_name()));
  }
  std::string text = found->get<std::string>();
  if (text.empty()) return invalid_argument(fmt::format("\"{}\" is empty", key));
  return text;
}

Result<Exam> parse_exam(const std::string& line) {
  const Json object = Json::parse(line, nullptr, /*allow_exceptions=*/false);
  if (object.is_discarded()) return invalid_argument("not JSON");
  Exam exam;
  THRIFTATTN_ASSIGN_OR_RETURN(context, text_at(object, "context"));
  exam.context = std::move(context);
  const auto questions = object.find("questions");
  if (questions == object.end() || !questions->is_array() || questions->empty()) {
    return invalid_argument("\"questions\" is not a list of at least one {\"ask\", \"answer\"}");
  }
  for (const Json& question : *questions) {
    THRIFTATTN_ASSIGN_OR_RETURN(ask, text_at(question, "ask"));
    THRIFTATTN_ASSIGN_OR_RETURN(answer, text_at(question, "answer"));
    exam.questions.push_back({std::move(ask), std::move(answer)});
  }
  return exam;
}

}  // namespace

size_t valid_utf8(std::string_view bytes) {
  size_t i = 0;
  while (i < bytes.size()) {
    const auto lead = static_cast<uint8_t>(bytes[i]);
    const size_t length = lead < 0x80 ? 1 : lead < 0xC2 ? 0 : lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : lead < 0xF5 ? 4 : 0;
    if (length == 0 || i + length > bytes.size()) return i;
    for (size_t j = 1; j < length; ++j) {
      const auto next = static_cast<uint8_t>(bytes[i + j]);
      if ((next & 0xC0) != 0x80) return i;
      // Overlong forms, surrogates and what lies beyond U+10FFFF show in the second byte.
      if (j == 1 && ((lead == 0xE0 && next < 0xA0) || (lead == 0xED && next > 0x9F) || (lead == 0xF0 && next < 0x90) ||
                     (lead == 0xF4 && next > 0x8F))) {
        return i;
      }
    }
    i += length;
  }
  return i;
}

Result<Method> one_method(const std::string& spec) {
  if (!spec.starts_with('@')) return parse_method(spec);
  return invalid_argument(
      fmt::format("--method {}: a schedule is for the layers of a model, which eval and generate have", spec));
}

Result<std::optional<int>> parse_device(const std::string& device) {
  if (device == "cpu") return std::optional<int>();
  if (device == "cuda") return std::optional(0);
  int index = 0;
  const char* end = device.data() + device.size();
  if (device.starts_with("cuda:")) {
    const auto [parsed, error] = std::from_chars(device.data() + 5, end, index);
    if (error == std::errc() && parsed == end && index >= 0) return std::optional(index);
  }
  return invalid_argument(fmt::format("--device {} is not known: cpu, cuda and cuda:N are", device));
}

Result<std::string> read_text(const std::string& path) {
  std::error_code error;
  const auto status = std::filesystem::status(path, error);
  if (!std::filesystem::exists(status)) return not_found(fmt::format("{}: no such file", path));
  if (std::filesystem::is_directory(status)) return invalid_argument(fmt::format("{} is a folder, not a file", path));
  std::ifstream file(path, std::ios::binary);
  if (!file) return not_found(fmt::format("{} cannot be read", path));
  std::string text{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  if (file.bad()) return Status(Code::io, fmt::format("{}: reading failed", path));
  if (text.empty()) return invalid_argument(fmt::format("{} is empty", path));
  const size_t valid = valid_utf8(text);
  if (valid < text.size()) {
    return invalid_argument(fmt::format("{} is not UTF-8: byte {:#04x} at offset {}", path,
                                        static_cast<unsigned>(static_cast<uint8_t>(text[valid])), valid));
  }
  return text;
}

Result<std::vector<Exam>> read_exams(const std::string& path) {
  THRIFTATTN_ASSIGN_OR_RETURN(text, read_text(path));
  std::vector<Exam> exams;
  int number = 0;
  for (size_t from = 0; from < text.size(); ++number) {
    const size_t to = std::min(text.find('\n', from), text.size());
    const std::string line = text.substr(from, to - from);
    from = to + 1;
    if (line.find_first_not_of(" \t\r") == std::string::npos) continue;
    Result<Exam> exam = parse_exam(line);
    if (!exam.ok()) {
      return invalid_argument(fmt::format("{}, line {}: {}", path, number + 1, exam.status().message()));
    }
    exams.push_back(std::move(*exam));
  }
  if (exams.empty()) return invalid_argument(fmt::format("{} holds no questions", path));
  return exams;
}

}  // namespace thriftattn::cli
