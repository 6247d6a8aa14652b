// Tokens that stand in a text as they are, found before it is tokenised.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace thriftattn::model {

struct AddedToken {
  std::string content;  // not empty
  int32_t id = 0;
  bool single_word = false;             // not where a letter, mark or digit touches it
  bool lstrip = false, rstrip = false;  // takes the white space before it, after it
};

class AddedTokens {
 public:
  void add(AddedToken token);

  // The leftmost of the longest that `text` holds at or after `from`; `at` is where it begins.
  const AddedToken* find(std::string_view text, size_t from, size_t* at) const;

  // Calls plain(part) and added(token) in order; together they cover `text`.
  template <class Plain, class Added>
  void split(std::string_view text, const Plain& plain, const Added& added) const {
    size_t done = 0, at = 0;
    for (size_t from = 0; const AddedToken* token = find(text, from, &at); from = at + token->content.size()) {
      const std::optional<Extent> extent = taken(*token, text, at, done);
      if (!extent) continue;
      if (extent->begin > done) plain(text.substr(done, extent->begin - done));
      added(*token);
      done = extent->end;
    }
    if (done < text.size()) plain(text.substr(done));
  }

 private:
  struct Extent {
    size_t begin, end;
  };
  // What a token at `at` takes of the text, not before `done`; nothing where it does not count.
  static std::optional<Extent> taken(const AddedToken& token, std::string_view text, size_t at, size_t done);

  std::array<std::vector<AddedToken>, 256> by_first_;  // longest first
};

}  // namespace thriftattn::model
