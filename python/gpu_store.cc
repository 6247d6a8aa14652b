// A cache on a GPU. cuda::Cache takes a step of one batch through all layers and is of a fixed size; a KvCache of
// Python takes calls as they come and grows. In between stands, for every sequence, what the host knows of it:
//
//   append   first layer of a step: end_step of the last one, reserve (grow where nothing is left), begin_step
//            all layers:            set_batch, append
//   attend   set_batch, run; when every layer has attended, or has been settled, end_step
//
// Lengths are known here, so no call waits for the device, but those that say so and those that grow the cache.
#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <type_traits>
#include <vector>

#include "format/page_layout.h"
#include "store.h"

namespace thriftattn::python {
namespace {

// Of a GPU's memory. A prefill and a decode step for layers with a window and without, and one to change over.
constexpr size_t kPlansKept = 5;
// Prompts are read one after another from so many rows on: each fills the GPU, and scratch memory is for one of them.
constexpr int64_t kRowsTogether = 4096;

constexpr cuda::CacheSize kSmall = {.max_sequences = 4, .max_tokens = 1024, .pages = 32, .max_append = 64};

class GpuStore final : public Store {
 public:
  GpuStore(cuda::Cache cache, Machine machine) : cache_(std::move(cache)), machine_(std::move(machine)) {}

  const CacheConfig& config() const override { return cache_.config(); }

  Result<SeqId> new_sequence() override {
    THRIFTATTN_RETURN_IF_ERROR(make_room_for_one_more());
    THRIFTATTN_ASSIGN_OR_RETURN(seq, cache_.new_sequence(stream_));
    return enter(seq, 0);
  }

  Status append(std::span<const SeqId> seqs, int layer, const Sequences& k, const Sequences& v) override {
    THRIFTATTN_RETURN_IF_ERROR(check_shapes(k, v));
    THRIFTATTN_RETURN_IF_ERROR(check_sequences(seqs, layer));
    const int64_t n = k.first.tokens;
    if (n == 0 || seqs.empty()) return {};
    std::vector<SeqId> beginning;  // those for which this layer is the step's first
    for (const SeqId seq : seqs) {
      const Sequence& s = sequences_.at(seq);
      if (s.length[layer] + n == s.begun) continue;
      if (!s.all_are(s.length, s.begun))
        return invalid_argument(
            fmt::format("sequence {}: {} tokens to the {} of layer {}, and the step of other layers ends at {}: all "
                        "layers take the "
                        "same tokens before the next step",
                        seq, n, s.length[layer], layer, s.begun));
      beginning.push_back(seq);
    }
    THRIFTATTN_RETURN_IF_ERROR(end_steps(beginning));
    for (const SeqId seq : beginning) THRIFTATTN_RETURN_IF_ERROR(reserve(seq, sequences_.at(seq).begun + n, n));
    if (!beginning.empty()) {
      THRIFTATTN_RETURN_IF_ERROR(set_batch(beginning, n));
      THRIFTATTN_RETURN_IF_ERROR(cache_.begin_step(stream_));
      for (const SeqId seq : beginning) sequences_.at(seq).begun += n;
    }
    if (k.in_rows() && v.in_rows()) {
      THRIFTATTN_RETURN_IF_ERROR(set_batch(seqs, n));
      THRIFTATTN_RETURN_IF_ERROR(cache_.append(layer, k.rows(), v.rows(), stream_));
    } else {
      for (int64_t i = 0; i < k.b; ++i) {
        THRIFTATTN_RETURN_IF_ERROR(set_batch(seqs.subspan(i, 1), n));
        THRIFTATTN_RETURN_IF_ERROR(cache_.append(layer, k.sequence(i), v.sequence(i), stream_));
      }
    }
    for (const SeqId seq : seqs) sequences_.at(seq).length[layer] += n;
    return {};
  }

  Status settle(std::span<const SeqId> seqs, int layer) override {
    THRIFTATTN_RETURN_IF_ERROR(check_sequences(seqs, layer));
    std::vector<SeqId> done;
    for (const SeqId seq : seqs) {
      Sequence& s = sequences_.at(seq);
      s.settled[layer] = s.length[layer];
      if (s.all_are(s.settled, s.begun)) done.push_back(seq);
    }
    return end_steps(done);
  }

  Status attend(const Call& call) override {
    THRIFTATTN_RETURN_IF_ERROR(check_sequences(call.seqs, call.layer));
    const int64_t b = call.q.b, s_q = call.q.first.tokens;
    const bool together = call.form.phase == Phase::decode || call.given || call.stats || b * s_q <= kRowsTogether;
    if (together && call.q.in_rows()) {
      THRIFTATTN_RETURN_IF_ERROR(run_part(call, 0, b).status());
    } else {
      for (int64_t i = 0; i < b; ++i) THRIFTATTN_RETURN_IF_ERROR(run_part(call, i, 1).status());
    }
    return settle(call.seqs, call.layer);
  }

