"""Tokens per second of stock SGLang and of sts, through the real server, on the same machine in one run.

Arms (each its own server, `--repeats` times in alternating order):
  stock                the target alone
  stock-spec           the target and its draft (`--algorithm`)
  stock-spec-captured  the same with its draft-extend in a CUDA graph: what that graph alone brings
  stock-fp8            that one with keys and values in FP8, where FA3 or FlashInfer of the host reads it
  sts-dense            sts with every target layer dense: what capture and selection cost
  sts                  sts with the given --sts-config and, where there is a draft, "draft": "dense"
  sts-draft            the same with "draft": "all", which is what chains have by default
  sts-extend           sts with "draft": "extend"
  sts-draft-refresh    that one with "draft_refresh": 4; sts-draft-refresh-2: with 2
  sts-draft-every      sts with "draft": "every"
  sts-draft-kv         sts with "draft_kv": "fp8_e4m3", where `stock-fp8` runs
  sts-pages            sts with "selector": "pages"
  sts-tokens           sts with "selector": "tokens"; with --dummy, by directions drawn at random
  sts-warm             sts with "history": "warm"
  sts-blend            sts with "history": "blend"
  sts-draft-blend      sts with "draft": "all" and "history": "blend"
With `--algorithm NONE` nothing drafts, every decode step is sparse, and the arms are stock, sts, sts-pages
and sts-tokens.

For every shape, CONTEXTxREQUESTS or mixed:SHORTEST-LONGESTxREQUESTS (lengths in one batch, each the same
factor longer than the one before), the prompts are prefilled once, so that the measured requests find them in
the prefix cache; then all requests decode `--new-tokens` at the same time, `--passes` times. Prompts of
a shorter context begin like those of a longer one: give the longest first. A shape that a server has no room
for at once is left out. With `--shared N` all begin with the same N tokens, as agents over one history do.
An sts arm whose counters show no sparse verify, a dense one, or another share of the context than was asked
for (within one page of 16 tokens; all of it while a batch stands aside) ends the benchmark.

With `--server-args "--kv-cache-dtype fp8_e4m3"` KV is FP8 in every arm; rows say so, and the tables of other
servers leave them out. Rows also say which models they are of and how fast the device reads, by which the
report tells how many times the least time for its bytes a round takes (bound.py).

Examples, on a GPU, with models that have the shapes of Llama-3.1-8B and 3.2-1B but dummy weights:
  python -m benchmarks.bench_serving --dummy --shapes 32000x8,16000x8,8000x8,4000x8 --accept-length 3 \\
      --server-args "--context-length 131072 --cuda-graph-max-bs 8" --out serving.jsonl
  python -m benchmarks.bench_serving --dummy --algorithm EAGLE3 --accept-length 3 --topk 4 \\
      --arms stock-spec-captured,stock-fp8,sts --shapes 128000x1,mixed:2000-64000x16,32000x8 \\
      --server-args "--context-length 131072 --cuda-graph-max-bs 16" --out serving.jsonl
  python -m benchmarks.bench_serving --dummy --algorithm NONE --shapes 128000x1,32000x16,8000x64 \\
      --server-args "--context-length 131072 --cuda-graph-max-bs 64" --out serving.jsonl
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks import bound, dummy_models
from benchmarks.harness import check_arms, commit, read_rate
from benchmarks.serving_arms import ARMS_OF, Arm, arm_args, check_kept, launched
from benchmarks.shapes import Shape
from sts_sglang.evaluate.pair import NONE
from sts_sglang.headmap import RANKS
from sts_sglang.tools.local_server import LocalServer, sparse_between, stop_when_terminated

WARM_TOKENS = 64  # of an answer before any is timed


def prompt(request: int, context: int, vocab: int, shared: int = 0) -> list[int]:
    """A request's prompt; a shorter one begins like a longer one, and all alike for `shared` tokens."""
    common, own = random.Random(-1), random.Random(request)
    return [(common if i < shared else own).randrange(5, vocab) for i in range(context)]


