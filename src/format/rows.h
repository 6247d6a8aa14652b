// Rows of the caller's tensors to float and back, whatever their type.
#pragma once

#include <cstdint>
#include <cstring>

#include "format/codecs.h"
#include "thriftattn/tensor.h"

namespace thriftattn {

inline void load_row(DType type, const void* from, int64_t n, float* to) {
  if (type == DType::f32) {
    std::memcpy(to, from, n * sizeof(float));
    return;
  }
  const auto* bits = static_cast<const uint16_t*>(from);
  for (int64_t i = 0; i < n; ++i) to[i] = type == DType::f16 ? f16_decode(bits[i]) : bf16_decode(bits[i]);
}

inline void store_row(DType type, const float* from, int64_t n, void* to) {
  if (type == DType::f32) {
    std::memcpy(to, from, n * sizeof(float));
    return;
  }
  auto* bits = static_cast<uint16_t*>(to);
  for (int64_t i = 0; i < n; ++i) bits[i] = type == DType::f16 ? f16_encode(from[i]) : bf16_encode(from[i]);
}

}  // namespace thriftattn
