// Any bytes as a tokenizer.json; where it loads, a text is encoded and decoded. The text is what follows the input's
// first zero byte, after a fixed one. The 256 tokens of single bytes, without which no vocabulary is accepted, are put
// into `"vocab": {` by the target in both spellings (ids 0 to 511): inputs stay small, and a mutation seldom breaks
// them. The same bytes are read as a tekken.json, whose vocabulary is put into `"vocab": [`.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <string_view>

#include "model/tokenizer.h"

namespace {

// "\u0100": 0, ..., "<0x00>": 256, ... as tokenizers over bytes and over characters spell single bytes.
std::string byte_tokens() {
  std::string out;
  uint32_t next = 0x100;
  char entry[32];
  for (uint32_t b = 0; b < 256; ++b) {
    const bool visible = (b >= '!' && b <= '~') || (b >= 0xa1 && b <= 0xac) || b >= 0xae;
    std::snprintf(entry, sizeof(entry), "\"\\u%04x\":%u,", visible ? b : next++, b);
    out += entry;
    std::snprintf(entry, sizeof(entry), "\"<0x%02X>\":%u,", b, 256 + b);
    out += entry;
  }
  return out;
}

// {"rank": 0, "token_bytes": "AA=="}, ... of tekken.json.
std::string byte_ranks() {
  const char* digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  std::string out;
  char entry[64];
  for (uint32_t b = 0; b < 256; ++b) {
    std::snprintf(entry, sizeof(entry), "{\"rank\":%u,\"token_bytes\":\"%c%c==\"},", b, digits[b >> 2],
                  digits[(b & 3) << 4]);
    out += entry;
  }
  return out;
}

using thriftattn::Result;
using thriftattn::model::TextStream;
using thriftattn::model::Tokenizer;

void use(const Result<Tokenizer>& tokenizer, const std::string& text) {
  if (!tokenizer.ok()) {
    const std::string& message = tokenizer.status().message();
    if (message.empty() || message.find('\n') != std::string::npos) std::abort();
    return;
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
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const std::string bytes = byte_tokens(), ranks = byte_ranks();
  const std::string_view input(reinterpret_cast<const char*>(data), size);
  const std::string json(input.substr(0, input.find('\0')));
  std::string text = "It's the old house, 1984 \xe2\x82\xac\n\n  and <s>hello</s>! cafe\xcc\x81";
  text += input.substr(std::min(input.size(), json.size() + 1));
  const auto with = [&](std::string_view where, const std::string& tokens) {
    std::string filled = json;
    if (const size_t at = json.find(where); at != std::string::npos) filled.insert(at + where.size(), tokens);
    return filled;
  };
  use(Tokenizer::parse(with("\"vocab\":{", bytes), "tokenizer.json"), text);
  use(Tokenizer::parse_tekken(with("\"vocab\":[", ranks), "tekken.json"), text);
  return 0;
}
