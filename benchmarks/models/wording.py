"""Names, values and wording of the generated tasks, in a training and a test half that share nothing.

Words and values fall into a half by a checksum, wording by wording.json. Training wording is composed of
fragments and random words (a model of this size learns whole templates by heart and then fails on new ones);
test wording is fixed sentences.
Slots: {a} attribute, {k} name, {v} value, {x} a random word, {n} a random number.
"""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Split = Literal["train", "test"]

DATA = json.loads(Path(__file__).with_name("wording.json").read_text())
TEST, TRAIN = DATA["test"], DATA["train"]
# What is said in the manner of a question, with its leads and tails.
ASKED = ("question", "all", "group", "variable", "code", "instruction")


def half(text: str) -> Split:
    return "test" if zlib.crc32(text.encode()) % 8 == 0 else "train"


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


@dataclass
class Pool:
    """Draws names, values and wording of one half."""

    split: Split
    words: list[str]
    rng: random.Random

    def own(self, draw: Callable[[], str]) -> str:
        while True:
            text = draw()
            if half(text) == self.split:
                return text

    def word(self) -> str:
        return self.rng.choice(self.words)

    def made_up(self) -> str:
        return self.own(
            lambda: "".join(self.rng.choices(DATA["syllables"], k=self.rng.randint(2, 4))).capitalize()
        )

    def key(self) -> str:
        a, b, r = self.word(), self.word(), self.rng.random()
        if r < 0.4:
            return f"{a} {b}"
        if r < 0.55:
            return f"{a}-{b}"
        if r < 0.65:
            return f"{a}_{b}"
        if r < 0.75:
            return self.own(lambda: f"{self.word()} {self.rng.randint(2, 99)}")
        if r < 0.85:
            return self.made_up()
        if r < 0.92:
            return self.path()
        return f"{a} {b} {self.word()}"

    def path(self) -> str:
        return f"{self.word()}/{self.word()}.{self.rng.choice(['log', 'txt', 'md', 'json'])}"

    def identifier(self) -> str:
        a, b, r = self.word(), self.word(), self.rng.random()
        if r < 0.6:
            return f"{a}_{b}"
        if r < 0.75:
            return f"{a.capitalize()}{b.capitalize()}"
        if r < 0.85:
            return f"{a}_{b}_{self.word()}"
        return self.own(lambda: f"{self.word()}{self.rng.randint(1, 99)}")

    def number(self) -> str:
        return self.own(lambda: str(self.rng.randint(100, 10 ** self.rng.randint(4, 7))))

    def value(self) -> str:
        r = self.rng.random()
        if r < 0.6:
            return self.number()
        if r < 0.72:
            letters = "ABCDEFGHKLMNPQRSTUVWXYZ"
            return self.own(
                lambda: "".join(self.rng.choices(letters, k=2)) + f"-{self.rng.randint(100, 999)}"
            )
        if r < 0.84:
            return self.own(lambda: f"{self.rng.getrandbits(24):06x}")
        if r < 0.92:
            return self.own(lambda: f"{self.word()}{self.rng.randint(10, 99)}")
        return f"{self.word().capitalize()}{self.word().capitalize()}"

    def attribute(self) -> str:
        if self.split == "train" and self.rng.random() < 0.6:
            return " ".join(self.word() for _ in range(self.rng.choice([1, 1, 2, 2, 2, 3])))
        return self.rng.choice(DATA["attributes"][self.split])

    def noise(self, most: int) -> str:
        words = range(self.rng.randint(1, most))
        common = DATA["function_words"]
        return " ".join(self.rng.choice(common) if self.rng.random() < 0.5 else self.word() for _ in words)

    def lead(self, fragments: list[str]) -> str:
        if len(fragments) < 10 or self.rng.random() < 0.7:
            return self.rng.choice(fragments)
        return self.noise(5) + self.rng.choice([" ", " ", ": ", ", ", "; ", ". ", " - "])

    def tail(self, fragments: list[str]) -> str:
        if len(fragments) < 10 or self.rng.random() < 0.7:
            return self.rng.choice(fragments)
        joint, end = (
            self.rng.choice([", ", ", ", "; ", " - ", ". ", " ("]),
            self.rng.choice(["?", ".", "", "!", ")"]),
        )
        return joint + self.noise(5) + end

    def verb(self, fragments: list[str]) -> str:
        return self.rng.choice(fragments) if self.rng.random() < 0.65 else self.noise(2)

    def separator(self) -> str:
        if self.rng.random() < 0.5:
            return self.rng.choice(DATA["separators"])
        marks = "".join(self.rng.choices("!#$%&*+-.:;<=>?@^_|~,", k=self.rng.randint(1, 2)))
        return self.rng.choice([f" {marks} ", f"{marks} ", f" {marks}", marks])

    def connector(self) -> str:
        mark, r = self.separator(), self.rng.random()
        if r < 0.4:
            return mark
        if r < 0.6:
            return f" {self.noise(3)} "
        return f"{mark.rstrip()} {self.noise(2)} " if r < 0.8 else f" {self.noise(2)}{mark}"

    def shape(self, parts: list[str]) -> str:
        """A sentence of no known form: the parts in any order, with anything between."""
        body = parts[0]
        for part in parts[1:]:
            body += self.connector() + part
        return body

    def core(self, what: str) -> str:
        """A known form or, where the reader can still tell what is meant, any form."""
        parts = ["{a}" if what in ("statement", "question") else "{x}", "{k}"]
        if what not in ("statement", "question", "code", "variable") or self.rng.random() < 0.6:
            return self.rng.choice(TRAIN["core"][what])
        self.rng.shuffle(parts)
        if what == "statement":
            parts.insert(2 if self.rng.random() < 0.85 else 1, "{v}")
        return self.shape(parts)

    def compose(self, what: str) -> str:
        manner = "question" if what in ASKED else what
        leads, tails = (TRAIN[part].get(manner, [""]) for part in ("lead", "tail"))
        text = self.lead(leads) + self.core(what) + self.tail(tails)
        while "{x}" in text:
            text = text.replace("{x}", self.noise(1), 1)
        return text

    def say(self, what: str, **slots: str) -> str:
        """A sentence with the slots filled."""
        text = self.rng.choice(TEST[what]) if self.split == "test" else self.compose(what)
        number = str(self.rng.randint(1, 9999))
        mark = self.separator()
        verbs = {"is": self.verb(DATA["is"]), "has": self.verb(DATA["has"])}
        text = text.format(**slots, **verbs, sep=mark, n=number)
        plain = what in ("snippet", "assignment") or self.rng.random() < 0.3
        return text if plain else capital(text)

    def distinct(self, draw: Callable[[], str], n: int) -> list[str]:
        seen: dict[str, None] = {}
        for _ in range(20 * n):
            seen[draw()] = None
            if len(seen) == n:
                break
        return list(seen)
