#!/usr/bin/env python3
"""thriftattn beside what else attends on a CPU: PyTorch's SDPA and ONNX Runtime's GroupQueryAttention.

    pip install numpy torch onnxruntime onnx
    python3 bench/peers_cpu.py --phase decode --s-kv 16384 131072 --method fp4 thrift --json peers.json

All see the same shapes with as many threads in the same run, in turn, round after round (ours, peer, peer, ours, ...),
because machines have slow and fast phases of minutes: a ratio is taken within a round, and its median over the rounds
is what is reported. Every repetition reads another copy of the caches, which together are at least four times the
last-level cache. Every peer is checked against attention in double precision before it is timed, and so is ours by
`thriftattn bench attention`.

PyTorch: BF16, FP16 and F32, in the fastest of the forms that a caller can choose: enable_gqa=True; in decode the query
heads of a group as rows over their KV head ("packed"); in prefill K and V repeated for all query heads beforehand
("repeated"). ONNX Runtime: one node, past and present in one buffer (by IO binding), so that nothing is copied; FP32,
FP16, and INT8 and INT4 caches, these with scales by channel or by tensor and queries in FP32 or FP16, whichever is the
fastest. What the installed version refuses is printed and left out.
"""
import glob
import math
import os
import statistics
import time

import peers as common
from peers import Refused, finish, positive, say

