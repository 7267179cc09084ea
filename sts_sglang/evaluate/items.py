"""What any language model can be asked in plain words: things to look up, to copy and to read on, far back.

Nothing needs training on the task: questions are answered by the pattern of those before them, or in a
conversation where the model has a chat template, and copies are continued where the prompt begins them.
What a model cannot do with dense attention says nothing about sparse attention: whoever asks leaves those
tasks out first (GOOD_ENOUGH).

The first token of an answer comes from the prefill, not from a verify. So answers repeat the question's words
before the value, and a copy or a forced text counts from the second token on.

Every item has its own seed: item 7 is the same whatever else is asked.
"""

from __future__ import annotations

import hashlib
import math
import random
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sts_sglang.evaluate.asking import Client, Reply

GOOD_ENOUGH = 0.6  # dense score from which a task is asked
FORCED = 64  # tokens of text that a loss item measures
CUE = 48  # tokens of a passage that begin its copy
SPARE = 8  # positions behind the last token, for drafts of the last round
SHOTS = 3  # questions answered before the one that is asked
LOSS = "text"  # the task whose score is a loss


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


ADJECTIVES = _words(
    "amber brave calm dusty eager faint gentle hollow idle jolly keen lively mellow narrow old proud quiet "
    "rough silver tender upper vivid warm young"
)
NOUNS = _words(
    "anchor basket candle desert engine forest garden harbor island jacket kettle lantern meadow needle "
    "orchard pillow quarry river saddle temple umbrella valley window yard"
)
PLAIN = _words(
    "apple bread chair dance eagle field glass house iron judge knife lemon money night ocean paper queen "
    "rain ship table uncle voice water year bird cloud door fire gold hand king lamp moon nose road salt "
    "tree wall boat cake dust farm gate hill leaf milk page rope sand tool wind bell coat"
)
COLORS = _words("red blue green yellow black white brown purple")
CITIES = _words("Paris London Berlin Madrid Rome Vienna Dublin Athens Lisbon Oslo Prague Cairo Tokyo Delhi")


@dataclass
class Item:
    """A prompt whose answer must have every value in its first line; the score is the share that it has."""

    ids: list[int]
    values: list[str]
    new_tokens: int
    depth: float

    def ask(self, client: Client, keep: float) -> list[Reply]:
        reply = client.generate(self.ids, keep, self.new_tokens)
        line = reply.text.strip().partition("\n")[0]
        reply.score = sum(value in line for value in self.values) / len(self.values)
        reply.depth = self.depth
        return [reply]


@dataclass
class Copy:
    """A prompt that ends where a passage of it begins again; the score is the share that is copied before the
    first other token."""

    ids: list[int]
    expected: list[int]
    depth: float

    def ask(self, client: Client, keep: float) -> list[Reply]:
        reply = client.generate(self.ids, keep, len(self.expected), ignore_eos=True)
        same = 0
        for given, wanted in zip(reply.ids, self.expected, strict=False):
            if given != wanted:
                break
            same += 1
        reply.score, reply.depth = same / len(self.expected), self.depth
        return [reply]


@dataclass
class Text:
    """Text that is read on: the score is minus the loss, nats a token."""

    prefix: list[int]
    forced: list[int]  # the first comes from the prefill and does not count

    def ask(self, client: Client, keep: float) -> list[Reply]:
        reply, logprobs = client.forced(self.prefix, self.forced, keep)
        reply.score = sum(logprobs) / len(logprobs)
        return [reply]


@dataclass
class Recital:
    """A passage that is read again: the score is the mean probability that its tokens are given."""

    prefix: list[int]
    forced: list[int]
    depth: float

    def ask(self, client: Client, keep: float) -> list[Reply]:
        reply, logprobs = client.forced(self.prefix, self.forced, keep)
        reply.score = sum(map(math.exp, logprobs)) / len(logprobs)
        reply.depth = self.depth
        return [reply]


def shortest_context(length: int) -> int:
    """Tokens that the first verify of an item of `length` tokens has before it."""
    return length - SPARE - FORCED - 1


class TooShort(ValueError):
    """The texts have too few tokens for what is asked of them."""


class NoRoom(TooShort):
    """A length is too short for what is asked of it, whatever the texts."""


