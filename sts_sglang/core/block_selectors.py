"""Who says which blocks of keys a block of new tokens attends to in a sparse prefill."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch

from sts_kernels import Ops
from sts_kernels.layout import SHIFT, WHOLE, Contexts, KvPool, Pooling, QueryBlocks, blocks_of
from sts_sglang.config import StsConfig
from sts_sglang.core.channels import Channels
from sts_sglang.core.round import Draft

SAMPLED = 8  # rows of a block of new tokens that ask: evenly spaced, the last among them
LEAST = 2.0**-126  # of a score whose logarithm is taken, the smallest normal float32


class BlockCall(NamedTuple):
    """Attention that one layer of a prefill asks for: its number, [N, H_q, D] queries of the new tokens,
    whose keys and values are in the pool, and the scale of the logits."""

    layer: int
    q: torch.Tensor
    pool: KvPool
    scale: float


class BlockSelector(Protocol):
    """Lists blocks of keys, as many as blocks of queries have settled.

    said: who it is, in words. mark: the same for the prefix cache, as others make other keys and values.
    asks_draft: whether the draft has to read the new tokens before the target does. row_bytes: that it
    holds at a time for a block of queries and one of keys.
    """

    said: str
    mark: str
    asks_draft: bool
    row_bytes: int

    def can_ask(self, number: int) -> bool:
        """Whether the first block of a request's new tokens can ask, which has so many of them."""

    def begin(self, contexts: Contexts, before: torch.Tensor, parts: list[QueryBlocks]) -> None:
        """Before the layers of a forward, and before the draft's. before: int32 [bs], tokens before the new
        ones. parts: that will be asked for, each for itself, in every layer."""

    def listed(self, part: int, call: BlockCall) -> torch.Tensor:
        """int32 [blocks, H_kv, most] (`list_blocks`) of one of them."""

    def listed_first(self, part: int, call: BlockCall) -> torch.Tensor:
        """The same for a draft that is heard while it reads, in the place of `hear`."""

    def hear(self, layer: int, q: torch.Tensor) -> None:
        """[N, H_q, D] queries of the new tokens in a layer of the draft, whose keys are there."""

    def heard(self) -> None:
        """All layers of the draft have run."""

    def end(self) -> None:
        """The forward is over."""


class ByOwnQueries:
    """Every layer asks for itself, of the target or of a draft.

    Args:
        config: what is forced. ops: the ops in use. kv_heads, group: of the model on this rank. model: which.
    """

    mark, asks_draft = "", False

    def __init__(self, config: StsConfig, ops: Ops, kv_heads: int, group: int, model: str = "target"):
        self.ops, self.forced, self.said = ops, forced_blocks(config), f"the {model}'s queries"
        self.row_bytes = 4 * kv_heads * (SAMPLED * group + 1)
        self._contexts: Contexts | None = None
        self._parts: list[QueryBlocks] = []

    def can_ask(self, number: int) -> bool:
        return True

    def begin(self, contexts: Contexts, before: torch.Tensor, parts: list[QueryBlocks]) -> None:
        self._contexts, self._parts = contexts, parts

    def listed(self, part: int, call: BlockCall) -> torch.Tensor:
        blocks, (sink, recent) = self._parts[part], self.forced
        sums = self.ops.score_blocks(
            call.q, call.pool, self._contexts, blocks, scale=call.scale, sampled=SAMPLED
        )
        return self.ops.list_blocks(sums, blocks, sink=sink, recent=recent)

    def listed_first(self, part: int, call: BlockCall) -> torch.Tensor:
        raise RuntimeError("STS: no draft is asked")

    def hear(self, layer: int, q: torch.Tensor) -> None:
        """No draft is asked."""

    def heard(self) -> None:
        """No draft is asked."""

    def end(self) -> None:
        self._contexts, self._parts = None, []


