// Regular expressions as tokenizer.json writes them: Oniguruma's meaning, matched by PCRE2.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <string>
#include <string_view>

#include "thriftattn/status.h"

namespace thriftattn::model {

class Pattern {
 public:
  // `literal`: the expression is the text to find. `source` names the file in errors.
  static Result<Pattern> compile(const std::string& expression, bool literal, const std::string& source);

  Pattern(Pattern&&) noexcept;
  Pattern& operator=(Pattern&&) noexcept;
  ~Pattern();

  // Calls piece(part, matched) for every match in `text` and for every stretch between matches, in order. Empty matches
  // split nothing, bytes that are not UTF-8 match nothing, and neither does what takes PCRE2 more than 10 million
  // steps.
  using Piece = std::function<void(std::string_view part, bool matched)>;
  void split(std::string_view text, const Piece& piece) const;

 private:
  struct Code;
  explicit Pattern(std::unique_ptr<const Code> code);
  std::unique_ptr<const Code> code_;
};

}  // namespace thriftattn::model
