"""bench/peers_cpu.py, as far as it goes without the peers.

python3 peers_test.py PROGRAM SOURCE_DIR [unittest arguments]
"""
import json
import os
import subprocess
import sys
import unittest

import program
from program import PROGRAM, SOURCE


class Peers(program.Case):
    SHAPE = ("--h-q", 4, "--h-kv", 2, "--d", 64, "--s-kv", 300, "--reps", 2)

    def run_peers(self, *arguments, **environment):
        return subprocess.run([sys.executable, str(SOURCE / "bench" / "peers_cpu.py"), "--program", PROGRAM,
                               *map(str, arguments)], stdin=subprocess.DEVNULL, capture_output=True, timeout=300, text=True,
                              env={**os.environ, **environment}, check=False)

    def refused(self, words, *arguments, **environment):
        done = self.run_peers(*arguments, **environment)
        last = done.stderr.splitlines()[-1]
        self.assertEqual((done.returncode, done.stdout), (2, ""), done.stderr)
        self.assertNotIn("Traceback", done.stderr)
        self.assertTrue(last.startswith("peers_cpu.py: "), last)
        for word in words:
            self.assertIn(word, last)

    def test_ours_alone(self):
        out = self.path("out.json")
        done = self.run_peers(*self.SHAPE, "--peers", "none", "--rounds", 2, "--method", "fp16", "fp4", "--json", out)
        self.assertEqual(done.returncode, 0, done.stderr)
        with open(out, encoding="utf-8") as f:
            found = json.load(f)
        self.assertEqual([row["method"] for row in found["rows"]], ["fp16", "fp4"])
        self.assertEqual(found["ratios"], [])
        for row in found["rows"]:
            self.assertEqual(len(row["ms_by_round"]), 2)
            self.assertTrue(row["ms_min"] <= row["ms_median"] <= row["ms_max"])
            self.assertAlmostEqual(row["gb_per_s"], row["bytes"] / row["ms_median"] / 1e6)
            self.assertIn(row["method"], done.stdout)
        samples = found["machine"]["read_gb_per_s_samples"]
        self.assertAlmostEqual(found["machine"]["read_gb_per_s"], sum(samples) / len(samples))

    def test_a_package_that_is_missing_is_named(self):
        for package, peer in (("torch", "torch"), ("onnxruntime", "ort")):
            folder = self.path(peer)
            os.mkdir(folder)
            self.file(f"{peer}/numpy.py", "")
            self.file(f"{peer}/{package}.py", "raise ImportError('not here')")
            self.refused([package, "not here", "pip install", package], *self.SHAPE, "--peers", peer, PYTHONPATH=folder)

    def test_nonsense_is_refused(self):
        for words, arguments in ((["--h-q 7", "--h-kv 2"], ("--h-q", 7, "--h-kv", 2)),
                                 (["--s-q 4", "decode"], ("--s-q", 4)),
                                 (["none"], ("--peers", "none", "torch")),
                                 (["--peers-target AVX2", "--peers torch"], ("--peers-target", "AVX2")),
                                 (["--peers-target AVX2", "--target AVX2"],
                                  ("--peers-target", "AVX2", "--peers", "torch")),
                                 (["--peers", "tensorflow", "torch"], ("--peers", "tensorflow")),
                                 (["--phase", "append"], ("--phase", "append")),
                                 (["--rounds", "0"], ("--rounds", 0)),
                                 (["/no/such"], ("--json", "/no/such/out.json")),
                                 (["/no/such"], ("--program", "/no/such")),
                                 (["magic"], ("--peers", "none", "--method", "magic")),
                                 (["head_dim 100"], ("--peers", "none", "--d", 100))):
            with self.subTest(arguments=arguments):
                self.refused(words, *arguments)


if __name__ == "__main__":
    program.main()
