// What stands between Python and the library: one pool of threads for the process, and a cache that plans its own
// calls. Python's lock is given up while the library works; calls of several Python threads then take turns, because
// each of them uses all threads of the pool.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>
#include <list>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "tensors.h"
#include "thriftattn/attention.h"

namespace thriftattn::python {

// While one lives, Python's lock is given up and the pool and all caches are this thread's.
class Turn {
 public:
  Turn();
  ~Turn();
  ThreadPool& pool();

 private:
  nb::gil_scoped_release released_;
};

// work(ThreadPool&) in a turn: it touches nothing of Python and raises nothing.
template <class Work>
auto in_turn(const Work& work) {
  Turn turn;
  return work(turn.pool());
}

void set_threads(int threads);  // of the pool; 0 = the processors that this process may use
int threads();

// How the rows of a call see the keys, and how it computes: the fields of Problem that do not follow from tensors.
struct Form {
  Phase phase = Phase::prefill;
  bool causal = true;
  int64_t window = 0;
  float sm_scale = 0;
  float softcap = 0;
  DType compute = DType::f32;
};

// What a call brings beside q, and what it wants.
struct Extras {
  nb::handle sinks;                  // None or [h_q]
  const Selection* given = nullptr;  // promote exactly these
  nb::handle out;                    // None or [b, s_q, h_q, d_v]
  bool return_lse = false;
  bool stats = false;
};

// What a call did, and the shape of its page_mass.
struct CallStats : Stats {
  int64_t b = 0, h_kv = 0, pages = 0;
};

// A KvCache and the plans of the calls that it has served.
class Cache {
 public:
  Cache(const Method& method, const CacheConfig& config);

  const Method& method() const { return method_; }
  KvCache& store() { return store_; }
  const KvCache& store() const { return store_; }

  std::vector<SeqId> new_sequences(int64_t count);
  void append(std::span<const SeqId> seqs, int layer, nb::handle k, nb::handle v);
  void settle(std::span<const SeqId> seqs, int layer);
  // out, or (out, lse), (out, stats), (out, lse, stats). Settles the layer.
  nb::object attend(std::span<const SeqId> seqs, int layer, const Form& form, const Method& method, nb::handle q,
                    const Extras& extras);
  Selection select(std::span<const SeqId> seqs, int layer, const Form& form, const Method& method, nb::handle q);

 private:
  struct Prepared {
    Problem problem;
    Plan plan;
    Workspace workspace;
  };
  // The plan of a call and scratch memory for it, kept for the next call of the same form. These two run in a Turn.
  Result<Prepared*> prepare(Problem problem, int threads);
  Problem problem(const Form& form, const Method& method, const Batch& q, std::span<const SeqId> seqs, int layer) const;

  Method method_;
  KvCache store_;
  std::list<Prepared> prepared_;  // the latest first
};

}  // namespace thriftattn::python
