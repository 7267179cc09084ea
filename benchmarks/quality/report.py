"""Tables and the Pareto plot from result files alone.

    python -m benchmarks.quality.report benchmarks/results/quality

reads FOLDER/*.jsonl and writes FOLDER/report.md and, where more than dense was asked, FOLDER/pareto.png.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import numpy as np

from benchmarks import pictures
from benchmarks.quality.cells import unpacked
from sts_sglang.evaluate.stats import ENOUGH, Interval, interval, macro_interval

DENSE = 1.0
ALONE = "Target alone: {target}; a verify is one decode step, selected for by the target's own queries. "
LOSS = "text"
RIVALS = ("quest", "pages", "recent", "random", "oracle", "sts-uniform", "sts-proportional")
RIVALS += ("sts-warm", "sts-blend", "sts-full4")
COLORS = {
    "sts": "C3",
    "sts-draft-blend": "C1",
    "oracle": "k",
    "quest": "C0",
    "pages": "C4",
    "recent": "C2",
    "random": "C7",
    "map": "C5",
    "joined": "C8",
    "tokens": "C6",
    "tokens-split": "C9",
    "prefill": "navy",
    "prefill-draft": "darkorange",
    "prefill-draft-sparse": "firebrick",
    "prefill-verify": "teal",
}


def folder_digest(folder: Path) -> str:
    """Of the result files that a report and its plot are made from."""
    return pictures.digest(b"".join(path.read_bytes() for path in sorted(folder.glob("*.jsonl"))))


class Results:
    """All cells of a folder by (arm, task, length, keep)."""

    def __init__(self, folder: Path):
        self.digest = folder_digest(folder)
        self._intervals: dict[
            tuple, Interval | None
        ] = {}  # thousands of resamples each, shown in several tables
        self.headers: dict[str, dict] = {}
        self.cells: dict[tuple[str, str, int, float], dict] = {}
        for path in sorted(folder.glob("*.jsonl")):
            for line in path.read_text().splitlines():
                row = json.loads(line)
                if "task" in row:
                    self.cells[row["arm"], row["task"], row["length"], row["keep"]] = unpacked(row)
                else:
                    self.headers[row["arm"]] = row
        if not self.cells:
            raise SystemExit(f"{folder}: no results")
        for what in ("text", "models", "tried"):
            if len({json.dumps(header.get(what)) for header in self.headers.values()}) > 1:
                raise SystemExit(f"{folder}: arms were measured with different {what}; measure them again")

    @cached_property
    def prefills(self) -> dict[str, float]:
        """Arms whose keeps are of prompts, and the share of the context that their verifies attend to."""
        return {arm: self.headers[arm]["verify"] for arm in self.arms if "sweeps" in self.headers[arm]}

    @cached_property
    def rivals(self) -> list[str]:
        """What sts is compared with, an arm of one's own before all."""
        own = [arm for arm, of in self.headers.items() if of.get("own") and arm not in self.prefills]
        return [*own, *(arm for arm in RIVALS if arm in self.arms)]

    def _values(self, index: int) -> list:
        return sorted({key[index] for key in self.cells})

    @cached_property
    def arms(self) -> list[str]:
        """STS first, then as in RIVALS."""
        order = ["sts", *RIVALS, "sts-again", "dense", "stock"]
        return sorted(self._values(0), key=lambda a: order.index(a) if a in order else len(order))

    @cached_property
    def tasks(self) -> list[str]:
        return [task for task in self._values(1) if task != LOSS]

    @cached_property
    def keeps(self) -> list[float]:
        return [keep for keep in self._values(3) if keep != DENSE]

    def lengths(self, loss: bool = False) -> list[int]:
        return sorted({key[2] for key in self.cells if (key[1] == LOSS) == loss})

    def pairs(self, a: tuple[str, float], b: tuple[str, float], task: str, length: int):
        """(differences of score, groups) of two (arm, keep) on one task; None where one was not measured."""
        first, second = (self.cells.get((arm, task, length, keep)) for arm, keep in (a, b))
        if first is None or second is None:
            return None
        if first["group"] != second["group"]:
            raise SystemExit(f"{a} and {b} were not asked the same items of {task} at {length}")
        return np.subtract(first["score"], second["score"]), first["group"]

    def difference(self, a: tuple[str, float], b: tuple[str, float], length: int) -> Interval | None:
        """Mean of the paired difference over the tasks that both were asked."""
        if (key := (a, b, length)) not in self._intervals:
            found = [pair for task in self.tasks if (pair := self.pairs(a, b, task, length))]
            self._intervals[key] = macro_interval(found) if found else None
        return self._intervals[key]

    def loss_change(self, a: tuple[str, float], b: tuple[str, float], length: int) -> Interval | None:
        """Loss of text under a minus that under b, as a share of the dense loss."""
        if (key := (a, b, length, LOSS)) not in self._intervals:
            pair, dense = self.pairs(a, b, LOSS, length), self.cells.get((a[0], LOSS, length, DENSE))
            share = (pair[0] / np.mean(dense["score"]), pair[1]) if pair and dense else None
            self._intervals[key] = interval(*share) if share else None
        return self._intervals[key]

    def mean(self, arm: str, keep: float, length: int) -> float | None:
        """Over the tasks that it was asked."""
        found = [np.mean(c["score"]) for t in self.tasks if (c := self.cells.get((arm, t, length, keep)))]
        return float(np.mean(found)) if found else None

    @cached_property
    def whole(self) -> str:
        """The arm whose dense answers stand in tables of all: sts, where it was asked."""
        return next((arm for arm in self.arms if arm not in ("stock", "dense")), self.arms[0])

    def part(self, arm: str, length: int) -> str:
        """Says how many tasks an arm was asked where these are not all."""
        asked = [task for task in self.tasks if (arm, task, length, DENSE) in self.cells]
        return f" ({len(asked)} of {len(self.tasks)} tasks)" if 0 < len(asked) < len(self.tasks) else ""

    def accept_length(self, arm: str, keep: float, length: int, tasks: Iterable[str]) -> float | None:
        """Tokens a verify round, the first token (the prefill's) not counted."""
        cells = [self.cells.get((arm, task, length, keep)) for task in tasks]
        rounds = sum(sum(cell["rounds"]) for cell in cells if cell)
        tokens = sum(sum(cell["tokens"]) - len(cell["tokens"]) for cell in cells if cell)
        return tokens / rounds if rounds else None


