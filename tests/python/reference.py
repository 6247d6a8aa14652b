"""Attention in double precision, by definition: docs/design.md, section 2, Masks."""

import numpy as np


def visible(s_q: int, s_kv: int, causal: bool, window: int) -> np.ndarray:
    """bool [s_q, s_kv]: whether row r, at position s_kv - s_q + r, sees key j."""
    i = np.arange(s_kv - s_q, s_kv)[:, None]
    j = np.arange(s_kv)[None, :]
    seen = np.ones((s_q, s_kv), bool)
    if causal:
        seen &= j <= i
    if window:
        seen &= np.abs(i - j) < window
    return seen


def attention(q, k, v, *, causal=True, window=0, sm_scale=None, softcap=0.0, sinks=None):
    """(out [b, s_q, h_q, d_v], lse [b, s_q, h_q]) of q [b, s_q, h_q, d], k and v [b, s_kv, h_kv, ...]."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    group = q.shape[2] // k.shape[2]
    k, v = (np.repeat(x, group, axis=2) for x in (k, v))
    scores = np.einsum("bihd,bjhd->bihj", q, k) * (sm_scale or 1 / np.sqrt(q.shape[3]))
    if softcap:
        scores = softcap * np.tanh(scores / softcap)
    scores = np.where(visible(q.shape[1], k.shape[1], causal, window)[None, :, None, :], scores, -np.inf)
    sink = np.full(q.shape[2], -np.inf) if sinks is None else np.asarray(sinks, np.float64)
    top = np.maximum(scores.max(axis=-1, initial=-np.inf), sink)
    safe = np.where(np.isinf(top), 0, top)
    p = np.exp(scores - safe[..., None])
    total = p.sum(axis=-1) + np.exp(sink - safe)
    with np.errstate(divide="ignore"):
        lse = np.log(total) + safe
    out = np.einsum("bihj,bjhd->bihd", p, v) / np.where(total == 0, 1, total)[..., None]
    return out, lse
