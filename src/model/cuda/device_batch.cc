#include "model/cuda/device_batch.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <optional>
#include <utility>
#include <vector>

#include "model/cuda/kernels.h"
#include "model/plans.h"
#include "thriftattn/cuda.h"

namespace thriftattn::model::gpu {
namespace {

constexpr int64_t kChunkRows = 2048;                // rows that pass through the MLP together
constexpr int64_t kLogitFloats = int64_t{1} << 25;  // logits in memory at once, at most, unless one row has more

// The scratch memory of a phase's plans, each from the first use on.
using Workspaces = std::vector<std::optional<cuda::Workspace>>;

// Device memory of a step; `type` is that of the products.
struct Activations {
  float *x, *delta;           // [rows, hidden]: the hidden states, and what is still to be added to them
  float* qkv;                 // [rows, q, k and v of a token side by side]
  void* attended;             // [rows, h_q, d_v] of `type`
  void* normed;               // [chunk, hidden] of `type`
  float* gate_up;             // [chunk, 2, intermediate]
  void* activated;            // [chunk, intermediate] of `type`
  float* logits;              // [logit_rows, vocab]
  float* losses;              // [rows]
  int32_t *tokens, *targets;  // [rows]; a decode step leaves the tokens of the next one
  int32_t* past;              // [b], tokens of every sequence before the step
  int64_t chunk, logit_rows;
  DeviceMemory memory;
  int64_t bytes = 0;
};

Result<Activations> take_activations(const ModelConfig& c, DType type, int64_t b, int64_t max_step) {
  const int64_t rows = b * max_step, width = size_of(type);
  const int64_t qkv_width = int64_t{c.h_q} * c.d + int64_t{c.h_kv} * (c.d + c.d_v);
  Activations a;
  a.chunk = std::min(rows, kChunkRows);
  a.logit_rows = std::max(b, std::min(a.chunk, kLogitFloats / c.vocab));
  std::vector<std::pair<void**, int64_t>> parts;  // where the pointer belongs, and where its memory begins
  const auto part = [&](auto** pointer, int64_t bytes) {
    parts.emplace_back(reinterpret_cast<void**>(pointer), a.bytes);
    a.bytes += (bytes + 255) / 256 * 256;
  };
  part(&a.x, rows * c.hidden * 4);
  part(&a.delta, rows * c.hidden * 4);
  part(&a.qkv, rows * qkv_width * 4);
  part(&a.attended, rows * c.h_q * c.d_v * width);
  part(&a.normed, std::max(a.chunk, a.logit_rows) * c.hidden * width);
  part(&a.gate_up, a.chunk * 2 * c.intermediate * 4);
  part(&a.activated, a.chunk * c.intermediate * width);
  part(&a.logits, a.logit_rows * c.vocab * 4);
  part(&a.losses, rows * 4);
  part(&a.tokens, rows * 4);
  part(&a.targets, rows * 4);
  part(&a.past, b * 4);
  THRIFTATTN_ASSIGN_OR_RETURN(memory, take(a.bytes, "activations"));
  for (const auto& [pointer, at] : parts) *pointer = memory.data() + at;
  a.memory = std::move(memory);
  return a;
}

class Batch : public DeviceBatch {
 public:
  Batch(const ModelParts& model, SessionPlan plan, cuda::Cache cache, Products products, Activations activations,
        Stream stream, int b)
      : c_(model.config),
        w_(model.weights),
        b_(b),
        plan_(std::move(plan)),
        cache_(std::move(cache)),
        products_(std::move(products)),
        a_(std::move(activations)),
        stream_(std::move(stream)),
        prefill_(plan_.prefill.plans.size()),
        decode_(plan_.decode.plans.size()) {}

  Status start();

  Status read(std::span<const int32_t> tokens, Phase phase, const Wanted& wanted, const Advance& advance) override;
  Status fill(int64_t tokens, uint64_t seed) override;
  Result<std::vector<float>> decode_greedily(int steps) override;

  void use_graph(bool on) override { use_graph_ = on; }
  int size() const override { return b_; }
  int64_t length() const override { return length_; }
  const Result<Plan>& plan(Phase phase) const override { return plan_.of(phase).first_or_refused(); }
  Stats stats() const override { return stats_; }
  int64_t cache_bytes() const override { return cache_.bytes().total(); }
  int64_t activation_bytes() const override;
  Status save(const std::string&) const override { return no_files(); }
  Status resume(const std::string&, std::span<const int32_t>) override { return no_files(); }

