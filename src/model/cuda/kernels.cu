// The kernels between the products. In a decode step each touches a few rows and is bound by its launch, in a prefill
// by memory: so every value is read once and written once, and neighbours in a row are neighbours in a warp.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cfloat>

#include "model/cuda/kernels.h"

namespace thriftattn::model::gpu {
namespace {

constexpr int kWarp = 32;
constexpr unsigned kAll = 0xffffffff;

__device__ float load(const void* from, DType type, int64_t i) {
  if (type == DType::f32) return static_cast<const float*>(from)[i];
  if (type == DType::f16) return __half2float(static_cast<const __half*>(from)[i]);
  return __bfloat162float(static_cast<const __nv_bfloat16*>(from)[i]);
}

__device__ void store(void* to, DType type, int64_t i, float value) {
  if (type == DType::f32) {
    static_cast<float*>(to)[i] = value;
  } else if (type == DType::f16) {
    static_cast<__half*>(to)[i] = __float2half_rn(value);
  } else {
    static_cast<__nv_bfloat16*>(to)[i] = __float2bfloat16_rn(value);
  }
}

__device__ float warp_sum(float v) {
  for (int step = kWarp / 2; step > 0; step /= 2) v += __shfl_xor_sync(kAll, v, step);
  return v;
}

__device__ float warp_max(float v) {
  for (int step = kWarp / 2; step > 0; step /= 2) v = fmaxf(v, __shfl_xor_sync(kAll, v, step));
  return v;
}

// The same over a block of whole warps; every thread gets the result. `fill` is what absent warps count for.
template <class Reduce>
__device__ float over_block(float v, float fill, const Reduce& reduce) {
  __shared__ float of_warp[kWarp];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  v = reduce(v);
  __syncthreads();  // the last result has been read
  if (lane == 0) of_warp[warp] = v;
  __syncthreads();
  return reduce(lane < blockDim.x / kWarp ? of_warp[lane] : fill);
}
__device__ float block_sum(float v) {
  return over_block(v, 0, [](float x) { return warp_sum(x); });
}
__device__ float block_max(float v) {
  return over_block(v, -FLT_MAX, [](float x) { return warp_max(x); });
}

__global__ void embed_kernel(const void* table, DType type, int64_t hidden, const int32_t* tokens, float scale,
                             float* x) {
  const int64_t row = blockIdx.x, from = tokens[row] * hidden;
  for (int64_t c = threadIdx.x; c < hidden; c += blockDim.x) x[row * hidden + c] = scale * load(table, type, from + c);
}

// One block per row, whose threads hold its channels in registers; weights are loaded beside them, not after the sums.
constexpr int kHeld = 8, kNormThreads = kMaxHidden / kHeld;

__global__ void __launch_bounds__(kNormThreads) add_norm_kernel(const AddNorm a) {
  float* x = a.x + blockIdx.x * a.stride;
  const int hidden = static_cast<int>(a.hidden);
  const int64_t at = blockIdx.x * a.hidden, y_at = blockIdx.x * a.stride;
  float v[kHeld] = {}, w[kHeld] = {};
  const auto for_held = [&](const auto& body) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int c = static_cast<int>(i * blockDim.x + threadIdx.x);
      if (c < hidden) body(i, c);
    }
  };
  const auto norm_scale = [&] {
    float squares = 0;
    for_held([&](int i, int) { squares += v[i] * v[i]; });
    return 1.0f / sqrtf(block_sum(squares) / static_cast<float>(hidden) + a.eps);
  };
  if (a.weight) for_held([&](int i, int c) { w[i] = a.weight[c]; });
  if (a.y) {
    for_held([&](int i, int c) { v[i] = a.y[y_at + c]; });
    if (a.y_weight) {
      const float scale = norm_scale();
      for_held([&](int i, int c) { v[i] = v[i] * scale * a.y_weight[c]; });
    }
    for_held([&](int i, int c) { v[i] += x[c]; });  // all loads before the first store
    for_held([&](int i, int c) { x[c] = v[i]; });
  } else {
    for_held([&](int i, int c) { v[i] = x[c]; });
  }
  if (!a.weight) return;
  const float scale = norm_scale();
  for_held([&](int i, int c) { store(a.out, a.type, at + c, v[i] * scale * w[i]); });
}

// One warp per (row, head): a lane holds channels c and c + d/2 of its pairs.
constexpr int kTurnThreads = 128, kPairs = kMaxTurned / 2 / kWarp;

