#include "model/json_file.h"

#include <fmt/format.h>

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>

namespace thriftattn::model {

Result<std::string> read_file(const std::string& path) {
  std::error_code error;
  const auto kind = std::filesystem::status(path, error).type();
  if (kind == std::filesystem::file_type::directory) return data_loss(fmt::format("{} is a folder, not a file", path));
  if (std::filesystem::exists(path, error) && kind != std::filesystem::file_type::regular) {
    return data_loss(fmt::format("{} is a pipe or a device, not a file", path));
  }
  std::ifstream in(path, std::ios::binary);
  if (!in) return not_found(fmt::format("cannot open {}: {}", path, std::strerror(errno)));
  std::string text((std::istreambuf_iterator<char>(in)), std::istreambuf_iterator<char>());
  if (in.bad()) return Status(Code::io, fmt::format("cannot read {}: {}", path, std::strerror(errno)));
  return text;
}

Result<Json> parse_object(std::string_view text, const std::string& source) {
  Json json = Json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!json.is_object()) return data_loss(fmt::format("{}: not a JSON object", source));
  return json;
}

const Json& member(const Json& json, const char* key) {
  static const Json null;
  if (!json.is_object()) return null;
  const auto it = json.find(key);
  return it == json.end() ? null : *it;
}

std::vector<const Json*> steps_of(const Json& json, const char* key) {
  std::vector<const Json*> steps;
  const Json& list = member(json, key);
  if (member(json, "type") == "Sequence" && list.is_array()) {
    for (const Json& step : list) steps.push_back(&step);
  } else if (!json.is_null()) {
    steps.push_back(&json);
  }
  return steps;
}

std::string shown(const Json& json) {
  if (json.is_structured()) {
    for (const Json& element : json) {
      if (!element.is_structured()) continue;
      const Json& type = member(json, "type");
      return type.is_string() ? shown(type) : json.type_name();
    }
  }
  std::string text = json.dump(-1, ' ', true, Json::error_handler_t::replace);
  if (text.size() > 60) text = text.substr(0, 57) + "...";
  return text;
}

}  // namespace thriftattn::model
