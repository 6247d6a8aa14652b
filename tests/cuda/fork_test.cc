// Forks on a GPU: whatever sequences share, each holds the bytes that it would hold alone.
#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <string>
#include <vector>

#include "cuda/caches.h"

namespace thriftattn::testing {
namespace {

class CudaFork : public CudaCache {};

TEST_F(CudaFork, BothGoOnAsIfAlone) {
  for (const Storage storage : kStorages)
    for (const int64_t tokens : {0, 5, 63, 64, 65, 64 * 6, 64 * 7 + 44}) {
      const std::string what = to_string(storage) + ", " + std::to_string(tokens) + " tokens";
      Twins twins(config_of(storage, 32, 48, 2), {2, 1000, 0, 1000}, stream);
      twins.start();
      twins.append(0, 0, tokens);
      twins.fork(0);
      twins.expect_equal(what + ", forked");
      twins.append(0, 100, 70);
      twins.append(1, 200, 1);
      twins.append(1, 300, 190);
      twins.expect_equal(what + ", grown");
      twins.free(0);
      twins.append(0, 150, 30);
      twins.expect_equal(what + ", alone");
      if (HasFailure()) return;
    }
}

TEST_F(CudaFork, ACutIntoASharedPageLeavesTheOthersTheirs) {
  for (const Storage storage : kStorages) {
    const auto after = [&](const char* event) { return to_string(storage) + ", " + event; };
    Twins twins(config_of(storage, 48, 32, 2), {4, 1000, 0, 1000}, stream);
    twins.start();
    twins.append(0, 0, 64 * 6 + 20);
    twins.fork(0);
    twins.cut(1, 64 * 5 + 10);  // the fork: in a page that it shares, with 16 bit
    twins.expect_equal(after("the fork is cut"));
    twins.append(1, 200, 64 * 3);
    twins.expect_equal(after("the fork has grown"));
    twins.fork(0);
    twins.cut(0, 64 * 4 + 50);  // the parent, in a page that three share
    twins.append(0, 300, 300);
    twins.expect_equal(after("the parent is cut and has grown"));
    twins.cut(0, 64 * 3);  // between shared pages
    twins.expect_equal(after("cut between pages"));
    twins.append(0, 100, 65);
    twins.cut(2, 30);  // the sink page
    twins.append(2, 70, 200);
    twins.cut(1, 0);
    twins.append(1, 10, 70);
    twins.expect_equal(after("all are apart"));
    if (HasFailure()) return;
  }
}

TEST_F(CudaFork, AnyOrderOfEvents) {
  std::mt19937 random(31);
  const auto below = [&](int64_t n) { return static_cast<int64_t>(random() % static_cast<uint64_t>(n)); };
  for (const Storage storage : kStorages) {
    CacheConfig config = config_of(storage, 16, 32, 2, 1);
    config.sink = 1 + static_cast<int>(below(2));
    Twins twins(config, {5, 900, 0, 150}, stream);
    const MemoryUse empty = twins.gpu().bytes();
    for (int event = 0; event < 60; ++event) {
      const int64_t kind = below(10);
      const auto i = static_cast<size_t>(below(std::max<int64_t>(1, static_cast<int64_t>(twins.count()))));
      std::string what = to_string(storage) + ", event " + std::to_string(event);
      if (twins.count() == 0) {
        twins.start();
        twins.append(0, 0, 130);
      } else if (kind < 4) {
        const int64_t n = std::min(below(3) == 0 ? below(150) : below(20), 900 - twins.length(i));
        twins.append(i, below(Twins::kRows - 150), n);
      } else if (kind < 7) {
        if (twins.count() == 5) twins.free(i);
        twins.fork(static_cast<size_t>(below(static_cast<int64_t>(twins.count()))));
      } else if (kind < 9) {
        twins.cut(i, std::max<int64_t>(0, twins.length(i) - below(250)));
      } else {
        twins.free(i);
      }
      twins.expect_equal(what);
      if (HasFailure()) return;
    }
    while (twins.count() > 0) twins.free(static_cast<size_t>(below(static_cast<int64_t>(twins.count()))));
    EXPECT_EQ(twins.gpu().bytes().total(), empty.total());
  }
}

TEST_F(CudaFork, SharedPagesCountOnce) {
  for (const Storage storage : kStorages) {
    Twins twins(config_of(storage, 32, 32), {3, 64 * 4, 5, 64 * 4}, stream);
    twins.start();
    twins.append(0, 0, 64 * 3 + 1);
    const MemoryUse one = twins.gpu().bytes();
    twins.fork(0);
    EXPECT_EQ(twins.gpu().bytes().codes * 4, one.codes * 5) << "its tail alone";
    auto third = twins.gpu().fork(twins.seq(0), stream);
    EXPECT_EQ(third.status().code(), Code::out_of_memory) << "no page for a third tail";
    EXPECT_NE(third.status().message().find("tail"), std::string::npos) << third.status().message();
    EXPECT_EQ(twins.gpu().truncate(twins.seq(1), 64 * 2 + 7, stream).code(), Code::ok) << "the tail's page serves";
    twins.cut(0, 64 * 3);
    twins.fork(0);  // no tail, no page
    EXPECT_EQ(twins.gpu().fork(twins.seq(0), stream).status().code(), Code::out_of_memory) << "no sequence";
    // The page reserved beyond the end is the parent's alone; a fork that has none cannot be cut into a shared page.
    EXPECT_EQ(twins.gpu().truncate(twins.seq(2), 64 * 2 + 9, stream).code(), Code::out_of_memory);
    EXPECT_EQ(twins.gpu().truncate(twins.seq(2), 64 * 2, stream).code(), Code::ok);
    EXPECT_EQ(twins.gpu().reserve(twins.seq(2), 64 * 2 + 1, stream).code(), Code::out_of_memory);
    if (HasFailure()) return;
  }
}

TEST_F(CudaFork, RefusesTheMiddleOfAStep) {
  Twins twins(config_of(Storage::residual, 32, 32), {3, 200, 0, 10}, stream);
  EXPECT_EQ(twins.gpu().fork(0, stream).status().code(), Code::not_found);
  twins.start();
  const SeqId seq = twins.seq(0);
  ASSERT_OK(twins.gpu().reserve(seq, 10, stream));
  ASSERT_OK(twins.gpu().set_batch(std::vector<SeqId>{seq}, std::vector<int64_t>{10}, stream));
  ASSERT_OK(twins.gpu().begin_step(stream));
  const auto fork = twins.gpu().fork(seq, stream);
  EXPECT_EQ(fork.status().code(), Code::invalid_argument);
  EXPECT_NE(fork.status().message().find("in the middle of a step"), std::string::npos) << fork.status().message();
}

// Attention reads a fork's pages where they lie: bit for bit what it reads of a sequence that shares nothing.
TEST_F(CudaFork, AttentionIsThatOfSequencesApart) {
  const Shape shape{8, 2, 64, 64};
  constexpr int64_t kShared = 64 * 9 + 30, kRows[] = {1, 5, 40};
  const Tokens first = attention_like(shape, kShared + 46, 1);
  Tokens second = attention_like(shape, kShared + 46, 2);
  std::copy_n(first.k.begin(), kShared * shape.h_kv * shape.d, second.k.begin());
  std::copy_n(first.v.begin(), kShared * shape.h_kv * shape.d_v, second.v.begin());
  for (const char* spec : {"thrift", "thrift:storage=dual", "fp4", "fp16"}) {
    GpuSession apart(method(spec), {&first, &second}), forked(method(spec), {&first, &second});
    apart.append({kShared, kShared});
    apart.end_step();
    forked.append({kShared, 0});
    forked.end_step();
    forked.fork(1);
    for (const int64_t rows : kRows) {
      Call call;
      call.phase = rows <= 16 ? Phase::decode : Phase::prefill;
      apart.append({rows, rows});
      forked.append({rows, rows});
      const Ran want = apart.attend(call), got = forked.attend(call);
      EXPECT_EQ(got.out, want.out) << spec << ", " << rows << " rows";
      EXPECT_EQ(got.lse, want.lse) << spec << ", " << rows << " rows";
      apart.end_step();
      forked.end_step();
    }
  }
}

}  // namespace
}  // namespace thriftattn::testing
