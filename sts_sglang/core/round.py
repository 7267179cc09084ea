"""The static tensors of a round: rows carried between rounds, importance, and the lists verify attends to.

A round has these draft rows per request: the *carried* row (the last accepted token's, from the
previous draft-extend or the prefill; it stands for verify row 0) and one row per draft decode step and
branch, or per branch of the first step alone if the draft is sparse. The last draft token never runs
through the draft, so it has no row; rows are pooled per request because tree nodes cannot be matched to the
branches that ran, and `spread` stands in for rows that are not there.

What is carried is the row's *query*, not its scores: the next round scores it in the read of the keys
that its first draft step makes anyway, and no per-token state outlives a round. Everything is static,
keyed by row of the table of slots or by batch column, and read and written on the device, so that CUDA
graphs can record it. Row 0 of the table is SGLang's padding.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch

from sts_kernels import Ops
from sts_kernels.layout import (
    SHIFT,
    UNKNOWN,
    WHOLE,
    Carried,
    Contexts,
    Count,
    Kept,
    KvPool,
    Lists,
    Room,
    Scores,
    Sizes,
)
from sts_sglang.config import StsConfig
from sts_sglang.core import sizes
from sts_sglang.core.channels import Channels
from sts_sglang.core.history import SlotHistory
from sts_sglang.core.sizes import Capacity
from sts_sglang.headmap import HeadMap


class KvPools(Protocol):
    """The KV pools of a model."""

    def layer(self, layer: int) -> KvPool: ...


class Cache(NamedTuple):
    """Where the contexts of a batch are, and how large they can be.

    table: int32 [requests, width], the slot of every position of every request. slots: rows of a KV pool.
    capacity: of the buffers of a round.
    """

    table: torch.Tensor
    slots: int
    capacity: Capacity


class Draft(NamedTuple):
    """The draft's pass over a context.

    num_steps, topk: of speculation. q_heads, kv_heads, head_dim, dtype: of the draft's queries. pools: its
    KV. scales: of the logits, by layer.
    """

    num_steps: int
    topk: int
    q_heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    pools: KvPools
    scales: tuple[float, ...]

    @property
    def kv_dtype(self) -> torch.dtype:
        return self.pools.layer(0).k.dtype

    @property
    def slots(self) -> int:
        """Rows of its KV pool's buffers."""
        return self.pools.layer(0).k.shape[0]


class LastRound(NamedTuple):
    """Where the scores of a request stand for a dump: its place in the batch, the first of its columns of
    importance, and the context's length."""

    place: int
    column: int
    length: int


