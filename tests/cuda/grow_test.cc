// A cache on a GPU that has grown holds what it held, and goes on as one that was made so large.
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "cuda/caches.h"

namespace thriftattn::testing {
namespace {

class CudaGrow : public CudaCache {};

TEST_F(CudaGrow, KeepsWhatItHolds) {
  for (const Storage storage : kStorages)
    for (const int sink : {1, 6}) {  // 6: more than the pages of a sequence, until it grows
      const auto after = [&](const char* event) {
        return to_string(storage) + ", sink " + std::to_string(sink) + ", " + event;
      };
      CacheConfig config = config_of(storage, 32, 48, 2);
      config.sink = sink;
      Twins twins(config, {3, 64 * 5, 0, 280}, stream);
      twins.start();
      twins.start();
      twins.append(0, 0, 64 * 4 + 20);
      twins.append(1, 50, 64);
      twins.fork(0);
      ASSERT_OK(twins.gpu().grow({3, 64 * 5, 0, 310}, stream));  // steps alone: rings of another size
      twins.expect_equal(after("longer steps"));
      twins.append(2, 100, 30);
      twins.append(0, 0, 1);
      ASSERT_OK(twins.gpu().grow({3, 900, 40, 310}, stream));
      twins.expect_equal(after("longer sequences"));
      twins.append(0, 300, 270);
      twins.append(2, 200, 64 * 3);
      twins.cut(2, 64 * 4 + 5);
      twins.expect_equal(after("longer sequences, appended"));
      ASSERT_OK(twins.gpu().grow({5, 900, 0, 310}, stream));
      twins.start();
      twins.append(3, 7, 210);
      twins.fork(0);
      twins.free(1);
      twins.append(3, 20, 90);
      twins.expect_equal(after("more sequences"));
      if (HasFailure()) return;
    }
}

TEST_F(CudaGrow, InTheMiddleOfAStepToo) {
  for (const Storage storage : kStorages) {
    const CacheConfig config = config_of(storage, 32, 32, 2);
    Tensor k(300, config.h_kv, config.d), v(300, config.h_kv, config.d_v);
    std::mt19937 random(5);
    k.fill(random);
    v.fill(random);
    ASSERT_OK(k.send(stream));
    ASSERT_OK(v.send(stream));
    auto gpu = cuda::Cache::create(config, {1, 300, 0, 200}, 0);
    auto cpu = KvCache::create(config);
    ASSERT_TRUE(gpu.ok() && cpu.ok());
    const SeqId seq = *gpu->new_sequence(stream), twin = cpu->new_sequence();
    ASSERT_OK(gpu->reserve(seq, 300, stream));
    ASSERT_OK(step(*gpu, seq, k.device(0, 100), v.device(0, 100), stream));
    ASSERT_OK(gpu->set_batch(std::vector<SeqId>{seq}, std::vector<int64_t>{200}, stream));
    ASSERT_OK(gpu->begin_step(stream));
    ASSERT_OK(gpu->append(0, k.device(100, 200), v.device(100, 200), stream));
    ASSERT_OK(gpu->grow({2, 1000, 0, 200}, stream));
    ASSERT_OK(gpu->append(1, k.device(100, 200), v.device(100, 200), stream));
    ASSERT_OK(gpu->end_step(stream));
    ASSERT_OK(step(*cpu, twin, k.host(0, 100), v.host(0, 100)));
    ASSERT_OK(step(*cpu, twin, k.host(100, 200), v.host(100, 200)));
    expect_equal(*gpu, seq, *cpu, twin, stream, to_string(storage));
  }
}

TEST_F(CudaGrow, RefusesToShrinkAndWhatDoesNotFit) {
  Twins twins(config_of(Storage::residual, 32, 32), {2, 500, 12, 100}, stream);
  twins.start();
  twins.append(0, 0, 100);
  const auto refused = [&](const cuda::CacheSize& size, Code code, const char* word) {
    const Status status = twins.gpu().grow(size, stream);
    EXPECT_EQ(status.code(), code) << status.message();
    EXPECT_NE(status.message().find(word), std::string::npos) << status.message();
    EXPECT_EQ(twins.gpu().size().max_tokens, 500);
    twins.expect_equal(word);
  };
  refused({1, 500, 12, 100}, Code::invalid_argument, "smaller");
  refused({2, 499, 12, 100}, Code::invalid_argument, "smaller");
  refused({2, 500, 11, 100}, Code::invalid_argument, "smaller");
  refused({2, 500, 12, 99}, Code::invalid_argument, "smaller");
  refused({2, 500, -1, 100}, Code::invalid_argument, "pages -1");
  refused({2000, 1 << 20, 0, 100}, Code::out_of_memory, "bytes on GPU 0");
  twins.append(0, 100, 99);
  twins.expect_equal("goes on");
  ASSERT_OK(twins.gpu().grow({2, 500, 12, 100}, stream));
  twins.append(0, 200, 99);
  twins.expect_equal("grown to what it was");
}

TEST_F(CudaGrow, AttentionIsThatOfALargeCache) {
  const Tokens tokens = attention_like({8, 2, 64, 64}, 700);
  Tokens few = tokens;  // a cache for these has no room for the rest
  few.s = 400;
  for (const char* spec : {"thrift", "thrift:storage=dual", "fp4", "fp16"}) {
    GpuSession large(method(spec), tokens), grown(method(spec), few);
    for (GpuSession* session : {&large, &grown}) {
      session->append(380);
      session->end_step();
    }
    grown.grow(large.cache().size());
    for (const int64_t rows : {1, 9, 310}) {
      Call call;
      call.phase = rows <= 16 ? Phase::decode : Phase::prefill;
      large.append(rows);
      grown.append(rows);
      const Ran want = large.attend(call), got = grown.attend(call);
      EXPECT_EQ(got.out, want.out) << spec << ", " << rows << " rows";
      EXPECT_EQ(got.lse, want.lse) << spec << ", " << rows << " rows";
      large.end_step();
      grown.end_step();
    }
  }
}

}  // namespace
}  // namespace thriftattn::testing
