"""The tensors of a round: rows carried between rounds, importance, and the lists verify attends to.

A round has these draft rows per request: the *carried* row (the last accepted token's, from the
previous draft-extend or the prefill; it stands for verify row 0) and one row per draft decode step and
branch, or per branch of the first step alone if the draft is sparse. The last draft token never runs
through the draft, so it has no row; rows are pooled per request because tree nodes cannot be matched to the
branches that ran, and `spread` stands in for rows that are not there.

What is carried is the row's *query*, not its scores: the next round scores it in the read of the keys
that its first draft step makes anyway, and no per-token state outlives a round. Everything is static,
keyed by req_pool_idx or by batch column, and read and written on the device, so that CUDA graphs can
record it. Request slot 0 is SGLang's padding.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from sts_kernels import ALIGN, UNKNOWN, Members
from sts_kernels.reference import SHIFT, context_columns
from sts_sglang.config import StsConfig
from sts_sglang.headmap import HeadMap
from sts_sglang.memory import Sizes


class Selection(NamedTuple):
    """What the requests of a verify batch attend to."""

    kv_start: torch.Tensor  # int64 [bs, channels]
    kv_count: torch.Tensor  # int32 [bs, channels], -1: the whole context

    def whole(self) -> Selection:
        """Everybody attends to everything."""
        return Selection(self.kv_start, torch.full_like(self.kv_count, -1))


class RoundState:
    """Static buffers of one draft-target pair, and the device-side rules that fill them.

    Args:
        config, head_map: what to keep, and the channels.
        requests: request slots (rows of req_to_token); slots: KV slots.
        sizes: of the buffers that follow the KV pool; a request that does not fit attends whole.
        draft_heads, draft_dim: query heads and head size of the draft.
        dtype, device: of the draft's queries.
        importance_dtype: float16, which is all that the kernels take, or float32.
    """

    def __init__(
        self,
        config: StsConfig,
        head_map: HeadMap,
        requests: int,
        slots: int,
        sizes: Sizes,
        draft_heads: int,
        draft_dim: int,
        dtype: torch.dtype,
        device: str,
        importance_dtype: torch.dtype,
    ):
        self.config, self.rule = config, config.rule()
        channels = len(head_map.channels)
        self.members = members_by_layer(head_map, device)
        shape = (len(self.members), requests, draft_heads, draft_dim)  # of the draft layers that speak
        self.carried = torch.zeros(shape, dtype=dtype, device=device)
        self.carried_q = dict(zip(self.members, self.carried, strict=True))
        self.carried_len = torch.zeros(requests, dtype=torch.int64, device=device)
        self.keeps = torch.full((requests,), torch.nan, dtype=torch.float64, device=device)
        columns = -(-sizes.columns // ALIGN) * ALIGN
        self.importance = torch.zeros(channels, columns, dtype=importance_dtype, device=device)
        entries = int(channels * sizes.indices * head_map.list_growth(config.keep))
        self.kv_indices = torch.zeros(entries, dtype=torch.int32, device=device)
        # With a sparse draft: the draft's slots of the same tokens, and the lists of the round's batch,
        # which one graph makes and another one reads.
        self.draft_indices = torch.zeros_like(self.kv_indices) if config.sparse_draft else None
        shared = (requests, channels) if config.sparse_draft else (0, channels)
        self.made = Selection(
            torch.zeros(shared, dtype=torch.int64, device=device),
            torch.full(shared, -1, dtype=torch.int32, device=device),
        )
        self.history = (
            SlotHistory(config, channels, slots, requests, device, importance_dtype)
            if config.history != "off"
            else None
        )
        split = head_map.split()
        self.split = None if split is None else torch.tensor(split, dtype=torch.float64, device=device)
        self.rounds = torch.zeros(requests, dtype=torch.int32, device=device)  # since the prefill
        # sparse verifies, dense verifies, context tokens attended to, context tokens there, full verifies,
        # clipped tokens, context tokens that sparse draft steps attended to, and those there
        self.counts = torch.zeros(8, dtype=torch.int64, device=device)
        self.attended, self.clipped, self.draft_attended = self.counts[2:4], self.counts[5:6], self.counts[6:]
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
        """Note which committed lengths [bs] the carried rows are of."""
        self.carried_len.index_copy_(0, reqs, committed)
        if prefill:
            self.rounds.index_fill_(0, reqs, 0)
            if self.history is not None:
                self.history.fresh_request.index_fill_(0, reqs, True)
            if self.scored is not None:
                self.scored.index_fill_(1, reqs, -1)

    def columns(self, seq_lens: torch.Tensor) -> torch.Tensor:
        """int64 [bs] first column of each request, -1 where its context does not fit."""
        return context_columns(seq_lens, self.importance.shape[1])

    def select(self, ops, reqs, seq_lens: torch.Tensor, table: torch.Tensor) -> Selection:
        """Write the lists of a verify batch; requests whose importance is not known attend whole.

        With another selector than the draft only sizes are set: lists are made layer by layer.
        """
        config = self.config
        sizes = ops.size_lists(
            seq_lens,
            reqs,
            self.carried_len,
            self.keeps,
            self.rule,
            self.split,
            self.importance.shape[0],
            self.importance.shape[1],
            self.kv_indices.numel(),
            self.counts,
            self._full_verifies(reqs),
            # What target layers attend to under `verify: dense` no list says; a sparse draft goes by its own.
            config.verify == "dense" and config.sparse_draft,
        )
        if self.history is not None:
            self.history.blend(ops, self.importance, sizes.known, seq_lens, reqs, table)
        if config.spread and config.selector == "draft":
            ops.spread_importance(self.importance, sizes.sparse, seq_lens, config.spread)
        if self.scored is not None:
            self.scored_round += 1
            rounds = self.scored_round.expand_as(seq_lens)
            self.scored.index_copy_(1, reqs, torch.stack([sizes.known, seq_lens, rounds]))
        if config.selector == "draft":
            ops.select_tokens(
                self.importance,
                sizes.known,
                seq_lens,
                sizes.budgets,
                config.sink,
                config.recent,
                table,
                reqs,
                self.kv_indices,
                sizes.kv_start,
                sizes.kv_count,
                self._top_p(reqs),
                self.draft_indices,
            )
        return Selection(sizes.kv_start, sizes.kv_count)

    def select_early(self, ops, reqs, seq_lens: torch.Tensor, table: torch.Tensor) -> Selection:
        """`select` after the first draft step, for the steps after it and for verify."""
        for made, new in zip(self.made, self.select(ops, reqs, seq_lens, table), strict=True):
            made[: reqs.numel()].copy_(new)
        return self.selected(reqs.numel())

    def selected(self, bs: int) -> Selection:
        """What `select_early` made for this round's batch."""
        return Selection(*(made[:bs] for made in self.made))

    def _top_p(self, reqs: torch.Tensor) -> torch.Tensor | None:
        """float32 [bs], infinite for a request with a keep of its own; None under other policies."""
        if self.config.policy != "top_p":
            return None
        return torch.where(self.keeps[reqs].isnan(), self.config.top_p, torch.inf).float()

    def _full_verifies(self, reqs: torch.Tensor) -> torch.Tensor | None:
        """bool [bs]: who attends to everything this round because the configuration says so; None: nobody."""
        every = self.config.full_verify_every
        if self.config.verify == "dense":
            return torch.ones_like(reqs, dtype=torch.bool)
        if not every:
            return None
        self.rounds[reqs] += 1
        return self.rounds[reqs] % every == 0

    def last_scores(self, req: int, context: int) -> torch.Tensor:
        """[channels, context] of a request's latest round, UNKNOWN where none, on the CPU; waits for the
        device, which needs no room for it."""
        shape = (self.importance.shape[0], context)
        found = torch.full(shape, UNKNOWN, dtype=self.importance.dtype)
        column, scored, round_ = self.scored[:, req].tolist()
        if column >= 0 and round_ == int(self.scored_round):  # else others' scores are there by now
            end = min(scored, context)
            for row, scores in zip(found, self.importance, strict=True):
                row[SHIFT:end] = scores[column + SHIFT : column + end]
        return found

    def nbytes(self) -> dict[str, int]:
        """Bytes by purpose."""
        carried = [self.carried, self.carried_len, self.keeps, self.rounds]
        history = {} if self.history is None else {"history": self.history.nbytes()}
        return {
            **history,
            "importance": self.importance.nbytes,
            "kv_indices": self.kv_indices.nbytes * (1 if self.draft_indices is None else 2),
            "carried_rows": sum(t.nbytes for t in carried),
        }