__global__ void __launch_bounds__(kTurnThreads) turn_qk_kernel(const TurnQk t) {
  const int64_t unit = (blockIdx.x * static_cast<int64_t>(kTurnThreads) + threadIdx.x) / kWarp;
  const int heads = t.h_q + t.h_kv, lane = threadIdx.x % kWarp, half = t.d / 2;
  const int64_t row = unit / heads;
  if (row >= t.rows) return;
  const int head = static_cast<int>(unit % heads);
  const bool is_q = head < t.h_q;
  float* x = t.qkv + row * t.row_stride + static_cast<int64_t>(head) * t.d;
  float a[kPairs], b[kPairs];
  const auto for_pairs = [&](const auto& body) {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const int c = i * kWarp + lane;
      if (c < half) body(a[i], b[i], c);
    }
  };
  for_pairs([&](float& p, float& q, int c) {
    p = x[c];
    q = x[c + half];
  });
  if (const float* weight = is_q ? t.q_norm : t.k_norm) {
    float squares = 0;
    for_pairs([&](float& p, float& q, int) { squares += p * p + q * q; });
    const float scale = 1.0f / sqrtf(warp_sum(squares) / static_cast<float>(t.d) + t.eps);
    for_pairs([&](float& p, float& q, int c) {
      p = p * scale * weight[c];
      q = q * scale * weight[c + half];
    });
  }
  const int position = t.positions.past[row / t.positions.s_q] + static_cast<int>(row % t.positions.s_q);
  float growth = 1;
  if (is_q && t.beta != 0) growth = static_cast<float>(1 + t.beta * log1p(static_cast<double>(position / t.period)));
  for_pairs([&](float& p, float& q, int c) {
    float sin, cos;
    sincosf(static_cast<float>(position) * t.frequencies[c], &sin, &cos);
    sin *= t.factor;
    cos *= t.factor;
    x[c] = growth * (p * cos - q * sin);
    x[c + half] = growth * (q * cos + p * sin);
  });
}

__device__ float gated(float x, float y) { return x / (1 + expf(fminf(-y, 88.0f))); }  // x * sigmoid(y)

__device__ float activate(Activation f, float x) {
  if (f == Activation::silu) return gated(x, x);
  // x * (1 + tanh(z)) / 2 with z = sqrt(2 / pi) (x + 0.044715 x^3)
  return gated(x, x * (1.59576912f + 0.0713548163f * x * x));
}

constexpr int kGateThreads = 256, kGated = 4;  // channels of one thread, loaded before the first is stored

__global__ void __launch_bounds__(kGateThreads)
    gate_multiply_kernel(Activation f, const float* gate_up, int64_t channels, void* y, DType type) {
  const int64_t row = blockIdx.y, first = blockIdx.x * static_cast<int64_t>(kGateThreads * kGated) + threadIdx.x;
  const float *gate = gate_up + row * 2 * channels, *up = gate + channels;
  float g[kGated], u[kGated];
#pragma unroll
  for (int i = 0; i < kGated; ++i) {
    const int64_t c = first + i * kGateThreads;
    g[i] = c < channels ? gate[c] : 0;
    u[i] = c < channels ? up[c] : 0;
  }
#pragma unroll
  for (int i = 0; i < kGated; ++i) {
    const int64_t c = first + i * kGateThreads;
    if (c < channels) store(y, type, row * channels + c, activate(f, g[i]) * u[i]);
  }
}

// One block per row, which passes over it for the maximum and again for the sum, with kAhead loads in flight.
constexpr int kScoreThreads = 1024, kAhead = 8;

// Calls body(c, x[c]) for every c < n of this thread's, ascending.
template <class Body>
__device__ void for_row(const float* x, int64_t n, const Body& body) {
  const int64_t apart = blockDim.x;
  for (int64_t c = threadIdx.x; c < n; c += kAhead * apart) {
    float v[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) v[i] = c + i * apart < n ? x[c + i * apart] : 0;
#pragma unroll
    for (int i = 0; i < kAhead; ++i)
      if (c + i * apart < n) body(c + i * apart, v[i]);
  }
}

__global__ void __launch_bounds__(kScoreThreads) score_kernel(const Score s) {
  const int64_t row = blockIdx.x;
  float* x = s.logits + row * s.vocab;
  float top = -FLT_MAX;
  int64_t first = s.vocab;
  for_row(x, s.vocab, [&](int64_t c, float v) {
    if (s.softcap != 0) x[c] = v = s.softcap * tanhf(v / s.softcap);
    if (v > top || first == s.vocab) {
      top = v;
      first = c;
    }
  });
  const float high = block_max(top);
  if (s.best) {
    __shared__ int lowest;
    if (threadIdx.x == 0) lowest = static_cast<int>(s.vocab) - 1;
    __syncthreads();
    if (top == high && first < s.vocab) atomicMin(&lowest, static_cast<int>(first));
    __syncthreads();
    if (threadIdx.x == 0) s.best[row] = lowest;
  }
  if (!s.targets) return;
  float sum = 0;
  for_row(x, s.vocab, [&](int64_t, float v) { sum += expf(v - high); });
  sum = block_sum(sum);
  if (threadIdx.x == 0) s.losses[row] = high + logf(sum) - x[s.targets[row]];
}

