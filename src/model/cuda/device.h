// CUDA's errors as a Status, and what must be given back to it.
#pragma once

#include <cuda_runtime_api.h>
#include <fmt/format.h>

#include <cstdint>
#include <utility>

#include "thriftattn/status.h"

namespace thriftattn::model::gpu {

// `what` names the call or the kernel that returned `error`.
inline Status check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return {};
  cudaGetLastError();  // an error that does not stay is not found again by the next call
  return Status(error == cudaErrorMemoryAllocation ? Code::out_of_memory : Code::unsupported,
                fmt::format("{}: {} ({})", what, cudaGetErrorString(error), cudaGetErrorName(error)));
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

// A handle and the function that gives it back.
template <class Handle, auto kDestroy>
class Owned {
 public:
  Owned() = default;
  Owned(Owned&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
  Owned& operator=(Owned&& other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }
  ~Owned() {
    if (handle_) kDestroy(handle_);
  }
  Handle get() const { return handle_; }
  Handle* out() { return &handle_; }  // for the call that creates it
  explicit operator bool() const { return handle_ != nullptr; }

 private:
  Handle handle_ = nullptr;
};
using Stream = Owned<cudaStream_t, cudaStreamDestroy>;
using Event = Owned<cudaEvent_t, cudaEventDestroy>;
using Graph = Owned<cudaGraph_t, cudaGraphDestroy>;
using GraphExec = Owned<cudaGraphExec_t, cudaGraphExecDestroy>;

// Device memory; freeing it needs no current device.
using Memory = Owned<void*, cudaFree>;

inline Result<Memory> take(int64_t bytes, const char* what) {
  Memory memory;
  const Status status = check(cudaMalloc(memory.out(), static_cast<size_t>(bytes)), "cudaMalloc");
  if (!status.ok()) return Status(status.code(), fmt::format("{} of {} bytes: {}", what, bytes, status.message()));
  return memory;
}

}  // namespace thriftattn::model::gpu
