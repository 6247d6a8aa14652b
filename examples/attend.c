/* One sequence, one layer, from C: append keys and values, attend to them, print what was promoted. */
#include <stdio.h>
#include <stdlib.h>

#include "thriftattn/c_api.h"

enum { H_Q = 8, H_KV = 2, D = 128, PROMPT = 4096 };

#define TRY(call)                                       \
  do {                                                  \
    if ((call) != THRIFTATTN_OK) {                      \
      fprintf(stderr, "%s\n", thriftattn_last_error()); \
      exit(1);                                          \
    }                                                   \
  } while (0)

static float q[PROMPT * H_Q * D], k[PROMPT * H_KV * D], v[PROMPT * H_KV * D], out[PROMPT * H_Q * D];

static void randomize(float* x, int64_t count) {
  for (int64_t i = 0; i < count; ++i) x[i] = (float)rand() / (float)RAND_MAX - 0.5f;
}

int main(void) {
  const char* method = "thrift:budget=0.05";
  ThriftattnPool* pool = NULL;
  ThriftattnCache* cache = NULL;
  ThriftattnStats* stats = NULL;
  ThriftattnCacheConfig config = THRIFTATTN_CACHE_CONFIG_DEFAULTS;
  int32_t seq = 0;
  TRY(thriftattn_pool_create(0, &pool));
  TRY(thriftattn_cache_config_for_method(method, /*layers=*/1, H_KV, D, D, &config));
  TRY(thriftattn_cache_create(&config, &cache));
  TRY(thriftattn_cache_new_sequence(cache, &seq));
  TRY(thriftattn_stats_create(&stats));

  /* Prefills 4096 random tokens and takes one decode step. */
  for (int32_t phase = THRIFTATTN_PREFILL; phase <= THRIFTATTN_DECODE; ++phase) {
    const int64_t s_q = phase == THRIFTATTN_PREFILL ? PROMPT : 1;
    ThriftattnProblem problem = THRIFTATTN_PROBLEM_DEFAULTS;
    problem.phase = phase;
    problem.max_s_q = s_q;
    problem.max_s_kv = PROMPT + 1;
    problem.h_q = H_Q;
    problem.method = method;
    problem.cache = &config;
    ThriftattnPlan* plan = NULL;
    ThriftattnWorkspace* workspace = NULL;
    TRY(thriftattn_plan_create(&problem, thriftattn_pool_size(pool), &plan));
    TRY(thriftattn_workspace_create(plan, &workspace));

    randomize(q, s_q * H_Q * D);
    randomize(k, s_q * H_KV * D);
    randomize(v, s_q * H_KV * D);
    const ThriftattnView keys = thriftattn_view(k, s_q, H_KV, D), values = thriftattn_view(v, s_q, H_KV, D);
    ThriftattnAttendArgs args = THRIFTATTN_ATTEND_ARGS_DEFAULTS;
    args.cache = cache;
    args.b = 1;
    args.seqs = &seq;
    args.s_q = &s_q;
    args.q = thriftattn_view(q, s_q, H_Q, D);
    args.out = thriftattn_mutable_view(out, s_q, H_Q, D);
    args.stats = stats;
    TRY(thriftattn_cache_append(cache, seq, 0, &keys, &values, pool));
    TRY(thriftattn_attend(plan, workspace, pool, &args));
    TRY(thriftattn_cache_settle(cache, seq, 0));

    ThriftattnStatsValues done = THRIFTATTN_STATS_VALUES_DEFAULTS;
    TRY(thriftattn_stats_read(stats, &done));
    printf("%s\n  promoted %lld of %lld pairs so far\n", thriftattn_plan_text(plan), (long long)done.promoted,
           (long long)done.pairs);
    thriftattn_workspace_destroy(workspace);
    thriftattn_plan_destroy(plan);
  }
  thriftattn_stats_destroy(stats);
  thriftattn_cache_destroy(cache);
  thriftattn_pool_destroy(pool);
  return 0;
}
