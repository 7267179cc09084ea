"""Answers and accept length in a real SGLang server (on a machine without a GPU: the project's CPU platform).

python benchmarks/models/accept.py --algorithm STANDALONE --out FILE.jsonl [--corpus .data/corpus]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
from pathlib import Path

import torch
from exam import SHIPPED, heldout, score
from tasks import EXAM, Writer
from tqdm import tqdm

from sts_sglang.tools.local_server import LocalServer, stop_when_terminated

DRAFTS = {"STANDALONE": "draft", "EAGLE3": "eagle3"}
SPECULATION = [
    "--speculative-num-steps",
    "3",
    "--speculative-eagle-topk",
    "1",
    "--speculative-num-draft-tokens",
    "4",
]


def server(models: Path, algorithm: str, config: str, log: Path, more: list[str]) -> LocalServer:
    args = [
        "--speculative-algorithm",
        algorithm,
        "--speculative-draft-model-path",
        str(models / DRAFTS[algorithm]),
        *SPECULATION,
    ]
    args += ["--context-length", "33792", "--max-running-requests", "2", "--mem-fraction-static", "0.5"]
    args += ["--attention-backend", "sts", "--sts-config", config, *more]
    env = {"HF_HUB_OFFLINE": "1"}
    if not torch.cuda.is_available():
        args += ["--device", "cpu", "--dtype", "float32", "--max-total-tokens", "70000"]
        env |= {"SGLANG_PLATFORM": "sts_cpu", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    return LocalServer(models / "target", log, "--skip-server-warmup", *args, env=env, start_seconds=300)


def generate(running: LocalServer, ids: list[int], tokens: int) -> dict:
    return running.post(
        "/generate", {"input_ids": ids, "sampling_params": {"max_new_tokens": tokens, "temperature": 0}}
    )


def prompts(writer: Writer, name: str, length: int, items: int) -> list[tuple[list[int], object]]:
    rng = random.Random(f"accept {name} {length}")
    if name == "text":
        return [(writer.plain(length, rng).ids, None) for _ in range(items)]
    made = [writer.examination(name, length, rng) for _ in range(items)]
    return [(row.ids, question) for row, question in made]


def measure(running: LocalServer, writer: Writer, name: str, length: int, items: int) -> dict:
    scores, tokens, rounds = [], 0, 0
    for ids, question in prompts(writer, name, length, items):
        answer = generate(running, ids, 96)
        meta = answer["meta_info"]
        tokens += meta["completion_tokens"]
        rounds += meta["spec_verify_ct"]
        if question is not None:
            scores.append(score(answer["text"], question))
    accuracy = sum(scores) / len(scores) if scores else None
    return {
        "task": name,
        "length": length,
        "items": items,
        "tokens": tokens,
        "accept_length": tokens / rounds,
        "accuracy": accuracy,
    }


def main() -> None:
    stop_when_terminated()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--corpus", type=Path, help="what corpus.py built; without it the documents are Python's own library"
    )
    parser.add_argument("--models", type=Path, default=SHIPPED)
    parser.add_argument("--algorithm", choices=DRAFTS, required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument(
        "--sts-config", default='{"keep": 1.0}', help="everything kept: dense, unless changed"
    )
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--items", type=int, default=6)
    parser.add_argument("--tasks", nargs="+", default=[*EXAM, "text"])
    parser.add_argument("server", nargs="*", help="further arguments of the server, after --")
    args = parser.parse_args()
    writer = heldout(args.corpus)
    log = Path(tempfile.mkdtemp()) / "server.log"
    results = []
    with server(args.models, args.algorithm, args.sts_config, log, args.server) as running:
        for name in tqdm(args.tasks):
            results.append(
                {"algorithm": args.algorithm, **measure(running, writer, name, args.length, args.items)}
            )
            tqdm.write(json.dumps(results[-1]))
    if args.out:
        args.out.write_text("\n".join(map(json.dumps, results)) + "\n")


if __name__ == "__main__":
    main()
