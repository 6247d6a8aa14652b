// y = x W^T + bias, by oneDNN.
//
// W is cut into panels of kPanelColumns output channels, each in the layout that oneDNN prefers, and x into tiles of
// kTileRows rows. A (tile, panel) pair is one task of the ThreadPool and one single-threaded oneDNN call: oneDNN's own
// threads would compete with the pool's for the same processors, and results would depend on how many there are.
#pragma once

#include <cstdint>
#include <memory>
#include <span>

#include "model/model.h"
#include "model/safetensors.h"
#include "thriftattn/status.h"
#include "thriftattn/threads.h"

namespace thriftattn::model {

// How a checkpoint lays a weight out: a row per output channel, or, in experts, a row per input channel.
enum class Rows : uint8_t { outputs, inputs };

class Linear {
 public:
  // The rows of `weights`, each [n_i, inputs], one below the other; `biases` has as many tensors, each [n_i], or none.
  // With Rows::inputs there is one weight, [inputs, n]. F32 and F16 weights are rounded to BF16 where compute = bf16.
  static Result<Linear> create(std::span<const Tensor> weights, std::span<const Tensor> biases, Compute compute,
                               ThreadPool& pool, Rows stored = Rows::outputs);
  Linear();
  Linear(Linear&&) noexcept;
  Linear& operator=(Linear&&) noexcept;
  ~Linear();

  int64_t inputs() const;
  int64_t outputs() const;

  // x: [rows, inputs], y: [rows, outputs]. With compute = bf16, x is rounded to BF16. One call at a time per pool; the
  // error is oneDNN's.
  Status apply(const float* x, int64_t rows, float* y, ThreadPool& pool) const;

 private:
  struct Panels;
  std::unique_ptr<Panels> panels_;
};

}  // namespace thriftattn::model
