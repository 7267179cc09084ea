"""Selection by pages: a score of their sketches (arXiv 2605.27740) by the queries that a layer has now.

A page's score is q.mean + |q|.deviation of its keys by dimension, what a key one deviation from the mean
towards q would have; what one row of one head wants is enough. To read the sketches of a layer is to read an
eighth of its keys. Alone, whole pages are selected. Joined with the draft's importance, pages have a part of
every list, and the draft's best of the other tokens the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from sts_kernels import Ops
from sts_kernels.layout import (
    ALIGN,
    PAGE,
    UNKNOWN,
    Contexts,
    Count,
    Lists,
    PageSizes,
    Plan,
    Pooling,
    Scores,
    Sizes,
    pages_of,
)
from sts_sglang.config import StsConfig
from sts_sglang.core import sketches
from sts_sglang.core.round import RoundState
from sts_sglang.core.selectors.base import HeadLists, LayerCall, Scored, list_bytes
from sts_sglang.core.selectors.draft import DraftSelector
from sts_sglang.core.sizes import SCRATCH, Capacity, Need, parted
from sts_sglang.core.sketches import PageSketches
from sts_sglang.core.verifier import TargetShape


class Share(NamedTuple):
    """Neighbours of a batch whose pages are scored at once, and how their work is parted."""

    requests: slice
    sizes: PageSizes
    plan: Plan | None


class PageScores:
    """Scores of the pages of one layer after another.

    Args:
        config: sink and recent. ops: the ops in use. sketches: of the target.
        of_target: int32 [layers, H_kv]. capacity: of the buffers of a round. dtype: of importance.
    """

    def __init__(
        self,
        config: StsConfig,
        ops: Ops,
        sketches: PageSketches,
        of_target: torch.Tensor,
        capacity: Capacity,
        dtype: torch.dtype,
    ):
        self.config, self.ops, self.sketches, self.kv_heads = config, ops, sketches, of_target.shape[1]
        columns, kv_heads, device = page_columns(capacity.context), self.kv_heads, of_target.device
        shape = (kv_heads, capacity.requests * columns)
        # One buffer for all layers, unless what they scored is to be told later.
        told = config.inspect_dir is not None and config.selector == "pages"
        layers = sketches.of_layer if told else ()
        self.kept = {layer: torch.zeros(shape, dtype=dtype, device=device) for layer in layers}
        self.scores = torch.zeros(shape if not layers else (0, 0), dtype=dtype, device=device)
        self.starts = torch.arange(capacity.requests, device=device) * columns
        self.columns = columns  # of a request
        self._sizes: PageSizes | None = None  # of the running verify
        self._shares: list[Share] | None = None

    def begin(self, lists: Lists, channels: torch.Tensor, contexts: Contexts) -> PageSizes:
        """How many pages are on lists of these lengths, see `size_pages`."""
        config = self.config
        self._sizes = self.ops.size_pages(
            contexts, self.sketches.tags, lists, channels, sink=config.sink, recent=config.recent
        )
        self._shares = None  # how large they may be, the queries say
        return self._sizes

    def of_layer(self, call: LayerCall) -> tuple[Scores, PageSizes]:
        """Of its own queries; sketches that are due are written first."""
        self.sketches.write(call.layer, call.pool)
        (bs, tokens, q_heads, _), (table, reqs, lens) = call.q.shape, call.contexts
        buffer = self.kept.get(call.layer, self.scores)
        if self._shares is None:
            self._shares = self._shared_out(bs, tokens * q_heads // self.kv_heads)
        for few, sizes, plan in self._shares:
            own = buffer[:, few.start * self.columns : few.stop * self.columns]
            self.ops.score_pages(
                call.q[few],
                self.sketches.of_layer[call.layer],
                Contexts(table, reqs[few], lens[few]),
                sizes,
                Scores(own, self.starts[: few.stop - few.start]),
                scale=call.scale * call.pool.k_scale,  # sketches are of keys as they are stored
                # The pool of the configuration, or of a head map, is what suits the draft's heads.
                pooling=Pooling("max", "max", tokens),
                plan=plan,
            )
        return Scores(buffer[:, : bs * self.columns], self.starts[:bs]), self._sizes

    def _shared_out(self, bs: int, rows: int) -> list[Share]:
        """Alike in all layers of a step: as many requests at a time as there is scratch for."""
        kv_heads = self.kv_heads
        most = at_once(self.columns, kv_heads, rows)
        parts = [(few, self._sizes.some(few)) for few in parted(bs, most)]
        return [Share(few, own, self.ops.plan_pages(own, kv_heads=kv_heads)) for few, own in parts]

    def last(self, layer: int, place: int, pages: int) -> torch.Tensor:
        """float32 [H_kv, pages * PAGE] on the CPU: importance of the tokens of the request at this place of
        the last batch, its page's in equal parts; UNKNOWN where a page has no sketch."""
        start = int(self.starts[place])
        of_pages = self.kept[layer][:, start : start + pages].float().cpu() / PAGE
        return of_pages.nan_to_num(nan=UNKNOWN).repeat_interleave(PAGE, 1)

    def nbytes(self) -> int:
        return self.scores.nbytes + self.starts.nbytes + sum(t.nbytes for t in self.kept.values())


