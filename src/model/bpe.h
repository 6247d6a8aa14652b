// Byte-pair encoding: a vocabulary, and the pairs of tokens that merge.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "model/json_file.h"
#include "thriftattn/status.h"

namespace thriftattn::model {

class Bpe {
 public:
  // What a word is made of before anything merges: bytes, which the vocabulary spells in visible characters (GPT-2); or
  // characters, and the tokens <0x00> to <0xFF> for those that have no token (SentencePiece).
  enum class Symbols : uint8_t { bytes, characters };

  // tokenizer.json's `model`; `source` names the file in errors.
  static Result<Bpe> parse(const Json& model, Symbols symbols, const std::string& source);
  // tekken.json's `vocab`: the bytes of each token in base64, by rank; ids are `first_id` more. `count` = tokens to
  // take.
  static Result<Bpe> parse_ranks(const Json& vocab, int64_t count, int64_t first_id, const std::string& source);

  // Appends the ids of one word.
  void encode(std::string_view word, std::vector<int32_t>* out) const;

  // What a token stands for, by id; empty where there is none.
  const std::vector<std::string>& tokens() const { return tokens_; }
  Status add(int64_t id, std::string bytes, const std::string& source);

 private:
  struct Merge {
    int32_t rank, id;  // lower ranks merge first; the token that the pair becomes
  };
  static uint64_t pair(int32_t left, int32_t right) {
    return static_cast<uint64_t>(left) << 32 | static_cast<uint32_t>(right);
  }
  Status check_bytes(const std::string& source) const;
  void first_symbols(std::string_view word, std::vector<int32_t>* ids) const;

  Symbols symbols_ = Symbols::bytes;
  bool whole_words_ = false;  // a word that is a token is taken whole, whatever the merges would make of it
  std::vector<std::string> tokens_;
  std::array<int32_t, 256> byte_ids_ = {};
  std::unordered_map<std::string, int32_t> words_;  // text -> id, where whole words or characters are looked up
  std::unordered_map<uint64_t, Merge> merges_;
};

}  // namespace thriftattn::model
