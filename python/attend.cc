#include "attend.h"

#include <fmt/format.h>
#include <pthread.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <mutex>

namespace thriftattn::python {
namespace {

constexpr size_t kPlansKept = 16;

// The pool is made by the first call that needs it. A forked child has the memory of its parent's pool and none of its
// threads: it leaves that pool where it is and makes one of its own.
struct Shared {
  std::mutex mutex;
  std::unique_ptr<ThreadPool> pool;
  int threads = 0;

  Shared() {
    pthread_atfork([] { shared().mutex.lock(); }, [] { shared().mutex.unlock(); },
                   [] {
                     static_cast<void>(shared().pool.release());
                     shared().mutex.unlock();
                   });
  }
  static Shared& shared() {
    static Shared* one = new Shared;  // never destroyed: threads of Python may outlive static objects
    return *one;
  }
};

// q in one run of rows: itself, or a copy where its sequences do not follow one another.
View in_rows(const Batch& q, std::vector<char>& copy) {
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

Batch queries(nb::handle q, std::span<const SeqId> seqs) {
  Batch rows = batch(q, "q", {"b", "s_q", "h_q", "d"});
  if (rows.b != std::ssize(seqs))
    throw nb::value_error(fmt::format("q has {} sequences, seqs has {}", rows.b, seqs.size()).c_str());
  return rows;
}

int64_t at_least(int64_t floor, int64_t n) {
  return static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(std::max(floor, n))));
}

}  // namespace

Turn::Turn() { Shared::shared().mutex.lock(); }
Turn::~Turn() { Shared::shared().mutex.unlock(); }

ThreadPool& Turn::pool() {
  Shared& s = Shared::shared();
  if (!s.pool) s.pool = std::make_unique<ThreadPool>(s.threads);
  return *s.pool;
}

void set_threads(int threads) {
  if (threads < 0 || threads > 1024)
    throw nb::value_error(fmt::format("{} threads are not supported: 0 to 1024 are", threads).c_str());
  in_turn([&](ThreadPool&) {
    Shared& s = Shared::shared();
    s.threads = threads;
    s.pool = nullptr;
  });
}

int threads() {
  return in_turn([](ThreadPool& pool) { return pool.size(); });
}

Cache::Cache(const Method& method, const CacheConfig& config)
    : method_(method), store_(value_or_raise(KvCache::create(config))) {}

std::vector<SeqId> Cache::new_sequences(int64_t count) {
  std::vector<SeqId> seqs;
  for (int64_t i = 0; i < count; ++i) {
    seqs.push_back(store_.new_sequence());
    if (seqs.back() < 0) throw std::bad_alloc();
  }
  return seqs;
}

void Cache::append(std::span<const SeqId> seqs, int layer, nb::handle k, nb::handle v) {
  const Batch keys = batch(k, "k", {"b", "s", "h_kv", "d"}), values = batch(v, "v", {"b", "s", "h_kv", "d_v"});
  for (const auto& [name, t] : {std::pair{"k", &keys}, {"v", &values}})
    if (t->b != std::ssize(seqs))
      throw nb::value_error(fmt::format("{} has {} sequences, seqs has {}", name, t->b, seqs.size()).c_str());
  check(in_turn([&](ThreadPool& pool) -> Status {
    for (int64_t i = 0; i < keys.b; ++i) {
      Status s = store_.append(seqs[i], layer, keys.sequence(i), values.sequence(i), pool);
      if (!s.ok()) return Status(s.code(), fmt::format("sequence {}: {}", seqs[i], s.message()));
    }
    return {};
  }));
}

void Cache::settle(std::span<const SeqId> seqs, int layer) {
  check(in_turn([&](ThreadPool&) -> Status {
    for (const SeqId seq : seqs) THRIFTATTN_RETURN_IF_ERROR(store_.settle(seq, layer));
    return {};
  }));
}

Problem Cache::problem(const Form& form, const Method& method, const Batch& q, std::span<const SeqId> seqs,
                       int layer) const {
  Problem p;
  p.phase = form.phase;
  p.b = static_cast<int>(q.b);
  p.h_q = static_cast<int>(q.first.heads);
  const CacheConfig& config = store_.config();
  p.h_kv = config.h_kv;
  p.d = config.d;
  p.d_v = config.d_v;
  p.causal = form.causal;
  p.window = form.window;
  p.sm_scale = form.sm_scale;
  p.softcap = form.softcap;
  p.method = method;
  p.cache = config;
  p.compute = form.compute;
  // A growing sequence meets the same plan until it has doubled.
  const int64_t s_q = q.first.tokens;
  p.max_s_q = form.phase == Phase::prefill ? at_least(kPageTokens, s_q) : s_q > kMaxDecodeRows ? s_q : at_least(1, s_q);
  for (const SeqId seq : seqs) p.max_s_kv = std::max(p.max_s_kv, store_.length(seq, layer));
  p.max_s_kv = at_least(kPageTokens, p.max_s_kv);
  return p;
}

