"""What a selector is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch

from sts_kernels.layout import Contexts, KvPool, Lists, Sizes


class LayerCall(NamedTuple):
    """Attention that one layer of a verify asks for.

    layer: its number. q: [bs, T, H_q, D], queries of the T tokens of the tail. pool: the layer's keys and
    values. tail_mask: bool [bs, T, T], which token of the tail sees which. scale: of the logits.
    """

    layer: int
    q: torch.Tensor
    pool: KvPool
    contexts: Contexts
    tail_mask: torch.Tensor
    scale: float


class Selector(Protocol):
    """Chooses what a verify attends to, at list lengths that `size_lists` has settled.

    ahead: whether `select` makes the lists of all layers, so that a verifier can plan for them; else they are
    made layer by layer.
    """

    ahead: bool

    def admit(self, rows: torch.Tensor, prompts: list[Sequence[int]]) -> None:
        """Rows of the table were given to requests with these prompts."""

    def select(self, sizes: Sizes, contexts: Contexts) -> Lists:
        """Once a round, before its first layer. Recorded by CUDA graphs: no host sync."""

    def of_layer(self, lists: Lists, call: LayerCall) -> tuple[Lists, torch.Tensor]:
        """What a layer attends to, given what `select` answered: lists, and int32 [H_kv], the column of their
        `starts` and `counts` that each KV head goes by."""
