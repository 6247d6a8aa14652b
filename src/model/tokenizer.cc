#include "model/tokenizer.h"

#include <fmt/format.h>

#include <algorithm>
#include <filesystem>
#include <functional>
#include <unordered_map>
#include <utility>

#include "model/added_tokens.h"
#include "model/bpe.h"
#include "model/json_file.h"
#include "model/normalizer.h"
#include "model/pattern.h"
#include "model/unicode.h"

namespace thriftattn::model {
namespace {

using Ids = std::vector<int32_t>;

// What ByteLevel splits by where it is told to use its regular expression.
constexpr char kByteLevelPattern[] = R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

// One step of pre-tokenisation, in this order: spaces become `space`, `prefix` goes in front of a piece that does not
// begin with it (of the text's first one only, where `first_only`), the pattern splits.
struct Splitter {
  enum class Keep : uint8_t { all, matches, others, matches_with_previous };
  std::string space, prefix;
  bool first_only = false;
  std::optional<Pattern> pattern;
  Keep keep = Keep::all;

  // Calls piece(text) for every piece of `text`; `first` where it begins the whole text.
  template <class Piece>
  void split(std::string_view text, bool first, const Piece& piece) const {
    std::string changed;
    if (!space.empty()) {
      changed = replaced(text, " ", space);
      text = changed;
    }
    if (!prefix.empty() && !text.starts_with(prefix) && (first || !first_only))
      text = changed = prefix + std::string(text);
    if (!pattern) return piece(text);
    std::string_view held;  // what a match right after it belongs to
    pattern->split(text, [&](std::string_view part, bool matched) {
      switch (keep) {
        case Keep::all:
          return piece(part);
        case Keep::matches:
        case Keep::others:
          return matched == (keep == Keep::matches) ? piece(part) : void();
        case Keep::matches_with_previous:
          if (matched) {
            piece(text.substr(part.data() - held.size() - text.data(), held.size() + part.size()));
            held = {};
          } else {
            held = part;
          }
      }
    });
    if (!held.empty()) piece(held);
  }
};

}  // namespace

struct Tokenizer::Rules {
  Normalizer normalizer;
  AddedTokens raw, normalized;  // found before and after normalisation
  std::vector<Splitter> splitters;
  Bpe bpe;
  std::optional<Ids> prefix;
  bool chat_template = false;

