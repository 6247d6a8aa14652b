"""thriftattn.hf against Transformers' own attention. THRIFTATTN_TEST_MODELS names more checkpoints, folders with ':'."""

import copy
import json
import os
import random
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.24")

import thriftattn.hf as hf  # noqa: E402
from thriftattn import KvCache  # noqa: E402

ROOT = Path(__file__).parents[2]
TINY = sorted((ROOT / "tests" / "data").glob("tiny-*"))
MODELS = [ROOT / "models" / "pocket-8m"] + [Path(p) for p in os.environ.get("THRIFTATTN_TEST_MODELS", "").split(":") if p]
POCKET = MODELS[0]
PAD = 2
NEAR = 0.02  # best logits that a 16-bit cache may exchange
loaded = {}
torch.set_num_threads(1)  # for models this small a second thread waits more than it computes


def load(path, device="cpu"):
    if (path, device) not in loaded:
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval().to(device)
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(path / "tokenizer.json"))
        loaded[path, device] = model, tokenizer
    model, tokenizer = loaded[path, device]
    return hf.disable(model), tokenizer


def prompts(tokenizer, lengths):
    """Stretches of the project's own prose, each after BOS."""
    ids = tokenizer((ROOT / "docs" / "design.md").read_text(), add_special_tokens=False)["input_ids"]
    starts = [97 * n % (len(ids) - n) for n in lengths]
    return [torch.tensor([[0] + ids[start : start + n - 1]]) for start, n in zip(starts, lengths)]


def left_padded(rows):
    width = max(row.shape[1] for row in rows)
    ids = torch.full((len(rows), width), PAD)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, width - row.shape[1] :] = row[0]
        mask[i, width - row.shape[1] :] = 1
    return {"input_ids": ids, "attention_mask": mask}


def generate(model, inputs, tokens=64, **options):
    options = {"do_sample": False, "max_new_tokens": tokens, "pad_token_id": PAD, "eos_token_id": None, **options}
    if torch.is_tensor(inputs):
        inputs = {"input_ids": inputs, "attention_mask": torch.ones_like(inputs)}
    inputs = {name: x.to(model.device) for name, x in inputs.items()}
    return model.generate(**inputs, return_dict_in_generate=True, output_logits=True, **options)


def parting(ours, theirs, row=0):
    """The step at which two greedy continuations part, or None; where they do, two logits must have been near."""
    new = len(theirs.logits)
    a, b = (out.sequences[row, -new:] for out in (ours, theirs))
    if torch.equal(a, b):
        return None
    step = int((a != b).nonzero()[0])
    best = theirs.logits[step][row].topk(2).values
    assert best[0] - best[1] < NEAR, f"row {row} parts at step {step}, where the best logits differ by {best[0] - best[1]}"
    return step


@pytest.mark.parametrize("path", MODELS, ids=lambda p: p.name)
def test_greedy_fp16_is_sdpa_token_for_token(device, path, capsys):
    model, tokenizer = load(path, device)
    rows = prompts(tokenizer, [2 * i * i + 1 for i in range(1, 21)])  # 3 to 801
    batch = left_padded(rows)
    theirs = [generate(model, row) for row in rows]
    theirs_batch = generate(model, batch)
    hf.enable(model, "fp16")
    parted = [parting(generate(model, row), out) for row, out in zip(rows, theirs)]
    ours_batch = generate(model, batch)
    parted += [parting(ours_batch, theirs_batch, i) for i in range(len(rows))]
    with capsys.disabled():
        print(f"\n{path.name} on {device}: {sum(p is not None for p in parted)} of {len(parted)} continuations part at near logits")
    assert sum(p is not None for p in parted) <= 4


