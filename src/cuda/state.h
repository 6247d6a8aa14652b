// What stands behind a cuda::Cache. Device memory is taken once; the host knows which pages a sequence has been given
// and the batch as it was set, and nothing that a step changes: lengths live on the device alone.
#pragma once

#include <fmt/format.h>

#include <cstdint>
#include <new>
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
  std::vector<int32_t> users;       // [pages], sequences whose block table names the page
  std::vector<int32_t> free_pages;  // those without users; the last is taken next

  // The batch as set_batch was given it.
  std::vector<SeqId> seqs;
  std::vector<int64_t> s_q;
  int64_t rows = 0, max_s_q = 0;  // the sum of s_q, and the largest

  LayerCache layer(int index) const;
  Batch batch() const;
  bool has(SeqId seq) const { return seq >= 0 && seq < std::ssize(sequences) && sequences[seq].live; }
};

inline cudaStream_t to_cuda(Stream stream) { return static_cast<cudaStream_t>(stream); }
inline Status wait(Stream stream) { return check(cudaStreamSynchronize(to_cuda(stream)), "cudaStreamSynchronize"); }
inline Status copy(void* to, const void* from, int64_t bytes, cudaMemcpyKind kind, Stream stream) {
  return check(cudaMemcpyAsync(to, from, bytes, kind, to_cuda(stream)), "cudaMemcpyAsync");
}
inline Status to_device(void* to, const void* from, int64_t bytes, Stream stream) {
  return copy(to, from, bytes, cudaMemcpyHostToDevice, stream);
}
inline Status to_host(void* to, const void* from, int64_t bytes, Stream stream) {
  return copy(to, from, bytes, cudaMemcpyDeviceToHost, stream);
}

inline Status unknown(SeqId seq) { return not_found(fmt::format("sequence {} does not exist", seq)); }
inline Status no_memory(const char* what) {
  return Status(Code::out_of_memory, fmt::format("no host memory left for {}", what));
}

// What the device knows of one sequence.
struct Lengths {
  int32_t settled = 0, s_kv = 0, released = 0;
};

// Of a sequence that lives. Synchronises. The second refuses in the middle of a step, when a sequence cannot be `done`.
Result<Lengths> read_lengths(const Cache::State& state, SeqId seq, Stream stream);
Result<Lengths> settled_lengths(const Cache::State& state, SeqId seq, const char* done, Stream stream);

// Makes `tokens` the length of a sequence that holds at least as many.
Status cut(const Cache::State& state, SeqId seq, int64_t tokens, int64_t released, Stream stream);

// A new sequence to which fill(seq) -> Status gives its content, for `what`; where it fails, or throws for want of
// memory, there is none.
template <class Fill>
Result<SeqId> filled_sequence(Cache& cache, const char* what, Stream stream, const Fill& fill) {
  THRIFTATTN_ASSIGN_OR_RETURN(seq, cache.new_sequence(stream));
  Status status;
  try {
    status = fill(seq);
  } catch (const std::bad_alloc&) {
    status = no_memory(what);
  }
  if (status.ok()) return seq;
  (void)cache.free(seq, stream);  // the first error is the one to tell
  return status;
}

// Records of pages [first, end) of a sequence in one layer, in canonical order.
struct LayerRecords {
  struct OneForm {
    int64_t record_bytes = 0;
    std::vector<StagedPage> pages;  // that are stored in this form
    std::vector<int32_t> place;     // [end - first], in `pages`; -1 = not stored
    std::vector<uint8_t> bytes;     // [pages, h_kv, record_bytes]
  };
  static constexpr int kFp4 = 0, kResidual = 1, kHigh = 2, kSummary = 3;
  int64_t first = 0;
  int h_kv = 0;
  OneForm forms[4];

  // Null where the page is not stored in that form.
  uint8_t* at(int form, int64_t page, int head) {
    OneForm& f = forms[form];
    const int64_t place = f.place[page - first];
    return place < 0 ? nullptr : f.bytes.data() + (place * h_kv + head) * f.record_bytes;
  }
};

// Synchronises.
Result<LayerRecords> download_records(const Cache::State& state, SeqId seq, int layer, int64_t first, int64_t end,
                                      Stream stream);

}  // namespace thriftattn::cuda
