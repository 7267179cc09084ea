"""What a calibration found: a table, the raw numbers, a plot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from sts_sglang import files
from sts_sglang.config import ConfigError

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
    return "\n".join(lines)


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
    figure_class = _figure()
    from matplotlib.patches import Rectangle

    recall, weak = torch.tensor(report["heldout_recall"]), report["weak_heads"]
    layers, heads = recall.shape
    figure = figure_class(figsize=(3 + 0.6 * layers, 2.4 + 0.4 * heads), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(recall.T.numpy(), vmin=0, vmax=1, aspect="auto", cmap="viridis")
    axes.set(xlabel="target layer", ylabel="KV head", title=title, xticks=range(layers), yticks=range(heads))
    if recall.numel() <= 64:
        for t in range(layers):
            for h in range(heads):
                color = "white" if recall[t, h] < 0.6 else "black"
                axes.text(t, h, f"{recall[t, h]:.2f}", ha="center", va="center", color=color)
    for head in weak:
        corner = (head["layer"] - 0.5, head["head"] - 0.5)
        axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor="red", linewidth=2))
    figure.colorbar(image, label="recall outside sink and recent")
    listed = ", ".join(f"{w['layer']}.{w['head']} ({w['recall']:.2f})" for w in weak[:12]) or "none"
    more = f" and {len(weak) - 12} more" if len(weak) > 12 else ""
    figure.supxlabel(f"weak heads, below {WEAK:.0%} of the oracle: {listed}{more}", fontsize=8, wrap=True)
    try:
        with files.replacing("--plot", path) as partial:
            figure.savefig(partial, format=Path(path).suffix[1:].lower())
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"--plot {path}: {error}; allowed: a .png, .svg or .pdf to write") from None
