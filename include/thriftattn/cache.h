// The paged key/value cache: what a method keeps of every token, for all layers of a model.
//
// A page is 64 consecutive tokens. A sequence is a table of page ids, one table for all layers; in which forms a page
// is stored is decided per (layer, KV head, page). A page fills in 16 bit and is encoded once, when full. Full pages
// are immutable and shared between forks; the tail belongs to one sequence.
//
// One step of one layer is   append(seq, layer, k, v)   attend(...)   settle(seq, layer):
// the 16-bit copies of the pages that the append filled live until settle, so that forced pages are read in 16 bit.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "thriftattn/export.h"
#include "thriftattn/method.h"
#include "thriftattn/status.h"
#include "thriftattn/tensor.h"

namespace thriftattn {

class ThreadPool;
struct CacheState;  // src/attention/cache_state.h: what kernels see of a cache

using SeqId = int32_t;

struct CacheConfig {
  int layers = 1;  // layers x h_kv: up to 2^20
  int h_kv = 1;
  int d = 128;                    // channels of a key head: a multiple of 16 up to 256
  int d_v = 128;                  // channels of a value head: the same
  DType high_dtype = DType::f16;  // the 16-bit form; f16 refuses values beyond 65504
  Storage storage = Storage::residual;
  std::vector<Storage> storage_by_head;  // [layers, h_kv] where heads differ; empty = `storage` for all
  Fp4Format format = Fp4Format::nvfp4;
  Scales scales = Scales::six;
  bool centring = true;
  bool page_scale = true;
  bool mean = true;       // page summaries: stored only when a policy or centring needs them
  bool min_max = false;   // for quest
  bool variance = false;  // for second_moment
  int sink = 1;           // first pages that keep their 16-bit form
  int recent = 2;         // last full pages that keep their 16-bit form; at least 2
  int64_t max_bytes = 0;  // limit of bytes().total() that append and fork keep; 0 = none

  Storage storage_at(int layer, int kv_head) const {
    return storage_by_head.empty() ? storage : storage_by_head[static_cast<size_t>(layer) * h_kv + kv_head];
  }
  bool operator==(const CacheConfig&) const = default;

  // What `method` needs stored for a model of this shape.
  THRIFTATTN_API static CacheConfig for_method(const Method& method, int layers, int h_kv, int d, int d_v);
};

// Bytes by what they hold. A page shared by forks counts once.
struct MemoryUse {
  int64_t codes = 0;      // FP4 codes and scales, first plane
  int64_t residual = 0;   // FP4 codes and scales, second plane
  int64_t high = 0;       // 16-bit pages, tails included
  int64_t summaries = 0;  // means, min/max, variances, page scales, residual norms
  int64_t tables = 0;     // block tables and form tables
  int64_t total() const { return codes + residual + high + summaries + tables; }
};

class THRIFTATTN_API KvCache {
 public:
  static Result<KvCache> create(const CacheConfig& config);
  KvCache(KvCache&&) noexcept;
  KvCache& operator=(KvCache&&) noexcept;
  ~KvCache();

  const CacheConfig& config() const;

  // A new, empty sequence; -1 where the system has no memory left for its tables.
  SeqId new_sequence();

  // Appends k [n, h_kv, d] and v [n, h_kv, d_v] to one layer of a sequence, n >= 0. All layers must be brought to the
  // same length before the next step. Refused, with nothing appended: wrong shapes, NaN, Inf, values beyond the 16-bit
  // form's range (the message names layer, token, head), no memory left under max_bytes.
  Status append(SeqId seq, int layer, const View& k, const View& v, ThreadPool& pool);

  // Ends a step of one layer: frees the 16-bit copies that only the step needed.
  Status settle(SeqId seq, int layer);

  // A new sequence that shares the full pages of `seq` and owns a copy of its tail. All layers must be of one length.
  Result<SeqId> fork(SeqId seq);

  // Shortens a sequence to `length` tokens. Cutting into an encoded page is exact where its 16-bit form is stored (the
  // last two full pages of a sequence that has only grown always are) and refused otherwise, unless `lossy` allows the
  // page to be rebuilt from FP4. A cut into a page that a fork shares makes a copy, whatever max_bytes says.
  Status truncate(SeqId seq, int64_t length, bool lossy = false);

  Status free(SeqId seq);

  // Tokens that every layer holds / that one layer holds. -1 for an unknown sequence.
  int64_t length(SeqId seq) const;
  int64_t length(SeqId seq, int layer) const;

  // Copies tokens [first, first + k.tokens) of one layer out of the best form stored of each page.
  Status read(SeqId seq, int layer, int64_t first, const MutableView& k, const MutableView& v) const;

  // Writes a sequence, whose layers must be of one length, and `metadata` (any bytes, up to 512 MiB) to a file of its
  // own, from which `load` brings back the same records: attention, truncate and all later steps go on bit for bit. An
  // older file is replaced in one step once the new one is on the disk; after an error it is untouched.
  Status save(SeqId seq, const std::string& path, std::string_view metadata = {}) const;

  // A new sequence with the content of a saved one, and what was saved with it in `metadata` unless that is null. The
  // cache's config must be that of the file, max_bytes apart. Refused, with the cache as it was: another config (the
  // message names the field), a file that is cut short or changed (it names layer, page and KV head), no memory left
  // under max_bytes.
  Result<SeqId> load(const std::string& path, std::string* metadata = nullptr);

  MemoryUse bytes() const;         // in use now
  int64_t peak_bytes() const;      // the largest total so far
  int64_t reserved_bytes() const;  // taken from the system, free records included

  const CacheState& state() const;
  CacheState& state();

 private:
  explicit KvCache(std::unique_ptr<CacheState> state);
  std::unique_ptr<CacheState> state_;
};

// What the header of a saved sequence says.
struct SavedSequence {
  uint32_t version = 0;
  CacheConfig config;  // max_bytes, a cache's own limit, is not saved
  int64_t tokens = 0;
  int64_t file_bytes = 0;
  MemoryUse bytes;  // what loading it into an empty cache takes
  std::string metadata;
};

// Reads and checks the header alone.
THRIFTATTN_API Result<SavedSequence> inspect_saved(const std::string& path);

}  // namespace thriftattn