def ask(server: LocalServer, ids: list[int], new_tokens: int) -> dict:
    """Greedy, exactly so many tokens."""
    params = {"max_new_tokens": new_tokens, "temperature": 0, "ignore_eos": True}
    return server.post("/generate", {"input_ids": ids, "sampling_params": params}, timeout=1800)


def run_shape(server: LocalServer, shape: Shape, options: argparse.Namespace) -> list[dict]:
    """One shape on a running server: prefill, a few rounds of the batch that are not timed, since what is
    compiled at first use would be, then the measured batch, `passes` times."""
    prompts = prompts_of(shape, options)
    for ids in prompts:
        ask(server, ids, 1)
    rows = []
    with ThreadPoolExecutor(shape.requests) as pool:

        def together(new_tokens: int) -> list[dict]:
            return list(pool.map(lambda ids: ask(server, ids, new_tokens), prompts))

        together(min(WARM_TOKENS, options.new_tokens))
        for _ in range(options.passes):
            started = time.monotonic()
            answers = together(options.new_tokens)
            rows.append(measured(answers, time.monotonic() - started, options.new_tokens))
    return rows


def prompts_of(shape: Shape, options: argparse.Namespace) -> list[list[int]]:
    """A prompt for each request of a shape."""
    return [prompt(i, n, options.vocab, options.shared) for i, n in enumerate(shape.lengths())]


def measured(answers: list[dict], seconds: float, new_tokens: int) -> dict:
    """What one pass tells."""
    metas = [a["meta_info"] for a in answers]
    return {
        "tokens_per_s": round(sum(m["completion_tokens"] for m in metas) / seconds, 2),
        "tpot_ms": round(1000 * seconds / new_tokens, 3),
        "cached_tokens": min(m["cached_tokens"] for m in metas),
        "accept_length": round(statistics.mean(m.get("spec_accept_length") or 1 for m in metas), 3),
    }


def serve(arm: str, repeat: int, options: argparse.Namespace) -> LocalServer:
    """The server of an arm."""
    log, known = options.logs / f"{arm}-{repeat}.log", ARMS_OF[options.algorithm][arm]
    args = [*shlex.split(options.server_args), *arm_args(known, options)]
    env = {"SGLANG_SIMULATE_ACC_LEN": str(options.accept_length)} if options.accept_length else {}
    return LocalServer(options.target, log, *args, env=env, start_seconds=600, module=known.module)


def run_arm(arm: str, repeat: int, shapes: list[Shape], options: argparse.Namespace) -> list[dict]:
    """All shapes of one arm on one server that it has room for."""
    known, rows = ARMS_OF[options.algorithm][arm], []
    with serve(arm, repeat, options) as server:
        for shape in shapes:
            if lacks := lacking(server.state(), shape, options):
                print(f"{arm} {shape}: left out, {lacks}", flush=True)
                continue
            before = None if known.config is None else server.counters()
            about = {"arm": arm, "repeat": repeat, **shape.fields(), **served(known, options)}
            passes = run_shape(server, shape, options)
            if before is not None:
                delta = sparse_between(before, server.counters())
                aside = server.sts()["config"]["stand_aside"]
                check_kept(delta["keep_ratio"], known, shape.lengths(), options, aside)
                about["aside_share"] = round(delta["aside_verifies"] / delta["sparse_verifies"], 4)
                about["sparse_verifies"] = delta["sparse_verifies"]
                about["keep_ratio"] = round(delta["keep_ratio"], 4)
                if kept := delta.get("kept_rounds"):
                    about["scored_share"] = round(delta["scored_rounds"] / (delta["scored_rounds"] + kept), 4)
            for row in passes:
                rows.append({**about, **row, "server": server.shown_command()})
                print(json.dumps({**about, **row}), flush=True)
            if options.out:
                with options.out.open("a") as f:
                    f.writelines(json.dumps({**row, **options.where}) + "\n" for row in rows[-len(passes) :])
    return rows


