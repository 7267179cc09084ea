"""What a calibration found: a table, the raw numbers, a plot."""

from __future__ import annotations

import json
from typing import Any

import torch

from sts_sglang.config import ConfigError

WEAK = 0.5  # of the oracle's recall


def table(report: dict[str, Any]) -> str:
    """The report as text: held-out recall by method and domain, stability, weak heads."""
    lines = ["recall of the target's attention mass outside sink and recent (1.0: nothing lost)"]
    lines += [f"  {name:<24}{value:6.3f}" for name, value in report["recall"].items()]
    lines += [f"  {report['share_outside']:.0%} of the target's attention lies outside sink and recent"]
    if (closed := report["gap_closed"]) is not None:
        lines += [
            f"  of the gap between the proportional default and the oracle, the map closes {closed:.0%}"
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
    lines += [f"  layer {w['layer']} KV head {w['head']}: {w['recall']:.3f}" for w in weak[:20]]
    if layers := report["dense_layers"]:
        lines += [f'layers to keep dense: add "dense_layers": {json.dumps(layers)} to --sts-config']
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


def plot(path: str, recall: torch.Tensor, title: str) -> None:
    """Draw `recall` [layers, KV heads] as a coloured grid into `path`.

    Raises:
        ConfigError: matplotlib is missing or cannot write there.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError(
            "--plot: matplotlib is not installed; allowed: pip install sts-sglang[plots]"
        ) from None
    layers, heads = recall.shape
    figure = Figure(figsize=(2 + 0.5 * layers, 2 + 0.4 * heads), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(recall.T.numpy(), vmin=0, vmax=1, aspect="auto", cmap="viridis")
    axes.set(xlabel="target layer", ylabel="KV head", title=title, xticks=range(layers), yticks=range(heads))
    figure.colorbar(image, label="recall outside sink and recent")
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--plot {path}: {error}; allowed: a .png, .svg or .pdf to write") from None
