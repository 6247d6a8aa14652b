#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "model/layers.cc"
#include <hwy/foreach_target.h>  // NOLINT: must come before highway.h

#include <hwy/contrib/math/math-inl.h>
#include <hwy/highway.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numbers>

#include "model/layers.h"

HWY_BEFORE_NAMESPACE();
namespace thriftattn::model {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;
using Floats = hn::ScalableTag<float>;
using Vec = hn::Vec<Floats>;

// Calls body(i, load, store) for i in steps of a register; the last step may be a partial one, whose missing lanes load
// as `fill`.
template <class Body>
HWY_INLINE void for_lanes(int64_t n, const Body& body) {
  const Floats f;
  const auto lanes = static_cast<int64_t>(hn::Lanes(f));
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    body([&](const float* p, float) { return hn::LoadU(f, p + i); }, [&](Vec v, float* p) { hn::StoreU(v, f, p + i); });
  }
  if (i == n) return;
  HWY_ALIGN float part[hn::MaxLanes(f)];
  body(
      [&](const float* p, float fill) {
        std::fill(part, part + lanes, fill);
        std::copy(p + i, p + n, part);
        return hn::Load(f, part);
      },
      [&](Vec v, float* p) {
        hn::Store(v, f, part);
        std::copy(part, part + (n - i), p + i);
      });
}

void rms_norm_row(const float* x, int64_t n, const float* weight, double eps, float* y) {
  const Floats f;
  Vec squares = hn::Zero(f);
  for_lanes(n, [&](auto load, auto) {
    const Vec v = load(x, 0.0f);
    squares = hn::MulAdd(v, v, squares);
  });
  const float mean = hn::GetLane(hn::SumOfLanes(f, squares)) / static_cast<float>(n);
  const Vec scale = hn::Set(f, 1.0f / std::sqrt(mean + static_cast<float>(eps)));
  for_lanes(n, [&](auto load, auto store) { store(hn::Mul(hn::Mul(load(x, 0.0f), scale), load(weight, 0.0f)), y); });
}

void rope_row(const float* cos, const float* sin, float* x, int64_t half) {
  for_lanes(half, [&](auto load, auto store) {
    const Vec a = load(x, 0.0f), b = load(x + half, 0.0f), c = load(cos, 0.0f), s = load(sin, 0.0f);
    store(hn::Sub(hn::Mul(a, c), hn::Mul(b, s)), x);
    store(hn::Add(hn::Mul(b, c), hn::Mul(a, s)), x + half);
  });
}

// x * sigmoid(y)
HWY_INLINE Vec gated(Vec x, Vec y) {
  const Floats f;
  const Vec limit = hn::Set(f, 88.0f);  // exp(88) is finite, and x / exp(88) as good as 0
  const Vec e = hn::Exp(f, hn::Min(hn::Neg(y), limit));
  return hn::Div(x, hn::Add(hn::Set(f, 1.0f), e));
}

void silu_multiply_row(const float* gate, const float* up, int64_t n, float* y) {
  for_lanes(n, [&](auto load, auto store) {
    const Vec x = load(gate, 0.0f);
    store(hn::Mul(gated(x, x), load(up, 0.0f)), y);
  });
}

// x * (1 + tanh(z)) / 2 = x * sigmoid(2 z) with z = sqrt(2 / pi) (x + 0.044715 x^3)
void gelu_multiply_row(const float* gate, const float* up, int64_t n, float* y) {
  const Floats f;
  const Vec linear = hn::Set(f, 1.59576912f), cubic = hn::Set(f, 0.0713548163f);
  for_lanes(n, [&](auto load, auto store) {
    const Vec x = load(gate, 0.0f);
    const Vec z = hn::Mul(x, hn::MulAdd(cubic, hn::Mul(x, x), linear));
    store(hn::Mul(gated(x, z), load(up, 0.0f)), y);
  });
}

void clamped_swiglu_row(const float* gate_up, int64_t n, float limit, float alpha, float* y) {
  const Floats f;
  const auto lanes = static_cast<int64_t>(hn::Lanes(f));
  const Vec high = hn::Set(f, limit), low = hn::Set(f, -limit);
  HWY_ALIGN float pairs[2 * hn::MaxLanes(f)], out[hn::MaxLanes(f)];
  for (int64_t i = 0; i < n; i += lanes) {
    const int64_t count = std::min(lanes, n - i);
    std::fill(std::copy_n(gate_up + 2 * i, 2 * count, pairs), pairs + 2 * lanes, 0.0f);
    Vec gate, up;
    hn::LoadInterleaved2(f, pairs, gate, up);
    gate = hn::Min(gate, high);
    up = hn::Add(hn::Min(hn::Max(up, low), high), hn::Set(f, 1.0f));
    hn::Store(hn::Mul(up, gated(gate, hn::Mul(gate, hn::Set(f, alpha)))), f, out);
    std::copy_n(out, count, y + i);
  }
}

