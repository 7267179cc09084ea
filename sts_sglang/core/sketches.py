"""Sketches of the target's keys beside the slots of the KV pool: shorter than keys, and enough to tell which
of them a query wants.

Two kinds: the mean and deviation of a page, and a token's key on few directions. What both add to the ops
that write them is when: a prefill writes the sketches of what it adds and of what lacks one in its prefix; a
verify writes those of what earlier verifies added, for only then is it known which of their tokens were
accepted, and of single tokens those of its own as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

import torch

from sts_kernels import Ops
from sts_kernels.layout import NO_PAGE, PAGE, SKETCHED, Contexts, Directions, KvPool, sketch_bytes
from sts_sglang.core.round import KvPools

SCRATCH = 128 << 20  # bytes that looking for what has no sketch may take: so many requests at a time
BYTES_LOOKED_AT = 20  # a position: its slot twice, what lies there, and whether that is a sketch


class Sketches(Protocol):
    """of_layer: sketches by number of the layers that select by them."""

    of_layer: Mapping[int, torch.Tensor]

    def begin_prefill(self, contexts: Contexts, before: torch.Tensor) -> None:
        """Before the layers of a prefill. before: int [bs], tokens of the prefix. What of it has no sketch is
        written anew, with all behind it: what came in the last verify of another request, or what HiCache
        brought back."""

    def begin_verify(self, contexts: Contexts, most: int, tokens: int) -> None:
        """Before the layers of a verify of so many tokens, at the positions behind the context. most: how
        many of them a round commits."""

    def begin_catch_up(self, contexts: Contexts, most: int) -> None:
        """To write what came since a verify of these requests last did, at most `most` tokens of each, whose
        keys are there. The ops hear of the table's width, as in a prefill: they are compiled for that."""

    def write(self, layer: int, pool: KvPool) -> None:
        """Once the keys of a layer are there."""

    def forget(self, slots: torch.Tensor) -> None:
        """These slots get other occupants than what this object sees written."""

    def nbytes(self) -> int:
        """Of all of it."""


