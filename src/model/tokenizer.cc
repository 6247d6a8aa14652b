#include "model/tokenizer.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <fmt/format.h>
#include <pcre2.h>

#include <algorithm>
#include <array>
#include <functional>
#include <optional>
#include <queue>
#include <unordered_map>
#include <utility>

#include "model/json_file.h"

namespace thriftattn::model {
namespace {

constexpr int64_t kMaxTokens = 1 << 20;  // four times the largest vocabulary in use; a table of ids is made

// Byte-level tokens are spelled in visible characters: a byte that is visible in Latin-1 is its own code point, the
// others follow from U+0100 on in ascending order.
std::array<uint32_t, 256> visible_characters() {
  std::array<uint32_t, 256> out = {};
  uint32_t next = 0x100;
  for (uint32_t b = 0; b < 256; ++b) {
    const bool visible = (b >= '!' && b <= '~') || (b >= 0xa1 && b <= 0xac) || b >= 0xae;
    out[b] = visible ? b : next++;
  }
  return out;
}

// The bytes that a byte-level token spells; nothing where it has other characters.
std::optional<std::string> spelled_bytes(const std::string& token) {
  static const std::array<int16_t, 0x200> byte_of = [] {
    std::array<int16_t, 0x200> out;
    out.fill(-1);
    const auto characters = visible_characters();
    for (int b = 0; b < 256; ++b) out[characters[b]] = static_cast<int16_t>(b);
    return out;
  }();
  std::string bytes;
  for (size_t i = 0; i < token.size(); ++i) {
    uint32_t c = static_cast<uint8_t>(token[i]);
    if (c >= 0x80) {  // the characters in use have one or two bytes
      if ((c & 0xe0) != 0xc0 || i + 1 == token.size()) return std::nullopt;
      c = (c & 0x1f) << 6 | (static_cast<uint8_t>(token[++i]) & 0x3f);
    }
    if (c >= byte_of.size() || byte_of[c] < 0) return std::nullopt;
    bytes.push_back(static_cast<char>(byte_of[c]));
  }
  return bytes;
}

// PCRE2's \s has U+180E, which is no white space since Unicode 6.3: spells \s and \S out, as sets or as members of one.
std::string with_unicode_spaces(const std::string& expression) {
  const std::string spaces =
      R"(\t-\r\x{20}\x{85}\x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000})";
  std::string out;
  bool in_set = false;
  for (size_t i = 0; i < expression.size(); ++i) {
    const char c = expression[i], escaped = c == '\\' && i + 1 < expression.size() ? expression[i + 1] : '\0';
    if (escaped == 's') {
      out += in_set ? spaces : '[' + spaces + ']';
    } else if (escaped == 'S' && !in_set) {
      out += "[^" + spaces + ']';
    } else {
      out += c;
      if (escaped) out += escaped;
      if (c == '[' || c == ']') in_set = c == '[';
    }
    if (escaped) ++i;
  }
  return out;
}

// A compiled regular expression. Text that is not UTF-8 matches nothing.
class Pattern {
 public:
  static Result<Pattern> compile(const std::string& expression, bool literal, const std::string& source) {
    int error = 0;
    size_t at = 0;
    const uint32_t options = PCRE2_UTF | PCRE2_MATCH_INVALID_UTF | (literal ? PCRE2_LITERAL : PCRE2_UCP);
    const std::string spelled = literal ? expression : with_unicode_spaces(expression);
    Pattern p;
    p.code_.reset(
        pcre2_compile(reinterpret_cast<PCRE2_SPTR>(spelled.data()), spelled.size(), options, &error, &at, nullptr));
    if (!p.code_) {
      PCRE2_UCHAR text[256] = {};
      pcre2_get_error_message(error, text, sizeof(text));
      return unsupported(fmt::format("{}: pattern {} is not supported: {}", source, shown(expression),
                                     reinterpret_cast<const char*>(text)));
    }
    pcre2_jit_compile(p.code_.get(), PCRE2_JIT_COMPLETE);  // where there is no JIT, matching is slower and the same
    return p;
  }

