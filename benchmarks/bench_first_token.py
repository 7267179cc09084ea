"""Seconds to the first token of long prompts: dense and sparse prefill, in one server, in turn.

Every kind asks for new prompts of random tokens, so that no prefix is cached: first a prompt of each length,
then, with `--turn N`, the longest one again with its last N tokens new, as a turn of an agent over its
history. The first ask of a kind is not counted: kernels are compiled in it. Kinds are what a request may ask
for of a server whose prefill is sparse: `dense`, and a share of the blocks of keys for each of `--keeps`.
A sparse kind whose counters show no block left out, and a dense one whose counters show any, end the
benchmark.

Example, on a GPU, with the shape of Llama-3.1-8B and an EAGLE-3 head:
  python -m benchmarks.bench_first_token --dummy --algorithm EAGLE3 --lengths 128000,32000 --turn 4000 \\
      --server-args "--context-length 131072 --cuda-graph-max-bs 1" --out first_token.jsonl
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time

from benchmarks import bench_serving
from sts_sglang.tools.local_server import LocalServer, stop_when_terminated

DENSE = "dense"


def kinds_of(keeps: list[float]) -> dict[str, dict]:
    """What requests of each kind ask for."""
    return {DENSE: {"prefill": "dense"}, **{f"sparse {keep:g}": {"prefill_keep": keep} for keep in keeps}}


def first_token(server: LocalServer, ids: list[int], asks: dict) -> tuple[float, int]:
    """(seconds, tokens that a cached prefix brought) of one token behind a prompt."""
    params = {"max_new_tokens": 1, "temperature": 0, "custom_params": {"sts": asks}}
    begun = time.perf_counter()
    answer = server.post("/generate", {"input_ids": ids, "sampling_params": params})
    return time.perf_counter() - begun, answer["meta_info"]["cached_tokens"]


def left_out(server: LocalServer) -> int:
    """Blocks of keys that sparse prefills have not attended to so far."""
    counters = server.counters()
    return counters["prefill_available_blocks"] - counters["prefill_selected_blocks"]


def measure(server: LocalServer, length: int, kind: str, options: argparse.Namespace) -> list[dict]:
    """Rows of one kind and length: `--passes` prompts, and a turn behind each."""
    asks, rng = kinds_of(options.keeps)[kind], random.Random(f"{length} {kind}")
    draw = lambda n: [rng.randrange(1, options.vocab) for _ in range(n)]  # noqa: E731
    found: dict[tuple[int, int], list[float]] = {}
    before = left_out(server)
    for number in range(options.passes + 1):
        ids = draw(length)
        prompts = [ids]
        if options.turn and length == max(options.lengths):
            prompts.append(ids[: length - options.turn] + draw(options.turn))
        for turn, prompt in enumerate(prompts):
            seconds, cached = first_token(server, prompt, asks)
            new = options.turn if turn else length
            if cached > length - new + 1 or (turn and cached < length - new - 1):
                raise SystemExit(
                    f"{kind}, {length} tokens, {new} new: {cached} were cached; nothing is reported"
                )
            if number:
                found.setdefault((length, new), []).append(seconds)
    if (left_out(server) > before) != (kind != DENSE and length > options.floor):
        raise SystemExit(f"{kind}, {length} tokens: prefilled otherwise; nothing is reported")
    return [
        {"kind": kind, "context": n, "new": new, "seconds": [round(s, 4) for s in times]}
        for (n, new), times in found.items()
    ]


def run(options: argparse.Namespace) -> list[dict]:
    """All kinds and lengths, on one server."""
    rows = []
    with bench_serving.serve("sts", 0, options) as server:
        for length in options.lengths:
            for kind in kinds_of(options.keeps):
                for row in measure(server, length, kind, options):
                    row |= {"algorithm": options.algorithm, "server": server.shown_command(), **options.where}
                    rows.append(row)
                    shown = f"{row['context']:,} tokens, {row['new']:,} new, {kind}"
                    print(f"{shown}: {statistics.median(row['seconds']):.3f} s", flush=True)
                    if options.out:
                        with options.out.open("a") as f:
                            f.write(json.dumps(row) + "\n")
    return rows


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--lengths", default="128000,32000,16000", help="tokens, longest first (%(default)s)")
    p.add_argument("--keeps", type=float, nargs="+", default=[0.25], help="shares of blocks (%(default)s)")
    p.add_argument("--turn", type=int, default=0, help="new tokens of a second ask of the longest (none)")
    p.add_argument("--floor", type=int, default=16384, help="prefill_floor of the server (%(default)s)")
    p.epilog = (
        "further options, --dummy, --algorithm, --server-args, --out and others, are those of bench_serving"
    )
    own, rest = p.parse_known_args(argv)
    options = bench_serving.parse(["--arms", "sts", *rest])
    try:
        options.lengths = sorted({int(word) for word in own.lengths.split(",")}, reverse=True)
    except ValueError:
        p.error(f"--lengths: got {own.lengths!r}; allowed: numbers with commas between them")
    if own.turn and not 0 < own.turn < options.lengths[0]:
        p.error(f"--turn: got {own.turn}; allowed: 1 to {options.lengths[0] - 1}")
    options.keeps, options.turn, options.floor = own.keeps, own.turn, own.floor
    sparse = {"prefill": "sparse", "prefill_keep": own.keeps[0], "prefill_floor": own.floor}
    options.sts_config = json.dumps({**json.loads(options.sts_config), **sparse})
    return options


def main() -> None:
    stop_when_terminated()
    options = parse()
    bench_serving.prepare(options)
    run(options)


if __name__ == "__main__":
    main()
