#!/usr/bin/env python3
"""One token of a Transformers model over a long context: thriftattn beside sdpa with DynamicCache, in turn.

    python3 bench/hf_cpu.py --model models/pocket-8m --text book.txt --context 16384 --method fp16 thrift --json out.json

Needs thriftattn, torch and transformers. Every contender reads the same context once; then rounds of single tokens are
timed in turn, all over the same tokens, so that slow phases of the machine meet everyone. Checked before timing: the
loss of each on those tokens. Prints medians in ms, the ratio to sdpa within rounds, and the bytes of each cache.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
import transformers

import hf
import thriftattn


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
    needed = args.context + args.tokens * (args.rounds + 1) + 1
    if len(ids) < needed:
        sys.exit(f"hf_cpu.py: the text has {len(ids)} tokens, {needed} are needed")
    ids = torch.tensor([ids[:needed]])

    rows, contenders = {}, {}
    for name in ("sdpa", *args.method):
        model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).eval()
        cache = hf.cache_of(model, name)
        start = time.perf_counter()
        model(ids[:, : args.context], cache=cache, logits_to_keep=1)
        rows[name] = {"prefill_s": time.perf_counter() - start}
        contenders[name] = model, cache
    hf.time_tokens(contenders, rows, ids, args.context, args.rounds, args.tokens)
    hf.summarize(rows, args.tokens)
    print(f"{args.model.name}, {args.dtype}, {args.context} tokens, {torch.get_num_threads()} threads; ms per token")
    for name, row in rows.items():
        row["bytes"] = hf.cache_bytes(contenders[name][1])
        print(
            f"{name:24} {row['median_ms']:8.2f}  {row['faster']:5.2f}x sdpa  prefill {row['prefill_s']:6.1f} s  "
            f"{row['bytes'] / args.context:6.0f} bytes per token  nll {row['nll']:.4f}"
        )
    if args.json:
        hf.write(args.json, args.context, rows)


if __name__ == "__main__":
    main()
