// Keys, values and queries by rule from (sequence, token, head), so that a reference can make any of them again and no
// copy beside the cache is needed; and attention over them as its definition reads.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "format/codecs.h"
#include "thriftattn/threads.h"

namespace thriftattn::cli {

enum class Input : uint64_t { query, key, value };

// The rule. A row is the sum of two stretches of one table of numbers: a cache of 10^5 tokens takes 10^8 of them, and
// to make each anew takes longer than what is to be timed. A GPU makes its own rows, of keys and values, from the same.
struct InputRule {
  static constexpr uint64_t kOffsets = 1 << 14;  // that a row may begin at in the table

  THRIFTATTN_HD static constexpr uint64_t mix(uint64_t x) {  // splitmix64
    x += 0x9e3779b97f4a7c15;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
    x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
    return x ^ (x >> 31);
  }
  THRIFTATTN_HD static constexpr uint64_t key_of(uint64_t what, uint64_t seq, uint64_t token, uint64_t head) {
    return mix(mix(mix(mix(what + 1) + seq) + token) + head);
  }
  // Channel c of the row of noise that `key` names.
  THRIFTATTN_HD static float noise(const float* table, uint64_t key, int c) {
    return table[key % kOffsets + c] + table[(key >> 32) % kOffsets + c];
  }
  // What keys have beside noise: channel 5 is an outlier and token 0 is a sink.
  THRIFTATTN_HD static float of_key(int64_t token, int c, int d) {
    return (c == 5 % d ? 6.0f : 0.0f) + (c == 0 && token == 0 ? 12.0f : 0.0f);
  }
};

// About normal, with what attention has in models: keys have an outlier channel and the first token is a sink; a query
// leans towards the sink and towards one token that it sees, so that rows are peaked and few pages carry the mass.
class Inputs {
 public:
  Inputs(int h_q, int h_kv, int d);

  // d channels of one head of one token.
  void row(Input what, int64_t seq, int64_t token, int64_t head, float* out) const;

  // Tokens [first, first + tokens) of a sequence, [tokens, heads, d].
  void rows(Input what, int64_t seq, int64_t first, int64_t tokens, ThreadPool* pool, std::vector<float>* out) const;

  std::span<const float> table() const { return table_; }

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
