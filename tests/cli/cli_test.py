"""The program from outside: exit codes, one-line messages, the JSON it writes, what it prints where.

python3 cli_test.py PROGRAM SOURCE_DIR [unittest arguments]
"""
import json
import os
import pathlib
import pty
import re
import shutil
import signal
import subprocess
import threading
import time

import program
from program import MODEL, PROGRAM, SOURCE, Case, prose


class Arguments(Case):
    def test_help_and_version_succeed_on_stdout(self):
        self.assertRegex(self.succeeds("--version").stdout.decode(), r"^thriftattn \d+\.\d+\.\d+\n$")
        for command in ("eval", "generate"):
            self.assertIn(b"Example: thriftattn " + command.encode(), self.succeeds(command, "--help").stdout)

    def test_wrong_arguments_are_refused_in_one_line(self):
        self.refused([], )
        self.refused(["frobnicate"], "frobnicate")
        self.refused(["--model"], "eval", "--text", "x")
        self.refused(["--text", "--questions"], "eval", "--model", MODEL)
        self.refused(["--prompt"], "generate", "--model", MODEL)
        self.refused(["--nonsense"], "eval", "--model", MODEL, "--text", "x", "--nonsense")
        self.refused(["--context", "banana"], "eval", "--model", MODEL, "--text", "x", "--context", "banana")
        self.refused(["--context", "0"], "eval", "--model", MODEL, "--text", "x", "--context", "0")
        self.refused(["--compute", "f8"], "eval", "--model", MODEL, "--text", "x", "--compute", "f8")
        self.refused(["--threads", "-1"], "eval", "--model", MODEL, "--text", "x", "--threads", "-1")
        self.refused(["--text"], "eval", "--model", MODEL, "--text", "x", "--questions", "y")
        for option, values in (("--temperature", ("-1", "101", "nan", "warm")), ("--top-p", ("0", "2", "nan"))):
            for value in values:
                self.refused([option, value], "generate", "--model", MODEL, "--prompt", "x", option, value)


