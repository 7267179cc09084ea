"""Sparse prefill: Triton against its twins (gate), then time, beside FA3 dense and FA3 over the same lists.

A chunk of `new` tokens behind `cached` ones in one layer of an 8B: 8 KV heads of 128 dimensions. `score`,
`list` and `attend` are the three kernels, `layer` all of them; `whole` is `attend` with every block of keys.
`fa3-dense` is what SGLang's backend calls, at page size 1. `fa3-lists` is FA3 over the lists, as the product
calls it (sts_sglang/core/block_attention.py), `fa3-table` the part of it that writes the pages, `fa3-layer`
all of it with `score` and `list`. Rates are of the keys and values that are attended to, each read once a
block of queries.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from benchmarks.harness import (
    DEVICE,
    DTYPE,
    Results,
    Shape,
    compile_ahead,
    compile_only,
    microseconds,
    parser,
    settings,
    tune,
    using,
)
from sts_kernels import ops, prefill
from sts_kernels.layout import KEY_BLOCK, QUERY_BLOCK, WHOLE, Contexts, KvPool, QueryBlocks, blocks_of
from sts_sglang.core.block_attention import Block, ByFa3, Fa3
from sts_sglang.core.sizes import parted
from sts_sglang.core.verifier import TargetShape

KV_HEADS, SAMPLED, SINK, RECENT = 8, 8, 1, 1
FULL = settings(
    {
        "cached": [0, 8192, 32768, 122880],
        "new": [1024, 4096, 8192],
        "keep": [0.125, 0.25, 0.5],
        "group": [4],
        "dim": [128],
    }
)
QUICK = [
    {"cached": cached, "new": new, "keep": 0.25, "group": 4, "dim": 128}
    for cached, new in ((0, 8192), (32768, 8192), (122880, 8192), (122880, 4096))
]
TUNED = [{"cached": 122880, "new": 8192, "keep": 0.25, "group": 4, "dim": 128}]
# Where keys lie is read before they are, and lists before that: Triton keeps one tile more in flight for
# every second, or third, stage beyond the first.
ATTEND_GRID = settings({"tile": [32, 64, 128], "num_warps": [4, 8], "num_stages": [4, 7], "heads": [1, 2]})
SCORE_GRID = settings(
    {
        "score_rows": [128, 256],
        "span": [64, 128],
        "score_warps": [4, 8],
        "score_stages": [3, 5, 7],
        "score_registers": [128, 255],
    }
)
LIST_GRID = settings({"cells": [4096, 8192, 16384], "list_warps": [2, 4, 8]})
TOLERANCE = {"rtol": 1.6e-2, "atol": 8e-3}


@dataclass
class Chunk:
    """A layer of one chunk of a prompt that goes on behind it."""

    q: torch.Tensor
    pool: KvPool
    contexts: Contexts
    blocks: QueryBlocks
    out: torch.Tensor
    scale: float

    @classmethod
    def draw(cls, shape: Shape, device: str = DEVICE) -> Chunk:
        torch.manual_seed(0)
        cached, new, dim = shape["cached"], shape["new"], shape["dim"]
        context = cached + new
        table = (torch.randperm(context, device=device).int() + 1)[None]
        table = torch.cat([torch.zeros_like(table), table])
        k, v = (torch.randn(context + 1, KV_HEADS, dim, dtype=DTYPE, device=device) for _ in range(2))
        firsts = range(0, new, QUERY_BLOCK)
        choices = [(cached + first) // KEY_BLOCK for first in firsts]
        wanted = [max(-int(-shape["keep"] * n // 1), SINK + RECENT) for n in choices]
        counts = [WHOLE if count >= n else count for count, n in zip(wanted, choices, strict=True)]
        numbers = [min(QUERY_BLOCK, new - first) for first in firsts]
        columns = [[0] * len(counts), [*firsts], numbers, [cached + first for first in firsts], counts]
        columns = torch.tensor(columns, dtype=torch.int32, device=device)
        q = torch.randn(new, KV_HEADS * shape["group"], dim, dtype=DTYPE, device=device)
        contexts = Contexts(
            table,
            torch.ones(1, dtype=torch.int64, device=device),
            torch.full((1,), context, device=device),
        )
        blocks = QueryBlocks(*columns, blocks_of(context))
        return cls(q, KvPool(k, v), contexts, blocks, torch.empty_like(q), dim**-0.5)

    def score(self, kernel: str = "triton") -> torch.Tensor:
        return ops(kernel).score_blocks(
            self.q, self.pool, self.contexts, self.blocks, scale=self.scale, sampled=SAMPLED
        )

    def list(self, sums: torch.Tensor, kernel: str = "triton") -> torch.Tensor:
        return ops(kernel).list_blocks(sums, self.blocks, sink=SINK, recent=RECENT)

    def attend(self, listed: torch.Tensor, kernel: str = "triton") -> torch.Tensor:
        ops(kernel).block_attention(
            self.q, self.pool, self.contexts, self.blocks, listed, self.out, scale=self.scale
        )
        return self.out

    def layer(self) -> torch.Tensor:
        return self.attend(self.list(self.score()))

    def some(self, listed: torch.Tensor) -> tuple[Chunk, torch.Tensor]:
        """Of the first, a middle and the last block of queries: the twins take one after the other."""
        last = self.blocks.counts.numel() - 1
        few = torch.tensor(sorted({0, last // 2, last}), device=self.q.device)
        columns = [part[few].contiguous() for part in self.blocks[:5]]
        return replace(self, blocks=QueryBlocks(*columns, self.blocks.most)), listed[few].contiguous()

    def whole(self) -> Chunk:
        counts = torch.full_like(self.blocks.counts, WHOLE)
        return replace(self, blocks=self.blocks._replace(counts=counts))


def same_attention(chunk: Chunk, listed: torch.Tensor, run: Callable[[], torch.Tensor]) -> None:
    few, own = chunk.some(listed)
    found = run().clone()
    expected = few.attend(own, "torch")
    for row, number in zip(few.blocks.rows.tolist(), few.blocks.numbers.tolist(), strict=True):
        rows = slice(row, row + number)
        torch.testing.assert_close(found[rows].float(), expected[rows].float(), **TOLERANCE)


def same_sums(chunk: Chunk) -> None:
    listed = torch.zeros(chunk.blocks.counts.numel(), 1, dtype=torch.int32, device=chunk.q.device)
    few, _ = chunk.some(listed)
    found, expected = few.score(), few.score("torch")
    for i, count in enumerate(few.blocks.counts.tolist()):
        end = blocks_of(int(few.blocks.before[i] + few.blocks.numbers[i]))
        if count != WHOLE:
            torch.testing.assert_close(found[i, :, :end], expected[i, :, :end], rtol=1e-3, atol=1e-3)


def same_lists(chunk: Chunk, sums: torch.Tensor) -> None:
    """But for scores that are equal to the last bits."""
    found, expected = chunk.list(sums), chunk.list(sums, "torch")
    for i, count in enumerate(chunk.blocks.counts.tolist()):
        if count == WHOLE:
            continue
        for own, other in zip(found[i, :, :count].tolist(), expected[i, :, :count].tolist(), strict=True):
            assert len(set(own) & set(other)) >= count - 1 and own == sorted(own), f"block {i}"


# ---- FA3


def fa3_dense(shape: Shape, chunk: Chunk) -> Callable[[], torch.Tensor]:
    """As SGLang's FlashAttentionBackend calls it."""
    from sgl_kernel.flash_attn import flash_attn_with_kvcache

    options = {
        "q": chunk.q,
        "k_cache": chunk.pool.k[:, None],
        "v_cache": chunk.pool.v[:, None],
        "page_table": chunk.contexts.table[1:].contiguous(),
        "cache_seqlens": chunk.contexts.lens.int(),
        "cu_seqlens_q": torch.tensor([0, shape["new"]], dtype=torch.int32, device="cuda"),
        "max_seqlen_q": shape["new"],
        "softmax_scale": chunk.scale,
        "causal": True,
    }
    return lambda: flash_attn_with_kvcache(**options)