Result<Cache::Prepared*> Cache::prepare(Problem problem, int threads) {
  const auto found = std::find_if(prepared_.begin(), prepared_.end(),
                                  [&](const Prepared& p) { return p.plan.threads == threads && p.problem == problem; });
  if (found != prepared_.end()) {
    prepared_.splice(prepared_.begin(), prepared_, found);
    return &prepared_.front();
  }
  THRIFTATTN_ASSIGN_OR_RETURN(chosen, plan(problem, Machine::here(threads)));
  THRIFTATTN_ASSIGN_OR_RETURN(workspace, Workspace::create(chosen));
  prepared_.push_front({std::move(problem), std::move(chosen), std::move(workspace)});
  if (prepared_.size() > kPlansKept) prepared_.pop_back();
  return &prepared_.front();
}

nb::object Cache::attend(std::span<const SeqId> seqs, int layer, const Form& form, const Method& method, nb::handle q,
                         const Extras& extras) {
  const Batch rows = queries(q, seqs);
  const int64_t s_q = rows.first.tokens, h_q = rows.first.heads;
  std::optional<Tensor> sinks;
  if (!extras.sinks.is_none()) {
    sinks = tensor(extras.sinks, "sinks", {"h_q"});
    if (sinks->dtype != DType::f32) throw nb::type_error("sinks: float32 is supported");
    if (sinks->size(0) != h_q)
      throw nb::value_error(fmt::format("sinks has {} heads, q has {}", sinks->size(0), h_q).c_str());
  }
  Written out = written(extras.out, "out", rows.b, s_q, h_q, store_.config().d_v, rows.first.dtype);
  std::optional<Output> lse;
  if (extras.return_lse)
    lse.emplace(std::vector<size_t>{static_cast<size_t>(rows.b), static_cast<size_t>(s_q), static_cast<size_t>(h_q)},
                dlpack_type(DType::f32));

  CallStats stats;
  check(in_turn([&](ThreadPool& pool) -> Status {
    Problem p = problem(form, method, rows, seqs, layer);
    p.stats = extras.stats;
    THRIFTATTN_ASSIGN_OR_RETURN(prepared, prepare(std::move(p), pool.size()));
    std::vector<char> copy;
    const std::vector<int64_t> counts(seqs.size(), s_q);
    AttendArgs args;
    args.cache = &store_;
    args.layer = layer;
    args.seqs = seqs;
    args.s_q = counts;
    args.q = in_rows(rows, copy);
    args.out = out.view;
    args.lse = lse ? lse->data<float>() : nullptr;
    args.sinks = sinks ? static_cast<const float*>(sinks->data()) : nullptr;
    args.given = extras.given;
    args.stats = extras.stats ? &stats : nullptr;
    THRIFTATTN_RETURN_IF_ERROR(run(prepared->plan, prepared->workspace, pool, args));
    for (const SeqId seq : seqs) THRIFTATTN_RETURN_IF_ERROR(store_.settle(seq, layer));
    return {};
  }));

  stats.b = rows.b;
  stats.h_kv = store_.config().h_kv;
  stats.pages = stats.b == 0 ? 0 : std::ssize(stats.page_mass) / (stats.b * stats.h_kv);
  nb::object result = out.release(q);
  if (lse && extras.stats) return nb::make_tuple(result, lse->release(q), std::move(stats));
  if (lse) return nb::make_tuple(result, lse->release(q));
  if (extras.stats) return nb::make_tuple(result, std::move(stats));
  return result;
}

Selection Cache::select(std::span<const SeqId> seqs, int layer, const Form& form, const Method& method, nb::handle q) {
  const Batch rows = queries(q, seqs);
  return value_or_raise(in_turn([&](ThreadPool& pool) -> Result<Selection> {
    THRIFTATTN_ASSIGN_OR_RETURN(prepared, prepare(problem(form, method, rows, seqs, layer), pool.size()));
    std::vector<char> copy;
    const std::vector<int64_t> counts(seqs.size(), rows.first.tokens);
    AttendArgs args;
    args.cache = &store_;
    args.layer = layer;
    args.seqs = seqs;
    args.s_q = counts;
    args.q = in_rows(rows, copy);
    return thriftattn::select(prepared->plan, prepared->workspace, pool, args);
  }));
}

}  // namespace thriftattn::python
