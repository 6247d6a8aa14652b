#!/usr/bin/env python3
"""One token of a Transformers model over a long context: thriftattn beside sdpa with DynamicCache, in turn.

    python3 bench/hf_cpu.py --model models/pocket-8m --text book.txt --context 16384 --method fp16 thrift --json out.json

Needs thriftattn, torch and transformers. Every contender reads the same context once; then rounds of single tokens are
timed in turn, all over the same tokens, so that slow phases of the machine meet everyone. Checked before timing: the
loss of each on those tokens. Prints medians in ms, the ratio to sdpa within rounds, and the bytes of each cache.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
import transformers

import thriftattn
import thriftattn.hf


def contender(path, name, dtype):
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).eval()
    if name == "sdpa":
        return model, transformers.DynamicCache()
    thriftattn.hf.enable(model, name)
    return model, thriftattn.hf.ThriftCache(model)


def cache_bytes(cache):
    if isinstance(cache, thriftattn.hf.ThriftCache):
        return cache.bytes().total
    return sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True, help="long enough for the context and the timed tokens")
    parser.add_argument("--context", type=int, default=16384)
    parser.add_argument("--method", nargs="+", default=["fp16", "thrift"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=8, help="of one contender in one round")
    parser.add_argument("--threads", type=int, default=0, help="of everyone; 0: the processors there are")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    thriftattn.set_threads(args.threads)
    torch.set_num_threads(thriftattn.threads())

    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(args.model / "tokenizer.json"))
    ids = [0] + tokenizer(args.text.read_text(), add_special_tokens=False)["input_ids"]
    steps = args.tokens * (args.rounds + 1)
    if len(ids) < args.context + steps + 1:
        sys.exit(f"hf_cpu.py: the text has {len(ids)} tokens, {args.context + steps + 1} are needed")
    ids = torch.tensor([ids[: args.context + steps + 1]])

    rows = {name: {"prefill_s": 0.0, "nll": 0.0, "ms": []} for name in ["sdpa", *args.method]}
    models = {name: contender(args.model, name, args.dtype) for name in rows}
    for name, (model, cache) in models.items():
        start = time.perf_counter()
        model(ids[:, : args.context], cache=cache, logits_to_keep=1)
        rows[name]["prefill_s"] = time.perf_counter() - start
    at = args.context
    for round_ in range(args.rounds + 1):  # the first one warms up
        for name, (model, cache) in models.items():
            for i in range(at, at + args.tokens):
                start = time.perf_counter()
                logits = model(ids[:, i : i + 1], cache=cache).logits
                spent = time.perf_counter() - start
                rows[name]["nll"] -= float(logits[0, -1].float().log_softmax(0)[ids[0, i + 1]]) / steps
                if round_:
                    rows[name]["ms"].append(1e3 * spent)
        at += args.tokens
    print(f"{args.model.name}, {args.dtype}, {args.context} tokens, {torch.get_num_threads()} threads; ms per token")
    for name, row in rows.items():
        row["bytes"] = cache_bytes(models[name][1])
        row["median_ms"] = statistics.median(row["ms"])
        per_round = [
            statistics.median(rows["sdpa"]["ms"][i : i + args.tokens]) / statistics.median(row["ms"][i : i + args.tokens])
            for i in range(0, len(row["ms"]), args.tokens)
        ]
        row["faster"] = statistics.median(per_round)
        print(
            f"{name:24} {row['median_ms']:8.2f}  {row['faster']:5.2f}x sdpa  prefill {row['prefill_s']:6.1f} s  "
            f"{row['bytes'] / args.context:6.0f} bytes per token  nll {row['nll']:.4f}"
        )
    if args.json:
        args.json.write_text(json.dumps({"schema": "thriftattn.bench_hf/1", "context": args.context, "rows": rows}))


if __name__ == "__main__":
    main()
