"""The servers that are compared, and what all of them are asked."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.harness import commit
from sts_sglang import headmap
from sts_sglang.tools.local_server import LocalServer

ROOT = Path(__file__).parents[2]
DENSE = 1.0  # the keep of a request that attends to everything
BASE = {"keep": 0.5, "budget": 0}  # room in the lists for every keep that is asked for


@dataclass(frozen=True)
class Arm:
    """A server to ask: None is stock SGLang; else the configuration on top of BASE."""

    config: dict | None
    about: str
    keeps: bool = True  # one cell a keep; else dense alone


ARMS = {
    "stock": Arm(None, "SGLang without sts", keeps=False),
    "dense": Arm({"verify": "dense"}, "draft and scoring as ever, dense verify", keeps=False),
    "sts": Arm({}, "the draft's attention, default head map"),
    "sts-again": Arm({}, "the same once more: run-to-run noise"),
    "sts-proportional": Arm({"head_map": "proportional"}, "the map that needs no calibration"),
    "sts-uniform": Arm({"head_map": "uniform"}, "the default map, but the same budget for every head"),
    "sts-warm": Arm({"history": "warm"}, "history in a request's first verify"),
    "sts-blend": Arm({"history": "blend"}, "history in every verify"),
    "sts-no-spread": Arm({"spread": 0}, "no token passes importance on to the next"),
    "sts-steps": Arm({"draft": "steps"}, "draft steps after the first attend to the selection"),
    "sts-draft": Arm({"draft": "all"}, "so does draft-extend"),
    "sts-draft-blend": Arm({"draft": "all", "history": "blend"}, "the same with history in every verify"),
    "sts-full4": Arm({"full_verify_every": 4}, "every 4th verify attends to everything"),
    "oracle": Arm({"selector": "oracle"}, "the target's own attention"),
    "quest": Arm({"selector": "quest"}, "Quest's bounds over pages of 16"),
    "recent": Arm({"selector": "recent"}, "sink and the last tokens (StreamingLLM)"),
    "random": Arm({"selector": "random"}, "chance"),
}


@dataclass(frozen=True)
class Plan:
    """What is asked of every arm."""

    tasks: tuple[str, ...]  # of items.TASKS, and "shared", "text"
    lengths: tuple[int, ...]
    text_lengths: tuple[int, ...]
    keeps: tuple[float, ...]
    items: int
    concurrency: int
    device: str
    models: Path
    server_args: tuple[str, ...] = ()

    def cells(self) -> list[tuple[str, int]]:
        """(task, length), all tasks of the shortest first: a run that is cut off leaves whole lengths."""
        found = [(t, n) for t in self.tasks for n in (self.text_lengths if t == "text" else self.lengths)]
        return sorted(found, key=lambda cell: cell[1])


def sts_config(arm: Arm, models: Path, folder: Path) -> str:
    config = {**BASE, **arm.config}
    if (name := config.get("head_map")) in MAPS:
        path = folder / f"{name}.json"
        path.write_text(json.dumps(MAPS[name](models)))
        config["head_map"] = str(path)
    return json.dumps(config)


def _proportional(models: Path) -> dict:
    counts = []
    for name in ("target", "draft"):
        config = json.loads((models / name / "config.json").read_text())
        fields = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads")
        counts.append(headmap.HeadCounts(*(config[f] for f in fields)))
    head_map = headmap.proportional(*counts)
    shapes = {"target": counts[0]._asdict(), "draft": counts[1]._asdict()}
    return {"version": 1, "shift": 1, "tp": 1, **shapes, "sources": head_map.sources}


def _uniform(models: Path) -> dict:
    """The packaged map of the pair without its split of the budget."""
    data = json.loads((headmap.MAPS / "standalone.json").read_text())
    return {key: value for key, value in data.items() if key != "shares"}


MAPS = {"proportional": _proportional, "uniform": _uniform}


def start(name: str, plan: Plan, folder: Path) -> LocalServer:
    """The arm's server; with the draft of the same folder as the target."""
    arm, cpu = ARMS[name], plan.device == "cpu"
    longest = max(n for _, n in plan.cells())
    args = ["--context-length", str(longest + 256), "--max-running-requests", str(plan.concurrency)]
    # What the requests at a time need, so that their prompts stay cached, and little more: several servers
    # may share the device.
    args += ["--max-total-tokens", str(5 * plan.concurrency * (longest + 512) // 4)]
    args += ["--grammar-backend", "forced", "--skip-server-warmup", "--random-seed", "0"]
    env = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    if cpu:
        args += ["--device", "cpu", "--dtype", "float32"]
        env |= {"SGLANG_PLATFORM": "sts_cpu", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    else:
        # Whole prompts at a time: a chunk of these tiny models waits for the host, whatever its size is.
        args += ["--chunked-prefill-size", "32768", "--max-prefill-tokens", "32768"]
        args += ["--cuda-graph-max-bs", str(plan.concurrency), "--cuda-graph-backend-prefill", "disabled"]
        args += ["--mem-fraction-static", "0.8", "--sleep-on-idle"]
    if arm.config is not None:
        args += ["--attention-backend", "sts", "--sts-config", sts_config(arm, plan.models, folder)]
    # SGLang's own CPU attention does not speculate: stock is the target alone there.
    if arm.config is not None or not cpu:
        draft = str(plan.models / "draft")
        args += ["--speculative-algorithm", "STANDALONE", "--speculative-draft-model-path", draft]
        args += ["--speculative-num-steps", "3", "--speculative-eagle-topk", "1"]
        args += ["--speculative-num-draft-tokens", "4"]
    return LocalServer(
        plan.models / "target",
        folder / f"{name}.log",
        *args,
        *plan.server_args,
        env=env,
        start_seconds=600,
        module="benchmarks.quality.serve",
    )


def common(plan: Plan, checksum: str) -> dict:
    """What results must have in common to stand in one file."""
    return {
        "device": torch.cuda.get_device_name() if plan.device == "cuda" else f"CPU {platform.machine()}",
        "items": plan.items,
        "keeps": list(plan.keeps),
        "text": checksum,
        "models": headmap.ModelPaths(str(plan.models / "target"), str(plan.models / "draft")).fingerprints(),
    }


def header(name: str, plan: Plan, checksum: str, server: LocalServer) -> dict:
    """Where the results of an arm come from."""
    arm = ARMS[name]
    state = {} if arm.config is None else server.sts()
    kept = ("config", "head_map", "kernel", "graphs", "channels")
    found = {
        "arm": name,
        "about": arm.about,
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
