"""Where a decode round goes: kernels by time, the device's idle time, and the host's waits, per arm.

    python -m benchmarks.profile_round --dummy --shape 32000x8 --accept-length 3 --arms stock-spec,sts \\
        --server-args "--context-length 131072 --cuda-graph-max-bs 8" --out profile.jsonl
    python -m benchmarks.profile_round --dummy --algorithm EAGLE3 --shape mixed:2000-64000x16 --topk 4 \\
        --arms sts --server-args "--context-length 131072 --cuda-graph-max-bs 16" --out profile.jsonl
    python -m benchmarks.profile_round --dummy --algorithm NONE --shape 32000x8 \\
        --server-args "--context-length 131072 --cuda-graph-max-bs 8" --out profile.jsonl

Serves each arm of bench_serving, prefills, and records a few rounds in SGLang's own profiler while all
requests decode. Counts are per round: a target verify, or without a draft a decode step, which is one launch
of a graph. What scores and selects is shown by the files of its kernels (sts_kernels/page_scores.py, whose
pooling is that of tokens too, pages.py, tokens.py, select.py, kept.py), as a share of the round. A host that
waits for the device (cudaStreamSynchronize and its kind, cudaMalloc, blocking copies) in sts and not in stock
is a defect.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from benchmarks import bench_serving
from benchmarks.serving_arms import ARMS_OF
from sts_kernels import kept, page_scores, pages, select, tokens
from sts_sglang.tools.local_server import LocalServer, stop_when_terminated

WAITS = (
    "cudaStreamSynchronize",
    "cudaDeviceSynchronize",
    "cudaEventSynchronize",
    "cudaMalloc",
    "cudaFree",
    "cudaMemcpyAsync",
    "cudaGraphLaunch",
)

SELECTS = {"page_scores": page_scores, "pages": pages, "tokens": tokens, "select": select, "kept": kept}
REST = "rest"


def record(server: LocalServer, prompts: list[list[int]], rounds: int, tokens: int = 3000) -> list[dict]:
    """Events of a trace over about `rounds` decode rounds of a batch that is prefilled already.

    `tokens`, which each request may decode, must last for two seconds; the requests are aborted then.
    """
    for ids in prompts:
        bench_serving.ask(server, ids, 1)
    running = [threading.Thread(target=bench_serving.ask, args=(server, ids, tokens)) for ids in prompts]
    for thread in running:
        thread.start()
    time.sleep(1.5)  # all of them decode by now
    with tempfile.TemporaryDirectory() as folder:
        body = {"output_dir": folder, "activities": ["CPU", "GPU"], "num_steps": rounds, "with_stack": False}
        server.post_text("/start_profile", body)
        deadline = time.monotonic() + 60
        while not any(Path(folder).rglob("*.json.gz")):
            if time.monotonic() > deadline:
                raise SystemExit("the server wrote no trace")
            time.sleep(0.5)
        time.sleep(2)  # written to its end
        first = min(Path(folder).rglob("*.json.gz"))  # under --tp every rank writes one
        with gzip.open(first) as file:
            events = json.load(file)["traceEvents"]
    server.post_text("/abort_request", {"rid": "", "abort_all": True})
    for thread in running:
        thread.join()
    return [e for e in events if e.get("ph") == "X"]


def short(name: str) -> str:
    """A kernel's name without its template arguments."""
    name = re.sub(r"^void ", "", name)
    return re.split(r"[<(]", name)[0][-60:] or name[:60]


class Timeline(NamedTuple):
    """Microseconds: of everything, and with no kernel, by what is before and after. late: of these, before
    the host's call that launched what comes after had returned, or begun where it copies."""

    wall: float
    gaps: dict[str, float]
    late: dict[str, float]


def timeline(kernels: list[dict], calls: list[dict]) -> Timeline:
    """From the first kernel to the end of the last. calls: of the host."""
    # A copy's call may return when the copy has ended.
    launched = {
        correlation(e): e["ts"] + (0 if e["name"].startswith("cudaMemcpy") else e["dur"]) for e in calls
    }
    end, last, gaps, late = min(e["ts"] for e in kernels), "", defaultdict(float), defaultdict(float)
    begin = end
    for e in sorted(kernels, key=lambda e: (e["ts"], e["dur"])):
        start, name = e["ts"], short(e["name"])
        if start > end:
            pair = f"{last} > {name}"
            gaps[pair] += start - end
            late[pair] += max(0, min(start, launched.get(correlation(e), end)) - end)
        if start + e["dur"] > end:
            end, last = start + e["dur"], name
    return Timeline(end - begin, gaps, late)


def correlation(event: dict) -> int | None:
    """Which call launched which kernel; all kernels of a graph have that of its launch."""
    return event.get("args", {}).get("correlation")


def verifies(kernels: Counter, host: Counter) -> int:
    """Rounds of a target with a draft, by what each has once, whatever the server."""
    # A selector for comparison launches `_select_kernel` in every layer.
    names = ("VerifyTree", "verify_tree", "TreeSpeculative", "simulate", "_select_kernel")
    return next((n for key in names for name, n in kernels.items() if key in name), 0)