__global__ void advance_kernel(int32_t* past, int b, int s_q) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < b) past[i] += s_q;
}

__global__ void convert_kernel(const void* from, DType from_type, void* to, DType to_type, int64_t n) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; i < n; i += stride)
    store(to, to_type, i, load(from, from_type, i));
}

// A bijection of 64 bits whose output looks random (the finaliser of SplitMix64).
__device__ uint64_t scramble(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

__global__ void fill_normal_kernel(void* to, DType type, int64_t n, float scale, uint64_t seed, int outliers,
                                   float shift) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; i < n; i += stride) {
    const uint64_t bits = scramble(scramble(seed) + static_cast<uint64_t>(i) * 0x9e3779b97f4a7c15ull);
    const float u = (static_cast<float>(bits >> 40) + 0.5f) * 0x1p-24f;  // in (0, 1)
    const float turn = static_cast<float>(bits & 0xffffff) * 0x1p-24f;
    float value = scale * sqrtf(-2 * logf(u)) * cospif(2 * turn);  // Box and Muller
    if (outliers > 0 && i % outliers == 0) value += shift;
    store(to, type, i, value);
  }
}

unsigned blocks_for(int64_t n, int threads) { return static_cast<unsigned>((n + threads - 1) / threads); }

// Blocks of a loop over any n.
unsigned loop_blocks(int64_t n, int threads) { return std::min(blocks_for(n, threads), 4096u); }

}  // namespace

cudaError_t embed(const void* table, DType type, int64_t hidden, const int32_t* tokens, int64_t rows, float scale,
                  float* x, cudaStream_t stream) {
  embed_kernel<<<static_cast<unsigned>(rows), 256, 0, stream>>>(table, type, hidden, tokens, scale, x);
  return cudaGetLastError();
}

cudaError_t add_norm(const AddNorm& a, cudaStream_t stream) {
  const int64_t warps = std::clamp<int64_t>((a.hidden + kHeld * kWarp - 1) / (kHeld * kWarp), 1, kNormThreads / kWarp);
  add_norm_kernel<<<static_cast<unsigned>(a.rows), static_cast<unsigned>(warps) * kWarp, 0, stream>>>(a);
  return cudaGetLastError();
}

cudaError_t turn_qk(const TurnQk& t, cudaStream_t stream) {
  const unsigned blocks = blocks_for(t.rows * (t.h_q + t.h_kv) * kWarp, kTurnThreads);
  turn_qk_kernel<<<blocks, kTurnThreads, 0, stream>>>(t);
  return cudaGetLastError();
}

cudaError_t gate_multiply(Activation f, const float* gate_up, int64_t rows, int64_t channels, void* y, DType type,
                          cudaStream_t stream) {
  const dim3 blocks(blocks_for(channels, kGateThreads * kGated), static_cast<unsigned>(rows));
  gate_multiply_kernel<<<blocks, kGateThreads, 0, stream>>>(f, gate_up, channels, y, type);
  return cudaGetLastError();
}

cudaError_t score(const Score& s, cudaStream_t stream) {
  score_kernel<<<static_cast<unsigned>(s.rows), kScoreThreads, 0, stream>>>(s);
  return cudaGetLastError();
}

cudaError_t advance(int32_t* past, int b, int s_q, cudaStream_t stream) {
  advance_kernel<<<blocks_for(b, 128), 128, 0, stream>>>(past, b, s_q);
  return cudaGetLastError();
}

cudaError_t convert(const void* from, DType from_type, void* to, DType to_type, int64_t n, cudaStream_t stream) {
  convert_kernel<<<loop_blocks(n, 256), 256, 0, stream>>>(from, from_type, to, to_type, n);
  return cudaGetLastError();
}

cudaError_t fill_normal(void* to, DType type, int64_t n, float scale, uint64_t seed, int outliers, float shift,
                        cudaStream_t stream) {
  fill_normal_kernel<<<loop_blocks(n, 256), 256, 0, stream>>>(to, type, n, scale, seed, outliers, shift);
  return cudaGetLastError();
}

}  // namespace thriftattn::model::gpu
