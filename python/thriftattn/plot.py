"""Pictures of what a method does. Each function draws on `ax`, or on an axis of its own, and returns the figure.

`loss_by_position` and `recovery` read what `thriftattn eval --json FILE` wrote: json.load() of it, or its path.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from os import PathLike

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure

from . import PAGE_TOKENS, KvCache, Selection

__all__ = ["loss_by_position", "memory", "promoted_pages", "recovery"]

TIERS = ("none", "fp4", "fp4x2", "fp16")


def promoted_pages(layers: Sequence[Selection], tokens: int, *, ax: Axes | None = None) -> Figure:
    """In which tier a decode step of one sequence read each page, a row for each layer and KV head.

    layers: the selection of each layer, e.g. [s.selection for (s,) in ThriftCache.stats].
    tokens: of the sequence.
    """
    ax = ax or plt.subplots()[1]
    heads = [len(selection.offsets) - 1 for selection in layers]
    tier = np.zeros((sum(heads), tokens // PAGE_TOKENS))
    row = 0
    for selection in layers:
        offsets, pages, tiers = selection.offsets, selection.pages, selection.tiers
        for first, end in zip(offsets, offsets[1:]):
            tier[row, pages[first:end]] = tiers[first:end]
            row += 1
    colors = ListedColormap(["#f2f2f2", "#9ecae1", "#4292c6", "#08306b"])
    image = ax.imshow(tier, aspect="auto", interpolation="nearest", cmap=colors, norm=BoundaryNorm(range(5), 4))
    bar = ax.figure.colorbar(image, ax=ax, ticks=np.arange(4) + 0.5)
    bar.ax.set_yticklabels(["rest", *TIERS[1:]])
    ax.set(xlabel=f"page of {PAGE_TOKENS} tokens", ylabel="layer", title=f"promoted pages at {tokens} tokens")
    ax.set_yticks(np.cumsum([0, *heads[:-1]]), range(len(heads)))
    return ax.figure


def loss_by_position(report: dict | str | PathLike, *, against: str = "fp16", ax: Axes | None = None) -> Figure:
    """What each method loses to `against` along the text, nats per token: mean over the texts of an eval report."""
    ax = ax or plt.subplots()[1]
    curves = {}
    for row in _rows(report):
        curves.setdefault(row["method"], []).append([bucket["nll"] for bucket in row["nll_by_position"]])
        position = [(bucket["from"] + bucket["to"]) / 2 for bucket in row["nll_by_position"]]
    if against not in curves:
        raise ValueError(f"the report has no method {against!r}: {', '.join(curves)} are there")
    reference = np.mean(curves.pop(against), axis=0)
    for method, nll in curves.items():
        ax.plot(position, np.mean(nll, axis=0) - reference, marker=".", label=method)
    ax.axhline(0, color="black", linewidth=0.8)
    ax.set(xlabel="position, tokens", ylabel=f"loss to {against}, nats per token")
    ax.legend()
    return ax.figure


def recovery(report: dict | str | PathLike, *, ax: Axes | None = None) -> Figure:
    """The share of the loss of `paper-fp4` that methods give back, against the share of pages that they promote."""
    ax = ax or plt.subplots()[1]
    points = {}
    for row in _rows(report):
        if row["recovery"] is not None:
            points.setdefault(row["method"], []).append((row["share_promoted"], row["recovery"]))
    for method, of_texts in points.items():
        promoted, recovered = 100 * np.mean(of_texts, axis=0)
        ax.scatter(promoted, recovered)
        ax.annotate(method, (promoted, recovered), xytext=(4, 4), textcoords="offset points", fontsize="small")
    ax.axhline(100, color="black", linewidth=0.8)
    ax.set(xlabel="pages promoted, %", ylabel="recovery of the loss of paper-fp4, %")
    return ax.figure


def memory(
    methods: Sequence[str], contexts: Sequence[int], *, layers: int, h_kv: int, d: int, ax: Axes | None = None
) -> Figure:
    """GiB that the cache of each method takes at each context (tokens), for a model of this shape."""
    ax = ax or plt.subplots()[1]
    for method in methods:
        few, more = (_bytes(method, pages * PAGE_TOKENS, h_kv, d) for pages in (16, 32))
        by_token = (more - few) / (16 * PAGE_TOKENS)  # from a few pages on, each page more takes the same
        gib = [layers * (few + by_token * (n - 16 * PAGE_TOKENS)) / 2**30 for n in contexts]
        ax.plot(contexts, gib, marker=".", label=method)
    ax.set(xlabel="context, tokens", ylabel="cache, GiB", xscale="log", yscale="log")
    ax.legend()
    return ax.figure


def _rows(report):
    if not isinstance(report, dict):
        with open(report) as file:
            report = json.load(file)
    if report.get("schema") != "thriftattn.eval/1":
        raise ValueError(f"schema {report.get('schema')!r} is not supported: thriftattn.eval/1 is")
    return [row for row in report["rows"] if row.get("nll_by_position")]


def _bytes(method, tokens, h_kv, d):
    cache = KvCache(method, h_kv=h_kv, d=d)
    seq = cache.new_sequence()
    zeros = np.zeros((1, tokens, h_kv, d), np.float16)
    cache.append([seq], zeros, zeros)
    cache.settle([seq])
    return cache.bytes().total