def served(arm: Arm, options: argparse.Namespace) -> dict:
    """What the rows of an arm say of its server."""
    found = {"algorithm": options.algorithm, "tp": options.tp, "shared": options.shared}
    found |= {"kv": kv_dtype(shlex.join([*shlex.split(options.server_args), *arm.args]))}
    found |= {"drafts": arm.drafts, "new_tokens": options.new_tokens}
    if arm.drafts:
        found |= {"steps": options.steps, "topk": options.topk, "draft_tokens": options.draft_tokens}
    if arm.config is not None:
        known = launched(arm, options)
        found |= {"keep": known.keep, "sparse_draft": known.draft, "selector": known.selector}
        found |= {"draft_kv": known.draft_kv, "draft_refresh": known.draft_refresh}
        found |= dict(zip(("spread", "spread_over"), known.passed_on, strict=True))
    return found


def kv_dtype(server_args: str) -> str:
    """What a server with these arguments keeps KV as, as SGLang's flag has it; the last one counts."""
    p = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    p.add_argument("--kv-cache-dtype", default="auto")
    return p.parse_known_args(shlex.split(server_args))[0].kv_cache_dtype


def lacking(state: dict, shape: Shape, options: argparse.Namespace) -> str:
    """What a server has too little of to decode a shape's requests at the same time; "" where it fits.

    Requests that wait for others would be measured in turn, and prompts that make room prefilled again.
    """
    own = sum(length - options.shared + options.new_tokens for length in shape.lengths())
    tokens, requests = options.shared + own, shape.requests
    for wanted, there, what in (
        (requests, state["effective_max_running_requests_per_dp"], "requests at a time"),
        (tokens, state["memory_usage"]["token_capacity"], "tokens of KV"),
    ):
        if wanted > there:
            return f"room for {there:,} {what}, not for {wanted:,}"
    return ""


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
    p.add_argument("--target", type=Path, help="folder of the target model")
    p.add_argument("--draft", type=Path, help="folder of the draft model, or of the EAGLE-3 head")
    p.add_argument(
        "--algorithm",
        choices=ARMS_OF,
        default="STANDALONE",
        help=f"of speculation, or {NONE}: the target alone (%(default)s)",
    )
    p.add_argument(
        "--dummy",
        type=Path,
        nargs="?",
        const=Path("."),
        help="write a model, and its draft, here and use those",
    )
    p.add_argument("--dummy-model", choices=dummy_models.DRAFTS, default="llama-8b", help="(%(default)s)")
    p.add_argument("--shapes", default="32000x1,32000x8", help="comma separated, see above (%(default)s)")
    p.add_argument("--shared", type=int, default=0, help="tokens that all prompts begin with (%(default)s)")
    p.add_argument("--arms", help="comma separated (all of the algorithm)")
    p.add_argument(
        "--tp",
        type=int,
        choices=RANKS,
        default=1,
        help="GPUs that share the heads, in every arm (%(default)s)",
    )
    p.add_argument("--sts-config", default='{"keep": 0.1}', help="inline JSON (%(default)s)")
    p.add_argument("--new-tokens", type=int, default=512, help="decoded per request (%(default)s)")
    p.add_argument("--passes", type=int, default=3, help="measured per shape and server (%(default)s)")
    p.add_argument("--steps", type=int, help="draft steps a round (3)")
    p.add_argument("--topk", type=int, help="branches of a draft step; above 1 a tree is drafted (1)")
    p.add_argument("--draft-tokens", type=int, help="verified a round (of a chain STEPS + 1, of a tree 8)")
    p.add_argument(
        "--accept-length", type=float, help="simulate this accept length (SGLANG_SIMULATE_ACC_LEN)"
    )
    p.add_argument("--vocab", type=int, default=250, help="prompts draw ids below this (%(default)s)")
    p.add_argument("--repeats", type=int, default=1, help="servers per arm (%(default)s)")
    p.add_argument("--server-args", default="", help="arguments common to all servers, one string")
    p.add_argument("--logs", type=Path, default=Path("."), help="folder of the server logs (%(default)s)")
    p.add_argument("--out", type=Path, help="append raw results to this JSONL file")
    options = p.parse_args(argv)
    check_models(p, options)
    arms = tuple(ARMS_OF[options.algorithm])
    options.arms = options.arms or ",".join(arms)
    check_arms(p, options.arms, arms)
    try:
        options.shapes = [Shape.parse(word) for word in options.shapes.split(",")]
    except ValueError as error:
        p.error(f"--shapes: {error}")
    options.steps, options.topk = options.steps or 3, options.topk or 1
    options.draft_tokens = options.draft_tokens or (options.steps + 1 if options.topk == 1 else 8)
    return options


