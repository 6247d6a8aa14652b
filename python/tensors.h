// Tensors that Python hands in and gets back. Any object that speaks DLPack comes in, and is read and written where it
// lies; what goes back is of the caller's framework.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>
#include <initializer_list>
#include <memory>
#include <string>
#include <vector>

#include "thriftattn/status.h"
#include "thriftattn/tensor.h"

namespace thriftattn::python {

namespace nb = nanobind;

// Raises what a Status says: ValueError for invalid_argument and not_found, NotImplementedError for unsupported,
// MemoryError, OSError.
void check(const Status& status);

template <class T>
T value_or_raise(Result<T> result) {
  check(result.status());
  return std::move(*result);
}

// A tensor on the CPU whose last axis is contiguous.
struct Tensor {
  nb::ndarray<nb::ro> array;  // keeps the memory
  DType dtype = DType::f32;

  const void* data() const { return array.data(); }
  int64_t size(int axis) const { return static_cast<int64_t>(array.shape(axis)); }
  // Elements from one index of an axis to the next. An axis of length 1 or less has none: `packed` stands for it.
  int64_t stride(int axis, int64_t packed) const { return size(axis) > 1 ? array.stride(axis) : packed; }
};

// Raises TypeError where `object` is no tensor, wants a gradient, or is not of F32, F16 or BF16; ValueError where it
// is on another device, has another number of axes than `axes`, whose words name them, or a last axis with gaps.
Tensor tensor(nb::handle object, const char* name, std::initializer_list<const char*> axes);
Tensor tensor(nb::handle object, const char* name);       // of one axis or more
Tensor byte_tensor(nb::handle object, const char* name);  // the same, of uint8; `dtype` says nothing

// The sequences [tokens, heads, channels] of a tensor [b, tokens, heads, channels].
struct Batch {
  Tensor tensor;
  int64_t b = 0;
  View first;          // the first sequence
  int64_t stride = 0;  // elements from one sequence to the next

  View sequence(int64_t i) const;
  // Whether one stride leads from row to row through all sequences.
  bool in_rows() const { return b <= 1 || first.tokens == 0 || stride == first.tokens * first.token_stride; }
  View rows() const;  // [b * tokens, heads, channels]; only where in_rows()
};
Batch batch(nb::handle object, const char* name, std::initializer_list<const char*> axes);

// Memory that is written and then given to Python.
class Output {
 public:
  Output(std::vector<size_t> shape, nb::dlpack::dtype dtype);

  template <class T>
  T* data() const {
    return reinterpret_cast<T*>(bytes_.get());
  }
  // A tensor of the framework of `like` (NumPy where that is none of PyTorch and JAX), which owns the memory.
  nb::object release(nb::handle like);

 private:
  std::vector<size_t> shape_;
  nb::dlpack::dtype dtype_;
  std::unique_ptr<char[]> bytes_;
};

nb::dlpack::dtype dlpack_type(DType type);

// The [rows, heads, channels] that a call writes, and what the caller then gets.
struct Written {
  nb::object given;  // the caller's own; none where `fresh` is used
  std::unique_ptr<Output> fresh;
  MutableView view;

  nb::object release(nb::handle like) { return fresh ? fresh->release(like) : given; }
};
// `out` is None or a writable tensor [b, s_q, h_q, d_v] whose rows follow one another at one stride.
Written written(nb::handle out, const char* name, int64_t b, int64_t s_q, int64_t h_q, int64_t d_v, DType dtype);

}  // namespace thriftattn::python
