// The cache on a GPU against the CPU's: after the same appends every record has the same bytes.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "cuda/caches.h"

namespace thriftattn::cuda {
namespace {

using namespace testing;

// The same rows to a new sequence of both caches, in steps of `chunk` tokens; then every record is compared.
void expect_same_appends(const CacheConfig& config, DType dtype, int64_t tokens, int64_t chunk, cudaStream_t stream,
                         float magnitude = 1, int gap = 0) {
  const std::string what =
      to_string(config.storage) + " " + to_string(config.format) + (config.scales == Scales::six ? " six" : " 4over6") +
      (config.centring ? " centred" : "") + (config.page_scale ? " scaled" : "") + " d " + std::to_string(config.d) +
      "/" + std::to_string(config.d_v) + " chunk " + std::to_string(chunk) + " x " + std::to_string(magnitude);
  std::mt19937 random(11);
  Tensor k(tokens, config.h_kv, config.d, dtype, gap), v(tokens, config.h_kv, config.d_v, dtype, gap);
  k.fill(random, magnitude);
  v.fill(random, magnitude);
  ASSERT_OK(k.send(stream));
  ASSERT_OK(v.send(stream));
  auto cpu = KvCache::create(config);
  auto gpu = Cache::create(config, {1, tokens, 0, chunk}, 0);
  ASSERT_TRUE(cpu.ok() && gpu.ok()) << gpu.status().message();
  const SeqId host = cpu->new_sequence();
  const auto seq = gpu->new_sequence(stream);
  ASSERT_TRUE(seq.ok());
  ASSERT_OK(gpu->reserve(*seq, tokens, stream));
  for (int64_t t = 0; t < tokens; t += chunk) {
    const int64_t n = std::min(chunk, tokens - t);
    ASSERT_OK(step(*cpu, host, k.host(t, n), v.host(t, n)));
    ASSERT_OK(step(*gpu, *seq, k.device(t, n), v.device(t, n), stream));
  }
  expect_equal(*gpu, *seq, *cpu, host, stream, what);
  const auto faults = gpu->faults(stream);
  ASSERT_TRUE(faults.ok() && !*faults) << what;
}

TEST_F(CudaCache, EncodesAsTheCpuDoes) {
  for (const Storage storage : {Storage::high_only, Storage::dual, Storage::residual, Storage::fp4_only})
    for (const Fp4Format format : {Fp4Format::nvfp4, Fp4Format::mxfp4})
      for (const Scales scales : {Scales::six, Scales::four_over_six})
        for (const bool centring : {true, false})
          for (const bool page_scale : {true, false})
            for (const float magnitude : {1.0f, 1e-3f, 500.0f, 1e-6f}) {
              CacheConfig config = config_of(storage);
              config.format = format;
              config.scales = scales;
              config.centring = centring && storage != Storage::high_only;
              config.page_scale = page_scale;
              config.min_max = config.variance = page_scale;
              expect_same_appends(config, DType::f32, 200, 77, stream, magnitude);
              if (HasFatalFailure()) return;
            }
}

TEST_F(CudaCache, EveryHeadSizeAndType) {
  for (const Fp4Format format : {Fp4Format::nvfp4, Fp4Format::mxfp4})
    for (int d = 16; d <= kMaxChannels; d += 16)
      for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
        CacheConfig config = config_of(Storage::residual, d, d % 112 + 16, 1, 1);
        config.format = format;
        config.min_max = config.variance = true;
        expect_same_appends(config, dtype, 140, 65, stream);
        std::swap(config.d, config.d_v);
        expect_same_appends(config, dtype, 140, 130, stream, 1, 3);  // rows that no wide load can take
        if (HasFatalFailure()) return;
      }
}

TEST_F(CudaCache, StepsOfAnySizeGiveTheSameBytes) {
  for (const int64_t chunk : {1, 2, 3, 7, 8, 63, 64, 65, 129, 400}) {
    expect_same_appends(config_of(Storage::residual, 48, 80, 2), DType::f32, 400, chunk, stream);
    expect_same_appends(config_of(Storage::dual, 32, 16, 1, 3), DType::bf16, 333, chunk, stream);
    if (HasFatalFailure()) return;
  }
}

TEST_F(CudaCache, TheRingOfALongSequenceHoldsItsWindow) {
  CacheConfig config = config_of(Storage::fp4_only, 16, 16, 2, 1);
  config.sink = 3;
  config.recent = 4;
  expect_same_appends(config, DType::f32, 64 * 40 + 17, 100, stream);
  expect_same_appends(config, DType::f32, 64 * 20, 64, stream);
  config.sink = 0;
  config.recent = 2;
  expect_same_appends(config, DType::f32, 64 * 30 + 1, 1, stream);
  config.sink = 100;  // more than there are pages
  expect_same_appends(config, DType::f32, 64 * 5, 50, stream);
}

TEST_F(CudaCache, SequencesOfABatchGrowEachByItsOwn) {
  const CacheConfig config = config_of(Storage::residual, 32, 48, 2);
  auto cpu = KvCache::create(config);
  auto gpu = Cache::create(config, {4, 500, 32, 200}, 0);
  ASSERT_TRUE(cpu.ok() && gpu.ok());
  std::mt19937 random(3);
  std::vector<SeqId> seqs, hosts;
  for (int i = 0; i < 4; ++i) {
    seqs.push_back(*gpu->new_sequence(stream));
    hosts.push_back(cpu->new_sequence());
  }
  const std::vector<std::vector<int64_t>> steps = {{70, 1, 0, 200}, {1, 63, 130, 1}, {1, 1, 1, 1},
                                                   {57, 0, 64, 55}, {1, 1, 1, 1},    {2, 190, 3, 7}};
  std::vector<int64_t> length(4);
  for (const auto& s_q : steps) {
    int64_t rows = 0;
    for (size_t i = 0; i < 4; ++i) {
      length[i] += s_q[i];
      rows += s_q[i];
      ASSERT_OK(gpu->reserve(seqs[i], length[i], stream));  // a page at a time: ids of all sequences mix
    }
    Tensor k(rows, config.h_kv, config.d), v(rows, config.h_kv, config.d_v);
    k.fill(random);
    v.fill(random);
    ASSERT_OK(k.send(stream));
    ASSERT_OK(v.send(stream));
    ASSERT_OK(gpu->set_batch(seqs, s_q, stream));
    ASSERT_OK(step(*gpu, k.device(0, rows), v.device(0, rows), stream));
    ASSERT_EQ(cudaStreamSynchronize(stream), cudaSuccess);
    int64_t row = 0;
    for (size_t i = 0; i < 4; ++i) {
      ASSERT_OK(step(*cpu, hosts[i], k.host(row, s_q[i]), v.host(row, s_q[i])));
      row += s_q[i];
    }
  }
  for (size_t i = 0; i < 4; ++i) expect_equal(*gpu, seqs[i], *cpu, hosts[i], stream, "sequence " + std::to_string(i));
}

// Between steps the same pages have a 16-bit form, whatever room a step needs. (A tail's place in the other pools is
// taken here, not there.)
TEST_F(CudaCache, HighBytesAreThoseOfTheCpu) {
  for (const Storage storage : kStorages) {
    const CacheConfig config = config_of(storage);
    auto cpu = KvCache::create(config);
    auto gpu = Cache::create(config, {2, 64 * 40, 0, 64 * 40}, 0);
    ASSERT_TRUE(cpu.ok() && gpu.ok());
    const SeqId host = cpu->new_sequence(), seq = *gpu->new_sequence(stream);
    constexpr int64_t kTokens = 64 * 20 + 5;
    std::mt19937 random(5);
    Tensor k(kTokens, config.h_kv, config.d), v(kTokens, config.h_kv, config.d_v);
    k.fill(random);
    v.fill(random);
    ASSERT_OK(k.send(stream));
    ASSERT_OK(v.send(stream));
    ASSERT_OK(gpu->reserve(seq, kTokens, stream));
    ASSERT_OK(step(*gpu, seq, k.device(0, kTokens), v.device(0, kTokens), stream));
    ASSERT_OK(step(*cpu, host, k.host(0, kTokens), v.host(0, kTokens)));
    const MemoryUse ours = gpu->bytes(), theirs = cpu->bytes();
    EXPECT_EQ(ours.high, theirs.high) << to_string(storage);
    EXPECT_GT(gpu->reserved_bytes(), ours.total());
  }
}

TEST_F(CudaCache, FreedPagesServeOthers) {
  const CacheConfig config = config_of(Storage::residual, 32, 32);
  auto cpu = KvCache::create(config);
  auto gpu = Cache::create(config, {3, 64 * 4, 8, 64 * 4}, 0);
  ASSERT_TRUE(cpu.ok() && gpu.ok());
  const auto empty = gpu->bytes().total();
  std::mt19937 random(4);
  Tensor k(64 * 4, config.h_kv, config.d), v(64 * 4, config.h_kv, config.d_v);
  k.fill(random);
  v.fill(random);
  ASSERT_OK(k.send(stream));
  ASSERT_OK(v.send(stream));
  for (int round = 0; round < 5; ++round) {
    std::vector<SeqId> seqs;
    for (const int64_t tokens : {100, 200, 64}) {
      const auto seq = gpu->new_sequence(stream);
      ASSERT_TRUE(seq.ok());
      seqs.push_back(*seq);
      ASSERT_OK(gpu->reserve(*seq, tokens, stream));
      ASSERT_OK(step(*gpu, *seq, k.device(0, tokens), v.device(0, tokens), stream));
    }
    EXPECT_FALSE(gpu->new_sequence(stream).ok()) << "all three are in use";
    EXPECT_EQ(gpu->reserve(seqs[2], 65 + 64, stream).code(), Code::out_of_memory) << "7 of 8 pages are taken";
    ASSERT_OK(gpu->reserve(seqs[2], 65, stream));
    const SeqId host = cpu->new_sequence();
    ASSERT_OK(step(*cpu, host, k.host(0, 200), v.host(0, 200)));
    expect_equal(*gpu, seqs[1], *cpu, host, stream, "round " + std::to_string(round));
    if (HasFatalFailure()) return;
    ASSERT_OK(cpu->free(host));
    for (const size_t i : {size_t{1}, size_t{0}, size_t{2}}) ASSERT_OK(gpu->free(seqs[i], stream));
    EXPECT_EQ(gpu->free(seqs[0], stream).code(), Code::not_found);
    EXPECT_EQ(gpu->bytes().total(), empty);
  }
}

TEST_F(CudaCache, WithoutAPageNothingOfTheStepIsAppended) {
  const CacheConfig config = config_of(Storage::residual, 32, 32);
  auto cpu = KvCache::create(config);
  auto gpu = Cache::create(config, {2, 130, 0, 128}, 0);
  ASSERT_TRUE(cpu.ok() && gpu.ok());
  std::mt19937 random(4);
  Tensor k(256, config.h_kv, config.d), v(256, config.h_kv, config.d_v);
  k.fill(random);
  v.fill(random);
  ASSERT_OK(k.send(stream));
  ASSERT_OK(v.send(stream));
  const std::vector<SeqId> seqs = {*gpu->new_sequence(stream), *gpu->new_sequence(stream)};
  const std::vector<SeqId> hosts = {cpu->new_sequence(), cpu->new_sequence()};
  ASSERT_OK(gpu->reserve(seqs[0], 64, stream));
  ASSERT_OK(gpu->reserve(seqs[1], 130, stream));
  const auto both = [&](int64_t first, int64_t n0, int64_t n1, bool first_fits, bool second_fits) {
    ASSERT_OK(gpu->set_batch(seqs, std::vector<int64_t>{n0, n1}, stream));
    ASSERT_OK(step(*gpu, k.device(first, n0 + n1), v.device(first, n0 + n1), stream));
    if (first_fits) ASSERT_OK(step(*cpu, hosts[0], k.host(first, n0), v.host(first, n0)));
    if (second_fits) ASSERT_OK(step(*cpu, hosts[1], k.host(first + n0, n1), v.host(first + n0, n1)));
    for (size_t i = 0; i < 2; ++i) expect_equal(*gpu, seqs[i], *cpu, hosts[i], stream, "sequence " + std::to_string(i));
    const auto faults = gpu->faults(stream, true);
    ASSERT_TRUE(faults.ok());
    EXPECT_EQ(faults->no_pages, !(first_fits && second_fits));
    EXPECT_FALSE(faults->not_finite);
  };
  both(0, 60, 60, true, true);
  both(10, 5, 5, false, true);  // 65 tokens need a second page
  both(20, 4, 64, true, true);
  both(30, 0, 2, true, false);  // 131 tokens are more than max_tokens
  both(40, 0, 1, true, true);
  ASSERT_OK(gpu->reserve(seqs[0], 65, stream));
  both(50, 1, 0, true, true);
  EXPECT_FALSE(*gpu->faults(stream)) << "cleared";
}

TEST_F(CudaCache, WhatIsNotFiniteIsSeenAndSpoilsItsPage) {
  for (const Fp4Format format : {Fp4Format::nvfp4, Fp4Format::mxfp4})
    for (const float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(),
                            -std::numeric_limits<float>::infinity(), 65520.0f, -1e30f}) {
      CacheConfig config = config_of(Storage::residual, 32, 32, 1, 2);
      config.format = format;
      config.sink = 0;
      auto gpu = Cache::create(config, {1, 64 * 6, 0, 64 * 6}, 0);
      ASSERT_TRUE(gpu.ok());
      std::mt19937 random(4);
      Tensor k(64 * 6, 2, 32), v(64 * 6, 2, 32);
      k.fill(random);
      v.fill(random);
      k.set(70, 0, 3, bad);
      v.set(140, 1, 9, bad);
      k.set(5, 0, 0, 65519);  // rounds to 65504
      ASSERT_OK(k.send(stream));
      ASSERT_OK(v.send(stream));
      const SeqId seq = *gpu->new_sequence(stream);
      ASSERT_OK(gpu->reserve(seq, 64 * 6, stream));
      ASSERT_OK(step(*gpu, seq, k.device(0, 64), v.device(0, 64), stream));
      EXPECT_FALSE(*gpu->faults(stream));
      ASSERT_OK(step(*gpu, seq, k.device(64, 20), v.device(64, 20), stream));
      EXPECT_TRUE(gpu->faults(stream, true)->not_finite);
      auto tail = download_records(gpu->state(), seq, 0, 1, 2, stream);
      ASSERT_TRUE(tail.ok());
      const auto nan_at = [&](int64_t at) {
        uint16_t bits;
        std::memcpy(&bits, tail->at(LayerRecords::kHigh, 1, 0) + 2 * at, sizeof(bits));
        return std::isnan(f16_decode(bits));
      };
      EXPECT_TRUE(nan_at(gpu->state().canonical.high_k_at(6, 3)));
      EXPECT_FALSE(nan_at(gpu->state().canonical.high_k_at(7, 3)));
      ASSERT_OK(step(*gpu, seq, k.device(84, 300), v.device(84, 300), stream));
      EXPECT_TRUE(gpu->faults(stream)->not_finite);
      EXPECT_TRUE(gpu->faults(stream)->not_finite) << "sticky";
      std::vector<float> got_k(static_cast<size_t>(64 * 6 * 2 * 32)), got_v(got_k);
      ASSERT_OK(gpu->download(seq, 0, 0, mutable_view(got_k.data(), 384, 2, 32), mutable_view(got_v.data(), 384, 2, 32),
                              stream));
      for (int t = 0; t < 384; ++t)
        for (int h = 0; h < 2; ++h) {
          const size_t row = static_cast<size_t>((t * 2 + h) * 32);
          EXPECT_EQ(std::isnan(got_k[row + 3]), t / 64 == 1 && h == 0) << t;  // every key of the page
          EXPECT_EQ(
              std::isnan(got_v[row + 9]),
              t / (format == Fp4Format::nvfp4 ? 16 : 32) == 140 / (format == Fp4Format::nvfp4 ? 16 : 32) && h == 1)
              << t;  // the values that share its scale
        }
    }
}

