#include "thriftattn/threads.h"

#include <gtest/gtest.h>

#include <array>
#include <atomic>
#include <chrono>
#include <memory>
#include <thread>
#include <vector>

namespace thriftattn {
namespace {

// Many short calls and a few that outlast every wait, so that threads are found watching and asleep.
class Threads : public ::testing::TestWithParam<bool> {};

TEST_P(Threads, DoEveryTaskOnceAndReturnWhenAllAreDone) {
  ThreadPool pool(3);
  ASSERT_EQ(pool.size(), 3);
  const auto watch = GetParam() ? std::make_unique<ThreadPool::Watch>(pool) : nullptr;
  for (int call = 0; call < 2000; ++call) {
    const int64_t count = call % 7;
    std::vector<std::atomic<int>> done(7);
    pool.parallel_for(count, [&](int64_t i, int worker) {
      ASSERT_LT(worker, 3);
      if (call % 500 == 3 && i == count - 1) std::this_thread::sleep_for(std::chrono::milliseconds(3));
      ++done[i];
    });
    for (int64_t i = 0; i < 7; ++i) ASSERT_EQ(done[i], i < count ? 1 : 0) << "call " << call << ", task " << i;
    if (call % 400 == 5) std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
}

// Far more threads than processors and tasks of nothing: most workers come when the call that woke them has returned
// and another one, with another task, is open or shut.
TEST_P(Threads, WhoComesLateTakesNoTaskOfAnotherCall) {
  static constexpr int kThreads = 16;
  ThreadPool pool(kThreads);
  const auto watch = GetParam() ? std::make_unique<ThreadPool::Watch>(pool) : nullptr;
  for (int call = 0; call < 3000; ++call) {
    const int64_t count = 2 + call % 3;
    std::array<std::atomic<int>, 4> done = {};
    pool.parallel_for(count, [&done, call](int64_t i, int worker) {
      ASSERT_LT(worker, kThreads);
      done[i] += 1 + call;
    });
    for (int64_t i = 0; i < 4; ++i) ASSERT_EQ(done[i], i < count ? 1 + call : 0) << "call " << call << ", task " << i;
    if (call % 100 == 7) std::this_thread::sleep_for(std::chrono::microseconds(200));
  }
}

INSTANTIATE_TEST_SUITE_P(Pool, Threads, ::testing::Bool(),
                         [](const auto& watched) { return watched.param ? "Watched" : "Plain"; });

}  // namespace
}  // namespace thriftattn
