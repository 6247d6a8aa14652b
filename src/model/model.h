// A checkpoint ready to run: configuration and weights. A Session runs it.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "model/config.h"
#include "thriftattn/status.h"
#include "thriftattn/threads.h"

namespace thriftattn::model {

// What the matrix products multiply; they add in F32, and everything between them is F32. bf16 allows the products of a
// prefill's attention to be BF16 as well (Problem::compute).
enum class Compute : uint8_t { f32, bf16 };
std::string to_string(Compute compute);

// True where this processor multiplies BF16 natively (AVX512_BF16 or AMX_BF16).
bool has_native_bf16();

// The instruction set that oneDNN multiplies with here, as it spells it, e.g. "avx512_core_bf16".
std::string product_isa();

struct Weights;  // weights.h

class Model {
 public:
  // Loads a Hugging Face folder: config.json and one or more safetensors files in F32, F16 or BF16. compute = bf16 on a
  // processor without native BF16 is refused. The folder's files must not change while the model lives.
  static Result<Model> load(const std::string& dir, Compute compute, ThreadPool& pool);

  Model(Model&&) noexcept;
  Model& operator=(Model&&) noexcept;
  ~Model();

  const ModelConfig& config() const { return config_; }
  Compute compute() const { return compute_; }
  const Weights& weights() const { return *weights_; }

 private:
  Model(ModelConfig config, Compute compute, std::unique_ptr<const Weights> weights);
  ModelConfig config_;
  Compute compute_ = Compute::f32;
  std::unique_ptr<const Weights> weights_;
};

}  // namespace thriftattn::model