PACKAGES = {"torch": ("numpy", "torch"), "ort": ("numpy", "onnxruntime", "onnx")}
LIMITS = {"f32": 1e-3, "fp32": 1e-3, "fp16": 1e-2, "bf16": 5e-2, "int8": 0.1, "int4": 0.5}  # relative error
LIMIT_TO = {"AVX2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}}
SECONDS = 3  # of one peer in one round: what takes longer is repeated less often


def parse(arguments):
    parser = common.Parser(__doc__, peers=("torch", "ort"), s_kv=16384, methods=["fp16", "fp4", "thrift"])
    parser.add_argument("--target", help="instruction set of thriftattn; default the best")
    parser.add_argument("--peers-target", choices=("AVX2",),
                        help="hold PyTorch, with oneDNN and MKL below it, to these instructions too, as on a processor "
                             "that has no more; ONNX Runtime knows no such limit")
    parser.add_argument("--compute", choices=("f32", "bf16"), default="f32",
                        help="what thriftattn may round a prefill's factors to; PyTorch's BF16 rounds them too")
    parser.add_argument("--threads", type=positive, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--reps", type=positive, default=5, help="repetitions in one round")
    o = parser.parse(arguments)
    if o.peers_target:
        if o.peers != ["torch"]:
            raise Refused(f"--peers-target {o.peers_target} holds PyTorch alone: --peers torch")
        if o.target != o.peers_target:
            raise Refused(f"--peers-target {o.peers_target} goes with --target {o.peers_target}: shares of the peak refer "
                          "to products of these instructions")
        # Read when these libraries are loaded, by thriftattn too, whose oneDNN measures that peak.
        os.environ.update(LIMIT_TO[o.peers_target])
    return o


def load(name, package):
    try:
        return __import__(name)
    except ImportError as error:
        needed = " ".join(PACKAGES[package])
        raise Refused(f"--peers {package} needs {name}, which cannot be imported ({error}): pip install {needed}")


def last_level_cache():
    sizes = [0]
    for path in glob.glob("/sys/devices/system/cpu/cpu0/cache/index*/size"):
        with open(path, encoding="ascii") as f:
            text = f.read().strip()
        sizes.append(int(text[:-1]) * {"K": 1 << 10, "M": 1 << 20}[text[-1]])
    return max(sizes) or 32 << 20


class Shape(common.Shape):
    def bytes(self, per_element):
        """What must be read: K and V once, and q; out is written."""
        return (2 * self.batch * self.h_kv * self.s_kv * self.d * per_element
                + 2 * 4 * self.batch * self.h_q * self.s_q * self.d)


class Inputs:
    """K and V [b, h_kv, s_kv, d], q [b, h_q, s_q, d]; a query leans towards one key, so that rows are peaked."""

    def __init__(self, shape):
        import numpy as np
        s = self.shape = shape
        random = np.random.default_rng(1)
        self.k, self.v = (random.standard_normal((s.batch, s.h_kv, s.s_kv, s.d), dtype=np.float32) for _ in range(2))
        self.q = random.standard_normal((s.batch, s.h_q, s.s_q, s.d), dtype=np.float32)
        target = random.integers(0, s.s_kv - s.s_q + 1, s.h_q)
        for h in range(s.h_q):
            self.q[:, h] += self.k[:, h // s.group, target[h]][:, None]
        self.rows = sorted({0, s.s_q // 2, s.s_q - 1})  # those that are checked
        self.want = np.stack([self.reference(r) for r in self.rows], axis=2)

    def reference(self, row):
        import numpy as np
        s = self.shape
        seen = s.s_kv - s.s_q + row + 1
        out = np.empty((s.batch, s.h_q, s.d))
        for b in range(s.batch):
            for g in range(s.h_kv):
                heads = slice(g * s.group, (g + 1) * s.group)
                scores = self.q[b, heads, row] @ self.k[b, g, :seen].T / math.sqrt(s.d)
                weights = np.exp((scores - scores.max(axis=-1, keepdims=True)).astype(np.float64))
                out[b, heads] = (weights @ self.v[b, g, :seen]) / weights.sum(axis=-1, keepdims=True)
        return out

    def error(self, out):
        import numpy as np
        found = np.asarray(out, dtype=np.float64)[:, :, self.rows]
        return float(np.linalg.norm(found - self.want) / np.linalg.norm(self.want))


def timed(call):
    begin = time.perf_counter()
    out = call()
    return (time.perf_counter() - begin) * 1e3, out


class Peer:
    """`calls`: one per copy of the cache. `result`: what the last call computed, [b, h_q, s_q, d] in float32."""

    def __init__(self, name, target, inputs, calls, result, per_element, form=None):
        self.name, self.target, self.form, self.calls = name, target, form, calls
        self.shape, self.per_element = inputs.shape, per_element
        self.turn, self.rounds = 0, []
        self.first_ms, out = timed(calls[0])
        self.rel_err = inputs.error(result(out))
        limit = LIMITS[name.rsplit("-", 1)[-1]]
        if not self.rel_err <= limit:
            raise RuntimeError(f"its result is wrong: relative error {self.rel_err:.2e}, at most {limit} is right")

    def run(self, reps):
        times, begin = [], time.perf_counter()
        for rep in range(reps + 1):
            ms, _ = timed(self.calls[self.turn % len(self.calls)])
            self.turn += 1
            if rep:  # the first one wakes threads
                times.append(ms)
            if rep and time.perf_counter() - begin > SECONDS:
                break
        return times

    def probe(self):
        """About what a call takes."""
        return self.first_ms if self.first_ms > 1000 else min(self.run(2))

    def round(self, reps):
        self.rounds.append(self.run(reps))

    def row(self, o, machine):
        s = self.shape
        layers = len(self.calls)
        return finish({**s.fields(), "method": self.name, "form": self.form, "target": self.target, "threads": o.threads},
                      self.rounds, s.bytes(self.per_element), s.flops, machine, rate,
                      {"rel_err": self.rel_err, "layers": layers,
                       "cold": layers * s.bytes(self.per_element) >= 4 * last_level_cache()})


def rate(flops, ms, machine):
    return {"pct_of_matrix_peak": 100 * flops / ms / 1e6 / machine["matrix_gflops"]}


def copies(shape, per_element):
    """So many that they hold four times the last-level cache together."""
    return math.ceil(4 * last_level_cache() / (2 * shape.batch * shape.h_kv * shape.s_kv * shape.d * per_element))


def torch_peers(o, inputs):
    import numpy as np
    import torch
    import torch.nn.functional as F
    torch.set_num_threads(o.threads)
    s = inputs.shape
    mask = {}
    if s.s_q == s.s_kv and s.s_q > 1:
        mask = {"is_causal": True}
    elif s.s_q > 1:  # is_causal puts the first row over the first key; here the last one stands over the last key
        mask = {"attn_mask": torch.ones(s.s_q, s.s_kv, dtype=torch.bool).tril(s.s_kv - s.s_q)}

    def held(x, dtype):
        """A copy in NumPy's memory, which asks the system for huge pages as PyTorch's own does not."""
        out = torch.from_numpy(np.empty(x.numel() * dtype.itemsize, np.uint8)).view(dtype).view(x.shape)
        return out.copy_(x)

    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("f32", torch.float32)):
        size = dtype.itemsize
        q = torch.from_numpy(inputs.q).to(dtype)
        base = [torch.from_numpy(x) for x in (inputs.k, inputs.v)]
        caches = [[x if i == 0 and x.dtype == dtype else held(x, dtype) for x in base] for i in range(copies(s, size))]
        forms = {"enable_gqa": (q, caches, {"enable_gqa": True, **mask})}
        if s.phase == "decode":
            forms["packed"] = (q.view(s.batch, s.h_kv, s.group, s.d), caches, {})
        elif s.group > 1:
            many = copies(s, size * s.group)
            repeated = [[held(x.repeat_interleave(s.group, dim=1), dtype) for x in cache] for cache in caches[:many]]
            forms["repeated"] = (q, repeated, mask)
        best = None
        for form, (rows, kv, options) in forms.items():
            calls = [lambda k=k, v=v, rows=rows, options=options: F.scaled_dot_product_attention(rows, k, v, **options)
                     for k, v in kv]
            try:
                with torch.inference_mode():
                    peer = Peer(f"torch-sdpa-{name}", torch.backends.cpu.get_cpu_capability(), inputs, calls,
                                lambda out: out.float().reshape(s.batch, s.h_q, s.s_q, s.d).numpy(), size, form)
                    few = peer.probe()
            except RuntimeError as error:
                say(f"torch-sdpa-{name}, {form}: left out, torch {torch.__version__} refuses it: {first_line(error)}")
                continue
            say(f"torch-sdpa-{name}, {form}: {few:.2f} ms")
            if best is None or few < best[0]:
                best = (few, peer)
        if best:
            yield best[1]


def first_line(error):
    return str(error).strip().splitlines()[0][:300]


def quantise(x, bits, mode):
    """Codes and their F32 scales: [1, h_kv, 1, d] by channel, [1] by tensor."""
    import numpy as np
    top = 2 ** (bits - 1) - 1
    largest = np.maximum(x.max(axis=(0, 2), keepdims=True), -x.min(axis=(0, 2), keepdims=True))
    scale = (largest if mode == "PER_CHANNEL" else np.full_like(largest, largest.max())) / top
    out = np.empty(x.shape if bits == 8 else (*x.shape[:-1], x.shape[-1] // 2), np.int8 if bits == 8 else np.uint8)
    for b in range(x.shape[0]):
        for h in range(x.shape[1]):  # by head, so that no second copy in F32 is held
            codes = np.clip(np.rint(x[b, h] / scale[0, h]), -top - 1, top).astype(np.int8)
            out[b, h] = codes if bits == 8 else (codes[:, 0::2] + 8) | (codes[:, 1::2] + 8) << 4
    return out, scale if mode == "PER_CHANNEL" else scale.reshape(-1)[:1].copy()


def gqa_model(shape, element, cache, bits, mode):
    """One GroupQueryAttention node: the cache in, s_q new tokens, the cache with them out."""
    import onnx
    from onnx import TensorProto as T, helper
    names = ["query", "key", "value", "past_key", "past_value", "seqlens_k", "total_sequence_length"]
    attributes = {"num_heads": shape.h_q, "kv_num_heads": shape.h_kv}
    optional = []
    if bits:
        names += [""] * 5 + ["k_scale", "v_scale"]  # cos, sin, positions, bias, sinks
        attributes |= {"k_quant_type": mode, "v_quant_type": mode, "kv_cache_bit_width": bits}
        scales = [1, shape.h_kv, 1, shape.d] if mode == "PER_CHANNEL" else [1]
        optional = [helper.make_tensor_value_info(n, T.FLOAT, scales) for n in names[-2:]]
    node = helper.make_node("GroupQueryAttention", names, ["output", "present_key", "present_value"],
                            domain="com.microsoft", **attributes)
    rows = [shape.batch, shape.s_q]
    held = [shape.batch, shape.h_kv, shape.s_kv, shape.d // 2 if bits == 4 else shape.d]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [node], "gqa",
        [value("query", element, [*rows, shape.h_q * shape.d]), value("key", element, [*rows, shape.h_kv * shape.d]),
         value("value", element, [*rows, shape.h_kv * shape.d]), value("past_key", cache, held),
         value("past_value", cache, held), value("seqlens_k", T.INT32, [shape.batch]),
         value("total_sequence_length", T.INT32, [1]), *optional],
        [value("output", element, [*rows, shape.h_q * shape.d]), value("present_key", cache, held),
         value("present_value", cache, held)])
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


def ort_peer(o, inputs, name, dtype, cache_type, bits, mode):
    import numpy as np
    import onnxruntime as ort
    from onnx import TensorProto as T
    s = inputs.shape
    size = bits / 8 if bits else np.dtype(dtype).itemsize
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = o.threads, 1
    # Threads that spin after a call would take the processors from whoever is timed next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    model = gqa_model(s, T.FLOAT16 if dtype == np.float16 else T.FLOAT, cache_type, bits, mode)
    session = ort.InferenceSession(model, options, ["CPUExecutionProvider"])

    def tokens(x):  # [b, h, s_kv, d] -> [b, s_q, h d], the last s_q tokens
        last = x[:, :, -s.s_q:].transpose(0, 2, 1, 3)
        return np.ascontiguousarray(last.reshape(s.batch, s.s_q, -1).astype(dtype))

    feeds = {"query": tokens(inputs.q), "key": tokens(inputs.k), "value": tokens(inputs.v),
             "seqlens_k": np.full(s.batch, s.s_kv - 1, np.int32), "total_sequence_length": np.array([s.s_kv], np.int32)}
    if bits:
        k, feeds["k_scale"] = quantise(inputs.k, bits, mode)
        v, feeds["v_scale"] = quantise(inputs.v, bits, mode)
    else:
        k, v = (x.astype(dtype, copy=False) for x in (inputs.k, inputs.v))
    fixed = {n: ort.OrtValue.ortvalue_from_numpy(x) for n, x in feeds.items()}
    out = ort.OrtValue.ortvalue_from_numpy(np.zeros((s.batch, s.s_q, s.h_q * s.d), dtype))
    bindings = []
    for copy in range(copies(s, size)):
        binding = session.io_binding()
        for n, x in fixed.items():
            binding.bind_ortvalue_input(n, x)
        binding.bind_ortvalue_output("output", out)
        for n, x in (("key", k), ("value", v)):
            held = ort.OrtValue.ortvalue_from_numpy(x if copy == 0 else x.copy())
            binding.bind_ortvalue_input(f"past_{n}", held)
            binding.bind_ortvalue_output(f"present_{n}", held)
        bindings.append(binding)

    def result(_):
        return out.numpy().astype(np.float32).reshape(s.batch, s.s_q, s.h_q, s.d).transpose(0, 2, 1, 3)

    form = f"{np.dtype(dtype).name}, {mode.lower()}" if bits else None
    return Peer(name, "mlas", inputs, [lambda b=b: session.run_with_iobinding(b) for b in bindings], result, size, form)


def ort_peers(o, inputs):
    import numpy as np
    import onnxruntime as ort
    from onnx import TensorProto as T
    ort.set_default_logger_severity(4)  # a refusal is printed once, by us
    quantised = [(dtype, mode) for dtype in (np.float32, np.float16) for mode in ("PER_CHANNEL", "PER_TENSOR")]
    for name, cache_type, bits, forms in (("fp32", T.FLOAT, 0, [(np.float32, "NONE")]),
                                          ("fp16", T.FLOAT16, 0, [(np.float16, "NONE")]),
                                          ("int8", T.INT8, 8, quantised), ("int4", T.UINT8, 4, quantised)):
        name, best = f"ort-gqa-{name}", None
        for dtype, mode in forms:
            form = f"{np.dtype(dtype).name}, {mode.lower()}" if bits else "one node"
            try:
                peer = ort_peer(o, inputs, name, dtype, cache_type, bits, mode)
                few = peer.probe()
            except Exception as error:  # onnxruntime's exceptions share no class of their own
                say(f"{name}, {form}: left out, onnxruntime {ort.__version__} refuses it: {first_line(error)}")
                continue
            say(f"{name}, {form}: {few:.2f} ms")
            if best is None or few < best[0]:
                best = (few, peer)
        if best:
            yield best[1]


def spread(values):
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def bench(o, s_kv, machines):
    """All rounds of one length: rows, ratios."""
    shape = Shape(o, s_kv)
    peers = []
    if o.peers != ["none"]:
        say(f"{s_kv} tokens: preparing the peers")
        inputs = Inputs(shape)
        peers = [peer for name in ("torch", "ort") if name in o.peers
                 for peer in {"torch": torch_peers, "ort": ort_peers}[name](o, inputs)]
    mine = []
    for i in range(o.rounds):
        say(f"{s_kv} tokens: round {i + 1} of {o.rounds}")
        machine, rows = common.ours(o, shape, "--threads", o.threads, *(["--target", o.target] if o.target else []),
                                    "--compute", o.compute)
        machines.append(machine)
        mine.append(rows)
        for peer in peers:
            peer.round(o.reps)
    machine = {key: statistics.mean(m[key] for m in machines) for key in ("read_gb_per_s", "matrix_gflops")}
    rows = common.own_rows(mine, (*shape.fields(), "method", "target", "threads"), machine, rate)
    others = [peer.row(o, machine) for peer in peers]
    return rows + others, common.compare(rows, others, ("s_q", "s_kv"))


def table(rows):
    lines = [("method", "form", "s_q", "s_kv", "ms", "min", "max", "MB", "GB/s", "% of read", "% of matrix", "rel err")]
    for r in rows:
        lines.append((r["method"] + ("" if r["cold"] else " *"), r.get("form") or "", str(r["s_q"]), str(r["s_kv"]),
                      f"{r['ms_median']:.3f}", f"{r['ms_min']:.3f}", f"{r['ms_max']:.3f}", f"{r['bytes'] / 1e6:.1f}",
                      f"{r['gb_per_s']:.1f}", f"{r['pct_of_read_bandwidth']:.1f}", f"{r['pct_of_matrix_peak']:.1f}",
                      f"{r['rel_err']:.1e}"))
    return common.columns(lines)


def main(arguments):
    o = parse(arguments)
    versions = {name: getattr(load(name, peer), "__version__", "") for peer in o.peers if peer != "none"
                for name in PACKAGES[peer]}
    rows, ratios, machines = [], [], []
    for s_kv in o.s_kv:
        found, compared = bench(o, s_kv, machines)
        rows += found
        ratios += compared
    machine = {**machines[-1], **versions}
    for key in ("read_gb_per_s", "matrix_gflops"):
        machine[key] = statistics.mean(m[key] for m in machines)
        machine[f"{key}_samples"] = [m[key] for m in machines]
    print(f"{o.phase}, batch {o.batch}, {o.h_q} query and {o.h_kv} KV heads of {o.d}; {o.threads} threads on "
          f"{machine['cpu']}; {', '.join(f'{n} {v}' for n, v in versions.items())}")
    print(f"reading {spread(machine['read_gb_per_s_samples'])} GB/s, F32 products "
          f"{spread(machine['matrix_gflops_samples'])} GFLOP/s\n")
    print(table(rows))
    print(f"\nms: median of {o.rounds} rounds of {o.reps} repetitions; rel err: to attention in double")
    if not all(row["cold"] for row in rows):
        print("* the caches it rotates over are not four times the last-level cache: parts of them stay in it")
    common.print_ratios(ratios)
    common.write(o, machine, rows, ratios)


if __name__ == "__main__":
    common.run(main)
