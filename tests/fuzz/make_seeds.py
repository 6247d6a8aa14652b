"""Writes the fuzz targets' first inputs: OUT/TARGET/NAME, from the checkpoints under tests/data and tests/cli/malformed.py.

python3 make_seeds.py OUT
"""
import json
import pathlib
import struct
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "cli"))
import malformed  # noqa: E402: found by the line above

DATA = malformed.DATA
MAX_SEED = 8192  # larger ones slow every mutation down
compact = malformed.compact


def small_tokenizer(text):
    """Without the tokens of single bytes, which the target adds with ids 0 to 511."""
    tokenizer = json.loads(text)
    vocab = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {token: 512 + i for i, token in
                                   enumerate(t for t in vocab if len(t) > 1 and not t.startswith("<0x"))}
    for token in tokenizer["added_tokens"]:
        token["id"] = tokenizer["model"]["vocab"].get(token["content"], token["id"])
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


def malformed_seeds():
    """The malformed files, without the weights behind a header: they would fill every input with numbers."""
    target = {malformed.CONFIG: "config", malformed.INDEX: "index", malformed.TOKENIZER: "tokenizer",
              malformed.WEIGHTS: "safetensors"}
    for case in malformed.cases():
        for file, content in case.files.items():
            if file not in target or not isinstance(content, bytes):
                continue
            if file == malformed.WEIGHTS and len(content) > 8:
                content = content[8:8 + min(struct.unpack("<Q", content[:8])[0], 1 << 16)] + b"\0"
            if file == malformed.TOKENIZER:
                try:
                    content = small_tokenizer(content)
                except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                    pass  # too malformed to be made smaller
            if len(content) <= MAX_SEED:
                yield target[file], case.name.replace("/", "-"), content


def main():
    out = pathlib.Path(sys.argv[1])
    for target, name, content in [*seeds(), *malformed_seeds()]:
        (out / target).mkdir(parents=True, exist_ok=True)
        (out / target / name).write_bytes(content)


if __name__ == "__main__":
    main()
