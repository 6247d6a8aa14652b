// Whole records between a cache on the device and the host.
//
//   upload     a KvCache's records --> bytes --> staging on the device --convert.cu--> pools, then the lengths
//   download   the same way back; attention/cache_state.h's bring_in takes them into the KvCache
//
// kStagedPages pages of one layer at a time, for which the host waits: these are no part of a step. What crosses
// between host and device binds them.
#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <new>

#include "attention/cache_state.h"
#include "cuda/params.h"
#include "cuda/state.h"
#include "format/page_codec.h"
#include "format/rows.h"

namespace thriftattn::cuda {
namespace {

// The forms in the order of LayerRecords.
struct FormOf {
  RecordKind kind;
  int32_t PageForms::*record;
  RecordPool CacheState::*host;
  uint8_t* LayerCache::*pool;
  int64_t PageLayout::*bytes;
};
constexpr FormOf kForms[] = {
    {RecordKind::fp4, &PageForms::fp4, &CacheState::fp4, &LayerCache::fp4, &PageLayout::fp4_bytes},
    {RecordKind::fp4, &PageForms::residual, &CacheState::residual, &LayerCache::residual, &PageLayout::fp4_bytes},
    {RecordKind::high, &PageForms::high, &CacheState::high, &LayerCache::high, &PageLayout::high_bytes},
    {RecordKind::summary, &PageForms::summary, &CacheState::summary, &LayerCache::summary, &PageLayout::summary_bytes},
};

// Carries records between pools and the host through memory of its own.
class Ferry {
 public:
  static Result<Ferry> create(const Cache::State& s, Stream stream) {
    const PageLayout& l = s.canonical;
    const int64_t largest = std::max({l.fp4_bytes, l.high_bytes, l.summary_bytes});
    THRIFTATTN_ASSIGN_OR_RETURN(
        staging, DeviceMemory::take(kStagedPages * s.config.h_kv * largest, s.device, "records on their way"));
    return Ferry(s, stream, std::move(staging));
  }

  // Room for the records of pages [first, end) of a sequence of these lengths.
  void make_room(SeqId seq, int64_t first, int64_t end, const Lengths& lengths, LayerRecords& to) const {
    const LayerCache cache = s_.layer(0);
    to.first = first;
    to.h_kv = cache.h_kv;
    for (int f = 0; f < std::ssize(kForms); ++f) {
      const bool high = kForms[f].kind == RecordKind::high;
      LayerRecords::OneForm& form = to.forms[f];
      form.record_bytes = s_.canonical.*kForms[f].bytes;
      form.pages.clear();
      form.place.assign(end - first, -1);
      for (int64_t j = first; j < end; ++j) {
        const int page = static_cast<int>(j);
        const int64_t held = std::min<int64_t>(lengths.s_kv - j * kPageTokens, kPageTokens);
        const bool stored =
            high ? cache.has_high(page, lengths.released) : cache.*kForms[f].pool && held == kPageTokens;
        if (!stored) continue;
        const int32_t id = s_.sequences[seq].pages[j];
        form.place[j - first] = static_cast<int32_t>(form.pages.size());
        form.pages.push_back({high ? cache.high_record(seq, page, id) : id, static_cast<int>(held)});
      }
      form.bytes.resize(std::ssize(form.pages) * to.h_kv * form.record_bytes);
    }
  }

