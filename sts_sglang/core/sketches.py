"""Sketches of the target's keys: their mean and deviation by page, beside the slots of the KV pool.

`sts_kernels.torch_ops.tag_pages` says how a page finds its sketch, and what happens where requests that share
slots part within a page. What this module adds is when: a prefill writes the sketches of the pages that it
completes and of those of its prefix that have none; a verify writes those of the pages that earlier verifies
completed, for only then is it known which of their tokens were accepted.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from sts_kernels import Ops
from sts_kernels.layout import NO_PAGE, PAGE, Contexts

SCRATCH = 128 << 20  # bytes that looking for pages without a sketch may take: so many requests at a time
BYTES_LOOKED_AT = 20  # a position: its slot twice, the tag there, and whether they are the same


class Sketches:
    """Of the layers that select by them.

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
        """Before the layers of a prefill. before: int [bs], tokens of the prefix. Complete pages of it that
        have no sketch are written anew, with all behind them: those that ended in the last verify of another
        request, that HiCache brought back, or whose place another branch took."""
        first = self._first_unknown(contexts)
        # The page in which the prefix ends is completed anyway, or by nobody.
        before = torch.where(first < before // PAGE * PAGE, first, before.long())
        self._begin(contexts, before, contexts.table.shape[1])  # how much is missing no host knows

    def begin_verify(self, contexts: Contexts, most: int) -> None:
        """Before the layers of a verify. most: tokens that a round commits."""
        self._begin(contexts, self.sketched[contexts.reqs], most)

    def write(self, layer: int, keys: torch.Tensor) -> None:
        """Once the keys [slots, H_kv, D] of a layer are there."""
        self.ops.sketch_pages(
            keys, self.of_layer[layer], self._contexts, self._before, self.tags, most=self._most
        )

    def forget(self, slots: torch.Tensor) -> None:
        """These slots get other occupants than what this object sees written."""
        self.tags.index_fill_(0, slots, NO_PAGE)

    def nbytes(self) -> int:
        return sum(t.nbytes for t in (*self.of_layer.values(), self.tags, self.sketched))

    def _begin(self, contexts: Contexts, before: torch.Tensor, most: int) -> None:
        self._contexts, self._before, self._most = contexts, before, most
        self.ops.tag_pages(contexts, before, self.tags, most=most)
        self.sketched.index_copy_(0, contexts.reqs.long(), contexts.lens.long())

    def _first_unknown(self, contexts: Contexts) -> torch.Tensor:
        """int64 [bs], the first position of the first page without a sketch; some requests at a time."""
        (table, reqs, _), found = contexts, []
        pages = table.shape[1] // PAGE
        for few in reqs.long().split(max(1, SCRATCH // (BYTES_LOOKED_AT * table.shape[1]))):
            slots = table[few, : pages * PAGE].unflatten(1, (pages, PAGE))
            unknown = (self.tags[slots.long()] != slots[..., -1:]).any(2)
            # Behind the last page: the table is at least as long as any prefix.
            there = torch.cat([unknown, torch.ones_like(unknown[:, :1])], 1)
            found.append(there.int().argmax(1) * PAGE)
        return torch.cat(found)


def bytes_per_token(layers: int, kv_heads: int, head_dim: int) -> int:
    """Of the KV pool: float16 slices beside the keys of so many layers, and a tag."""
    return layers * kv_heads * (2 * head_dim // PAGE) * 2 + 4
