#include "device.h"

#include <fmt/format.h>
#include <nanobind/stl/string.h>

#include <charconv>
#include <string_view>

#include "turn.h"

#ifdef THRIFTATTN_PYTHON_CUDA
#include "core/device.h"
#endif

namespace thriftattn::python {

std::string to_string(Device device) { return device.is_cpu() ? "cpu" : fmt::format("cuda:{}", device.gpu); }

Device device_of(const std::string& word) {
  if (word == "cpu") return {};
  if (word == "cuda") return {0};
  Device device;
  constexpr std::string_view kCuda = "cuda:";
  const char* const end = word.data() + word.size();
  if (word.starts_with(kCuda)) {
    const auto [stop, error] = std::from_chars(word.data() + kCuda.size(), end, device.gpu);
    if (error == std::errc() && stop == end && device.gpu >= 0) return device;
  }
  throw nb::value_error(fmt::format("device '{}' is not known: cpu, cuda and cuda:0, cuda:1, ... are", word).c_str());
}

Machine machine_of(Device device) {
  const Result<Machine> machine = in_turn([&] { return cuda::machine(device.gpu); });
  if (!machine.ok())
    throw nb::value_error(fmt::format("device {}: {}", to_string(device), machine.status().message()).c_str());
  return machine.value();
}

Framework framework_of(nb::handle object) {
  const auto module = nb::cast<std::string>(nb::str(object.type().attr("__module__")));
  const std::string first = module.substr(0, module.find('.'));
  if (first == "torch") return Framework::torch;
  if (first == "cupy") return Framework::cupy;
  return first == "jax" || first == "jaxlib" ? Framework::jax : Framework::other;
}

CupyDevice::CupyDevice(Device device) : device_(nb::module_::import_("cupy.cuda").attr("Device")(device.gpu)) {
  device_.attr("__enter__")();
}
CupyDevice::~CupyDevice() { device_.attr("__exit__")(nb::none(), nb::none(), nb::none()); }

cuda::Stream current_stream(nb::handle like, Device device) {
  nb::object address;
  switch (framework_of(like)) {  // which is loaded, since `like` is of it
    case Framework::torch:
      address = nb::module_::import_("torch.cuda").attr("current_stream")(device.gpu).attr("cuda_stream");
      break;
    case Framework::cupy: {
      const CupyDevice there(device);
      address = nb::module_::import_("cupy.cuda").attr("get_current_stream")().attr("ptr");
      break;
    }
    default:
      return nullptr;
  }
  return reinterpret_cast<cuda::Stream>(nb::cast<uintptr_t>(address));
}

bool must_wait(nb::handle like, Device device) {
  if (device.is_cpu()) return false;
  const Framework framework = framework_of(like);
  return framework != Framework::torch && framework != Framework::cupy;
}

Status wait_for(cuda::Stream stream, Device device) {
#ifdef THRIFTATTN_PYTHON_CUDA
  const cuda::CurrentDevice current(device.gpu);
  return cuda::check(cudaStreamSynchronize(static_cast<cudaStream_t>(stream)), "cudaStreamSynchronize");
#else
  static_cast<void>(stream), static_cast<void>(device);
  return {};
#endif
}

cuda::Stream stream_of(nb::handle stream, nb::handle like, Device device) {
  if (device.is_cpu()) {
    if (!stream.is_none()) throw nb::value_error("stream: the tensors are on the CPU, which has none");
    return nullptr;
  }
  if (stream.is_none()) return current_stream(like, device);
  nb::object address = nb::borrow(stream);
  if (nb::hasattr(stream, "__cuda_stream__"))
    address = stream.attr("__cuda_stream__")()[1];  // (version, address)
  else if (nb::hasattr(stream, "cuda_stream"))
    address = stream.attr("cuda_stream");
  else if (nb::hasattr(stream, "ptr"))
    address = stream.attr("ptr");
  uintptr_t number = 0;
  if (!nb::try_cast(address, number))
    throw nb::type_error("stream: None, the address of a cudaStream_t, or a stream of PyTorch or CuPy is expected");
  return reinterpret_cast<cuda::Stream>(number);
}

}  // namespace thriftattn::python
