// Any bytes as a tokenizer.json; where it loads, a text is encoded and decoded. The text is what follows the input's
// first zero byte, after a fixed one. The 256 tokens of single bytes, without which no vocabulary is accepted, are put
// into `"vocab": {` by the target (ids 0 to 255): inputs stay small, and a mutation seldom breaks them.
#include <cstdint>
#include <cstdlib>
#include <string>
#include <string_view>

#include "model/tokenizer.h"

namespace {

// "\u0100": 0, ... as byte-level tokenizers spell single bytes.
std::string byte_tokens() {
  std::string out;
  uint32_t next = 0x100;
  char entry[32];
  for (uint32_t b = 0; b < 256; ++b) {
    const bool visible = (b >= '!' && b <= '~') || (b >= 0xa1 && b <= 0xac) || b >= 0xae;
    std::snprintf(entry, sizeof(entry), "\"\\u%04x\":%u,", visible ? b : next++, b);
    out += entry;
  }
  return out;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using thriftattn::model::TextStream;
  using thriftattn::model::Tokenizer;
  static const std::string bytes = byte_tokens();
  const std::string_view input(reinterpret_cast<const char*>(data), size);
  std::string json(input.substr(0, input.find('\0')));
  std::string text = "It's the old house, 1984 \xe2\x82\xac\n\n  and <s>hello</s>!";
  text += input.substr(std::min(input.size(), json.size() + 1));
  const std::string_view vocab = "\"vocab\":{";
  if (const size_t at = json.find(vocab); at != std::string::npos) json.insert(at + vocab.size(), bytes);

  const auto tokenizer = Tokenizer::parse(json, "tokenizer.json");
  if (!tokenizer.ok()) {
    const std::string& message = tokenizer.status().message();
    if (message.empty() || message.find('\n') != std::string::npos) std::abort();
    return 0;
  }
  const auto ids = tokenizer->encode(text);
  TextStream stream(*tokenizer);
  std::string streamed;
  for (const int32_t id : ids) {
    if (id < 0 || id >= tokenizer->vocab()) std::abort();
    streamed += stream.push(id);
  }
  streamed += stream.finish();
  if (streamed.empty() != tokenizer->decode(ids).empty()) std::abort();
  return 0;
}
