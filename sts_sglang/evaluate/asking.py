"""Asking a server: one item at one keep, and all items of a task at every keep as cells of results.

What a keep is a share of, a `Sweep` says: of the context in verify, or of the prompt's blocks in a sparse
prefill. Every keep of verify is asked over the same cached prompt, dense (keep 1) included, so that a
difference is between two answers of one server to one item; a prompt is prefilled anew for every keep of
prefill, since the server shares prefixes only among those who ask for the same.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import repeat
from typing import Protocol

from sts_sglang.tools.local_server import LocalServer

DENSE = 1.0  # the keep of a request that attends to everything


class Sweep(Protocol):
    """What the keeps of cells stand for. Keep 1 is dense, whatever else is a share of something."""

    def asks(self, keep: float) -> dict:
        """`custom_params.sts` of a request in a cell of this keep."""

    def named(self) -> dict:
        """What a result file says of it."""


@dataclass(frozen=True)
class VerifySweep:
    """Shares of the context that verifies attend to; prompts are prefilled as the server does."""

    def asks(self, keep: float) -> dict:
        return {"keep": keep}

    def named(self) -> dict:
        return {}


@dataclass(frozen=True)
class PrefillSweep:
    """Shares of the blocks of keys that prompts attend to; verifies attend to a share that is the same for
    all but the dense cell."""

    verify: float = DENSE

    def asks(self, keep: float) -> dict:
        if keep == DENSE:
            return {"keep": DENSE, "prefill": "dense"}
        return {"keep": self.verify, "prefill": "sparse", "prefill_keep": keep}

    def named(self) -> dict:
        return {"sweeps": "prefill_keep", "verify": self.verify}


VERIFY = VerifySweep()


class NotAsked(RuntimeError):
    """The server did something else than it was asked: its results would be of that."""


@dataclass
class Reply:
    score: float  # from 0 to 1; of text, minus nats a token
    tokens: int
    rounds: int  # of drafting and verifying; 0 where nothing drafts
    out: str  # checksum of the output ids
    text: str = ""
    ids: tuple[int, ...] = ()
    depth: float = 0.0  # where in the prompt the answer stands, 0 is the beginning


class Asked(Protocol):
    """A document and what is asked about it."""

    def ask(self, client: Client, keep: float) -> list[Reply]:
        """One reply a question."""


@dataclass
class Cell:
    """Results of one task, length and keep; lists are by question."""

    arm: str
    task: str
    length: int
    keep: float
    group: list[int] = field(default_factory=list)
    depth: list[float] = field(default_factory=list)
    score: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    rounds: list[int] = field(default_factory=list)
    out: list[str] = field(default_factory=list)
    counters: dict[str, int] = field(default_factory=dict)  # what this cell added to the server's
    seconds: float = 0.0

    def add(self, reply: Reply, group: int) -> None:
        self.group.append(group)
        self.depth.append(reply.depth)
        self.score.append(round(reply.score, 5))
        self.tokens.append(reply.tokens)
        self.rounds.append(reply.rounds)
        self.out.append(reply.out)


class Client:
    """Asks one server greedily; `sweep`: what a keep asks it for, None: it is stock SGLang."""

    def __init__(self, server: LocalServer, sweep: Sweep | None = VERIFY):
        self.server, self.sweep = server, sweep

    def generate(
        self, ids: list[int], keep: float, new_tokens: int, extra: dict | None = None, **params
    ) -> Reply:
        """Up to `new_tokens` after the prompt `ids`; `extra` joins the body, `params` the sampling's."""
        return reply_of(self._generate(ids, keep, new_tokens, extra or {}, **params), 0.0)

    def forced(self, ids: list[int], tokens: list[int], keep: float) -> tuple[Reply, list[float]]:
        """A reply without score, and the log-probability of each of `tokens` after those before it.

        The first comes from the prefill and is left out, at every keep and however the prompt was prefilled:
        the others are decoded.

        Raises:
            NotAsked: the server emitted something else; it is not sts_sglang.host.forced.
        """
        answer = self._generate(
            ids,
            keep,
            len(tokens),
            {"return_logprob": True, "top_logprobs_num": 2},
            ebnf=" ".join(map(str, tokens)),
            ignore_eos=True,
        )
        if answer["output_ids"] != tokens:
            raise NotAsked("the server did not emit the given text; is it sts_sglang.host.forced?")
        return reply_of(answer, 0.0), forced_logprobs(answer["meta_info"])[1:]

    def _generate(self, ids: list[int], keep: float, new_tokens: int, extra: dict, **params) -> dict:
        params = {"max_new_tokens": new_tokens, "temperature": 0, **params}
        if self.sweep is not None:
            params["custom_params"] = {"sts": self.sweep.asks(keep)}
        body = {"input_ids": ids, "sampling_params": params, **extra}
        return self.server.post("/generate", body, timeout=3600)

    def counters(self) -> dict[str, int]:
        """Of a server at rest: on a GPU the round after the last answer is on its way already."""
        if self.sweep is None:
            return {}
        before, now = None, self.server.counters()
        while before != now:
            time.sleep(0.03)
            before, now = now, self.server.counters()
        return {k: v for k, v in now.items() if k != "keep_ratio"}