  Result<Selection> select(const Call& call) override {
    THRIFTATTN_RETURN_IF_ERROR(check_sequences(call.seqs, call.layer));
    THRIFTATTN_ASSIGN_OR_RETURN(prepared, run_part(call, 0, call.q.b));
    THRIFTATTN_ASSIGN_OR_RETURN(stats, cuda::stats(prepared->plan, prepared->workspace, cache_, stream_));
    return std::move(stats.selection);
  }

  Result<SeqId> fork(SeqId seq) override {
    THRIFTATTN_RETURN_IF_ERROR(between_steps(seq));
    THRIFTATTN_RETURN_IF_ERROR(make_room_for_one_more());
    const int64_t tokens = sequences_.at(seq).begun;
    THRIFTATTN_ASSIGN_OR_RETURN(copy, with_more_pages(1, [&] { return cache_.fork(seq, stream_); }));
    return enter(copy, tokens);
  }

  Status truncate(SeqId seq, int64_t length, bool) override {
    THRIFTATTN_RETURN_IF_ERROR(between_steps(seq));
    THRIFTATTN_RETURN_IF_ERROR(with_more_pages(1, [&] { return cache_.truncate(seq, length, stream_); }));
    return enter(seq, length).status();
  }

  Status free(SeqId seq) override {
    THRIFTATTN_RETURN_IF_ERROR(cache_.free(seq, stream_));
    sequences_.erase(seq);
    return {};
  }

  int64_t length(SeqId seq, int layer) const override {
    const auto found = sequences_.find(seq);
    return found == sequences_.end() ? -1 : found->second.length[layer];
  }
  int64_t length(SeqId seq) const override {
    const auto found = sequences_.find(seq);
    return found == sequences_.end() ? -1 : *std::ranges::min_element(found->second.length);
  }

  Status read(SeqId seq, int layer, int64_t first, const MutableView& k, const MutableView& v) override {
    return cache_.download(seq, layer, first, k, v, stream_);
  }

  Status save(SeqId seq, const std::string& path, std::string_view metadata) override {
    THRIFTATTN_RETURN_IF_ERROR(between_steps(seq));
    THRIFTATTN_ASSIGN_OR_RETURN(copy, on_the_cpu());
    THRIFTATTN_ASSIGN_OR_RETURN(there, cache_.download(seq, copy, stream_));
    return copy.save(there, path, metadata);
  }

  Result<SeqId> load(const std::string& path, std::string* metadata) override {
    THRIFTATTN_ASSIGN_OR_RETURN(copy, on_the_cpu());
    THRIFTATTN_ASSIGN_OR_RETURN(there, copy.load(path, metadata));
    const int64_t tokens = copy.length(there);
    THRIFTATTN_RETURN_IF_ERROR(make_room_for_one_more());
    THRIFTATTN_RETURN_IF_ERROR(make_room_for(tokens, 1));
    THRIFTATTN_ASSIGN_OR_RETURN(
        seq, with_more_pages(pages_for(tokens), [&] { return cache_.upload(copy, there, stream_); }));
    return enter(seq, tokens);
  }

  MemoryUse bytes() const override { return cache_.bytes(); }
  int64_t peak_bytes() const override { return peak_bytes_; }
  int64_t reserved_bytes() const override {
    int64_t bytes = cache_.reserved_bytes();
    for (const auto& prepared : prepared_) bytes += prepared.workspace.bytes();
    return bytes;
  }

  Status order_on(cuda::Stream stream) override {
    if (stream == stream_) return {};
    THRIFTATTN_RETURN_IF_ERROR(wait());
    stream_ = stream;
    return {};
  }

  Status wait() override { return cache_.faults(stream_).status(); }

  Status check_appended() override {
    THRIFTATTN_ASSIGN_OR_RETURN(faults, cache_.faults(stream_, true));
    if (faults.not_finite) return invalid_argument("k or v hold NaN, Inf or values beyond 65504, which give NaN");
    if (faults.no_pages) return invalid_argument("a sequence had no page for its tokens");
    return {};
  }

 private:
  struct Sequence {
    std::vector<int64_t> length, settled;  // [layers], tokens that a layer has appended, and those it has attended to
    int64_t begun = 0, ended = 0;          // tokens as the last begin_step and end_step left them

