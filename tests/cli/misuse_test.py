"""Command lines that ask for what cannot be had, and machines that will not give it: one line each.

python3 misuse_test.py PROGRAM SOURCE_DIR [unittest arguments]
"""
import os
import resource
import unittest

import program
from program import MODEL, SOURCE, prose

TINY = str(SOURCE / "tests" / "data" / "tiny-llama-f32-tied")  # 256 positions, 300 tokens

EVAL = ("eval", "--model", TINY, "--text", "{text}", "--context", "64", "--method", "fp16")
GENERATE = ("generate", "--model", TINY, "--prompt", "Once")

# (arguments, words of the message). {text}: a file of 250 words, {folder}: where it lies.
REFUSED = [
    *(((*EVAL[:-4], "--context", value), ("--context", value)) for value in ("0", "-1", "1.5", "", "1e30", "ten",
                                                                               "16777217", "99999999999999999999")),
    ((*EVAL[:-4], "--context", "257"), ("257", "256")),
    (("eval", "--model", MODEL, "--text", "{text}", "--context", "30000"), ("{text}", "too short", "30000", "30001")),
    (("eval", "--model", MODEL, "--text", "{text}", "--context", "32769"), ("32769", "32768")),
    *(((*EVAL, "--decode-chunk", value), ("--decode-chunk", value)) for value in ("0", "-4", "some", "16777217")),
    ((*EVAL, "--prefill", "fp16"), ("--prefill", "--questions")),
    ((*EVAL, "--limit", "3"), ("--limit", "--questions")),
    ((*EVAL, "--json", ""), ("--json", "empty")),
    ((*EVAL, "--json", "/no/such/folder/out.json"), ("/no/such/folder/out.json", "No such file")),
    ((*EVAL, "--json", "{folder}"), ("{folder}", "is a folder")),
    ((*EVAL, "--json", "{text}"), ("{text}", "inputs")),
    ((*EVAL, "--json", "{text}/out.json"), ("{text}/out.json", "Not a directory")),
    ((*EVAL, "--json", "{folder}/" + "n" * 300), ("nnn", "File name too long")),
    ((*EVAL, "--json", "/proc/out.json"), ("/proc/out.json",)),
    (("eval", "--model", TINY, "--text", ""), ("--text", "empty")),
    (("eval", "--model", "", "--text", "{text}"), ("--model", "empty")),
    (("eval", "--model", TINY, "--questions", "{text}"), ("line 1", "not JSON")),
    *(((*EVAL[:-1], spec), words) for spec, words in (
        ("", ("fp16", "thrift")), ("magic", ("magic", "thrift")), ("Thrift", ("Thrift", "thrift")),
        ("thrift:", ("thrift:",)), ("thrift:budget", ("budget",)), ("thrift:budget=", ("budget",)),
        ("thrift:budget=1.5", ("1.5",)), ("thrift:budget=-0.1", ("-0.1",)), ("thrift:budget=nan", ("nan",)),
        ("thrift:budget=inf", ("inf",)), ("thrift:budget=0.05x", ("0.05x",)), ("thrift:budget=mass:2", ("mass",)),
        ("thrift:budget=mass:nan", ("nan",)), ("thrift:budget=paper:-1", ("paper",)),
        ("thrift:budget=top_k:-3", ("top_k",)), ("thrift:budget=top_k:1.5", ("top_k",)),
        ("thrift:budget=tolerance:nan", ("nan",)), ("thrift:budget=share:1", ("share",)),
        ("thrift:recent=-1", ("recent", "-1")), ("thrift:recent=99999999999", ("recent", "99999999999")),
        ("thrift:force=sink:-1", ("sink",)), ("thrift:force=middle", ("middle",)),
        ("thrift:storage=attic", ("attic", "residual")), ("thrift:policy=psychic", ("psychic", "quest")),
        ("thrift:format=fp3", ("fp3", "nvfp4")), ("thrift:rest=fp4,storage=high_only", ("high_only",)),
        ("thrift:arithmetic=mma8", ("mma8",)), ("thrift:policy=fp4_mass", ("fp4_mass", "prefill")),
        ("thrift:colour=red", ("colour",)), ("thrift budget=0.1", ("thrift budget",)))),
    *(((*GENERATE, option, value), (option, value)) for option, value in (
        ("--temperature", "nan"), ("--temperature", "-nan"), ("--temperature", "inf"), ("--temperature", "-0.1"),
        ("--max-tokens", "0"), ("--max-tokens", "-5"), ("--max-tokens", "1e3"), ("--max-tokens", "nan"),
        ("--threads", "-1"), ("--threads", "1025"), ("--threads", "two"), ("--seed", "-1"),
        ("--seed", "99999999999999999999"), ("--compute", "f16"))),
    *(((*GENERATE, "--temperature", "1", "--top-p", value), ("--top-p", value)) for value in ("nan", "0", "-1", "1.01",
                                                                                             "inf")),
    ((*GENERATE, "--top-p", "0.5"), ("--top-p", "--temperature")),
    ((*GENERATE, "--max-tokens", "300"), ("300", "256")),
    ((*GENERATE, "--prompt-file", "{text}"), ("--prompt",)),
    ((*GENERATE, "--model", MODEL), ("--model",)),
    ((*GENERATE, "more", "words"), ("more",)),
    (("generate", "--model", TINY, "--prompt", "caf\udce9"), ("UTF-8",)),
    (("generate", "--model", TINY, "--prompt-file", "{folder}"), ("{folder}", "folder")),
    (("generate", "--model", TINY + "/config.json", "--prompt", "Once"), ("config.json", "Not a directory")),
    (("generate", "--model", "{folder}/" + "m" * 300, "--prompt", "Once"), ("mmm", "File name too long")),
    *((("bench", "attention", option, value), (option, value)) for option, value in (
        ("--rounds", "0"), ("--rounds", "-1"), ("--rounds", "1001"), ("--rounds", "some"), ("--reps", "0"), ("--s-q", "0"),
        ("--s-kv", "0"), ("--batch", "0"), ("--h-q", "0"), ("--device", "gpu"), ("--device", "cuda:x"),
        ("--json", ""))),
    (("bench", "model", "--shape", "llama3-8b", "--random-weights", "--json", ""), ("--json", "empty")),
    (("bench", "attention", "--device", "cuda", "--target", "AVX2"), ("--target AVX2", "--device cuda")),
    (("eval", "generate"), ("--model",)),
    (("--frobnicate",), ("--frobnicate",)),
    (("",), ()),
    ((), ("eval", "completion")),
]


