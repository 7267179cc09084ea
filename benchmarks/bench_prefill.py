"""Sparse prefill: Triton against its twins (gate), then time, beside FA3 dense and FA3 over the same lists.

A chunk of `new` tokens behind `cached` ones in one layer of an 8B: 8 KV heads of 128 dimensions. `score`,
`list` and `attend` are the three kernels, `layer` all of them; `whole` is `attend` with every block of keys.
`fa3-dense` is what SGLang's backend calls, at page size 1. `fa3-lists` is FA3 as the sparse kernel: every
(block of queries, KV head) is a request whose pages are the slots of its list, of KV seen as
[slots * H_kv, 1, 1, D]. `fa3-table` is the part of it that writes the pages, `fa3-layer` all of it with
`score` and `list`. Rates are of the keys and values that are attended to, each read once a block of queries.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl

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
ATTEND_GRID = settings({"tile": [64, 128], "num_warps": [4, 8], "num_stages": [2, 3, 4], "heads": [1, 2]})
SCORE_GRID = settings(
    {"score_rows": [64, 128, 256], "span": [32, 64, 128], "score_warps": [4, 8], "score_stages": [2, 3, 4]}
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


@triton.jit
def _pages_kernel(
    pages_ptr,  # int32 [H_kv, blocks, width], written
    listed_ptr,  # int32 [blocks, H_kv, most]
    before_ptr,
    number_ptr,
    count_ptr,
    slot_ptr,
    most,
    width,
    KEYS: tl.constexpr,
):
    h, block, i = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    heads = tl.num_programs(0)
    before, count = tl.load(before_ptr + block), tl.load(count_ptr + block)
    choices = before // KEYS
    total = tl.where(count < 0, choices, count)
    end = before + tl.load(number_ptr + block)
    pair = block.to(tl.int64) * heads + h
    j = tl.load(listed_ptr + pair * most + i, mask=(count >= 0) & (i < total), other=0)
    j = tl.where(i < total, tl.where(count < 0, i, j), choices + i - total)
    offs = j * KEYS + tl.arange(0, KEYS)
    slots = tl.load(slot_ptr + offs, mask=offs < end, other=0)
    to_ptr = pages_ptr + (h.to(tl.int64) * tl.num_programs(1) + block) * width + i * KEYS
    tl.store(to_ptr + tl.arange(0, KEYS), slots * heads + h, mask=offs < end)


@dataclass
class Fa3Lists:
    """FA3 over lists; blocks of queries stand in the order of their rows."""

    chunk: Chunk
    width: int
    options: dict

    @classmethod
    def make(cls, chunk: Chunk) -> Fa3Lists:
        _, _, numbers, before, counts, _ = chunk.blocks
        own = before + numbers - before // KEY_BLOCK * KEY_BLOCK
        lens = torch.where(counts < 0, before // KEY_BLOCK, counts) * KEY_BLOCK + own
        rows = torch.cat([torch.zeros(1, device=numbers.device), numbers.repeat(KV_HEADS)])
        flat = [pool.view(-1, 1, 1, pool.shape[2]) for pool in (chunk.pool.k, chunk.pool.v)]
        options = {
            "k_cache": flat[0],
            "v_cache": flat[1],
            "cache_seqlens": lens.repeat(KV_HEADS).int(),
            "cu_seqlens_q": rows.cumsum(0).int(),
            "max_seqlen_q": QUERY_BLOCK,
            "softmax_scale": chunk.scale,
            "causal": True,
        }
        return cls(chunk, blocks_of(int(lens.max())) * KEY_BLOCK, options)

    def pages(self, listed: torch.Tensor) -> torch.Tensor:
        blocks, number = self.chunk.blocks, self.chunk.blocks.counts.numel()
        pages = torch.zeros(KV_HEADS, number, self.width, dtype=torch.int32, device=listed.device)
        grid = (KV_HEADS, number, self.width // KEY_BLOCK)
        columns = (blocks.before, blocks.numbers, blocks.counts, self.chunk.contexts.table[1])
        _pages_kernel[grid](pages, listed, *columns, blocks.most, self.width, KEYS=KEY_BLOCK, num_warps=1)
        return pages.flatten(0, 1)

    def attend(self, listed: torch.Tensor) -> torch.Tensor:
        from sgl_kernel.flash_attn import flash_attn_with_kvcache

        q = self.chunk.q.unflatten(1, (KV_HEADS, -1)).transpose(0, 1).flatten(0, 1)
        found = flash_attn_with_kvcache(q, page_table=self.pages(listed), **self.options)
        return found.view(KV_HEADS, -1, *found.shape[1:]).transpose(0, 1).flatten(1, 2)


def same_pages(chunk: Chunk) -> None:
    """FA3's pages are the slots that the twin attends to, in the order of positions."""
    listed, table = chunk.list(chunk.score()), chunk.contexts.table[1].cpu()
    lists = Fa3Lists.make(chunk)
    pages, lens = lists.pages(listed).cpu().unflatten(0, (KV_HEADS, -1)), lists.options["cache_seqlens"]
    columns = (chunk.blocks.before, chunk.blocks.numbers, chunk.blocks.counts)
    for i, (before, number, count) in enumerate(zip(*(part.tolist() for part in columns), strict=True)):
        choices = before // KEY_BLOCK
        for h in range(KV_HEADS):
            chosen = range(choices) if count == WHOLE else listed[i, h, :count].tolist()
            positions = [j * KEY_BLOCK + p for j in chosen for p in range(KEY_BLOCK)]
            positions += range(choices * KEY_BLOCK, before + number)
            assert int(lens[h * len(pages[0]) + i]) == len(positions)
            assert torch.equal(pages[h, i, : len(positions)], table[positions] * KV_HEADS + h), f"block {i}"


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
    arm("fa3-table", lambda: same_pages(chunk), lambda: lists.pages(listed), nbytes)


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
