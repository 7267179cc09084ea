"""Ops of draft-guided sparse attention (STS, arXiv 2605.15508), from scores to attention.

`Ops` is what they are; `ops("torch")` is the reference on any device, `ops("triton")` the kernels. This
package imports torch and triton and never sglang.
"""

from __future__ import annotations

import importlib
from typing import Protocol

import torch

from sts_kernels.layout import (
    Carried,
    Contexts,
    Directions,
    History,
    Kept,
    KeptSizes,
    KvPool,
    Lists,
    Members,
    PagedLists,
    PageSizes,
    Plan,
    Pooling,
    QueryBlocks,
    Room,
    Rule,
    Scores,
    Sizes,
)

__all__ = ["Ops", "ops"]


class Ops(Protocol):
    """The steps of a round in the order they run. `sts_kernels.torch_ops` says what each takes and writes."""

    def score_columns(
        self, contexts: Contexts, keeps: torch.Tensor, rule: Rule, room: Room
    ) -> torch.Tensor: ...

    def draft_attention(
        self,
        q: torch.Tensor | None,
        pool: KvPool,
        contexts: Contexts,
        scores: Scores,
        members: Members,
        carried: Carried,
        *,
        step: int,
        num_steps: int,
        scale: float,
        pooling: Pooling,
        elsewhere: torch.Tensor | None = None,
        plan: Plan | None = None,
    ) -> torch.Tensor | None: ...

    def size_lists(
        self,
        contexts: Contexts,
        carried_lens: torch.Tensor,
        keeps: torch.Tensor,
        rule: Rule,
        room: Room,
        totals: torch.Tensor,
        *,
        split: torch.Tensor | None = None,
        full: torch.Tensor | None = None,
        list_full: bool = False,
    ) -> Sizes: ...

    def size_kept(
        self,
        contexts: Contexts,
        sizes: Sizes,
        kept: Kept,
        room: Room,
        totals: torch.Tensor,
        *,
        every: int,
        percent: int | None = None,
        first_too: bool = False,
    ) -> KeptSizes: ...

    def list_kept(
        self, kept: Kept, contexts: Contexts, lists: Lists, draft_indices: torch.Tensor
    ) -> None: ...

    def keep_selected(self, kept: Kept, contexts: Contexts, found: KeptSizes, lists: Lists) -> None: ...

    def blend_history(
        self, scores: Scores, contexts: Contexts, history: History, weight: torch.Tensor, *, decay: float
    ) -> None: ...

    def spread_importance(self, scores: Scores, lens: torch.Tensor, *, factor: float, over: int) -> None: ...

    def select_tokens(
        self,
        scores: Scores,
        contexts: Contexts,
        budgets: torch.Tensor,
        lists: Lists,
        *,
        sink: int,
        recent: int,
        top_p: torch.Tensor | None = None,
        draft_indices: torch.Tensor | None = None,
    ) -> None: ...

    def plan_lists(
        self, lists: Lists, channels: torch.Tensor, lens: torch.Tensor, *, programs: int, most: int
    ) -> Plan: ...

    def sparse_attention(
        self,
        q: torch.Tensor,
        pool: KvPool,
        lists: Lists,
        channels: torch.Tensor,
        contexts: Contexts,
        tail_mask: torch.Tensor,
        attended: torch.Tensor,
        *,
        scale: float,
        plan: Plan | None = None,
    ) -> torch.Tensor: ...

    def headwise_lists(
        self,
        lists: Lists,
        channels: torch.Tensor,
        contexts: Contexts,
        paged: PagedLists,
        attended: torch.Tensor,
        clipped: torch.Tensor,
        *,
        tokens: int,
        layers: int,
    ) -> None: ...

    def tag_pages(
        self, contexts: Contexts, before: torch.Tensor, tags: torch.Tensor, *, most: int
    ) -> None: ...

    def sketch_pages(
        self,
        keys: torch.Tensor,
        sketches: torch.Tensor,
        contexts: Contexts,
        before: torch.Tensor,
        tags: torch.Tensor,
        *,
        most: int,
    ) -> None: ...

    def size_pages(
        self,
        contexts: Contexts,
        tags: torch.Tensor,
        lists: Lists,
        channels: torch.Tensor,
        *,
        sink: int,
        recent: int,
    ) -> PageSizes: ...

    def score_pages(
        self,
        q: torch.Tensor,
        sketches: torch.Tensor,
        contexts: Contexts,
        sizes: PageSizes,
        scores: Scores,
        *,
        scale: float,
        pooling: Pooling,
        plan: Plan | None = None,
    ) -> None: ...

    def list_pages(
        self,
        scores: Scores,
        contexts: Contexts,
        sizes: PageSizes,
        lists: Lists,
        channels: torch.Tensor,
        *,
        layer: int,
        sink: int,
        recent: int,
    ) -> None: ...

    def join_pages(
        self,
        scores: Scores,
        drafted: Scores,
        joined: torch.Tensor,
        contexts: Contexts,
        sizes: PageSizes,
        channels: torch.Tensor,
        *,
        layer: int,
        sink: int,
        recent: int,
    ) -> None: ...

    def sketch_tokens(
        self,
        keys: torch.Tensor,
        sketches: torch.Tensor,
        directions: Directions,
        contexts: Contexts,
        before: torch.Tensor,
        *,
        most: int,
        k_scale: float = 1.0,
    ) -> None: ...

    def score_tokens(
        self,
        q: torch.Tensor,
        sketches: torch.Tensor,
        directions: Directions,
        contexts: Contexts,
        scores: Scores,
        *,
        scale: float,
        pooling: Pooling,
        plan: Plan | None = None,
    ) -> None: ...

    def list_tokens(
        self, scores: Scores, contexts: Contexts, lists: Lists, *, sink: int, recent: int
    ) -> None: ...

    def score_blocks(
        self,
        q: torch.Tensor,
        pool: KvPool,
        contexts: Contexts,
        blocks: QueryBlocks,
        *,
        scale: float,
        sampled: int,
        shift: int = 0,
    ) -> torch.Tensor: ...

    def pool_blocks(
        self,
        sums: torch.Tensor,
        blocks: QueryBlocks,
        members: Members,
        scores: torch.Tensor,
        *,
        pooling: Pooling,
    ) -> None: ...

    def list_blocks(
        self, sums: torch.Tensor, blocks: QueryBlocks, *, sink: int, recent: int
    ) -> torch.Tensor: ...

    def block_attention(
        self,
        q: torch.Tensor,
        pool: KvPool,
        contexts: Contexts,
        blocks: QueryBlocks,
        listed: torch.Tensor,
        out: torch.Tensor,
        *,
        scale: float,
    ) -> None: ...

    def block_slots(
        self, contexts: Contexts, blocks: QueryBlocks, listed: torch.Tensor, *, width: int
    ) -> torch.Tensor: ...

    def plan_scores(self, contexts: Contexts, *, kv_heads: int) -> Plan | None:
        """`plan_lists` for score_tokens, alike in all layers of a step; None where none is needed."""

    def plan_pages(self, sizes: PageSizes, *, kv_heads: int) -> Plan | None:
        """`plan_lists` for score_pages, alike in all layers of a step; None where none is needed."""

    def plan_attention(
        self, lists: Lists, channels: torch.Tensor, lens: torch.Tensor, *, max_context: int
    ) -> Plan | None:
        """`plan_lists` for sparse_attention in several layers; None where the implementation needs none."""

    def plan_contexts(self, lens: torch.Tensor, pool: KvPool, *, max_context: int) -> Plan | None:
        """The same for draft_attention, alike in all layers of a round."""


def ops(kernel: str) -> Ops:
    """The steps by implementation, "torch" or "triton"; ValueError for another name."""
    if kernel not in ("torch", "triton"):
        raise ValueError(f"kernel must be 'torch' or 'triton', got {kernel!r}")
    return importlib.import_module(f"sts_kernels.{kernel}_ops")
