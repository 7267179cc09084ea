"""The servers that are compared, and what all of them are asked."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

import torch

from benchmarks.harness import commit
from sts_sglang import headmap
from sts_sglang.evaluate import pair as pairs
from sts_sglang.evaluate.asking import DENSE, VERIFY, Asked, PrefillSweep, Sweep
from sts_sglang.evaluate.pair import Models
from sts_sglang.tools.local_server import LocalServer

ROOT = Path(__file__).parents[2]
KEEP = 0.5  # of a server: room in the lists for every keep that is asked for


@dataclass(frozen=True)
class Arm:
    """A server to ask: None is stock SGLang; else the configuration on top of the plan's."""

    config: dict | None
    about: str
    keeps: bool = True  # one cell a keep; else dense alone
    own: bool = False  # named on the command line
    sweep: Sweep = VERIFY  # what the keeps are shares of


def own_arm(config: dict, about: str, keep: float) -> Arm:
    """Of the command line. Where its prefill is sparse the keeps are the prompts', and verifies attend to its
    server's `keep`, if it names one, else to everything."""
    sparse = config.get("prefill") == "sparse"
    sweep = PrefillSweep(keep if "keep" in config else DENSE) if sparse else VERIFY
    return Arm(config, about, own=True, sweep=sweep)


DENSE_DRAFT = {"draft": "dense"}
SPARSE_PREFILL = {**DENSE_DRAFT, "prefill": "sparse", "prefill_floor": 0}  # a floor would hide keeps

ARMS = {
    "stock": Arm(None, "SGLang without sts", keeps=False),
    "dense": Arm({**DENSE_DRAFT, "verify": "dense"}, "draft and scoring as ever, dense verify", keeps=False),
    "sts": Arm(DENSE_DRAFT, "the draft's attention, default head map; a dense draft"),
    "sts-again": Arm(DENSE_DRAFT, "the same once more: run-to-run noise"),
    "sts-proportional": Arm({**DENSE_DRAFT, "head_map": "proportional"}, "the map that needs no calibration"),
    "sts-uniform": Arm(
        {**DENSE_DRAFT, "head_map": "uniform"}, "the default map, but the same budget for every head"
    ),
    "sts-warm": Arm({**DENSE_DRAFT, "history": "warm"}, "history in a request's first verify"),
    "sts-blend": Arm({**DENSE_DRAFT, "history": "blend"}, "history in every verify"),
    "sts-no-spread": Arm({**DENSE_DRAFT, "spread": 0}, "no token passes importance on to the next"),
    "sts-extend": Arm({"draft": "extend"}, "draft-extend alone attends to the selection"),
    "sts-steps": Arm({"draft": "steps"}, "draft steps after the first attend to the selection"),
    "sts-draft": Arm({"draft": "all"}, "so does draft-extend"),
    "sts-draft-refresh-2": Arm({"draft": "all", "draft_refresh": 2}, "and is scored in every other round"),
    "sts-draft-refresh": Arm({"draft": "all", "draft_refresh": 4}, "and is scored in every 4th round"),
    "sts-draft-adaptive": Arm(
        {"draft": "all", "draft_refresh": "adaptive"}, "and is scored when fewer tokens are accepted"
    ),
    "sts-draft-every": Arm({"draft": "every"}, "every pass of the draft attends to a selection"),
    "sts-draft-blend": Arm({"draft": "all", "history": "blend"}, "the same with history in every verify"),
    "sts-full4": Arm({**DENSE_DRAFT, "full_verify_every": 4}, "every 4th verify attends to everything"),
    "joined": Arm({"selector": "joined"}, "pages have three quarters of a list, the draft the rest"),
    "tokens": Arm({"selector": "tokens"}, "the target's own queries against short forms of its keys"),
    "oracle": Arm({"selector": "oracle"}, "the target's own attention"),
    "quest": Arm({"selector": "quest"}, "Quest's bounds over pages of 16"),
    "pages": Arm({"selector": "pages"}, "mean and deviation of pages of 16"),
    "recent": Arm({"selector": "recent"}, "sink and the last tokens (StreamingLLM)"),
    "random": Arm({"selector": "random"}, "chance"),
    "prefill": Arm(
        SPARSE_PREFILL,
        "whole verifies; of a prompt, what the target's own queries select",
        sweep=PrefillSweep(),
    ),
    "prefill-draft": Arm(
        {**SPARSE_PREFILL, "prefill_by": "draft"},
        "whole verifies; of a prompt, what the draft selects, which reads it first",
        sweep=PrefillSweep(),
    ),
    "prefill-draft-sparse": Arm(
        {**SPARSE_PREFILL, "prefill_by": "draft", "prefill_draft": "sparse"},
        "as `prefill-draft`, and the draft reads it as sparsely",
        sweep=PrefillSweep(),
    ),
    "prefill-verify": Arm(
        SPARSE_PREFILL,
        "as `prefill`, and verifies attend to a tenth, as one would serve both",
        sweep=PrefillSweep(verify=0.1),
    ),
}
# A head cannot read first.
HEADED = {name: arm for name, arm in ARMS.items() if arm.config is None or "prefill_by" not in arm.config}
ALONE = {  # of a target that nothing drafts for
    "stock": ARMS["stock"],
    "dense": Arm({"verify": "dense"}, "decode attends to everything", keeps=False),
    "sts": Arm({}, "the target's own queries: tokens with a map that has directions, else pages"),
    "sts-uniform": ARMS["sts-uniform"],
    **{name: ARMS[name] for name in ("sts-again", "sts-full4", "tokens", "pages")},
    **{name: ARMS[name] for name in ("oracle", "quest", "recent", "random")},
    **{name: ARMS[name] for name in ("prefill", "prefill-verify")},
}


