// Plain values in FP4 on the device: the bytes and the values are the codec's.
#include <cmath>
#include <cstring>
#include <limits>
#include <random>

#include "cuda/session.h"
#include "format/codecs.h"

namespace thriftattn {
namespace {

using testing::Floats;
using testing::OwnStream;

// Bytes on the device; a byte before them makes every address odd.
class Bytes {
 public:
  explicit Bytes(int64_t count) : host(static_cast<size_t>(count)) { EXPECT_CUDA(cudaMalloc(&memory_, count + 1)); }
  explicit Bytes(std::vector<uint8_t> from) : Bytes(std::ssize(from)) {
    host = std::move(from);
    EXPECT_CUDA(cudaMemcpy(data(), host.data(), host.size(), cudaMemcpyHostToDevice));
    EXPECT_CUDA(cudaDeviceSynchronize());
  }
  ~Bytes() { cudaFree(memory_); }
  Bytes(const Bytes&) = delete;
  Bytes& operator=(const Bytes&) = delete;

  uint8_t* data() const { return static_cast<uint8_t*>(memory_) + 1; }
  const std::vector<uint8_t>& fetch() {
    EXPECT_CUDA(cudaMemcpy(host.data(), data(), host.size(), cudaMemcpyDeviceToHost));
    return host;
  }

  std::vector<uint8_t> host;

 private:
  void* memory_ = nullptr;
};

// Blocks of every magnitude, of values beside the midpoints of a grid, of zeros, and of one NaN or infinity.
std::vector<float> hard_values(int64_t n) {
  std::mt19937 random(3);
  std::normal_distribution<float> normal;
  std::vector<float> x(static_cast<size_t>(n));
  for (size_t i = 0; i < x.size(); ++i) {
    const size_t block = i / 32;
    const float grid = static_cast<float>(static_cast<int>(random() % 25) - 12) * 0.25f;
    x[i] = std::ldexp(block % 2 ? normal(random) : grid, static_cast<int>(block % 80) - 40);
    if (block % 4 == 0) x[i] = std::nextafter(x[i], random() % 2 ? 1e9f : -1e9f);
    if (block % 97 == 13) x[i] = random() % 2 ? 0.0f : -0.0f;
  }
  x[32 * 5 + 7] = std::numeric_limits<float>::quiet_NaN();
  x[32 * 6 + 20] = std::numeric_limits<float>::infinity();
  x[32 * 7 + 1] = -std::numeric_limits<float>::infinity();
  return x;
}

TEST(GpuCodes, AreTheCodecs) {
  SKIP_WITHOUT_GPU();
  constexpr int64_t kCount = 32 * 1000;
  const OwnStream stream;
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    const Floats x(hard_values(kCount), dtype);
    const std::vector<float> rounded = x.get();
    for (const auto& [format, rule] : {std::pair{Fp4Format::nvfp4, Scales::six},
                                       {Fp4Format::nvfp4, Scales::four_over_six},
                                       {Fp4Format::mxfp4, Scales::six}}) {
      const int block = block_size(format);
      std::vector<uint8_t> codes, scales;
      for (int64_t b = 0; b < kCount / block; ++b) {
        uint8_t unpacked[kMaxBlockSize];
        scales.push_back(encode_block(format, rule, rounded.data() + b * block, unpacked));
        for (int i = 0; i < block; i += 2) codes.push_back(static_cast<uint8_t>(unpacked[i] | unpacked[i + 1] << 4));
      }
      Bytes got_codes(kCount / 2), got_scales(kCount / block);
      EXPECT_OK(cuda::quantize(x.f32(), dtype, kCount, format, rule, got_codes.data(), got_scales.data(), 0, stream));
      stream.wait();
      EXPECT_EQ(got_codes.fetch(), codes);
      EXPECT_EQ(got_scales.fetch(), scales);
    }
  }
}

TEST(GpuCodes, EveryCodeTimesEveryScale) {
  SKIP_WITHOUT_GPU();
  const OwnStream stream;
  for (const Fp4Format format : {Fp4Format::nvfp4, Fp4Format::mxfp4}) {
    const int block = block_size(format);
    std::vector<uint8_t> codes, scales;
    for (int scale = 0; scale < 256; ++scale) {
      scales.push_back(static_cast<uint8_t>(scale));
      for (int i = 0; i < block / 2; ++i) codes.push_back(static_cast<uint8_t>((2 * i + scale) % 16 | i % 16 << 4));
    }
    const Bytes device_codes(codes), device_scales(scales);
    const int64_t n = 256 * block;
    const Floats x(n, DType::f32);
    EXPECT_OK(cuda::dequantize(device_codes.data(), device_scales.data(), n, format, x.f32(), 0, stream));
    stream.wait();
    const std::vector<float> got = x.get();
    for (int64_t i = 0; i < n; ++i) {
      const uint8_t code = codes[i / 2] >> i % 2 * 4 & 15;
      const float expected = e2m1_decode(code) * decode_scale(format, scales[i / block]);
      if (std::isnan(expected))
        ASSERT_TRUE(std::isnan(got[i])) << i;
      else
        ASSERT_EQ(bits_of(got[i]), bits_of(expected)) << i;
    }
  }
}

TEST(GpuCodes, HalfABlockIsRefused) {
  SKIP_WITHOUT_GPU();
  EXPECT_EQ(cuda::quantize(nullptr, DType::f32, 48, Fp4Format::mxfp4, Scales::six, nullptr, nullptr, 0, nullptr).code(),
            Code::invalid_argument);
  EXPECT_EQ(cuda::dequantize(nullptr, nullptr, 8, Fp4Format::nvfp4, nullptr, 0, nullptr).code(),
            Code::invalid_argument);
  EXPECT_OK(cuda::quantize(nullptr, DType::f32, 0, Fp4Format::nvfp4, Scales::six, nullptr, nullptr, 0, nullptr));
}

}  // namespace
}  // namespace thriftattn
