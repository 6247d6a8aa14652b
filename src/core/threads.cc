#include "thriftattn/threads.h"

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace thriftattn {

struct ThreadPool::Shared {
  std::vector<std::thread> workers;
  std::mutex mutex;
  std::condition_variable start, done;
  const void* task = nullptr;
  Call call = nullptr;
  int64_t count = 0;
  std::atomic<int64_t> next{0};
  std::atomic<uint64_t> generation{0};  // counts the parallel_for calls, so that a worker joins each once at most
  // Workers in the current call, less kShut while none is open. A call does not wait for those that were still asleep:
  // who comes when it is shut leaves again.
  std::atomic<int> inside{-kShut};
  std::atomic<bool> stopping{false};
  std::atomic<int> watches{0};  // Watch objects that live

  static constexpr int kShut = 1 << 30;
  static constexpr std::chrono::microseconds kWatch{500};

  void drain(int worker) {
    for (int64_t i = next.fetch_add(1); i < count; i = next.fetch_add(1)) call(task, i, worker);
  }

  void work(int worker) {
    for (uint64_t seen = 0;;) {
      const auto called = [&] { return generation.load(std::memory_order_acquire) != seen || stopping.load(); };
      if (!spin_until(called)) {
        std::unique_lock lock(mutex);
        start.wait(lock, called);
      }
      if (stopping) return;
      seen = generation.load(std::memory_order_acquire);
      if (inside.fetch_add(1, std::memory_order_acq_rel) >= 0) drain(worker);
      if (inside.fetch_sub(1, std::memory_order_acq_rel) > 1 - kShut) continue;
      std::lock_guard lock(mutex);  // the caller is either before its check of `inside` or waits already
      done.notify_one();
    }
  }

  // One call follows another within microseconds in a decode step, and going to sleep and being woken costs tens of
  // them: watch for a while first. False where nothing happened.
  template <class Condition>
  bool spin_until(const Condition& condition) const {
    for (int i = 0; i < 1000; ++i) {
      if (condition()) return true;
      pause();
    }
    // Whoever needs the processor meanwhile gets it sooner from a thread that sleeps than from one that yields.
    const auto end = std::chrono::steady_clock::now() + kWatch;
    while (watches.load(std::memory_order_relaxed) > 0 && std::chrono::steady_clock::now() < end)
      for (int i = 0; i < 100; ++i) {
        if (condition()) return true;
        pause();
      }
    return false;
  }

  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("isb");
#endif
  }
};

namespace {

int usable_processors() {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return std::max(1, CPU_COUNT(&set));
  return std::max(1u, std::thread::hardware_concurrency());
}

}  // namespace

ThreadPool::ThreadPool(int threads) : shared_(std::make_unique<Shared>()) {
  const int n = threads > 0 ? threads : usable_processors();
  try {
    for (int w = 1; w < n; ++w) shared_->workers.emplace_back([s = shared_.get(), w] { s->work(w); });
  } catch (const std::exception&) {
    // The system grants no more threads: those that run must not be lost with the exception.
  }
}

ThreadPool::~ThreadPool() {
  {
    std::lock_guard lock(shared_->mutex);
    shared_->stopping = true;
  }
  shared_->start.notify_all();
  for (std::thread& t : shared_->workers) t.join();
}

ThreadPool::Watch::Watch(ThreadPool& pool) : pool_(pool) { ++pool_.shared_->watches; }
ThreadPool::Watch::~Watch() { --pool_.shared_->watches; }

int ThreadPool::size() const { return static_cast<int>(shared_->workers.size()) + 1; }

void ThreadPool::run(int64_t count, const void* task, Call call) {
  Shared& s = *shared_;
  if (count <= 1 || s.workers.empty()) {  // waking a worker costs more than a single task gains
    for (int64_t i = 0; i < count; ++i) call(task, i, 0);
    return;
  }
  {
    std::lock_guard lock(s.mutex);
    s.task = task;
    s.call = call;
    s.count = count;
    s.next.store(0);
    s.inside.fetch_add(Shared::kShut, std::memory_order_release);
    s.generation.fetch_add(1, std::memory_order_release);
  }
  s.start.notify_all();
  s.drain(0);
  s.inside.fetch_sub(Shared::kShut, std::memory_order_acq_rel);
  const auto finished = [&] { return s.inside.load(std::memory_order_acquire) == -Shared::kShut; };
  if (s.spin_until(finished)) return;
  std::unique_lock lock(s.mutex);
  s.done.wait(lock, finished);
}

}  // namespace thriftattn
