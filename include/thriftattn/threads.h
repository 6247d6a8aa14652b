// A fixed set of threads that runs independent tasks. Results never depend on how many threads there are.
#pragma once

#include <cstdint>
#include <memory>

#include "thriftattn/export.h"

namespace thriftattn {

class THRIFTATTN_API ThreadPool {
 public:
  // `threads` workers including the caller; 0 = the processors this process may use. Where the system grants fewer
  // threads, size() says how many.
  explicit ThreadPool(int threads = 0);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const;

  // While one lives, threads of the pool that wait for one another do so awake for up to half a millisecond: to be
  // woken takes a good part of what a decode step has between two calls.
  class THRIFTATTN_API Watch {
   public:
    explicit Watch(ThreadPool& pool);
    ~Watch();
    Watch(const Watch&) = delete;
    Watch& operator=(const Watch&) = delete;

   private:
    ThreadPool& pool_;
  };

  // Calls task(i, worker) for every i in [0, count), lower i first, on all workers; worker < size(). Returns when all
  // are done. One parallel_for at a time per pool; not reentrant. Allocates nothing; task must not throw.
  template <class Task>
  void parallel_for(int64_t count, const Task& task) {
    run(count, &task, [](const void* t, int64_t i, int worker) { (*static_cast<const Task*>(t))(i, worker); });
  }

 private:
  using Call = void (*)(const void* task, int64_t i, int worker);
  void run(int64_t count, const void* task, Call call);

  struct Shared;
  std::unique_ptr<Shared> shared_;
};

}  // namespace thriftattn
