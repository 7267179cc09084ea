"""What verify could select by instead of the draft, to compare STS with at the same budget.

One rule scores the context of one target layer, from that layer's own queries and keys; everything else
(budget, sink, recent, dense layers, the select op, exact attention over what it chose) is shared with STS:

* `oracle`: the target's own attention probability (softmax over context and tail), pooled over the verify
  rows and over the query heads of a KV head as `pool_rows` and `pool_heads` say (max by default, as for
  the draft). Layers below have attended sparsely already.
* `quest` (arXiv 2406.10774): pages of 16 keys; the bound of q.k over a page is the sum over channels of
  max(q * min, q * max) of its keys. Rows and heads are made comparable by a softmax over pages, then pooled
  as above; whole pages are taken from the top, the last of them cut so that the budget is exact (its later
  tokens stay).
* `recent` (StreamingLLM): all scores are equal, and of equal scores the later position wins.
* `random`: a hash of (prompt, layer, KV head, position), so the same in every round and every run.

Scores become non-negative float16 values for the select kernel; ranks are stored as the n-th float16.
Plain torch over every position that a context may have: slower than STS, but nothing waits for the device,
so that CUDA graphs record it and all selectors are served alike.
"""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sts_kernels import Ops
from sts_kernels.layout import ALIGN, IMPORTANCE_SCALE, PAGE, Contexts, Lists, Scores, Sizes
from sts_sglang.config import StsConfig, not_allowed
from sts_sglang.core.selectors.base import HeadLists, LayerCall, Scored, list_bytes
from sts_sglang.core.sizes import Capacity, Need
from sts_sglang.core.verifier import TargetShape

SCRATCH = 512 << 20  # bytes that scoring a layer may take: so many requests at a time
RANKS = 0x7C00  # finite non-negative float16 values


class Layer(NamedTuple):
    """One target layer in one verify; the context's keys by position, padded to the longest context. Keys are
    in the units that they are kept in, and `scale` makes logits of them."""

    number: int
    q: Tensor  # [bs, T, H_q, D]
    keys: Tensor  # [bs, L, H_kv, D], anything at positions >= lengths[b]
    tail_keys: Tensor  # [bs, T, H_kv, D]
    lengths: Tensor  # int64 [bs]
    tail_mask: Tensor  # bool [bs, T, T]
    scale: float
    seeds: Tensor  # int64 [bs], of the prompts
    pool_rows: str
    pool_heads: str

    @property
    def there(self) -> Tensor:
        """bool [bs, L]: positions of the context, not of the padding."""
        return torch.arange(self.keys.shape[1], device=self.keys.device) < self.lengths[:, None]

    def grouped(self) -> Tensor:
        """float32 queries by KV head: [bs, H_kv, G, T, D]."""
        return self.q.float().unflatten(2, (self.keys.shape[2], -1)).permute(0, 2, 3, 1, 4)


def oracle(layer: Layer) -> Tensor:
    q, keys, tail = layer.grouped(), layer.keys.float(), layer.tail_keys.float()
    context = torch.einsum("bhgtd,blhd->bhgtl", q, keys) * layer.scale
    context = context.masked_fill(~layer.there[:, None, None, None], -torch.inf)
    own = torch.einsum("bhgtd,bshd->bhgts", q, tail) * layer.scale
    own = own.masked_fill(~layer.tail_mask[:, None, None], -torch.inf)
    probs = torch.cat([context, own], -1).softmax(-1)[..., : keys.shape[1]]
    pooled = probs.amax(2) if layer.pool_heads == "max" else probs.mean(2)
    return (pooled.amax(2) if layer.pool_rows == "max" else pooled.mean(2)) * IMPORTANCE_SCALE


def quest(layer: Layer) -> Tensor:
    lows, highs = page_bounds(layer.keys, layer.there)
    q = layer.grouped()
    # max(q * low, q * high) is q * high where q is positive, else q * low.
    bound = torch.einsum("bhgtd,bphd->bhgtp", q.clamp(min=0), highs.float())
    bound = bound + torch.einsum("bhgtd,bphd->bhgtp", q.clamp(max=0), lows.float())
    return _ranks_of_pages(layer, bound)


