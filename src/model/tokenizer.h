// Byte-level BPE as Hugging Face's tokenizer.json describes it; gives the same ids as the `tokenizers` library.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "thriftattn/status.h"

namespace thriftattn::model {

class Tokenizer {
 public:
  // Reads `dir`/tokenizer.json. Supported: model BPE without dropout, prefixes, suffixes or byte fallback;
  // pre-tokenizers ByteLevel, Split (isolated) and Digits and sequences of them that end in ByteLevel; no normalizer.
  // Errors name what is not.
  static Result<Tokenizer> load(const std::string& dir);
  // The same from the text of a tokenizer.json; `source` names it in errors.
  static Result<Tokenizer> parse(std::string_view json, const std::string& source);

  Tokenizer(Tokenizer&&) noexcept;
  Tokenizer& operator=(Tokenizer&&) noexcept;
  ~Tokenizer();

  // Ids of `text`. Added tokens, special ones included, are recognised in it; no BOS or EOS is put around it. Bytes
  // that are not UTF-8 are tokenised as bytes. May be called from several threads.
  std::vector<int32_t> encode(std::string_view text) const;

  // The bytes of one token, not always whole characters; empty for an id that no token has.
  std::string_view bytes(int32_t id) const;
  std::string decode(std::span<const int32_t> ids) const;

  // One more than the largest id.
  int64_t vocab() const;

 private:
  struct Rules;
  explicit Tokenizer(std::unique_ptr<const Rules> rules);
  std::unique_ptr<const Rules> rules_;
};

// Text of tokens that come one at a time, in whole UTF-8 characters. Bytes that can never become one turn into U+FFFD.
class TextStream {
 public:
  explicit TextStream(const Tokenizer& tokenizer) : tokenizer_(&tokenizer) {}
  // The text that `token` completes.
  std::string push(int32_t token);
  // What is left of a character that never became complete, as U+FFFD.
  std::string finish();

 private:
  std::string take(bool all);
  const Tokenizer* tokenizer_;
  std::string pending_;  // bytes of an incomplete character
};

}  // namespace thriftattn::model
