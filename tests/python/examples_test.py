import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.name)
def test_example_runs(example, tmp_path):
    if "transformers" in example.read_text():
        pytest.importorskip("transformers", minversion="5.24")
    done = subprocess.run(
        [sys.executable, example], cwd=tmp_path, env=os.environ, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout


@pytest.mark.parametrize("notebook", sorted((ROOT / "examples").glob("*.ipynb")), ids=lambda path: path.name)
def test_notebook_runs(notebook):
    pytest.importorskip("transformers", minversion="5.24")
    for needed in ("matplotlib", "ipykernel"):
        pytest.importorskip(needed)
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    cells = nbformat.read(notebook, as_version=4)
    nbclient.NotebookClient(cells, timeout=300, resources={"metadata": {"path": str(ROOT)}}).execute()