class PagesSelector:
    """Whole pages by their scores alone.

    Args:
        config: what to keep. state: of the round. scores: of the pages. lists: of every (request, KV head).
    """

    def __init__(self, config: StsConfig, state: RoundState, scores: PageScores, lists: HeadLists):
        self.config, self.state, self.scores, self.lists = config, state, scores, lists
        self.channels = lists.channels

    def admit(self, rows: torch.Tensor, prompts: list[Sequence[int]]) -> None:
        """What pages hold needs no prompt."""

    def select(self, sizes: Sizes, contexts: Contexts) -> Lists:
        """Lengths alone: what is on the lists depends on the queries of each layer."""
        return Lists(self.lists.indices, sizes.starts, sizes.counts)

    def begin(self, lists: Lists, contexts: Contexts) -> Lists:
        wanted = self.lists.sized(lists)
        sizes = self.scores.begin(wanted, self.channels, contexts)
        self._count_unknown(wanted, sizes)
        first = self.state.first_columns[: sizes.counts.shape[0]]
        self.state.note_scores(torch.where((sizes.counts >= 0).any(1), first, -1), contexts)
        return wanted._replace(counts=sizes.counts)

    def list_layer(self, lists: Lists, call: LayerCall) -> None:
        scores, sizes = self.scores.of_layer(call)
        self.scores.ops.list_pages(
            scores,
            call.contexts,
            sizes,
            lists,
            self.channels,
            layer=call.layer,
            sink=self.config.sink,
            recent=self.config.recent,
        )

    def scored(self, row: int, slots: torch.Tensor) -> Scored:
        """What pages were worth to every head in the last step; nothing is known of dense layers."""
        layers, kv_heads = self.channels.shape
        found = torch.full((layers, kv_heads, slots.numel()), UNKNOWN)
        if (last := self.state.last_round(row)) is not None:
            pages = min(last.length, slots.numel()) // PAGE
            for layer in self.scores.kept:
                found[layer, :, : pages * PAGE] = self.scores.last(layer, last.place, pages)
        return Scored(found.flatten(0, 1), self.channels.cpu(), "page scores")

    def nbytes(self) -> int:
        return self.scores.nbytes() + self.lists.nbytes()

    def _count_unknown(self, wanted: Lists, sizes: PageSizes) -> None:
        """Requests that attend to everything because too many of their pages have no sketch were counted as
        sparse, by their lengths."""
        dense = ((wanted.counts >= 0) & (sizes.counts < 0)).any(1).sum()
        self.state.totals[Count.SPARSE_VERIFIES] -= dense
        self.state.totals[Count.DENSE_VERIFIES] += dense


