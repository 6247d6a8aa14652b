#include "model/nll.h"

#include <algorithm>
#include <limits>

#include "model/layers.h"

namespace thriftattn::model {

void nll(const float* logits, int64_t vocab, std::span<const int32_t> targets, std::span<float> losses,
         ThreadPool& pool) {
  constexpr int64_t kRowsPerTask = 16;
  const int64_t rows = std::ssize(targets);
  pool.parallel_for((rows + kRowsPerTask - 1) / kRowsPerTask, [&](int64_t task, int) {
    for (int64_t i = task * kRowsPerTask; i < std::min(rows, (task + 1) * kRowsPerTask); ++i) {
      const float* row = logits + i * vocab;
      losses[i] = log_sum_exp(row, vocab) - row[targets[i]];
    }
  });
}

Best best(const float* logits, int64_t vocab) {
  constexpr float kLowest = -std::numeric_limits<float>::infinity();
  int32_t first = 0;
  float second = kLowest;
  for (int64_t i = 1; i < vocab; ++i) {
    if (logits[i] > logits[first]) {
      second = logits[first];
      first = static_cast<int32_t>(i);
    } else if (logits[i] > second) {
      second = logits[i];
    }
  }
  return {first, vocab > 1 ? logits[first] - second : 0};
}

}  // namespace thriftattn::model
