// A cache on a GPU beside the CPU's: steps of the same tokens to both, and the comparison of every byte they hold.
#pragma once

#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "attention/cache_state.h"
#include "core/device.h"
#include "cuda/session.h"
#include "cuda/state.h"
#include "format/rows.h"
#include "thriftattn/cuda.h"

namespace thriftattn::testing {

inline constexpr Storage kStorages[] = {Storage::high_only, Storage::dual, Storage::residual, Storage::fp4_only};

class CudaCache : public ::testing::Test {
 protected:
  void SetUp() override {
    SKIP_WITHOUT_GPU();
    ASSERT_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  }
  void TearDown() override {
    if (stream) {
      EXPECT_CUDA(cudaStreamDestroy(stream));
    }
  }

  cudaStream_t stream = nullptr;
};

// A tensor [tokens, heads, channels] of the host and its copy on the device, rows `gap` elements apart.
class Tensor {
 public:
  Tensor(int64_t tokens, int heads, int channels, DType dtype = DType::f32, int gap = 0)
      : tokens_(tokens), heads_(heads), channels_(channels), gap_(gap), dtype_(dtype) {
    bytes_.resize(static_cast<size_t>((tokens * stride() + gap) * size_of(dtype)));
  }

  // Keys and values that look like attention's: an outlier channel, a loud token, a page far from zero.
  void fill(std::mt19937& random, float magnitude = 1) {
    std::normal_distribution<float> normal;
    std::vector<float> row(static_cast<size_t>(channels_));
    for (int64_t t = 0; t < tokens_; ++t)
      for (int h = 0; h < heads_; ++h) {
        for (int c = 0; c < channels_; ++c) {
          float x = normal(random);
          if (c == 5) x += 8;
          if (t % 97 == 3) x *= 10;
          if (t / 64 % 3 == 1) x += 2;
          row[static_cast<size_t>(c)] = x * magnitude;
        }
        store_row(dtype_, row.data(), channels_, at(t, h));
      }
  }
  void set(int64_t t, int h, int c, float x) {
    store_row(dtype_, &x, 1, static_cast<char*>(at(t, h)) + c * size_of(dtype_));
  }

