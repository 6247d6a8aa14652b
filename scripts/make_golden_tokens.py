#!/usr/bin/env python3
"""Makes tests/data/tokenizer-*: small tokenizers of the forms that models have, with golden token ids.

Needs tokenizers; for tekken.json and for the tokens in front of a text also transformers. Regular expressions,
normalizers, added tokens and post-processors are those of the real ones, vocabularies are trained on the text below.
Each folder holds tokenizer.json (or tekken.json), where it matters tokenizer_config.json, and

  golden.json   {"prefix": [...], "texts": [{"text", "ids"}]}: what the post-processor puts in front, the ids without it
"""

import base64
import json
import pathlib
import shutil

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

DATA = pathlib.Path(__file__).resolve().parent.parent / "tests" / "data"
TRAINING_TEXT = [
    "The cat sat on the mat and the dog ran to the old house in 1984, didn't it? I'll say it's 31415 THEY'RE here. " * 20,
    "caf\u00e9 na\u00efve \u00fcber stra\u00dfe \u0434\u043e\u043c \u043a\u043e\u0448\u043a\u0430 \u03b1\u03b2\u03b3 "
    "\u4e2d\u6587 \u65e5\u672c\u8a9e \ud55c\uad6d\uc5b4 \u0645\u0631\u062d\u0628\u0627 \U0001f600 " * 20,
    "def f(x):\n    return x + 1  # one\n\n\tif (a != b) { c(); }\r\n" * 20,
]
TEXTS = [
    "", " ", "\n", "the cat sat on the mat", "  two  spaces\n\n\tand a tab \t ", "a\r\nb\r\n\r\n  c\r", "\n \n  \n   x", "x   \n",
    "I'll say it's THEY'RE, DON'T, I'LL, \u2019S he'D 'twas '\u017f", "12345 in 1984, 3.14 1000000 \u0663\u0664\u0665\u0666 \u2167 \u00bd",
    "na\u00efve caf\u00e9", "nai\u0308ve cafe\u0301 A\u030a\u0323 \u1e9b\u0323 \ud55c\uad6d \u1112\u1161\u11ab\u1100\u116e\u11a8 \u212b \u2126",
    "q\u0323\u0307 q\u0307\u0323 \u0344 \u0958 \u2adc \u0301start", "\u4e2d\u6587\u65e5\u672c\u8a9e\ud55c\uad6d\uc5b4\uff0c\u3002\u3000x",
    "\u0645\u064e\u0631\u0652\u062d\u064e\u0628\u064b\u0627 \u05e9\u05b8\u05c1\u05dc\u05d5\u05b9\u05dd \u0928\u092e\u0938\u094d\u0924\u0947 \u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35",
    "\U0001f600\u200d\U0001f525 \U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 \U0001f1e9\U0001f1ea \u2764\ufe0f \U0001f44d\U0001f3fd",
    "\u00a0wide\u3000space\u2003\u180ex\u200b\u200c\ufeff\u0085y\u2028z", "a" * 70, "A" * 70 + "b", " " * 50 + "x", "\n" * 30, "=" * 65, "0" * 40, "ab" * 90,
    "CamelCase ALLCAPS McDonald iPhone \u01c5ungla \u02b0x \u0130stanbul \u1e9eA", "...!?--- (quoted) \"text\" //// /* c */\n//\n", "$x^2_{i}+\\alpha$",
    "\ufffd\u0000\u0001\u007f\u0080\ufffe",
]
# Special tokens inside a text, cut short, and close together; filled in with each form's own tokens.
AROUND = ["{0}the{1} end", "x {0} y{0}{0}\n{1}", "{0}{1}cafe\u0301{0}e\u0301", "\u0301{0}\u0301", "{0}", "  {1}  \n", "a{0}b \u00e9{1}\u00e9 _{0}_ {1}."]

LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
TEKKEN = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+"
          r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
O200K = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?"
         r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|"
         r"\s*[\r\n]+|\s+(?!\S)|\s+")


def byte_level(pattern, vocab=500, behavior="isolated", invert=False, **model):
    """BPE over bytes, split by `pattern` first. `model`: attributes that training does not set."""
    t = Tokenizer(models.BPE())
    t.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), behavior, invert),
                                               pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    t.decoder = decoders.ByteLevel()
    t.train_from_iterator(TRAINING_TEXT, trainers.BpeTrainer(
        vocab_size=vocab, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False))
    for name, value in model.items():
        setattr(t.model, name, value)
    return t


