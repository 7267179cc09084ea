"""What a calibration found: a table, the raw numbers, a plot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from sts_sglang import files
from sts_sglang.config import ConfigError
from sts_sglang.headmap import DIMS_STEP, HEAD_DIMS, directions_of

SHOWN = 20  # weak heads in the table
WEAK = 0.5  # of the oracle's recall


def table(report: dict[str, Any]) -> str:
    """The report as text: held-out recall by method and domain, stability, weak heads."""
    order = ("sink + recent only", "random", "sink + recent, same size", "proportional default", "calibrated")
    order += ("calibrated, own texts", "best draft head a window", "oracle")
    domains = list(next(iter(report["recall_by_domain"].values())))
    lines = [
        "recall of the target's attention mass outside sink and recent, on held-out texts (1.0: nothing lost)"
    ]
    lines += [" " * 28 + "mean  by mass" + "".join(f"{name[:10]:>11}" for name in domains)]
    for name in order:
        shares = [report["recall_by_mass"][name]] if name in report["recall_by_mass"] else []
        shares += report["recall_by_domain"][name].values() if shares else []
        lines += [f"  {name:<24}{report['recall'][name]:6.3f}" + "".join(f"{s:9.3f}  " for s in shares)]
    lines += [f"  {report['share_outside']:.0%} of the target's attention lies outside sink and recent"]
    lost = [
        f"{share:.2%} with a {name} (recall by mass {report['recall_by_mass'][f'calibrated, {name}']:.3f})"
        for name, share in report["lost"].items()
    ]
    lines += [f"  of all its attention, the map leaves out {' and '.join(lost)}"]
    if saved := report["saved"]:
        ways = " and ".join(f"the {name} {part:.1%}" for name, part in saved.items())
        lines += [f"  of the error of its output that sink and recent leave, {ways} takes away"]
    gaps = ((report["gap_closed"], ""), (report["gap_closed_by_mass"], " by mass, with its budgets"))
    if closed := [f"{part:.0%}{how}" for part, how in gaps if part is not None]:
        gap = "of the gap between the proportional default and the oracle"
        lines += [f"  {gap}, the map closes {' and '.join(closed)}"]
    lines += [
        f"pool {report['pool']}, {report['heads_mean']:.1f} draft heads a target head; "
        f"{report['latest_heads']} target heads take the latest tokens instead"
    ]
    lines += ["stability: recall of a map calibrated on one domain (row) and used on another (column)"]
    domains = list(report["stability"])
    lines += [" " * 18 + "".join(f"{name[:15]:>16}" for name in next(iter(report["stability"].values())))]
    lines += [
        f"  {name[:15]:<16}" + "".join(f"{value:16.3f}" for value in report["stability"][name].values())
        for name in domains
    ]
    weak = report["weak_heads"]
    lines += [f"weak heads (recall below {WEAK:.0%} of the oracle's): {len(weak)}"]
    lines += [f"  layer {w['layer']} KV head {w['head']}: {w['recall']:.3f}" for w in weak[:SHOWN]]
    lines += [f"  and {len(weak) - SHOWN} more, all of them in --report"] if len(weak) > SHOWN else []
    if layers := report["dense_layers"]:
        lines += [f"layers that the map keeps dense: {json.dumps(layers)}"]
    return "\n".join([*lines, *_of_directions(report)])


def table_alone(report: dict[str, Any]) -> str:
    """The same of a target without a draft: held-out error by way to select, and how uneven shares are."""
    error = report["error"]
    domains = list(next(iter(report["error_by_domain"].values())))
    lines = [
        "squared error of the output of attention on held-out texts, in thousandths of the residual's square",
        " " * 39 + "mean" + "".join(f"{name[:10]:>11}" for name in domains),
    ]
    for name, mean in error.items():
        by_domain = report["error_by_domain"][name].values()
        errors = "".join(f"{1e3 * value:9.4f}  " for value in (mean, *by_domain))
        lines += [f"  {name:<34}{errors}".rstrip()]
    lines += [f"lists are {report['list_share']:.1%} of the context, with either budget"]
    equal, split = (error[f"{report['by']}, {budget}"] for budget in ("equal budgets", "split budget"))
    if equal > 0:
        lines += [f"of the error with equal budgets, the split takes away {1 - split / equal:.1%}"]
    if split >= equal:
        lines += [
            "the map is no better than none on these texts: give more or longer ones (--text, --tokens)"
        ]
    shares = torch.tensor(report["shares"]).flatten()
    low, middle, high = shares.min(), shares.median(), shares.max()
    below = float((shares < 1).float().mean())
    lines += [
        f"shares of the budget from {low:.2f} to {high:.2f}, median {middle:.2f}; {below:.0%} of heads have "
        "less than an equal one"
    ]
    return "\n".join([*lines, *_of_directions(report)])


def _of_directions(report: dict[str, Any]) -> list[str]:
    """What the map has of the target's keys."""
    dim, number, held = (report["directions"][name] for name in ("head_dim", "number", "variance"))
    if not number:
        why = f": its heads have {dim} dimensions, and not a multiple of {DIMS_STEP} from {HEAD_DIMS[0]} on"
        return ["the map has no directions of keys" + (why if not directions_of(dim) else "")]
    return [f"{number} directions of the {dim} that keys have hold {held:.1%} of how they differ"]


