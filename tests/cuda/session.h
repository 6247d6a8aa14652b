// The same as attention/session.h on a GPU: a cache there, tokens of some sequences, and calls over the step that they
// have just made.
#pragma once

#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "attention/session.h"
#include "cuda/gpu.h"
#include "format/codecs.h"
#include "format/rows.h"
#include "thriftattn/cuda.h"

namespace thriftattn::testing {

// Floats on the device in one of the caller's types; fresh ones are NaN.
class Floats {
 public:
  Floats(int64_t count, DType dtype) : count_(count), dtype_(dtype) {
    const size_t bytes = std::max<size_t>(16, static_cast<size_t>(count * size_of(dtype)));
    EXPECT_CUDA(cudaMalloc(&data_, bytes));
    EXPECT_CUDA(cudaMemset(data_, 0xff, bytes));
    EXPECT_CUDA(cudaDeviceSynchronize());
  }
  Floats(const std::vector<float>& from, DType dtype) : Floats(std::ssize(from), dtype) { set(from); }
  ~Floats() { cudaFree(data_); }
  Floats(const Floats&) = delete;
  Floats& operator=(const Floats&) = delete;

  void set(const std::vector<float>& from) {
    std::vector<uint8_t> raw(from.size() * static_cast<size_t>(size_of(dtype_)));
    store_row(dtype_, from.data(), std::ssize(from), raw.data());
    EXPECT_CUDA(cudaMemcpy(data_, raw.data(), raw.size(), cudaMemcpyHostToDevice));
    EXPECT_CUDA(cudaDeviceSynchronize());  // other streams do not wait for the copy's last part
  }
  std::vector<float> get() const {
    std::vector<uint8_t> raw(static_cast<size_t>(count_ * size_of(dtype_)));
    EXPECT_CUDA(cudaMemcpy(raw.data(), data_, raw.size(), cudaMemcpyDeviceToHost));
    std::vector<float> to(static_cast<size_t>(count_));
    load_row(dtype_, raw.data(), count_, to.data());
    return to;
  }
  float* f32() const { return static_cast<float*>(data_); }
  View view(int64_t tokens, int64_t heads, int64_t channels) const {
    return {data_, dtype_, tokens, heads, channels, heads * channels, channels};
  }
  MutableView mutable_view(int64_t tokens, int64_t heads, int64_t channels) const {
    return {data_, dtype_, tokens, heads, channels, heads * channels, channels};
  }

 private:
  int64_t count_ = 0;
  DType dtype_ = DType::f32;
  void* data_ = nullptr;
};

// A stream of its own, so that nothing rests on the default one.
class OwnStream {
 public:
  OwnStream() { EXPECT_CUDA(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking)); }
  ~OwnStream() {
    if (stream_) cudaStreamDestroy(stream_);
  }
  OwnStream(OwnStream&& other) noexcept : stream_(std::exchange(other.stream_, nullptr)) {}
  OwnStream& operator=(OwnStream&&) = delete;
  operator cudaStream_t() const { return stream_; }
  void wait() const { EXPECT_CUDA(cudaStreamSynchronize(stream_)); }

 private:
  cudaStream_t stream_ = nullptr;
};

// A cache of one layer with some sequences, for one method.
class GpuSession {
 public:
  GpuSession(const Method& m, std::vector<const Tokens*> tokens, int64_t max_tokens = 0)
      : method_(m), tokens_(std::move(tokens)), shape_(tokens_[0]->shape) {
    for (const Tokens* t : tokens_) size_.max_tokens = std::max({size_.max_tokens, t->s, max_tokens, int64_t{1}});
    size_.max_sequences = static_cast<int>(tokens_.size());
    size_.max_append = size_.max_tokens;
    auto made = cuda::Cache::create(CacheConfig::for_method(m, 1, shape_.h_kv, shape_.d, shape_.d_v), size_, 0);
    EXPECT_TRUE(made.ok()) << made.status().message();
    cache_.emplace(std::move(*made));
    for (size_t i = 0; i < tokens_.size(); ++i) {
      auto seq = cache_->new_sequence(stream_);
      EXPECT_TRUE(seq.ok()) << seq.status().message();
      EXPECT_OK(cache_->reserve(*seq, size_.max_tokens, stream_));
      seqs_.push_back(*seq);
    }
    lengths_.assign(tokens_.size(), 0);
    for (int h = 0; h < shape_.h_q; ++h) sinks_.push_back(3.0f - 1.5f * static_cast<float>(h));
  }
  GpuSession(const Method& m, const Tokens& tokens, int64_t max_tokens = 0)
      : GpuSession(m, std::vector<const Tokens*>{&tokens}, max_tokens) {}

  cuda::Cache& cache() { return *cache_; }
  SeqId seq(size_t i = 0) const { return seqs_[i]; }
  const OwnStream& stream() const { return stream_; }
  int64_t length(size_t i = 0) const { return lengths_[i]; }

