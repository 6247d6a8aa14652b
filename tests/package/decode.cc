// Decodes 1,000 steps through the C++ interface and prints a checksum of all outputs' bits; decode.c is its twin.
#include <thriftattn/attention.h>
#include <thriftattn/c_api.h>

#include <bit>
#include <cstdint>
#include <cstdio>
#include <vector>

namespace {

using namespace thriftattn;

constexpr int kHeadsQ = 4, kHeadsKv = 2, kChannels = 64, kSteps = 1000;

uint64_t state = 20260523;
void fill(std::vector<float>& x) {
  for (float& value : x) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    value = static_cast<float>(static_cast<int32_t>(state >> 40) - (1 << 23)) / (1 << 21);
  }
}

Result<uint64_t> decode() {
  THRIFTATTN_ASSIGN_OR_RETURN(method, parse_method("thrift:budget=0.2"));
  THRIFTATTN_ASSIGN_OR_RETURN(cache,
                              KvCache::create(CacheConfig::for_method(method, 1, kHeadsKv, kChannels, kChannels)));
  ThreadPool pool(2);
  const SeqId seq = cache.new_sequence();
  Problem problem;
  problem.phase = Phase::decode;
  problem.max_s_kv = kSteps;
  problem.h_q = kHeadsQ;
  problem.h_kv = kHeadsKv;
  problem.d = problem.d_v = kChannels;
  problem.method = method;
  problem.cache = cache.config();
  THRIFTATTN_ASSIGN_OR_RETURN(chosen, plan(problem, Machine::here(pool.size())));
  THRIFTATTN_ASSIGN_OR_RETURN(workspace, Workspace::create(chosen));

  std::vector<float> q(kHeadsQ * kChannels), k(kHeadsKv * kChannels), v(k), out(q), lse(kHeadsQ);
  const int64_t one = 1;
  AttendArgs args;
  args.cache = &cache;
  args.seqs = {&seq, 1};
  args.s_q = {&one, 1};
  args.q = view(q.data(), 1, kHeadsQ, kChannels);
  args.out = mutable_view(out.data(), 1, kHeadsQ, kChannels);
  args.lse = lse.data();
  uint64_t sum = 14695981039346656037u;  // FNV-1a over words
  for (int step = 0; step < kSteps; ++step) {
    fill(k);
    fill(v);
    fill(q);
    THRIFTATTN_RETURN_IF_ERROR(
        cache.append(seq, 0, view(k.data(), 1, kHeadsKv, kChannels), view(v.data(), 1, kHeadsKv, kChannels), pool));
    THRIFTATTN_RETURN_IF_ERROR(run(chosen, workspace, pool, args));
    THRIFTATTN_RETURN_IF_ERROR(cache.settle(seq, 0));
    for (const auto* values : {&out, &lse})
      for (const float value : *values) sum = (sum ^ std::bit_cast<uint32_t>(value)) * 1099511628211u;
  }
  return sum;
}

}  // namespace

int main() {
  const Result<uint64_t> sum = decode();
  if (!sum.ok()) {
    std::fprintf(stderr, "%s\n", sum.status().message().c_str());
    return 1;
  }
  std::printf("%s %016llx\n", thriftattn_version(), static_cast<unsigned long long>(*sum));
}
