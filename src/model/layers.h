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

// x[i] = scale * table[tokens[i]]; table: [vocab, channels], x: [tokens.size(), channels].
void embed(const Tensor& table, std::span<const int32_t> tokens, double scale, float* x, ThreadPool& pool);

// y = x / sqrt(mean(x^2) + eps) * weight, row by row of `channels`; y may be x. x: [rows, groups, channels] with
// `row_stride` floats between rows; y has the same layout.
void rms_norm(const float* x, int64_t rows, int64_t groups, int64_t channels, int64_t row_stride, const float* weight,
              double eps, float* y, ThreadPool& pool);

// Cosines and sines [count, d/2] of the angles at positions first, first + 1, ..., all times `factor`.
struct RopeAngles {
  std::vector<float> cos, sin;
};
// The angle of channel c, in radians per position: [d/2].
std::vector<float> rope_frequencies(const RopeConfig& rope, int d);
void rope_angles(std::span<const float> frequencies, double factor, int64_t first, int64_t count, RopeAngles* out,
                 ThreadPool& pool);

// Turns channels c and c + d/2 of every head of x, [rows, heads, d] with `row_stride` floats between rows.
void rope(const RopeAngles& angles, float* x, int64_t rows, int heads, int d, int64_t row_stride, ThreadPool& pool);

// Row i of x, `channels` floats with `row_stride` between rows, grows by 1 + beta ln(1 + floor((first + i) / period)).
void grow_by_position(double beta, int64_t period, int64_t first, float* x, int64_t rows, int64_t channels,
                      int64_t row_stride, ThreadPool& pool);

// y = f(gate) * up; gate_up: [rows, 2, channels], y: [rows, channels].
void gate_multiply(Activation f, const float* gate_up, int64_t rows, int64_t channels, float* y, ThreadPool& pool);

// y = (clamp(up, -limit, limit) + 1) * g * sigmoid(alpha * g) with g = min(gate, limit); gate_up: [rows, channels, 2],
// y: [rows, channels].
void clamped_swiglu(const float* gate_up, int64_t rows, int64_t channels, double limit, double alpha, float* y,
                    ThreadPool& pool);

// x = cap * tanh(x / cap), [rows, channels].
void soft_cap(double cap, float* x, int64_t rows, int64_t channels, ThreadPool& pool);

// x += y, [rows, channels].
void add(float* x, const float* y, int64_t rows, int64_t channels, ThreadPool& pool);

// log(sum(exp(row))) of one row of n >= 1 floats.
float log_sum_exp(const float* row, int64_t n);

}  // namespace thriftattn::model
