"""Prefill of long prompts that attends to selected blocks of keys.

A block of new tokens asks for itself: some of its rows, the target's own or the draft's
(core.block_selectors), are multiplied with all keys before them, which says how much of their attention each
block of keys has, and all its rows attend to the best. So nothing but the tokens of its own block and before
it decides what a token's keys and values become, and they can be shared like any prefix, among requests that
are prefilled alike. A draft may be prefilled so too, by itself or, where it reads first, with what it is
asked for the target; what the last row of a chunk of its attends to may then depend on who else is in the
batch (views.last_rows_of), and so its keys behind.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import torch

from sts_kernels.layout import KEY_BLOCK, QUERY_BLOCK, WHOLE, Contexts, QueryBlocks, blocks_of
from sts_sglang.config import CEIL_GUARD, ConfigError, StsConfig, quoted, request_prefill
from sts_sglang.core.block_attention import Block, BlockAttention, columns
from sts_sglang.core.block_selectors import BlockCall, BlockSelector, forced_blocks
from sts_sglang.core.request import Request
from sts_sglang.core.sizes import Need, parted

logger = logging.getLogger(__name__)

SCRATCH = 128 << 20  # bytes of what they found, and of lists: so many blocks of new tokens at a time


class _Asked(NamedTuple):
    """Of a request: its share of blocks of keys, None for a dense prefill, and the tokens of its prompt."""

    keep: float | None
    tokens: int


class Reader(NamedTuple):
    """A model whose new tokens attend to selections.

    attention: to these. layers: that do. kv_heads: of a layer on this rank. counts: int64 [2], blocks of keys
    attended to and those there are added.
    """

    attention: BlockAttention
    layers: frozenset[int]
    kv_heads: int
    counts: torch.Tensor

    def count(self, attended: int, there: int) -> None:
        """Blocks of keys, of a KV head."""
        heads = len(self.layers) * self.kv_heads
        for count, number in zip(self.counts.unbind(), (attended, there), strict=True):
            count.add_(number * heads)


class SparsePrefill:
    """The prefills of one model, a forward at a time.

    Args:
        config: with prefill 'sparse'. selector: who says what is attended to. reader: the model. device:
            where it runs. first: a draft that reads the same tokens first, and attends sparsely itself.
    """

    def __init__(
        self,
        config: StsConfig,
        selector: BlockSelector,
        reader: Reader,
        device: str,
        first: Reader | None = None,
    ):
        self.config, self.selector, self.device = config, selector, device
        self.reader, self.first = reader, first
        self._readers = [reader] if first is None else [reader, first]
        self._forced = sum(forced_blocks(config))
        self._asked: list[_Asked] = []
        # Of the running forward, none where it is dense.
        self._parts: list[QueryBlocks] = []
        self._rows = 0
        self._listening = self._heard = False  # whether the draft reads, or has read, its new tokens

    def keep_of(self, params: Mapping[str, object] | None, rid: str | None = None) -> float | None:
        """What a request's prompt attends to (`request_prefill`), None for everything; the server's where it
        asks for nonsense, and the log says so if there is an id to name."""
        try:
            keep = request_prefill(params, self.config)
        except ConfigError as error:
            # The tokenizer manager answers 400 to these; see core.runtime.keep_of.
            if rid is not None:
                logger.warning("STS: request %s prefilled as the server does: %s", quoted(rid), error)
            keep = self.config.prefill_keep
        return None if keep == 1 else keep

    def mark(self, params: Mapping[str, object] | None) -> str:
        """Requests of different marks may not share a prefix: its keys and values would be others. Empty for
        a dense prefill."""
        keep = self.keep_of(params)
        return "" if keep is None else f"sts_prefill_keep={self.selector.mark}{keep}|"

    def admit(self, requests: list[Request]) -> None:
        """The requests of the next forward. One that was retracted is prefilled with what it has answered."""
        self._asked = [_Asked(self.keep_of(r.params, r.rid), len(r.prompt) + len(r.output)) for r in requests]

    def begin(self, contexts: Contexts, before: list[int], numbers: list[int]) -> None:
        """Before the layers of a forward, unless the draft has read its tokens. before, numbers: of each
        request, tokens before its new ones, and these."""
        if not self._heard:
            self._begin(contexts, before, numbers)

    def ask_draft(self, contexts: Contexts, before: list[int], numbers: list[int]) -> bool:
        """The same before the draft reads, which it has to before the target if this says so."""
        self._begin(contexts, before, numbers)
        self._heard = True
        return bool(self._parts)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """While the draft reads."""
        self._listening = True
        try:
            yield
        finally:
            self._listening = False
        self.selector.heard()

    @property
    def listens(self) -> bool:
        return self._listening

    def hear(self, layer: int, q: torch.Tensor) -> None:
        """[N, H_q, D]: queries of the new tokens in a layer of a dense draft, whose keys are in its pool."""
        self._check_rows(q)
        self.selector.hear(layer, q)

    def attend_first(self, call: BlockCall) -> torch.Tensor:
        """[N, H_q, D]: attention of a layer of the draft that reads first, which is heard with that."""
        return self._attend(self.first, self.selector.listed_first, call)

    def end(self) -> None:
        """After the target's forward, where the draft has been asked."""
        self._heard, self._parts = False, []
        self.selector.end()

    def _begin(self, contexts: Contexts, before: list[int], numbers: list[int]) -> None:
        blocks = []
        if len(before) == len(self._asked):  # else SGLang tries a forward, of nobody
            row = 0
            for request, (asked, first, number) in enumerate(zip(self._asked, before, numbers, strict=True)):
                blocks += self._blocks(request, row, asked, first, number)
                row += number
        self._rows, self._parts = sum(numbers), []
        self._count(blocks)
        whole = [block for block in blocks if block.count == WHOLE]
        listed = [block for block in blocks if block.count != WHOLE]
        if not listed:
            return
        most = max(blocks_of(block.end) for block in listed)
        rooms = [reader.attention.room(listed) for reader in self._readers]
        at_once = max(1, min(SCRATCH // (self.selector.row_bytes * most), *rooms))
        parts = [listed[few] for few in parted(len(listed), at_once)]
        for reader in self._readers:
            reader.attention.begin(contexts, whole, parts)
        self._parts = [columns(part, self.device) for part in parts]
        cached = torch.tensor(before, dtype=torch.int32).to(self.device, non_blocking=True)
        self.selector.begin(contexts, cached, self._parts)

    def attends(self, layer: int) -> bool:
        """Whether this forward attends to a selection in a layer."""
        return bool(self._parts) and layer in self.reader.layers

    def attend(self, call: BlockCall) -> torch.Tensor:
        """[N, H_q, D]: attention of the new tokens' queries, whose keys and values are in the pool."""
        return self._attend(self.reader, self.selector.listed, call)

    def _attend(
        self, reader: Reader, listing: Callable[[int, BlockCall], torch.Tensor], call: BlockCall
    ) -> torch.Tensor:
        self._check_rows(call.q)
        out = torch.empty(call.q.shape, dtype=call.q.dtype, device=call.q.device)
        reader.attention.attend_whole(call.q, call.pool, out, scale=call.scale)
        for part, blocks in enumerate(self._parts):
            listed = listing(part, call)
            reader.attention.attend(part, blocks, listed, call.q, call.pool, out, scale=call.scale)
        return out

    def _check_rows(self, q: torch.Tensor) -> None:
        if q.shape[0] != self._rows:
            raise RuntimeError(f"STS: {q.shape[0]} queries of a prefill of {self._rows} tokens")

    def _blocks(self, request: int, row: int, asked: _Asked, before: int, number: int) -> Iterator[Block]:
        """The new tokens of a request in blocks that begin where those of the whole prompt would, so that it
        hardly matters how a prompt is cut into chunks."""
        first, end = before, before + number
        while first < end:
            last = min((first // QUERY_BLOCK + 1) * QUERY_BLOCK, end)
            asks = first > before or self.selector.can_ask(last - first)
            count = self._selects(asked, first, last) if asks else WHOLE
            yield Block(request, row + first - before, last - first, first, count)
            first = last

    def _selects(self, asked: _Asked, first: int, last: int) -> int:
        """Blocks of keys that the tokens [first, last) select, or WHOLE."""
        choices = first // KEY_BLOCK
        if asked.keep is None or last <= self.config.prefill_floor or last >= asked.tokens:
            return WHOLE
        count = max(math.ceil(asked.keep * choices - CEIL_GUARD), self._forced)
        return WHOLE if count >= choices else count

    def _count(self, blocks: list[Block]) -> None:
        """On the host alone, which knows how long lists are; of requests that are prefilled sparsely."""
        sparse = [block for block in blocks if self._asked[block.request].keep is not None]
        if not sparse:
            return
        attended = sum(block.choices if block.count == WHOLE else block.count for block in sparse)
        for reader in self._readers:
            reader.count(attended, sum(block.choices for block in sparse))


class DraftPrefill(Protocol):
    """The prefills of a draft that attends to selections: a `SparsePrefill` of its own, or `ReadsFirst`.

    reader: the draft.
    """

    reader: Reader

    def admit(self, requests: list[Request]) -> None:
        """The requests of the next forward."""

    def begin(self, contexts: Contexts, before: list[int], numbers: list[int]) -> None:
        """Before the layers of a forward (`SparsePrefill.begin`)."""

    def attends(self, layer: int) -> bool:
        """Whether this forward attends to a selection in a layer of the draft."""

    def attend(self, call: BlockCall) -> torch.Tensor:
        """[N, H_q, D]: attention of the new tokens' queries, whose keys and values are in the pool."""


class ReadsFirst:
    """Of a draft that reads before its target does: what it is asked for that selects for its own layers too.
    Nothing else does: its row of a last token, which runs again, attends to everything.

    Args:
        prefill: the target's, which has `first`.
    """

    def __init__(self, prefill: SparsePrefill):
        self.prefill, self.reader = prefill, prefill.first

    def admit(self, requests: list[Request]) -> None:
        """The target's has admitted them."""

    def begin(self, contexts: Contexts, before: list[int], numbers: list[int]) -> None:
        """The target's has begun."""

    def attends(self, layer: int) -> bool:
        return self.prefill.listens

    def attend(self, call: BlockCall) -> torch.Tensor:
        return self.prefill.attend_first(call)


def need(config: StsConfig, channels: int, tokens: int, requests: int, context: int) -> Need:
    """What a sparse prefill takes besides what a dense one does.

    Args:
        channels: of the head map. tokens, requests: of the largest forward. context: the longest.
    """
    if config.prefill == "dense":
        return Need()
    if config.prefill_selector == "target":
        return Need(SCRATCH)
    # What the draft says of all layers is there before the target's first. A request has no more blocks than
    # its tokens fill, and one at each end.
    blocks = tokens // QUERY_BLOCK + 2 * min(requests, tokens)
    return Need(SCRATCH + 4 * blocks * channels * blocks_of(context))
