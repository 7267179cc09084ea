"""One arm: its server, and every item at every keep, as one result line a cell (task, length, keep)."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from pathlib import Path

from tqdm import tqdm

from benchmarks.quality.arms import Arm, Dense, Plan, Suite, common, header, start
from benchmarks.quality.cells import packed
from sts_sglang.evaluate import asking
from sts_sglang.evaluate.asking import DENSE, Asked, Cell, Client
from sts_sglang.evaluate.items import GOOD_ENOUGH
from sts_sglang.tools.local_server import LocalServer

# Arms that the report compares word for word; checksums of outputs are a third of a result file.
WORD_FOR_WORD = ("stock", "dense", "sts", "sts-again")
LATER = {"config": {"budget": 0}}  # what result files say since more than one value is possible


@cache
def make(suite: Suite, task: str, length: int, index: int) -> Asked:
    """Made once for all arms of this process."""
    return suite.make(task, length, index)


def measure(
    client: Client, suite: Suite, name: str, plan: Plan, cell: tuple[str, int], bar: tqdm
) -> list[Cell]:
    """All keeps of one task and length."""
    task, length = cell
    keeps = [*(plan.keeps if plan.arms[name].keeps else ()), DENSE]
    cells = [Cell(name, task, length, keep) for keep in keeps]
    asking.measure(
        client,
        lambda index: make(suite, task, length, index),
        suite.documents(task, plan.items),
        cells,
        plan.concurrency,
        bar.update,
    )
    for found in cells:
        check_sparse(found, plan.arms[name])
    return cells


def check_sparse(cell: Cell, arm: Arm) -> None:
    """Refuse results of verifies and prefills that were not what the arm says."""
    if arm.config is None:
        return
    dense, some_full = arm.config.get("verify") == "dense", bool(arm.config.get("full_verify_every"))
    name = f"{cell.arm} {cell.task} {cell.length} keep {cell.keep}"
    if not asking.verified_as_said(cell, arm.sweep, dense=dense, some_full=some_full):
        raise SystemExit(f"{name}: verified as {cell.counters}")
    sparse_draft = arm.config.get("prefill_draft") == "sparse"
    for counted in ("prefill", "draft_prefill") if sparse_draft else ("prefill",):
        if not asking.prefilled_as_said(cell, arm.sweep, counted):
            raise SystemExit(f"{name}: prefilled as {cell.counters}")


def try_dense(plan: Plan, suite: Suite, items: int, out: Path, logs: Path) -> tuple[Dense, ...]:
    """Every task on a few items with dense attention: what the model cannot do is not asked of any arm.

    The scores stay in out/dense_first.json, so that a run that goes on asks the same tasks.
    """
    path, same = out / "dense_first.json", {**common(plan, suite.checksum), "tried": items}
    if path.exists():
        known = json.loads(path.read_text())
        if known["of"] != same:
            raise SystemExit(f"{path}: of another run; give another --out or remove the file")
        return tuple(Dense(**row) for row in known["found"])
    found = []
    asked = [cell for cell in plan.cells() if cell[0] != "text"]
    with start("sts", plan, logs) as server, tqdm(total=len(asked), desc="dense first") as bar:
        for task, length in asked:
            score = asking.dense_score(
                Client(server),
                lambda i, t=task, n=length: make(suite, t, n, i),
                suite.documents(task, items),
                task,
                length,
                plan.concurrency,
            )
            score = round(score, 3)
            found.append(Dense(task, length, score, score >= GOOD_ENOUGH))
            bar.update()
    path.write_text(json.dumps({"of": same, "found": [dense._asdict() for dense in found]}, indent=1))
    return tuple(found)


def run_arm(
    name: str,
    plan: Plan,
    suite: Suite,
    out: Path,
    logs: Path,
    servers: list[LocalServer],
    say: Callable = tqdm.write,
) -> None:
    """Ask everything of one arm; out/NAME.jsonl gets a header line, then a line a cell as they are done.

    The arm's server joins `servers`, so that another thread can stop it.
    """
    path = out / f"{name}.jsonl"
    done = finished(path, common(plan, suite.checksum))
    todo = [cell for cell in plan.cells() if cell not in done]
    if not todo:
        say(f"{name}: all there")
        return
    arm = plan.arms[name]
    keeps = len(plan.keeps) + 1 if arm.keeps else 1
    total = keeps * sum(suite.documents(task, plan.items) for task, _ in todo)
    started = time.monotonic()
    server = start(name, plan, logs)
    servers.append(server)
    with (
        server,
        tqdm(total=total, desc=name, mininterval=5) as bar,
        path.open("a") as file,
    ):
        if file.tell() == 0:
            file.write(json.dumps(header(name, plan, suite.checksum, server)) + "\n")
        client = Client(server, None if arm.config is None else arm.sweep)
        for cell in todo:
            for found in measure(client, suite, name, plan, cell, bar):
                row = packed(asdict(found))
                if name not in WORD_FOR_WORD:
                    del row["out"]
                file.write(json.dumps(row, separators=(",", ":")) + "\n")
            file.flush()
    say(f"{name}: {time.monotonic() - started:.0f} s")


def finished(path: Path, expected: dict) -> set[tuple[str, int]]:
    """(task, length) of the cells in a result file, which must be of the same device, items and models."""
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    for key, value in expected.items() if rows else ():
        if rows[0].get(key, LATER.get(key)) != value:
            raise SystemExit(f"{path}: has other {key} than this run; give another --out or remove the file")
    return {(row["task"], row["length"]) for row in rows if "task" in row}
