// JSON from files that may lie: every access checks the type first.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "thriftattn/status.h"

namespace thriftattn::model {

using Json = nlohmann::json;

// A whole regular file. A pipe or a device is refused, because it might never end.
Result<std::string> read_file(const std::string& path);

// The JSON object that `text` holds.
Result<Json> parse_object(std::string_view text, const std::string& source);

// The member `key`, or null where there is none or `json` is no object.
const Json& member(const Json& json, const char* key);

// The steps of a {"type": "Sequence", `key`: [...]}, or the one step that `json` is; none for null. A Sequence inside a
// Sequence is a step like any other, so that a hostile file cannot nest a million of them.
std::vector<const Json*> steps_of(const Json& json, const char* key);

// A value as an error message shows it: one line, cut short. What is nested deeper than one level is only named,
// because dump() recurses and a hostile file may nest a million levels.
std::string shown(const Json& json);

}  // namespace thriftattn::model
