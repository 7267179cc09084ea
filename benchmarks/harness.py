"""Timing, correctness gates, tuning and raw results shared by the bench_<op>.py scripts."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.errors import OutOfResources
from triton.runtime.jit import JITFunction

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton's interpreter multiplies the bits of bfloat16, not their values.
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float16
REPLAYS = 20
# Inputs rotate so that a replay finds none of its KV in the 50 MB L2 cache.
COLD_BYTES = 200 << 20

Shape = dict[str, Any]
Knobs = dict[str, Any]


def parser(description: str) -> argparse.ArgumentParser:
    """Options every benchmark has."""
    p = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, help="append raw results to this JSONL file")
    p.add_argument("--quick", action="store_true", help="the shapes of the README table only")
    p.add_argument("--tune", action="store_true", help="time every setting of the knobs on those shapes")
    return p


def add_fp8(p: argparse.ArgumentParser) -> None:
    """For benchmarks of ops that read keys and values."""
    p.add_argument("--fp8", action="store_true", help="of FP8 keys and values; give --out a file of its own")


def add_heads(p: argparse.ArgumentParser) -> None:
    """For benchmarks of ops whose tiles are powers of two."""
    p.add_argument(
        "--heads",
        action="store_true",
        help="query groups 1 to 8 and heads of 64, 96 and 128 at 32,768 x 8, ours alone, each beside the "
        "powers of two that its tiles are padded to",
    )


def heads_of(shapes: list[Shape]) -> list[Shape]:
    """Of shapes that a benchmark has, that at 32,768 x 8, with every query group and head."""
    (first,) = (shape for shape in shapes if (shape["context"], shape["batch"]) == (32768, 8))
    return [{**first, "dim": dim, "group": group} for dim in (64, 96, 128) for group in range(1, 9)]


def stored(shape: Shape, dtype: torch.dtype) -> torch.dtype:
    """What a shape keeps keys and values as: its "stored", by torch's name, or the dtype of queries."""
    return getattr(torch, shape["stored"]) if "stored" in shape else dtype


def check_arms(p: argparse.ArgumentParser, given: str, arms: tuple[str, ...]) -> None:
    """End with a usage error where a comma separated list names an arm that there is not."""
    if unknown := set(given.split(",")) - set(arms):
        p.error(f"--arms: no {', '.join(sorted(unknown))}; there are {', '.join(arms)}")


def microseconds(calls: list[Callable[[], Any]], replays: int = REPLAYS) -> float:
    """Median device time of one call. `calls` do the same work on different inputs, taken in turn.

    All are recorded into one CUDA graph, so that launch gaps of the host do not count.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())  # which makes the inputs
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
        for _ in range(replays):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            stream.synchronize()
            times.append(start.elapsed_time(end) * 1000 / len(calls))
    return statistics.median(times)


def copies(bytes_each: int, most: int = 8) -> int:
    """How many input sets of this size keep the cache cold."""
    return max(1, min(most, -(-COLD_BYTES // max(1, bytes_each))))


def copy_rate() -> float:
    """Measured device copy rate in GB/s, bytes read plus bytes written."""
    source = torch.ones(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / microseconds([lambda: target.copy_(source)]) / 1000


def read_rate() -> float | None:
    """Measured rate in GB/s at which the device reads memory once, in a plain sum; None without a GPU."""
    if DEVICE != "cuda":
        return None
    source = torch.ones(1 << 28, dtype=torch.float32, device=DEVICE)
    rate = source.nbytes / microseconds([source.sum]) / 1000
    del source
    torch.cuda.empty_cache()  # servers want the memory
    return round(rate)


class Results:
    """Gates and rows: appended to a JSONL file with where they come from, shown as one table at the end."""

    def __init__(self, op: str, out: Path | None):
        self.op, self.out = op, out
        self.rows: list[tuple[Shape, str, float]] = []
        self.gates = self.failed = 0
        self.rate = copy_rate()
        self.origin = {
            "gpu": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "python": platform.python_version(),
            "commit": commit(),
            "command": " ".join(Path(word).name if word.startswith("/") else word for word in sys.argv),
            "copy_gbps": round(self.rate),
        }
        print(f"{op}: {self.origin}")

    def gate(self, provider: str, shape: Shape, check: Callable[[], None]) -> bool:
        """Whether a provider equals the twin; one that does not is not timed, and fails the run."""
        self.gates += 1
        try:
            check()
        except AssertionError as error:
            self.failed += 1
            print(f"{self.op}: {provider} is WRONG at {shape}: {str(error)[:400]}", flush=True)
            return False
        return True

    def add(self, provider: str, shape: Shape, us: float, nbytes: int, **more: Any) -> None:
        """One measurement; `nbytes` is the least traffic the work needs (each input read once)."""
        gbps = nbytes / us / 1000
        row = {"op": self.op, "provider": provider, **shape, "us": round(us, 2), "gbps": round(gbps)}
        row |= {"of_copy_rate": round(gbps / self.rate, 3), **more}
        if not more:
            self.rows.append((shape, provider, us))
        if self.out:
            with self.out.open("a") as f:
                f.write(json.dumps({**row, **self.origin}) + "\n")

    def beside_powers(self, provider: str, nbytes: Callable[[Shape], int]) -> None:
        """Print what every group and head reaches by bytes, and which part that is of what its next powers of
        two reach."""
        rates = {
            (shape["group"], shape["dim"]): nbytes(shape) / us / 1000
            for shape, name, us in self.rows
            if name == provider
        }
        for (group, dim), rate in rates.items():
            power = rates.get((1 << (group - 1).bit_length(), 1 << (dim - 1).bit_length()))
            part = f", {rate / power:.2f} of the powers of two" if power else ""
            print(f"{provider}: {group} x {dim}: {rate:.0f} GB/s{part}")

    def finish(self, across: str = "keep") -> None:
        """Print a line a shape, in microseconds, values of `across` beside each other; exit by the gates."""
        table: dict[str, dict[str, float]] = {}
        for shape, provider, us in self.rows:
            line = "/".join(str(v) for k, v in shape.items() if k != across)
            column = provider + (f"@{shape[across]}" if across in shape else "")
            table.setdefault(line, {})[column] = us
        columns = sorted({column for cells in table.values() for column in cells})
        print("/".join(k for k in next(iter(self.rows), [{}])[0] if k != across), *columns)
        for line, cells in table.items():
            print(f"{line:18}", *(f"{cells.get(column, float('nan')):7.1f}" for column in columns))
        print(f"{self.op}: {self.gates} gates, {self.failed} failed, copy rate {self.rate:.0f} GB/s")
        sys.exit(self.failed > 0)


def commit() -> str:
    """The commit measured: STS_COMMIT where there is no repository, else git's answer."""
    if "STS_COMMIT" in os.environ:
        return os.environ["STS_COMMIT"]
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return found.stdout.strip() or "unknown"


