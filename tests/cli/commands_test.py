"""doctor, inspect, bench and completion.

python3 commands_test.py PROGRAM SOURCE_DIR [unittest arguments]
"""
import json
import os
import re
import shutil
import subprocess
import unittest

import program
from program import MODEL, PROGRAM, SOURCE

COMMANDS = ("eval", "generate", "doctor", "inspect", "bench", "completion")


class Doctor(program.Case):
    def ask(self, *arguments):
        return json.loads(self.succeeds("doctor", "--json", *arguments).stdout)

    def test_the_table_says_what_the_json_says(self):
        found, table = self.ask(), self.succeeds("doctor").stdout.decode()
        self.assertEqual(found["schema"], "thriftattn.doctor/1")
        for name in (found["machine"]["cpu"], *found["machine"]["targets"], *found["machine"]["features"],
                     found["machine"]["products"], found["plans"]["decode"]["kernel"]):
            self.assertIn(name, table)

    def test_bytes_are_those_that_a_cache_of_the_model_takes(self):
        costs = {row["storage"]: row for row in self.ask("--h-q", 4, "--h-kv", 2, "--d", 128, "--layers", 8, "--s-kv",
                                                         4096)["storage"]}
        self.assertAlmostEqual(costs["high_only"]["bytes_per_token"] / (2 * 8 * 2 * 128 * 2), 1, delta=0.01)
        self.assertLess(costs["fp4_only"]["bytes_per_token"], costs["residual"]["bytes_per_token"])
        self.assertLess(costs["residual"]["bytes_per_token"], costs["high_only"]["bytes_per_token"])
        for row in costs.values():
            self.assertGreaterEqual(row["bytes"], row["bytes_per_token"] * 4096)

    def test_a_plan_that_is_refused_says_why(self):
        plans = self.ask("--method", "thrift:policy=fp4_mass")["plans"]
        self.assertIn("fp4_mass", plans["prefill"]["refused"])
        self.assertEqual(plans["decode"]["kernel"], "decode_exchange")
        self.assertIn("refused: ", self.succeeds("doctor", "--method", "thrift:policy=fp4_mass").stdout.decode())

    def test_nonsense_is_refused(self):
        self.refused(["h_q 7", "h_kv 2"], "doctor", "--h-q", 7, "--h-kv", 2)
        self.refused(["magic"], "doctor", "--method", "magic")
        self.refused(["--s-kv"], "doctor", "--s-kv", 0)
        self.refused(["head_dim 100", "256"], "doctor", "--d", 100)
        self.refused(["@schedule.json", "layers"], "doctor", "--method", "@schedule.json")


class Inspect(program.Case):
    def test_a_checkpoint(self):
        found = json.loads(self.succeeds("inspect", MODEL, "--json", "--tensors").stdout)
        self.assertTrue(found["readable"])
        self.assertEqual((found["layers"], found["h_kv"], found["d"]), (8, 2, 128))
        self.assertEqual(found["tensors"], len(found["list"]))
        self.assertEqual(found["bytes"], sum(tensor["bytes"] for tensor in found["list"]))
        self.assertEqual(found["bytes"], 2 * found["parameters"], "all of it is BF16")
        index = json.loads((SOURCE / "models/pocket-8m/model.safetensors.index.json").read_text())
        self.assertEqual({tensor["name"] for tensor in found["list"]}, set(index["weight_map"]))
        table = self.succeeds("inspect", MODEL, "--tensors").stdout.decode()
        for tensor in found["list"]:
            self.assertIn(tensor["name"], table)

    def test_what_cannot_be_run_is_described_and_says_why(self):
        model = self.path("model")
        shutil.copytree(MODEL, model)
        config = json.loads(self.read("model/config.json"))
        self.file("model/config.json", json.dumps({**config, "architectures": ["ParrotForCausalLM"]}))
        found = json.loads(self.succeeds("inspect", model, "--json").stdout)
        self.assertFalse(found["readable"])
        self.assertIn("ParrotForCausalLM", found["refused"])
        self.assertEqual(found["dtypes"], {"BF16": found["tensors"]})

    def test_a_saved_cache(self):
        saved = self.path("saved")
        self.succeeds("generate", "--model", MODEL, "--prompt", "Once upon a time", "--max-tokens", 2, "--save-cache", saved)
        found = json.loads(self.succeeds("inspect", saved, "--json").stdout)
        self.assertEqual((found["kind"], found["layers"], found["d"]), ("saved cache", 8, 128))
        self.assertEqual(found["file_bytes"], os.path.getsize(saved))
        self.assertGreater(found["tokens"], 3)
        self.assertEqual(len(json.loads(found["metadata"])["tokens"]), found["tokens"])
        table = self.succeeds("inspect", saved).stdout.decode()
        self.assertRegex(table, r"(?m)^method +thrift$")
        self.assertLess(max(map(len, table.splitlines())), 120, "a table, not the prompt's tokens")
        self.refused([saved, "--tensors"], "inspect", saved, "--tensors")

    def test_what_is_neither_is_refused(self):
        self.refused(["/no/such"], "inspect", "/no/such")
        self.refused(["config.json"], "inspect", self.folder.name)
        self.refused(["text.txt"], "inspect", self.file("text.txt", "Not a cache at all."))
        self.refused(["config.json", "folder"], "inspect", os.path.join(MODEL, "config.json"))

    def read(self, name):
        with open(self.path(name), encoding="utf-8") as f:
            return f.read()


