"""Writes the fuzz targets' first inputs: OUT/TARGET/NAME, from the checkpoints under tests/data.

python3 make_seeds.py OUT
"""
import json
import pathlib
import struct
import sys

DATA = pathlib.Path(__file__).resolve().parent.parent / "data"


def compact(value):
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def small_tokenizer(text):
    """Without the tokens of single bytes, which the target adds with ids 0 to 511."""
    tokenizer = json.loads(text)
    vocab = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {token: 512 + i for i, token in
                                   enumerate(t for t in vocab if len(t) > 1 and not t.startswith("<0x"))}
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:12]
    return compact(tokenizer)


def small_tekken(text):
    """Without the tokens of single bytes, which the target adds in front."""
    tekken = json.loads(text)
    tekken["vocab"] = tekken["vocab"][256:300]
    tekken["config"]["default_vocab_size"] = 12 + 256 + len(tekken["vocab"])
    return compact(tekken)


def safetensors(tensors, data):
    return compact(tensors) + b"\0" + data


def seeds():
    for folder in sorted(DATA.iterdir()):
        for target, file in (("config", "config.json"), ("index", "model.safetensors.index.json")):
            if (folder / file).exists():
                yield target, folder.name, compact(json.loads((folder / file).read_text()))
        if (folder / "tokenizer.json").exists():
            yield "tokenizer", folder.name, small_tokenizer((folder / "tokenizer.json").read_text())
        if (folder / "tekken.json").exists():
            yield "tokenizer", folder.name, small_tekken((folder / "tekken.json").read_text())
    two = {"a": {"dtype": "F32", "shape": [2, 1], "data_offsets": [0, 8]},
           "b": {"dtype": "BF16", "shape": [3], "data_offsets": [8, 14]}}
    yield "safetensors", "two", safetensors(two, bytes(14))
    yield "safetensors", "raw", struct.pack("<Q", len(compact(two))) + safetensors(two, bytes(14)).replace(b"}}\0", b"}}")
    yield "safetensors", "none", safetensors({"__metadata__": {"format": "pt"}}, b"")
    yield "safetensors", "other", safetensors({"i": {"dtype": "I64", "shape": [], "data_offsets": [0, 8]}}, bytes(8))


def main():
    out = pathlib.Path(sys.argv[1])
    for target, name, content in seeds():
        (out / target).mkdir(parents=True, exist_ok=True)
        (out / target / name).write_bytes(content)


if __name__ == "__main__":
    main()