@pytest.mark.parametrize("folder", TINY, ids=lambda p: p.name)
def test_every_family_in_prefill_and_decode(device, folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    model.eval().to(device)
    tokens = torch.tensor([json.loads((folder / "golden.json").read_text())["tokens"][:140]], device=device)
    with torch.no_grad():
        expected = model(tokens).logits
        hf.enable(model, "fp16")
        cache = hf.ThriftCache(model)
        parts = [model(part, cache=cache).logits for part in tokens.split([97, 20, 16, 1, 1, 1, 1, 1, 1, 1], dim=1)]
    assert (torch.cat(parts, 1) - expected).abs().max() < (8e-3 if device == "cpu" else 1.6e-2)  # q and p in 16 bit
    assert hf.disable(model).config._attn_implementation == "eager"


def test_methods_differ_by_what_they_store_and_agree_on_what_is_clear(device):
    model, tokenizer = load(POCKET, device)
    row = prompts(tokenizer, [1501])[0].to(device)
    with torch.no_grad():
        exact = model(row).logits[0, -1].log_softmax(0)
        stored = {}
        for method in ("fp16", "thrift", "fp4"):
            hf.enable(model, method)
            cache = hf.ThriftCache(model)
            for part in row[:, :-1].split(128, 1):  # what a step brings stays in 16 bit until it ends
                model(part, cache=cache)
            loss = (exact.exp() * (exact - model(row[:, -1:], cache=cache).logits[0, -1].log_softmax(0))).sum()
            assert loss < 0.1, (method, loss)
            stored[method] = cache.bytes().total
            assert cache.kv.length(cache.sequences[0]) == cache.get_seq_length() == 1501
    assert stored["fp16"] > stored["thrift"] > stored["fp4"]


def test_stats_say_what_the_last_step_did(device):
    model, tokenizer = load(POCKET, device)
    (row,) = prompts(tokenizer, [1001])
    hf.enable(model, "thrift", stats=True)
    cache = hf.ThriftCache(model)
    generate(model, row, 3, cache=cache)
    assert len(cache.stats) == model.config.num_hidden_layers
    for (stats,) in cache.stats:
        assert stats.pairs == 4 * 15 and 0 < stats.mass_above_fp4 <= 1
        assert stats.promoted == 2 * len(stats.selection.pages)  # two query heads share a KV head's


def test_beam_search_scores(device):
    model, tokenizer = load(POCKET, device)
    batch = left_padded(prompts(tokenizer, [61, 130]))
    theirs = generate(model, batch, 32, num_beams=4, output_scores=True)
    hf.enable(model, "fp16")
    ours = generate(model, batch, 32, num_beams=4, output_scores=True)
    assert (ours.sequences_scores - theirs.sequences_scores).abs().max() < 0.01
    hf.enable(model, "thrift")
    assert generate(model, batch, 32, num_beams=4).sequences.shape[0] == 2


def test_sampling_is_reproducible_in_a_batch(device):
    model, tokenizer = load(POCKET, device)
    batch = left_padded(prompts(tokenizer, [33, 257]))
    hf.enable(model, "thrift")
    outs = []
    for _ in range(2):
        torch.manual_seed(5)
        outs.append(generate(model, batch, 24, do_sample=True, num_return_sequences=2, top_p=0.9).sequences)
    assert torch.equal(*outs) and outs[0].shape[0] == 4


def test_assisted_decoding_is_greedy(device):
    model, tokenizer = load(POCKET, device)
    assistant = copy.deepcopy(model)
    (row,) = prompts(tokenizer, [333])
    greedy = generate(model, row)
    hf.enable(model, "fp16")
    parting(generate(model, row, assistant_model=assistant), greedy)
    parting(generate(model, row, prompt_lookup_num_tokens=7), greedy)
    hf.enable(assistant, "thrift")
    parting(generate(model, row, assistant_model=assistant), greedy)


@pytest.mark.parametrize("chunk", [7, 64, 100])
def test_chunked_prefill_is_prefill(device, chunk):
    model, tokenizer = load(POCKET, device)
    batch = left_padded(prompts(tokenizer, [150, 301]))
    theirs = generate(model, batch, 16)
    hf.enable(model, "fp16")
    ours = generate(model, batch, 16, prefill_chunk_size=chunk)
    for i in range(2):
        parting(ours, theirs, i)


def test_a_cache_serves_several_turns_and_copies(device):
    model, tokenizer = load(POCKET, device)
    first, more = prompts(tokenizer, [200, 51])
    hf.enable(model, "fp16")
    cache = hf.ThriftCache(model)
    said = generate(model, first, 20, cache=cache).sequences
    assert cache.get_seq_length() == 219
    second = torch.cat([said, more.to(device)], 1)
    fork = copy.deepcopy(cache)
    assert fork.bytes().total < 2 * 219 * 8192 * 1.3 or device != "cpu"  # two tails, one set of full pages
    turns = [generate(model, second, 20, cache=c) for c in (cache, fork)]
    assert torch.equal(turns[0].sequences, turns[1].sequences)
    hf.disable(model)
    parting(turns[0], generate(model, second, 20))
    with pytest.raises(ValueError, match="enable"):
        generate(model, second, 1, cache=fork)


def test_without_a_cache_every_pass_stands_alone(device):
    model, tokenizer = load(POCKET, device)
    row = prompts(tokenizer, [100])[0].to(device)
    theirs = generate(model, row, 5)
    hf.enable(model, "fp16")
    parting(generate(model, row, 5, use_cache=False), theirs)
    with torch.no_grad():
        assert model(row, use_cache=False).cache is None
        assert not any(isinstance(x, hf.ThriftCache) for x in model(row, use_cache=False, return_dict=False))
        assert isinstance(model(row).cache, hf.ThriftCache)


def test_rows_can_be_chosen_and_cropped(device):
    model, tokenizer = load(POCKET, device)
    batch = left_padded(prompts(tokenizer, [40, 90, 131]))
    hf.enable(model, "fp16")
    with torch.no_grad():
        cache = hf.ThriftCache(model)
        model(**{name: x.to(device) for name, x in batch.items()}, cache=cache)
        cache.crop(-5)
        assert cache.get_seq_length() == 126 and [cache.kv.length(s) for s in cache.sequences] == [35, 85, 126]
        cache.batch_select_indices(torch.tensor([2, 0, 2]))
        cache.batch_repeat_interleave(2)
        assert [cache.kv.length(s) for s in cache.sequences] == [126, 126, 35, 35, 126, 126]
        with pytest.raises(ValueError, match="cannot be removed"):
            cache.crop(-127)
        kv = cache.kv
        cache.reset()
        assert cache.get_seq_length() == 0 and kv.bytes().total == 0


def test_rows_that_cannot_be_cropped_leave_the_others_as_they_are():
    model, tokenizer = load(POCKET)
    batch = left_padded(prompts(tokenizer, [900, 880]))
    hf.enable(model, "thrift")
    with torch.no_grad():
        cache = hf.ThriftCache(model)
        model(**batch, cache=cache)
        before, used = [cache.kv.length(s) for s in cache.sequences], cache.kv.bytes().total
        with pytest.raises(NotImplementedError):
            cache.crop(-260)  # the first row could be cut, the second one not
        assert [cache.kv.length(s) for s in cache.sequences] == before
        assert cache.get_seq_length() == 900 and cache.kv.bytes().total == used


def test_a_pass_that_ended_early_does_not_go_on_unseen(monkeypatch):
    model, tokenizer = load(POCKET)
    (row,) = prompts(tokenizer, [120])
    hf.enable(model, "fp16")
    with torch.no_grad():
        cache, whole = hf.ThriftCache(model), hf.ThriftCache(model)
        model(row[:, :110], cache=cache)
        attend, calls = KvCache.attend, []

        def interrupted(*args, **kwargs):
            calls.append(kwargs["layer"])
            if kwargs["layer"] == 2:
                raise KeyboardInterrupt
            return attend(*args, **kwargs)

        monkeypatch.setattr(KvCache, "attend", interrupted)
        with pytest.raises(KeyboardInterrupt):
            model(row[:, 110:], cache=cache)
        monkeypatch.undo()
        with pytest.raises(ValueError, match="ended early"):
            model(row[:, 110:], cache=cache)
        cache.crop(0)
        assert cache.get_seq_length() == 110
        model(row[:, :110], cache=whole)
        torch.testing.assert_close(model(row[:, 110:], cache=cache).logits, model(row[:, 110:], cache=whole).logits)


def test_what_cannot_be_served_raises_with_the_reason(caplog):
    model, tokenizer = load(POCKET)
    (row,) = prompts(tokenizer, [40])
    with pytest.raises(ValueError, match="'thirft' is not known"):
        hf.enable(model, "thirft")
    with pytest.raises(ValueError, match="enable"):
        hf.ThriftCache(model)
    hf.enable(model, "thrift")
    with pytest.raises(TypeError, match=r"no gradient: call the model under torch.no_grad\(\)"):
        model(row)
    with torch.no_grad():
        with pytest.raises(ValueError, match="several sequences in a row"):
            model(row, position_ids=torch.arange(20).repeat(1, 2))
        with pytest.raises(ValueError, match="DynamicCache"):
            model(row, cache=transformers.DynamicCache())
        with pytest.raises(NotImplementedError, match="padding is supported on the left"):
            model(row, attention_mask=torch.tensor([[1] * 30 + [0] * 10]))
        with pytest.raises(NotImplementedError, match="masks of one's own"):
            model(row, attention_mask=torch.ones(1, 1, 40, 40, dtype=torch.bool))
        with pytest.raises(ValueError, match="static"):
            generate(model, row, 1, cache_implementation="static")
        cache = hf.ThriftCache(model)
        model(row, cache=cache)
        with pytest.raises(ValueError, match="the batch has 2 rows, the cache 1"):
            model(row[:, :1].repeat(2, 1), cache=cache)
        with pytest.raises(ValueError, match="left padding"):
            model(row[:, :1], cache=cache, attention_mask=torch.tensor([[0] * 5 + [1] * 36]))
        model(row[:, :1], cache=cache)  # what was refused has changed nothing
    with pytest.raises(ValueError, match="dtype 'float15' is not known"):
        hf.enable(model, "thrift", dtype="float15")
    config = transformers.T5Config(d_model=16, d_kv=16, d_ff=16, num_layers=1, num_heads=1, vocab_size=32)
    seq2seq = transformers.T5ForConditionalGeneration(config)
    with pytest.raises(NotImplementedError, match="encoder"):
        hf.enable(seq2seq, "thrift")
    hf.enable(seq2seq, "thrift", fallback="sdpa")
    assert "left on sdpa" in caplog.text and "encoder" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("path", MODELS, ids=lambda p: p.name)
def test_fifty_needles_at_16k(device, path, capsys):
    """One context of 16384 tokens holds 50 numbers; each is asked for over a copy of the cache."""
    model, tokenizer = load(path, device)
    seeded = random.Random(16)
    keys = [f"{a}-{b}" for a in "winter hollow golden quiet proud".split() for b in
            "river lantern harbor pencil meadow engine falcon garden hammer island".split()]
    numbers = {key: str(seeded.randrange(10**6, 10**7)) for key in keys}

    def encode(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    needles = [encode(f" One of the special magic numbers for {key} is: {numbers[key]}.") for key in keys]
    noise = encode(" The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.")
    head = [0] + encode("Some special magic numbers are hidden within the following text. Make sure to memorize it. "
                        "I will quiz you about the numbers afterwards.\n")
    fill = 16384 - len(head) - sum(map(len, needles))
    hay, places = (noise * (fill // len(noise) + 1))[:fill], sorted(seeded.randrange(fill) for _ in keys)
    seeded.shuffle(needles)
    context, last = head, 0
    for place, needle in zip(places, needles):
        context, last = context + hay[last:place] + needle, place
    context = torch.tensor([context + hay[last:]], device=device)
    found = {}
    for method in ("fp16", "thrift"):
        hf.enable(model, method)
        cache = hf.ThriftCache(model)
        with torch.no_grad():
            model(context, cache=cache, logits_to_keep=1)
        found[method] = 0
        for key in keys:
            ask = encode(f"\nWhat is the special magic number for {key} mentioned in the provided text? The special magic "
                         f"number for {key} mentioned in the provided text is")
            out = generate(model, torch.cat([context, torch.tensor([ask], device=device)], 1), 12, cache=copy.deepcopy(cache))
            found[method] += numbers[key] in tokenizer.decode(out.sequences[0, -12:])
    with capsys.disabled():
        print(f"\n{path.name} on {device}: {found} of {len(keys)} needles")
    assert abs(found["thrift"] - found["fp16"]) <= 1 and found["fp16"] >= 40
