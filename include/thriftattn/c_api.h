/* The C interface: attention over a paged FP4 key/value cache, for engines that do not speak C++.
 *
 * One step of one layer is   cache_append(k, v)   attend(q, out)   cache_settle()   ; examples/attend.c is a program.
 * The words (page, tier, method, selection) are those of docs/design.md, section 1.
 *
 * Errors. A call that can fail returns a ThriftattnCode; after one other than THRIFTATTN_OK, thriftattn_last_error()
 * says in one line which value was wrong and what is supported. Outputs are then untouched, unless said otherwise. A
 * null pointer is an error that names the argument; only destroy functions take null, and do nothing. Nothing is
 * printed, thrown or aborted.
 *
 * Handles are made by a _create function and given back by _destroy; none keeps a pointer to another one or to the
 * caller's memory. Different handles may be used by different threads at the same time. A cache may be read (attend,
 * read, length) by several threads while no thread changes it; a pool and a workspace serve one call at a time.
 *
 * Structs that may grow begin with `struct_size`: start from the THRIFTATTN_..._DEFAULTS of the type, which set it. A
 * library that knows more fields gives those that a program does not know their defaults (all bits zero); a program
 * that knows more fields than the library may leave those zero and is refused otherwise. Fields that hold an
 * enumeration are integers of fixed size; a value that the enumeration does not have is an error.
 *
 * Text is UTF-8 and ends with NUL. Tensors: shapes are [outermost, ..., innermost], and strides count elements.
 */
#ifndef THRIFTATTN_C_API_H_
#define THRIFTATTN_C_API_H_

#include <stddef.h>
#include <stdint.h>

#include "thriftattn/export.h"

