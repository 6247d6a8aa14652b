"""Every input of malformed.py: exit code 2, one line that says the right thing, nothing written, no hang, no signal.

python3 malformed_test.py PROGRAM SOURCE_DIR [unittest arguments]
"""
import os
import unittest

import malformed
import program


class Malformed(program.Case):
    """A test per case, added below."""

    def lay_out(self, case):
        """The folder of a case: its own files, and links to those of the checkpoint it is made from."""
        for name in os.listdir(case.base):
            if name not in case.files and name.endswith(".json") or name.endswith(".safetensors"):
                if name not in case.files:
                    os.symlink(case.base / name, self.path(name))
        for name, content in case.files.items():
            if content == malformed.FOLDER:
                os.mkdir(self.path(name))
            elif content == malformed.DANGLING:
                os.symlink(self.path("nowhere"), self.path(name))
            elif content == malformed.FIFO:
                os.mkfifo(self.path(name))
            elif content == malformed.ENDLESS:
                os.symlink("/dev/zero", self.path(name))
            elif content is not None:
                self.file(name, content)

    def check(self, case):
        self.lay_out(case)
        before = sorted(os.listdir(self.folder.name))
        if case.command == "generate":
            # A word long enough to try the patience of a pattern.
            arguments = ("generate", "--prompt", "a" * 40 + "!", "--max-tokens", 2)
        elif case.command == "text":
            arguments = ("eval", "--context", 64, "--method", "fp16", "--text", self.path("input"))
        else:
            arguments = ("eval", "--method", "fp16", "--questions", self.path("input"))
        message = self.refused([], *arguments, "--model", self.folder.name, cwd=self.folder.name, timeout=60)
        self.assertRegex(message, case.says)
        self.assertLess(len(message), 9000, "a line of a readable length")
        self.assertEqual(sorted(os.listdir(self.folder.name)), before, "nothing is written")


class Table(unittest.TestCase):
    def test_there_are_more_than_a_hundred_and_no_two_alike(self):
        cases = list(malformed.cases())
        self.assertGreater(len(cases), 100)
        self.assertEqual(len({case.name for case in cases}), len(cases))
        made = [(case.command, case.base, tuple(sorted(case.files.items(), key=str))) for case in cases]
        self.assertEqual(len(set(made)), len(made))


for each in malformed.cases():
    setattr(Malformed, "test_" + each.name, lambda self, case=each: self.check(case))

if __name__ == "__main__":
    program.main()
