// From a public call to a backend: checks the arguments, resolves block tables to records, runs.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <new>
#include <numeric>
#include <vector>

#include "attention/backends.h"
#include "attention/cache_state.h"
#include "core/prefetch.h"
#include "cpu/backend.h"
#include "cuda/backend.h"
#include "format/params.h"
#include "format/selection.h"

namespace thriftattn {

std::span<const Backend> backends() {
  static constexpr Backend kBackends[] = {
      {"cpu", cpu::refusal, cpu::plan,
       [](const Plan& plan) -> std::shared_ptr<void> { return cpu::make_scratch(plan); },
       [](const Plan& plan, void* scratch, ThreadPool& pool, const AttentionCall& call) {
         return cpu::run(plan, *static_cast<cpu::Scratch*>(scratch), pool, call);
       }},
      // Its caches are others, and so are workspaces and runs over them (thriftattn/cuda.h).
      {"cuda", cuda::refusal, cuda::plan, nullptr, nullptr},
  };
  return kBackends;
}

bool append_rows(const PageAppend& append) { return cpu::append_rows(append); }

Machine Machine::here(int threads) { return {threads, cpu::targets(), std::nullopt}; }

struct Workspace::Buffers {
  Plan plan;  // that this was made for
  const Backend* backend = nullptr;
  std::shared_ptr<void> scratch;
  std::vector<PageRef> pages;  // [b, h_kv, max pages]
  std::vector<SequenceCall> sequences;
  std::vector<int> all_heads;  // [h_kv]
};

Workspace::Workspace(std::unique_ptr<Buffers> buffers) : buffers_(std::move(buffers)) {}
Workspace::Workspace(Workspace&&) noexcept = default;
Workspace& Workspace::operator=(Workspace&&) noexcept = default;
Workspace::~Workspace() = default;

Result<Workspace> Workspace::create(const Plan& plan) {
  const auto all = backends();
  const auto backend = std::find_if(all.begin(), all.end(), [&](const Backend& b) { return plan.backend == b.name; });
  if (backend == all.end()) return invalid_argument(fmt::format("the plan names no backend ('{}')", plan.backend));
  if (!backend->run)
    return invalid_argument(
        fmt::format("the plan is for backend {}: thriftattn::cuda::Workspace serves it", plan.backend));
  try {
    auto buffers = std::make_unique<Buffers>();
    buffers->plan = plan;
    buffers->backend = &*backend;
    buffers->scratch = backend->scratch(plan);
    const Problem& p = plan.problem;
    buffers->pages.resize(static_cast<size_t>(p.b) * p.h_kv * pages_for(p.max_s_kv));
    buffers->sequences.reserve(p.b);
    buffers->all_heads.resize(p.h_kv);
    std::iota(buffers->all_heads.begin(), buffers->all_heads.end(), 0);
    return Workspace(std::move(buffers));
  } catch (const std::bad_alloc&) {
    return Status(Code::out_of_memory, fmt::format("no memory for a workspace of {} bytes", plan.workspace_bytes));
  }
}

namespace {

Status check_heads(const Problem& p, const AttendArgs& a) {
  int previous = -1;
  for (const int g : a.kv_heads) {
    if (g <= previous || g >= p.h_kv)
      return invalid_argument(fmt::format("kv_heads: {} is out of order or not below h_kv {}", g, p.h_kv));
    previous = g;
  }
  for (int h = 0; h < p.h_q && a.sinks; ++h)
    if (!std::isfinite(a.sinks[h]))
      return invalid_argument(fmt::format("the sink of head {} is {}: finite numbers are supported", h, a.sinks[h]));
  return {};
}

Status check_args(const Problem& p, const AttendArgs& a) {
  if (!a.cache) return invalid_argument("no cache is given");
  const CacheConfig& c = a.cache->config();
  if (!pages_alike(c, p.cache))
    return invalid_argument("the cache is not of the configuration that the plan was made for");
  if (a.layer < 0 || a.layer >= c.layers)
    return invalid_argument(fmt::format("layer {} does not exist: the cache has {}", a.layer, c.layers));
  THRIFTATTN_RETURN_IF_ERROR(check_heads(p, a));
  if (a.seqs.size() != a.s_q.size() || static_cast<int>(a.seqs.size()) > p.b)
    return invalid_argument(
        fmt::format("{} sequences and {} row counts do not fit a plan for {}", a.seqs.size(), a.s_q.size(), p.b));
  int64_t rows = 0;
  for (size_t i = 0; i < a.seqs.size(); ++i) {
    const int64_t s_kv = a.cache->length(a.seqs[i], a.layer);
    if (s_kv < 0) return not_found(fmt::format("sequence {} does not exist", a.seqs[i]));
    if (a.s_q[i] < 0 || a.s_q[i] > p.max_s_q)
      return invalid_argument(
          fmt::format("s_q {} of sequence {} is out of the plan's range [0, {}]", a.s_q[i], a.seqs[i], p.max_s_q));
    if (s_kv > p.max_s_kv)
      return invalid_argument(
          fmt::format("sequence {} holds {} tokens, the plan serves up to {}", a.seqs[i], s_kv, p.max_s_kv));
    rows += a.s_q[i];
  }
  if (a.q.tokens != rows || a.q.heads != p.h_q || a.q.channels != p.d)
    return invalid_argument(
        fmt::format("q is [{}, {}, {}], expected [{}, {}, {}]", a.q.tokens, a.q.heads, a.q.channels, rows, p.h_q, p.d));
  return {};
}

// Every page must have the form in which it will be read.
Status check_forms(const Problem& p, const AttendArgs& a, const AttentionCall& call) {
  for (size_t i = 0; i < call.sequences.size(); ++i) {
    const SequenceCall& s = call.sequences[i];
    const int64_t full = s.s_kv / kPageTokens;
    if (p.method.rest == Tier::fp16)
      for (const int g : call.kv_heads)
        for (int64_t page = 0; page < full; ++page)
          if (!s.pages[g * s.page_stride + page].high)
            return invalid_argument(
                fmt::format("page {} of sequence {}, layer {} has no 16-bit form left, which method {} "
                            "reads (storage={})",
                            page, a.seqs[i], a.layer, to_string(p.method), to_string(p.cache.storage)));
  }
  if (!a.cache->config().storage_by_head.empty())
    for (const int g : call.kv_heads)
      if (Status s = check_stored(p.method, p.cache, a.cache->config().storage_at(a.layer, g)); !s.ok())
        return invalid_argument(fmt::format("layer {}, KV head {}: {}", a.layer, g, s.message()));
  if (!call.given) return {};
  if (call.given->first.empty()) return invalid_argument("the given selection has no offsets: `first` is empty");
  const int heads = p.phase == Phase::prefill ? p.h_q : p.h_kv;
  int64_t block = 0;
  for (size_t i = 0; i < call.sequences.size(); ++i) {
    const SequenceCall& s = call.sequences[i];
    const int64_t blocks = query_blocks(p.phase, s.s_q, s.s_kv);
    for (int h = 0; h < heads; ++h)
      for (int64_t b = 0; b < blocks; ++b, ++block) {
        if (block + 1 >= static_cast<int64_t>(call.given->first.size()))
          return invalid_argument(
              fmt::format("the given selection has {} query blocks, the call has more", call.given->first.size() - 1));
        const int64_t first = call.given->first[block], end = call.given->first[block + 1];
        if (first < 0 || end < first || end > static_cast<int64_t>(call.given->pages.size()))
          return invalid_argument(fmt::format("given selection, block {}: pages [{}, {}) are not among its {}", block,
                                              first, end, call.given->pages.size()));
        const int g = p.phase == Phase::prefill ? h / (p.h_q / p.h_kv) : h;
        if (std::find(call.kv_heads.begin(), call.kv_heads.end(), g) == call.kv_heads.end()) continue;
        int64_t previous = -1;
        for (int64_t e = first; e < end; ++e) {
          const Promoted& one = call.given->pages[e];
          if (one.page <= previous || one.page >= s.s_kv / kPageTokens)
            return invalid_argument(
                fmt::format("given selection, block {}: page {} is out of order or not a full page of "
                            "sequence {}",
                            block, one.page, a.seqs[i]));
          previous = one.page;
          const PageRef& ref = s.pages[g * s.page_stride + one.page];
          const bool stored = one.tier == Tier::none || (one.tier == Tier::fp4 && ref.fp4) ||
                              (one.tier == Tier::fp4x2 && ref.residual) || (one.tier == Tier::fp16 && ref.high);
          if (!stored)
            return invalid_argument(fmt::format("given selection, block {}: page {} is not stored in tier {}", block,
                                                one.page, to_string(one.tier)));
        }
      }
  }
  if (block + 1 != static_cast<int64_t>(call.given->first.size()))
    return invalid_argument(
        fmt::format("the given selection has {} query blocks, the call has {}", call.given->first.size() - 1, block));
  return {};
}

// Where the records of every page of every sequence lie: pages [b, h_kv, stride].
void resolve_pages(const CacheState& state, const AttendArgs& a, std::span<const SequenceCall> sequences,
                   int64_t stride, PageRef* pages, ThreadPool& pool) {
  constexpr int64_t kPages = 64;  // of a task
  const int h_kv = state.config.h_kv;
  const int64_t tasks = (stride + kPages - 1) / kPages;
  pool.parallel_for(std::ssize(sequences) * tasks, [&](int64_t task, int) {
    const int64_t i = task / tasks, first = task % tasks * kPages;
    const std::vector<int32_t>& table = state.find(a.seqs[i])->pages;
    PageRef* of_sequence = pages + i * h_kv * stride;
    const int64_t end = std::min(first + kPages, pages_for(sequences[i].s_kv));
    // Forms of pages lie apart, where no prefetcher of hardware follows; what they become is written a head at a time,
    // in the order of memory.
    for (int64_t p = first; p < end; ++p)
      prefetch(state.forms_of(table[p], a.layer), h_kv * int64_t{sizeof(PageForms)});
    for (int h = 0; h < h_kv; ++h)
      for (int64_t p = first; p < end; ++p) {
        const PageForms& forms = state.forms_of(table[p], a.layer)[h];
        of_sequence[h * stride + p] = {state.fp4.at(forms.fp4), state.residual.at(forms.residual),
                                       reinterpret_cast<const uint16_t*>(state.high.at(forms.high)),
                                       state.summary.at(forms.summary)};
      }
  });
}

Status run_call(const Plan& plan, Workspace& workspace, ThreadPool& pool, const AttendArgs& a, bool select_only,
                Stats* stats) {
  const Problem& p = plan.problem;
  THRIFTATTN_RETURN_IF_ERROR(check_args(p, a));
  Workspace::Buffers& w = workspace.buffers();
  if (!sizes_alike(plan, w.plan))
    return invalid_argument(
        fmt::format("the workspace was made for another plan: {}, not {}", to_string(w.plan), to_string(plan)));
  const CacheState& state = a.cache->state();
  const int64_t stride = pages_for(p.max_s_kv);
  w.sequences.clear();
  int64_t first_row = 0, first_block = 0;
  for (size_t i = 0; i < a.seqs.size(); ++i) {
    SequenceCall s;
    s.s_q = a.s_q[i];
    s.s_kv = a.cache->length(a.seqs[i], a.layer);
    s.first_row = first_row;
    s.first_block = first_block;
    s.page_stride = stride;
    s.pages = w.pages.data() + i * p.h_kv * stride;
    first_row += s.s_q;
    first_block += (p.phase == Phase::prefill ? p.h_q : p.h_kv) * query_blocks(p.phase, s.s_q, s.s_kv);
    w.sequences.push_back(s);
  }
  resolve_pages(state, a, w.sequences, stride, w.pages.data(), pool);
  AttentionCall call;
  call.problem = &p;
  call.layout = &state.layout;
  call.sequences = w.sequences;
  call.kv_heads = a.kv_heads.empty() ? std::span<const int>(w.all_heads) : a.kv_heads;
  call.sinks = a.sinks;
  call.q = a.q;
  call.out = a.out;
  call.lse = a.lse;
  call.given = a.given;
  call.select_only = select_only;
  call.stats = stats;
  THRIFTATTN_RETURN_IF_ERROR(check_forms(p, a, call));
  try {
    return w.backend->run(plan, w.scratch.get(), pool, call);
  } catch (const std::bad_alloc&) {
    return Status(Code::out_of_memory, "no memory left for the selection or the stats of a call");
  }
}

}  // namespace

Status run(const Plan& plan, Workspace& workspace, ThreadPool& pool, const AttendArgs& args) {
  const MutableView& out = args.out;
  if (out.tokens != args.q.tokens || out.heads != plan.problem.h_q || out.channels != plan.problem.d_v)
    return invalid_argument(fmt::format("out is [{}, {}, {}], expected [{}, {}, {}]", out.tokens, out.heads,
                                        out.channels, args.q.tokens, plan.problem.h_q, plan.problem.d_v));
  return run_call(plan, workspace, pool, args, false, args.stats);
}

Result<Selection> select(const Plan& plan, Workspace& workspace, ThreadPool& pool, const AttendArgs& args) {
  Stats stats;
  THRIFTATTN_RETURN_IF_ERROR(run_call(plan, workspace, pool, args, true, &stats));
  return std::move(stats.selection);
}

}  // namespace thriftattn
