// What the host tells a workspace and asks of it: selections given, and what a run promoted. Both wait for the stream;
// the rest of this backend does not.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "cuda/choose.cuh"
#include "cuda/state.h"
#include "cuda/workspace.h"
#include "format/params.h"
#include "format/rows.h"

namespace thriftattn::cuda {
namespace {

constexpr float kLog2e = 1.44269504f;

// One call, as the host sees it once the stream is idle.
class Call {
 public:
  static Result<Call> create(const Plan& plan, const Workspace::State& w, const Cache& cache, Stream stream) {
    THRIFTATTN_RETURN_IF_ERROR(check_call(w, plan, &cache));
    Call call(plan.problem, w, cache, static_cast<cudaStream_t>(stream));
    THRIFTATTN_RETURN_IF_ERROR(call.download(call.layer_.s_kv, cache.size().max_sequences, &call.s_kv_));
    THRIFTATTN_RETURN_IF_ERROR(call.download(call.layer_.released, cache.size().max_sequences, &call.released_));
    return call;
  }

  // Refuses what names no page, or one that is not stored in the tier.
  Status check_selection(const Selection& selection) const {
    if (selection.first.empty()) return invalid_argument("the given selection has no offsets: `first` is empty");
    const int64_t blocks = std::ssize(selection.first) - 1;
    int64_t expected = 0;
    for (size_t i = 0; i < s_q().size(); ++i) expected += heads() * query_blocks(i);
    if (blocks != expected)
      return invalid_argument(
          fmt::format("the given selection has {} query blocks, the call has {}", blocks, expected));
    int64_t b = 0;
    for (size_t i = 0; i < s_q().size(); ++i)
      for (const int64_t end = b + heads() * query_blocks(i); b < end; ++b)
        THRIFTATTN_RETURN_IF_ERROR(check_block(selection, b, static_cast<int>(i)));
    return {};
  }

  // Calls body(sequence, head, query block of the sequence, its pages) in the order of a Selection.
  template <class Body>
  void for_blocks(Body body) const {
    for (size_t i = 0; i < s_q().size(); ++i)
      for (int h = 0; h < heads(); ++h)
        for (int64_t b = 0; b < query_blocks(i); ++b) body(static_cast<int>(i), h, b, pages_of(i, b));
  }

  Status give(const Selection& selection) const { return prefill() ? give_tiers(selection) : give_lists(selection); }

  Result<Stats> stats() const {
    Stats stats;
    stats.selection.first.push_back(0);
    THRIFTATTN_RETURN_IF_ERROR(prefill() ? read_tiers(&stats) : read_lists(&stats));
    if (p_.stats) THRIFTATTN_RETURN_IF_ERROR(read_masses(&stats));
    return stats;
  }

 private:
  Call(const Problem& p, const Workspace::State& w, const Cache& cache, cudaStream_t stream)
      : p_(p), w_(w), cache_(cache), layer_(cache.state().layer(w.layer)), stream_(stream) {}

  bool prefill() const { return p_.phase == Phase::prefill; }
  const std::vector<int64_t>& s_q() const { return cache_.state().s_q; }
  int slot(size_t i) const { return cache_.state().seqs[i]; }
  int64_t s_kv(size_t i) const { return s_kv_[slot(i)]; }
  int heads() const { return prefill() ? p_.h_q : p_.h_kv; }
  int64_t query_blocks(size_t i) const { return thriftattn::query_blocks(p_.phase, s_q()[i], s_kv(i)); }

  BlockPages pages_of(size_t i, int64_t block) const {
    const int64_t s_kv = this->s_kv(i), offset = s_kv - s_q()[i];
    if (!prefill()) return block_pages(offset, s_kv - 1, s_kv, {p_.causal, p_.window});
    const int64_t page = floor_page(offset) + block;
    return block_pages(std::max(page * kPageTokens, offset), std::min((page + 1) * kPageTokens, s_kv) - 1, s_kv,
                       {p_.causal, p_.window});
  }