TEST_F(CudaCache, TruncateIsExactWhereThePageHasSixteenBits) {
  for (const Storage storage : {Storage::high_only, Storage::dual, Storage::residual, Storage::fp4_only}) {
    const CacheConfig config = config_of(storage, 32, 48, 2);
    auto cpu = KvCache::create(config);
    auto gpu = Cache::create(config, {1, 64 * 12, 0, 64 * 12}, 0);
    ASSERT_TRUE(cpu.ok() && gpu.ok());
    std::mt19937 random(4);
    Tensor k(64 * 12, config.h_kv, config.d), v(64 * 12, config.h_kv, config.d_v);
    k.fill(random);
    v.fill(random);
    ASSERT_OK(k.send(stream));
    ASSERT_OK(v.send(stream));
    const SeqId seq = *gpu->new_sequence(stream), host = cpu->new_sequence();
    ASSERT_OK(gpu->reserve(seq, 64 * 12, stream));
    int64_t length = 0;
    const auto grow = [&](int64_t n) {
      ASSERT_OK(step(*cpu, host, k.host(length, n), v.host(length, n)));
      ASSERT_OK(step(*gpu, seq, k.device(length, n), v.device(length, n), stream));
      length += n;
      expect_equal(*gpu, seq, *cpu, host, stream, to_string(storage) + ", grown to " + std::to_string(length));
    };
    const auto shorten = [&](int64_t to) {
      const Status want = cpu->truncate(host, to), got = gpu->truncate(seq, to, stream);
      ASSERT_EQ(got.code(), want.code()) << got.message() << " / " << want.message();
      if (want.ok()) length = to;
      expect_equal(*gpu, seq, *cpu, host, stream, to_string(storage) + ", cut to " + std::to_string(length));
    };
    grow(64 * 10 + 20);
    shorten(64 * 10 + 13);  // within the tail, in the middle of an item
    grow(1);
    shorten(64 * 9 + 5);  // a page that is encoded, with 16 bit
    grow(64 + 2);
    shorten(64 * 6 + 30);  // one without, but for high_only and dual
    shorten(64 * 4);       // no page is cut
    grow(70);
    shorten(64 * 3);
    shorten(64 * 3 - 7);  // of an older window: only where all pages keep 16 bit
    shorten(30);          // the sink page
    grow(64 * 5);
    shorten(0);
    grow(65);
    EXPECT_EQ(gpu->truncate(seq, 66, stream).code(), Code::invalid_argument);
    EXPECT_EQ(gpu->truncate(seq, -1, stream).code(), Code::invalid_argument);
    if (HasFatalFailure()) return;
  }
}

