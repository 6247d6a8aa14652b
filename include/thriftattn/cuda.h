// The same attention on an NVIDIA GPU: a cache whose pages, block tables and lengths live on the device, and steps over
// it that never wait for the host.
//
//   cache.set_batch(seqs, s_q, stream)          which sequences the next steps take, and how many tokens of each
//   cache.begin_step(stream)                    lengths grow
//     for every layer:
//       cache.append(layer, k, v, stream)
//       run(plan, workspace, {cache, layer, q, out, ...}, stream)
//   cache.end_step(stream)                      the 16-bit copies that only the step needed may be overwritten
//
// All calls between set_batch and the next one launch kernels on the caller's stream and nothing else: no allocation,
// no synchronisation, no copy from the host. So begin_step .. end_step can be captured in a CUDA graph, whose replays
// go on step after step while the sequences grow, as far as pages were reserved for them.
//
// In a build without CUDA every function here returns Code::unsupported.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "thriftattn/attention.h"
#include "thriftattn/cache.h"
#include "thriftattn/export.h"
#include "thriftattn/status.h"
#include "thriftattn/tensor.h"

namespace thriftattn::cuda {

using Stream = void*;  // a cudaStream_t of the cache's device

// The GPUs that the driver shows, by index. Unsupported in a build without CUDA or where there is no driver.
THRIFTATTN_API Result<std::vector<Gpu>> gpus();

// A machine for plan(): the GPU `index`.
THRIFTATTN_API Result<Machine> machine(int index);

struct CacheSize {
  int max_sequences = 1;
  int64_t max_tokens = 0;  // of one sequence
  int64_t pages = 0;       // of all sequences together, at most; 0 = max_sequences times the pages of max_tokens
  int64_t max_append = 1;  // tokens of one sequence in one step, at most
};

// What a step could not do; sticky until cleared.
struct Faults {
  bool no_pages = false;  // a sequence had no page reserved for its new tokens: nothing of that step was appended to it
  bool not_finite = false;  // a NaN, an Inf or a value beyond 65504 came in: its page gives NaN
  explicit operator bool() const { return no_pages || not_finite; }
};

class THRIFTATTN_API Cache {
 public:
  // Takes all memory at once, on GPU `device`. Refused: what KvCache::create refuses, storage_by_head, and
  // high_dtype bf16; max_bytes is compared with what the pools take.
  static Result<Cache> create(const CacheConfig& config, const CacheSize& size, int device);
  Cache(Cache&&) noexcept;
  Cache& operator=(Cache&&) noexcept;
  ~Cache();

  const CacheConfig& config() const;
  const CacheSize& size() const;
  int device() const;

  // A new, empty sequence; an error where all max_sequences live.
  Result<SeqId> new_sequence(Stream stream);
  // Makes sure that the sequence can grow to `tokens`: takes pages for it and writes its block table.
  Status reserve(SeqId seq, int64_t tokens, Stream stream);
  Status free(SeqId seq, Stream stream);
  // A new sequence that shares the full pages of `seq` and owns a copy of its tail, and of those 16-bit pages that are
  // kept for the window alone. Pages reserved beyond the length stay with `seq`: the fork reserves its own. Refused in
  // the middle of a step; out of memory where all sequences live or no page is left for the tail. Synchronises.
  Result<SeqId> fork(SeqId seq, Stream stream);
  // Shortens a sequence. Its pages stay reserved, but for those after the new end that a fork shares: they are the
  // other's alone from then on, and a cut into one takes a page for the copy where none is reserved. Exact where the
  // page that is cut has its 16-bit form; refused otherwise. Synchronises.
  Status truncate(SeqId seq, int64_t length, Stream stream);

  // Makes the cache larger, with all that it holds: sequences, their pages and reservations, the batch, faults. No
  // field may be smaller than size()'s; pages = 0 counts as in create. While it copies, the memory of both sizes is
  // taken; where there is not enough the cache stays as it was. What was made for the old size ends here: captured
  // graphs, and plans whose max_s_kv is less than the new max_tokens. Synchronises.
  Status grow(const CacheSize& size, Stream stream);

