"""A target with its draft or alone: checked before anything is loaded, and served with forced text."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from sts_sglang import headmap
from sts_sglang.config import BACKEND, CHAIN_FLAGS, ConfigError, StsConfig, shown
from sts_sglang.headmap import ModelPaths
from sts_sglang.tools.local_server import LocalServer

ALGORITHMS = ("STANDALONE", "EAGLE3", "EAGLE")
NONE = "NONE"  # in place of an algorithm: nothing drafts for the target
FORCED_SERVER = "sts_sglang.host.forced"
# Files of a folder that brings a tokenizer: transformers' own, sentencepiece's, GPT-2's.
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
ROOM = 256  # positions of a server beyond the longest prompt, where the models have them


class Models(Protocol):
    """What is served.

    drafts: whether something drafts for the target. algorithm: how, or NONE.
    """

    target: str
    algorithm: str
    drafts: bool

    def flags(self) -> list[str]:
        """Of a server, for the draft."""

    def paths(self) -> ModelPaths:
        """Where the weights are."""

    def named(self) -> dict[str, str | None]:
        """For a result file: without this machine's folders."""


class Pair(NamedTuple):
    """Folders or hub names, and how the draft drafts (SGLang's --speculative-algorithm)."""

    target: str
    draft: str
    algorithm: str
    drafts = True

    def flags(self) -> list[str]:
        """Of the draft: a chain of 3 steps, 4 tokens a verify."""
        draft = ["--speculative-algorithm", self.algorithm, "--speculative-draft-model-path", self.draft]
        return [*draft, *CHAIN_FLAGS.split()]

    def paths(self) -> ModelPaths:
        return ModelPaths(self.target, self.draft)

    def named(self) -> dict[str, str | None]:
        names = {"target": _named(self.target), "draft": _named(self.draft)}
        return {**names, "algorithm": self.algorithm}


class Alone(NamedTuple):
    """The folder or hub name of a target that nothing drafts for: a verify is one decode step."""

    target: str
    algorithm = NONE
    drafts = False

    def flags(self) -> list[str]:
        return []

    def paths(self) -> ModelPaths:
        return ModelPaths(self.target, None)

    def named(self) -> dict[str, str | None]:
        return {"target": _named(self.target), "draft": None, "algorithm": NONE}


def _named(model: str) -> str:
    return Path(model).resolve().name if os.path.isdir(model) else model


class Known(NamedTuple):
    """What was read of the models before they are loaded."""

    pair: Models
    tokenizer: Any  # transformers', of the target
    positions: int | None  # the most that all of them have, if they say
    bounded: bool = False  # whether it is the draft that has no more


def check(target: str, draft: str | None, algorithm: str | None) -> Known:
    """Reads the configurations and the tokenizers.

    Args:
        draft: None: the target is served alone.
        algorithm: None: what the draft's architecture is for; NONE, or None, without one.

    Raises:
        ConfigError: one line that names the flag, for what is no model, not served, or no pair.
    """
    if draft is None:
        return _check_alone(target, algorithm)
    if algorithm == NONE:
        raise ConfigError(f"--draft {draft}: given with --algorithm {NONE}; allowed: one of the two")
    return _check_pair(target, draft, algorithm)


def _check_alone(target: str, algorithm: str | None) -> Known:
    from sts_sglang.calibrate.record import tokenizer_of

    if algorithm not in (None, NONE):
        raise ConfigError(f"--algorithm {algorithm}: given without --draft; allowed: with one, or {NONE}")
    config = _target_config(target)
    return Known(Alone(target), tokenizer_of(target, "--target"), _positions(config))


def _check_pair(target: str, draft: str, algorithm: str | None) -> Known:
    from sts_sglang.calibrate.record import head_reads, read_config, tokenizer_of
    from sts_sglang.host.serves import DRAFTS, OWN_LAYERS, listed

    configs = _target_config(target), read_config("--draft", draft)
    name = _architecture(configs[1])
    name = OWN_LAYERS.get(name, name)  # what SGLang makes of it as a draft
    algorithms = [known for known in ALGORITHMS if name in DRAFTS[known]]
    if not algorithms or (algorithm and algorithm not in algorithms):
        served = DRAFTS[algorithm] if algorithm else frozenset().union(*DRAFTS.values())
        under = f" under --algorithm {algorithm}" if algorithm else ""
        problem = f"--draft {draft}: architecture {shown(name)}{under}"
        raise ConfigError(f"{problem}; allowed: {listed(served)}")
    pair = Pair(target, draft, algorithm or algorithms[0])
    sizes = [config.get("vocab_size") for config in configs]
    if sizes[0] != sizes[1]:
        raise ConfigError(
            f"--draft {draft}: vocabulary of {shown(sizes[1])}, the target's is {shown(sizes[0])}; "
            "allowed: a draft with the target's tokenizer"
        )
    layers = configs[0].get("num_hidden_layers")
    if pair.algorithm == "EAGLE3" and type(layers) is int:
        head_reads(f"--draft {draft}", configs[1], layers)
    tokenizer = tokenizer_of(target, "--target")
    _check_tokens(draft, tokenizer)
    positions = _positions(*configs)
    return Known(pair, tokenizer, positions, positions != _positions(configs[0]))


