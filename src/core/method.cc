#include "thriftattn/method.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <optional>
#include <span>

namespace thriftattn {
namespace {

template <class T>
struct Word {
  std::string_view word;
  T value;
};

constexpr Word<Policy> kPolicies[] = {
    {"none", Policy::none},
    {"auto", Policy::automatic},
    {"block_mean", Policy::block_mean},
    {"quest", Policy::quest},
    {"second_moment", Policy::second_moment},
    {"fp4_mass", Policy::fp4_mass},
    {"recent", Policy::recent},
    {"oracle", Policy::oracle},
};
constexpr Word<Tier> kRests[] = {{"none", Tier::none}, {"fp4", Tier::fp4}, {"fp16", Tier::fp16}};
constexpr Word<bool> kSwitches[] = {{"on", true}, {"off", false}};
constexpr Word<Arithmetic> kArithmetics[] = {
    {"auto", Arithmetic::automatic}, {"kv4", Arithmetic::kv4}, {"mma8", Arithmetic::mma8}, {"mma4", Arithmetic::mma4}};
// compact and offload are named by the design and not stored yet: they are not words of the grammar until they are.
constexpr Word<Storage> kStorages[] = {{"high_only", Storage::high_only},
                                       {"dual", Storage::dual},
                                       {"residual", Storage::residual},
                                       {"fp4_only", Storage::fp4_only}};
constexpr Word<Fp4Format> kFormats[] = {{"nvfp4", Fp4Format::nvfp4}, {"mxfp4", Fp4Format::mxfp4}};
constexpr Word<Scales> kScales[] = {{"6", Scales::six}, {"4over6", Scales::four_over_six}};
constexpr Word<PQuant> kPQuants[] = {{"two_level", PQuant::two_level}, {"constant", PQuant::constant}};
constexpr Word<Budget::Kind> kBudgets[] = {{"paper", Budget::Kind::paper},
                                           {"top_k", Budget::Kind::top_k},
                                           {"mass", Budget::Kind::mass},
                                           {"tolerance", Budget::Kind::tolerance}};

template <class T>
std::string word_of(std::span<const Word<T>> words, T value) {
  for (const auto& w : words)
    if (w.value == value) return std::string(w.word);
  return "?";
}

template <class T>
std::string list(std::span<const Word<T>> words) {
  std::string all;
  for (const auto& w : words) all += (all.empty() ? "" : ", ") + std::string(w.word);
  return all;
}

template <class T, size_t N>
Status parse_word(const Word<T> (&words)[N], std::string_view key, std::string_view text, T& value) {
  for (const auto& w : words)
    if (w.word == text) {
      value = w.value;
      return {};
    }
  return invalid_argument(fmt::format("{}={} is not known: {}", key, text, list(std::span<const Word<T>>(words))));
}

std::optional<double> parse_number(std::string_view text) {
  double value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || !std::isfinite(value)) return {};
  return value;
}

constexpr int kMaxCount = 1 << 24;  // pages: a billion tokens

std::optional<int> parse_count(std::string_view text) {
  int value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || value < 0 || value > kMaxCount) return {};
  return value;
}

Status parse_budget(std::string_view text, Budget& budget) {
  constexpr const char* kKnown = "a fraction in [0, 1], all, paper:F, top_k:K, per64, mass:P, tolerance:E";
  const auto refuse = [&](std::string_view why) {
    return invalid_argument(fmt::format("budget={} {}: {}", text, why, kKnown));
  };
  if (text == "all") {
    budget = {Budget::Kind::all, 1};
    return {};
  }
  if (text == "per64") {
    budget = {Budget::Kind::per64, 0};
    return {};
  }
  const size_t colon = text.find(':');
  Budget::Kind kind = Budget::Kind::fraction;
  if (colon != std::string_view::npos) {
    const auto* known = std::find_if(std::begin(kBudgets), std::end(kBudgets),
                                     [&](const auto& w) { return w.word == text.substr(0, colon); });
    if (known == std::end(kBudgets)) return refuse("is not known");
    kind = known->value;
  }
  const std::string_view number = colon == std::string_view::npos ? text : text.substr(colon + 1);
  if (kind == Budget::Kind::top_k) {
    const auto count = parse_count(number);
    if (!count) return refuse("is not a count of pages");
    budget = {kind, static_cast<double>(*count)};
    return {};
  }
  const auto value = parse_number(number);
  if (!value) return refuse("is not known");
  if (*value < 0 || (*value > 1 && kind != Budget::Kind::tolerance)) return refuse("is out of range");
  budget = {kind, *value};
  return {};
}

Status parse_force(std::string_view text, Force& force) {
  force = {};
  if (text == "none") return {};
  for (size_t from = 0; from <= text.size();) {
    const size_t plus = std::min(text.find('+', from), text.size());
    const std::string_view item = text.substr(from, plus - from);
    const size_t colon = std::min(item.find(':'), item.size());
    const std::string_view name = item.substr(0, colon);
    const auto count = colon < item.size() ? parse_count(item.substr(colon + 1)) : std::optional<int>(1);
    if (name == "sink" && count) {
      force.sink = *count;
    } else if (name == "previous" && count) {
      force.previous = *count;
    } else if (item == "diagonal") {
      force.diagonal = true;
    } else {
      return invalid_argument(
          fmt::format("force={}: '{}' is not known: none, or sink:N, diagonal, previous:N joined by +", text, item));
    }
    from = plus + 1;
  }
  return {};
}

