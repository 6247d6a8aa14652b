// One run on the CPU: cuts a call into tasks, ranks, selects, attends, merges. Reads top to bottom as the algorithm:
//
//   prefill   per (sequence, KV head, up to 4 of its query heads, query block):   rank -> select -> attend -> finish
//   decode    per (sequence, KV head):                            load q
//             per (sequence, range of pages), all KV heads:       [rank]
//             per (sequence, KV head):                            [select]
//             per (sequence, range of pages), all KV heads:       [score, and per KV head select:] attend
//             per (sequence, KV head), fp4_mass:                  select by the masses that this read
//             per (sequence, KV head, part of the promoted):      exchange their FP4 for their tier
//             per (sequence, KV head):                            merge -> finish
//
// Tasks write to places of their own, so results do not depend on the number of threads.
#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <new>

#include "core/prefetch.h"
#include "cpu/backend.h"
#include "cpu/kernels.h"
#include "cpu/scratch.h"
#include "format/rows.h"
#include "format/selection.h"
#include "format/softmax_state.h"

namespace thriftattn::cpu {
namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kNoSink = -1e30f;  // log2: a sink below it is none, as -inf is: no score of finite floats is as low

// Part i of n things cut into `parts`.
struct Range {
  int64_t first, end;
};
Range range_of(int64_t n, int64_t i, int64_t parts) { return {n * i / parts, n * (i + 1) / parts}; }

// Sums that Stats wants, of one task; added up in task order, so that they do not depend on threads either.
struct TaskStats {
  double mass_above_fp4 = 0, error_estimate = 0;
  std::vector<double> page_mass;  // summed over rows
  std::vector<std::vector<Promoted>> selection;
};

class Run {
 public:
  Run(const Plan& plan, const Kernels& kernels, Scratch& scratch, ThreadPool& pool, const AttentionCall& call)
      : plan_(plan),
        problem_(*call.problem),
        kernels_(kernels),
        scratch_(scratch),
        pool_(pool),
        call_(call),
        group_(problem_.h_q / problem_.h_kv),
        mask_{problem_.causal, problem_.window},
        mma4_(problem_.method.arithmetic == Arithmetic::mma4),
        estimates_error_(problem_.method.budget.kind == Budget::Kind::tolerance),
        details_(call.stats && (problem_.stats || call.select_only)) {}

  void prefill() {
    std::vector<PrefillTask>& tasks = scratch_.tasks;
    tasks.clear();
    const int step = heads_per_task(problem_);
    int64_t most = 0;
    for (const SequenceCall& s : call_.sequences) most = std::max(most, query_blocks(Phase::prefill, s.s_q, s.s_kv));
    for (int64_t i = most; i-- > 0;)  // the last blocks see most pages: longest tasks first
      for (size_t s = 0; s < call_.sequences.size(); ++s) {
        if (i >= query_blocks(Phase::prefill, call_.sequences[s].s_q, call_.sequences[s].s_kv)) continue;
        for (const int g : call_.kv_heads)
          for (int h = 0; h < group_; h += step)
            tasks.push_back({static_cast<int64_t>(s), g, h, std::min(step, group_ - h), i});
      }
    start_stats(static_cast<int64_t>(tasks.size()));
    pool_.parallel_for(static_cast<int64_t>(tasks.size()), [&](int64_t task, int w) {
      const PrefillTask& t = tasks[task];
      prefill_block(t.sequence, t.kv_head, t.first_head, t.heads, t.block, w, task);
    });
    if (out_of_memory_) throw std::bad_alloc();
    for (size_t i = 0; i < task_stats_.size(); ++i)
      for (int h = 0; h < tasks[i].heads; ++h) {
        const SequenceCall& s = call_.sequences[tasks[i].sequence];
        const int64_t blocks = query_blocks(Phase::prefill, s.s_q, s.s_kv);
        const int head = tasks[i].kv_head * group_ + tasks[i].first_head + h;
        add_stats(task_stats_[i], h, s.first_block + head * blocks + tasks[i].block, tasks[i].sequence,
                  tasks[i].kv_head, h == 0);
      }
    finish_stats();
  }

