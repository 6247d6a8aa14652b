"""What peers_cpu.py and peers_gpu.py share: options, shapes, a round of thriftattn, rows, ratios, how they are printed."""
import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile


class Refused(Exception):
    """What the user gave cannot be had: one line, exit code 2."""


class Parser(argparse.ArgumentParser):
    """With the options that every comparison has; `doc` is shown by --help."""

    def __init__(self, doc, peers, s_kv, methods):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
        root = pathlib.Path(__file__).resolve().parent.parent
        self.add_argument("--program", default=str(root / "build" / "release" / "thriftattn"))
        self.add_argument("--phase", choices=("decode", "prefill"), default="decode")
        self.add_argument("--s-kv", type=positive, nargs="+", default=[s_kv], metavar="N", help="tokens of a sequence")
        self.add_argument("--s-q", type=positive, help="rows of a prefill; default all of --s-kv. decode: 1")
        self.add_argument("--batch", type=positive, default=1)
        self.add_argument("--h-q", type=positive, default=32)
        self.add_argument("--h-kv", type=positive, default=8)
        self.add_argument("--d", type=positive, default=128)
        self.add_argument("--method", nargs="+", default=methods, metavar="SPEC")
        self.add_argument("--peers", nargs="+", choices=(*peers, "none"), default=list(peers))
        self.add_argument("--rounds", type=positive, default=3)
        self.add_argument("--json", help="write all figures to this file")

    def error(self, message):
        raise Refused(message)

    def parse(self, arguments):
        o = self.parse_args(arguments)
        if o.h_q % o.h_kv:
            raise Refused(f"--h-q {o.h_q} is not a multiple of --h-kv {o.h_kv}")
        if o.phase == "decode" and o.s_q not in (None, 1):
            raise Refused(f"--s-q {o.s_q}: the peers decode one row; --phase prefill takes more")
        if "none" in o.peers and len(o.peers) > 1:
            raise Refused("--peers none stands alone")
        if not os.access(o.program, os.X_OK):
            raise Refused(f"{o.program} is no program: make build makes it, --program names another")
        if o.json and not os.path.isdir(os.path.dirname(os.path.abspath(o.json))):
            raise Refused(f"cannot write {o.json}: no such folder")
        return o


def positive(text):
    value = int(text) if text.isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1 on")
    return value


def say(text):
    print(text, file=sys.stderr, flush=True)


class Shape:
    def __init__(self, o, s_kv):
        self.phase, self.s_kv = o.phase, s_kv
        self.s_q = 1 if o.phase == "decode" else min(o.s_q or s_kv, s_kv)
        self.batch, self.h_q, self.h_kv, self.d = o.batch, o.h_q, o.h_kv, o.d
        self.group = o.h_q // o.h_kv
        pairs = self.s_q * (s_kv - (self.s_q - 1) / 2)
        self.flops = 4 * pairs * o.d * o.h_q * o.batch

    def fields(self):
        return {key: getattr(self, key) for key in ("phase", "s_q", "s_kv", "batch", "h_q", "h_kv", "d")}


def ours(o, shape, *options):
    """One round of thriftattn: its machine and its rows."""
    with tempfile.TemporaryDirectory() as folder:
        out = os.path.join(folder, "ours.json")
        command = [o.program, "bench", "attention", "--phase", o.phase, "--s-kv", shape.s_kv, "--s-q", shape.s_q,
                   "--batch", o.batch, "--h-q", o.h_q, "--h-kv", o.h_kv, "--d", o.d, "--reps", o.reps, *options,
                   "--json", out, "--method", *o.method]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
        if done.returncode:
            said = done.stderr.strip().removeprefix("thriftattn: ")
            raise Refused(said or f"{o.program} ended with {done.returncode}")
        with open(out, encoding="utf-8") as f:
            found = json.load(f)
    return found["machine"], found["rows"]


def finish(row, rounds, size, flops, machine, rate, rest):
    """A row in the format of `thriftattn bench attention`; `rounds`: the times of each, in milliseconds; `rate(flops, ms,
    machine)`: what the row says of its speed in products."""
    by_round = [statistics.median(times) for times in rounds]
    ms = statistics.median(by_round)
    gb = size / ms / 1e6
    return {**row, "ms_median": ms, "ms_min": min(map(min, rounds)), "ms_max": max(map(max, rounds)),
            "ms_by_round": by_round, "bytes": size, "flops": flops, "gb_per_s": gb,
            "pct_of_read_bandwidth": 100 * gb / machine["read_gb_per_s"], **rate(flops, ms, machine), **rest}


def own_rows(rounds, keys, machine, rate, medians=()):
    """The rows of all rounds of thriftattn as one row a method, with the fields `keys` of its first and the medians of
    `medians` where all rounds have them."""
    rows = []
    for same in zip(*rounds):  # one method in all rounds
        first = same[0]
        rest = {key: first[key] for key in ("rel_err", "layers", "cold")}
        rest |= {key: statistics.median(r[key] for r in same) for key in medians if all(key in r for r in same)}
        row = finish({key: first[key] for key in keys}, [[r["ms_median"]] for r in same], first["bytes"], first["flops"],
                     machine, rate, rest)
        row["ms_min"], row["ms_max"] = min(r["ms_min"] for r in same), max(r["ms_max"] for r in same)
        rows.append(row)
    return rows


def compare(rows, others, keys):
    """How many times faster each of `rows` is than each of `others`, round by round; `keys` tell of which shape."""
    ratios = []
    for row in rows:
        for other in others:
            by_round = [theirs / own for theirs, own in zip(other["ms_by_round"], row["ms_by_round"])]
            ratios.append({"method": row["method"], "peer": other["method"],
                           **{key: row[key] for key in keys},
                           "times_faster": statistics.median(by_round), "by_round": by_round})
    return ratios


def columns(lines):
    """Lines of cells as a table; the first two cells of a line are words."""
    width = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(cell.ljust(w) if i < 2 else cell.rjust(w)
                               for i, (cell, w) in enumerate(zip(line, width))) for line in lines)


def print_ratios(ratios):
    if ratios:
        print("\nmedian of the rounds (least to most):")
    for r in ratios:
        faster = r["times_faster"] >= 1
        values = r["by_round"] if faster else [1 / ratio for ratio in r["by_round"]]
        batch = f", batch {r['batch']}" if "batch" in r else ""
        print(f"{r['s_kv']} tokens{batch}: thriftattn {r['method']} is {statistics.median(values):.2f}x "
              f"{'faster' if faster else 'slower'} than {r['peer']} ({min(values):.2f} to {max(values):.2f})")


def write(o, machine, rows, ratios):
    """To --json, where it is given."""
    if o.json:
        with open(o.json, "w", encoding="utf-8") as f:
            json.dump({"schema": "thriftattn.peers/1", "machine": machine, "rounds": o.rounds, "reps": o.reps,
                       "rows": rows, "ratios": ratios}, f, indent=1)
            f.write("\n")


def run(main):
    """The program: `main` with its arguments, errors as one line."""
    try:
        main(sys.argv[1:])
    except (Refused, OSError) as refused:
        print(f"{os.path.basename(sys.argv[0])}: {' '.join(str(refused).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
