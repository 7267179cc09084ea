"""Spread in Triton: a token's importance passes on to the next tokens, in place."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from sts_kernels.checks import check_spread
from sts_kernels.layout import ALIGN, SHIFT, Scores


@dataclass(frozen=True)
class SpreadKnobs:
    """block: scores at a time, MOST_OVER of them at least. programs: that all rows are parted among, at most
    `most` of them a row. num_warps: of a program.
    """

    block: int = 4096
    programs: int = 1024
    most: int = 16
    num_warps: int = 8


KNOBS = SpreadKnobs()


def spread_importance(scores: Scores, lens: torch.Tensor, *, factor: float, over: int) -> None:
    """Kernel of `sts_kernels.torch_ops.spread_importance` (see there); graph-safe, no host sync.

    Where several programs share a row, a first launch copies the scores that each part passes on to the next,
    before they change.
    """
    check_spread(scores, factor, over)
    importance, bs, most = scores.importance, lens.numel(), KNOBS.most
    channels = importance.shape[0]
    if bs == 0:
        return
    parts = max(1, min(most, KNOBS.programs // (bs * channels)))
    edges = importance.new_empty(bs, channels, most, triton.next_power_of_2(over))
    row = [importance, edges, scores.starts, lens, importance.stride(0)]
    shape = {"PARTS": parts, "MOST": most, "WIDTH": edges.shape[-1], "BLOCK": KNOBS.block, "ALIGN": ALIGN}
    if parts > 1:
        _edges_kernel[(bs, channels)](*row, **shape, num_warps=1)
    _spread_kernel[(bs, channels, parts)](
        *row, factor, OVER=over, SHIFT=SHIFT, **shape, num_warps=KNOBS.num_warps
    )


@triton.jit
def _row(
    importance_ptr,
    edges_ptr,
    column_ptr,
    lens_ptr,
    stride,
    PARTS,
    MOST: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK,
    ALIGN,
):
    """Of a row: first column, below 0 where there is none; length; pointers to its scores and to its edges;
    and how many scores a part has."""
    b, c = tl.program_id(0), tl.program_id(1)
    start = tl.multiple_of(tl.load(column_ptr + b), ALIGN)
    length = tl.load(lens_ptr + b).to(tl.int32)
    edge_ptr = edges_ptr + (b * tl.num_programs(1) + c) * MOST * WIDTH
    part = tl.cdiv(tl.cdiv(length, PARTS), BLOCK) * BLOCK
    return start, length, importance_ptr + c.to(tl.int64) * stride + start, edge_ptr, part


@triton.jit
def _edges_kernel(
    importance_ptr,  # float16 or float32 [channels, columns]
    edges_ptr,  # [bs, channels, MOST, WIDTH]: the last scores of the part before, the last one first
    column_ptr,  # int64 [bs], first columns, below 0: none
    lens_ptr,  # int [bs]
    stride,
    PARTS: tl.constexpr,
    MOST: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
):
    start, length, row_ptr, edge_ptr, part = _row(
        importance_ptr, edges_ptr, column_ptr, lens_ptr, stride, PARTS, MOST, WIDTH, BLOCK, ALIGN
    )
    if start < 0:
        return
    i, k = tl.arange(0, MOST)[:, None], tl.arange(0, WIDTH)[None]  # parts, tokens before each
    last = i * part - 1 - k
    ok = (i > 0) & (last < length)
    tl.store(edge_ptr + i * WIDTH + k, tl.load(row_ptr + last, mask=ok, other=0.0), mask=ok)


@triton.jit
def _spread_kernel(
    importance_ptr,  # as in _edges_kernel
    edges_ptr,
    column_ptr,
    lens_ptr,
    stride,
    factor,
    OVER: tl.constexpr,
    PARTS: tl.constexpr,
    MOST: tl.constexpr,
    WIDTH: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
):
    start, length, row_ptr, edge_ptr, part = _row(
        importance_ptr, edges_ptr, column_ptr, lens_ptr, stride, PARTS, MOST, WIDTH, BLOCK, ALIGN
    )
    if start < 0:
        return
    first = tl.program_id(2) * part
    edge_ptr += tl.program_id(2) * WIDTH
    blocks = tl.cdiv(tl.minimum(part, length - first), BLOCK)
    # From the last block to the first, so that scores which a block passes on are read before they change.
    for i in range(1, blocks):
        begin = first + (blocks - i) * BLOCK
        _spread_block(row_ptr, edge_ptr, begin, first, length, factor, False, OVER, SHIFT, BLOCK, ALIGN)
    if blocks > 0:
        _spread_block(row_ptr, edge_ptr, first, first, length, factor, True, OVER, SHIFT, BLOCK, ALIGN)


@triton.jit
def _spread_block(
    row_ptr,
    edge_ptr,
    begin,
    first,
    length,
    factor,
    EDGE: tl.constexpr,
    OVER: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """What a block gets. EDGE: it is the first of a part, where some come from the part before.

    Its scores are read and written up to a multiple of ALIGN, past the context as they are: a mask by
    position would split every access into single scores."""
    offs = begin + tl.arange(0, BLOCK)
    ok = offs < tl.multiple_of(tl.cdiv(length, ALIGN) * ALIGN, ALIGN)
    gets = offs < length
    if EDGE:
        gets &= offs > SHIFT
    own = tl.load(row_ptr + offs, mask=ok, other=0.0)  # [BLOCK]
    best, weight = own, 1.0
    for k in tl.static_range(1, OVER + 1):
        weight = weight * factor
        at = offs - k
        if EDGE:
            scored = gets & (at >= SHIFT)
            before = tl.load(row_ptr + at, mask=scored & (at >= first), other=float("-inf"))
            edge = tl.load(edge_ptr + first - 1 - at, mask=scored & (at < first), other=float("-inf"))
            before = tl.where(at < first, edge, before)
        else:
            before = tl.load(row_ptr + at, mask=ok, other=float("-inf"))
        passed = (before.to(tl.float32) * weight).to(own.dtype)
        best = tl.where(passed > best, passed, best)
    tl.debug_barrier()  # all threads have read the block before one writes to it
    tl.store(row_ptr + offs, tl.where(gets, best, own), mask=ok)
