"""Documents with facts hidden in real text, questions about them, and their answers, as token ids.

A task yields the lines to hide (in document order) and the questions; `Writer.row` spreads the lines over
a piece of real text so that the whole conversation has exactly the length asked for.
"""

from __future__ import annotations

import json
import lzma
import math
import random
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import wording as w
from tokenizers import Tokenizer

SILENT, TEXT, ANSWER = 0, 1, 2  # how a token counts as a training target
ROOM = 112  # tokens that the answer to an evaluation prompt may take


@dataclass
class Question:
    ask: str
    answer: str
    values: list[str]  # an answer is right when it has all of them


@dataclass
class Task:
    lines: list[str]
    questions: list[Question]
    paths: list[str] = field(default_factory=list)  # of an agent transcript: one tool output each


def fact_answer(attr: str, key: str, values: list[str]) -> str:
    return f"The {attr} of {key} is {', '.join(values)}."


def retrieval(pool: w.Pool, n: int) -> Task:
    """n facts of distinct (name, attribute), one question each."""
    attrs = pool.distinct(pool.attribute, 1 if pool.rng.random() < 0.5 else 3)
    keys = pool.distinct(pool.key, n)
    pairs = [(k, pool.rng.choice(attrs)) for k in keys]
    if len(attrs) > 1 and pool.rng.random() < 0.4:
        pairs = [(k, a) for k in keys[: math.ceil(n / len(attrs))] for a in attrs][:n]
        pool.rng.shuffle(pairs)
    lines, questions = [], []
    for key, attr in pairs:
        val = pool.value()
        lines.append(pool.say("statement", a=attr, k=key, v=val))
        questions.append(Question(pool.say("question", a=attr, k=key), fact_answer(attr, key, [val]), [val]))
    return Task(lines, questions)