  void decode() {
    const ThreadPool::Watch watch(pool_);
    const int64_t units = std::ssize(call_.sequences) * std::ssize(call_.kv_heads);
    const int64_t walks = std::ssize(call_.sequences) * head_groups(std::ssize(call_.kv_heads));
    const bool by_mass = scores_first(problem_) && !call_.given && ranks(problem_.method);
    const bool exchange = by_mass && exchanges(problem_) && !call_.select_only;
    const bool ranks_first = ranks(problem_.method) && !call_.given && !by_mass;
    start_stats(units);
    pool_.parallel_for(units, [&](int64_t u, int w) { load_unit(u, by_mass, w); });
    const auto walk_all = [&](bool scores_alone) {
      // The last range has the tail and most pages that are forced: what takes longest begins first.
      pool_.parallel_for(walks * plan_.splits, [&](int64_t i, int w) {
        walk(i % walks, static_cast<int>((i / walks + plan_.splits - 1) % plan_.splits), scores_alone, w);
      });
    };
    const auto select_all = [&] { pool_.parallel_for(units, [&](int64_t u, int w) { select_unit(u, by_mass, w); }); };
    if (ranks_first) {
      pool_.parallel_for(walks * plan_.splits, [&](int64_t i, int) { rank_pages(i / plan_.splits, i % plan_.splits); });
      select_all();
    }
    if (exchange) {
      walk_all(false);
      select_all();
      // Parts of a list take some microseconds to begin: no more of them than even out what threads have to do.
      const int64_t parts = std::clamp<int64_t>(8 * plan_.threads / std::max<int64_t>(1, units), 1, plan_.splits);
      pool_.parallel_for(units * parts, [&](int64_t i, int) { exchange_unit(i / parts, i % parts, parts); });
    } else {
      if (by_mass) {
        walk_all(true);
        select_all();
      }
      if (!call_.select_only) walk_all(false);
    }
    pool_.parallel_for(units, [&](int64_t u, int) { finish_unit(u, exchange); });
    if (out_of_memory_) throw std::bad_alloc();
    for (size_t u = 0; u < task_stats_.size(); ++u) {
      const int64_t s = static_cast<int64_t>(u) / std::ssize(call_.kv_heads);
      const int g = call_.kv_heads[u % call_.kv_heads.size()];
      if (call_.sequences[s].s_q == 0) continue;  // it has no query block
      add_stats(task_stats_[u], 0, call_.sequences[s].first_block + g, s, g, true);
    }
    finish_stats();
  }

 private:
  // --- shared by both phases

  // Copies rows of q into `rows`; row i of the task is row first + i % count of head first_head + i / count.
  void load_q(const SequenceCall& s, int64_t first, int64_t count, int first_head, int heads, Rows& rows) const {
    const int d = problem_.d;
    for (int h = 0; h < heads; ++h)
      for (int64_t r = 0; r < count; ++r) {
        const int64_t i = h * count + r;
        float* q = &rows.q[i * d];
        if (r + kAhead < count)
          prefetch(call_.q.at(s.first_row + first + r + kAhead, first_head + h), d * size_of(call_.q.dtype));
        load_row(call_.q.dtype, call_.q.at(s.first_row + first + r, first_head + h), d, q);
        rows.finite[i] = all_finite(q, d);
        if (!rows.finite[i]) std::fill(q, q + d, 0.0f);  // NaN stays within its row
      }
    rows.clear(heads * count, problem_.d_v);
    for (int64_t i = 0; i < heads * count && call_.sinks; ++i) {
      const float sink = sink_of(first_head + static_cast<int>(i / count));
      if (sink == kMinusInf) continue;
      rows.m[i] = sink;
      rows.l[i] = rows.l_high[i] = 1;  // a sink's mass is as exact as that of 16-bit pages
    }
    if (mma4_) kernels_.quantize_rows(problem_.method, heads * count, d, rows.q.data(), rows.q4.data());
  }

  // Rows of q and out lie a page of memory or more apart, where no hardware prefetcher follows.
  static constexpr int64_t kAhead = 8;

  // By bits and without a way out, so that the compiler makes it a loop over registers.
  static bool all_finite(const float* x, int n) {
    int32_t bad = 0;
    for (int i = 0; i < n; ++i) bad |= (bits_of(x[i]) & 0x7f800000u) == 0x7f800000u;
    return bad == 0;
  }

  // The mean row of one head; false where it has no finite row.
  bool mean_row(const Rows& rows, int64_t first, int64_t count, float* mean) const {
    const int d = problem_.d;
    int64_t n = 0;
    std::fill_n(mean, d, 0.0f);
    for (int64_t r = first; r < first + count; ++r) {
      if (!rows.finite[r]) continue;
      ++n;
      for (int c = 0; c < d; ++c) mean[c] += rows.q[r * d + c];
    }
    for (int c = 0; c < d; ++c) mean[c] = n ? mean[c] / static_cast<float>(n) : 0.0f;
    return n > 0;
  }

