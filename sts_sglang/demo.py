"""The main job in one command: a short conversation about a long document, served by `sts`.

Starts SGLang with `--attention-backend sts` on this machine (the reference CPU platform without a GPU),
asks over the OpenAI-compatible API, and prints for every answer what speculation and sparsity did.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from sts_sglang.local_server import LocalServer
from sts_sglang.tiny_pair import make_pair

WORDS = """
the a of and to in is that for on with as it was by at from this but not are have be or an they which one
you were all her there would their we him been has when who will no more if out so up said what its about
than into them can only other time new some could these two may first then do any like my now over such
"""


class Pair(NamedTuple):
    """A target and a STANDALONE draft on disk."""

    target: Path
    draft: Path
    note: str


def default_pair(folder: Path) -> Pair:
    """The embedded pair; `folder` takes it when it has to be made first."""
    paths = make_pair(folder)
    note = (
        "tiny target and draft with random weights from a fixed seed: the numbers are real, "
        "the answers are not language"
    )
    return Pair(paths["target"], paths["draft"], note)


def document(characters: int) -> str:
    """Filler prose with a few facts in it, the same on every run."""
    state, words, size, facts, choices = 1, [], 0, iter(FACTS), WORDS.split()
    while size < characters:
        state = (state * 1103515245 + 12345) % 2**31
        word = choices[state // 65536 % len(choices)]
        if len(words) % 400 == 200 and (fact := next(facts, None)):
            word = f"\n{fact}\n{word}"
        words.append(word)
        size += len(word) + 1
    return " ".join(words)


FACTS = (
    "The special number of the blue harbor is 48213.",
    "The special number of the old bridge is 90417.",
    "The special number of the green door is 15526.",
)
QUESTIONS = (
    "What is the special number of the blue harbor?",
    "What is the special number of the green door?",
    "What is the special number of the old bridge?",
)


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
    messages = [{"role": "user", "content": f"{text}\n\n{QUESTIONS[0]}"}]
    for turn, question in enumerate(QUESTIONS, start=1):
        if turn > 1:
            messages.append({"role": "user", "content": question})
        before, started = server.counters(), time.monotonic()
        body = {"model": "demo", "messages": messages, "temperature": 0, "max_tokens": max_tokens}
        reply = server.post("/v1/chat/completions", body)
        seconds = time.monotonic() - started
        after, usage = server.counters(), reply["usage"]
        answer = reply["choices"][0]["message"]["content"]
        messages.append({"role": "assistant", "content": answer})
        delta = {name: after[name] - before[name] for name in after}
        print(f"\n[{turn}] {question}\n    {answer!r}")
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
    parser = argparse.ArgumentParser(prog="sts-sglang demo", description=__doc__)
    parser.add_argument("--characters", type=int, default=12000, help="length of the document (%(default)s)")
    parser.add_argument("--max-tokens", type=int, default=24, help="length of an answer (%(default)s)")
    parser.add_argument("--sts-config", help="inline JSON or a path, as for the server")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        pair = default_pair(Path(folder) / "pair")
        print(f"Models: {pair.note}.")
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
    # Without CUDA graphs: the kernels of this release are the torch reference.
    gpu = ["--disable-cuda-graph", "--mem-fraction-static", "0.5"]
    return gpu if _on_gpu() else ["--device", "cpu", "--dtype", "float32", "--max-total-tokens", "65536"]


def _device_env() -> dict[str, str]:
    return {} if _on_gpu() else {"SGLANG_PLATFORM": "sts_cpu"}


if __name__ == "__main__":
    main()
