// One row of a bench: a method over sequences of one length, filled, checked against the definition, then timed.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "bench_problem.h"
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

class BenchRow {
 public:
  // Plans; an unsupported problem is an error here, before anything is filled.
  static Result<BenchRow> create(Bench* bench, const Method& method, int64_t s_kv);

  double cache_bytes() const { return layer_bytes_ * layers(); }  // what filling will take, about

  // Fills the caches, checks the result the first time, and reads them once; nothing where they are filled.
  Status prepare();
  // One round of --reps repetitions; in phase append one cache filled from nothing, freed and filled again.
  Status measure();
  // Gives the memory back; prepare() fills again.
  void release();

  Timing timing() const;

 private:
  BenchRow(Bench* bench, BenchProblem problem) : bench_(bench), problem_(std::move(problem)) {}
  Status fill(std::vector<double>* times);
  Status check();
  Status check_appended();
  AttendArgs args();
  bool is(const char* phase) const { return problem_.is(phase); }
  int layers() const { return problem_.problem.cache.layers; }
  Timing& row() { return problem_.row; }

  Bench* bench_;
  BenchProblem problem_;
  std::optional<Plan> plan_;
  double layer_bytes_ = 0;  // stored by one layer of all sequences, about
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
