"""What the shipped models are asked: tasks like RULER's, several questions over one document, held-out text.

Any other model is asked in plain words (sts_sglang/evaluate/items.py). Here items are built from
benchmarks/models/tasks.py (test halves of names, values and sentences, which training never saw) over Python
source of installed packages that training never saw either. Every item has its own seed: item 7 is the same
whatever else runs.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from sts_sglang.calibrate.command import read_texts
from sts_sglang.evaluate.asking import Client, Reply
from sts_sglang.evaluate.items import FORCED, Text

MODELS = Path(__file__).parents[1] / "models"
sys.path.insert(0, str(MODELS))

import tasks  # noqa: E402
import wording  # noqa: E402
from tasks import ROOM, Question, Row, Task, Writer  # noqa: E402

DEPTHS = [i / 10 for i in range(11)]
# Dependencies of SGLang that benchmarks/models/corpus.py did not take.
UNSEEN = ("openai", "pydantic", "aiohttp", "huggingface_hub", "fastapi", "httpx", "anyio", "uvicorn")
TEXT_TOKENS = 50_000  # of each at most
TRIES = 100  # documents of one item, whose lengths differ by what is drawn
TURNS = 4  # questions of one conversation, and as many again in requests of their own


@dataclass
class Item:
    """A prompt and what its answer must have."""

    ids: list[int]
    question: Question
    depth: float  # of the farthest fact asked for, 0 is the beginning of the prompt

    def ask(self, client: Client, keep: float) -> list[Reply]:
        reply = _scored(client.generate(self.ids, keep, ROOM), self.question)
        reply.depth = self.depth
        return [reply]


def _scored(reply: Reply, question: Question) -> Reply:
    """The share of the values that the answer has."""
    reply.score = sum(value in reply.text for value in question.values) / len(question.values)
    return reply


@dataclass
class Shared:
    """One document and the questions about it."""

    document: list[int]
    turns: list[tuple[Question, list[int]]]  # what follows the document or the last answer
    alone: list[tuple[Question, list[int]]]  # what follows the document, in a request of its own

    def ask(self, client: Client, keep: float) -> list[Reply]:
        """The turns of one conversation, then the same document's questions in requests of their own."""
        # Answers become context: a cache of its own for every keep, or another keep's KV would be theirs.
        own = {"extra_key": f"keep {keep}"}
        ids, replies = list(self.document), []
        for question, asked in self.turns:
            ids += asked
            replies.append(_scored(client.generate(ids, keep, ROOM, own), question))
            ids += replies[-1].ids
        return replies + [
            _scored(client.generate(self.document + asked, keep, ROOM, own), question)
            for question, asked in self.alone
        ]