  // To or from the pools of a layer. Synchronises.
  Status carry(int layer, LayerRecords& records, bool to_pool) const {
    const LayerCache cache = s_.layer(layer);
    const int64_t pool_bytes[] = {s_.layout.fp4_bytes, s_.layout.fp4_bytes, s_.layout.high_bytes,
                                  s_.canonical.summary_bytes};
    for (int f = 0; f < std::ssize(kForms); ++f) {
      LayerRecords::OneForm& form = records.forms[f];
      const ConvertParams p{s_.canonical,          s_.layout,       kForms[f].kind, to_pool,
                            cache.*kForms[f].pool, staging_.data(), pool_bytes[f],  form.record_bytes};
      for (int64_t done = 0; done < std::ssize(form.pages); done += kStagedPages) {
        const int64_t count = std::min<int64_t>(std::ssize(form.pages) - done, kStagedPages);
        const int64_t page_bytes = cache.h_kv * form.record_bytes;
        uint8_t* const host = form.bytes.data() + done * page_bytes;
        if (to_pool) THRIFTATTN_RETURN_IF_ERROR(to_device(staging_.data(), host, count * page_bytes, stream_));
        THRIFTATTN_RETURN_IF_ERROR(check(
            launch_convert(p, cache.h_kv, &form.pages[done], static_cast<int>(count), to_cuda(stream_)), "convert"));
        if (!to_pool) THRIFTATTN_RETURN_IF_ERROR(to_host(host, staging_.data(), count * page_bytes, stream_));
      }
    }
    return wait(stream_);
  }

 private:
  Ferry(const Cache::State& s, Stream stream, DeviceMemory staging)
      : s_(s), stream_(stream), staging_(std::move(staging)) {}