def _ranks_of_pages(layer: Layer, score: Tensor) -> Tensor:
    """Every token's score from the logits of its page, [bs, H_kv, G, T, pages] before the scale.

    A softmax over pages makes rows and heads comparable, whose logits may lie anywhere.
    """
    empty = ~layer.there[:, ::PAGE][:, None, None, None]
    score = (score * layer.scale).masked_fill(empty, -torch.inf).log_softmax(-1)
    score = score.amax(2) if layer.pool_heads == "max" else score.logsumexp(2)
    score = score.amax(2) if layer.pool_rows == "max" else score.logsumexp(2)
    order = score.argsort(dim=-1, stable=True)
    ranks = torch.empty_like(order).scatter_(
        -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
    )
    return _nth_float(ranks).repeat_interleave(PAGE, -1)[..., : layer.keys.shape[1]]


def page_bounds(keys: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
    """Least and greatest of each channel in each page of [bs, L, H, D]; 0 in pages without a token."""
    spare = -keys.shape[1] % PAGE
    there = torch.nn.functional.pad(there, (0, spare))[:, :, None, None]
    keys = torch.nn.functional.pad(keys, (0, 0, 0, 0, 0, spare))
    empty = ~there.unflatten(1, (-1, PAGE)).any(2)
    low = keys.masked_fill(~there, torch.inf).unflatten(1, (-1, PAGE)).amin(2)
    high = keys.masked_fill(~there, -torch.inf).unflatten(1, (-1, PAGE)).amax(2)
    return low.masked_fill(empty, 0), high.masked_fill(empty, 0)


def recent(layer: Layer) -> Tensor:
    bs, length, kv_heads, _ = layer.keys.shape
    return torch.zeros(bs, kv_heads, length, device=layer.keys.device)


def random(layer: Layer) -> Tensor:
    _, length, kv_heads, _ = layer.keys.shape
    positions = torch.arange(length, device=layer.keys.device)
    heads = torch.arange(kv_heads, device=layer.keys.device) + layer.number * kv_heads
    mixed = _hash(_hash(layer.seeds[:, None, None] + heads[:, None]) + positions)
    return _nth_float(mixed % RANKS)


RULES: dict[str, Callable[[Layer], Tensor]] = {
    "oracle": oracle,
    "quest": quest,
    "recent": recent,
    "random": random,
}


def _nth_float(n: Tensor) -> Tensor:
    """The n-th non-negative float16, as float32: order without rounding."""
    return n.clamp(max=RANKS - 1).to(torch.int16).view(torch.float16).float()


def _hash(x: Tensor) -> Tensor:
    """Mixes the low 32 bits of int64 (the finaliser of MurmurHash3; products wrap)."""
    low = 0xFFFFFFFF
    x = x & low
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & low
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & low
    return x ^ (x >> 16)


def prompt_seed(ids: Sequence[int]) -> int:
    """What `random` knows a request by: the same prompt draws the same tokens in every run."""
    return zlib.crc32(array("q", ids).tobytes())


class LayerSelector:
    """Makes the lists of a verify layer by one of RULES, with buffers of its own.

    Args:
        config: `selector` names the rule. ops: the ops in use.
        lists: of every (request, KV head).
        capacity: of the buffers of a round. requests: rows of the table.
        dtype: of the scores, float16 for the kernels.
        width: positions of every request that are looked at, so that no length is read from the device;
            None: as many as the longest context of a batch has.
    """

    def __init__(
        self,
        config: StsConfig,
        ops: Ops,
        lists: HeadLists,
        capacity: Capacity,
        requests: int,
        dtype: torch.dtype,
        *,
        width: int | None = None,
    ):
        self.config, self.ops, self.rule, self.width = config, ops, RULES[config.selector], width
        self.lists, kv_heads, device = lists, lists.kv_heads, lists.channels.device
        self.channels, self.columns = lists.channels, capacity.requests * capacity.context
        # Behind them, in whole blocks as before, one that takes the scores of what is no context.
        self.scores = torch.zeros(kv_heads, self.columns + ALIGN, dtype=dtype, device=device)
        self.starts = torch.arange(capacity.requests, device=device) * capacity.context
        self.seeds = torch.zeros(requests, dtype=torch.int64, device=device)

    def admit(self, rows: Tensor, prompts: list[Sequence[int]]) -> None:
        if self.config.selector == "random":
            seeds = torch.tensor([prompt_seed(ids) for ids in prompts], dtype=torch.int64)
            self.seeds[rows] = seeds.to(self.seeds.device)

    def select(self, sizes: Sizes, contexts: Contexts) -> Lists:
        """Lengths alone: what is on the lists depends on the queries of each layer."""
        return Lists(self.lists.indices, sizes.starts, sizes.counts)

    def begin(self, lists: Lists, contexts: Contexts) -> Lists:
        return self.lists.sized(lists)

    def list_layer(self, lists: Lists, call: LayerCall) -> None:
        """Waits for the device where there is no `width`."""
        own, longest = self.lists.of_layer(call.layer)
        starts = self.starts[: call.contexts.lens.numel()]
        self._score(call, own.counts, starts)
        self.ops.select_tokens(
            Scores(self.scores, starts),
            call.contexts,
            longest,
            own,
            sink=self.config.sink,
            recent=self.config.recent,
        )

    def scored(self, row: int, slots: Tensor) -> Scored:
        raise not_allowed(
            "sts_config.selector", f"{self.config.selector!r} keeps no scores", "another selector"
        )

    def nbytes(self) -> int:
        return self.lists.nbytes() + self.scores.nbytes + self.starts.nbytes + self.seeds.nbytes

    def _score(self, call: LayerCall, counts: Tensor, starts: Tensor) -> None:
        """Write the scores of every request that has a list, some requests at a time."""
        contexts, q, lens = call.contexts, call.q, call.contexts.lens
        tail = lens[:, None] + torch.arange(q.shape[1], device=q.device)
        width = int(lens.max()) if self.width is None else self.width
        positions = torch.arange(width, device=q.device)
        step = at_once(width, q, call.pool.k.shape[1])
        for few in (slice(first, first + step) for first in range(0, q.shape[0], step)):
            slots = contexts.table[contexts.reqs[few]]
            layer = Layer(
                call.layer,
                q[few],
                # FP8 has no infinity to fill pages up with.
                call.pool.k[slots[:, :width].long()].to(q.dtype),
                call.pool.k[slots.gather(1, tail[few]).long()].to(q.dtype),
                lens[few].long(),
                call.tail_mask[few],
                call.scale * call.pool.k_scale,
                self.seeds[contexts.reqs[few]],
                self.config.pool_rows,
                self.config.pool_heads,
            )
            scored = layer.there & (counts[few] >= 0).any(1, keepdim=True)
            place = torch.where(scored, starts[few, None] + positions, self.columns)
            self.scores[:, place] = self.rule(layer).transpose(0, 1).to(self.scores.dtype)


def at_once(width: int, q: Tensor, kv_heads: int) -> int:
    """Requests whose layer is scored within SCRATCH bytes, and at least one."""
    _, tokens, q_heads, dim = q.shape
    rows = tokens * q_heads // kv_heads
    return max(1, SCRATCH // request_bytes(width, kv_heads, dim, q.itemsize, rows))


def request_bytes(width: int, kv_heads: int, dim: int, itemsize: int, rows: int) -> int:
    """That scoring a layer of one request takes, `rows` being the queries of a KV head.

    A token of a KV head has its key, a float32 copy of it or the bounds' two, and four values a query row.
    """
    return width * kv_heads * (dim * (itemsize + 4) + 16 * rows)


def need(target: TargetShape, longest: int) -> Need:
    """Of a LayerSelector: scores and lists of every request, and what scoring a layer takes."""
    rows = target.tokens * target.q_heads // target.kv_heads
    layer = request_bytes(target.context_len, target.kv_heads, target.head_dim, target.dtype.itemsize, rows)
    scores = 2 * target.kv_heads * (target.requests * target.context_len + ALIGN)
    lists = list_bytes(target.kv_heads, target.requests, longest)
    return Need(scores + lists + max(SCRATCH, layer))