    static bool all_are(const std::vector<int64_t>& lengths, int64_t tokens) {
      return std::ranges::all_of(lengths, [&](int64_t n) { return n == tokens; });
    }
  };

  // A sequence whose layers hold `tokens` each, between two steps.
  Result<SeqId> enter(SeqId seq, int64_t tokens) {
    const std::vector<int64_t> of_layers(config().layers, tokens);
    sequences_[seq] = {of_layers, of_layers, tokens, tokens};
    peak_bytes_ = std::max(peak_bytes_, bytes().total());
    return seq;
  }

  Status check_shapes(const Sequences& k, const Sequences& v) const {
    const View &a = k.first, &b = v.first;
    const CacheConfig& c = config();
    if (a.tokens == b.tokens && a.heads == c.h_kv && b.heads == c.h_kv && a.channels == c.d && b.channels == c.d_v)
      return {};
    return invalid_argument(
        fmt::format("append of k [{}, {}, {}] and v [{}, {}, {}], expected [n, {}, {}] and [n, {}, {}]", a.tokens,
                    a.heads, a.channels, b.tokens, b.heads, b.channels, c.h_kv, c.d, c.h_kv, c.d_v));
  }

  Status check_sequences(std::span<const SeqId> seqs, int layer) const {
    if (layer < 0 || layer >= config().layers)
      return invalid_argument(fmt::format("layer {} does not exist: the cache has {}", layer, config().layers));
    for (const SeqId seq : seqs)
      if (!sequences_.contains(seq)) return not_found(fmt::format("sequence {} does not exist", seq));
    return {};
  }

  // Ends the steps that these sequences are in.
  Status end_steps(const std::vector<SeqId>& seqs) {
    std::vector<SeqId> open;
    for (const SeqId seq : seqs)
      if (const Sequence& s = sequences_.at(seq); s.ended != s.begun) open.push_back(seq);
    if (open.empty()) return {};
    THRIFTATTN_RETURN_IF_ERROR(set_batch(open, batch_tokens_));  // what end_step does not ask for
    THRIFTATTN_RETURN_IF_ERROR(cache_.end_step(stream_));
    for (const SeqId seq : open) {
      Sequence& s = sequences_.at(seq);
      s.ended = s.begun;
      s.settled = s.length;
    }
    return {};
  }

  // Ends the step of a sequence whose layers have all been appended to; of others the library says what is wrong.
  Status between_steps(SeqId seq) {
    THRIFTATTN_RETURN_IF_ERROR(check_sequences({&seq, 1}, 0));
    const Sequence& s = sequences_.at(seq);
    return s.all_are(s.length, s.begun) ? end_steps({seq}) : Status();
  }

  Status set_batch(std::span<const SeqId> seqs, int64_t tokens) {
    if (std::ranges::equal(seqs, batch_) && tokens == batch_tokens_) return {};
    batch_.clear();  // it stays so where the call fails
    THRIFTATTN_RETURN_IF_ERROR(cache_.set_batch(seqs, std::vector<int64_t>(seqs.size(), tokens), stream_));
    batch_.assign(seqs.begin(), seqs.end());
    batch_tokens_ = tokens;
    return {};
  }

  // Attention of sequences [first, first + count) of a call, whose plan comes back.
  Result<Prepared<cuda::Workspace>*> run_part(const Call& call, int64_t first, int64_t count) {
    const int64_t s_q = call.q.first.tokens;
    const auto seqs = call.seqs.subspan(first, count);
    for (const SeqId seq : seqs)
      if (const Sequence& s = sequences_.at(seq); s.length[call.layer] != s.begun)
        return invalid_argument(
            fmt::format("sequence {}: layer {} holds {} tokens, and the step of other layers ends at {}", seq,
                        call.layer, s.length[call.layer], s.begun));
    THRIFTATTN_RETURN_IF_ERROR(make_room_for(0, s_q));
    Problem problem = problem_of(config(), call, count, cache_.size().max_tokens);
    THRIFTATTN_ASSIGN_OR_RETURN(
        prepared, find_or_make(prepared_, kPlansKept, machine_.threads, std::move(problem), machine_,
                               [&](const Plan& plan) { return cuda::Workspace::create(plan, cache_.device()); }));
    if (count * s_q == 0) return prepared;
    THRIFTATTN_RETURN_IF_ERROR(set_batch(seqs, s_q));
    auto& [_, plan, workspace] = *prepared;
    cuda::AttendArgs args;
    args.cache = &cache_;
    args.layer = call.layer;
    args.q = count == call.q.b ? call.q.rows() : call.q.sequence(first);
    args.out = call.out.slice(first * s_q, count * s_q);
    args.lse = call.lse ? call.lse + first * s_q * call.q.first.heads : nullptr;
    args.sinks = call.sinks;
    if (call.given) THRIFTATTN_RETURN_IF_ERROR(cuda::give_selection(plan, workspace, cache_, call.given, stream_));
    Status status = cuda::run(plan, workspace, args, stream_);
    if (status.ok() && call.stats) {
      Result<Stats> stats = cuda::stats(plan, workspace, cache_, stream_);
      if (stats.ok()) *call.stats = std::move(*stats);
      status = stats.status();
    }
    if (call.given) THRIFTATTN_RETURN_IF_ERROR(cuda::give_selection(plan, workspace, cache_, nullptr, stream_));
    if (!status.ok()) return status;
    return prepared;
  }

