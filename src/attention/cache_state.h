// What stands behind a KvCache: record pools, form tables, block tables. See cache.h for what it promises.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "format/page_layout.h"
#include "thriftattn/cache.h"

namespace thriftattn {

// Room for `more` elements, so that pushing them does not allocate; may throw std::bad_alloc.
template <class T>
void grow_by(std::vector<T>& v, int64_t more) {
  const size_t wanted = v.size() + static_cast<size_t>(more);
  if (v.capacity() < wanted) v.reserve(std::max(wanted, 2 * v.capacity()));
}

// Equal records that never move, named by index. Memory is taken in blocks, the first small, later ones as large as a
// quarter of what there is already, up to 16 MiB; from 2 MiB on a block asks for huge pages, which a decode step reads
// a tenth faster (docs/performance.md, "Decode"). Within a block records stand in chunks of 16, so that finding one
// takes no division.
class RecordPool {
 public:
  static constexpr int64_t kAlignment = 64;

  explicit RecordPool(int64_t record_bytes = 0)
      : record_bytes_(record_bytes), stride_(round_up(record_bytes, kAlignment)) {}

  // Makes sure that the next `count` takes succeed; false where the system has no memory left: give_up then gives back
  // what this took.
  bool reserve(int64_t count) {
    try {
      while (static_cast<int64_t>(free_.size()) < count) add_block();
    } catch (const std::bad_alloc&) {
      return false;
    }
    return true;
  }

  // The blocks as they are; giving up what has been reserved since, where nothing has been taken or given back.
  struct Mark {
    size_t blocks, chunks, free;
    int64_t reserved;
  };
  Mark mark() const { return {blocks_.size(), chunks_.size(), free_.size(), reserved_}; }
  void give_up(const Mark& mark) {
    free_.resize(mark.free);
    chunks_.resize(mark.chunks);
    blocks_.resize(mark.blocks);
    reserved_ = mark.reserved;
  }

  int32_t take() {  // after reserve
    const int32_t record = free_.back();
    free_.pop_back();
    ++used_;
#ifdef THRIFTATTN_POISON
    std::memset(at(record), 0xff, stride_);  // NaN in every form: who reads what was never written is found out
#endif
    return record;
  }

  // Returns the record that `record` names, if any, and forgets it.
  void give_back(int32_t& record) {
    if (record < 0) return;
    free_.push_back(record);
    --used_;
    record = -1;
  }

  uint8_t* at(int32_t record) const {
    return record < 0 ? nullptr : chunks_[record / kChunkRecords] + (record % kChunkRecords) * stride_;
  }
  int64_t record_bytes() const { return record_bytes_; }
  int64_t used_bytes() const { return used_ * record_bytes_; }
  int64_t reserved_bytes() const { return reserved_; }

 private:
  static constexpr uint32_t kChunkRecords = 16;
  static constexpr int64_t kHugePage = int64_t{1} << 21;

  struct Release {
    int64_t alignment = kAlignment;
    void operator()(uint8_t* p) const { ::operator delete(p, std::align_val_t(alignment)); }
  };

  void add_block() {
    const int64_t chunk_bytes = int64_t{kChunkRecords} * stride_;
    int64_t bytes = std::max({chunk_bytes, int64_t{1} << 18, std::min(reserved_ / 4, int64_t{1} << 24)});
    const bool huge = bytes >= kHugePage;
    if (huge) bytes = bytes / kHugePage * kHugePage;
    const Release release{huge ? kHugePage : kAlignment};
    std::unique_ptr<uint8_t, Release> block(
        static_cast<uint8_t*>(::operator new(bytes, std::align_val_t(release.alignment))), release);
    if (huge) madvise(block.get(), bytes, MADV_HUGEPAGE);  // where the system has none, small ones do
    const int64_t chunks = bytes / chunk_bytes, first = std::ssize(chunks_) * kChunkRecords;
    grow_by(blocks_, 1);
    grow_by(chunks_, chunks);
    grow_by(free_,
            first + chunks * kChunkRecords - std::ssize(free_));  // all may come back: give_back must not allocate
    for (int64_t c = 0; c < chunks; ++c) chunks_.push_back(block.get() + c * chunk_bytes);
    for (int64_t i = chunks * kChunkRecords; i-- > 0;) free_.push_back(static_cast<int32_t>(first + i));
    blocks_.push_back(std::move(block));
    reserved_ += bytes;
  }

