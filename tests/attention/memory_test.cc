// Memory that ends, as an error and not as an exception: in a process of its own whose address space is limited.
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/wait.h>

#include <cstdlib>
#include <fstream>
#include <vector>

#include "attention/cache_state.h"
#include "attention/session.h"

namespace thriftattn::testing {
namespace {

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define THRIFTATTN_SANITIZED
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer) || __has_feature(memory_sanitizer)
#define THRIFTATTN_SANITIZED
#endif
#endif
#ifndef THRIFTATTN_SANITIZED  // their allocators end the process instead

constexpr int64_t kKiB = 1024;

// From now on the process gets `more` bytes of address space and no others.
void leave_memory(int64_t more) {
  int64_t pages = 0;
  std::ifstream("/proc/self/statm") >> pages;
  const rlim_t limit = static_cast<rlim_t>(pages * 4096 + more);
  const rlimit both{limit, limit};
  if (pages == 0 || setrlimit(RLIMIT_AS, &both) != 0) std::_Exit(2);
}

// Processes that begin anew: one that other tests ran in has freed memory to give.
class Memory : public ::testing::Test {
 protected:
  Memory() { GTEST_FLAG_SET(death_test_style, "threadsafe"); }
  ~Memory() override { GTEST_FLAG_SET(death_test_style, "fast"); }
};

TEST_F(Memory, ThatEndsAtANewSequenceIsAnError) {
  constexpr int kLayers = 1 << 20;  // tables of 8 MiB each
  auto cache = KvCache::create(CacheConfig::for_method(method("thrift"), kLayers, 1, 64, 64));
  ASSERT_TRUE(cache.ok());
  const auto run_out = [&] {
    leave_memory(4 * 1024 * kKiB);
    const SeqId seq = cache->new_sequence();
    std::_Exit(seq == -1 && cache->length(0) == -1 && cache->free(0).code() == Code::not_found ? 0 : 1);
  };
  EXPECT_EXIT(run_out(), ::testing::ExitedWithCode(0), "");
}

TEST_F(Memory, ThatEndsInAnAppendIsGivenBack) {
  const Shape shape{1, 1, 128, 128};
  const Tokens tokens = attention_like(shape, 64);
  auto cache = KvCache::create(CacheConfig::for_method(method("thrift"), 1, shape.h_kv, shape.d, shape.d_v));
  ASSERT_TRUE(cache.ok());
  const SeqId seq = cache->new_sequence();
  const auto run_out = [&] {
    ThreadPool one(1);
    View k = tokens.k_view(0, 64), v = tokens.v_view(0, 64);
    k.token_stride = v.token_stride = 0;     // one token again and again
    k.tokens = v.tokens = int64_t{1} << 17;  // 107 MB, the 16-bit form of every page among them
    leave_memory(48 * 1024 * kKiB);
    const auto reserved = [&] {
      const CacheState& s = cache->state();
      return s.fp4.reserved_bytes() + s.residual.reserved_bytes() + s.high.reserved_bytes() +
             s.summary.reserved_bytes();
    };
    bool good = cache->append(seq, 0, k, v, one).code() == Code::out_of_memory;
    good = good && reserved() == 0 && cache->length(seq) == 0;
    k.tokens = v.tokens = int64_t{1} << 15;  // what came back serves fewer
    good = good && cache->append(seq, 0, k, v, one).ok();
    std::_Exit(good ? 0 : 1);
  };
  EXPECT_EXIT(run_out(), ::testing::ExitedWithCode(0), "");
}

TEST_F(Memory, ThatEndsWithTheDetailsOfACallIsAnError) {
  const Shape shape{4, 2, 16, 16};
  const Tokens tokens = attention_like(shape, 64 * 5);
  auto cache = KvCache::create(CacheConfig::for_method(method("thrift"), 1, shape.h_kv, shape.d, shape.d_v));
  ASSERT_TRUE(cache.ok());
  const SeqId seq = cache->new_sequence();
  ThreadPool one(1);
  ASSERT_OK(cache->append(seq, 0, tokens.k_view(0, tokens.s), tokens.v_view(0, tokens.s), one));
  for (const Phase phase : {Phase::prefill, Phase::decode}) {
    const int64_t rows = phase == Phase::prefill ? tokens.s : 1;
    Problem p;
    p.phase = phase;
    p.max_s_q = rows;
    p.max_s_kv = int64_t{1} << 22;  // masses of 512 KiB a KV head
    p.h_q = shape.h_q;
    p.h_kv = shape.h_kv;
    p.d = shape.d;
    p.d_v = shape.d_v;
    p.method = method("thrift");
    p.cache = cache->config();
    p.stats = true;
    bool refused = false, served = false;
    for (const int64_t left :
         {0, 512, 1280, 1792, 2560, 1 << 20}) {  // at the call's own sums, in a task of it, nowhere
      const auto run_out = [&] {
        const auto planned = plan(p, Machine::here(2));
        auto workspace = Workspace::create(*planned);
        ThreadPool threads(2);
        std::vector<float> out(static_cast<size_t>(rows * shape.h_q * shape.d_v));
        Stats stats;
        AttendArgs args;
        args.cache = &*cache;
        args.seqs = {&seq, 1};
        args.s_q = {&rows, 1};
        args.q = tokens.q_view(tokens.s - rows, rows);
        args.out = mutable_view(out.data(), rows, shape.h_q, shape.d_v);
        args.stats = &stats;
        leave_memory(left * kKiB);
        const Status status = run(*planned, *workspace, threads, args);
        std::_Exit(status.ok() ? 10 : status.code() == Code::out_of_memory ? 11 : 1);
      };
      const auto ended = [&](int how) {
        served |= WIFEXITED(how) && WEXITSTATUS(how) == 10;
        refused |= WIFEXITED(how) && WEXITSTATUS(how) == 11;
        return WIFEXITED(how) && (WEXITSTATUS(how) == 10 || WEXITSTATUS(how) == 11);
      };
      EXPECT_EXIT(run_out(), ended, "") << left << " KiB";
    }
    EXPECT_TRUE(served && refused) << "else nothing was tried";
  }
}

#endif

}  // namespace
}  // namespace thriftattn::testing