def template(t, token):
    return processors.TemplateProcessing(single=f"{token} $A", pair=f"{token} $A {token} $B",
                                         special_tokens=[(token, t.token_to_id(token))])


def llama3():
    t = byte_level(LLAMA3, ignore_merges=True)
    specials = ["<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    t.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in specials])
    t.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template(t, specials[0])])
    return t, specials[0], "<|eot_id|>"


def qwen():
    t = byte_level(QWEN)
    t.normalizer = normalizers.NFC()
    for s in ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_pad|>"]:
        t.add_special_tokens([AddedToken(s, special=True, normalized=False)])
    for s in ["<tool_call>", "</tool_call>", "<|fim_prefix|>", "<think>", "</think>"]:
        t.add_tokens([AddedToken(s, special=False, normalized=False)])
    t.post_processor = processors.ByteLevel(add_prefix_space=False, use_regex=False, trim_offsets=False)
    return t, "<|im_start|>", "</think>"


def tekken():
    t = byte_level(TEKKEN, ignore_merges=True)
    specials = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "<SPECIAL_20>"]
    t.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in specials])
    t.post_processor = template(t, "<s>")
    return t, "[INST]", "</s>"


def o200k():
    """gpt-oss and Phi-4 split like this; exports from tiktoken remove what does not match, which is nothing."""
    t = byte_level(O200K, behavior="removed", invert=True, ignore_merges=True)
    t.add_special_tokens([AddedToken("<|endoftext|>", special=True, normalized=False)])
    return t, "<|endoftext|>", "<|endofte"


def deepseek():
    """Several splits in a row, and special tokens that are not ASCII."""
    t = byte_level(LLAMA3)
    t.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"\p{N}{1,3}"), "isolated"),
        pre_tokenizers.Split(Regex(r"[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+".encode().decode("unicode_escape")), "isolated"),
        pre_tokenizers.Split(Regex(r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| "
                                   r"?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bos, eos = "<\uff5cbegin\u2581of\u2581sentence\uff5c>", "<\uff5cend\u2581of\u2581sentence\uff5c>"
    t.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in [bos, eos]])
    t.add_tokens([AddedToken("<think>", normalized=False), AddedToken("cafe\u0301", normalized=True)])
    t.post_processor = template(t, bos)
    return t, bos, "<think>"


def stripping():
    """Added tokens that take white space, stand alone, are normalised, begin alike, or are white space themselves."""
    t = Tokenizer(models.BPE())
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    t.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace("\u2019", "'")])
    t.decoder = decoders.ByteLevel()
    t.train_from_iterator(TRAINING_TEXT, trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False))
    t.add_tokens([
        AddedToken("<l>", lstrip=True, normalized=False), AddedToken("<r>", rstrip=True, normalized=False),
        AddedToken("<lr>", lstrip=True, rstrip=True, normalized=False), AddedToken("word", single_word=True, normalized=False),
        AddedToken("<w>", single_word=True, lstrip=True, rstrip=True, normalized=False), AddedToken("    ", normalized=False),
        AddedToken("e\u0301l", normalized=True), AddedToken("don\u2019", normalized=True, single_word=True),
        AddedToken("<l>>", normalized=False), AddedToken("\n\n", normalized=True, lstrip=True)])
    t.post_processor = processors.ByteLevel(trim_offsets=True)
    return t, "<l>", "<lr>"


STRIP_TEXTS = [
    "a <l> b <r> c <lr> d", "a\u3000\n<l><r> \t<l>  <lr>  <l>", "<l>><l> ><l>>", "word words sword word. _word word\u0301 \u24b6word word\u24b6 \u00e9word word",
    "x <w> y<w> <w>z <w>.<w>", "a    b     c        d", "<r>    x <r>     <l>    y", "el\u0301 \u00e9l e\u0301l e\u0301\u0323l <l>e\u0301l",
    "don\u2019t don' don\u2019 don't", "a \n\n b  \n\n\n\n", "wordword word-word word\u200dword word\u180e", "<lr>" * 3 + " \u00a0\u2028<lr>\u180e<lr>",
]


