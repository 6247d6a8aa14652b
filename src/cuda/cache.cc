// A cache on the device. The host hands out page ids and launches; what a step changes it never sees.
//
//   create       one block of memory: pools of records, block tables, lengths, batch, faults
//   reserve      free page ids --> block table                    (values travel in kernel parameters: launch_write)
//   set_batch    slots, s_q, first rows --> batch table
//   begin_step, append, end_step                                  append.cu, steps.cu; nothing but launches
//   upload, download                                              records by convert.h's permutation; these wait
//
// Pages stay with a sequence until it is freed, through a truncate too: a captured graph goes on with them. Calls take
// effect in the order of their streams, so one page's next owner must come after its last one there: one stream, or
// streams that wait for one another.
#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <initializer_list>
#include <new>

#include "attention/cache_state.h"
#include "core/device.h"
#include "cuda/convert.h"
#include "cuda/params.h"
#include "cuda/state.h"
#include "format/page_codec.h"
#include "format/rows.h"
#include "thriftattn/cuda.h"

namespace thriftattn::cuda {
namespace {

constexpr int64_t kMaxTokens = int64_t{1} << 30;  // of a sequence: positions are int32
constexpr int kMaxSequences = 65535;              // a grid's last dimensions: append has a block for every sequence and
constexpr int64_t kMaxAppend = int64_t{1} << 21;  // every page of a step

cudaStream_t to_cuda(Stream stream) { return static_cast<cudaStream_t>(stream); }

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

Status check_config(const CacheConfig& config, const CacheSize& size) {
  const auto refuse = [](const char* name, int64_t value, const char* supported) {
    return invalid_argument(fmt::format("{} {} is not supported: {}", name, value, supported));
  };
  THRIFTATTN_RETURN_IF_ERROR(KvCache::create(config).status());
  if (!config.storage_by_head.empty())
    return unsupported("storage_by_head is not supported on a GPU: one storage for all heads is");
  if (config.high_dtype != DType::f16) return unsupported("high_dtype bf16 is not supported on a GPU: f16 is");
  if (size.max_sequences < 1 || size.max_sequences > kMaxSequences)
    return refuse("max_sequences", size.max_sequences, "1 to 65535");
  if (size.max_tokens < 1 || size.max_tokens > kMaxTokens) return refuse("max_tokens", size.max_tokens, "1 to 2^30");
  if (size.pages < 0 || size.pages > INT32_MAX) return refuse("pages", size.pages, "0 (as many as needed) to 2^31 - 1");
  if (size.max_append < 1 || size.max_append > kMaxAppend) return refuse("max_append", size.max_append, "1 to 2^21");
  return {};
}

Status unknown(SeqId seq) { return not_found(fmt::format("sequence {} does not exist", seq)); }

Status wait(Stream stream) { return check(cudaStreamSynchronize(to_cuda(stream)), "cudaStreamSynchronize"); }

Status to_device(void* to, const void* from, int64_t bytes, Stream stream) {
  return check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, to_cuda(stream)), "cudaMemcpyAsync");
}
Status to_host(void* to, const void* from, int64_t bytes, Stream stream) {
  return check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, to_cuda(stream)), "cudaMemcpyAsync");
}

// What the device knows of one sequence.
struct Lengths {
  int32_t settled = 0, s_kv = 0, released = 0;
};

Result<Lengths> read_lengths(const Cache::State& s, SeqId seq, Stream stream) {
  Lengths lengths;
  const size_t size = sizeof(int32_t);
  THRIFTATTN_RETURN_IF_ERROR(check(cudaMemcpy2DAsync(&lengths, size, s.settled + seq, size * s.sequences.size(), size,
                                                     3, cudaMemcpyDeviceToHost, to_cuda(stream)),
                                   "cudaMemcpy2DAsync"));
  THRIFTATTN_RETURN_IF_ERROR(wait(stream));
  return lengths;
}

// Makes `tokens` the length of a sequence that holds at least as many.
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

StepParams step_params(const Cache::State& s) {
  return {s.batch(), s.block_table, s.max_pages, static_cast<int>(s.size.max_tokens), s.recent, s.settled,
          s.s_kv,    s.released,    s.faults};
}

// The four records of all heads of page j of a sequence in one layer; null = not stored.
struct PageAddress {
  uint8_t *fp4 = nullptr, *residual = nullptr, *high = nullptr, *summary = nullptr;
};