// The table of docs/design.md, section 3.
std::vector<Method> named_methods() {
  const Force usual{1, true, 1};
  Method fp16;
  fp16.name = "fp16";
  fp16.budget = {Budget::Kind::all, 1};
  fp16.rest = Tier::fp16;
  fp16.storage = Storage::high_only;

  Method fp4;
  fp4.name = "fp4";
  fp4.storage = Storage::fp4_only;

  Method thrift;
  thrift.name = "thrift";
  thrift.policy = Policy::automatic;
  thrift.budget = {Budget::Kind::fraction, 0.05};
  thrift.force = usual;

  Method paper_fp4 = fp4;
  paper_fp4.name = "paper-fp4";
  paper_fp4.centring = paper_fp4.page_scale = false;
  paper_fp4.arithmetic = Arithmetic::mma4;

  Method paper = paper_fp4;
  paper.name = "paper";
  paper.policy = Policy::block_mean;
  paper.budget = {Budget::Kind::paper, 0.05};
  paper.storage = Storage::dual;

  Method topk;
  topk.name = "topk";
  topk.policy = Policy::block_mean;
  topk.budget = {Budget::Kind::fraction, 0.05};
  topk.rest = Tier::none;
  topk.force = usual;
  topk.storage = Storage::high_only;

  Method quest = topk;
  quest.name = "quest";
  quest.policy = Policy::quest;

  Method window = topk;
  window.name = "window";
  window.policy = Policy::recent;

  return {fp16, fp4, thrift, paper_fp4, paper, topk, quest, window};
}

Status set_option(Method& m, std::string_view key, std::string_view value) {
  if (key == "policy") return parse_word(kPolicies, key, value, m.policy);
  if (key == "budget") return parse_budget(value, m.budget);
  if (key == "rest") return parse_word(kRests, key, value, m.rest);
  if (key == "force") return parse_force(value, m.force);
  if (key == "centring") return parse_word(kSwitches, key, value, m.centring);
  if (key == "page_scale") return parse_word(kSwitches, key, value, m.page_scale);
  if (key == "arithmetic") return parse_word(kArithmetics, key, value, m.arithmetic);
  if (key == "storage") return parse_word(kStorages, key, value, m.storage);
  if (key == "format") return parse_word(kFormats, key, value, m.format);
  if (key == "scales") return parse_word(kScales, key, value, m.scales);
  if (key == "p_quant") return parse_word(kPQuants, key, value, m.p_quant);
  if (key == "recent") {
    const auto count = parse_count(value);
    if (!count) return invalid_argument(fmt::format("recent={} is not a count of pages", value));
    m.recent = *count;
    return {};
  }
  return invalid_argument(fmt::format(
      "'{}' is not a key of a method: policy, budget, rest, force, centring, page_scale, arithmetic, storage, format, "
      "scales, p_quant, recent",
      key));
}

// Contradictions between options, each of which is legal alone.
Status check(const Method& m) {
  const auto clash = [&](const std::string& one, const std::string& other, std::string_view why) {
    return invalid_argument(fmt::format("{} with {}: {}", one, other, why));
  };
  const std::string policy = "policy=" + to_string(m.policy), storage = "storage=" + to_string(m.storage);
  const std::string budget = "budget=" + to_string(m.budget), rest = "rest=" + to_string(m.rest);
  if ((m.budget.kind == Budget::Kind::all) != (m.rest == Tier::fp16))
    return clash(budget, rest, "budget=all and rest=fp16 go together");
  if (m.rest == Tier::fp4 && m.storage == Storage::high_only)
    return clash(rest, storage, "no FP4 planes are stored; dual, residual and fp4_only have them");
  if (m.policy == Policy::fp4_mass && m.storage == Storage::high_only)
    return clash(policy, storage, "no FP4 planes are stored; dual, residual and fp4_only have them");
  const bool promotes = m.budget.value > 0 || m.budget.kind == Budget::Kind::per64 ||
                        m.budget.kind == Budget::Kind::paper;  // both promote at least one page
  if (m.policy == Policy::none && promotes && m.budget.kind != Budget::Kind::all)
    return clash(policy, budget, "a budget above 0 needs a policy that ranks pages");
  const bool estimates = m.policy != Policy::recent && m.policy != Policy::none;
  if (!estimates && (m.budget.kind == Budget::Kind::mass || m.budget.kind == Budget::Kind::tolerance))
    return clash(policy, budget, "this policy estimates no softmax mass");
  if (m.budget.kind == Budget::Kind::tolerance && m.storage == Storage::high_only)
    return clash(budget, storage, "no FP4 planes are stored whose error could be estimated");
  return {};
}

}  // namespace

