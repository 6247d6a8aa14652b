// The C interface over the C++ one: checks what C cannot promise (nulls, enumerations, struct sizes), turns Status into
// codes and a message per thread, and lets no exception out.
#include "thriftattn/c_api.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "thriftattn/attention.h"

using namespace thriftattn;  // NOLINT: the C names carry the prefix

struct ThriftattnPool {
  explicit ThriftattnPool(int threads) : value(threads) {}
  ThreadPool value;
};

struct ThriftattnCache {
  KvCache value;
};

struct ThriftattnSaved {
  SavedSequence value;
};

struct ThriftattnPlan {
  Plan value;
  std::string text;
};

struct ThriftattnWorkspace {
  Workspace value;
};

struct ThriftattnSelection {
  Selection value;
};

struct ThriftattnStats {
  Stats value;
};

namespace {

constexpr int32_t kMaxThreads = 1024;

// The numbers of the C enumerations are those of the C++ ones.
template <class C, class Cpp>
constexpr bool same(C c, Cpp cpp) {
  return static_cast<int>(c) == static_cast<int>(cpp);
}
static_assert(same(THRIFTATTN_OK, Code::ok) && same(THRIFTATTN_INVALID_ARGUMENT, Code::invalid_argument) &&
              same(THRIFTATTN_UNSUPPORTED, Code::unsupported) && same(THRIFTATTN_NOT_FOUND, Code::not_found) &&
              same(THRIFTATTN_DATA_LOSS, Code::data_loss) && same(THRIFTATTN_OUT_OF_MEMORY, Code::out_of_memory) &&
              same(THRIFTATTN_IO, Code::io) && same(THRIFTATTN_CANCELLED, Code::cancelled));
static_assert(same(THRIFTATTN_F32, DType::f32) && same(THRIFTATTN_F16, DType::f16) &&
              same(THRIFTATTN_BF16, DType::bf16));
static_assert(same(THRIFTATTN_STORAGE_HIGH_ONLY, Storage::high_only) && same(THRIFTATTN_STORAGE_DUAL, Storage::dual) &&
              same(THRIFTATTN_STORAGE_RESIDUAL, Storage::residual) &&
              same(THRIFTATTN_STORAGE_FP4_ONLY, Storage::fp4_only));
static_assert(same(THRIFTATTN_NVFP4, Fp4Format::nvfp4) && same(THRIFTATTN_MXFP4, Fp4Format::mxfp4));
static_assert(same(THRIFTATTN_SCALES_6, Scales::six) && same(THRIFTATTN_SCALES_4OVER6, Scales::four_over_six));
static_assert(same(THRIFTATTN_PREFILL, Phase::prefill) && same(THRIFTATTN_DECODE, Phase::decode));
static_assert(same(THRIFTATTN_TIER_NONE, Tier::none) && same(THRIFTATTN_TIER_FP4, Tier::fp4) &&
              same(THRIFTATTN_TIER_FP4X2, Tier::fp4x2) && same(THRIFTATTN_TIER_FP16, Tier::fp16));
static_assert(THRIFTATTN_PAGE_TOKENS == kPageTokens);
// Arrays of them are handed through as they are.
static_assert(sizeof(ThriftattnPromoted) == sizeof(Promoted) &&
              offsetof(ThriftattnPromoted, tier) == offsetof(Promoted, tier));
static_assert(sizeof(Storage) == sizeof(uint8_t) && std::is_same_v<SeqId, int32_t> && std::is_same_v<int, int32_t>);

constexpr const char* kCodeNames[] = {
    "ok", "invalid_argument", "unsupported", "not_found", "data_loss", "out_of_memory", "io", "cancelled", "internal"};

// ---- Errors

thread_local std::string last_message;  // of the last failed call
thread_local const char* last_error_text = "";

ThriftattnCode fail(ThriftattnCode code, std::string message) noexcept {
  last_message = std::move(message);
  last_error_text = last_message.c_str();
  return code;
}

// Where no memory for a message is to be expected.
ThriftattnCode fail_fixed(ThriftattnCode code, const char* message) noexcept {
  last_error_text = message;
  return code;
}

// Runs `body`, which returns a Status, and turns what comes out of it into a code.
template <class Body>
ThriftattnCode guarded(const Body& body) noexcept {
  try {
    Status status = body();
    if (status.ok()) return THRIFTATTN_OK;
    return fail(static_cast<ThriftattnCode>(status.code()), status.message());
  } catch (const std::bad_alloc&) {
    return fail_fixed(THRIFTATTN_OUT_OF_MEMORY, "the system has no memory left");
  } catch (const std::length_error&) {
    return fail_fixed(THRIFTATTN_OUT_OF_MEMORY, "the call needs more memory than can be addressed");
  } catch (...) {
    return fail_fixed(THRIFTATTN_INTERNAL, "an unexpected exception: a fault of the library");
  }
}

Status null_argument(const char* name) { return invalid_argument(fmt::format("{} is null", name)); }

#define RETURN_IF_NULL(pointer) \
  if (!(pointer)) return null_argument(#pointer)

// ---- What C cannot promise

// A struct of the caller's, of the size it knows, over `defaults`, which holds what it does not know. `first_size` is
// the size that the struct had when it first appeared.
template <class T>
Result<T> read_struct(const char* name, const T* from, size_t first_size, T defaults) {
  if (!from) return null_argument(name);
  const size_t size = from->struct_size;
  if (size < first_size)
    return invalid_argument(fmt::format(
        "{}->struct_size {} is not supported: {} (start from the DEFAULTS of the struct)", name, size, sizeof(T)));
  const auto* bytes = reinterpret_cast<const unsigned char*>(from);
  for (size_t i = sizeof(T); i < size; ++i)
    if (bytes[i] != 0)
      return invalid_argument(fmt::format("{} uses a field at byte {} that this library, which knows {}, does not have",
                                          name, i, sizeof(T)));
  std::memcpy(&defaults, from, std::min(size, sizeof(T)));
  return defaults;
}

// Fills as much of `to` as the caller knows.
template <class T>
Status write_struct(const char* name, T* to, size_t first_size, T values) {
  if (!to) return null_argument(name);
  const size_t size = to->struct_size;
  if (size < first_size)
    return invalid_argument(fmt::format(
        "{}->struct_size {} is not supported: {} (start from the DEFAULTS of the struct)", name, size, sizeof(T)));
  values.struct_size = size;
  std::memcpy(to, &values, std::min(size, sizeof(T)));
  if (size > sizeof(T)) std::memset(reinterpret_cast<unsigned char*>(to) + sizeof(T), 0, size - sizeof(T));
  return {};
}

// An enumeration by its number; `last` is its largest.
template <class Enum>
Status read_enum(const char* name, int32_t number, Enum last, Enum& value) {
  if (number < 0 || number > static_cast<int32_t>(last))
    return invalid_argument(
        fmt::format("{} {} is not supported: 0 to {} are", name, number, static_cast<int32_t>(last)));
  value = static_cast<Enum>(number);
  return {};
}

Status read_switch(const char* name, int32_t number, bool& value) {
  if (number != 0 && number != 1)
    return invalid_argument(fmt::format("{} {} is not supported: 0 and 1 are", name, number));
  value = number == 1;
  return {};
}

template <class Out, class CView>
Result<Out> read_view(const char* name, const CView* view) {
  if (!view) return null_argument(name);
  Out out;
  THRIFTATTN_RETURN_IF_ERROR(read_enum(fmt::format("{}.dtype", name).c_str(), view->dtype, DType::bf16, out.dtype));
  if (view->tokens < 0 || view->heads < 0 || view->channels < 0)
    return invalid_argument(
        fmt::format("{} is [{}, {}, {}]: sizes are 0 or more", name, view->tokens, view->heads, view->channels));
  const bool empty = view->tokens == 0 || view->heads == 0 || view->channels == 0;
  if (!view->data && !empty) return null_argument(fmt::format("{}.data", name).c_str());
  out.data = view->data;
  out.tokens = view->tokens;
  out.heads = view->heads;
  out.channels = view->channels;
  out.token_stride = view->token_stride;
  out.head_stride = view->head_stride;
  return out;
}

Result<CacheConfig> read_config(const char* name, const ThriftattnCacheConfig* from) {
  THRIFTATTN_ASSIGN_OR_RETURN(c, read_struct<ThriftattnCacheConfig>(name, from, sizeof(ThriftattnCacheConfig),
                                                                    THRIFTATTN_CACHE_CONFIG_DEFAULTS));
  CacheConfig config;
  config.layers = c.layers;
  config.h_kv = c.h_kv;
  config.d = c.d;
  config.d_v = c.d_v;
  THRIFTATTN_RETURN_IF_ERROR(read_enum("high_dtype", c.high_dtype, DType::bf16, config.high_dtype));
  THRIFTATTN_RETURN_IF_ERROR(read_enum("storage", c.storage, Storage::offload, config.storage));
  THRIFTATTN_RETURN_IF_ERROR(read_enum("format", c.format, Fp4Format::mxfp4, config.format));
  THRIFTATTN_RETURN_IF_ERROR(read_enum("scales", c.scales, Scales::four_over_six, config.scales));
  THRIFTATTN_RETURN_IF_ERROR(read_switch("centring", c.centring, config.centring));
  THRIFTATTN_RETURN_IF_ERROR(read_switch("page_scale", c.page_scale, config.page_scale));
  THRIFTATTN_RETURN_IF_ERROR(read_switch("mean", c.mean, config.mean));
  THRIFTATTN_RETURN_IF_ERROR(read_switch("min_max", c.min_max, config.min_max));
  THRIFTATTN_RETURN_IF_ERROR(read_switch("variance", c.variance, config.variance));
  config.sink = c.sink;
  config.recent = c.recent;
  config.max_bytes = c.max_bytes;
  if (c.storage_by_head) {
    if (c.layers < 1 || c.h_kv < 1)
      return invalid_argument(
          fmt::format("storage_by_head is [layers {}, h_kv {}]: 1 or more of each", c.layers, c.h_kv));
    const int64_t count = int64_t{c.layers} * c.h_kv;
    for (int64_t i = 0; i < count; ++i) {
      Storage storage = Storage::residual;
      THRIFTATTN_RETURN_IF_ERROR(read_enum("storage_by_head", c.storage_by_head[i], Storage::offload, storage));
      config.storage_by_head.push_back(storage);
    }
  }
  return config;
}

ThriftattnCacheConfig write_config(const CacheConfig& c) {
  ThriftattnCacheConfig out = THRIFTATTN_CACHE_CONFIG_DEFAULTS;
  out.layers = c.layers;
  out.h_kv = c.h_kv;
  out.d = c.d;
  out.d_v = c.d_v;
  out.high_dtype = static_cast<int32_t>(c.high_dtype);
  out.storage = static_cast<int32_t>(c.storage);
  out.storage_by_head =
      c.storage_by_head.empty() ? nullptr : reinterpret_cast<const uint8_t*>(c.storage_by_head.data());
  out.format = static_cast<int32_t>(c.format);
  out.scales = static_cast<int32_t>(c.scales);
  out.centring = c.centring;
  out.page_scale = c.page_scale;
  out.mean = c.mean;
  out.min_max = c.min_max;
  out.variance = c.variance;
  out.sink = c.sink;
  out.recent = c.recent;
  out.max_bytes = c.max_bytes;
  return out;
}

Result<Problem> read_problem(const ThriftattnProblem* problem) {
  THRIFTATTN_ASSIGN_OR_RETURN(p,
                              read_struct<ThriftattnProblem>("problem", problem, offsetof(ThriftattnProblem, compute),
                                                             THRIFTATTN_PROBLEM_DEFAULTS));
  if (!p.method) return null_argument("problem->method");
  Problem out;
  THRIFTATTN_ASSIGN_OR_RETURN(config, read_config("problem->cache", p.cache));
  THRIFTATTN_ASSIGN_OR_RETURN(method, parse_method(p.method));
  THRIFTATTN_RETURN_IF_ERROR(read_enum("phase", p.phase, Phase::decode, out.phase));
  THRIFTATTN_RETURN_IF_ERROR(read_enum("compute", p.compute, DType::bf16, out.compute));
  THRIFTATTN_RETURN_IF_ERROR(read_switch("causal", p.causal, out.causal));
  THRIFTATTN_RETURN_IF_ERROR(read_switch("stats", p.stats, out.stats));
  out.b = p.b;
  out.max_s_q = p.max_s_q;
  out.max_s_kv = p.max_s_kv;
  out.h_q = p.h_q;
  out.h_kv = config.h_kv;
  out.d = config.d;
  out.d_v = config.d_v;
  out.window = p.window;
  out.sm_scale = p.sm_scale;
  out.softcap = p.softcap;
  out.method = method;
  out.cache = config;
  return out;
}

// The arguments that attend and select share; select looks at no output.
Result<AttendArgs> read_args(const ThriftattnPlan* plan, const ThriftattnWorkspace* workspace,
                             const ThriftattnPool* pool, const ThriftattnAttendArgs* args, bool select_only) {
  RETURN_IF_NULL(plan);
  RETURN_IF_NULL(workspace);
  RETURN_IF_NULL(pool);
  THRIFTATTN_ASSIGN_OR_RETURN(a, read_struct<ThriftattnAttendArgs>("args", args, sizeof(ThriftattnAttendArgs),
                                                                   THRIFTATTN_ATTEND_ARGS_DEFAULTS));
  if (!a.cache) return null_argument("args->cache");
  if (a.b < 0) return invalid_argument(fmt::format("args->b {} is not supported: 0 or more", a.b));
  if (a.b > 0 && !a.seqs) return null_argument("args->seqs");
  if (a.b > 0 && !a.s_q) return null_argument("args->s_q");
  if (a.n_kv_heads < 0)
    return invalid_argument(fmt::format("args->n_kv_heads {} is not supported: 0 (all) or more", a.n_kv_heads));
  if (a.n_kv_heads > 0 && !a.kv_heads) return null_argument("args->kv_heads");
  AttendArgs out;
  out.cache = &a.cache->value;
  out.layer = a.layer;
  out.seqs = {a.seqs, static_cast<size_t>(a.b)};
  out.s_q = {a.s_q, static_cast<size_t>(a.b)};
  out.kv_heads = {a.kv_heads, static_cast<size_t>(a.n_kv_heads)};
  THRIFTATTN_ASSIGN_OR_RETURN(q, read_view<View>("args->q", &a.q));
  out.q = q;
  out.sinks = a.sinks;
  if (select_only) return out;
  THRIFTATTN_ASSIGN_OR_RETURN(o, read_view<MutableView>("args->out", &a.out));
  out.out = o;
  out.lse = a.lse;
  out.given = a.given ? &a.given->value : nullptr;
  out.stats = a.stats ? &a.stats->value : nullptr;
  return out;
}

}  // namespace

// ---- Version and errors

int32_t thriftattn_c_api_version(void) { return THRIFTATTN_C_API_VERSION; }
const char* thriftattn_version(void) { return THRIFTATTN_VERSION; }
int32_t thriftattn_version_number(void) { return THRIFTATTN_VERSION_NUMBER; }
const char* thriftattn_last_error(void) { return last_error_text; }

const char* thriftattn_code_name(int32_t code) {
  return code >= 0 && code < static_cast<int32_t>(std::size(kCodeNames)) ? kCodeNames[code] : "unknown";
}

// ---- Threads

ThriftattnCode thriftattn_pool_create(int32_t threads, ThriftattnPool** pool) {
  return guarded([&]() -> Status {
    RETURN_IF_NULL(pool);
    if (threads < 0 || threads > kMaxThreads)
      return invalid_argument(
          fmt::format("{} threads are not supported: 0 (as many as processors) to {} are", threads, kMaxThreads));
    auto made = std::make_unique<ThriftattnPool>(threads);
    if (threads > 0 && made->value.size() != threads)
      return {Code::io, fmt::format("the system started {} of {} threads", made->value.size(), threads)};
    *pool = made.release();
    return {};
  });
}

void thriftattn_pool_destroy(ThriftattnPool* pool) { delete pool; }
int32_t thriftattn_pool_size(const ThriftattnPool* pool) { return pool ? pool->value.size() : -1; }

// ---- Cache

ThriftattnCode thriftattn_cache_config_for_method(const char* method, int32_t layers, int32_t h_kv, int32_t d,
                                                  int32_t d_v, ThriftattnCacheConfig* config) {
  return guarded([&]() -> Status {
    RETURN_IF_NULL(method);
    THRIFTATTN_ASSIGN_OR_RETURN(parsed, parse_method(method));
    return write_struct("config", config, sizeof(ThriftattnCacheConfig),
                        write_config(CacheConfig::for_method(parsed, layers, h_kv, d, d_v)));
  });
}

ThriftattnCode thriftattn_cache_create(const ThriftattnCacheConfig* config, ThriftattnCache** cache) {
  return guarded([&]() -> Status {
    RETURN_IF_NULL(cache);
    THRIFTATTN_ASSIGN_OR_RETURN(read, read_config("config", config));
    THRIFTATTN_ASSIGN_OR_RETURN(made, KvCache::create(read));
    *cache = new ThriftattnCache{std::move(made)};
    return {};
  });
}

void thriftattn_cache_destroy(ThriftattnCache* cache) { delete cache; }

ThriftattnCode thriftattn_cache_config(const ThriftattnCache* cache, ThriftattnCacheConfig* config) {
  return guarded([&]() -> Status {
    RETURN_IF_NULL(cache);
    return write_struct("config", config, sizeof(ThriftattnCacheConfig), write_config(cache->value.config()));
  });
}

ThriftattnCode thriftattn_cache_new_sequence(ThriftattnCache* cache, int32_t* seq) {
  return guarded([&]() -> Status {
    RETURN_IF_NULL(cache);
    RETURN_IF_NULL(seq);
    const SeqId made = cache->value.new_sequence();
    if (made < 0) throw std::bad_alloc();
    *seq = made;
    return {};
  });
}

ThriftattnCode thriftattn_cache_append(ThriftattnCache* cache, int32_t seq, int32_t layer, const ThriftattnView* k,
                                       const ThriftattnView* v, ThriftattnPool* pool) {
  return guarded([&]() -> Status {
    RETURN_IF_NULL(cache);
    RETURN_IF_NULL(pool);
    THRIFTATTN_ASSIGN_OR_RETURN(keys, read_view<View>("k", k));
    THRIFTATTN_ASSIGN_OR_RETURN(values, read_view<View>("v", v));
    return cache->value.append(seq, layer, keys, values, pool->value);
  });
}

ThriftattnCode thriftattn_cache_settle(ThriftattnCache* cache, int32_t seq, int32_t layer) {
  return guarded([&]() -> Status {
    RETURN_IF_NULL(cache);
    return cache->value.settle(seq, layer);
  });
}

ThriftattnCode thriftattn_cache_fork(ThriftattnCache* cache, int32_t seq, int32_t* fork) {
  return guarded([&]() -> Status {
    RETURN_IF_NULL(cache);
    RETURN_IF_NULL(fork);
    THRIFTATTN_ASSIGN_OR_RETURN(made, cache->value.fork(seq));
    *fork = made;
    return {};
  });
}

ThriftattnCode thriftattn_cache_truncate(ThriftattnCache* cache, int32_t seq, int64_t length, int32_t lossy) {
  return guarded([&]() -> Status {
    RETURN_IF_NULL(cache);
    bool allowed = false;
    THRIFTATTN_RETURN_IF_ERROR(read_switch("lossy", lossy, allowed));
    return cache->value.truncate(seq, length, allowed);
  });
}

ThriftattnCode thriftattn_cache_free_sequence(ThriftattnCache* cache, int32_t seq) {
  return guarded([&]() -> Status {
    RETURN_IF_NULL(cache);
    return cache->value.free(seq);
  });
}

int64_t thriftattn_cache_length(const ThriftattnCache* cache, int32_t seq) {
  return cache ? cache->value.length(seq) : -1;
}

int64_t thriftattn_cache_layer_length(const ThriftattnCache* cache, int32_t seq, int32_t layer) {
  return cache ? cache->value.length(seq, layer) : -1;
}

ThriftattnCode thriftattn_cache_read(const ThriftattnCache* cache, int32_t seq, int32_t layer, int64_t first,
                                     const ThriftattnMutableView* k, const ThriftattnMutableView* v) {
  return guarded([&]() -> Status {
    RETURN_IF_NULL(cache);
    THRIFTATTN_ASSIGN_OR_RETURN(keys, read_view<MutableView>("k", k));
    THRIFTATTN_ASSIGN_OR_RETURN(values, read_view<MutableView>("v", v));
    return cache->value.read(seq, layer, first, keys, values);
  });
}

ThriftattnCode thriftattn_cache_memory(const ThriftattnCache* cache, ThriftattnMemory* memory) {
  return guarded([&]() -> Status {
    RETURN_IF_NULL(cache);
    const MemoryUse use = cache->value.bytes();
    ThriftattnMemory out = THRIFTATTN_MEMORY_DEFAULTS;
    out.codes = use.codes;
    out.residual = use.residual;
    out.high = use.high;
    out.summaries = use.summaries;
    out.tables = use.tables;
    out.total = use.total();
    out.peak = cache->value.peak_bytes();
    out.reserved = cache->value.reserved_bytes();
    return write_struct("memory", memory, sizeof(ThriftattnMemory), out);
  });
}

ThriftattnCode thriftattn_cache_save(const ThriftattnCache* cache, int32_t seq, const char* path, const void* metadata,
                                     int64_t metadata_bytes) {
  return guarded([&]() -> Status {
    RETURN_IF_NULL(cache);
    RETURN_IF_NULL(path);
    if (metadata_bytes < 0)
      return invalid_argument(fmt::format("metadata_bytes {} is not supported: 0 or more", metadata_bytes));
    if (metadata_bytes > 0) RETURN_IF_NULL(metadata);
    return cache->value.save(seq, path, {static_cast<const char*>(metadata), static_cast<size_t>(metadata_bytes)});
  });
}

ThriftattnCode thriftattn_cache_load(ThriftattnCache* cache, const char* path, int32_t* seq) {
  return guarded([&]() -> Status {
    RETURN_IF_NULL(cache);
    RETURN_IF_NULL(path);
    RETURN_IF_NULL(seq);
    THRIFTATTN_ASSIGN_OR_RETURN(made, cache->value.load(path));
    *seq = made;
    return {};
  });
}

ThriftattnCode thriftattn_saved_create(const char* path, ThriftattnSaved** saved) {
  return guarded([&]() -> Status {
    RETURN_IF_NULL(path);
    RETURN_IF_NULL(saved);
    THRIFTATTN_ASSIGN_OR_RETURN(made, inspect_saved(path));
    *saved = new ThriftattnSaved{std::move(made)};
    return {};
  });
}

void thriftattn_saved_destroy(ThriftattnSaved* saved) { delete saved; }

ThriftattnCode thriftattn_saved_read(const ThriftattnSaved* saved, ThriftattnSavedValues* values) {
  return guarded([&]() -> Status {
    RETURN_IF_NULL(saved);
    const SavedSequence& s = saved->value;
    ThriftattnSavedValues out = THRIFTATTN_SAVED_VALUES_DEFAULTS;
    out.version = s.version;
    out.tokens = s.tokens;
    out.file_bytes = s.file_bytes;
    out.memory_bytes = s.bytes.total();
    out.metadata = s.metadata.empty() ? nullptr : s.metadata.data();
    out.metadata_bytes = static_cast<int64_t>(s.metadata.size());
    return write_struct("values", values, sizeof(ThriftattnSavedValues), out);
  });
}

ThriftattnCode thriftattn_saved_config(const ThriftattnSaved* saved, ThriftattnCacheConfig* config) {
  return guarded([&]() -> Status {
    RETURN_IF_NULL(saved);
    return write_struct("config", config, sizeof(ThriftattnCacheConfig), write_config(saved->value.config));
  });
}

// ---- Plan

ThriftattnCode thriftattn_plan_create(const ThriftattnProblem* problem, int32_t threads, ThriftattnPlan** plan) {
  return guarded([&]() -> Status {
    RETURN_IF_NULL(plan);
    THRIFTATTN_ASSIGN_OR_RETURN(read, read_problem(problem));
    THRIFTATTN_ASSIGN_OR_RETURN(made, thriftattn::plan(read, Machine::here(threads)));
    std::string text = to_string(made);
    *plan = new ThriftattnPlan{std::move(made), std::move(text)};
    return {};
  });
}

void thriftattn_plan_destroy(ThriftattnPlan* plan) { delete plan; }
const char* thriftattn_plan_text(const ThriftattnPlan* plan) { return plan ? plan->text.c_str() : nullptr; }
int64_t thriftattn_plan_workspace_bytes(const ThriftattnPlan* plan) { return plan ? plan->value.workspace_bytes : -1; }

ThriftattnCode thriftattn_workspace_create(const ThriftattnPlan* plan, ThriftattnWorkspace** workspace) {
  return guarded([&]() -> Status {
    RETURN_IF_NULL(plan);
    RETURN_IF_NULL(workspace);
    THRIFTATTN_ASSIGN_OR_RETURN(made, Workspace::create(plan->value));
    *workspace = new ThriftattnWorkspace{std::move(made)};
    return {};
  });
}

void thriftattn_workspace_destroy(ThriftattnWorkspace* workspace) { delete workspace; }

// ---- Selection

ThriftattnCode thriftattn_selection_create(int64_t blocks, const int64_t* first, const ThriftattnPromoted* pages,
                                           ThriftattnSelection** selection) {
  return guarded([&]() -> Status {
    RETURN_IF_NULL(first);
    RETURN_IF_NULL(selection);
    if (blocks < 0) return invalid_argument(fmt::format("{} query blocks are not supported: 0 or more", blocks));
    if (first[0] != 0) return invalid_argument(fmt::format("first[0] is {}, expected 0", first[0]));
    for (int64_t i = 0; i < blocks; ++i)
      if (first[i + 1] < first[i])
        return invalid_argument(
            fmt::format("first[{}] {} is below first[{}] {}: offsets ascend", i + 1, first[i + 1], i, first[i]));
    const int64_t count = first[blocks];
    if (count > 0 && !pages) return null_argument("pages");
    auto made = std::make_unique<ThriftattnSelection>();
    made->value.first.assign(first, first + blocks + 1);
    made->value.pages.resize(static_cast<size_t>(count));
    for (int64_t i = 0; i < count; ++i) {
      Promoted& to = made->value.pages[static_cast<size_t>(i)];
      to.page = pages[i].page;
      THRIFTATTN_RETURN_IF_ERROR(
          read_enum(fmt::format("pages[{}].tier", i).c_str(), pages[i].tier, Tier::fp16, to.tier));
    }
    *selection = made.release();
    return {};
  });
}

void thriftattn_selection_destroy(ThriftattnSelection* selection) { delete selection; }

ThriftattnCode thriftattn_selection_read(const ThriftattnSelection* selection, int64_t* blocks, const int64_t** first,
                                         const ThriftattnPromoted** pages) {
  return guarded([&]() -> Status {
    RETURN_IF_NULL(selection);
    RETURN_IF_NULL(blocks);
    RETURN_IF_NULL(first);
    RETURN_IF_NULL(pages);
    *blocks = static_cast<int64_t>(selection->value.first.size()) - 1;
    *first = selection->value.first.data();
    *pages = reinterpret_cast<const ThriftattnPromoted*>(selection->value.pages.data());
    return {};
  });
}

// ---- Attention

ThriftattnCode thriftattn_stats_create(ThriftattnStats** stats) {
  return guarded([&]() -> Status {
    RETURN_IF_NULL(stats);
    *stats = new ThriftattnStats;
    return {};
  });
}

void thriftattn_stats_destroy(ThriftattnStats* stats) { delete stats; }

ThriftattnCode thriftattn_stats_reset(ThriftattnStats* stats) {
  return guarded([&]() -> Status {
    RETURN_IF_NULL(stats);
    stats->value = {};
    return {};
  });
}

ThriftattnCode thriftattn_stats_read(const ThriftattnStats* stats, ThriftattnStatsValues* values) {
  return guarded([&]() -> Status {
    RETURN_IF_NULL(stats);
    const Stats& s = stats->value;
    ThriftattnStatsValues out = THRIFTATTN_STATS_VALUES_DEFAULTS;
    out.pairs = s.pairs;
    out.promoted = s.promoted;
    out.wanted_not_stored = s.wanted_not_stored;
    out.mass_above_fp4 = s.mass_above_fp4;
    out.error_estimate = s.error_estimate;
    out.page_mass = s.page_mass.empty() ? nullptr : s.page_mass.data();
    out.page_mass_count = static_cast<int64_t>(s.page_mass.size());
    return write_struct("values", values, sizeof(ThriftattnStatsValues), out);
  });
}

ThriftattnCode thriftattn_stats_selection(const ThriftattnStats* stats, ThriftattnSelection** selection) {
  return guarded([&]() -> Status {
    RETURN_IF_NULL(stats);
    RETURN_IF_NULL(selection);
    if (stats->value.selection.first.empty())
      return invalid_argument("no call of a plan with stats=1 has filled these stats");
    *selection = new ThriftattnSelection{stats->value.selection};
    return {};
  });
}

ThriftattnCode thriftattn_attend(const ThriftattnPlan* plan, ThriftattnWorkspace* workspace, ThriftattnPool* pool,
                                 const ThriftattnAttendArgs* args) {
  return guarded([&]() -> Status {
    THRIFTATTN_ASSIGN_OR_RETURN(read, read_args(plan, workspace, pool, args, false));
    return run(plan->value, workspace->value, pool->value, read);
  });
}

ThriftattnCode thriftattn_select(const ThriftattnPlan* plan, ThriftattnWorkspace* workspace, ThriftattnPool* pool,
                                 const ThriftattnAttendArgs* args, ThriftattnSelection** selection) {
  return guarded([&]() -> Status {
    RETURN_IF_NULL(selection);
    THRIFTATTN_ASSIGN_OR_RETURN(read, read_args(plan, workspace, pool, args, true));
    THRIFTATTN_ASSIGN_OR_RETURN(made, select(plan->value, workspace->value, pool->value, read));
    *selection = new ThriftattnSelection{std::move(made)};
    return {};
  });
}