def characters(vocab):
    """SentencePiece's form: BPE over characters, with a token for every byte."""
    t = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    t.normalizer = normalizers.Replace(" ", "\u2581")
    t.pre_tokenizer = pre_tokenizers.Split("\u2581", "merged_with_next")  # words for the trainer
    specials = ["<unk>", "<s>", "</s>"] + [f"<0x{b:02X}>" for b in range(256)]
    t.train_from_iterator([x.replace("\r", "") for x in TRAINING_TEXT], trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=specials, limit_alphabet=60, show_progress=False))
    model = json.loads(t.to_str())["model"]
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in model["merges"]]
    t = Tokenizer(models.BPE(vocab=model["vocab"], merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    t.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in specials[:3]])
    t.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return t


def llama2():
    t = characters(700)
    t.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    t.post_processor = template(t, "<s>")
    return t, "<s>", "</s>"


def metaspace():
    t = characters(600)
    t.pre_tokenizer = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="first", split=False)
    t.post_processor = template(t, "<s>")
    return t, "<s>", "</s>"


def gemma():
    t = characters(600)
    t.normalizer = normalizers.Replace(" ", "\u2581")
    t.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    t.add_tokens([AddedToken("\n\n", normalized=False), AddedToken("\u2581\u2581", normalized=False),
                  AddedToken("<start_of_turn>", special=True, normalized=False)])
    t.post_processor = template(t, "<s>")
    return t, "<start_of_turn>", "</s>"


def write(name, t, first, second, more=()):
    folder = DATA / f"tokenizer-{name}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    t.save(str(folder / "tokenizer.json"), pretty=False)
    write_golden(folder, t, first, second, more)
    return folder


def write_golden(folder, t, first, second, more=()):
    prefix = t.encode("", add_special_tokens=True).ids
    texts = TEXTS + [x.format(first, second) for x in AROUND] + [first[:-1], "x" + second[:3] + " " + first + second[:-2]] + list(more)
    golden = {"prefix": prefix, "texts": [{"text": x, "ids": t.encode(x, add_special_tokens=False).ids} for x in texts]}
    (folder / "golden.json").write_text(json.dumps(golden) + "\n")


def write_tekken(t):
    """The native form of a vocabulary whose tokens are numbered by rank, read back by Transformers' own converter."""
    from transformers.integrations.mistral.tokenizer import MistralConverter

    byte_of = {c: b for b, c in enumerate_bytes()}
    vocab = sorted(json.loads(t.to_str())["model"]["vocab"].items(), key=lambda item: item[1])
    ranks = sorted((bytes(byte_of[c] for c in token) for token, _ in vocab if all(c in byte_of for c in token)),
                   key=lambda b: (len(b) > 1, 0 if len(b) > 1 else b[0]))
    specials = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
    tekken = {
        "config": {"pattern": TEKKEN, "num_vocab_tokens": len(ranks), "default_vocab_size": 12 + len(ranks) - 3,
                   "default_num_special_tokens": 12, "version": "v7"},
        "vocab": [{"rank": r, "token_bytes": base64.b64encode(b).decode(), "token_str": None} for r, b in enumerate(ranks)],
        "special_tokens": [{"rank": r, "token_str": s, "is_control": True} for r, s in enumerate(specials)],
    }
    folder = DATA / "tokenizer-tekken-native"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "tekken.json").write_text(json.dumps(tekken, separators=(",", ":")) + "\n")
    converted = MistralConverter(str(folder / "tekken.json")).converted()
    # mistral-common begins every prompt with <s>; the converter leaves that to its callers.
    converted.post_processor = template(converted, "<s>")
    write_golden(folder, converted, "[INST]", "<SPECIAL_7>", ["<SPECIAL_12><SPECIAL_4>"])


def enumerate_bytes():
    visible = [*range(ord("!"), ord("~") + 1), *range(0xa1, 0xad), *range(0xae, 0x100)]
    hidden = [b for b in range(256) if b not in visible]
    return [(b, chr(b)) for b in visible] + [(b, chr(256 + i)) for i, b in enumerate(hidden)]


def main():
    write("llama3", *llama3())
    folder = write("qwen", *qwen())
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"add_bos_token": False, "bos_token": None, "eos_token": "<|im_end|>", "chat_template": "{{ messages[0].content }}"}) + "\n")
    form = tekken()
    write("tekken", *form)
    write_tekken(form[0])
    write("o200k", *o200k())
    write("deepseek", *deepseek())
    write("stripping", *stripping(), STRIP_TEXTS)
    write("llama2", *llama2())
    write("metaspace", *metaspace())
    write("gemma", *gemma(), ["a\n\nb\n\n\nc", "x  y   z    "])


if __name__ == "__main__":
    main()