class SlotHistory:
    """What KV slots remember of the importance their tokens had, by the slot of the *target's* token.

    A slot forgets when the target writes it for a token, so what it remembers is of its present
    occupant, whatever happened in between (eviction, flush, abort, retraction): no hook on the
    allocator is needed. HiCache writes slots without a forward, and says which. Requests with a
    common prefix share its slots, and so what was learned of it.
    """

    def __init__(
        self,
        config: StsConfig,
        channels: int,
        slots: int,
        requests: int,
        device: str,
        dtype: torch.dtype,  # of importance
    ):
        self.config = config
        self.remembered = torch.full((slots, channels), UNKNOWN, dtype=dtype, device=device)
        self.owner = torch.zeros(slots, dtype=torch.int64, device=device)
        self.round = torch.zeros(1, dtype=torch.int64, device=device)
        self.fresh_request = torch.zeros(requests, dtype=torch.bool, device=device)
        self._loaded: list[torch.Tensor] = []

    def forget(self, slots: torch.Tensor) -> None:
        """The target writes these slots now."""
        # index_fill_, here and below: assigning a Python number copies from the host, which no graph holds.
        self.remembered.index_fill_(0, slots, UNKNOWN)

    def loaded(self, slots: torch.Tensor) -> None:
        """HiCache brings KV from the host back into these slots: to be forgotten before the next forward."""
        self._loaded.append(slots)

    def forget_loaded(self) -> None:
        """To be called on the stream of the forwards, before the next one.

        Not when HiCache allocates: a round that is still in flight may hold a request that has finished,
        and lets the slots it no longer owns remember.
        """
        for slots in self._loaded:
            self.forget(slots)
            if slots.is_cuda:  # allocated on the scheduler's stream, and dropped here before it was read
                slots.record_stream(torch.cuda.current_stream())
        self._loaded.clear()

    def blend(self, ops, importance, starts, seq_lens, reqs, table: torch.Tensor) -> None:
        """Mix memory into the importance of a verify batch and remember the batch; starts -1: not known."""
        self.round += 1
        weight = torch.full_like(seq_lens, self.config.history_weight, dtype=torch.float32)
        if self.config.history == "warm":
            weight = weight * self.fresh_request[reqs]
        self.fresh_request.index_fill_(0, reqs, False)
        ops.blend_history(
            importance,
            starts,
            seq_lens,
            table,
            reqs,
            self.remembered,
            self.owner,
            self.round,
            weight,
            self.config.history_decay,
        )

    def nbytes(self) -> int:
        return self.remembered.nbytes + self.owner.nbytes


