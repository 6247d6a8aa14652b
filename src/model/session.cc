#include "model/session.h"

#include <fmt/format.h>

#include <algorithm>
#include <new>
#include <utility>

#include "model/identity.h"
#include "model/json_file.h"
#include "model/layers.h"
#include "model/plans.h"
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
  RopeAngles angles, local_angles;
  Buffer x, qkv, attended;                       // of all rows of a step
  Buffer normed, projected, gate_up, activated;  // of one chunk of rows
  Buffer logits;
};

// The scratch memory of a phase's plans, each from the first use on.
using Workspaces = std::vector<std::optional<Workspace>>;

}  // namespace

struct Session::State {
  const Model* model;
  ThreadPool* pool;
  SessionPlan plan;
  Attention replaced;  // SessionOptions::attention
  KvCache cache;
  Workspaces prefill, decode;
  std::vector<float> frequencies, local_frequencies;
  Stats stats = {};
  std::vector<std::vector<int32_t>> history = {};  // the tokens of every sequence

  Activations buffers = {};

  Result<Json> identity() const;
  Workspaces& of(Phase phase) { return phase == Phase::decode ? decode : prefill; }
  Status check_whole(SeqId seq) const;
  Status check(SeqId seq, std::span<const int32_t> tokens, Phase phase);
  Result<SeqId> adopt(SeqId seq, std::span<const int32_t> tokens);
  Status forward(SeqId seq, std::span<const int32_t> tokens, Phase phase, LogitRows rows, const LogitSink& sink,
                 const Advance& advance);
  Status attend(Phase phase, const LayerStep& step);
  Status mlp(const LayerWeights& l, const float* x, int64_t rows, float* y);
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
  LayerStep step;
  step.seq = seq;
  step.past = past;
  step.q = {q, DType::f32, n, c.h_q, c.d, qkv_width, c.d};
  step.k = {k, DType::f32, n, c.h_kv, c.d, qkv_width, c.d};
  step.v = {v, DType::f32, n, c.h_kv, c.d_v, qkv_width, c.d_v};
  step.out = mutable_view(attended, n, c.h_q, c.d_v);

  embed(w.embedding, tokens, c.embedding_scale, x, *pool);
  rope_angles(frequencies, c.rope.attention_factor, past, n, &buffers.angles, *pool);
  if (c.local_rope) {
    rope_angles(local_frequencies, c.local_rope->attention_factor, past, n, &buffers.local_angles, *pool);
  }
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
    const RopeAngles& angles = c.local_rope && c.windows[layer] > 0 ? buffers.local_angles : buffers.angles;
    rope(angles, q, n, c.h_q, c.d, qkv_width, *pool);
    rope(angles, k, n, c.h_kv, c.d, qkv_width, *pool);
    if (c.temperature_beta != 0) {
      grow_by_position(c.temperature_beta, c.rope.original_max_positions, past, q, n, q_width, qkv_width, *pool);
    }

    step.layer = layer;
    THRIFTATTN_RETURN_IF_ERROR(cache.append(seq, layer, step.k, step.v, *pool));
    THRIFTATTN_RETURN_IF_ERROR(attend(phase, step));
    THRIFTATTN_RETURN_IF_ERROR(cache.settle(seq, layer));

    for (int64_t i = 0; i < n; i += chunk) {
      const int64_t m = std::min(chunk, n - i);
      float* rows_of_x = x + i * hidden;
      const auto norm = [&](const float* from, const std::vector<float>& weight, float* to) {
        rms_norm(from, m, 1, hidden, hidden, weight.data(), c.norm_eps, to, *pool);
      };
      THRIFTATTN_RETURN_IF_ERROR(l.o.apply(attended + i * out_width, m, projected, *pool));
      if (c.output_norms) norm(projected, l.attention_output_norm, projected);
      add(rows_of_x, projected, m, hidden, *pool);
      norm(rows_of_x, l.mlp_norm, normed);
      THRIFTATTN_RETURN_IF_ERROR(mlp(l, normed, m, projected));
      if (c.output_norms) norm(projected, l.mlp_output_norm, projected);
      add(rows_of_x, projected, m, hidden, *pool);
    }
    if (advance && !advance(static_cast<double>(layer + 1) / c.layers)) return Status(Code::cancelled, "cancelled");
  }
  return write_logits(x, n, rows, sink);
}