  static float norm(const float* x, int n) {
    float sum = 0;
    for (int i = 0; i < n; ++i) sum += x[i] * x[i];
    return std::sqrt(sum);
  }

  // Scores pages before reading them.
  void rank(std::span<const RankTask> tasks, int64_t first, int64_t end) const {
    if (problem_.method.policy == Policy::recent) {
      for (const RankTask& t : tasks)
        for (int64_t p = first; p < end; ++p) t.score[p] = t.heads > 0 ? static_cast<float>(p) : kMinusInf;
    } else {
      kernels_.rank(problem_.method.policy, *call_.layout, problem_.cache.high_dtype, problem_.sm_scale, tasks, first,
                    end);
    }
  }

  // Log2 of what a query head's sink takes.
  float sink_of(int head) const {
    const float sink = call_.sinks ? call_.sinks[head] * kLog2e : kMinusInf;
    return sink < kNoSink ? kMinusInf : sink;
  }

  // Scores by softmax mass: mean over the rows of a head, maximum over heads from `first_head` on. page_m and page_l
  // hold the pages [block.first_visible, end_page) of the rows.
  float rank_by_mass(const Rows& rows, int64_t first, int64_t count, int first_head, int heads, int64_t end_page,
                     const BlockPages& block, Choice& choice) const {
    const int64_t stride = max_pages(problem_), n = block.n(), all_pages = end_page - block.first_visible;
    float mean[kMaxChannels], q_norm = 0;
    float* score = choice.score.data() + block.first_visible;
    float* share = choice.mass.data();
    std::fill_n(score, n, 0.0f);
    for (int h = 0; h < heads; ++h) {
      const float sink = sink_of(first_head + h);
      if (estimates_error_ && mean_row(rows, first + h * count, count, mean))
        q_norm = std::max(q_norm, norm(mean, problem_.d));
      const auto begin = rows.finite.begin() + first + h * count;
      const auto seen = std::count(begin, begin + count, uint8_t{1});
      std::fill_n(share, all_pages, 0.0f);
      for (int64_t r = first + h * count; r < first + (h + 1) * count && all_pages > 0; ++r)
        if (rows.finite[r])
          kernels_.decode.add_shares(&rows.page_m[r * stride + block.first_visible],
                                     &rows.page_l[r * stride + block.first_visible], all_pages, sink,
                                     1.0f / static_cast<float>(seen), choice.share.data(), share);
      for (int64_t p = 0; p < n; ++p) score[p] = std::max(score[p], share[p]);
    }
    return q_norm;
  }

  BlockTask block_task(const SequenceCall& s, const PageRef* pages, int64_t first_page, int64_t end_page,
                       int64_t first_position, int heads, int rows, int period, Rows& r) const {
    BlockTask t{};
    t.layout = call_.layout;
    t.method = &problem_.method;
    t.high_dtype = problem_.cache.high_dtype;
    t.format = problem_.cache.format;
    t.centring = problem_.cache.centring;
    t.mma4 = mma4_;
    t.sm_scale = problem_.sm_scale;
    t.softcap = problem_.softcap;
    t.pages = pages;
    t.first_page = first_page;
    t.end_page = end_page;
    t.s_kv = s.s_kv;
    t.first_position = first_position;
    t.period = period;
    t.mask = mask_;
    t.rest = problem_.method.rest;
    t.heads = heads;
    t.rows = rows;
    t.q = r.q.data();
    t.q4 = r.q4.data();
    t.state = r.state();
    return t;
  }

  void want_pages(Rows& r, BlockTask& t) const {
    if (r.page_m.empty()) return;
    t.page_m = r.page_m.data();
    t.page_l = r.page_l.data();
    t.page_stride = max_pages(problem_);
  }

  // Pages, tail included, that rows up to position `last` see.
  int64_t end_page(const SequenceCall& s, int64_t last) const { return pages_for(mask_.end_token(last, s.s_kv)); }

  // In which tier the `oracle` policy scores pages: the best that is stored.
  void best_tiers(const PageRef* pages, const BlockPages& block, Choice& c) const {
    c.count = 0;
    for (int64_t p = block.first_visible; p < block.visible; ++p) {
      const Tier best = pages[p].high ? Tier::fp16 : pages[p].residual ? Tier::fp4x2 : Tier::fp4;
      c.promoted[c.count++] = {static_cast<int32_t>(p), best};
    }
  }

