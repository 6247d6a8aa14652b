"""Attention over a paged FP4 key/value cache that gives back what 4 bits lose.

`attention` is one call on tensors; `KvCache` keeps keys and values between calls; `thriftattn.hf` puts it under a
Transformers model. A method is a string such as "thrift:budget=0.05", the same in every language.
"""

from ._core import (
    MAX_DECODE_ROWS,
    PAGE_TOKENS,
    KvCache,
    MemoryUse,
    Plan,
    Selection,
    Stats,
    __version__,
    attention,
    dequantize,
    gpus,
    method_options,
    methods,
    plan,
    quantize,
    select,
    set_threads,
    threads,
)

__all__ = [
    "MAX_DECODE_ROWS",
    "PAGE_TOKENS",
    "KvCache",
    "MemoryUse",
    "Plan",
    "Selection",
    "Stats",
    "__version__",
    "attention",
    "dequantize",
    "gpus",
    "method_options",
    "methods",
    "plan",
    "quantize",
    "select",
    "set_threads",
    "threads",
]
