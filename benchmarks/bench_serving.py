"""Tokens per second of stock SGLang and of sts, through the real server, on the same machine in one run.

Arms (each its own server, one after the other, `--repeats` times in alternating order):
  stock         the target alone
  stock-spec    the target and a STANDALONE draft
  sts-dense     sts with every target layer dense: what capture and selection cost
  sts           sts with the given --sts-config

For every shape CONTEXTxREQUESTS the prompts are prefilled once, so that the measured requests find them
in the prefix cache; then all requests decode `--new-tokens` at the same time. An sts arm whose counters
show no sparse verify, or a dense one, ends the benchmark.

Example, on a GPU, with models that have the shapes of Llama-3.1-8B and 3.2-1B but dummy weights:
  python benchmarks/bench_serving.py --target T --draft D --shapes 32000x8,128000x1 \\
      --server-args "--load-format dummy --skip-tokenizer-init" --accept-length 3 --out serving.jsonl
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sts_sglang.local_server import LocalServer

ARMS = ("stock", "stock-spec", "sts-dense", "sts")


def arm_args(arm: str, options: argparse.Namespace) -> list[str]:
    """Arguments of an arm's server on top of the common ones."""
    if arm == "stock":
        return []
    steps = options.steps
    args = ["--speculative-algorithm", "STANDALONE", "--speculative-draft-model-path", str(options.draft)]
    args += ["--speculative-num-steps", str(steps), "--speculative-eagle-topk", "1"]
    args += ["--speculative-num-draft-tokens", str(steps + 1)]
    if arm == "stock-spec":
        return args
    config = json.loads(options.sts_config)
    if arm == "sts-dense":
        layers = json.loads((options.target / "config.json").read_text())["num_hidden_layers"]
        config["dense_layers"] = list(range(layers))
    return [*args, "--attention-backend", "sts", "--sts-config", json.dumps(config)]


def run_shape(server: LocalServer, context: int, requests: int, options: argparse.Namespace) -> dict:
    """One shape on a running server: prefill, then the measured batch."""
    rng = random.Random(context)
    prompts = [[rng.randrange(5, options.vocab) for _ in range(context)] for _ in range(requests)]

    def ask(prompt: list[int], new_tokens: int) -> dict:
        params = {"max_new_tokens": new_tokens, "temperature": 0, "ignore_eos": True}
        return server.post("/generate", {"input_ids": prompt, "sampling_params": params}, timeout=1800)

    for prompt in prompts:
        ask(prompt, 1)
    with ThreadPoolExecutor(requests) as pool:
        started = time.monotonic()
        answers = list(pool.map(lambda p: ask(p, options.new_tokens), prompts))
        seconds = time.monotonic() - started
    metas = [a["meta_info"] for a in answers]
    tokens = sum(m["completion_tokens"] for m in metas)
    return {
        "tokens_per_s": round(tokens / seconds, 2),
        "tpot_ms": round(1000 * seconds / options.new_tokens, 3),
        "cached_tokens": min(m["cached_tokens"] for m in metas),
        "accept_length": round(statistics.mean(m.get("spec_accept_length") or 1 for m in metas), 3),
    }


def run_arm(arm: str, repeat: int, shapes: list[tuple[int, int]], options: argparse.Namespace) -> list[dict]:
    """All shapes of one arm on one server."""
    log = options.logs / f"{arm}-{repeat}.log"
    args = [*shlex.split(options.server_args), *arm_args(arm, options)]
    env = {"SGLANG_SIMULATE_ACC_LEN": str(options.accept_length)} if options.accept_length else {}
    rows = []
    with LocalServer(options.target, log, *args, env=env, start_seconds=600) as server:
        for context, requests in shapes:
            before = server.counters() if arm.startswith("sts") else None
            row = {"arm": arm, "repeat": repeat, "context": context, "requests": requests}
            row |= run_shape(server, context, requests, options)
            if before is not None:
                row |= _sparsity(arm, before, server.counters())
            print(json.dumps(row), flush=True)
            rows.append({**row, "server": server.shown_command()})
    return rows


def _sparsity(arm: str, before: dict, after: dict) -> dict:
    """What this shape's verifies attended to; an arm that was not what its name says ends the run."""
    delta = {name: after[name] - before[name] for name in after}
    if not delta["sparse_verifies"] or delta["dense_verifies"]:
        raise SystemExit(f"{arm}: counters {delta} show that this was not sts; nothing is reported")
    keep = delta["selected_tokens"] / delta["available_tokens"]
    return {"sparse_verifies": delta["sparse_verifies"], "keep_ratio": round(keep, 4)}


def origin() -> dict:
    """Hardware and versions of this run."""
    import platform
    from importlib.metadata import version

    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else f"none ({platform.machine()} CPU)"
    names = ("sglang", "torch", "flashinfer-python", "sts-sglang")
    return {"gpu": gpu, "python": platform.python_version(), **{n: version(n) for n in names}}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--target", type=Path, required=True, help="folder of the target model")
    p.add_argument("--draft", type=Path, required=True, help="folder of the STANDALONE draft")
    p.add_argument(
        "--shapes", default="32000x1,32000x8", help="CONTEXTxREQUESTS, comma separated (%(default)s)"
    )
    p.add_argument("--arms", default=",".join(ARMS), help="comma separated (%(default)s)")
    p.add_argument("--sts-config", default='{"keep": 0.1}', help="inline JSON (%(default)s)")
    p.add_argument("--new-tokens", type=int, default=256, help="decoded per request (%(default)s)")
    p.add_argument("--steps", type=int, default=3, help="draft steps a round (%(default)s)")
    p.add_argument(
        "--accept-length", type=float, help="simulate this accept length (SGLANG_SIMULATE_ACC_LEN)"
    )
    p.add_argument("--vocab", type=int, default=250, help="prompts draw ids below this (%(default)s)")
    p.add_argument("--repeats", type=int, default=1, help="servers per arm (%(default)s)")
    p.add_argument("--server-args", default="", help="arguments common to all servers, one string")
    p.add_argument("--logs", type=Path, default=Path("."), help="folder of the server logs (%(default)s)")
    p.add_argument("--out", type=Path, help="append raw results to this JSONL file")
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    shapes = [tuple(map(int, shape.split("x"))) for shape in options.shapes.split(",")]
    where = {
        **origin(),
        "commit": os.environ.get("STS_COMMIT", "unknown"),
        "simulated": options.accept_length,
    }
    rows = []
    for repeat in range(options.repeats):
        arms = options.arms.split(",")
        for arm in arms if repeat % 2 == 0 else reversed(arms):
            rows += run_arm(arm, repeat, shapes, options)
    if options.out:
        with options.out.open("a") as f:
            f.writelines(json.dumps({**row, **where}) + "\n" for row in rows)
    for shape in shapes:
        print(f"\n{shape[0]} x {shape[1]}")
        for arm in options.arms.split(","):
            mine = [r for r in rows if (r["arm"], r["context"], r["requests"]) == (arm, *shape)]
            speeds = [r["tokens_per_s"] for r in mine]
            middle, spread = statistics.median(speeds), max(speeds) - min(speeds)
            print(f"  {arm:12} {middle:9.1f} tokens/s  (spread {spread:.1f})")


if __name__ == "__main__":
    main()
