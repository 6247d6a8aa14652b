#include "thriftattn/cache.h"

#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#include "attention/backends.h"
#include "attention/cache_state.h"
#include "format/page_codec.h"
#include "format/rows.h"
#include "thriftattn/threads.h"

namespace thriftattn {

int64_t form_table_bytes(const CacheConfig& c) {
  return c.layers * (c.h_kv * int64_t{sizeof(PageForms)} + int64_t{sizeof(int32_t)}) + int64_t{sizeof(int32_t)};
}

MemoryUse memory_use(const CacheState& s) {
  MemoryUse use;
  use.codes = s.fp4.used_bytes();
  use.residual = s.residual.used_bytes();
  use.high = s.high.used_bytes();
  use.summaries = s.summary.used_bytes();
  const int64_t live_pages = static_cast<int64_t>(s.page_users.size() - s.free_pages.size());
  use.tables = live_pages * form_table_bytes(s.config);
  for (const Sequence& q : s.sequences)
    if (q.live) use.tables += static_cast<int64_t>(q.pages.size() * sizeof(int32_t));
  return use;
}

MemoryUse memory_needed(const PageLayout& l, const CacheConfig& config, const SequenceForms& q) {
  MemoryUse use;
  for (const uint8_t forms : q.forms) {
    use.codes += forms & kFp4Form ? l.fp4_bytes : 0;
    use.residual += forms & kResidualForm ? l.fp4_bytes : 0;
    use.high += forms & kHighForm ? l.high_bytes : 0;
    use.summaries += forms & kSummaryForm ? l.summary_bytes : 0;
  }
  use.tables = q.pages() * (form_table_bytes(config) + int64_t{sizeof(int32_t)});
  return use;
}

uint8_t stored_forms(const CacheState& s, int layer, int kv_head, int64_t page, int64_t tokens, int64_t released) {
  if (page >= tokens / kPageTokens) return kHighForm;
  const CacheState::Stored stored = s.stored(layer, kv_head);
  const bool high = stored.all_high || page < s.config.sink || page >= released;
  return static_cast<uint8_t>((stored.fp4 ? kFp4Form : 0) | (stored.residual ? kResidualForm : 0) |
                              (high ? kHighForm : 0) | (stored.summary ? kSummaryForm : 0));
}

Status unknown_sequence(SeqId seq) { return not_found(fmt::format("sequence {} does not exist", seq)); }

namespace {

// Rows of one head that an append brings in without waking other threads, which takes longer than that many rows do.
constexpr int64_t kRowsAlone = 64;

// Heads of pages that one thread appends in turn, so that it can read each one's rows ahead: few enough that all
// threads end at about the same time.
constexpr int64_t kRunsPerThread = 4, kMaxRun = 16;

// Makes sure that `count` take_page calls and `entries` more in `table` succeed; false where no memory is left.
bool reserve_pages(CacheState& s, int64_t count, std::vector<int32_t>& table, int64_t entries) {
  try {
    grow_by(table, entries);
    const int64_t fresh = std::max<int64_t>(0, count - static_cast<int64_t>(s.free_pages.size()));
    grow_by(s.page_users, fresh);
    grow_by(s.high_users, fresh * s.config.layers);
    grow_by(s.forms, fresh * s.config.layers * s.config.h_kv);
    s.free_pages.reserve(s.page_users.capacity());  // every page may become free
  } catch (const std::bad_alloc&) {
    return false;
  }
  return true;
}

// A page id whose records are all empty, held by one sequence.
int32_t take_page(CacheState& s) {
  if (s.free_pages.empty()) {
    s.free_pages.push_back(static_cast<int32_t>(s.page_users.size()));
    s.page_users.push_back(0);
    s.high_users.resize(s.high_users.size() + s.config.layers, 0);
    s.forms.resize(s.forms.size() + static_cast<size_t>(s.config.layers) * s.config.h_kv);
  }
  const int32_t page = s.free_pages.back();
  s.free_pages.pop_back();
  s.page_users[page] = 1;
  return page;
}

// Sequences whose 16-bit window holds the page in one layer.
int32_t& high_users(CacheState& s, int32_t page, int layer) {
  return s.high_users[static_cast<int64_t>(page) * s.config.layers + layer];
}

// One sequence gives up the 16-bit form of a page; the last one to do so frees it, for the heads that may lose it.
void release_high(CacheState& s, int32_t page, int layer) {
  int32_t& users = high_users(s, page, layer);
  if (users == 0 || --users > 0) return;
  PageForms* forms = s.forms_of(page, layer);
  for (int h = 0; h < s.config.h_kv; ++h)
    if (!s.stored(layer, h).all_high) s.high.give_back(forms[h].high);
}

void drop_encoded(CacheState& s, PageForms& forms) {
  s.fp4.give_back(forms.fp4);
  s.residual.give_back(forms.residual);
  s.summary.give_back(forms.summary);
}

// One sequence drops page `index` of its table; the last one to do so frees it.
void drop_page(CacheState& s, Sequence& q, int64_t index) {
  const int32_t page = q.pages[index];
  for (int l = 0; l < s.config.layers; ++l)
    if (index < s.config.sink || index >= q.released[l]) release_high(s, page, l);
  if (--s.page_users[page] > 0) return;
  for (int l = 0; l < s.config.layers; ++l) {
    high_users(s, page, l) = 0;
    for (int h = 0; h < s.config.h_kv; ++h) {
      PageForms& forms = s.forms_of(page, l)[h];
      drop_encoded(s, forms);
      s.high.give_back(forms.high);
    }
  }
  s.free_pages.push_back(page);
}

Status check_shape(const CacheConfig& c, const View& k, const View& v) {
  if (k.tokens < 0 || k.tokens != v.tokens || k.heads != c.h_kv || v.heads != c.h_kv || k.channels != c.d ||
      v.channels != c.d_v)
    return invalid_argument(
        fmt::format("k [{}, {}, {}] and v [{}, {}, {}] do not fit the cache: [n, {}, {}] and [n, {}, {}]", k.tokens,
                    k.heads, k.channels, v.tokens, v.heads, v.channels, c.h_kv, c.d, c.h_kv, c.d_v));
  return {};
}

// Names the first value of x that its 16-bit form cannot hold; an ok status where there is none.
Status check_values(const CacheConfig& config, int layer, const char* name, const View& x) {
  const float limit = high_limit(config.high_dtype);
  float row[kMaxChannels];
  for (int64_t t = 0; t < x.tokens; ++t)
    for (int64_t h = 0; h < x.heads; ++h) {
      load_row(x.dtype, x.at(t, h), x.channels, row);
      const float* bad = std::find_if(row, row + x.channels, [&](float e) { return !(std::abs(e) <= limit); });
      if (bad != row + x.channels)
        return invalid_argument(
            fmt::format("{} of layer {}, token {}, head {}, channel {} is {}: {} holds finite values "
                        "up to {}",
                        name, layer, t, h, bad - row, *bad, config.high_dtype == DType::f16 ? "f16" : "bf16",
                        config.high_dtype == DType::f16 ? "65504" : "3.39e38"));
    }
  return {};
}

// Takes the records that tokens [from, to) of one layer need of pages that its table holds; all are reserved.
void take_records(CacheState& s, const Sequence& q, int layer, int64_t from, int64_t to) {
  for (int64_t p = from / kPageTokens; p < pages_for(to); ++p) {
    PageForms* forms = s.forms_of(q.pages[p], layer);
    const bool fills = p < to / kPageTokens;
    if (forms[0].high < 0) high_users(s, q.pages[p], layer) = 1;
    for (int h = 0; h < s.config.h_kv; ++h) {
      const CacheState::Stored stored = s.stored(layer, h);
      if (forms[h].high < 0) forms[h].high = s.high.take();
      if (fills && stored.fp4) forms[h].fp4 = s.fp4.take();
      if (fills && stored.residual) forms[h].residual = s.residual.take();
      if (fills && stored.summary) forms[h].summary = s.summary.take();
    }
  }
}

// Gives back what take_records took, and the last `new_pages` pages of the table.
void give_back_records(CacheState& s, Sequence& q, int layer, int64_t from, int64_t to, int64_t new_pages) {
  for (int64_t p = from / kPageTokens; p < pages_for(to); ++p) {
    PageForms* forms = s.forms_of(q.pages[p], layer);
    const bool was_tail = p * kPageTokens < from;
    if (!was_tail) high_users(s, q.pages[p], layer) = 0;
    for (int h = 0; h < s.config.h_kv; ++h) {
      drop_encoded(s, forms[h]);
      if (!was_tail) s.high.give_back(forms[h].high);
    }
  }
  for (; new_pages > 0; --new_pages) {
    s.page_users[q.pages.back()] = 0;
    s.free_pages.push_back(q.pages.back());
    q.pages.pop_back();
  }
}

}  // namespace

CacheConfig CacheConfig::for_method(const Method& m, int layers, int h_kv, int d, int d_v) {
  CacheConfig c;
  c.layers = layers;
  c.h_kv = h_kv;
  c.d = d;
  c.d_v = d_v;
  c.storage = m.storage;
  c.format = m.format;
  c.scales = m.scales;
  const bool has_fp4 = m.storage != Storage::high_only;
  c.centring = m.centring && has_fp4;
  c.page_scale = m.page_scale;
  // `auto` ranks by block means in prefill.
  c.mean = c.centring || m.policy == Policy::block_mean || m.policy == Policy::automatic ||
           m.policy == Policy::second_moment;
  c.min_max = m.policy == Policy::quest;
  c.variance = m.policy == Policy::second_moment;
  c.sink = std::max(1, m.force.sink);
  c.recent = std::max({2, m.recent, m.force.previous + 1});
  return c;
}

// All heads of a page come and go together: of more than these one page of tokens would take gigabytes.
constexpr int64_t kMostHeads = int64_t{1} << 20;

Result<KvCache> KvCache::create(const CacheConfig& c) {
  const auto refuse = [](const char* name, int64_t value, const char* supported) {
    return invalid_argument(fmt::format("{} {} is not supported: {}", name, value, supported));
  };
  if (c.layers < 1) return refuse("layers", c.layers, "1 or more");
  if (c.h_kv < 1) return refuse("h_kv", c.h_kv, "1 or more");
  if (int64_t{c.layers} * c.h_kv > kMostHeads)
    return invalid_argument(
        fmt::format("{} layers of {} KV heads are not supported: {} heads in all are", c.layers, c.h_kv, kMostHeads));
  if (!is_head_dim(c.d)) return refuse("head_dim", c.d, "multiples of 16 from 16 to 256 are");
  if (!is_head_dim(c.d_v)) return refuse("value head_dim", c.d_v, "multiples of 16 from 16 to 256 are");
  if (c.high_dtype == DType::f32) return invalid_argument("the cache's 16-bit form is f16 or bf16, not f32");
  if (!c.storage_by_head.empty() && std::ssize(c.storage_by_head) != int64_t{c.layers} * c.h_kv)
    return invalid_argument(fmt::format("storage_by_head names {} storages, expected layers x h_kv = {} x {}",
                                        c.storage_by_head.size(), c.layers, c.h_kv));
  std::vector<Storage> storages = c.storage_by_head;
  storages.push_back(c.storage);
  for (const Storage storage : storages)
    if (storage == Storage::compact || storage == Storage::offload)
      return unsupported(
          fmt::format("storage {} is not supported: high_only, dual, residual and fp4_only are", to_string(storage)));
  if (c.centring && !c.mean) return invalid_argument("centring needs the page means");
  if (c.sink < 0) return refuse("sink", c.sink, "0 or more pages");
  if (c.recent < 2) return refuse("recent", c.recent, "2 or more pages");
  if (c.max_bytes < 0) return refuse("max_bytes", c.max_bytes, "0 (no limit) or more");
  auto s = std::make_unique<CacheState>();
  s->config = c;
  s->layout = page_layout(c.d, c.d_v, c.format, c.mean, c.min_max, c.variance);
  s->fp4 = RecordPool(s->layout.fp4_bytes);
  s->residual = RecordPool(s->layout.fp4_bytes);
  s->high = RecordPool(s->layout.high_bytes);
  s->summary = RecordPool(s->layout.summary_bytes);
  return KvCache(std::move(s));
}

KvCache::KvCache(std::unique_ptr<CacheState> state) : state_(std::move(state)) {}
KvCache::KvCache(KvCache&&) noexcept = default;
KvCache& KvCache::operator=(KvCache&&) noexcept = default;
KvCache::~KvCache() = default;
const CacheConfig& KvCache::config() const { return state_->config; }
const CacheState& KvCache::state() const { return *state_; }
CacheState& KvCache::state() { return *state_; }

SeqId KvCache::new_sequence() {
  const CacheConfig& c = state_->config;
  auto& all = state_->sequences;
  try {
    Sequence fresh;
    fresh.live = true;
    fresh.layer_length.assign(c.layers, 0);
    fresh.released.assign(c.layers, c.sink);
    size_t id = 0;
    while (id < all.size() && all[id].live) ++id;
    if (id == all.size()) all.emplace_back();
    all[id] = std::move(fresh);
    return static_cast<SeqId>(id);
  } catch (const std::bad_alloc&) {
    return -1;
  }
}

Status KvCache::append(SeqId seq, int layer, const View& k, const View& v, ThreadPool& pool) {
  CacheState& s = *state_;
  const CacheConfig& c = s.config;
  if (!s.find(seq)) return unknown_sequence(seq);
  if (layer < 0 || layer >= c.layers)
    return invalid_argument(fmt::format("layer {} does not exist: the cache has {}", layer, c.layers));
  THRIFTATTN_RETURN_IF_ERROR(check_shape(c, k, v));

  Sequence& q = s.sequences[seq];
  const int64_t from = q.layer_length[layer], to = from + k.tokens;
  const int64_t first_page = from / kPageTokens, end_page = pages_for(to);
  const int64_t filled = to / kPageTokens - first_page;  // pages that become full

  // Reserve everything first, so that nothing is appended where something is missing.
  const int64_t new_pages = std::max<int64_t>(0, end_page - static_cast<int64_t>(q.pages.size()));
  CacheState::Records fresh;
  fresh.high = (end_page - first_page - (from % kPageTokens != 0 ? 1 : 0)) * c.h_kv;
  for (int h = 0; h < c.h_kv; ++h) {
    const CacheState::Stored stored = s.stored(layer, h);
    fresh.fp4 += stored.fp4 ? filled : 0;
    fresh.residual += stored.residual ? filled : 0;
    fresh.summary += stored.summary ? filled : 0;
  }
  const int64_t need = fresh.high * s.layout.high_bytes + (fresh.fp4 + fresh.residual) * s.layout.fp4_bytes +
                       fresh.summary * s.layout.summary_bytes +
                       new_pages * (form_table_bytes(c) + int64_t{sizeof(int32_t)});
  if (c.max_bytes > 0 && memory_use(s).total() + need > c.max_bytes)
    return Status(Code::out_of_memory, fmt::format("{} more tokens need {} bytes, the cache holds {} of at most {}",
                                                   k.tokens, need, memory_use(s).total(), c.max_bytes));
  if (!reserve_pages(s, new_pages, q.pages, new_pages) || !s.reserve(fresh))
    return Status(Code::out_of_memory,
                  fmt::format("{} more tokens need {} bytes, which the system refused", k.tokens, need));

  for (int64_t i = 0; i < new_pages; ++i) q.pages.push_back(take_page(s));
  take_records(s, q, layer, from, to);

  std::atomic<bool> good{true};
  const int64_t tasks = (end_page - first_page) * c.h_kv;  // heads of a page one after another, as its rows lie
  const auto page_append = [&](int64_t task) {
    const int64_t p = first_page + task / c.h_kv;
    const int h = static_cast<int>(task % c.h_kv);
    const int64_t begin = std::max(from, p * kPageTokens), end = std::min(to, (p + 1) * kPageTokens);
    const PageForms& forms = s.forms_of(q.pages[p], layer)[h];
    PageAppend a;
    a.config = &c;
    a.layout = &s.layout;
    a.k = {k.at(begin - from, h), k.dtype, k.token_stride * size_of(k.dtype)};
    a.v = {v.at(begin - from, h), v.dtype, v.token_stride * size_of(v.dtype)};
    a.first = static_cast<int>(begin - p * kPageTokens);
    a.end = static_cast<int>(end - p * kPageTokens);
    a.high = reinterpret_cast<uint16_t*>(s.high.at(forms.high));
    a.fp4 = s.fp4.at(forms.fp4);
    a.residual = s.residual.at(forms.residual);
    a.summary = s.summary.at(forms.summary);
    return a;
  };
  const auto append_run = [&](int64_t first, int64_t end) {
    PageAppend now, next;
    if (first < end) next = page_append(first);
    for (int64_t task = first; task < end; ++task) {
      now = next;
      if (task + 1 < end) {
        next = page_append(task + 1);
        now.next = &next;
      }
      if (!append_rows(now)) good.store(false, std::memory_order_relaxed);
    }
  };
  if (filled == 0 && k.tokens * c.h_kv <= kRowsAlone) {
    append_run(0, tasks);
  } else {
    const int64_t run = std::clamp<int64_t>(tasks / (kRunsPerThread * pool.size()), 1, kMaxRun);
    pool.parallel_for((tasks + run - 1) / run,
                      [&](int64_t i, int) { append_run(i * run, std::min(tasks, (i + 1) * run)); });
  }
  if (!good) {
    give_back_records(s, q, layer, from, to, new_pages);
    THRIFTATTN_RETURN_IF_ERROR(check_values(c, layer, "k", k));
    return check_values(c, layer, "v", v);
  }
  q.layer_length[layer] = to;
  s.peak_bytes = std::max(s.peak_bytes, memory_use(s).total());
  return {};
}

Status KvCache::settle(SeqId seq, int layer) {
  CacheState& s = *state_;
  if (!s.find(seq)) return unknown_sequence(seq);
  if (layer < 0 || layer >= s.config.layers)
    return invalid_argument(fmt::format("layer {} does not exist: the cache has {}", layer, s.config.layers));
  Sequence& q = s.sequences[seq];
  const int64_t end = q.layer_length[layer] / kPageTokens - s.config.recent;
  for (int64_t& p = q.released[layer]; p < end; ++p) release_high(s, q.pages[p], layer);
  return {};
}

Result<SeqId> KvCache::fork(SeqId seq) {
  CacheState& s = *state_;
  if (!s.find(seq)) return unknown_sequence(seq);
  const int64_t tokens = length(seq);
  for (int l = 0; l < s.config.layers; ++l)
    if (length(seq, l) != tokens)
      return invalid_argument(
          fmt::format("sequence {} cannot be forked in the middle of a step: layer {} holds {} tokens, "
                      "another one {}",
                      seq, l, length(seq, l), tokens));
  const bool tail = tokens % kPageTokens != 0;
  const int64_t tail_records = tail ? int64_t{s.config.layers} * s.config.h_kv : 0;
  const int64_t need = tail_records * s.layout.high_bytes + (tail ? form_table_bytes(s.config) : 0) +
                       pages_for(tokens) * int64_t{sizeof(int32_t)};
  const SeqId copy = new_sequence();
  if (copy < 0) return Status(Code::out_of_memory, fmt::format("no memory left for a fork of sequence {}", seq));
  const Sequence& from = s.sequences[seq];
  Sequence& to = s.sequences[copy];
  if ((s.config.max_bytes > 0 && memory_use(s).total() + need > s.config.max_bytes) ||
      !reserve_pages(s, tail, to.pages, pages_for(tokens)) || !s.reserve({.high = tail_records})) {
    to = {};
    return Status(Code::out_of_memory,
                  fmt::format("a fork of sequence {} needs {} bytes for its tail and tables", seq, need));
  }
  to.layer_length = from.layer_length;
  to.released = from.released;
  to.pages.assign(from.pages.begin(), from.pages.begin() + tokens / kPageTokens);
  for (size_t p = 0; p < to.pages.size(); ++p) {
    ++s.page_users[to.pages[p]];
    for (int l = 0; l < s.config.layers; ++l)
      if (static_cast<int64_t>(p) < s.config.sink || static_cast<int64_t>(p) >= to.released[l])
        ++high_users(s, to.pages[p], l);
  }
  if (tail) {
    const int32_t page = take_page(s);
    for (int l = 0; l < s.config.layers; ++l) {
      high_users(s, page, l) = 1;
      for (int h = 0; h < s.config.h_kv; ++h) {
        int32_t& high = s.forms_of(page, l)[h].high;
        high = s.high.take();
        std::memcpy(s.high.at(high), s.high.at(s.forms_of(from.pages[tokens / kPageTokens], l)[h].high),
                    s.layout.high_bytes);
      }
    }
    to.pages.push_back(page);
  }
  s.peak_bytes = std::max(s.peak_bytes, memory_use(s).total());
  return copy;
}

Status KvCache::truncate(SeqId seq, int64_t tokens, bool lossy) {
  CacheState& s = *state_;
  if (!s.find(seq)) return unknown_sequence(seq);
  int64_t longest = 0;
  for (int l = 0; l < s.config.layers; ++l) longest = std::max(longest, length(seq, l));
  if (tokens < 0 || tokens > longest)
    return invalid_argument(
        fmt::format("sequence {} cannot be truncated to {} tokens: it holds {}", seq, tokens, longest));
  Sequence& q = s.sequences[seq];
  const int64_t cut = tokens / kPageTokens;  // the page that becomes the tail, if any token of it stays
  if (tokens % kPageTokens != 0) {
    const int32_t old_page = q.pages[cut];
    // Which layers hold the page encoded, and can all of them become a 16-bit tail again?
    bool encoded = false;
    for (int l = 0; l < s.config.layers; ++l) {
      if (length(seq, l) <= tokens) continue;
      for (int h = 0; h < s.config.h_kv; ++h) {
        const PageForms& forms = s.forms_of(old_page, l)[h];
        encoded |= forms.summary >= 0 || length(seq, l) / kPageTokens > cut;
        if (forms.high < 0 && !lossy)
          return unsupported(
              fmt::format("sequence {} cannot be truncated to {} tokens exactly: page {} of layer {} has no "
                          "16-bit form (lengths from {} on, or a multiple of {}, or lossy, can)",
                          seq, tokens, cut, l, q.released[l] * kPageTokens, kPageTokens));
      }
    }
    if (encoded) {
      const int64_t records = int64_t{s.config.layers} * s.config.h_kv;
      if (!reserve_pages(s, 1, q.pages, 0) || !s.reserve({.high = records}))
        return Status(Code::out_of_memory, "no memory to rebuild the tail of a truncated sequence");
      const int32_t page = take_page(s);
      float k[kMaxChannels * kPageTokens], v[kMaxChannels * kPageTokens];
      const int64_t k_size = int64_t{s.config.d} * kPageTokens, v_size = int64_t{s.config.d_v} * kPageTokens;
      for (int l = 0; l < s.config.layers; ++l) {
        if (length(seq, l) <= cut * kPageTokens) continue;
        high_users(s, page, l) = 1;
        for (int h = 0; h < s.config.h_kv; ++h) {
          const PageForms from = s.forms_of(old_page, l)[h];
          int32_t& to = s.forms_of(page, l)[h].high;
          to = s.high.take();
          auto* high = reinterpret_cast<uint16_t*>(s.high.at(to));
          if (from.high >= 0) {
            std::memcpy(high, s.high.at(from.high), s.layout.high_bytes);
            continue;
          }
          decode_page(s.config, s.layout, s.fp4.at(from.fp4), s.residual.at(from.residual), s.summary.at(from.summary),
                      k, v);
          // Codes may mean more than 16 bit can say, by their rounding and by what centring adds.
          const auto encode = [&](float x) {
            const float limit = high_limit(s.config.high_dtype);
            return high_encode(s.config.high_dtype, std::clamp(x, -limit, limit));
          };
          for (int64_t i = 0; i < k_size; ++i) high[i] = encode(k[i]);
          for (int64_t i = 0; i < v_size; ++i) high[s.layout.high_v + i] = encode(v[i]);
        }
      }
      drop_page(s, q, cut);
      q.pages[cut] = page;
    }
  }
  while (static_cast<int64_t>(q.pages.size()) > pages_for(tokens)) {
    drop_page(s, q, static_cast<int64_t>(q.pages.size()) - 1);
    q.pages.pop_back();
  }
  for (int l = 0; l < s.config.layers; ++l) {
    q.layer_length[l] = std::min(q.layer_length[l], tokens);
    q.released[l] = std::min(q.released[l], std::max<int64_t>(cut, s.config.sink));
  }
  s.peak_bytes = std::max(s.peak_bytes, memory_use(s).total());  // a tail cut out of a shared page is one more
  return {};
}

Status KvCache::free(SeqId seq) {
  CacheState& s = *state_;
  if (!s.find(seq)) return unknown_sequence(seq);
  Sequence& q = s.sequences[seq];
  for (int64_t p = static_cast<int64_t>(q.pages.size()); p-- > 0;) drop_page(s, q, p);
  q = {};
  return {};
}

int64_t KvCache::length(SeqId seq) const {
  const Sequence* q = state_->find(seq);
  return q ? *std::min_element(q->layer_length.begin(), q->layer_length.end()) : -1;
}

int64_t KvCache::length(SeqId seq, int layer) const {
  const Sequence* q = state_->find(seq);
  return q && layer >= 0 && layer < state_->config.layers ? q->layer_length[layer] : -1;
}

Status KvCache::read(SeqId seq, int layer, int64_t first, const MutableView& k, const MutableView& v) const {
  const CacheState& s = *state_;
  if (!s.find(seq)) return unknown_sequence(seq);
  const View ck{k.data, k.dtype, k.tokens, k.heads, k.channels, k.token_stride, k.head_stride};
  const View cv{v.data, v.dtype, v.tokens, v.heads, v.channels, v.token_stride, v.head_stride};
  THRIFTATTN_RETURN_IF_ERROR(check_shape(s.config, ck, cv));
  if (first < 0 || k.tokens > length(seq, layer) - first)  // the sum of both may overflow
    return invalid_argument(fmt::format("{} tokens from {} on of layer {} are not in sequence {}: it holds {}",
                                        k.tokens, first, layer, seq, length(seq, layer)));
  const Sequence& q = s.sequences[seq];
  const int d = s.config.d, d_v = s.config.d_v;
  float pk[kMaxChannels * kPageTokens], pv[kMaxChannels * kPageTokens], row[kMaxChannels];
  for (int h = 0; h < s.config.h_kv; ++h)
    for (int64_t t = first; t < first + k.tokens;) {
      const int64_t p = t / kPageTokens, end = std::min(first + k.tokens, (p + 1) * kPageTokens);
      const PageForms& forms = s.forms_of(q.pages[p], layer)[h];
      if (forms.high >= 0) {
        const auto* high = reinterpret_cast<const uint16_t*>(s.high.at(forms.high));
        const int from = static_cast<int>(t % kPageTokens), to = from + static_cast<int>(end - t);
        for (int slot = from; slot < to; ++slot) {  // the slots of a tail beyond its tokens hold nothing
          for (int c = 0; c < d; ++c)
            pk[c * kPageTokens + slot] = high_decode(s.config.high_dtype, high[s.layout.high_k_at(slot, c)]);
          for (int c = 0; c < d_v; ++c)
            pv[slot * d_v + c] = high_decode(s.config.high_dtype, high[s.layout.high_v_at(slot, c)]);
        }
      } else {
        decode_page(s.config, s.layout, s.fp4.at(forms.fp4), s.residual.at(forms.residual), s.summary.at(forms.summary),
                    pk, pv);
      }
      for (; t < end; ++t) {
        const int slot = static_cast<int>(t % kPageTokens);
        for (int c = 0; c < d; ++c) row[c] = pk[c * kPageTokens + slot];
        store_row(k.dtype, row, d, k.at(t - first, h));
        store_row(v.dtype, pv + slot * d_v, d_v, v.at(t - first, h));
      }
    }
  return {};
}

MemoryUse KvCache::bytes() const { return memory_use(*state_); }
int64_t KvCache::peak_bytes() const { return state_->peak_bytes; }
int64_t KvCache::reserved_bytes() const {
  const CacheState& s = *state_;
  return s.fp4.reserved_bytes() + s.residual.reserved_bytes() + s.high.reserved_bytes() + s.summary.reserved_bytes() +
         static_cast<int64_t>(s.forms.capacity() * sizeof(PageForms) +
                              (s.high_users.capacity() + s.page_users.capacity()) * sizeof(int32_t));
}

Result<SeqId> bring_in(KvCache& cache, const SequenceForms& from, const std::string& what,
                       const std::function<Status(int, int64_t, int, const PageForms&)>& fill) {
  CacheState& s = cache.state();
  const CacheConfig& c = s.config;
  const int64_t need = memory_needed(s.layout, c, from).total(), used = memory_use(s).total();
  if (c.max_bytes > 0 && used + need > c.max_bytes)
    return Status(Code::out_of_memory, fmt::format("{}: its {} tokens need {} bytes, the cache holds {} of at most {}",
                                                   what, from.tokens, need, used, c.max_bytes));
  const auto count = [&](Form form) {
    return std::count_if(from.forms.begin(), from.forms.end(), [form](uint8_t forms) { return (forms & form) != 0; });
  };
  const SeqId seq = cache.new_sequence();
  if (seq < 0 || !reserve_pages(s, from.pages(), s.sequences[seq].pages, from.pages()) ||
      !s.reserve({count(kFp4Form), count(kResidualForm), count(kHighForm), count(kSummaryForm)})) {
    if (seq >= 0) s.sequences[seq] = {};
    return Status(Code::out_of_memory,
                  fmt::format("{}: its {} tokens need {} bytes, which the system refused", what, from.tokens, need));
  }
  Sequence& q = s.sequences[seq];
  q.released = from.released;
  q.layer_length.assign(c.layers, from.tokens);
  for (int64_t p = 0; p < from.pages(); ++p) {
    const int32_t page = take_page(s);
    q.pages.push_back(page);
    for (int l = 0; l < c.layers; ++l) {
      high_users(s, page, l) = p < c.sink || p >= q.released[l];
      for (int h = 0; h < c.h_kv; ++h) {
        const uint8_t forms = from.forms[(l * from.pages() + p) * c.h_kv + h];
        PageForms& to = s.forms_of(page, l)[h];
        if (forms & kFp4Form) to.fp4 = s.fp4.take();
        if (forms & kResidualForm) to.residual = s.residual.take();
        if (forms & kHighForm) to.high = s.high.take();
        if (forms & kSummaryForm) to.summary = s.summary.take();
      }
    }
  }
  Status status;
  try {
    for (int l = 0; status.ok() && l < c.layers; ++l)
      for (int64_t p = 0; status.ok() && p < from.pages(); ++p)
        for (int h = 0; status.ok() && h < c.h_kv; ++h) status = fill(l, p, h, s.forms_of(q.pages[p], l)[h]);
  } catch (const std::bad_alloc&) {
    status = Status(Code::out_of_memory, fmt::format("{}: no memory left for its records", what));
  }
  if (!status.ok()) {
    (void)cache.free(seq);  // the first error is the one to tell
    return status;
  }
  s.peak_bytes = std::max(s.peak_bytes, memory_use(s).total());
  return seq;
}

}  // namespace thriftattn