def aggregation(pool: wording.Pool, n: int) -> Task:
    """Four values for every name, far apart; all four are asked for."""
    attr, facts, questions = pool.attribute(), [], []
    for key in pool.distinct(pool.key, max(1, n // 4)):
        values = pool.distinct(pool.value, 4)
        places = sorted(pool.rng.random() for _ in values)
        facts += [(p, pool.say("statement", a=attr, k=key, v=v)) for p, v in zip(places, values, strict=True)]
        questions.append(
            Question(pool.say("all", a=attr, k=key), tasks.fact_answer(attr, key, values), values)
        )
    return Task([line for _, line in sorted(facts)], questions)


def qa(pool: wording.Pool, n: int) -> Task:
    """Statements, records and definitions in one document; a question about any of them."""
    parts = [make(pool, n // 3) for make in (tasks.retrieval, tasks.json_records, tasks.code)]
    lines = [line for part in parts for line in part.lines]
    pool.rng.shuffle(lines)
    return Task(lines, [q for part in parts for q in part.questions])


# The task and how many facts the document hides.
TASKS = {
    "single": (tasks.retrieval, 1),
    "multi_key": (tasks.retrieval, 32),
    "multi_value": (tasks.multi_value, 12),
    "multi_query": (tasks.multi_query, 12),
    "variables": (tasks.variables, 16),
    "aggregation": (aggregation, 16),
    "qa": (qa, 24),
}


class Shipped:
    """The tasks that the shipped models were trained for the manner of."""

    def __init__(self, target: Path):
        self.writer, self.checksum = unseen_writer(target)
        self.tasks = (*TASKS, "shared", "text")

    def make(self, task: str, length: int, index: int) -> Item | Shared | Text:
        if task == "text":
            return text(self.writer, length, index)
        if task == "shared":
            return shared(self.writer, length, index)
        return item(self.writer, task, length, index)

    def documents(self, task: str, items: int) -> int:
        """Of one cell; a shared document has several questions."""
        return max(2, items // (2 * TURNS)) if task == "shared" else items


def any_texts() -> list[str]:
    """Documentation, code and prose for models that were trained elsewhere: descriptions of installed
    packages, sources of UNSEEN, and this package's held-out texts. They are of the environment; the result
    file has their checksum."""
    found = {d.name: d.metadata.get_payload() or "" for d in importlib.metadata.distributions() if d.name}
    prose = [text for _, text in sorted(found.items()) if isinstance(text, str) and len(text) > 4096]
    code = ["".join(_sources(package))[:200_000] for package in UNSEEN]
    return [*(text[:30_000] for text in prose), *code, *(t.content for t in read_texts(None, "heldout", ""))]


def unseen_writer(model: Path) -> tuple[Writer, str]:
    """The writer of test items, and a checksum of the text it hides facts in."""
    tok = Tokenizer.from_file(str(model / "tokenizer.json"))
    text = np.array([token for package in UNSEEN for token in _tokens(package, tok)], np.uint16)
    words = json.loads((MODELS / "words.json").read_text())
    return Writer(tok, words, "test", text), hashlib.sha256(text.tobytes()).hexdigest()[:12]


def _sources(package: str) -> Iterator[str]:
    """Source files of an installed package, in order of their paths; none where it is not there."""
    spec = importlib.util.find_spec(package)
    for path in sorted(Path(spec.origin).parent.rglob("*.py")) if spec and spec.origin else ():
        yield path.read_text(errors="ignore")


def _tokens(package: str, tok: Tokenizer) -> list[int]:
    ids: list[int] = []
    for source in _sources(package):
        ids += tok.encode(source.replace("\t", "    "), add_special_tokens=False).ids
        if len(ids) >= TEXT_TOKENS:
            break
    return ids[:TEXT_TOKENS]


def item(writer: Writer, name: str, length: int, index: int) -> Item:
    """A prompt of exactly `length` - ROOM tokens, its question last. SystemExit where that is too short."""
    make, n = TASKS[name]
    rng = random.Random(f"quality {name} {length} {index}")
    pool = writer.pool(rng, narrow=n > 1)
    depth = DEPTHS[index % len(DEPTHS)] if name == "single" else None
    for _ in range(TRIES):
        task = make(pool, n)
        rng.shuffle(task.questions)
        task.questions = task.questions[:1]
        depths = None if depth is None else [depth]
        row = writer.conversation(task, length - ROOM, rng, depths, prompt_only=True)
        if row is not None:
            question = task.questions[0]
            return Item(row.ids, question, _depth(writer, row, question))
    raise too_short("--lengths", name, length)


def too_short(flag: str, task: str, length: int) -> SystemExit:
    return SystemExit(f"{flag}: {task} does not fit into {length} tokens; give more, or other --tasks")


def _depth(writer: Writer, row: Row, question: Question) -> float:
    """Where the farthest of the values stands, as a share of the prompt's characters."""
    text = writer.tok.decode(row.ids, skip_special_tokens=False)
    found = [text.find(value) for value in question.values]
    return round(max(0, min(found)) / len(text), 3)


def shared(writer: Writer, length: int, index: int) -> Shared:
    """A document of about `length` tokens with room for its turns. SystemExit where that is too short."""
    rng = random.Random(f"quality shared {length} {index}")
    task = qa(writer.pool(rng, narrow=True), 24)
    rng.shuffle(task.questions)
    head = writer.opening(task, rng)
    room = length - len(head.ids) - TURNS * ROOM - sum(len(writer.encode(x + "\n")) for x in task.lines)
    if room < 0:
        raise too_short("--lengths", "shared", length)
    document = head.join(writer.document(task.lines, room, rng, None)).ids
    chosen = task.questions[: 2 * TURNS]
    first = [(q, [writer.newline, *_asked(writer, q)]) for q in chosen]
    later = [(q, [writer.user, *_asked(writer, q)]) for q in chosen]
    return Shared(document, [first[0], *later[1:TURNS]], first[TURNS:])


def _asked(writer: Writer, question: Question) -> list[int]:
    return [*writer.encode(question.ask), writer.end, writer.assistant]


def text(writer: Writer, length: int, index: int) -> Text:
    """`length` tokens of text, the last FORCED of them to be predicted (and one before, by the prefill).
    SystemExit where nothing would stand before them."""
    if length < FORCED + 2:
        raise too_short("--text-lengths", "text", length)
    rng = random.Random(f"quality text {length} {index}")
    ids = writer.plain(length, rng).ids
    return Text(ids[: -FORCED - 1], ids[-FORCED - 1 :])