  void store_row_result(const SequenceCall& s, int64_t row, int head, const Rows& rows, int64_t i) const {
    const int d_v = problem_.d_v;
    float out[kMaxChannels];
    const float l = rows.l[i];
    const float scale = rows.finite[i] ? (l > 0 ? 1.0f / l : 0.0f) : kNaN;
    for (int c = 0; c < d_v; ++c) out[c] = rows.o[i * d_v + c] * scale;
    store_row(call_.out.dtype, out, d_v, call_.out.at(s.first_row + row, head));
    if (call_.lse) {
      const float lse = l > 0 ? (rows.m[i] + std::log2(l)) / kLog2e : kMinusInf;
      call_.lse[(s.first_row + row) * problem_.h_q + head] = rows.finite[i] ? lse : kNaN;
    }
  }

  void given_selection(int64_t block, Choice& c) const {
    const Selection& g = *call_.given;
    c.count = 0;
    c.wanted_not_stored = 0;
    for (int64_t i = g.first[block]; i < g.first[block + 1]; ++i) c.promoted[c.count++] = g.pages[i];
  }

  void count(const BlockPages& block, const Choice& c, Worker& w) const {
    w.pairs += block.n();
    w.promoted += c.count;
    w.wanted_not_stored += c.wanted_not_stored;
  }

  // --- prefill

  void prefill_block(int64_t sequence, int g, int first_head, int heads, int64_t block, int w, int64_t task) {
    const SequenceCall& s = call_.sequences[sequence];
    const int64_t offset = s.s_kv - s.s_q;  // position of row 0
    const int64_t page = floor_page(offset) + block;
    const int64_t first = std::max(page * kPageTokens, offset) - offset;
    const int64_t end = std::min((page + 1) * kPageTokens, s.s_kv) - offset;
    const int rows = static_cast<int>(end - first);
    const PageRef* pages = s.pages + g * s.page_stride;
    const int64_t last_page = end_page(s, offset + end - 1);
    const BlockPages facts = block_pages(offset + first, offset + end - 1, s.s_kv, mask_);
    Rows& r = scratch_.rows[w];
    Worker& worker = scratch_.workers[w];
    load_q(s, first, rows, g * group_ + first_head, heads, r);

    BlockTask t = block_task(s, pages, facts.first_visible, last_page, offset + first, heads, rows, rows, r);
    want_pages(r, t);
    const int64_t blocks = query_blocks(Phase::prefill, s.s_q, s.s_kv);
    if (!call_.given && ranks(problem_.method) && scores_first(problem_)) {
      for (int h = 0; h < heads; ++h) {
        best_tiers(pages, facts, scratch_.choices[w][h]);
        t.promoted[h] = scratch_.choices[w][h].result();
      }
      kernels_.score(t, worker.tiles);
    }
    for (int h = 0; h < heads; ++h) {
      Choice& c = scratch_.choices[w][h];
      if (call_.given) {
        given_selection(s.first_block + (g * group_ + first_head + h) * blocks + block, c);
      } else if (!ranks(problem_.method)) {
        choose_forced(problem_.method, facts, pages, c);
      } else {
        const int head = g * group_ + first_head + h;
        float q_norm = 0;
        if (scores_first(problem_)) {
          q_norm = rank_by_mass(r, h * rows, rows, head, 1, last_page, facts, c);
        } else {
          float mean[kMaxChannels];
          const RankTask whole{mean, mean_row(r, h * rows, rows, mean), pages, c.score.data(), nullptr};
          rank({&whole, 1}, facts.first_visible, facts.visible);
          if (estimates_error_) q_norm = norm(mean, problem_.d);
        }
        choose(problem_, kernels_, facts, pages, q_norm, c);
      }
      count(facts, c, worker);
      t.promoted[h] = c.result();
    }
    if (!call_.select_only) {
      kernels_.attend(t, worker.tiles);
      for (int h = 0; h < heads; ++h)
        for (int i = 0; i < rows; ++i) {
          const int head = g * group_ + first_head + h;
          if (i + kAhead < rows)
            prefetch<1>(call_.out.at(s.first_row + first + i + kAhead, head), problem_.d_v * size_of(call_.out.dtype));
          store_row_result(s, first + i, head, r, h * rows + i);
        }
    }
    fill_stats(task, [&](TaskStats& stats) {
      for (int h = 0; h < heads; ++h) {
        const Choice& c = scratch_.choices[w][h];
        stats.selection.emplace_back(c.result().begin(), c.result().end());
        head_stats(r, h * rows, rows, pages, last_page, facts, c, stats);
      }
    });
  }