@dataclass
class Fa3Lists:
    """FA3 over lists as the product has it (core.block_attention); blocks of queries stand in the order of
    their rows, those that list nothing first.

    parts: places of the blocks that are attended to at a time, and these.
    """

    chunk: Chunk
    attention: ByFa3
    parts: list[tuple[slice, QueryBlocks]]

    @classmethod
    def make(cls, chunk: Chunk, fa3: Fa3 | None = None) -> Fa3Lists:
        if fa3 is None:
            from sgl_kernel.flash_attn import flash_attn_with_kvcache as fa3
        (_, heads, dim), dtype = chunk.q.shape, chunk.q.dtype
        slots, context = chunk.pool.k.shape[0], chunk.contexts.table.shape[1]
        shape = TargetShape(1, 1, heads, KV_HEADS, dim, dtype, dtype, context, 1, 0, slots)
        attention = ByFa3(ops("triton"), fa3, shape, chunk.q.device)
        columns = chunk.blocks[:5]
        blocks = [Block(*own) for own in zip(*(part.tolist() for part in columns), strict=True)]
        number = sum(block.count == WHOLE for block in blocks)
        whole, listed = blocks[:number], blocks[number:]
        few = parted(len(listed), attention.room(listed))
        attention.begin(chunk.contexts, whole, [listed[part] for part in few])
        places = [slice(number + part.start, number + part.stop) for part in few]
        parts = [
            (part, QueryBlocks(*(column[part].contiguous() for column in columns), chunk.blocks.most))
            for part in places
        ]
        return cls(chunk, attention, parts)

    def pages(self, listed: torch.Tensor, kernel: str = "triton") -> list[torch.Tensor]:
        """int32 [H_kv, blocks, width], by part."""
        return [
            ops(kernel).block_slots(
                self.chunk.contexts, blocks, listed[few], width=self.attention.widths[part]
            )
            for part, (few, blocks) in enumerate(self.parts)
        ]

    def attend(self, listed: torch.Tensor) -> torch.Tensor:
        q, pool, out, scale = self.chunk.q, self.chunk.pool, self.chunk.out, self.chunk.scale
        self.attention.attend_whole(q, pool, out, scale=scale)
        for part, (few, blocks) in enumerate(self.parts):
            self.attention.attend(part, blocks, listed[few], q, pool, out, scale=scale)
        return out


