#!/usr/bin/env python3
"""One token of a Transformers model on a GPU over a long context: thriftattn beside sdpa with DynamicCache and beside
QuantizedCache, in turn.

    python3 bench/hf_gpu.py --shape 1b --context 32768 --batch 1 --peer fp8 quanto --method fp16 thrift --json out.json
    python3 bench/hf_gpu.py --model DIR --text book.txt --context 32768

Needs thriftattn built with CUDA, torch and transformers; peers of QuantizedCache that are not installed are named and
left out. A shape is a Llama of random weights, whose tokens take as long as a trained one's: what is compared of its
losses is that they are equal. Every contender reads the same context in chunks; then rounds of single tokens are timed
in turn. "sdpa" is PyTorch's own choice of kernels; "flash" decodes without cuDNN's, which PyTorch 2.11 prefers on
Hopper and which prepare themselves, for milliseconds, at every new length. Prints medians in ms, the ratio to the
faster of these two within rounds, and memory in GiB: what the cache keeps, and the peak of everything beside the
weights, prefill included.
"""

import argparse
import copy
import sys
import time
from pathlib import Path

import torch
import transformers

import hf
import thriftattn

SHAPES = {  # those of Llama 3.2 1B and Llama 3 8B
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "head_dim": 128},
}


def random_model(shape, dtype):
    config = transformers.LlamaConfig(
        **SHAPES[shape], num_attention_heads=32, num_key_value_heads=8, vocab_size=32000,
        max_position_embeddings=1 << 20,
    )
    torch.set_default_dtype(dtype)
    with torch.device("cuda"):
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    return model


def sharing(model):
    """A model with the same weights, which may be enabled by itself."""
    memo = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo)


def taken(cache):
    """Bytes of the GPU that PyTorch does not count: a ThriftCache's, scratch memory included."""
    return cache.kv.reserved_bytes() if isinstance(cache, thriftattn.hf.ThriftCache) else 0


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--model", type=Path, help="a checkpoint instead of a shape; needs --text")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--context", type=int, default=32768)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--peer", nargs="*", default=["sdpa", "fp8", "quanto", "hqq"],
                        choices=["sdpa", "fp8", "quanto", "hqq"], help="beside flash")
    parser.add_argument("--method", nargs="+", default=["fp16", "thrift"])
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--chunk", type=int, default=1024, help="tokens of a row that a prefill step reads")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=8, help="of one contender in one round")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if not thriftattn.gpus():
        sys.exit("hf_gpu.py: no GPU, or a build of thriftattn without CUDA")
    dtype, needed = getattr(torch, args.dtype), args.context + args.tokens * (args.rounds + 1) + 2
    if args.model:
        base = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).eval().to("cuda")
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(args.model / "tokenizer.json"))
        ids = [0] + tokenizer(args.text.read_text(), add_special_tokens=False)["input_ids"]
        if len(ids) < needed:
            sys.exit(f"hf_gpu.py: the text has {len(ids)} tokens, {needed} are needed")
        ids = torch.tensor([ids[:needed]] * args.batch, device="cuda")
    else:
        base = random_model(args.shape, dtype)
        ids = torch.randint(32000, (args.batch, needed), device="cuda")

    name = args.model.name if args.model else f"llama {args.shape}, random weights"
    print(f"{name}, {args.dtype}, {args.batch} x {args.context} tokens, {torch.cuda.get_device_name()}")
    with torch.no_grad():
        for n in (args.chunk, 1):  # what a first call loads is nobody's
            base(ids[:, :n])
    rows, contenders = {}, {}
    for name in ("flash", *args.peer, *args.method):
        model = sharing(base)
        try:
            cache = hf.cache_of(model, name, needed)
        except ImportError as error:
            print(f"{name}: left out: {error}")
            continue
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        start = time.perf_counter()
        for part in ids[:, : args.context].split(args.chunk, 1):
            model(part, cache=cache, logits_to_keep=1)
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        model(ids[:, args.context : args.context + 1], cache=cache)
        rows[name] = {"prefill_s": seconds, "peak_bytes": torch.cuda.max_memory_allocated() - before + taken(cache)}
        contenders[name] = model, cache
    hf.time_tokens(contenders, rows, ids, args.context + 1, args.rounds, args.tokens, torch.cuda.synchronize)
    hf.summarize(rows, args.tokens)
    for name, row in rows.items():
        row["bytes"] = hf.cache_bytes(contenders[name][1])
        keeps = f"{row['bytes'] / 2**30:6.2f}" if row["bytes"] else "     ?"
        print(
            f"{name:24} {row['median_ms']:8.2f} ms  {row['faster']:5.2f}x  cache {keeps} GiB  peak "
            f"{row['peak_bytes'] / 2**30:6.2f} GiB  prefill {row['prefill_s']:6.2f} s  nll {row['nll']:.4f}",
            flush=True,
        )
    if args.json:
        hf.write(args.json, args.context, rows, batch=args.batch, gpu=torch.cuda.get_device_name())


if __name__ == "__main__":
    main()
