// One sequence, one layer: append keys and values, attend to them, print what was promoted.
#include <cstdio>
#include <random>
#include <vector>

#include "thriftattn/attention.h"

using namespace thriftattn;  // NOLINT: an example

// Prefills 4096 random tokens and takes one decode step.
static Status attend() {
  constexpr int kHeadsQ = 8, kHeadsKv = 2, kChannels = 128;
  constexpr int64_t kPrompt = 4096;

  THRIFTATTN_ASSIGN_OR_RETURN(method, parse_method("thrift:budget=0.05"));
  THRIFTATTN_ASSIGN_OR_RETURN(
      cache, KvCache::create(CacheConfig::for_method(method, /*layers=*/1, kHeadsKv, kChannels, kChannels)));
  ThreadPool pool;
  const SeqId seq = cache.new_sequence();

  Problem problem;
  problem.h_q = kHeadsQ;
  problem.h_kv = kHeadsKv;
  problem.max_s_kv = kPrompt + 1;
  problem.method = method;
  problem.cache = cache.config();

  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  for (const Phase phase : {Phase::prefill, Phase::decode}) {
    const int64_t s_q = phase == Phase::prefill ? kPrompt : 1;
    problem.phase = phase;
    problem.max_s_q = s_q;
    THRIFTATTN_ASSIGN_OR_RETURN(chosen, plan(problem, Machine::here(pool.size())));
    THRIFTATTN_ASSIGN_OR_RETURN(workspace, Workspace::create(chosen));

    std::vector<float> q(s_q * kHeadsQ * kChannels), k(s_q * kHeadsKv * kChannels), v(k.size()), out(q.size());
    for (auto* tensor : {&q, &k, &v}) {
      for (float& x : *tensor) x = normal(random);
    }
    THRIFTATTN_RETURN_IF_ERROR(
        cache.append(seq, 0, view(k.data(), s_q, kHeadsKv, kChannels), view(v.data(), s_q, kHeadsKv, kChannels), pool));
    Stats stats;
    AttendArgs args;
    args.cache = &cache;
    args.seqs = {&seq, 1};
    args.s_q = {&s_q, 1};
    args.q = view(q.data(), s_q, kHeadsQ, kChannels);
    args.out = mutable_view(out.data(), s_q, kHeadsQ, kChannels);
    args.stats = &stats;
    THRIFTATTN_RETURN_IF_ERROR(run(chosen, workspace, pool, args));
    THRIFTATTN_RETURN_IF_ERROR(cache.settle(seq, 0));
    std::printf("%s\n  promoted %lld of %lld pairs, cache %lld bytes\n", to_string(chosen).c_str(),
                static_cast<long long>(stats.promoted), static_cast<long long>(stats.pairs),
                static_cast<long long>(cache.bytes().total()));
  }
  return {};
}

int main() {
  const Status status = attend();
  if (!status.ok()) std::fprintf(stderr, "%s\n", status.message().c_str());
  return status.ok() ? 0 : 1;
}
