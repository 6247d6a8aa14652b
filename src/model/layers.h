// What stands between the matrix products of a transformer layer, in F32. All tensors are packed rows unless a stride
// is named; rows are shared out over the pool, and results do not depend on how.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "model/config.h"
#include "model/safetensors.h"
#include "thriftattn/threads.h"

namespace thriftattn::model {

// x[i] = table[tokens[i]]; table: [vocab, channels], x: [tokens.size(), channels].
void embed(const Tensor& table, std::span<const int32_t> tokens, float* x, ThreadPool& pool);

// y = x / sqrt(mean(x^2) + eps) * weight, row by row of `channels`; y may be x. x: [rows, groups, channels] with
// `row_stride` floats between rows; y has the same layout.
void rms_norm(const float* x, int64_t rows, int64_t groups, int64_t channels, int64_t row_stride, const float* weight,
              double eps, float* y, ThreadPool& pool);

// Cosines and sines [count, d/2] of the angles at positions first, first + 1, ...
struct RopeAngles {
  std::vector<float> cos, sin;
};
// The angle of channel c, in radians per position: [d/2].
std::vector<float> rope_frequencies(const RopeConfig& rope, int d);
void rope_angles(std::span<const float> frequencies, int64_t first, int64_t count, RopeAngles* out, ThreadPool& pool);

// Turns channels c and c + d/2 of every head of x, [rows, heads, d] with `row_stride` floats between rows.
void rope(const RopeAngles& angles, float* x, int64_t rows, int heads, int d, int64_t row_stride, ThreadPool& pool);

// y = silu(gate) * up; gate_up: [rows, 2, channels], y: [rows, channels].
void silu_multiply(const float* gate_up, int64_t rows, int64_t channels, float* y, ThreadPool& pool);

// x += y, [rows, channels].
void add(float* x, const float* y, int64_t rows, int64_t channels, ThreadPool& pool);

// log(sum(exp(row))) of one row of n >= 1 floats.
float log_sum_exp(const float* row, int64_t n);

}  // namespace thriftattn::model