def served_by(algorithm: str) -> dict[str, Arm]:
    """Those that a pair, or a target alone, can serve."""
    return {pairs.NONE: ALONE, "STANDALONE": ARMS}.get(algorithm, HEADED)


class Suite(Protocol):
    """What a kind of model can be asked: items.Shipped, or sts_sglang.evaluate.items.Plain."""

    tasks: tuple[str, ...]  # "text" is the loss
    checksum: str  # of the texts behind them

    def make(self, task: str, length: int, index: int) -> Asked: ...
    def documents(self, task: str, items: int) -> int: ...


class Dense(NamedTuple):
    """How a task of a length went with dense attention, before any arm was asked."""

    task: str
    length: int
    score: float
    kept: bool


@dataclass(frozen=True)
class Plan:
    """What is asked of every arm."""

    tasks: tuple[str, ...]  # of the suite
    lengths: tuple[int, ...]
    text_lengths: tuple[int, ...]
    keeps: tuple[float, ...]
    items: int
    concurrency: int
    device: str
    pair: Models
    server_args: tuple[str, ...] = ()
    config: Mapping = field(default_factory=lambda: {"budget": 0})  # of every arm; a floor would hide keeps
    arms: Mapping[str, Arm] = field(default_factory=lambda: ARMS)
    positions: int | None = None  # of the models
    tried: tuple[Dense, ...] = ()

    def cells(self) -> list[tuple[str, int]]:
        """(task, length), all tasks of the shortest first: a run that is cut off leaves whole lengths."""
        found = [(t, n) for t in self.tasks for n in (self.text_lengths if t == "text" else self.lengths)]
        dropped = {(dense.task, dense.length) for dense in self.tried if not dense.kept}
        return sorted((cell for cell in found if cell not in dropped), key=lambda cell: cell[1])


def sts_config(arm: Arm, plan: Plan, folder: Path) -> dict:
    config = {"keep": KEEP, **plan.config, **arm.config}
    if (name := config.get("head_map")) in MAPS:
        path = folder / f"{name}.json"
        path.write_text(json.dumps(MAPS[name](plan)))
        config["head_map"] = str(path)
    return config


def _proportional(plan: Plan) -> dict:
    counts = []
    for model in (plan.pair.target, plan.pair.draft):
        config = json.loads((Path(model) / "config.json").read_text())
        fields = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads")
        counts.append(headmap.HeadCounts(*(config[f] for f in fields)))
    head_map = headmap.proportional(*counts)
    shapes = {"target": counts[0]._asdict(), "draft": counts[1]._asdict()}
    return {"version": 1, "shift": 1, "tp": 1, **shapes, "sources": head_map.sources}


def _uniform(plan: Plan) -> dict:
    """The map of all arms, else the packaged one of the shipped models, without its split of the budget."""
    packaged = headmap.MAPS / f"{plan.pair.algorithm.lower()}.json"
    data = json.loads(Path(plan.config.get("head_map") or packaged).read_text())
    return {key: value for key, value in data.items() if key != "shares"}


MAPS: dict[str, Callable[[Plan], dict]] = {"proportional": _proportional, "uniform": _uniform}


def start(name: str, plan: Plan, folder: Path) -> LocalServer:
    """The arm's server."""
    arm = plan.arms[name]
    context = max(n for _, n in plan.cells()) + pairs.ROOM
    extra = []
    if plan.device == "cuda":
        # Whole prompts at a time: a chunk of these tiny models waits for the host, whatever its size is.
        extra += ["--chunked-prefill-size", "32768", "--max-prefill-tokens", "32768"]
        extra += ["--cuda-graph-backend-prefill", "disabled", "--mem-fraction-static", "0.8"]
    return pairs.start(
        plan.pair,
        folder / f"{name}.log",
        device=plan.device,
        context=min(context, plan.positions or context),
        concurrency=plan.concurrency,
        config=None if arm.config is None else sts_config(arm, plan, folder),
        extra=[*extra, *plan.server_args],
    )


def common(plan: Plan, checksum: str) -> dict:
    """What results must have in common to stand in one file."""
    return {
        "device": torch.cuda.get_device_name() if plan.device == "cuda" else f"CPU {platform.machine()}",
        "items": plan.items,
        "keeps": list(plan.keeps),
        "text": checksum,
        "models": plan.pair.paths().fingerprints(),
        "config": dict(plan.config),
    }


def header(name: str, plan: Plan, checksum: str, server: LocalServer) -> dict:
    """Where the results of an arm come from."""
    arm = plan.arms[name]
    state = {} if arm.config is None else server.sts()
    kept = ("config", "head_map", "kernel", "graphs", "channels")
    found = {
        "arm": name,
        "about": arm.about,
        **({"own": True} if arm.own else {}),
        **arm.sweep.named(),
        "pair": plan.pair.named(),
        "tried": [dense._asdict() for dense in plan.tried],
        "sts": {key: state[key] for key in kept if key in state},
        **common(plan, checksum),
        "dtype": "float32" if plan.device == "cpu" else "bfloat16",
        "commit": commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "server": server.shown_command(),
    }
    # Maps made for this run are named by their files, not by this machine's folders.
    return json.loads(json.dumps(found).replace(f"{server.log.parent}/", ""))
