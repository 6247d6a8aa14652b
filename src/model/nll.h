// How well rows of logits predict tokens.
#pragma once

#include <cstdint>
#include <span>

#include "thriftattn/threads.h"

namespace thriftattn::model {

// losses[i] = log(sum_j exp(logits[i][j])) - logits[i][targets[i]], in nats. logits: [targets.size(), vocab]; every
// target in [0, vocab); losses.size() == targets.size().
void nll(const float* logits, int64_t vocab, std::span<const int32_t> targets, std::span<float> losses,
         ThreadPool& pool);

// The most likely token of one row, the lowest of equals, and by how much it leads the second (0 where vocab is 1).
struct Best {
  int32_t token = 0;
  float lead = 0;
};
Best best(const float* logits, int64_t vocab);

inline int32_t argmax(const float* logits, int64_t vocab) { return best(logits, vocab).token; }

}  // namespace thriftattn::model