def _target_config(target: str) -> dict[str, Any]:
    """Of a target that sts serves."""
    from sts_sglang.calibrate.record import read_config
    from sts_sglang.host.serves import TARGETS, listed

    config = read_config("--target", target)
    if (name := _architecture(config)) not in TARGETS:
        problem = f"--target {target}: architecture {shown(name)}"
        raise ConfigError(f"{problem}; allowed: {listed(TARGETS)}")
    return config


def _architecture(config: dict[str, Any]) -> str:
    return (config.get("architectures") or [""])[0]


def _positions(*configs: dict[str, Any]) -> int | None:
    found = [config.get("max_position_embeddings") for config in configs]
    return min((n for n in found if type(n) is int), default=None)


def _check_tokens(draft: str, tokenizer: Any) -> None:
    """A draft need not bring a tokenizer, the server takes the target's; one that it brings must agree."""
    from sts_sglang.calibrate.record import tokenizer_of

    folder = Path(draft)
    # transformers makes an empty one for some kinds of models that bring none.
    if folder.is_dir() and not any((folder / name).exists() for name in TOKENIZERS):
        return
    try:
        own = tokenizer_of(draft, "--draft").get_vocab()
    except ConfigError:
        return
    vocab = tokenizer.get_vocab()
    other = sorted(word for word in own.keys() | vocab.keys() if own.get(word) != vocab.get(word))
    if other:
        raise ConfigError(
            f"--draft {draft}: its tokenizer differs from the target's in {len(other)} tokens, among them "
            f"{shown(other[0], 40)}; allowed: a draft with the target's tokenizer"
        )


def check_map(models: Models, config: StsConfig, ranks: int) -> None:
    """Reads the head map that a configuration names as the launch will, without the models' weights. Those of
    a type that transformers does not know are left to the launch, which alone can read their heads.

    Args:
        config: of this launch. ranks: tensor-parallel ones.

    Raises:
        ConfigError: the map serves other models, or not this configuration.
    """
    from sts_sglang.calibrate.record import head_counts, head_dim, known_config

    paths = models.paths()
    if config.head_map is None:
        return
    found = [known_config(path) for path in (paths.target, paths.draft) if path is not None]
    if any(one is None for one in found):
        return
    target, draft = head_counts(found[0]), head_counts(found[1]) if models.drafts else None
    if models.algorithm == "EAGLE":  # one layer, which a model's own says nothing of
        draft = draft._replace(layers=1)
    # Weights of a hub name may not be here yet.
    here = paths if paths.are_folders() else None
    head_map = headmap.of_config(config, target, draft, here, ranks)
    headmap.check_directions(config, head_map, head_dim(found[0]))


def _platform(device: str) -> tuple[dict[str, str], list[str]]:
    """The environment and the flags that choose it; "cpu" is the reference platform in float32."""
    if device != "cpu":
        return {}, []
    return {"SGLANG_PLATFORM": "sts_cpu"}, ["--device", "cpu", "--dtype", "float32"]


def launch_line(models: Models, config: dict, device: str, extra: Sequence[str] = ()) -> str:
    """The command that serves them with this configuration of sts, as `start` did on the device and with
    these arguments, without what only bounded its size."""
    env, flags = _platform(device)
    words = [f"{name}={value}" for name, value in env.items()]
    words += ["python", "-m", "sglang.launch_server", "--model-path", models.target, *flags]
    words += ["--attention-backend", BACKEND, "--sts-config", json.dumps(config), *models.flags(), *extra]
    return shlex.join(words)


def start(
    models: Models,
    log: Path,
    *,
    device: str,
    context: int,
    concurrency: int,
    config: dict | None,
    extra: Sequence[str] = (),
    start_seconds: int = 900,
) -> LocalServer:
    """A server of the models that can be told which tokens to emit (host/forced.py).

    Args:
        log: takes the server's output.
        device: "cuda", or "cpu" for the reference platform in float32.
        context: most tokens of a request, its answer included.
        concurrency: requests at a time.
        config: of sts; None: stock SGLang, which on a CPU does not speculate.
        extra: further arguments, which win over those from here.
    """
    args = ["--context-length", str(context), "--max-running-requests", str(concurrency)]
    # What the requests at a time need, so that their prompts stay cached, and little more: the device may
    # be shared.
    args += ["--max-total-tokens", str(5 * concurrency * (context + ROOM) // 4)]
    args += ["--grammar-backend", "forced", "--skip-server-warmup", "--random-seed", "0"]
    env, flags = _platform(device)
    args += flags
    if models.paths().are_folders():
        env["HF_HUB_OFFLINE"] = "1"
    if device == "cpu":
        env["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "1")
    else:
        args += ["--cuda-graph-max-bs", str(concurrency), "--sleep-on-idle"]
    if config is not None:
        args += ["--attention-backend", BACKEND, "--sts-config", json.dumps(config)]
    if config is not None or device != "cpu":
        args += models.flags()
    return LocalServer(
        models.target, log, *args, *extra, env=env, start_seconds=start_seconds, module=FORCED_SERVER
    )