// Every part of the layer's KV heads under its own plan.
Status Session::State::attend(Phase phase, const LayerStep& step) {
  if (replaced) return replaced(step);
  const std::vector<float>& sinks = model->weights().layers[step.layer].sinks;
  AttendArgs args;
  args.cache = &cache;
  args.layer = step.layer;
  args.seqs = {&step.seq, 1};
  args.s_q = {&step.q.tokens, 1};
  args.q = step.q;
  args.out = step.out;
  args.sinks = sinks.empty() ? nullptr : sinks.data();
  args.stats = &stats;
  const PhasePlans& plans = plan.of(phase);
  for (const Part& part : plans.layers[step.layer]) {
    const Plan& at = *plans.plans[part.plan];
    args.kv_heads = part.kv_heads;
    const int64_t pairs = stats.pairs, promoted = stats.promoted;
    THRIFTATTN_RETURN_IF_ERROR(run(at, *of(phase)[part.plan], *pool, args));
    if (at.problem.method.budget.kind == Budget::Kind::all) {
      stats.promoted = promoted + stats.pairs - pairs;
    }
  }
  return {};
}

Status Session::State::mlp(const LayerWeights& l, const float* x, int64_t rows, float* y) {
  const ModelConfig& c = model->config();
  if (c.experts > 0) return apply(l.experts, c, x, rows, y, *pool);
  float* gate_up = buffers.gate_up.at_least(rows * 2 * c.intermediate);
  float* activated = buffers.activated.at_least(rows * c.intermediate);
  THRIFTATTN_RETURN_IF_ERROR(l.gate_up.apply(x, rows, gate_up, *pool));
  gate_multiply(c.activation, gate_up, rows, c.intermediate, activated, *pool);
  return l.down.apply(activated, rows, y, *pool);
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
    if (c.logit_softcap != 0) soft_cap(c.logit_softcap, logits, m, c.vocab, *pool);
    sink(i, m, logits);
  }
  return {};
}

// Ok where every layer holds the sequence's tokens, as it does unless a step of it has failed.
Status Session::State::check_whole(SeqId seq) const {
  if (cache.length(seq) < 0) return not_found(fmt::format("sequence {} does not exist", seq));
  for (int layer = 0; layer < model->config().layers; ++layer) {
    if (cache.length(seq, layer) == std::ssize(history[seq])) continue;
    return invalid_argument(fmt::format("sequence {} can only be freed: a step of it did not end well", seq));
  }
  return {};
}

// Gives a new sequence of the cache its tokens; frees it where there is no memory for them.
Result<SeqId> Session::State::adopt(SeqId seq, std::span<const int32_t> tokens) {
  try {
    if (seq < 0) throw std::bad_alloc();
    history.resize(std::max(history.size(), static_cast<size_t>(seq) + 1));
    history[seq].assign(tokens.begin(), tokens.end());
    return seq;
  } catch (const std::bad_alloc&) {
    (void)cache.free(seq);
    return Status(Code::out_of_memory, "no memory left for another sequence");
  }
}

