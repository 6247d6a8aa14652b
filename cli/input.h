// What the user hands in: texts and questions, checked before any work begins.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "thriftattn/method.h"
#include "thriftattn/status.h"

namespace thriftattn::cli {

// A whole file of UTF-8. Refused, with the path: no such file, a folder, empty, not UTF-8 (with the offset).
Result<std::string> read_text(const std::string& path);

// A method for a command that runs no model, so that a schedule, @FILE, has no layers to speak of and is refused.
Result<Method> one_method(const std::string& spec);

// The GPU that --device names, by index; none for "cpu".
Result<std::optional<int>> parse_device(const std::string& device);

// The length in bytes of the longest prefix of `bytes` that is whole, valid UTF-8.
size_t valid_utf8(std::string_view bytes);

struct Question {
  std::string ask, answer;  // tokenised separately, exactly as they stand
};
struct Exam {
  std::string context;
  std::vector<Question> questions;
};

// Lines of {"context": "", "questions": [{"ask": "", "answer": ""}]}; other keys are let be, blank lines skipped. A
// malformed line is refused with its number. No string may be empty, and no list.
Result<std::vector<Exam>> read_exams(const std::string& path);

}  // namespace thriftattn::cli