  // Begins a step that brings every sequence so many tokens.
  void append(const std::vector<int64_t>& counts) {
    s_q_ = counts;
    std::vector<float> k, v;
    for (size_t i = 0; i < counts.size(); ++i) {
      gather(tokens_[i]->k, lengths_[i], counts[i], shape_.h_kv * shape_.d, &k);
      gather(tokens_[i]->v, lengths_[i], counts[i], shape_.h_kv * shape_.d_v, &v);
      lengths_[i] += counts[i];
    }
    const Floats k_there(k, DType::f32), v_there(v, DType::f32);
    EXPECT_OK(cache_->set_batch(seqs_, counts, stream_));
    EXPECT_OK(cache_->begin_step(stream_));
    EXPECT_OK(cache_->append(0, k_there.view(rows(), shape_.h_kv, shape_.d),
                             v_there.view(rows(), shape_.h_kv, shape_.d_v), stream_));
    stream_.wait();
  }
  void append(int64_t count) { append(std::vector<int64_t>{count}); }
  // Makes sequence i a fork of the first one, of which it has all tokens.
  void fork(size_t i) {
    EXPECT_OK(cache_->free(seqs_[i], stream_));
    auto seq = cache_->fork(seqs_[0], stream_);
    EXPECT_TRUE(seq.ok()) << seq.status().message();
    EXPECT_OK(cache_->reserve(*seq, size_.max_tokens, stream_));
    seqs_[i] = *seq;
    lengths_[i] = lengths_[0];
  }
  void grow(const cuda::CacheSize& size) {
    size_ = size;
    EXPECT_OK(cache_->grow(size, stream_));
    for (const SeqId seq : seqs_) EXPECT_OK(cache_->reserve(seq, size.max_tokens, stream_));
  }
  // Frees the sequences in this order, and begins with an empty one for the first tokens, alone.
  void start_over(const std::vector<size_t>& order) {
    for (const size_t i : order) EXPECT_OK(cache_->free(seqs_[i], stream_));
    auto seq = cache_->new_sequence(stream_);
    EXPECT_TRUE(seq.ok()) << seq.status().message();
    EXPECT_OK(cache_->reserve(*seq, size_.max_tokens, stream_));
    seqs_ = {*seq};
    lengths_ = {0};
    tokens_.resize(1);
  }
  void end_step() { EXPECT_OK(cache_->end_step(stream_)); }

  Problem problem(const Call& call) const {
    Problem p;
    p.phase = call.phase;
    p.b = size_.max_sequences;
    p.max_s_q = std::max<int64_t>(1, s_q_.empty() ? 1 : *std::max_element(s_q_.begin(), s_q_.end()));
    p.max_s_kv = size_.max_tokens;
    p.h_q = shape_.h_q;
    p.h_kv = shape_.h_kv;
    p.d = shape_.d;
    p.d_v = shape_.d_v;
    p.causal = call.causal;
    p.window = call.window;
    p.softcap = call.softcap;
    p.sm_scale = call.sm_scale;
    p.method = method_;
    p.cache = cache_->config();
    p.stats = call.stats;
    return p;
  }

  // The tokens of the step under way attend, in the order of the sequences.
  Ran attend(const Call& call, DType dtype = DType::f32) {
    Ran ran;
    attend_into(&ran, call, dtype);
    return ran;
  }

  // One decode step of every sequence as a CUDA graph, which is replayed for token after token.
  class Replay {
   public:
    Replay(GpuSession* session, const Call& call)
        : s_(session),
          b_(std::ssize(session->seqs_)),
          k_(b_ * s_->shape_.h_kv * s_->shape_.d, DType::f32),
          v_(b_ * s_->shape_.h_kv * s_->shape_.d_v, DType::f32),
          q_(b_ * s_->shape_.h_q * s_->shape_.d, DType::f32),
          out_(b_ * s_->shape_.h_q * s_->shape_.d_v, DType::f32),
          lse_(b_ * s_->shape_.h_q, DType::f32) {
      capture(call);
    }
    ~Replay() { cudaGraphExecDestroy(graph_); }
    Replay(const Replay&) = delete;
    Replay& operator=(const Replay&) = delete;

    // The step of the next token of every sequence.
    Ran run() {
      std::vector<float> k, v, q;
      for (int64_t i = 0; i < b_; ++i) {
        const Tokens& x = *s_->tokens_[i];
        gather(x.k, s_->lengths_[i], 1, x.shape.h_kv * x.shape.d, &k);
        gather(x.v, s_->lengths_[i], 1, x.shape.h_kv * x.shape.d_v, &v);
        gather(x.q, s_->lengths_[i]++, 1, x.shape.h_q * x.shape.d, &q);
      }
      k_.set(k);
      v_.set(v);
      q_.set(q);
      EXPECT_CUDA(cudaGraphLaunch(graph_, s_->stream_));
      s_->stream_.wait();
      Ran ran;
      ran.out = out_.get();
      ran.lse = lse_.get();
      return ran;
    }