# ---- knobs


def settings(grid: dict[str, list]) -> list[Knobs]:
    """Every combination of a grid of knobs."""
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


@contextlib.contextmanager
def using(module: ModuleType, knobs: Knobs) -> Iterator[None]:
    """A kernel's `KNOBS` set to these for a while."""
    before = module.KNOBS
    module.KNOBS = dataclasses.replace(before, **knobs)
    try:
        yield
    finally:
        module.KNOBS = before


def tune(results: Results, module: ModuleType, grid: list[Knobs], shape: Shape, prepare: Callable) -> None:
    """Time every setting on one shape. `prepare` gives calls, a check of one call, and their bytes."""
    calls, check, nbytes = prepare(shape)
    found = []
    for knobs in grid:
        with using(module, knobs):
            try:
                if not results.gate(f"triton {knobs}", shape, check):
                    continue
                us = microseconds(calls, replays=10)
            except OutOfResources as error:
                print(f"{knobs} does not fit: {error}")
                continue
        found.append((us, knobs))
        results.add("triton", shape, us, nbytes, knobs=knobs)
    for us, knobs in sorted(found, key=lambda f: f[0])[:5]:
        print(f"{shape}: {us:.1f} us {nbytes / us / 1000:.0f} GB/s {knobs}", flush=True)


# ---- compiling without launching: ahead of timing, in many processes, or where there is no GPU


class NoGpu:
    """What Triton asks of a driver to compile for sm_90."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def compile_only() -> Iterator[list]:
    """Ops called on tensors of the meta device compile their kernels; yields (name, compiled kernel)s."""
    compiled: list = []
    run, driver = JITFunction.run, triton.runtime.driver
    before = driver._active

    def compile_instead(self, *args, grid, warmup, **kwargs):
        compiled.append((self.__name__, run(self, *args, grid=grid, warmup=True, **kwargs)))

    driver.set_active(NoGpu())
    JITFunction.run = compile_instead
    try:
        yield compiled
    finally:
        JITFunction.run = run
        driver.set_active(before)


def compile_ahead(
    compile_one: Callable[[Shape, Knobs], None], shapes: list[Shape], grid: list[Knobs]
) -> None:
    """Fill Triton's cache from up to 12 processes. They are forked: call it before anything uses CUDA."""
    fork = multiprocessing.get_context("fork")
    work = [(shape, knobs) for knobs in grid for shape in shapes]
    with ProcessPoolExecutor(min(12, os.cpu_count() or 1), mp_context=fork) as pool:
        running = [(pool.submit(compile_one, *w), w) for w in work]
        for future, w in running:
            if future.exception():
                print(f"does not compile: {w}: {str(future.exception())[-300:]}")
