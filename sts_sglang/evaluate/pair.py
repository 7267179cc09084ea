"""A target and its draft: checked before anything is loaded, and served with forced text."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sts_sglang.config import BACKEND, CHAIN_FLAGS, ConfigError, shown
from sts_sglang.tools.local_server import LocalServer

ALGORITHMS = ("STANDALONE", "EAGLE3", "EAGLE")
FORCED_SERVER = "sts_sglang.host.forced"
ROOM = 256  # positions of a server beyond the longest prompt, where the models have them


class Pair(NamedTuple):
    """Folders or hub names, and how the draft drafts (SGLang's --speculative-algorithm)."""

    target: str
    draft: str
    algorithm: str

    def flags(self) -> list[str]:
        """Of the draft: a chain of 3 steps, 4 tokens a verify."""
        draft = ["--speculative-algorithm", self.algorithm, "--speculative-draft-model-path", self.draft]
        return [*draft, *CHAIN_FLAGS.split()]

    def named(self) -> dict[str, str]:
        """For a result file: without this machine's folders."""
        models = {key: getattr(self, key) for key in ("target", "draft")}
        names = {k: Path(v).resolve().name if os.path.isdir(v) else v for k, v in models.items()}
        return {**names, "algorithm": self.algorithm}


class Known(NamedTuple):
    """What was read of a pair before it is loaded."""

    pair: Pair
    tokenizer: Any  # transformers', of the target
    positions: int | None  # the most that both models have, if they say


def check(target: str, draft: str, algorithm: str | None) -> Known:
    """Reads both configurations and the tokenizers.

    Args:
        algorithm: None: what the draft's architecture is for.

    Raises:
        ConfigError: one line that names the flag, for what is no model, not served, or no pair.
    """
    from sts_sglang.calibrate.record import read_config, tokenizer_of
    from sts_sglang.host.serves import DRAFTS, TARGETS

    configs = {"--target": read_config("--target", target), "--draft": read_config("--draft", draft)}
    names = {flag: (config.get("architectures") or [""])[0] for flag, config in configs.items()}
    if names["--target"] not in TARGETS:
        problem = f"--target {target}: architecture {shown(names['--target'])}"
        raise ConfigError(f"{problem}; allowed: {', '.join(sorted(TARGETS))}")
    algorithms = [name for name in ALGORITHMS if names["--draft"] in DRAFTS[name]]
    if not algorithms or (algorithm and algorithm not in algorithms):
        served = DRAFTS[algorithm] if algorithm else frozenset().union(*DRAFTS.values())
        under = f" under --algorithm {algorithm}" if algorithm else ""
        problem = f"--draft {draft}: architecture {shown(names['--draft'])}{under}"
        raise ConfigError(f"{problem}; allowed: {', '.join(sorted(served))}")
    pair = Pair(target, draft, algorithm or algorithms[0])
    sizes = [config.get("vocab_size") for config in configs.values()]
    if sizes[0] != sizes[1]:
        raise ConfigError(
            f"--draft {draft}: vocabulary of {shown(sizes[1])}, the target's is {shown(sizes[0])}; "
            "allowed: a draft with the target's tokenizer"
        )
    tokenizer = tokenizer_of(target, "--target")
    if pair.algorithm == "STANDALONE":
        _check_tokens(draft, tokenizer)
    positions = [config.get("max_position_embeddings") for config in configs.values()]
    return Known(pair, tokenizer, min((n for n in positions if type(n) is int), default=None))


def _check_tokens(draft: str, tokenizer: Any) -> None:
    """A draft need not bring a tokenizer, the server takes the target's; one that it brings must agree."""
    from sts_sglang.calibrate.record import tokenizer_of

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


def start(
    pair: Pair,
    log: Path,
    *,
    device: str,
    context: int,
    concurrency: int,
    config: dict | None,
    extra: Sequence[str] = (),
    start_seconds: int = 900,
) -> LocalServer:
    """A server of the pair that can be told which tokens to emit (host/forced.py).

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
    env = {"HF_HUB_OFFLINE": "1"} if os.path.isdir(pair.target) and os.path.isdir(pair.draft) else {}
    if device == "cpu":
        args += ["--device", "cpu", "--dtype", "float32"]
        env |= {"SGLANG_PLATFORM": "sts_cpu", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    else:
        args += ["--cuda-graph-max-bs", str(concurrency), "--sleep-on-idle"]
    if config is not None:
        args += ["--attention-backend", BACKEND, "--sts-config", json.dumps(config)]
    if config is not None or device != "cpu":
        args += pair.flags()
    return LocalServer(
        pair.target, log, *args, *extra, env=env, start_seconds=start_seconds, module=FORCED_SERVER
    )
