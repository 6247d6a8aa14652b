import json
import subprocess
import sys

import thriftattn as ta


def run(*args):
    return subprocess.run([sys.executable, "-m", "thriftattn", *args], capture_output=True, text=True)


def test_doctor_is_the_programs():
    done = run("doctor", "--json", "--s-kv", "4096")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["version"] == ta.__version__ and report["plans"]["decode"]["backend"] == "cpu"


def test_exit_codes_are_the_programs():
    assert run("inspect", "nothing-here").returncode == 2


def test_import_needs_no_torch():
    code = "import sys; sys.modules['torch'] = None; import thriftattn; print(thriftattn.plan(s_kv=99, h_q=1, h_kv=1, d=64))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
