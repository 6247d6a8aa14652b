// What tokenisation needs of Unicode, from utf8proc's tables.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace thriftattn::model {

struct Character {
  int32_t code = -1;  // -1 = bytes that are no UTF-8 character
  size_t bytes = 0;   // 0 = there is none
};
Character first_character(std::string_view text);
Character last_character(std::string_view text);

// The property White_Space.
bool is_space(int32_t code);
// What \w matches in Unicode's regular expressions (UTS 18): letters, marks, decimal digits, connectors, joiners.
bool is_word(int32_t code);

// Normalisation form C. Bytes that are not UTF-8 stay as they are and separate what is normalised.
std::string nfc(std::string_view text);

// `text` with `to` for every `from`, which is not empty.
std::string replaced(std::string_view text, std::string_view from, std::string_view to);

}  // namespace thriftattn::model
