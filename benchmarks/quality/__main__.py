"""What sparse verify costs in answers, by selector and budget, through the real server.

    python -m benchmarks.quality --quick                         # minutes on a CPU, a first look
    python -m benchmarks.quality --items 200 --lengths 16384 32768 --text-lengths 4096 16384 32768
    python -m benchmarks.quality --algorithm EAGLE3 --lengths 4096          # the shipped EAGLE-3 head
    python -m benchmarks.quality --target T --draft D --out DIR             # any pair, in plain words
    python -m benchmarks.quality --target T --algorithm NONE --out DIR      # a target alone

Each arm is a server of its own (speculation 3 steps, 4 tokens; with NONE every decode step is sparse); all
get the same items at every keep, greedily. The shipped target is asked recall tasks in the manner of RULER,
several questions over one document in the manner of SCBench (`shared`), and held-out text, forced token by
token (`text`). Any other is asked look-ups, copies and text in plain words (sts_sglang/evaluate/items.py),
each with dense attention first: what scores below 0.6 there is left out and stated. Results go to
OUT/ARM.jsonl, a line a cell as it is done; cells that are there are not measured again, so a run that was cut
off goes on where it stopped. At the end benchmarks.quality.report makes OUT/report.md and OUT/pareto.png from
these files. A verify or a prefill that was not what the arm says ends the run.

A keep is a share of the context in verify, after a dense prefill. In arms whose prefill is sparse (`prefill`,
`prefill-draft`, `prefill-draft-sparse`, `prefill-verify`, and those of --arm with {"prefill": "sparse"},
whose verifies attend to their own `keep` or to everything) it is a share of the blocks of keys that prompts
attend to. Dense, which they are compared with, is a dense prefill and whole verifies in every arm.

arms:
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.quality import items, report
from benchmarks.quality.arms import ALONE, ARMS, ROOT, Arm, Plan, Suite, own_arm, served_by
from benchmarks.quality.measure import run_arm, try_dense
from sts_sglang.calibrate.command import read_texts
from sts_sglang.config import ConfigError, StsConfig
from sts_sglang.evaluate import pair as pairs
from sts_sglang.evaluate.items import NoRoom, Plain, Source, TooShort
from sts_sglang.tools.demo import MODELS
from sts_sglang.tools.local_server import LocalServer, stop_when_terminated

OUT = ROOT / "benchmarks" / "results" / "quality"
QUICK = {"items": 4, "lengths": [4096], "text_lengths": [4096], "keeps": [0.05, 0.1, 0.25]}
KEEPS = [0.05, 0.1, 0.25, 0.5]
FULL = {  # by suite
    "shipped": {
        "items": 200,
        "lengths": [16384, 32768],
        "text_lengths": [4096, 16384, 32768],
        "keeps": KEEPS,
        "dense_first": 0,
    },
    "plain": {
        "items": 200,
        "lengths": [2048, 4096, 8192],
        "text_lengths": [2048, 4096, 8192],
        "keeps": KEEPS,
        "dense_first": 20,
    },
}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    about = __doc__ + "\n".join(f"  {name:20} {arm.about}" for name, arm in ARMS.items())
    about += f"\n\nwith --algorithm NONE: {', '.join(ALONE)}; `sts` are tokens, by a map, or pages"
    about += "\nwith a head of an EAGLE algorithm: all but prefill-draft and prefill-draft-sparse"
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.quality",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--quick", action="store_true", help=f"a small run: {QUICK}, unless given")
    p.add_argument("--target", help="folder or hub name (the shipped target)")
    p.add_argument("--draft", help="folder or hub name (the shipped draft, or head under EAGLE3)")
    p.add_argument(
        "--algorithm", choices=(*pairs.ALGORITHMS, pairs.NONE), help="(what the draft is made for)"
    )
    p.add_argument("--suite", choices=FULL, help="(shipped for the shipped target, plain for others)")
    p.add_argument("--text", nargs="+", metavar="FILE", help="plain: texts (packages installed here)")
    p.add_argument("--dense-first", type=int, metavar="N", help="items of the first look (plain: 20)")
    p.add_argument("--arms", nargs="+", metavar="ARM", help="(all), and those of --arm")
    p.add_argument(
        "--arm",
        action="append",
        default=[],
        metavar="NAME=JSON",
        help="an arm of your own",
    )
    p.add_argument("--sts-config", default="{}", metavar="JSON", help='of all arms ({"budget": 0}: no floor)')
    p.add_argument("--tasks", nargs="+", metavar="TASK", help="(all of the suite)")
    p.add_argument("--lengths", type=int, nargs="+", help="tokens (16384 32768; plain: 2048 4096 8192)")
    p.add_argument("--text-lengths", type=int, nargs="+", help="(4096 16384 32768; plain: 2048 4096 8192)")
    p.add_argument("--keeps", type=float, nargs="+", help="below 0.5, beside dense (0.05 0.1 0.25 0.5)")
    p.add_argument("--items", type=int, help="of a task at a length (200); shared: questions")
    p.add_argument("--concurrency", type=int, help="requests at a time (64, CPU: 4)")
    p.add_argument("--parallel", type=int, default=1, help="arms at a time, on one device (%(default)s)")
    p.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="(%(default)s)")
    p.add_argument("--out", type=Path, help="folder (benchmarks/results/quality, quick: .../quality_quick)")
    p.add_argument("--logs", type=Path, help="folder of the server logs (a temporary one)")
    p.add_argument("server", nargs="*", help="further arguments of all servers, after --")
    return p.parse_args(argv)


def known_pair(options: argparse.Namespace) -> pairs.Known:
    """The models that are asked for; the shipped ones where none are named."""
    draft = options.draft
    if not draft and options.algorithm != pairs.NONE:
        if options.target:
            raise SystemExit(f"--draft: needed with --target, or --algorithm {pairs.NONE}")
        draft = str(MODELS / ("eagle3" if options.algorithm == "EAGLE3" else "draft"))
    try:
        return pairs.check(options.target or str(MODELS / "target"), draft, options.algorithm)
    except ConfigError as error:
        raise SystemExit(str(error)) from None


def suite_of(options: argparse.Namespace, known: pairs.Known) -> tuple[str, Suite]:
    """Its name and the suite: what the target can be asked."""
    own = Path(known.pair.target)
    name = options.suite or ("shipped" if own.resolve() == (MODELS / "target").resolve() else "plain")
    if name == "shipped":
        return name, items.Shipped(own)
    texts = [t.content for t in read_texts(options.text, "", "--text")] if options.text else items.any_texts()
    return name, Plain(Source(known.tokenizer, texts))


def arms_of(options: argparse.Namespace, pair: pairs.Models) -> dict[str, Arm]:
    """Those of a pair or of a target alone, and those of --arm."""
    arms = dict(served_by(pair.algorithm))
    for given in options.arm:
        name, _, config = given.partition("=")
        try:
            served = StsConfig.parse(config).for_launch(pair.drafts, directions=True)
        except ConfigError as error:
            raise SystemExit(f"--arm {name}: {error}") from None
        arms[name] = own_arm(json.loads(config), config, served.keep)
    if unknown := set(options.arms or ()) - set(arms):
        raise SystemExit(f"--arms: no {', '.join(sorted(unknown))}; there are {', '.join(arms)}")
    return arms


def plan_of(options: argparse.Namespace, known: pairs.Known, name: str, suite: Suite) -> Plan:
    full = FULL[name]
    chosen = {key: getattr(options, key) for key in full if getattr(options, key) is not None}
    size = {**full, **(QUICK if options.quick else {}), **chosen}
    options.dense_first = size["dense_first"]
    if max(size["keeps"]) > 0.5 or min(size["keeps"]) <= 0:
        raise SystemExit("--keeps: from above 0 to 0.5 (dense is measured besides)")
    if unknown := set(options.tasks or ()) - set(suite.tasks):
        raise SystemExit(f"--tasks: no {', '.join(sorted(unknown))}; there are {', '.join(suite.tasks)}")
    for flag in ("lengths", "text_lengths"):
        if known.positions and max(size[flag]) > known.positions:
            said = f"--{flag.replace('_', '-')}: {max(size[flag])}"
            raise SystemExit(f"{said}, the models have positions for {known.positions}")
    config = {"budget": 0, "stand_aside": 0, **json.loads(options.sts_config)}
    if config.get("prefill", "dense") != "dense":
        raise SystemExit("--sts-config: prefill is said by an arm (--arms prefill, or one of --arm)")
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return Plan(
        tasks=tuple(options.tasks or suite.tasks),
        lengths=tuple(size["lengths"]),
        text_lengths=tuple(size["text_lengths"]),
        keeps=tuple(sorted(size["keeps"])),
        items=size["items"],
        concurrency=options.concurrency or (4 if device == "cpu" else 64),
        device=device,
        pair=known.pair,
        server_args=tuple(options.server),
        config=config,
        arms=arms_of(options, known.pair),
        positions=known.positions,
    )


def check_room(plan: Plan, suite: Suite) -> None:
    """The last item of every task and length is made: what does not fit is said before a server starts."""
    for task, length in plan.cells():
        try:
            suite.make(task, length, suite.documents(task, plan.items) - 1)
        except TooShort as error:
            flag = "--text-lengths" if task == "text" else "--lengths"
            if not isinstance(error, NoRoom):
                flag = "--text"
            raise SystemExit(f"{flag}: {task} of {length} tokens: {error}") from None


def main(argv: list[str] | None = None) -> None:
    stop_when_terminated()
    options = parse(argv)
    known = known_pair(options)
    name, suite = suite_of(options, known)
    plan = plan_of(options, known, name, suite)
    check_room(plan, suite)
    options.out = options.out or (OUT.with_name("quality_quick") if options.quick else OUT)
    logs = options.logs or Path(tempfile.mkdtemp(prefix="quality-"))
    for folder in (logs, options.out):
        folder.mkdir(parents=True, exist_ok=True)
    if options.dense_first:
        plan = replace(plan, tried=try_dense(plan, suite, options.dense_first, options.out, logs))
        for dense in plan.tried:
            said = "asked" if dense.kept else "left out"
            tqdm.write(f"dense: {dense.task} of {dense.length}: {dense.score:.2f}, {said}")
        if not plan.cells():
            raise SystemExit("this model does none of the tasks, not with dense attention either")
    own = [arm for arm in plan.arms if plan.arms[arm].own]
    arms = list(dict.fromkeys([*(options.arms or plan.arms), *own]))
    tqdm.write(f"{len(arms)} arms, device {plan.device}, server logs in {logs}")
    servers: list[LocalServer] = []
    with ThreadPoolExecutor(options.parallel) as pool:
        running = [pool.submit(run_arm, arm, plan, suite, options.out, logs, servers) for arm in arms]
        try:
            for arm in running:
                arm.result()
        except KeyboardInterrupt:  # threads end when their servers do
            pool.shutdown(wait=False, cancel_futures=True)
            for server in servers:
                server.stop()
            raise SystemExit("interrupted; the same command goes on where this one stopped") from None
    report.write(options.out)


if __name__ == "__main__":
    sys.exit(main())
