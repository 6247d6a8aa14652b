#include "tensors.h"

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstdlib>
#include <functional>
#include <new>
#include <numeric>
#include <tuple>

#ifdef THRIFTATTN_PYTHON_CUDA
#include "core/device.h"
#endif

namespace thriftattn::python {
namespace {

using namespace nb::literals;  // NOLINT: the names of arguments

std::string kind_of(nb::handle object) { return nb::cast<std::string>(nb::str(object.type().attr("__name__"))); }

std::string dtype_name(nb::dlpack::dtype t) {
  static constexpr const char* kKinds[] = {"int", "uint", "float", "opaque", "bfloat", "complex", "bool"};
  return t.code < std::size(kKinds) ? fmt::format("{}{}", kKinds[t.code], t.bits)
                                    : fmt::format("DLPack type {} of {} bits", t.code, t.bits);
}

std::vector<int64_t> shape_of(const nb::ndarray<nb::ro>& array) {
  return {array.shape_ptr(), array.shape_ptr() + array.ndim()};
}

// Whether two rows of a view share memory.
bool overlaps(const View& v) {
  struct Axis {
    int64_t stride, count;
  } inner{std::abs(v.head_stride), v.heads}, outer{std::abs(v.token_stride), v.tokens};
  if (inner.stride > outer.stride) std::swap(inner, outer);
  int64_t reach = v.channels;  // elements that the axes so far span
  for (const Axis& axis : {inner, outer}) {
    if (axis.count <= 1) continue;
    if (axis.stride < reach) return true;
    reach += axis.stride * (axis.count - 1);
  }
  return false;
}

[[noreturn]] void type_error(const std::string& message) { throw nb::type_error(message.c_str()); }
[[noreturn]] void value_error(const std::string& message) { throw nb::value_error(message.c_str()); }

// Where DLPack says that an array lies; memory of other kinds is refused.
Device device_of(const nb::ndarray<nb::ro>& array, const char* name) {
  switch (array.device_type()) {
    case nb::device::cpu::value:
      return {};
    case nb::device::cuda::value:
      return {array.device_id()};
    default:
      value_error(
          fmt::format("{} is on DLPack device {}:{}: tensors in the CPU's memory and on NVIDIA GPUs are supported",
                      name, array.device_type(), array.device_id()));
  }
}

// A tensor of any type, of one axis or more, the last of them contiguous.
Tensor any_tensor(nb::handle object, const char* name) {
  // Of PyTorch alone; a gradient would be lost without a word.
  if (nb::hasattr(object, "requires_grad") && nb::cast<bool>(object.attr("requires_grad")))
    type_error(fmt::format("{} requires grad, and nothing here has a gradient: pass {}.detach()", name, name));
  Tensor t;
  if (!nb::ndarray_check(object) || !nb::try_cast(object, t.array)) {
    PyErr_Clear();
    type_error(fmt::format("{} is a {}: a tensor that speaks DLPack is expected (NumPy, PyTorch, JAX, ...)", name,
                           kind_of(object)));
  }
  t.device = device_of(t.array, name);
  const Framework framework = framework_of(object);
  if (!t.device.is_cpu() && framework != Framework::torch && framework != Framework::cupy) {
    // Its maker alone knows the stream that it is written on, and now makes the legacy default stream, 1 in DLPack,
    // wait.
    const nb::object ready = object.attr("__dlpack__")("stream"_a = 1);
    t.array = nb::cast<nb::ndarray<nb::ro>>(ready);
  }
  const nb::ndarray<nb::ro>& array = t.array;
  if (array.ndim() == 0) value_error(fmt::format("{} is a scalar: one axis or more is expected", name));
  const size_t last = array.ndim() - 1;
  if (array.size() > 0 && array.shape(last) > 1 && array.stride(last) != 1)
    value_error(fmt::format("{}: the last axis is not contiguous, its stride is {}: pass a contiguous copy", name,
                            array.stride(last)));
  return t;
}

bool is_packed(const nb::ndarray<nb::ro>& array) {
  int64_t packed = 1;
  for (size_t axis = array.ndim(); axis-- > 0; packed *= static_cast<int64_t>(array.shape(axis)))
    if (array.shape(axis) > 1 && array.stride(axis) != packed) return array.size() == 0;
  return true;
}

// The contiguous copy of a tensor of a GPU that `framework` makes.
nb::object packed_copy(nb::handle object, const char* name, const nb::ndarray<nb::ro>& array, Framework framework) {
  switch (framework) {
    case Framework::torch:
      return object.attr("contiguous")();
    case Framework::cupy: {
      const CupyDevice there({array.device_id()});
      return nb::module_::import_("cupy").attr("ascontiguousarray")(object);
    }
    default:
      value_error(fmt::format("{}: strides [{}] have gaps: pass a contiguous copy", name,
                              fmt::join(array.stride_ptr(), array.stride_ptr() + array.ndim(), ", ")));
  }
}

// Device memory and the object that frees it.
std::pair<void*, nb::object> take_on_gpu(size_t bytes, Device device) {
#ifdef THRIFTATTN_PYTHON_CUDA
  auto memory = std::make_unique<cuda::DeviceMemory>(value_or_raise(
      cuda::DeviceMemory::take(static_cast<int64_t>(std::max<size_t>(bytes, 1)), device.gpu, "a tensor")));
  void* data = memory->data();
  nb::capsule owner(memory.release(), [](void* p) noexcept { delete static_cast<cuda::DeviceMemory*>(p); });
  return {data, std::move(owner)};
#else
  static_cast<void>(bytes);
  value_error(fmt::format("this build has no memory on {}", to_string(device)));
#endif
}

}  // namespace

void check(const Status& status) {
  const char* message = status.message().c_str();
  switch (status.code()) {
    case Code::ok:
      return;
    case Code::unsupported:
      PyErr_SetString(PyExc_NotImplementedError, message);
      break;
    case Code::out_of_memory:
      PyErr_SetString(PyExc_MemoryError, message);
      break;
    case Code::io:
      PyErr_SetString(PyExc_OSError, message);
      break;
    default:
      PyErr_SetString(PyExc_ValueError, message);
  }
  throw nb::python_error();
}

Tensor tensor(nb::handle object, const char* name) {
  Tensor t = any_tensor(object, name);
  const nb::dlpack::dtype type = t.array.dtype();
  for (const DType known : {DType::f32, DType::f16, DType::bf16})
    if (type == dlpack_type(known)) {
      t.dtype = known;
      return t;
    }
  type_error(fmt::format("{} is of {}: float32, float16 and bfloat16 are supported", name, dtype_name(type)));
}

Tensor byte_tensor(nb::handle object, const char* name) {
  Tensor t = any_tensor(object, name);
  if (t.array.dtype() != nb::dtype<uint8_t>())
    type_error(fmt::format("{} is of {}: uint8 is supported", name, dtype_name(t.array.dtype())));
  return t;
}

Tensor tensor(nb::handle object, const char* name, std::initializer_list<const char*> axes) {
  Tensor t = tensor(object, name);
  if (t.array.ndim() != axes.size())
    value_error(fmt::format("{} is {}, expected [{}]", name, shape_of(t.array), fmt::join(axes, ", ")));
  return t;
}

void check_device(const Tensor& tensor, const char* name, const char* what, Device device) {
  if (tensor.device != device)
    value_error(fmt::format("{} is on {}, {} on {}: one device is expected", name, to_string(tensor.device), what,
                            to_string(device)));
}

View Sequences::sequence(int64_t i) const {
  View v = first;
  v.data = static_cast<const char*>(first.data) + i * stride * size_of(first.dtype);
  return v;
}

View Sequences::rows() const {
  View v = first;
  v.tokens = b * first.tokens;
  if (first.tokens == 1) v.token_stride = stride;
  return v;
}

Batch batch(nb::handle object, const char* name, std::initializer_list<const char*> axes) {
  Batch result;
  result.tensor = tensor(object, name, axes);
  const Tensor& t = result.tensor;
  View& v = result.first;
  v = {t.data(), t.dtype, t.size(1), t.size(2), t.size(3), 0, 0};
  v.head_stride = t.stride(2, v.channels);
  v.token_stride = t.stride(1, v.heads * v.channels);
  result.b = t.size(0);
  result.stride = t.stride(0, v.tokens * v.token_stride);
  if (v.tokens == 1) v.token_stride = result.stride;
  return result;
}

Tensor packed_on_gpu(Tensor t, nb::handle object, const char* name) {
  if (t.device.is_cpu() || is_packed(t.array)) return t;
  t.array = nb::cast<nb::ndarray<nb::ro>>(packed_copy(object, name, t.array, framework_of(object)));
  return t;
}

Batch in_rows_on_gpu(Batch t, nb::handle object, const char* name, std::initializer_list<const char*> axes,
                     nb::handle stream) {
  if (t.in_rows()) return t;
  const Framework framework = stream.is_none() ? framework_of(object) : Framework::other;
  return batch(packed_copy(object, name, t.tensor.array, framework), name, axes);
}

Output::Output(const std::vector<size_t>& shape, nb::dlpack::dtype dtype, nb::handle like, Device device)
    : shape_(shape), dtype_(dtype), framework_(framework_of(like)), device_(device) {
  if (!device.is_cpu() && framework_ == Framework::torch) {
    const nb::object type = nb::module_::import_("torch").attr(dtype_name(dtype).c_str());
    tensor_ = like.attr("new_empty")(shape, "dtype"_a = type);
    data_ = reinterpret_cast<void*>(nb::cast<uintptr_t>(tensor_.attr("data_ptr")()));
    return;
  }
  if (!device.is_cpu() && framework_ == Framework::cupy) {
    const CupyDevice there(device);
    tensor_ = nb::module_::import_("cupy").attr("empty")(shape, dtype_name(dtype).c_str());
    data_ = reinterpret_cast<void*>(nb::cast<uintptr_t>(tensor_.attr("data").attr("ptr")));
    return;
  }
  const size_t bytes = std::accumulate(shape.begin(), shape.end(), size_t{1}, std::multiplies<>()) * dtype.bits / 8;
  if (device.is_cpu()) {
    constexpr std::align_val_t kAligned{64};  // what JAX takes without a copy
    data_ = operator new(bytes, kAligned);
    owner_ = nb::capsule(data_, [](void* p) noexcept { operator delete(p, kAligned); });
  } else {
    std::tie(data_, owner_) = take_on_gpu(bytes, device);
  }
}

nb::object Output::release() {
  if (tensor_.is_valid()) return std::move(tensor_);
  const auto give = [&](auto as) {
    using Array = decltype(as);
    const int type = device_.is_cpu() ? nb::device::cpu::value : nb::device::cuda::value;
    return nb::cast(
        Array(data_, shape_.size(), shape_.data(), std::move(owner_), nullptr, dtype_, type, std::max(0, device_.gpu)));
  };
  if (framework_ == Framework::jax) return give(nb::ndarray<nb::jax>());
  if (!device_.is_cpu()) return give(nb::ndarray<>());
  if (framework_ == Framework::torch) return give(nb::ndarray<nb::pytorch>());
  if (dtype_ == dlpack_type(DType::bf16)) return give(nb::ndarray<>());  // NumPy has no such type
  return give(nb::ndarray<nb::numpy>());
}

nb::dlpack::dtype dlpack_type(DType type) {
  const auto code = type == DType::bf16 ? nb::dlpack::dtype_code::Bfloat : nb::dlpack::dtype_code::Float;
  return {static_cast<uint8_t>(code), static_cast<uint8_t>(8 * size_of(type)), 1};
}

Written written(nb::handle out, const char* name, const std::vector<int64_t>& shape, DType dtype, nb::handle like,
                Device device) {
  const int64_t rows = shape[0] * shape[1], h_q = shape[2], d_v = shape[3];
  if (out.is_none()) {
    Output fresh({shape.begin(), shape.end()}, dlpack_type(dtype), like, device);
    void* data = fresh.data<void>();
    return {std::move(fresh), {data, dtype, rows, h_q, d_v, h_q * d_v, d_v}};
  }
  const Batch t = batch(out, name, {"b", "s_q", "h_q", "d_v"});
  check_device(t.tensor, name, "q", device);
  if (shape_of(t.tensor.array) != shape)
    value_error(fmt::format("{} is {}, expected {}", name, shape_of(t.tensor.array), shape));
  nb::ndarray<> writable;
  if (!nb::try_cast(out, writable)) {
    PyErr_Clear();
    value_error(fmt::format("{} is read-only", name));
  }
  const View view = t.rows();
  if (!t.in_rows() || overlaps(view))
    value_error(fmt::format("{}: strides {} overlap or do not lead from row to row: pass a contiguous tensor", name,
                            std::vector<int64_t>(writable.stride_ptr(), writable.stride_ptr() + writable.ndim())));
  return {Output(nb::borrow(out)),
          {writable.data(), view.dtype, view.tokens, view.heads, view.channels, view.token_stride, view.head_stride}};
}

}  // namespace thriftattn::python
