#include "model/sampling.h"

#include <algorithm>
#include <cmath>

#include "model/nll.h"

namespace thriftattn::model {

Sampler::Sampler(double temperature, double top_p, uint64_t seed)
    : temperature_(temperature), top_p_(top_p), generator_(seed) {}

int32_t Sampler::pick(const float* logits, int64_t vocab) {
  if (temperature_ <= 0) return argmax(logits, vocab);
  ranked_.resize(vocab);
  for (int64_t i = 0; i < vocab; ++i) ranked_[i] = {logits[i], static_cast<int32_t>(i)};
  std::sort(ranked_.begin(), ranked_.end(),
            [](const auto& a, const auto& b) { return a.first != b.first ? a.first > b.first : a.second < b.second; });
  const auto weight = [&](int64_t i) {  // proportional to the probability
    return std::exp((static_cast<double>(ranked_[i].first) - ranked_[0].first) / temperature_);
  };
  double total = 0, kept = 0;
  for (int64_t i = 0; i < vocab; ++i) total += weight(i);
  int64_t count = 0;
  while (count < vocab && (count == 0 || kept < top_p_ * total)) kept += weight(count++);
  // 53 random bits as they come: std::uniform_real_distribution differs between standard libraries.
  double left = static_cast<double>(generator_() >> 11) * 0x1p-53 * kept;
  for (int64_t i = 0; i < count; ++i) {
    if ((left -= weight(i)) < 0) return ranked_[i].second;
  }
  return ranked_[count - 1].second;
}

}  // namespace thriftattn::model