std::string to_string(Tier tier) {
  return tier == Tier::fp4x2 ? "fp4x2" : word_of(std::span<const Word<Tier>>(kRests), tier);
}
std::string to_string(Policy policy) { return word_of(std::span<const Word<Policy>>(kPolicies), policy); }
std::string to_string(Arithmetic a) { return word_of(std::span<const Word<Arithmetic>>(kArithmetics), a); }
std::string to_string(Storage storage) {
  if (storage == Storage::compact) return "compact";
  if (storage == Storage::offload) return "offload";
  return word_of(std::span<const Word<Storage>>(kStorages), storage);
}
std::string to_string(Fp4Format format) { return word_of(std::span<const Word<Fp4Format>>(kFormats), format); }

std::string to_string(const Budget& b) {
  switch (b.kind) {
    case Budget::Kind::all:
      return "all";
    case Budget::Kind::per64:
      return "per64";
    case Budget::Kind::fraction:
      return fmt::format("{}", b.value);
    case Budget::Kind::top_k:
      return fmt::format("top_k:{}", static_cast<int64_t>(b.value));
    default:
      return fmt::format("{}:{}", word_of(std::span<const Word<Budget::Kind>>(kBudgets), b.kind), b.value);
  }
}

std::string to_string(const Force& f) {
  std::string text;
  const auto add = [&](const std::string& item) { text += (text.empty() ? "" : "+") + item; };
  if (f.sink > 0) add(fmt::format("sink:{}", f.sink));
  if (f.diagonal) add("diagonal");
  if (f.previous > 0) add(fmt::format("previous:{}", f.previous));
  return text.empty() ? "none" : text;
}

Tier high_tier(Storage storage) {
  switch (storage) {
    case Storage::high_only:
    case Storage::dual:
    case Storage::offload:
      return Tier::fp16;
    case Storage::residual:
    case Storage::compact:
      return Tier::fp4x2;
    case Storage::fp4_only:
      return Tier::none;
  }
  return Tier::none;
}

std::vector<std::string> method_names() {
  std::vector<std::string> names;
  for (const Method& m : named_methods()) names.push_back(m.name);
  return names;
}

Result<Method> parse_method(std::string_view spec) {
  const size_t colon = std::min(spec.find(':'), spec.size());
  const std::string_view name = spec.substr(0, colon);
  std::optional<Method> method;
  std::string known;
  for (const Method& m : named_methods()) {
    if (m.name == name) method = m;
    known += (known.empty() ? "" : ", ") + m.name;
  }
  if (!method) return invalid_argument(fmt::format("method '{}' is not known: {}", name, known));

  std::vector<std::string_view> seen;
  for (size_t from = colon + 1; colon < spec.size() && from <= spec.size();) {
    const size_t comma = std::min(spec.find(',', from), spec.size());
    const std::string_view item = spec.substr(from, comma - from);
    const size_t equals = item.find('=');
    if (equals == std::string_view::npos)
      return invalid_argument(fmt::format("method '{}': '{}' is not of the form key=value", spec, item));
    const std::string_view key = item.substr(0, equals);
    if (std::find(seen.begin(), seen.end(), key) != seen.end())
      return invalid_argument(fmt::format("method '{}': '{}' is given twice", spec, key));
    seen.push_back(key);
    const Status status = set_option(*method, key, item.substr(equals + 1));
    if (!status.ok()) return Status(status.code(), fmt::format("method '{}': {}", spec, status.message()));
    from = comma + 1;
  }
  // A forced page is read in 16 bit wherever it stands, so the window of 16-bit pages covers the forced ones.
  method->recent = std::max({method->recent, method->force.previous + 1, 2});
  const Status status = check(*method);
  if (!status.ok()) return Status(status.code(), fmt::format("method '{}': {}", spec, status.message()));
  return *method;
}

std::vector<std::pair<std::string, std::string>> options(const Method& m) {
  const auto on_off = [](bool on) { return std::string(on ? "on" : "off"); };
  return {{"policy", to_string(m.policy)},
          {"budget", to_string(m.budget)},
          {"rest", to_string(m.rest)},
          {"force", to_string(m.force)},
          {"centring", on_off(m.centring)},
          {"page_scale", on_off(m.page_scale)},
          {"arithmetic", to_string(m.arithmetic)},
          {"storage", to_string(m.storage)},
          {"format", to_string(m.format)},
          {"scales", word_of(std::span<const Word<Scales>>(kScales), m.scales)},
          {"p_quant", word_of(std::span<const Word<PQuant>>(kPQuants), m.p_quant)},
          {"recent", fmt::format("{}", m.recent)}};
}

std::string to_string(const Method& method) {
  std::string spec = method.name;
  const auto base = parse_method(method.name);
  if (!base.ok()) return spec;
  const auto ours = options(method), theirs = options(*base);
  char separator = ':';
  for (size_t i = 0; i < ours.size(); ++i)
    if (ours[i] != theirs[i]) {
      const auto so_far = parse_method(spec);  // `force` may imply `recent`
      if (so_far.ok() && *so_far == method) break;
      spec += separator + ours[i].first + "=" + ours[i].second;
      separator = ',';
    }
  return spec;
}

}  // namespace thriftattn
