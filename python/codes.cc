#include "codes.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "format/codecs.h"
#include "turn.h"

namespace thriftattn::python {
namespace {

constexpr nb::dlpack::dtype kByte = {static_cast<uint8_t>(nb::dlpack::dtype_code::UInt), 8, 1};

float decode(DType type, const void* data, int64_t i) {
  if (type == DType::f32) return static_cast<const float*>(data)[i];
  const uint16_t bits = static_cast<const uint16_t*>(data)[i];
  return type == DType::f16 ? f16_decode(bits) : bf16_decode(bits);
}

// The last axis of an array, row by row, whatever the strides of the axes before it.
class Rows {
 public:
  explicit Rows(const nb::ndarray<nb::ro>& array) : array_(array), index_(array.ndim()) {
    for (size_t axis = 0; axis + 1 < array.ndim(); ++axis) count_ *= static_cast<int64_t>(array.shape(axis));
  }
  int64_t count() const { return count_; }
  int64_t offset() const { return offset_; }  // elements, of the row at hand
  void next() {
    for (size_t axis = array_.ndim() - 1; axis-- > 0;) {
      offset_ += array_.stride(axis);
      if (++index_[axis] < static_cast<int64_t>(array_.shape(axis))) return;
      offset_ -= index_[axis] * array_.stride(axis);
      index_[axis] = 0;
    }
  }

 private:
  const nb::ndarray<nb::ro>& array_;
  std::vector<int64_t> index_;
  int64_t count_ = 1, offset_ = 0;
};

std::vector<size_t> shape_with(const nb::ndarray<nb::ro>& array, int64_t last) {
  std::vector<size_t> shape(array.shape_ptr(), array.shape_ptr() + array.ndim());
  shape.back() = static_cast<size_t>(last);
  return shape;
}

void quantize_on_cpu(const Tensor& x, Fp4Format format, Scales rule, uint8_t* code, uint8_t* scale) {
  const int block = block_size(format);
  const int64_t blocks = x.size(static_cast<int>(x.array.ndim()) - 1) / block;
  Rows rows(x.array);
  for (int64_t r = 0; r < rows.count(); ++r, rows.next())
    for (int64_t b = 0; b < blocks; ++b, code += block / 2) {
      float values[kMaxBlockSize];
      uint8_t unpacked[kMaxBlockSize];
      for (int i = 0; i < block; ++i) values[i] = decode(x.dtype, x.data(), rows.offset() + b * block + i);
      *scale++ = encode_block(format, rule, values, unpacked);
      for (int i = 0; i < block / 2; ++i) code[i] = static_cast<uint8_t>(unpacked[2 * i] | unpacked[2 * i + 1] << 4);
    }
}

void dequantize_on_cpu(const Tensor& codes, const Tensor& scales, Fp4Format format, float* x) {
  const int block = block_size(format);
  const int64_t n = codes.size(static_cast<int>(codes.array.ndim()) - 1) * 2;
  Rows code_rows(codes.array), scale_rows(scales.array);
  for (int64_t r = 0; r < code_rows.count(); ++r, code_rows.next(), scale_rows.next()) {
    const uint8_t* code = static_cast<const uint8_t*>(codes.data()) + code_rows.offset();
    const uint8_t* scale = static_cast<const uint8_t*>(scales.data()) + scale_rows.offset();
    for (int64_t i = 0; i < n; ++i)
      *x++ = e2m1_decode(static_cast<uint8_t>(code[i / 2] >> (i % 2 * 4))) * decode_scale(format, scale[i / block]);
  }
}

// Queues launch(stream) where work on tensors like this one belongs.
template <class Launch>
void queue(nb::handle like, Device device, const Launch& launch) {
  const cuda::Stream stream = current_stream(like, device);
  const bool waits = must_wait(like, device);
  check(in_turn([&]() -> Status {
    THRIFTATTN_RETURN_IF_ERROR(launch(stream));
    return waits ? wait_for(stream, device) : Status();
  }));
}

}  // namespace

nb::object quantize(nb::handle x, Fp4Format format, Scales rule) {
  const Tensor in = packed_on_gpu(tensor(x, "x"), x, "x");
  const int block = block_size(format);
  const int64_t n = in.size(static_cast<int>(in.array.ndim()) - 1);
  if (n % block != 0)
    throw nb::value_error(fmt::format("x has {} elements on its last axis: {} takes multiples of {}", n,
                                      format == Fp4Format::nvfp4 ? "nvfp4" : "mxfp4", block)
                              .c_str());
  Output codes(shape_with(in.array, n / 2), kByte, x, in.device),
      scales(shape_with(in.array, n / block), kByte, x, in.device);
  auto* const code = codes.data<uint8_t>();
  auto* const scale = scales.data<uint8_t>();
  if (in.device.is_cpu()) {
    nb::gil_scoped_release released;
    quantize_on_cpu(in, format, rule, code, scale);
  } else {
    queue(x, in.device, [&](cuda::Stream stream) {
      return cuda::quantize(in.data(), in.dtype, static_cast<int64_t>(in.array.size()), format, rule, code, scale,
                            in.device.gpu, stream);
    });
  }
  return nb::make_tuple(codes.release(), scales.release());
}

nb::object dequantize(nb::handle codes, nb::handle scales, Fp4Format format) {
  const Tensor c = packed_on_gpu(byte_tensor(codes, "codes"), codes, "codes"),
               s = packed_on_gpu(byte_tensor(scales, "scales"), scales, "scales");
  check_device(s, "scales", "codes", c.device);
  const int block = block_size(format);
  const int64_t n = c.size(static_cast<int>(c.array.ndim()) - 1) * 2;
  const std::vector<size_t> expected = shape_with(c.array, n / block);
  if (n % block != 0 || std::vector<size_t>(s.array.shape_ptr(), s.array.shape_ptr() + s.array.ndim()) != expected)
    throw nb::value_error(fmt::format("scales is [{}], expected {}: one byte for every {} bytes of codes",
                                      fmt::join(s.array.shape_ptr(), s.array.shape_ptr() + s.array.ndim(), ", "),
                                      expected, block / 2)
                              .c_str());
  Output out(shape_with(c.array, n), dlpack_type(DType::f32), codes, c.device);
  auto* const x = out.data<float>();
  if (c.device.is_cpu()) {
    nb::gil_scoped_release released;
    dequantize_on_cpu(c, s, format, x);
  } else {
    queue(codes, c.device, [&](cuda::Stream stream) {
      return cuda::dequantize(static_cast<const uint8_t*>(c.data()), static_cast<const uint8_t*>(s.data()),
                              static_cast<int64_t>(c.array.size()) * 2, format, x, c.device.gpu, stream);
    });
  }
  return out.release();
}

}  // namespace thriftattn::python