def steps(kernels: Counter, host: Counter) -> int:
    """Decode steps of a target alone. Stock has no kernel of its own in each, but both replay one graph."""
    return host["cudaGraphLaunch"]


def parts(spent: dict[str, float]) -> dict[str, float]:
    """Microseconds of what scores and selects, by the file that defines the kernel, and of the rest."""
    of = {kernel: part for part, module in SELECTS.items() for kernel in kernels_of(module)}
    found = dict.fromkeys((*SELECTS, REST), 0.0)
    for name, us in spent.items():
        found[of.get(name, REST)] += us
    return found


def kernels_of(module: ModuleType) -> list[str]:
    """Names in a trace of those that a file defines."""
    found = {name: value for name, value in vars(module).items() if name.endswith("_kernel")}
    return [name for name, kernel in found.items() if kernel.fn.__module__ == module.__name__]


def summary(events: list[dict], top: int, rounds_of: Callable[[Counter, Counter], int] = verifies) -> dict:
    """Per round: microseconds by kernel, busy and idle time of the device, what it idles between and how much
    of that the host was late, and the host's calls.

    Args:
        rounds_of: `verifies` or `steps`, from how often each kernel ran and each call of the host.

    Raises:
        SystemExit: no kernels, or no round.
    """
    kernels = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    if not kernels:
        raise SystemExit("the trace holds no kernels")
    counts = Counter(short(e["name"]) for e in kernels)
    calls = [e for e in events if e.get("cat") in ("cuda_runtime", "cuda_driver")]
    host = Counter(e["name"] for e in calls)
    if not (rounds := rounds_of(counts, host)):
        raise SystemExit(f"the trace holds no {rounds_of.__name__}")
    spent: dict[str, float] = defaultdict(float)
    for e in kernels:
        spent[short(e["name"])] += e["dur"]
    wall, gaps, late = timeline(kernels, calls)
    by_part = parts(spent)
    selecting = sum(by_part.values()) - by_part[REST]
    order = sorted(spent, key=spent.get, reverse=True)
    between = sorted(gaps, key=gaps.get, reverse=True)[: top // 2]

    def by_pair(us: dict[str, float]) -> dict[str, float]:
        return {pair: round(us[pair] / rounds, 1) for pair in between}

    return {
        "rounds": rounds,
        "round_us": round(wall / rounds, 1),
        "idle_us": round(sum(gaps.values()) / rounds, 1),
        "parts": {part: round(us / rounds, 1) for part, us in by_part.items()},
        "select_share": round(selecting / wall, 4),
        "kernels": {
            n: {"us": round(spent[n] / rounds, 1), "calls": round(counts[n] / rounds, 2)} for n in order[:top]
        },
        "late_us": round(sum(late.values()) / rounds, 1),
        "gaps": by_pair(gaps),
        "late": by_pair(late),
        "host_calls": {name: round(host[name] / rounds, 2) for name in WAITS},
    }


def main(argv: list[str] | None = None) -> None:
    stop_when_terminated()
    p = argparse.ArgumentParser(
        description=__doc__,
        epilog="further options, --dummy, --arms, --out and others, are those of benchmarks.bench_serving",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--shape", default="32000x8", help="one of bench_serving's --shapes (%(default)s)")
    p.add_argument("--rounds", type=int, default=12, help="scheduler steps to record (%(default)s)")
    p.add_argument("--top", type=int, default=24, help="kernels to show (%(default)s)")
    own, rest = p.parse_known_args(argv)
    options = bench_serving.parse([*rest, "--shapes", own.shape])
    bench_serving.prepare(options)
    (shape,) = options.shapes
    prompts = bench_serving.prompts_of(shape, options)
    for arm in options.arms.split(","):
        known = ARMS_OF[options.algorithm][arm]
        with bench_serving.serve(arm, 0, options) as server:
            found = summary(record(server, prompts, own.rounds), own.top, verifies if known.drafts else steps)
            row = {"arm": arm, **shape.fields(), **found, **bench_serving.served(known, options)}
            row |= {"server": server.shown_command(), **options.where}
        if options.out:
            with options.out.open("a") as f:
                f.write(json.dumps(row) + "\n")
        idle = f"idle {found['idle_us']:.0f} us, of which the host was late {found['late_us']:.0f} us"
        print(f"\n{arm} {shape}: round {found['round_us']:.0f} us, {idle}")
        spent = ", ".join(f"{part} {us:.0f} us" for part, us in found["parts"].items())
        print(f"  scores pages and selects: {found['select_share']:.1%} of a round; {spent}")
        print(f"  host per round: {found['host_calls']}")
        for name, k in found["kernels"].items():
            print(f"  {k['us']:9.1f} us  {k['calls']:7.2f} x  {name}")
        print("  idle between:")
        for pair, us in found["gaps"].items():
            print(f"  {us:9.1f} us, {found['late'][pair]:9.1f} us late  {pair}")


if __name__ == "__main__":
    main()
