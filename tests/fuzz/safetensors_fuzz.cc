// Any bytes as a safetensors file. An input that begins with '{' is a header up to the first zero byte, and the data
// after it: the length in front is put there, so that changing a header's size does not end every attempt.
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>
#include <string_view>
#include <vector>

#include "model/safetensors.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  namespace model = thriftattn::model;
  std::string_view input(reinterpret_cast<const char*>(data), size);
  std::vector<char> file;  // of exactly its size: a byte too far is seen
  if (input.starts_with('{')) {
    const std::string_view header = input.substr(0, input.find('\0'));
    const std::string_view rest = input.substr(std::min(input.size(), header.size() + 1));
    const uint64_t length = header.size();
    file.resize(8 + header.size() + rest.size());
    std::memcpy(file.data(), &length, 8);
    std::copy(header.begin(), header.end(), file.begin() + 8);
    std::copy(rest.begin(), rest.end(), file.begin() + 8 + header.size());
  } else {
    file.assign(input.begin(), input.end());
  }
  const auto tensors = model::parse_safetensors({file.data(), file.size()}, "model.safetensors");
  if (!tensors.ok()) {
    if (tensors.status().message().empty()) std::abort();
    return 0;
  }
  for (const model::Tensor& t : *tensors) {
    const bool readable = t.dtype_name == "F32" || t.dtype_name == "F16" || t.dtype_name == "BF16";
    if (!readable || t.elements() == 0) continue;
    int64_t elements = 1;  // what the loader compares with config.json, and then reads
    for (const int64_t n : t.shape) elements *= n;
    if (elements != t.elements()) std::abort();
    std::vector<float> out(elements);
    t.read(0, elements, out.data());
  }
  return 0;
}