  Status check_block(const Selection& selection, int64_t b, int i) const {
    const int64_t first = selection.first[b], end = selection.first[b + 1];
    if (first < 0 || end < first || end > std::ssize(selection.pages))
      return invalid_argument(fmt::format("given selection, block {}: pages [{}, {}) are not among its {}", b, first,
                                          end, selection.pages.size()));
    int64_t previous = -1;
    for (int64_t e = first; e < end; ++e) {
      const auto [page, tier] = selection.pages[e];
      if (page <= previous || page >= s_kv(i) / kPageTokens)
        return invalid_argument(fmt::format(
            "given selection, block {}: page {} is out of order or not a full page of sequence {}", b, page, i));
      previous = page;
      const bool stored = tier == Tier::none || (tier == Tier::fp4 && layer_.fp4) ||
                          (tier == Tier::fp4x2 && layer_.residual) ||
                          (tier == Tier::fp16 && layer_.has_high(page, released_[slot(i)]));
      if (!stored)
        return invalid_argument(
            fmt::format("given selection, block {}: page {} is not stored in tier {}", b, page, to_string(tier)));
      if (prefill()) THRIFTATTN_RETURN_IF_ERROR(check_prefill_tier(b, page, tier, s_kv(i)));
    }
    return {};
  }

  // A prefill expands pages into memory that the plan has sized: planes only where its method reads some, and 16 bit,
  // where not all pages keep that form, only of those that a method may name.
  Status check_prefill_tier(int64_t b, int64_t page, Tier tier, int64_t s_kv) const {
    if (p_.method.rest == Tier::fp16 && (tier == Tier::fp4 || tier == Tier::fp4x2))
      return unsupported(
          fmt::format("given selection, block {}: page {} in tier {} under method {}, whose prefill on a "
                      "GPU has room for fp16 alone",
                      b, page, to_string(tier), to_string(p_.method)));
    const HighRoom room = prefill_high_room(p_);
    const int64_t near = pages_for(s_kv) - (room.pages - room.sink);
    if (tier == Tier::fp16 && page >= room.sink && page < near)
      return unsupported(fmt::format(
          "given selection, block {}: page {} in tier fp16, of which a prefill of up to {} rows on a GPU has "
          "room for pages before {} and from {}",
          b, page, p_.max_s_q, room.sink, near));
    return {};
  }

  // --- decode: lists

  Status give_lists(const Selection& selection) const {
    const int64_t max_pages = cuda::max_pages(p_);
    std::vector<uint32_t> order(units(p_) * max_pages);
    std::vector<int32_t> counts(units(p_) * 8);
    int64_t block = 0;
    for_blocks([&](int i, int g, int64_t, const BlockPages& pages) {
      const int64_t u = int64_t{i} * p_.h_kv + g;
      uint32_t* to = &order[u * max_pages];
      int32_t* count = &counts[u * 8];
      std::vector<bool> listed(max_pages);
      for (int64_t e = selection.first[block]; e < selection.first[block + 1]; ++e) {
        const auto [page, tier] = selection.pages[e];
        if (page < pages.first_visible || page >= pages.visible) continue;
        to[count[0]++] = static_cast<uint32_t>(page) * 4 + static_cast<uint32_t>(tier);
        ++count[4 - static_cast<int>(tier)];
        listed[page] = true;
      }
      ++block;
      std::stable_sort(to, to + count[0], [](uint32_t a, uint32_t b) { return a % 4 > b % 4; });
      // Pages to come are among the others, so that the sequence may grow (as cuda.h says).
      int64_t n = count[0];
      for (int64_t page = pages.first_visible; page < max_pages; ++page)
        if (!listed[page]) to[n++] = static_cast<uint32_t>(page) * 4 + static_cast<uint32_t>(p_.method.rest);
    });
    THRIFTATTN_RETURN_IF_ERROR(upload(order, w_.at.order));
    return upload(counts, w_.at.counts);
  }