void scale_row(float factor, int64_t n, float* x) {
  const Floats f;
  for_lanes(n, [&](auto load, auto store) { store(hn::Mul(load(x, 0.0f), hn::Set(f, factor)), x); });
}

void soft_cap_row(float cap, int64_t n, float* x) {
  const Floats f;
  const Vec c = hn::Set(f, cap);
  for_lanes(n, [&](auto load, auto store) { store(hn::Mul(c, hn::Tanh(f, hn::Div(load(x, 0.0f), c))), x); });
}

void add_row(const float* y, int64_t n, float* x) {
  for_lanes(n, [&](auto load, auto store) { store(hn::Add(load(x, 0.0f), load(y, 0.0f)), x); });
}

float log_sum_exp_row(const float* row, int64_t n) {
  const Floats f;
  constexpr float kLowest = -std::numeric_limits<float>::infinity();
  Vec top = hn::Set(f, kLowest);
  for_lanes(n, [&](auto load, auto) { top = hn::Max(top, load(row, kLowest)); });
  const float high = hn::GetLane(hn::MaxOfLanes(f, top));
  Vec sum = hn::Zero(f);
  for_lanes(n, [&](auto load, auto) { sum = hn::Add(sum, hn::Exp(f, hn::Sub(load(row, kLowest), hn::Set(f, high)))); });
  return high + std::log(hn::GetLane(hn::SumOfLanes(f, sum)));
}

}  // namespace HWY_NAMESPACE
}  // namespace thriftattn::model
HWY_AFTER_NAMESPACE();

#if HWY_ONCE

namespace thriftattn::model {

HWY_EXPORT(rms_norm_row);
HWY_EXPORT(rope_row);
HWY_EXPORT(silu_multiply_row);
HWY_EXPORT(gelu_multiply_row);
HWY_EXPORT(clamped_swiglu_row);
HWY_EXPORT(scale_row);
HWY_EXPORT(soft_cap_row);
HWY_EXPORT(add_row);
HWY_EXPORT(log_sum_exp_row);

namespace {

constexpr int64_t kRowsPerTask = 64;

// Calls body(row) for every row in [0, rows).
template <class Body>
void for_rows(int64_t rows, ThreadPool& pool, const Body& body) {
  pool.parallel_for((rows + kRowsPerTask - 1) / kRowsPerTask, [&](int64_t task, int) {
    const int64_t end = std::min(rows, (task + 1) * kRowsPerTask);
    for (int64_t row = task * kRowsPerTask; row < end; ++row) body(row);
  });
}

}  // namespace

void embed(const Tensor& table, std::span<const int32_t> tokens, double scale, float* x, ThreadPool& pool) {
  const auto multiply = HWY_DYNAMIC_DISPATCH(scale_row);
  const int64_t channels = table.shape[1];
  for_rows(std::ssize(tokens), pool, [&](int64_t i) {
    table.read(tokens[i] * channels, channels, x + i * channels);
    if (scale != 1) multiply(static_cast<float>(scale), channels, x + i * channels);
  });
}

void rms_norm(const float* x, int64_t rows, int64_t groups, int64_t channels, int64_t row_stride, const float* weight,
              double eps, float* y, ThreadPool& pool) {
  const auto row_norm = HWY_DYNAMIC_DISPATCH(rms_norm_row);
  for_rows(rows, pool, [&](int64_t row) {
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t at = row * row_stride + g * channels;
      row_norm(x + at, channels, weight, eps, y + at);
    }
  });
}

namespace {

// The channels between which yarn fades: those that turn beta_fast and beta_slow times within the original context.
struct Fade {
  double first, last;
};
Fade yarn_fade(const RopeConfig& rope, int d) {
  const auto channel = [&](double turns) {
    const double wavelength = static_cast<double>(rope.original_max_positions) / turns;
    return d * std::log(wavelength / (2 * std::numbers::pi)) / (2 * std::log(rope.theta));
  };
  Fade fade{channel(rope.beta_fast), channel(rope.beta_slow)};
  if (rope.truncate) fade = {std::floor(fade.first), std::ceil(fade.last)};
  fade = {std::max(fade.first, 0.0), std::min(fade.last, d - 1.0)};
  if (fade.first == fade.last) fade.last += 0.001;
  return fade;
}

}  // namespace