def members_by_layer(head_map: HeadMap, device: str) -> dict[int, Members]:
    """For every draft layer that speaks, the channels it feeds.

    Layers run in order, so the lowest layer of a channel is the first to feed it.
    """
    fed: dict[int, list[tuple[int, list[int]]]] = {}
    for channel, sources in enumerate(head_map.channels):
        for layer in sorted({layer for layer, _ in sources}):
            heads = [head for source, head in sources if source == layer]
            fed.setdefault(layer, []).append((channel, heads))
    # A channel without sources is fed by none: its row stays zero, and of equal scores the later wins.
    first = [min((layer for layer, _ in sources), default=-1) for sources in head_map.channels]
    members = {}
    for layer, entries in sorted(fed.items()):
        most = max(len(heads) for _, heads in entries)
        channels = [channel for channel, _ in entries]
        members[layer] = Members(
            channels=torch.tensor(channels, dtype=torch.int32, device=device),
            heads=torch.tensor(
                [heads + [-1] * (most - len(heads)) for _, heads in entries], dtype=torch.int32, device=device
            ),
            scale=torch.tensor([1 / len(head_map.channels[c]) for c in channels], device=device),
            fresh=torch.tensor([first[c] == layer for c in channels], device=device),
        )
    return members


NO_MEMBERS = Members(
    torch.empty(0, dtype=torch.int32), torch.empty(0, 1, dtype=torch.int32), torch.empty(0), torch.empty(0)
)