def same_pages(chunk: Chunk, lists: Fa3Lists) -> None:
    """FA3's pages are those of the twin, as far as anybody reads them."""
    listed = chunk.list(chunk.score())
    for own, other, (_, blocks) in zip(
        lists.pages(listed), lists.pages(listed, "torch"), lists.parts, strict=True
    ):
        columns = (blocks.before, blocks.numbers, blocks.counts)
        for i, (before, number, count) in enumerate(zip(*(c.tolist() for c in columns), strict=True)):
            length = count * KEY_BLOCK + before % KEY_BLOCK + number
            assert torch.equal(own[:, i, :length], other[:, i, :length]), f"block {i}"


# ---- arms


def attended_bytes(shape: Shape, chunk: Chunk) -> int:
    """Keys and values on the lists."""
    counts = torch.where(chunk.blocks.counts < 0, chunk.blocks.before // KEY_BLOCK, chunk.blocks.counts)
    keys = int(counts.sum()) * KEY_BLOCK + shape["new"] * KEY_BLOCK
    return keys * KV_HEADS * shape["dim"] * 2 * chunk.q.itemsize


def bench(results: Results, shape: Shape) -> None:
    chunk = Chunk.draw(shape)
    nbytes, whole = attended_bytes(shape, chunk), chunk.whole()
    all_bytes = attended_bytes(shape, whole)

    def arm(name: str, gate: Callable[[], None], call: Callable, nbytes: int) -> None:
        if results.gate(name, shape, gate):
            results.add(name, shape, microseconds([call], replays=5), nbytes)

    sums = chunk.score()
    listed = chunk.list(sums)
    arm("score", lambda: same_sums(chunk), chunk.score, all_bytes // 2)
    arm("list", lambda: same_lists(chunk, sums), lambda: chunk.list(sums), sums.nbytes)
    attend = lambda: chunk.attend(listed)  # noqa: E731
    arm("attend", lambda: same_attention(chunk, listed, attend), attend, nbytes)
    arm("layer", lambda: same_attention(chunk, listed, chunk.layer), chunk.layer, nbytes)
    every = lambda: whole.attend(listed)  # noqa: E731
    arm("whole", lambda: same_attention(whole, listed, every), every, all_bytes)
    dense, lists = fa3_dense(shape, chunk), Fa3Lists.make(chunk)
    arm("fa3-dense", lambda: same_attention(whole, listed, dense), dense, all_bytes)
    over = lambda: lists.attend(listed)  # noqa: E731
    arm("fa3-lists", lambda: same_attention(chunk, listed, over), over, nbytes)
    layer = lambda: lists.attend(chunk.list(chunk.score()))  # noqa: E731
    arm("fa3-layer", lambda: same_attention(chunk, listed, layer), layer, nbytes)
    arm("fa3-table", lambda: same_pages(chunk, lists), lambda: lists.pages(listed), nbytes)


def prepare_attend(shape: Shape):
    chunk = Chunk.draw(shape)
    listed = chunk.list(chunk.score())
    attend = lambda: chunk.attend(listed)  # noqa: E731
    return [attend], lambda: same_attention(chunk, listed, attend), attended_bytes(shape, chunk)


def prepare_score(shape: Shape):
    chunk = Chunk.draw(shape)
    return [chunk.score], lambda: same_sums(chunk), attended_bytes(shape, chunk.whole()) // 2


def prepare_list(shape: Shape):
    chunk = Chunk.draw(shape)
    sums = chunk.score()
    return [lambda: chunk.list(sums)], lambda: same_lists(chunk, sums), sums.nbytes


GRIDS = ((ATTEND_GRID, prepare_attend), (SCORE_GRID, prepare_score), (LIST_GRID, prepare_list))


def compile_one(shape: Shape, knobs: dict) -> None:
    """The ops on tensors that are only shapes."""
    with compile_only(), using(prefill, knobs):
        Chunk.draw(shape, device="meta").layer()


def main() -> None:
    args = parser(__doc__).parse_args()
    shapes = TUNED if args.tune else QUICK if args.quick else FULL
    knobs = [knobs for grid, _ in GRIDS for knobs in grid] if args.tune else [{}]
    compile_ahead(compile_one, shapes[:1], knobs)
    results = Results("prefill", args.out)
    for shape in shapes:
        if args.tune:
            for grid, prepare in GRIDS:
                tune(results, prefill, grid, shape, prepare)
        else:
            bench(results, shape)
        torch.cuda.empty_cache()
    results.finish()


if __name__ == "__main__":
    main()
