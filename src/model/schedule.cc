#include "model/schedule.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <utility>

#include "model/json_file.h"

namespace thriftattn::model {
namespace {

struct Range {
  int64_t first = -1, last = -1;
};

// 5, "5" or "5-7"; nothing below 0 where it is none of these.
Range parse_range(const Json& json) {
  if (json.is_number_unsigned()) {
    const auto value = static_cast<int64_t>(std::min<uint64_t>(json.get<uint64_t>(), INT64_MAX));
    return {value, value};
  }
  if (!json.is_string()) return {};
  const auto& text = json.get_ref<const std::string&>();
  const char *at = text.data(), *const end = at + text.size();
  Range range;
  const auto number = [&](int64_t* out) {
    const auto [stop, error] = std::from_chars(at, end, *out);
    const bool ok = error == std::errc() && *at != '-';
    at = stop;
    return ok;
  };
  if (!number(&range.first)) return {};
  range.last = range.first;
  if (at != end && (*at++ != '-' || !number(&range.last))) return {};
  return at == end ? range : Range{};
}

// Which of `count` things ("layers") a rule names: all, where it names none.
Result<std::vector<bool>> parse_set(const Json& rule, const char* key, int count, const std::string& where) {
  const Json& json = member(rule, key);
  if (!rule.contains(key)) return std::vector<bool>(count, true);
  std::vector<bool> set(count, false);
  const auto refuse = [&](const Json& value, const std::string& why) {
    return invalid_argument(fmt::format("{}: {} {} is not supported: {}", where, key, shown(value), why));
  };
  const auto add = [&](const Json& value) -> Status {
    const Range range = parse_range(value);
    if (range.first < 0 || range.last < range.first) {
      return refuse(value, "a number, a range such as \"0-3\", or a list of those is");
    }
    if (range.last >= count) return refuse(value, fmt::format("the model has 0 to {}", count - 1));
    std::fill(set.begin() + range.first, set.begin() + range.last + 1, true);
    return {};
  };
  if (!json.is_array()) {
    THRIFTATTN_RETURN_IF_ERROR(add(json));
    return set;
  }
  if (json.empty()) return refuse(json, "an empty list names none");
  for (const Json& value : json) THRIFTATTN_RETURN_IF_ERROR(add(value));
  return set;
}

Status check_keys(const Json& json, std::initializer_list<std::string_view> known, const std::string& where) {
  for (const auto& [key, value] : json.items()) {
    if (std::find(known.begin(), known.end(), key) != known.end()) continue;
    std::string names;
    for (const std::string_view name : known) names += fmt::format("{}{}", names.empty() ? "" : ", ", name);
    return invalid_argument(fmt::format("{}: {} is not a key: {} are", where, shown(key), names));
  }
  return {};
}

Result<Method> parse_named(const Json& json, const char* key, const std::string& where) {
  const Json& spec = member(json, key);
  if (!spec.is_string()) {
    return invalid_argument(
        fmt::format("{}: {} {} is not a method: a string such as \"thrift:budget=0.1\" is", where, key, shown(spec)));
  }
  auto method = parse_method(spec.get_ref<const std::string&>());
  if (method.ok()) return method;
  return Status(method.status().code(), fmt::format("{}: {}: {}", where, key, method.status().message()));
}

}  // namespace

Schedule Schedule::uniform(const Method& method, int layers, int h_kv) {
  return {layers, h_kv, {method}, std::vector<int>(static_cast<size_t>(layers) * h_kv, 0)};
}

Result<Schedule> Schedule::parse(std::string_view text, const std::string& source, int layers, int h_kv) {
  THRIFTATTN_ASSIGN_OR_RETURN(json, parse_object(text, source));
  THRIFTATTN_RETURN_IF_ERROR(check_keys(json, {"default", "rules"}, source));
  THRIFTATTN_ASSIGN_OR_RETURN(otherwise, parse_named(json, "default", source));
  const Json& rules = member(json, "rules");
  if (json.contains("rules") && !rules.is_array()) {
    return invalid_argument(fmt::format("{}: rules {} is not a list", source, shown(rules)));
  }
  std::vector<Method> all = {otherwise};                           // as given
  std::vector<int> chosen(static_cast<size_t>(layers) * h_kv, 0);  // into `all`
  for (size_t r = 0; r < rules.size(); ++r) {
    const Json& rule = rules[r];
    const std::string where = fmt::format("{}: rules[{}]", source, r);
    if (!rule.is_object()) return invalid_argument(fmt::format("{}: {} is not an object", where, shown(rule)));
    THRIFTATTN_RETURN_IF_ERROR(check_keys(rule, {"layers", "kv_heads", "method"}, where));
    THRIFTATTN_ASSIGN_OR_RETURN(method, parse_named(rule, "method", where));
    THRIFTATTN_ASSIGN_OR_RETURN(in_layers, parse_set(rule, "layers", layers, where));
    THRIFTATTN_ASSIGN_OR_RETURN(in_heads, parse_set(rule, "kv_heads", h_kv, where));
    for (int layer = 0; layer < layers; ++layer) {
      for (int head = 0; head < h_kv; ++head) {
        if (in_layers[layer] && in_heads[head]) chosen[layer * h_kv + head] = static_cast<int>(all.size());
      }
    }
    all.push_back(std::move(method));
  }
  Schedule out{layers, h_kv, {}, {}};
  for (const int i : chosen) {
    auto it = std::find(out.methods.begin(), out.methods.end(), all[i]);
    if (it == out.methods.end()) it = out.methods.insert(it, all[i]);
    out.index.push_back(static_cast<int>(it - out.methods.begin()));
  }
  return out;
}

Result<Schedule> Schedule::load(const std::string& path, int layers, int h_kv) {
  THRIFTATTN_ASSIGN_OR_RETURN(text, read_file(path));
  return parse(text, path, layers, h_kv);
}

std::vector<Schedule::Group> Schedule::groups(int layer) const {
  std::vector<Group> out;
  for (size_t m = 0; m < methods.size(); ++m) {
    std::vector<int> heads;
    for (int head = 0; head < h_kv; ++head) {
      if (index[layer * h_kv + head] == static_cast<int>(m)) heads.push_back(head);
    }
    if (!heads.empty()) out.push_back({methods[m], std::move(heads)});
  }
  return out;
}

Result<CacheConfig> Schedule::cache_config(int d, int d_v) const {
  const auto has_fp4 = [](const Method& m) { return m.storage != Storage::high_only; };
  const auto any = std::find_if(methods.begin(), methods.end(), has_fp4);
  const Method& first = any == methods.end() ? methods[0] : *any;  // says what the FP4 planes are
  CacheConfig out = CacheConfig::for_method(first, layers, h_kv, d, d_v);
  bool same_storage = true;
  for (const Method& m : methods) {
    same_storage &= m.storage == methods[0].storage;
    const CacheConfig one = CacheConfig::for_method(m, layers, h_kv, d, d_v);
    out.mean |= one.mean;
    out.min_max |= one.min_max;
    out.variance |= one.variance;
    out.sink = std::max(out.sink, one.sink);
    out.recent = std::max(out.recent, one.recent);
    if (!has_fp4(m)) continue;
    const char* differs = m.format != first.format           ? "format"
                          : m.scales != first.scales         ? "scales"
                          : m.centring != first.centring     ? "centring"
                          : m.page_scale != first.page_scale ? "page_scale"
                                                             : nullptr;
    if (differs) {
      return invalid_argument(fmt::format("methods '{}' and '{}' differ in {}: one cache has one", to_string(first),
                                          to_string(m), differs));
    }
  }
  if (same_storage) return out;
  for (const int i : index) out.storage_by_head.push_back(methods[i].storage);
  return out;
}

std::string to_string(const Schedule& schedule) {
  std::string out;
  for (const Method& m : schedule.methods) out += (out.empty() ? "" : " | ") + thriftattn::to_string(m);
  if (schedule.methods.size() == 1) return out;
  for (size_t i = 0; i < schedule.index.size(); ++i) {
    out += i == 0 ? ": " : i % schedule.h_kv == 0 ? " " : ",";
    out += std::to_string(schedule.index[i]);
  }
  return out;
}

}  // namespace thriftattn::model