  Status read_lists(Stats* stats) const {
    const int64_t max_pages = cuda::max_pages(p_), group = p_.h_q / p_.h_kv;
    const bool forced_alone = !w_.given && promotes(p_.method) && !ranks(p_.method);  // of which there is no list
    const Choosing how = choosing(p_.method, {}, false);
    std::vector<uint32_t> order;
    std::vector<int32_t> counts;
    THRIFTATTN_RETURN_IF_ERROR(download(w_.pointer<uint32_t>(w_.at.order), units(p_) * max_pages, &order));
    THRIFTATTN_RETURN_IF_ERROR(download(w_.pointer<int32_t>(w_.at.counts), units(p_) * 8, &counts));
    for_blocks([&](int i, int g, int64_t, const BlockPages& pages) {
      const int64_t u = int64_t{i} * p_.h_kv + g;
      stats->pairs += pages.n() * group;
      stats->promoted += counts[u * 8] * group;
      stats->wanted_not_stored += counts[u * 8 + 5] * group;
      if (forced_alone) {
        const Candidates c = candidates(pages, how.force, layer_, counts[u * 8 + 6]);
        for (int page = c.first; page < c.end; ++page)
          if (const Verdict v = judge(how, c, Cut::none(), page, c.forced(page) ? kForcedKey : 1); v.listed)
            stats->selection.pages.push_back({page, v.tier});
      } else {
        uint32_t* first = &order[u * max_pages];
        std::sort(first, first + counts[u * 8]);  // by page
        for (int64_t e = 0; e < counts[u * 8]; ++e)
          stats->selection.pages.push_back({static_cast<int32_t>(first[e] / 4), static_cast<Tier>(first[e] % 4)});
      }
      stats->selection.first.push_back(std::ssize(stats->selection.pages));
    });
    return {};
  }

  // --- prefill: tiers, 2 bits a page

  int64_t block_index(int i, int h, int64_t block) const { return (int64_t{i} * p_.h_q + h) * max_blocks(p_) + block; }

  Status give_tiers(const Selection& selection) const {
    const int64_t blocks = int64_t{p_.b} * p_.h_q * max_blocks(p_);
    std::vector<uint32_t> tiers(blocks * tier_words(p_));
    std::vector<int32_t> counts(blocks * 2);
    int64_t block = 0;
    for_blocks([&](int i, int h, int64_t b, const BlockPages& pages) {
      const int64_t at = block_index(i, h, b);
      uint32_t* words = &tiers[at * tier_words(p_)];
      const auto set = [words](int64_t page, Tier tier) {
        uint32_t& word = words[page / 16];
        const int shift = static_cast<int>(page % 16) * 2;
        word = (word & ~(3u << shift)) | static_cast<uint32_t>(tier) << shift;
      };
      for (int64_t page = pages.first_visible; page < pages.visible; ++page) set(page, p_.method.rest);
      for (int64_t e = selection.first[block]; e < selection.first[block + 1]; ++e) {
        const auto [page, tier] = selection.pages[e];
        if (page < pages.first_visible || page >= pages.visible) continue;
        set(page, tier);
        ++counts[at * 2];
      }
      ++block;
    });
    THRIFTATTN_RETURN_IF_ERROR(upload(tiers, w_.at.tiers));
    return upload(counts, w_.at.block_counts);
  }

  Status read_tiers(Stats* stats) const {
    const int64_t blocks = int64_t{p_.b} * p_.h_q * max_blocks(p_);
    std::vector<uint32_t> tiers;
    std::vector<int32_t> counts;
    THRIFTATTN_RETURN_IF_ERROR(download(w_.pointer<uint32_t>(w_.at.tiers), blocks * tier_words(p_), &tiers));
    THRIFTATTN_RETURN_IF_ERROR(download(w_.pointer<int32_t>(w_.at.block_counts), blocks * 2, &counts));
    for_blocks([&](int i, int h, int64_t b, const BlockPages& pages) {
      const int64_t at = block_index(i, h, b);
      stats->pairs += pages.n();
      stats->promoted += counts[at * 2];
      stats->wanted_not_stored += counts[at * 2 + 1];
      for (int64_t page = pages.first_visible; page < pages.visible; ++page) {
        const auto tier = static_cast<Tier>(tiers[at * tier_words(p_) + page / 16] >> page % 16 * 2 & 3);
        if (tier != p_.method.rest) stats->selection.pages.push_back({static_cast<int32_t>(page), tier});
      }
      stats->selection.first.push_back(std::ssize(stats->selection.pages));
    });
    return {};
  }

