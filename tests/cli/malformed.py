"""Inputs that no program may trust: checkpoints, texts and questions, each wrong in one way, and what must be said.

Everything is made from tests/data, by rule; nothing here is random. The fuzz targets start from the same files.
"""
import copy
import dataclasses
import json
import pathlib
import struct

DATA = pathlib.Path(__file__).resolve().parent.parent / "data"
SINGLE = DATA / "tiny-llama-f32-tied"  # one model.safetensors, tied embeddings, no biases
SHARDED = DATA / "tiny-llama-bf16-llama3"  # three shards and their index, rope_parameters, biases

CONFIG, INDEX, TOKENIZER, WEIGHTS = "config.json", "model.safetensors.index.json", "tokenizer.json", "model.safetensors"
FOLDER, DANGLING, FIFO, ENDLESS = "folder", "dangling link", "fifo", "endless"  # what a file may be instead of bytes
DEEP = 100_000  # levels of nesting, more than any stack of frames holds


@dataclasses.dataclass
class Case:
    name: str
    says: str  # a regular expression that the one line on stderr must match
    files: dict  # name -> bytes, one of the four words above, or None = not there
    base: pathlib.Path = SINGLE  # the checkpoint whose other files stand beside them
    command: str = "generate"  # or "text", "questions": the file `input` is handed to eval


def compact(value):
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def read(base, name):
    return (base / name).read_bytes()


def split(weights):
    """(header, data) of a safetensors file."""
    (length,) = struct.unpack("<Q", weights[:8])
    return json.loads(weights[8:8 + length]), weights[8 + length:]


def join(header, data):
    text = header if isinstance(header, bytes) else compact(header)
    return struct.pack("<Q", len(text)) + text + data


def nested(levels, inner="", opening="[", closing="]"):
    return (opening * levels + inner + closing * levels).encode()


def with_raw(config, key, raw):
    """A config whose `key` has the text `raw`, which json could not write."""
    return compact({**config, key: "@@"}).replace(b'"@@"', raw)


# --- model.safetensors

FIRST = "model.embed_tokens.weight"
NORM = "model.norm.weight"


