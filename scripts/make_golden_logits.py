#!/usr/bin/env python3
"""Makes tests/data/tiny-*: small random checkpoints of every architecture with golden logits, and golden token ids.

    scripts/make_golden_logits.py [FOLDER ...]     all of them without an argument

Needs torch, transformers and tokenizers. The checkpoints are random but shaped so that every part matters: logits of
order 1, attention scores with a standard deviation of about 1, norm weights away from 1, more than two pages of tokens,
windows shorter than the text and shorter than a page. Each folder is a Hugging Face folder plus

  golden.json   {"tokens": [...], "every": n}, for the Llama folders {"tokens": [...], "texts": [{"text", "ids"}]}
  logits.bin    float32 [tokens / n, vocab]: rows n-1, 2n-1, ..., by Transformers in float32 from the weights as stored;
                n is 2 where golden.json does not say
  logits_f16_cache.bin   the same with keys and values rounded to float16 before attention, as the cache stores them
"""

import importlib
import json
import pathlib
import shutil
import sys

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

DATA = pathlib.Path(__file__).resolve().parent.parent / "tests" / "data"
VOCAB, TOKENS = 300, 150
SPECIAL = ["<|bos|>", "<|eos|>", "<|pad|>"]
TRAINING_TEXT = "the cat sat on the mat and the dog ran to the old house in 1984, didn't it? " * 20
TEXTS = [
    "", " ", "the cat sat on the mat", "  two  spaces\n\n\tand a tab ", "I'll say it's they'd DON'T", "12345 in 1984, 3.14",
    "na\u00efve caf\u00e9 \u4e2d\u6587 \U0001f600\u200d!", "<|bos|>the<|eos|> end<|pa", "\r\nline\r\n\r\n  x", "hello hello hellohello",
    "\u00a0wide\u3000space \u017fharp's", "a" * 70, "...!?--- (quoted) \"text\"", "\u0663\u0664 \u2167 \u00bd",
]
YARN = dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=64)
LLAMA = dict(
    architecture="Llama", every=2, tokenizer=True,
    config=dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                head_dim=64, rms_norm_eps=1e-5))
SMALL = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
             tie_word_embeddings=True, rms_norm_eps=1e-6)
WINDOW = 40
LOCAL, GLOBAL = "sliding_attention", "full_attention"
FOLDERS = {
    "llama-f32-tied": dict(LLAMA, dtype=torch.float32, more=dict(tie_word_embeddings=True, rope_theta=10000.0)),
    "llama-bf16-llama3": dict(
        LLAMA, dtype=torch.bfloat16, shards="60KB",
        more=dict(tie_word_embeddings=False, attention_bias=True, mlp_bias=True, eos_token_id=[1, 2],
                  rope_parameters=dict(rope_type="llama3", rope_theta=10000.0, factor=4.0, low_freq_factor=1.0,
                                       high_freq_factor=4.0, original_max_position_embeddings=64))),
    "llama-f16-linear": dict(
        LLAMA, dtype=torch.float16, old_rope=True,
        more=dict(tie_word_embeddings=False, rope_parameters=dict(rope_type="linear", rope_theta=10000.0, factor=2.0))),
    "qwen2": dict(  # windows from the second layer on
        architecture="Qwen2", dtype=torch.bfloat16, config=SMALL,
        more=dict(num_hidden_layers=3, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1)),
    "qwen3": dict(architecture="Qwen3", dtype=torch.float16, config=SMALL, more=dict(head_dim=80)),
    "mistral": dict(
        architecture="Mistral", dtype=torch.bfloat16, config=SMALL, old_rope=True,
        more=dict(head_dim=64, sliding_window=WINDOW, rope_parameters=dict(rope_type="default", rope_theta=5000.0))),
    "ministral": dict(
        architecture="Ministral", dtype=torch.bfloat16, config=SMALL,
        more=dict(num_hidden_layers=3, head_dim=32, num_attention_heads=4, num_key_value_heads=2, sliding_window=WINDOW,
                  layer_types=[LOCAL, GLOBAL, LOCAL], rope_parameters=YARN)),
    "ministral3": dict(
        architecture="Ministral3", dtype=torch.bfloat16, config=SMALL,
        more=dict(head_dim=48, rope_parameters=dict(
            YARN, original_max_position_embeddings=32, beta_fast=1.0, beta_slow=0.1, mscale=1.0, mscale_all_dim=0.5,
            llama_4_scaling_beta=0.3))),
    "gemma2": dict(
        architecture="Gemma2", dtype=torch.bfloat16, config=SMALL,
        more=dict(head_dim=64, sliding_window=WINDOW, query_pre_attn_scalar=40, attn_logit_softcapping=2.0,
                  final_logit_softcapping=3.0)),
    "gemma3": dict(
        architecture="Gemma3", config_class="Gemma3TextConfig", dtype=torch.bfloat16, config=SMALL,
        more=dict(num_hidden_layers=3, head_dim=32, num_attention_heads=4, num_key_value_heads=2, sliding_window=WINDOW,
                  query_pre_attn_scalar=24, layer_types=[LOCAL, LOCAL, GLOBAL],
                  rope_parameters={GLOBAL: dict(rope_type="linear", rope_theta=1e6, factor=8.0),
                                   LOCAL: dict(rope_type="default", rope_theta=1e4)})),
    "gpt-oss": dict(
        architecture="GptOss", module="gpt_oss", dtype=torch.bfloat16, config=SMALL,
        more=dict(intermediate_size=24, head_dim=64, sliding_window=WINDOW, num_local_experts=4, num_experts_per_tok=2,
                  swiglu_limit=1.0, rope_parameters=dict(YARN, truncate=False))),
}


