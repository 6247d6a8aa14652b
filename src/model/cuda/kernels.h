// What stands between the matrix products of a transformer layer, as layers.h has it, on a GPU. Values are F32; what a
// product reads is written in the product's type, f32 or bf16. Pointers are the device's, tensors packed rows unless a
// stride is named. Launchers return the launch's error and nothing else.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "model/config.h"
#include "thriftattn/tensor.h"

namespace thriftattn::model::gpu {

inline constexpr int64_t kMaxHidden = 8192;  // channels that add_norm holds in registers
inline constexpr int kMaxTurned = 256;       // channels of a head, as those of turn_qk

// x[i] = scale * table[tokens[i]]; table: [vocab, hidden] of `type`, x: [rows, hidden].
cudaError_t embed(const void* table, DType type, int64_t hidden, const int32_t* tokens, int64_t rows, float scale,
                  float* x, cudaStream_t stream);

// x += y, and out = rms_norm(x) * weight. Where y has a weight, it is y's RMS norm that is added.
struct AddNorm {
  float* x;               // [rows, hidden], rows `stride` apart
  const float* y;         // the same; null = nothing is added
  const float* y_weight;  // [hidden] or null
  const float* weight;    // [hidden]; null = out is not wanted
  void* out;              // [rows, hidden] of `type`
  DType type;
  int64_t rows, hidden, stride;
  float eps;
};
cudaError_t add_norm(const AddNorm& a, cudaStream_t stream);

// Row r of a step stands at position past[r / s_q] + r % s_q.
struct Positions {
  const int32_t* past;  // [b], tokens of every sequence before the step
  int s_q;
};

// Between the product and attention, in place: the RMS norms of query and key heads, RoPE, and the growth of queries by
// 1 + beta ln(1 + floor(position / period)).
struct TurnQk {
  float* qkv;  // [rows, (h_q + h_kv) heads of d and what follows], rows row_stride apart
  int64_t rows, row_stride;
  int h_q, h_kv, d;
  const float *q_norm, *k_norm;  // [d] or null
  float eps;
  const float* frequencies;  // [d/2], radians per position
  float factor;              // of cosines and sines
  double beta;               // 0 = queries do not grow
  int64_t period;
  Positions positions;
};
cudaError_t turn_qk(const TurnQk& t, cudaStream_t stream);

// y = f(gate) * up; gate_up: [rows, 2, channels], y: [rows, channels] of `type`.
cudaError_t gate_multiply(Activation f, const float* gate_up, int64_t rows, int64_t channels, void* y, DType type,
                          cudaStream_t stream);

// Rows of logits: soft-capped in place, their losses and best tokens.
struct Score {
  float* logits;  // [rows, vocab]
  int64_t rows, vocab;
  float softcap;           // 0 = none
  const int32_t* targets;  // [rows] or null
  float* losses;           // [rows]: log_sum_exp(row) - row[target]; with targets
  int32_t* best;           // [rows], the lowest of equals; or null
};
cudaError_t score(const Score& s, cudaStream_t stream);

// past[i] += s_q
cudaError_t advance(int32_t* past, int b, int s_q, cudaStream_t stream);

// to[i] = from[i] in another type.
cudaError_t convert(const void* from, DType from_type, void* to, DType to_type, int64_t n, cudaStream_t stream);

// to[i] = scale * g_i with g_i from the standard normal distribution, a function of (seed, i). Where `outliers` > 0,
// the channels i % outliers == 0 are moved by `shift`.
cudaError_t fill_normal(void* to, DType type, int64_t n, float scale, uint64_t seed, int outliers, float shift,
                        cudaStream_t stream);

}  // namespace thriftattn::model::gpu
