"""One arm: its server, and every item at every keep, as one result line a cell (task, length, keep)."""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cache
from itertools import repeat
from pathlib import Path

from tqdm import tqdm

from benchmarks.quality import items
from benchmarks.quality.arms import ARMS, DENSE, Arm, Plan, common, header, start
from sts_sglang.tools.local_server import LocalServer

Made = items.Item | items.Shared | items.Text


@dataclass
class Reply:
    score: float  # the share of the values that the answer has; of text, minus nats a token
    tokens: int
    rounds: int
    out: str  # checksum of the output ids
    text: str = ""


@dataclass
class Cell:
    """Results of one task, length and keep; lists are by item."""

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

    def add(self, reply: Reply, group: int, depth: float) -> None:
        self.group.append(group)
        self.depth.append(depth)
        self.score.append(round(reply.score, 5))
        self.tokens.append(reply.tokens)
        self.rounds.append(reply.rounds)
        self.out.append(reply.out)


class Client:
    """Asks a server of one arm."""

    def __init__(self, server: LocalServer, arm: Arm):
        self.server, self.arm = server, arm

    def generate(self, ids: list[int], keep: float, new_tokens: int, extra: dict, **params) -> dict:
        params = {"max_new_tokens": new_tokens, "temperature": 0, **params}
        if self.arm.config is not None:
            params["custom_params"] = {"sts": {"keep": keep}}
        body = {"input_ids": ids, "sampling_params": params, **extra}
        return self.server.post("/generate", body, timeout=3600)

    def answer(
        self, ids: list[int], question: items.Question, keep: float, extra: dict | None = None
    ) -> Reply:
        answer = self.generate(ids, keep, items.ROOM, extra or {})
        found = [value in answer["text"] for value in question.values]
        return _reply(answer, sum(found) / len(found))

    def loss(self, text: items.Text, keep: float) -> Reply:
        answer = self.generate(
            text.prefix,
            keep,
            len(text.forced),
            {"return_logprob": True, "top_logprobs_num": 2},
            ebnf=" ".join(map(str, text.forced)),
            ignore_eos=True,
        )
        if answer["output_ids"] != text.forced:
            raise SystemExit("the server did not emit the given text; is it benchmarks.quality.serve?")
        logprobs = forced_logprobs(answer["meta_info"])[1:]  # the first is the dense prefill's
        return _reply(answer, sum(logprobs) / len(logprobs))

    def conversation(self, shared: items.Shared, keep: float) -> list[Reply]:
        """The turns of one conversation, then the same document's questions in requests of their own."""
        # Answers become context: a cache of its own for every keep, or another keep's KV would be theirs.
        own = {"extra_key": f"keep {keep}"}
        ids, replies = list(shared.document), []
        for question, asked in shared.turns:
            ids += asked
            answer = self.generate(ids, keep, items.ROOM, own)
            found = [value in answer["text"] for value in question.values]
            replies.append(_reply(answer, sum(found) / len(found)))
            ids += answer["output_ids"]
        return replies + [self.answer(shared.document + asked, q, keep, own) for q, asked in shared.alone]

    def counters(self) -> dict[str, int]:
        """Of a server at rest: on a GPU the round after the last answer is on its way already."""
        if self.arm.config is None:
            return {}
        before, now = None, self.server.counters()
        while before != now:
            time.sleep(0.03)
            before, now = now, self.server.counters()
        return {k: v for k, v in now.items() if k != "keep_ratio"}


def _reply(answer: dict, score: float) -> Reply:
    meta = answer["meta_info"]
    out = f"{zlib.crc32(str(answer['output_ids']).encode()):08x}"
    return Reply(score, meta["completion_tokens"], meta.get("spec_verify_ct", 0), out, answer["text"])


def forced_logprobs(meta_info: dict) -> list[float]:
    """What the target gave each forced token (serve.py), from an answer with top_logprobs_num 2."""
    pairs = (sorted(top[:2], reverse=True) for top in meta_info["output_top_logprobs"])
    return [mark[0] - token[0] + 1 for token, mark in pairs]


@cache
def make(writer: items.Writer, task: str, length: int, index: int) -> Made:
    """Made once for all arms of this process."""
    if task == "text":
        return items.text(writer, length, index)
    if task == "shared":
        return items.shared(writer, length, index)
    return items.item(writer, task, length, index)