  // --- Problem::stats, of decode alone

  Status read_masses(Stats* stats) const {
    const int group = p_.h_q / p_.h_kv, stride = row_stride(p_), table = layer_.max_pages, parts = mass_parts(p_);
    const int64_t summary_bytes = layer_.summary ? layer_.canonical.summary_bytes : 0;
    int64_t rows = 0;
    for (const int64_t n : s_q()) rows += n;
    std::vector<float> page_mass, high, lse;
    std::vector<uint8_t> q, summaries;
    std::vector<int32_t> block_table;
    THRIFTATTN_RETURN_IF_ERROR(
        download(w_.pointer<float>(w_.at.page_mass), units(p_) * table * parts * stride, &page_mass));
    THRIFTATTN_RETURN_IF_ERROR(download(w_.pointer<float>(w_.at.row_mass_high), units(p_) * stride, &high));
    THRIFTATTN_RETURN_IF_ERROR(download(w_.pointer<float>(w_.at.lse), rows * p_.h_q, &lse));
    THRIFTATTN_RETURN_IF_ERROR(download(w_.pointer<uint8_t>(w_.at.q), rows * p_.h_q * p_.d * size_of(w_.q_dtype), &q));
    THRIFTATTN_RETURN_IF_ERROR(
        download(layer_.block_table, int64_t{cache_.size().max_sequences} * table, &block_table));
    THRIFTATTN_RETURN_IF_ERROR(download(layer_.summary, summary_bytes * cache_.size().pages * p_.h_kv, &summaries));

    const int64_t of_unit = max_pages(p_);
    stats->page_mass.assign(s_q().size() * p_.h_kv * of_unit, 0.0f);
    double mass_high = 0, error = 0;
    int64_t first_row = 0, blocks = 0, unit = 0, next = 0;
    for (size_t i = 0; i < s_q().size(); first_row += s_q()[i++]) {
      if (s_q()[i] == 0) {
        unit += p_.h_kv;
        continue;
      }
      ++blocks;
      const BlockPages block = pages_of(i, 0);
      const int64_t end_page = pages_for(Mask{p_.causal, p_.window}.end_token(s_kv(i) - 1, s_kv(i)));
      std::vector<double> mass(end_page);
      for (int g = 0; g < p_.h_kv; ++g, ++unit, ++next) {
        float* of_pages = &stats->page_mass[unit * of_unit];
        for (int h = 0; h < group; ++h) {
          const int head = g * group + h;
          std::fill(mass.begin(), mass.end(), 0.0);
          for (int64_t r = 0; r < s_q()[i]; ++r) {
            const float log2_sum = lse[(first_row + r) * p_.h_q + head] * kLog2e;
            if (!std::isfinite(log2_sum)) continue;
            const int64_t row = h * s_q()[i] + r;
            mass_high += high[unit * stride + row];
            for (int64_t p = block.first_visible; p < end_page; ++p) {
              for (int part = 0; part < parts; ++part) {
                const float x = page_mass[((unit * table + p) * parts + part) * stride + row];
                if (!std::isnan(x)) mass[p] += std::exp2(x - log2_sum);
              }
            }
          }
          const float norm = mean_norm(q.data(), first_row, s_q()[i], rows, head);
          const Promoted* promoted = stats->selection.pages.data() + stats->selection.first[next];
          const Promoted* end = stats->selection.pages.data() + stats->selection.first[next + 1];
          const auto count = static_cast<double>(s_q()[i]);
          for (int64_t p = block.first_visible; p < end_page; ++p) {
            of_pages[p] += static_cast<float>(mass[p] / (count * group));
            while (promoted < end && promoted->page < p) ++promoted;
            const bool listed = promoted < end && promoted->page == p;
            if (p >= block.visible || (listed ? promoted->tier : p_.method.rest) != Tier::fp4) continue;
            const int64_t page_id = block_table[slot(i) * int64_t{table} + p];
            PageSummary facts;
            std::memcpy(&facts, &summaries[(page_id * p_.h_kv + g) * summary_bytes], sizeof(facts));
            error += error_contribution(facts, static_cast<float>(mass[p] / count), p_.sm_scale, norm);
          }
        }
      }
    }
    stats->mass_above_fp4 = rows ? mass_high / static_cast<double>(rows * p_.h_q) : 0;
    stats->error_estimate = blocks ? error / static_cast<double>(blocks * p_.h_q) : 0;
    return {};
  }