def check_models(p: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """End with a usage error where models are missing, or something is said of a draft that there is not."""
    drafts = options.algorithm != NONE
    given = options.target and (options.draft or not drafts)
    if not options.dummy and not given:
        p.error(f"give --target{' and --draft' if drafts else ''}, or --dummy")
    if not options.dummy and not (options.target / "config.json").is_file():
        p.error(f"--target {options.target}: no folder with a config.json")
    for flag in () if drafts else ("draft", "steps", "topk", "draft_tokens", "accept_length"):
        if getattr(options, flag) is not None:
            p.error(f"--{flag.replace('_', '-')}: nothing drafts with --algorithm {NONE}")


def prepare(options: argparse.Namespace, words: bool = False) -> None:
    """Write the dummy models if asked for, and note where the numbers come from.

    words: whether prompts are text, for which dummy models have a tokenizer too.
    """
    if options.dummy:
        options.target = dummy_models.write(options.dummy_model, options.dummy)
        if options.algorithm != NONE:
            draft = dummy_models.DRAFTS[options.dummy_model][options.algorithm]
            options.draft = dummy_models.write(draft, options.dummy)
        options.server_args += " --load-format dummy" + ("" if words else " --skip-tokenizer-init")
        if words:
            dummy_models.write_tokenizer(options.target)
        options.vocab = 128000
    check_configs(options)
    options.where = {**origin(), "commit": commit(), "simulated": options.accept_length}
    options.where |= {"target": bound.model(options.target), "read_gbps": read_rate()}
    options.where |= {"draft": bound.model(options.draft) if options.draft else None}


def check_configs(options: argparse.Namespace) -> None:
    """End before the first server starts where a later one could not."""
    for arm in options.arms.split(","):
        known = ARMS_OF[options.algorithm][arm]
        try:
            if known.config is not None:
                launched(known, options)
        except ValueError as error:  # ConfigError, or no JSON
            raise SystemExit(f"--sts-config, as arm {arm} takes it: {error}") from None


def main(argv: list[str] | None = None) -> None:
    stop_when_terminated()
    options = parse(argv)
    prepare(options)
    rows = []
    for repeat in range(options.repeats):
        arms = options.arms.split(",")
        for arm in arms if repeat % 2 == 0 else reversed(arms):
            rows += run_arm(arm, repeat, options.shapes, options)
    for shape in dict.fromkeys(map(Shape.of, rows)):
        print(f"\n{shape}")
        for arm in options.arms.split(","):
            mine = [{**r, **options.where} for r in rows if (r["arm"], Shape.of(r)) == (arm, shape)]
            if speeds := [r["tokens_per_s"] for r in mine]:
                middle, spread = statistics.median(speeds), max(speeds) - min(speeds)
                times = bound.times_bound(mine)
                bytes_of = f", {times:.2f} times its bytes" if times else ""
                print(f"  {arm:20} {middle:9.1f} tokens/s  (spread {spread:.1f}{bytes_of})")


if __name__ == "__main__":
    main()
