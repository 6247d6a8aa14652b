#!/usr/bin/env python3
"""thriftattn beside what else attends on an NVIDIA GPU: PyTorch's SDPA, by cuDNN and by FlashAttention.

    pip install torch
    python3 bench/peers_gpu.py --phase decode --s-kv 32768 131072 --method fp16 fp4 thrift --json peers.json

All see the same shapes in the same run, in turn, round after round: a ratio is taken within a round, and its median over
the rounds is what is reported. A measurement is a CUDA graph of calls, each over another copy of the cache; the copies
hold more than four times the L2 cache together. Every peer is checked against attention in double precision before it
is timed, and so is ours by `thriftattn bench attention`. Clocks and power are those that nvidia-smi shows meanwhile.

PyTorch in FP16, in each form that a caller can choose: enable_gqa=True and, in decode, the query heads of a group as
rows over their KV head ("packed"). What the installed version refuses is printed and left out.
"""
import math
import statistics
import subprocess
import threading

import peers as common
from peers import Refused, finish, positive, say

LIMIT = 1e-2  # relative error of an FP16 peer
GRAPH_MS = 10  # a graph holds so many calls that it lasts about this long


def parse(arguments):
    parser = common.Parser(__doc__, peers=("cudnn", "flash"), s_kv=131072,
                           methods=["fp16", "fp4", "thrift", "thrift:policy=block_mean"])
    parser.add_argument("--device", type=int, default=0, help="index of the GPU")
    parser.add_argument("--reps", type=positive, default=5, help="graphs in one round")
    return parser.parse(arguments)