  View host(int64_t first, int64_t n) const {
    return {at(first, 0), dtype_, n, heads_, channels_, stride(), channels_};
  }
  // Of the copy that `send` made.
  View device(int64_t first, int64_t n) const {
    View v = host(first, n);
    v.data = memory_.data() + (static_cast<const char*>(v.data) - bytes_.data());
    return v;
  }
  Status send(cudaStream_t stream) {
    THRIFTATTN_ASSIGN_OR_RETURN(memory, cuda::DeviceMemory::take(std::ssize(bytes_), 0, "a tensor"));
    memory_ = std::move(memory);
    THRIFTATTN_RETURN_IF_ERROR(
        cuda::check(cudaMemcpyAsync(memory_.data(), bytes_.data(), bytes_.size(), cudaMemcpyHostToDevice, stream),
                    "cudaMemcpyAsync"));
    return cuda::check(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
  }

 private:
  int64_t stride() const { return int64_t{heads_} * channels_ + gap_; }
  void* at(int64_t t, int h) const {
    return const_cast<char*>(bytes_.data()) + (gap_ + t * stride() + h * channels_) * size_of(dtype_);
  }

  int64_t tokens_;
  int heads_, channels_, gap_;
  DType dtype_;
  std::vector<char> bytes_;
  cuda::DeviceMemory memory_;
};

inline CacheConfig config_of(Storage storage, int d = 64, int d_v = 64, int layers = 1, int h_kv = 2) {
  CacheConfig c;
  c.storage = storage;
  c.layers = layers;
  c.h_kv = h_kv;
  c.d = d;
  c.d_v = d_v;
  c.centring = storage != Storage::high_only;
  return c;
}

// One step of the CPU's cache, all layers.
inline Status step(KvCache& cache, SeqId seq, const View& k, const View& v) {
  for (int l = 0; l < cache.config().layers; ++l) THRIFTATTN_RETURN_IF_ERROR(cache.append(seq, l, k, v, pool()));
  for (int l = 0; l < cache.config().layers; ++l) THRIFTATTN_RETURN_IF_ERROR(cache.settle(seq, l));
  return {};
}

// One step of the batch that is set.
inline Status step(cuda::Cache& cache, const View& k, const View& v, cudaStream_t stream) {
  THRIFTATTN_RETURN_IF_ERROR(cache.begin_step(stream));
  for (int l = 0; l < cache.config().layers; ++l) THRIFTATTN_RETURN_IF_ERROR(cache.append(l, k, v, stream));
  return cache.end_step(stream);
}

inline Status step(cuda::Cache& cache, SeqId seq, const View& k, const View& v, cudaStream_t stream) {
  const int64_t n = k.tokens;
  THRIFTATTN_RETURN_IF_ERROR(cache.set_batch({&seq, 1}, {&n, 1}, stream));
  return step(cache, k, v, stream);
}

// Every record of both sequences: the same forms, the same bytes; of the tail those of its tokens.
inline void expect_equal(const cuda::Cache& gpu, SeqId gpu_seq, const KvCache& cpu, SeqId cpu_seq, cudaStream_t stream,
                         const std::string& what) {
  const int64_t tokens = cpu.length(cpu_seq), pages = pages_for(tokens);
  const auto length = gpu.length(gpu_seq, stream);
  ASSERT_TRUE(length.ok()) << length.status().message();
  ASSERT_EQ(*length, tokens) << what;
  using Records = cuda::LayerRecords;
  const CacheState& s = cpu.state();
  for (int l = 0; l < s.config.layers; ++l) {
    auto records = cuda::download_records(gpu.state(), gpu_seq, l, 0, pages, stream);
    ASSERT_TRUE(records.ok()) << records.status().message();
    for (int64_t j = 0; j < pages; ++j)
      for (int h = 0; h < s.config.h_kv; ++h) {
        const PageForms& forms =
            s.forms_of(s.sequences[static_cast<size_t>(cpu_seq)].pages[static_cast<size_t>(j)], l)[h];
        const auto got = [&](int form) {
          const uint8_t* at = records->at(form, j, h);
          return at ? std::vector<uint8_t>(at, at + records->forms[form].record_bytes) : std::vector<uint8_t>{};
        };
        const std::string where = what + ", layer " + std::to_string(l) + ", page " + std::to_string(j) + " of " +
                                  std::to_string(pages) + ", head " + std::to_string(h);
        const auto want = [&](const RecordPool& records_of, int32_t record) {
          const uint8_t* at = records_of.at(record);
          return at ? std::vector<uint8_t>(at, at + records_of.record_bytes()) : std::vector<uint8_t>{};
        };
        ASSERT_EQ(got(Records::kSummary), want(s.summary, forms.summary)) << "summary, " << where;
        ASSERT_EQ(got(Records::kFp4), want(s.fp4, forms.fp4)) << "fp4, " << where;
        ASSERT_EQ(got(Records::kResidual), want(s.residual, forms.residual)) << "residual, " << where;
        const std::vector<uint8_t> high = want(s.high, forms.high), got_high = got(Records::kHigh);
        ASSERT_EQ(got_high.size(), high.size()) << "high, " << where;
        if (high.empty()) continue;
        const int held = static_cast<int>(std::min<int64_t>(tokens - j * kPageTokens, kPageTokens));
        const auto same = [&](int64_t at) {
          return std::memcmp(got_high.data() + 2 * at, high.data() + 2 * at, 2) == 0;
        };
        for (int t = 0; t < held; ++t) {
          for (int c = 0; c < s.config.d; ++c) ASSERT_TRUE(same(s.layout.high_k_at(t, c))) << where << ", token " << t;
          for (int c = 0; c < s.config.d_v; ++c)
            ASSERT_TRUE(same(s.layout.high_v_at(t, c))) << where << ", token " << t;
        }
        // What a kernel may read after the tail's last token is zero.
        for (int t = held; t < (held + kHighItemTokens - 1) / kHighItemTokens * kHighItemTokens; ++t)
          for (int c = 0; c < s.config.d_v; ++c) {
            const int64_t at = 2 * s.layout.high_v_at(t, c);
            ASSERT_EQ(got_high[static_cast<size_t>(at)] | got_high[static_cast<size_t>(at + 1)], 0) << where;
          }
      }
  }
}

// A cache on the GPU and one of the CPU. A sequence here has a twin there that shares nothing: a fork's goes through
// the whole history of the sequence again.
class Twins {
 public:
  Twins(const CacheConfig& config, const cuda::CacheSize& size, cudaStream_t stream)
      : stream_(stream), k_(kRows, config.h_kv, config.d), v_(kRows, config.h_kv, config.d_v) {
    auto gpu = cuda::Cache::create(config, size, 0);
    auto cpu = KvCache::create(config);
    EXPECT_TRUE(gpu.ok() && cpu.ok()) << gpu.status().message();
    gpu_.emplace(std::move(*gpu));
    cpu_.emplace(std::move(*cpu));
    std::mt19937 random(21);
    k_.fill(random);
    v_.fill(random);
    EXPECT_OK(k_.send(stream));
    EXPECT_OK(v_.send(stream));
  }