class JoinedSelector:
    """Pages have `page_share` of every list, and what the draft attended to most has the rest. Where too few
    pages have a sketch, or their part of a list is too short, the draft has all of it.

    Args:
        drafted: whose importance is joined with the scores. of_target: int32 [layers, H_kv], the channels
            that it has of it. The others as of PagesSelector.
    """

    def __init__(
        self,
        config: StsConfig,
        state: RoundState,
        drafted: DraftSelector,
        scores: PageScores,
        lists: HeadLists,
    ):
        self.config, self.state, self.drafted = config, state, drafted
        self.scores, self.lists, self.channels = scores, lists, lists.channels
        importance = state.importance
        shape = (lists.kv_heads, importance.shape[1])
        self.joined = torch.zeros(shape, dtype=importance.dtype, device=importance.device)
        self._starts: torch.Tensor | None = None  # int64 [bs] of the running verify, as in `Scores`

    def admit(self, rows: torch.Tensor, prompts: list[Sequence[int]]) -> None:
        self.drafted.admit(rows, prompts)

    def select(self, sizes: Sizes, contexts: Contexts) -> Lists:
        if self.config.sparse_draft:  # it attends to its own choice
            return self.drafted.select(sizes, contexts)
        self.drafted.finish_scores(sizes, contexts)
        return Lists(self.state.indices, sizes.starts, sizes.counts)

    def begin(self, lists: Lists, contexts: Contexts) -> Lists:
        counts = lists.counts
        part = (counts * self.config.page_share).to(torch.int32)
        part = lists._replace(counts=torch.where(counts < 0, counts, part))
        self.scores.begin(part, self.drafted.channels, contexts)
        first = self.state.first_columns[: counts.shape[0]]
        self._starts = torch.where((counts >= 0).any(1), first, -1)
        return self.lists.sized(lists)

    def list_layer(self, lists: Lists, call: LayerCall) -> None:
        config, contexts, ops = self.config, call.contexts, self.scores.ops
        scores, sizes = self.scores.of_layer(call)
        drafted = self.state.scores(self._starts)
        joined = self.joined[:, : drafted.importance.shape[1]]
        sink, recent = config.sink, config.recent
        ops.join_pages(
            scores,
            drafted,
            joined,
            contexts,
            sizes,
            self.drafted.channels,
            layer=call.layer,
            sink=sink,
            recent=recent,
        )
        own, longest = self.lists.of_layer(call.layer)
        ops.select_tokens(Scores(joined, drafted.starts), contexts, longest, own, sink=sink, recent=recent)

    def scored(self, row: int, slots: torch.Tensor) -> Scored:
        return self.drafted.scored(row, slots)

    def nbytes(self) -> int:
        return self.scores.nbytes() + self.lists.nbytes() + self.joined.nbytes


def need(config: StsConfig, target: TargetShape, longest: int) -> Need:
    """Of either selector beside the buffers of a round: scores and their logits, lists of pages and of
    tokens, and the sketches."""
    capacity = Capacity.of(target.requests, target.context_len)
    own = page_columns(capacity.context)
    columns = target.requests * own
    rows = target.tokens * target.q_heads // target.kv_heads
    layers = sum(not config.dense_verify(layer) for layer in range(target.layers))
    kept = layers if config.inspect_dir is not None and config.selector == "pages" else 1
    fixed = target.kv_heads * columns * (2 * kept + 4)
    fixed += min(target.requests, at_once(own, target.kv_heads, rows)) * logit_bytes(
        own, target.kv_heads, rows
    )
    fixed += list_bytes(target.kv_heads, target.requests, longest) + sketches.SCRATCH
    if config.selector == "joined":
        fixed += 2 * target.kv_heads * target.requests * capacity.context
    return Need(fixed, sketches.page_bytes(layers, target.kv_heads, target.head_dim))


def logit_bytes(columns: int, kv_heads: int, rows: int) -> int:
    """Of one request, while a layer's pages are scored: a float32 for each of a KV head's query rows."""
    return 4 * kv_heads * columns * rows


def at_once(columns: int, kv_heads: int, rows: int) -> int:
    """Requests whose pages are scored within sizes.SCRATCH bytes, and at least one."""
    return max(1, SCRATCH // logit_bytes(columns, kv_heads, rows))


def page_columns(context: int) -> int:
    """Columns of page scores of a request."""
    return -(-pages_of(context) // ALIGN) * ALIGN
