// One pool of threads for the process, and the lock by which calls take turns: Python's lock is given up while the
// library works, and calls of several Python threads then follow one another, because each of them uses all threads of
// the pool, or queues its work on a GPU in a moment.
#pragma once

#include <nanobind/nanobind.h>

#include "thriftattn/threads.h"

namespace thriftattn::python {

namespace nb = nanobind;

// While one lives, Python's lock is given up and the pool and all caches are this thread's.
class Turn {
 public:
  Turn();
  ~Turn();

 private:
  nb::gil_scoped_release released_;
};

// work() in a turn: it touches nothing of Python and raises nothing.
template <class Work>
auto in_turn(const Work& work) {
  Turn turn;
  return work();
}

ThreadPool& pool();  // only in a turn

void set_threads(int threads);  // of the pool; 0 = the processors that this process may use
int threads();

}  // namespace thriftattn::python