  cuda::Cache& gpu() { return *gpu_; }
  KvCache& cpu() { return *cpu_; }
  size_t count() const { return all_.size(); }
  int64_t length(size_t i) const { return cpu_->length(all_[i].cpu); }
  SeqId seq(size_t i) const { return all_[i].gpu; }
  SeqId twin(size_t i) const { return all_[i].cpu; }

  void start() {
    auto seq = gpu_->new_sequence(stream_);
    ASSERT_OK(seq.status());
    all_.push_back({*seq, cpu_->new_sequence(), {}});
  }
  void fork(size_t i) {
    auto seq = gpu_->fork(all_[i].gpu, stream_);
    ASSERT_OK(seq.status());
    Sequence copy{*seq, cpu_->new_sequence(), all_[i].history};
    for (const Event& event : copy.history) ASSERT_OK(live(copy.cpu, event));
    all_.push_back(copy);
  }
  // Appends n rows of the tensors, from `first` on.
  void append(size_t i, int64_t first, int64_t n) {
    ASSERT_OK(gpu_->reserve(all_[i].gpu, length(i) + n, stream_));
    ASSERT_OK(step(*gpu_, all_[i].gpu, k_.device(first, n), v_.device(first, n), stream_));
    all_[i].history.push_back({false, first, n});
    ASSERT_OK(live(all_[i].cpu, all_[i].history.back()));
  }
  void cut(size_t i, int64_t tokens) {
    const Event event{true, 0, tokens};
    const Status want = live(all_[i].cpu, event), got = gpu_->truncate(all_[i].gpu, tokens, stream_);
    ASSERT_EQ(got.code(), want.code()) << got.message() << " / " << want.message();
    if (want.ok()) all_[i].history.push_back(event);
  }
  void free(size_t i) {
    ASSERT_OK(gpu_->free(all_[i].gpu, stream_));
    ASSERT_OK(cpu_->free(all_[i].cpu));
    all_.erase(all_.begin() + static_cast<std::ptrdiff_t>(i));
  }
  void expect_equal(const std::string& what) {
    for (size_t i = 0; i < all_.size(); ++i)
      testing::expect_equal(*gpu_, all_[i].gpu, *cpu_, all_[i].cpu, stream_, what + ", sequence " + std::to_string(i));
    EXPECT_FALSE(*gpu_->faults(stream_)) << what;
  }

  static constexpr int64_t kRows = 1000;

 private:
  struct Event {
    bool cut;
    int64_t first, n;  // rows; or the length that remains
  };
  struct Sequence {
    SeqId gpu, cpu;
    std::vector<Event> history;
  };

  Status live(SeqId twin, const Event& e) {
    return e.cut ? cpu_->truncate(twin, e.n) : step(*cpu_, twin, k_.host(e.first, e.n), v_.host(e.first, e.n));
  }

  cudaStream_t stream_;
  Tensor k_, v_;
  std::optional<cuda::Cache> gpu_;
  std::optional<KvCache> cpu_;
  std::vector<Sequence> all_;
};

}  // namespace thriftattn::testing
