#include "model/added_tokens.h"

#include <algorithm>
#include <utility>

#include "model/unicode.h"

namespace thriftattn::model {

void AddedTokens::add(AddedToken token) {
  auto& bucket = by_first_[static_cast<uint8_t>(token.content[0])];
  const auto shorter = [&](const AddedToken& other) { return other.content.size() < token.content.size(); };
  bucket.insert(std::find_if(bucket.begin(), bucket.end(), shorter), std::move(token));
}

const AddedToken* AddedTokens::find(std::string_view text, size_t from, size_t* at) const {
  for (size_t i = from; i < text.size(); ++i) {
    for (const AddedToken& token : by_first_[static_cast<uint8_t>(text[i])]) {
      if (!text.substr(i).starts_with(token.content)) continue;
      *at = i;
      return &token;
    }
  }
  return nullptr;
}

std::optional<AddedTokens::Extent> AddedTokens::taken(const AddedToken& token, std::string_view text, size_t at,
                                                      size_t done) {
  size_t begin = at, end = at + token.content.size();
  if (token.single_word &&
      (is_word(last_character(text.substr(0, begin)).code) || is_word(first_character(text.substr(end)).code))) {
    return std::nullopt;
  }
  if (token.lstrip) {
    while (begin > 0) {
      const Character before = last_character(text.substr(0, begin));
      if (!is_space(before.code)) break;
      begin -= before.bytes;
    }
    begin = std::max(begin, done);  // an earlier token may have taken some
  }
  if (token.rstrip) {
    while (end < text.size()) {
      const Character after = first_character(text.substr(end));
      if (!is_space(after.code)) break;
      end += after.bytes;
    }
  }
  return Extent{begin, end};
}

}  // namespace thriftattn::model