class Source:
    """Texts as one long row of tokens, in which facts are hidden and of which loss is measured.

    Args:
        tokenizer: transformers' of the target.
        texts: put one after the other.
    """

    def __init__(self, tokenizer: Any, texts: Sequence[str]):
        self.tokenizer = tokenizer
        self.stream: list[int] = []
        for text in texts:
            self.stream += self.encode(text.rstrip() + "\n\n")
        begin = tokenizer.bos_token_id
        whole = tokenizer("a", verbose=False)["input_ids"]
        # As the tokenizer itself begins a prompt: some models are lost without their first token.
        self.head = [begin] if begin is not None and whole[:1] == [begin] else []
        self.chat = self._chat()
        self._ends_line = {token: tokenizer.decode([token]).endswith("\n") for token in set(self.stream)}
        self.checksum = hashlib.sha256(array("q", self.stream).tobytes()).hexdigest()[:12]

    def _chat(self) -> tuple[list[int], list[int]] | None:
        """What stands before a user's words and between them and the answer; None without a chat template."""
        if not getattr(self.tokenizer, "chat_template", None):
            return None
        said, mark = [{"role": "user", "content": "WORDS"}], "WORDS"
        whole = self.tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
        before, found, after = whole.partition(mark)
        return (self.encode(before), self.encode(after)) if found else None

    def encode(self, text: str) -> list[int]:
        """Without special tokens, however long."""
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def filler(self, count: int, rng: random.Random) -> list[int]:
        """`count` tokens from a line's beginning on. Raises TooShort."""
        last = len(self.stream) - count
        if last < 1:
            raise TooShort(f"{len(self.stream)} tokens; allowed: at least {count + 1} for such prompts")
        start = rng.randrange(last)
        while start > 0 and not self._ends_line[self.stream[start - 1]]:
            start -= 1
        return self.stream[start : start + count]

    def line_ends(self, ids: list[int]) -> list[int]:
        """Places in `ids` where a line may be put in, 0 among them."""
        return [0, *(i + 1 for i, token in enumerate(ids) if self._ends_line[token])]

    def tails(self, length: int) -> int:
        """Windows of `length` tokens whose measured tokens are no other's."""
        return max(0, (len(self.stream) - length) // (FORCED + 1) + 1) if len(self.stream) >= length else 0

    def window(self, length: int, number: int) -> list[int]:
        """The tokens up to the end of measured tail `number`."""
        end = length + number * (FORCED + 1)
        return self.stream[end - length : end]


class Plain:
    """The tasks over one source: `make` gives item `index` of a task, whose prompt and answer together have
    `length` tokens."""

    def __init__(self, source: Source):
        self.source, self.checksum = source, source.checksum
        self.tasks = (*TASKS, *(CHATS if source.chat else ()), LOSS)

    def make(self, task: str, length: int, index: int) -> Item | Copy | Text | Recital:
        """Raises TooShort."""
        rng = random.Random(f"plain {task} {length} {index}")
        return (TASKS | CHATS | {LOSS: text})[task](self.source, length, index, rng)

    def documents(self, task: str, items: int) -> int:
        return items


def text(source: Source, length: int, index: int, rng: random.Random) -> Text:
    places = list(range(source.tails(length - SPARE)))
    if index >= len(places):
        least = length - SPARE + index * (FORCED + 1)
        raise TooShort(f"{len(source.stream)} tokens; allowed: at least {least} for so many windows")
    random.Random(f"plain text {length}").shuffle(places)
    ids = [*source.head, *source.window(length - SPARE, places[index])[len(source.head) :]]
    return Text(ids[: -FORCED - 1], ids[-FORCED - 1 :])


def _hidden(
    source: Source,
    lines: list[str],
    asked: str,
    ends: tuple[list[int], list[int]],
    length: int,
    rng: random.Random,
) -> tuple[list[int], float]:
    """(ids, depth of the line `asked`): lines at random ends of lines of a filler, between the two `ends`."""
    encoded = {line: source.encode(line + "\n") for line in lines}
    head, tail = ends
    room = length - len(head) - len(tail) - sum(map(len, encoded.values()))
    if room < 64:
        raise NoRoom(f"no room for the question in {length} tokens")
    filler = source.filler(room, rng)
    between = source.line_ends(filler)
    places = sorted(rng.choice(between) for _ in lines)
    ids, depth = list(head), 0.0
    for line, begin, end in zip(lines, [0, *places], places, strict=False):
        ids += filler[begin:end]
        depth = len(ids) / length if line == asked else depth
        ids += encoded[line]
    return [*ids, *filler[places[-1] :], *tail], round(depth, 3)


def _completed(source: Source, ending: str) -> tuple[list[int], list[int]]:
    """The ends of a prompt that the model goes on with."""
    return source.head, source.encode("\n" + ending)


def _conversed(source: Source, question: str) -> tuple[list[int], list[int]]:
    """The ends of a user's words."""
    before, after = source.chat
    return before, [*source.encode("\n" + question), *after]


def _names(rng: random.Random, count: int, adjectives: int = len(ADJECTIVES)) -> list[str]:
    """Distinct two-word names; of few adjectives, only the whole name tells them apart."""
    first = rng.sample(ADJECTIVES, adjectives)
    return rng.sample([f"{a} {n}" for a in first for n in NOUNS], count)


def _look_up(facts: int, adjectives: int, chat: bool = False) -> Callable:
    """Numbers of names, all of one wording, one of which is asked for."""

    def make(source: Source, length: int, index: int, rng: random.Random) -> Item:
        names = _names(rng, SHOTS + facts, adjectives)
        said = {name: f"The secret number of the {name} is {rng.randrange(10000, 100000)}." for name in names}
        lines = [said[name] for name in names]
        rng.shuffle(lines)
        name = names[SHOTS]
        if chat:
            ends = _conversed(source, f"What is the secret number of the {name}?")
        else:
            pattern = "Question: What is the secret number of the {}?\nAnswer: {}\n\n"
            shots = "".join(pattern.format(shot, said[shot]) for shot in names[:SHOTS])
            ends = _completed(source, (shots + pattern.format(name, "")).rstrip())
        new_tokens = len(source.encode(" " + said[name])) + 8
        ids, depth = _hidden(source, lines, said[name], ends, length - new_tokens - SPARE, rng)
        return Item(ids, [said[name].split()[-1].rstrip(".")], new_tokens, depth)

    return make


def records(source: Source, length: int, index: int, rng: random.Random) -> Item:
    """Rows of a table: three columns of the row that is named."""
    keys = rng.sample([f"{a}-{n}" for a in ADJECTIVES for n in NOUNS], SHOTS + 8)
    rows = {key: (rng.choice(COLORS), str(rng.randrange(10000, 100000)), rng.choice(CITIES)) for key in keys}
    said = {key: f"Record {key}: color {c}, number {n}, city {t}." for key, (c, n, t) in rows.items()}
    lines = list(said.values())
    rng.shuffle(lines)
    key = keys[SHOTS]
    ending = "Some of the records once more:\n" + "".join(f"{said[k]}\n" for k in keys[:SHOTS])
    ending += f"Record {key}:"
    new_tokens = len(source.encode(said[key])) + 4
    ends = _completed(source, ending)
    ids, depth = _hidden(source, lines, said[key], ends, length - new_tokens - SPARE, rng)
    return Item(ids, list(rows[key]), new_tokens, depth)


def sequence(source: Source, length: int, index: int, rng: random.Random) -> Copy:
    """Words in an order that nothing but the list itself tells."""
    names, words = _names(rng, 4), rng.sample(PLAIN, 48)
    said = [f"Words of the {n}: {' '.join(words[12 * i : 12 * i + 12])}." for i, n in enumerate(names)]
    whole = source.encode(said[0])
    begun = len(source.encode(" ".join(said[0].split()[:6])))  # the name and two words
    ends = _completed(source, f"The same words once more.\n{said[1]}\n")  # the pattern
    ids, depth = _hidden(source, said, said[0], ends, length - len(whole) - SPARE, rng)
    return Copy([*ids, *whole[:begun]], whole[begun:], depth)


def _passage(source: Source, length: int, rng: random.Random) -> tuple[list[int], list[int], float]:
    """(prompt that ends with the first CUE tokens of a passage in it, the next FORCED + 1 of it, depth)."""
    seam = source.encode("\n\n")
    room = length - SPARE - CUE - FORCED - 1 - len(source.head) - len(seam)
    filler = source.filler(room, rng)
    most = int(0.7 * room) - CUE - FORCED
    start = rng.choice([end for end in source.line_ends(filler) if end <= most])
    passage = filler[start : start + CUE + FORCED + 1]
    ids = [*source.head, *filler, *seam, *passage[:CUE]]
    return ids, passage[CUE:], round(start / length, 3)


def copy(source: Source, length: int, index: int, rng: random.Random) -> Copy:
    ids, rest, depth = _passage(source, length, rng)
    return Copy(ids, rest[: CUE // 2], depth)


def recite(source: Source, length: int, index: int, rng: random.Random) -> Recital:
    return Recital(*_passage(source, length, rng))


TASKS: dict[str, Callable[[Source, int, int, random.Random], Any]] = {
    "needle": _look_up(1, len(ADJECTIVES)),
    "keys": _look_up(24, 4),
    "records": records,
    "sequence": sequence,
    "copy": copy,
    "recite": recite,
}
CHATS: dict[str, Callable[[Source, int, int, random.Random], Any]] = {  # by the model's chat template
    "ask": _look_up(1, len(ADJECTIVES), chat=True),
    "ask_keys": _look_up(24, 4, chat=True),
}
ABOUT = {
    "needle": "a number of one of four names",
    "keys": "a number of one of 27 names that share their words",
    "records": "three columns of one of eleven rows",
    "sequence": "twelve words in a random order",
    "copy": "the next 24 tokens of a passage, greedily",
    "recite": "the probability of the next 64 tokens of a passage, forced",
    "ask": "as needle, as a question in a conversation",
    "ask_keys": "as keys, as a question in a conversation",
    LOSS: "the loss of 64 tokens of text, forced",
}
