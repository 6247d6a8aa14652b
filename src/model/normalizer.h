// What tokenizer.json's normalizer does to a text before it is split.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "model/json_file.h"
#include "thriftattn/status.h"

namespace thriftattn::model {

class Normalizer {
 public:
  // Supported: null, NFC, Prepend, Replace (of a string) and sequences of them.
  static Result<Normalizer> parse(const Json& json, const std::string& source);

  // The normalised text; it lives in `storage` where it differs from `text`.
  std::string_view apply(std::string_view text, std::string* storage) const;

 private:
  struct Step {
    enum class Kind : uint8_t { nfc, prepend, replace } kind;
    std::string from, to;
  };
  std::vector<Step> steps_;
};

}  // namespace thriftattn::model