  // The sequences of the next steps and the tokens that each step brings them, at most max_append each. Copies to the
  // device in stream order.
  Status set_batch(std::span<const SeqId> seqs, std::span<const int64_t> s_q, Stream stream);
  Status begin_step(Stream stream);
  // k: [sum s_q, h_kv, d], v: [sum s_q, h_kv, d_v], on the device, sequences one after another.
  Status append(int layer, const View& k, const View& v, Stream stream);
  Status end_step(Stream stream);

  // Copies a sequence of a cache of the same configuration (max_bytes apart) to a new one here / from here to a new one
  // there, record by record: the bytes are those that each would have written. So what KvCache::save writes of a
  // downloaded sequence, KvCache::load and upload bring back, and all later steps go on bit for bit. Refused in the
  // middle of a step. Both synchronise.
  Result<SeqId> upload(const KvCache& from, SeqId seq, Stream stream);
  Result<SeqId> download(SeqId seq, KvCache& to, Stream stream) const;
  // Copies tokens [first, first + k.tokens) of one layer, out of the best form stored of each page, to k and v of the
  // host. Synchronises.
  Status download(SeqId seq, int layer, int64_t first, const MutableView& k, const MutableView& v, Stream stream) const;

  // Tokens of a sequence. Both synchronise.
  Result<int64_t> length(SeqId seq, Stream stream) const;
  Result<Faults> faults(Stream stream, bool clear = false);

  // Of the pages that sequences hold, in the forms that they keep between steps. All that is taken from the device is
  // more: free pages, and room for the 16-bit form of what a step of max_append tokens fills.
  MemoryUse bytes() const;
  int64_t reserved_bytes() const;

  struct State;
  State& state() const { return *state_; }

 private:
  explicit Cache(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

// Device memory of a plan, used by one run at a time.
class THRIFTATTN_API Workspace {
 public:
  static Result<Workspace> create(const Plan& plan, int device);
  Workspace(Workspace&&) noexcept;
  Workspace& operator=(Workspace&&) noexcept;
  ~Workspace();
  int64_t bytes() const;

  struct State;
  State& state() const { return *state_; }

 private:
  explicit Workspace(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

struct AttendArgs {
  Cache* cache = nullptr;
  int layer = 0;
  View q;                        // [sum s_q, h_q, d], on the device as all below
  MutableView out;               // [sum s_q, h_q, d_v]
  float* lse = nullptr;          // [sum s_q, h_q], natural log; may be null
  const float* sinks = nullptr;  // [h_q] or null
};

// out = softmax(q k^T sm_scale) v over the batch of the cache, as thriftattn::run defines it. Launches and returns; an
// error of an earlier launch may show here.
THRIFTATTN_API Status run(const Plan& plan, Workspace& workspace, const AttendArgs& args, Stream stream);

// What the next runs of a workspace promote instead of selecting, in the order of thriftattn::Selection; null: they
// select again. Copies to the device and waits. It is of the cache's batch and lengths as they are. The sequences of a
// decode may grow under it where there is no window and every page that it names in 16 bit keeps that form.
THRIFTATTN_API Status give_selection(const Plan& plan, Workspace& workspace, const Cache& cache,
                                     const Selection* selection, Stream stream);

// What the last run promoted, and with Problem::stats the rest of Stats. Waits for the stream.
THRIFTATTN_API Result<Stats> stats(const Plan& plan, const Workspace& workspace, const Cache& cache, Stream stream);

// n values in FP4, in blocks of 16 (nvfp4) or 32 (mxfp4), as a cache encodes a block, its page scale and centring
// apart. A NaN makes its block NaN, infinities saturate. Pointers are of GPU `device`; launches and returns.
//   x:      [n], one after another; n is a multiple of the block
//   codes:  [n / 2], two in a byte, the first in its low half
//   scales: [n / block]
THRIFTATTN_API Status quantize(const void* x, DType dtype, int64_t n, Fp4Format format, Scales rule, uint8_t* codes,
                               uint8_t* scales, int device, Stream stream);
// And back; x is aligned to 8 bytes.
THRIFTATTN_API Status dequantize(const uint8_t* codes, const uint8_t* scales, int64_t n, Fp4Format format, float* x,
                                 int device, Stream stream);

}  // namespace thriftattn::cuda
