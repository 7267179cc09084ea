"""Many requests of every kind against one server, and nothing may be off.

Prompts of mixed lengths, some of which share prefixes or go on from an earlier answer; each request may ask
for its own keep; some are aborted; the pool is small and SGLang is made to retract besides. Every `--every`
requests all of them are waited for, the cache is flushed, and these are checked:

- the server is alive, its log holds neither a leak (SGLang's strict check is on) nor a traceback;
- the counters agree with an account of our own, made of what was asked and of the rounds that answers report;
- one fixed greedy prompt is answered as at first;
- the server's processes hold no more memory than allowed above what they held after the first part.

Ends with exit code 1 and one line when something is off.

    python -m benchmarks.soak --requests 10000 --out soak.jsonl
    python -m benchmarks.soak --requests 60 --every 20 --pair tiny --longest 600
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import sys
import tempfile
import threading
import time
import urllib.error
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.bench_serving import origin
from benchmarks.harness import commit
from sts_sglang.config import CHAIN_FLAGS, StsConfig
from sts_sglang.tools.demo import Pair, shipped_pair
from sts_sglang.tools.local_server import LocalServer, stop_when_terminated
from sts_sglang.tools.tiny_pair import make_pair

GPU = torch.cuda.is_available()
CHAIN = CHAIN_FLAGS.split()
TOKENS = 256  # prompts draw bytes, which both pairs have
OFF = re.compile(r"memory leak|leak detected|Traceback", re.IGNORECASE)
KEEPS = (None, None, 0.02, 0.05, 0.2, 0.5, 1.0)
PROBE_TOKENS = 48
# Without overlap a request's rounds are those that its answer reports. With it, on a GPU, one more may be
# under way when a request ends or is retracted, and nobody reports it.
SLACK_ROUNDS = 3 if GPU else 0


class Off(Exception):
    """What was off, in one line."""


@dataclass(frozen=True)
class Ask:
    """One request: tokens in, how many out, its keep, and after how many seconds it is aborted."""

    number: int
    ids: list[int]
    new_tokens: int
    keep: float | None
    abort_after: float | None


@dataclass
class Account:
    """What the counters must say, from below and above; tokens are per layer and KV head.

    Of an aborted request nobody knows the rounds: it adds to what may be, and to nothing that must be.
    longest_list: of the server; who asks for more attends to everything.
    """

    config: StsConfig
    longest_list: int
    least: dict[str, float] = field(default_factory=lambda: dict.fromkeys(_COUNTED, 0.0))
    most: dict[str, float] = field(default_factory=lambda: dict.fromkeys(_COUNTED, 0.0))

    def add(self, ask: Ask, rounds: int | None) -> None:
        """`rounds`: verifies that the answer reports; None where it was aborted."""
        first, last = len(ask.ids), len(ask.ids) + ask.new_tokens + 8
        upper = (ask.new_tokens if rounds is None else rounds) + SLACK_ROUNDS
        for name, number, context in (("least", rounds or 0, first), ("most", upper, last)):
            found = getattr(self, name)
            found["sparse_verifies"] += number
            found["available_tokens"] += number * context
            found["selected_tokens"] += number * self._budget(context, ask.keep)

    def _budget(self, context: int, keep: float | None) -> int:
        budget = self.config.budget_for(context, keep)
        return context if budget > self.longest_list else budget

    def check(self, delta: dict[str, float], heads: int) -> None:
        """Raises `Off`. `heads`: layers times KV heads."""
        if delta["dense_verifies"] or delta["clipped_tokens"]:
            found = f"{delta['dense_verifies']} dense verifies, {delta['clipped_tokens']} clipped tokens"
            raise Off(f"counters: {found}, where there should be none")
        for name in _COUNTED:
            each = 1 if name == "sparse_verifies" else heads
            # A head map may split budgets between heads, rounding each.
            part = 0.02 if name == "selected_tokens" else 0.0
            least = math.floor((1 - part) * self.least[name] * each)
            most = math.ceil((1 + part) * self.most[name] * each)
            if not least <= delta[name] <= most:
                raise Off(f"counters: {name} grew by {delta[name]}, by our account {least} to {most}")


_COUNTED = ("sparse_verifies", "available_tokens", "selected_tokens")


class Mix:
    """Requests from a seed: the same ones every time, but for what an answer adds."""

    def __init__(self, seed: int, longest: int):
        self._rng = random.Random(seed)
        self._longest = longest
        self._prefixes = [self._fresh(longest // 2) for _ in range(4)]
        self._answered: list[list[int]] = []

    def _fresh(self, count: int) -> list[int]:
        return [self._rng.randrange(TOKENS) for _ in range(count)]

    def _length(self, most: int) -> int:
        """Evenly on a logarithmic scale."""
        return max(1, int(math.exp(self._rng.uniform(0, math.log(most)))))

    def ask(self, number: int, abort: float) -> Ask:
        rng, kind = self._rng, self._rng.random()
        if kind < 0.4:
            ids = self._fresh(self._length(self._longest))
        elif kind < 0.8 or not self._answered:
            prefix = rng.choice(self._prefixes)
            ids = prefix[: rng.randrange(1, len(prefix) + 1)] + self._fresh(self._length(self._longest // 4))
        else:
            ids = rng.choice(self._answered) + self._fresh(self._length(64))
        after = rng.uniform(0.0, 1.0) if rng.random() < abort else None
        return Ask(number, ids[: self._longest], rng.randrange(1, 65), rng.choice(KEEPS), after)

    def answered(self, ask: Ask, tokens: list[int]) -> None:
        """A later request may go on from here."""
        self._answered = [*self._answered[-15:], ask.ids + tokens]


class Soak:
    """A running server and what is known of it."""

    def __init__(self, server: LocalServer, options: argparse.Namespace):
        self.server, self.options = server, options
        self.config = StsConfig.parse(options.sts_config)
        shape = json.loads((options.pair.target / "config.json").read_text())
        self.heads = shape["num_hidden_layers"] * shape["num_key_value_heads"]
        self.mix = Mix(options.seed, options.longest)
        self.done = self.aborted = 0
        self.probe: list[int] | None = None
        self.memory: list[float] = []
        self.started = time.monotonic()

    def run(self) -> dict[str, Any]:
        """All requests, a part at a time. Raises `Off`."""
        row: dict[str, Any] = {}
        self.check_probe()
        with ThreadPoolExecutor(self.options.concurrent) as pool:
            while (left := self.options.requests - self.done - self.aborted) > 0:
                row = self.part(pool, min(left, self.options.every))
                self.record(row)
        if self.options.retract and not row["retractions"]:
            raise Off("retraction: none was seen; use more requests, or a smaller --pool")
        return row

    def part(self, pool: ThreadPoolExecutor, number: int) -> dict[str, Any]:
        before, account = self.server.counters(), Account(self.config, self.server.sts()["longest_list"])
        first = self.done + self.aborted
        asks = [self.mix.ask(first + i, self.options.abort) for i in range(number)]
        for ask, answer in zip(asks, pool.map(self.answer, asks), strict=True):
            if answer is None:
                self.aborted += 1
                account.add(ask, None)
                continue
            self.done += 1
            account.add(ask, answer["meta_info"].get("spec_verify_ct", 0))
            self.mix.answered(ask, answer["output_ids"])
        after = self.server.counters()
        delta = {name: after[name] - before[name] for name in after}
        account.check(delta, self.heads)
        self.check_probe()
        log = self.check_log()
        return {
            "requests": self.done + self.aborted,
            "aborted": self.aborted,
            "seconds": round(time.monotonic() - self.started, 1),
            "memory_mb": self.check_memory(),
            "retractions": len(re.findall(r"Retract requests|Testing retraction", log)),
            **{name: delta[name] for name in (*_COUNTED, "dense_verifies")},
        }

    def answer(self, ask: Ask) -> dict[str, Any] | None:
        """None where it was aborted; raises `Off` for anything but a whole answer."""
        timer = None
        if ask.abort_after is not None:
            body = {"rid": _rid(ask)}
            timer = threading.Timer(ask.abort_after, self._abort, (body,))
            timer.start()
        try:
            answer = self.server.post("/generate", _body(ask))
        except urllib.error.HTTPError as error:
            if ask.abort_after is not None:
                return None
            raise Off(f"request {ask.number}: HTTP {error.code} {error.read()[:200]!r}") from None
        except OSError as error:
            raise Off(f"request {ask.number}: {error}; {self._last_words()}") from None
        finally:
            if timer is not None:
                timer.cancel()
        reason = answer["meta_info"]["finish_reason"]["type"]
        if reason == "abort" and ask.abort_after is not None:
            return None
        if reason != "length" or len(answer["output_ids"]) != ask.new_tokens:
            found = f"{len(answer['output_ids'])} of {ask.new_tokens} tokens, {reason}"
            raise Off(f"request {ask.number}: {found}")
        return answer

    def _abort(self, body: dict) -> None:
        try:
            self.server.post("/abort_request", body)
        except OSError as error:  # the request's own answer says whether the server is gone
            print(f"abort of {body['rid']}: {error}", file=sys.stderr)

    def check_probe(self) -> None:
        """After a flush, so that the prompt is prefilled as it was at first."""
        self._flush()
        ids = [i * 7 % TOKENS for i in range(self.options.longest // 2)]
        found = self.answer(Ask(-1, ids, PROBE_TOKENS, None, None))["output_ids"]
        self.probe = self.probe or found
        if found != self.probe:
            same = next(i for i, pair in enumerate(zip(found, self.probe, strict=True)) if pair[0] != pair[1])
            raise Off(f"probe: answered as at first for {same} of {PROBE_TOKENS} tokens")

    def _flush(self) -> None:
        try:
            self.server.flush()
        except urllib.error.HTTPError:
            raise Off(
                "flush: still refused ten seconds after the last answer, as if requests were running"
            ) from None
        except OSError as error:
            raise Off(f"flush: {error}; {self._last_words()}") from None

    def check_log(self) -> str:
        log = self.server.log.read_text(errors="replace")
        if found := OFF.search(log):
            raise Off(f"log: {log[found.start() :].splitlines()[0][:200]}")
        return log

    def check_memory(self) -> float:
        """Resident megabytes of the server's processes. Raises `Off` where they grew too much."""
        launcher = psutil.Process(self.server.pid)
        each = [p.memory_info().rss for p in (launcher, *launcher.children(recursive=True))]
        self.memory.append(round(sum(each) / 1e6, 1))
        grown = self.memory[-1] - self.memory[0]
        if grown > self.options.growth:
            raise Off(f"memory: {grown:.0f} MB more than after the first part, allowed {self.options.growth}")
        return self.memory[-1]

    def record(self, row: dict[str, Any]) -> None:
        print(json.dumps(row), flush=True)
        if self.options.out:
            with self.options.out.open("a") as file:
                file.write(json.dumps({**row, **self.options.where}) + "\n")

    def _last_words(self) -> str:
        return " ".join(self.server.log_tail(1).split())[:200]


