"""The main job in one command: a short conversation about a long document, served by `sts`.

Starts SGLang with `--attention-backend sts` on this machine (the reference CPU platform without a GPU),
asks over the OpenAI-compatible API, and prints for every answer what speculation and sparsity did.
"""

from __future__ import annotations

import argparse
import json
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from sts_sglang.tools.local_server import LocalServer, stop_when_terminated

MODELS = Path(__file__).parents[1] / "models"
FACTS = {"amber lantern": "48213", "stone harbor": "90417", "quiet meadow": "15526"}
ASKED = ("stone harbor", "amber lantern", "quiet meadow")


class Pair(NamedTuple):
    """A target and a STANDALONE draft on disk."""

    target: Path
    draft: Path


def shipped_pair() -> Pair:
    """The trained pair of this package (see models/MODEL_CARD.md)."""
    return Pair(MODELS / "target", MODELS / "draft")


def document(characters: int) -> str:
    """Source code of the running Python's library, with the facts far apart in it, one a line."""
    lines: list[str] = []
    size = 0
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for line in path.read_text(errors="ignore").splitlines():
            if size >= characters:
                break
            lines.append(line)
            size += len(line) + 1
    for i, (name, code) in enumerate(FACTS.items()):
        place = len(lines) * (2 * i + 1) // (2 * len(FACTS))
        lines.insert(place, f"The access code of {name} is {code}.")
    return "\n".join(lines)


def question(name: str, text: str = "") -> str:
    """A message that asks for a fact, behind the text that has it."""
    asked = f"What is the access code of {name}?"
    return f"{text}\n\n{asked}" if text else asked


def launch_args(pair: Pair, sts_config: str | None, context: int) -> list[str]:
    """Arguments of the demo's server after the model path."""
    args = ["--attention-backend", "sts", "--speculative-algorithm", "STANDALONE"]
    args += ["--speculative-draft-model-path", str(pair.draft), "--enable-cache-report", "--sleep-on-idle"]
    args += ["--context-length", str(context), "--max-running-requests", "4", "--skip-server-warmup"]
    if sts_config:
        args += ["--sts-config", sts_config]
    return args


def converse(server: LocalServer, text: str, max_tokens: int) -> None:
    """Ask the questions in one growing conversation and print a line of numbers under each answer."""
    messages: list[dict] = []
    for turn, name in enumerate(ASKED, start=1):
        messages.append({"role": "user", "content": question(name, "" if messages else text)})
        before, started = server.counters(), time.monotonic()
        body = {"model": "demo", "messages": messages, "temperature": 0, "max_tokens": max_tokens}
        reply = server.post("/v1/chat/completions", body)
        seconds = time.monotonic() - started
        after, usage = server.counters(), reply["usage"]
        answer = reply["choices"][0]["message"]["content"]
        messages.append({"role": "assistant", "content": answer})
        delta = {name: after[name] - before[name] for name in after}
        verdict = "right" if FACTS[name] in answer else f"wrong, the document says {FACTS[name]}"
        print(f"\n[{turn}] {question(name)}\n    {answer!r}  ({verdict})")
        print(
            f"    prompt {usage['prompt_tokens']} tokens, cached "
            f"{(usage.get('prompt_tokens_details') or {}).get('cached_tokens', 0)}, "
            f"accept length {usage['completion_tokens'] / max(1, delta['sparse_verifies']):.2f}, "
            f"keep ratio {delta['selected_tokens'] / max(1, delta['available_tokens']):.3f}, "
            f"{usage['completion_tokens'] / seconds:.1f} tokens/s (prefill included)"
        )
        if not delta["sparse_verifies"] or delta["dense_verifies"]:
            sys.exit(f"demo: this answer was not verified sparsely: {delta}")


def main(argv: list[str] | None = None) -> None:
    """Command line of the demo."""
    parser = argparse.ArgumentParser(prog="python -m sts_sglang.tools.demo", description=__doc__)
    parser.add_argument("--characters", type=int, default=40000, help="length of the document (%(default)s)")
    parser.add_argument("--max-tokens", type=int, default=24, help="length of an answer (%(default)s)")
    parser.add_argument("--sts-config", help="inline JSON or a path, as for the server")
    args = parser.parse_args(argv)
    stop_when_terminated()
    with tempfile.TemporaryDirectory() as folder:
        pair = shipped_pair()
        print(f"Models: the trained pair in {MODELS}, a target of 7M parameters and a draft of 1M.")
        log = Path(folder) / "server.log"
        print("Starting SGLang with --attention-backend sts (20 to 60 s) ...", flush=True)
        server = LocalServer(
            pair.target, log, *launch_args(pair, args.sts_config, 32768), *_device_args(), env=_device_env()
        )
        with server:
            described = server.sts()
            described.pop("counters")
            print(f"STS serves: {json.dumps(described)}")
            converse(server, document(args.characters), args.max_tokens)
        print("\nServer stopped.")


def _on_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _device_args() -> list[str]:
    gpu = ["--mem-fraction-static", "0.5", "--cuda-graph-max-bs", "4"]
    return gpu if _on_gpu() else ["--device", "cpu", "--dtype", "float32", "--max-total-tokens", "65536"]


def _device_env() -> dict[str, str]:
    return {} if _on_gpu() else {"SGLANG_PLATFORM": "sts_cpu"}


if __name__ == "__main__":
    main()
