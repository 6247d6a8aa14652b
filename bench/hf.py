"""What hf_cpu.py and hf_gpu.py share: who takes part, rounds of single tokens in turn, ratios, the JSON."""
import contextlib
import json
import statistics
import time

import torch
import transformers

import thriftattn.hf


def cache_of(model, name, max_tokens=0):
    """An empty cache for a contender: "sdpa" or "flash", a backend of QuantizedCache, or a method, for which the model
    is enabled."""
    if name in ("sdpa", "flash"):
        return transformers.DynamicCache()
    if name in ("fp8", "quanto", "hqq"):
        return transformers.QuantizedCache(name, model.config)
    thriftattn.hf.enable(model, name)
    return thriftattn.hf.ThriftCache(model, max_tokens=max_tokens)


def kernels(name):
    """What a contender decodes under: PyTorch's own choice of kernels, and without cuDNN, which prepares anew for every
    length, for all but "sdpa"."""
    if name == "sdpa":
        return contextlib.nullcontext()
    others = (torch.nn.attention.SDPBackend.FLASH_ATTENTION, torch.nn.attention.SDPBackend.EFFICIENT_ATTENTION,
              torch.nn.attention.SDPBackend.MATH)
    return torch.nn.attention.sdpa_kernel(list(others))


def cache_bytes(cache):
    """What a DynamicCache or a ThriftCache keeps; None for others, whose layers keep it each in its own way."""
    if isinstance(cache, thriftattn.hf.ThriftCache):
        return cache.bytes().total
    if isinstance(cache, transformers.QuantizedCache):
        return None
    return sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))


@torch.no_grad()
def time_tokens(contenders, rows, ids, context, rounds, tokens, done=lambda: None):
    """Fills row["ms"] and row["nll"]. contenders: name -> (model, cache that has read ids[:, :context])."""
    steps = tokens * (rounds + 1)
    at = context
    for round_ in range(rounds + 1):  # the first one warms up
        for name, (model, cache) in contenders.items():
            for i in range(at, at + tokens):
                with kernels(name):
                    done()
                    start = time.perf_counter()
                    logits = model(ids[:, i : i + 1], cache=cache).logits
                    done()
                    spent = time.perf_counter() - start
                loss = torch.nn.functional.cross_entropy(logits[:, -1].float(), ids[:, i + 1])
                rows[name]["nll"] = rows[name].get("nll", 0) + float(loss) / steps
                if round_:
                    rows[name].setdefault("ms", []).append(1e3 * spent)
        at += tokens


def summarize(rows, tokens):
    """Adds row["median_ms"] and row["faster"]: the ratio to the faster of sdpa and flash, median over rounds."""
    for row in rows.values():
        row["median_ms"] = statistics.median(row["ms"])
    base = min((rows[name] for name in ("sdpa", "flash") if name in rows), key=lambda row: row["median_ms"])
    for row in rows.values():
        rounds = [slice(i, i + tokens) for i in range(0, len(row["ms"]), tokens)]
        ratios = [statistics.median(base["ms"][r]) / statistics.median(row["ms"][r]) for r in rounds]
        row["faster"] = statistics.median(ratios)


def write(path, context, rows, **others):
    path.write_text(json.dumps({"schema": "thriftattn.bench_hf/1", "context": context, **others, "rows": rows}))
