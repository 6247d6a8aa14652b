// Any bytes as a model.safetensors.index.json: no file outside the folder is ever named.
#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "model/safetensors.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const auto index = thriftattn::model::parse_index({reinterpret_cast<const char*>(data), size}, "index.json");
  if (!index.ok()) {
    const std::string& message = index.status().message();
    if (message.empty() || message.find('\n') != std::string::npos) std::abort();
    return 0;
  }
  for (const auto& [tensor, file] : *index) {
    if (file.find('/') != std::string::npos) std::abort();
  }
  return 0;
}
