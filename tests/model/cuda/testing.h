// Tests that need a GPU, and memory on it.
#pragma once

#include <gtest/gtest.h>

#include <bit>
#include <cstdint>
#include <vector>

#include "model/cuda/device.h"
#include "thriftattn/cuda.h"

namespace thriftattn::model::gpu {

class GpuTest : public testing::Test {
 protected:
  void SetUp() override {
    const auto machine = cuda::machine(0);
    if (!machine.ok()) GTEST_SKIP() << machine.status().message();
  }
};

inline DeviceMemory device_room(int64_t bytes) {
  auto memory = take(bytes, "a test");
  EXPECT_TRUE(memory.ok()) << memory.status().message();
  return std::move(*memory);
}

template <class T>
DeviceMemory device_copy(const std::vector<T>& from) {
  DeviceMemory memory = device_room(std::ssize(from) * sizeof(T));
  EXPECT_EQ(cudaMemcpy(memory.data(), from.data(), from.size() * sizeof(T), cudaMemcpyHostToDevice), cudaSuccess);
  return memory;
}

template <class T>
T* as(const DeviceMemory& memory) {
  return reinterpret_cast<T*>(memory.data());
}

template <class T>
std::vector<T> host_copy(const DeviceMemory& memory, int64_t n) {
  std::vector<T> out(n);
  EXPECT_EQ(cudaMemcpy(out.data(), memory.data(), n * sizeof(T), cudaMemcpyDeviceToHost), cudaSuccess);
  return out;
}
inline std::vector<float> host_floats(const DeviceMemory& memory, int64_t n) { return host_copy<float>(memory, n); }

inline float from_bf16(uint16_t bits) { return std::bit_cast<float>(uint32_t{bits} << 16); }
inline uint16_t bf16_bits(float x) {  // to the nearest, ties to even
  const auto bits = std::bit_cast<uint32_t>(x);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline std::vector<uint16_t> bf16_bits(const std::vector<float>& from) {
  std::vector<uint16_t> out;
  for (const float x : from) out.push_back(bf16_bits(x));
  return out;
}
inline std::vector<float> host_bf16(const DeviceMemory& memory, int64_t n) {
  std::vector<float> out;
  for (const uint16_t bits : host_copy<uint16_t>(memory, n)) out.push_back(from_bf16(bits));
  return out;
}

}  // namespace thriftattn::model::gpu
