// What stands behind a KvCache: record pools, form tables, block tables. See cache.h for what it promises.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "format/page_layout.h"
#include "thriftattn/cache.h"

namespace thriftattn {

// Equal records in chunks that never move. A record is named by its index.
class RecordPool {
 public:
  static constexpr int64_t kAlignment = 64;

  explicit RecordPool(int64_t record_bytes = 0)
      : record_bytes_(record_bytes),
        stride_(round_up(record_bytes, kAlignment)),
        per_chunk_(stride_ ? std::max<int64_t>(1, (int64_t{1} << 20) / stride_) : 0) {}

  // Makes sure that the next `count` takes succeed; false where the system has no memory left.
  bool reserve(int64_t count) {
    try {
      while (static_cast<int64_t>(free_.size()) < count) {
        const int64_t first = static_cast<int64_t>(chunks_.size()) * per_chunk_;
        free_.reserve(first + per_chunk_);  // every record may come back: give_back must not allocate
        std::unique_ptr<uint8_t, Release> chunk(
            static_cast<uint8_t*>(::operator new(per_chunk_* stride_, std::align_val_t(kAlignment))));
        chunks_.push_back(std::move(chunk));
        for (int64_t i = per_chunk_; i-- > 0;) free_.push_back(static_cast<int32_t>(first + i));
      }
    } catch (const std::bad_alloc&) {
      return false;
    }
    return true;
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
    return record < 0 ? nullptr : chunks_[record / per_chunk_].get() + (record % per_chunk_) * stride_;
  }
  int64_t record_bytes() const { return record_bytes_; }
  int64_t used_bytes() const { return used_ * record_bytes_; }
  int64_t reserved_bytes() const { return static_cast<int64_t>(chunks_.size()) * per_chunk_ * stride_; }

 private:
  struct Release {
    void operator()(uint8_t* p) const { ::operator delete(p, std::align_val_t(kAlignment)); }
  };
  int64_t record_bytes_, stride_, per_chunk_;
  int64_t used_ = 0;
  std::vector<std::unique_ptr<uint8_t, Release>> chunks_;
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

// What the form tables hold of one page: its forms, and the counts of its users.
int64_t form_table_bytes(const CacheConfig& config);

MemoryUse memory_use(const CacheState& state);

Status unknown_sequence(SeqId seq);

// Makes sure that `count` take_page calls and `entries` more in `table` succeed; false where no memory is left.
bool reserve_pages(CacheState& state, int64_t count, std::vector<int32_t>& table, int64_t entries);

// A page id whose records are all empty, held by one sequence.
int32_t take_page(CacheState& state);

// Sequences whose 16-bit window holds the page in one layer.
int32_t& high_users(CacheState& state, int32_t page, int layer);

}  // namespace thriftattn
