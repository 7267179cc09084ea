"""`sts-sglang inspect`: what a finished request's tokens were worth, as a plot and a table."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from sts_sglang import files
from sts_sglang.config import ConfigError, one_line, quoted
from sts_sglang.headmap import MAP_SHIFT

if TYPE_CHECKING:
    from sts_sglang.core.dumps import Dump

GROUPS = 4  # of target layers
POINTS = 1000  # of a curve; a point is the maximum of its positions
SHOWN = 48  # characters of text around a token


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "inspect",
        help="plot and list what the tokens of a dumped request were worth",
        description="Reads dumps that a server wrote under sts_config.inspect_dir for requests with\n"
        '"custom_params": {"sts": {"inspect": true}}, draws importance by position for every\n'
        "layer group of the target into FILE.png, and prints where it lies.",
        epilog="example:\n  sts-sglang inspect dumps/*.npz --tokenizer TARGET",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="a dump")
    parser.add_argument("--tokenizer", type=Path, metavar="FOLDER", help="show tokens as this tokenizer does")
    parser.add_argument("--top", type=_count, default=10, help="positions to list (default 10)")
    parser.add_argument("--no-plot", action="store_true", help="print only; matplotlib is not needed")
    parser.set_defaults(run=run)


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is no number of positions")
    return int(text)


def run(args: argparse.Namespace) -> int:
    """Returns 0. Raises ConfigError, one line that names the file or flag."""
    from sts_sglang.core.dumps import read  # imports torch, which the launcher's side goes without

    figure = None if args.no_plot else _figure()
    tokenizer = None if args.tokenizer is None else _tokenizer(args.tokenizer)
    if figure is not None:
        for path in args.files:
            files.check_output("inspect:", _picture(path))
    for path in args.files:
        dump = read(path)
        print(f"{one_line(path)}: {describe(dump)}")
        print(table(dump))
        print(top(dump, args.top, tokenizer))
        if figure is not None:
            print(f"plot: {one_line(plot(dump, _picture(path), figure))}")
    return 0


def _picture(path: Path) -> Path:
    """Where the plot of a dump goes. Raises ConfigError for a name that could be none."""
    if path.suffix != ".npz":
        raise ConfigError(f"{path}: not a dump; allowed: a .npz file written under inspect_dir")
    return path.with_suffix(".png")


class Group(NamedTuple):
    """A run of target layers."""

    name: str
    scores: np.ndarray  # float32 [L], the most that any of its heads gives a position; 0 where unknown


def groups(dump: Dump) -> list[Group]:
    """The target's layers in runs of nearly equal length, at most GROUPS."""
    found = []
    for layers in np.array_split(np.arange(len(dump.channels)), min(GROUPS, len(dump.channels))):
        name = f"layers {layers[0]}-{layers[-1]}" if len(layers) > 1 else f"layer {layers[0]}"
        scores = np.zeros(len(dump.tokens), np.float32)  # what is unknown is below
        for channel in np.unique(dump.channels[layers]):  # one after the other: no copy of all of them
            np.maximum(scores, dump.importance[channel], out=scores)
        found.append(Group(name, scores))
    return found


def describe(dump: Dump) -> str:
    unknown = (dump.importance[:, MAP_SHIFT:] < 0).all(0).mean() if len(dump.tokens) > MAP_SHIFT else 1.0
    config = dump.meta["config"]
    return (
        f"{len(dump.tokens)} tokens, {dump.meta['prompt_tokens']} of them prompt; signal: "
        f"{dump.meta['signal']} (history {config['history']}, decay {config['history_decay']}); "
        f"{len(dump.importance)} channels; {unknown:.1%} of the positions unknown"
    )


def table(dump: Dump) -> str:
    """Share of a group's importance in every tenth of the context."""
    lines = ["share of importance by tenth of the context"]
    for group in groups(dump):
        tenths = np.array([part.sum() for part in np.array_split(group.scores, 10)])
        shares = tenths / (tenths.sum() or 1)
        lines.append(f"  {group.name:<14}" + "".join(f"{share:7.1%}" for share in shares))
    return "\n".join(lines)


def top(dump: Dump, count: int, tokenizer: Any) -> str:
    """The positions that some layer group scores highest."""
    found = groups(dump)
    best = np.stack([group.scores for group in found])
    lines = ["highest positions"]
    for position in np.argsort(-best.max(0), kind="stable")[:count]:
        group = found[int(best[:, position].argmax())].name
        token = int(dump.tokens[position])
        text = f"token {token}" if tokenizer is None else _around(dump, int(position), tokenizer)
        lines.append(f"  {position:>8}  {best[:, position].max():.4f}  {group:<14}{text}")
    return "\n".join(lines)


def _around(dump: Dump, position: int, tokenizer: Any) -> str:
    """A token between its neighbours, in one line."""
    first = max(0, position - 6)
    before, token, after = (
        tokenizer.decode(dump.tokens[span].tolist())
        for span in (slice(first, position), slice(position, position + 1), slice(position + 1, position + 7))
    )
    line = f"{before[-SHOWN // 2 :]}[{token}]{after[: SHOWN // 2]}"
    return "".join(c if c.isprintable() else "·" for c in line)  # control characters stay out of terminals


def plot(dump: Dump, path: Path, figure_class: Any) -> Path:
    """Draw importance by position, a curve a layer group, into `path`. Raises ConfigError."""
    figure = figure_class(figsize=(9, 3.2), layout="constrained")
    axes = figure.subplots()
    for group in groups(dump):
        parts = np.array_split(group.scores, max(1, min(POINTS, len(group.scores))))
        ends = np.cumsum([len(part) for part in parts])
        axes.plot(ends - 1, [part.max(initial=0) for part in parts], linewidth=0.8, label=group.name)
    axes.set(xlabel="position", ylabel=f"importance ({dump.meta['signal']})")
    axes.set_yscale("symlog", linthresh=1e-4)
    axes.set_ylim(bottom=0)
    axes.axvline(dump.meta["prompt_tokens"], color="grey", linewidth=0.8, linestyle=":")
    axes.legend(loc="upper center", ncols=GROUPS, fontsize=8)
    with files.replacing("inspect:", path) as partial:
        figure.savefig(partial, format="png", dpi=150)
    return path


def _figure() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError(
            "inspect: matplotlib is not installed; allowed: pip install sts-sglang[plots], or --no-plot"
        ) from None
    return Figure


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises of everything for a file that is no tokenizer
        reason = quoted(str(error) or type(error).__name__, 160)
        raise ConfigError(f"--tokenizer {folder}: {reason}; allowed: a folder with a tokenizer") from None