def _rid(ask: Ask) -> str:
    return f"soak-{ask.number}"


def _body(ask: Ask) -> dict[str, Any]:
    params: dict[str, Any] = {"max_new_tokens": ask.new_tokens, "temperature": 0, "ignore_eos": True}
    if ask.keep is not None:
        params["custom_params"] = {"sts": {"keep": ask.keep}}
    rid = {"rid": _rid(ask)} if ask.number >= 0 else {}
    return {"input_ids": ask.ids, "sampling_params": params, **rid}


def serve(options: argparse.Namespace, folder: Path) -> LocalServer:
    config = json.dumps({"stand_aside": 0, **json.loads(options.sts_config)})
    args = ["--attention-backend", "sts", "--sts-config", config, "--random-seed", "0"]
    args += ["--speculative-algorithm", "STANDALONE", *CHAIN]
    args += ["--speculative-draft-model-path", str(options.pair.draft)]
    args += ["--context-length", str(options.longest + 512), "--max-total-tokens", str(options.pool)]
    args += ["--max-running-requests", str(options.concurrent), "--skip-server-warmup"]
    env = {"SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1", "HF_HUB_OFFLINE": "1"}
    if options.retract:
        env |= {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": str(options.retract)}
    if GPU:
        args += ["--cuda-graph-max-bs", str(options.concurrent)]
    else:
        args += ["--device", "cpu", "--dtype", "float32"]
        env |= {"SGLANG_PLATFORM": "sts_cpu", "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    log = options.log or folder / "soak.log"
    return LocalServer(options.pair.target, log, *args, env=env, start_seconds=600)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--requests", type=int, default=1000, help="(%(default)s)")
    p.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    p.add_argument("--every", type=int, default=100, help="requests between checks (%(default)s)")
    p.add_argument("--concurrent", type=int, default=8, help="requests at once (%(default)s)")
    p.add_argument("--longest", type=int, default=4000, help="tokens of a prompt (%(default)s)")
    p.add_argument("--pool", type=int, help="tokens of KV (three times --longest)")
    p.add_argument("--abort", type=float, default=0.05, help="share that is aborted (%(default)s)")
    p.add_argument("--retract", type=int, default=50, help="force one every so many forwards; 0: never")
    p.add_argument("--growth", type=float, default=512, help="megabytes that memory may grow (%(default)s)")
    p.add_argument("--pair", choices=("tiny", "shipped"), default="shipped" if GPU else "tiny")
    p.add_argument("--sts-config", default='{"keep": 0.1, "budget": 64}', help="inline JSON (%(default)s)")
    p.add_argument("--log", type=Path, help="keep the server's log here")
    p.add_argument("--out", type=Path, help="append raw results to this JSONL file")
    options = p.parse_args(argv)
    options.pool = options.pool or 3 * options.longest
    return options


def main(argv: list[str] | None = None) -> None:
    stop_when_terminated()
    options = parse(argv)
    with tempfile.TemporaryDirectory() as folder:
        made = make_pair(folder) if options.pair == "tiny" else None
        options.pair = Pair(made["target"], made["draft"]) if made else shipped_pair()
        with serve(options, Path(folder)) as server:
            options.where = {**origin(), "commit": commit(), "server": server.shown_command()}
            options.where["seed"] = options.seed
            try:
                row = Soak(server, options).run()
            except Off as problem:
                raise SystemExit(f"soak: {problem}") from None
    print(f"soak: {row['requests']} requests, {row['aborted']} aborted, nothing was off")


if __name__ == "__main__":
    main()
