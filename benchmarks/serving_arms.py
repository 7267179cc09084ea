"""The servers that bench_serving compares, and how much of the context those of sts must have attended to."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks import dummy_models
from sts_kernels.layout import KEPT_TOKENS, PAGE
from sts_sglang.config import StsConfig
from sts_sglang.evaluate.pair import NONE


@dataclass(frozen=True)
class Arm:
    """A server to compare.

    config: of sts, on top of the given --sts-config; None: stock SGLang. drafts: whether something drafts for
    the target. module: what launches it. args: that it has besides.
    """

    config: dict | None
    drafts: bool = True
    module: str = "sglang.launch_server"
    args: tuple[str, ...] = ()


DENSE = {"draft": "dense"}
ARMS = {
    "stock": Arm(None, drafts=False),
    "stock-spec": Arm(None),
    "stock-spec-captured": Arm(None, module="benchmarks.captured_stock"),
    "stock-fp8": Arm(None, module="benchmarks.captured_stock", args=("--kv-cache-dtype", "fp8_e4m3")),
    "sts-dense": Arm({**DENSE, "dense_layers": "all"}),
    "sts": Arm(DENSE),
    "sts-extend": Arm({"draft": "extend"}),
    "sts-draft": Arm({"draft": "all"}),
    "sts-draft-refresh-2": Arm({"draft": "all", "draft_refresh": 2}),
    "sts-draft-refresh": Arm({"draft": "all", "draft_refresh": 4}),
    "sts-draft-every": Arm({"draft": "every"}),
    "sts-draft-kv": Arm({**DENSE, "draft_kv": "fp8_e4m3"}),
    "sts-pages": Arm({"selector": "pages"}),
    "sts-tokens": Arm({"selector": "tokens"}),
    "sts-warm": Arm({**DENSE, "history": "warm"}),
    "sts-blend": Arm({**DENSE, "history": "blend"}),
    "sts-draft-blend": Arm({"draft": "all", "history": "blend"}),
}
ALONE = {
    name: replace(ARMS[name], config={} if name == "sts" else ARMS[name].config, drafts=False)
    for name in ("stock", "sts", "sts-pages", "sts-tokens")
}
ARMS_OF = {NONE: ALONE, **dict.fromkeys(("STANDALONE", "EAGLE3"), ARMS)}  # by algorithm


def arm_args(arm: Arm, options: argparse.Namespace) -> list[str]:
    """Arguments of an arm's server on top of --server-args."""
    args = ["--tp-size", str(options.tp)] if options.tp > 1 else []
    if arm.drafts:
        args += ["--speculative-algorithm", options.algorithm]
        args += ["--speculative-draft-model-path", str(options.draft)]
        args += ["--speculative-num-steps", str(options.steps)]
        args += ["--speculative-eagle-topk", str(options.topk)]
        args += ["--speculative-num-draft-tokens", str(options.draft_tokens)]
    if arm.config is not None:
        args += ["--attention-backend", "sts", "--sts-config", json.dumps(sts_config(arm, options))]
    return [*args, *arm.args]


def sts_config(arm: Arm, options: argparse.Namespace) -> dict:
    """Of an sts arm."""
    config = {**json.loads(options.sts_config), **arm.config}
    if config.get("dense_layers") == "all":
        config["dense_layers"] = list(range(layers_of(options.target)))
    if config.get("selector") == "tokens" and options.dummy and "head_map" not in config:
        draft = options.draft if arm.drafts else None
        config["head_map"] = str(dummy_models.directions(options.target, draft))
    return config


def launched(arm: Arm, options: argparse.Namespace) -> StsConfig:
    """The configuration that an sts arm launches with. Raises `ConfigError` for one that it could not."""
    config = StsConfig.parse(sts_config(arm, options)).for_launch(arm.drafts)
    return config.for_draft(options.algorithm, options.steps, options.topk) if arm.drafts else config


def layers_of(target: Path) -> int:
    return json.loads((target / "config.json").read_text())["num_hidden_layers"]


# Of the context tokens of a shape: what may be attended to whole while its requests come one after the other,
# and are a batch that stands aside as long as they are few.
RAMP = 0.05


def check_kept(
    ratio: float, arm: Arm, lengths: list[int], options: argparse.Namespace, aside: int = 0
) -> None:
    """End the benchmark where verifies attended to another share of contexts of these lengths than was asked
    for. aside: `stand_aside` of the server, in tokens.

    Pages are whole, and the parts of a map's heads rounded up, so a list may miss its budget by less than one
    page, and one that is kept has what came since. How much a top-p set or verifies of everything come to is
    not known beforehand.
    """
    known = launched(arm, options)
    if known.policy == "top_p" or known.full_verify_every or known.verify == "dense":
        return
    dense = len(known.dense_layers) / layers_of(options.target)
    longer = ([n + more for n in lengths] for more in (0, options.new_tokens))
    shares = [sum(map(known.budget_for, some)) / sum(some) for some in longer]
    whole = min(1, max(0, (aside - sum(lengths)) / (options.new_tokens * len(lengths))))  # share of steps
    dense = whole + (1 - whole) * dense
    low, high = (dense + (1 - dense) * share for share in (min(shares), max(shares)))
    within, rounds = PAGE * len(lengths) / sum(lengths), known.refresh[0]
    since = min(KEPT_TOKENS, (rounds - 1) * (options.draft_tokens or 0)) * len(lengths) / sum(lengths)
    ramp = RAMP if min(lengths) <= aside else 0
    if not low - within <= ratio <= high + within + since + ramp:
        raise SystemExit(
            f"{min(lengths)} to {max(lengths)} tokens: verifies attended to {ratio:.4f} of them; asked for "
            f"was {low:.4f} to {high:.4f}, within a page; nothing is reported"
        )
