// What a build without CUDA says of it.
#include "bench_gpu.h"
#include "thriftattn/cuda.h"

namespace thriftattn::cli {

Status bench_attention_gpu(const BenchOptions&, int device) { return cuda::machine(device).status(); }

}  // namespace thriftattn::cli
