// Keys, values and queries by rule from (sequence, token, head), so that a reference can make any of them again and no
// copy beside the cache is needed; and attention over them as its definition reads.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "thriftattn/threads.h"

namespace thriftattn::cli {

enum class Input : uint64_t { query, key, value };

// About normal, with what attention has in models: keys have an outlier channel and the first token is a sink; a query
// leans towards the sink and towards one token that it sees, so that rows are peaked and few pages carry the mass.
class Inputs {
 public:
  Inputs(int h_q, int h_kv, int d);

  // d channels of one head of one token.
  void row(Input what, int64_t seq, int64_t token, int64_t head, float* out) const;

  // Tokens [first, first + tokens) of a sequence, [tokens, heads, d].
  void rows(Input what, int64_t seq, int64_t first, int64_t tokens, ThreadPool* pool, std::vector<float>* out) const;

  struct Row {
    std::vector<double> all;   // over every token in [0, visible)
    std::vector<double> some;  // over those for which reads(token) says yes
  };
  // Attention of one query row (d numbers of query head `head`) in double precision.
  Row attention(const float* q, int64_t seq, int64_t visible, int head,
                const std::function<bool(int64_t)>& reads) const;

 private:
  void noise(Input what, int64_t seq, int64_t token, int64_t head, float* out) const;

  int h_q_, h_kv_, d_;
  std::vector<float> table_;
};

}  // namespace thriftattn::cli
