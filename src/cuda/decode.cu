// How a decode step runs on a GPU, and its launches: decode_kernel.cuh has the kernel.
#include <algorithm>

#include "cuda/decode_kernel.cuh"
#include "cuda/launch.cuh"

namespace thriftattn::cuda {
namespace {

cudaError_t launch(const DecodeParams& params, const DecodeConfig& config, Pass pass, cudaStream_t stream) {
  const Fp4Format format = params.cache.format;
  const void* kernel =
      config.d_bucket == 128 ? decode_kernel_d128(config.columns, format) : decode_kernel_d256(config.columns, format);
  DecodeArgs args{params,
                  config.columns,
                  config.tiles,
                  config.exchanges_at_once,
                  pass,
                  params.shape.sm_scale * kLog2E,
                  params.shape.softcap * kLog2E,
                  params.shape.sm_scale * kLog2E * kCodeScale,
                  params.mass_parts == 8 ? 3 : 5,
                  static_cast<uint32_t>(params.cache.max_pages * params.mass_parts * params.row_stride),
                  1.0 / config.tiles,
                  1.0 / params.shape.h_kv,
                  1.0 / config.blocks};
  if (pass != Pass::attend) args.p.page_mass = nullptr;  // they are the first reading's
  void* pointers[] = {&args};
  return launch_early(kernel, static_cast<unsigned>(config.blocks), static_cast<unsigned>(32 * config.warps),
                      config.shared_bytes, stream, pointers);
}

}  // namespace

DecodeConfig decode_config(const Problem& problem, const Gpu& gpu) {
  const int64_t rows = problem.h_q / problem.h_kv * problem.max_s_q;
  const DeviceLayout layout = device_layout(problem.d, problem.d_v);
  DecodeConfig config{};
  config.d_bucket = problem.d == 128 && problem.d_v == 128 ? 128 : 256;
  config.columns = rows <= 4 ? 4 : rows <= 8 || config.d_bucket == 256 ? 8 : 16;
  config.tiles = static_cast<int>((rows + config.columns - 1) / config.columns);
  config.slots = static_cast<int>(kRingSlots);
  config.blocks = gpu.multiprocessors;
  config.warps = max_warps(config.d_bucket, config.columns);
  const auto bytes = [&] { return shared_layout(layout, config.columns, config.warps, config.blocks).bytes; };
  while (config.warps > 1 && bytes() > gpu.shared_bytes) --config.warps;
  config.shared_bytes = bytes();
  // Two items of a warp, were every twentieth page exchanged.
  const int64_t pages = int64_t{problem.b} * problem.h_kv * config.tiles * pages_for(problem.max_s_kv);
  config.exchanges_at_once = pages > int64_t{20} * config.blocks * config.warps;
  return config;
}

int64_t decode_partial_bytes(const Problem& problem, const DecodeConfig& config) {
  const int dv = device_layout(problem.d, problem.d_v).dv;
  return int64_t{2} * config.blocks * partial_floats(config.columns, dv) * static_cast<int64_t>(sizeof(float));
}

cudaError_t launch_attend(const DecodeParams& params, const DecodeConfig& config, cudaStream_t stream) {
  return launch(params, config, Pass::attend, stream);
}

cudaError_t launch_exchange(const DecodeParams& params, const DecodeConfig& config, cudaStream_t stream) {
  return launch(params, config, Pass::exchange, stream);
}

}  // namespace thriftattn::cuda
