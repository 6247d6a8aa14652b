#include "store.h"

#include <algorithm>
#include <bit>

namespace thriftattn::python {

int64_t power_of_two(int64_t floor, int64_t n) {
  return static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(std::max(floor, n))));
}

Problem problem_of(const CacheConfig& config, const Call& call, int64_t b, int64_t max_s_kv) {
  Problem p;
  p.phase = call.form.phase;
  p.b = static_cast<int>(b);
  const int64_t s_q = call.q.first.tokens;
  p.max_s_q = p.phase == Phase::prefill ? power_of_two(kPageTokens, s_q)
              : s_q > kMaxDecodeRows    ? s_q
                                        : power_of_two(1, s_q);
  p.max_s_kv = max_s_kv;
  p.h_q = static_cast<int>(call.q.first.heads);
  p.h_kv = config.h_kv;
  p.d = config.d;
  p.d_v = config.d_v;
  p.causal = call.form.causal;
  p.window = call.form.window;
  p.sm_scale = call.form.sm_scale;
  p.softcap = call.form.softcap;
  p.method = call.method;
  p.cache = config;
  p.stats = call.stats != nullptr;
  p.compute = call.form.compute;
  return p;
}

}  // namespace thriftattn::python
