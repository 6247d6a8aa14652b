// A model, a method and the cache it needs: feeds tokens through the model and hands out logits.
//
//   auto session = Session::create(model, *parse_method("thrift"), {.max_tokens = 16384}, pool);
//   SeqId seq = session->new_sequence();
//   session->forward(seq, prompt, Phase::prefill, LogitRows::last, sink);
//   session->forward(seq, {&token, 1}, Phase::decode, LogitRows::last, sink);
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>

#include "model/model.h"
#include "model/schedule.h"
#include "thriftattn/attention.h"
#include "thriftattn/cache.h"
#include "thriftattn/method.h"
#include "thriftattn/status.h"
#include "thriftattn/threads.h"

namespace thriftattn::model {

// Attention of one layer over a step's tokens and all before them.
struct LayerStep {
  SeqId seq = 0;
  int layer = 0;
  int64_t past = 0;  // tokens of the sequence before the step
  View q, k, v;      // the step's, F32, K after RoPE: [n, h_q, d], [n, h_kv, d], [n, h_kv, d_v]
  MutableView out;   // [n, h_q, d_v], F32
};
using Attention = std::function<Status(const LayerStep&)>;

struct SessionOptions {
  int64_t max_tokens = 0;  // of one sequence; 0 = the model's positions
  int64_t max_step = 0;    // tokens of one forward; 0 = max_tokens
  int64_t max_decode = 0;  // tokens of one forward in Phase::decode; 0 = as many as max_step and a decode step allow
  // For Phase::prefill, over the cache that the session's method needs; none = the session's method.
  std::optional<Method> prefill_method = {};
  int64_t max_cache_bytes = 0;  // 0 = no limit
  bool collect_stats = false;   // fill the costly part of Stats too (Problem::stats)
  // For tests and experiments: computes attention in place of the method's kernels. What an architecture asks of it
  // (window, scale, soft-cap, sinks) is in Model::config() and weights(). The cache is filled all the same.
  Attention attention = nullptr;
};

// The rows of a step whose logits are wanted.
enum class LogitRows : uint8_t { none, last, all };

// Receives logits [rows, vocab] of the step's rows [first_row, first_row + rows), in order, in chunks of whatever size
// is convenient: 16k rows of logits are never in memory at once. The pointer is valid during the call.
using LogitSink = std::function<void(int64_t first_row, int64_t rows, const float* logits)>;

// Told the share of the step that is done, in (0, 1]; false stops the step.
using Advance = std::function<bool(double fraction)>;

class Session {
 public:
  // Keeps references to `model` and `pool`. A method that no backend serves in either phase is refused; one that only
  // one phase can serve (fp4_mass does not prefill) is refused when the other phase is asked for.
  static Result<Session> create(const Model& model, const Method& method, const SessionOptions& options,
                                ThreadPool& pool);
  // The same with a method for each layer and KV head, of which `schedule` has as many as the model.
  static Result<Session> create(const Model& model, const Schedule& schedule, const SessionOptions& options,
                                ThreadPool& pool);
  Session(Session&&) noexcept;
  Session& operator=(Session&&) noexcept;
  ~Session();

  SeqId new_sequence();  // -1 where no memory is left
  Result<SeqId> fork(SeqId seq);
  Status free(SeqId seq);
  int64_t length(SeqId seq) const;  // tokens; -1 for an unknown sequence

  // Appends `tokens` to a sequence: 1 to max_step of them, to max_decode in Phase::decode, each below vocab().
  // Refused, with nothing appended, where they are not. After any later error, Code::cancelled included, the sequence
  // can only be freed: what else it is asked for is refused.
  Status forward(SeqId seq, std::span<const int32_t> tokens, Phase phase, LogitRows rows, const LogitSink& sink,
                 const Advance& advance = nullptr);

  // A new sequence with the keys and values of a sequence of another session of the same model, whose method must store
  // every page in 16 bit (storage high_only). Encoded here as `method` says.
  Result<SeqId> copy_from(const Session& other, SeqId seq);

  // Shortens a sequence to `length` tokens where that is exact (KvCache::truncate): to a multiple of 64 it always is.
  Status truncate(SeqId seq, int64_t length);

  // The tokens of a sequence; empty for an unknown one.
  std::span<const int32_t> tokens(SeqId seq) const;

  // Saves a sequence with its tokens to a file, from which a session of the same model, compute, method and prefill
  // method loads it; the message says which of them differs. See KvCache::save and load.
  Status save(SeqId seq, const std::string& path) const;
  Result<SeqId> load(const std::string& path);

  const Model& model() const;
  const Schedule& schedule() const;
  const KvCache& cache() const;
  int64_t vocab() const;
  // The plan of a phase, or why there is none. Where layers differ in their window or heads in their method, each kind
  // has a plan of its own; this is the first layer's, or the first that is refused.
  const Result<Plan>& plan(Phase phase) const;
  // Sums over all forwards and layers since the session was made. A method that reads every page in 16 bit promotes
  // every pair.
  const Stats& stats() const;

 private:
  struct State;
  explicit Session(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

}  // namespace thriftattn::model