def randomise(model, generator):
    """Weights whose products keep the scale of their inputs."""
    one_norm = 0 if "Gemma" in type(model).__name__ else 1  # Gemma multiplies by 1 + weight
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        if "norm" in name:
            p.data = one_norm + 0.2 * noise
        elif name.endswith("sinks"):
            p.data = noise
        elif name.endswith("bias"):
            p.data = 0.3 * noise
        elif "embed" in name or "lm_head" in name:
            p.data = 0.2 * noise
        else:
            p.data = noise / p.shape[1] ** 0.5  # the inputs: [outputs, inputs], of experts [experts, inputs, outputs]


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


def old_rope(folder):
    """The spelling before Transformers 5."""
    path = folder / "config.json"
    written = json.loads(path.read_text())
    rope = written.pop("rope_parameters")
    written["rope_theta"] = rope.pop("rope_theta")
    written["rope_scaling"] = {"type": rope.pop("rope_type"), **rope} if len(rope) > 1 else None
    path.write_text(json.dumps(written, indent=2) + "\n")


def make(name, seed):
    options = FOLDERS[name]
    architecture = options["architecture"]
    folder = DATA / f"tiny-{name}"
    shutil.rmtree(folder, ignore_errors=True)
    config = getattr(transformers, options.get("config_class", architecture + "Config"))(**{
        **dict(vocab_size=VOCAB, max_position_embeddings=256, bos_token_id=0, eos_token_id=1, pad_token_id=None),
        **options["config"], **options["more"]})
    generator = torch.Generator().manual_seed(seed)
    model = getattr(transformers, architecture + "ForCausalLM")(config)
    randomise(model, generator)
    model.tie_weights()
    model.to(options["dtype"]).save_pretrained(folder, max_shard_size=options.get("shards", "5GB"))
    (folder / "generation_config.json").unlink(missing_ok=True)

    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager").eval()
    tokens = torch.cat([torch.zeros(1, dtype=torch.long), torch.randint(3, VOCAB, (TOKENS - 1,), generator=generator)])
    module = options.get("module", architecture.lower())
    modeling = importlib.import_module(f"transformers.models.{module}.modeling_{module}")
    attend = modeling.eager_attention_forward
    with torch.no_grad():
        logits = model(tokens[None]).logits[0]
        modeling.eager_attention_forward = lambda module, q, k, v, *args, **kwargs: attend(
            module, q, k.half().float(), v.half().float(), *args, **kwargs)
        rounded = model(tokens[None]).logits[0]
        modeling.eager_attention_forward = attend
    every = options.get("every", 5)
    golden = dict(tokens=tokens.tolist())
    logits[every - 1::every].numpy().astype("<f4").tofile(folder / "logits.bin")
    rounded[every - 1::every].numpy().astype("<f4").tofile(folder / "logits_f16_cache.bin")
    if options.get("old_rope"):
        old_rope(folder)

    if options.get("tokenizer"):
        spec = make_tokenizer(name.removeprefix("llama-"))
        text = json.dumps(spec, ensure_ascii=False)
        (folder / "tokenizer.json").write_text(text + "\n")
        tokenizer = Tokenizer.from_str(text)
        golden["texts"] = [dict(text=t, ids=tokenizer.encode(t, add_special_tokens=False).ids) for t in TEXTS]
    else:
        golden["every"] = every
    (folder / "golden.json").write_text(json.dumps(golden) + "\n")
    print(folder.name, f"logits std {logits.std():.3f}, moved by a float16 cache: {(rounded - logits).abs().max():.2g}")


if __name__ == "__main__":
    wanted = [pathlib.PurePath(a).name.removeprefix("tiny-") for a in sys.argv[1:]] or list(FOLDERS)
    for number, name in enumerate(FOLDERS):
        if name in wanted:
            make(name, 20 + number)
