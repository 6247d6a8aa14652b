// CUDA's errors as a Status, and what must be given back: device memory, the current device. For host code of builds
// with CUDA; both what attends on a GPU and what runs a model there stand on it.
#pragma once

#include <cuda_runtime_api.h>
#include <fmt/format.h>

#include <cstdint>
#include <utility>

#include "thriftattn/status.h"

namespace thriftattn::cuda {

// `call` is the name of what returned `error`. The runtime forgets the error, unless it is one that stays.
inline Status check(cudaError_t error, const char* call) {
  if (error == cudaSuccess) return {};
  cudaGetLastError();
  return Status(error == cudaErrorMemoryAllocation ? Code::out_of_memory : Code::io,
                fmt::format("{}: {} ({})", call, cudaGetErrorString(error), cudaGetErrorName(error)));
}

// Makes `device` the thread's current one while it lives.
class CurrentDevice {
 public:
  explicit CurrentDevice(int device) {
    if (cudaGetDevice(&before_) == cudaSuccess && before_ != device) changed_ = cudaSetDevice(device) == cudaSuccess;
  }
  ~CurrentDevice() {
    if (changed_) cudaSetDevice(before_);
  }
  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

// Bytes of one device.
class DeviceMemory {
 public:
  DeviceMemory() = default;
  DeviceMemory(DeviceMemory&& other) noexcept { *this = std::move(other); }
  DeviceMemory& operator=(DeviceMemory&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    std::swap(device_, other.device_);
    return *this;
  }
  ~DeviceMemory() {
    if (!data_) return;
    const CurrentDevice current(device_);
    cudaFree(data_);
  }

  // `what` it is for goes into the message where there is none.
  static Result<DeviceMemory> take(int64_t bytes, int device, const char* what) {
    const CurrentDevice current(device);
    DeviceMemory memory;
    const Status status = check(cudaMalloc(&memory.data_, static_cast<size_t>(bytes)), "cudaMalloc");
    if (!status.ok())
      return Status(status.code(), fmt::format("{} of {} bytes on GPU {}: {}", what, bytes, device, status.message()));
    memory.bytes_ = bytes;
    memory.device_ = device;
    return memory;
  }

  uint8_t* data() const { return static_cast<uint8_t*>(data_); }
  int64_t bytes() const { return bytes_; }

 private:
  void* data_ = nullptr;
  int64_t bytes_ = 0;
  int device_ = 0;
};

}  // namespace thriftattn::cuda