  // Calls piece(part) for every match in `text` and for every stretch between matches, in order.
  template <class Piece>
  void split(std::string_view text, const Piece& piece) const {
    const std::unique_ptr<pcre2_match_data, decltype(&pcre2_match_data_free)> match(
        pcre2_match_data_create_from_pattern(code_.get(), nullptr), pcre2_match_data_free);
    const auto* subject = reinterpret_cast<PCRE2_SPTR>(text.data());
    const auto matches = [&](size_t from) {
      int found = pcre2_match(code_.get(), subject, text.size(), from, 0, match.get(), nullptr);
      if (found == PCRE2_ERROR_JIT_STACKLIMIT) {  // the interpreter takes its stack from the heap
        found = pcre2_match(code_.get(), subject, text.size(), from, PCRE2_NO_JIT, match.get(), nullptr);
      }
      return found > 0;
    };
    size_t done = 0, from = 0;
    while (from < text.size() && matches(from)) {
      const size_t* bounds = pcre2_get_ovector_pointer(match.get());
      if (bounds[1] <= bounds[0]) {  // an empty match splits nothing
        ++from;
        continue;
      }
      if (bounds[0] > done) piece(text.substr(done, bounds[0] - done));
      piece(text.substr(bounds[0], bounds[1] - bounds[0]));
      done = from = bounds[1];
    }
    if (done < text.size()) piece(text.substr(done));
  }

 private:
  struct Free {
    void operator()(pcre2_code* code) const { pcre2_code_free(code); }
  };
  std::unique_ptr<pcre2_code, Free> code_;
};

// What ByteLevel splits by where it is told to use its regular expression.
constexpr char kByteLevelPattern[] = R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

// One step of pre-tokenisation: splits every piece, after a space is put before it where asked for.
struct Splitter {
  bool add_prefix_space = false;
  std::optional<Pattern> pattern;
};

// Tokens that stand in the text as they are, matched leftmost and longest.
class AddedTokens {
 public:
  void add(std::string content, int32_t id) {
    by_first_[static_cast<uint8_t>(content[0])].push_back({std::move(content), id});
  }
  void finish() {
    for (auto& bucket : by_first_) {
      std::sort(bucket.begin(), bucket.end(),
                [](const auto& a, const auto& b) { return a.first.size() > b.first.size(); });
    }
  }
  // Calls plain(text) and added(id) in order.
  template <class Plain, class Added>
  void split(std::string_view text, const Plain& plain, const Added& added) const {
    size_t done = 0;
    for (size_t i = 0; i < text.size();) {
      const auto& bucket = by_first_[static_cast<uint8_t>(text[i])];
      const auto it = std::find_if(bucket.begin(), bucket.end(),
                                   [&](const auto& token) { return text.substr(i).starts_with(token.first); });
      if (it == bucket.end()) {
        ++i;
        continue;
      }
      if (i > done) plain(text.substr(done, i - done));
      added(it->second);
      done = i += it->first.size();
    }
    if (done < text.size()) plain(text.substr(done));
  }

 private:
  std::array<std::vector<std::pair<std::string, int32_t>>, 256> by_first_;
};

struct Merge {
  int32_t rank = 0, id = 0;  // lower ranks merge first; the token that the pair becomes
};

uint64_t pair_key(int32_t left, int32_t right) {
  return static_cast<uint64_t>(left) << 32 | static_cast<uint32_t>(right);
}

}  // namespace

struct Tokenizer::Rules {
  std::vector<std::string> bytes;                  // by id
  std::array<int32_t, 256> byte_ids = {};          // the token of every single byte
  std::unordered_map<std::string, int32_t> words;  // bytes -> id, where merges are ignored for whole tokens
  std::unordered_map<uint64_t, Merge> merges;
  AddedTokens raw, normalized;  // found in this order
  std::vector<Splitter> splitters;

