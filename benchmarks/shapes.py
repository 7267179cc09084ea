"""Batches to measure: how many requests, and how long the context of each is.

CONTEXTxREQUESTS, as 32000x8, is of equal contexts. mixed:SHORTEST-LONGESTxREQUESTS, as mixed:2000-64000x16,
is of contexts from the shortest to the longest, each the same factor longer than the one before: half of
them are then shorter than the geometric mean, as a server's requests are.
"""

from __future__ import annotations

import re
from typing import NamedTuple

WORD = re.compile(r"(?:mixed:(\d+)-)?(\d+)x(\d+)")


class Shape(NamedTuple):
    """A batch. context: tokens of the longest context. shortest: None where all are as long."""

    context: int
    requests: int
    shortest: int | None = None

    @classmethod
    def parse(cls, word: str) -> Shape:
        """Raises ValueError for a word that is no shape, or names a mixture of fewer than two lengths."""
        found = WORD.fullmatch(word.strip())
        if found is None:
            raise ValueError(f"{word!r} is no CONTEXTxREQUESTS and no mixed:SHORTEST-LONGESTxREQUESTS")
        shortest, context, requests = (n and int(n) for n in found.groups())
        if not context or not requests or (shortest is not None and not (shortest and requests > 1)):
            raise ValueError(f"{word!r}: lengths and requests are above 0, and a mixture has two at least")
        if shortest is not None and shortest >= context:
            raise ValueError(f"{word!r}: the shortest context is not below the longest")
        return cls(context, requests, shortest)

    def lengths(self) -> list[int]:
        """Of the contexts, the longest first."""
        if self.shortest is None:
            return [self.context] * self.requests
        factor = self.shortest / self.context
        return [round(self.context * factor ** (i / (self.requests - 1))) for i in range(self.requests)]

    def fields(self) -> dict[str, int]:
        """What a row says of it."""
        own = {"context": self.context, "requests": self.requests}
        return own if self.shortest is None else {**own, "shortest": self.shortest}

    @classmethod
    def of(cls, row: dict) -> Shape:
        """The one that `fields` told."""
        return cls(row["context"], row["requests"], row.get("shortest"))

    def __str__(self) -> str:
        """As `parse` takes it."""
        mixed = "" if self.shortest is None else f"mixed:{self.shortest}-"
        return f"{mixed}{self.context}x{self.requests}"

    def shown(self) -> str:
        """For a table."""
        mixed = "" if self.shortest is None else f"{self.shortest:,} to "
        return f"{mixed}{self.context:,} x {self.requests}"