  // --- decode

  struct UnitPlace {
    const SequenceCall& s;
    int g;
    const PageRef* pages;
    int64_t rows, offset, end;  // rows of the unit; position of row 0; pages, tail included
  };
  UnitPlace place(int64_t u) const {
    const int64_t heads = std::ssize(call_.kv_heads);
    const SequenceCall& s = call_.sequences[u / heads];
    const int g = call_.kv_heads[u % heads];
    return {s, g, s.pages + g * s.page_stride, group_ * s.s_q, s.s_kv - s.s_q, end_page(s, s.s_kv - 1)};
  }

  // KV heads of one sequence whose pages are read together: the units from `unit` on.
  struct HeadsOfWalk {
    int64_t sequence, unit, count;
  };
  HeadsOfWalk heads_of_walk(int64_t i) const {
    const int64_t all = std::ssize(call_.kv_heads), groups = head_groups(all), first = i % groups * kMaxHeadsPerWalk;
    return {i / groups, i / groups * all + first, std::min<int64_t>(kMaxHeadsPerWalk, all - first)};
  }

  void load_unit(int64_t u, bool by_mass, int w) {
    const UnitPlace at = place(u);
    Unit& unit = scratch_.units[u];
    load_q(at.s, 0, at.s.s_q, at.g * group_, group_, unit.rows_);
    if (!mma4_) {
      const float scale = problem_.sm_scale * kLog2e;
      for (int64_t i = 0; i < at.rows * problem_.d; ++i) unit.q[i] = unit.rows_.q[i] * scale;
      kernels_.decode.quantize_q(*call_.layout, static_cast<int>(at.rows), unit.q.data(), unit.q_cells.data(),
                                 unit.q_unit.data());
    }
    unit.block = block_pages(at.offset, at.s.s_kv - 1, at.s.s_kv, mask_);
    unit.starts_known = false;
    Choice& c = unit.choice;
    if (at.s.s_q == 0) {
      c.count = 0;
      return;
    }
    if (call_.given) {
      given_selection(at.s.first_block + at.g, c);
    } else if (!ranks(problem_.method)) {
      choose_forced(problem_.method, unit.block, at.pages, c);
    } else if (by_mass) {  // the tiers to score in; the choice comes after
      if (problem_.method.policy == Policy::oracle) {
        best_tiers(at.pages, unit.block, c);
      } else {
        choose_forced(problem_.method, unit.block, at.pages, c);
      }
      return;
    } else {
      mean_rows(at, unit);
      return;
    }
    count(unit.block, c, scratch_.workers[w]);
  }

  // What ranks the pages of a unit: the mean row of each query head that has finite ones.
  void mean_rows(const UnitPlace& at, Unit& unit) const {
    unit.mean_heads = 0;
    unit.q_norm = 0;
    for (int h = 0; h < group_; ++h) {
      float* mean = &unit.means[static_cast<int64_t>(unit.mean_heads) * problem_.d];
      if (!mean_row(unit.rows_, h * at.s.s_q, at.s.s_q, mean)) continue;
      if (estimates_error_) unit.q_norm = std::max(unit.q_norm, norm(mean, problem_.d));
      ++unit.mean_heads;
    }
    // With one row a head, its products with the means are where the scores of FP4 pages start.
    const Policy policy = problem_.method.policy;
    unit.starts_known = (policy == Policy::block_mean || policy == Policy::second_moment) && !unit.starts.empty() &&
                        at.s.s_q == 1 && unit.mean_heads == group_;
  }

  // Scores one range of pages of some KV heads of one sequence.
  void rank_pages(int64_t i, int64_t split) {
    const HeadsOfWalk heads = heads_of_walk(i);
    if (call_.sequences[heads.sequence].s_q == 0) return;
    RankTask tasks[kMaxHeadsPerWalk];
    for (int64_t h = 0; h < heads.count; ++h) {
      Unit& unit = scratch_.units[heads.unit + h];
      tasks[h] = {unit.means.data(), unit.mean_heads, place(heads.unit + h).pages, unit.choice.score.data(),
                  unit.starts_known ? unit.starts.data() : nullptr};
    }
    const BlockPages& block = scratch_.units[heads.unit].block;
    const Range range = range_of(block.n(), split, plan_.splits);
    const int64_t first = block.first_visible + range.first, end = block.first_visible + range.end;
    rank({tasks, static_cast<size_t>(heads.count)}, first, end);
    const int64_t width = round_up(group_, 4);
    for (int64_t h = 0; h < heads.count; ++h)
      for (int64_t k = first * width; k < end * width && tasks[h].products; ++k)
        tasks[h].products[k] *= problem_.sm_scale * kLog2e;
  }