  Status read_added(const Json& list, const std::string& source);
  Status read_splitters(const Json& json, const std::string& source);
  Status read_prefix(const Json& json, const std::string& source);
  template <class Word>
  void split(std::string_view text, bool first, size_t step, const Word& word) const;
};

// --- reading tokenizer.json

namespace {

bool is_true(const Json& json, const char* key) { return member(json, key) == true; }

// Words are bytes where the last step of pre-tokenisation makes them so.
Bpe::Symbols symbols_of(const Json& pre_tokenizer) {
  const auto steps = steps_of(pre_tokenizer, "pretokenizers");
  return !steps.empty() && member(*steps.back(), "type") == "ByteLevel" ? Bpe::Symbols::bytes
                                                                        : Bpe::Symbols::characters;
}

Result<Splitter> parse_split(const Json& json, const std::string& source) {
  const Json &pattern = member(json, "pattern"), &literal = member(pattern, "String"),
             &expression = literal.is_null() ? member(pattern, "Regex") : literal, &behavior = member(json, "behavior");
  if (!expression.is_string()) return data_loss(fmt::format("{}: Split has pattern {}", source, shown(pattern)));
  const bool invert = is_true(json, "invert");
  Splitter out;
  if (behavior == "Isolated") {
    out.keep = Splitter::Keep::all;
  } else if (behavior == "Removed") {
    out.keep = invert ? Splitter::Keep::matches : Splitter::Keep::others;
  } else if (behavior == "MergedWithPrevious" && !invert) {
    out.keep = Splitter::Keep::matches_with_previous;
  } else {
    return unsupported(fmt::format(
        "{}: Split with behavior {}{} is not supported: Isolated, Removed and MergedWithPrevious (not inverted) are",
        source, shown(behavior), invert ? ", inverted," : ""));
  }
  THRIFTATTN_ASSIGN_OR_RETURN(compiled, Pattern::compile(expression.get<std::string>(), !literal.is_null(), source));
  out.pattern = std::move(compiled);
  return out;
}

}  // namespace

Status Tokenizer::Rules::read_splitters(const Json& json, const std::string& source) {
  const auto steps = steps_of(json, "pretokenizers");
  for (size_t i = 0; i < steps.size(); ++i) {
    const Json& step = *steps[i];
    const Json &type = member(step, "type"), &scheme = member(step, "prepend_scheme");
    const bool last = i + 1 == steps.size();
    Splitter splitter;
    std::string expression;
    if (type == "Split") {
      THRIFTATTN_ASSIGN_OR_RETURN(split, parse_split(step, source));
      splitter = std::move(split);
    } else if (type == "Digits") {
      expression = is_true(step, "individual_digits") ? "\\p{N}" : "\\p{N}+";
    } else if (type == "ByteLevel" && last) {
      if (member(step, "use_regex") != false) expression = kByteLevelPattern;
      if (member(step, "add_prefix_space") != false) splitter.prefix = " ";
    } else if (type == "Metaspace" && member(step, "split") == false && member(step, "replacement").is_string()) {
      splitter.space = member(step, "replacement").get<std::string>();
      if (scheme != "never") splitter.prefix = splitter.space;
      splitter.first_only = scheme == "first";
    } else {
      return unsupported(
          fmt::format("{}: pre-tokenizer {} is not supported: Split, Digits, a ByteLevel at the end and a Metaspace "
                      "that does not split are, and a sequence of them",
                      source, shown(step)));
    }
    if (!expression.empty()) {
      THRIFTATTN_ASSIGN_OR_RETURN(pattern, Pattern::compile(expression, false, source));
      splitter.pattern = std::move(pattern);
    }
    splitters.push_back(std::move(splitter));
  }
  return {};
}

Status Tokenizer::Rules::read_added(const Json& list, const std::string& source) {
  if (!list.is_array() && !list.is_null()) return data_loss(fmt::format("{}: added_tokens is not a list", source));
  for (const Json& json : list) {
    const Json &content = member(json, "content"), &id = member(json, "id");
    if (!content.is_string() || content == "" || !id.is_number_integer()) {
      return data_loss(fmt::format("{}: added token {} has no content or no id", source, shown(json)));
    }
    AddedToken token{content.get<std::string>(), 0, is_true(json, "single_word"), is_true(json, "lstrip"),
                     is_true(json, "rstrip")};
    THRIFTATTN_RETURN_IF_ERROR(bpe.add(id.get<int64_t>(), token.content, source));
    token.id = id.get<int32_t>();
    if (is_true(json, "normalized")) {
      std::string storage;
      token.content = normalizer.apply(token.content, &storage);
      if (!token.content.empty()) normalized.add(std::move(token));
    } else {
      raw.add(std::move(token));
    }
  }
  return {};
}

Status Tokenizer::Rules::read_prefix(const Json& json, const std::string& source) {
  if (json.is_null()) return {};
  prefix.emplace();
  for (const Json* step : steps_of(json, "processors")) {
    const Json &type = member(*step, "type"), &single = member(*step, "single");
    if (type == "ByteLevel") continue;  // concerns offsets alone
    if (type != "TemplateProcessing" || !single.is_array()) {
      return unsupported(fmt::format(
          "{}: post-processor {} is not supported: ByteLevel and TemplateProcessing are, and a sequence of them",
          source, shown(*step)));
    }
    Ids before;
    for (const Json& piece : single) {
      if (!member(piece, "Sequence").is_null()) break;
      const Json& name = member(member(piece, "SpecialToken"), "id");
      const Json& ids =
          name.is_string()
              ? member(member(member(*step, "special_tokens"), name.get_ref<const std::string&>().c_str()), "ids")
              : name;
      if (!ids.is_array()) return data_loss(fmt::format("{}: post-processor has {}", source, shown(piece)));
      for (const Json& id : ids) {
        if (!id.is_number_integer() || id.get<int64_t>() < 0 || id.get<int64_t>() >= std::ssize(bpe.tokens())) {
          return data_loss(fmt::format("{}: post-processor puts token {}: ids from 0 to {} exist", source, shown(id),
                                       bpe.tokens().size() - 1));
        }
        before.push_back(id.get<int32_t>());
      }
    }
    prefix->insert(prefix->begin(), before.begin(), before.end());
  }
  return {};
}

Result<Tokenizer> Tokenizer::parse(std::string_view text, const std::string& source) {
  THRIFTATTN_ASSIGN_OR_RETURN(json, parse_object(text, source));
  const Json &model = member(json, "model"), &pre_tokenizer = member(json, "pre_tokenizer");
  if (const Json& type = member(model, "type"); type != "BPE") {
    return unsupported(fmt::format("{}: a tokenizer of model {} is not supported: BPE is", source, shown(type)));
  }
  for (const char* key : {"dropout", "continuing_subword_prefix", "end_of_word_suffix"}) {
    const Json& value = member(model, key);
    if (!value.is_null() && value != "" && value != 0) {
      return unsupported(fmt::format("{}: {} {} is not supported: none is", source, key, shown(value)));
    }
  }
  const Bpe::Symbols symbols = symbols_of(pre_tokenizer);
  if (symbols == Bpe::Symbols::characters && !is_true(model, "byte_fallback")) {
    return unsupported(fmt::format(
        "{}: pre-tokenizer {} is not supported without byte_fallback: with it, or one that ends in ByteLevel, is",
        source, shown(pre_tokenizer)));
  }
  auto rules = std::make_unique<Rules>();
  THRIFTATTN_RETURN_IF_ERROR(rules->read_splitters(pre_tokenizer, source));
  THRIFTATTN_ASSIGN_OR_RETURN(normalizer, Normalizer::parse(member(json, "normalizer"), source));
  rules->normalizer = std::move(normalizer);
  THRIFTATTN_ASSIGN_OR_RETURN(bpe, Bpe::parse(model, symbols, source));
  rules->bpe = std::move(bpe);
  THRIFTATTN_RETURN_IF_ERROR(rules->read_added(member(json, "added_tokens"), source));
  THRIFTATTN_RETURN_IF_ERROR(rules->read_prefix(member(json, "post_processor"), source));
  return Tokenizer(std::move(rules));
}

// --- reading tekken.json: special tokens first, then tokens by rank

Result<Tokenizer> Tokenizer::parse_tekken(std::string_view text, const std::string& source) {
  THRIFTATTN_ASSIGN_OR_RETURN(json, parse_object(text, source));
  const Json &config = member(json, "config"), &specials = member(json, "special_tokens"),
             &vocab = member(json, "vocab"), &pattern = member(config, "pattern");
  if (!specials.is_array()) {
    return unsupported(fmt::format("{}: without special_tokens it is not supported: version v7 and later are", source));
  }
  if (!pattern.is_string()) return data_loss(fmt::format("{}: config.pattern is missing", source));
  const auto count = [&](const char* key, int64_t otherwise) {
    const Json& value = member(config, key);
    if (value.is_null()) return otherwise;
    // Anything else fits no vocabulary and is refused as such.
    return value.is_number_unsigned() && value.get<uint64_t>() < 1 << 20 ? value.get<int64_t>() : -1;
  };
  const int64_t special_count = count("default_num_special_tokens", std::ssize(specials));
  const int64_t vocab_count = count("default_vocab_size", std::ssize(vocab) + special_count) - special_count;
  if (special_count < std::ssize(specials)) {
    return data_loss(fmt::format("{}: {} special tokens, room for {}", source, specials.size(), special_count));
  }

  auto rules = std::make_unique<Rules>();
  Splitter splitter;
  THRIFTATTN_ASSIGN_OR_RETURN(compiled, Pattern::compile(pattern.get<std::string>(), false, source));
  splitter.pattern = std::move(compiled);
  rules->splitters.push_back(std::move(splitter));
  THRIFTATTN_ASSIGN_OR_RETURN(
      bpe, Bpe::parse_ranks(vocab, std::min<int64_t>(vocab_count, std::ssize(vocab)), special_count, source));
  rules->bpe = std::move(bpe);
  std::vector<std::string> names(special_count);
  for (size_t i = 0; i < names.size(); ++i) names[i] = fmt::format("<SPECIAL_{}>", i);  // what is kept for later
  for (const Json& token : specials) {
    const Json &rank = member(token, "rank"), &name = member(token, "token_str");
    if (!rank.is_number_integer() || rank.get<int64_t>() < 0 || rank.get<int64_t>() >= std::ssize(specials) ||
        !name.is_string() || name == "") {
      return data_loss(
          fmt::format("{}: special token {} has no name, or no rank below {}", source, shown(token), specials.size()));
    }
    names[rank.get<int64_t>()] = name.get<std::string>();
  }
  for (int32_t id = 0; id < special_count; ++id) {
    if (names[id] == "<s>") rules->prefix = Ids{id};
    THRIFTATTN_RETURN_IF_ERROR(rules->bpe.add(id, names[id], source));
    rules->raw.add({names[id], id});
  }
  return Tokenizer(std::move(rules));
}

// --- the folder

Result<Tokenizer> Tokenizer::load(const std::string& dir) {
  std::error_code error;
  const std::string path = dir + "/tokenizer.json", tekken = dir + "/tekken.json";
  const bool native = !std::filesystem::exists(path, error) && std::filesystem::exists(tekken, error);
  THRIFTATTN_ASSIGN_OR_RETURN(text, read_file(native ? tekken : path));
  auto tokenizer = native ? parse_tekken(text, tekken) : parse(text, path);
  if (tokenizer.ok()) THRIFTATTN_RETURN_IF_ERROR(tokenizer->read_config(dir));
  return tokenizer;
}

Status Tokenizer::read_config(const std::string& dir) {
  std::error_code error;
  for (const char* name : {"/chat_template.jinja", "/chat_template.json"}) {
    rules_->chat_template |= std::filesystem::exists(dir + name, error);
  }
  const std::string path = dir + "/tokenizer_config.json";
  if (!std::filesystem::exists(path, error)) return {};
  THRIFTATTN_ASSIGN_OR_RETURN(text, read_file(path));
  THRIFTATTN_ASSIGN_OR_RETURN(json, parse_object(text, path));
  rules_->chat_template |= !member(json, "chat_template").is_null();
  if (rules_->prefix) return {};
  rules_->prefix.emplace();
  const Json &named = member(json, "bos_token"), &bos = named.is_object() ? member(named, "content") : named;
  if (!is_true(json, "add_bos_token") || bos.is_null()) return {};
  const auto& tokens = rules_->bpe.tokens();
  const auto it = bos.is_string() ? std::find(tokens.begin(), tokens.end(), bos.get<std::string>()) : tokens.end();
  if (it == tokens.end() || it->empty()) {
    return data_loss(fmt::format("{}: bos_token {} is not a token", path, shown(named)));
  }
  rules_->prefix->push_back(static_cast<int32_t>(it - tokens.begin()));
  return {};
}

// --- encoding

// Calls word(text) for every word that the splitters from `step` on make of `text`.
template <class Word>
void Tokenizer::Rules::split(std::string_view text, bool first, size_t step, const Word& word) const {
  if (step == splitters.size()) return word(text);
  splitters[step].split(text, first,
                        [&](std::string_view piece) { split(piece, std::exchange(first, false), step + 1, word); });
}

std::vector<int32_t> Tokenizer::encode(std::string_view text) const {
  Ids out;
  struct Known {
    size_t first, count;  // in `out`
  };
  std::unordered_map<std::string, Known> known;  // a text has few different words
  std::string key;
  const auto word = [&](std::string_view w) {
    key.assign(w);
    if (const auto it = known.find(key); it != known.end()) {
      for (size_t i = 0; i < it->second.count; ++i) out.push_back(out[it->second.first + i]);
      return;
    }
    const size_t begin = out.size();
    rules_->bpe.encode(w, &out);
    known.emplace(key, Known{begin, out.size() - begin});
  };
  const auto added = [&](const AddedToken& token) { out.push_back(token.id); };
  rules_->raw.split(
      text,
      [&](std::string_view part) {
        std::string storage;
        const std::string_view normal = rules_->normalizer.apply(part, &storage);
        rules_->normalized.split(
            normal,
            [&](std::string_view plain) {
              rules_->split(plain, part.data() == text.data() && plain.data() == normal.data(), 0, word);
            },
            added);
      },
      added);
  return out;
}

// --- decoding

Tokenizer::Tokenizer(std::unique_ptr<Rules> rules) : rules_(std::move(rules)) {}
Tokenizer::Tokenizer(Tokenizer&&) noexcept = default;
Tokenizer& Tokenizer::operator=(Tokenizer&&) noexcept = default;
Tokenizer::~Tokenizer() = default;

int64_t Tokenizer::vocab() const { return std::ssize(rules_->bpe.tokens()); }
const std::optional<std::vector<int32_t>>& Tokenizer::prefix() const { return rules_->prefix; }
bool Tokenizer::has_chat_template() const { return rules_->chat_template; }

std::string_view Tokenizer::bytes(int32_t id) const {
  return id >= 0 && id < vocab() ? std::string_view(rules_->bpe.tokens()[id]) : std::string_view();
}

std::string Tokenizer::decode(std::span<const int32_t> ids) const {
  std::string out;
  for (const int32_t id : ids) out += bytes(id);
  return out;
}

std::string TextStream::push(int32_t token) {
  pending_ += tokenizer_->bytes(token);
  return take(false);
}

std::string TextStream::finish() { return take(true); }

// Takes whole characters off `pending_`; an incomplete one at its end stays, unless all is wanted.
std::string TextStream::take(bool all) {
  std::string out;
  size_t i = 0;
  while (i < pending_.size()) {
    const auto at = [&](size_t j) { return static_cast<uint8_t>(pending_[j]); };
    const uint8_t lead = at(i);
    const size_t length = lead < 0x80                   ? 1
                          : lead >= 0xc2 && lead < 0xe0 ? 2
                          : (lead & 0xf0) == 0xe0       ? 3
                          : lead >= 0xf0 && lead < 0xf5 ? 4
                                                        : 0;
    size_t good = length > 0 ? 1 : 0;  // bytes that agree with the lead
    while (good > 0 && good < length && i + good < pending_.size()) {
      // The second byte's range keeps out overlong forms, surrogates and values beyond U+10FFFF.
      const uint8_t low = good > 1 ? 0x80 : lead == 0xe0 ? 0xa0 : lead == 0xf0 ? 0x90 : 0x80;
      const uint8_t high = good > 1 ? 0xbf : lead == 0xed ? 0x9f : lead == 0xf4 ? 0x8f : 0xbf;
      if (at(i + good) < low || at(i + good) > high) break;
      ++good;
    }
    if (good == length && length > 0) {
      out.append(pending_, i, length);
    } else if (good > 0 && i + good == pending_.size() && !all) {
      break;
    } else {
      out += "\xef\xbf\xbd";
    }
    i += std::max<size_t>(good, 1);
  }
  pending_.erase(0, i);
  return out;
}

}  // namespace thriftattn::model
