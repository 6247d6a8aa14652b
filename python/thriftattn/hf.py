"""thriftattn under a Transformers model: one line, and `generate()` goes on as before::

    model = AutoModelForCausalLM.from_pretrained(...)
    thriftattn.hf.enable(model, "thrift:budget=0.05")
    model.generate(**inputs)

How it hangs together. `enable` gives the model an attention function and a mask function of Transformers' registries,
and has every forward pass run over a `ThriftCache`, which `generate()` is given in place of a DynamicCache. The model's
layer calls `cache.update(k, v)`, which only marks k; the attention function finds the mark, appends k and v to the
sequences and attends. Each row of a batch is a sequence of its own, which begins after the row's left padding: padding
is neither stored nor seen. A page is quantised once, when it is full.

The cache is where the model is, in the CPU's memory or on a GPU. There `generate()` reads a prompt in chunks, because
a cache keeps room in 16 bit for the tokens of its largest step.
"""

from __future__ import annotations

import functools
import logging
import types

import torch
import transformers
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, CacheLayerMixin

from . import MAX_DECODE_ROWS, KvCache, MemoryUse, Stats, gpus, method_options

if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 24):
    # Before, models take their cache by another name, and leave out what they do not know.
    raise ImportError(f"thriftattn.hf needs transformers 5.24 or later, and this is {transformers.__version__}")

__all__ = ["ThriftCache", "disable", "enable"]

NAME = "thriftattn"  # in Transformers' registries
PREFILL_CHUNK = 1024  # tokens of a row that generate() reads at a time on a GPU, unless it is told otherwise
logger = logging.getLogger(__name__)


def enable(
    model, method: str = "thrift", *, dtype: str = "float16", stats: bool = False, fallback: str | None = None
):
    """Has a model attend by `method` from now on.

    Calls that cannot be served (masks other than causal ones with left padding, another cache, attention weights as an
    output, dropout) raise ValueError or NotImplementedError with the reason.

    Args:
        model: An AutoModelForCausalLM in the CPU's memory or on one GPU.
        method: "name[:key=value,...]", as everywhere.
        dtype: The 16-bit form of keys and values: "float16" refuses values beyond 65504, "bfloat16" takes them, on the
            CPU alone.
        stats: Keep what the last step did in ThriftCache.stats, at some cost; on a GPU of steps of up to 16 tokens.
        fallback: "sdpa" leaves a model that cannot be served as it is, and logs why; None raises.

    Returns:
        The model.

    Raises:
        NotImplementedError: The model cannot be served; the message has the reason.
    """
    if fallback not in (None, "sdpa"):
        raise ValueError(f"fallback {fallback!r} is not known: None and 'sdpa' are")
    if dtype not in ("float16", "bfloat16"):
        raise ValueError(f"dtype {dtype!r} is not known: 'float16' and 'bfloat16' are")
    method_options(method)  # a mistake in it is the caller's, whatever the model
    reason = _why_not(model)
    if reason and fallback:
        logger.warning("thriftattn: %s: left on sdpa", reason)
        return model
    if reason:
        raise NotImplementedError(f"thriftattn: {reason}")
    disable(model)
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    decoder = model.base_model
    hooks = (
        decoder.register_forward_pre_hook(_give_cache, with_kwargs=True),
        decoder.register_forward_hook(_take_cache),
    )
    decoder._thriftattn = types.SimpleNamespace(method=method, dtype=dtype, stats=stats, before=before, hooks=hooks)
    model._prepare_cache_for_generation = functools.partial(_prepare_cache_for_generation, model)
    return model


def disable(model):
    """Puts back what `enable` changed; returns the model."""
    state = model.base_model.__dict__.pop("_thriftattn", None)
    if state:
        for hook in state.hooks:
            hook.remove()
        del model._prepare_cache_for_generation
        model.set_attn_implementation(state.before)
    return model


