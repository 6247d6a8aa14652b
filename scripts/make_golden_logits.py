#!/usr/bin/env python3
"""Makes tests/data/tiny-llama-*: small random Llama checkpoints with golden logits and golden token ids.

Needs torch, transformers and tokenizers. The checkpoints are random but shaped so that every part matters: logits of
order 1, attention scores with a standard deviation of about 1, norm weights away from 1, more than two pages of tokens.
Each folder is a Hugging Face folder plus

  golden.json   {"tokens": [...], "texts": [{"text", "ids"}]}
  logits.bin    float32 [tokens / 2, vocab]: rows 1, 3, 5, ..., by Transformers in float32 from the weights as stored
  logits_f16_cache.bin   the same with keys and values rounded to float16 before attention, as the cache stores them
"""

import json
import pathlib
import shutil

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama

DATA = pathlib.Path(__file__).resolve().parent.parent / "tests" / "data"
VOCAB, TOKENS = 300, 150
SPECIAL = ["<|bos|>", "<|eos|>", "<|pad|>"]
TRAINING_TEXT = "the cat sat on the mat and the dog ran to the old house in 1984, didn't it? " * 20
TEXTS = [
    "", " ", "the cat sat on the mat", "  two  spaces\n\n\tand a tab ", "I'll say it's they'd DON'T", "12345 in 1984, 3.14",
    "na\u00efve caf\u00e9 \u4e2d\u6587 \U0001f600\u200d!", "<|bos|>the<|eos|> end<|pa", "\r\nline\r\n\r\n  x", "hello hello hellohello",
    "\u00a0wide\u3000space \u017fharp's", "a" * 70, "...!?--- (quoted) \"text\"", "\u0663\u0664 \u2167 \u00bd",
]
VARIANTS = {
    "f32-tied": dict(dtype=torch.float32, config=dict(tie_word_embeddings=True, rope_theta=10000.0)),
    "bf16-llama3": dict(
        dtype=torch.bfloat16, shards="60KB",
        config=dict(tie_word_embeddings=False, attention_bias=True, mlp_bias=True, eos_token_id=[1, 2],
                    rope_parameters=dict(rope_type="llama3", rope_theta=10000.0, factor=4.0, low_freq_factor=1.0,
                                         high_freq_factor=4.0, original_max_position_embeddings=64))),
    "f16-linear": dict(
        dtype=torch.float16, old_rope=True,
        config=dict(tie_word_embeddings=False, rope_parameters=dict(rope_type="linear", rope_theta=10000.0, factor=2.0))),
}


def randomise(model, generator):
    """Weights whose products keep the scale of their inputs."""
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        if "norm" in name:
            p.data = 1 + 0.2 * noise
        elif name.endswith("bias"):
            p.data = 0.3 * noise
        elif "embed" in name or "lm_head" in name:
            p.data = 0.2 * noise
        else:
            p.data = noise / p.shape[1] ** 0.5


def make_tokenizer(variant):
    """Byte-level BPE in three dialects; the vocabulary is that of the checkpoint."""
    t = Tokenizer(models.BPE())
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=variant == "f32-tied", use_regex=True)
    t.decoder = decoders.ByteLevel()
    t.train_from_iterator([TRAINING_TEXT], trainers.BpeTrainer(
        vocab_size=VOCAB - 1, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    if variant == "bf16-llama3":
        t.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])
    t.add_special_tokens([AddedToken(s, normalized=False, special=True) for s in SPECIAL])
    spec = json.loads(t.to_str())
    if variant == "f32-tied":  # the older spelling of merges
        spec["model"]["merges"] = [" ".join(pair) for pair in spec["model"]["merges"]]
    spec["model"]["vocab"]["\u0120hello"] = VOCAB - 1  # no merges lead to it
    spec["model"]["ignore_merges"] = variant == "f16-linear"
    return spec


def make(variant, seed):
    options = VARIANTS[variant]
    folder = DATA / f"tiny-llama-{variant}"
    shutil.rmtree(folder, ignore_errors=True)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
        vocab_size=VOCAB, max_position_embeddings=256, rms_norm_eps=1e-5, bos_token_id=0,
        **{"eos_token_id": 1, **options["config"]})
    generator = torch.Generator().manual_seed(seed)
    model = LlamaForCausalLM(config)
    randomise(model, generator)
    model.tie_weights()
    model.to(options["dtype"]).save_pretrained(folder, max_shard_size=options.get("shards", "5GB"))
    (folder / "generation_config.json").unlink(missing_ok=True)

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    tokens = torch.cat([torch.zeros(1, dtype=torch.long), torch.randint(3, VOCAB, (TOKENS - 1,), generator=generator)])
    attend = modeling_llama.eager_attention_forward
    with torch.no_grad():
        logits = model(tokens[None]).logits[0]
        modeling_llama.eager_attention_forward = lambda module, q, k, v, *args, **kwargs: attend(
            module, q, k.half().float(), v.half().float(), *args, **kwargs)
        rounded = model(tokens[None]).logits[0]
        modeling_llama.eager_attention_forward = attend
    logits[1::2].numpy().astype("<f4").tofile(folder / "logits.bin")
    rounded[1::2].numpy().astype("<f4").tofile(folder / "logits_f16_cache.bin")

    if options.get("old_rope"):  # the spelling before Transformers 5
        path = folder / "config.json"
        written = json.loads(path.read_text())
        rope = written.pop("rope_parameters")
        written["rope_theta"] = rope.pop("rope_theta")
        written["rope_scaling"] = {"type": rope.pop("rope_type"), **rope}
        path.write_text(json.dumps(written, indent=2) + "\n")

    spec = make_tokenizer(variant)
    text = json.dumps(spec, ensure_ascii=False)
    (folder / "tokenizer.json").write_text(text + "\n")
    tokenizer = Tokenizer.from_str(text)
    golden = [dict(text=t, ids=tokenizer.encode(t, add_special_tokens=False).ids) for t in TEXTS]
    (folder / "golden.json").write_text(json.dumps(dict(tokens=tokens.tolist(), texts=golden)) + "\n")
    print(folder.name, f"logits std {logits.std():.3f}, moved by a float16 cache: {(rounded - logits).abs().max():.2g}")


if __name__ == "__main__":
    for number, name in enumerate(VARIANTS):
        make(name, 20 + number)
