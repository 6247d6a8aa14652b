"""thriftattn as PyTorch operators, which `torch.compile` keeps in its graph.

`torch.ops.thriftattn.attention` and `torch.ops.thriftattn.step` have fake kernels, so that shapes and types are known
without running them. They compute where q is, on the CPU or on a GPU, and have no gradient.

A graph knows tensors alone. What stands for a cache in it is a small tensor, `state(cache)`, which every step writes:
so the compiler neither drops a step nor changes the order of two.
"""

from __future__ import annotations

import itertools
import weakref

import torch

from . import KvCache
from . import attention as _attention

__all__ = ["attention", "state", "step"]

_caches: weakref.WeakValueDictionary[int, KvCache] = weakref.WeakValueDictionary()
_numbers = itertools.count(1)


def state(cache: KvCache) -> torch.Tensor:
    """What stands for `cache` in a graph, as long as the cache lives: int64 [2], its number and its steps so far."""
    number = next(_numbers)
    _caches[number] = cache
    return torch.tensor([number, 0])


@torch.library.custom_op("thriftattn::attention", mutates_args=(), device_types=("cpu", "cuda"))
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    causal: bool = True,
    method: str = "thrift",
    phase: str = "prefill",
    window: int = 0,
    sm_scale: float | None = None,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [b, s_q, h_q, d_v], lse [b, s_q, h_q]) of q [b, s_q, h_q, d], k and v [b, s_kv, h_kv, ...].

    The arguments are those of thriftattn.attention().
    """
    return _attention(
        *(q, k, v), causal=causal, method=method, phase=phase, window=window, sm_scale=sm_scale, softcap=softcap,
        sinks=sinks, return_lse=True,
    )


@attention.register_fake
def _(q, k, v, causal=True, method="thrift", phase="prefill", window=0, sm_scale=None, softcap=0.0, sinks=None):
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("thriftattn::step", mutates_args=("cache",), device_types=("cpu", "cuda"))
def step(
    cache: torch.Tensor,
    seqs: list[int],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layer: int = 0,
    phase: str = "decode",
    window: int = 0,
    sm_scale: float | None = None,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Appends k and v [b, s, h_kv, ...] to sequences of a cache, given by its state(), and attends to them.

    q: [b, s, h_q, d]. Returns out [b, s, h_q, d_v]; the arguments are those of KvCache.attend().
    """
    held = _caches.get(int(cache[0]))
    if held is None:
        raise ValueError(f"cache {int(cache[0])} does not live")
    if q.dim() != 4 or k.dim() != 4 or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q is {list(q.shape)} and k {list(k.shape)}: [b, s, h_q, d] and [b, s, h_kv, d] are expected")
    held.append(seqs, k, v, layer=layer)
    cache[1] += 1
    return held.attend(
        seqs, q, layer=layer, phase=phase, window=window, sm_scale=sm_scale, softcap=softcap, sinks=sinks
    )


@step.register_fake
def _(cache, seqs, q, k, v, layer=0, phase="decode", window=0, sm_scale=None, softcap=0.0, sinks=None):
    return q.new_empty(*q.shape[:3], v.shape[3])