  Status read_vocab(const Json& model, const std::string& source);
  Status read_merges(const Json& model, const std::string& source);
  Status read_added(const Json& list, const std::string& source);
  Status read_splitter(const Json& json, bool last, const std::string& source);
  Status put(int64_t id, std::string content, const std::string& source);
  void merge(std::string_view word, std::vector<int32_t>* out) const;
  template <class Word>
  void split(std::string_view text, size_t step, const Word& word) const;
};

// --- reading tokenizer.json

Status Tokenizer::Rules::put(int64_t id, std::string content, const std::string& source) {
  if (id < 0 || id >= kMaxTokens) {
    return data_loss(fmt::format("{}: token {} has id {}: ids from 0 to {} are supported", source, shown(content), id,
                                 kMaxTokens - 1));
  }
  if (id >= std::ssize(bytes)) bytes.resize(id + 1);
  bytes[id] = std::move(content);
  return {};
}

Status Tokenizer::Rules::read_vocab(const Json& model, const std::string& source) {
  const Json& vocab = member(model, "vocab");
  if (!vocab.is_object() || vocab.empty()) return data_loss(fmt::format("{}: model.vocab is missing", source));
  const bool whole_words = member(model, "ignore_merges") == true;
  byte_ids.fill(-1);
  for (const auto& [token, id] : vocab.items()) {
    if (!id.is_number_integer())
      return data_loss(fmt::format("{}: token {} has id {}", source, shown(token), shown(id)));
    auto spelled = spelled_bytes(token);
    if (!spelled)
      spelled = token;  // an added token; no sequence of bytes leads to it
    else if (spelled->size() == 1)
      byte_ids[static_cast<uint8_t>((*spelled)[0])] = id.get<int32_t>();
    if (whole_words) words.emplace(*spelled, id.get<int32_t>());
    THRIFTATTN_RETURN_IF_ERROR(put(id.get<int64_t>(), *spelled, source));
  }
  for (int b = 0; b < 256; ++b) {
    if (byte_ids[b] < 0)
      return unsupported(
          fmt::format("{}: no token for byte 0x{:02x}: byte-level vocabularies with all 256 are supported", source, b));
  }
  return {};
}

Status Tokenizer::Rules::read_merges(const Json& model, const std::string& source) {
  const Json &vocab = member(model, "vocab"), &list = member(model, "merges");
  if (!list.is_array()) return data_loss(fmt::format("{}: model.merges is missing", source));
  for (const Json& entry : list) {  // "a b" or ["a", "b"]
    std::string left, right;
    if (entry.is_string()) {
      const std::string both = entry.get<std::string>();
      const size_t space = both.find(' ');
      left = both.substr(0, space);
      if (space != std::string::npos) right = both.substr(space + 1);
    } else if (entry.is_array() && entry.size() == 2 && entry[0].is_string() && entry[1].is_string()) {
      left = entry[0].get<std::string>();
      right = entry[1].get<std::string>();
    }
    const Json &a = member(vocab, left.c_str()), &b = member(vocab, right.c_str()),
               &ab = member(vocab, (left + right).c_str());
    if (left.empty() || right.empty() || a.is_null() || b.is_null() || ab.is_null()) {
      return data_loss(fmt::format("{}: merge {} is not a pair of tokens that make a token", source, shown(entry)));
    }
    const auto rank = static_cast<int32_t>(merges.size());
    merges.try_emplace(pair_key(a.get<int32_t>(), b.get<int32_t>()), Merge{rank, ab.get<int32_t>()});
  }
  return {};
}

Status Tokenizer::Rules::read_added(const Json& list, const std::string& source) {
  if (!list.is_array() && !list.is_null()) return data_loss(fmt::format("{}: added_tokens is not a list", source));
  for (const Json& token : list) {
    const Json &content = member(token, "content"), &id = member(token, "id");
    if (!content.is_string() || content.get<std::string>().empty() || !id.is_number_integer()) {
      return data_loss(fmt::format("{}: added token {} has no content or no id", source, shown(token)));
    }
    for (const char* key : {"single_word", "lstrip", "rstrip"}) {
      if (member(token, key) == true) {
        return unsupported(
            fmt::format("{}: added token {} with {} is not supported: false is", source, shown(content), key));
      }
    }
    THRIFTATTN_RETURN_IF_ERROR(put(id.get<int64_t>(), content.get<std::string>(), source));
    (member(token, "normalized") == true ? normalized : raw).add(content.get<std::string>(), id.get<int32_t>());
  }
  raw.finish();
  normalized.finish();
  return {};
}

Status Tokenizer::Rules::read_splitter(const Json& json, bool last, const std::string& source) {
  const Json& type = member(json, "type");
  if (type == "Sequence" && member(json, "pretokenizers").is_array()) {
    const Json& list = member(json, "pretokenizers");
    for (size_t i = 0; i < list.size(); ++i) {
      THRIFTATTN_RETURN_IF_ERROR(read_splitter(list[i], last && i + 1 == list.size(), source));
    }
    return {};
  }
  std::string expression;
  bool literal = false;
  Splitter splitter;
  if (type == "ByteLevel" && last) {
    if (member(json, "use_regex") != false) expression = kByteLevelPattern;
    splitter.add_prefix_space = member(json, "add_prefix_space") != false;
  } else if (type == "Digits" && !last) {
    expression = member(json, "individual_digits") == true ? "\\p{N}" : "\\p{N}+";
  } else if (type == "Split" && !last && member(json, "behavior") == "Isolated" && member(json, "invert") != true) {
    const Json& pattern = member(json, "pattern");
    const Json& value = member(pattern, (literal = pattern.contains("String")) ? "String" : "Regex");
    if (!value.is_string()) return data_loss(fmt::format("{}: Split has pattern {}", source, shown(pattern)));
    expression = value.get<std::string>();
  } else {
    return unsupported(
        fmt::format("{}: pre-tokenizer {} is not supported: ByteLevel is, after any number of Digits and Split "
                    "(Isolated, not inverted)",
                    source, shown(json)));
  }
  if (!expression.empty()) {
    THRIFTATTN_ASSIGN_OR_RETURN(pattern, Pattern::compile(expression, literal, source));
    splitter.pattern = std::move(pattern);
  }
  splitters.push_back(std::move(splitter));
  return {};
}

Result<Tokenizer> Tokenizer::parse(std::string_view text, const std::string& source) {
  THRIFTATTN_ASSIGN_OR_RETURN(json, parse_object(text, source));
  const Json &model = member(json, "model"), &normalizer = member(json, "normalizer");
  if (const Json& type = member(model, "type"); type != "BPE") {
    return unsupported(
        fmt::format("{}: a tokenizer of model {} is not supported: byte-level BPE is", source, shown(type)));
  }
  for (const char* key : {"dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"}) {
    const Json& value = member(model, key);
    if (!value.is_null() && value != false && value != "" && value != 0) {
      return unsupported(fmt::format("{}: {} {} is not supported: none is", source, key, shown(value)));
    }
  }
  if (!normalizer.is_null()) {
    return unsupported(fmt::format("{}: normalizer {} is not supported: none is", source, shown(normalizer)));
  }
  auto rules = std::make_unique<Rules>();
  THRIFTATTN_RETURN_IF_ERROR(rules->read_splitter(member(json, "pre_tokenizer"), true, source));
  THRIFTATTN_RETURN_IF_ERROR(rules->read_vocab(model, source));
  THRIFTATTN_RETURN_IF_ERROR(rules->read_merges(model, source));
  THRIFTATTN_RETURN_IF_ERROR(rules->read_added(member(json, "added_tokens"), source));
  return Tokenizer(std::move(rules));
}

Result<Tokenizer> Tokenizer::load(const std::string& dir) {
  const std::string path = dir + "/tokenizer.json";
  THRIFTATTN_ASSIGN_OR_RETURN(text, read_file(path));
  return parse(text, path);
}

// --- encoding

// Byte-pair encoding of one word: of all neighbours that merge, the pair of lowest rank does, the leftmost of equals,
// until none is left. A queue keeps a long word from taking quadratic time.
void Tokenizer::Rules::merge(std::string_view word, std::vector<int32_t>* out) const {
  if (!words.empty()) {
    if (const auto it = words.find(std::string(word)); it != words.end()) return out->push_back(it->second);
  }
  struct Symbol {
    int32_t id, previous, next;  // neighbours by position; -1 = none
  };
  struct Candidate {
    int32_t rank, left, left_id, right_id, id;
    bool operator>(const Candidate& o) const { return std::pair(rank, left) > std::pair(o.rank, o.left); }
  };
  const auto n = static_cast<int32_t>(word.size());
  std::vector<Symbol> symbols(n);
  std::priority_queue<Candidate, std::vector<Candidate>, std::greater<>> queue;
  const auto consider = [&](int32_t left) {
    if (left < 0 || symbols[left].next < 0) return;
    const int32_t a = symbols[left].id, b = symbols[symbols[left].next].id;
    if (const auto it = merges.find(pair_key(a, b)); it != merges.end()) {
      queue.push({it->second.rank, left, a, b, it->second.id});
    }
  };
  for (int32_t i = 0; i < n; ++i) symbols[i] = {byte_ids[static_cast<uint8_t>(word[i])], i - 1, i + 1 < n ? i + 1 : -1};
  for (int32_t i = 0; i < n; ++i) consider(i);
  while (!queue.empty()) {
    const Candidate c = queue.top();
    queue.pop();
    Symbol& left = symbols[c.left];
    if (left.id != c.left_id || left.next < 0 || symbols[left.next].id != c.right_id)
      continue;  // merged otherwise since
    Symbol& right = symbols[left.next];
    left.id = c.id;
    left.next = right.next;
    right.id = -1;
    if (left.next >= 0) symbols[left.next].previous = c.left;
    consider(left.previous);
    consider(c.left);
  }
  for (int32_t i = 0; i >= 0 && i < n; i = symbols[i].next) out->push_back(symbols[i].id);
}

// Calls word(text) for every word that the splitters from `step` on make of `text`.
template <class Word>
void Tokenizer::Rules::split(std::string_view text, size_t step, const Word& word) const {
  if (step == splitters.size()) return word(text);
  const Splitter& s = splitters[step];
  const auto rest = [&](std::string_view piece) { split(piece, step + 1, word); };
  std::string prefixed;
  if (s.add_prefix_space && !text.starts_with(' ')) text = prefixed = ' ' + std::string(text);
  s.pattern ? s.pattern->split(text, rest) : rest(text);
}

std::vector<int32_t> Tokenizer::encode(std::string_view text) const {
  std::vector<int32_t> out;
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
    const size_t first = out.size();
    rules_->merge(w, &out);
    known.emplace(key, Known{first, out.size() - first});
  };
  const auto id = [&](int32_t token) { out.push_back(token); };
  rules_->raw.split(
      text,
      [&](std::string_view part) {
        rules_->normalized.split(
            part, [&](std::string_view plain) { rules_->split(plain, 0, word); }, id);
      },
      id);
  return out;
}

// --- decoding

Tokenizer::Tokenizer(std::unique_ptr<const Rules> rules) : rules_(std::move(rules)) {}
Tokenizer::Tokenizer(Tokenizer&&) noexcept = default;
Tokenizer& Tokenizer::operator=(Tokenizer&&) noexcept = default;
Tokenizer::~Tokenizer() = default;

int64_t Tokenizer::vocab() const { return std::ssize(rules_->bytes); }

std::string_view Tokenizer::bytes(int32_t id) const {
  return id >= 0 && id < vocab() ? std::string_view(rules_->bytes[id]) : std::string_view();
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
