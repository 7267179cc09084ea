"""Servers under load: SGLang's own serving client (load_client.py) sends requests at random times (Poisson),
at several rates.

Arms are those of bench_serving (`--arms`; stock, and sts as chains have it by default); each is a server of
its own, and sees the same prompts at the same times. Loads (`--dataset`):
  generated-shared-prefix  `--groups` prompts of `--context` tokens, of which each has questions of 128 tokens
                           behind it; all of it is prefilled before anything is measured, so that what is
                           measured is decode with requests that come and go
  random-ids               `--requests` prompts of up to `--context` tokens that nobody has seen: prefill
                           and decode
With `--turns N` the requests of the former are conversations of agents: the prompt and its question are the
first turn, and each answer and another question of 128 tokens make the next one, which is asked as soon as
the answer is there, and prefilled then. Rates are of conversations, everything else is by turn; what earlier
rates left in the cache is flushed. A row is one arm at one rate: what the client says, and of every request
the time to its first token and the mean time of the others, so that goodput (requests a second whose tokens
took at most `--tpot-ms`) can be worked out for another bound too. With `--enable-metrics` among the
`--server-args` a row also has how long requests waited for their prefill and how long it took, by the
scheduler's clock: the rest of the time to the first token went by in the client, in HTTP and in the process
that turns text into tokens and back. A client that fails a request, prefixes
that are not in the cache when they should be, and an sts arm whose counters show no sparse verify or a dense
one, end the benchmark.

Example, on a GPU, with the shapes of Llama-3.1-8B and an EAGLE-3 head:
  python -m benchmarks.bench_load --dummy --algorithm EAGLE3 --accept-length 3 --rates 1,2,4,8 \\
      --server-args "--context-length 65536 --cuda-graph-max-bs 64 --max-running-requests 64" --out load.jsonl
Agents over histories of 60,000 tokens:
  python -m benchmarks.bench_load --dummy --algorithm EAGLE3 --accept-length 3 --context 60000 --turns 6 \\
      --requests 32 --rates 0.25,0.5,1 --new-tokens 256 --server-args "--context-length 65536 \\
      --cuda-graph-max-bs 32 --max-running-requests 32" --out load.jsonl
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from benchmarks import bench_serving
from benchmarks.serving_arms import ARMS_OF
from benchmarks.tables.load import goodput
from sts_sglang.tools.local_server import LocalServer, sparse_between, stop_when_terminated

ROOT = Path(__file__).parents[1]
SHARED, RANDOM = "generated-shared-prefix", "random-ids"
QUESTION = 128  # tokens that the requests of a group differ in
CACHED = 0.95  # of the tokens of prompts that were prefilled
SAID = ("duration", "completed", "output_throughput", "request_throughput", "concurrency", "accept_length")
TIMES = tuple(f"{stat}_{what}_ms" for what in ("ttft", "tpot") for stat in ("mean", "median", "p90", "p99"))
# Of the scheduler, before a request's first token: a row's name, SGLang's histogram, and its labels.
STAGES = (
    ("waits_ms", "sglang:queue_time_seconds", {}),
    ("prefill_ms", "sglang:per_stage_req_latency_seconds", {"stage": "prefill_forward"}),
)


def client_args(options: argparse.Namespace, new_tokens: int) -> list[str]:
    """What the client is asked for, but where, when and how many."""
    # Only its chat clients know turns.
    backend = ["--backend", "sglang"] if options.turns == 1 else ["--backend", "sglang-oai-chat"]
    args = [*backend, "--dataset-name", options.dataset, "--seed", "1", "--disable-tqdm"]
    args += ["--model", str(options.target), "--tokenizer", str(options.target)]
    args += ["--output-details", "--cache-report"]
    if options.dataset == SHARED:
        args += ["--gsp-num-groups", str(options.groups)]
        args += ["--gsp-prompts-per-group", str(options.requests // options.groups)]
        args += ["--gsp-system-prompt-len", str(options.context - QUESTION)]
        if options.turns > 1:  # a warm-up would be a whole conversation, and leave it in the cache
            args += ["--gsp-num-turns", str(options.turns), "--warmup-requests", "0"]
        return [*args, "--gsp-question-len", str(QUESTION), "--gsp-output-len", str(new_tokens)]
    args += ["--random-input-len", str(options.context), "--random-output-len", str(new_tokens)]
    return [*args, "--random-range-ratio", str(options.least_share), "--flush-cache"]


def client(server: LocalServer, options: argparse.Namespace, rate: float, new_tokens: int) -> dict:
    """One run of SGLang's serving client: what it writes of it.

    Raises:
        SystemExit: it ended in an error, or failed a request.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "client.jsonl"
        command = [sys.executable, "-m", "benchmarks.load_client", *client_args(options, new_tokens)]
        command += ["--host", "127.0.0.1", "--port", str(server.port), "--request-rate", str(rate)]
        command += ["--num-prompts", str(options.requests), "--output-file", str(out)]
        # It keeps prompts in the home folder by their lengths, whatever the tokenizer: not those of others.
        env = {**os.environ, "HOME": folder, "HF_HUB_OFFLINE": "1"}
        paths = [str(ROOT), env.get("PYTHONPATH")]  # load_client.py is found wherever this runs
        env["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        if done.returncode or not out.exists():
            raise SystemExit(f"the client ended in an error: {(done.stdout + done.stderr)[-2000:]}")
        found = json.loads(out.read_text().splitlines()[-1])
    if failed := [error for error in found["errors"] if error]:
        raise SystemExit(f"{len(failed)} requests failed, the first with: {failed[0][-2000:]}")
    return found


def check_cached(found: dict, turns: int) -> None:
    """Raises SystemExit where the prompts of first turns were not in the cache. Of a conversation the client
    tells its turns one after the other, each with the length of the first."""
    cached, asked = (sum(found[what][::turns]) for what in ("cached_tokens", "input_lens"))
    share = cached / asked
    if share < CACHED:
        raise SystemExit(
            f"{share:.0%} of the prompts' tokens were in the prefix cache when they were asked for: take "
            f"fewer --groups, or a larger pool (--mem-fraction-static, --max-total-tokens)"
        )


def summary(found: dict, bound_ms: float) -> dict:
    """What a row says of a run of the client."""
    # Gaps are between the tokens of one client, and between the chunks of another one.
    each = zip(found["itls"], found["output_lens"], strict=True)
    tpots = [1000 * sum(gaps) / (tokens - 1) for gaps, tokens in each if gaps]
    return {
        **{name: _rounded(found[name]) for name in (*SAID, *TIMES)},
        "tpot_bound_ms": bound_ms,
        "goodput": round(goodput(tpots, found["duration"], bound_ms), 4),
        "tpots_ms": [round(tpot, 3) for tpot in tpots],
        "ttfts_ms": [round(1000 * ttft, 1) for ttft in found["ttfts"]],
    }


def stages(server: LocalServer) -> dict[str, tuple[float, float]]:
    """Sum, in ms, and number of requests so far of each of STAGES, by what the server publishes; it publishes
    nothing of what no request has been through."""
    families = list(text_string_to_metric_families(server.get("/metrics").decode()))
    found = {}
    for name, histogram, labels in STAGES:
        own = [s for family in families for s in family.samples if labels.items() <= s.labels.items()]
        total, requests = (
            sum(s.value for s in own if s.name == histogram + end) for end in ("_sum", "_count")
        )
        found[name] = 1000 * total, requests
    return found


def means(before: dict, after: dict) -> dict[str, float]:
    """Of each stage, over the requests between two calls of `stages`, the client's own warm-up among them.

    Raises:
        SystemExit: there were none, or SGLang names its histograms otherwise.
    """
    changes = [(name, *(a - b for a, b in zip(after[name], before[name], strict=True))) for name in before]
    if unknown := [name for name, _, requests in changes if not requests]:
        raise SystemExit(
            f"the server publishes nothing that says {', '.join(unknown)} (STAGES of bench_load)"
        )
    return {name: round(total / requests, 3) for name, total, requests in changes}


def _rounded(value: float | None) -> float | None:
    return value if value is None else round(value, 3)


def run_arm(arm: str, options: argparse.Namespace) -> list[dict]:
    """All rates of one arm on one server."""
    known, rows = ARMS_OF[options.algorithm][arm], []
    published = "--enable-metrics" in shlex.split(options.server_args)
    with bench_serving.serve(arm, 0, options) as server:
        for number, rate in enumerate(options.rates):
            if options.dataset == SHARED and (number == 0 or options.turns > 1):
                server.flush()
                client(server, options, float("inf"), min(bench_serving.WARM_TOKENS, options.new_tokens))
            before = None if known.config is None else server.counters()
            begun = stages(server) if published else None
            row = {"arm": arm, "dataset": options.dataset, "context": options.context, "rate": rate}
            row |= {"requests": options.requests, **bench_serving.served(known, options)}
            row |= {"groups": options.groups if options.dataset == SHARED else None, "turns": options.turns}
            found = client(server, options, rate, options.new_tokens)
            if options.dataset == SHARED:
                check_cached(found, options.turns)
            row |= summary(found, options.tpot_ms)
            if published:
                row |= means(begun, stages(server))
            if before is not None:
                delta = sparse_between(before, server.counters())
                row |= {"sparse_verifies": delta["sparse_verifies"]}
                row |= {"keep_ratio": round(delta["keep_ratio"], 4)}
            rows.append({**row, "server": server.shown_command(), **options.where})
            print(f"{arm} at {rate:g}/s: {row['output_throughput']:.0f} tokens/s, goodput", end=" ")
            print(f"{row['goodput']:.2f}/s, median {row['median_tpot_ms']:.2f} ms a token", flush=True)
            if options.out:
                with options.out.open("a") as f:
                    f.write(json.dumps(rows[-1]) + "\n")
    return rows


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__,
        epilog="further options, --dummy, --arms, --out and others, are those of benchmarks.bench_serving",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--dataset", choices=(SHARED, RANDOM), default=SHARED, help="(%(default)s)")
    p.add_argument("--context", type=int, default=32000, help="tokens of a prompt (%(default)s)")
    p.add_argument("--least-share", type=float, default=0.1, help="of it, with random-ids (%(default)s)")
    p.add_argument("--groups", type=int, default=8, help="prefixes that requests share (%(default)s)")
    p.add_argument("--turns", type=int, default=1, help="of a conversation, see above (%(default)s)")
    p.add_argument("--requests", type=int, default=128, help="at each rate (%(default)s)")
    p.add_argument("--rates", default="1,2,4,8", help="requests a second, comma separated (%(default)s)")
    p.add_argument("--tpot-ms", type=float, default=20, help="bound of goodput (%(default)s)")
    own, rest = p.parse_known_args(argv)
    try:
        own.rates = [float(rate) for rate in own.rates.split(",")]
    except ValueError:
        p.error(f"--rates {own.rates}: numbers, comma separated")
    if min(own.rates) <= 0:
        p.error(f"--rates {min(own.rates):g}: above 0")
    if own.requests % own.groups:
        p.error(f"--requests {own.requests}: no multiple of --groups {own.groups}")
    if own.turns < 1 or (own.turns > 1 and own.dataset != SHARED):
        p.error(f"--turns {own.turns}: 1, or more with --dataset {SHARED}")
    if own.context <= QUESTION:
        p.error(f"--context {own.context}: questions alone have {QUESTION} tokens")
    if "--arms" not in rest:
        rest += ["--arms", "stock-spec-captured,sts-draft"]
    return argparse.Namespace(**{**vars(bench_serving.parse(rest)), **vars(own)})


def main(argv: list[str] | None = None) -> None:
    stop_when_terminated()
    options = parse(argv)
    bench_serving.prepare(options, words=True)
    for arm in options.arms.split(","):
        run_arm(arm, options)


if __name__ == "__main__":
    main()
