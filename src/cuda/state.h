// What stands behind a cuda::Cache. Device memory is taken once; the host knows which pages a sequence has been given
// and the batch as it was set, and nothing that a step changes: lengths live on the device alone.
#pragma once

#include <cstdint>
#include <vector>

#include "core/device.h"
#include "cuda/params.h"
#include "thriftattn/cuda.h"

namespace thriftattn::cuda {

// Hidden, because what belongs to a class that a shared library shows would be shown with it.
struct __attribute__((visibility("hidden"))) Cache::State {
  CacheConfig config;
  CacheSize size;  // pages filled in
  int device = 0;
  PageLayout canonical;
  DeviceLayout layout;
  int max_pages = 0;         // of one sequence
  int sink = 0, recent = 0;  // the config's, max_pages at most
  int ring_pages = 0;        // 16-bit records of a sequence, where not all pages have one
  int64_t high_records = 0;  // of one layer and head
  bool all_high = false;

  DeviceMemory memory;                                                               // what follows points into it
  uint8_t *fp4 = nullptr, *residual = nullptr, *high = nullptr, *summary = nullptr;  // [layers], each as in LayerCache
  int32_t* block_table = nullptr;                                                    // [max_sequences, max_pages]
  int32_t *settled = nullptr, *s_kv = nullptr, *released = nullptr;                  // [max_sequences]
  int32_t* batch_table = nullptr;                                                    // [3, b]: slots, s_q, first rows
  int32_t* faults = nullptr;                                                         // [1]

  struct Sequence {
    bool live = false;
    std::vector<int32_t> pages;  // those that its block table names
  };
  std::vector<Sequence> sequences;  // [max_sequences], a SeqId is the slot
  std::vector<int32_t> free_pages;  // the last is taken next

  // The batch as set_batch was given it.
  std::vector<SeqId> seqs;
  std::vector<int64_t> s_q;
  int64_t rows = 0, max_s_q = 0;  // the sum of s_q, and the largest

  LayerCache layer(int index) const;
  Batch batch() const;
  bool has(SeqId seq) const { return seq >= 0 && seq < std::ssize(sequences) && sequences[seq].live; }
};

// The records of one page and head, in canonical order; empty where the page is not stored in that form.
struct PageRecords {
  std::vector<uint8_t> fp4, residual, high, summary;
};

// Those of pages [first, end) of a sequence in one layer, [pages, h_kv]. Synchronises.
Result<std::vector<PageRecords>> download_records(const Cache::State& state, SeqId seq, int layer, int64_t first,
                                                  int64_t end, Stream stream);

}  // namespace thriftattn::cuda
