#include "model/pattern.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <fmt/format.h>
#include <pcre2.h>

#include <new>
#include <utility>

#include "model/json_file.h"

namespace thriftattn::model {
namespace {

// PCRE2's \s has U+180E, which is no white space since Unicode 6.3: spells \s and \S out, as sets or as members of one.
std::string with_unicode_spaces(const std::string& expression) {
  const std::string spaces =
      R"(\t-\r\x{20}\x{85}\x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000})";
  std::string out;
  bool in_set = false;
  for (size_t i = 0; i < expression.size(); ++i) {
    const char c = expression[i], escaped = c == '\\' && i + 1 < expression.size() ? expression[i + 1] : '\0';
    if (escaped == 's') {
      out += in_set ? spaces : '[' + spaces + ']';
    } else if (escaped == 'S' && !in_set) {
      out += "[^" + spaces + ']';
    } else {
      out += c;
      if (escaped) out += escaped;
      if (c == '[' || c == ']') in_set = c == '[';
    }
    if (escaped) ++i;
  }
  return out;
}

}  // namespace

struct Pattern::Code {
  pcre2_code* code = nullptr;
  ~Code() { pcre2_code_free(code); }
};

Pattern::Pattern(std::unique_ptr<const Code> code) : code_(std::move(code)) {}
Pattern::Pattern(Pattern&&) noexcept = default;
Pattern& Pattern::operator=(Pattern&&) noexcept = default;
Pattern::~Pattern() = default;

Result<Pattern> Pattern::compile(const std::string& expression, bool literal, const std::string& source) {
  int error = 0;
  size_t at = 0;
  const uint32_t options = PCRE2_UTF | PCRE2_MATCH_INVALID_UTF | (literal ? PCRE2_LITERAL : PCRE2_UCP);
  const std::string spelled = literal ? expression : with_unicode_spaces(expression);
  auto code = std::make_unique<Code>();
  code->code =
      pcre2_compile(reinterpret_cast<PCRE2_SPTR>(spelled.data()), spelled.size(), options, &error, &at, nullptr);
  if (!code->code) {
    PCRE2_UCHAR text[256] = {};
    pcre2_get_error_message(error, text, sizeof(text));
    return unsupported(fmt::format("{}: pattern {} is not supported: {}", source, shown(expression),
                                   reinterpret_cast<const char*>(text)));
  }
  pcre2_jit_compile(code->code, PCRE2_JIT_COMPLETE);  // where there is no JIT, matching is slower and the same
  return Pattern(std::move(code));
}

void Pattern::split(std::string_view text, const Piece& piece) const {
  const std::unique_ptr<pcre2_match_data, decltype(&pcre2_match_data_free)> match(
      pcre2_match_data_create_from_pattern(code_->code, nullptr), pcre2_match_data_free);
  if (!match) throw std::bad_alloc();
  const auto* subject = reinterpret_cast<PCRE2_SPTR>(text.data());
  const auto matches = [&](size_t from) {
    int found = pcre2_match(code_->code, subject, text.size(), from, 0, match.get(), nullptr);
    if (found == PCRE2_ERROR_JIT_STACKLIMIT) {  // the interpreter takes its stack from the heap
      found = pcre2_match(code_->code, subject, text.size(), from, PCRE2_NO_JIT, match.get(), nullptr);
    }
    if (found == PCRE2_ERROR_NOMEMORY) throw std::bad_alloc();
    return found > 0;
  };
  size_t done = 0, from = 0;
  while (from < text.size() && matches(from)) {
    const size_t* bounds = pcre2_get_ovector_pointer(match.get());
    if (bounds[1] <= bounds[0]) {
      do ++from;
      while (from < text.size() && (static_cast<unsigned char>(text[from]) & 0xc0) == 0x80);
      continue;
    }
    if (bounds[0] > done) piece(text.substr(done, bounds[0] - done), false);
    piece(text.substr(bounds[0], bounds[1] - bounds[0]), true);
    done = from = bounds[1];
  }
  if (done < text.size()) piece(text.substr(done), false);
}

}  // namespace thriftattn::model
