#include "turn.h"

#include <fmt/format.h>
#include <pthread.h>

#include <memory>
#include <mutex>

namespace thriftattn::python {
namespace {

// The pool is made by the first call that needs it. A forked child has the memory of its parent's pool and none of its
// threads: it leaves that pool where it is and makes one of its own.
struct Shared {
  std::mutex mutex;
  std::unique_ptr<ThreadPool> pool;
  int threads = 0;

  Shared() {
    pthread_atfork([] { shared().mutex.lock(); }, [] { shared().mutex.unlock(); },
                   [] {
                     static_cast<void>(shared().pool.release());
                     shared().mutex.unlock();
                   });
  }
  static Shared& shared() {
    static Shared* one = new Shared;  // never destroyed: threads of Python may outlive static objects
    return *one;
  }
};

}  // namespace

Turn::Turn() { Shared::shared().mutex.lock(); }
Turn::~Turn() { Shared::shared().mutex.unlock(); }

ThreadPool& pool() {
  Shared& s = Shared::shared();
  if (!s.pool) s.pool = std::make_unique<ThreadPool>(s.threads);
  return *s.pool;
}

void set_threads(int threads) {
  if (threads < 0 || threads > 1024)
    throw nb::value_error(fmt::format("{} threads are not supported: 0 to 1024 are", threads).c_str());
  in_turn([&] {
    Shared& s = Shared::shared();
    s.threads = threads;
    s.pool = nullptr;
  });
}

int threads() {
  return in_turn([] { return pool().size(); });
}

}  // namespace thriftattn::python