   private:
    void capture(const Call& call) {
      ASSERT_OK(s_->cache_->set_batch(s_->seqs_, std::vector<int64_t>(b_, 1), s_->stream_));
      s_->s_q_.assign(b_, 1);
      auto planned = plan(s_->problem(call), *gpu_machine());
      ASSERT_TRUE(planned.ok()) << planned.status().message();
      auto made = cuda::Workspace::create(*planned, 0);
      ASSERT_TRUE(made.ok()) << made.status().message();
      workspace_.emplace(std::move(*made));
      s_->stream_.wait();
      const Shape& x = s_->shape_;
      cuda::AttendArgs args;
      args.cache = &*s_->cache_;
      args.q = q_.view(b_, x.h_q, x.d);
      args.out = out_.mutable_view(b_, x.h_q, x.d_v);
      args.lse = lse_.f32();
      ASSERT_CUDA(cudaStreamBeginCapture(s_->stream_, cudaStreamCaptureModeThreadLocal));
      EXPECT_OK(s_->cache_->begin_step(s_->stream_));
      EXPECT_OK(s_->cache_->append(0, k_.view(b_, x.h_kv, x.d), v_.view(b_, x.h_kv, x.d_v), s_->stream_));
      EXPECT_OK(cuda::run(*planned, *workspace_, args, s_->stream_));
      EXPECT_OK(s_->cache_->end_step(s_->stream_));
      cudaGraph_t graph = nullptr;
      ASSERT_CUDA(cudaStreamEndCapture(s_->stream_, &graph));
      ASSERT_CUDA(cudaGraphInstantiate(&graph_, graph, 0));
      cudaGraphDestroy(graph);
    }

    GpuSession* s_;
    int64_t b_;
    Floats k_, v_, q_, out_, lse_;
    std::optional<cuda::Workspace> workspace_;
    cudaGraphExec_t graph_ = nullptr;
  };
  int64_t rows() const {
    int64_t sum = 0;
    for (const int64_t n : s_q_) sum += n;
    return sum;
  }

 private:
  static void gather(const std::vector<float>& from, int64_t first, int64_t count, int width, std::vector<float>* to) {
    to->insert(to->end(), from.begin() + first * width, from.begin() + (first + count) * width);
  }

  void attend_into(Ran* ran, const Call& call, DType dtype) {
    auto planned = plan(problem(call), *gpu_machine());
    ASSERT_TRUE(planned.ok()) << planned.status().message();
    if (call.splits > 0) planned->splits = call.splits;
    ran->plan = *planned;
    auto workspace = cuda::Workspace::create(ran->plan, 0);
    ASSERT_TRUE(workspace.ok()) << workspace.status().message();
    EXPECT_GE(workspace->bytes(), 0);
    std::vector<float> queries;  // [rows, h_q, d]
    for (size_t i = 0; i < s_q_.size(); ++i)
      gather(tokens_[i]->q, lengths_[i] - s_q_[i], s_q_[i], shape_.h_q * shape_.d, &queries);
    const Floats q(queries, dtype), out(rows() * shape_.h_q * shape_.d_v, dtype), lse(rows() * shape_.h_q, DType::f32),
        sinks(sinks_, DType::f32);
    if (call.given) ASSERT_OK(cuda::give_selection(ran->plan, *workspace, *cache_, call.given, stream_));
    cuda::AttendArgs args;
    args.cache = &*cache_;
    args.q = q.view(rows(), shape_.h_q, shape_.d);
    args.out = out.mutable_view(rows(), shape_.h_q, shape_.d_v);
    args.lse = lse.f32();
    args.sinks = call.sinks ? sinks.f32() : nullptr;
    ASSERT_OK(cuda::run(ran->plan, *workspace, args, stream_));
    auto stats = cuda::stats(ran->plan, *workspace, *cache_, stream_);
    ASSERT_TRUE(stats.ok()) << stats.status().message();
    ran->stats = std::move(*stats);
    ran->out = out.get();
    ran->lse = lse.get();
  }

  Method method_;
  std::vector<const Tokens*> tokens_;
  Shape shape_;
  cuda::CacheSize size_;
  OwnStream stream_;
  std::optional<cuda::Cache> cache_;
  std::vector<SeqId> seqs_;
  std::vector<int64_t> lengths_, s_q_;
  std::vector<float> sinks_;  // [h_q], as a Session's
};

// Heads and masks of a call.
struct Setting {
  const char* name;
  int h_q, h_kv, d, d_v;
  int64_t window;
  float softcap;
  bool sinks;
};
inline std::ostream& operator<<(std::ostream& out, const Setting& setting) { return out << setting.name; }
inline Call call_of(const Setting& setting, Phase phase) {
  Call c;
  c.phase = phase;
  c.window = setting.window;
  c.softcap = setting.softcap;
  c.sinks = setting.sinks;
  return c;
}

}  // namespace thriftattn::testing