// Rounds where the reference implementation of the field does: a frequency and an angle are floats. At position 16384
// the angle's rounding alone is worth 1e-3 radians, and models were trained with it.
std::vector<float> rope_frequencies(const RopeConfig& rope, int d) {
  using Scaling = RopeConfig::Scaling;
  const Fade fade = rope.scaling == Scaling::yarn ? yarn_fade(rope, d) : Fade{};
  std::vector<float> out(d / 2);
  for (int c = 0; c < d / 2; ++c) {
    const float exponent = static_cast<float>(2 * c) / static_cast<float>(d);
    const double f = 1.0f / static_cast<float>(std::pow(rope.theta, static_cast<double>(exponent)));
    double kept = rope.scaling == Scaling::none ? 1 : 0;  // the share that is not divided by the factor
    if (rope.scaling == Scaling::llama3) {
      // Turns within the original context: few are stretched by the factor, many are kept, between them it fades.
      const double turns = static_cast<double>(rope.original_max_positions) * f / (2 * std::numbers::pi);
      kept = std::clamp((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor), 0.0, 1.0);
    }
    if (rope.scaling == Scaling::yarn) kept = 1 - std::clamp((c - fade.first) / (fade.last - fade.first), 0.0, 1.0);
    out[c] = static_cast<float>((1 - kept) * f / rope.factor + kept * f);
  }
  return out;
}

void rope_angles(std::span<const float> frequencies, double factor, int64_t first, int64_t count, RopeAngles* out,
                 ThreadPool& pool) {
  const int64_t half = std::ssize(frequencies);
  out->cos.resize(count * half);
  out->sin.resize(count * half);
  for_rows(count, pool, [&](int64_t i) {
    for (int64_t c = 0; c < half; ++c) {
      const double angle = static_cast<float>(first + i) * frequencies[c];
      out->cos[i * half + c] = static_cast<float>(factor * std::cos(angle));
      out->sin[i * half + c] = static_cast<float>(factor * std::sin(angle));
    }
  });
}

void rope(const RopeAngles& angles, float* x, int64_t rows, int heads, int d, int64_t row_stride, ThreadPool& pool) {
  const auto turn = HWY_DYNAMIC_DISPATCH(rope_row);
  const int64_t half = d / 2;
  for_rows(rows, pool, [&](int64_t row) {
    for (int h = 0; h < heads; ++h) {
      turn(&angles.cos[row * half], &angles.sin[row * half], x + row * row_stride + h * d, half);
    }
  });
}

void grow_by_position(double beta, int64_t period, int64_t first, float* x, int64_t rows, int64_t channels,
                      int64_t row_stride, ThreadPool& pool) {
  const auto multiply = HWY_DYNAMIC_DISPATCH(scale_row);
  for_rows(rows, pool, [&](int64_t row) {
    const double growth = 1 + beta * std::log1p(static_cast<double>((first + row) / period));
    multiply(static_cast<float>(growth), channels, x + row * row_stride);
  });
}

void gate_multiply(Activation f, const float* gate_up, int64_t rows, int64_t channels, float* y, ThreadPool& pool) {
  const auto multiply =
      f == Activation::gelu_tanh ? HWY_DYNAMIC_DISPATCH(gelu_multiply_row) : HWY_DYNAMIC_DISPATCH(silu_multiply_row);
  for_rows(rows, pool, [&](int64_t row) {
    const float* gate = gate_up + row * 2 * channels;
    multiply(gate, gate + channels, channels, y + row * channels);
  });
}

void clamped_swiglu(const float* gate_up, int64_t rows, int64_t channels, double limit, double alpha, float* y,
                    ThreadPool& pool) {
  const auto swiglu = HWY_DYNAMIC_DISPATCH(clamped_swiglu_row);
  for_rows(rows, pool, [&](int64_t row) {
    swiglu(gate_up + row * 2 * channels, channels, static_cast<float>(limit), static_cast<float>(alpha),
           y + row * channels);
  });
}

void soft_cap(double cap, float* x, int64_t rows, int64_t channels, ThreadPool& pool) {
  const auto bend = HWY_DYNAMIC_DISPATCH(soft_cap_row);
  for_rows(rows, pool, [&](int64_t row) { bend(static_cast<float>(cap), channels, x + row * channels); });
}

void add(float* x, const float* y, int64_t rows, int64_t channels, ThreadPool& pool) {
  const auto add_to = HWY_DYNAMIC_DISPATCH(add_row);
  for_rows(rows, pool, [&](int64_t row) { add_to(y + row * channels, channels, x + row * channels); });
}

float log_sum_exp(const float* row, int64_t n) { return HWY_DYNAMIC_DISPATCH(log_sum_exp_row)(row, n); }

}  // namespace thriftattn::model

#endif  // HWY_ONCE
