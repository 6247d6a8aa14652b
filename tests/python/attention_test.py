import ctypes
import gc
import multiprocessing
import resource
import sys
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import thriftattn as ta
from reference import attention as reference

rng = np.random.default_rng(7)


def normal(*shape, dtype=np.float32):
    return rng.standard_normal(shape).astype(dtype)


def qkv(b=1, s_q=5, s_kv=200, h_q=4, h_kv=2, d=64, d_v=None):
    return normal(b, s_q, h_q, d), normal(b, s_kv, h_kv, d), normal(b, s_kv, h_kv, d_v or d)


@st.composite
def laid_out(draw, shape):
    """A tensor of this shape, in one of the layouts that share a contiguous last axis."""
    seeded, dtype = np.random.default_rng(draw(st.integers(0, 999))), draw(st.sampled_from([np.float32, np.float16]))
    b, s, h, d = shape
    layout = draw(st.sampled_from(["packed", "heads first", "every other", "backwards", "inside a larger one"]))
    lies = {
        "packed": shape,
        "heads first": (b, h, s, d),
        "every other": (b, 2 * s, h, d),
        "backwards": shape,
        "inside a larger one": (b + 1, s + 3, h + 1, d + 16),
    }
    tensor = seeded.standard_normal(lies[layout]).astype(dtype)
    view = {
        "packed": lambda t: t,
        "heads first": lambda t: t.transpose(0, 2, 1, 3),
        "every other": lambda t: t[:, ::2],
        "backwards": lambda t: t[:, ::-1],
        "inside a larger one": lambda t: t[1:, 3:, :-1, 16:],
    }[layout]
    return lambda place: view(place.put(tensor))


