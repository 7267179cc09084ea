"""How long `sts-sglang evaluate` takes for an 8B target, alone or with a draft, and what memory it needs.

    python -m benchmarks.time_evaluate --models DIR --draft EAGLE3 --out FILE --device cuda

Writes models with the shapes of Llama-3.1-8B and of its draft and random weights to DIR (16 GB in bfloat16;
kept, and used again), with the shipped pair's tokenizer, and evaluates them with its defaults: text, tasks,
and with a draft the share of attention that is held. A random model does no task, and its drafts are hardly
ever right: here every task counts as one that the model does, so that all is asked that a model is asked
which does everything, and a round brings one token, so that no draft of that size takes longer. The verdict
says nothing. Further options are those of evaluate. `device_mb` is whatever the device gave meanwhile, also
to others.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import save_file

from benchmarks import dummy_models, time_calibrate
from sts_sglang import cli
from sts_sglang.evaluate import command, items
from sts_sglang.evaluate.asking import DENSE, Cell
from sts_sglang.evaluate.pair import NONE

TARGET = "llama-8b"
DRAFTS = dummy_models.DRAFTS[TARGET]  # by algorithm


class Parts:
    """Seconds of parts, and the most memory of the device meanwhile beyond what was in use before. A part may
    lie in another."""

    def __init__(self):
        self.before = time_calibrate.device_memory()
        self.seconds: dict[str, float] = {}
        self.device_mb: dict[str, int] = {}
        self.returned: dict[str, Any] = {}

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        started, ended = time.monotonic(), threading.Event()
        self.device_mb[name] = 0

        def look() -> None:
            while not ended.wait(0.2):
                used = time_calibrate.device_memory() - self.before >> 20
                self.device_mb[name] = max(self.device_mb[name], used)

        looking = threading.Thread(target=look, daemon=True)
        looking.start()
        try:
            yield
        finally:
            ended.set()
            looking.join()
            self.seconds[name] = round(time.monotonic() - started, 1)

    def of(self, name: str, function: Callable) -> Callable:
        """The function as a part, and what it returns in `returned`."""

        def timed(*args, **kwargs):
            with self.part(name):
                self.returned[name] = function(*args, **kwargs)
            return self.returned[name]

        return timed


def timed(words: list[str]) -> dict[str, Any]:
    """`sts-sglang evaluate` with these arguments, no task left out. Raises SystemExit where it refuses."""
    parts = Parts()
    with contextlib.ExitStack() as patched:
        for part, name in {"recall": "_recall", "serving": "measure", "asking": "_ask"}.items():
            function = parts.of(part, getattr(command, name))
            patched.enter_context(mock.patch.object(command, name, function))
        patched.enter_context(mock.patch.object(items, "GOOD_ENOUGH", 0.0))
        with parts.part("whole"):
            code = cli.main(["evaluate", *words])
    if code not in (0, 1):
        sys.exit(code)
    cells, left_out = parts.returned["asking"]
    assert not left_out
    seconds = {**parts.seconds, "starting": round(parts.seconds["serving"] - parts.seconds["asking"], 1)}
    found = {"seconds": seconds, "seconds_by_task": by_task(cells.values()), "device_mb": parts.device_mb}
    found |= {"requests": sum(len(cell.group) for cell in cells.values())}
    found |= {"keeps": sorted({keep for *_, keep in cells}), "lengths": sorted({n for _, n, _ in cells})}
    return {**found, "tokens_a_round": accepted(cells.values())}


def by_task(cells: Iterable[Cell]) -> dict[str, float]:
    """At every keep and length, without the first look at each."""
    found: dict[str, float] = {}
    for cell in cells:
        found[cell.task] = round(found.get(cell.task, 0) + cell.seconds, 1)
    return found


def accepted(cells: Iterable[Cell]) -> float | None:
    """Tokens a round of dense verify; None where nothing drafts."""
    dense = [cell for cell in cells if cell.keep == DENSE]
    rounds = sum(sum(cell.rounds) for cell in dense)
    return round(sum(sum(cell.tokens) - len(cell.tokens) for cell in dense) / rounds, 2) if rounds else None


def make_head(name: str, folder: Path, dtype: torch.dtype) -> Path:
    """A folder of an EAGLE-3 head with random weights, as SGLang's models/llama_eagle3.py names them."""
    path = dummy_models.write(name, folder)
    if any(path.glob("*.safetensors")):
        return path
    config = json.loads((path / "config.json").read_text())
    hidden, inner, dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = dim * config["num_attention_heads"], dim * config["num_key_value_heads"]
    shapes = {"fc": (hidden, 3 * hidden), "norm": (hidden,), "lm_head": (config["draft_vocab_size"], hidden)}
    shapes |= {
        f"midlayer.{part}": shape
        for part, shape in {
            "input_layernorm": (hidden,),
            "hidden_norm": (hidden,),
            "post_attention_layernorm": (hidden,),
            "self_attn.q_proj": (q, 2 * hidden),
            "self_attn.k_proj": (kv, 2 * hidden),
            "self_attn.v_proj": (kv, 2 * hidden),
            "self_attn.o_proj": (hidden, q),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }.items()
    }
    torch.manual_seed(0)
    weights = {
        f"{key}.weight": torch.ones(shape, dtype=dtype)
        if len(shape) == 1
        else 0.02 * torch.randn(shape, dtype=dtype)
        for key, shape in shapes.items()
    }
    # Its vocabulary is the first tokens of the target's.
    save_file(
        {**weights, "d2t": torch.zeros(config["draft_vocab_size"], dtype=torch.int64)},
        path / "model.safetensors",
    )
    return path


def models(folder: Path, algorithm: str, device: str, dtype: torch.dtype) -> list[str]:
    """Of evaluate: the flags that name the models, which are written where they are not there."""
    words = ["--target", str(time_calibrate.make(TARGET, folder, device, dtype))]
    if algorithm == NONE:
        return words
    name = DRAFTS[algorithm]
    if algorithm == "EAGLE3":
        draft = make_head(name, folder, dtype)
    else:
        draft = time_calibrate.make(name, folder, device, dtype)
    return [*words, "--draft", str(draft)]


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--models", type=Path, required=True, metavar="DIR", help="where to write the models")
    p.add_argument("--draft", choices=(*DRAFTS, NONE), default="EAGLE3", help="by algorithm (%(default)s)")
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="as for evaluate (%(default)s)")
    p.add_argument("--dtype", default="bfloat16", help="of the weights (%(default)s)")
    p.add_argument("--out", type=Path, help="append the result to this JSONL file")
    options, further = p.parse_known_args(argv)  # what is not known here is for evaluate
    words = models(options.models, options.draft, options.device, getattr(torch, options.dtype))
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    words += ["--device", options.device, *further]
    time_calibrate.tell(timed(words), ["evaluate", *words], options.out)


if __name__ == "__main__":
    main()