class PageSketches:
    """Mean and deviation of pages: `sts_kernels.torch_ops.tag_pages` says how a page finds its sketch, and
    what happens where requests that share slots part within a page.

    Args:
        ops: the ops in use. layers: their numbers. slots: of the KV pool. kv_heads, head_dim: of the target.
        requests: rows of the table of slots. device: where they live.
        dtype: float16, which has three bits more than bfloat16, or float32.
    """

    def __init__(
        self,
        ops: Ops,
        layers: Iterable[int],
        slots: int,
        kv_heads: int,
        head_dim: int,
        requests: int,
        device: torch.device | str,
        dtype: torch.dtype,
    ):
        self.ops = ops
        shape = (slots, kv_heads, 2 * head_dim // PAGE)
        self.of_layer = {layer: torch.zeros(shape, dtype=dtype, device=device) for layer in layers}
        self.tags = torch.full((slots,), NO_PAGE, dtype=torch.int32, device=device)
        self.sketched = torch.zeros(requests, dtype=torch.int64, device=device)  # tokens of the request
        # Of the running forward: what it completes.
        self._contexts: Contexts | None = None
        self._before: torch.Tensor | None = None
        self._most = 0

    def begin_prefill(self, contexts: Contexts, before: torch.Tensor) -> None:
        """Pages whose place another branch took are written anew too."""
        first = _first(contexts, self._pages_unknown) * PAGE
        # The page in which the prefix ends is completed anyway, or by nobody.
        before = torch.where(first < before // PAGE * PAGE, first, before.long())
        self._begin(contexts, before, contexts.table.shape[1])  # how much is missing no host knows

    def begin_verify(self, contexts: Contexts, most: int, tokens: int) -> None:
        self._begin(contexts, self.sketched[contexts.reqs], most)

    def begin_catch_up(self, contexts: Contexts, most: int) -> None:
        self._begin(contexts, self.sketched[contexts.reqs], contexts.table.shape[1])

    def write(self, layer: int, pool: KvPool) -> None:
        """As they are stored: who reads the sketches multiplies by `pool.k_scale`."""
        self.ops.sketch_pages(
            pool.k, self.of_layer[layer], self._contexts, self._before, self.tags, most=self._most
        )

    def forget(self, slots: torch.Tensor) -> None:
        self.tags.index_fill_(0, slots, NO_PAGE)

    def nbytes(self) -> int:
        return sum(t.nbytes for t in (*self.of_layer.values(), self.tags, self.sketched))

    def _begin(self, contexts: Contexts, before: torch.Tensor, most: int) -> None:
        self._contexts, self._before, self._most = contexts, before, most
        self.ops.tag_pages(contexts, before, self.tags, most=most)
        self.sketched.index_copy_(0, contexts.reqs.long(), contexts.lens.long())

    def _pages_unknown(self, slots: torch.Tensor) -> torch.Tensor:
        slots = slots[:, : slots.shape[1] // PAGE * PAGE].unflatten(1, (-1, PAGE))
        return (self.tags[slots.long()] != slots[..., -1:]).any(2)


class TokenSketches:
    """Keys on few directions, token by token. A sketch lies beside its slot: whoever shares one shares both.

    Args:
        directions: by number of the layers that select by them. The others as of PageSketches.
    """

    def __init__(
        self,
        ops: Ops,
        directions: Mapping[int, Directions],
        slots: int,
        requests: int,
        device: torch.device | str,
    ):
        self.ops, self.directions = ops, directions
        self.of_layer = {
            layer: torch.zeros(
                slots, own.centre.shape[0], own.centre.shape[1] // 2, dtype=torch.int8, device=device
            )
            for layer, own in directions.items()
        }
        self.written = torch.zeros(slots, dtype=torch.bool, device=device)  # alike in all layers
        self.sketched = torch.zeros(requests, dtype=torch.int64, device=device)  # tokens of the request
        # Of the running forward: what it sketches.
        self._contexts: Contexts | None = None
        self._before: torch.Tensor | None = None
        self._most = 0

    def begin_prefill(self, contexts: Contexts, before: torch.Tensor) -> None:
        before = torch.minimum(_first(contexts, self._unwritten), before.long())
        for few in _some(contexts):
            self._mark(few, contexts, before, 0, contexts.table.shape[1])
        self._begin(contexts, before, contexts.table.shape[1])  # how much is missing no host knows

    def begin_verify(self, contexts: Contexts, most: int, tokens: int) -> None:
        """Its own tokens are sketched at once: when a request ends, SGLang may give its slots to another that
        has the same text, in place of slots whose prompt ran already, and nothing would write them anew."""
        before = self.sketched[contexts.reqs]
        self._mark(slice(None), contexts, before, before[:, None], most)
        self._begin(contexts, before, most + tokens, tokens)

    def begin_catch_up(self, contexts: Contexts, most: int) -> None:
        before = self.sketched[contexts.reqs]
        self._mark(slice(None), contexts, before, before[:, None], most)
        self._begin(contexts, before, contexts.table.shape[1])

    def write(self, layer: int, pool: KvPool) -> None:
        """As they are meant, for the steps of directions are of those."""
        self.ops.sketch_tokens(
            pool.k,
            self.of_layer[layer],
            self.directions[layer],
            self._contexts,
            self._before,
            most=self._most,
            k_scale=pool.k_scale,
        )

    def forget(self, slots: torch.Tensor) -> None:
        self.written.index_fill_(0, slots, False)

    def nbytes(self) -> int:
        own = sum(t.nbytes for given in self.directions.values() for t in given)
        return own + sum(t.nbytes for t in (*self.of_layer.values(), self.written, self.sketched))

    def _begin(self, contexts: Contexts, before: torch.Tensor, most: int, tokens: int = 0) -> None:
        self._contexts = contexts._replace(lens=contexts.lens + tokens)
        self._before, self._most = before, most
        self.sketched.index_copy_(0, contexts.reqs.long(), contexts.lens.long())

    def _unwritten(self, slots: torch.Tensor) -> torch.Tensor:
        return ~self.written[slots.long()]

    def _mark(
        self, few: slice, contexts: Contexts, before: torch.Tensor, first: torch.Tensor | int, number: int
    ) -> None:
        """Say of the positions [before, lens) of some requests, which are within `number` from `first` on,
        that they have a sketch. Slot 0, that of padding, is said to have one for all the others."""
        reqs, lens = contexts.reqs[few].long(), contexts.lens[few]
        places = first + torch.arange(number, device=lens.device)
        here = (places >= before[few, None]) & (places < lens[:, None]) & (reqs > 0)[:, None]
        width = contexts.table.shape[1]
        slots = contexts.table[reqs[:, None], places.clamp(max=width - 1)]
        self.written.index_fill_(0, torch.where(here, slots, 0).flatten().long(), True)


def catch_up(sketches: Sketches, contexts: Contexts, most: int, pools: KvPools) -> None:
    """Sketch what was committed since a verify last sketched something of these requests, in all layers:
    at most `most` tokens of each, whose keys are there."""
    most = min(most, contexts.table.shape[1])
    for few in _some(contexts):
        own = contexts._replace(reqs=contexts.reqs[few], lens=contexts.lens[few])
        sketches.begin_catch_up(own, most)
        for layer in sketches.of_layer:
            sketches.write(layer, pools.layer(layer))


def _first(contexts: Contexts, unknown: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """int64 [bs], the first column of what `unknown` says of slots [.., width]: bool [.., n]."""
    found = []
    for few in _some(contexts):
        lacks = unknown(contexts.table[contexts.reqs[few].long()])
        # Behind the last: the table is at least as long as any prefix.
        there = torch.cat([lacks, torch.ones_like(lacks[:, :1])], 1)
        found.append(there.int().argmax(1))
    return torch.cat(found)


def _some(contexts: Contexts) -> list[slice]:
    """Neighbours of a batch whose whole tables are looked at together."""
    bs, step = contexts.lens.numel(), max(1, SCRATCH // (BYTES_LOOKED_AT * contexts.table.shape[1]))
    return [slice(first, min(first + step, bs)) for first in range(0, max(bs, 1), step)]


def page_bytes(layers: int, kv_heads: int, head_dim: int) -> int:
    """Of a token of the KV pool: float16 slices beside the keys of so many layers, and a tag."""
    return layers * kv_heads * (2 * head_dim // PAGE) * 2 + 4


def token_bytes(layers: int, kv_heads: int, head_dim: int) -> int:
    """Of a token of the KV pool: a sketch in so many layers, and whether it is written."""
    return layers * kv_heads * sketch_bytes(head_dim) + 1


def direction_bytes(layers: int, kv_heads: int, head_dim: int, itemsize: int) -> int:
    """Of the directions of so many layers, for keys and for queries, and their centres."""
    number = head_dim // SKETCHED
    return layers * kv_heads * number * (2 * head_dim * itemsize + 4)