@st.composite
def problems(draw):
    b, h_kv, group = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 4))
    d, d_v = 16 * draw(st.integers(1, 9)), 16 * draw(st.integers(1, 9))
    s_q, s_kv = draw(st.integers(0, 80)), draw(st.sampled_from([0, 1, 2, 63, 64, 65, 127, 130, 200, 257]))
    sinks = lambda place: place.put(np.linspace(-2, 2, h_kv * group, dtype=np.float32))  # noqa: E731
    mask = {
        "causal": draw(st.booleans()),
        "window": draw(st.sampled_from([0, 1, 17, 64, 100])),
        "sm_scale": draw(st.sampled_from([None, 0.05, -0.2])),
        "softcap": draw(st.sampled_from([0.0, 2.0])),
        "sinks": draw(st.sampled_from([None, sinks])),
    }
    phase = "decode" if s_q <= ta.MAX_DECODE_ROWS and draw(st.booleans()) else "prefill"
    q = draw(laid_out((b, s_q, h_kv * group, d)))
    k = draw(laid_out((b, s_kv, h_kv, d)))
    v = draw(laid_out((b, s_kv, h_kv, d_v)))
    return q, k, v, mask, phase


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(problems())
def test_fp16_is_attention_whatever_the_shapes_strides_types_and_masks(place, problem):
    *laid, mask, phase = problem
    q, k, v = (x(place) for x in laid)
    mask = {**mask, "sinks": mask["sinks"] and mask["sinks"](place)}
    stored_k, stored_v = (place.get(x).astype(np.float16) for x in (k, v))  # what the method keeps, exactly
    on_host = {key: place.get(x) if key == "sinks" and x is not None else x for key, x in mask.items()}
    expected, expected_lse = reference(place.get(q), stored_k, stored_v, **on_host)
    out, lse = (place.get(x) for x in ta.attention(q, k, v, method="fp16", phase=phase, return_lse=True, **mask))
    assert out.dtype == q.dtype and out.shape == expected.shape and lse.dtype == np.float32
    tolerance = place.tolerance(1e-5 if q.dtype == np.float32 else 2e-3)
    np.testing.assert_allclose(out.astype(np.float64), expected, rtol=tolerance, atol=tolerance)
    tolerance = place.tolerance(1e-5)
    np.testing.assert_allclose(lse, expected_lse, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("method", ["thrift:storage=dual", "topk", "quest", "window"])
def test_promoting_all_pages_is_fp16(place, method, phase):
    q, k, v = map(place.put, qkv(s_q=4, s_kv=300))
    everything = method + (",budget=1" if ":" in method else ":budget=1")
    expected, out = (place.get(ta.attention(q, k, v, method=m, phase=phase)) for m in ("fp16", everything))
    np.testing.assert_allclose(out, expected, atol=place.tolerance(2e-4))


def test_promoted_pages_bring_back_what_fp4_loses(place):
    tensors = qkv(s_q=1, s_kv=4096)
    exact = reference(*tensors)[0]
    q, k, v = map(place.put, tensors)

    def loss(method):
        return np.abs(place.get(ta.attention(q, k, v, method=method, phase="decode")) - exact).max()

    assert loss("fp16") < loss("thrift:budget=0.5") < loss("fp4") < 0.05
    if place.on_gpu:
        with pytest.raises(NotImplementedError, match="arithmetic=mma4 has no CUDA kernel"):
            loss("paper-fp4")
    else:
        assert loss("paper-fp4") < 0.1


def test_a_given_selection_is_what_is_promoted(place):
    q, k, v = map(place.put, qkv(s_q=1, s_kv=640))
    _, stats = ta.attention(q, k, v, phase="decode", stats=True)
    _, same = ta.attention(q, k, v, phase="decode", given=stats.selection, stats=True)
    assert same.promoted == stats.promoted > 0
    np.testing.assert_array_equal(same.selection.pages, stats.selection.pages)
    chosen = ta.Selection([0, 2, 3], [1, 4, 7], [2, 2, 1])
    out, stats = ta.attention(q, k, v, phase="decode", given=chosen, stats=True)
    np.testing.assert_array_equal(stats.selection.offsets, [0, 2, 3])
    np.testing.assert_array_equal(stats.selection.pages, [1, 4, 7])
    np.testing.assert_array_equal(stats.selection.tiers, [2, 2, 1])
    assert np.isfinite(place.get(out)).all()


@pytest.mark.parametrize("phase,s_q", [("prefill", 70), ("decode", 5)])
def test_select_is_what_attention_promotes(place, phase, s_q):
    tensors = qkv(b=2, s_q=s_q, s_kv=640)
    _, stats = ta.attention(*tensors, phase=phase, stats=True)
    selection = ta.select(*map(place.put, tensors), phase=phase)
    np.testing.assert_array_equal(selection.pages, stats.selection.pages)
    np.testing.assert_array_equal(selection.offsets, stats.selection.offsets)
    q, k, v = map(place.put, tensors)
    if place.on_gpu and phase == "prefill":
        with pytest.raises(NotImplementedError, match="stats of a prefill"):
            ta.attention(q, k, v, stats=True)
    out = ta.attention(q, k, v, phase=phase)
    np.testing.assert_array_equal(place.get(ta.attention(q, k, v, phase=phase, given=selection)), place.get(out))


def test_stats_account_for_all_mass(place):
    q, k, v = map(place.put, qkv(b=2, s_q=3, s_kv=640))
    _, stats = ta.attention(q, k, v, phase="decode", stats=True)
    assert stats.page_mass.shape[:2] == (2, 2)
    np.testing.assert_allclose(stats.page_mass.sum(axis=-1), 1, rtol=1e-3)
    assert 0 < stats.mass_above_fp4 <= 1 and stats.wanted_not_stored == 0


def test_out_is_written_where_it_lies(place):
    q, k, v = map(place.put, qkv(b=2))
    larger = place.put(np.full((2, 5, 4, 96), np.nan, np.float32))
    out = larger[..., 32:]
    assert ta.attention(q, k, v, out=out) is out
    np.testing.assert_array_equal(place.get(out), place.get(ta.attention(q, k, v)))
    assert np.isnan(place.get(larger)[..., :32]).all()


@pytest.mark.parametrize("fmt,block", [("nvfp4", 16), ("mxfp4", 32)])
def test_quantize_keeps_what_the_format_can_say(place, fmt, block):
    grid = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    x = np.concatenate([grid, -grid, grid, -grid]).astype(np.float32)[None].repeat(3, 0) * np.float32([[1], [2], [0.25]])
    codes, scales = ta.quantize(place.put(x), format=fmt)
    assert codes.shape == (3, 16) and scales.shape == (3, 32 // block) and codes.dtype == scales.dtype == np.uint8
    np.testing.assert_array_equal(place.get(ta.dequantize(codes, scales, format=fmt)), x)
    assert codes[0, 1] == 2 | 3 << 4
    y = normal(4, 5, 64)

    def rounded(z):
        return place.get(ta.dequantize(*ta.quantize(z, format=fmt), format=fmt))

    twice = rounded(place.put(y).transpose(1, 0, 2)).transpose(1, 0, 2)
    np.testing.assert_array_equal(twice, rounded(place.put(y)))
    assert np.abs(twice - y).max() < np.abs(y).max() / 4
    assert ta.quantize(place.put(y[:0]))[0].shape == (0, 5, 32)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("words", [{}, {"scales": "4over6"}, {"format": "mxfp4"}], ids=str)
def test_codes_are_the_same_everywhere(place, words, dtype):
    x = (normal(7, 3, 96) * np.exp2(rng.integers(-20, 12, (7, 3, 1)))).astype(dtype)
    x[1, 1, 5], x[2, 0, 70], x[3, 2, 33], x[4] = np.nan, np.inf, -np.inf, 0
    expected = ta.quantize(x, **words)
    codes = ta.quantize(place.put(x), **words)
    for ours, theirs in zip(codes, expected):
        np.testing.assert_array_equal(place.get(ours), theirs)
    fmt = words.get("format", "nvfp4")
    back = place.get(ta.dequantize(*codes, format=fmt))
    np.testing.assert_array_equal(back, ta.dequantize(*expected, format=fmt))
    assert np.isnan(back[1, 1]).any() and not np.isnan(back[2:]).any()


def test_plan_says_what_would_run_or_why_nothing_would(place):
    shape = {"s_kv": 16384, "h_q": 32, "h_kv": 8, "d": 128, "device": place.device}
    plan = ta.plan("thrift", **shape)
    assert plan.backend == place.device.split(":")[0] and plan.kernel in str(plan)
    assert place.on_gpu or plan.threads == ta.threads()
    with pytest.raises(NotImplementedError, match="mma8"):
        ta.plan("thrift:arithmetic=mma8", **shape)


def test_method_options_feed_back():
    options = ta.method_options("thrift:budget=0.02")
    assert options["budget"] == "0.02"
    spec = "thrift:" + ",".join(f"{key}={value}" for key, value in options.items())
    assert ta.method_options(spec) == options


def on_device(array, device):
    """What DLPack shows of a tensor on another device."""

    class Elsewhere:
        def __dlpack__(self, **_):
            capsule = array.__dlpack__()
            get = ctypes.pythonapi.PyCapsule_GetPointer
            get.restype, get.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
            ctypes.cast(get(capsule, b"dltensor"), ctypes.POINTER(ctypes.c_int32))[2] = device
            return capsule

        def __dlpack_device__(self):
            return (device, 0)

    return Elsewhere()


@pytest.mark.skipif(bool(ta.gpus()), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_named():
    q, k, v = (on_device(x, 2) for x in qkv())
    with pytest.raises(ValueError, match="device cuda:0: .*(no CUDA backend|no GPU can be used)"):
        ta.attention(q, k, v)
    for make in (lambda: ta.KvCache("thrift", h_kv=2, d=64, device="cuda:0"),
                 lambda: ta.plan(s_kv=99, h_q=1, h_kv=1, d=64, device="cuda")):
        with pytest.raises(ValueError, match="device cuda:0: "):
            make()
    with pytest.raises(ValueError, match="device 'gpu' is not known"):
        ta.KvCache("thrift", h_kv=2, d=64, device="gpu")


def read_only(array):
    array = array.copy()
    array.flags.writeable = False
    return array


MISTAKES = {
    "not a tensor": (lambda q, k, v: ((q.tolist(), k, v), {}), TypeError, "q is a list"),
    "float64": (lambda q, k, v: ((q, k.astype(float), v), {}), TypeError, "k is of float64"),
    "integers": (lambda q, k, v: ((q, k, v.astype(np.int32)), {}), TypeError, "v is of int32"),
    "three axes": (lambda q, k, v: ((q[0], k, v), {}), ValueError, r"q is \[5, 4, 64\], expected \[b, s_q, h_q, d\]"),
    "gaps": (lambda q, k, v: ((q, k[..., ::2], v), {}), ValueError, "k: the last axis is not contiguous"),
    "batches": (lambda q, k, v: ((q, k[:1], v), {}), ValueError, "q and k differ in b: 2 and 1"),
    "lengths": (lambda q, k, v: ((q, k, v[:, :9]), {}), ValueError, "k and v differ in s_kv: 200 and 9"),
    "channels": (lambda q, k, v: ((q[..., :48], k, v), {}), ValueError, "q and k differ in d: 48 and 64"),
    "group": (lambda q, k, v: ((q[:, :, :3], k, v), {}), ValueError, "h_q 3 is not a multiple of h_kv 2"),
    "head size": (lambda q, k, v: ((q[..., :20], k[..., :20], v), {}), ValueError, "20 is not supported"),
    "rows": (lambda q, k, v: ((np.repeat(q, 4, 1), k, v), {"phase": "decode"}), ValueError, "max_s_q 20"),
    "devices": (lambda q, k, v: ((on_device(q, 2), k, v), {}), ValueError, "q is on cuda:0, k on cpu"),
    "device": (lambda q, k, v: ((on_device(q, 10), k, v), {}), ValueError, "q is on DLPack device 10:0"),
    "stream": (lambda q, k, v: ((q, k, v), {"stream": 7}), ValueError, "stream: the tensors are on the CPU"),
    "NaN": (lambda q, k, v: ((q, k * np.float32(np.nan), v), {}), ValueError, "k"),
    "range": (lambda q, k, v: ((q, k, v * np.float32(1e6)), {}), ValueError, "v"),
    "method": (lambda q, k, v: ((q, k, v), {"method": "thirft"}), ValueError, "'thirft' is not known: fp16, fp4"),
    "option": (lambda q, k, v: ((q, k, v), {"method": "thrift:bugdet=1"}), ValueError, "bugdet"),
    "phase": (lambda q, k, v: ((q, k, v), {"phase": "verify"}), ValueError, "phase 'verify' is not known"),
    "window": (lambda q, k, v: ((q, k, v), {"window": -1}), ValueError, "window -1"),
    "sinks' type": (lambda q, k, v: ((q, k, v), {"sinks": np.zeros(4)}), TypeError, "sinks is of float64"),
    "sinks' heads": (lambda q, k, v: ((q, k, v), {"sinks": normal(3)}), ValueError, "sinks has 3 heads, q has 4"),
    "out's shape": (lambda q, k, v: ((q, k, v), {"out": q[:1]}), ValueError, "out is "),
    "out is read-only": (lambda q, k, v: ((q, k, v), {"out": read_only(q)}), ValueError, "out is read-only"),
    "out overlaps": (
        lambda q, k, v: ((q, k, v), {"out": np.lib.stride_tricks.as_strided(q, q.shape, (1280, 256, 256, 4))}),
        ValueError,
        "out: strides",
    ),
    "sm_scale": (lambda q, k, v: ((q, k, v), {"sm_scale": 0.0}), ValueError, "sm_scale is 0"),
    "selection's offsets": (
        lambda q, k, v: ((q, k, v), {"given": ta.Selection([2, 0] + [0] * 7, [0, 1], [3, 3])}),
        ValueError,
        r"given selection, block 0: pages \[2, 0\)",
    ),
    "selection": (
        lambda q, k, v: ((q, k, v), {"given": ta.Selection([0, 1], [99], [3])}),
        ValueError,
        "given selection",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named(mistake):
    make, error, words = MISTAKES[mistake]
    args, kwargs = make(*qkv(b=2))
    with pytest.raises(error, match=words):
        ta.attention(*args, **kwargs)


def test_read_only_inputs_are_read():
    q, k, v = qkv()
    np.testing.assert_array_equal(ta.attention(*map(read_only, (q, k, v))), ta.attention(q, k, v))


def test_ten_thousand_calls_leak_nothing():
    q, k, v = qkv(s_q=1, s_kv=70)
    bad = q.astype(np.float64)

    def calls(n):
        for _ in range(n):
            ta.attention(q, k, v, phase="decode", return_lse=True, stats=True)
            with pytest.raises(TypeError):
                ta.attention(bad, k, v)
        gc.collect()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    before = calls(2000)
    counts = [sys.getrefcount(x) for x in (q, k, v, bad)]
    after = calls(8000)
    assert [sys.getrefcount(x) for x in (q, k, v, bad)] == counts
    assert after - before < 4096, f"{after - before} KiB more after 8000 calls"


def test_threads_take_turns_and_results_do_not_depend_on_how_many_there_are():
    q, k, v = qkv(s_q=130, s_kv=700)
    results = {}
    for n in (1, 3):
        ta.set_threads(n)
        assert ta.threads() == n
        results[n] = ta.attention(q, k, v)
    np.testing.assert_array_equal(results[1], results[3])
    outs = [None] * 4

    def work(i):
        outs[i] = ta.attention(q, k, v)

    callers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in callers:
        t.start()
    for t in callers:
        t.join()
    for out in outs:
        np.testing.assert_array_equal(out, results[1])
    ta.set_threads(0)


def in_child(queue, tensors):
    queue.put(ta.attention(*tensors))


def test_a_forked_child_has_a_pool_of_its_own():
    tensors = qkv(s_q=130, s_kv=700)
    ta.set_threads(2)
    expected = ta.attention(*tensors)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=in_child, args=(queue, tensors))
    child.start()
    np.testing.assert_array_equal(queue.get(timeout=60), expected)
    child.join(60)
    ta.set_threads(0)