def reply_of(answer: dict, score: float) -> Reply:
    meta, ids = answer["meta_info"], answer["output_ids"]
    out = f"{zlib.crc32(str(ids).encode()):08x}"
    rounds = meta.get("spec_verify_ct", 0)
    return Reply(score, meta["completion_tokens"], rounds, out, answer["text"], tuple(ids))


def forced_logprobs(meta_info: dict) -> list[float]:
    """What the target gave each forced token (host/forced.py), from an answer with top_logprobs_num 2."""
    pairs = (sorted(top[:2], reverse=True) for top in meta_info["output_top_logprobs"])
    return [mark[0] - token[0] + 1 for token, mark in pairs]


def measure(
    client: Client,
    make: Callable[[int], Asked],
    count: int,
    cells: Sequence[Cell],
    concurrency: int,
    progress: Callable[[int], object] = lambda done: None,
) -> None:
    """Fill the cells of one task, a keep each, with documents 0 to `count`.

    As many documents as run at once are asked at one keep after the other, so that prompts which are
    prefilled alike are in the prefix cache and the counters belong to one keep. `progress` hears of every
    batch at every keep.
    """
    before = client.counters()
    pool = ThreadPoolExecutor(concurrency)
    try:
        for first in range(0, count, concurrency):
            batch = range(first, min(count, first + concurrency))
            made = [make(index) for index in batch]
            for cell in cells:
                started = time.monotonic()
                replies = pool.map(lambda asked, keep: asked.ask(client, keep), made, repeat(cell.keep))
                for group, found in zip(batch, replies, strict=True):
                    for reply in found:
                        cell.add(reply, group)
                cell.seconds += round(time.monotonic() - started, 2)
                after = client.counters()
                for key in after:
                    cell.counters[key] = cell.counters.get(key, 0) + after[key] - before[key]
                before = after
                progress(len(batch))
    finally:
        # Not waited for: who is interrupted stops the server, which ends what is still being asked.
        pool.shutdown(wait=False, cancel_futures=True)


def dense_score(
    client: Client, make: Callable[[int], Asked], count: int, task: str, length: int, concurrency: int
) -> float:
    """Mean score of documents 0 to `count` of a task with dense attention: whether the model can do it."""
    cell = Cell("sts", task, length, DENSE)
    measure(client, make, count, [cell], concurrency)
    return sum(cell.score) / len(cell.score)


def verified_as_said(
    cell: Cell, sweep: Sweep = VERIFY, *, dense: bool = False, some_full: bool = False
) -> bool:
    """Whether the verifies of a cell were what its requests asked for.

    Args:
        sweep: what its keep asks for. dense: the server verifies densely whatever a request asks. some_full:
            every N-th verify is full.
    """
    counters = cell.counters
    sparse, full = counters["selected_tokens"] < counters["available_tokens"], bool(counters["full_verifies"])
    if dense:
        return full and not sparse and not counters["sparse_verifies"]
    # At keep 1 a verify counts as sparse too: it attended to a selection, of everything.
    right = sparse == (sweep.asks(cell.keep)["keep"] != DENSE) and full == some_full
    return right and counters["sparse_verifies"] > 0 and not counters["dense_verifies"]


def prefilled_as_said(cell: Cell, sweep: Sweep, counted: str = "prefill") -> bool:
    """Whether the prompts of a cell were prefilled as its requests asked: with blocks left out where they
    name a share of them, else densely, of which nothing is counted. counted: "draft_prefill" of a draft's
    own prefill, where that is sparse too."""
    selected, there = (cell.counters[f"{counted}_{which}_blocks"] for which in ("selected", "available"))
    return selected < there if "prefill_keep" in sweep.asks(cell.keep) else there == 0
