// Tensors that Python hands in and gets back. Any object that speaks DLPack comes in, and is read and written where it
// lies, in the CPU's memory or on a GPU; what goes back is of the caller's framework, in the same place.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>
#include <initializer_list>
#include <memory>
#include <string>
#include <vector>

#include "device.h"
#include "thriftattn/status.h"
#include "thriftattn/tensor.h"

namespace thriftattn::python {

// Raises what a Status says: ValueError for invalid_argument and not_found, NotImplementedError for unsupported,
// MemoryError, OSError.
void check(const Status& status);

template <class T>
T value_or_raise(Result<T> result) {
  check(result.status());
  return std::move(*result);
}

// A tensor whose last axis is contiguous.
struct Tensor {
  nb::ndarray<nb::ro> array;  // keeps the memory
  Device device;
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

// Raises ValueError where a tensor is on another device than `what`, which is on `device`.
void check_device(const Tensor& tensor, const char* name, const char* what, Device device);

// Sequences [tokens, heads, channels], one after another at a stride.
struct Sequences {
  int64_t b = 0;
  View first;          // the first sequence
  int64_t stride = 0;  // elements from one sequence to the next

  View sequence(int64_t i) const;
  // Whether one stride leads from row to row through all sequences.
  bool in_rows() const { return b <= 1 || first.tokens == 0 || stride == first.tokens * first.token_stride; }
  View rows() const;  // [b * tokens, heads, channels]; only where in_rows()
};

// A tensor [b, tokens, heads, channels] as sequences.
struct Batch : Sequences {
  Tensor tensor;
};
Batch batch(nb::handle object, const char* name, std::initializer_list<const char*> axes);

// The same tensor with its elements one after another, where it is on a GPU: itself, or the copy that PyTorch or CuPy
// makes on its current stream. Others raise ValueError.
Tensor packed_on_gpu(Tensor tensor, nb::handle object, const char* name);

// The same tensor in rows, in the same way; where `stream` is not None nothing is copied, and ValueError raised.
Batch in_rows_on_gpu(Batch tensor, nb::handle object, const char* name, std::initializer_list<const char*> axes,
                     nb::handle stream);

// A new tensor of the framework of `like`, on `device`; for others NumPy, or, of bfloat16 and on a GPU, an object that
// speaks DLPack. The caller writes what it holds, then releases it: a framework may copy what it is shown.
class Output {
 public:
  Output(const std::vector<size_t>& shape, nb::dlpack::dtype dtype, nb::handle like = nb::none(), Device device = {});
  explicit Output(nb::object tensor) : tensor_(std::move(tensor)) {}  // one that is there, as it is

  template <class T>
  T* data() const {
    return static_cast<T*>(data_);
  }
  nb::object release();

 private:
  nb::object tensor_;  // where its framework has made it
  void* data_ = nullptr;
  nb::object owner_;  // of memory that no framework has made
  std::vector<size_t> shape_;
  nb::dlpack::dtype dtype_{};
  Framework framework_ = Framework::other;
  Device device_;
};

nb::dlpack::dtype dlpack_type(DType type);

// The [rows, heads, channels] that a call writes, and what the caller then gets.
struct Written {
  Output tensor;
  MutableView view;
};
// `out` is None, for a new tensor of the framework of `like`, or a writable tensor [b, s_q, h_q, d_v] on the same
// device whose rows follow one another at one stride.
Written written(nb::handle out, const char* name, const std::vector<int64_t>& shape, DType dtype, nb::handle like,
                Device device);

}  // namespace thriftattn::python