class Refused(program.Case):
    def setUp(self):
        super().setUp()
        self.text = self.file("text.txt", prose(250))

    def test_what_cannot_be_asked_for_is_named_in_one_line(self):
        for arguments, words in REFUSED:
            place = {"text": self.text, "folder": self.folder.name}
            arguments, words = ([word.replace("{text}", place["text"]).replace("{folder}", place["folder"]) for word in each]
                                for each in (arguments, words))
            with self.subTest(arguments=arguments[:1] + [a for a in arguments if a not in EVAL + GENERATE]):
                self.refused(words, *arguments, cwd=self.folder.name, timeout=60)
                self.assertEqual(os.listdir(self.folder.name), ["text.txt"], "nothing is written")

    @unittest.skipIf(os.geteuid() == 0, "root may read and write everything")
    def test_permissions(self):
        model = self.path("model")
        os.mkdir(model)
        for name in ("config.json", "tokenizer.json", "model.safetensors"):
            with open(os.path.join(TINY, name), "rb") as f:
                self.file(f"model/{name}", f.read())
        for name in os.listdir(model):
            os.chmod(os.path.join(model, name), 0)
            self.refused([name, "Permission denied"], "generate", "--model", model, "--prompt", "Once")
            os.chmod(os.path.join(model, name), 0o600)
        os.chmod(self.text, 0)
        self.refused([self.text], "generate", "--model", TINY, "--prompt-file", self.text)


class Machine(program.Case):
    """What the machine refuses: exit code 1, one line, no half-written file, no signal."""

    def setUp(self):
        super().setUp()
        self.text = self.file("text.txt", prose(250))

    def test_a_full_disk_behind_json(self):
        self.refused(["/dev/full", "No space left"], *self.eval(), "--json", "/dev/full", code=1)

    def test_a_full_disk_behind_stdout(self):
        with open("/dev/full", "wb") as full:
            for command in (self.eval(), (*GENERATE, "--max-tokens", "8"), ("eval", "--help"), ("--version",)):
                self.refused(["stdout"], *command, code=1, capture_output=False, stdout=full, stderr=-1)

    def test_a_limit_on_the_size_of_files(self):
        def limit():
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

        self.refused(["out.json", "File too large"], *self.eval(), "--json", self.path("out.json"), code=1, preexec_fn=limit)
        self.assertEqual(os.listdir(self.folder.name), ["text.txt"], "no part of a file stays")

    def test_memory_that_cannot_be_had(self):
        out = self.path("out.json")
        refused = 0
        # From what libraries alone take, which differs with CUDA's, to what is enough.
        for megabytes in (int(60 * 1.04**n) for n in range(100)):
            def limit():
                resource.setrlimit(resource.RLIMIT_AS, (megabytes << 20, megabytes << 20))

            done = self.run_program("eval", "--model", MODEL, "--text", self.text, "--context", 256, "--threads", 2,
                                    "--method", "thrift", "--json", out, preexec_fn=limit, timeout=100)
            message = done.stderr.decode()
            with self.subTest(megabytes=megabytes, message=message):
                if b"error while loading shared libraries" in done.stderr:
                    continue  # it did not come to run
                self.assertIn(done.returncode, (0, 1), "no signal, and not the user's mistake")
                self.assertEqual(message.count("\n"), done.returncode)
                if done.returncode:
                    refused += 1
                    self.assertRegex(message, "(?i)memory|alloc|thread")
                self.assertEqual(os.path.exists(out), done.returncode == 0)
            if os.path.exists(out):
                os.remove(out)
                break
        self.assertGreater(refused, 0, "limits that never bind test nothing")

    def eval(self):
        return [word.replace("{text}", self.text) for word in EVAL]


if __name__ == "__main__":
    program.main()
