// Picks the next token from a row of logits.
#pragma once

#include <cstdint>
#include <random>
#include <utility>
#include <vector>

namespace thriftattn::model {

class Sampler {
 public:
  // temperature 0 = greedy; otherwise logits are divided by it and a token is drawn from the fewest most likely ones
  // whose probabilities sum to at least top_p in (0, 1]. The same seed draws the same tokens on every machine.
  Sampler(double temperature, double top_p, uint64_t seed);

  // logits: [vocab].
  int32_t pick(const float* logits, int64_t vocab);

 private:
  double temperature_, top_p_;
  std::mt19937_64 generator_;
  std::vector<std::pair<float, int32_t>> ranked_;  // (logit, token)
};

}  // namespace thriftattn::model