TEST_F(CudaCache, AGraphGoesOnWhileTheSequencesGrow) {
  for (const Storage storage : {Storage::residual, Storage::dual}) {
    const CacheConfig config = config_of(storage, 64, 64, 3);
    constexpr int64_t kSteps = 200;
    auto cpu = KvCache::create(config);
    auto gpu = Cache::create(config, {2, 400, 0, 1}, 0);
    ASSERT_TRUE(cpu.ok() && gpu.ok());
    std::mt19937 random(9);
    Tensor k(2 * kSteps, config.h_kv, config.d, DType::f16), v(2 * kSteps, config.h_kv, config.d_v, DType::f16);
    Tensor k_now(2, config.h_kv, config.d, DType::f16), v_now(2, config.h_kv, config.d_v, DType::f16);
    k.fill(random);
    v.fill(random);
    for (Tensor* t : {&k, &v, &k_now, &v_now}) ASSERT_OK(t->send(stream));
    const std::vector<SeqId> seqs = {*gpu->new_sequence(stream), *gpu->new_sequence(stream)};
    const std::vector<SeqId> hosts = {cpu->new_sequence(), cpu->new_sequence()};
    for (const SeqId seq : seqs) ASSERT_OK(gpu->reserve(seq, kSteps, stream));
    ASSERT_OK(gpu->set_batch(seqs, std::vector<int64_t>{1, 1}, stream));

    cudaGraph_t graph;
    cudaGraphExec_t ready;
    ASSERT_EQ(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), cudaSuccess);
    ASSERT_OK(step(*gpu, k_now.device(0, 2), v_now.device(0, 2), stream));
    ASSERT_EQ(cudaStreamEndCapture(stream, &graph), cudaSuccess);
    ASSERT_EQ(cudaGraphInstantiate(&ready, graph, 0), cudaSuccess);
    for (int64_t i = 0; i < kSteps; ++i) {
      const auto bring = [&](const Tensor& from, const Tensor& to, int channels) {
        return cudaMemcpyAsync(const_cast<void*>(to.device(0, 2).data), from.device(2 * i, 2).data,
                               static_cast<size_t>(2 * 2 * config.h_kv * channels), cudaMemcpyDeviceToDevice, stream);
      };
      ASSERT_EQ(bring(k, k_now, config.d), cudaSuccess);
      ASSERT_EQ(bring(v, v_now, config.d_v), cudaSuccess);
      ASSERT_EQ(cudaGraphLaunch(ready, stream), cudaSuccess);
      for (size_t s = 0; s < 2; ++s)
        ASSERT_OK(step(*cpu, hosts[s], k.host(2 * i + static_cast<int64_t>(s), 1),
                       v.host(2 * i + static_cast<int64_t>(s), 1)));
    }
    for (size_t s = 0; s < 2; ++s) expect_equal(*gpu, seqs[s], *cpu, hosts[s], stream, to_string(storage));
    EXPECT_FALSE(*gpu->faults(stream));
    ASSERT_EQ(cudaGraphLaunch(ready, stream), cudaSuccess);  // token 201 has its page; token 257 has none
    for (int i = 0; i < 60; ++i) ASSERT_EQ(cudaGraphLaunch(ready, stream), cudaSuccess);
    EXPECT_TRUE(gpu->faults(stream)->no_pages);
    EXPECT_EQ(*gpu->length(seqs[0], stream), 256);
    EXPECT_EQ(cudaGraphExecDestroy(ready), cudaSuccess);
    EXPECT_EQ(cudaGraphDestroy(graph), cudaSuccess);
  }
}