  // Norm of the mean of a head's finite rows; q: [h_q, all_rows, d].
  float mean_norm(const uint8_t* q, int64_t first, int64_t count, int64_t all_rows, int head) const {
    float mean[kMaxChannels] = {}, row[kMaxChannels];
    float finite = 0;
    for (int64_t r = first; r < first + count; ++r) {
      load_row(w_.q_dtype, q + (head * all_rows + r) * p_.d * size_of(w_.q_dtype), p_.d, row);
      if (!std::all_of(row, row + p_.d, [](float x) { return std::isfinite(x); })) continue;
      ++finite;
      for (int c = 0; c < p_.d; ++c) mean[c] += row[c];
    }
    float sum = 0;
    for (int c = 0; c < p_.d && finite > 0; ++c) sum += mean[c] / finite * (mean[c] / finite);
    return std::sqrt(sum);
  }

  // --- copies that wait

  template <class T>
  Status download(const T* from, int64_t count, std::vector<std::remove_const_t<T>>* to) const {
    to->resize(count);
    if (count == 0) return {};
    THRIFTATTN_RETURN_IF_ERROR(check(
        cudaMemcpyAsync(to->data(), from, count * sizeof(T), cudaMemcpyDeviceToHost, stream_), "cudaMemcpyAsync"));
    return check(cudaStreamSynchronize(stream_), "cudaStreamSynchronize");
  }
  template <class T>
  Status upload(const std::vector<T>& from, int64_t offset) const {
    THRIFTATTN_RETURN_IF_ERROR(check(
        cudaMemcpyAsync(w_.pointer<T>(offset), from.data(), from.size() * sizeof(T), cudaMemcpyHostToDevice, stream_),
        "cudaMemcpyAsync"));
    return check(cudaStreamSynchronize(stream_), "cudaStreamSynchronize");
  }

  const Problem& p_;
  const Workspace::State& w_;
  const Cache& cache_;
  LayerCache layer_;
  cudaStream_t stream_;
  std::vector<int32_t> s_kv_, released_;  // [max_sequences]
};

}  // namespace

Status give_selection(const Plan& plan, Workspace& workspace, const Cache& cache, const Selection* selection,
                      Stream stream) {
  Workspace::State& w = workspace.state();
  const CurrentDevice current(w.device);
  if (selection) {
    THRIFTATTN_ASSIGN_OR_RETURN(call, Call::create(plan, w, cache, stream));
    THRIFTATTN_RETURN_IF_ERROR(call.check_selection(*selection));
    THRIFTATTN_RETURN_IF_ERROR(call.give(*selection));
  } else if (plan.problem.phase == Phase::decode) {  // methods that promote nothing run on empty lists
    const auto stream_of = static_cast<cudaStream_t>(stream);
    THRIFTATTN_RETURN_IF_ERROR(
        check(cudaMemsetAsync(w.lists().counts, 0, units(w.plan.problem) * 8 * 4, stream_of), "cudaMemsetAsync"));
    THRIFTATTN_RETURN_IF_ERROR(check(cudaStreamSynchronize(stream_of), "cudaStreamSynchronize"));
  }
  w.given = selection != nullptr;
  return {};
}

Result<Stats> stats(const Plan& plan, const Workspace& workspace, const Cache& cache, Stream stream) {
  const Workspace::State& w = workspace.state();
  const CurrentDevice current(w.device);
  THRIFTATTN_ASSIGN_OR_RETURN(call, Call::create(plan, w, cache, stream));
  return call.stats();
}

}  // namespace thriftattn::cuda