FIELDS = {"phase", "s_q", "s_kv", "batch", "h_q", "h_kv", "d", "method", "target", "threads", "ms_median", "ms_min", "ms_max",
          "ms_by_round", "bytes", "flops", "gb_per_s", "pct_of_read_bandwidth", "pct_of_matrix_peak", "rel_err", "layers",
          "cold"}


class Bench(program.Case):
    SHAPE = ("--h-q", 4, "--h-kv", 2, "--d", 64, "--s-kv", 300, "--reps", 2)

    def rows(self, *arguments):
        out = self.path("out.json")
        table = self.succeeds("bench", "attention", *self.SHAPE, "--json", out, *arguments).stdout.decode()
        with open(out, encoding="utf-8") as f:
            found = json.load(f)
        self.assertGreater(found["machine"]["read_gb_per_s"], 0)
        self.assertGreater(found["machine"]["matrix_gflops"], 0)
        for rate in ("read_gb_per_s", "matrix_gflops"):  # before, and after every round
            samples = found["machine"][f"{rate}_samples"]
            self.assertEqual(len(samples), 1 + found["rounds"])
            self.assertAlmostEqual(found["machine"][rate], sum(samples) / len(samples))
        for row in found["rows"]:
            self.assertLessEqual(FIELDS, set(row))
            self.assertEqual(len(row["ms_by_round"]), found["rounds"])
            self.assertTrue(row["ms_min"] <= min(row["ms_by_round"]) and max(row["ms_by_round"]) <= row["ms_max"])
            self.assertTrue(0 < row["ms_min"] <= row["ms_median"] <= row["ms_max"])
            self.assertAlmostEqual(row["gb_per_s"], row["bytes"] / row["ms_median"] / 1e6)
            self.assertAlmostEqual(row["pct_of_read_bandwidth"],
                                   100 * row["gb_per_s"] / found["machine"]["read_gb_per_s"])
            self.assertAlmostEqual(row["pct_of_matrix_peak"],
                                   100 * row["flops"] / row["ms_median"] / 1e6 / found["machine"]["matrix_gflops"])
            self.assertIn(row["method"], table)
        return found["rows"]

    def test_model_refuses_what_names_no_model_or_no_gpu(self):
        self.refused(["--model", "--shape"], "bench", "model")
        self.refused(["--model", "--shape"], "bench", "model", "--shape", "llama3-8b", "--model", MODEL)
        self.refused(["--random-weights"], "bench", "model", "--shape", "llama3-8b")
        self.refused(["llama3-9b", "llama3-8b"], "bench", "model", "--shape", "llama3-9b")
        self.refused(["cpu"], "bench", "model", "--model", MODEL, "--device", "cpu")
        self.refused(["magic"], "bench", "model", "--model", MODEL, "--method", "magic")

    def test_decode(self):
        fp16, fp4 = self.rows("--method", "fp16", "fp4")
        self.assertEqual(fp16["flops"], 4 * 4 * 64 * 300, "2 d for a score, 2 d for a value")
        # K and V of 300 tokens in 16 bit; q and out in F32.
        self.assertAlmostEqual(fp16["bytes"], 2 * 2 * 2 * 64 * 300 + 8 * 4 * 64)
        self.assertLess(fp4["bytes"], fp16["bytes"])
        self.assertLess(fp16["rel_err"], 2e-3)
        self.assertTrue(1e-3 < fp4["rel_err"] < 0.5, fp4["rel_err"])

    def test_what_a_decode_must_read(self):
        """300 tokens of 2 KV heads are 4 full pages and a tail of 44 tokens; h_q 4, d 64."""
        page, high, mean, tail = 2 * 64 * (64 // 2 + 64 // 16), 64 * 4 * 64, 16 + 2 * 64, 44 * 4 * 64
        rows = 8 * 4 * 64
        for method, bytes_of_a_head in (("fp4", 4 * (page + mean) + tail),
                                        ("fp4:centring=off", 4 * (page + 16) + tail),
                                        # Forced: the first page and the one before the tail's.
                                        ("thrift", 2 * high + 2 * page + 4 * mean + tail),
                                        ("thrift:force=none,budget=top_k:1", 2 * page + 3 * page + 4 * mean + tail),
                                        ("thrift:force=none,budget=top_k:1,storage=dual", high + 3 * page + 4 * mean + tail),
                                        ("topk", 2 * high + 4 * mean + tail)):
            row, = self.rows("--method", method)
            self.assertAlmostEqual(row["bytes"], 2 * bytes_of_a_head + rows, msg=method)
        topk, = self.rows("--method", "topk")
        self.assertAlmostEqual(topk["flops"], 4 * 4 * 64 * 300 / 2, msg="2 of 4 pages")

    def test_rounds_and_verify_steps(self):
        for s_q in (4, 16):
            for row in self.rows("--method", "fp16", "thrift", "--rounds", 3, "--s-q", s_q):
                self.assertEqual(row["s_q"], s_q)
                self.assertAlmostEqual(row["flops"], 4 * 4 * 64 * s_q * (300 - (s_q - 1) / 2))
        for phase in ("append", "rank"):
            self.rows("--phase", phase, "--method", "thrift", "--rounds", 2)

    def test_every_phase(self):
        for phase, s_q in (("prefill", 100), ("append", 100), ("rank", 1)):
            for row in self.rows("--phase", phase, "--method", "thrift", *(("--s-q", s_q) if s_q > 1 else ())):
                self.assertEqual((row["phase"], row["s_q"]), (phase, s_q))

    def test_an_append_is_timed_on_used_records_and_on_fresh_ones(self):
        row, = self.rows("--phase", "append", "--method", "thrift", "--s-q", 128)
        self.assertGreater(row["ms_fresh"], 0)
        table = self.succeeds("bench", "attention", *self.SHAPE, "--phase", "append").stdout.decode()
        self.assertIn("records that a freed sequence gave back", table)
        self.assertIn("fresh ms", table)

    def test_what_is_not_given_fits_the_phase(self):
        self.assertEqual([row["method"] for row in self.rows("--phase", "rank")], ["thrift"])
        for row in self.rows("--phase", "append", "--method", "fp16"):  # 512 tokens where there are as many
            self.assertEqual((row["s_q"], row["s_kv"]), (300, 300))

    def test_a_star_marks_what_stays_in_a_cache(self):
        table = self.succeeds("bench", "attention", *self.SHAPE, "--method", "fp16").stdout.decode()
        self.assertIn("\nfp16 * ", table)
        self.assertIn("\n* the caches", table)

    def test_a_target_is_forced_or_refused(self):
        targets = json.loads(self.succeeds("doctor", "--json").stdout)["machine"]["targets"]
        for target in targets:
            only = ("--phase", "prefill", "--compute", "bf16") if target in ("AMX", "AVX3_BF16") else ()
            rows = self.rows("--method", "fp4", "--target", target, *only)
            self.assertEqual({row["target"] for row in rows}, {target})
        self.refused(["Z80", *targets], "bench", "attention", *self.SHAPE, "--target", "Z80")
        self.refused(["--target", "append", "best"], "bench", "attention", *self.SHAPE, "--phase", "append", "--target",
                     targets[-1])

    def test_nonsense_is_refused(self):
        self.refused(["fp4", "ranks no pages"], "bench", "attention", *self.SHAPE, "--phase", "rank", "--method", "fp4")
        self.refused(["--phase", "verify"], "bench", "attention", "--phase", "verify")
        self.refused(["magic"], "bench", "attention", "--method", "magic")
        self.refused(["@schedule.json", "layers"], "bench", "attention", "--method", "@schedule.json")
        for phase in ("decode", "rank"):
            self.refused(["--s-q 17", phase, "16"], "bench", "attention", *self.SHAPE, "--s-q", 17, "--phase", phase)
        self.refused(["bench", "attention"], "bench")
        self.refused(["h_q 7"], "bench", "attention", "--h-q", 7, "--h-kv", 2)
        self.refused(["/no/such"], "bench", "attention", "--json", "/no/such/out.json")


class Completion(program.Case):
    def complete(self, *words):
        script = self.file("completion.bash", self.succeeds("completion", "bash").stdout)
        done = subprocess.run(["bash", "-c", 'source "$1"; shift; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _thriftattn; '
                               'printf "%s\\n" "${COMPREPLY[@]}"', "-", script, "thriftattn", *words],
                              capture_output=True, check=True, cwd=self.folder.name)
        self.assertEqual(done.stderr, b"")
        return set(done.stdout.decode().split())

    def test_bash_completes_every_command_and_every_option(self):
        self.assertLessEqual(set(COMMANDS), self.complete(""))
        self.assertEqual(self.complete("ev"), {"eval"})
        self.assertEqual(self.complete("bench", "att"), {"attention"})
        for command in (*((c,) for c in COMMANDS), ("bench", "attention")):
            text = self.succeeds(*command, "--help").stdout.decode()
            options = set(re.findall(r"(?m)^\s+(?:-\w,)?(--[a-z-]+)", text))
            self.assertGreater(len(options), 0)
            self.assertEqual(self.complete(*command, "--"), options)

    def test_bash_completes_files_where_a_value_stands(self):
        self.file("book.txt", "")
        self.assertEqual(self.complete("eval", "--text", "bo"), {"book.txt"})
        self.assertEqual(self.complete("inspect", "models/pocket-8m", "--t"), {"--tensors"}, "a path is no command")

    def test_bash_completes_the_words_that_an_option_takes(self):
        self.file("book.txt", "")
        self.assertEqual(self.complete("eval", "--compute", ""), {"f32", "bf16"})
        self.assertEqual(self.complete("bench", "attention", "--phase", "p"), {"prefill"})
        self.assertLessEqual({"bash", "zsh", "fish"}, self.complete("completion", ""))

    @unittest.skipUnless(shutil.which("zsh"), "no zsh here")
    def test_zsh_reads_its_script(self):
        subprocess.run(["zsh", "-c", 'autoload -U compinit && compinit -D; source "$1"', "-",
                        self.file("c.zsh", self.succeeds("completion", "zsh").stdout)], check=True)

    def test_fish_names_every_command(self):
        script = self.succeeds("completion", "fish").stdout.decode()
        for command in (*COMMANDS, "attention"):
            self.assertIn(f"-a {command} ", script)
        self.assertIn("-l save-cache ", script)

    def test_every_help_ends_with_an_example(self):
        for command in (*((c,) for c in COMMANDS), ("bench", "attention")):
            text = self.succeeds(*command, "--help").stdout.decode()
            self.assertIn("Example: ", text.split("\n\n")[-1] + text[-400:])
        self.refused(["sh"], "completion", "sh")


if __name__ == "__main__":
    program.main()
