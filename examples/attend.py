"""One sequence, one layer: append keys and values, attend to them, print what was promoted."""

import numpy as np

import thriftattn

H_Q, H_KV, D, PROMPT = 8, 2, 128, 4096
random = np.random.default_rng(1)


def rows(n, heads):
    return random.standard_normal((1, n, heads, D), dtype=np.float32)


cache = thriftattn.KvCache("thrift:budget=0.05", h_kv=H_KV, d=D)
seq = cache.new_sequence()
for phase, s_q in (("prefill", PROMPT), ("decode", 1)):
    print(thriftattn.plan(cache.method, phase=phase, s_kv=PROMPT + 1, s_q=s_q, h_q=H_Q, h_kv=H_KV, d=D))
    cache.append([seq], rows(s_q, H_KV), rows(s_q, H_KV))
    out, stats = cache.attend([seq], rows(s_q, H_Q), phase=phase, stats=True)
    print(f"  promoted {stats.promoted} of {stats.pairs} pairs, cache {cache.bytes().total} bytes")