  int64_t record_bytes_, stride_;
  int64_t used_ = 0, reserved_ = 0;
  std::vector<std::unique_ptr<uint8_t, Release>> blocks_;
  std::vector<uint8_t*> chunks_;  // in the blocks
  std::vector<int32_t> free_;
};

// The records of one (page, layer, KV head); -1 = that form is not stored.
struct PageForms {
  int32_t fp4 = -1, residual = -1, high = -1, summary = -1;
};

struct Sequence {
  bool live = false;
  std::vector<int32_t> pages;         // the block table
  std::vector<int64_t> layer_length;  // [layers], tokens
  std::vector<int64_t> released;      // [layers], pages [sink, released) have been given up as 16-bit pages
};

// A form as a bit, in the order in which saved records stand.
enum Form : uint8_t { kFp4Form = 1, kResidualForm = 2, kHighForm = 4, kSummaryForm = 8 };

// A sequence without its records.
struct SequenceForms {
  int64_t tokens = 0;
  std::vector<int64_t> released;  // [layers], as in Sequence
  std::vector<uint8_t> forms;     // [layers, pages, h_kv], bits of Form

  int64_t pages() const { return pages_for(tokens); }
};

struct CacheState {
  CacheConfig config;
  PageLayout layout;
  RecordPool fp4, residual, high, summary;
  std::vector<PageForms> forms;     // [pages, layers, h_kv]
  std::vector<int32_t> high_users;  // [pages, layers], sequences whose 16-bit window holds the page
  std::vector<int32_t> page_users;  // [pages], sequences whose table holds the page
  std::vector<int32_t> free_pages;
  std::vector<Sequence> sequences;
  int64_t peak_bytes = 0;

  PageForms* forms_of(int32_t page, int layer) {
    return &forms[(static_cast<int64_t>(page) * config.layers + layer) * config.h_kv];
  }
  const PageForms* forms_of(int32_t page, int layer) const {
    return const_cast<CacheState*>(this)->forms_of(page, layer);
  }
  const Sequence* find(SeqId seq) const {
    return seq >= 0 && seq < static_cast<SeqId>(sequences.size()) && sequences[seq].live ? &sequences[seq] : nullptr;
  }
  // Makes sure that so many records of each form can be taken, or changes nothing: false where the system has no memory
  // left.
  struct Records {
    int64_t fp4 = 0, residual = 0, high = 0, summary = 0;
  };
  bool reserve(const Records& n) {
    RecordPool* const pools[] = {&fp4, &residual, &high, &summary};
    const int64_t counts[] = {n.fp4, n.residual, n.high, n.summary};
    RecordPool::Mark marks[4];
    for (int i = 0; i < 4; ++i) marks[i] = pools[i]->mark();
    for (int i = 0; i < 4; ++i) {
      if (pools[i]->reserve(counts[i])) continue;
      for (int j = 0; j <= i; ++j) pools[j]->give_up(marks[j]);
      return false;
    }
    return true;
  }
  // The forms that a full page of one head is stored in.
  struct Stored {
    bool fp4, residual, summary;
    bool all_high;  // its 16-bit form stays; otherwise a window of them does
  };
  Stored stored(int layer, int kv_head) const {
    const Storage storage = config.storage_at(layer, kv_head);
    const bool encoded = storage != Storage::high_only;
    return {encoded, storage == Storage::residual, encoded || layout.summary_bytes > int64_t{sizeof(PageSummary)},
            !encoded || storage == Storage::dual};
  }
};

// The forms in which page `page` of a sequence of `tokens` is stored where pages [sink, released) have left the window.
// For a fork's sake a full page may be stored in 16 bit beside them.
uint8_t stored_forms(const CacheState& state, int layer, int kv_head, int64_t page, int64_t tokens, int64_t released);

// A new sequence of these forms. fill(layer, page, KV head, records) -> Status writes every record of a page, in this
// order. After an error, a lack of memory under max_bytes or in the system too, the cache is as before; `what` begins
// the messages.
Result<SeqId> bring_in(KvCache& cache, const SequenceForms& sequence, const std::string& what,
                       const std::function<Status(int, int64_t, int, const PageForms&)>& fill);

// What the form tables hold of one page: its forms, and the counts of its users.
int64_t form_table_bytes(const CacheConfig& config);

MemoryUse memory_use(const CacheState& state);

// What a sequence of these forms takes.
MemoryUse memory_needed(const PageLayout& layout, const CacheConfig& config, const SequenceForms& sequence);

Status unknown_sequence(SeqId seq);

}  // namespace thriftattn
