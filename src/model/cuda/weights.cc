#include "model/cuda/weights.h"

#include <optional>
#include <string>
#include <utility>

#include "model/cuda/kernels.h"
#include "model/layers.h"

namespace thriftattn::model::gpu {
namespace {

// Makes the parts of Weights one after another, on a stream of its own.
class Maker {
 public:
  explicit Maker(Compute compute) { w_.type = compute == Compute::bf16 ? DType::bf16 : DType::f32; }

  Status start() { return check(cudaStreamCreateWithFlags(stream_.out(), cudaStreamNonBlocking), "a stream"); }
  Result<Weights> finish() {
    THRIFTATTN_RETURN_IF_ERROR(check(cudaStreamSynchronize(stream_.get()), "loading weights"));
    return std::move(w_);
  }
  Weights& made() { return w_; }

  Status floats(const std::vector<float>& from, const float** out) {
    THRIFTATTN_ASSIGN_OR_RETURN(room, take_room(std::ssize(from) * 4));
    *out = static_cast<const float*>(room);
    return copy(room, from.data(), std::ssize(from) * 4);
  }
  Status norm(const std::optional<Tensor>& from, double offset, const float** out) {
    return from ? floats(values(*from, offset), out) : Status();
  }

  // The tensors one below the other, in `type`.
  Status tensors(const std::vector<Tensor>& from, DType type, const void** out) {
    int64_t elements = 0;
    for (const Tensor& t : from) elements += t.elements();
    THRIFTATTN_ASSIGN_OR_RETURN(room, take_room(elements * size_of(type)));
    *out = room;
    auto* to = static_cast<char*>(room);
    for (const Tensor& t : from) {
      if (t.dtype == type) {
        THRIFTATTN_RETURN_IF_ERROR(copy(to, t.data, t.bytes));
      } else {
        if (t.bytes > unconverted_.bytes()) {
          unconverted_ = {};  // freeing waits for what still reads it
          THRIFTATTN_ASSIGN_OR_RETURN(larger, take(t.bytes, "a tensor before its conversion"));
          unconverted_ = std::move(larger);
        }
        THRIFTATTN_RETURN_IF_ERROR(copy(unconverted_.data(), t.data, t.bytes));
        THRIFTATTN_RETURN_IF_ERROR(
            check(convert(unconverted_.data(), t.dtype, to, type, t.elements(), stream_.get()), "convert"));
      }
      to += t.elements() * size_of(type);
    }
    return {};
  }

  Status matrix(const Projection& from, Matrix* out) {
    out->type = w_.type;
    out->inputs = from.weights[0].shape[1];
    for (const Tensor& t : from.weights) out->outputs += t.shape[0];
    THRIFTATTN_RETURN_IF_ERROR(tensors(from.weights, w_.type, &out->weights));
    if (from.biases.empty()) return {};
    const void* bias = nullptr;
    THRIFTATTN_RETURN_IF_ERROR(tensors(from.biases, DType::f32, &bias));
    out->bias = static_cast<const float*>(bias);
    return {};
  }

  Status random(int64_t elements, uint64_t seed, const void** out) {
    THRIFTATTN_ASSIGN_OR_RETURN(room, take_room(elements * size_of(w_.type)));
    *out = room;
    return check(fill_normal(room, w_.type, elements, 0.02f, seed, 0, 0, stream_.get()), "fill_normal");
  }

  // What config.json alone says.
  Status rope(const ModelConfig& c) {
    THRIFTATTN_RETURN_IF_ERROR(floats(rope_frequencies(c.rope, c.d), &w_.frequencies));
    return c.local_rope ? floats(rope_frequencies(*c.local_rope, c.d), &w_.local_frequencies) : Status();
  }

 private:
  Result<void*> take_room(int64_t bytes) {
    THRIFTATTN_ASSIGN_OR_RETURN(memory, take(bytes, "weights"));
    w_.bytes += bytes;
    return w_.memory.emplace_back(std::move(memory)).data();
  }
  // From pageable memory, which has been read when the call returns.
  Status copy(void* to, const void* from, int64_t bytes) {
    return check(cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), cudaMemcpyHostToDevice, stream_.get()),
                 "copying weights");
  }

  Weights w_;
  Stream stream_;
  DeviceMemory unconverted_;
};

}  // namespace