def safetensors_cases():
    good = read(SINGLE, WEIGHTS)
    header, data = split(good)
    file = r"/model\.safetensors: "

    def case(name, says, content):
        return Case(f"safetensors/{name}", says, {WEIGHTS: content})

    def edited(name, says, edit, new_data=data):
        changed = copy.deepcopy(header)
        edit(changed)
        return case(name, file + says, join(changed, new_data))

    def entry(name, says, key, value, tensor=NORM):
        def edit(h):
            if value is None:
                del h[tensor][key]
            else:
                h[tensor][key] = value
        return edited(name, rf"tensor {tensor}: {says}", edit)

    yield case("empty", file + "0 bytes are too few for a header", b"")
    yield case("seven-bytes", file + "7 bytes are too few", good[:7])
    yield case("length-alone", file + rf"a header of {len(good) - 8 - len(data)} bytes does not fit into a file of 8",
               good[:8])
    yield case("length-of-file", file + rf"a header of {len(good)} bytes does not fit", struct.pack("<Q", len(good)) + good[8:])
    yield case("length-2-63", file + "a header of 9223372036854775808 bytes", struct.pack("<Q", 1 << 63) + good[8:])
    yield case("length-max", file + "a header of 18446744073709551615 bytes", b"\xff" * 8 + good[8:])
    yield case("length-too-short", file + "header: not a JSON object", struct.pack("<Q", 100) + good[8:])
    yield case("length-zero", file + "header: not a JSON object", bytes(8) + data)
    yield case("zeros", file + "header: not a JSON object", bytes(4096))
    yield case("text", file + r"a header of \d+ bytes does not fit", b"This is a pointer to a file kept elsewhere.\n")
    yield case("header-list", file + "header: not a JSON object", join(b"[]", data))
    yield case("header-no-utf8", file + "header: not a JSON object", join(b'{"\xff\xfe": {}}', data))
    yield case("header-empty", rf"follow the last tensor", join({}, data))
    yield case("nothing-inside", rf"tensor {FIRST} is missing", join({}, b""))
    yield case("header-deep", file + "header: not a JSON object", join(b'{"a":' + b"[" * DEEP, b""))
    yield case("entry-deep", file + "tensor a: dtype null", join(b'{"a":' + nested(DEEP) + b"}", b""))
    yield case("dtype-deep", file + "tensor a: dtype array", join(b'{"a":{"dtype":' + nested(DEEP) + b"}}", b""))
    yield case("truncated", file + r"tensor .*: data_offsets \[\d+, \d+\] are outside the \d+ bytes", good[:-1])
    yield case("truncated-half", file + r"tensor .*: data_offsets \[\d+, \d+\] are outside", good[:len(good) // 2])
    yield case("trailing", file + "1 bytes follow the last tensor", good + b"\0")

    yield entry("dtype-none", "dtype null is not a string", "dtype", None)
    yield entry("dtype-number", "dtype 32 is not a string", "dtype", 32)
    yield entry("dtype-unknown", "dtype F4 is not supported: F32, F16 and BF16", "dtype", "F4")
    yield entry("dtype-integers", r"dtype I32 is not supported", "dtype", "I32")
    yield entry("dtype-narrow", r"shape \[\d+\] in BF16 does not fill", "dtype", "BF16")
    yield entry("dtype-control", "dtype", "dtype", "F32\x1b[31m\n")
    yield entry("shape-none", "shape null is not a list of sizes", "shape", None)
    yield entry("shape-number", "shape 32 is not a list", "shape", 32)
    yield entry("shape-text", r'shape \["32"\] is not a list', "shape", ["32"])
    yield entry("shape-negative", r"shape \[-32\] is not a list", "shape", [-32])
    yield entry("shape-negative-twice", r"shape \[-1,-32\] is not a list", "shape", [-1, -32])
    yield entry("shape-fraction", r"shape \[32.5\] is not a list", "shape", [32.5])
    yield entry("shape-nested", r"shape array is not a list", "shape", [[32]])
    yield entry("shape-overflow", r"shape \[1099511627776, 1099511627776\] in F32 does not fill", "shape", [1 << 40, 1 << 40])
    yield entry("shape-overflow-to-size", r"shape \[\d+, 4, \d+\] in F32 does not fill", "shape",
                [1 << 62, 4, header[NORM]["shape"][0]])
    yield entry("shape-beyond-63-bits", r"shape \[18446744073709551615\] is not a list", "shape", [(1 << 64) - 1])
    yield entry("shape-other", r"shape \[2, \d+\] does not fit config.json: \[\d+\] expected", "shape",
                [2, header[NORM]["shape"][0] // 2])
    yield entry("shape-transposed", r"shape \[\d+, 300\] does not fit config.json: \[300, \d+\] expected", "shape",
                header[FIRST]["shape"][::-1], FIRST)
    begin, end = header[NORM]["data_offsets"]
    for name, says, offsets in (
            ("none", "data_offsets null are not two offsets", None),
            ("one", r"data_offsets \[\d+\] are not two", [begin]),
            ("three", r"data_offsets \[\d+,\d+,\d+\] are not two", [begin, end, end]),
            ("text", r'data_offsets \["0","4"\] are not two', ["0", "4"]),
            ("negative", r"data_offsets \[-4,\d+\] are not two", [-4, end]),
            ("fraction", r"data_offsets \[0.5,\d+\.0\] are not two", [0.5, float(end)]),
            ("reversed", rf"data_offsets \[{end}, {begin}\] are outside", [end, begin]),
            ("beyond", rf"data_offsets \[{begin}, {len(data) + 4}\] are outside the {len(data)} bytes", [begin, len(data) + 4]),
            ("max", r"data_offsets \[9223372036854775800, 9223372036854775807\] are outside", [(1 << 63) - 8, (1 << 63) - 1]),
            ("beyond-63-bits", r"data_offsets \[18446744073709551608,18446744073709551615\] are not two",
             [(1 << 64) - 8, (1 << 64) - 1])):
        yield entry(f"offsets-{name}", says, "data_offsets", offsets)

    def overlap(h):
        h[NORM]["data_offsets"] = [h[FIRST]["data_offsets"][0], h[FIRST]["data_offsets"][0] + end - begin]
    yield edited("overlap", r"tensor .* (its bytes overlap another tensor's|leave a gap) ", overlap)

    def duplicate(h):
        h["twin"] = copy.deepcopy(h[NORM])
    yield edited("same-bytes-twice", r"tensor (twin|model\.norm\.weight): its bytes overlap another tensor's", duplicate)

    def shift(h):
        for name, tensor in h.items():
            if name != "__metadata__":
                tensor["data_offsets"] = [n + 4 for n in tensor["data_offsets"]]
    yield edited("gap-first", r"tensor .*: its bytes leave a gap at offset 4, expected 0", shift, bytes(4) + data)

    for tensor in (FIRST, NORM, "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight",
                   "model.layers.1.input_layernorm.weight"):
        def rename(h, tensor=tensor):
            h["other." + tensor] = h.pop(tensor)
        changed = copy.deepcopy(header)
        rename(changed)
        yield case(f"missing-{tensor}", rf"tensor {tensor} is missing", join(changed, data))
    changed = copy.deepcopy(header)
    changed["model.layers.0.self_attn.q_proj.bias"] = {"dtype": "F32", "shape": [1], "data_offsets": [len(data), len(data) + 4]}
    yield case("bias-denied", r"tensor model\.layers\.0\.self_attn\.q_proj\.bias: config\.json says that there is no bias",
               join(changed, data + bytes(4)))
    changed = copy.deepcopy(header)
    changed["model.layers.2.input_layernorm.weight"] = {"dtype": "F32", "shape": [1], "data_offsets": [len(data), len(data) + 4]}
    yield case("layers-denied", r"tensor model\.layers\.2\.input_layernorm\.weight: config\.json says num_hidden_layers 2", join(changed, data + bytes(4)))

    yield case("folder", r"/model\.safetensors is a folder", FOLDER)
    yield case("fifo", r"/model\.safetensors is .*not a file", FIFO)
    yield case("device", r"/model\.safetensors is .*not a file", ENDLESS)
    yield case("absent", r"has neither model\.safetensors nor model\.safetensors\.index\.json", None)
    yield case("dangling", r"has neither model\.safetensors nor model\.safetensors\.index\.json", DANGLING)


# --- model.safetensors.index.json

def index_cases():
    good = json.loads(read(SHARDED, INDEX))
    weight_map = good["weight_map"]
    file = r"/model\.safetensors\.index\.json: "
    shards = sorted(set(weight_map.values()))

    def case(name, says, content, **files):
        return Case(f"index/{name}", says, {INDEX: content, **files}, SHARDED)

    def mapped(name, says, tensor, shard):
        return case(name, says, compact({**good, "weight_map": {**weight_map, tensor: shard}}))

    yield case("empty", file + "not a JSON object", b"")
    yield case("truncated", file + "not a JSON object", compact(good)[:-2])
    yield case("list", file + "not a JSON object", b"[]")
    yield case("no-map", file + "weight_map is missing", compact({"metadata": {}}))
    yield case("map-list", file + "weight_map is missing", compact({"weight_map": list(weight_map)}))
    yield case("map-empty", rf"tensor {FIRST} is missing", compact({"weight_map": {}}))
    yield case("map-deep", file + r"tensor a: array is not the name of a file",
               b'{"weight_map":{"a":' + nested(DEEP) + b"}}")
    yield mapped("shard-number", file + r"tensor model\.norm\.weight: 7 is not the name of a file", NORM, 7)
    yield mapped("shard-null", file + r"tensor model\.norm\.weight: null is not the name of a file", NORM, None)
    yield mapped("shard-empty", rf"{NORM}: \"\" is not the name of a file", NORM, "")
    yield mapped("shard-self", rf"{NORM}: \"\.\" is not the name of a file", NORM, ".")
    yield mapped("shard-absent", r"cannot open .*/model-00009-of-00003\.safetensors: No such file", NORM,
                 "model-00009-of-00003.safetensors")
    yield mapped("shard-above", file + r'tensor model\.norm\.weight: "\.\./secret" is not the name of a file', NORM,
                 "../secret")
    yield mapped("shard-absolute", file + r'tensor model\.norm\.weight: "/etc/passwd" is not the name', NORM, "/etc/passwd")
    yield mapped("shard-long", r"cannot open .*aaaa: File name too long", NORM, "a" * 5000)
    yield mapped("shard-newline", r"cannot open .*/two.lines: No such file", NORM, "two\nlines")
    yield mapped("shard-nul", rf"{NORM}: .* is not the name of a file", NORM, shards[0] + "\0")
    yield mapped("shard-config", r"/config\.json: a header of \d+ bytes does not fit", NORM, CONFIG)
    yield mapped("shard-other", file + r"tensor .* is not in .*/model-0000\d-of-00003\.safetensors", NORM,
                 shards[0] if weight_map[NORM] != shards[0] else shards[1])
    yield mapped("tensor-nowhere", file + r"tensor model\.extra is not in .*model-00001", "model.extra", shards[0])
    yield case("shard-truncated", r"/model-00002-of-00003\.safetensors: tensor .* are outside", compact(good),
               **{shards[1]: read(SHARDED, shards[1])[:-100]})
    yield case("shard-gone", r"cannot open .*/model-00003-of-00003\.safetensors: No such file", compact(good),
               **{shards[2]: None})
    yield case("shard-folder", r"/model-00003-of-00003\.safetensors is a folder", compact(good), **{shards[2]: FOLDER})
    yield case("shard-twice", r"/model-00002-of-00003\.safetensors: tensor .* is also in .*model-00001", compact(good),
               **{shards[1]: read(SHARDED, shards[0])})
    yield case("folder", r"/model\.safetensors\.index\.json is a folder", FOLDER)


# --- config.json

def config_cases():
    single, sharded = (json.loads(read(base, CONFIG)) for base in (SINGLE, SHARDED))
    file = r"/config\.json: "

    def case(name, says, content, base=SINGLE):
        return Case(f"config/{name}", says, {CONFIG: content}, base)

    def changed(name, says, **members):
        return case(name, says, compact({**single, **members}))

    yield case("empty", file + "not a JSON object", b"")
    yield case("text", file + "not a JSON object", b"hidden_size: 64\n")
    yield case("truncated", file + "not a JSON object", compact(single)[:-1])
    yield case("trailing", file + "not a JSON object", compact(single) + b"}")
    yield case("list", file + "not a JSON object", compact([single]))
    yield case("number", file + "not a JSON object", b"42")
    yield case("no-utf8", file + "not a JSON object", compact(single)[:-1] + b',"name":"\xff"}')
    yield case("utf16", file + "not a JSON object", compact(single).decode().encode("utf-16"))
    yield case("nan", file + "not a JSON object", with_raw(single, "rms_norm_eps", b"NaN"))
    yield case("deep", file + "not a JSON object", b'{"a":' + b"[" * DEEP)
    yield case("folder", r"/config\.json is a folder", FOLDER)
    yield case("absent", r"cannot open .*/config\.json: No such file", None)
    yield case("dangling", r"cannot open .*/config\.json: No such file", DANGLING)
    yield case("fifo", r"/config\.json is .*not a file", FIFO)
    yield case("endless", r"/config\.json is .*not a file", ENDLESS)

    yield changed("architecture-unknown", file + r'architectures \["ParrotForCausalLM"\] is not supported',
                  architectures=["ParrotForCausalLM"])
    yield changed("architecture-encoder", file + r'architectures \["BertModel"\] is not supported', architectures=["BertModel"])
    yield changed("architecture-none", file + r"architectures (\[\]|null)? ?is (not supported|missing)", architectures=[])
    yield changed("architecture-two", file + r"architectures \[.*,.*\] is not supported",
                  architectures=["LlamaForCausalLM", "LlamaForCausalLM"])
    yield changed("architecture-number", file + r"architectures \[7\] is not supported", architectures=[7])
    yield changed("architecture-null", file + "architectures is missing", architectures=None)
    yield case("architecture-deep", file + "architectures array is not supported",
               with_raw(single, "architectures", nested(DEEP)))

    integers = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size",
                "max_position_embeddings")
    for key in integers:
        without = {k: v for k, v in single.items() if k != key}
        yield case(f"{key}-missing", file + f"{key} is missing", compact(without))
        yield changed(f"{key}-zero", file + f"{key} 0 is not supported", **{key: 0})
    for key, value, shown in (
            ("hidden_size", "64", r'"64"'), ("hidden_size", 64.5, r"64\.5"), ("hidden_size", True, "true"),
            ("hidden_size", [64], r"\[64\]"), ("hidden_size", -64, "-64"), ("hidden_size", 1 << 40, str(1 << 40)),
            ("hidden_size", (1 << 64) - 1, str((1 << 64) - 1)), ("intermediate_size", 1 << 31, str(1 << 31)),
            ("num_hidden_layers", 1_000_000_000, "1000000000"), ("num_attention_heads", 1 << 20, str(1 << 20)),
            ("num_key_value_heads", 0, "0"), ("num_key_value_heads", 3, "3"), ("num_key_value_heads", "two", r'"two"'),
            ("vocab_size", 1 << 60, str(1 << 60)), ("max_position_embeddings", 1 << 62, str(1 << 62)),
            ("head_dim", 0, "0"), ("head_dim", -64, "-64"), ("head_dim", 63, "63"), ("head_dim", 1 << 33, str(1 << 33)),
            ("head_dim", "wide", r'"wide"'), ("rms_norm_eps", 0, "0"), ("rms_norm_eps", -1e-5, "-1e-05"),
            ("rms_norm_eps", 7, "7"), ("rms_norm_eps", "small", r'"small"'), ("tie_word_embeddings", "yes", r'"yes"'),
            ("tie_word_embeddings", 1, "1"), ("attention_bias", "no", r'"no"'), ("hidden_act", "relu", r'"relu"'),
            ("hidden_act", 7, "7"), ("bos_token_id", 300, "300"), ("bos_token_id", -1, "-1"),
            ("bos_token_id", "<s>", r'"<s>"'), ("eos_token_id", [1, 1 << 40], str(1 << 40)),
            ("eos_token_id", [1, None], "null"), ("eos_token_id", {"a": 1}, r'\{"a":1\}'),
            ("quantization_config", {"quant_method": "gptq"}, r'"gptq"'), ("rope_theta", 0, "0"),
            ("rope_theta", "big", r'"big"'), ("rope_theta", 1e300, r"1e\+300")):
        text = ("list-" if isinstance(value, list) else "") + json.dumps(value).strip('[]{}"').replace(" ", "")[:24]
        yield changed(f"{key}-is-{text}", file + rf"{key} {shown} is not supported", **{key: value})
    yield case("hidden_size-1e999", file + "not a JSON object", with_raw(single, "hidden_size", b"1e999"))
    yield case("hidden_size-deep", file + r"hidden_size array is not supported", with_raw(single, "hidden_size", nested(DEEP)))
    yield changed("hidden_size-control", file + r"hidden_size .* is not supported", hidden_size="\x1b[31m\n\x07")
    yield changed("hidden_size-long", file + r'hidden_size "aaa.{0,80} is not supported', hidden_size="a" * 100_000)

    yield changed("head_dim-other", r"/model\.safetensors: tensor .*q_proj\.weight: shape .* does not fit config\.json",
                  head_dim=128)
    yield changed("hidden_size-other", r"/model\.safetensors: tensor .*: shape .* does not fit config\.json", hidden_size=48)
    yield changed("vocab_size-other", r"tensor model\.embed_tokens\.weight: shape \[300, \d+\] does not fit config\.json: "
                  r"\[301, \d+\] expected", vocab_size=301)
    yield changed("intermediate_size-other", r"tensor .*mlp.*: shape .* does not fit config\.json", intermediate_size=65)
    yield changed("num_hidden_layers-more", r"tensor model\.layers\.2\..* is missing", num_hidden_layers=3)
    yield changed("num_hidden_layers-fewer", r"tensor model\.layers\.1\..*: config\.json says num_hidden_layers 1", num_hidden_layers=1)
    yield changed("num_hidden_layers-most", r"tensor model\.layers\.2\..* is missing", num_hidden_layers=4096)
    yield changed("untied", r"tensor lm_head\.weight is missing", tie_word_embeddings=False)
    yield changed("biased", r"tensor .*_proj\.bias is missing", attention_bias=True)

    def rope(name, says, **members):
        return case(f"rope-{name}", file + says,
                    compact({**sharded, "rope_parameters": {**sharded["rope_parameters"], **members}}), SHARDED)

    yield rope("type", r'rope_parameters: rope_type "spiral" is not supported', rope_type="spiral")
    yield rope("type-number", r"rope_parameters: rope_type 3 is not supported", rope_type=3)
    yield rope("factor-zero", r"rope_parameters: factor 0 is not supported", factor=0)
    yield rope("factor-negative", r"rope_parameters: factor -4 is not supported", factor=-4)
    yield rope("factor-text", r'rope_parameters: factor "4" is not supported', factor="4")
    yield rope("factor-null", r"rope_parameters: factor is missing", factor=None)
    yield rope("frequencies", r"rope_parameters: high_freq_factor 4\.0 is not supported", low_freq_factor=8.0)
    yield rope("positions", r"rope_parameters: original_max_position_embeddings 0 is not supported",
               original_max_position_embeddings=0)
    old = {k: v for k, v in single.items() if k != "rope_parameters"}
    yield case("rope_scaling-text", file + r'rope_scaling "linear" is not supported', compact({**old, "rope_scaling": "linear"}))


# --- tokenizer.json

def tokenizer_cases():
    good = json.loads(read(SINGLE, TOKENIZER))
    file = r"/tokenizer\.json: "

    def case(name, says, content):
        return Case(f"tokenizer/{name}", says, {TOKENIZER: content})

    def changed(name, says, **members):
        return case(name, file + says, compact({**good, **members}))

    def model(name, says, **members):
        return changed(name, says, model={**good["model"], **members})

    def vocab(name, says, **tokens):
        return model(name, says, vocab={**good["model"]["vocab"], **tokens})

    def added(name, says, **members):
        token = {"id": 300, "content": "<x>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
                 "special": True, **members}
        return changed(name, says, added_tokens=good["added_tokens"] + [token])

    yield case("empty", file + "not a JSON object", b"")
    yield case("sentencepiece", file + "not a JSON object", b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02")
    yield case("truncated", file + "not a JSON object", compact(good)[:-40])
    yield case("absent", r"cannot open .*/tokenizer\.json: No such file", None)
    yield case("folder", r"/tokenizer\.json is a folder", FOLDER)
    yield case("fifo", r"/tokenizer\.json is .*not a file", FIFO)
    yield changed("model-none", "a tokenizer of model null is not supported", model=None)
    yield model("model-wordpiece", r'a tokenizer of model "WordPiece" is not supported', type="WordPiece")
    yield model("model-wordlevel", r'a tokenizer of model "WordLevel" is not supported', type="WordLevel")
    yield model("model-number", r"a tokenizer of model 7 is not supported", type=7)
    yield model("dropout", r"dropout 0\.5 is not supported", dropout=0.5)
    yield model("suffix", r'end_of_word_suffix "</w>" is not supported', end_of_word_suffix="</w>")
    yield model("vocab-none", r"model\.vocab is missing", vocab=None)
    yield model("vocab-empty", r"model\.vocab is missing", vocab={})
    yield model("vocab-list", r"model\.vocab is missing", vocab=list(good["model"]["vocab"]))
    yield vocab("id-text", r'token "Ġold" has id "294"'.replace("Ġ", ".*"), **{"Ġold": "294"})
    yield vocab("id-fraction", r"token .*old.* has id 294\.5", **{"Ġold": 294.5})
    yield vocab("id-negative", r"token .*old.* has id -1", **{"Ġold": -1})
    yield vocab("id-2-24", r"token .*old.* has id 16777216", **{"Ġold": 1 << 24})
    yield vocab("id-2-32", r"token .*old.* has id 4294967296", **{"Ġold": 1 << 32})
    yield vocab("id-2-63", r"token .*old.* has id 9223372036854775808", **{"Ġold": 1 << 63})
    yield vocab("id-twice", r"token .* has id 295, which token .* has too", **{"Ġold": 295})
    yield vocab("byte-id-2-32", r"token .* has id 4294967296", **{"!": 1 << 32})
    some = {token: i for token, i in good["model"]["vocab"].items() if token != "A"}
    yield model("byte-missing", r"no token for byte 0x41", vocab=some)
    yield model("merges-none", r"model\.merges is missing", merges=None)
    yield model("merges-object", r"model\.merges is missing", merges={})
    for name, merge in (("unknown", ["qq", "zz"]), ("product", ["old", "hello"]), ("one", ["a"]), ("three", ["a", "b", "c"]),
                        ("number", 7), ("joined", "ab"), ("empty", ["", "a"]), ("null", None)):
        yield model(f"merge-{name}", r"merge .* is not a pair of tokens that make a token",
                    merges=good["model"]["merges"] + [merge])
    yield changed("normalizer", r'normalizer .*"Leetspeak".* is not supported', normalizer={"type": "Leetspeak"})
    yield changed("splitter", r'pre-tokenizer .*"Telepathy".* is not supported', pre_tokenizer={"type": "Telepathy"})
    yield changed("splitter-none", r"pre-tokenizer null .*is not supported", pre_tokenizer=None)
    yield changed("splitter-text", r'pre-tokenizer "ByteLevel" .*is not supported', pre_tokenizer="ByteLevel")
    yield changed("splitter-whitespace", r'pre-tokenizer .*"Whitespace".* is not supported',
                  pre_tokenizer={"type": "Sequence", "pretokenizers": [{"type": "Whitespace"}, good["pre_tokenizer"]]})
    deep = nested(DEEP, '{"type":"Digits"}', '{"type":"Sequence","pretokenizers":[', "]}")
    yield case("splitter-deep", file + "pre-tokenizer .* is not supported", with_raw(good, "pre_tokenizer", deep))

    def pattern(name, says, expression, **members):
        step = {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False, **members}
        return changed(f"pattern-{name}", says,
                       pre_tokenizer={"type": "Sequence", "pretokenizers": [step, {**good["pre_tokenizer"], "use_regex": False}]})

    yield pattern("open", r'pattern "\(a" is not supported: missing closing parenthesis', "(a")
    yield pattern("range", r'pattern "\[z-a\]" is not supported: range out of order', "[z-a]")
    yield pattern("count", r'pattern "a\{99999\}" is not supported: number too big', "a{99999}")
    yield pattern("property", r"pattern .* is not supported: unknown property", r"\p{Runic Scribble}")
    yield pattern("behind", r"pattern .* is not supported: lookbehind assertion is not fixed length", "(?<=a+)b")
    yield pattern("nested", r"pattern .* is not supported: parentheses are too deeply nested", "(" * 5000 + ")" * 5000)
    yield pattern("behavior", r'Split with behavior "Sideways" is not supported', "a", behavior="Sideways")
    yield changed("pattern-number", r"Split has pattern .*7", pre_tokenizer={
        "type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": 7}, "behavior": "Isolated", "invert": False}, good["pre_tokenizer"]]})
    yield changed("pattern-none", r"Split has pattern", pre_tokenizer={
        "type": "Sequence", "pretokenizers": [
            {"type": "Split", "behavior": "Isolated", "invert": False}, good["pre_tokenizer"]]})

    yield changed("added-object", "added_tokens is not a list", added_tokens={"<x>": 7})
    yield changed("added-text", r'added token "<x>" has no content or no id', added_tokens=["<x>"])
    yield added("added-no-id", r"added token .* has no content or no id", id=None)
    yield added("added-empty", r"added token .* has no content or no id", content="")
    yield added("added-number", r"added token .* has no content or no id", content=7)
    yield added("added-negative", r'token "<x>" has id -3', id=-3)
    yield added("added-2-40", rf'token "<x>" has id {1 << 40}', id=1 << 40)
    yield Case("tokenizer/added-beyond-model", r"token 300 ", {TOKENIZER: compact(
        {**good, "added_tokens": good["added_tokens"] + [{"id": 300, "content": "!", "normalized": False}]})})


# --- what eval is given

def text_cases():
    prose = "It was the best of times, it was the worst of times. ".encode() * 40

    def case(name, says, content):
        return Case(f"text/{name}", says, {"input": content}, command="text")

    yield case("empty", "input is empty", b"")
    yield case("short", r"input is too short: \d+ tokens with BOS, context 64 needs 65", b"Too short.")
    yield case("latin-1", r"input is not UTF-8: byte 0xe9 at offset 3", b"caf\xe9 au lait" + prose)
    yield case("utf-16", r"input is not UTF-8: byte 0xff at offset 0", prose.decode().encode("utf-16"))
    yield case("cut", rf"input is not UTF-8: byte 0xe2 at offset {len(prose)}", prose + b"\xe2\x82")
    yield case("continuation", r"input is not UTF-8: byte 0x80 at offset 0", b"\x80" + prose)
    yield case("overlong", r"input is not UTF-8: byte 0xc0 at offset 2", b"ab\xc0\xaf" + prose)
    yield case("overlong-three", r"input is not UTF-8: byte 0xe0 at offset 0", b"\xe0\x80\xaf" + prose)
    yield case("surrogate", r"input is not UTF-8: byte 0xed at offset 0", b"\xed\xa0\x80" + prose)
    yield case("beyond-unicode", r"input is not UTF-8: byte 0xf4 at offset 0", b"\xf4\x90\x80\x80" + prose)
    yield case("five-bytes", r"input is not UTF-8: byte 0xf8 at offset 0", b"\xf8\x88\x80\x80\x80" + prose)
    yield case("weights", r"input is not UTF-8: byte 0x\w\w at offset \d+", read(SINGLE, WEIGHTS))
    yield case("folder", "input is a folder", FOLDER)
    yield case("absent", "input: no such file", None)


def question_cases():
    good = {"context": "The cat sat. " * 5, "questions": [{"ask": " Who?", "answer": " A cat"}]}

    def case(name, says, content):
        return Case(f"questions/{name}", says, {"input": content}, command="questions")

    def line(name, says, value):
        return case(name, r"input, line 2: " + says, compact(good) + b"\n" + compact(value) + b"\n")

    yield case("empty", "input is empty", b"")
    yield case("blank", "input holds no questions", b"\n \n\t\r\n")
    yield case("no-utf8", r"input is not UTF-8: byte 0xff", b"\xff")
    yield case("not-json", "input, line 1: not JSON", b"What is a cat?\n")
    yield case("cut", "input, line 1: not JSON", compact(good)[:-1])
    yield case("two-lines", "input, line 1: not JSON", json.dumps(good, indent=1).encode())
    yield case("deep", "input, line 1: not JSON", b"[" * DEEP)
    yield case("deep-list", "input, line 1: array where an object is wanted", nested(DEEP))
    yield line("list", "array where an object is wanted", [good])
    yield line("context-none", 'no "context"', {"questions": good["questions"]})
    yield line("context-number", '"context" is number, a string is wanted', {**good, "context": 7})
    yield line("context-empty", '"context" is empty', {**good, "context": ""})
    yield line("questions-none", '"questions" is not a list', {"context": "a"})
    yield line("questions-empty", '"questions" is not a list of at least one', {**good, "questions": []})
    yield line("questions-text", '"questions" is not a list', {**good, "questions": "Who?"})
    yield line("question-text", "string where an object is wanted", {**good, "questions": ["Who?"]})
    yield line("ask-none", 'no "ask"', {**good, "questions": [{"answer": "a"}]})
    yield line("answer-none", 'no "answer"', {**good, "questions": [{"ask": "a"}]})
    yield line("answer-empty", '"answer" is empty', {**good, "questions": [{"ask": "a", "answer": ""}]})
    yield line("answer-list", '"answer" is array, a string is wanted', {**good, "questions": [{"ask": "a", "answer": ["b"]}]})
    yield case("too-long", r"needs \d+ positions, the model has 256", compact({**good, "context": "The cat sat. " * 200}))
    yield case("folder", "input is a folder", FOLDER)
    yield case("absent", "input: no such file", None)


def cases():
    for group in (safetensors_cases, index_cases, config_cases, tokenizer_cases, text_cases, question_cases):
        yield from group()