  const Cache::State& s_;
  Stream stream_;
  DeviceMemory staging_;  // [kStagedPages, h_kv], records of one form
};

// Whether records mean the same in a KvCache.
Status check_config(const Cache::State& s, const KvCache& host, const char* done) {
  CacheConfig theirs = host.config();
  theirs.max_bytes = s.config.max_bytes;
  if (theirs == s.config) return {};
  return invalid_argument(fmt::format("a sequence can be {} a cache of the same configuration only", done));
}

}  // namespace

Result<SeqId> Cache::upload(const KvCache& from, SeqId seq, Stream stream) {
  State& s = *state_;
  THRIFTATTN_RETURN_IF_ERROR(check_config(s, from, "uploaded to"));
  const CacheState& host = from.state();
  const Sequence* q = host.find(seq);
  if (!q) return unknown(seq);
  const int64_t tokens = from.length(seq);
  for (int l = 0; l < s.config.layers; ++l)
    if (from.length(seq, l) != tokens)
      return invalid_argument(fmt::format("sequence {} cannot be uploaded in the middle of a step", seq));
  Lengths lengths;
  lengths.settled = lengths.s_kv = static_cast<int32_t>(tokens);
  lengths.released = static_cast<int32_t>(
      std::max(*std::max_element(q->released.begin(), q->released.end()), tokens / kPageTokens - s.recent));
  const CurrentDevice current(s.device);
  return filled_sequence(*this, "an upload", stream, [&](SeqId copy) -> Status {
    THRIFTATTN_RETURN_IF_ERROR(reserve(copy, tokens, stream));
    THRIFTATTN_ASSIGN_OR_RETURN(ferry, Ferry::create(s, stream));
    LayerRecords records;
    for (int l = 0; l < s.config.layers; ++l)
      for (int64_t first = 0; first < pages_for(tokens); first += kStagedPages) {
        const int64_t end = std::min(first + kStagedPages, pages_for(tokens));
        ferry.make_room(copy, first, end, lengths, records);
        for (int f = 0; f < std::ssize(kForms); ++f)
          for (int64_t j = first; j < end; ++j)
            for (int h = 0; h < s.config.h_kv; ++h)
              if (uint8_t* to = records.at(f, j, h))
                std::memcpy(to, (host.*kForms[f].host).at(host.forms_of(q->pages[j], l)[h].*kForms[f].record),
                            records.forms[f].record_bytes);
        THRIFTATTN_RETURN_IF_ERROR(ferry.carry(l, records, true));
      }
    THRIFTATTN_RETURN_IF_ERROR(cut(s, copy, tokens, lengths.released, stream));
    return wait(stream);
  });
}

Result<LayerRecords> download_records(const Cache::State& s, SeqId seq, int layer, int64_t first, int64_t end,
                                      Stream stream) {
  if (!s.has(seq)) return unknown(seq);
  const CurrentDevice current(s.device);
  THRIFTATTN_ASSIGN_OR_RETURN(lengths, read_lengths(s, seq, stream));
  if (layer < 0 || layer >= s.config.layers || first < 0 || end < first || end > pages_for(lengths.s_kv))
    return invalid_argument(fmt::format("pages {} to {} of layer {} are not in sequence {}: it holds {} tokens", first,
                                        end, layer, seq, lengths.s_kv));
  try {
    THRIFTATTN_ASSIGN_OR_RETURN(ferry, Ferry::create(s, stream));
    LayerRecords records;
    ferry.make_room(seq, first, end, lengths, records);
    THRIFTATTN_RETURN_IF_ERROR(ferry.carry(layer, records, false));
    return records;
  } catch (const std::bad_alloc&) {
    return no_memory("a download");
  }
}

Result<SeqId> Cache::download(SeqId seq, KvCache& to, Stream stream) const {
  const State& s = *state_;
  THRIFTATTN_RETURN_IF_ERROR(check_config(s, to, "downloaded to"));
  const CurrentDevice current(s.device);
  THRIFTATTN_ASSIGN_OR_RETURN(now, settled_lengths(s, seq, "downloaded", stream));
  CacheState& host = to.state();
  try {
    SequenceForms shape;
    shape.tokens = now.s_kv;
    shape.released.assign(s.config.layers, std::max(now.released, s.config.sink));
    for (int l = 0; l < s.config.layers; ++l)
      for (int64_t j = 0; j < shape.pages(); ++j)
        shape.forms.insert(shape.forms.end(), s.config.h_kv,
                           stored_forms(host, l, 0, j, shape.tokens, shape.released[l]));
    THRIFTATTN_ASSIGN_OR_RETURN(ferry, Ferry::create(s, stream));
    LayerRecords records;
    const auto fill = [&](int layer, int64_t page, int head, const PageForms& forms) -> Status {
      if (page % kStagedPages == 0 && head == 0) {
        ferry.make_room(seq, page, std::min(page + kStagedPages, shape.pages()), now, records);
        THRIFTATTN_RETURN_IF_ERROR(ferry.carry(layer, records, false));
      }
      for (int f = 0; f < std::ssize(kForms); ++f)
        if (const uint8_t* from = records.at(f, page, head))
          std::memcpy((host.*kForms[f].host).at(forms.*kForms[f].record), from, records.forms[f].record_bytes);
      return {};
    };
    return bring_in(to, shape, fmt::format("sequence {} of GPU {}", seq, s.device), fill);
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
  const auto half = [](const uint8_t* record, int64_t at) {
    uint16_t bits;
    std::memcpy(&bits, record + 2 * at, sizeof(bits));
    return f16_decode(bits);
  };
  for (int64_t t = first; t < first + k.tokens;) {
    const int64_t j = t / kPageTokens, end = std::min(first + k.tokens, (j + 1) * kPageTokens);
    THRIFTATTN_ASSIGN_OR_RETURN(records, download_records(s, seq, layer, j, j + 1, stream));
    for (int h = 0; h < c.h_kv; ++h) {
      const uint8_t* high = records.at(LayerRecords::kHigh, j, h);
      if (!high)
        decode_page(c, s.canonical, records.at(LayerRecords::kFp4, j, h), records.at(LayerRecords::kResidual, j, h),
                    records.at(LayerRecords::kSummary, j, h), pk, pv);
      for (int64_t i = t; i < end; ++i) {
        const int slot = static_cast<int>(i % kPageTokens);
        for (int ch = 0; ch < c.d; ++ch)
          row[ch] = high ? half(high, s.canonical.high_k_at(slot, ch)) : pk[ch * kPageTokens + slot];
        store_row(k.dtype, row, c.d, k.at(i - first, h));
        for (int ch = 0; ch < c.d_v; ++ch)
          row[ch] = high ? half(high, s.canonical.high_v_at(slot, ch)) : pv[slot * c.d_v + ch];
        store_row(v.dtype, row, c.d_v, v.at(i - first, h));
      }
    }
    t = end;
  }
  return {};
}

}  // namespace thriftattn::cuda
