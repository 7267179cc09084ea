"""Before and after the restructuring of the code, from results/house: both sides in one run on one card."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict

from benchmarks.quality.report import table
from benchmarks.tables import RESULTS

FOLDER = RESULTS / "house"
SHAPE = ("context", "batch", "dim", "rows", "group", "keep", "step")


def restructuring() -> str:
    """Medians of the old commit and of the new one, and what lies between repeats of the same side."""
    serving = [
        _serving_line(arm, *shape) for arm in ("sts", "sts-draft") for shape in ((128000, 1), (32000, 8))
    ]
    kernels = [_kernel_line(op) for op in ("verify", "draft_attention")]
    head = ["", "before", "after", "after / before", "spread of one side"]
    one = json.loads((FOLDER / "serving_new.jsonl").read_text().splitlines()[0])
    note = (
        "Tokens per second (more is better), medians of three passes; microseconds of kernels, the geometric "
        "mean over the quick shapes of the median of two runs. The spread is the largest distance between "
        f"repeats of one side, over their median. {one['gpu']}, everything in turn on one card, commits "
        f"{_commit('serving', 'old')} and {one['commit']}."
    )
    return table(head, [*serving, *kernels]) + "\n\n" + note


def _rows(name: str, side: str) -> list[dict]:
    return [json.loads(line) for line in (FOLDER / f"{name}_{side}.jsonl").read_text().splitlines()]


def _commit(name: str, side: str) -> str:
    return _rows(name, side)[0]["commit"]


def _line(name: str, sides: dict[str, list[list[float]]], digits: int) -> list[str]:
    """`sides`: for old and new, the repeats of every case."""
    means = {
        side: statistics.geometric_mean(statistics.median(repeats) for repeats in cases)
        for side, cases in sides.items()
    }
    spread = max(
        (max(repeats) - min(repeats)) / statistics.median(repeats)
        for cases in sides.values()
        for repeats in cases
    )
    shown = [f"{means[side]:,.{digits}f}" for side in ("old", "new")]
    return [name, *shown, f"{means['new'] / means['old']:.3f}", f"{spread:.1%}"]


def _serving_line(arm: str, context: int, requests: int) -> list[str]:
    def speeds(side: str) -> list[list[float]]:
        wanted = (arm, context, requests)
        found = [r for r in _rows("serving", side) if (r["arm"], r["context"], r["requests"]) == wanted]
        return [[r["tokens_per_s"] for r in found]]

    return _line(f"`{arm}`, {context:,} x {requests}", {s: speeds(s) for s in ("old", "new")}, 1)


def _kernel_line(op: str) -> list[str]:
    def times(side: str) -> dict[tuple, list[float]]:
        found: dict[tuple, list[float]] = defaultdict(list)
        for r in _rows(op, side):
            if r["provider"].startswith("triton"):
                found[r["provider"], *(r.get(key) for key in SHAPE)].append(r["us"])
        return found

    old, new = times("old"), times("new")
    assert old.keys() == new.keys()
    name = {"verify": "sparse verify", "draft_attention": "draft attention"}[op]
    return _line(f"{name}, microseconds", {"old": [*old.values()], "new": [new[key] for key in old]}, 1)
