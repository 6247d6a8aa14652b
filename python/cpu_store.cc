// A cache in the CPU's memory: KvCache, and a plan and scratch memory for every form of call that it has served.
#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "store.h"
#include "turn.h"

namespace thriftattn::python {
namespace {

constexpr size_t kPlansKept = 16;

// q in one run of rows: itself, or a copy where its sequences do not follow one another.
View in_rows(const Sequences& q, std::vector<char>& copy) {
  if (q.in_rows()) return q.rows();
  const View& f = q.first;
  const int64_t row = f.channels * size_of(f.dtype);
  copy.resize(static_cast<size_t>(q.b * f.tokens * f.heads * row));
  char* to = copy.data();
  for (int64_t i = 0; i < q.b; ++i)
    for (int64_t t = 0; t < f.tokens; ++t)
      for (int64_t h = 0; h < f.heads; ++h, to += row) std::memcpy(to, q.sequence(i).at(t, h), row);
  return {copy.data(), f.dtype, q.b * f.tokens, f.heads, f.channels, f.heads * f.channels, f.channels};
}

class CpuStore final : public Store {
 public:
  explicit CpuStore(KvCache cache) : cache_(std::move(cache)) {}

  const CacheConfig& config() const override { return cache_.config(); }

  Result<SeqId> new_sequence() override {
    const SeqId seq = cache_.new_sequence();
    if (seq < 0) return Status(Code::out_of_memory, "no memory left for the tables of a sequence");
    return seq;
  }

  Status append(std::span<const SeqId> seqs, int layer, const Sequences& k, const Sequences& v) override {
    for (int64_t i = 0; i < k.b; ++i) {
      Status s = cache_.append(seqs[i], layer, k.sequence(i), v.sequence(i), pool());
      if (!s.ok()) return Status(s.code(), fmt::format("sequence {}: {}", seqs[i], s.message()));
    }
    return {};
  }

  Status settle(std::span<const SeqId> seqs, int layer) override {
    for (const SeqId seq : seqs) THRIFTATTN_RETURN_IF_ERROR(cache_.settle(seq, layer));
    return {};
  }

  Status attend(const Call& call) override {
    THRIFTATTN_ASSIGN_OR_RETURN(prepared, prepare(call));
    std::vector<char> copy;
    const std::vector<int64_t> s_q(call.seqs.size(), call.q.first.tokens);
    AttendArgs args = arguments(call, s_q, copy);
    args.out = call.out;
    args.lse = call.lse;
    args.sinks = call.sinks;
    args.given = call.given;
    args.stats = call.stats;
    THRIFTATTN_RETURN_IF_ERROR(run(prepared->plan, prepared->workspace, pool(), args));
    return settle(call.seqs, call.layer);
  }

  Result<Selection> select(const Call& call) override {
    THRIFTATTN_ASSIGN_OR_RETURN(prepared, prepare(call));
    std::vector<char> copy;
    const std::vector<int64_t> s_q(call.seqs.size(), call.q.first.tokens);
    return thriftattn::select(prepared->plan, prepared->workspace, pool(), arguments(call, s_q, copy));
  }

  Result<SeqId> fork(SeqId seq) override { return cache_.fork(seq); }
  Status truncate(SeqId seq, int64_t length, bool lossy) override { return cache_.truncate(seq, length, lossy); }
  Status free(SeqId seq) override { return cache_.free(seq); }
  int64_t length(SeqId seq, int layer) const override { return cache_.length(seq, layer); }
  int64_t length(SeqId seq) const override { return cache_.length(seq); }
  Status read(SeqId seq, int layer, int64_t first, const MutableView& k, const MutableView& v) override {
    return cache_.read(seq, layer, first, k, v);
  }
  Status save(SeqId seq, const std::string& path, std::string_view metadata) override {
    return cache_.save(seq, path, metadata);
  }
  Result<SeqId> load(const std::string& path, std::string* metadata) override { return cache_.load(path, metadata); }
  MemoryUse bytes() const override { return cache_.bytes(); }
  int64_t peak_bytes() const override { return cache_.peak_bytes(); }
  int64_t reserved_bytes() const override { return cache_.reserved_bytes(); }

 private:
  Result<Prepared<Workspace>*> prepare(const Call& call) {
    // A growing sequence meets the same plan until it has doubled.
    int64_t s_kv = 1;
    for (const SeqId seq : call.seqs) s_kv = std::max(s_kv, cache_.length(seq, call.layer));
    Problem problem = problem_of(config(), call, call.q.b, power_of_two(kPageTokens, s_kv));
    const int threads = pool().size();
    return find_or_make(prepared_, kPlansKept, threads, std::move(problem), Machine::here(threads),
                        [](const Plan& plan) { return Workspace::create(plan); });
  }

  AttendArgs arguments(const Call& call, std::span<const int64_t> s_q, std::vector<char>& copy) const {
    AttendArgs args;
    args.cache = &cache_;
    args.layer = call.layer;
    args.seqs = call.seqs;
    args.s_q = s_q;
    args.q = in_rows(call.q, copy);
    return args;
  }

  KvCache cache_;
  std::list<Prepared<Workspace>> prepared_;
};

}  // namespace

Result<std::unique_ptr<Store>> make_cpu_store(const CacheConfig& config) {
  THRIFTATTN_ASSIGN_OR_RETURN(cache, KvCache::create(config));
  return std::unique_ptr<Store>(std::make_unique<CpuStore>(std::move(cache)));
}

}  // namespace thriftattn::python