class ByDraft:
    """The draft reads the new tokens first, and what its rows attend to selects for all layers of the target.

    Its row of a token stands a position before the token's own, and so do keys (SHIFT): a block of tokens
    asks with the rows of these tokens, and neither its keys and values nor its lists depend on a later one.
    Of the first new token of a request the row was in the forward before this one.

    A draft that attends to selections itself goes by the same sums, layer by layer: rows of its own numbers
    attend to blocks of keys by its own numbers, for which those a position before them have asked.

    Args:
        config: how to pool, and what is forced. ops: the ops in use. channels: of the head map, fed by the
            draft. draft: its shape and its KV.
    """

    said, mark = "the draft's attention", "draft,"
    asks_draft = True

    def __init__(self, config: StsConfig, ops: Ops, channels: Channels, draft: Draft):
        self.ops, self.forced = ops, forced_blocks(config)
        self.members, self.number, self.draft = channels.members, channels.number, draft
        self.of_target = channels.of_target.long()
        self.pooling = Pooling(config.pool_rows, config.pool_heads, SAMPLED)
        sums = SAMPLED * draft.q_heads + draft.kv_heads
        self.row_bytes = 4 * max(sums, self.number, self.of_target.shape[1])
        self._contexts: Contexts | None = None
        self._parts: list[QueryBlocks] = []
        self._asking: list[QueryBlocks] = []  # the same with the draft's rows
        # Of each part: float32 [blocks, channels, most] while the draft reads, then int32 lists of as many.
        self._scores: list[torch.Tensor] = []
        self._lists: list[torch.Tensor] = []

    def can_ask(self, number: int) -> bool:
        return number > SHIFT

    def begin(self, contexts: Contexts, before: torch.Tensor, parts: list[QueryBlocks]) -> None:
        self._contexts, self._parts, self._lists = contexts, parts, []
        self._asking = [of_draft(blocks, before) for blocks in parts]
        self._scores = [
            torch.zeros(blocks.counts.numel(), self.number, blocks.most, device=blocks.counts.device)
            for blocks in parts
        ]

    def hear(self, layer: int, q: torch.Tensor) -> None:
        for part in range(len(self._asking) if layer in self.members else 0):
            self._ask(part, layer, q)

    def listed_first(self, part: int, call: BlockCall) -> torch.Tensor:
        sink, recent = self.forced
        sums = self._ask(part, call.layer, call.q)
        return self.ops.list_blocks(sums, self._parts[part], sink=sink, recent=recent)

    def _ask(self, part: int, layer: int, q: torch.Tensor) -> torch.Tensor:
        """Sums of a layer (`score_blocks`), which feed the channels that it speaks for."""
        blocks, pool = self._asking[part], self.draft.pools.layer(layer)
        sums = self.ops.score_blocks(
            q, pool, self._contexts, blocks, scale=self.draft.scales[layer], sampled=SAMPLED, shift=SHIFT
        )
        if (members := self.members.get(layer)) is not None:
            self.ops.pool_blocks(sums, blocks, members, self._scores[part], pooling=self.pooling)
        return sums

    def heard(self) -> None:
        sink, recent = self.forced
        for blocks in self._parts:
            # What one row finds in a block of keys has the order of its logarithm.
            sums = self._scores.pop(0).clamp_(min=LEAST).log2_().unsqueeze(-1)
            self._lists.append(self.ops.list_blocks(sums, blocks, sink=sink, recent=recent))

    def listed(self, part: int, call: BlockCall) -> torch.Tensor:
        return self._lists[part].index_select(1, self.of_target[call.layer])

    def end(self) -> None:
        self._contexts, self._parts, self._asking, self._scores, self._lists = None, [], [], [], []


def of_draft(blocks: QueryBlocks, before: torch.Tensor) -> QueryBlocks:
    """The rows that ask for blocks of tokens in the draft's pass over the same tokens; before: int32 [bs],
    tokens before the new ones of a request. The first of these has no row there, so that its block asks
    without it."""
    first = (blocks.before == before[blocks.requests.long()]) & (blocks.counts != WHOLE)
    missing = SHIFT * first.int()
    return blocks._replace(
        rows=blocks.rows - SHIFT + missing, numbers=blocks.numbers - missing, before=blocks.before + missing
    )


def forced_blocks(config: StsConfig) -> tuple[int, int]:
    """Blocks of keys that every list has: the first, and the last before the block of queries."""
    return blocks_of(config.sink), blocks_of(config.recent)