class RoundState:
    """Static buffers of one draft-target pair, and what is written into them between two selections.

    Without a draft a round is one decode step, nothing is carried and no channel has importance: a context is
    known as soon as the step begins.

    Args:
        config, head_map: what to keep, and for whom. channels: of the head map.
        cache: whose contexts these are. draft: shapes of what is carried, None without one.
        device: where the buffers live.
        importance_dtype: float16, which is all that the kernels take, or float32.
    """

    def __init__(
        self,
        config: StsConfig,
        head_map: HeadMap,
        channels: Channels,
        cache: Cache,
        draft: Draft | None,
        device: str,
        importance_dtype: torch.dtype,
    ):
        self.config, self.rule, requests = config, config.rule(), cache.table.shape[0]
        speaking = (0, 0) if draft is None else (draft.q_heads, draft.head_dim)
        shape = (len(channels.members), requests, *speaking)  # of layers that speak
        self.carried = torch.zeros(shape, dtype=None if draft is None else draft.dtype, device=device)
        self.carried_q = dict(zip(channels.members, self.carried, strict=True))
        self.carried_lens = torch.zeros(requests, dtype=torch.int64, device=device)
        self.keeps = torch.full((requests,), torch.nan, dtype=torch.float64, device=device)
        batch, self.room = cache.capacity.requests, cache.capacity.room(config, head_map)
        self.first_columns = torch.arange(batch, device=device) * self.room.columns
        # Without a draft selectors have scores and lists of their own.
        columns, entries = (0, 0) if draft is None else (batch * self.room.columns, batch * self.room.entries)
        self.importance = torch.zeros(channels.number, columns, dtype=importance_dtype, device=device)
        self.indices = torch.zeros(entries, dtype=torch.int32, device=device)
        if draft is not None:
            rows = (1 + draft.topk) * draft.q_heads // draft.kv_heads
            self.at_once = sizes.at_once(self.room.columns, draft.kv_heads, rows)
        # With a sparse draft: the draft's slots of the same tokens, and the lists of the round's batch,
        # which one graph makes and another one reads.
        self.draft_indices = torch.zeros_like(self.indices) if config.sparse_draft else None
        shared = (requests if config.sparse_draft else 0, channels.number)
        self.starts = torch.zeros(shared, dtype=torch.int64, device=device)
        self.counts = torch.full(shared, WHOLE, dtype=torch.int32, device=device)
        self.history = (
            SlotHistory(config, channels.number, cache.slots, requests, device, importance_dtype)
            if config.history != "off"
            else None
        )
        self.kept, self.positions = None, torch.zeros(1, 0, dtype=torch.int32, device=device)
        if config.keeps_selections:
            self.kept = _nothing_kept(requests, self.room, device)
            # The row of a table by which a list of slots is one of positions.
            self.positions = torch.arange(cache.table.shape[1], dtype=torch.int32, device=device)[None]
        split = head_map.split()
        self.split = None if split is None else torch.tensor(split, dtype=torch.float64, device=device)
        self.rounds = torch.zeros(requests, dtype=torch.int32, device=device)  # since the prefill
        self.totals = torch.zeros(len(Count), dtype=torch.int64, device=device)
        self.attended = self.totals[Count.SELECTED_TOKENS : Count.AVAILABLE_TOKENS + 1]
        between = Count.ASIDE_VERIFIES - Count.SPARSE_VERIFIES  # which are counted together
        self.asides = self.totals[Count.SPARSE_VERIFIES :: between][:2]
        self.clipped = self.totals[Count.CLIPPED_TOKENS : Count.CLIPPED_TOKENS + 1]
        self.draft_attended = self.totals[Count.DRAFT_SELECTED_TOKENS : Count.DRAFT_AVAILABLE_TOKENS + 1]
        # For dumps without history: first column, context and round of a request's latest scores.
        dumped = config.inspect_dir is not None and self.history is None
        self.scored = torch.full((3, requests), -1, device=device) if dumped else None
        self.scored_round = torch.zeros(1, dtype=torch.int64, device=device)

    def carry(self, reqs: torch.Tensor, queries: list[torch.Tensor], rows: torch.Tensor | None) -> None:
        """Keep each request's row (`rows` [bs], None: they are in order) of the queries [N, H_q, D] that the
        layers which speak had, all of them at once: a launch costs as much as what it does here."""
        found = torch.stack(queries)
        self.carried.index_copy_(1, reqs, found if rows is None else found.index_select(1, rows))

    def carry_lengths(self, reqs: torch.Tensor, committed: torch.Tensor, prefill: bool) -> None:
        """Note which committed lengths [bs] the carried rows are of or, without a draft, are known."""
        self.carried_lens.index_copy_(0, reqs, committed)
        if prefill:
            self.rounds.index_fill_(0, reqs, 0)
            if self.history is not None:
                self.history.fresh_request.index_fill_(0, reqs, True)
            if self.kept is not None:  # the row has another owner, or its owner other slots
                self.kept.lens.index_fill_(0, reqs, 0)
                self.kept.accepted.index_fill_(0, reqs, 0)
            if self.scored is not None:
                self.scored.index_fill_(1, reqs, -1)

    def carried_of(self, layer: int, first: bool) -> Carried:
        """What a layer scores besides the rows of a pass: its carried ones, in the `first` of a round."""
        return Carried(self.carried_q.get(layer) if first else None, self.carried_lens)

    def size(self, ops: Ops, contexts: Contexts) -> Sizes:
        """Where the lists of a verify batch lie; requests whose importance is not known attend whole."""
        return ops.size_lists(
            contexts,
            self.carried_lens,
            self.keeps,
            self.rule,
            self.room,
            self.totals,
            split=self.split,
            full=self._full_verifies(contexts.reqs),
            # What target layers attend to under `verify: dense` no list says; a sparse draft goes by its own.
            list_full=self.config.verify == "dense" and self.config.sparse_draft,
        )

    def _full_verifies(self, reqs: torch.Tensor) -> torch.Tensor | None:
        """bool [bs]: who attends to everything this round because the configuration says so; None: nobody."""
        every = self.config.full_verify_every
        if self.config.verify == "dense":
            return torch.ones_like(reqs, dtype=torch.bool)
        if not every:
            return None
        self.rounds[reqs] += 1
        return self.rounds[reqs] % every == 0

    def count_aside(self, contexts: Contexts, heads: int) -> None:
        """A round that stands aside: everybody attends to everything, by choice. heads: (layer, KV head)
        pairs whose tokens are counted here, since no op of ours attends."""
        real = contexts.reqs > 0
        self.asides.add_(real.sum())
        if heads:
            self.attended.add_((contexts.lens * real).sum(), alpha=heads)

    def note_scores(self, known: torch.Tensor, contexts: Contexts) -> None:
        """For dumps: where the scores of this round stand."""
        if self.scored is not None:
            self.scored_round += 1
            rounds = self.scored_round.expand_as(contexts.lens)
            self.scored.index_copy_(1, contexts.reqs, torch.stack([known, contexts.lens, rounds]))

    def keep_lists(self, lists: Lists) -> None:
        """Let the passes of this round that run in other graphs find its lists."""
        self.starts[: lists.starts.shape[0]].copy_(lists.starts)
        self.counts[: lists.counts.shape[0]].copy_(lists.counts)

    def kept_lists(self, bs: int) -> Lists:
        """Those lists of this round's batch, which `keep_lists` or `Refresh.select` writes."""
        return Lists(self.indices, self.starts[:bs], self.counts[:bs])

    def last_round(self, row: int) -> LastRound | None:
        """Of a request; None once others' scores are there. Waits for the device."""
        column, length, round_ = self.scored[:, row].tolist()
        if column < 0 or round_ != int(self.scored_round):
            return None
        return LastRound(column // self.room.columns, column, length)

    def last_scores(self, row: int, context: int) -> torch.Tensor:
        """[channels, context] of a request's latest round, UNKNOWN where none, on the CPU; waits for the
        device, which needs no room for it."""
        shape = (self.importance.shape[0], context)
        found = torch.full(shape, UNKNOWN, dtype=self.importance.dtype)
        if (last := self.last_round(row)) is not None:
            end = min(last.length, context)
            for own, scores in zip(found, self.importance, strict=True):
                own[SHIFT:end] = scores[last.column + SHIFT : last.column + end]
        return found

    def scores(self, starts: torch.Tensor) -> Scores:
        """Importance of a batch, where the columns of each request start there (-1: it has none)."""
        return Scores(self.importance[:, : starts.numel() * self.room.columns], starts)

    def score_columns(self, ops: Ops, contexts: Contexts) -> torch.Tensor:
        """int64 [bs]: where the importance of a batch goes that is alone in the buffer, -1 for who attends to
        everything whatever it is. Slots remember it all the same, and dumps tell it."""
        if self.history is not None or self.scored is not None:
            return self.first_columns[: contexts.lens.numel()]
        return ops.score_columns(contexts, self.keeps, self.rule, self.room)

    def scores_of(self, few: slice, starts: torch.Tensor) -> Scores:
        """Importance of some neighbours of a batch as if they were one, at their `score_columns`."""
        columns = slice(few.start * self.room.columns, few.stop * self.room.columns)
        return Scores(self.importance[:, columns], starts)

    def nbytes(self) -> dict[str, int]:
        """Bytes by purpose."""
        carried = [self.carried, self.carried_lens, self.keeps, self.rounds]
        history = {} if self.history is None else {"history": self.history.nbytes()}
        kept = (
            {}
            if self.kept is None
            else {"kept_selections": sum(t.nbytes for t in (*self.kept, self.positions))}
        )
        return {
            **history,
            **kept,
            "importance": self.importance.nbytes,
            "kv_indices": self.indices.nbytes * (1 if self.draft_indices is None else 2),
            "carried_rows": sum(t.nbytes for t in carried),
        }


def _nothing_kept(requests: int, room: Room, device: str) -> Kept:
    """Of so many rows of the table."""

    def zeros(*size: int) -> torch.Tensor:
        return torch.zeros(requests, *size, dtype=torch.int64, device=device)

    return Kept(
        positions=torch.zeros(requests * room.entries, dtype=torch.int32, device=device),
        starts=zeros(room.channels),
        counts=torch.full((requests, room.channels), WHOLE, dtype=torch.int32, device=device),
        lens=zeros(),
        rounds=zeros(),
        last=zeros(),
        accepted=zeros(4),
    )
