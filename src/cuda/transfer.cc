// Whole records between a cache on the device and the host.
//
//   upload     a KvCache's sequence: forms --convert.h--> staged, a page of one layer at a time --> pools, then lengths
//   download   the same way back
//
// Conversion to the other order of words binds both, on the host. They wait for every page: these are no part of a
// step.
#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <new>

#include "attention/cache_state.h"
#include "cuda/convert.h"
#include "cuda/state.h"
#include "format/page_codec.h"
#include "format/rows.h"

namespace thriftattn::cuda {
namespace {

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
  });
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

Result<SeqId> Cache::download(SeqId seq, KvCache& to, Stream stream) const {
  const State& s = *state_;
  THRIFTATTN_RETURN_IF_ERROR(check_config(s, to, "downloaded to"));
  const CurrentDevice current(s.device);
  THRIFTATTN_ASSIGN_OR_RETURN(now, settled_lengths(s, seq, "downloaded", stream));
  const int h_kv = s.config.h_kv;
  CacheState& host = to.state();
  SequenceForms shape;
  std::vector<PageRecords> page_records;  // [h_kv], of the page under way
  try {
    shape.tokens = now.s_kv;
    shape.released.assign(s.config.layers, std::max(now.released, s.config.sink));
    for (int l = 0; l < s.config.layers; ++l)
      for (int64_t j = 0; j < shape.pages(); ++j)
        shape.forms.insert(shape.forms.end(), h_kv, stored_forms(host, l, 0, j, shape.tokens, shape.released[l]));
    const auto fill = [&](int layer, int64_t j, int h, const PageForms& forms) -> Status {
      if (h == 0) {
        THRIFTATTN_ASSIGN_OR_RETURN(records, download_records(s, seq, layer, j, j + 1, stream));
        page_records = std::move(records);
      }
      const auto put = [](const RecordPool& pool, int32_t record, const std::vector<uint8_t>& bytes) {
        if (record >= 0) std::memcpy(pool.at(record), bytes.data(), bytes.size());
      };
      const PageRecords& records = page_records[h];
      put(host.fp4, forms.fp4, records.fp4);
      put(host.residual, forms.residual, records.residual);
      put(host.high, forms.high, records.high);
      put(host.summary, forms.summary, records.summary);
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

}  // namespace thriftattn::cuda