 private:
  static Status no_files() { return unsupported("a sequence on a GPU is not saved or loaded: on the processor it is"); }

  Status check_step(int64_t tokens, Phase phase) const;
  Status begin(int64_t n, Phase phase);
  Status forward(int64_t n, Phase phase, LogitRows rows, const Advance& advance);
  Status attend(int layer, Phase phase, const View& q, const MutableView& out);
  Status write_logits(int64_t n, LogitRows rows);
  Status decode_step();
  Status count(Phase phase, size_t plan, int64_t times);
  Status count_decoded();
  Status end();

  Workspaces& workspaces(Phase phase) { return phase == Phase::decode ? decode_ : prefill_; }
  cudaStream_t stream() const { return stream_.get(); }
  Status product(const Matrix& w, const void* x, int64_t rows, float* y) {
    return products_.multiply(w, x, rows, y, stream());
  }

  const ModelConfig& c_;
  const Weights& w_;
  const int b_;
  SessionPlan plan_;
  cuda::Cache cache_;
  Products products_;
  Activations a_;
  Stream stream_;
  Workspaces prefill_, decode_;
  std::vector<SeqId> seqs_;
  int64_t length_ = 0;        // of every sequence
  int64_t batch_tokens_ = 0;  // of each sequence in a step, as the cache was told
  bool whole_ = true;         // no step has failed
  bool launched_ = false;     // a decode step has run: what it needs is loaded and can be captured
  bool use_graph_ = true;
  GraphExec graph_;  // a decode step
  Stats stats_;
};

// Every sequence gets its pages now: steps take none.
Status Batch::start() {
  for (int i = 0; i < b_; ++i) {
    THRIFTATTN_ASSIGN_OR_RETURN(seq, cache_.new_sequence(stream()));
    THRIFTATTN_RETURN_IF_ERROR(cache_.reserve(seq, plan_.max_tokens, stream()));
    seqs_.push_back(seq);
  }
  return check(cudaMemsetAsync(a_.memory.data(), 0, static_cast<size_t>(a_.bytes), stream()), "cudaMemsetAsync");
}

// The model: embedding, layers, logits of n tokens of every sequence. What a part of a layer gives waits in `delta`
// until the norm of the next part adds it to x.
Status Batch::forward(int64_t n, Phase phase, LogitRows rows_wanted, const Advance& advance) {
  const int64_t rows = b_ * n, hidden = c_.hidden, chunk = a_.chunk;
  const int64_t q_width = int64_t{c_.h_q} * c_.d, k_width = int64_t{c_.h_kv} * c_.d,
                v_width = int64_t{c_.h_kv} * c_.d_v;
  const int64_t qkv_width = q_width + k_width + v_width, out_width = int64_t{c_.h_q} * c_.d_v;
  const View q{a_.qkv, DType::f32, rows, c_.h_q, c_.d, qkv_width, c_.d};
  const View k{a_.qkv + q_width, DType::f32, rows, c_.h_kv, c_.d, qkv_width, c_.d};
  const View v{a_.qkv + q_width + k_width, DType::f32, rows, c_.h_kv, c_.d_v, qkv_width, c_.d_v};
  const MutableView attended{a_.attended, w_.type, rows, c_.h_q, c_.d_v, out_width, c_.d_v};
  // x += delta, normed by delta_norm where there is one; normed = norm(x) * weight. Rows [i, i + m).
  const auto add_and_norm = [&](int64_t i, int64_t m, const float* delta, const float* delta_norm,
                                const float* weight) {
    return check(add_norm({a_.x + i * hidden, delta ? delta + i * hidden : nullptr, delta_norm, weight, a_.normed,
                           w_.type, m, hidden, hidden, static_cast<float>(c_.norm_eps)},
                          stream()),
                 "add_norm");
  };

  THRIFTATTN_RETURN_IF_ERROR(cache_.begin_step(stream()));
  THRIFTATTN_RETURN_IF_ERROR(check(embed(w_.embedding, w_.embedding_type, hidden, a_.tokens, rows,
                                         static_cast<float>(c_.embedding_scale), a_.x, stream()),
                                   "embed"));
  const float *delta = nullptr, *delta_norm = nullptr;  // of the layer before
  for (int layer = 0; layer < c_.layers; ++layer) {
    const LayerWeights& l = w_.layers[layer];
    for (int64_t i = 0; i < rows; i += chunk) {
      const int64_t m = std::min(chunk, rows - i);
      THRIFTATTN_RETURN_IF_ERROR(add_and_norm(i, m, delta, delta_norm, l.attention_norm));
      THRIFTATTN_RETURN_IF_ERROR(product(l.qkv, a_.normed, m, a_.qkv + i * qkv_width));
    }
    const bool local = c_.local_rope && c_.windows[layer] > 0;
    THRIFTATTN_RETURN_IF_ERROR(
        check(turn_qk({a_.qkv,
                       rows,
                       qkv_width,
                       c_.h_q,
                       c_.h_kv,
                       c_.d,
                       l.q_norm,
                       l.k_norm,
                       static_cast<float>(c_.norm_eps),
                       local ? w_.local_frequencies : w_.frequencies,
                       static_cast<float>(local ? c_.local_rope->attention_factor : c_.rope.attention_factor),
                       c_.temperature_beta,
                       c_.rope.original_max_positions,
                       {a_.past, static_cast<int>(n)}},
                      stream()),
              "turn_qk"));
    THRIFTATTN_RETURN_IF_ERROR(cache_.append(layer, k, v, stream()));
    THRIFTATTN_RETURN_IF_ERROR(attend(layer, phase, q, attended));
    for (int64_t i = 0; i < rows; i += chunk) {
      const int64_t m = std::min(chunk, rows - i);
      const void* heads = static_cast<const char*>(a_.attended) + i * out_width * size_of(w_.type);
      THRIFTATTN_RETURN_IF_ERROR(product(l.o, heads, m, a_.delta + i * hidden));
      THRIFTATTN_RETURN_IF_ERROR(add_and_norm(i, m, a_.delta, l.attention_output_norm, l.mlp_norm));
      THRIFTATTN_RETURN_IF_ERROR(product(l.gate_up, a_.normed, m, a_.gate_up));
      THRIFTATTN_RETURN_IF_ERROR(
          check(gate_multiply(c_.activation, a_.gate_up, m, c_.intermediate, a_.activated, w_.type, stream()), "gate"));
      THRIFTATTN_RETURN_IF_ERROR(product(l.down, a_.activated, m, a_.delta + i * hidden));
    }
    delta = a_.delta;
    delta_norm = l.mlp_output_norm;
    if (!advance) continue;
    THRIFTATTN_RETURN_IF_ERROR(check(cudaStreamSynchronize(stream()), "a layer"));
    if (!advance(static_cast<double>(layer + 1) / c_.layers)) return Status(Code::cancelled, "cancelled");
  }
  THRIFTATTN_RETURN_IF_ERROR(cache_.end_step(stream()));
  THRIFTATTN_RETURN_IF_ERROR(write_logits(n, rows_wanted));
  return check(gpu::advance(a_.past, b_, static_cast<int>(n), stream()), "advance");
}

Status Batch::attend(int layer, Phase phase, const View& q, const MutableView& out) {
  const PhasePlans& plans = plan_.of(phase);
  const size_t at = plans.layers[layer][0].plan;
  cuda::AttendArgs args;
  args.cache = &cache_;
  args.layer = layer;
  args.q = q;
  args.out = out;
  THRIFTATTN_RETURN_IF_ERROR(cuda::run(*plans.plans[at], *workspaces(phase)[at], args, stream()));
  const bool captured = phase == Phase::decode && batch_tokens_ == 1;
  return captured ? Status() : count(phase, at, 1);
}

// The last norm, the logits and their losses, of the rows wanted. Where these are one per sequence, the likeliest
// tokens replace those of the step.
Status Batch::write_logits(int64_t n, LogitRows wanted) {
  if (wanted == LogitRows::none) return {};
  const bool all = wanted == LogitRows::all;
  const int64_t apart = all ? 1 : n, first = all ? 0 : n - 1, rows = all ? b_ * n : b_, hidden = c_.hidden;
  const float* delta_norm = w_.layers.back().mlp_output_norm;
  for (int64_t i = 0; i < rows; i += a_.logit_rows) {
    const int64_t m = std::min(a_.logit_rows, rows - i), at = (first + i * apart) * hidden;
    THRIFTATTN_RETURN_IF_ERROR(check(add_norm({a_.x + at, a_.delta + at, delta_norm, w_.norm, a_.normed, w_.type, m,
                                               hidden, apart * hidden, static_cast<float>(c_.norm_eps)},
                                              stream()),
                                     "add_norm"));
    THRIFTATTN_RETURN_IF_ERROR(product(w_.logits, a_.normed, m, a_.logits));
    THRIFTATTN_RETURN_IF_ERROR(
        check(score({a_.logits, m, c_.vocab, static_cast<float>(c_.logit_softcap), all ? a_.targets + i : nullptr,
                     a_.losses + i, rows == b_ ? a_.tokens + i : nullptr},
                    stream()),
              "score"));
  }
  return {};
}

// One token of every sequence: launched the first time, captured the second, replayed from then on.
Status Batch::decode_step() {
  if (!launched_ || !use_graph_) {
    launched_ = true;
    return forward(1, Phase::decode, LogitRows::all, nullptr);
  }
  if (!graph_) {
    Graph graph;
    THRIFTATTN_RETURN_IF_ERROR(
        check(cudaStreamBeginCapture(stream(), cudaStreamCaptureModeThreadLocal), "cudaStreamBeginCapture"));
    const Status status = forward(1, Phase::decode, LogitRows::all, nullptr);
    const cudaError_t ended = cudaStreamEndCapture(stream(), graph.out());
    THRIFTATTN_RETURN_IF_ERROR(status);
    THRIFTATTN_RETURN_IF_ERROR(check(ended, "cudaStreamEndCapture"));
    THRIFTATTN_RETURN_IF_ERROR(check(cudaGraphInstantiate(graph_.out(), graph.get(), 0), "cudaGraphInstantiate"));
  }
  return check(cudaGraphLaunch(graph_.get(), stream()), "cudaGraphLaunch");
}

// Adds to stats_ what the last run of a plan promoted, `times` over. Waits for the stream.
Status Batch::count(Phase phase, size_t i, int64_t times) {
  const Plan& plan = *plan_.of(phase).plans[i];
  THRIFTATTN_ASSIGN_OR_RETURN(last, cuda::stats(plan, *workspaces(phase)[i], cache_, stream()));
  stats_.pairs += times * last.pairs;
  stats_.promoted += times * (plan.problem.method.budget.kind == Budget::Kind::all ? last.pairs : last.promoted);
  stats_.wanted_not_stored += times * last.wanted_not_stored;
  return {};
}

// The same of a step of one token, whose layers have passed when it can be asked.
Status Batch::count_decoded() {
  for (size_t i = 0; i < decode_.size(); ++i) {
    const auto& layers = plan_.decode.layers;
    const auto served = std::count_if(layers.begin(), layers.end(), [i](const auto& l) { return l[0].plan == i; });
    THRIFTATTN_RETURN_IF_ERROR(count(Phase::decode, i, served));
  }
  return {};
}

Status Batch::check_step(int64_t n, Phase phase) const {
  if (!whole_) return invalid_argument("a step has failed: the sequences cannot go on");
  if (!plan(phase).ok()) return plan(phase).status();
  const int64_t limit = plan_.most(phase);
  if (n < 1 || n > limit) {
    return invalid_argument(fmt::format("a step of {} tokens is not supported: 1 to {} are", n, limit));
  }
  if (length_ + n > plan_.max_tokens) {
    return invalid_argument(
        fmt::format("{} tokens after {} are more than the {} of the session", n, length_, plan_.max_tokens));
  }
  return {};
}

// Tells the cache what comes, and makes what a phase needs.
Status Batch::begin(int64_t n, Phase phase) {
  Workspaces& of_phase = workspaces(phase);
  for (size_t i = 0; i < of_phase.size(); ++i) {
    if (of_phase[i]) continue;
    THRIFTATTN_ASSIGN_OR_RETURN(workspace, cuda::Workspace::create(*plan_.of(phase).plans[i], cache_.device()));
    of_phase[i] = std::move(workspace);
  }
  if (n == batch_tokens_) return {};
  batch_tokens_ = n;
  return cache_.set_batch(seqs_, std::vector<int64_t>(seqs_.size(), n), stream());
}

// Waits, and asks what the step could not do.
Status Batch::end() {
  THRIFTATTN_ASSIGN_OR_RETURN(faults, cache_.faults(stream()));
  if (faults.not_finite) return invalid_argument("a key or value is no number that FP16 has: beyond 65504, or NaN");
  if (faults.no_pages) return Status(Code::out_of_memory, "the cache has no page left");
  return {};
}

Status Batch::read(std::span<const int32_t> tokens, Phase phase, const Wanted& wanted, const Advance& advance) {
  const CurrentDevice current(cache_.device());
  const int64_t n = std::ssize(tokens) / b_;
  THRIFTATTN_RETURN_IF_ERROR(check_step(n, phase));
  if (n * b_ != std::ssize(tokens)) {
    return invalid_argument(fmt::format("{} tokens for {} sequences", tokens.size(), b_));
  }
  if (n > 1 && !wanted.losses.empty() && !wanted.logits.empty()) {
    return unsupported("losses and logits of one step of several tokens are not given on a GPU: one of them is");
  }
  const auto no_token = [&](int32_t token) { return token < 0 || token >= c_.vocab; };
  for (const std::span<const int32_t> some : {tokens, wanted.targets}) {
    const auto wrong = std::find_if(some.begin(), some.end(), no_token);
    if (wrong == some.end()) continue;
    return invalid_argument(fmt::format("token {} does not exist: ids from 0 to {} do", *wrong, c_.vocab - 1));
  }

  whole_ = false;
  THRIFTATTN_RETURN_IF_ERROR(begin(n, phase));
  const auto to_device = [&](int32_t* to, std::span<const int32_t> from) {
    return check(cudaMemcpyAsync(to, from.data(), from.size_bytes(), cudaMemcpyHostToDevice, stream()), "tokens");
  };
  THRIFTATTN_RETURN_IF_ERROR(to_device(a_.tokens, tokens));
  if (!wanted.targets.empty()) THRIFTATTN_RETURN_IF_ERROR(to_device(a_.targets, wanted.targets));
  const LogitRows rows = !wanted.losses.empty()   ? LogitRows::all
                         : !wanted.logits.empty() ? LogitRows::last
                                                  : LogitRows::none;
  if (phase == Phase::decode && n == 1) {
    THRIFTATTN_RETURN_IF_ERROR(decode_step());
    THRIFTATTN_RETURN_IF_ERROR(count_decoded());
  } else {
    THRIFTATTN_RETURN_IF_ERROR(forward(n, phase, rows, advance));
  }
  const auto to_host = [&](std::span<float> to, const float* from) {
    return check(cudaMemcpyAsync(to.data(), from, to.size_bytes(), cudaMemcpyDeviceToHost, stream()), "results");
  };
  if (!wanted.losses.empty()) THRIFTATTN_RETURN_IF_ERROR(to_host(wanted.losses, a_.losses));
  if (!wanted.logits.empty()) THRIFTATTN_RETURN_IF_ERROR(to_host(wanted.logits, a_.logits));
  THRIFTATTN_RETURN_IF_ERROR(check(cudaStreamSynchronize(stream()), "a step"));
  THRIFTATTN_RETURN_IF_ERROR(end());
  length_ += n;
  whole_ = true;
  if (advance && phase == Phase::decode && !advance(1)) return Status(Code::cancelled, "cancelled");
  return {};
}

Status Batch::fill(int64_t tokens, uint64_t seed) {
  const CurrentDevice current(cache_.device());
  const int64_t k_width = int64_t{c_.h_kv} * c_.d, v_width = int64_t{c_.h_kv} * c_.d_v;
  for (int64_t left = tokens, n = 0; left > 0; left -= n) {
    n = std::min(left, plan_.max_step);
    THRIFTATTN_RETURN_IF_ERROR(check_step(n, Phase::prefill));
    whole_ = false;
    batch_tokens_ = n;
    THRIFTATTN_RETURN_IF_ERROR(cache_.set_batch(seqs_, std::vector<int64_t>(seqs_.size(), n), stream()));
    THRIFTATTN_RETURN_IF_ERROR(cache_.begin_step(stream()));
    const int64_t rows = b_ * n;
    float *k = a_.qkv, *v = k + rows * k_width;
    for (int layer = 0; layer < c_.layers; ++layer) {
      const uint64_t of_layer = (seed * plan_.max_tokens + length_) * 2 * c_.layers + 2 * layer;
      THRIFTATTN_RETURN_IF_ERROR(
          check(fill_normal(k, DType::f32, rows * k_width, 1, of_layer, kOutlierEvery, kOutlierShift, stream()), "k"));
      THRIFTATTN_RETURN_IF_ERROR(
          check(fill_normal(v, DType::f32, rows * v_width, 1, of_layer + 1, 0, 0, stream()), "v"));
      THRIFTATTN_RETURN_IF_ERROR(
          cache_.append(layer, view(k, rows, c_.h_kv, c_.d), view(v, rows, c_.h_kv, c_.d_v), stream()));
    }
    THRIFTATTN_RETURN_IF_ERROR(cache_.end_step(stream()));
    THRIFTATTN_RETURN_IF_ERROR(check(gpu::advance(a_.past, b_, static_cast<int>(n), stream()), "advance"));
    length_ += n;
    whole_ = true;
  }
  return end();
}

Result<std::vector<float>> Batch::decode_greedily(int steps) {
  const CurrentDevice current(cache_.device());
  if (length_ + steps > plan_.max_tokens) {
    return invalid_argument(
        fmt::format("{} steps after {} tokens are more than the {} of the session", steps, length_, plan_.max_tokens));
  }
  THRIFTATTN_RETURN_IF_ERROR(check_step(1, Phase::decode));
  whole_ = false;
  THRIFTATTN_RETURN_IF_ERROR(begin(1, Phase::decode));
  std::vector<Event> events(steps + 1);
  for (int i = 0; i <= steps; ++i) {
    if (i > 0) THRIFTATTN_RETURN_IF_ERROR(decode_step());
    THRIFTATTN_RETURN_IF_ERROR(check(cudaEventCreate(events[i].out()), "cudaEventCreate"));
    THRIFTATTN_RETURN_IF_ERROR(check(cudaEventRecord(events[i].get(), stream()), "cudaEventRecord"));
  }
  THRIFTATTN_RETURN_IF_ERROR(check(cudaStreamSynchronize(stream()), "decode steps"));
  THRIFTATTN_RETURN_IF_ERROR(end());
  THRIFTATTN_RETURN_IF_ERROR(count_decoded());
  length_ += steps;
  whole_ = true;
  std::vector<float> times(steps);
  for (int i = 0; i < steps; ++i) {
    THRIFTATTN_RETURN_IF_ERROR(
        check(cudaEventElapsedTime(&times[i], events[i].get(), events[i + 1].get()), "cudaEventElapsedTime"));
  }
  return times;
}

int64_t Batch::activation_bytes() const {
  int64_t bytes = a_.bytes;
  for (const Workspaces* of_phase : {&prefill_, &decode_}) {
    for (const auto& workspace : *of_phase) bytes += workspace ? workspace->bytes() : 0;
  }
  return bytes;
}

}  // namespace

Result<std::unique_ptr<DeviceBatch>> open_batch(const ModelParts& model, const Schedule& schedule,
                                                const SessionOptions& options, int size) {
  if (options.attention) return unsupported("attention cannot be replaced on a GPU");
  THRIFTATTN_ASSIGN_OR_RETURN(plan, plan_session(model.config, schedule, options, model.compute, model.machine, size));
  for (const PhasePlans* phase : {&plan.prefill, &plan.decode}) {
    for (size_t layer = 0; layer < phase->layers.size(); ++layer) {
      if (phase->layers[layer].size() == 1) continue;
      return unsupported(fmt::format(
          "the KV heads of layer {} have several methods: on a GPU a layer has one method for all its heads", layer));
    }
  }
  const int device = model.machine.gpu->index;
  const CurrentDevice current(device);
  Stream stream;
  THRIFTATTN_RETURN_IF_ERROR(check(cudaStreamCreateWithFlags(stream.out(), cudaStreamNonBlocking), "a stream"));
  THRIFTATTN_ASSIGN_OR_RETURN(cache,
                              cuda::Cache::create(plan.cache, {size, plan.max_tokens, 0, plan.max_step}, device));
  THRIFTATTN_ASSIGN_OR_RETURN(products, Products::create());
  THRIFTATTN_ASSIGN_OR_RETURN(activations, take_activations(model.config, model.weights.type, size, plan.max_step));
  auto batch = std::make_unique<Batch>(model, std::move(plan), std::move(cache), std::move(products),
                                       std::move(activations), std::move(stream), size);
  THRIFTATTN_RETURN_IF_ERROR(batch->start());
  return std::unique_ptr<DeviceBatch>(std::move(batch));
}

}  // namespace thriftattn::model::gpu
