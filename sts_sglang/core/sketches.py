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

    def begin_prefill(self, contexts: Contexts, before: torch.Tensor, most: int) -> None:
        """Before the layers of a prefill. before: int [bs], tokens of the prefix; most: new tokens of a
        request at most. Pages of the prefix that have no sketch are written anew, with all behind them: those
        that ended in the last verify of another request, that HiCache brought back, or whose place another
        branch took."""
        self._begin(contexts, torch.minimum(before.long(), self._first_unknown(contexts)), most)

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
        """int64 [bs], the first position of the first page without a sketch."""
        table, reqs, _ = contexts
        pages = table.shape[1] // PAGE
        slots = table[reqs.long(), : pages * PAGE].unflatten(1, (pages, PAGE))
        unknown = (self.tags[slots.long()] != slots[..., -1:]).any(2)
        # Behind the last page: the table is at least as long as any prefix.
        there = torch.cat([unknown, torch.ones_like(unknown[:, :1])], 1)
        return there.int().argmax(1) * PAGE


def bytes_per_token(layers: int, kv_heads: int, head_dim: int) -> int:
    """Of the KV pool: float16 slices beside the keys of so many layers, and a tag."""
    return layers * kv_heads * (2 * head_dim // PAGE) * 2 + 4
