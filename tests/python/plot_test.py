import json

import numpy as np
import pytest

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402

import thriftattn as ta  # noqa: E402
from thriftattn import plot  # noqa: E402


@pytest.fixture
def ax():
    figure, ax = plt.subplots()
    yield ax
    plt.close(figure)


def row(method, losses, recovery, promoted):
    buckets = [{"from": 64 * i, "to": 64 * i + 64, "nll": x} for i, x in enumerate(losses)]
    return {"method": method, "recovery": recovery, "share_promoted": promoted, "nll_by_position": buckets}


REPORT = {
    "schema": "thriftattn.eval/1",
    "rows": [
        row("fp16", [3.0, 2.0], None, 1.0),
        row("fp4", [3.5, 2.25], 0.5, 0.0),
        row("fp16", [1.0, 1.0], None, 1.0),
        row("fp4", [1.5, 1.25], 0.7, 0.0),
    ],
}


def test_promoted_pages_has_a_row_for_each_layer_and_head(ax):
    layers = [ta.Selection([0, 1, 3], [0, 2, 4], [3, 2, 2]), ta.Selection([0, 0, 1], [1], [3])]
    assert plot.promoted_pages(layers, 330, ax=ax) is ax.figure
    expected = [[3, 0, 0, 0, 0], [0, 0, 2, 0, 2], [0, 0, 0, 0, 0], [0, 3, 0, 0, 0]]
    np.testing.assert_array_equal(ax.images[0].get_array(), expected)


def test_loss_by_position_is_the_mean_over_texts(ax, tmp_path):
    path = tmp_path / "report.json"
    path.write_text(json.dumps(REPORT))
    assert plot.loss_by_position(path, ax=ax) is ax.figure
    np.testing.assert_allclose(ax.lines[0].get_xydata(), [[32, 0.5], [96, 0.25]])
    with pytest.raises(ValueError, match="no method 'thrift': fp16, fp4 are there"):
        plot.loss_by_position(REPORT, against="thrift", ax=ax)
    with pytest.raises(ValueError, match="schema"):
        plot.loss_by_position({"schema": "other"}, ax=ax)


def test_recovery_against_promoted_pages(ax):
    assert plot.recovery(REPORT, ax=ax) is ax.figure
    np.testing.assert_allclose(ax.collections[0].get_offsets(), [[0, 60]])


def test_memory_is_what_a_cache_takes(ax):
    assert plot.memory(["fp16", "thrift"], [2048, 4096], layers=3, h_kv=2, d=32, ax=ax) is ax.figure
    cache = ta.KvCache("thrift", h_kv=2, d=32, layers=3)
    seq = cache.new_sequence()
    kv = np.zeros((1, 4096, 2, 32), np.float32)
    for layer in range(3):
        cache.append([seq], kv, kv, layer=layer)
        cache.settle([seq], layer=layer)
    assert ax.lines[1].get_ydata()[1] * 2**30 == pytest.approx(cache.bytes().total, rel=0.01)


def test_an_axis_of_its_own():
    plt.close(plot.recovery(REPORT))
