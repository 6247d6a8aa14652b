/* Decodes 1,000 steps through the C interface and prints a checksum of all outputs' bits; decode.cc is its twin. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <thriftattn/c_api.h>

enum { H_Q = 4, H_KV = 2, D = 64, STEPS = 1000 };

static void try(ThriftattnCode code) {
  if (code == THRIFTATTN_OK) return;
  fprintf(stderr, "%s: %s\n", thriftattn_code_name(code), thriftattn_last_error());
  exit(1);
}

static uint64_t state = 20260523;
static void fill(float* x, int count) {
  for (int i = 0; i < count; ++i) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    x[i] = (float)((int32_t)(state >> 40) - (1 << 23)) / (1 << 21);
  }
}

int main(void) {
  const char* method = "thrift:budget=0.2";
  float q[H_Q * D], k[H_KV * D], v[H_KV * D], out[H_Q * D], lse[H_Q];
  ThriftattnPool* pool = NULL;
  ThriftattnCache* cache = NULL;
  ThriftattnPlan* plan = NULL;
  ThriftattnWorkspace* workspace = NULL;
  ThriftattnCacheConfig config = THRIFTATTN_CACHE_CONFIG_DEFAULTS;
  int32_t seq = -1;
  if (thriftattn_c_api_version() != THRIFTATTN_C_API_VERSION) return 1;
  try(thriftattn_pool_create(2, &pool));
  try(thriftattn_cache_config_for_method(method, 1, H_KV, D, D, &config));
  try(thriftattn_cache_create(&config, &cache));
  try(thriftattn_cache_new_sequence(cache, &seq));
  ThriftattnProblem problem = THRIFTATTN_PROBLEM_DEFAULTS;
  problem.phase = THRIFTATTN_DECODE;
  problem.max_s_kv = STEPS;
  problem.h_q = H_Q;
  problem.method = method;
  problem.cache = &config;
  try(thriftattn_plan_create(&problem, 2, &plan));
  try(thriftattn_workspace_create(plan, &workspace));

  const int64_t one = 1;
  const ThriftattnView keys = thriftattn_view(k, 1, H_KV, D), values = thriftattn_view(v, 1, H_KV, D);
  ThriftattnAttendArgs args = THRIFTATTN_ATTEND_ARGS_DEFAULTS;
  args.cache = cache;
  args.b = 1;
  args.seqs = &seq;
  args.s_q = &one;
  args.q = thriftattn_view(q, 1, H_Q, D);
  args.out = thriftattn_mutable_view(out, 1, H_Q, D);
  args.lse = lse;
  uint64_t sum = 14695981039346656037u; /* FNV-1a over words */
  for (int step = 0; step < STEPS; ++step) {
    fill(k, H_KV * D);
    fill(v, H_KV * D);
    fill(q, H_Q * D);
    try(thriftattn_cache_append(cache, seq, 0, &keys, &values, pool));
    try(thriftattn_attend(plan, workspace, pool, &args));
    try(thriftattn_cache_settle(cache, seq, 0));
    for (int i = 0; i < H_Q * D + H_Q; ++i) {
      uint32_t bits;
      memcpy(&bits, i < H_Q * D ? &out[i] : &lse[i - H_Q * D], sizeof bits);
      sum = (sum ^ bits) * 1099511628211u;
    }
  }
  printf("%s %016llx\n", thriftattn_version(), (unsigned long long)sum);
  thriftattn_workspace_destroy(workspace);
  thriftattn_plan_destroy(plan);
  thriftattn_cache_destroy(cache);
  thriftattn_pool_destroy(pool);
  return 0;
}
