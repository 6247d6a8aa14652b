// A cache on the device. The host hands out page ids and launches; what a step changes it never sees.
//
//   create       one block of memory: pools of records, block tables, lengths, batch, faults
//   reserve      free page ids --> block table                    (values travel in kernel parameters: launch_write)
//   fork         full pages --> both block tables; tail, ring --> copies
//   grow         create, then pools, rings, tables and lengths --> the new block; the old one is freed
//   set_batch    slots, s_q, first rows --> batch table
//   begin_step, append, end_step                                  append.cu, steps.cu; nothing but launches
//   upload, download                                              transfer.cc
//
// Pages stay with a sequence until it is freed, through a truncate too: a captured graph goes on with them. A page that
// several sequences share is full and is not written again: fork shares no other, and truncate gives up the shared ones
// that would be. So the shared pages of a sequence stand before its own. Calls take effect in the order of their
// streams, so one page's next owner must come after its last one there: one stream, or streams that wait for one
// another.
#include <fmt/format.h>

#include <algorithm>
#include <initializer_list>
#include <new>
#include <vector>

#include "core/device.h"
#include "cuda/params.h"
#include "cuda/state.h"
#include "thriftattn/cuda.h"

namespace thriftattn::cuda {
namespace {

constexpr int64_t kMaxTokens = int64_t{1} << 30;  // of a sequence: positions are int32
constexpr int kMaxSequences = 65535;              // a grid's last dimensions: append has a block for every sequence and
constexpr int64_t kMaxAppend = int64_t{1} << 21;  // every page of a step

// Adds up one block of memory. Parts begin on 256 bytes.
class Parts {
 public:
  int64_t take(std::initializer_list<int64_t> factors) {
    int64_t bytes = 1;
    const int64_t at = bytes_;
    for (const int64_t factor : factors) fits_ &= !__builtin_mul_overflow(bytes, factor, &bytes);
    fits_ &= bytes <= INT64_MAX - 256 && !__builtin_add_overflow(bytes_, round_up(fits_ ? bytes : 0, 256), &bytes_);
    return at;
  }
  bool fits() const { return fits_; }
  int64_t bytes() const { return bytes_; }

