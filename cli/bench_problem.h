// One row of a bench as a problem, whatever measures it: its shape, whether a result agrees with the definition, and
// the bytes and operations that it takes.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "bench_inputs.h"
#include "commands.h"
#include "thriftattn/attention.h"

namespace thriftattn::cli {

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

double median(std::vector<double> values);

class BenchProblem {
 public:
  BenchProblem(const BenchOptions* options, const Method& method, int64_t s_kv);

  Timing row;
  Problem problem;  // of a cache of one layer and with the method as asked, until a plan and its measurer say more

  bool is(const char* phase) const { return options_->phase == phase; }
  // Query blocks of one sequence and head: in prefill 64 rows at absolute positions, a decode step is one.
  int64_t query_blocks() const;

  // Compares sampled rows of out [b * s_q, h_q, d] with the definition: sets row.rel_err, and refuses what is wrong.
  Status check(const Inputs& inputs, ThreadPool* pool, std::span<const float> q, std::span<const float> out,
               const Selection& selection);
  // Sets row.bytes and row.flops. `use` is of all layers; q and out have elements of io_bytes.
  void count(const Selection& selection, const MemoryUse& use, int io_bytes);

 private:
  const BenchOptions* options_;
};

}  // namespace thriftattn::cli
