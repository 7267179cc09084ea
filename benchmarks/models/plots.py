"""Draw results/*.jsonl: the curves of the training runs, the examination, and the prediction of attention.

python benchmarks/models/plots.py                          # what is in results/
python benchmarks/models/plots.py FILE.summary.jsonl ...   # loss against keep of what variants.py compared
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).with_name("results")
RUNS = ("run1", "run2", "run3", "run4")


def lines(name: str) -> list[dict]:
    return [json.loads(line) for line in (RESULTS / name).read_text().splitlines()]


def save(figure: plt.Figure, name: str) -> None:
    figure.tight_layout()
    figure.savefig(RESULTS / name, dpi=50)
    plt.close(figure)


def curves() -> None:
    """Loss on text and on answers by length; a mean over few batches of few answers is noisy at 32,768."""
    figure, axes = plt.subplots(3, len(RUNS), figsize=(4 * len(RUNS), 9))
    for column, name in enumerate(RUNS):
        rows = lines(f"{name}.jsonl")
        for length in sorted({r["length"] for r in rows}):
            part = [r for r in rows if r["length"] == length]
            for axis, key in zip(axes[:2, column], ("text", "answer"), strict=True):
                axis.plot([r["step"] for r in part], [r[key] for r in part], label=f"{length:,}", lw=1)
            if "draft_answer" in part[0] and length > 128:
                (line,) = axes[2, column].plot(
                    [r["step"] for r in part], [r["draft_text"] for r in part], lw=1, label=f"text {length:,}"
                )
                answers = [r["draft_answer"] for r in part]
                axes[2, column].plot([r["step"] for r in part], answers, lw=1, ls=":", color=line.get_color())
            if "tail" in part[0]:
                axes[2, 0].plot(
                    [r["step"] for r in part], [r["tail"] for r in part], lw=1, label=f"{length:,}"
                )
        axes[0, column].set_title(f"{name}: loss on text")
        axes[1, column].set_title("loss on answers")
        axes[1, column].set_yscale("log")
        axes[0, column].legend()
        if "draft_answer" in rows[0]:
            axes[2, column].set_title("draft agrees with target (dotted: answers)")
            axes[2, column].legend()
    axes[2, 0].set_title("run4: attention no few tokens hold")
    axes[2, 0].set_yscale("log")
    axes[2, 0].legend()
    axes[2, 1].axis("off")
    save(figure, "curves.png")


def heat(axis: plt.Axes, table: list[list[float]], rows: list[str], columns: list[str], title: str) -> None:
    axis.imshow(table, vmin=0, vmax=1, aspect="auto", cmap="viridis")
    axis.set_xticks(range(len(columns)), columns)
    axis.set_yticks(range(len(rows)), rows)
    axis.set_title(title)
    for i, row in enumerate(table):
        for j, value in enumerate(row):
            axis.text(
                j, i, f"{value:.2f}", ha="center", va="center", color="w" if value < 0.7 else "k", fontsize=8
            )


def examination() -> None:
    rows = lines("exam.jsonl")
    cell = {(r["task"], r["length"]): r for r in rows}
    lengths, names = sorted({r["length"] for r in rows}), list(dict.fromkeys(r["task"] for r in rows))
    columns = [f"{n:,}" for n in lengths]
    figure, axes = plt.subplots(1, 2, figsize=(11, 4))
    heat(
        axes[0],
        [[cell[t, n]["accuracy"] for n in lengths] for t in names],
        names,
        columns,
        "accuracy by task",
    )
    depths = list(cell["single", lengths[0]]["by_depth"])
    table = [[cell["single", n]["by_depth"][d] for n in lengths] for d in depths]
    heat(axes[1], table, depths, columns, "single needle by depth (0: start)")
    save(figure, "exam.png")


def prediction() -> None:
    result = lines("predict.jsonl")[-1]
    parts = [
        ("proportional", "mass_by_head"),
        ("target itself", "mass_by_head"),
        ("proportional", "outside_by_head"),
    ]
    titles = [
        "mass recall, default map",
        "mass recall, the target's own choice",
        "mass outside sink and recent",
    ]
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.5))
    for axis, (way, key), title in zip(axes, parts, titles, strict=True):
        table = result[way][key]
        heat(axis, table, [f"layer {i}" for i in range(len(table))], ["KV head 0", "KV head 1"], title)
    save(figure, "predict.png")


ALWAYS = ("oracle", "draft")  # in every panel of `variants`, in grey


def variants(path: Path) -> None:
    """Loss against keep, a panel for each family of variants; beside the file, as a picture."""
    rows = sorted(map(json.loads, path.read_text().splitlines()), key=lambda row: row["keep"])
    by_name: dict[str, list[dict]] = {}
    for row in rows:
        by_name.setdefault(row["variant"], []).append(row)
    families = list(dict.fromkeys(r["family"] for r in rows))
    wide = -(-len(families) // 2)
    figure, axes = plt.subplots(2, wide, figsize=(6 * wide, 13), sharex=True, sharey=True, squeeze=False)
    for axis, family in zip(axes.flat, families, strict=False):
        axis.set_prop_cycle(color=plt.get_cmap("tab20").colors)
        for name, own in by_name.items():
            if own[0]["family"] == family or name in ALWAYS:
                grey = {"color": "0.4", "ls": "--", "lw": 2} if name in ALWAYS else {"lw": 1}
                line = [[r[key] for r in own] for key in ("kept", "loss", "standard_error")]
                axis.errorbar(*line, label=name, marker=".", capsize=2, **grey)
        axis.set_title(family)
        axis.set_xscale("log")
        axis.set_yscale("symlog", linthresh=1)
        axis.axhline(0, color="k", lw=0.5)
        axis.set_xlabel("share of the context kept")
        axis.set_ylabel("loss of text, % of dense")
        axis.legend(fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.1))
    figure.suptitle("{target}, {draft}: {windows} windows of {length} tokens".format(**rows[0]))
    figure.tight_layout(rect=(0, 0, 1, 0.98))
    figure.savefig(path.with_name(path.name.removesuffix(".summary.jsonl") + ".png"), dpi=70)
    plt.close(figure)


if __name__ == "__main__":
    if sys.argv[1:]:
        for file in sys.argv[1:]:
            variants(Path(file))
    else:
        curves()
        examination()
        prediction()
