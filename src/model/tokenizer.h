// Byte-pair encoding as Hugging Face's tokenizer.json or Mistral's tekken.json describes it; gives the same ids as the
// `tokenizers` library.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "thriftattn/status.h"

namespace thriftattn::model {

class Tokenizer {
 public:
  // Reads `dir`/tokenizer.json or, where there is none, `dir`/tekken.json. Supported: model BPE without dropout,
  // prefixes and suffixes, over bytes (pre-tokenizers Split and Digits and a ByteLevel at the end) or over characters
  // with byte_fallback (Metaspace, Split or none); the normalizers of normalizer.h. Errors name what is not.
  static Result<Tokenizer> load(const std::string& dir);
  // The same from the text of a tokenizer.json, of a tekken.json; `source` names it in errors.
  static Result<Tokenizer> parse(std::string_view json, const std::string& source);
  static Result<Tokenizer> parse_tekken(std::string_view json, const std::string& source);

  Tokenizer(Tokenizer&&) noexcept;
  Tokenizer& operator=(Tokenizer&&) noexcept;
  ~Tokenizer();

  // Ids of `text`. Added tokens, special ones included, are recognised in it; no BOS or EOS is put around it. Bytes
  // that are not UTF-8 are tokenised as bytes. May be called from several threads.
  std::vector<int32_t> encode(std::string_view text) const;

  // What stands in front of a text, as Transformers' AutoTokenizer has it: the post-processor's tokens, which may be
  // none (what it puts after the text is left out, because prompts are continued). Without a post-processor
  // tokenizer_config.json's add_bos_token decides. Nothing = the folder does not say.
  const std::optional<std::vector<int32_t>>& prefix() const;

  // True where the model comes with a chat template (which nothing here renders).
  bool has_chat_template() const;

  // The bytes of one token, not always whole characters; empty for an id that no token has.
  std::string_view bytes(int32_t id) const;
  std::string decode(std::span<const int32_t> ids) const;

  // One more than the largest id.
  int64_t vocab() const;

 private:
  struct Rules;
  explicit Tokenizer(std::unique_ptr<Rules> rules);
  Status read_config(const std::string& dir);
  std::unique_ptr<Rules> rules_;
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
