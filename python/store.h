// What a KvCache of Python stands on: the sequences of one cache, in the CPU's memory (cpu_store.cc) or on a GPU
// (gpu_store.cc), which plans the calls that it serves. All of it is called in a Turn and touches nothing of Python.
#pragma once

#include <cstdint>
#include <list>
#include <memory>
#include <span>
#include <string>
#include <string_view>

#include "tensors.h"
#include "thriftattn/attention.h"
#include "thriftattn/cuda.h"

namespace thriftattn::python {

// How the rows of a call see the keys, and how it computes: the fields of Problem that do not follow from tensors.
struct Form {
  Phase phase = Phase::prefill;
  bool causal = true;
  int64_t window = 0;
  float sm_scale = 0;
  float softcap = 0;
  DType compute = DType::f32;
};

// One call of attention. Addresses are of the store's device.
struct Call {
  std::span<const SeqId> seqs;  // [b]
  int layer = 0;
  Form form;
  Method method;
  Sequences q;                       // [b, s_q, h_q, d]
  MutableView out;                   // [b * s_q, h_q, d_v]
  float* lse = nullptr;              // [b * s_q, h_q] or null
  const float* sinks = nullptr;      // [h_q] or null
  const Selection* given = nullptr;  // promote exactly these
  Stats* stats = nullptr;            // may be null
};

class Store {
 public:
  virtual ~Store() = default;
  virtual const CacheConfig& config() const = 0;

  virtual Result<SeqId> new_sequence() = 0;
  virtual Status append(std::span<const SeqId> seqs, int layer, const Sequences& k, const Sequences& v) = 0;
  virtual Status settle(std::span<const SeqId> seqs, int layer) = 0;
  // Settles the layer.
  virtual Status attend(const Call& call) = 0;
  // What attend() would promote; it may write to `out`.
  virtual Result<Selection> select(const Call& call) = 0;
  virtual Result<SeqId> fork(SeqId seq) = 0;
  virtual Status truncate(SeqId seq, int64_t length, bool lossy) = 0;
  virtual Status free(SeqId seq) = 0;
  // Tokens that one layer holds / all layers hold; -1 for an unknown sequence.
  virtual int64_t length(SeqId seq, int layer) const = 0;
  virtual int64_t length(SeqId seq) const = 0;
  // To memory of the CPU.
  virtual Status read(SeqId seq, int layer, int64_t first, const MutableView& k, const MutableView& v) = 0;
  virtual Status save(SeqId seq, const std::string& path, std::string_view metadata) = 0;
  virtual Result<SeqId> load(const std::string& path, std::string* metadata) = 0;

  virtual MemoryUse bytes() const = 0;
  virtual int64_t peak_bytes() const = 0;
  virtual int64_t reserved_bytes() const = 0;  // on a GPU scratch memory too

  // The stream of all calls from now on. One that has changed waits for the work on the last.
  virtual Status order_on(cuda::Stream) { return {}; }
  virtual Status wait() { return {}; }  // until the device is done
  // Waits. Not ok where what was appended since the last time was not finite, which append() itself finds on the CPU.
  virtual Status check_appended() { return {}; }
};

// What a cache on a GPU begins with; 0 = little. It grows when more is needed, for which it needs the memory of both.
struct Room {
  int sequences = 0;
  int64_t tokens = 0;  // of one sequence
  int64_t step = 0;    // tokens of one sequence in one step
};

Result<std::unique_ptr<Store>> make_cpu_store(const CacheConfig& config);
Result<std::unique_ptr<Store>> make_gpu_store(const CacheConfig& config, Machine machine, const Room& room);

// The problem of a call over sequences of at most max_s_kv tokens, b of them at once. Sizes of rows are rounded up, so
// that calls that differ a little share a plan.
Problem problem_of(const CacheConfig& config, const Call& call, int64_t b, int64_t max_s_kv);

int64_t power_of_two(int64_t floor, int64_t n);  // the least that is not below either

// Plans and what their calls need, the latest first; the eldest is dropped where there are more than `kept`.
template <class Workspace>
struct Prepared {
  Problem problem;
  Plan plan;
  Workspace workspace;
};
template <class Workspace, class Make>
Result<Prepared<Workspace>*> find_or_make(std::list<Prepared<Workspace>>& all, size_t kept, int threads,
                                          Problem problem, const Machine& machine, const Make& make) {
  for (auto it = all.begin(); it != all.end(); ++it)
    if (it->plan.threads == threads && it->problem == problem) {
      all.splice(all.begin(), all, it);
      return &all.front();
    }
  THRIFTATTN_ASSIGN_OR_RETURN(chosen, plan(problem, machine));
  THRIFTATTN_ASSIGN_OR_RETURN(workspace, make(chosen));
  all.push_front({std::move(problem), std::move(chosen), std::move(workspace)});
  if (all.size() > kept) all.pop_back();
  return &all.front();
}

}  // namespace thriftattn::python