  // --- Growth. Twice as much of what has run out, so that a cache that grows is copied a few times only; where that is
  // more than there is, what is needed.

  Status grow(const cuda::CacheSize& ample, const cuda::CacheSize& least) {
    Status status = cache_.grow(ample, stream_);
    if (status.code() == Code::out_of_memory) status = cache_.grow(least, stream_);
    if (status.ok()) prepared_.clear();  // plans serve the lengths that a cache may hold
    return status;
  }

  Status make_room_for_one_more() {
    cuda::CacheSize least = cache_.size();
    if (std::ssize(sequences_) < least.max_sequences) return {};
    cuda::CacheSize ample = least;
    least.max_sequences += 1;
    ample.max_sequences *= 2;
    return grow(ample, least);
  }

  Status make_room_for(int64_t tokens, int64_t step_tokens) {
    const cuda::CacheSize now = cache_.size();
    cuda::CacheSize least = now, ample = now;
    least.max_tokens = std::max({now.max_tokens, tokens, step_tokens});
    least.max_append = ample.max_append = std::max(now.max_append, step_tokens);
    ample.max_tokens =
        least.max_tokens == now.max_tokens ? now.max_tokens : power_of_two(2 * now.max_tokens, least.max_tokens);
    if (least.max_tokens == now.max_tokens && least.max_append == now.max_append) return {};
    return grow(ample, least);
  }

  // `take`, again with `pages` more where none are left.
  template <class Take>
  std::invoke_result_t<Take> with_more_pages(int64_t pages, const Take& take) {
    std::invoke_result_t<Take> taken = take();
    if (code_of(taken) != Code::out_of_memory) return taken;
    cuda::CacheSize least = cache_.size(), ample = least;
    least.pages += pages;
    ample.pages += std::max(pages, least.pages / 2);
    if (const Status status = grow(ample, least); !status.ok()) return status;
    return take();
  }
  static Code code_of(const Status& status) { return status.code(); }
  static Code code_of(const Result<SeqId>& result) { return result.status().code(); }

  Status reserve(SeqId seq, int64_t tokens, int64_t step_tokens) {
    THRIFTATTN_RETURN_IF_ERROR(make_room_for(tokens, step_tokens));
    const int64_t more = pages_for(tokens) - pages_for(sequences_.at(seq).begun);
    THRIFTATTN_RETURN_IF_ERROR(with_more_pages(more, [&] { return cache_.reserve(seq, tokens, stream_); }));
    if (more > 0) peak_bytes_ = std::max(peak_bytes_, bytes().total());
    return {};
  }

  Result<KvCache> on_the_cpu() const {
    CacheConfig same = config();
    same.max_bytes = 0;
    return KvCache::create(same);
  }

  cuda::Cache cache_;
  const Machine machine_;
  cuda::Stream stream_ = nullptr;
  std::map<SeqId, Sequence> sequences_;
  std::vector<SeqId> batch_;  // as the device has it, with as many tokens for each
  int64_t batch_tokens_ = 0;
  std::list<Prepared<cuda::Workspace>> prepared_;
  int64_t peak_bytes_ = 0;
};

}  // namespace

Result<std::unique_ptr<Store>> make_gpu_store(const CacheConfig& config, Machine machine, const Room& room) {
  cuda::CacheSize size = kSmall;
  if (room.sequences > 0) size.max_sequences = room.sequences;
  if (room.step > 0) size.max_append = room.step;
  if (room.tokens > 0) size.pages = 0;  // those of all sequences
  size.max_tokens = std::max(room.tokens > 0 ? room.tokens : size.max_tokens, size.max_append);
  THRIFTATTN_ASSIGN_OR_RETURN(cache, cuda::Cache::create(config, size, machine.gpu->index));
  return std::unique_ptr<Store>(std::make_unique<GpuStore>(std::move(cache), std::move(machine)));
}

}  // namespace thriftattn::python