def ask(client: Client, made: Made, keep: float) -> list[tuple[Reply, float]]:
    """Reply and depth of one item; of a shared document, of each of its questions."""
    if isinstance(made, items.Text):
        return [(client.loss(made, keep), 0.0)]
    if isinstance(made, items.Shared):
        return [(reply, 0.0) for reply in client.conversation(made, keep)]
    return [(client.answer(made.ids, made.question, keep), made.depth)]


def documents(task: str, plan: Plan) -> int:
    """Items of one cell; a shared document has several questions."""
    return max(2, plan.items // (2 * items.TURNS)) if task == "shared" else plan.items


def measure(
    client: Client, writer: items.Writer, name: str, plan: Plan, task: str, length: int, bar: tqdm
) -> list[Cell]:
    """All keeps of one task and length: as many items as run at once, at one keep after the other, so that
    their prompts are in the prefix cache and the counters belong to one keep."""
    keeps = [*(plan.keeps if ARMS[name].keeps else ()), DENSE]
    cells = {keep: Cell(name, task, length, keep) for keep in keeps}
    count = documents(task, plan)
    before = client.counters()
    with ThreadPoolExecutor(plan.concurrency) as pool:
        for first in range(0, count, plan.concurrency):
            batch = range(first, min(count, first + plan.concurrency))
            made = [make(writer, task, length, index) for index in batch]
            for keep, cell in cells.items():
                started = time.monotonic()
                replies = pool.map(ask, repeat(client), made, repeat(keep))
                for group, found in zip(batch, replies, strict=True):
                    for reply, depth in found:
                        cell.add(reply, group, depth)
                cell.seconds += round(time.monotonic() - started, 2)
                after = client.counters()
                for key in after:
                    cell.counters[key] = cell.counters.get(key, 0) + after[key] - before[key]
                before = after
                bar.update(len(batch))
    for cell in cells.values():
        check_sparse(cell, ARMS[name])
    return list(cells.values())


def check_sparse(cell: Cell, arm: Arm) -> None:
    """Refuse results of verifies that were not what the arm says."""
    if arm.config is None:
        return
    counters = cell.counters
    sparse = counters["selected_tokens"] < counters["available_tokens"]
    full = bool(counters["full_verifies"])
    if arm.config.get("verify") == "dense":
        right = full and not sparse and not counters["sparse_verifies"]
    else:
        # At keep 1 a verify counts as sparse too: it attended to a selection, of everything.
        right = sparse == (cell.keep != DENSE) and full == bool(arm.config.get("full_verify_every"))
        right &= counters["sparse_verifies"] > 0 and not counters["dense_verifies"]
    if not right:
        raise SystemExit(f"{cell.arm} {cell.task} {cell.length} keep {cell.keep}: verified as {counters}")


def run_arm(
    name: str,
    plan: Plan,
    writer: items.Writer,
    checksum: str,
    out: Path,
    logs: Path,
    servers: list[LocalServer],
    say: Callable = tqdm.write,
) -> None:
    """Ask everything of one arm; out/NAME.jsonl gets a header line, then a line a cell as they are done.

    The arm's server joins `servers`, so that another thread can stop it.
    """
    path = out / f"{name}.jsonl"
    done = finished(path, common(plan, checksum))
    todo = [cell for cell in plan.cells() if cell not in done]
    if not todo:
        say(f"{name}: all there")
        return
    keeps = len(plan.keeps) + 1 if ARMS[name].keeps else 1
    total = keeps * sum(documents(task, plan) for task, _ in todo)
    started = time.monotonic()
    server = start(name, plan, logs)
    servers.append(server)
    with (
        server,
        tqdm(total=total, desc=name, mininterval=5) as bar,
        path.open("a") as file,
    ):
        if file.tell() == 0:
            file.write(json.dumps(header(name, plan, checksum, server)) + "\n")
        client = Client(server, ARMS[name])
        for task, length in todo:
            for cell in measure(client, writer, name, plan, task, length, bar):
                file.write(json.dumps(asdict(cell), separators=(",", ":")) + "\n")
            file.flush()
    say(f"{name}: {time.monotonic() - started:.0f} s")


def finished(path: Path, expected: dict) -> set[tuple[str, int]]:
    """(task, length) of the cells in a result file, which must be of the same device, items and models."""
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    for key, value in expected.items() if rows else ():
        if rows[0].get(key) != value:
            raise SystemExit(f"{path}: has other {key} than this run; give another --out or remove the file")
    return {(row["task"], row["length"]) for row in rows if "task" in row}
