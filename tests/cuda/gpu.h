// The GPU of the tests, whether there is one, and memory on it.
#pragma once

#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "thriftattn/cuda.h"

namespace thriftattn::testing {

// The first GPU; none where there is no driver or no device.
inline const std::optional<Machine>& gpu_machine() {
  static const std::optional<Machine> here = [] {
    auto machine = cuda::machine(0);
    return machine.ok() ? std::optional(*machine) : std::nullopt;
  }();
  return here;
}

#define SKIP_WITHOUT_GPU()                                               \
  do {                                                                   \
    if (!::thriftattn::testing::gpu_machine()) GTEST_SKIP() << "no GPU"; \
  } while (0)
inline ::testing::AssertionResult succeeds(const char* call, cudaError_t error) {
  if (error == cudaSuccess) return ::testing::AssertionSuccess();
  return ::testing::AssertionFailure() << call << ": " << cudaGetErrorString(error);
}
#define ASSERT_CUDA(call) ASSERT_PRED_FORMAT1(::thriftattn::testing::succeeds, call)
#define EXPECT_CUDA(call) EXPECT_PRED_FORMAT1(::thriftattn::testing::succeeds, call)

// An array on the device, every byte of which is 0xff (NaN, -1) until something is written.
template <class T>
class OnDevice {
 public:
  explicit OnDevice(size_t n) : n_(n) {
    EXPECT_CUDA(cudaMalloc(&data_, bytes()));
    poison();
  }
  explicit OnDevice(const std::vector<T>& from) : OnDevice(from.size()) {
    EXPECT_CUDA(cudaMemcpy(data_, from.data(), n_ * sizeof(T), cudaMemcpyHostToDevice));
  }
  OnDevice(const OnDevice&) = delete;
  ~OnDevice() { cudaFree(data_); }
  void poison() { EXPECT_CUDA(cudaMemset(data_, 0xff, bytes())); }
  T* get() const { return static_cast<T*>(data_); }
  std::vector<T> read() const {
    std::vector<T> to(n_);
    EXPECT_CUDA(cudaMemcpy(to.data(), data_, n_ * sizeof(T), cudaMemcpyDeviceToHost));
    return to;
  }

 private:
  size_t bytes() const { return std::max<size_t>(n_ * sizeof(T), 16); }
  size_t n_;
  void* data_ = nullptr;
};

}  // namespace thriftattn::testing
