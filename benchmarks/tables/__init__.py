"""Tables of what was measured, each from the files of benchmarks/results that its function names.

Medians over repeats and passes, and half their spread. A file that is not there yet makes no table.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from pathlib import Path

RESULTS = Path(__file__).parents[1] / "results"
MISSING = "Not measured yet."


def rows(name: str) -> list[dict]:
    path = RESULTS / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def timings(op: str) -> list[dict]:
    """Of a kernel as it is shipped, without those of searching for its knobs."""
    return [r for r in rows(f"{op}.jsonl") if "knobs" not in r]


def commits(found: Iterable[dict]) -> str:
    return ", ".join(dict.fromkeys(r["commit"] for r in found))


def spread(values: list[float]) -> str:
    """Median ± half the spread."""
    return f"{statistics.median(values):,.0f} ± {(max(values) - min(values)) / 2:,.0f}"


def gpus(found: Iterable[dict]) -> str:
    return " and ".join(by_gpu(found))


def by_gpu(found: Iterable[dict]) -> dict[str, list[dict]]:
    """Rows of each card."""
    own: dict[str, list[dict]] = {}
    for r in found:
        own.setdefault(r["gpu"], []).append(r)
    return own


def card(gpu: str) -> str:
    """As tables name it: H200 for NVIDIA H200."""
    return gpu.removeprefix("NVIDIA ").split()[0]


def shapes_of(found: list[dict]) -> list[tuple[int, int]]:
    return list(dict.fromkeys((r["context"], r["requests"]) for r in found))
