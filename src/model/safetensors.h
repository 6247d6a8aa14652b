// Reads safetensors checkpoints by mmap: nothing is copied until a tensor is used.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "thriftattn/status.h"
#include "thriftattn/tensor.h"

namespace thriftattn::model {

// A tensor inside a mapped file; valid as long as its Safetensors. `data` may be unaligned.
struct Tensor {
  std::string name, file;
  std::string dtype_name;  // as the file spells it
  DType dtype = DType::f32;
  std::vector<int64_t> shape;
  const unsigned char* data = nullptr;
  int64_t bytes = 0;

  int64_t elements() const;
  // Copies elements [first, first + count) as floats; F16 and BF16 widen exactly.
  void read(int64_t first, int64_t count, float* out) const;
  // Element i of the first dimension, i < shape[0]: a view of the same bytes.
  Tensor at(int64_t i) const;
};

// "[256, 64]"
std::string shape_to_string(const std::vector<int64_t>& shape);

// The tensors of one safetensors file, whose bytes these are; `path` names it in errors. Refused: a header that is cut
// short, too long or no JSON; offsets outside the file, overlapping or with gaps; bytes that differ from shape times
// dtype.
Result<std::vector<Tensor>> parse_safetensors(std::string_view bytes, const std::string& path);

// tensor -> file, as the text of a model.safetensors.index.json has it; `path` names it in errors.
Result<std::map<std::string, std::string>> parse_index(std::string_view json, const std::string& path);

class Safetensors {
 public:
  Safetensors() = default;  // no tensors

  // Opens `dir`/model.safetensors, or the shards that `dir`/model.safetensors.index.json lists. Refused, naming file
  // and tensor: what the two functions above refuse; a tensor that is not in the shard that the index names, or in two.
  static Result<Safetensors> open(const std::string& dir);

  // The tensor `name` of exactly this shape, in F32, F16 or BF16.
  Result<Tensor> find(const std::string& name, const std::vector<int64_t>& shape) const;
  bool contains(const std::string& name) const { return tensors_.contains(name); }
  const std::map<std::string, Tensor>& tensors() const { return tensors_; }

 private:
  struct Mapping;
  Status add_file(const std::string& path);

  std::string dir_;
  std::vector<std::shared_ptr<const Mapping>> mappings_;
  std::map<std::string, Tensor> tensors_;
};

}  // namespace thriftattn::model