TEST_F(CudaCache, UploadAndDownloadKeepEveryValue) {
  for (const Storage storage : {Storage::high_only, Storage::dual, Storage::residual, Storage::fp4_only})
    for (const int64_t tokens : {0, 13, 64, 700}) {
      const CacheConfig config = config_of(storage, 48, 32, 2);
      auto cpu = KvCache::create(config);
      auto gpu = Cache::create(config, {2, 1000, 0, 100}, 0);
      ASSERT_TRUE(cpu.ok() && gpu.ok());
      std::mt19937 random(14);
      Tensor k(tokens + 100, config.h_kv, config.d), v(tokens + 100, config.h_kv, config.d_v);
      k.fill(random);
      v.fill(random);
      ASSERT_OK(k.send(stream));
      ASSERT_OK(v.send(stream));
      const SeqId host = cpu->new_sequence();
      ASSERT_OK(step(*cpu, host, k.host(0, tokens), v.host(0, tokens)));
      const auto seq = gpu->upload(*cpu, host, stream);
      ASSERT_TRUE(seq.ok()) << seq.status().message();
      expect_equal(*gpu, *seq, *cpu, host, stream, to_string(storage) + ", uploaded");
      // And it goes on.
      ASSERT_OK(gpu->reserve(*seq, tokens + 100, stream));
      ASSERT_OK(step(*cpu, host, k.host(tokens, 100), v.host(tokens, 100)));
      ASSERT_OK(step(*gpu, *seq, k.device(tokens, 100), v.device(tokens, 100), stream));
      expect_equal(*gpu, *seq, *cpu, host, stream, to_string(storage) + ", grown");
      if (HasFatalFailure()) return;
      const int64_t first = tokens / 2, n = tokens + 100 - first;
      for (int l = 0; l < config.layers; ++l) {
        std::vector<float> want_k(static_cast<size_t>(n * config.h_kv * config.d)), got_k(want_k),
            want_v(static_cast<size_t>(n * config.h_kv * config.d_v)), got_v(want_v);
        const auto rows = [&](std::vector<float>& x, int channels) {
          return mutable_view(x.data(), n, config.h_kv, channels);
        };
        ASSERT_OK(cpu->read(host, l, first, rows(want_k, config.d), rows(want_v, config.d_v)));
        ASSERT_OK(gpu->download(*seq, l, first, rows(got_k, config.d), rows(got_v, config.d_v), stream));
        ASSERT_EQ(got_k, want_k);
        ASSERT_EQ(got_v, want_v);
      }
    }
}