class BadInput(Case):
    def test_texts(self):
        def evaluate(text, context=64):
            return ("eval", "--model", MODEL, "--method", "fp16", "--context", context, "--text", text)

        self.refused(["/no/such/file"], *evaluate("/no/such/file"))
        text = self.file("text.txt", prose(300))
        self.refused([text, "inputs"], *evaluate(text), "--json", text)
        with open(text, encoding="utf-8") as f:
            self.assertEqual(f.read(), prose(300), "the input is as it was")
        self.refused([self.folder.name, "folder"], *evaluate(self.folder.name))
        self.refused(["empty.txt", "empty"], *evaluate(self.file("empty.txt", "")))
        self.refused(["UTF-8", "offset 3"], *evaluate(self.file("latin.txt", b"caf\xe9 au lait")))
        self.refused(["short.txt", "64"], *evaluate(self.file("short.txt", "Too short.")))
        self.refused(["32769", "32768"], *evaluate(self.file("long.txt", prose(20000)), 32769))

    def test_methods_are_refused_before_any_work(self):
        text = self.file("text.txt", prose(200))
        for spec, word in (("magic", "thrift"), ("thrift:budget=2", "budget"), ("thrift:colour=red", "colour"),
                           ("thrift:storage=attic", "residual")):
            self.refused([word], "eval", "--model", MODEL, "--text", text, "--context", 64, "--method", spec)
            self.refused([word], "generate", "--model", MODEL, "--prompt", "Once", "--method", spec)

    def test_devices(self):
        text, questions = self.file("text.txt", prose(200)), self.file("questions.jsonl", "")
        for device in ("cudax", "cuda:", "cuda:-1", "cuda:1x", "gpu"):
            for arguments in (("eval", "--text", text, "--context", 64), ("generate", "--prompt", "Once")):
                self.refused([f"--device {device}", "cuda:N"], *arguments, "--model", MODEL, "--device", device)
        self.refused([], "generate", "--prompt", "Once", "--model", MODEL, "--device", "cuda:99")
        self.refused(["--questions", "fork"], "eval", "--questions", questions, "--model", MODEL, "--device", "cuda")

    def test_models(self):
        text = self.file("text.txt", prose(200))
        for arguments in (("eval", "--text", text, "--context", 64), ("generate", "--prompt", "Once")):
            self.refused(["/no/such/model"], *arguments, "--model", "/no/such/model")
            self.refused(["config.json"], *arguments, "--model", self.folder.name)
        lying = self.path("lying")
        os.mkdir(lying)
        config = json.loads((SOURCE / "models/pocket-8m/config.json").read_text())
        config["architectures"] = ["ParrotForCausalLM"]
        pathlib.Path(lying, "config.json").write_text(json.dumps(config))
        self.refused(["ParrotForCausalLM", "LlamaForCausalLM"], "generate", "--prompt", "Once", "--model", lying)

    def test_a_folder_where_a_file_of_the_model_is_wanted(self):
        for name in ("config.json", "tokenizer.json", "model.safetensors"):
            model = self.path(f"without-{name}")
            shutil.copytree(SOURCE / "models" / "pocket-8m", model, ignore=shutil.ignore_patterns(name + "*"))
            os.mkdir(os.path.join(model, name))
            self.refused([name], "generate", "--prompt", "Once", "--model", model)

    def test_a_config_of_fewer_layers_than_the_weights(self):
        model = pathlib.Path(self.path("shallow"))
        shutil.copytree(SOURCE / "models" / "pocket-8m", model)
        config = json.loads((model / "config.json").read_text())
        config["num_hidden_layers"] -= 1
        (model / "config.json").write_text(json.dumps(config))
        self.refused(["num_hidden_layers", 7], "generate", "--prompt", "Once", "--model", model)

    def test_an_output_that_cannot_be_written_is_refused_before_any_work(self):
        text = self.file("text.txt", prose(200))
        for path in ("/no/such/folder/out.json", self.folder.name, text + "/out.json", self.path("long" * 99)):
            self.refused([path], "eval", "--model", MODEL, "--text", text, "--context", 64, "--json", path)
        self.assertEqual(os.listdir(self.folder.name), ["text.txt"])

    def test_empty_names_are_refused(self):
        self.refused(["--json"], "eval", "--model", MODEL, "--text", "x", "--json", "")
        self.refused(["--text"], "eval", "--model", MODEL, "--text", "")
        self.refused(["--model"], "eval", "--model", "", "--text", "x")

    def test_questions_name_the_malformed_line(self):
        good = json.dumps({"context": "A book.", "questions": [{"ask": "What is it?", "answer": " A book."}]})
        for bad in ("{", "[]", "7", '{"context": "x"}', '{"context": "x", "questions": []}',
                    '{"context": 3, "questions": [{"ask": "x", "answer": "y"}]}',
                    '{"context": "x", "questions": [{"ask": "x"}]}',
                    '{"context": "x", "questions": [{"ask": "x", "answer": ""}]}'):
            path = self.file("questions.jsonl", f"{good}\n\n{bad}\n")
            self.refused([path, "line 3"], "eval", "--model", MODEL, "--questions", path)
        self.refused(["empty"], "eval", "--model", MODEL, "--questions", self.file("none.jsonl", ""))