 private:
  int64_t bytes_ = 0;
  bool fits_ = true;
};

Status check_config(const CacheConfig& config) {
  THRIFTATTN_RETURN_IF_ERROR(KvCache::create(config).status());
  if (!config.storage_by_head.empty())
    return unsupported("storage_by_head is not supported on a GPU: one storage for all heads is");
  if (config.high_dtype != DType::f16) return unsupported("high_dtype bf16 is not supported on a GPU: f16 is");
  return {};
}

// A size that can be, with what was left open filled in.
Result<CacheSize> checked(CacheSize size) {
  const auto refuse = [](const char* name, int64_t value, const char* supported) {
    return invalid_argument(fmt::format("{} {} is not supported: {}", name, value, supported));
  };
  if (size.max_sequences < 1 || size.max_sequences > kMaxSequences)
    return refuse("max_sequences", size.max_sequences, "1 to 65535");
  if (size.max_tokens < 1 || size.max_tokens > kMaxTokens) return refuse("max_tokens", size.max_tokens, "1 to 2^30");
  if (size.max_append < 1 || size.max_append > kMaxAppend) return refuse("max_append", size.max_append, "1 to 2^21");
  if (size.pages == 0) size.pages = size.max_sequences * pages_for(size.max_tokens);
  if (size.pages < 0 || size.pages > INT32_MAX)
    return refuse("pages", size.pages, "up to 2^31 - 1, or 0 for as many as max_sequences of max_tokens take");
  size.max_append = std::min(size.max_append, size.max_tokens);
  return size;
}

StepParams step_params(const Cache::State& s) {
  return {s.batch(), s.block_table, s.max_pages, static_cast<int>(s.size.max_tokens), s.recent, s.settled,
          s.s_kv,    s.released,    s.faults};
}

// Moves `count` free pages to the end of a block table; throws where it has no room for them.
void take_pages(Cache::State& s, std::vector<int32_t>& pages, int64_t count) {
  pages.insert(pages.end(), s.free_pages.rbegin(), s.free_pages.rbegin() + count);
  s.free_pages.resize(s.free_pages.size() - count);
  for (auto page = pages.end() - count; page != pages.end(); ++page) s.users[*page] = 1;
}

// Writes a sequence's block table to the device from entry `first` on.
Status write_table(const Cache::State& s, SeqId seq, int64_t first, Stream stream) {
  const std::vector<int32_t>& pages = s.sequences[seq].pages;
  return check(launch_write(s.block_table + int64_t{seq} * s.max_pages + first, pages.data() + first,
                            std::ssize(pages) - first, to_cuda(stream)),
               "launch_write");
}

// Makes entries [first, end) of a sequence's block table on the device -1.
Status clear_table(const Cache::State& s, SeqId seq, int64_t first, int64_t end, Stream stream) {
  return check(cudaMemsetAsync(s.block_table + int64_t{seq} * s.max_pages + first, 0xff,
                               (end - first) * sizeof(int32_t), to_cuda(stream)),
               "cudaMemsetAsync");
}

// Copies 16-bit records of all heads in all layers, within a cache or to another one.
Status copy_high(const Cache::State& from, const Cache::State& to, const std::vector<RecordPair>& records,
                 Stream stream) {
  CopyParams p{};
  p.from = from.high;
  p.to = to.high;
  p.record_bytes = from.config.h_kv * from.layout.high_bytes;
  p.from_layer_bytes = from.high_records * p.record_bytes;
  p.to_layer_bytes = to.high_records * p.record_bytes;
  p.layers = from.config.layers;
  return check(launch_copy(p, records.data(), std::ssize(records), to_cuda(stream)), "launch_copy");
}

// Copies all that the device holds of a cache to a larger one, whose host side is as it will be.
Status copy_contents(const Cache::State& from, const Cache::State& to, Stream stream) {
  const auto on_device = [&](void* target, const void* source, int64_t bytes) {
    return copy(target, source, bytes, cudaMemcpyDeviceToDevice, stream);
  };
  // The records of all pages, [layers, pages, h_kv, bytes].
  const auto pool = [&](uint8_t* target, const uint8_t* source, int64_t bytes) -> Status {
    const int64_t page = from.config.h_kv * bytes;
    for (int64_t l = 0; source && l < from.config.layers; ++l)
      THRIFTATTN_RETURN_IF_ERROR(
          on_device(target + l * to.size.pages * page, source + l * from.size.pages * page, from.size.pages * page));
    return {};
  };
  THRIFTATTN_RETURN_IF_ERROR(pool(to.fp4, from.fp4, from.layout.fp4_bytes));
  THRIFTATTN_RETURN_IF_ERROR(pool(to.residual, from.residual, from.layout.fp4_bytes));
  THRIFTATTN_RETURN_IF_ERROR(pool(to.summary, from.summary, from.canonical.summary_bytes));
  if (from.all_high) THRIFTATTN_RETURN_IF_ERROR(pool(to.high, from.high, from.layout.high_bytes));

  const int64_t slots = std::ssize(from.sequences), row = slots * sizeof(int32_t);
  std::vector<int32_t> lengths(3 * slots);  // settled, s_kv, released
  THRIFTATTN_RETURN_IF_ERROR(to_host(lengths.data(), from.settled, 3 * row, stream));
  THRIFTATTN_RETURN_IF_ERROR(wait(stream));
  for (SeqId seq = 0; seq < slots; ++seq) {
    if (!from.has(seq)) continue;
    THRIFTATTN_RETURN_IF_ERROR(write_table(to, seq, 0, stream));
    int32_t& released = lengths[2 * slots + seq];
    if (!from.all_high) {
      const LayerCache old_rings = from.layer(0), rings = to.layer(0);
      std::vector<RecordPair> records;
      for (int j = 0; j < pages_for(lengths[slots + seq]); ++j)
        if (old_rings.has_high(j, released))
          records.push_back({old_rings.high_record(seq, j, 0), rings.high_record(seq, j, 0)});
      THRIFTATTN_RETURN_IF_ERROR(copy_high(from, to, records, stream));
    }
    released = std::max(released, to.sink);  // where max_tokens held fewer pages than the config's sink
  }
  int32_t* const rows[] = {to.settled, to.s_kv, to.released};
  for (int i = 0; i < 3; ++i) THRIFTATTN_RETURN_IF_ERROR(to_device(rows[i], &lengths[i * slots], row, stream));
  THRIFTATTN_RETURN_IF_ERROR(on_device(to.batch_table, from.batch_table, 3 * std::ssize(from.seqs) * sizeof(int32_t)));
  return on_device(to.faults, from.faults, sizeof(int32_t));
}

// Gives up the pages of a sequence that others share, from the one with token `tokens` on, so that it can be written
// from there on.
Status unshare(Cache::State& s, SeqId seq, int64_t tokens, Stream stream) {
  std::vector<int32_t>& pages = s.sequences[seq].pages;
  const int64_t first = tokens / kPageTokens, before = std::ssize(pages);
  if (first >= before || s.users[pages[first]] == 1) return {};
  const auto shared = pages.begin() + first;
  const auto own = std::find_if(shared, pages.end(), [&](int32_t page) { return s.users[page] == 1; });
  const int32_t cut_page = *shared;
  const bool cuts = tokens % kPageTokens != 0;
  if (cuts && own == pages.end() && s.free_pages.empty())
    return Status(Code::out_of_memory,
                  fmt::format("a cut of sequence {} to {} tokens needs a page of its own: none is free", seq, tokens));
  for (auto page = shared; page != own; ++page) --s.users[*page];
  pages.erase(shared, own);
  if (cuts && std::ssize(pages) == first) take_pages(s, pages, 1);
  THRIFTATTN_RETURN_IF_ERROR(clear_table(s, seq, first, before, stream));
  THRIFTATTN_RETURN_IF_ERROR(write_table(s, seq, first, stream));
  if (!cuts || !s.all_high) return {};  // a ring's record is the sequence's own
  return copy_high(s, s, {{cut_page, pages[first]}}, stream);
}

}  // namespace

Result<Lengths> read_lengths(const Cache::State& s, SeqId seq, Stream stream) {
  Lengths lengths;
  const size_t size = sizeof(int32_t);
  THRIFTATTN_RETURN_IF_ERROR(check(cudaMemcpy2DAsync(&lengths, size, s.settled + seq, size * s.sequences.size(), size,
                                                     3, cudaMemcpyDeviceToHost, to_cuda(stream)),
                                   "cudaMemcpy2DAsync"));
  THRIFTATTN_RETURN_IF_ERROR(wait(stream));
  return lengths;
}

Result<Lengths> settled_lengths(const Cache::State& s, SeqId seq, const char* done, Stream stream) {
  if (!s.has(seq)) return unknown(seq);
  THRIFTATTN_ASSIGN_OR_RETURN(lengths, read_lengths(s, seq, stream));
  if (lengths.settled != lengths.s_kv)
    return invalid_argument(fmt::format("sequence {} cannot be {} in the middle of a step", seq, done));
  return lengths;
}

Status cut(const Cache::State& s, SeqId seq, int64_t tokens, int64_t released, Stream stream) {
  const int64_t page = tokens / kPageTokens;
  CutParams p{};
  p.layout = s.layout;
  p.high = s.high;
  p.layer_bytes = s.high_records * s.config.h_kv * s.layout.high_bytes;
  if (tokens % kPageTokens != 0)
    p.record = s.layer(0).high_record(seq, static_cast<int>(page), s.sequences[seq].pages[page]) * s.config.h_kv;
  p.layers = s.config.layers;
  p.h_kv = s.config.h_kv;
  p.slot = seq;
  p.tokens = static_cast<int>(tokens);
  p.released_pages = static_cast<int>(released);
  p.settled = s.settled;
  p.s_kv = s.s_kv;
  p.released = s.released;
  return check(launch_cut(p, to_cuda(stream)), "cut");
}

LayerCache Cache::State::layer(int index) const {
  const int64_t heads = int64_t{index} * config.h_kv;
  const auto at = [&](uint8_t* pool, int64_t records, int64_t bytes) {
    return pool ? pool + heads * records * bytes : nullptr;
  };
  LayerCache l{};
  l.layout = layout;
  l.canonical = canonical;
  l.fp4 = at(fp4, size.pages, layout.fp4_bytes);
  l.residual = at(residual, size.pages, layout.fp4_bytes);
  l.high = at(high, high_records, layout.high_bytes);
  l.summary = at(summary, size.pages, canonical.summary_bytes);
  l.block_table = block_table;
  l.s_kv = s_kv;
  l.released = released;
  l.max_pages = max_pages;
  l.h_kv = config.h_kv;
  l.all_high = all_high;
  l.sink = sink;
  l.ring_pages = ring_pages;
  l.format = config.format;
  l.centring = config.centring && fp4;
  return l;
}

Batch Cache::State::batch() const {
  const int b = static_cast<int>(seqs.size());
  return {b, batch_table, batch_table + b, batch_table + 2 * b};
}

Cache::Cache(std::unique_ptr<State> state) : state_(std::move(state)) {}
Cache::Cache(Cache&&) noexcept = default;
Cache& Cache::operator=(Cache&&) noexcept = default;
Cache::~Cache() = default;
const CacheConfig& Cache::config() const { return state_->config; }
const CacheSize& Cache::size() const { return state_->size; }
int Cache::device() const { return state_->device; }

Result<Cache> Cache::create(const CacheConfig& config, const CacheSize& wanted, int device) {
  THRIFTATTN_RETURN_IF_ERROR(check_config(config));
  THRIFTATTN_ASSIGN_OR_RETURN(size, checked(wanted));
  THRIFTATTN_RETURN_IF_ERROR(machine(device).status());
  auto state = std::make_unique<State>();
  State& s = *state;
  s.config = config;
  s.size = size;
  s.device = device;
  s.canonical = page_layout(config.d, config.d_v, config.format, config.mean, config.min_max, config.variance);
  s.layout = device_layout(config.d, config.d_v);
  s.max_pages = static_cast<int>(pages_for(size.max_tokens));
  s.sink = std::min(config.sink, s.max_pages);
  s.recent = std::min(config.recent, s.max_pages);
  const int64_t sequences = size.max_sequences, pages = size.pages;
  const bool encoded = config.storage != Storage::high_only;
  s.all_high = !encoded || config.storage == Storage::dual;
  // The window, the tail, the pages that a step fills and one more; never more than a sequence has.
  s.ring_pages = static_cast<int>(std::min<int64_t>(int64_t{s.sink} + s.recent + 2 + pages_for(size.max_append),
                                                    std::max(s.max_pages, s.sink + 1)));
  s.high_records = s.all_high ? pages : sequences * s.ring_pages;

  Parts parts;
  const int64_t heads = int64_t{config.layers} * config.h_kv, int_bytes = sizeof(int32_t);
  const bool summaries = encoded || s.canonical.summary_bytes > int64_t{sizeof(PageSummary)};
  const bool residuals = config.storage == Storage::residual;
  const int64_t fp4 = parts.take({encoded ? heads : 0, pages, s.layout.fp4_bytes});
  const int64_t residual = parts.take({residuals ? heads : 0, pages, s.layout.fp4_bytes});
  const int64_t high = parts.take({heads, s.high_records, s.layout.high_bytes});
  const int64_t summary = parts.take({summaries ? heads : 0, pages, s.canonical.summary_bytes});
  const int64_t tables = parts.take({sequences, s.max_pages, int_bytes});
  const int64_t lengths = parts.take({3, sequences, int_bytes});
  const int64_t batch = parts.take({3, sequences, int_bytes});
  const int64_t faults = parts.take({int_bytes});
  if (!parts.fits()) return invalid_argument("the cache's pools take more bytes than can be counted");
  if (config.max_bytes > 0 && parts.bytes() > config.max_bytes)
    return Status(Code::out_of_memory,
                  fmt::format("{} sequences of up to {} tokens in {} pages take {} bytes, of at most {}", sequences,
                              size.max_tokens, pages, parts.bytes(), config.max_bytes));
  try {
    s.sequences.resize(sequences);
    s.users.resize(pages);
    s.free_pages.resize(pages);
    for (int64_t i = 0; i < pages; ++i) s.free_pages[i] = static_cast<int32_t>(pages - 1 - i);
  } catch (const std::bad_alloc&) {
    return no_memory("the tables of a cache");
  }
  THRIFTATTN_ASSIGN_OR_RETURN(memory, DeviceMemory::take(parts.bytes(), device, "a cache"));
  s.memory = std::move(memory);
  uint8_t* const base = s.memory.data();
  const auto ints = [&](int64_t at) { return reinterpret_cast<int32_t*>(base + at); };
  s.fp4 = encoded ? base + fp4 : nullptr;
  s.residual = residuals ? base + residual : nullptr;
  s.high = base + high;
  s.summary = summaries ? base + summary : nullptr;
  s.block_table = ints(tables);
  s.settled = ints(lengths);
  s.s_kv = s.settled + sequences;
  s.released = s.s_kv + sequences;
  s.batch_table = ints(batch);
  s.faults = ints(faults);

  const CurrentDevice current(device);
#ifdef THRIFTATTN_POISON
  const int64_t fill = 0;  // NaN in every form: who reads what was never written is found out
#else
  const int64_t fill = tables;
#endif
  const Stream stream = cudaStreamPerThread;
  const auto set = [&](int64_t from, int64_t to, int value) {
    return check(cudaMemsetAsync(base + from, value, to - from, to_cuda(stream)), "cudaMemsetAsync");
  };
  THRIFTATTN_RETURN_IF_ERROR(set(fill, lengths, 0xff));  // a block table's -1
  THRIFTATTN_RETURN_IF_ERROR(set(lengths, parts.bytes(), 0));
  THRIFTATTN_RETURN_IF_ERROR(wait(stream));
  return Cache(std::move(state));
}

Result<SeqId> Cache::new_sequence(Stream stream) {
  State& s = *state_;
  const auto free = std::find_if(s.sequences.begin(), s.sequences.end(), [](const auto& q) { return !q.live; });
  if (free == s.sequences.end())
    return Status(Code::out_of_memory, fmt::format("all {} sequences of the cache are in use", s.sequences.size()));
  const auto seq = static_cast<SeqId>(free - s.sequences.begin());
  const CurrentDevice current(s.device);
  THRIFTATTN_RETURN_IF_ERROR(cut(s, seq, 0, s.sink, stream));
  free->live = true;
  return seq;
}

Status Cache::reserve(SeqId seq, int64_t tokens, Stream stream) {
  State& s = *state_;
  if (!s.has(seq)) return unknown(seq);
  if (tokens < 0 || tokens > s.size.max_tokens)
    return invalid_argument(fmt::format("{} tokens cannot be reserved for sequence {}: the cache is made for up to {}",
                                        tokens, seq, s.size.max_tokens));
  std::vector<int32_t>& pages = s.sequences[seq].pages;
  const int64_t have = std::ssize(pages), more = pages_for(tokens) - have;
  if (more <= 0) return {};
  if (more > std::ssize(s.free_pages))
    return Status(Code::out_of_memory, fmt::format("{} tokens of sequence {} need {} more pages: {} of {} are free",
                                                   tokens, seq, more, s.free_pages.size(), s.size.pages));
  try {
    take_pages(s, pages, more);
  } catch (const std::bad_alloc&) {
    return no_memory("a block table");
  }
  const CurrentDevice current(s.device);
  return write_table(s, seq, have, stream);
}

Status Cache::free(SeqId seq, Stream stream) {
  State& s = *state_;
  if (!s.has(seq)) return unknown(seq);
  const CurrentDevice current(s.device);
  State::Sequence& q = s.sequences[seq];
  THRIFTATTN_RETURN_IF_ERROR(clear_table(s, seq, 0, std::ssize(q.pages), stream));
  for (auto page = q.pages.rbegin(); page != q.pages.rend(); ++page)
    if (--s.users[*page] == 0) s.free_pages.push_back(*page);  // within its capacity: all fit
  q = {};
  return {};
}

Result<SeqId> Cache::fork(SeqId seq, Stream stream) {
  State& s = *state_;
  const CurrentDevice current(s.device);
  THRIFTATTN_ASSIGN_OR_RETURN(now, settled_lengths(s, seq, "forked", stream));
  const int64_t full = now.s_kv / kPageTokens, tail = now.s_kv % kPageTokens != 0 ? 1 : 0;
  if (tail > std::ssize(s.free_pages))
    return Status(Code::out_of_memory,
                  fmt::format("a fork of sequence {} needs a page for its tail: none is free", seq));
  return filled_sequence(*this, "a fork", stream, [&](SeqId copy) -> Status {
    const std::vector<int32_t>& from = s.sequences[seq].pages;
    std::vector<int32_t>& to = s.sequences[copy].pages;
    to.reserve(full + tail);
    to.assign(from.begin(), from.begin() + full);
    for (const int32_t page : to) ++s.users[page];
    take_pages(s, to, tail);
    THRIFTATTN_RETURN_IF_ERROR(write_table(s, copy, 0, stream));
    const LayerCache cache = s.layer(0);
    std::vector<RecordPair> records;  // a shared page's is shared, where it belongs to the page
    for (int j = s.all_high ? static_cast<int>(full) : 0; j < full + tail; ++j)
      if (cache.has_high(j, now.released))
        records.push_back({cache.high_record(seq, j, from[j]), cache.high_record(copy, j, to[j])});
    THRIFTATTN_RETURN_IF_ERROR(copy_high(s, s, records, stream));
    return cut(s, copy, now.s_kv, now.released, stream);
  });
}

Status Cache::truncate(SeqId seq, int64_t length, Stream stream) {
  State& s = *state_;
  const CurrentDevice current(s.device);
  THRIFTATTN_ASSIGN_OR_RETURN(now, settled_lengths(s, seq, "truncated", stream));
  if (length < 0 || length > now.s_kv)
    return invalid_argument(
        fmt::format("sequence {} cannot be truncated to {} tokens: it holds {}", seq, length, now.s_kv));
  const int64_t page = length / kPageTokens;
  if (length % kPageTokens != 0 && !s.layer(0).has_high(static_cast<int>(page), now.released))
    return unsupported(fmt::format(
        "sequence {} cannot be truncated to {} tokens: page {} has no 16-bit form (lengths from {} on, or a "
        "multiple of {}, can)",
        seq, length, page, now.released * kPageTokens, kPageTokens));
  THRIFTATTN_RETURN_IF_ERROR(unshare(s, seq, length, stream));
  return cut(s, seq, length, std::min<int64_t>(now.released, std::max<int64_t>(page, s.sink)), stream);
}

Status Cache::grow(const CacheSize& size, Stream stream) {
  const State& from = *state_;
  const CacheSize now = from.size;
  THRIFTATTN_ASSIGN_OR_RETURN(wanted, checked(size));
  if (wanted.max_sequences < now.max_sequences || wanted.max_tokens < now.max_tokens || wanted.pages < now.pages ||
      wanted.max_append < now.max_append)
    return invalid_argument(fmt::format(
        "a cache of {} sequences of {} tokens, {} pages and {} tokens a step cannot grow to {}, {}, {} and {}: none of "
        "them may be smaller",
        now.max_sequences, now.max_tokens, now.pages, now.max_append, wanted.max_sequences, wanted.max_tokens,
        wanted.pages, wanted.max_append));
  THRIFTATTN_ASSIGN_OR_RETURN(grown, create(from.config, wanted, from.device));
  State& to = *grown.state_;
  try {
    std::copy(from.sequences.begin(), from.sequences.end(), to.sequences.begin());
    std::copy(from.users.begin(), from.users.end(), to.users.begin());
    to.free_pages.resize(wanted.pages - now.pages);  // the new ones, which have the highest ids and are taken last
    to.free_pages.insert(to.free_pages.end(), from.free_pages.begin(), from.free_pages.end());
    to.seqs = from.seqs;
    to.s_q = from.s_q;
    to.rows = from.rows;
    to.max_s_q = from.max_s_q;
    const CurrentDevice current(from.device);
    THRIFTATTN_RETURN_IF_ERROR(copy_contents(from, to, stream));
    THRIFTATTN_RETURN_IF_ERROR(wait(stream));
  } catch (const std::bad_alloc&) {
    return no_memory("the tables of a larger cache");
  }
  *this = std::move(grown);
  return {};
}

Status Cache::set_batch(std::span<const SeqId> seqs, std::span<const int64_t> s_q, Stream stream) {
  State& s = *state_;
  if (seqs.size() != s_q.size())
    return invalid_argument(fmt::format("a batch of {} sequences names {} s_q", seqs.size(), s_q.size()));
  std::vector<bool> seen;
  std::vector<int32_t> table;  // as in Batch
  std::vector<SeqId> batch;
  std::vector<int64_t> lengths;
  try {
    seen.resize(s.sequences.size());
    table.reserve(3 * seqs.size());
    batch.assign(seqs.begin(), seqs.end());
    lengths.assign(s_q.begin(), s_q.end());
  } catch (const std::bad_alloc&) {
    return no_memory("a batch");
  }
  int64_t rows = 0, max_s_q = 0;
  for (size_t i = 0; i < seqs.size(); ++i) {
    if (!s.has(seqs[i])) return unknown(seqs[i]);
    if (seen[seqs[i]]) return invalid_argument(fmt::format("sequence {} is twice in a batch", seqs[i]));
    if (s_q[i] < 0 || s_q[i] > s.size.max_append)
      return invalid_argument(fmt::format("s_q {} of sequence {} is not supported: 0 to max_append = {} is", s_q[i],
                                          seqs[i], s.size.max_append));
    seen[seqs[i]] = true;
    rows += s_q[i];
    max_s_q = std::max(max_s_q, s_q[i]);
  }
  if (rows > kMaxTokens)
    return invalid_argument(fmt::format("a step of {} rows is not supported: up to 2^30 are", rows));
  table.insert(table.end(), seqs.begin(), seqs.end());
  table.insert(table.end(), s_q.begin(), s_q.end());
  for (int64_t i = 0, first = 0; i < std::ssize(s_q); first += s_q[i++]) table.push_back(static_cast<int32_t>(first));
  s.seqs = std::move(batch);
  s.s_q = std::move(lengths);
  s.rows = rows;
  s.max_s_q = max_s_q;
  const CurrentDevice current(s.device);
  return check(launch_write(s.batch_table, table.data(), std::ssize(table), to_cuda(stream)), "set_batch");
}

Status Cache::begin_step(Stream stream) {
  const CurrentDevice current(state_->device);
  return check(launch_begin_step(step_params(*state_), to_cuda(stream)), "begin_step");
}

Status Cache::end_step(Stream stream) {
  const CurrentDevice current(state_->device);
  return check(launch_end_step(step_params(*state_), to_cuda(stream)), "end_step");
}

Status Cache::append(int layer, const View& k, const View& v, Stream stream) {
  const State& s = *state_;
  if (layer < 0 || layer >= s.config.layers)
    return invalid_argument(fmt::format("layer {} does not exist: the cache has {}", layer, s.config.layers));
  if (k.tokens != s.rows || v.tokens != s.rows || k.heads != s.config.h_kv || v.heads != s.config.h_kv ||
      k.channels != s.config.d || v.channels != s.config.d_v)
    return invalid_argument(
        fmt::format("append of k [{}, {}, {}] and v [{}, {}, {}], expected [{}, {}, {}] and [{}, {}, {}]", k.tokens,
                    k.heads, k.channels, v.tokens, v.heads, v.channels, s.rows, s.config.h_kv, s.config.d, s.rows,
                    s.config.h_kv, s.config.d_v));
  AppendParams p{};
  p.cache = s.layer(layer);
  p.batch = s.batch();
  p.settled = s.settled;
  p.k = {k.data, k.dtype, k.token_stride, k.head_stride};
  p.v = {v.data, v.dtype, v.token_stride, v.head_stride};
  p.max_s_q = static_cast<int>(s.max_s_q);
  p.scales = s.config.scales;
  p.page_scale = s.config.page_scale;
  p.faults = s.faults;
  const CurrentDevice current(s.device);
  return check(launch_append(p, to_cuda(stream)), "append");
}

Result<int64_t> Cache::length(SeqId seq, Stream stream) const {
  if (!state_->has(seq)) return unknown(seq);
  const CurrentDevice current(state_->device);
  THRIFTATTN_ASSIGN_OR_RETURN(lengths, read_lengths(*state_, seq, stream));
  return int64_t{lengths.s_kv};
}

Result<Faults> Cache::faults(Stream stream, bool clear) {
  const State& s = *state_;
  const CurrentDevice current(s.device);
  int32_t bits = 0;
  THRIFTATTN_RETURN_IF_ERROR(to_host(&bits, s.faults, sizeof(bits), stream));
  if (clear)
    THRIFTATTN_RETURN_IF_ERROR(check(cudaMemsetAsync(s.faults, 0, sizeof(bits), to_cuda(stream)), "cudaMemsetAsync"));
  THRIFTATTN_RETURN_IF_ERROR(wait(stream));
  return Faults{(bits & kNoPages) != 0, (bits & kNotFinite) != 0};
}

MemoryUse Cache::bytes() const {
  const State& s = *state_;
  const int64_t pages = std::ssize(s.users) - std::ssize(s.free_pages);
  int64_t entries = 0, live = 0, kept = 0;  // of block tables; sequences; their pages that stay in 16 bit
  for (const State::Sequence& q : s.sequences) {
    entries += std::ssize(q.pages);
    live += q.live;
    kept += std::min<int64_t>(std::ssize(q.pages), s.sink + s.recent + 1);
  }
  const int64_t heads = int64_t{s.config.layers} * s.config.h_kv;
  MemoryUse use;
  use.codes = s.fp4 ? heads * pages * s.layout.fp4_bytes : 0;
  use.residual = s.residual ? heads * pages * s.layout.fp4_bytes : 0;
  use.high = heads * (s.all_high ? pages : kept) * s.layout.high_bytes;
  use.summaries = s.summary ? heads * pages * s.canonical.summary_bytes : 0;
  use.tables = (live * 6 + entries) * int64_t{sizeof(int32_t)};
  return use;
}

int64_t Cache::reserved_bytes() const { return state_->memory.bytes(); }

}  // namespace thriftattn::cuda
