"""Whether a keep may be switched on: a gate that is stated before anything is measured.

Everything is the difference from the same server's dense answers (keep 1) to the same items, with 95 %
intervals from a paired bootstrap over documents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from sts_sglang.evaluate.asking import DENSE, Cell
from sts_sglang.evaluate.items import LOSS
from sts_sglang.evaluate.recall import Recall
from sts_sglang.evaluate.stats import ENOUGH, Interval, interval, macro_interval

LOSS_MEAN, LOSS_END = 0.01, 0.02  # most that the loss of text may rise, as a share of the dense loss
TASK_MEAN, TASKS_END = 0.02, 0.02  # most that a task, and the mean of all, may fall, of 1
GATE = (
    f"a keep passes when, against dense, (1) the loss of text rises by at most {LOSS_MEAN:.0%}, and the "
    f"upper end of its interval is at most {LOSS_END:.0%}; (2) no task falls by more than "
    f"{100 * TASK_MEAN:g} points; (3) the lower end of the interval of their mean is no lower than "
    f"{-100 * TASKS_END:g} points; (4) every task has at least {ENOUGH} documents; and (5) every larger keep "
    "that was measured passes too"
)

Cells = Mapping[tuple[str, int, float], Cell]  # by task, length, keep


class Judged(NamedTuple):
    """One keep.

    Attributes:
        loss: by length, the rise of the loss as a share of the dense one.
        tasks: by (task, length), the change of its mean score, from -1 to 1.
        mean: of all tasks, None where none was asked.
        accept: tokens a verify round, and dense; None where nothing drafts.
        problems: what keeps it out. shown: False where only too few or too uncertain documents do.
    """

    keep: float
    loss: dict[int, Interval]
    tasks: dict[tuple[str, int], Interval]
    mean: Interval | None
    accept: tuple[float, float] | None
    problems: tuple[str, ...]
    shown: bool

    @property
    def passes(self) -> bool:
        return not self.problems


def judge(cells: Cells, keep: float, tasks_wanted: bool = True) -> Judged:
    """By rules 1 to 4 of GATE; where tasks were wanted and the model does none, nothing is shown."""
    loss, tasks, pairs, docs = {}, {}, [], []
    for (task, length, _), dense in sorted(cells.items()):
        if dense.keep != DENSE:
            continue
        sparse = cells[task, length, keep]
        change, groups = np.subtract(sparse.score, dense.score), sparse.group
        docs.append(len(set(groups)))
        if task == LOSS:
            loss[length] = interval(change / np.mean(dense.score), groups)
        else:
            tasks[task, length] = interval(change, groups)
            pairs.append((change, groups))
    mean = macro_interval(pairs) if pairs else None
    wrong = [f"loss of text {_percent(i.mean)} at {n:,}" for n, i in loss.items() if i.mean > LOSS_MEAN]
    wrong += [
        f"{task} {100 * i.mean:+.1f} points at {n:,}" for (task, n), i in tasks.items() if i.mean < -TASK_MEAN
    ]
    unsure = [
        f"the loss of text may be {_percent(i.high)} at {n:,}" for n, i in loss.items() if i.high > LOSS_END
    ]
    if mean is not None and mean.low < -TASKS_END:
        unsure.append(f"the tasks may fall by {-100 * mean.low:.1f} points")
    if mean is None and tasks_wanted:
        unsure.append("none of the tasks is one that dense attention does")
    if min(docs) < ENOUGH:
        unsure.append(f"{min(docs)} documents of a task, {ENOUGH} are needed")
    problems, shown = tuple(wrong or unsure), bool(wrong or not unsure)
    return Judged(keep, loss, tasks, mean, _accept(cells, keep), problems, shown)


def smallest(judged: Sequence[Judged]) -> Judged | None:
    """The smallest keep that passes with every larger one (rule 5); None where none does."""
    found = None
    for one in sorted(judged, key=lambda j: -j.keep):
        if not one.passes:
            break
        found = one
    return found


def _accept(cells: Cells, keep: float) -> tuple[float, float] | None:
    """Tokens a round, the first token (the prefill's) not counted: at the keep, and dense."""
    found = []
    for wanted in (keep, DENSE):
        own = [cell for cell in cells.values() if cell.keep == wanted]
        rounds = sum(sum(cell.rounds) for cell in own)
        if not rounds:
            return None
        found.append(sum(sum(cell.tokens) - len(cell.tokens) for cell in own) / rounds)
    return found[0], found[1]


def table(cells: Cells, judged: Sequence[Judged], recall: Mapping[float, Recall] | None = None) -> str:
    """Markdown: a row a task and length, a column a keep; bold where an interval excludes 0."""
    keeps = sorted(judged, key=lambda one: one.keep)
    rows = [["task, tokens", "documents", "dense", *(f"keep {100 * one.keep:g} %" for one in keeps)]]
    rows.append(["---"] * len(rows[0]))
    for (task, length, keep), cell in sorted(cells.items(), key=lambda item: (item[0][0] == LOSS, item[0])):
        if keep != DENSE:
            continue
        documents = str(len(set(cell.group)))
        if task == LOSS:
            row = [f"loss of text, {length:,} (%)", documents, f"{-np.mean(cell.score):.3f} nats"]
            rows.append([*row, *(_said(one.loss[length], 2) for one in keeps)])
        else:
            row = [f"{task}, {length:,} (points)", documents, f"{100 * np.mean(cell.score):.1f}"]
            rows.append([*row, *(_said(one.tasks[task, length], 1) for one in keeps)])
    if keeps[0].mean:
        rows.append(["mean of the tasks (points)", "", "", *(_said(one.mean, 1) for one in keeps)])
    if keeps[0].accept:
        accept = [f"{one.accept[0]:.2f}" for one in keeps]
        rows.append(["tokens a round", "", f"{keeps[0].accept[1]:.2f}", *accept])
    if recall:
        held = [recall.get(one.keep) for one in keeps]
        said = [f"{100 * r.draft:.0f} ({100 * r.latest:.0f}, {100 * r.best:.0f})" if r else "-" for r in held]
        rows.append(["attention held (by the latest, by the best; %)", "", "", *said])
    rows.append(["**verdict**", "", "", *(verdict(one) for one in keeps)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def verdict(one: Judged) -> str:
    return "passes" if one.passes else "fails" if one.shown else "not shown"


def _said(found: Interval, digits: int) -> str:
    mean, low, high = (f"{100 * v:+.{digits}f}" for v in (found.mean, found.low, found.high))
    text = f"{mean} [{low}, {high}]"
    return f"**{text}**" if found.excludes_zero else text


def _percent(share: float) -> str:
    return f"{100 * share:+.2f} %"