PageAddress address(const Cache::State& s, SeqId seq, int layer, int64_t j, const Lengths& lengths) {
  const LayerCache cache = s.layer(layer);
  const int32_t id = s.sequences[seq].pages[j];
  const int page = static_cast<int>(j);
  const auto at = [&](uint8_t* pool, int64_t record, int64_t bytes) {
    return pool ? pool + record * cache.h_kv * bytes : nullptr;
  };
  PageAddress a;
  if ((j + 1) * kPageTokens <= lengths.s_kv) {
    a.fp4 = at(cache.fp4, id, s.layout.fp4_bytes);
    a.residual = at(cache.residual, id, s.layout.fp4_bytes);
    a.summary = at(cache.summary, id, s.canonical.summary_bytes);
  }
  if (cache.has_high(page, lengths.released))
    a.high = at(cache.high, cache.high_record(seq, page, id), s.layout.high_bytes);
  return a;
}

Status no_memory(const char* what) {
  return Status(Code::out_of_memory, fmt::format("no host memory left for {}", what));
}

}  // namespace

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

Result<Cache> Cache::create(const CacheConfig& config, const CacheSize& size, int device) {
  THRIFTATTN_RETURN_IF_ERROR(check_config(config, size));
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
  s.size.max_append = std::min(size.max_append, size.max_tokens);
  const int64_t sequences = size.max_sequences;
  if (size.pages == 0) s.size.pages = sequences * s.max_pages;
  if (s.size.pages > INT32_MAX)
    return invalid_argument(
        fmt::format("{} sequences of {} pages are more than 2^31 - 1 pages", sequences, s.max_pages));
  const bool encoded = config.storage != Storage::high_only;
  s.all_high = !encoded || config.storage == Storage::dual;
  // The window, the tail, the pages that a step fills and one more; never more than a sequence has.
  s.ring_pages = static_cast<int>(std::min<int64_t>(int64_t{s.sink} + s.recent + 2 + pages_for(s.size.max_append),
                                                    std::max(s.max_pages, s.sink + 1)));
  s.high_records = s.all_high ? s.size.pages : sequences * s.ring_pages;

  Parts parts;
  const int64_t heads = int64_t{config.layers} * config.h_kv, pages = s.size.pages, int_bytes = sizeof(int32_t);
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
    pages.insert(pages.end(), s.free_pages.rbegin(), s.free_pages.rbegin() + more);
  } catch (const std::bad_alloc&) {
    return no_memory("a block table");
  }
  s.free_pages.resize(s.free_pages.size() - more);
  const CurrentDevice current(s.device);
  return check(
      launch_write(s.block_table + int64_t{seq} * s.max_pages + have, pages.data() + have, more, to_cuda(stream)),
      "reserve");
}

Status Cache::free(SeqId seq, Stream stream) {
  State& s = *state_;
  if (!s.has(seq)) return unknown(seq);
  const CurrentDevice current(s.device);
  State::Sequence& q = s.sequences[seq];
  THRIFTATTN_RETURN_IF_ERROR(check(cudaMemsetAsync(s.block_table + int64_t{seq} * s.max_pages, 0xff,
                                                   q.pages.size() * sizeof(int32_t), to_cuda(stream)),
                                   "cudaMemsetAsync"));
  s.free_pages.insert(s.free_pages.end(), q.pages.rbegin(), q.pages.rend());  // within its capacity: all fit
  q = {};
  return {};
}

