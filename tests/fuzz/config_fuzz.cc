// Any bytes as a config.json: an answer or a refusal in one line, and limits that the loader relies on.
#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "model/config.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using thriftattn::model::ModelConfig;
  const auto config = ModelConfig::parse({reinterpret_cast<const char*>(data), size}, "config.json");
  if (!config.ok()) {
    const std::string& message = config.status().message();
    if (message.empty() || message.find('\n') != std::string::npos) std::abort();
    return 0;
  }
  const ModelConfig& c = *config;
  if (c.layers < 1 || c.hidden < 1 || c.vocab < 1 || c.d < 1 || c.h_kv < 1 || c.h_q % c.h_kv != 0) std::abort();
  if (c.bos && (*c.bos < 0 || *c.bos >= c.vocab)) std::abort();
  for (const int32_t id : c.eos) {
    if (id < 0 || id >= c.vocab) std::abort();
  }
  return 0;
}
