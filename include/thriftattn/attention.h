// Attention over a KvCache: describe the problem, plan it once, run the plan at every step.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "thriftattn/cache.h"
#include "thriftattn/export.h"
#include "thriftattn/method.h"
#include "thriftattn/status.h"
#include "thriftattn/tensor.h"
#include "thriftattn/threads.h"

namespace thriftattn {

enum class Phase : uint8_t {
  prefill,  // query blocks of 64 rows at absolute positions; selection per query head
  decode,   // s_q <= 16 rows form one block; selection per KV head. Verify steps are decode steps with s_q > 1
};

struct Problem {
  Phase phase = Phase::prefill;
  int b = 1;               // sequences in one call, at most; up to 4096
  int64_t max_s_q = 1;     // rows of one sequence, at most; up to 2^30, as are tokens
  int64_t max_s_kv = 1;    // tokens of one sequence, at most
  int h_q = 1, h_kv = 1;   // query and KV heads, up to 4096; h_q is a multiple of h_kv
  int d = 128, d_v = 128;  // channels of a key and of a value head: multiples of 16 up to 256
  bool causal = true;      // the row at position i sees no key after it; row r of s_q stands at s_kv - s_q + r
  int64_t window = 0;      // it sees keys less than `window` positions away alone; 0 = all
  float sm_scale = 0;      // any finite number; 0 = 1/sqrt(d)
  float softcap = 0;       // a scaled score s becomes softcap * tanh(s / softcap); 0 = it stays
  Method method;
  CacheConfig cache;   // of the cache that the plan will run over
  bool stats = false;  // fill Stats
  // The least precise form in which q, k, v and p may enter a product of a prefill. f32: FP32 products of what the
  // cache holds. bf16 allows each factor to be rounded to BF16 once (relative error 2^-9), which matrix tiles and
  // AVX512-BF16 need; sums stay FP32. A machine without them computes in FP32 all the same, and decode always does.
  DType compute = DType::f32;

  bool operator==(const Problem&) const = default;
};

// An NVIDIA GPU as the planner sees it (thriftattn/cuda.h).
struct Gpu {
  int index = 0;
  std::string name;
  int compute_capability = 0;  // 90 = 9.0
  int multiprocessors = 0;
  int64_t shared_bytes = 0;  // of one block, at most
  int64_t l2_bytes = 0, memory_bytes = 0;
};

// What the planner knows of the machine; the same words force a choice in tests.
struct Machine {
  int threads = 1;                   // up to 1024
  std::vector<std::string> targets;  // instruction sets of the CPU backend, best first, e.g. {"AMX", "AVX3", "AVX2"}
  std::optional<Gpu> gpu = {};       // where it is named, plans are for it and for caches on it
  THRIFTATTN_API static Machine here(int threads);
};

// A backend that will not serve a problem, and why.
struct Refusal {
  std::string backend, reason;
};

struct Plan {
  Problem problem;      // with sm_scale, policy and arithmetic resolved
  std::string backend;  // "cpu", "cuda"
  std::string kernel;  // "prefill_tiles", "prefill_matrix_tiles"; "decode_one_pass"; "decode_exchange", which reads all
                       // pages in FP4 first and then exchanges those promoted; "decode_score_first"
  std::string target;  // the instruction set, e.g. "AVX3"
  int rows_per_tile = 0;  // query rows of one tile
  int splits = 1;         // page ranges into which one (sequence, KV head) of a decode step is cut
  int threads = 1;
  int64_t workspace_bytes = 0;
  std::vector<Refusal> refused;  // the backends, and targets of the chosen one, passed over
};

// Chooses a kernel. Pure: looks at nothing but its arguments. An unsupported problem is an error that lists every
// backend's reason.
THRIFTATTN_API Result<Plan> plan(const Problem& problem, const Machine& machine);
THRIFTATTN_API std::string to_string(const Plan& plan);

// One promoted page of one query block.
struct Promoted {
  int32_t page = 0;
  Tier tier = Tier::fp16;
  bool operator==(const Promoted&) const = default;
};

// Pages promoted for every query block of a call. Block (s, h, i): sequence s, head h (query head in prefill, KV head
// in decode), i-th query block of that sequence. Pages ascend within a block; all others are read in the method's rest.
struct Selection {
  std::vector<int64_t> first;  // [blocks + 1], offsets into `pages`, blocks in the order s, h, i
  std::vector<Promoted> pages;
};

// What a call did. Pairs are (query block, full page, query head) triples that a block can see.
struct Stats {
  int64_t pairs = 0, promoted = 0;
  int64_t wanted_not_stored = 0;  // promotions that the policy asked for and the storage could not serve
  // Only with Problem::stats:
  double mass_above_fp4 = 0;     // softmax mass read in a tier above fp4, mean over rows and heads
  double error_estimate = 0;     // docs/design.md section 2, Reports; mean over blocks and heads
  std::vector<float> page_mass;  // [b, h_kv, max pages]: softmax mass per page, mean over rows and query heads
  Selection selection;           // what was promoted
};

struct AttendArgs {
  const KvCache* cache = nullptr;
  int layer = 0;
  std::span<const SeqId> seqs;   // [b]
  std::span<const int64_t> s_q;  // [b], rows of each sequence; its last row is the sequence's last token
  // The KV heads to compute, ascending; empty = all. Rows of `out` and `lse` of other heads are left alone, and a
  // selection has empty blocks for them: heads of one layer may run under plans of different methods.
  std::span<const int> kv_heads = {};
  View q;                            // [sum s_q, h_q, d], sequences one after another
  MutableView out;                   // [sum s_q, h_q, d_v]
  float* lse = nullptr;              // [sum s_q, h_q], natural log; may be null
  const float* sinks = nullptr;      // [h_q] or null: a learned logit per head that takes mass and brings no value
  const Selection* given = nullptr;  // promote exactly these pages instead of selecting
  Stats* stats = nullptr;            // may be null; the counts are added to, the rest describes this call
};

// Scratch memory of a plan: made once, used by one run at a time. Serves every plan of the same sizes and method, over
// caches that keep the same of a page.
class THRIFTATTN_API Workspace {
 public:
  static Result<Workspace> create(const Plan& plan);
  Workspace(Workspace&&) noexcept;
  Workspace& operator=(Workspace&&) noexcept;
  ~Workspace();
  struct Buffers;
  Buffers& buffers() const { return *buffers_; }

 private:
  explicit Workspace(std::unique_ptr<Buffers> buffers);
  std::unique_ptr<Buffers> buffers_;
};

// out = softmax(q k^T sm_scale) v over the cache's sequences, every page in the tier that the plan's method selects.
// Rows without a visible key give out = 0, lse = -inf (the sink's logit where there is one). NaN or Inf in q stay
// within their row.
THRIFTATTN_API Status run(const Plan& plan, Workspace& workspace, ThreadPool& pool, const AttendArgs& args);

// The selection alone, as `run` would make it.
THRIFTATTN_API Result<Selection> select(const Plan& plan, Workspace& workspace, ThreadPool& pool,
                                        const AttendArgs& args);

}  // namespace thriftattn
