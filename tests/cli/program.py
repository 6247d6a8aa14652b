"""The program under test and how it is run; shared by the tests of this folder.

Each of them runs as: python3 NAME_test.py PROGRAM SOURCE_DIR [unittest arguments]
"""
import os
import pathlib
import subprocess
import sys
import tempfile
import unittest

PROGRAM, SOURCE = os.path.abspath(sys.argv[1]), pathlib.Path(sys.argv[2]).resolve()
MODEL = str(SOURCE / "models" / "pocket-8m")


def prose(words):
    """Plain English of so many words that never repeats exactly: the licence, wrapped around with numbers."""
    source = (SOURCE / "LICENSE").read_text(encoding="utf-8").split()
    return " ".join(f"{source[i % len(source)]}{'' if i < len(source) else i}" for i in range(words))


class Case(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.TemporaryDirectory()
        self.addCleanup(self.folder.cleanup)

    def file(self, name, content):
        path = os.path.join(self.folder.name, name)
        with open(path, "wb") as f:
            f.write(content if isinstance(content, bytes) else content.encode())
        return path

    def path(self, name):
        return os.path.join(self.folder.name, name)

    def run_program(self, *arguments, **options):
        return subprocess.run([PROGRAM, *map(str, arguments)], stdin=subprocess.DEVNULL,
                              **{"capture_output": True, "timeout": 500, **options})

    def succeeds(self, *arguments):
        done = self.run_program(*arguments)
        self.assertEqual(done.returncode, 0, done.stderr.decode())
        return done

    def refused(self, words, *arguments, code=2, **options):
        """Exit code 2, nothing on stdout and one line on stderr that holds all `words`. Returns that line."""
        done = self.run_program(*arguments, **options)
        message = done.stderr.decode()
        self.assertEqual(done.returncode, code, message)
        self.assertFalse(done.stdout)
        self.assertEqual(message.count("\n"), 1, message)
        self.assertTrue(message.startswith("thriftattn: ") and message.endswith("\n"), message)
        self.assertTrue(message[:-1].isprintable(), f"control characters reach the terminal: {message!r}")
        for word in words:
            self.assertIn(str(word), message)
        return message


def main():
    unittest.main(argv=[sys.argv[0], *sys.argv[3:]])
