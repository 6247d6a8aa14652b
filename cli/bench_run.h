// One row of a bench: a method over sequences of one length, filled, checked against the definition, then timed.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "bench_inputs.h"
#include "commands.h"
#include "progress.h"
#include "rates.h"
#include "thriftattn/attention.h"

namespace thriftattn::cli {

// What all rows of a run share.
struct Bench {
  const BenchOptions& options;
  Machine machine;
  ThreadPool* pool;
  Progress* progress;
  Inputs inputs;
  int64_t last_level = 0;            // bytes of the last-level cache; 0 = unknown
  std::optional<Eviction> eviction;  // made by the first row that needs it

  // What the caches that a row rotates over must hold together, so that no repetition finds them in a cache.
  double cold_bytes() const { return 4.0 * static_cast<double>(last_level); }
  Status evict();
};

struct Timing {
  int64_t s_q = 0, s_kv = 0;
  std::string method, target;
  std::vector<double> by_round;            // median of each round, milliseconds
  double median = 0, least = 0, most = 0;  // of all rounds, milliseconds
  double fresh = 0;                        // phase append: median on memory that the system has just given
  double bytes = 0, flops = 0;             // of the problem, whatever the kernel does
  double rel_err = 0;
  int layers = 1;     // copies of the cache that were rotated over
  bool cold = false;  // together beyond four times the last-level cache
};

class BenchRow {
 public:
  // Plans; an unsupported problem is an error here, before anything is filled.
  static Result<BenchRow> create(Bench* bench, const Method& method, int64_t s_kv);

  double cache_bytes() const { return layer_bytes_ * config_.layers; }  // what filling will take, about

  // Fills the caches and, the first time, checks the result; nothing where they are filled.
  Status prepare();
  // One round of --reps repetitions; in phase append one cache filled from nothing, freed and filled again.
  Status measure();
  // Gives the memory back; prepare() fills again.
  void release();

  Timing timing() const;

 private:
  BenchRow(Bench* bench, Method method) : bench_(bench), method_(std::move(method)) {}
  Status fill(std::vector<double>* times);
  Status check();
  Status check_appended();
  void count(const Selection& selection, const MemoryUse& use);
  AttendArgs args();
  bool is(const char* phase) const { return bench_->options.phase == phase; }
  int64_t query_blocks() const;

  Bench* bench_;
  Method method_;
  CacheConfig config_;
  std::optional<Plan> plan_;
  double layer_bytes_ = 0;  // stored by one layer of all sequences, about
  Timing row_;
  std::vector<double> times_, fresh_times_;
  bool checked_ = false;
  bool evict_ = false;  // a rotation reads less than what makes it cold, however much is stored
  int64_t turn_ = 0;    // repetitions so far: each reads the next layer

  std::optional<KvCache> cache_;
  std::optional<Workspace> workspace_;
  std::vector<SeqId> seqs_;
  std::vector<int64_t> s_q_;
  std::vector<float> q_, out_;
};

}  // namespace thriftattn::cli
