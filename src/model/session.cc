#include "model/session.h"

#include <fmt/format.h>

#include <algorithm>
#include <new>
#include <utility>

#include "model/layers.h"
#include "model/weights.h"

namespace thriftattn::model {
namespace {

constexpr int64_t kChunkRows = 1024;                // rows that pass through the MLP together
constexpr int64_t kLogitFloats = int64_t{1} << 22;  // logits in memory at once, at most

// Floats that grow and are never initialised.
class Buffer {
 public:
  float* at_least(int64_t n) {
    if (n > size_) {
      data_.reset();
      size_ = 0;
      data_ = std::make_unique_for_overwrite<float[]>(n);
      size_ = n;
    }
    return data_.get();
  }

 private:
  std::unique_ptr<float[]> data_;
  int64_t size_ = 0;
};

struct Activations {
  RopeAngles angles;
  Buffer x, qkv, attended;                       // of all rows of a step
  Buffer normed, projected, gate_up, activated;  // of one chunk of rows
  Buffer logits;
};

Problem problem_for(const ModelConfig& c, Phase phase, const Method& method, const CacheConfig& cache,
                    int64_t max_tokens, int64_t max_step, bool stats) {
  Problem p;
  p.phase = phase;
  p.max_s_q = phase == Phase::decode ? std::min<int64_t>(max_step, kMaxDecodeRows) : max_step;
  p.max_s_kv = max_tokens;
  p.h_q = c.h_q;
  p.h_kv = c.h_kv;
  p.d = c.d;
  p.d_v = c.d_v;
  p.method = method;
  p.cache = cache;
  p.stats = stats;
  return p;
}

}  // namespace

struct Session::State {
  // Everything of a phase: the plan, or why there is none, and its scratch memory from the first use on.
  struct PhasePlan {
    Result<Plan> plan;
    std::optional<Workspace> workspace;
  };

  const Model* model;
  ThreadPool* pool;
  Method method;
  int64_t max_tokens, max_step;
  KvCache cache;
  PhasePlan prefill, decode;
  std::vector<float> frequencies;
  Stats stats = {};

  Activations buffers = {};