#ifdef __cplusplus
extern "C" {
#endif

/* The version of this interface: counts up when a program that was built against an older one could stop working. */
#define THRIFTATTN_C_API_VERSION 1

/* Of the library that runs: compare with THRIFTATTN_C_API_VERSION. */
THRIFTATTN_API int32_t thriftattn_c_api_version(void);
THRIFTATTN_API const char* thriftattn_version(void);    /* e.g. "0.1.0" */
THRIFTATTN_API int32_t thriftattn_version_number(void); /* 10000 major + 100 minor + patch */

typedef enum ThriftattnCode {
  THRIFTATTN_OK = 0,
  THRIFTATTN_INVALID_ARGUMENT = 1, /* the caller's value is wrong: shape, option, range, NaN, null */
  THRIFTATTN_UNSUPPORTED = 2,      /* a valid problem that no kernel or storage here serves */
  THRIFTATTN_NOT_FOUND = 3,        /* a file or sequence that does not exist */
  THRIFTATTN_DATA_LOSS = 4,        /* a file that is cut short, lies or is corrupt */
  THRIFTATTN_OUT_OF_MEMORY = 5,    /* the cache's or the machine's limit */
  THRIFTATTN_IO = 6,               /* the operating system refused */
  THRIFTATTN_CANCELLED = 7,        /* the caller asked to stop */
  THRIFTATTN_INTERNAL = 8          /* a fault of the library: please report it */
} ThriftattnCode;

/* Why the calling thread's last failed call failed; "" where none has. Valid until its next failed call. */
THRIFTATTN_API const char* thriftattn_last_error(void);

/* The word of a code, e.g. "invalid_argument"; "unknown" for a number that is none. Never null. */
THRIFTATTN_API const char* thriftattn_code_name(int32_t code);

/* ---- Tensors ------------------------------------------------------------------------------------------------- */

typedef enum ThriftattnDType { THRIFTATTN_F32 = 0, THRIFTATTN_F16 = 1, THRIFTATTN_BF16 = 2 } ThriftattnDType;

/* A [tokens, heads, channels] tensor whose channels are contiguous. `data` may be null where it has no elements. */
typedef struct ThriftattnView {
  const void* data;
  int32_t dtype; /* ThriftattnDType */
  int64_t tokens, heads, channels;
  int64_t token_stride, head_stride; /* elements from one token, one head, to the next */
} ThriftattnView;

typedef struct ThriftattnMutableView {
  void* data;
  int32_t dtype;
  int64_t tokens, heads, channels;
  int64_t token_stride, head_stride;
} ThriftattnMutableView;

/* Packed tensors of floats, [tokens, heads, channels]. */
static inline ThriftattnView thriftattn_view(const float* data, int64_t tokens, int64_t heads, int64_t channels) {
  ThriftattnView v = {data, THRIFTATTN_F32, tokens, heads, channels, heads * channels, channels};
  return v;
}
static inline ThriftattnMutableView thriftattn_mutable_view(float* data, int64_t tokens, int64_t heads,
                                                            int64_t channels) {
  ThriftattnMutableView v = {data, THRIFTATTN_F32, tokens, heads, channels, heads * channels, channels};
  return v;
}

/* ---- Threads ------------------------------------------------------------------------------------------------- */

/* A fixed set of threads. Results never depend on how many there are. */
typedef struct ThriftattnPool ThriftattnPool;

/* `threads` in [0, 1024], the caller's among them; 0 = the processors that this process may use. */
THRIFTATTN_API ThriftattnCode thriftattn_pool_create(int32_t threads, ThriftattnPool** pool);
THRIFTATTN_API void thriftattn_pool_destroy(ThriftattnPool* pool);
THRIFTATTN_API int32_t thriftattn_pool_size(const ThriftattnPool* pool); /* -1 for null */

/* ---- Cache --------------------------------------------------------------------------------------------------- */

/* Tokens of one page: the unit of storage and of selection. */
#define THRIFTATTN_PAGE_TOKENS 64

/* In which forms pages are kept. 3 and 5 are reserved. */
typedef enum ThriftattnStorage {
  THRIFTATTN_STORAGE_HIGH_ONLY = 0, /* 16 bit */
  THRIFTATTN_STORAGE_DUAL = 1,      /* FP4 and 16 bit for all pages */
  THRIFTATTN_STORAGE_RESIDUAL = 2,  /* FP4 and its residual in FP4; 16 bit for sink, recent and tail */
  THRIFTATTN_STORAGE_FP4_ONLY = 4   /* FP4; 16 bit for sink, recent and tail */
} ThriftattnStorage;

typedef enum ThriftattnFp4Format { THRIFTATTN_NVFP4 = 0, THRIFTATTN_MXFP4 = 1 } ThriftattnFp4Format;
typedef enum ThriftattnScales { THRIFTATTN_SCALES_6 = 0, THRIFTATTN_SCALES_4OVER6 = 1 } ThriftattnScales;

typedef struct ThriftattnCacheConfig {
  size_t struct_size;
  int32_t layers, h_kv;
  int32_t d, d_v;                 /* channels of a key and of a value head: multiples of 16 up to 256 */
  int32_t high_dtype;             /* the 16-bit form, THRIFTATTN_F16 (refuses values beyond 65504) or THRIFTATTN_BF16 */
  int32_t storage;                /* ThriftattnStorage */
  const uint8_t* storage_by_head; /* [layers, h_kv] of ThriftattnStorage where heads differ; null = `storage` for all */
  int32_t format;                 /* ThriftattnFp4Format */
  int32_t scales;                 /* ThriftattnScales */
  int32_t centring, page_scale;   /* 0 or 1, as are the next three */
  int32_t mean, min_max, variance; /* page summaries that policies read */
  int32_t sink, recent;            /* pages at both ends that keep their 16-bit form; recent >= 2 */
  int64_t max_bytes;               /* limit of `total` that append and fork keep; 0 = none */
} ThriftattnCacheConfig;

#define THRIFTATTN_CACHE_CONFIG_DEFAULTS                                                                             \
  {                                                                                                                  \
    sizeof(ThriftattnCacheConfig), 1, 1, 128, 128, THRIFTATTN_F16, THRIFTATTN_STORAGE_RESIDUAL, NULL, 0, 0, 1, 1, 1, \
        0, 0, 1, 2, 0                                                                                                \
  }

/* What the method `method`, e.g. "thrift:budget=0.02", needs stored for a model of this shape. Fills the fields of
 * `config`, whose struct_size is set, as far as the caller knows them. */
THRIFTATTN_API ThriftattnCode thriftattn_cache_config_for_method(const char* method, int32_t layers, int32_t h_kv,
                                                                 int32_t d, int32_t d_v, ThriftattnCacheConfig* config);

/* A paged key/value cache of all layers of a model. */
typedef struct ThriftattnCache ThriftattnCache;

THRIFTATTN_API ThriftattnCode thriftattn_cache_create(const ThriftattnCacheConfig* config, ThriftattnCache** cache);
THRIFTATTN_API void thriftattn_cache_destroy(ThriftattnCache* cache);

/* The configuration that a cache was made with. storage_by_head points into the cache. */
THRIFTATTN_API ThriftattnCode thriftattn_cache_config(const ThriftattnCache* cache, ThriftattnCacheConfig* config);

/* Sequences are named by numbers from 0 up; a freed one's number is used again. */
THRIFTATTN_API ThriftattnCode thriftattn_cache_new_sequence(ThriftattnCache* cache, int32_t* seq);

/* Appends k [n, h_kv, d] and v [n, h_kv, d_v], n >= 0, to one layer of a sequence. All layers must be brought to the
 * same length before the next step. Refused, with nothing appended: wrong shapes, NaN, Inf, values beyond the 16-bit
 * form's range (the message names layer, token and head), no memory left under max_bytes. */
THRIFTATTN_API ThriftattnCode thriftattn_cache_append(ThriftattnCache* cache, int32_t seq, int32_t layer,
                                                      const ThriftattnView* k, const ThriftattnView* v,
                                                      ThriftattnPool* pool);

/* Ends a step of one layer: frees the 16-bit copies that only the step needed. */
THRIFTATTN_API ThriftattnCode thriftattn_cache_settle(ThriftattnCache* cache, int32_t seq, int32_t layer);

/* A new sequence, *fork, that shares the full pages of `seq` and owns a copy of its tail. All layers must be of one
 * length. */
THRIFTATTN_API ThriftattnCode thriftattn_cache_fork(ThriftattnCache* cache, int32_t seq, int32_t* fork);

/* Shortens a sequence to `length` tokens. Cutting into an encoded page is exact where its 16-bit form is stored (the
 * last two full pages of a sequence that has only grown always are) and refused otherwise, unless `lossy` is 1, which
 * allows the page to be rebuilt from FP4. */
THRIFTATTN_API ThriftattnCode thriftattn_cache_truncate(ThriftattnCache* cache, int32_t seq, int64_t length,
                                                        int32_t lossy);

THRIFTATTN_API ThriftattnCode thriftattn_cache_free_sequence(ThriftattnCache* cache, int32_t seq);

/* Tokens that every layer holds / that one layer holds; -1 for null, an unknown sequence or an unknown layer. */
THRIFTATTN_API int64_t thriftattn_cache_length(const ThriftattnCache* cache, int32_t seq);
THRIFTATTN_API int64_t thriftattn_cache_layer_length(const ThriftattnCache* cache, int32_t seq, int32_t layer);

/* Copies tokens [first, first + n) of one layer, out of the best form stored of each page, to k [n, h_kv, d] and
 * v [n, h_kv, d_v]. */
THRIFTATTN_API ThriftattnCode thriftattn_cache_read(const ThriftattnCache* cache, int32_t seq, int32_t layer,
                                                    int64_t first, const ThriftattnMutableView* k,
                                                    const ThriftattnMutableView* v);

/* Bytes by what they hold. A page shared by forks counts once. */
typedef struct ThriftattnMemory {
  size_t struct_size;
  int64_t codes;     /* FP4 codes and scales, first plane */
  int64_t residual;  /* FP4 codes and scales, second plane */
  int64_t high;      /* 16-bit pages, tails included */
  int64_t summaries; /* means, minima and maxima, variances, page scales, residual norms */
  int64_t tables;    /* block tables and form tables */
  int64_t total;     /* of the above, in use now */
  int64_t peak;      /* the largest total so far */
  int64_t reserved;  /* taken from the system, free records included */
} ThriftattnMemory;

#define THRIFTATTN_MEMORY_DEFAULTS \
  { sizeof(ThriftattnMemory), 0, 0, 0, 0, 0, 0, 0, 0 }

THRIFTATTN_API ThriftattnCode thriftattn_cache_memory(const ThriftattnCache* cache, ThriftattnMemory* memory);

/* Writes a sequence, whose layers must be of one length, and `metadata` [metadata_bytes], any bytes up to 512 MiB (null
 * where there are none), to a file of its own, from which load brings back the same records: attention, truncate and
 * all later steps go on bit for bit. An older file is replaced in one step once the new one is on the disk; after an
 * error it is untouched. */
THRIFTATTN_API ThriftattnCode thriftattn_cache_save(const ThriftattnCache* cache, int32_t seq, const char* path,
                                                    const void* metadata, int64_t metadata_bytes);

/* A new sequence, *seq, with the content of a saved one. The cache's configuration must be that of the file, max_bytes
 * apart. Refused, with the cache as it was: another configuration (the message names the field), a file that is cut
 * short or changed, no memory left under max_bytes. */
THRIFTATTN_API ThriftattnCode thriftattn_cache_load(ThriftattnCache* cache, const char* path, int32_t* seq);

/* What the header of a saved sequence says. */
typedef struct ThriftattnSaved ThriftattnSaved;

typedef struct ThriftattnSavedValues {
  size_t struct_size;
  int64_t version; /* of the format */
  int64_t tokens;
  int64_t file_bytes;
  int64_t memory_bytes; /* what loading it into an empty cache takes */
  const void* metadata; /* [metadata_bytes], what was saved with it, valid as long as the ThriftattnSaved */
  int64_t metadata_bytes;
} ThriftattnSavedValues;

#define THRIFTATTN_SAVED_VALUES_DEFAULTS \
  { sizeof(ThriftattnSavedValues), 0, 0, 0, 0, NULL, 0 }

/* Reads and checks the header alone. */
THRIFTATTN_API ThriftattnCode thriftattn_saved_create(const char* path, ThriftattnSaved** saved);
THRIFTATTN_API void thriftattn_saved_destroy(ThriftattnSaved* saved);
THRIFTATTN_API ThriftattnCode thriftattn_saved_read(const ThriftattnSaved* saved, ThriftattnSavedValues* values);

/* The configuration of a cache that loads it; storage_by_head points into `saved`. */
THRIFTATTN_API ThriftattnCode thriftattn_saved_config(const ThriftattnSaved* saved, ThriftattnCacheConfig* config);

/* ---- Plan ---------------------------------------------------------------------------------------------------- */

typedef enum ThriftattnPhase {
  THRIFTATTN_PREFILL = 0, /* query blocks of 64 rows at absolute positions; selection per query head */
  THRIFTATTN_DECODE = 1   /* at most 16 rows form one block; selection per KV head; verify steps too */
} ThriftattnPhase;

typedef struct ThriftattnProblem {
  size_t struct_size;
  int32_t phase;    /* ThriftattnPhase */
  int32_t b;        /* sequences in one call, at most; up to 4096 */
  int64_t max_s_q;  /* rows of one sequence, at most; up to 2^30, as are tokens */
  int64_t max_s_kv; /* tokens of one sequence, at most */
  int32_t h_q;      /* query heads, a multiple of the cache's h_kv; up to 4096 */
  int32_t causal; /* 1: the row at position i sees no key after it; row r of s_q stands at s_kv - s_q + r. 0: it does */
  int64_t window; /* a row sees keys less than `window` positions away alone; 0 = all */
  float sm_scale; /* any finite number; 0 = 1/sqrt(d) */
  float softcap;  /* a scaled score s becomes softcap * tanh(s / softcap); 0 = it stays */
  int32_t stats;  /* 1: calls may be given a ThriftattnStats to fill beyond its counts */
  const char* method;                 /* e.g. "thrift" or "quest:budget=0.1" */
  const ThriftattnCacheConfig* cache; /* of the cache that the plan will run over; gives h_kv, d and d_v */
  int32_t compute; /* ThriftattnDType, F32 or BF16: the least precise form in which q, k, v and p may enter a product of
                      a prefill. BF16 allows what matrix tiles need; where there are none, F32 serves all the same */
} ThriftattnProblem;

#define THRIFTATTN_PROBLEM_DEFAULTS \
  { sizeof(ThriftattnProblem), THRIFTATTN_PREFILL, 1, 1, 1, 1, 1, 0, 0, 0, 0, "thrift", NULL, THRIFTATTN_F32 }

/* How a problem will be computed: kernel, instruction set, tiles, splits, workspace. Serves all lengths up to the
 * problem's. */
typedef struct ThriftattnPlan ThriftattnPlan;

/* `threads` in [1, 1024]: those of the pool that calls will run on. A problem that nothing here serves is an error that
 * says why. */
THRIFTATTN_API ThriftattnCode thriftattn_plan_create(const ThriftattnProblem* problem, int32_t threads,
                                                     ThriftattnPlan** plan);
THRIFTATTN_API void thriftattn_plan_destroy(ThriftattnPlan* plan);

/* One line for people, valid as long as the plan; null for null. */
THRIFTATTN_API const char* thriftattn_plan_text(const ThriftattnPlan* plan);

/* Scratch memory that a workspace of the plan takes; -1 for null. */
THRIFTATTN_API int64_t thriftattn_plan_workspace_bytes(const ThriftattnPlan* plan);

/* Scratch memory: made once, used by one call at a time. Serves the plan and those of the same sizes and method. */
typedef struct ThriftattnWorkspace ThriftattnWorkspace;

THRIFTATTN_API ThriftattnCode thriftattn_workspace_create(const ThriftattnPlan* plan, ThriftattnWorkspace** workspace);
THRIFTATTN_API void thriftattn_workspace_destroy(ThriftattnWorkspace* workspace);

/* ---- Selection ----------------------------------------------------------------------------------------------- */

/* The form in which a page is read, in ascending order of quality. */
typedef enum ThriftattnTier {
  THRIFTATTN_TIER_NONE = 0,
  THRIFTATTN_TIER_FP4 = 1,
  THRIFTATTN_TIER_FP4X2 = 2,
  THRIFTATTN_TIER_FP16 = 3
} ThriftattnTier;

/* One promoted page of one query block. */
typedef struct ThriftattnPromoted {
  int32_t page; /* from the start of the sequence */
  uint8_t tier; /* ThriftattnTier */
} ThriftattnPromoted;

/* Pages promoted for every query block of a call; all others are read in the method's rest. Block (s, h, i): sequence
 * s, head h (query head in prefill, KV head in decode), i-th query block of that sequence. */
typedef struct ThriftattnSelection ThriftattnSelection;

/* A copy of first [blocks + 1], ascending offsets into pages from 0 on, blocks in the order s, h, i; and of pages
 * [first[blocks]], ascending within a block. A call that is given the selection checks it against what is stored. */
THRIFTATTN_API ThriftattnCode thriftattn_selection_create(int64_t blocks, const int64_t* first,
                                                          const ThriftattnPromoted* pages,
                                                          ThriftattnSelection** selection);
THRIFTATTN_API void thriftattn_selection_destroy(ThriftattnSelection* selection);

/* What a selection holds, as _create takes it; the arrays are valid as long as the selection. */
THRIFTATTN_API ThriftattnCode thriftattn_selection_read(const ThriftattnSelection* selection, int64_t* blocks,
                                                        const int64_t** first, const ThriftattnPromoted** pages);

/* ---- Attention ----------------------------------------------------------------------------------------------- */

/* What calls did: counts that add up over calls, and details of the last one. */
typedef struct ThriftattnStats ThriftattnStats;

/* Pairs are (query block, full page, query head) triples that a block can see. */
typedef struct ThriftattnStatsValues {
  size_t struct_size;
  int64_t pairs, promoted;   /* summed over calls */
  int64_t wanted_not_stored; /* promotions that the policy asked for and the storage could not serve; summed */
  double mass_above_fp4;     /* from here on only with ThriftattnProblem.stats, of the last call: softmax mass read in a
                                tier above fp4, mean over rows and heads */
  double error_estimate;     /* docs/design.md section 2, Reports; mean over blocks and heads */
  const float* page_mass;    /* [b, h_kv, max pages] of the call's sequences: softmax mass per page, mean over rows and
                                query heads; max pages = max_s_kv / 64, rounded up. Valid until the stats are used again */
  int64_t page_mass_count;   /* elements of page_mass */
} ThriftattnStatsValues;

#define THRIFTATTN_STATS_VALUES_DEFAULTS \
  { sizeof(ThriftattnStatsValues), 0, 0, 0, 0, 0, NULL, 0 }

THRIFTATTN_API ThriftattnCode thriftattn_stats_create(ThriftattnStats** stats);
THRIFTATTN_API void thriftattn_stats_destroy(ThriftattnStats* stats);
THRIFTATTN_API ThriftattnCode thriftattn_stats_reset(ThriftattnStats* stats); /* back to zero */
THRIFTATTN_API ThriftattnCode thriftattn_stats_read(const ThriftattnStats* stats, ThriftattnStatsValues* values);

/* A copy of what the last call promoted (with ThriftattnProblem.stats). */
THRIFTATTN_API ThriftattnCode thriftattn_stats_selection(const ThriftattnStats* stats, ThriftattnSelection** selection);

typedef struct ThriftattnAttendArgs {
  size_t struct_size;
  const ThriftattnCache* cache;
  int32_t layer;
  int32_t b;                 /* sequences of this call, up to the problem's */
  const int32_t* seqs;       /* [b] */
  const int64_t* s_q;        /* [b], rows of each sequence; its last row is the sequence's last token */
  ThriftattnView q;          /* [sum s_q, h_q, d], sequences one after another; h_q as planned */
  ThriftattnMutableView out; /* [sum s_q, h_q, d_v]; not read by select */
  float* lse;                /* [sum s_q, h_q], natural log; may be null */
  const float* sinks;        /* [h_q] or null: a learned logit per head that takes mass and brings no value */
  const int32_t* kv_heads;   /* [n_kv_heads], ascending: the KV heads to compute. Other heads' rows of out and lse are
                                left alone, and a selection has empty blocks for them */
  int32_t n_kv_heads;        /* 0 = all */
  const ThriftattnSelection* given; /* promote exactly these pages instead of selecting; may be null */
  ThriftattnStats* stats;           /* may be null */
} ThriftattnAttendArgs;

#define THRIFTATTN_ATTEND_ARGS_DEFAULTS                                                                             \
  {                                                                                                                 \
    sizeof(ThriftattnAttendArgs), NULL, 0, 0, NULL, NULL, {NULL, 0, 0, 0, 0, 0, 0}, {NULL, 0, 0, 0, 0, 0, 0}, NULL, \
        NULL, NULL, 0, NULL, NULL                                                                                   \
  }

/* out = softmax(q k^T sm_scale) v over the cache's sequences, every page in the tier that the plan's method selects.
 * Rows without a visible key give out = 0, lse = -inf (the sink's logit where there is one). NaN or Inf in q stay
 * within their row. out and lse are undefined after an error. */
THRIFTATTN_API ThriftattnCode thriftattn_attend(const ThriftattnPlan* plan, ThriftattnWorkspace* workspace,
                                                ThriftattnPool* pool, const ThriftattnAttendArgs* args);

/* The selection alone, as thriftattn_attend would make it: destroy it after use. out, lse, given and stats of args are
 * not looked at. */
THRIFTATTN_API ThriftattnCode thriftattn_select(const ThriftattnPlan* plan, ThriftattnWorkspace* workspace,
                                                ThriftattnPool* pool, const ThriftattnAttendArgs* args,
                                                ThriftattnSelection** selection);

#ifdef __cplusplus
}
#endif

#endif /* THRIFTATTN_C_API_H_ */