class Watch:
    """Clocks and power while it is entered, as nvidia-smi shows them."""
    FIELDS = ("clocks.sm", "clocks.mem", "power.draw")

    def __init__(self, device):
        self.command = ["nvidia-smi", "-i", str(device), "--query-gpu=" + ",".join(self.FIELDS),
                        "--format=csv,noheader,nounits", "-lms", "100"]
        self.samples = []

    def __enter__(self):
        self.process = subprocess.Popen(self.command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        self.reader = threading.Thread(target=self.read)
        self.reader.start()
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.reader.join()
        self.process.wait()

    def read(self):
        for line in self.process.stdout:
            try:
                self.samples.append([float(x) for x in line.split(",")])
            except ValueError:  # a field that this GPU does not show
                continue

    def summary(self):
        return {name: {"min": min(values), "median": statistics.median(values), "max": max(values)}
                for name, values in zip(self.FIELDS, zip(*self.samples))}


class Shape(common.Shape):
    def __init__(self, o, s_kv):
        super().__init__(o, s_kv)
        self.cache_bytes = 2 * o.batch * o.h_kv * s_kv * o.d * 2
        self.bytes = self.cache_bytes + 2 * 2 * o.batch * o.h_q * self.s_q * o.d


def reference(torch, q, k, v, shape):
    """Attention in double of some rows of the first and the last sequence, as (index, row) pairs."""
    found = []
    for b in sorted({0, shape.batch - 1}):
        for row in sorted({0, shape.s_q // 2, shape.s_q - 1}):
            seen = shape.s_kv - shape.s_q + row + 1
            for h in sorted({0, shape.h_q // 2 + 1, shape.h_q - 1}):
                keys, values = (x[b, h // shape.group, :seen].double() for x in (k, v))
                weights = torch.softmax(keys @ q[b, h, row].double() / math.sqrt(shape.d), 0)
                found.append(((b, h, row), weights @ values))
    return found


class Peer:
    """`calls`: one per copy of the cache, each returns [b, h_q, s_q, d]."""

    def __init__(self, torch, name, form, shape, calls, want):
        self.torch, self.name, self.form, self.shape = torch, name, form, shape
        self.rounds, self.copies = [], len(calls)
        out = calls[0]()
        error = sum(float((out[at].double() - row).square().sum()) for at, row in want)
        self.rel_err = math.sqrt(error / sum(float(row.square().sum()) for _, row in want))
        if not self.rel_err <= LIMIT:
            raise RuntimeError(f"its result is wrong: relative error {self.rel_err:.2e}, at most {LIMIT} is right")
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for call in (calls * 3)[:3]:
                call()
            stream.synchronize()
            one = self.milliseconds(lambda: calls[0]())
            self.per_graph = max(1, round(GRAPH_MS / one / len(calls))) * len(calls)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            for i in range(self.per_graph):
                calls[i % len(calls)]()

    def milliseconds(self, work):
        begin, end = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    def run(self, reps):
        self.graph.replay()
        return [self.milliseconds(self.graph.replay) / self.per_graph for _ in range(reps)]

    def round(self, reps):
        self.rounds.append(self.run(reps))

    def row(self, machine):
        s = self.shape
        return finish({**s.fields(), "method": self.name, "form": self.form}, self.rounds, s.bytes, s.flops, machine, rate,
                      {"rel_err": self.rel_err, "layers": self.copies,
                       "cold": self.copies * s.cache_bytes >= 4 * machine["l2_bytes"]})


def rate(flops, ms, _):
    return {"tflop_per_s": flops / ms / 1e9}


def torch_peers(o, shape, l2_bytes):
    import torch
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.attention.bias import causal_lower_right
    torch.cuda.set_device(o.device)
    torch.manual_seed(1)
    s = shape
    copies = math.ceil(4 * l2_bytes / s.cache_bytes)
    half = {"dtype": torch.float16, "device": "cuda"}
    caches = [tuple(torch.randn(s.batch, s.h_kv, s.s_kv, s.d, **half) for _ in range(2))]
    caches += [tuple(x.clone() for x in caches[0]) for _ in range(copies - 1)]
    k, v = caches[0]
    target = torch.randint(0, s.s_kv - s.s_q + 1, (s.h_q,))
    q = torch.randn(s.batch, s.h_q, s.s_q, s.d, **half)
    for h in range(s.h_q):  # a query leans towards one key, so that rows are peaked
        q[:, h] += k[:, h // s.group, target[h]][:, None]
    want = reference(torch, q, k, v, s)
    mask = {}
    if s.s_q == s.s_kv and s.s_q > 1:
        mask = {"is_causal": True}
    elif s.s_q > 1:
        mask = {"attn_mask": causal_lower_right(s.s_q, s.s_kv)}
    forms = {"enable_gqa": (q, {"enable_gqa": True, **mask})}
    if s.phase == "decode":
        forms["packed"] = (q.view(s.batch, s.h_kv, s.group, s.d), {})
    for name, backend in (("cudnn", SDPBackend.CUDNN_ATTENTION), ("flash", SDPBackend.FLASH_ATTENTION)):
        if name not in o.peers:
            continue
        best = None
        for form, (rows, options) in forms.items():
            def call(cache, rows=rows, options=options):
                with sdpa_kernel(backend):
                    out = F.scaled_dot_product_attention(rows, *cache, **options)
                return out.reshape(s.batch, s.h_q, s.s_q, s.d)
            try:
                with torch.inference_mode():
                    peer = Peer(torch, f"torch-{name}-fp16", form, s, [lambda c=c, f=call: f(c) for c in caches], want)
                    few = min(peer.run(2))
            except RuntimeError as error:
                reason = str(error).strip().splitlines()[0][:300]
                say(f"torch-{name}-fp16, {form}: left out, torch {torch.__version__} refuses it: {reason}")
                continue
            say(f"torch-{name}-fp16, {form}: {1e3 * few:.1f} us")
            if best is None or few < best[0]:
                best = (few, peer)
        if best:
            yield best[1]


def bench(o, s_kv, machines):
    """All rounds of one length: rows, ratios."""
    shape = Shape(o, s_kv)
    mine, peers = [], None
    for i in range(o.rounds):
        say(f"{s_kv} tokens: round {i + 1} of {o.rounds}")
        machine, rows = common.ours(o, shape, "--device", f"cuda:{o.device}")
        machines.append(machine)
        mine.append(rows)
        if peers is None:
            peers = [] if o.peers == ["none"] else list(torch_peers(o, shape, machine["l2_bytes"]))
        for peer in peers:
            peer.round(o.reps)
    machine = {**machines[-1], "read_gb_per_s": max(m["read_gb_per_s"] for m in machines)}
    rows = common.own_rows(mine, (*shape.fields(), "method", "kernel", "target"), machine, rate,
                           medians=("ms_single", "ms_given"))
    others = [peer.row(machine) for peer in peers]
    return rows + others, common.compare(rows, others, ("s_q", "s_kv", "batch"))


def table(rows):
    lines = [("method", "form", "s_q", "s_kv", "us", "min", "max", "single", "given", "MB", "GB/s", "% of read",
              "TFLOP/s", "rel err")]
    for r in rows:
        us = [f"{1e3 * r[key]:.1f}" if key in r else "" for key in ("ms_median", "ms_min", "ms_max", "ms_single", "ms_given")]
        lines.append((r["method"] + ("" if r["cold"] else " *"), r.get("form") or r.get("kernel") or "", str(r["s_q"]),
                      str(r["s_kv"]), *us, f"{r['bytes'] / 1e6:.1f}", f"{r['gb_per_s']:.0f}",
                      f"{r['pct_of_read_bandwidth']:.1f}", f"{r['tflop_per_s']:.1f}", f"{r['rel_err']:.1e}"))
    return common.columns(lines)


def main(arguments):
    o = parse(arguments)
    versions = {}
    if o.peers != ["none"]:
        try:
            import torch
        except ImportError as error:
            raise Refused(f"--peers {' '.join(o.peers)} needs torch, which cannot be imported ({error}): "
                          "pip install torch") from error
        versions = {"torch": torch.__version__, "cudnn": torch.backends.cudnn.version()}
    rows, ratios, machines = [], [], []
    with Watch(o.device) as watch:
        for s_kv in o.s_kv:
            found, compared = bench(o, s_kv, machines)
            rows += found
            ratios += compared
    samples = [m["read_gb_per_s"] for m in machines]
    machine = {**machines[-1], **versions, "read_gb_per_s": max(samples), "read_gb_per_s_samples": samples,
               "clocks": watch.summary()}
    print(f"{o.phase}, batch {o.batch}, {o.h_q} query and {o.h_kv} KV heads of {o.d} on {machine['gpu']}; "
          f"{', '.join(f'{n} {v}' for n, v in versions.items())}")
    print(f"reading {max(samples):.0f} GB/s (from {min(samples):.0f}); "
          + ", ".join(f"{name} {s['min']:.0f} to {s['max']:.0f}" for name, s in machine["clocks"].items()) + "\n")
    print(table(rows))
    print(f"\nus: median of {o.rounds} rounds of {o.reps} graphs; single: one call between two events; given: under the "
          "selection that was made; rel err: to attention in double")
    if not all(row["cold"] for row in rows):
        print("* the caches it rotates over are not four times the L2 cache: parts of them stay in it")
    common.print_ratios(ratios)
    common.write(o, machine, rows, ratios)


if __name__ == "__main__":
    common.run(main)