  PhasePlan& of(Phase phase) { return phase == Phase::decode ? decode : prefill; }
  Status check(SeqId seq, std::span<const int32_t> tokens, Phase phase);
  Status forward(SeqId seq, std::span<const int32_t> tokens, Phase phase, LogitRows rows, const LogitSink& sink,
                 const Advance& advance);
  Status write_logits(const float* hidden, int64_t n, LogitRows rows, const LogitSink& sink);
};

// The model: embedding, layers, logits.
Status Session::State::forward(SeqId seq, std::span<const int32_t> tokens, Phase phase, LogitRows rows,
                               const LogitSink& sink, const Advance& advance) {
  const ModelConfig& c = model->config();
  const Weights& w = model->weights();
  const int64_t n = std::ssize(tokens), past = cache.length(seq), hidden = c.hidden;
  const int64_t q_width = int64_t{c.h_q} * c.d, k_width = int64_t{c.h_kv} * c.d, v_width = int64_t{c.h_kv} * c.d_v;
  const int64_t qkv_width = q_width + k_width + v_width, out_width = int64_t{c.h_q} * c.d_v;
  const int64_t chunk = std::min(n, kChunkRows);

  float* x = buffers.x.at_least(n * hidden);
  float* q = buffers.qkv.at_least(n * qkv_width);
  float *k = q + q_width, *v = k + k_width;  // q, k and v of a token stand side by side
  float* attended = buffers.attended.at_least(n * out_width);
  float *normed = buffers.normed.at_least(chunk * hidden), *projected = buffers.projected.at_least(chunk * hidden);
  float* gate_up = buffers.gate_up.at_least(chunk * 2 * c.intermediate);
  float* activated = buffers.activated.at_least(chunk * c.intermediate);
  const View k_view{k, DType::f32, n, c.h_kv, c.d, qkv_width, c.d},
      v_view{v, DType::f32, n, c.h_kv, c.d_v, qkv_width, c.d_v};

  PhasePlan& at = of(phase);
  AttendArgs attend;
  attend.cache = &cache;
  attend.seqs = {&seq, 1};
  attend.s_q = {&n, 1};
  attend.q = {q, DType::f32, n, c.h_q, c.d, qkv_width, c.d};
  attend.out = mutable_view(attended, n, c.h_q, c.d_v);
  attend.stats = &stats;

  embed(w.embedding, tokens, x, *pool);
  rope_angles(frequencies, past, n, &buffers.angles, *pool);
  for (int layer = 0; layer < c.layers; ++layer) {
    const LayerWeights& l = w.layers[layer];
    for (int64_t i = 0; i < n; i += chunk) {
      const int64_t m = std::min(chunk, n - i);
      rms_norm(x + i * hidden, m, 1, hidden, hidden, l.attention_norm.data(), c.norm_eps, normed, *pool);
      THRIFTATTN_RETURN_IF_ERROR(l.qkv.apply(normed, m, q + i * qkv_width, *pool));
    }
    if (c.qk_norm) {
      rms_norm(q, n, c.h_q, c.d, qkv_width, l.q_norm.data(), c.norm_eps, q, *pool);
      rms_norm(k, n, c.h_kv, c.d, qkv_width, l.k_norm.data(), c.norm_eps, k, *pool);
    }
    rope(buffers.angles, q, n, c.h_q, c.d, qkv_width, *pool);
    rope(buffers.angles, k, n, c.h_kv, c.d, qkv_width, *pool);

    THRIFTATTN_RETURN_IF_ERROR(cache.append(seq, layer, k_view, v_view, *pool));
    attend.layer = layer;
    THRIFTATTN_RETURN_IF_ERROR(run(*at.plan, *at.workspace, *pool, attend));
    THRIFTATTN_RETURN_IF_ERROR(cache.settle(seq, layer));

    for (int64_t i = 0; i < n; i += chunk) {
      const int64_t m = std::min(chunk, n - i);
      float* rows_of_x = x + i * hidden;
      THRIFTATTN_RETURN_IF_ERROR(l.o.apply(attended + i * out_width, m, projected, *pool));
      add(rows_of_x, projected, m, hidden, *pool);
      rms_norm(rows_of_x, m, 1, hidden, hidden, l.mlp_norm.data(), c.norm_eps, normed, *pool);
      THRIFTATTN_RETURN_IF_ERROR(l.gate_up.apply(normed, m, gate_up, *pool));
      silu_multiply(gate_up, m, c.intermediate, activated, *pool);
      THRIFTATTN_RETURN_IF_ERROR(l.down.apply(activated, m, projected, *pool));
      add(rows_of_x, projected, m, hidden, *pool);
    }
    if (advance && !advance(static_cast<double>(layer + 1) / c.layers)) return Status(Code::cancelled, "cancelled");
  }
  return write_logits(x, n, rows, sink);
}

Status Session::State::write_logits(const float* x, int64_t n, LogitRows rows, const LogitSink& sink) {
  if (rows == LogitRows::none || !sink) return {};
  const ModelConfig& c = model->config();
  const Weights& w = model->weights();
  const int64_t chunk = std::clamp<int64_t>(kLogitFloats / c.vocab, 1, kChunkRows);
  for (int64_t i = rows == LogitRows::last ? n - 1 : 0; i < n; i += chunk) {
    const int64_t m = std::min(chunk, n - i);
    float *normed = buffers.normed.at_least(m * c.hidden), *logits = buffers.logits.at_least(m * c.vocab);
    rms_norm(x + i * c.hidden, m, 1, c.hidden, c.hidden, w.norm.data(), c.norm_eps, normed, *pool);
    THRIFTATTN_RETURN_IF_ERROR(w.logits.apply(normed, m, logits, *pool));
    sink(i, m, logits);
  }
  return {};
}

Status Session::State::check(SeqId seq, std::span<const int32_t> tokens, Phase phase) {
  const int64_t n = std::ssize(tokens), past = cache.length(seq);
  if (past < 0) return not_found(fmt::format("sequence {} does not exist", seq));
  const int64_t limit = phase == Phase::decode ? std::min<int64_t>(max_step, kMaxDecodeRows) : max_step;
  if (n < 1 || n > limit) {
    return invalid_argument(fmt::format("a step of {} tokens is not supported: 1 to {} are", n, limit));
  }
  if (past + n > max_tokens) {
    return invalid_argument(fmt::format("{} tokens after {} are more than the {} of the session", n, past, max_tokens));
  }
  for (const int32_t token : tokens) {
    if (token < 0 || token >= model->config().vocab) {
      return invalid_argument(
          fmt::format("token {} does not exist: ids from 0 to {} do", token, model->config().vocab - 1));
    }
  }
  return {};
}

Result<Session> Session::create(const Model& model, const Method& method, const SessionOptions& options,
                                ThreadPool& pool) {
  const ModelConfig& c = model.config();
  const int64_t max_tokens = options.max_tokens ? options.max_tokens : c.max_positions;
  if (max_tokens < 1 || max_tokens > c.max_positions) {
    return invalid_argument(
        fmt::format("max_tokens {} is not supported: the model has {} positions", max_tokens, c.max_positions));
  }
  const int64_t max_step = options.max_step ? options.max_step : max_tokens;
  if (max_step < 1 || max_step > max_tokens) {
    return invalid_argument(fmt::format("max_step {} is not supported: 1 to max_tokens {} are", max_step, max_tokens));
  }
  const Method prefill_method = options.prefill_method.value_or(method);
  CacheConfig cache_config = CacheConfig::for_method(method, c.layers, c.h_kv, c.d, c.d_v);
  const CacheConfig for_prefill = CacheConfig::for_method(prefill_method, c.layers, c.h_kv, c.d, c.d_v);
  cache_config.mean |= for_prefill.mean;
  cache_config.min_max |= for_prefill.min_max;
  cache_config.variance |= for_prefill.variance;
  cache_config.max_bytes = options.max_cache_bytes;
  const Machine machine = Machine::here(pool.size());
  const auto plan_for = [&](Phase phase, const Method& m) {
    return thriftattn::plan(problem_for(c, phase, m, cache_config, max_tokens, max_step, options.collect_stats),
                            machine);
  };
  Result<Plan> prefill = plan_for(Phase::prefill, prefill_method), decode = plan_for(Phase::decode, method);
  if (!prefill.ok() && !decode.ok()) return prefill.status();
  THRIFTATTN_ASSIGN_OR_RETURN(cache, KvCache::create(cache_config));
  return Session(std::unique_ptr<State>(new State{
      .model = &model,
      .pool = &pool,
      .method = method,
      .max_tokens = max_tokens,
      .max_step = max_step,
      .cache = std::move(cache),
      .prefill = {std::move(prefill), {}},
      .decode = {std::move(decode), {}},
      .frequencies = rope_frequencies(c.rope, c.d),
  }));
}

Session::Session(std::unique_ptr<State> state) : state_(std::move(state)) {}
Session::Session(Session&&) noexcept = default;
Session& Session::operator=(Session&&) noexcept = default;
Session::~Session() = default;

Status Session::forward(SeqId seq, std::span<const int32_t> tokens, Phase phase, LogitRows rows, const LogitSink& sink,
                        const Advance& advance) {
  State::PhasePlan& at = state_->of(phase);
  if (!at.plan.ok()) return at.plan.status();
  THRIFTATTN_RETURN_IF_ERROR(state_->check(seq, tokens, phase));
  try {
    if (!at.workspace) {
      THRIFTATTN_ASSIGN_OR_RETURN(workspace, Workspace::create(*at.plan));
      at.workspace = std::move(workspace);
    }
    return state_->forward(seq, tokens, phase, rows, sink, advance);
  } catch (const std::bad_alloc&) {
    return Status(Code::out_of_memory, fmt::format("no memory left for a step of {} tokens", tokens.size()));
  }
}

Result<SeqId> Session::copy_from(const Session& other, SeqId seq) {
  const KvCache& from = other.cache();
  const ModelConfig& c = model().config();
  const int64_t n = from.length(seq);
  if (other.state_->model != state_->model) return invalid_argument("the other session runs another model");
  if (n < 0) return not_found(fmt::format("sequence {} does not exist in the other session", seq));
  if (from.config().storage != Storage::high_only) {
    return unsupported(
        fmt::format("copying from storage {} is not supported: high_only is", to_string(from.config().storage)));
  }
  if (n > state_->max_tokens) {
    return invalid_argument(fmt::format("{} tokens are more than the {} of the session", n, state_->max_tokens));
  }
  const SeqId copy = new_sequence();
  const auto fill = [&]() -> Status {
    // In 16 bit, as both caches store them: exact.
    const int64_t k_width = int64_t{c.h_kv} * c.d, v_width = int64_t{c.h_kv} * c.d_v;
    std::vector<uint16_t> k(n * k_width), v(n * v_width);
    const DType dtype = from.config().high_dtype;
    const MutableView k_out{k.data(), dtype, n, c.h_kv, c.d, k_width, c.d},
        v_out{v.data(), dtype, n, c.h_kv, c.d_v, v_width, c.d_v};
    const View k_in{k.data(), dtype, n, c.h_kv, c.d, k_width, c.d},
        v_in{v.data(), dtype, n, c.h_kv, c.d_v, v_width, c.d_v};
    for (int layer = 0; layer < c.layers; ++layer) {
      THRIFTATTN_RETURN_IF_ERROR(from.read(seq, layer, 0, k_out, v_out));
      THRIFTATTN_RETURN_IF_ERROR(state_->cache.append(copy, layer, k_in, v_in, *state_->pool));
      THRIFTATTN_RETURN_IF_ERROR(state_->cache.settle(copy, layer));
    }
    return {};
  };
  Status status;
  try {
    status = fill();
  } catch (const std::bad_alloc&) {
    status = Status(Code::out_of_memory, fmt::format("no memory left to copy {} tokens", n));
  }
  if (status.ok()) return copy;
  (void)state_->cache.free(copy);  // the first error is the one to tell
  return status;
}

SeqId Session::new_sequence() { return state_->cache.new_sequence(); }
Result<SeqId> Session::fork(SeqId seq) { return state_->cache.fork(seq); }
Status Session::free(SeqId seq) { return state_->cache.free(seq); }
int64_t Session::length(SeqId seq) const { return state_->cache.length(seq); }
const Model& Session::model() const { return *state_->model; }
const Method& Session::method() const { return state_->method; }
const KvCache& Session::cache() const { return state_->cache; }
int64_t Session::vocab() const { return state_->model->config().vocab; }
const Result<Plan>& Session::plan(Phase phase) const { return state_->of(phase).plan; }
const Stats& Session::stats() const { return state_->stats; }

}  // namespace thriftattn::model
