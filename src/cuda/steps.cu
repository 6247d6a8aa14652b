// What a cache's device memory knows of sequences: lengths grow in begin_step and settle in end_step, block tables and
// batches are written from the host, and a fork gets copies of 16-bit records.
#include "cuda/params.h"

namespace thriftattn::cuda {
namespace {

// Where pages are missing or the room is spent the sequence stays as it was: append finds no tokens of this step for
// it, and attention takes the step's rows for the last s_q tokens of the old length.
__global__ void begin_step_kernel(const StepParams p) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= p.batch.b) return;
  const int slot = p.batch.slot[i], settled = p.settled[slot];
  const int64_t grown = int64_t{settled} + p.batch.s_q[i];
  // A block table is filled from its start, so the last page that is needed speaks for all.
  const bool fits =
      grown <= p.max_tokens && (grown == 0 || p.block_table[int64_t{slot} * p.max_pages + (pages_for(grown) - 1)] >= 0);
  p.s_kv[slot] = fits ? static_cast<int32_t>(grown) : settled;
  if (!fits) atomicOr(p.faults, kNoPages);
}

__global__ void end_step_kernel(const StepParams p) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= p.batch.b) return;
  const int slot = p.batch.slot[i], s_kv = p.s_kv[slot];
  p.settled[slot] = s_kv;
  p.released[slot] = max(p.released[slot], s_kv / kPageTokens - p.recent);
}

constexpr int kWords = 960;  // of one launch: kernels take 4 KB of parameters
struct Words {
  int32_t* to;
  int count;
  int32_t values[kWords];
};

__global__ void write_kernel(const __grid_constant__ Words words) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < words.count) words.to[i] = words.values[i];
}

// Grid: (heads, layers).
__global__ void cut_kernel(const CutParams p) {
  if (blockIdx.x == 0 && blockIdx.y == 0 && threadIdx.x == 0) {
    p.settled[p.slot] = p.s_kv[p.slot] = p.tokens;
    p.released[p.slot] = p.released_pages;
  }
  const int first = p.tokens % kHighItemTokens;
  if (first == 0) return;
  uint8_t* const item = p.high + blockIdx.y * p.layer_bytes + (p.record + blockIdx.x) * p.layout.high_bytes +
                        p.tokens % kPageTokens / kHighItemTokens * int64_t{p.layout.high_item_bytes};
  const auto clear = [&](int64_t offset) { *reinterpret_cast<uint16_t*>(item + offset) = 0; };
  for (int t = first; t < kHighItemTokens; ++t) {
    for (int c = threadIdx.x; c < p.layout.dk; c += blockDim.x) clear(p.layout.high_k(c, t));
    for (int c = threadIdx.x; c < p.layout.dv; c += blockDim.x) clear(p.layout.high_v_at(c, t));
  }
}

constexpr int kPairs = 240;  // of one launch, as above
struct Pairs {
  RecordPair values[kPairs];
};

// Grid: (parts of a record, records, layers).
__global__ void copy_kernel(const __grid_constant__ CopyParams p, const __grid_constant__ Pairs pairs) {
  const RecordPair pair = pairs.values[blockIdx.y];
  const int64_t layer = blockIdx.z;
  const auto* from = reinterpret_cast<const uint4*>(p.from + layer * p.from_layer_bytes + pair.from * p.record_bytes);
  auto* to = reinterpret_cast<uint4*>(p.to + layer * p.to_layer_bytes + pair.to * p.record_bytes);
  const int64_t count = p.record_bytes / sizeof(uint4), stride = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += stride) to[i] = from[i];
}

constexpr int kThreads = 128;
int blocks_for(int64_t n) { return static_cast<int>((n + kThreads - 1) / kThreads); }

}  // namespace

cudaError_t launch_begin_step(const StepParams& p, cudaStream_t stream) {
  if (p.batch.b == 0) return cudaSuccess;
  begin_step_kernel<<<blocks_for(p.batch.b), kThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

cudaError_t launch_end_step(const StepParams& p, cudaStream_t stream) {
  if (p.batch.b == 0) return cudaSuccess;
  end_step_kernel<<<blocks_for(p.batch.b), kThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

cudaError_t launch_write(int32_t* to, const int32_t* values, int64_t count, cudaStream_t stream) {
  for (int64_t done = 0; done < count; done += kWords) {
    Words words;
    words.to = to + done;
    words.count = static_cast<int>(count - done < kWords ? count - done : kWords);
    for (int i = 0; i < words.count; ++i) words.values[i] = values[done + i];
    write_kernel<<<blocks_for(words.count), kThreads, 0, stream>>>(words);
    if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

cudaError_t launch_cut(const CutParams& p, cudaStream_t stream) {
  cut_kernel<<<dim3(p.h_kv, p.layers), kThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

cudaError_t launch_copy(const CopyParams& p, const RecordPair* records, int64_t count, cudaStream_t stream) {
  constexpr int64_t kPart = 8 * kThreads * sizeof(uint4);
  const auto parts = static_cast<unsigned>((p.record_bytes + kPart - 1) / kPart);
  for (int64_t done = 0; done < count; done += kPairs) {
    const int n = static_cast<int>(count - done < kPairs ? count - done : kPairs);
    Pairs pairs;
    for (int i = 0; i < n; ++i) pairs.values[i] = records[done + i];
    copy_kernel<<<dim3(parts, n, p.layers), kThreads, 0, stream>>>(p, pairs);
    if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace thriftattn::cuda
