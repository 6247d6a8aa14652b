#include "model/experts.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "model/layers.h"

namespace thriftattn::model {
namespace {

constexpr int64_t kRowGrain = 16;  // a matrix product compiles itself for every number of rows: there must be few

// A token that an expert serves, and how much of it.
struct Share {
  int64_t row;
  float weight;
};

// The experts of every row: [experts], rows ascending.
std::vector<std::vector<Share>> route(const std::vector<float>& scores, int64_t rows, int experts, int chosen) {
  std::vector<std::vector<Share>> served(experts);
  std::vector<int> order(experts);
  for (int64_t row = 0; row < rows; ++row) {
    const float* score = &scores[row * experts];
    std::iota(order.begin(), order.end(), 0);
    std::partial_sort(order.begin(), order.begin() + chosen, order.end(),
                      [&](int a, int b) { return score[a] > score[b] || (score[a] == score[b] && a < b); });
    float sum = 0;
    for (int i = 0; i < chosen; ++i) sum += std::exp(score[order[i]] - score[order[0]]);
    for (int i = 0; i < chosen; ++i) {
      served[order[i]].push_back({row, std::exp(score[order[i]] - score[order[0]]) / sum});
    }
  }
  return served;
}

}  // namespace

Status apply(const Experts& experts, const ModelConfig& c, const float* x, int64_t rows, float* y, ThreadPool& pool) {
  std::vector<float> scores(rows * c.experts);
  THRIFTATTN_RETURN_IF_ERROR(experts.router.apply(x, rows, scores.data(), pool));
  const auto served = route(scores, rows, c.experts, c.experts_per_token);
  const int64_t hidden = c.hidden;
  std::fill_n(y, rows * hidden, 0.0f);
  std::vector<float> in, gate_up, activated, out;
  for (int e = 0; e < c.experts; ++e) {
    const int64_t count = std::ssize(served[e]);
    if (count == 0) continue;
    const int64_t n = count < kRowGrain ? count : (count + kRowGrain - 1) / kRowGrain * kRowGrain;
    in.resize(n * hidden);  // the rows beyond `count` are whatever they were
    out.resize(n * hidden);
    gate_up.resize(n * 2 * c.intermediate);
    activated.resize(n * c.intermediate);
    for (int64_t i = 0; i < count; ++i) std::copy_n(x + served[e][i].row * hidden, hidden, &in[i * hidden]);
    THRIFTATTN_RETURN_IF_ERROR(experts.all[e].gate_up.apply(in.data(), n, gate_up.data(), pool));
    clamped_swiglu(gate_up.data(), n, c.intermediate, c.swiglu_limit, c.swiglu_alpha, activated.data(), pool);
    THRIFTATTN_RETURN_IF_ERROR(experts.all[e].down.apply(activated.data(), n, out.data(), pool));
    for (int64_t i = 0; i < count; ++i) {
      float* to = y + served[e][i].row * hidden;
      for (int64_t j = 0; j < hidden; ++j) to[j] += served[e][i].weight * out[i * hidden + j];
    }
  }
  return {};
}

}  // namespace thriftattn::model
