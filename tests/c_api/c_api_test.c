/* An engine's view of the library, in C11: every function of c_api.h, its results against attention written out. */
#include "thriftattn/c_api.h"

#include <math.h>
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int failures = 0;

#define CHECK(condition)                                                                                        \
  do {                                                                                                          \
    if (!(condition)) {                                                                                         \
      ++failures;                                                                                               \
      fprintf(stderr, "%s:%d: %s (last error: %s)\n", __FILE__, __LINE__, #condition, thriftattn_last_error()); \
    }                                                                                                           \
  } while (0)
#define CHECK_OK(call) CHECK((call) == THRIFTATTN_OK)
/* The call fails with `code`, and its message holds `words`. */
#define CHECK_FAILS(call, code, words)                       \
  do {                                                       \
    CHECK((call) == (code));                                 \
    CHECK(strstr(thriftattn_last_error(), (words)) != NULL); \
    CHECK(strchr(thriftattn_last_error(), '\n') == NULL);    \
  } while (0)

enum { H_Q = 4, H_KV = 2, D = 64, D_V = 32, GROUP = H_Q / H_KV, LONGEST = 700 };

/* Numbers of 1/64 in [-2, 2): exact in 16 bit, so that what the cache keeps is what was given. */
static uint32_t random_state = 1;
static float random_number(void) {
  random_state = random_state * 1664525u + 1013904223u;
  return (float)((int32_t)(random_state >> 24) - 128) / 64.0f;
}
static float* random_tensor(int64_t count) {
  float* x = malloc((size_t)count * sizeof(float));
  if (!x) exit(2);
  for (int64_t i = 0; i < count; ++i) x[i] = random_number();
  return x;
}
static float* zeros(int64_t count) {
  float* x = calloc((size_t)count, sizeof(float));
  if (!x) exit(2);
  return x;
}

/* One sequence of the tests: q [LONGEST, H_Q, D], k [LONGEST, H_KV, D], v [LONGEST, H_KV, D_V]. */
typedef struct Tokens {
  float *q, *k, *v;
} Tokens;

static Tokens random_tokens(void) {
  Tokens t = {random_tensor((int64_t)LONGEST * H_Q * D), random_tensor((int64_t)LONGEST * H_KV * D),
              random_tensor((int64_t)LONGEST * H_KV * D_V)};
  return t;
}
static void free_tokens(Tokens t) {
  free(t.q);
  free(t.k);
  free(t.v);
}

typedef struct Mask {
  int causal;
  int64_t window;
  double softcap;
  const float* sinks; /* [H_Q] or null */
} Mask;

/* Attention as it is defined, row by row in double precision: the row at `position` of head h over s_kv tokens. */
static double reference_row(const Tokens* t, int64_t s_kv, int64_t position, int h, Mask mask, double* out) {
  static double p[LONGEST];
  double largest = mask.sinks ? mask.sinks[h] : -HUGE_VAL, sum = 0;
  for (int64_t j = 0; j < s_kv; ++j) {
    const float *q = t->q + (position * H_Q + h) * D, *k = t->k + (j * H_KV + h / GROUP) * D;
    double s = 0;
    for (int c = 0; c < D; ++c) s += (double)q[c] * k[c];
    s /= sqrt(D);
    if (mask.softcap > 0) s = mask.softcap * tanh(s / mask.softcap);
    const int64_t away = position > j ? position - j : j - position;
    const int visible = (!mask.causal || j <= position) && (mask.window == 0 || away < mask.window);
    p[j] = visible ? s : -HUGE_VAL;
    if (p[j] > largest) largest = p[j];
  }
  if (mask.sinks) sum = exp(mask.sinks[h] - largest);
  for (int c = 0; c < D_V; ++c) out[c] = 0;
  for (int64_t j = 0; j < s_kv; ++j) {
    const double mass = exp(p[j] - largest);
    sum += mass;
    for (int c = 0; c < D_V; ++c) out[c] += mass * t->v[(j * H_KV + h / GROUP) * D_V + c];
  }
  for (int c = 0; c < D_V; ++c) out[c] /= sum;
  return largest + log(sum);
}

/* The larger one, or NaN where there is one. */
static double worse(double a, double b) { return b > a || b != b ? b : a; }

/* How far out [s_q, H_Q, D_V] and lse [s_q, H_Q] of the last s_q rows of a sequence are from the definition, at most.
 */
static double distance(const Tokens* t, int64_t s_kv, int64_t s_q, Mask mask, const float* out, const float* lse) {
  double worst = 0, row[D_V];
  for (int64_t r = 0; r < s_q; ++r)
    for (int h = 0; h < H_Q; ++h) {
      const double want = reference_row(t, s_kv, s_kv - s_q + r, h, mask, row);
      worst = worse(worst, fabs(lse[r * H_Q + h] - want));
      for (int c = 0; c < D_V; ++c) worst = worse(worst, fabs(out[(r * H_Q + h) * D_V + c] - row[c]));
    }
  return worst;
}
static const double kFp32Error = 2e-5;    /* of sums of some hundred terms, in another order */
static const double kIntegerError = 1e-4; /* of a decode step that reads FP4, of the largest value: agreement.h */

static ThriftattnCache* make_cache(const char* method, int layers, ThriftattnCacheConfig* config) {
  ThriftattnCache* cache = NULL;
  CHECK_OK(thriftattn_cache_config_for_method(method, layers, H_KV, D, D_V, config));
  CHECK_OK(thriftattn_cache_create(config, &cache));
  return cache;
}

static ThriftattnProblem problem_of(const ThriftattnCacheConfig* config, const char* method, int32_t phase,
                                    int64_t max_s_q) {
  ThriftattnProblem problem = THRIFTATTN_PROBLEM_DEFAULTS;
  problem.phase = phase;
  problem.b = 2;
  problem.max_s_q = max_s_q;
  problem.max_s_kv = LONGEST;
  problem.h_q = H_Q;
  problem.method = method;
  problem.cache = config;
  return problem;
}

static void append(ThriftattnCache* cache, int32_t seq, int32_t layer, const Tokens* t, int64_t first, int64_t n,
                   ThriftattnPool* pool) {
  const ThriftattnView k = thriftattn_view(t->k + first * H_KV * D, n, H_KV, D);
  const ThriftattnView v = thriftattn_view(t->v + first * H_KV * D_V, n, H_KV, D_V);
  CHECK_OK(thriftattn_cache_append(cache, seq, layer, &k, &v, pool));
}

/* Arguments for the last s_q rows of one sequence that holds s_kv tokens; seq and s_q stay the caller's. */
static ThriftattnAttendArgs args_of(const ThriftattnCache* cache, const int32_t* seq, const int64_t* s_q,
                                    const Tokens* t, int64_t s_kv, float* out, float* lse) {
  ThriftattnAttendArgs args = THRIFTATTN_ATTEND_ARGS_DEFAULTS;
  args.cache = cache;
  args.b = 1;
  args.seqs = seq;
  args.s_q = s_q;
  args.q = thriftattn_view(t->q + (s_kv - *s_q) * H_Q * D, *s_q, H_Q, D);
  args.out = thriftattn_mutable_view(out, *s_q, H_Q, D_V);
  args.lse = lse;
  return args;
}

static void versions_agree(void) {
  int major = 0, minor = 0, patch = 0;
  CHECK(thriftattn_c_api_version() == THRIFTATTN_C_API_VERSION);
  CHECK(sscanf(thriftattn_version(), "%d.%d.%d", &major, &minor, &patch) == 3);
  CHECK(thriftattn_version_number() == 10000 * major + 100 * minor + patch);
  CHECK(strcmp(thriftattn_code_name(THRIFTATTN_OK), "ok") == 0);
  CHECK(strcmp(thriftattn_code_name(THRIFTATTN_INTERNAL), "internal") == 0);
  CHECK(strcmp(thriftattn_code_name(THRIFTATTN_INTERNAL + 1), "unknown") == 0);
  CHECK(strcmp(thriftattn_code_name(-1), "unknown") == 0);
}

/* Prefill, then steps of one and of three rows, in 16 bit, under every mask. */
static void attention_is_what_it_is_defined_to_be(ThriftattnPool* pool) {
  static const float sinks[H_Q] = {0.5f, -1.0f, 2.0f, 0.0f};
  const Mask masks[] = {{1, 0, 0, NULL},   {0, 0, 0, NULL},  {1, 100, 0, NULL},
                        {1, 0, 5.0, NULL}, {1, 0, 0, sinks}, {1, 70, 3.0, sinks}};
  for (size_t m = 0; m < sizeof masks / sizeof *masks; ++m) {
    const Tokens t = random_tokens();
    ThriftattnCacheConfig config = THRIFTATTN_CACHE_CONFIG_DEFAULTS;
    ThriftattnCache* cache = make_cache("fp16", 1, &config);
    int32_t seq = -1;
    CHECK_OK(thriftattn_cache_new_sequence(cache, &seq));
    int64_t s_kv = 0;
    const int64_t steps[] = {200, 1, 3, 1};
    for (int i = 0; i < 4; ++i) {
      const int64_t s_q = steps[i];
      ThriftattnProblem problem = problem_of(&config, "fp16", i == 0 ? THRIFTATTN_PREFILL : THRIFTATTN_DECODE, s_q);
      problem.causal = masks[m].causal;
      problem.window = masks[m].window;
      problem.softcap = (float)masks[m].softcap;
      ThriftattnPlan* plan = NULL;
      ThriftattnWorkspace* workspace = NULL;
      CHECK_OK(thriftattn_plan_create(&problem, thriftattn_pool_size(pool), &plan));
      CHECK_OK(thriftattn_workspace_create(plan, &workspace));
      append(cache, seq, 0, &t, s_kv, s_q, pool);
      s_kv += s_q;
      float *out = zeros(s_q * H_Q * D_V), *lse = zeros(s_q * H_Q);
      ThriftattnAttendArgs args = args_of(cache, &seq, &s_q, &t, s_kv, out, lse);
      args.sinks = masks[m].sinks;
      CHECK_OK(thriftattn_attend(plan, workspace, pool, &args));
      const double error = distance(&t, s_kv, s_q, masks[m], out, lse);
      if (!(error <= kFp32Error)) fprintf(stderr, "mask %d, step %d: off by %g\n", (int)m, i, error);
      CHECK(error <= kFp32Error);
      CHECK_OK(thriftattn_cache_settle(cache, seq, 0));
      free(out);
      free(lse);
      thriftattn_workspace_destroy(workspace);
      thriftattn_plan_destroy(plan);
    }
    thriftattn_cache_destroy(cache);
    free_tokens(t);
  }
}

/* Two sequences of different lengths in one call; q and out [.., heads, ..] with room between heads and tokens. */
static void batches_and_strides(ThriftattnPool* pool) {
  enum { ROOM_Q = D + 16, ROOM_OUT = D_V + 8 };
  const Tokens t[2] = {random_tokens(), random_tokens()};
  const int64_t s_kv[2] = {130, 67}, s_q[2] = {2, 5};
  ThriftattnCacheConfig config = THRIFTATTN_CACHE_CONFIG_DEFAULTS;
  ThriftattnCache* cache = make_cache("fp16", 2, &config);
  int32_t seqs[2];
  for (int i = 0; i < 2; ++i) {
    CHECK_OK(thriftattn_cache_new_sequence(cache, &seqs[i]));
    append(cache, seqs[i], 1, &t[i], 0, s_kv[i], pool);
    CHECK(thriftattn_cache_length(cache, seqs[i]) == 0); /* layer 0 has none */
    CHECK(thriftattn_cache_layer_length(cache, seqs[i], 1) == s_kv[i]);
  }
  float *q = random_tensor(7 * H_Q * ROOM_Q + 7), *out = random_tensor(7 * H_Q * ROOM_OUT), *lse = zeros(7 * H_Q);
  float* before = zeros(7 * H_Q * ROOM_OUT);
  memcpy(before, out, 7 * H_Q * ROOM_OUT * sizeof(float));
  for (int64_t i = 0, row = 0; i < 2; ++i)
    for (int64_t r = 0; r < s_q[i]; ++r, ++row)
      for (int h = 0; h < H_Q; ++h)
        memcpy(q + row * (H_Q * ROOM_Q + 1) + h * ROOM_Q, t[i].q + ((s_kv[i] - s_q[i] + r) * H_Q + h) * D,
               D * sizeof(float));
  const ThriftattnProblem problem = problem_of(&config, "fp16", THRIFTATTN_DECODE, 16);
  ThriftattnPlan* plan = NULL;
  ThriftattnWorkspace* workspace = NULL;
  CHECK_OK(thriftattn_plan_create(&problem, thriftattn_pool_size(pool), &plan));
  CHECK_OK(thriftattn_workspace_create(plan, &workspace));
  ThriftattnAttendArgs args = THRIFTATTN_ATTEND_ARGS_DEFAULTS;
  args.cache = cache;
  args.layer = 1;
  args.b = 2;
  args.seqs = seqs;
  args.s_q = s_q;
  args.q = thriftattn_view(q, 7, H_Q, D);
  args.q.token_stride = H_Q * ROOM_Q + 1;
  args.q.head_stride = ROOM_Q;
  args.out = thriftattn_mutable_view(out, 7, H_Q, D_V);
  args.out.token_stride = H_Q * ROOM_OUT;
  args.out.head_stride = ROOM_OUT;
  args.lse = lse;

  /* Of KV head 1 alone: the other's rows are left alone. */
  const int32_t second[] = {1};
  args.kv_heads = second;
  args.n_kv_heads = 1;
  CHECK_OK(thriftattn_attend(plan, workspace, pool, &args));
  for (int row = 0; row < 7; ++row)
    for (int h = 0; h < GROUP; ++h) {
      CHECK(memcmp(out + (row * H_Q + h) * ROOM_OUT, before + (row * H_Q + h) * ROOM_OUT, D_V * sizeof(float)) == 0);
      CHECK(lse[row * H_Q + h] == 0);
    }

  args.kv_heads = NULL;
  args.n_kv_heads = 0;
  CHECK_OK(thriftattn_attend(plan, workspace, pool, &args));
  float packed[7 * H_Q * D_V];
  for (int row = 0; row < 7 * H_Q; ++row) {
    memcpy(packed + row * D_V, out + row * ROOM_OUT, D_V * sizeof(float));
    CHECK(memcmp(out + row * ROOM_OUT + D_V, before + row * ROOM_OUT + D_V, 8 * sizeof(float)) == 0);
  }
  const Mask causal = {1, 0, 0, NULL};
  CHECK(distance(&t[0], s_kv[0], s_q[0], causal, packed, lse) <= kFp32Error);
  CHECK(distance(&t[1], s_kv[1], s_q[1], causal, packed + 2 * H_Q * D_V, lse + 2 * H_Q) <= kFp32Error);

  thriftattn_workspace_destroy(workspace);
  thriftattn_plan_destroy(plan);
  thriftattn_cache_destroy(cache);
  free(q);
  free(out);
  free(before);
  free(lse);
  free_tokens(t[0]);
  free_tokens(t[1]);
}

/* What `thrift` promotes can be read, written and given back, and then the same bits come out. */
static void selections_can_be_read_and_given_back(ThriftattnPool* pool) {
  const Tokens t = random_tokens();
  const int64_t s_kv = 650;
  ThriftattnCacheConfig config = THRIFTATTN_CACHE_CONFIG_DEFAULTS;
  ThriftattnCache* cache = make_cache("thrift:budget=0.5", 1, &config);
  int32_t seq = -1;
  CHECK_OK(thriftattn_cache_new_sequence(cache, &seq));
  append(cache, seq, 0, &t, 0, s_kv, pool);
  for (int decode = 0; decode < 2; ++decode) {
    const int64_t s_q = decode ? 3 : 200, blocks = decode ? H_KV : H_Q * 4; /* rows 450 .. 649 cut at 64 */
    ThriftattnProblem problem =
        problem_of(&config, "thrift:budget=0.5", decode ? THRIFTATTN_DECODE : THRIFTATTN_PREFILL, s_q);
    problem.stats = 1;
    ThriftattnPlan* plan = NULL;
    ThriftattnWorkspace* workspace = NULL;
    ThriftattnStats* stats = NULL;
    CHECK_OK(thriftattn_plan_create(&problem, thriftattn_pool_size(pool), &plan));
    CHECK_OK(thriftattn_workspace_create(plan, &workspace));
    CHECK_OK(thriftattn_stats_create(&stats));
    CHECK(strstr(thriftattn_plan_text(plan), decode ? "policy=fp4_mass" : "policy=block_mean") != NULL);
    CHECK(thriftattn_plan_workspace_bytes(plan) > 0);

    ThriftattnSelection *nothing = NULL, *chosen = NULL, *promoted = NULL, *copy = NULL;
    CHECK_FAILS(thriftattn_stats_selection(stats, &nothing), THRIFTATTN_INVALID_ARGUMENT, "stats");
    float *out = zeros(s_q * H_Q * D_V), *lse = zeros(s_q * H_Q), *again = zeros(s_q * H_Q * D_V);
    ThriftattnAttendArgs args = args_of(cache, &seq, &s_q, &t, s_kv, out, lse);
    args.stats = stats;
    CHECK_OK(thriftattn_attend(plan, workspace, pool, &args));
    CHECK_OK(thriftattn_stats_selection(stats, &promoted));
    CHECK_OK(thriftattn_select(plan, workspace, pool, &args, &chosen));

    int64_t n = 0, n_promoted = 0;
    const int64_t *first = NULL, *first_promoted = NULL;
    const ThriftattnPromoted *pages = NULL, *pages_promoted = NULL;
    CHECK_OK(thriftattn_selection_read(chosen, &n, &first, &pages));
    CHECK_OK(thriftattn_selection_read(promoted, &n_promoted, &first_promoted, &pages_promoted));
    CHECK(n == blocks && n_promoted == blocks);
    CHECK(memcmp(first, first_promoted, (size_t)(n + 1) * sizeof *first) == 0);
    for (int64_t i = 0; i < first[n]; ++i) {
      CHECK(pages[i].page == pages_promoted[i].page && pages[i].tier == pages_promoted[i].tier);
      CHECK(pages[i].tier == THRIFTATTN_TIER_FP4X2 || pages[i].tier == THRIFTATTN_TIER_FP16);
    }

    ThriftattnStatsValues values = THRIFTATTN_STATS_VALUES_DEFAULTS;
    CHECK_OK(thriftattn_stats_read(stats, &values));
    CHECK(values.promoted == first[n] * (decode ? GROUP : 1) && values.promoted > 0 && values.pairs > values.promoted);
    CHECK(values.wanted_not_stored == 0);
    CHECK(values.mass_above_fp4 > 0 && values.mass_above_fp4 < 1 && values.error_estimate > 0);
    CHECK(values.page_mass_count == H_KV * 11); /* 700 tokens are 11 pages */
    for (int h = 0; h < H_KV; ++h) {
      double sum = 0;
      for (int page = 0; page < 11; ++page) sum += values.page_mass[h * 11 + page];
      CHECK(fabs(sum - 1) < 1e-4);
    }

    CHECK_OK(thriftattn_selection_create(n, first, pages, &copy));
    args.given = copy;
    args.out = thriftattn_mutable_view(again, s_q, H_Q, D_V);
    CHECK_OK(thriftattn_attend(plan, workspace, pool, &args));
    if (decode) { /* this step read its pages in FP4 before it chose, the given one read them once: p in 15 bits each
                     time */
      for (int64_t i = 0; i < s_q * H_Q * D_V; ++i) CHECK(fabs(out[i] - again[i]) <= kIntegerError);
    } else {
      CHECK(memcmp(out, again, (size_t)(s_q * H_Q * D_V) * sizeof(float)) == 0);
    }
    ThriftattnStatsValues twice = THRIFTATTN_STATS_VALUES_DEFAULTS;
    CHECK_OK(thriftattn_stats_read(stats, &twice));
    CHECK(twice.pairs == 2 * values.pairs);
    CHECK_OK(thriftattn_stats_reset(stats));
    CHECK_OK(thriftattn_stats_read(stats, &twice));
    CHECK(twice.pairs == 0 && twice.page_mass == NULL && twice.page_mass_count == 0);

    /* Nothing promoted is another result; pages that are not there are refused. */
    int64_t* none = calloc((size_t)n + 1, sizeof *none);
    ThriftattnSelection *empty = NULL, *wrong = NULL;
    CHECK_OK(thriftattn_selection_create(n, none, NULL, &empty));
    args.given = empty;
    CHECK_OK(thriftattn_attend(plan, workspace, pool, &args));
    CHECK(memcmp(out, again, (size_t)(s_q * H_Q * D_V) * sizeof(float)) != 0);
    const int64_t one_page[] = {0, 1};
    const ThriftattnPromoted far_page = {99, THRIFTATTN_TIER_FP16};
    CHECK_OK(thriftattn_selection_create(1, one_page, &far_page, &wrong));
    args.given = wrong;
    CHECK_FAILS(thriftattn_attend(plan, workspace, pool, &args), THRIFTATTN_INVALID_ARGUMENT, "given selection");

    thriftattn_selection_destroy(wrong);
    thriftattn_selection_destroy(empty);
    thriftattn_selection_destroy(copy);
    thriftattn_selection_destroy(promoted);
    thriftattn_selection_destroy(chosen);
    thriftattn_stats_destroy(stats);
    thriftattn_workspace_destroy(workspace);
    thriftattn_plan_destroy(plan);
    free(none);
    free(out);
    free(again);
    free(lse);
  }
  thriftattn_cache_destroy(cache);
  free_tokens(t);
}

/* Fork, truncate, read, free, and the bytes behind them. */
static void sequences_fork_shrink_and_end(ThriftattnPool* pool) {
  const Tokens t = random_tokens();
  ThriftattnCacheConfig config = THRIFTATTN_CACHE_CONFIG_DEFAULTS, got = THRIFTATTN_CACHE_CONFIG_DEFAULTS;
  ThriftattnCache* cache = make_cache("thrift", 1, &config);
  CHECK_OK(thriftattn_cache_config(cache, &got));
  CHECK(got.struct_size == sizeof got && got.storage == THRIFTATTN_STORAGE_RESIDUAL && got.storage_by_head == NULL);
  CHECK(got.layers == 1 && got.h_kv == H_KV && got.d == D && got.d_v == D_V && got.recent == 2);

  int32_t seq = -1, fork = -1;
  CHECK_OK(thriftattn_cache_new_sequence(cache, &seq));
  append(cache, seq, 0, &t, 0, 300, pool);
  CHECK_OK(thriftattn_cache_settle(cache, seq, 0));
  ThriftattnMemory one = THRIFTATTN_MEMORY_DEFAULTS, two = one, none = one;
  CHECK_OK(thriftattn_cache_memory(cache, &one));
  CHECK(one.total == one.codes + one.residual + one.high + one.summaries + one.tables);
  CHECK(one.codes > 0 && one.residual == one.codes && one.peak >= one.total && one.reserved >= one.total - one.tables);
  CHECK_OK(thriftattn_cache_fork(cache, seq, &fork));
  CHECK(fork != seq && thriftattn_cache_length(cache, fork) == 300);
  CHECK_OK(thriftattn_cache_memory(cache, &two));
  CHECK(two.codes == one.codes && two.high > one.high); /* full pages are shared, the tail is copied */

  /* The tail and the last two full pages are there in 16 bit; page 1 is not. */
  float *k = zeros(300 * H_KV * D), *v = zeros(300 * H_KV * D_V);
  const ThriftattnMutableView all_k = thriftattn_mutable_view(k, 300, H_KV, D);
  const ThriftattnMutableView all_v = thriftattn_mutable_view(v, 300, H_KV, D_V);
  CHECK_OK(thriftattn_cache_read(cache, fork, 0, 0, &all_k, &all_v));
  CHECK(memcmp(k + 128 * H_KV * D, t.k + 128 * H_KV * D, 172 * H_KV * D * sizeof(float)) == 0);
  CHECK(memcmp(v, t.v, 64 * H_KV * D_V * sizeof(float)) == 0);
  int differ = 0;
  for (int i = 64 * H_KV * D; i < 128 * H_KV * D; ++i) {
    differ += k[i] != t.k[i];
    CHECK(fabsf(k[i] - t.k[i]) < 0.15f);
  }
  CHECK(differ > 0);
  CHECK_FAILS(thriftattn_cache_read(cache, fork, 0, 1, &all_k, &all_v), THRIFTATTN_INVALID_ARGUMENT,
              "300 tokens from 1 on");

  CHECK_FAILS(thriftattn_cache_truncate(cache, seq, 100, 0), THRIFTATTN_UNSUPPORTED, "exactly");
  CHECK_FAILS(thriftattn_cache_truncate(cache, seq, 100, 2), THRIFTATTN_INVALID_ARGUMENT, "lossy 2");
  CHECK_OK(thriftattn_cache_truncate(cache, seq, 100, 1));
  CHECK(thriftattn_cache_length(cache, seq) == 100 && thriftattn_cache_length(cache, fork) == 300);
  CHECK_OK(thriftattn_cache_free_sequence(cache, seq));
  CHECK_OK(thriftattn_cache_free_sequence(cache, fork));
  CHECK_FAILS(thriftattn_cache_free_sequence(cache, fork), THRIFTATTN_NOT_FOUND, "sequence 1");
  CHECK(thriftattn_cache_length(cache, seq) == -1 && thriftattn_cache_layer_length(cache, 0, 7) == -1);
  CHECK_OK(thriftattn_cache_memory(cache, &none));
  CHECK(none.total == 0 && none.peak >= two.total);
  free(k);
  free(v);
  thriftattn_cache_destroy(cache);

  /* A storage of its own for each head, and a limit. */
  const uint8_t storages[H_KV] = {THRIFTATTN_STORAGE_DUAL, THRIFTATTN_STORAGE_FP4_ONLY};
  config.storage_by_head = storages;
  config.max_bytes = 100000;
  CHECK_OK(thriftattn_cache_create(&config, &cache));
  CHECK_OK(thriftattn_cache_config(cache, &got));
  CHECK(got.storage_by_head != storages && memcmp(got.storage_by_head, storages, H_KV) == 0);
  CHECK(got.max_bytes == 100000);
  CHECK_OK(thriftattn_cache_new_sequence(cache, &seq));
  const ThriftattnView many_k = thriftattn_view(t.k, 600, H_KV, D), many_v = thriftattn_view(t.v, 600, H_KV, D_V);
  CHECK_FAILS(thriftattn_cache_append(cache, seq, 0, &many_k, &many_v, pool), THRIFTATTN_OUT_OF_MEMORY, "100000");
  CHECK(thriftattn_cache_length(cache, seq) == 0);
  thriftattn_cache_destroy(cache);
  free_tokens(t);
}

/* A sequence goes to a file and comes back into another cache; the file says what it holds. */
static void sequences_are_saved_and_loaded(ThriftattnPool* pool) {
  const char *path = "c_api_test.saved", *metadata = "what was\0read";
  const Tokens t = random_tokens();
  ThriftattnCacheConfig config = THRIFTATTN_CACHE_CONFIG_DEFAULTS, saved_config = config;
  ThriftattnCache *cache = make_cache("thrift", 1, &config), *other = NULL;
  ThriftattnSaved* saved = NULL;
  int32_t seq = -1, loaded = -1;
  CHECK_OK(thriftattn_cache_new_sequence(cache, &seq));
  append(cache, seq, 0, &t, 0, 300, pool);
  CHECK_OK(thriftattn_cache_settle(cache, seq, 0));
  CHECK_OK(thriftattn_cache_save(cache, seq, path, metadata, 13));
  CHECK_OK(thriftattn_saved_create(path, &saved));
  ThriftattnSavedValues values = THRIFTATTN_SAVED_VALUES_DEFAULTS;
  CHECK_OK(thriftattn_saved_read(saved, &values));
  CHECK(values.version >= 1 && values.tokens == 300 && values.file_bytes > 0 && values.memory_bytes > 0);
  CHECK(values.metadata_bytes == 13 && memcmp(values.metadata, metadata, 13) == 0);
  CHECK_OK(thriftattn_saved_config(saved, &saved_config));
  CHECK(saved_config.d_v == D_V && saved_config.storage == config.storage && saved_config.max_bytes == 0);

  CHECK_OK(thriftattn_cache_create(&saved_config, &other));
  CHECK_OK(thriftattn_cache_load(other, path, &loaded));
  CHECK(thriftattn_cache_length(other, loaded) == 300);
  float *k[2], *v[2];
  for (int i = 0; i < 2; ++i) {
    k[i] = zeros(300 * H_KV * D);
    v[i] = zeros(300 * H_KV * D_V);
    const ThriftattnMutableView all_k = thriftattn_mutable_view(k[i], 300, H_KV, D);
    const ThriftattnMutableView all_v = thriftattn_mutable_view(v[i], 300, H_KV, D_V);
    CHECK_OK(thriftattn_cache_read(i ? other : cache, i ? loaded : seq, 0, 0, &all_k, &all_v));
  }
  CHECK(memcmp(k[0], k[1], 300 * H_KV * D * sizeof(float)) == 0);
  CHECK(memcmp(v[0], v[1], 300 * H_KV * D_V * sizeof(float)) == 0);
  thriftattn_cache_destroy(other);

  saved_config.storage = THRIFTATTN_STORAGE_DUAL;
  CHECK_OK(thriftattn_cache_create(&saved_config, &other));
  CHECK_FAILS(thriftattn_cache_load(other, path, &loaded), THRIFTATTN_INVALID_ARGUMENT, "storage");
  CHECK(remove(path) == 0);
  CHECK_FAILS(thriftattn_cache_load(other, path, &loaded), THRIFTATTN_NOT_FOUND, path);
  CHECK_FAILS(thriftattn_saved_create(path, &saved), THRIFTATTN_NOT_FOUND, path);
  CHECK_FAILS(thriftattn_cache_save(cache, seq, path, metadata, -1), THRIFTATTN_INVALID_ARGUMENT, "metadata_bytes -1");
  for (int i = 0; i < 2; ++i) {
    free(k[i]);
    free(v[i]);
  }
  thriftattn_saved_destroy(saved);
  thriftattn_cache_destroy(other);
  thriftattn_cache_destroy(cache);
  free_tokens(t);
}

/* Structs of other sizes: what this library does not know must be zero, what the caller does not know is left alone. */
static void structs_may_grow(void) {
  struct {
    ThriftattnCacheConfig known;
    int64_t later;
  } newer = {THRIFTATTN_CACHE_CONFIG_DEFAULTS, 0};
  ThriftattnCache* cache = NULL;
  newer.known.struct_size = sizeof newer;
  CHECK_OK(thriftattn_cache_create(&newer.known, &cache));
  newer.later = 1;
  CHECK_OK(thriftattn_cache_config(cache, &newer.known));
  CHECK(newer.later == 0 && newer.known.struct_size == sizeof newer);
  thriftattn_cache_destroy(cache);
  newer.later = 1;
  CHECK_FAILS(thriftattn_cache_create(&newer.known, &cache), THRIFTATTN_INVALID_ARGUMENT, "byte");
  newer.known.struct_size = 0;
  CHECK_FAILS(thriftattn_cache_create(&newer.known, &cache), THRIFTATTN_INVALID_ARGUMENT, "config->struct_size 0");
}

static void wrong_values_are_named(ThriftattnPool* pool) {
  ThriftattnCacheConfig config = THRIFTATTN_CACHE_CONFIG_DEFAULTS, wrong;
  ThriftattnCache* cache = make_cache("thrift", 1, &config);
  ThriftattnCache* other = NULL;
  int32_t seq = -1;
  CHECK_OK(thriftattn_cache_new_sequence(cache, &seq));
  const ThriftattnCode invalid = THRIFTATTN_INVALID_ARGUMENT;
#define WRONG_CONFIG(field, value, words)                                 \
  do {                                                                    \
    wrong = config;                                                       \
    wrong.field = (value);                                                \
    CHECK_FAILS(thriftattn_cache_create(&wrong, &other), invalid, words); \
  } while (0)
  WRONG_CONFIG(high_dtype, 3, "high_dtype 3");
  WRONG_CONFIG(storage, -1, "storage -1");
  WRONG_CONFIG(format, 2, "format 2");
  WRONG_CONFIG(scales, 2, "scales 2");
  WRONG_CONFIG(centring, 7, "centring 7");
  WRONG_CONFIG(layers, 0, "layers 0");
  WRONG_CONFIG(d, 100, "head_dim 100");
  WRONG_CONFIG(recent, 1, "recent 1");
  CHECK_FAILS(thriftattn_cache_config_for_method("thirft", 1, 1, 64, 64, &config), invalid, "thirft");

  ThriftattnPlan* plan = NULL;
  ThriftattnProblem problem;
#define WRONG_PROBLEM(field, value, words)                                   \
  do {                                                                       \
    problem = problem_of(&config, "thrift", THRIFTATTN_DECODE, 1);           \
    problem.field = (value);                                                 \
    CHECK_FAILS(thriftattn_plan_create(&problem, 1, &plan), invalid, words); \
  } while (0)
  WRONG_PROBLEM(phase, 2, "phase 2");
  WRONG_PROBLEM(compute, 3, "compute 3");
  WRONG_PROBLEM(compute, THRIFTATTN_F16, "compute f16");
  WRONG_PROBLEM(causal, -1, "causal -1");
  WRONG_PROBLEM(stats, 2, "stats 2");
  WRONG_PROBLEM(h_q, 3, "h_q 3");
  WRONG_PROBLEM(max_s_q, 17, "max_s_q 17");
  WRONG_PROBLEM(window, -1, "window -1");
  WRONG_PROBLEM(method, "thrift:budget=2", "budget=2");
  WRONG_PROBLEM(struct_size, 8, "problem->struct_size 8");
  /* A program that was compiled before the field `compute` was there, whatever stands behind its struct. */
  problem = problem_of(&config, "thrift", THRIFTATTN_DECODE, 1);
  problem.struct_size = offsetof(ThriftattnProblem, compute);
  problem.compute = 99;
  CHECK_OK(thriftattn_plan_create(&problem, 1, &plan));
  thriftattn_plan_destroy(plan);
  plan = NULL;
  problem = problem_of(&config, "thrift", THRIFTATTN_DECODE, 1);
  CHECK_FAILS(thriftattn_plan_create(&problem, 0, &plan), invalid, "0 threads");
  CHECK_FAILS(thriftattn_plan_create(&problem, 1025, &plan), invalid, "1025 threads");
  CHECK_FAILS(thriftattn_pool_create(-1, &pool), invalid, "-1 threads");
  CHECK_FAILS(thriftattn_pool_create(1025, &pool), invalid, "1025 threads");

  float k[H_KV * D] = {0}, v[H_KV * D_V] = {0};
  ThriftattnView key = thriftattn_view(k, 1, H_KV, D), value = thriftattn_view(v, 1, H_KV, D_V);
  k[D + 1] = NAN;
  CHECK_FAILS(thriftattn_cache_append(cache, seq, 0, &key, &value, pool), invalid, "head 1");
  k[D + 1] = 0;
  key.dtype = 3;
  CHECK_FAILS(thriftattn_cache_append(cache, seq, 0, &key, &value, pool), invalid, "k.dtype 3");
  key.dtype = THRIFTATTN_F32;
  key.channels = -1;
  CHECK_FAILS(thriftattn_cache_append(cache, seq, 0, &key, &value, pool), invalid, "k is [1, 2, -1]");
  CHECK_FAILS(thriftattn_cache_append(cache, 5, 0, &value, &value, pool), THRIFTATTN_NOT_FOUND, "sequence 5");
  CHECK(thriftattn_cache_length(cache, seq) == 0);

  /* A workspace serves plans of its sizes alone: another one may need more. */
  ThriftattnPlan* larger = NULL;
  ThriftattnWorkspace* workspace = NULL;
  const int64_t s_q = 0;
  CHECK_OK(thriftattn_plan_create(&problem, thriftattn_pool_size(pool), &plan));
  problem.max_s_q = 2;
  CHECK_OK(thriftattn_plan_create(&problem, thriftattn_pool_size(pool), &larger));
  CHECK_OK(thriftattn_workspace_create(plan, &workspace));
  const Tokens no_tokens = {k, k, v};
  ThriftattnAttendArgs args = args_of(cache, &seq, &s_q, &no_tokens, 0, v, NULL);
  CHECK_OK(thriftattn_attend(plan, workspace, pool, &args));
  CHECK_FAILS(thriftattn_attend(larger, workspace, pool, &args), invalid, "another plan");
  args.n_kv_heads = -1;
  CHECK_FAILS(thriftattn_attend(plan, workspace, pool, &args), invalid, "n_kv_heads -1");
  args.n_kv_heads = 0;
  args.b = -1;
  CHECK_FAILS(thriftattn_attend(plan, workspace, pool, &args), invalid, "b -1");

  ThriftattnSelection* selection = NULL;
  const int64_t falling[] = {0, 1, 0}, late[] = {1, 1};
  const ThriftattnPromoted page = {0, 4};
  CHECK_FAILS(thriftattn_selection_create(2, falling, &page, &selection), invalid, "first[2]");
  CHECK_FAILS(thriftattn_selection_create(1, late, &page, &selection), invalid, "first[0]");
  CHECK_FAILS(thriftattn_selection_create(-1, late, &page, &selection), invalid, "-1");
  CHECK_FAILS(thriftattn_selection_create(1, falling, &page, &selection), invalid, "pages[0].tier 4");
  CHECK(selection == NULL && other == NULL);
  thriftattn_workspace_destroy(workspace);
  thriftattn_plan_destroy(plan);
  thriftattn_plan_destroy(larger);
  thriftattn_cache_destroy(cache);
}

/* Every pointer that may not be null, one at a time. */
static void nulls_are_named(ThriftattnPool* pool) {
  ThriftattnCacheConfig config = THRIFTATTN_CACHE_CONFIG_DEFAULTS;
  ThriftattnCache* cache = make_cache("thrift", 1, &config);
  const ThriftattnProblem good = problem_of(&config, "thrift", THRIFTATTN_DECODE, 1);
  ThriftattnProblem problem = good;
  ThriftattnPlan* plan = NULL;
  ThriftattnWorkspace* workspace = NULL;
  ThriftattnStats* stats = NULL;
  ThriftattnSelection* selection = NULL;
  ThriftattnSaved* saved = NULL;
  CHECK_OK(thriftattn_plan_create(&good, thriftattn_pool_size(pool), &plan));
  CHECK_OK(thriftattn_workspace_create(plan, &workspace));
  CHECK_OK(thriftattn_stats_create(&stats));
  int32_t seq = -1;
  CHECK_OK(thriftattn_cache_new_sequence(cache, &seq));
  float x[H_Q * D] = {0}, y[H_Q * D_V] = {0};
  const ThriftattnView k = thriftattn_view(x, 1, H_KV, D), v = thriftattn_view(y, 1, H_KV, D_V);
  const ThriftattnView no_data = thriftattn_view(NULL, 1, H_KV, D);
  const ThriftattnMutableView out_k = thriftattn_mutable_view(x, 1, H_KV, D);
  const ThriftattnMutableView out_v = thriftattn_mutable_view(y, 1, H_KV, D_V);
  const ThriftattnMutableView out_no_data = thriftattn_mutable_view(NULL, 1, H_KV, D_V);
  const int64_t offsets[] = {0, 1};
  const ThriftattnPromoted page = {0, THRIFTATTN_TIER_FP16};
  int64_t blocks = 0;
  const int64_t* first = NULL;
  const ThriftattnPromoted* pages = NULL;
  CHECK_OK(thriftattn_selection_create(1, offsets, &page, &selection));
#define CHECK_NULL(call, name) CHECK_FAILS(call, THRIFTATTN_INVALID_ARGUMENT, name " is null")
  CHECK_NULL(thriftattn_pool_create(1, NULL), "pool");
  CHECK_NULL(thriftattn_cache_config_for_method(NULL, 1, 1, 64, 64, &config), "method");
  CHECK_NULL(thriftattn_cache_config_for_method("thrift", 1, 1, 64, 64, NULL), "config");
  CHECK_NULL(thriftattn_cache_create(NULL, &cache), "config");
  CHECK_NULL(thriftattn_cache_create(&config, NULL), "cache");
  CHECK_NULL(thriftattn_cache_config(NULL, &config), "cache");
  CHECK_NULL(thriftattn_cache_config(cache, NULL), "config");
  CHECK_NULL(thriftattn_cache_new_sequence(NULL, &seq), "cache");
  CHECK_NULL(thriftattn_cache_new_sequence(cache, NULL), "seq");
  CHECK_NULL(thriftattn_cache_append(NULL, seq, 0, &k, &v, pool), "cache");
  CHECK_NULL(thriftattn_cache_append(cache, seq, 0, NULL, &v, pool), "k");
  CHECK_NULL(thriftattn_cache_append(cache, seq, 0, &k, NULL, pool), "v");
  CHECK_NULL(thriftattn_cache_append(cache, seq, 0, &k, &v, NULL), "pool");
  CHECK_NULL(thriftattn_cache_append(cache, seq, 0, &no_data, &v, pool), "k.data");
  CHECK_NULL(thriftattn_cache_settle(NULL, seq, 0), "cache");
  CHECK_NULL(thriftattn_cache_fork(NULL, seq, &seq), "cache");
  CHECK_NULL(thriftattn_cache_fork(cache, seq, NULL), "fork");
  CHECK_NULL(thriftattn_cache_truncate(NULL, seq, 0, 0), "cache");
  CHECK_NULL(thriftattn_cache_free_sequence(NULL, seq), "cache");
  CHECK_NULL(thriftattn_cache_read(NULL, seq, 0, 0, &out_k, &out_v), "cache");
  CHECK_NULL(thriftattn_cache_read(cache, seq, 0, 0, NULL, &out_v), "k");
  CHECK_NULL(thriftattn_cache_read(cache, seq, 0, 0, &out_k, NULL), "v");
  CHECK_NULL(thriftattn_cache_read(cache, seq, 0, 0, &out_k, &out_no_data), "v.data");
  CHECK_NULL(thriftattn_cache_memory(NULL, &(ThriftattnMemory)THRIFTATTN_MEMORY_DEFAULTS), "cache");
  CHECK_NULL(thriftattn_cache_memory(cache, NULL), "memory");
  CHECK_NULL(thriftattn_cache_save(NULL, seq, "file", NULL, 0), "cache");
  CHECK_NULL(thriftattn_cache_save(cache, seq, NULL, NULL, 0), "path");
  CHECK_NULL(thriftattn_cache_save(cache, seq, "file", NULL, 1), "metadata");
  CHECK_NULL(thriftattn_cache_load(NULL, "file", &seq), "cache");
  CHECK_NULL(thriftattn_cache_load(cache, NULL, &seq), "path");
  CHECK_NULL(thriftattn_cache_load(cache, "file", NULL), "seq");
  CHECK_NULL(thriftattn_saved_create(NULL, &saved), "path");
  CHECK_NULL(thriftattn_saved_create("file", NULL), "saved");
  CHECK_NULL(thriftattn_saved_read(NULL, &(ThriftattnSavedValues)THRIFTATTN_SAVED_VALUES_DEFAULTS), "saved");
  CHECK_NULL(thriftattn_saved_config(NULL, &config), "saved");
  CHECK_NULL(thriftattn_plan_create(NULL, 1, &plan), "problem");
  CHECK_NULL(thriftattn_plan_create(&good, 1, NULL), "plan");
  problem.method = NULL;
  CHECK_NULL(thriftattn_plan_create(&problem, 1, &plan), "problem->method");
  problem = good;
  problem.cache = NULL;
  CHECK_NULL(thriftattn_plan_create(&problem, 1, &plan), "problem->cache");
  CHECK_NULL(thriftattn_workspace_create(NULL, &workspace), "plan");
  CHECK_NULL(thriftattn_workspace_create(plan, NULL), "workspace");
  CHECK_NULL(thriftattn_selection_create(1, NULL, &page, &selection), "first");
  CHECK_NULL(thriftattn_selection_create(1, offsets, NULL, &selection), "pages");
  CHECK_NULL(thriftattn_selection_create(1, offsets, &page, NULL), "selection");
  CHECK_NULL(thriftattn_selection_read(NULL, &blocks, &first, &pages), "selection");
  CHECK_NULL(thriftattn_selection_read(selection, NULL, &first, &pages), "blocks");
  CHECK_NULL(thriftattn_selection_read(selection, &blocks, NULL, &pages), "first");
  CHECK_NULL(thriftattn_selection_read(selection, &blocks, &first, NULL), "pages");
  CHECK_NULL(thriftattn_stats_create(NULL), "stats");
  CHECK_NULL(thriftattn_stats_reset(NULL), "stats");
  CHECK_NULL(thriftattn_stats_read(NULL, &(ThriftattnStatsValues)THRIFTATTN_STATS_VALUES_DEFAULTS), "stats");
  CHECK_NULL(thriftattn_stats_read(stats, NULL), "values");
  CHECK_NULL(thriftattn_stats_selection(NULL, &selection), "stats");
  CHECK_NULL(thriftattn_stats_selection(stats, NULL), "selection");

  const int64_t s_q = 1;
  CHECK_OK(thriftattn_cache_append(cache, seq, 0, &k, &v, pool));
  const Tokens t = {x, x, y};
  const ThriftattnAttendArgs good_args = args_of(cache, &seq, &s_q, &t, 1, y, NULL);
  ThriftattnAttendArgs args = good_args;
  CHECK_NULL(thriftattn_attend(NULL, workspace, pool, &args), "plan");
  CHECK_NULL(thriftattn_attend(plan, NULL, pool, &args), "workspace");
  CHECK_NULL(thriftattn_attend(plan, workspace, NULL, &args), "pool");
  CHECK_NULL(thriftattn_attend(plan, workspace, pool, NULL), "args");
  CHECK_NULL(thriftattn_select(plan, workspace, pool, &args, NULL), "selection");
#define CHECK_NULL_FIELD(field, nothing)                                          \
  do {                                                                            \
    args = good_args;                                                             \
    args.field = (nothing);                                                       \
    CHECK_NULL(thriftattn_attend(plan, workspace, pool, &args), "args->" #field); \
  } while (0)
  CHECK_NULL_FIELD(cache, NULL);
  CHECK_NULL_FIELD(seqs, NULL);
  CHECK_NULL_FIELD(s_q, NULL);
  CHECK_NULL_FIELD(q.data, NULL);
  CHECK_NULL_FIELD(out.data, NULL);
  args = good_args;
  args.n_kv_heads = 1;
  CHECK_NULL(thriftattn_attend(plan, workspace, pool, &args), "args->kv_heads");
  CHECK_OK(thriftattn_attend(plan, workspace, pool, &good_args));

  CHECK(thriftattn_pool_size(NULL) == -1 && thriftattn_cache_length(NULL, 0) == -1);
  CHECK(thriftattn_cache_layer_length(NULL, 0, 0) == -1 && thriftattn_plan_workspace_bytes(NULL) == -1);
  CHECK(thriftattn_plan_text(NULL) == NULL);
  thriftattn_pool_destroy(NULL);
  thriftattn_cache_destroy(NULL);
  thriftattn_plan_destroy(NULL);
  thriftattn_workspace_destroy(NULL);
  thriftattn_selection_destroy(NULL);
  thriftattn_stats_destroy(NULL);
  thriftattn_saved_destroy(NULL);
  thriftattn_selection_destroy(selection);
  thriftattn_stats_destroy(stats);
  thriftattn_workspace_destroy(workspace);
  thriftattn_plan_destroy(plan);
  thriftattn_cache_destroy(cache);
}

static void* fail_elsewhere(void* untouched) {
  *(int*)untouched = strcmp(thriftattn_last_error(), "") == 0;
  CHECK(thriftattn_pool_create(-2, NULL) == THRIFTATTN_INVALID_ARGUMENT);
  return NULL;
}

static void messages_belong_to_their_thread(void) {
  ThriftattnPool* pool = NULL;
  CHECK_FAILS(thriftattn_pool_create(-7, &pool), THRIFTATTN_INVALID_ARGUMENT, "-7");
  pthread_t thread;
  int untouched = 0;
  CHECK(pthread_create(&thread, NULL, fail_elsewhere, &untouched) == 0);
  CHECK(pthread_join(thread, NULL) == 0);
  CHECK(untouched);
  CHECK(strstr(thriftattn_last_error(), "-7") != NULL);
}

int main(void) {
  CHECK(strcmp(thriftattn_last_error(), "") == 0);
  ThriftattnPool* pool = NULL;
  CHECK_OK(thriftattn_pool_create(2, &pool));
  CHECK(thriftattn_pool_size(pool) == 2);
  versions_agree();
  attention_is_what_it_is_defined_to_be(pool);
  batches_and_strides(pool);
  selections_can_be_read_and_given_back(pool);
  sequences_fork_shrink_and_end(pool);
  sequences_are_saved_and_loaded(pool);
  structs_may_grow();
  wrong_values_are_named(pool);
  nulls_are_named(pool);
  messages_belong_to_their_thread();
  thriftattn_pool_destroy(pool);
  if (failures) fprintf(stderr, "%d checks failed\n", failures);
  return failures ? 1 : 0;
}