  SoftmaxState state_of(Unit& unit, int split) const {
    return split == 0 ? unit.rows_.state() : unit.partial[split - 1].state();
  }

  BlockTask unit_task(int64_t u, int split) {
    const UnitPlace at = place(u);
    Unit& unit = scratch_.units[u];
    const int64_t first = unit.block.first_visible;
    const Range range = range_of(at.end - first, split, plan_.splits);
    BlockTask t = block_task(at.s, at.pages, first + range.first, first + range.end, at.offset, 1,
                             static_cast<int>(at.rows), static_cast<int>(std::max<int64_t>(1, at.s.s_q)), unit.rows_);
    t.promoted[0] = unit.choice.result();
    if (!mma4_) {  // scores are then in units of log2 as they are
      t.q = unit.q.data();
      t.sm_scale = 1.0f / kLog2e;
    }
    t.q_cells = unit.q_cells.data();
    t.q_unit = unit.q_unit.data();
    t.starts = unit.starts.empty() ? nullptr : unit.starts.data();
    t.start_stride = round_up(at.rows, 4);
    t.starts_known = unit.starts_known;
    t.state = state_of(unit, split);
    want_pages(unit.rows_, t);
    return t;
  }

  // Reads one range of pages of some KV heads of one sequence.
  void walk(int64_t i, int split, bool scores_alone, int w) {
    const auto [sequence, unit, count] = heads_of_walk(i);
    if (call_.sequences[sequence].s_q == 0) return;
    BlockTask tasks[kMaxHeadsPerWalk];
    for (int64_t h = 0; h < count; ++h) {
      const int64_t u = unit + h;
      BlockTask& t = tasks[h] = unit_task(u, split);
      if (scores_alone) {
        // Scored in FP4 even where the rest is dropped.
        if (problem_.method.policy == Policy::fp4_mass) t.rest = Tier::fp4;
      } else {
        if (split > 0) scratch_.units[u].partial[split - 1].clear(place(u).rows, problem_.d_v);
      }
    }
    if (mma4_) {
      for (int64_t h = 0; h < count; ++h)
        (scores_alone ? kernels_.score : kernels_.attend)(tasks[h], scratch_.workers[w].tiles);
    } else {
      (scores_alone ? kernels_.decode.score : kernels_.decode.attend)({tasks, static_cast<size_t>(count)});
    }
  }

  void select_unit(int64_t u, bool by_mass, int w) {
    const UnitPlace at = place(u);
    Unit& unit = scratch_.units[u];
    if (at.s.s_q == 0) return;
    Choice& c = unit.choice;
    if (by_mass) unit.q_norm = rank_by_mass(unit.rows_, 0, at.s.s_q, at.g * group_, group_, at.end, unit.block, c);
    choose(problem_, kernels_, unit.block, at.pages, unit.q_norm, c);
    count(unit.block, c, scratch_.workers[w]);
    if (unit.exchanged.empty()) return;
    unit.exchanged_count = 0;
    for (const Promoted& p : c.result())
      if (!is_forced(problem_.method.force, unit.block, p.page)) unit.exchanged[unit.exchanged_count++] = p;
    for (int64_t r = 0; r < at.rows; ++r) unit.mass_before[r] = log2_sum(unit, r);
  }

  // log2 of a row's sum over all splits.
  float log2_sum(Unit& unit, int64_t row) const {
    float m = kMinusInf, l = 0;
    for (int split = 0; split < plan_.splits; ++split) m = std::max(m, state_of(unit, split).m[row]);
    for (int split = 0; split < plan_.splits && m != kMinusInf; ++split) {
      const SoftmaxState s = state_of(unit, split);
      l += s.l[row] * std::exp2(s.m[row] - m);
    }
    return l > 0 ? m + std::log2(l) : kMinusInf;
  }

  // One part of a unit's list, in the state of one split: whichever read those pages, the sum of all is the same.
  void exchange_unit(int64_t u, int64_t part, int64_t parts) {
    Unit& unit = scratch_.units[u];
    const auto [first, end] = range_of(unit.exchanged_count, part, parts);
    if (call_.sequences[u / std::ssize(call_.kv_heads)].s_q == 0) return;
    BlockTask t = unit_task(u, static_cast<int>(part));
    t.promoted[0] = {unit.exchanged.data() + first, static_cast<size_t>(end - first)};
    if (!details_) t.page_m = t.page_l = nullptr;  // the choice is made: nobody asks for masses any more
    kernels_.decode.exchange(t);
  }