class Eval(Case):
    CONTEXT = 512

    def evaluate(self, *arguments, texts=("one.txt",)):
        self.texts = [self.file(name, prose(900 + 50 * i)[37 * i:]) for i, name in enumerate(texts)]
        out = self.path("out.json")
        self.printed = self.succeeds("eval", "--model", MODEL, "--context", self.CONTEXT, "--json", out, "--text",
                                     *self.texts, *arguments)
        with open(out, encoding="utf-8") as f:
            return json.load(f)

    def check(self, report):
        """What every report must obey; returns its rows by (text, method)."""
        self.assertEqual(report["schema"], "thriftattn.eval/1")
        self.assertEqual(report["model"], MODEL)
        for key in ("cpu", "cores", "threads", "target", "compute", "compiler"):
            self.assertTrue(report["machine"][key], key)
        rows = {(row["text"], row["method"]): row for row in report["rows"]}
        self.assertEqual(len(rows), len(report["rows"]))
        means = {row["method"]: row for row in report["mean"]}
        for (text, method), row in rows.items():
            self.assertEqual(row["tokens"], self.CONTEXT)
            self.assertTrue(1 < row["nll"] < 15, row["nll"])
            self.assertAlmostEqual(row["delta_nll"], row["nll"] - rows[text, "fp16"]["nll"], places=12)
            self.assertTrue(0 <= row["share_promoted"] <= 1)
            self.assertGreater(row["kv_bytes_per_token"], 0)
            self.assertGreater(row["seconds"], 0)
            buckets = row["nll_by_position"]
            self.assertEqual([b["from"] for b in buckets], [0] + [b["to"] for b in buckets[:-1]])
            self.assertEqual(buckets[-1]["to"], self.CONTEXT)
            total = sum((b["to"] - b["from"]) * b["nll"] for b in buckets)
            self.assertAlmostEqual(total / self.CONTEXT, row["nll"], places=6)
            self.assertNotIn("auto", [value for value in row["options"].values()])
            reads_fp4 = row["options"]["rest"] == "fp4"
            lost = rows[text, "paper-fp4"]["delta_nll"] if (text, "paper-fp4") in rows else 0
            if reads_fp4 and lost > 0:
                self.assertAlmostEqual(row["recovery"], 1 - row["delta_nll"] / lost, places=9)
            else:
                self.assertIsNone(row["recovery"])
        for method, mean in means.items():
            same = [row for row in report["rows"] if row["method"] == method]
            self.assertEqual(len(same), len(self.texts))
            for key in ("nll", "delta_nll", "share_promoted", "kv_bytes_per_token", "seconds"):
                self.assertAlmostEqual(mean[key], sum(row[key] for row in same) / len(same), places=9)
            lost = means["paper-fp4"]["delta_nll"] if "paper-fp4" in means else 0
            if mean["recovery"] is not None:
                self.assertAlmostEqual(mean["recovery"], 1 - mean["delta_nll"] / lost, places=9)
        return rows

    def test_defaults_name_the_five_methods_and_add_the_references(self):
        report = self.evaluate(texts=("one.txt", "two.txt"))
        rows = self.check(report)
        for text in self.texts:
            asked = [row["method"] for row in report["rows"] if row["text"] == text and not row["reference"]]
            self.assertEqual(asked, ["fp16", "paper-fp4", "paper", "fp4", "thrift"])
            self.assertEqual(rows[text, "fp16"]["delta_nll"], 0)
            self.assertEqual(rows[text, "fp16"]["share_promoted"], 1)
            self.assertEqual(rows[text, "fp4"]["share_promoted"], 0)
            self.assertIsNone(rows[text, "fp16"]["recovery"])
            self.assertLess(abs(rows[text, "thrift"]["delta_nll"]), 0.05)
            self.assertLess(rows[text, "fp4"]["kv_bytes_per_token"], rows[text, "thrift"]["kv_bytes_per_token"])
            self.assertLess(rows[text, "thrift"]["kv_bytes_per_token"], rows[text, "fp16"]["kv_bytes_per_token"])
        table = self.printed.stdout.decode()
        self.assertIn("mean of 2 texts", table)
        self.assertIn(f"{rows[self.texts[1], 'thrift']['nll']:.4f}", table)
        self.assertEqual(self.printed.stderr, b"", "quiet in a pipe")

    def test_references_that_are_missing_are_added_and_marked(self):
        report = self.evaluate("--method", "thrift:arithmetic=kv4,centring=off", "thrift:arithmetic=kv4,centring=off")
        self.check(report)
        marks = {row["method"]: row["reference"] for row in report["mean"]}
        self.assertEqual({m for m, reference in marks.items() if not reference},
                         {"thrift:centring=off,arithmetic=kv4"})
        references = {m for m, reference in marks.items() if reference}
        self.assertLessEqual({"fp16", "paper-fp4", "fp4:centring=off,arithmetic=kv4"}, references)
        self.assertIn(" *", self.printed.stdout.decode())
        # Nothing recovers more or less than itself.
        like = next(row for row in report["mean"] if row["method"] == "fp4:centring=off,arithmetic=kv4")
        self.assertIn(like["recovery_like"], (0, None))

    def test_no_reference_in_fp4_where_nothing_is_read_in_fp4(self):
        report = self.evaluate("--method", "topk")
        self.check(report)
        self.assertEqual({row["method"] for row in report["mean"]}, {"topk", "fp16"})

    def test_json_to_stdout_is_json_alone(self):
        text = self.file("text.txt", prose(900))
        done = self.succeeds("eval", "--model", MODEL, "--text", text, "--context", 64, "--method", "fp16", "--json", "-")
        self.assertEqual(json.loads(done.stdout)["rows"][0]["tokens"], 64)

    def test_steps_through_the_cache_equal_one_shot_in_fp16(self):
        one_shot = self.check(self.evaluate("--method", "fp16", "--compute", "f32"))
        for steps in (16, 100):
            chunked = self.evaluate("--method", "fp16", "--compute", "f32", "--decode-chunk", steps)
            self.assertEqual(chunked["decode_chunk"], steps)
            self.assertAlmostEqual(self.check(chunked)[self.texts[0], "fp16"]["nll"],
                                   one_shot[self.texts[0], "fp16"]["nll"], places=4)

    def test_threads_do_not_change_the_result(self):
        results = [self.evaluate("--method", "thrift", "--compute", "f32", "--threads", n)["rows"][0] for n in (1, 2)]
        self.assertAlmostEqual(results[0]["nll"], results[1]["nll"], places=5)

    def test_an_interrupt_leaves_no_json_and_ends_cleanly(self):
        text = self.file("long.txt", prose(20000))
        out = self.path("never.json")
        process = subprocess.Popen([PROGRAM, "eval", "--model", MODEL, "--text", text, "--context", "16384", "--json",
                                    out], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        time.sleep(2)
        process.send_signal(signal.SIGINT)
        printed, message = process.communicate(timeout=120)
        self.assertEqual(process.returncode, 130, message.decode())
        self.assertEqual(printed, b"")
        self.assertEqual(message.count(b"\n"), 1, message.decode())
        self.assertEqual([name for name in os.listdir(self.folder.name) if "never" in name], [])

    def test_progress_shows_on_a_terminal(self):
        text = self.file("text.txt", prose(900))
        try:
            ours, theirs = pty.openpty()
        except OSError as error:  # a container without devpts
            self.skipTest(f"this machine has no pseudo-terminals: {error}")
        process = subprocess.Popen([PROGRAM, "eval", "--model", MODEL, "--text", text, "--context", "512", "--method",
                                    "fp16"], stdout=subprocess.PIPE, stderr=theirs)
        os.close(theirs)
        shown = []

        def listen():
            try:
                while chunk := os.read(ours, 4096):
                    shown.append(chunk)
            except OSError:
                pass  # the other end is closed

        listener = threading.Thread(target=listen)
        listener.start()
        printed, _ = process.communicate(timeout=300)
        listener.join()
        os.close(ours)
        self.assertEqual(process.returncode, 0)
        self.assertIn(b"%", b"".join(shown))
        self.assertNotIn(b"\x1b", printed)


class Questions(Case):
    def setUp(self):
        super().setUp()
        needle = " One of the special magic numbers for quiet-river is: 4817263."
        ask = ("\nWhat is the special magic number for quiet-river mentioned in the provided text? "
               "The special magic number for quiet-river mentioned in the provided text is")
        context = prose(400) + needle + prose(300)
        self.questions = self.file("q.jsonl", json.dumps(
            {"context": context, "questions": [{"ask": ask, "answer": " 4817263."}, {"ask": ask, "answer": " 12."}]}))

    def ask(self, *arguments):
        out = self.path("out.json")
        printed = self.succeeds("eval", "--model", MODEL, "--questions", self.questions, "--json", out, *arguments)
        self.assertEqual(printed.stderr, b"")
        self.assertIn(b"answer NLL", printed.stdout)
        with open(out, encoding="utf-8") as f:
            return json.load(f)

    def test_a_right_answer_costs_less_than_a_wrong_one(self):
        both = self.ask("--method", "fp16", "thrift")
        first = self.ask("--method", "fp16", "thrift", "--limit", 1)
        for method in (0, 1):
            self.assertLess(first["mean"][method]["answer_nll"], both["mean"][method]["answer_nll"])
            self.assertGreater(both["rows"][method]["tokens"], first["rows"][method]["tokens"])
            self.assertIn(both["mean"][method]["exact"], (0, 0.5))  # the wrong answer is never the greedy one
            self.assertIn(first["mean"][method]["exact"], (0, 1))
        self.assertEqual(both["rows"][1]["options"]["policy"], "fp4_mass")

    def test_contexts_shorter_than_a_decode_step_are_asked_too(self):
        self.questions = self.file("short.jsonl", json.dumps(
            {"context": "The cat.", "questions": [{"ask": " Who?", "answer": " A"}]}))
        for prefill in ("fp16", "method"):
            self.assertGreater(self.ask("--method", "thrift", "--prefill", prefill)["rows"][0]["answer_nll"], 0)

    def test_who_reads_the_context_is_reported(self):
        self.assertEqual(self.ask("--method", "fp16", "--limit", 1)["prefill"], "fp16")
        report = self.ask("--method", "thrift", "--limit", 1, "--prefill", "method")
        self.assertEqual(report["prefill"], "method")
        row = next(row for row in report["rows"] if row["method"] == "thrift")
        self.assertEqual(row["options"]["policy"], {"prefill": "block_mean", "decode": "fp4_mass"})


class Schedules(Case):
    def test_one_method_everywhere_is_that_method(self):
        text, out = self.file("text.txt", prose(1500)), self.path("out.json")
        one = self.file("one.json", '{"default": "fp16", "rules": [{"method": "thrift"}]}')
        two = self.file("two.json", '{"default": "thrift", "rules": [{"layers": "0-3", "kv_heads": 1, "method": "fp16"}]}')
        self.succeeds("eval", "--model", MODEL, "--text", text, "--context", 1024, "--json", out, "--method", "thrift",
                      "@" + one, "@" + two, "@" + two)
        with open(out, encoding="utf-8") as f:
            rows = {row["method"]: row for row in json.load(f)["mean"]}
        self.assertEqual(list(rows), ["thrift", "@" + one, "@" + two, "fp16", "paper-fp4", "fp4"])
        for key in ("nll", "delta_nll", "recovery", "recovery_like", "share_promoted", "kv_bytes_per_token"):
            self.assertEqual(rows["@" + one][key], rows["thrift"][key], key)
        self.assertEqual(rows["@" + one]["schedule"], {"methods": ["thrift"], "index": [[0, 0]] * 8})
        self.assertEqual(rows["@" + two]["schedule"],
                         {"methods": ["thrift", "fp16"], "index": [[0, 1]] * 4 + [[0, 0]] * 4})
        for key in ("share_promoted", "kv_bytes_per_token"):
            self.assertTrue(rows["thrift"][key] < rows["@" + two][key] < rows["fp16"][key], key)
        self.assertNotIn("schedule", rows["thrift"])

    def test_a_prompt_is_continued_under_a_schedule(self):
        arguments = ("generate", "--model", MODEL, "--prompt", "Once", "--max-tokens", 8)
        uniform = self.file("uniform.json", '{"default": "fp4"}')
        mixed = self.file("mixed.json", '{"default": "fp4", "rules": [{"layers": [0, 7], "method": "fp16"}]}')
        done = self.succeeds(*arguments, "--method", "@" + uniform)
        self.assertEqual(done.stdout, self.succeeds(*arguments, "--method", "fp4").stdout)
        self.assertIn("@" + uniform, done.stderr.decode())
        self.succeeds(*arguments, "--method", "@" + mixed)

    def test_bad_schedules_are_named(self):
        text = self.file("text.txt", prose(200))
        for command in (("eval", "--text", text, "--context", 64), ("generate", "--prompt", "Once")):
            def refused(words, content):
                self.refused(words, *command, "--model", MODEL, "--method", "@" + self.file("s.json", content))

            self.refused(["/no/such/schedule"], *command, "--model", MODEL, "--method", "@/no/such/schedule")
            refused(["s.json", "rules[0]", "layers 8", "0 to 7"],
                    '{"default": "thrift", "rules": [{"layers": 8, "method": "fp16"}]}')
            refused(["'thrift'", "'paper'", "centring"],
                    '{"default": "thrift", "rules": [{"layers": 0, "method": "paper"}]}')


class Generate(Case):
    def generate(self, *arguments):
        return self.succeeds("generate", "--model", MODEL, *arguments)

    def test_the_same_seed_gives_the_same_text_and_only_text(self):
        greedy = [self.generate("--prompt", "It was a dark", "--max-tokens", 24).stdout for _ in range(2)]
        self.assertEqual(*greedy)
        self.assertGreater(len(greedy[0]), 24)
        greedy[0].decode()  # whole characters
        warm = ("--prompt", "It was a dark", "--max-tokens", 24, "--temperature", 1, "--top-p", 0.9)
        self.assertEqual(self.generate(*warm, "--seed", 7).stdout, self.generate(*warm, "--seed", 7).stdout)
        self.assertEqual(len({self.generate(*warm, "--seed", seed).stdout for seed in range(4)}), 4)

    def test_one_line_of_summary_unless_quiet(self):
        summary = self.generate("--prompt", "Once", "--max-tokens", 4).stderr.decode()
        self.assertEqual(summary.count("\n"), 1)
        self.assertIn("tokens/s", summary)
        self.assertEqual(self.generate("--prompt", "Once", "--max-tokens", 4, "--quiet").stderr, b"")
        one = self.generate("--prompt", "Once", "--max-tokens", 1).stderr.decode()
        self.assertRegex(one, r"wrote 1; ", "one token takes no decode step, so there is no rate of them")

    def test_the_tokenizer_says_what_stands_in_front(self):
        def read(model, prompt):
            summary = self.succeeds("generate", "--model", model, "--prompt", prompt, "--max-tokens", 2).stderr.decode()
            return int(summary.split("read ")[-1].split(" tokens")[0])

        without = self.path("without-bos")  # as Qwen: config.json names a BOS, the tokenizer puts none
        shutil.copytree(MODEL, without)
        path = pathlib.Path(without, "tokenizer.json")
        tokenizer = json.loads(path.read_text(encoding="utf-8"))
        tokenizer["post_processor"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False}
        path.write_text(json.dumps(tokenizer), encoding="utf-8")
        self.assertEqual(read(without, "Once upon") + 1, read(MODEL, "Once upon"))
        self.assertEqual(read(MODEL, "<|bos|>Once upon"), read(MODEL, "Once upon"), "not twice")

    def test_a_chat_template_that_is_not_applied_is_named(self):
        model = self.path("chat")
        shutil.copytree(MODEL, model)
        pathlib.Path(model, "chat_template.jinja").write_text("{{ messages[0].content }}")
        arguments = ("generate", "--model", model, "--prompt", "Once", "--max-tokens", 2)
        self.assertIn("chat template", self.succeeds(*arguments).stderr.decode().splitlines()[0])
        self.assertEqual(self.succeeds(*arguments, "--quiet").stderr, b"")

    def test_a_prompt_file_equals_the_prompt(self):
        path = self.file("prompt.txt", "The ship lay at anchor")
        self.assertEqual(self.generate("--prompt-file", path, "--max-tokens", 8).stdout,
                         self.generate("--prompt", "The ship lay at anchor", "--max-tokens", 8).stdout)

    def test_bad_prompts(self):
        self.refused(["/no/such/prompt"], "generate", "--model", MODEL, "--prompt-file", "/no/such/prompt")
        self.refused(["empty"], "generate", "--model", MODEL, "--prompt", "")
        self.refused(["UTF-8"], "generate", "--model", MODEL, "--prompt-file", self.file("bad.txt", b"\xff"))
        self.refused(["32768"], "generate", "--model", MODEL, "--prompt", "Once", "--max-tokens", 32768)

    def test_a_saved_prompt_is_not_read_again_and_gives_the_same_text(self):
        for method, cases in (("thrift", ((30, 0), (300, 0), (300, 1), (420, 200))), ("fp16", ((300, 50),)),
                              ("thrift:storage=dual,policy=block_mean", ((420, 70),))):
            for words, more in cases:
                prompt, longer = self.file("prompt.txt", prose(words)), self.file("longer.txt", prose(words + more))
                with self.subTest(method=method, words=words, more=more):
                    options = ("--method", method, "--compute", "f32", "--max-tokens", 24)
                    saved = self.path("prompt.kv")
                    plain = self.generate("--prompt-file", prompt, *options)
                    saving = self.generate("--prompt-file", prompt, "--save-cache", saved, *options)
                    self.assertEqual(saving.stdout, plain.stdout)
                    whole = self.generate("--prompt-file", longer, *options)
                    again = self.path("again.kv")
                    loading = self.generate("--prompt-file", longer, "--load-cache", saved, "--save-cache", again,
                                            *options)
                    self.assertEqual(loading.stdout, whole.stdout)
                    # Nothing but what lies behind the last whole page is read.
                    count = re.search(r"(?:loaded (\d+) tokens, )?read (\d+) tokens", loading.stderr.decode())
                    total = re.search(r"read (\d+) tokens", whole.stderr.decode())
                    loaded, read = int(count[1] or 0), int(count[2])
                    self.assertEqual(loaded + read, int(total[1]))
                    self.assertEqual(loaded % 64, 0)
                    if more == 0:
                        self.assertLessEqual(read, 64)
                    # What was saved after loading serves as well as what was saved first.
                    self.assertEqual(self.generate("--prompt-file", longer, "--load-cache", again, *options).stdout,
                                     whole.stdout)

    def test_a_saved_prompt_may_end_within_a_word(self):
        text = prose(500)
        options = ("--compute", "f32", "--max-tokens", 8)
        longer, saved = self.file("longer.txt", text), self.path("prompt.kv")
        whole = self.generate("--prompt-file", longer, *options)
        for end in range(1500, 1512):
            self.generate("--prompt-file", self.file("prompt.txt", text[:end]), "--save-cache", saved, *options)
            self.assertEqual(self.generate("--prompt-file", longer, "--load-cache", saved, *options).stdout,
                             whole.stdout)

    def test_a_saved_prompt_fits_its_model_method_and_text_alone(self):
        saved = self.path("prompt.kv")
        begin = ("generate", "--model", MODEL, "--max-tokens", 2, "--compute", "f32")
        self.succeeds(*begin, "--prompt", "It was a dark and stormy night", "--save-cache", saved)
        load = (*begin, "--load-cache", saved)
        self.refused([saved, "token 3"], *load, "--prompt", "It was no dark and stormy night, and")
        self.refused([saved, "more than the", "of the prompt"], *load, "--prompt", "It was a dark")
        self.refused([saved, "more than the", "of the prompt"], *load, "--prompt", "It")
        self.refused([saved, "method", "thrift", "fp16"], *load, "--prompt", "It was a dark and stormy night",
                     "--method", "fp16")
        self.refused([saved + "x", "no such file"], *begin, "--prompt", "It", "--load-cache", saved + "x")
        with open(saved, "rb") as f:
            content = f.read()
        self.refused(["checksum"], *begin, "--prompt", "It was a dark and stormy night", "--load-cache",
                     self.file("bad.kv", content[:-1] + bytes([content[-1] ^ 1])))
        self.refused(["cut.kv"], *begin, "--prompt", "It", "--load-cache", self.file("cut.kv", content[:-1]))
        # Another model of the same shape: one byte of one weight differs.
        other = self.path("model")
        shutil.copytree(MODEL, other)
        with open(os.path.join(other, "model-00002-of-00002.safetensors"), "r+b") as f:
            f.seek(-1, os.SEEK_END)
            last = f.read(1)[0]
            f.seek(-1, os.SEEK_END)
            f.write(bytes([last ^ 1]))
        self.refused([saved, "another model"], "generate", "--model", other, "--compute", "f32", "--load-cache", saved,
                     "--prompt", "It was a dark and stormy night")

    def test_a_cache_that_cannot_be_saved_is_refused_before_the_work(self):
        for target in (self.folder.name, "/no/such/folder/x", "/dev/null"):
            self.refused([target], "generate", "--model", MODEL, "--prompt", "Once", "--save-cache", target)
        prompt = self.file("prompt.txt", "Once")
        self.refused([prompt], "generate", "--model", MODEL, "--prompt-file", prompt, "--save-cache", prompt)


if __name__ == "__main__":
    program.main()
