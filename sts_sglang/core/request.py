"""What a round needs to know of a request, as plain values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Request(NamedTuple):
    """A request of a batch.

    rid: its id, foreign text. row: its row in the table of slots, None once it has none. prompt, output:
    token ids so far. params: its `custom_params`.
    """

    rid: str
    row: int | None
    prompt: Sequence[int]
    output: Sequence[int]
    params: Mapping[str, object] | None


class Finished(NamedTuple):
    """A request that has ended and still owns its slots.

    answer: token ids of it. committed: tokens of prompt and answer that the KV pools hold. cached: prompt
    tokens that a prefix hit brought.
    """

    request: Request
    answer: Sequence[int]
    committed: int
    cached: int

    @property
    def tokens(self) -> list[int]:
        """Prompt and answer, as far as the KV pools hold them."""
        return [*self.request.prompt, *self.answer][: self.committed]
