// Plain values in FP4: what the caller may get wrong, then one launch.
#include <fmt/format.h>

#include "core/device.h"
#include "cuda/params.h"
#include "format/codecs.h"
#include "thriftattn/cuda.h"

namespace thriftattn::cuda {
namespace {

Status check_count(int64_t n, Fp4Format format) {
  if (n >= 0 && n % block_size(format) == 0) return {};
  return invalid_argument(fmt::format("{} values are no whole blocks of {}", n, block_size(format)));
}

}  // namespace

Status quantize(const void* x, DType dtype, int64_t n, Fp4Format format, Scales rule, uint8_t* codes, uint8_t* scales,
                int device, Stream stream) {
  THRIFTATTN_RETURN_IF_ERROR(check_count(n, format));
  const CurrentDevice current(device);
  return check(launch_quantize(x, dtype, n, format, rule, codes, scales, static_cast<cudaStream_t>(stream)),
               "quantize");
}

Status dequantize(const uint8_t* codes, const uint8_t* scales, int64_t n, Fp4Format format, float* x, int device,
                  Stream stream) {
  THRIFTATTN_RETURN_IF_ERROR(check_count(n, format));
  const CurrentDevice current(device);
  return check(launch_dequantize(codes, scales, n, format, x, static_cast<cudaStream_t>(stream)), "dequantize");
}

}  // namespace thriftattn::cuda