def weak_heads(recall: torch.Tensor, oracle: torch.Tensor) -> list[dict[str, Any]]:
    """Target heads [layers, KV heads] that keep less than WEAK of what is possible, worst first."""
    found = [
        {"layer": t, "head": h, "recall": round(float(recall[t, h]), 4)}
        for t in range(recall.shape[0])
        for h in range(recall.shape[1])
        if recall[t, h] < WEAK * oracle[t, h]
    ]
    return sorted(found, key=lambda weak: weak["recall"])


def check_plot(path: str) -> None:
    """Before the work is done. Raises ConfigError: matplotlib is missing or draws no such file."""
    kinds = _figure()().canvas.get_supported_filetypes()
    if Path(path).suffix[1:].lower() not in kinds:
        raise ConfigError(
            f"--plot {path}: no picture; allowed: a name that ends in .{', .'.join(sorted(kinds))}"
        )


def _figure() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError(
            "--plot: matplotlib is not installed; allowed: pip install sts-sglang[plots]"
        ) from None
    return Figure


def plot(path: str, report: dict[str, Any], title: str) -> None:
    """Draw held-out recall by target layer and KV head into `path`, weak heads outlined and listed.

    Raises:
        ConfigError: matplotlib is missing or cannot write there.
    """
    listed = ", ".join(f"{w['layer']}.{w['head']} ({w['recall']:.2f})" for w in report["weak_heads"][:12])
    more = f" and {len(report['weak_heads']) - 12} more" if len(report["weak_heads"]) > 12 else ""
    note = f"weak heads, below {WEAK:.0%} of the oracle: {listed or 'none'}{more}"
    outlined = [(w["layer"], w["head"]) for w in report["weak_heads"]]
    label = "recall outside sink and recent"
    _draw(path, torch.tensor(report["heldout_recall"]), 1.0, title, label, note, outlined)


def plot_shares(path: str, report: dict[str, Any], title: str) -> None:
    """The same of the shares of a target without a draft."""
    shares = torch.tensor(report["shares"])
    note = "1: as much as with equal budgets"
    _draw(path, shares, float(shares.max()), title, "share of the budget", note, [])


def _draw(
    path: str,
    values: torch.Tensor,
    most: float,
    title: str,
    label: str,
    note: str,
    outlined: list[tuple[int, int]],
) -> None:
    """Values [layers, KV heads] from 0 to `most` as colors."""
    figure_class = _figure()
    from matplotlib.patches import Rectangle

    layers, heads = values.shape
    figure = figure_class(figsize=(3 + 0.6 * layers, 2.4 + 0.4 * heads), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(values.T.numpy(), vmin=0, vmax=most, aspect="auto", cmap="viridis")
    axes.set(xlabel="target layer", ylabel="KV head", title=title, xticks=range(layers), yticks=range(heads))
    if values.numel() <= 64:
        for t in range(layers):
            for h in range(heads):
                color = "white" if values[t, h] < 0.6 * most else "black"
                axes.text(t, h, f"{values[t, h]:.2f}", ha="center", va="center", color=color)
    for t, h in outlined:
        axes.add_patch(Rectangle((t - 0.5, h - 0.5), 1, 1, fill=False, edgecolor="red", linewidth=2))
    figure.colorbar(image, label=label)
    figure.supxlabel(note, fontsize=8, wrap=True)
    try:
        with files.replacing("--plot", path) as partial:
            figure.savefig(partial, format=Path(path).suffix[1:].lower())
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"--plot {path}: {error}; allowed: a .png, .svg or .pdf to write") from None
