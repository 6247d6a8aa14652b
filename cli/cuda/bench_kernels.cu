#include <cuda_fp16.h>

#include "bench_kernels.h"

namespace thriftattn::cli {
namespace {

constexpr int kThreads = 256;

// A block makes the rows of one token of one sequence.
__global__ void make_rows(const float* table, Input what, int64_t first, int64_t tokens, int heads, int d,
                          __half* out) {
  const int64_t seq = blockIdx.y, token = first + blockIdx.x;
  __half* to = out + (seq * tokens + blockIdx.x) * heads * d;
  for (int i = threadIdx.x; i < heads * d; i += blockDim.x) {
    const int head = i / d, c = i % d;
    float x = InputRule::noise(table, InputRule::key_of(static_cast<uint64_t>(what), seq, token, head), c);
    if (what == Input::key) x += InputRule::of_key(token, c, d);
    to[i] = __float2half_rn(x);
  }
}

// Every thread has eight loads of 16 bytes under way.
__global__ void __launch_bounds__(kThreads) read_all(const uint4* data, int64_t n, uint32_t* sink) {
  constexpr int kLoads = 8;
  const int64_t stride = int64_t{gridDim.x} * kThreads * kLoads;
  uint32_t sum = 0;
  for (int64_t i = int64_t{blockIdx.x} * kThreads * kLoads + threadIdx.x; i < n; i += stride) {
    uint4 x[kLoads];
#pragma unroll
    for (int k = 0; k < kLoads; ++k) x[k] = i + k * kThreads < n ? __ldcs(data + i + k * kThreads) : uint4{};
#pragma unroll
    for (int k = 0; k < kLoads; ++k) sum += x[k].x ^ x[k].y ^ x[k].z ^ x[k].w;
  }
  if (sum == 0x9e3779b9) *sink = sum;
}

}  // namespace

cudaError_t launch_rows(const float* table, Input what, int64_t first, int64_t tokens, int batch, int heads, int d,
                        void* out, cudaStream_t stream) {
  make_rows<<<dim3(static_cast<unsigned>(tokens), batch), kThreads, 0, stream>>>(table, what, first, tokens, heads, d,
                                                                                 static_cast<__half*>(out));
  return cudaGetLastError();
}

cudaError_t launch_read(const void* data, int64_t bytes, uint32_t* sink, int blocks, cudaStream_t stream) {
  read_all<<<blocks, kThreads, 0, stream>>>(static_cast<const uint4*>(data), bytes / 16, sink);
  return cudaGetLastError();
}

}  // namespace thriftattn::cli