Status Session::State::check(SeqId seq, std::span<const int32_t> tokens, Phase phase) {
  THRIFTATTN_RETURN_IF_ERROR(check_whole(seq));
  const int64_t n = std::ssize(tokens), past = cache.length(seq);
  const int64_t limit = plan.most(phase);
  if (n < 1 || n > limit) {
    return invalid_argument(fmt::format("a step of {} tokens is not supported: 1 to {} are", n, limit));
  }
  if (past + n > plan.max_tokens) {
    return invalid_argument(
        fmt::format("{} tokens after {} are more than the {} of the session", n, past, plan.max_tokens));
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
  return create(model, Schedule::uniform(method, c.layers, c.h_kv), options, pool);
}

Result<Session> Session::create(const Model& model, const Schedule& schedule, const SessionOptions& options,
                                ThreadPool& pool) {
  const ModelConfig& c = model.config();
  THRIFTATTN_ASSIGN_OR_RETURN(plan, plan_session(c, schedule, options, model.compute(), Machine::here(pool.size())));
  THRIFTATTN_ASSIGN_OR_RETURN(cache, KvCache::create(plan.cache));
  Workspaces prefill(plan.prefill.plans.size()), decode(plan.decode.plans.size());
  return Session(std::unique_ptr<State>(new State{
      .model = &model,
      .pool = &pool,
      .plan = std::move(plan),
      .replaced = options.attention,
      .cache = std::move(cache),
      .prefill = std::move(prefill),
      .decode = std::move(decode),
      .frequencies = rope_frequencies(c.rope, c.d),
      .local_frequencies = rope_frequencies(c.local_rope.value_or(c.rope), c.d),
  }));
}

Session::Session(std::unique_ptr<State> state) : state_(std::move(state)) {}
Session::Session(Session&&) noexcept = default;
Session& Session::operator=(Session&&) noexcept = default;
Session::~Session() = default;

Status Session::forward(SeqId seq, std::span<const int32_t> tokens, Phase phase, LogitRows rows, const LogitSink& sink,
                        const Advance& advance) {
  const PhasePlans& at = state_->plan.of(phase);
  if (!at.first_or_refused().ok() && !state_->replaced) return at.first_or_refused().status();
  THRIFTATTN_RETURN_IF_ERROR(state_->check(seq, tokens, phase));
  try {
    for (size_t i = 0; i < at.plans.size(); ++i) {
      if (state_->of(phase)[i] || !at.plans[i].ok()) continue;
      THRIFTATTN_ASSIGN_OR_RETURN(workspace, Workspace::create(*at.plans[i]));
      state_->of(phase)[i] = std::move(workspace);
    }
    std::vector<int32_t>& all = state_->history[seq];
    const size_t length = all.size() + tokens.size();  // reserved now: what the cache has taken must be kept
    if (all.capacity() < length) all.reserve(std::max(length, 2 * all.capacity()));
    THRIFTATTN_RETURN_IF_ERROR(state_->forward(seq, tokens, phase, rows, sink, advance));
    all.insert(all.end(), tokens.begin(), tokens.end());
    return {};
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
  THRIFTATTN_RETURN_IF_ERROR(other.state_->check_whole(seq));
  if (from.config().storage != Storage::high_only || !from.config().storage_by_head.empty()) {
    return unsupported(
        fmt::format("copying from storage {} is not supported: high_only is", to_string(from.config().storage)));
  }
  if (n > state_->plan.max_tokens) {
    return invalid_argument(fmt::format("{} tokens are more than the {} of the session", n, state_->plan.max_tokens));
  }
  THRIFTATTN_ASSIGN_OR_RETURN(copy, state_->adopt(state_->cache.new_sequence(), other.tokens(seq)));
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

SeqId Session::new_sequence() {
  const auto seq = state_->adopt(state_->cache.new_sequence(), {});
  return seq.ok() ? *seq : -1;
}

Result<SeqId> Session::fork(SeqId seq) {
  THRIFTATTN_RETURN_IF_ERROR(state_->check_whole(seq));
  THRIFTATTN_ASSIGN_OR_RETURN(copy, state_->cache.fork(seq));
  return state_->adopt(copy, tokens(seq));
}

Status Session::truncate(SeqId seq, int64_t length) {
  THRIFTATTN_RETURN_IF_ERROR(state_->check_whole(seq));
  THRIFTATTN_RETURN_IF_ERROR(state_->cache.truncate(seq, length));
  state_->history[seq].resize(length);
  return {};
}

std::span<const int32_t> Session::tokens(SeqId seq) const {
  if (length(seq) < 0) return {};
  return state_->history[seq];
}

// The metadata of a saved sequence is a JSON object of these members.
Result<Json> Session::State::identity() const {
  THRIFTATTN_ASSIGN_OR_RETURN(id, model::identity(*model));
  return Json{{"model", id},
              {"compute", to_string(model->compute())},
              {"method", model::to_string(plan.schedule)},
              {"prefill", model::to_string(plan.prefill_schedule)}};
}

Status Session::save(SeqId seq, const std::string& path) const {
  THRIFTATTN_RETURN_IF_ERROR(state_->check_whole(seq));
  try {
    THRIFTATTN_ASSIGN_OR_RETURN(metadata, state_->identity());
    metadata["tokens"] = state_->history[seq];
    return state_->cache.save(seq, path, metadata.dump());
  } catch (const std::bad_alloc&) {
    return Status(Code::out_of_memory, fmt::format("{}: no memory left to save sequence {}", path, seq));
  }
}

Result<SeqId> Session::load(const std::string& path) {
  try {
    THRIFTATTN_ASSIGN_OR_RETURN(saved, inspect_saved(path));
    THRIFTATTN_ASSIGN_OR_RETURN(metadata, parse_object(saved.metadata, path + ": metadata"));
    THRIFTATTN_ASSIGN_OR_RETURN(ours, state_->identity());
    if (member(metadata, "model") != ours["model"]) return invalid_argument(path + ": saved by another model");
    for (const char* key : {"compute", "method", "prefill"}) {
      if (member(metadata, key) == ours[key]) continue;
      return invalid_argument(fmt::format("{}: saved with {} {}, this session runs {}", path, key,
                                          shown(member(metadata, key)), shown(ours[key])));
    }
    std::vector<int32_t> tokens;
    const Json& list = member(metadata, "tokens");
    for (const Json& token : list) {
      const int64_t id = token.is_number_integer() ? token.get<int64_t>() : -1;
      if (id < 0 || id >= vocab()) return data_loss(fmt::format("{}: {} is no token", path, shown(token)));
      tokens.push_back(static_cast<int32_t>(id));
    }
    if (!list.is_array() || std::ssize(tokens) != saved.tokens) {
      return data_loss(fmt::format("{}: its metadata names {} tokens of {}", path, tokens.size(), saved.tokens));
    }
    if (saved.tokens > state_->plan.max_tokens) {
      return invalid_argument(fmt::format("{}: its {} tokens are more than the {} of the session", path, saved.tokens,
                                          state_->plan.max_tokens));
    }
    std::string loaded_metadata;
    THRIFTATTN_ASSIGN_OR_RETURN(seq, state_->cache.load(path, &loaded_metadata));
    if (loaded_metadata != saved.metadata) {
      (void)state_->cache.free(seq);
      return data_loss(path + ": was replaced while it was read");
    }
    return state_->adopt(seq, tokens);
  } catch (const std::bad_alloc&) {
    return Status(Code::out_of_memory, fmt::format("{}: no memory left to load it", path));
  }
}

Status Session::free(SeqId seq) {
  THRIFTATTN_RETURN_IF_ERROR(state_->cache.free(seq));
  state_->history[seq] = {};
  return {};
}

int64_t Session::length(SeqId seq) const { return state_->cache.length(seq); }
const Model& Session::model() const { return *state_->model; }
const Schedule& Session::schedule() const { return state_->plan.schedule; }
const KvCache& Session::cache() const { return state_->cache; }
int64_t Session::vocab() const { return state_->model->config().vocab; }
const Result<Plan>& Session::plan(Phase phase) const { return state_->plan.of(phase).first_or_refused(); }
const Stats& Session::stats() const { return state_->stats; }

}  // namespace thriftattn::model
