"""A Transformers model over a 4-bit cache: a number hidden in 3600 tokens, asked for under three methods; what each
cache takes, and which pages the last step promoted (promoted.png, where matplotlib is there).

    python3 examples/hf_generate.py [CHECKPOINT]
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import thriftattn.hf

checkpoint = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parents[1] / "models" / "pocket-8m"
model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(checkpoint / "tokenizer.json"))

hay = " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
prompt = (
    "<|bos|>Some special magic numbers are hidden within the following text. Make sure to memorize it. I will quiz you "
    f"about the numbers afterwards.\n{70 * hay} One of the special magic numbers for quiet-harbor is: 4719445.{70 * hay}\n"
    "What is the special magic number for quiet-harbor mentioned in the provided text? The special magic number for "
    "quiet-harbor mentioned in the provided text is"
)
inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)

for method in ("fp16", "thrift:budget=0.1", "fp4"):
    thriftattn.hf.enable(model, method, stats=True)
    cache = thriftattn.hf.ThriftCache(model)
    out = model.generate(**inputs, cache=cache, max_new_tokens=8, do_sample=False, pad_token_id=2)
    answer = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :])
    print(f"{method}:{answer}  ({cache.bytes().total} bytes for {cache.get_seq_length()} tokens)")
    if method.startswith("thrift"):
        try:
            import thriftattn.plot
        except ImportError:
            continue
        selections = [of_all_rows.selection for (of_all_rows,) in cache.stats]
        thriftattn.plot.promoted_pages(selections, cache.get_seq_length()).savefig("promoted.png")