def table(head: list[str], rows: list[list]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def points(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def signed(found: Interval | None, scale: float = 100, digits: int = 1) -> str:
    if found is None:
        return "-"
    values = (scale * v for v in (found.mean, found.low, found.high))
    mean, low, high = (f"{v:+.{digits}f}" for v in values)
    text = f"{mean} [{low}, {high}]"
    return f"**{text}**" if found.excludes_zero else text


def percent(keep: float) -> str:
    return f"{100 * keep:g} %"


def overview(r: Results, length: int) -> str:
    """Accuracy of every arm and keep beside dense, the worst task, and speculation."""
    rows = []
    for arm in (a for a in r.arms if a not in ("stock", "dense")):
        for keep in r.keeps:
            accuracy, change = r.mean(arm, keep, length), r.difference((arm, keep), (arm, DENSE), length)
            if accuracy is None or change is None:
                continue
            task, worst = worst_task(r, arm, keep, length)
            now, dense = (r.accept_length(arm, k, length, r.tasks) for k in (keep, DENSE))
            speculation = f"{now:.2f} ({now - dense:+.2f})" if now and dense else "-"
            name = arm + r.part(arm, length)
            rows.append(
                [
                    name,
                    percent(keep),
                    points(accuracy),
                    signed(change),
                    f"{task} {signed(worst)}",
                    speculation,
                ]
            )
    return table(
        ["arm", "keep", "accuracy", "against dense", "worst task", "accept length (against dense)"], rows
    )


def worst_task(r: Results, arm: str, keep: float, length: int) -> tuple[str, Interval]:
    pairs = {task: r.pairs((arm, keep), (arm, DENSE), task, length) for task in r.tasks}
    found = {task: interval(*pair) for task, pair in pairs.items() if pair}
    task = min(found, key=lambda t: found[t].mean)
    return task, found[task]


def rivals(r: Results, length: int) -> str:
    """STS minus the others, at the same keep."""
    rows = []
    for arm in r.rivals:
        found = [r.difference(("sts", keep), (arm, keep), length) for keep in r.keeps]
        rows.append([arm + r.part(arm, length), *map(signed, found)])
    return table(["sts minus", *map(percent, r.keeps)], rows)


def text_rivals(r: Results) -> str:
    """The same of the loss of text, in percent of the dense loss: below zero sts loses less."""
    rows = []
    for length in r.lengths(loss=True):
        for arm in r.rivals:
            found = [r.loss_change(("sts", keep), (arm, keep), length) for keep in r.keeps]
            if any(found):
                rows.append([length, arm, *(signed(f, digits=2) for f in found)])
    return table(["context", "loss, sts minus", *map(percent, r.keeps)], rows) if rows else ""


def by_task(r: Results, length: int, keep: float) -> str:
    arms = [a for a in r.arms if (a, r.tasks[0], length, keep) in r.cells]
    rows = []
    for task in r.tasks:
        dense = r.cells.get((r.whole, task, length, DENSE))
        found = [r.pairs((arm, keep), (arm, DENSE), task, length) for arm in arms]
        change = [signed(interval(*f)) if f else "-" for f in found]
        items = len(dense["score"]) if dense else "-"
        rows.append([task, items, points(np.mean(dense["score"]) if dense else None), *change])
    return table(["task", "items", "dense", *arms], rows)


def by_depth(r: Results, length: int, keep: float) -> str:
    """Accuracy on all tasks whose facts have a depth, by fifth of the prompt; arms that were asked all."""
    arms = [a for a in r.arms if (a, "single", length, keep) in r.cells and not r.part(a, length)]
    tasks = [t for t in r.tasks if t != "shared"]
    columns = [("dense", r.whole, DENSE), *((arm, arm, keep) for arm in arms)]
    cells = {
        head: [r.cells[arm, task, length, k] for task in tasks if (arm, task, length, k) in r.cells]
        for head, arm, k in columns
    }
    rows = []
    for fifth in range(5):
        means, count = [], 0
        for found in cells.values():
            scores = [
                s
                for cell in found
                for s, d in zip(cell["score"], cell["depth"], strict=True)
                if min(4, int(5 * d)) == fifth
            ]
            means.append(points(float(np.mean(scores)) if scores else None))
            count = max(count, len(scores))
        rows.append([f"{20 * fifth} to {20 * fifth + 20} %", count, *means])
    return table(["depth of the farthest fact", "items", *cells], rows)


def losses(r: Results) -> str:
    rows = []
    for length in r.lengths(loss=True):
        for arm in r.arms:
            for keep in r.keeps:
                found = r.pairs((arm, keep), (arm, DENSE), LOSS, length)
                if found is None:
                    continue
                dense = -np.mean(r.cells[arm, LOSS, length, DENSE]["score"])
                rise = r.loss_change((arm, keep), (arm, DENSE), length)
                now, before = (r.accept_length(arm, k, length, [LOSS]) for k in (keep, DENSE))
                rows.append(
                    [
                        length,
                        arm,
                        percent(keep),
                        f"{dense * (1 + rise.mean):.3f} ({dense:.3f})",
                        signed(rise, digits=2),
                        f"{now:.2f} ({now - before:+.2f})" if now and before else "-",
                    ]
                )
    return table(
        ["context", "arm", "keep", "nats a token (dense)", "change, %", "accept length (against dense)"], rows
    )


def same_outputs(r: Results, a: str, b: str, keeps: Iterable[float]) -> str:
    """How many outputs of two servers are equal token for token."""
    equal = total = 0
    for (arm, task, length, keep), cell in r.cells.items():
        other = r.cells.get((b, task, length, keep))
        if arm == a and other and keep in keeps:
            equal += sum(x == y for x, y in zip(cell["out"], other["out"], strict=True))
            total += len(cell["out"])
    return f"{equal} of {total}" if total else "not measured"


def reach(r: Results, length: int) -> str:
    """What was aimed at, and whether these results show it: (aim, found, met)."""
    found: list[tuple[str, str, Interval, bool]] = []
    ten, dense = ("sts", 0.1), ("sts", DENSE)
    if (mean := r.difference(ten, dense, length)) is not None:
        found.append(("mean within 1 point of dense", signed(mean), mean, mean.mean >= -0.01))
        task, worst = worst_task(r, *ten, length)
        found.append(("every task within 5", f"{task} {signed(worst)}", worst, worst.mean >= -0.05))
    if (rise := r.loss_change(ten, dense, length)) is not None:
        found.append(("loss of text within 1 %", signed(rise, digits=2), rise, rise.mean <= 0.01))
    if (gap := r.difference(ten, ("oracle", 0.1), length)) is not None:
        aim = "within 1 point of the oracle" + r.part("oracle", length)
        found.append((aim, signed(gap), gap, gap.mean >= -0.01))
    rows = [[f"keep 10 %: {aim}", said, verdict(over, met)] for aim, said, over, met in found]
    for rival in ("quest", "pages", "recent"):
        for keep in r.keeps:
            lead = r.difference(("sts", keep), (rival, keep), length)
            if lead is not None:
                aim, met = ("ahead of", lead.low > 0) if keep <= 0.1 else ("not behind", lead.high >= 0)
                aim = f"keep {percent(keep)}: {aim} {rival}{r.part(rival, length)}"
                rows.append([aim, signed(lead), verdict(lead, met)])
            if (less := r.loss_change(("sts", keep), (rival, keep), length)) is not None:
                aim, met = ("ahead of", less.high < 0) if keep <= 0.1 else ("not behind", less.low <= 0)
                aim = f"keep {percent(keep)}: loss of text {aim} {rival}"
                rows.append([aim, signed(less, digits=2), verdict(less, met)])
    rows += [row for arm in r.prefills for keep in r.keeps for row in prefill_reach(r, arm, keep, length)]
    return table(["aim", "found", "met"], rows)


def prefill_reach(r: Results, arm: str, keep: float, length: int) -> list[list[str]]:
    """What a sparse prefill may lose."""
    rows, name = [], f"{arm}, keep {percent(keep)}"
    if (mean := r.difference((arm, keep), (arm, DENSE), length)) is not None:
        met = verdict(mean, mean.mean >= -0.01)
        rows.append([f"{name}: mean within 1 point of dense{r.part(arm, length)}", signed(mean), met])
    if (rise := r.loss_change((arm, keep), (arm, DENSE), length)) is not None:
        found, met = signed(rise, digits=2), verdict(rise, rise.mean <= 0.01)
        rows.append([f"{name}: loss of text within 1 %", found, met])
    return rows


def verdict(found: Interval, met: bool) -> str:
    return "too few items" if found.documents < ENOUGH else "yes" if met else "no"


def noise(r: Results) -> str:
    if "sts-again" not in r.arms:
        return ""
    rows = []
    for length in r.lengths():
        for keep in [*r.keeps, DENSE]:
            found = r.difference(("sts", keep), ("sts-again", keep), length)
            rows.append([length, percent(keep), signed(found)])
    return table(["context", "keep", "sts minus sts-again"], rows)


def dense_speculation(r: Results) -> str:
    """Accept length without sparsity, stock's beside ours; nothing where nobody drafts."""
    arms = [arm for arm in ("stock", "dense", "sts") if arm in r.arms]
    found = {(arm, n): r.accept_length(arm, DENSE, n, r.tasks) for arm in arms for n in r.lengths()}
    if not any(found.values()):
        return ""
    rows = [
        [f"`{arm}`", *(f"{v:.3f}" if (v := found[arm, n]) else "no draft" for n in r.lengths())]
        for arm in arms
    ]
    return table(["accept length, dense", *map(str, r.lengths())], rows)


def parity(r: Results) -> str:
    """Outputs equal token for token."""
    if not {"sts", "dense"} & set(r.arms):
        return ""
    compared = [
        ("sts", "sts-again", r.keeps, "sparse"),
        ("sts", "sts-again", [DENSE], "keep 100 %"),
        ("sts", "stock", [DENSE], "keep 100 %"),
        ("dense", "stock", [DENSE], "the mode verify: dense"),
    ]
    rows = [[f"`{a}` and `{b}`", how, same_outputs(r, a, b, keeps)] for a, b, keeps, how in compared]
    return table(["servers", "how", "equal outputs"], rows)


def origin(r: Results) -> str:
    head = next(iter(r.headers.values()))
    weights = ", ".join(f"{name} {of['weights'][:12]}" for name, of in head["models"].items())
    commits = sorted({h["commit"] for h in r.headers.values()})
    said = (
        f"Device: {head['device']}, {head['dtype']}; torch {head['torch']}, Python {head['python']}; "
        f"{head['items']} items a task and length; text {head['text']}; weights: {weights}; commits: "
        f"{', '.join(commits)}."
    )
    if "pair" in head:
        pair = head["pair"]
        named = "Pair: {target} with {draft}, {algorithm}. " if pair["draft"] else ALONE
        said = named.format(**pair) + said
    if left := [t for t in head.get("tried", ()) if not t["kept"]]:
        named = ", ".join(f"{t['task']} of {t['length']:,} ({points(t['score'])})" for t in left)
        said += f"\n\nLeft out, because the model does not do them with dense attention: {named}."
    rows = []
    for arm, header in sorted(r.headers.items(), key=lambda pair: r.arms.index(pair[0])):
        sts, config = header["sts"], header["sts"].get("config", {})
        row = [f"`{arm}`", header["about"], sts.get("head_map"), config.get("pool_heads"), sts.get("kernel")]
        rows.append([value or "-" for value in row])
    return f"{said}\n\n" + table(["arm", "what it is", "head map", "pool", "kernel"], rows)


def few(r: Results) -> str:
    least = min(len(cell["score"]) for cell in r.cells.values())
    if least < ENOUGH:
        return f"**A first look: some cells have {least} items.** No conclusion is drawn from it.\n"
    return f"Some cells have {least} items, so that intervals are wide.\n" if least < 100 else ""


def what_is_sparse(r: Results) -> str:
    """What the keeps are shares of."""
    if not r.prefills:
        return "Prefill is dense everywhere; only verify is sparse."
    arms = ", ".join(f"`{arm}` ({percent(verify)})" for arm, verify in r.prefills.items())
    return (
        f"In {arms} a keep is the share of blocks of keys that prompts attend to, and in brackets is the "
        "share of the context that verifies attend to then; dense is dense in both. Elsewhere prefill is "
        "dense and only verify is sparse."
    )


def markdown(r: Results) -> str:
    shown = 0.1 if 0.1 in r.keeps else min(r.keeps, default=DENSE)
    about = (
        f"Made by `python -m benchmarks.quality.report` from the result files beside it ({r.digest}). "
        "Accuracy in points (0 to 100); a difference is paired with the same server's dense answer to the "
        "same item unless it says otherwise, with a 95 % bootstrap interval over documents; bold: it "
        f"excludes 0 and every task has {ENOUGH} documents. {what_is_sparse(r)}"
    )
    kinds = " and ".join(
        kind for kind, there in (("verify", set(r.arms) - set(r.prefills)), ("prefill", r.prefills)) if there
    )
    parts = [f"# Quality of sparse {kinds}, by selector and budget", about, few(r), origin(r)]
    for length in r.lengths() if r.keeps else ():
        parts += [f"## {length} tokens", overview(r, length)]
        if "sts" in r.arms or r.prefills:
            parts += ["### What was aimed at", reach(r, length)]
        if "sts" in r.arms:
            parts += ["### STS against the others", rivals(r, length)]
        parts += [f"### By task, keep {percent(shown)}, against dense", by_task(r, length, shown)]
        if "single" in r.tasks:
            parts += [f"### By depth, keep {percent(shown)}, accuracy", by_depth(r, length, shown)]
    if r.keeps and r.lengths(loss=True):
        parts += ["## Held-out text, forced through the server", losses(r), text_rivals(r)]
    if any(same := [noise(r), parity(r), dense_speculation(r)]):
        parts += ["## Noise and parity", *same]
    parts.append("![quality against keep](pareto.png)" if r.keeps else "")
    return "\n\n".join(part for part in parts if part) + "\n"


def plot(r: Results, path: Path) -> None:
    """One curve an arm: what a keep changes against dense; answers above, loss of text below."""
    from matplotlib.figure import Figure

    kinds = (
        (r.lengths(), r.difference, "accuracy against dense, points"),
        (r.lengths(loss=True), r.loss_change, "loss of text against dense, %"),
    )
    kinds = tuple(kind for kind in kinds if kind[0])
    columns = max(len(lengths) for lengths, *_ in kinds)
    figure = Figure(figsize=(1 + 4 * columns, 1 + 3.2 * len(kinds)), layout="constrained")
    axes = figure.subplots(len(kinds), columns, squeeze=False, sharey="row")
    for row, (lengths, change, unit) in zip(axes, kinds, strict=True):
        for axis in row[len(lengths) :]:
            axis.set_visible(False)
        for axis, length in zip(row, lengths, strict=False):
            for arm in (a for a in r.arms if a in COLORS):
                found = {keep: change((arm, keep), (arm, DENSE), length) for keep in r.keeps}
                label = arm if change == r.loss_change else arm + r.part(arm, length)
                draw(axis, {k: f for k, f in found.items() if f}, COLORS[arm], label)
            axis.axhline(0, color="k", linestyle=":", label="dense")
            axis.set(xscale="log", title=f"{length:,} tokens")
            axis.set_yscale("symlog", linthresh=1)
            axis.yaxis.set_major_formatter("{x:g}")
            axis.set_xticks(r.keeps, [percent(k) for k in r.keeps])
            axis.minorticks_off()
            axis.legend(fontsize=7)
        row[0].set_ylabel(unit)
    figure.supxlabel("keep (share of the context)", fontsize=10)
    head = next(iter(r.headers.values()))
    figure.suptitle(f"{head['device']}, {head['items']} items a task and length", fontsize=9)
    pictures.save(figure, path, r.digest, dpi=110)


def draw(axis, found: dict[float, Interval], color: str, label: str) -> None:
    """A curve of means with its 95 % intervals."""
    if found:
        axis.plot(list(found), [100 * f.mean for f in found.values()], "o-", color=color, label=label)
        bounds = [[100 * getattr(f, side) for f in found.values()] for side in ("low", "high")]
        axis.fill_between(list(found), *bounds, color=color, alpha=0.15, linewidth=0)


def write(folder: Path) -> None:
    results = Results(folder)
    (folder / "report.md").write_text(markdown(results))
    if results.keeps:
        plot(results, folder / "pareto.png")
    print(folder / "report.md")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="of result files")
    write(parser.parse_args().folder)