def multi_value(pool: w.Pool, n: int) -> Task:
    """Several values for one name, all asked for, in document order."""
    attr, facts, questions = pool.attribute(), [], []
    for key in pool.distinct(pool.key, max(1, n // 3)):
        values = pool.distinct(pool.value, pool.rng.randint(2, 4))
        places = sorted(pool.rng.random() for _ in values)
        facts += [(p, pool.say("statement", a=attr, k=key, v=v)) for p, v in zip(places, values, strict=True)]
        questions.append(Question(pool.say("all", a=attr, k=key), fact_answer(attr, key, values), values))
    return Task([line for _, line in sorted(facts)], questions)


def multi_query(pool: w.Pool, n: int) -> Task:
    """One question about several names."""
    attr, keys = pool.attribute(), pool.distinct(pool.key, max(2, n))
    values = {k: pool.value() for k in keys}
    lines = [pool.say("statement", a=attr, k=k, v=v) for k, v in values.items()]
    questions = []
    for _ in range(max(1, n // 2)):
        asked = pool.rng.sample(keys, min(len(keys), pool.rng.randint(2, 4)))
        names = ", ".join(asked[:-1]) + " and " + asked[-1]
        answer = " ".join(fact_answer(attr, k, [values[k]]) for k in asked)
        ask = pool.say("group", a=attr, k=names)
        questions.append(Question(ask, answer, [values[k] for k in asked]))
    return Task(lines, questions)


def json_records(pool: w.Pool, n: int) -> Task:
    fields = pool.distinct(pool.attribute, pool.rng.randint(1, 4))
    lines, questions = [], []
    for key in pool.distinct(pool.key, max(1, n // len(fields))):
        record = {a: pool.value() for a in fields}
        lines.append(json.dumps({pool.rng.choice(["name", "id"]): key, **record}))
        attr = pool.rng.choice(fields)
        ask = pool.say("question", a=attr, k=key)
        questions.append(Question(ask, fact_answer(attr, key, [record[attr]]), [record[attr]]))
    return Task(lines, questions)


def variables(pool: w.Pool, n: int) -> Task:
    """Chains of assignments; the answer walks the chain back to the value."""
    names, facts, questions = pool.distinct(pool.identifier, n), [], []
    while names:
        chain = [names.pop() for _ in range(min(len(names), pool.rng.randint(1, 4)))]
        val = pool.number()
        places = sorted(pool.rng.random() for _ in chain)
        for place, a, b in zip(places, chain, [val, *chain], strict=False):
            facts.append((place, pool.say("assignment", a=a, b=b)))
        hops = pool.rng.randint(1, len(chain))
        trace = " = ".join([*reversed(chain[:hops]), val])
        questions.append(Question(pool.say("variable", k=chain[hops - 1]), f"{trace}.", [val]))
    return Task([line for _, line in sorted(facts)], questions)


def code(pool: w.Pool, n: int) -> Task:
    lines, questions = [], []
    for name in pool.distinct(pool.identifier, n):
        val = pool.number()
        lines.append(pool.say("snippet", k=name, v=val))
        questions.append(Question(pool.say("code", k=name), f"{name} is {val}.", [val]))
    return Task(lines, questions)


def agent(pool: w.Pool, n: int) -> Task:
    """Tool outputs that later questions need."""
    task = retrieval(pool, n)
    task.paths = pool.distinct(pool.path, pool.rng.randint(1, max(1, min(8, n))))
    return task


TRAIN_MIX = [
    (retrieval, 5),
    (multi_value, 3),
    (multi_query, 2),
    (json_records, 2),
    (variables, 3),
    (code, 1),
    (agent, 2),
]
# What is examined: the task and how many facts the document hides.
EXAM = {
    "single": (retrieval, 1),
    "multi_key": (retrieval, 32),
    "multi_value": (multi_value, 12),
    "multi_query": (multi_query, 12),
    "json": (json_records, 32),
    "variables": (variables, 16),
    "code": (code, 16),
    "agent": (agent, 12),
}


@dataclass
class Row:
    ids: list[int] = field(default_factory=list)
    kinds: list[int] = field(default_factory=list)

    def add(self, ids: list[int], kind: int) -> None:
        self.ids += ids
        self.kinds += [kind] * len(ids)

    def join(self, *rows: Row) -> Row:
        for row in rows:
            self.ids += row.ids
            self.kinds += row.kinds
        return self


class Writer:
    def __init__(self, tok: Tokenizer, words: list[str], split: w.Split, text: np.ndarray):
        self.tok = tok
        self.words = [x for x in words if w.half(x) == split]
        self.split: w.Split = split
        self.text = text
        names = ["<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"]
        self.begin, self.end, self.system, self.user, self.assistant, self.tool = map(
            self.tok.token_to_id, names
        )
        self.newline = self.encode("\n")[0]

    @classmethod
    def of_corpus(cls, folder: Path, split: w.Split) -> Writer:
        """What corpus.py built, each half with its own text."""
        tok = Tokenizer.from_file(str(folder / "tokenizer.json"))
        text = lzma.decompress((folder / f"{'train' if split == 'train' else 'val'}.bin.xz").read_bytes())
        return cls(
            tok, json.loads((folder / "words.json").read_text()), split, np.frombuffer(text, np.uint16)
        )

    @classmethod
    def shipped(cls, model: Path, tokens: int = 400_000) -> Writer:
        """Held-out tasks without a corpus: the documents are of the installed Python's own library."""
        tok = Tokenizer.from_file(str(model / "tokenizer.json"))
        ids: list[int] = []
        for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
            if len(ids) < tokens:
                ids += tok.encode(
                    path.read_text(errors="ignore").replace("\t", "    "), add_special_tokens=False
                ).ids
        return cls(
            tok,
            json.loads(Path(__file__).with_name("words.json").read_text()),
            "test",
            np.array(ids, np.uint16),
        )

    def encode(self, text: str) -> list[int]:
        return self.tok.encode(text, add_special_tokens=False).ids

    def pool(self, rng: random.Random, narrow: bool | None = None) -> w.Pool:
        """Of few words sometimes: names then share words, and only the whole name tells them apart."""
        narrow = rng.random() < 0.4 if narrow is None else narrow
        words = rng.sample(self.words, rng.randint(12, 40)) if narrow else self.words
        return w.Pool(self.split, words, rng)

    def filler(self, n: int, rng: random.Random) -> np.ndarray:
        start = rng.randrange(len(self.text) - n - 400)
        start += int(np.argmax(self.text[start : start + 400] == self.newline)) + 1
        chunk = self.text[start : start + n].astype(np.int32)
        chunk[chunk == self.end] = self.newline
        return chunk

    def plain(self, length: int, rng: random.Random) -> Row:
        start = rng.randrange(len(self.text) - length)
        row = Row()
        row.add([self.begin], SILENT)
        row.add(self.text[start : start + length - 1].tolist(), TEXT)
        return row

    def repeat(self, length: int, rng: random.Random) -> Row:
        """Copy a piece of text: the shortest way to learn to look back."""
        n, row = (length - 5) // 2, Row()
        piece = self.filler(n, rng).tolist()
        row.add([self.begin, self.user], SILENT)
        row.add(piece, TEXT)
        row.add([self.end, self.assistant], SILENT)
        row.add([*piece, self.end], ANSWER)
        row.add([self.end] * (length - len(row.ids)), SILENT)
        return row

    def document(self, lines: list[str], room: int, rng: random.Random, depths: list[float] | None) -> Row:
        """The lines spread over `room` tokens of text, at line ends."""
        row, chunk = Row(), self.filler(room, rng)
        ends = np.flatnonzero(chunk == self.newline) + 1
        at = [0, *(ends if len(ends) else range(room + 1))]
        wanted = depths or sorted(rng.random() for _ in lines)
        cuts = [at[min(np.searchsorted(at, d * room), len(at) - 1)] for d in wanted]
        for line, a, b in zip(lines, [0, *cuts], cuts, strict=False):
            row.add(chunk[a:b].tolist(), TEXT)
            row.add(self.encode(line + "\n"), SILENT)
        row.add(chunk[cuts[-1] if cuts else 0 :].tolist(), TEXT)
        return row

    def conversation(
        self,
        task: Task,
        length: int,
        rng: random.Random,
        depths: list[float] | None = None,
        prompt_only: bool = False,
    ) -> Row | None:
        """A conversation of exactly `length` tokens; with `prompt_only` it ends where the last answer would
        begin. None if not even one question fits (with `prompt_only`: if not all fit)."""
        lines = [self.encode(line + "\n") for line in task.lines]
        head, tails = self.opening(task, rng), self.turns(task)
        used = len(head.ids) + sum(map(len, lines)) + self.seams(task)
        kept, size = [], 0
        for turn in tails:
            if used + size + len(turn.ids) > length:
                break
            kept.append(turn)
            size += len(turn.ids)
        if len(kept) < (len(tails) if prompt_only else 1):
            return None
        if prompt_only:
            answer = kept[-1].kinds.index(ANSWER)
            size -= len(kept[-1].ids) - answer
            kept[-1] = Row(kept[-1].ids[:answer], kept[-1].kinds[:answer])
        body = self.document(task.lines, length - used - size, rng, depths)
        return head.join(self.wrapped(task, body, rng), *kept)

    def opening(self, task: Task, rng: random.Random) -> Row:
        row = Row()
        row.add([self.begin], SILENT)
        if rng.random() < 0.2:
            row.add([self.system, *self.encode(rng.choice(w.DATA["system"])), self.end], SILENT)
        pool = w.Pool(self.split, self.words, rng)
        if task.paths:
            ask = pool.say("instruction", k=", ".join(task.paths))
            row.add([self.user, *self.encode(ask), self.end], SILENT)
        else:
            row.add([self.user, *self.encode(pool.say("preamble"))], SILENT)
        return row

    def calls(self, task: Task) -> list[list[int]]:
        tools = w.DATA["tools"][self.split]
        return [self.encode(f"{tools[len(p) % len(tools)]}({p})") for p in task.paths]

    def seams(self, task: Task) -> int:
        """Tokens that `wrapped` adds around the document."""
        return sum(len(c) + 4 for c in self.calls(task))

    def wrapped(self, task: Task, body: Row, rng: random.Random) -> Row:
        """The document as it is, or cut into tool outputs with the calls between."""
        if not task.paths:
            return body
        row, calls = Row(), self.calls(task)
        ends = [i + 1 for i, t in enumerate(body.ids) if t == self.newline] or [len(body.ids)]
        cuts = sorted(rng.choice(ends) for _ in calls[1:])
        for call, a, b in zip(calls, [0, *cuts], [*cuts, len(body.ids)], strict=True):
            row.add([self.assistant], SILENT)
            row.add([*call, self.end], ANSWER)
            row.add([self.tool], SILENT)
            row.join(Row(body.ids[a:b], body.kinds[a:b]))
            row.add([self.end], SILENT)
        return row

    def turns(self, task: Task) -> list[Row]:
        rows = []
        for i, q in enumerate(task.questions):
            first = i == 0 and not task.paths
            row = Row()
            ask = self.encode(q.ask)
            row.add([*([self.newline] if first else [self.user]), *ask, self.end, self.assistant], SILENT)
            row.add([*self.encode(q.answer), self.end], ANSWER)
            rows.append(row)
        return rows

    def row(self, length: int, rng: random.Random) -> Row:
        """One training row of exactly `length` tokens."""
        r = rng.random()
        if r < 0.2:
            return self.plain(length, rng)
        if r < 0.25 and length <= 4096:
            return self.repeat(length, rng)
        tasks, weights = zip(*TRAIN_MIX, strict=True)
        most = min(max(2, length // 45), 400)
        while True:
            n = round(most ** (rng.random() ** 0.5))  # mostly many facts, sometimes one
            task = rng.choices(tasks, weights)[0](self.pool(rng), n)
            rng.shuffle(task.questions)
            task.questions = task.questions[: rng.choice([1, 4, 16, 64, 100])]
            found = self.conversation(task, length, rng)
            if found is not None:
                return found
            most = max(1, most // 2)

    def examination(
        self, name: str, length: int, rng: random.Random, depth: float | None = None
    ) -> tuple[Row, Question]:
        """A prompt of exactly `length` - ROOM tokens and the question it ends with."""
        make, n = EXAM[name]
        pool = self.pool(rng, narrow=n > 1)
        while True:
            task = make(pool, n)
            rng.shuffle(task.questions)
            task.questions = task.questions[: 3 if task.paths else 1]
            depths = None if depth is None else [depth]
            row = self.conversation(task, length - ROOM, rng, depths, prompt_only=True)
            if row is not None:
                return row, task.questions[-1]
