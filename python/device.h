// Where tensors and caches lie, and the stream on which a GPU takes their work.
#pragma once

#include <nanobind/nanobind.h>

#include <string>

#include "thriftattn/cuda.h"

namespace thriftattn::python {

namespace nb = nanobind;

struct Device {
  int gpu = -1;  // its index; -1: the CPU

  bool is_cpu() const { return gpu < 0; }
  bool operator==(const Device&) const = default;
};
std::string to_string(Device device);       // "cpu", "cuda:1"
Device device_of(const std::string& word);  // the same words, and "cuda" for "cuda:0"; raises ValueError

// A GPU as plans see it; raises ValueError where this build has no CUDA, or the machine no such GPU.
Machine machine_of(Device device);

// Who made a tensor, as far as it matters to what goes back: who has memory and streams of its own on a GPU.
enum class Framework { torch, cupy, jax, other };
Framework framework_of(nb::handle object);

// Makes `device` CuPy's current one while it lives.
class CupyDevice {
 public:
  explicit CupyDevice(Device device);
  ~CupyDevice();
  CupyDevice(const CupyDevice&) = delete;
  CupyDevice& operator=(const CupyDevice&) = delete;

 private:
  nb::object device_;
};

// The stream of a GPU that work on tensors like this one belongs to: PyTorch's or CuPy's current one there, the legacy
// default stream for all others, who must bring their tensors there (tensors.cc).
cuda::Stream current_stream(nb::handle like, Device device);

// Memory of other frameworks than PyTorch and CuPy knows no stream: calls that read or write it on a GPU wait until
// they are done with it.
bool must_wait(nb::handle like, Device device);
Status wait_for(cuda::Stream stream, Device device);

// What a caller means by stream=: None (the current one), its address as a number, or an object that speaks
// __cuda_stream__ or has the address in `cuda_stream` (PyTorch) or `ptr` (CuPy). Raises TypeError for anything else,
// and ValueError for a stream beside a tensor on the CPU.
cuda::Stream stream_of(nb::handle stream, nb::handle like, Device device);

}  // namespace thriftattn::python