  // Whether what an exchange took out of some row was so much more than what stayed that float sums lost it: an FP4
  // score far above the true one.
  bool cancelled(Unit& unit, int64_t rows) const {
    // log2: so many rounding errors of what was there. Where a second plane is put in, the first one's products are
    // made once, with the difference of both weights, whose 15 bits are not those that went in.
    const float most = high_tier(problem_.method.storage) == Tier::fp4x2 ? 5 : 10;
    for (int64_t r = 0; r < rows; ++r)
      if (unit.mass_before[r] != kMinusInf && !(log2_sum(unit, r) >= unit.mass_before[r] - most)) return true;
    return false;
  }

  void finish_unit(int64_t u, bool exchanged) {
    const UnitPlace at = place(u);
    Unit& unit = scratch_.units[u];
    Rows& r = unit.rows_;
    if (!call_.select_only) {
      if (exchanged && at.s.s_q > 0 && cancelled(unit, at.rows)) {  // read again, each page in its own tier
        load_q(at.s, 0, at.s.s_q, at.g * group_, group_, r);
        for (int split = 0; split < plan_.splits; ++split) {
          if (split > 0) unit.partial[split - 1].clear(at.rows, problem_.d_v);
          const BlockTask t = unit_task(u, split);
          kernels_.decode.attend({&t, 1});
        }
      }
      for (Rows& partial : unit.partial)
        for (int64_t i = 0; i < at.rows; ++i)
          merge({&r.m[i], &r.l[i], &r.l_high[i], &r.o[i * problem_.d_v]},
                {&partial.m[i], &partial.l[i], &partial.l_high[i], &partial.o[i * problem_.d_v]}, problem_.d_v);
      for (int h = 0; h < group_; ++h)
        for (int64_t i = 0; i < at.s.s_q; ++i) store_row_result(at.s, i, at.g * group_ + h, r, h * at.s.s_q + i);
    }
    fill_stats(u, [&](TaskStats& stats) {
      stats.selection.emplace_back(unit.choice.result().begin(), unit.choice.result().end());
      for (int h = 0; h < group_; ++h)
        head_stats(r, h * at.s.s_q, at.s.s_q, at.pages, at.end, unit.block, unit.choice, stats);
    });
  }

  // --- statistics

  void start_stats(int64_t tasks) {
    for (Worker& w : scratch_.workers) w.pairs = w.promoted = w.wanted_not_stored = 0;
    if (!details_) return;
    task_stats_.resize(tasks);
    const int64_t blocks =
        call_.sequences.empty()
            ? 0
            : call_.sequences.back().first_block +
                  (problem_.phase == Phase::prefill ? problem_.h_q : problem_.h_kv) *
                      query_blocks(problem_.phase, call_.sequences.back().s_q, call_.sequences.back().s_kv);
    selection_.resize(blocks);
    page_mass_.assign(call_.sequences.size() * problem_.h_kv * max_pages(problem_), 0.0);
  }

  // Details alone allocate during a run; what a task throws would end the process.
  template <class Fill>
  void fill_stats(int64_t task, const Fill& fill) {
    if (!details_) return;
    try {
      fill(task_stats_[task]);
    } catch (const std::bad_alloc&) {
      out_of_memory_ = true;
    }
  }

  // The rows of one query head of one block.
  void head_stats(const Rows& r, int64_t first, int64_t count, const PageRef* pages, int64_t end_page,
                  const BlockPages& block, const Choice& c, TaskStats& stats) const {
    if (call_.select_only || !problem_.stats || count == 0) return;
    const int64_t stride = max_pages(problem_);
    stats.page_mass.resize(stride, 0.0);
    std::vector<double> mass(end_page);  // of this head, summed over its rows
    for (int64_t i = first; i < first + count; ++i) {
      if (!(r.l[i] > 0) || !r.finite[i]) continue;
      stats.mass_above_fp4 += r.l_high[i] / r.l[i];
      const float total = r.m[i] + std::log2(r.l[i]);
      for (int64_t p = block.first_visible; p < end_page; ++p)
        if (r.page_m[i * stride + p] != kMinusInf)
          mass[p] += r.page_l[i * stride + p] * std::exp2(r.page_m[i * stride + p] - total);
    }
    float mean[kMaxChannels];
    mean_row(r, first, count, mean);
    const float q_norm = norm(mean, problem_.d);
    size_t next = 0;
    for (int64_t p = block.first_visible; p < end_page; ++p) {
      stats.page_mass[p] += mass[p];
      while (next < static_cast<size_t>(c.count) && c.promoted[next].page < p) ++next;
      const bool promoted = next < static_cast<size_t>(c.count) && c.promoted[next].page == p;
      if (p < block.visible && (promoted ? c.promoted[next].tier : problem_.method.rest) == Tier::fp4)
        stats.error_estimate += error_contribution(
            summary_of(pages[p]), static_cast<float>(mass[p] / static_cast<double>(count)), problem_.sm_scale, q_norm);
    }
  }