TEST_F(CudaCache, RefusesWhatItCannotServe) {
  const CacheConfig good = config_of(Storage::residual);
  const auto refused = [&](const CacheConfig& config, const CacheSize& size, int device, Code code, const char* word) {
    const auto cache = Cache::create(config, size, device);
    EXPECT_EQ(cache.status().code(), code) << cache.status().message();
    EXPECT_NE(cache.status().message().find(word), std::string::npos) << cache.status().message();
  };
  const CacheSize size{2, 1000, 0, 16};
  CacheConfig c = good;
  c.storage_by_head.assign(2, Storage::dual);
  refused(c, size, 0, Code::unsupported, "storage_by_head");
  c = good;
  c.high_dtype = DType::bf16;
  refused(c, size, 0, Code::unsupported, "bf16");
  c = good;
  c.storage = Storage::compact;
  refused(c, size, 0, Code::unsupported, "compact");
  c = good;
  c.d = 40;
  refused(c, size, 0, Code::invalid_argument, "head_dim 40");
  c = good;
  c.max_bytes = 1000;
  refused(c, size, 0, Code::out_of_memory, "of at most 1000");
  refused(good, {0, 1000, 0, 1}, 0, Code::invalid_argument, "max_sequences 0");
  refused(good, {1, 0, 0, 1}, 0, Code::invalid_argument, "max_tokens 0");
  refused(good, {1, 1000, -1, 1}, 0, Code::invalid_argument, "pages -1");
  refused(good, {1, 1000, 0, 0}, 0, Code::invalid_argument, "max_append 0");
  refused(good, {1 << 16, 1000, 0, 1}, 0, Code::invalid_argument, "max_sequences 65536");
  refused(good, size, 99, Code::not_found, "GPU 99");
  c = good;
  c.layers = 1 << 30;
  refused(c, size, 0, Code::invalid_argument, "1048576 heads in all");
  c.layers = 1 << 19;
  refused(c, {1000, 1 << 30, INT32_MAX, 1}, 0, Code::invalid_argument, "bytes than can be counted");
  c.layers = 1 << 12;
  refused(c, {1000, 1 << 20, 0, 1}, 0, Code::out_of_memory, "bytes on GPU 0");

  auto cache = Cache::create(good, size, 0);
  ASSERT_TRUE(cache.ok()) << cache.status().message();
  const SeqId seq = *cache->new_sequence(stream);
  const auto batch = [&](std::vector<SeqId> seqs, std::vector<int64_t> s_q) {
    return cache->set_batch(seqs, s_q, stream).code();
  };
  EXPECT_EQ(batch({seq}, {1, 2}), Code::invalid_argument);
  EXPECT_EQ(batch({seq, seq}, {1, 2}), Code::invalid_argument);
  EXPECT_EQ(batch({1}, {1}), Code::not_found);
  EXPECT_EQ(batch({seq}, {17}), Code::invalid_argument);
  EXPECT_EQ(batch({seq}, {-1}), Code::invalid_argument);
  EXPECT_EQ(batch({seq}, {2}), Code::ok);
  Tensor k(3, good.h_kv, good.d), v(3, good.h_kv, good.d_v);
  ASSERT_OK(k.send(stream));
  ASSERT_OK(v.send(stream));
  EXPECT_EQ(cache->append(0, k.device(0, 3), v.device(0, 3), stream).code(), Code::invalid_argument);
  EXPECT_EQ(cache->append(1, k.device(0, 2), v.device(0, 2), stream).code(), Code::invalid_argument);
  EXPECT_EQ(cache->reserve(seq, 1001, stream).code(), Code::invalid_argument);
  EXPECT_EQ(cache->reserve(7, 10, stream).code(), Code::not_found);
  EXPECT_EQ(cache->truncate(7, 0, stream).code(), Code::not_found);
}

}  // namespace
}  // namespace thriftattn::cuda
