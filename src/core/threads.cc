#include "thriftattn/threads.h"

#include <sched.h>

#include <algorithm>
#include <atomic>
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
  uint64_t generation = 0;  // counts the parallel_for calls, so that a worker joins each once
  int busy = 0;             // workers that have not finished the current call
  bool stopping = false;

  void drain(int worker) {
    for (int64_t i = next.fetch_add(1); i < count; i = next.fetch_add(1)) call(task, i, worker);
  }

  void work(int worker) {
    uint64_t seen = 0;
    for (;;) {
      {
        std::unique_lock lock(mutex);
        start.wait(lock, [&] { return stopping || generation != seen; });
        if (stopping) return;
        seen = generation;
      }
      drain(worker);
      std::lock_guard lock(mutex);
      if (--busy == 0) done.notify_one();
    }
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
    s.busy = static_cast<int>(s.workers.size());
    ++s.generation;
  }
  s.start.notify_all();
  s.drain(0);
  std::unique_lock lock(s.mutex);
  s.done.wait(lock, [&] { return s.busy == 0; });
}

}  // namespace thriftattn
