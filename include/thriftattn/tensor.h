// Views of the caller's memory. The library copies what it keeps and never owns what it is shown.
#pragma once

#include <cstdint>
#include <type_traits>

namespace thriftattn {

enum class DType : uint8_t { f32, f16, bf16 };

inline constexpr int64_t size_of(DType type) { return type == DType::f32 ? 4 : 2; }

// A [tokens, heads, channels] tensor whose channels are contiguous. Strides count elements.
template <class Pointer>
struct BasicView {
  Pointer data = nullptr;
  DType dtype = DType::f32;
  int64_t tokens = 0, heads = 0, channels = 0;
  int64_t token_stride = 0, head_stride = 0;

  // Address of element [token, head, 0].
  auto* at(int64_t token, int64_t head) const {
    using Byte = std::conditional_t<std::is_const_v<std::remove_pointer_t<Pointer>>, const char, char>;
    return reinterpret_cast<Byte*>(data) + (token * token_stride + head * head_stride) * size_of(dtype);
  }
  BasicView slice(int64_t first, int64_t count) const {
    BasicView v = *this;
    v.data = at(first, 0);
    v.tokens = count;
    return v;
  }
};
using View = BasicView<const void*>;
using MutableView = BasicView<void*>;

// A packed [tokens, heads, channels] view of floats.
inline View view(const float* data, int64_t tokens, int64_t heads, int64_t channels) {
  return {data, DType::f32, tokens, heads, channels, heads * channels, channels};
}
inline MutableView mutable_view(float* data, int64_t tokens, int64_t heads, int64_t channels) {
  return {data, DType::f32, tokens, heads, channels, heads * channels, channels};
}

}  // namespace thriftattn