  void add_stats(TaskStats& t, int index, int64_t block, int64_t sequence, int g, bool first_of_task) {
    selection_[block] = std::move(t.selection[index]);
    if (!first_of_task) return;
    mass_above_fp4_ += t.mass_above_fp4;
    error_estimate_ += t.error_estimate;
    double* mass = page_mass_.data() + (sequence * problem_.h_kv + g) * max_pages(problem_);
    for (size_t p = 0; p < t.page_mass.size(); ++p) mass[p] += t.page_mass[p];
  }

  void finish_stats() {
    if (!call_.stats) return;
    Stats& out = *call_.stats;
    for (const Worker& w : scratch_.workers) {
      // Pairs count query heads, and a decode selection serves a whole group.
      const int64_t heads = problem_.phase == Phase::decode ? group_ : 1;
      out.pairs += w.pairs * heads;
      out.promoted += w.promoted * heads;
      out.wanted_not_stored += w.wanted_not_stored * heads;
    }
    if (!details_) return;
    out.selection = {};
    out.selection.first.push_back(0);
    for (const auto& pages : selection_) {
      out.selection.pages.insert(out.selection.pages.end(), pages.begin(), pages.end());
      out.selection.first.push_back(static_cast<int64_t>(out.selection.pages.size()));
    }
    if (call_.select_only) return;
    int64_t rows = 0, blocks = 0;
    for (const SequenceCall& s : call_.sequences) {
      rows += s.s_q;
      blocks += query_blocks(problem_.phase, s.s_q, s.s_kv);
    }
    const int64_t heads = std::ssize(call_.kv_heads) * group_;
    out.mass_above_fp4 = rows ? mass_above_fp4_ / static_cast<double>(rows * heads) : 0;
    out.error_estimate = blocks ? error_estimate_ / static_cast<double>(blocks * heads) : 0;
    out.page_mass.assign(page_mass_.size(), 0.0f);
    const int64_t per_sequence = problem_.h_kv * max_pages(problem_);
    for (size_t i = 0; i < page_mass_.size(); ++i) {
      const int64_t s_q = call_.sequences[static_cast<int64_t>(i) / per_sequence].s_q;
      if (s_q) out.page_mass[i] = static_cast<float>(page_mass_[i] / static_cast<double>(s_q * group_));
    }
  }

  const Plan& plan_;
  const Problem& problem_;
  const Kernels& kernels_;
  Scratch& scratch_;
  ThreadPool& pool_;
  const AttentionCall& call_;
  const int group_;
  const Mask mask_;
  const bool mma4_;
  const bool estimates_error_;         // which a choice by tolerance needs |q_mean| for
  const bool details_;                 // whether anybody asks for more than the counts
  std::vector<TaskStats> task_stats_;  // empty where nobody does
  std::vector<std::vector<Promoted>> selection_;
  std::vector<double> page_mass_;
  double mass_above_fp4_ = 0, error_estimate_ = 0;
  std::atomic<bool> out_of_memory_ = false;  // for the details
};

}  // namespace

Status run(const Plan& plan, Scratch& scratch, ThreadPool& pool, const AttentionCall& call) {
  if (pool.size() > plan.threads)
    return invalid_argument(fmt::format("the plan is made for {} threads, the pool has {}", plan.threads, pool.size()));
  const Kernels* kernels = kernels_for(plan.target);
  if (!kernels) return invalid_argument(fmt::format("the plan's target {} is not run by this machine", plan.target));
  Run run(plan, *kernels, scratch, pool, call);
  plan.problem.phase == Phase::prefill ? run.prefill() : run.decode();
  return {};
}

}  // namespace thriftattn::cpu