Status Cache::truncate(SeqId seq, int64_t length, Stream stream) {
  State& s = *state_;
  if (!s.has(seq)) return unknown(seq);
  const CurrentDevice current(s.device);
  THRIFTATTN_ASSIGN_OR_RETURN(now, read_lengths(s, seq, stream));
  if (now.settled != now.s_kv)
    return invalid_argument(fmt::format("sequence {} cannot be truncated in the middle of a step", seq));
  if (length < 0 || length > now.s_kv)
    return invalid_argument(
        fmt::format("sequence {} cannot be truncated to {} tokens: it holds {}", seq, length, now.s_kv));
  const int64_t page = length / kPageTokens;
  if (length % kPageTokens != 0 && !s.layer(0).has_high(static_cast<int>(page), now.released))
    return unsupported(fmt::format(
        "sequence {} cannot be truncated to {} tokens: page {} has no 16-bit form (lengths from {} on, or a "
        "multiple of {}, can)",
        seq, length, page, now.released * kPageTokens, kPageTokens));
  return cut(s, seq, length, std::min<int64_t>(now.released, std::max<int64_t>(page, s.sink)), stream);
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

Result<SeqId> Cache::upload(const KvCache& from, SeqId seq, Stream stream) {
  State& s = *state_;
  CacheConfig theirs = from.config();
  theirs.max_bytes = s.config.max_bytes;
  if (!(theirs == s.config))
    return invalid_argument("a sequence can be uploaded to a cache of the same configuration only");
  const CacheState& host = from.state();
  const Sequence* q = host.find(seq);
  if (!q) return unknown(seq);
  const int64_t tokens = from.length(seq);
  for (int l = 0; l < s.config.layers; ++l)
    if (from.length(seq, l) != tokens)
      return invalid_argument(fmt::format("sequence {} cannot be uploaded in the middle of a step", seq));
  THRIFTATTN_ASSIGN_OR_RETURN(copy, new_sequence(stream));
  Lengths lengths;
  lengths.settled = lengths.s_kv = static_cast<int32_t>(tokens);
  lengths.released = static_cast<int32_t>(
      std::max(*std::max_element(q->released.begin(), q->released.end()), tokens / kPageTokens - s.recent));
  const CurrentDevice current(s.device);
  const auto copy_pages = [&]() -> Status {
    THRIFTATTN_RETURN_IF_ERROR(reserve(copy, tokens, stream));
    const int h_kv = s.config.h_kv;
    std::vector<uint8_t> fp4(h_kv * s.layout.fp4_bytes), residual(fp4), high(h_kv * s.layout.high_bytes),
        summary(h_kv * s.canonical.summary_bytes);
    for (int l = 0; l < s.config.layers; ++l)
      for (int64_t j = 0; j < pages_for(tokens); ++j) {
        const PageAddress to = address(s, copy, l, j, lengths);
        const PageForms* forms = host.forms_of(q->pages[j], l);
        const int held = static_cast<int>(std::min<int64_t>(tokens - j * kPageTokens, kPageTokens));
        for (int h = 0; h < h_kv; ++h) {
          if (to.fp4)
            to_device_fp4(s.canonical, s.layout, host.fp4.at(forms[h].fp4), fp4.data() + h * s.layout.fp4_bytes);
          if (to.residual)
            to_device_fp4(s.canonical, s.layout, host.residual.at(forms[h].residual),
                          residual.data() + h * s.layout.fp4_bytes);
          if (to.high)
            to_device_high(s.canonical, s.layout, host.high.at(forms[h].high), held,
                           high.data() + h * s.layout.high_bytes);
          if (to.summary)
            std::memcpy(summary.data() + h * s.canonical.summary_bytes, host.summary.at(forms[h].summary),
                        s.canonical.summary_bytes);
        }
        if (to.fp4) THRIFTATTN_RETURN_IF_ERROR(to_device(to.fp4, fp4.data(), std::ssize(fp4), stream));
        if (to.residual)
          THRIFTATTN_RETURN_IF_ERROR(to_device(to.residual, residual.data(), std::ssize(residual), stream));
        if (to.high) THRIFTATTN_RETURN_IF_ERROR(to_device(to.high, high.data(), std::ssize(high), stream));
        if (to.summary) THRIFTATTN_RETURN_IF_ERROR(to_device(to.summary, summary.data(), std::ssize(summary), stream));
        THRIFTATTN_RETURN_IF_ERROR(wait(stream));
      }
    THRIFTATTN_RETURN_IF_ERROR(cut(s, copy, tokens, lengths.released, stream));
    return wait(stream);
  };
  Status status;
  try {
    status = copy_pages();
  } catch (const std::bad_alloc&) {
    status = no_memory("an upload");
  }
  if (status.ok()) return copy;
  (void)free(copy, stream);
  return status;
}

Result<std::vector<PageRecords>> download_records(const Cache::State& s, SeqId seq, int layer, int64_t first,
                                                  int64_t end, Stream stream) {
  if (!s.has(seq)) return unknown(seq);
  const CurrentDevice current(s.device);
  THRIFTATTN_ASSIGN_OR_RETURN(lengths, read_lengths(s, seq, stream));
  if (layer < 0 || layer >= s.config.layers || first < 0 || end < first || end > pages_for(lengths.s_kv))
    return invalid_argument(fmt::format("pages {} to {} of layer {} are not in sequence {}: it holds {} tokens", first,
                                        end, layer, seq, lengths.s_kv));
  const int h_kv = s.config.h_kv;
  try {
    std::vector<PageRecords> records((end - first) * h_kv);
    std::vector<uint8_t> fp4(h_kv * s.layout.fp4_bytes), residual(fp4), high(h_kv * s.layout.high_bytes),
        summary(h_kv * s.canonical.summary_bytes);
    for (int64_t j = first; j < end; ++j) {
      const PageAddress from = address(s, seq, layer, j, lengths);
      if (from.fp4) THRIFTATTN_RETURN_IF_ERROR(to_host(fp4.data(), from.fp4, std::ssize(fp4), stream));
      if (from.residual)
        THRIFTATTN_RETURN_IF_ERROR(to_host(residual.data(), from.residual, std::ssize(residual), stream));
      if (from.high) THRIFTATTN_RETURN_IF_ERROR(to_host(high.data(), from.high, std::ssize(high), stream));
      if (from.summary) THRIFTATTN_RETURN_IF_ERROR(to_host(summary.data(), from.summary, std::ssize(summary), stream));
      THRIFTATTN_RETURN_IF_ERROR(wait(stream));
      for (int h = 0; h < h_kv; ++h) {
        PageRecords& r = records[(j - first) * h_kv + h];
        const auto plane = [&](const std::vector<uint8_t>& all, std::vector<uint8_t>& record) {
          record.resize(s.canonical.fp4_bytes);
          to_canonical_fp4(s.layout, s.canonical, all.data() + h * s.layout.fp4_bytes, record.data());
        };
        if (from.fp4) plane(fp4, r.fp4);
        if (from.residual) plane(residual, r.residual);
        if (from.high) {
          r.high.resize(s.canonical.high_bytes);
          to_canonical_high(s.layout, s.canonical, high.data() + h * s.layout.high_bytes, r.high.data());
        }
        if (from.summary) {
          const uint8_t* at = summary.data() + h * s.canonical.summary_bytes;
          r.summary.assign(at, at + s.canonical.summary_bytes);
        }
      }
    }
    return records;
  } catch (const std::bad_alloc&) {
    return no_memory("a download");
  }
}

Status Cache::download(SeqId seq, int layer, int64_t first, const MutableView& k, const MutableView& v,
                       Stream stream) const {
  const State& s = *state_;
  const CacheConfig& c = s.config;
  if (k.tokens < 0 || k.tokens != v.tokens || k.heads != c.h_kv || v.heads != c.h_kv || k.channels != c.d ||
      v.channels != c.d_v)
    return invalid_argument(
        fmt::format("download to k [{}, {}, {}] and v [{}, {}, {}], expected [n, {}, {}] and [n, {}, {}]", k.tokens,
                    k.heads, k.channels, v.tokens, v.heads, v.channels, c.h_kv, c.d, c.h_kv, c.d_v));
  THRIFTATTN_ASSIGN_OR_RETURN(tokens, length(seq, stream));
  if (first < 0 || k.tokens > tokens - first)  // the sum of both may overflow
    return invalid_argument(
        fmt::format("{} tokens from {} on are not in sequence {}: it holds {}", k.tokens, first, seq, tokens));
  float pk[kMaxChannels * kPageTokens], pv[kMaxChannels * kPageTokens], row[kMaxChannels];
  const auto half = [](const std::vector<uint8_t>& record, int64_t at) {
    uint16_t bits;
    std::memcpy(&bits, record.data() + 2 * at, sizeof(bits));
    return f16_decode(bits);
  };
  for (int64_t t = first; t < first + k.tokens;) {
    const int64_t j = t / kPageTokens, end = std::min(first + k.tokens, (j + 1) * kPageTokens);
    THRIFTATTN_ASSIGN_OR_RETURN(records, download_records(s, seq, layer, j, j + 1, stream));
    for (int h = 0; h < c.h_kv; ++h) {
      const PageRecords& r = records[h];
      if (r.high.empty())
        decode_page(c, s.canonical, r.fp4.data(), r.residual.empty() ? nullptr : r.residual.data(), r.summary.data(),
                    pk, pv);
      for (int64_t i = t; i < end; ++i) {
        const int slot = static_cast<int>(i % kPageTokens);
        for (int ch = 0; ch < c.d; ++ch)
          row[ch] = r.high.empty() ? pk[ch * kPageTokens + slot] : half(r.high, s.canonical.high_k_at(slot, ch));
        store_row(k.dtype, row, c.d, k.at(i - first, h));
        for (int ch = 0; ch < c.d_v; ++ch)
          row[ch] = r.high.empty() ? pv[slot * c.d_v + ch] : half(r.high, s.canonical.high_v_at(slot, ch));
        store_row(v.dtype, row, c.d_v, v.at(i - first, h));
      }
    }
    t = end;
  }
  return {};
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
  int64_t pages = 0, live = 0;
  for (const State::Sequence& q : s.sequences) {
    pages += std::ssize(q.pages);
    live += q.live;
  }
  const int64_t heads = int64_t{s.config.layers} * s.config.h_kv;
  MemoryUse use;
  use.codes = s.fp4 ? heads * pages * s.layout.fp4_bytes : 0;
  use.residual = s.residual ? heads * pages * s.layout.fp4_bytes : 0;
  use.high = heads * (s.all_high ? pages : live * s.ring_pages) * s.layout.high_bytes;
  use.summaries = s.summary ? heads * pages * s.canonical.summary_bytes : 0;
  use.tables = (live * 6 + pages) * int64_t{sizeof(int32_t)};
  return use;
}

int64_t Cache::reserved_bytes() const { return state_->memory.bytes(); }

}  // namespace thriftattn::cuda
