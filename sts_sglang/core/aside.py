"""Standing aside: a batch whose contexts are few tokens together is attended to whole, by the dense backend.

To score, list and attend takes a layer some microseconds however short the contexts are, and what a small
batch is spared is less than that.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

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
        self._waiting: dict[int | None, int] = {}  # row of the table -> its tokens when it began to wait
        self._due = 0
        self._forwarded: torch.cuda.Event | None = None

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
        known = {request.row: len(request.prompt) + len(request.output) for request in requests}
        self.now = sum(known.values()) <= self.limit
        for row, tokens in known.items():
            if self.now:
                self._waiting.setdefault(row, tokens)
            else:
                self._due = max(self._due, self.release(row, tokens))

    def waits(self, row: int | None) -> bool:
        """Whether tokens of a request may be without a sketch."""
        return row in self._waiting

    def release(self, row: int | None, tokens: int) -> int:
        """Of its `tokens`, how many a request has without a sketch at most; it is not asked for again.

        Beside those that came meanwhile: of the verify before the first such round, and of as many rounds as
        the host is behind, when it begins and when it ends.
        """
        began = self._waiting.pop(row, None)
        return 0 if began is None else tokens - began + 3 * self.a_round

    def take_due(self) -> int:
        """The same of the batch that has just stopped standing aside, once."""
        due, self._due = self._due, 0
        return due

    def forwarded(self) -> None:
        """A forward of a batch that stands aside is on its way on the current stream."""
        if torch.cuda.is_available():
            self._forwarded = torch.cuda.Event()
            self._forwarded.record()

    def await_forward(self) -> None:
        """Let the current stream go on behind it: SGLang counts a token as committed when its forward is
        launched, and lets its own stream go on before that has written the key."""
        if self._forwarded is not None:
            torch.cuda.current_stream().wait_event(self._forwarded)

    @contextmanager
    def recorded(self, aside: bool) -> Iterator[None]:
        """While a CUDA graph is recorded: of batches that stand aside, or of the others."""
        before, self.now = self.now, aside
        try:
            yield
        finally:
            self.now = before
