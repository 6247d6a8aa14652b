// What the machine gives to code that does one thing alone: reading memory, multiplying matrices. Shares of these are
// what a bench reports, so they are measured in its run, and more than once: machines have slow and fast phases.
#pragma once

#include <cstdint>
#include <vector>

#include "model/model.h"
#include "thriftattn/status.h"
#include "thriftattn/threads.h"

namespace thriftattn::cli {

// Bytes per second that all threads read in wide loads from a buffer of `bytes` in huge pages, in GB/s: the best of
// several passes.
Result<double> read_rate(ThreadPool* pool, int64_t bytes);

// GFLOP/s of oneDNN's product in `compute`: what this processor's units for it give to well-made code. Best of several.
Result<double> matrix_rate(ThreadPool* pool, model::Compute compute);

// Reads `bytes` that nothing else uses, so that no cache holds what was there before.
class Eviction {
 public:
  static Result<Eviction> create(ThreadPool* pool, int64_t bytes);
  void run();

 private:
  ThreadPool* pool_ = nullptr;
  std::vector<uint64_t> buffer_;
};

// Both rates, measured every now and then of a run.
class Rates {
 public:
  Rates(ThreadPool* pool, model::Compute compute);
  Status measure();  // one sample more of each

  int64_t read_bytes() const { return read_bytes_; }  // of the buffer that is read
  const std::vector<double>& read() const { return read_; }
  const std::vector<double>& matrix() const { return matrix_; }

 private:
  ThreadPool* pool_;
  model::Compute compute_;
  int64_t read_bytes_;
  std::vector<double> read_, matrix_;
};

}  // namespace thriftattn::cli
