"""Standing aside: a batch whose contexts are few tokens together is attended to whole, by the dense backend.

To score, list and attend takes a layer some microseconds however short the contexts are, and what a small
batch is spared is less than that.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sts_sglang.config import StsConfig
from sts_sglang.core.request import Request
from sts_sglang.core.verifier import TargetShape

BYTES = 256 << 20  # of keys and values of one layer, up to which a batch stands aside under "auto"


def limit_of(config: StsConfig, target: TargetShape | None, device: str) -> int:
    """`stand_aside` in tokens. target: of this rank; None is enough where nothing is to be worked out."""
    if config.stand_aside != "auto":
        return config.stand_aside
    if device == "cpu" or not config.by_sketches or config.bars_standing_aside() is not None:
        return 0
    return BYTES // (2 * target.kv_heads * target.head_dim * target.kv_dtype.itemsize)


class StandAside:
    """Whether the batch of the running forward stands aside, and whose sketches have to wait for that.

    The host decides, before a forward, by what it knows: prompts, and answers as far as their tokens have
    come back, which under overlapped scheduling are a round behind. CUDA graphs are recorded both ways.

    Args:
        limit: tokens that the contexts of such a batch have at most; 0: no batch is one.
        a_round: tokens that a verify commits at most.
    """

    def __init__(self, limit: int, a_round: int):
        self.limit, self.a_round, self.now = limit, a_round, False
        self._waiting: dict[int | None, int] = {}  # row of the table -> tokens without a sketch at most
        self._due = 0

    @property
    def said(self) -> str:
        """In words, when."""
        return f"up to {self.limit} context tokens in a batch" if self.limit else "never"

    def admit(self, requests: list[Request]) -> None:
        """A prefill writes the sketches of whatever lacks one."""
        for request in requests:
            self._waiting.pop(request.row, None)

    def begin(self, requests: list[Request]) -> None:
        """These are in the next round."""
        self.now = sum(len(request.prompt) + len(request.output) for request in requests) <= self.limit
        for request in requests:
            if self.now:  # what came in the verify before the first such one lacks a sketch as well
                self._waiting[request.row] = self._waiting.get(request.row, self.a_round) + self.a_round
            else:
                self._due = max(self._due, self.release(request.row))

    def waits(self, row: int | None) -> bool:
        """Whether tokens of a request may be without a sketch."""
        return row in self._waiting

    def release(self, row: int | None) -> int:
        """Tokens without a sketch that a request has at most; it is not asked for again."""
        return self._waiting.pop(row, 0)

    def take_due(self) -> int:
        """The same of the batch that has just stopped standing aside, once."""
        due, self._due = self._due, 0
        return due

    @contextmanager
    def recorded(self, aside: bool) -> Iterator[None]:
        """While a CUDA graph is recorded: of batches that stand aside, or of the others."""
        before, self.now = self.now, aside
        try:
            yield
        finally:
            self.now = before
