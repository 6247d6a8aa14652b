#include "bench_inputs.h"

#include <algorithm>
#include <cmath>

namespace thriftattn::cli {
Inputs::Inputs(int h_q, int h_kv, int d) : h_q_(h_q), h_kv_(h_kv), d_(d), table_(InputRule::kOffsets + d) {
  for (size_t i = 0; i < table_.size(); ++i) {
    const uint64_t state = InputRule::mix(i);
    int sum = 0;  // of four uniform 16-bit numbers
    for (int k = 0; k < 4; ++k) sum += static_cast<int16_t>(state >> (16 * k));
    table_[i] = static_cast<float>(sum) / (37837.0f * std::sqrt(2.0f));
  }
}

void Inputs::noise(Input what, int64_t seq, int64_t token, int64_t head, float* out) const {
  const uint64_t key = InputRule::key_of(static_cast<uint64_t>(what), seq, token, head);
  for (int c = 0; c < d_; ++c) out[c] = InputRule::noise(table_.data(), key, c);
}

void Inputs::row(Input what, int64_t seq, int64_t token, int64_t head, float* out) const {
  noise(what, seq, token, head, out);
  if (what == Input::key) {
    for (int c = 0; c < d_; ++c) out[c] += InputRule::of_key(token, c, d_);
  }
  if (what == Input::query) {
    const int64_t target =
        static_cast<int64_t>(InputRule::key_of(7, seq, token, head) % static_cast<uint64_t>(token + 1));
    std::vector<float> key(d_);
    noise(Input::key, seq, target, head / (h_q_ / h_kv_), key.data());  // not to the outlier, which all keys share
    for (int c = 0; c < d_; ++c) out[c] += key[c];
    out[0] += 6;
  }
}

void Inputs::rows(Input what, int64_t seq, int64_t first, int64_t tokens, ThreadPool* pool,
                  std::vector<float>* out) const {
  const int64_t heads = what == Input::query ? h_q_ : h_kv_, step = 64;
  out->resize(tokens * heads * d_);
  pool->parallel_for((tokens + step - 1) / step, [&](int64_t i, int) {
    for (int64_t t = i * step; t < std::min(tokens, (i + 1) * step); ++t) {
      for (int64_t h = 0; h < heads; ++h) row(what, seq, first + t, h, &(*out)[(t * heads + h) * d_]);
    }
  });
}

Inputs::Row Inputs::attention(const float* q, int64_t seq, int64_t visible, int head,
                              const std::function<bool(int64_t)>& reads) const {
  const int64_t kv_head = head / (h_q_ / h_kv_);
  std::vector<float> row_of(d_);
  std::vector<double> scores(visible);
  for (int64_t t = 0; t < visible; ++t) {
    row(Input::key, seq, t, kv_head, row_of.data());
    double dot = 0;
    for (int c = 0; c < d_; ++c) dot += static_cast<double>(q[c]) * row_of[c];
    scores[t] = dot / std::sqrt(static_cast<double>(d_));
  }
  const double largest = *std::max_element(scores.begin(), scores.end());
  Row out{std::vector<double>(d_), std::vector<double>(d_)};
  double all = 0, some = 0;
  for (int64_t t = 0; t < visible; ++t) {
    const double weight = std::exp(scores[t] - largest), also = reads(t) ? weight : 0;
    all += weight;
    some += also;
    row(Input::value, seq, t, kv_head, row_of.data());
    for (int c = 0; c < d_; ++c) {
      out.all[c] += weight * row_of[c];
      out.some[c] += also * row_of[c];
    }
  }
  for (int c = 0; c < d_; ++c) {
    out.all[c] /= all;
    out.some[c] = some > 0 ? out.some[c] / some : 0;
  }
  return out;
}

}  // namespace thriftattn::cli