Result<Weights> upload(const Checkpoint& checkpoint, Compute compute) {
  const ModelConfig& c = checkpoint.config;
  Maker maker(compute);
  THRIFTATTN_RETURN_IF_ERROR(maker.start());
  Weights& w = maker.made();
  w.embedding_type = checkpoint.embedding.dtype;
  THRIFTATTN_RETURN_IF_ERROR(maker.tensors({checkpoint.embedding}, w.embedding_type, &w.embedding));
  for (const LayerTensors& from : checkpoint.layers) {
    LayerWeights& l = w.layers.emplace_back();
    THRIFTATTN_RETURN_IF_ERROR(maker.norm(from.attention_norm, c.norm_offset, &l.attention_norm));
    THRIFTATTN_RETURN_IF_ERROR(maker.norm(from.mlp_norm, c.norm_offset, &l.mlp_norm));
    THRIFTATTN_RETURN_IF_ERROR(maker.norm(from.attention_output_norm, c.norm_offset, &l.attention_output_norm));
    THRIFTATTN_RETURN_IF_ERROR(maker.norm(from.mlp_output_norm, c.norm_offset, &l.mlp_output_norm));
    THRIFTATTN_RETURN_IF_ERROR(maker.norm(from.q_norm, c.norm_offset, &l.q_norm));
    THRIFTATTN_RETURN_IF_ERROR(maker.norm(from.k_norm, c.norm_offset, &l.k_norm));
    THRIFTATTN_RETURN_IF_ERROR(maker.matrix(from.qkv, &l.qkv));
    THRIFTATTN_RETURN_IF_ERROR(maker.matrix(from.o, &l.o));
    THRIFTATTN_RETURN_IF_ERROR(maker.matrix(from.gate_up, &l.gate_up));
    THRIFTATTN_RETURN_IF_ERROR(maker.matrix(from.down, &l.down));
  }
  THRIFTATTN_RETURN_IF_ERROR(maker.norm(checkpoint.norm, c.norm_offset, &w.norm));
  if (c.tied_embeddings && w.embedding_type == w.type) {
    w.logits = {w.embedding, nullptr, c.hidden, c.vocab, w.type};
  } else {
    THRIFTATTN_RETURN_IF_ERROR(maker.matrix(checkpoint.logits, &w.logits));
  }
  THRIFTATTN_RETURN_IF_ERROR(maker.rope(c));
  return maker.finish();
}

Result<Weights> draw(const ModelConfig& c, Compute compute, uint64_t seed) {
  Maker maker(compute);
  THRIFTATTN_RETURN_IF_ERROR(maker.start());
  Weights& w = maker.made();
  seed *= 1 << 20;  // one seed per tensor
  const auto matrix = [&](int64_t outputs, int64_t inputs, Matrix* out) {
    *out = {nullptr, nullptr, inputs, outputs, w.type};
    return maker.random(outputs * inputs, seed++, &out->weights);
  };
  w.embedding_type = w.type;
  THRIFTATTN_RETURN_IF_ERROR(maker.random(c.vocab * c.hidden, seed++, &w.embedding));
  THRIFTATTN_RETURN_IF_ERROR(maker.floats(std::vector<float>(c.hidden, 1.0f), &w.norm));
  for (int i = 0; i < c.layers; ++i) {
    LayerWeights& l = w.layers.emplace_back();
    l.attention_norm = l.mlp_norm = w.norm;
    THRIFTATTN_RETURN_IF_ERROR(matrix(int64_t{c.h_q} * c.d + int64_t{c.h_kv} * (c.d + c.d_v), c.hidden, &l.qkv));
    THRIFTATTN_RETURN_IF_ERROR(matrix(c.hidden, int64_t{c.h_q} * c.d_v, &l.o));
    THRIFTATTN_RETURN_IF_ERROR(matrix(2 * c.intermediate, c.hidden, &l.gate_up));
    THRIFTATTN_RETURN_IF_ERROR(matrix(c.hidden, c.intermediate, &l.down));
  }
  THRIFTATTN_RETURN_IF_ERROR(matrix(c.vocab, c.hidden, &w.logits));
  THRIFTATTN_RETURN_IF_ERROR(maker.rope(c));
  return maker.finish();
}

}  // namespace thriftattn::model::gpu
