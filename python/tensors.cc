#include "tensors.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cstdlib>
#include <numeric>

namespace thriftattn::python {
namespace {

// First word of the module that the type of `object` comes from: "numpy", "torch", "jaxlib".
std::string framework(nb::handle object) {
  const auto module = nb::cast<std::string>(nb::str(object.type().attr("__module__")));
  return module.substr(0, module.find('.'));
}

std::string kind_of(nb::handle object) { return nb::cast<std::string>(nb::str(object.type().attr("__name__"))); }

std::string dtype_name(nb::dlpack::dtype t) {
  static constexpr const char* kKinds[] = {"int", "uint", "float", "opaque", "bfloat", "complex", "bool"};
  return t.code < std::size(kKinds) ? fmt::format("{}{}", kKinds[t.code], t.bits)
                                    : fmt::format("DLPack type {} of {} bits", t.code, t.bits);
}

std::string device_name(int type) {
  switch (type) {
    case nb::device::cuda::value:
      return "cuda";
    case nb::device::rocm::value:
      return "rocm";
    case nb::device::metal::value:
      return "metal";
    default:
      return fmt::format("DLPack device {}", type);
  }
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

// A tensor of any type on the CPU, of one axis or more, the last of them contiguous.
nb::ndarray<nb::ro> on_cpu(nb::handle object, const char* name) {
  // Of PyTorch alone; a gradient would be lost without a word.
  if (nb::hasattr(object, "requires_grad") && nb::cast<bool>(object.attr("requires_grad")))
    type_error(fmt::format("{} requires grad, and nothing here has a gradient: pass {}.detach()", name, name));
  nb::ndarray<nb::ro> array;
  if (!nb::ndarray_check(object) || !nb::try_cast(object, array)) {
    PyErr_Clear();
    type_error(fmt::format("{} is a {}: a tensor that speaks DLPack is expected (NumPy, PyTorch, JAX, ...)", name,
                           kind_of(object)));
  }
  if (array.device_type() != nb::device::cpu::value)
    value_error(fmt::format("{} is on {}:{}: tensors in the CPU's memory are supported", name,
                            device_name(array.device_type()), array.device_id()));
  if (array.ndim() == 0) value_error(fmt::format("{} is a scalar: one axis or more is expected", name));
  const size_t last = array.ndim() - 1;
  if (array.size() > 0 && array.shape(last) > 1 && array.stride(last) != 1)
    value_error(fmt::format("{}: the last axis is not contiguous, its stride is {}: pass a contiguous copy", name,
                            array.stride(last)));
  return array;
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
  Tensor t{on_cpu(object, name)};
  const nb::dlpack::dtype type = t.array.dtype();
  for (const DType known : {DType::f32, DType::f16, DType::bf16})
    if (type == dlpack_type(known)) {
      t.dtype = known;
      return t;
    }
  type_error(fmt::format("{} is of {}: float32, float16 and bfloat16 are supported", name, dtype_name(type)));
}

Tensor byte_tensor(nb::handle object, const char* name) {
  Tensor t{on_cpu(object, name)};
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

View Batch::sequence(int64_t i) const {
  View v = first;
  v.data = static_cast<const char*>(first.data) + i * stride * size_of(first.dtype);
  return v;
}

View Batch::rows() const {
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

Output::Output(std::vector<size_t> shape, nb::dlpack::dtype dtype) : shape_(std::move(shape)), dtype_(dtype) {
  const size_t count = std::accumulate(shape_.begin(), shape_.end(), size_t{1}, std::multiplies<>());
  bytes_ = std::make_unique_for_overwrite<char[]>(count * dtype.bits / 8);
}

nb::object Output::release(nb::handle like) {
  char* data = bytes_.get();
  nb::capsule owner(data, [](void* p) noexcept { delete[] static_cast<char*>(p); });
  bytes_.release();
  const auto give = [&](auto as) {
    using Array = decltype(as);
    return nb::cast(Array(data, shape_.size(), shape_.data(), owner, nullptr, dtype_, nb::device::cpu::value));
  };
  const std::string of = framework(like);
  if (of == "torch") return give(nb::ndarray<nb::pytorch>());
  if (of == "jax" || of == "jaxlib") return give(nb::ndarray<nb::jax>());
  return give(nb::ndarray<nb::numpy>());
}

nb::dlpack::dtype dlpack_type(DType type) {
  const auto code = type == DType::bf16 ? nb::dlpack::dtype_code::Bfloat : nb::dlpack::dtype_code::Float;
  return {static_cast<uint8_t>(code), static_cast<uint8_t>(8 * size_of(type)), 1};
}

Written written(nb::handle out, const char* name, int64_t b, int64_t s_q, int64_t h_q, int64_t d_v, DType dtype) {
  Written w;
  if (out.is_none()) {
    const std::vector<size_t> shape{static_cast<size_t>(b), static_cast<size_t>(s_q), static_cast<size_t>(h_q),
                                    static_cast<size_t>(d_v)};
    w.fresh = std::make_unique<Output>(shape, dlpack_type(dtype));
    w.view = {w.fresh->data<void>(), dtype, b * s_q, h_q, d_v, h_q * d_v, d_v};
    return w;
  }
  const Batch t = batch(out, name, {"b", "s_q", "h_q", "d_v"});
  const std::vector<int64_t> expected{b, s_q, h_q, d_v};
  if (shape_of(t.tensor.array) != expected)
    value_error(fmt::format("{} is {}, expected {}", name, shape_of(t.tensor.array), expected));
  nb::ndarray<> writable;
  if (!nb::try_cast(out, writable)) {
    PyErr_Clear();
    value_error(fmt::format("{} is read-only", name));
  }
  const View rows = t.rows();
  if (!t.in_rows() || overlaps(rows))
    value_error(fmt::format("{}: strides {} overlap or do not lead from row to row: pass a contiguous tensor", name,
                            std::vector<int64_t>(writable.stride_ptr(), writable.stride_ptr() + writable.ndim())));
  w.given = nb::borrow(out);
  w.view = {writable.data(), rows.dtype, rows.tokens, rows.heads, rows.channels, rows.token_stride, rows.head_stride};
  return w;
}

}  // namespace thriftattn::python