class ThriftCache(Cache):
    """The keys and values of a batch, in a `KvCache`. `generate()` makes one; make one to keep it over several turns::

        cache = ThriftCache(model)
        model.generate(**first, cache=cache)
        model.generate(**second, cache=cache)  # reads only what is new

    copy.deepcopy() of it shares full pages, so that one prompt may be continued in several ways.

    Args:
        model: One that is enabled.
        max_tokens: Of a row: room to begin with on a GPU, where a cache that must grow is copied; 0: a little.
    """

    def __init__(self, model, *, max_tokens: int = 0):
        state = getattr(model.base_model, "_thriftattn", None)
        if state is None:
            raise ValueError("the model is not enabled: call thriftattn.hf.enable(model, method) first")
        self.for_one_pass = False  # made by a forward pass for itself
        self.store = _Store(state.method, model.config, state.dtype, state.stats)
        self.store.max_tokens = max_tokens
        super().__init__(layers=[_Layer(self.store, i) for i in range(len(self.store.columns))])

    @property
    def kv(self) -> KvCache | None:
        """The cache itself; None before the first step."""
        return self.store.kv

    @property
    def sequences(self) -> list[int]:
        """The sequence in it of each row of the batch."""
        return list(self.store.seqs)

    @property
    def stats(self) -> list[list[Stats]]:
        """What the last step did, by layer: one Stats for all rows, or one each where padding was among its columns.
        Empty without enable(stats=True), and on a GPU after a prefill."""
        return self.store.stats

    def bytes(self) -> MemoryUse | None:
        """Bytes in use, as KvCache.bytes() says them; None before the first step."""
        return self.kv and self.kv.bytes()

    def crop(self, tokens_to_remove: int) -> None:
        self.store.crop(-tokens_to_remove)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.store.select(beam_idx.tolist())

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if indices.dtype == torch.bool:
            indices = indices.nonzero().flatten()
        self.store.select(indices.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.store.select([i for i in range(len(self.store.seqs)) for _ in range(repeats)])

    def reset(self) -> None:
        self.store.clear()

    def __deepcopy__(self, memo) -> ThriftCache:
        copy = object.__new__(ThriftCache)
        copy.__dict__.update(self.__dict__)
        copy.store = self.store.copy()
        copy.layers = [_Layer(copy.store, i) for i in range(len(self.layers))]
        return copy


class _Layer(CacheLayerMixin):
    """What Transformers asks of one layer of a cache."""

    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def __init__(self, store: _Store, index: int):
        super().__init__()
        self.store, self.index = store, index

    def lazy_initialization(self, key_states, value_states):
        pass

    def update(self, key_states, value_states, *args, **kwargs):
        if self.store.config._attn_implementation != NAME:
            raise ValueError("a ThriftCache serves models under thriftattn.hf.enable() alone")
        key_states._thriftattn = (self.store, self.index)
        return key_states, value_states

    def get_seq_length(self) -> int:
        return self.store.columns[self.index]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1


class _Store:
    """The rows of a batch as sequences of a KvCache. A column is a position of the batch, padding included."""

    def __init__(self, method: str, config, dtype: str, keep_stats: bool):
        self.method, self.config, self.dtype, self.keep_stats = method, config, dtype, keep_stats
        self.kv: KvCache | None = None
        self.on_cpu = True
        self.seqs: list[int] = []
        self.padding: list[int] = []  # columns before each row's first token
        self.columns = [0] * config.num_hidden_layers  # that each layer has seen
        self.under_way = False  # a forward pass, in which layers differ
        self.max_tokens = 0  # of a row, for which a cache on a GPU has room when it begins
        self.stats: list[list[Stats]] = [[] for _ in self.columns] if keep_stats else []

    def step(self, layer: int, q, k, v, padding: list[int] | None, form: dict) -> torch.Tensor:
        """Appends k [b, s, h_kv, d] and v [b, s, h_kv, d_v] and gives the attention of q [b, s, h_q, d] over all."""
        b, s = q.shape[:2]
        padding = padding or [0] * b
        if self.kv is None:
            shape = {"h_kv": k.shape[2], "d": k.shape[3], "d_v": v.shape[3], "layers": len(self.columns)}
            room = {"max_sequences": b, "max_tokens": self.max_tokens, "max_step": s}
            self.kv = _with_memory(
                k.device, KvCache, self.method, dtype=self.dtype, device=str(k.device), **shape, **room
            )
            self.on_cpu = k.device.type == "cpu"
        if not self.seqs:
            self.seqs = [self.kv.new_sequence() for _ in range(b)]
        elif len(self.seqs) != b:
            raise ValueError(f"the batch has {b} rows, the cache {len(self.seqs)}")
        if layer == 0 and self.under_way:
            raise ValueError("a forward pass over this cache ended early: begin with a new one, or crop(0) this one")
        past = self.columns[layer]
        if any(new != old for new, old in zip(padding, self.padding) if min(new, old) < past):
            raise ValueError(f"the left padding is {padding}, and was {self.padding} when the cache began")
        self.padding = padding
        self.under_way = True  # what is refused above changes nothing
        first = [max(0, p - past) for p in padding]  # column of the step at which each row begins
        form["phase"] = "decode" if past and s <= MAX_DECODE_ROWS else "prefill"
        keep_stats = self.keep_stats and (q.device.type == "cpu" or form["phase"] == "decode")
        form.update(layer=layer, stats=keep_stats)
        if any(first):
            out, done = q.new_zeros(*q.shape[:3], v.shape[3]), []
            for i, (seq, column) in enumerate(zip(self.seqs, first)):
                rows = slice(i, i + 1), slice(column, None)
                _with_memory(k.device, self.kv.append, [seq], k[rows], v[rows], layer=layer)
                done.append(self.kv.attend([seq], q[rows], out=out[rows], **form))
        else:
            _with_memory(k.device, self.kv.append, self.seqs, k, v, layer=layer)
            done = [self.kv.attend(self.seqs, q, **form)]
            out = done[0][0] if keep_stats else done[0]
        if self.keep_stats:
            self.stats[layer] = [stats for _, stats in done] if keep_stats else []
        self.columns[layer] += s
        self.under_way = layer < len(self.columns) - 1
        if not self.under_way and s > MAX_DECODE_ROWS:
            self.kv.check()  # now and then: a GPU is waited for
        return out

    def crop(self, columns: int) -> None:
        if columns < 0 or columns > min(self.columns):
            raise ValueError(f"{columns} tokens cannot be removed from {min(self.columns)}")
        if not columns and not self.under_way:
            return
        lengths = [max(0, self.kv.length(seq) - columns) for seq in self.seqs]  # of the layer that holds the least
        # A row that cannot be cut is to leave the others as they are. A cache on a GPU has no room for forks of its rows.
        forks = len(self.seqs) > 1 and self.on_cpu and not self.under_way
        seqs = []
        try:
            for seq, length in zip(self.seqs, lengths):
                seqs.append(self.kv.fork(seq) if forks else seq)
                self.kv.truncate(seqs[-1], length)
        except Exception:
            for seq in set(seqs) - set(self.seqs):
                self.kv.free(seq)
            raise
        for seq in set(self.seqs) - set(seqs):
            self.kv.free(seq)
        self.seqs = seqs
        self.columns = [min(self.columns) - columns] * len(self.columns)
        self.under_way = False

    def select(self, rows: list[int]) -> None:
        """Row i becomes what row rows[i] was."""
        left = list(self.seqs)
        seqs = []
        for i in rows:  # the first who wants a sequence takes it, the others fork it
            seqs.append(self.seqs[i] if left[i] is not None else self.kv.fork(self.seqs[i]))
            left[i] = None
        for seq in left:
            if seq is not None:
                self.kv.free(seq)
        self.seqs = seqs
        self.padding = [self.padding[i] for i in rows]

    def copy(self) -> _Store:
        copy = _Store(self.method, self.config, self.dtype, self.keep_stats)
        copy.max_tokens = self.max_tokens
        copy.kv, copy.padding, copy.columns = self.kv, list(self.padding), list(self.columns)
        copy.on_cpu, copy.under_way = self.on_cpu, self.under_way
        copy.seqs = [self.kv.fork(seq) for seq in self.seqs]
        return copy

    def clear(self) -> None:
        for seq in self.seqs:
            self.kv.free(seq)
        self.seqs, self.padding, self.columns = [], [], [0] * len(self.columns)
        self.under_way = False

    __del__ = clear  # a copy may share the KvCache


def _with_memory(device, call, /, *args, **kwargs):
    """The call, once more where a GPU has no memory left and PyTorch has given back what it only keeps."""
    try:
        return call(*args, **kwargs)
    except MemoryError:
        if device.type == "cpu":
            raise
        torch.cuda.empty_cache()
        return call(*args, **kwargs)


def _why_not(model) -> str | None:
    """Why a model cannot be served; None where it can."""
    config = model.config.get_text_config(decoder=True)
    if getattr(model.config, "is_encoder_decoder", False):
        return f"{type(model).__name__} has an encoder: decoders alone are supported"
    if config is not model.config:
        return f"{type(model).__name__} has parts beside a text decoder: text decoders alone are supported"
    if not getattr(config, "is_causal", True):
        return "attention in both directions is not supported"
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"]) - {"full_attention", "sliding_attention"}
    if kinds:
        return f"layers of {', '.join(sorted(kinds))} are not supported: full_attention and sliding_attention are"
    if getattr(config, "attention_chunk_size", None) or getattr(config, "kv_sharing_modes", None):
        return "attention in chunks, or over the keys of another layer, is not supported"
    if not model._supports_attention_backend or not model._can_set_attn_implementation():
        return f"{type(model).__name__} does not take its attention from Transformers' attention interface"
    devices = sorted({str(p.device) for p in model.parameters()})
    if len(devices) > 1:
        return f"parameters are on {', '.join(devices)}: models on one device are supported"
    if devices[0] != "cpu" and not devices[0].startswith("cuda"):
        return f"parameters are on {devices[0]}: models in the CPU's memory and on NVIDIA GPUs are supported"
    if devices[0] != "cpu" and not gpus():
        return f"parameters are on {devices[0]}: this build of thriftattn serves no GPU"
    return None


def _give_cache(decoder, args, kwargs):
    """Before every forward pass: its cache is ours."""
    cache = next((kwargs[name] for name in ("cache", "past_key_values") if kwargs.get(name) is not None), None)
    if cache is None:
        positions = kwargs.get("position_ids")
        if positions is not None and kwargs.get("attention_mask") is None and positions.dim() == 2:
            if (positions.diff(dim=1) != 1).any():
                raise ValueError("position_ids do not ascend by 1: several sequences in a row are not supported")
        kwargs["cache"] = ThriftCache(decoder)
        use_cache = kwargs.get("use_cache")
        kwargs["cache"].for_one_pass = not (decoder.config.use_cache if use_cache is None else use_cache)
    elif not isinstance(cache, ThriftCache):
        raise ValueError(f"the model's cache is a {type(cache).__name__}: pass a thriftattn.hf.ThriftCache, or none")
    return args, kwargs


def _take_cache(decoder, args, output):
    """After a forward pass without use_cache: the cache that served it does not show."""
    if isinstance(output, tuple):
        return tuple(x for x in output if not (isinstance(x, ThriftCache) and x.for_one_pass))
    if getattr(output, "cache", None) is not None and output.cache.for_one_pass:
        return type(output)(**{key: value for key, value in output.items() if key != "cache"})
    return output


def _prepare_cache_for_generation(
    model, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
):
    """generate()'s own, with a ThriftCache for a DynamicCache."""
    if generation_config.cache_implementation not in (None, "dynamic"):
        raise ValueError(f"cache_implementation={generation_config.cache_implementation!r}: thriftattn brings its own")
    generation_config.cache_implementation = None
    if model_kwargs.get("cache") is None and generation_config.use_cache is not False:
        model_kwargs["cache"] = ThriftCache(model, max_tokens=max_cache_length)
    by_ids = model_kwargs.get("cache") is not None and model_kwargs.get("inputs_embeds") is None
    if model.device.type == "cuda" and generation_config.prefill_chunk_size is None and by_ids:
        generation_config.prefill_chunk_size = PREFILL_CHUNK
    return type(model)._prepare_cache_for_generation(
        model, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    )


def _mask(batch_size, q_length, kv_length, attention_mask=None, use_vmap=False, allow_is_causal_skip=False, **kwargs):
    """Left padding by row, on the CPU, or None where there is none; the rest of a causal mask needs no tensor."""
    if use_vmap or not allow_is_causal_skip:
        raise NotImplementedError(
            "thriftattn: causal masks with left padding are supported, not packed sequences, blocks or masks of one's own"
        )
    if attention_mask is None or attention_mask.all():
        return None
    seen = attention_mask[:, :kv_length].bool()
    if (seen[:, :-1] & ~seen[:, 1:]).any():
        raise NotImplementedError("thriftattn: the attention mask has zeros after a one: padding is supported on the left")
    return seen.logical_not().sum(dim=1).cpu()  # once for all layers


def _attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """The attention function: query [b, h_q, s, d], new keys and values [b, h_kv, s, ...] -> [b, s, h_q, d_v]."""
    mark = getattr(key, "_thriftattn", None)
    if mark is None:
        raise NotImplementedError(f"thriftattn: {type(module).__name__} attends to keys that no ThriftCache has seen")
    if dropout:
        raise NotImplementedError(f"thriftattn: dropout {dropout} is not supported: call model.eval()")
    if kwargs.get("output_attentions") or kwargs.get("position_bias") is not None:
        raise NotImplementedError("thriftattn: attention weights as an output, and position biases, are not supported")
    if attention_mask is not None and attention_mask.ndim != 1:
        raise NotImplementedError("thriftattn: masks of one's own are not supported")
    if query.requires_grad or key.requires_grad or value.requires_grad:
        raise TypeError("thriftattn: attention has no gradient: call the model under torch.no_grad()")
    sinks = kwargs.get("s_aux")
    form = {
        "sm_scale": scaling,
        "window": kwargs.get("sliding_window") or 0,
        "softcap": kwargs.get("softcap") or 0.0,
        "sinks": None if sinks is None else sinks.detach().float(),
        # A model that is run in BF16 asks for products in it.
        "compute": "bfloat16" if query.dtype == torch.bfloat16 else "float32",
    }
    store, layer = mark
    padding = None if attention_mask is None else attention_mask.tolist()
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return store.step(layer, q, k, v, padding, form), None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)
