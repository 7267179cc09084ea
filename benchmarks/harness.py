"""Timing, correctness gates and raw results shared by the bench_<op>.py scripts."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton

REPLAYS = 20
# Inputs rotate so that a replay finds none of its KV in the 50 MB L2 cache.
COLD_BYTES = 200 << 20


def parser(description: str) -> argparse.ArgumentParser:
    """Options every benchmark has."""
    p = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, help="append raw results to this JSONL file")
    p.add_argument("--quick", action="store_true", help="the shapes of the README table only")
    return p


def microseconds(calls: list[Callable[[], Any]]) -> float:
    """Median device time of one call. `calls` do the same work on different inputs, taken in turn.

    All are recorded into one CUDA graph, so that launch gaps of the host do not count.
    """
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for call in calls:
                call()
        graph.replay()
        times = []
        for _ in range(REPLAYS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            stream.synchronize()
            times.append(start.elapsed_time(end) * 1000 / len(calls))
    return statistics.median(times)


def copies(bytes_each: int) -> int:
    """How many input sets of this size keep the cache cold."""
    return max(1, min(16, COLD_BYTES // max(1, bytes_each)))


def copy_rate() -> float:
    """Measured device copy rate in GB/s, bytes read plus bytes written."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / microseconds([lambda: target.copy_(source)]) / 1000


class Results:
    """Collects rows, prints them, and appends them to a JSONL file with where they come from."""

    def __init__(self, op: str, out: Path | None):
        self.op, self.out = op, out
        self.rate = copy_rate()
        self.origin = {
            "gpu": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "python": platform.python_version(),
            "commit": commit(),
            "command": " ".join(sys.argv),
            "copy_gbps": round(self.rate),
        }
        print(f"{op}: {self.origin}")

    def add(self, provider: str, shape: dict[str, Any], us: float, nbytes: int) -> None:
        """One measurement; `nbytes` is the least traffic the work needs (each input read once)."""
        gbps = nbytes / us / 1000
        row = {"op": self.op, "provider": provider, **shape, "us": round(us, 2), "gbps": round(gbps)}
        row["of_copy_rate"] = round(gbps / self.rate, 3)
        print(json.dumps(row), flush=True)
        if self.out:
            with self.out.open("a") as f:
                f.write(json.dumps({**row, **self.origin}) + "\n")


def commit() -> str:
    """The commit measured: STS_COMMIT where there is no repository, else git's answer."""
    if "STS_COMMIT" in os.environ:
        return os.environ["STS_COMMIT"]
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return found.stdout.strip() or "unknown"
