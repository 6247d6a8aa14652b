// y = x W^T + bias on a GPU, by cuBLASLt: F32 sums of products of F32 (no TF32) or BF16.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <memory>

#include "model/cuda/device.h"
#include "thriftattn/status.h"
#include "thriftattn/tensor.h"

namespace thriftattn::model::gpu {

struct Matrix {
  const void* weights = nullptr;  // [outputs, inputs] of `type`
  const float* bias = nullptr;    // [outputs] or null
  int64_t inputs = 0, outputs = 0;
  DType type = DType::f32;  // f32 or bf16
};

class Products {
 public:
  // On the current device.
  static Result<Products> create();
  Products(Products&&) noexcept;
  Products& operator=(Products&&) noexcept;
  ~Products();

  // x: [rows, inputs] of w.type, y: [rows, outputs]. How a shape is multiplied is chosen at its first call and kept, so
  // that equal calls give equal bits. Products of one object run one after another: they share scratch memory.
  Status multiply(const Matrix& w, const void* x, int64_t rows, float* y, cudaStream_t stream);

 private:
  struct State;
  explicit Products(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

}  // namespace thriftattn::model::gpu
