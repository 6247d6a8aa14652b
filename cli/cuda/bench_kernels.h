// What a bench on a GPU launches beside the library: rows made there by the rule of bench_inputs.h, and one kernel that
// only reads, whose rate is the floor.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "bench_inputs.h"

namespace thriftattn::cli {

// Keys or values of tokens [first, first + tokens) of sequences [0, batch), FP16 [batch * tokens, heads, d]. `table` is
// Inputs::table() on the device.
cudaError_t launch_rows(const float* table, Input what, int64_t first, int64_t tokens, int batch, int heads, int d,
                        void* out, cudaStream_t stream);

// Reads `bytes`, a multiple of 16, and writes one word of `sink` should their sum be a certain one.
cudaError_t launch_read(const void* data, int64_t bytes, uint32_t* sink, int blocks, cudaStream_t stream);

}  // namespace thriftattn::cli
