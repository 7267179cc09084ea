"""What sparse verify costs in answers, by selector and budget, through the real server.

    python -m benchmarks.quality --quick                         # minutes on a CPU, a first look
    python -m benchmarks.quality --items 200 --lengths 16384 32768 --text-lengths 4096 16384 32768

Each arm is a server of its own (the shipped pair, speculation 3 steps, 4 tokens); all get the same items at
every keep, greedily: recall tasks in the manner of RULER, several questions over one document in the manner
of SCBench (`shared`), and held-out text, forced token by token (`text`). Results go to OUT/ARM.jsonl, a line
a cell as it is done; cells that are there are not measured again, so a run that was cut off goes on where it
stopped. At the end benchmarks.quality.report makes OUT/report.md and OUT/pareto.png from these files.
A verify that was not what the arm says ends the run.

arms:
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.harness import end_orderly_when_terminated
from benchmarks.quality import items, report
from benchmarks.quality.arms import ARMS, ROOT, Plan
from benchmarks.quality.measure import run_arm
from sts_sglang.tools.demo import MODELS
from sts_sglang.tools.local_server import LocalServer

TASKS = (*items.TASKS, "shared", "text")
OUT = ROOT / "benchmarks" / "results" / "quality"
QUICK = {"items": 4, "lengths": [4096], "text_lengths": [4096], "keeps": [0.05, 0.1, 0.25]}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    about = __doc__ + "\n".join(f"  {name:17} {arm.about}" for name, arm in ARMS.items())
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.quality",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--quick", action="store_true", help=f"a small run: {QUICK}, unless given")
    p.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM", help="(all)")
    p.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS, metavar="TASK", help=" ".join(TASKS))
    p.add_argument("--lengths", type=int, nargs="+", help="tokens of a prompt (16384 32768)")
    p.add_argument("--text-lengths", type=int, nargs="+", help="of held-out text (4096 16384 32768)")
    p.add_argument("--keeps", type=float, nargs="+", help="below 0.5, beside dense (0.05 0.1 0.25 0.5)")
    p.add_argument("--items", type=int, help="of a task at a length (200); shared: questions")
    p.add_argument("--concurrency", type=int, help="requests at a time (64, CPU: 4)")
    p.add_argument("--parallel", type=int, default=1, help="arms at a time, on one device (%(default)s)")
    p.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="(%(default)s)")
    p.add_argument("--models", type=Path, default=MODELS, help="folder with target/ and draft/ (the shipped)")
    p.add_argument("--out", type=Path, help="folder (benchmarks/results/quality, quick: .../quality_quick)")
    p.add_argument("--logs", type=Path, help="folder of the server logs (a temporary one)")
    p.add_argument("server", nargs="*", help="further arguments of all servers, after --")
    return p.parse_args(argv)


def plan_of(options: argparse.Namespace) -> Plan:
    full = {
        "items": 200,
        "lengths": [16384, 32768],
        "text_lengths": [4096, 16384, 32768],
        "keeps": [0.05, 0.1, 0.25, 0.5],
    }
    chosen = {key: getattr(options, key) for key in full if getattr(options, key) is not None}
    size = {**full, **(QUICK if options.quick else {}), **chosen}
    if max(size["keeps"]) > 0.5 or min(size["keeps"]) <= 0:
        raise SystemExit("--keeps: from above 0 to 0.5 (dense is measured besides)")
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return Plan(
        tasks=tuple(options.tasks),
        lengths=tuple(size["lengths"]),
        text_lengths=tuple(size["text_lengths"]),
        keeps=tuple(sorted(size["keeps"])),
        items=size["items"],
        concurrency=options.concurrency or (4 if device == "cpu" else 64),
        device=device,
        models=options.models,
        server_args=tuple(options.server),
    )


def main(argv: list[str] | None = None) -> None:
    end_orderly_when_terminated()
    options = parse(argv)
    plan = plan_of(options)
    options.out = options.out or (OUT.with_name("quality_quick") if options.quick else OUT)
    logs = options.logs or Path(tempfile.mkdtemp(prefix="quality-"))
    for folder in (logs, options.out):
        folder.mkdir(parents=True, exist_ok=True)
    tqdm.write(f"{len(options.arms)} arms, device {plan.device}, server logs in {logs}")
    writer, checksum = items.unseen_writer(plan.models / "target")
    servers: list[LocalServer] = []
    with ThreadPoolExecutor(options.parallel) as pool:
        running = [
            pool.submit(run_arm, name, plan, writer, checksum, options.out, logs, servers)
            for name in options.arms
        ]
        try:
            for arm in running:
                arm.result()
        except KeyboardInterrupt:  # threads end when their servers do
            pool.shutdown(wait=False, cancel_futures=True)
            for server in servers:
                server.stop()
            raise
    report.write(options.out)


if __name__ == "__main__":
    sys.exit(main())
