#include "model/bpe.h"

#include <fmt/format.h>

#include <algorithm>
#include <functional>
#include <optional>
#include <queue>
#include <tuple>
#include <utility>

#include "model/unicode.h"

namespace thriftattn::model {
namespace {

constexpr int64_t kMaxTokens = 1 << 20;        // four times the largest vocabulary in use; a table of ids is made
constexpr std::string_view kSpace = "\u2581";  // SentencePiece writes a space so

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

// The byte that "<0xE4>" names.
std::optional<uint8_t> named_byte(const std::string& token) {
  constexpr std::string_view kDigits = "0123456789ABCDEF";
  if (token.size() != 6 || !token.starts_with("<0x") || token[5] != '>') return std::nullopt;
  const size_t high = kDigits.find(token[3]), low = kDigits.find(token[4]);
  if (high == kDigits.npos || low == kDigits.npos) return std::nullopt;
  return static_cast<uint8_t>(high << 4 | low);
}

std::optional<std::string> from_base64(std::string_view text) {
  constexpr std::string_view kDigits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  if (text.size() % 4 != 0) return std::nullopt;
  while (text.ends_with('=')) text.remove_suffix(1);
  std::string out;
  uint32_t bits = 0, count = 0;
  for (const char c : text) {
    const size_t digit = kDigits.find(c);
    if (digit == kDigits.npos) return std::nullopt;
    bits = bits << 6 | static_cast<uint32_t>(digit);
    if ((count += 6) >= 8) out.push_back(static_cast<char>(bits >> (count -= 8) & 0xff));
  }
  return out;
}

}  // namespace

Status Bpe::add(int64_t id, std::string bytes, const std::string& source) {
  if (id < 0 || id >= kMaxTokens) {
    return data_loss(fmt::format("{}: token {} has id {}: ids from 0 to {} are supported", source, shown(bytes), id,
                                 kMaxTokens - 1));
  }
  if (id >= std::ssize(tokens_)) tokens_.resize(id + 1);
  tokens_[id] = std::move(bytes);
  return {};
}

Status Bpe::check_bytes(const std::string& source) const {
  for (size_t b = 0; b < byte_ids_.size(); ++b) {
    if (byte_ids_[b] >= 0) continue;
    return unsupported(
        fmt::format("{}: no token for byte 0x{:02x}: vocabularies with all 256 are supported", source, b));
  }
  return {};
}

Result<Bpe> Bpe::parse(const Json& model, Symbols symbols, const std::string& source) {
  const Json &vocab = member(model, "vocab"), &list = member(model, "merges");
  if (!vocab.is_object() || vocab.empty()) return data_loss(fmt::format("{}: model.vocab is missing", source));
  if (!list.is_array()) return data_loss(fmt::format("{}: model.merges is missing", source));
  Bpe bpe;
  bpe.symbols_ = symbols;
  bpe.whole_words_ = member(model, "ignore_merges") == true;
  bpe.byte_ids_.fill(-1);
  std::unordered_map<std::string_view, int32_t> ids;  // as the file spells the tokens
  std::vector<std::string_view> spelled;              // the other way
  for (const auto& [token, value] : vocab.items()) {
    const bool too_large = value.is_number_unsigned() && value.get<uint64_t>() > INT64_MAX;
    if (!value.is_number_integer() || too_large) {
      return data_loss(fmt::format("{}: token {} has id {}", source, shown(token), shown(value)));
    }
    THRIFTATTN_RETURN_IF_ERROR(bpe.add(value.get<int64_t>(), token, source));
    const auto id = value.get<int32_t>();
    spelled.resize(bpe.tokens_.size());
    if (!spelled[id].empty()) {  // decoding could not tell them apart
      return data_loss(fmt::format("{}: token {} has id {}, which token {} has too", source, shown(token), id,
                                   shown(std::string(spelled[id]))));
    }
    spelled[id] = token;
    ids.emplace(token, id);
    if (symbols == Symbols::characters) {
      const auto byte = named_byte(token);
      if (byte) bpe.byte_ids_[*byte] = id;
      bpe.words_.emplace(token, id);
      bpe.tokens_[id] = byte ? std::string(1, static_cast<char>(*byte)) : replaced(token, kSpace, " ");
    } else if (auto bytes = spelled_bytes(token)) {  // else an added token; no sequence of bytes leads to it
      if (bytes->size() == 1) bpe.byte_ids_[static_cast<uint8_t>((*bytes)[0])] = id;
      if (bpe.whole_words_) bpe.words_.emplace(*bytes, id);
      bpe.tokens_[id] = std::move(*bytes);
    }
  }
  THRIFTATTN_RETURN_IF_ERROR(bpe.check_bytes(source));

  int32_t rank = 0;
  for (const Json& entry : list) {  // "a b" or ["a", "b"]
    std::string left, right;
    if (entry.is_string()) {
      const auto& both = entry.get_ref<const std::string&>();
      const size_t space = both.find(' ');
      left = both.substr(0, space);
      if (space != std::string::npos) right = both.substr(space + 1);
    } else if (entry.is_array() && entry.size() == 2 && entry[0].is_string() && entry[1].is_string()) {
      left = entry[0].get<std::string>();
      right = entry[1].get<std::string>();
    }
    const auto a = ids.find(left), b = ids.find(right), ab = ids.find(left + right);
    if (left.empty() || right.empty() || a == ids.end() || b == ids.end() || ab == ids.end()) {
      return data_loss(fmt::format("{}: merge {} is not a pair of tokens that make a token", source, shown(entry)));
    }
    bpe.merges_[pair(a->second, b->second)] = {rank++, ab->second};  // of equal pairs the last counts
  }
  return bpe;
}

Result<Bpe> Bpe::parse_ranks(const Json& vocab, int64_t count, int64_t first_id, const std::string& source) {
  if (!vocab.is_array() || count < 1 || count > std::ssize(vocab)) {
    return data_loss(fmt::format("{}: a vocab of {} tokens, {} are wanted", source, vocab.size(), count));
  }
  Bpe bpe;
  bpe.whole_words_ = true;
  bpe.byte_ids_.fill(-1);
  for (int64_t rank = 0; rank < count; ++rank) {
    const Json& text = member(vocab[rank], "token_bytes");
    auto bytes = text.is_string() ? from_base64(text.get_ref<const std::string&>()) : std::nullopt;
    if (!bytes || bytes->empty() || member(vocab[rank], "rank") != rank) {
      return data_loss(fmt::format("{}: vocab entry {} is not a token of rank {}", source, shown(vocab[rank]), rank));
    }
    THRIFTATTN_RETURN_IF_ERROR(bpe.add(first_id + rank, *bytes, source));
    const auto id = static_cast<int32_t>(first_id + rank);
    if (bytes->size() == 1) bpe.byte_ids_[static_cast<uint8_t>((*bytes)[0])] = id;
    bpe.words_.emplace(std::move(*bytes), id);
  }
  THRIFTATTN_RETURN_IF_ERROR(bpe.check_bytes(source));

  // A token is what any two tokens merge to that make it; the lowest ranks first.
  std::vector<std::tuple<int32_t, int32_t, int32_t>> all;  // token, left, right
  for (const auto& [bytes, id] : bpe.words_) {
    for (size_t cut = 1; cut < bytes.size(); ++cut) {
      const auto left = bpe.words_.find(bytes.substr(0, cut)), right = bpe.words_.find(bytes.substr(cut));
      if (left != bpe.words_.end() && right != bpe.words_.end()) all.emplace_back(id, left->second, right->second);
    }
  }
  std::sort(all.begin(), all.end());
  for (const auto& [id, left, right] : all) {
    bpe.merges_[pair(left, right)] = {static_cast<int32_t>(bpe.merges_.size()), id};
  }
  return bpe;
}

void Bpe::first_symbols(std::string_view word, std::vector<int32_t>* ids) const {
  const auto add_bytes = [&](std::string_view bytes) {
    for (const char c : bytes) ids->push_back(byte_ids_[static_cast<uint8_t>(c)]);
  };
  if (symbols_ == Symbols::bytes) return add_bytes(word);
  while (!word.empty()) {
    const std::string_view character = word.substr(0, first_character(word).bytes);
    if (const auto it = words_.find(std::string(character)); it != words_.end()) {
      ids->push_back(it->second);
    } else {
      add_bytes(character);
    }
    word.remove_prefix(character.size());
  }
}

// Of all neighbours that merge, the pair of lowest rank does, the leftmost of equals, until none is left. A queue keeps
// a long word from taking quadratic time.
void Bpe::encode(std::string_view word, std::vector<int32_t>* out) const {
  if (whole_words_) {
    if (const auto it = words_.find(std::string(word)); it != words_.end()) return out->push_back(it->second);
  }
  struct Symbol {
    int32_t id, previous, next;  // neighbours by position; -1 = none
  };
  struct Candidate {
    int32_t rank, left, id;
    bool operator>(const Candidate& o) const { return std::pair(rank, left) > std::pair(o.rank, o.left); }
  };
  std::vector<int32_t> ids;
  first_symbols(word, &ids);
  const auto n = static_cast<int32_t>(ids.size());
  std::vector<Symbol> symbols(n);
  std::priority_queue<Candidate, std::vector<Candidate>, std::greater<>> queue;
  const auto consider = [&](int32_t left) {
    if (left < 0 || symbols[left].next < 0) return;
    const int32_t a = symbols[left].id, b = symbols[symbols[left].next].id;
    if (const auto it = merges_.find(pair(a, b)); it != merges_.end()) {
      queue.push({it->second.rank, left, it->second.id});
    }
  };
  for (int32_t i = 0; i < n; ++i) symbols[i] = {ids[i], i - 1, i + 1 < n ? i + 1 : -1};
  for (int32_t i = 0; i < n; ++i) consider(i);
  while (!queue.empty()) {
    const Candidate c = queue.top();
    queue.pop();
    Symbol& left = symbols[c.left];
    if (left.id < 0 || left.next < 0) continue;
    Symbol& right = symbols[left.next];
    // The pair may have become another one since; as in the reference it merges all the same if it makes the same
    // token.
    const auto now = merges_.find(pair(left.id, right.id));
    if (now == merges_.end() || now->second.id != c.id) continue;
    left.id = c.id;
    left.next = right.next;
    right.id = -1;
    if (left.next >= 0) symbols[left.next].previous = c.left;
    consider(left.previous);
    consider(c.left);
  }
  for (int32_t i = 0; i >= 0 && i < n; i = symbols[i].next) out->push_back(symbols[i].id);
}

}  // namespace thriftattn::model
