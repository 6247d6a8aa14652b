// What the model runner holds of a GPU: device memory, streams, events, graphs.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <utility>

#include "core/device.h"

namespace thriftattn::model::gpu {

using cuda::check;
using cuda::CurrentDevice;
using cuda::DeviceMemory;

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

// On the current device.
inline Result<DeviceMemory> take(int64_t bytes, const char* what) {
  int device = 0;
  THRIFTATTN_RETURN_IF_ERROR(check(cudaGetDevice(&device), "cudaGetDevice"));
  return DeviceMemory::take(bytes, device, what);
}

}  // namespace thriftattn::model::gpu
