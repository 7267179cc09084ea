"""What a selector is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch

from sts_kernels.layout import Contexts, KvPool, Lists, Sizes


class LayerCall(NamedTuple):
    """Attention that one layer of a verify asks for.

    layer: its number. q: [bs, T, H_q, D], queries of the T tokens of the tail. pool: the layer's keys and
    values as they are kept, with their scales. tail_mask: bool [bs, T, T], which token of the tail sees
    which. scale: of the logits, without that of the keys.
    """

    layer: int
    q: torch.Tensor
    pool: KvPool
    contexts: Contexts
    tail_mask: torch.Tensor
    scale: float


class Scored(NamedTuple):
    """What the tokens of a request were worth when it was last looked at.

    importance: [channels, L], of IMPORTANCE_SCALE; UNKNOWN where nothing is known. channels: int32 [layers,
    H_kv], its row for every KV head of the target. signal: one of dumps.SIGNALS.
    """

    importance: torch.Tensor
    channels: torch.Tensor
    signal: str


class Selector(Protocol):
    """Chooses what a verify attends to, at list lengths that `size_lists` has settled.

    channels: int32 [layers, H_kv], the column of `starts` and `counts` that each KV head of the target goes
    by, in the lists that `begin` answers.
    """

    channels: torch.Tensor

    def admit(self, rows: torch.Tensor, prompts: list[Sequence[int]]) -> None:
        """Rows of the table were given to requests with these prompts."""

    def select(self, sizes: Sizes, contexts: Contexts) -> Lists:
        """Once a round, by channel of the head map; in a draft step already where the draft goes by it.
        Recorded by CUDA graphs, as what follows is: no host sync."""

    def begin(self, lists: Lists, contexts: Contexts) -> Lists:
        """Before the first layer of a verify, given what `select` answered: where the lists of all layers are
        and how long, so that a verifier can plan for them."""

    def list_layer(self, lists: Lists, call: LayerCall) -> None:
        """Write the entries of a layer's lists, where they are not there yet. Lists of two layers may lie in
        one place: the layer attends before the next one writes."""

    def scored(self, row: int, slots: torch.Tensor) -> Scored:
        """For a dump, on the CPU; waits for the device. row: of a request in the table; slots: int64 [L], of
        its context. Raises ConfigError where there is nothing to tell."""

    def nbytes(self) -> int:
        """Of what it has beside the buffers of a round."""


class HeadLists:
    """Lists of every (request, KV head), which the layers of the target write in turn.

    Args:
        of_target: int32 [layers, H_kv], Channels.of_target: whose list length a KV head takes.
        requests: of the largest batch. entries: of a list at most (Capacity.longest).
    """

    def __init__(self, of_target: torch.Tensor, requests: int, entries: int):
        (self.layers, self.kv_heads), device = of_target.shape, of_target.device
        self.of_target = of_target.flatten().long()
        columns = torch.arange(self.of_target.numel(), dtype=torch.int32, device=device)
        self.channels = columns.view(of_target.shape)
        lists = requests * self.kv_heads
        self.indices = torch.zeros(lists * entries, dtype=torch.int32, device=device)
        self.starts = (torch.arange(lists, device=device) * entries).view(-1, self.kv_heads)
        self._counts: torch.Tensor | None = None  # int32 [layers, bs, H_kv] of the running verify
        self._longest: torch.Tensor | None = None  # int32 [layers, bs]

    def sized(self, lists: Lists) -> Lists:
        """As long as the lists of the heads' channels are."""
        counts = lists.counts.index_select(1, self.of_target)
        bs = counts.shape[0]
        self._counts = counts.view(bs, self.layers, self.kv_heads).transpose(0, 1).contiguous()
        self._longest = self._counts.amax(2)
        return Lists(self.indices, self.starts[:bs].repeat(1, self.layers), counts)

    def of_layer(self, layer: int) -> tuple[Lists, torch.Tensor]:
        """Those of one layer, a column for every KV head, and int32 [bs], the longest of each request."""
        counts = self._counts[layer]
        return Lists(self.indices, self.starts[: counts.shape[0]], counts), self._longest[layer]

    def nbytes(self) -> int:
        return self.indices.nbytes + self.starts.nbytes


def list_bytes(kv_heads: int, requests: int, entries: int) -> int:
    """That HeadLists take."""
    return requests * kv_heads * (4 * entries + 8)
