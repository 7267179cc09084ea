"""Spread in Triton: a token's importance passes on to the next token, in place."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sts_kernels.checks import check_spread
from sts_kernels.reference import SHIFT

BLOCK = 4096
PROGRAMS = 1024  # of them as many share a row as there are for each, at most MOST
MOST = 16


def spread_importance(
    importance: torch.Tensor, ctx_start: torch.Tensor, seq_lens: torch.Tensor, factor: float
) -> None:
    """Kernel of `sts_kernels.reference.spread_importance` (see there); graph-safe, no host sync.

    Where several programs share a row, a first launch puts aside what each part passes on to the next.
    """
    check_spread(importance, factor)
    channels, bs = importance.shape[0], seq_lens.numel()
    if bs == 0:
        return
    parts = max(1, min(MOST, PROGRAMS // (bs * channels)))
    edges = importance.new_empty(bs, channels, MOST)
    row = [importance, edges, ctx_start, seq_lens, importance.stride(0)]
    if parts > 1:
        _edges_kernel[(bs, channels)](*row, PARTS=parts, MOST=MOST, BLOCK=BLOCK, num_warps=1)
    _spread_kernel[(bs, channels, parts)](
        *row, factor, PARTS=parts, MOST=MOST, SHIFT=SHIFT, BLOCK=BLOCK, num_warps=8
    )


@triton.jit
def _row(importance_ptr, edges_ptr, ctx_start_ptr, lens_ptr, stride, PARTS, MOST: tl.constexpr, BLOCK):
    """First column, below 0 where there is none, length and edges of a row, and how much of it is a part."""
    b, c = tl.program_id(0), tl.program_id(1)
    start = tl.load(ctx_start_ptr + b)
    length = tl.load(lens_ptr + b).to(tl.int32)
    edge_ptr = edges_ptr + (b * tl.num_programs(1) + c) * MOST
    part = tl.cdiv(tl.cdiv(length, PARTS), BLOCK) * BLOCK
    return start, length, importance_ptr + c.to(tl.int64) * stride + start, edge_ptr, part


@triton.jit
def _edges_kernel(
    importance_ptr,
    edges_ptr,  # [bs, channels, MOST]: the last of the part before
    ctx_start_ptr,
    lens_ptr,
    stride,
    PARTS: tl.constexpr,
    MOST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    start, length, row_ptr, edge_ptr, part = _row(
        importance_ptr, edges_ptr, ctx_start_ptr, lens_ptr, stride, PARTS, MOST, BLOCK
    )
    if start < 0:
        return
    i = tl.arange(0, MOST)
    last = i * part - 1
    ok = (i > 0) & (last < length)
    tl.store(edge_ptr + i, tl.load(row_ptr + last, mask=ok, other=0.0), mask=ok)


@triton.jit
def _spread_kernel(
    importance_ptr,
    edges_ptr,
    ctx_start_ptr,
    lens_ptr,
    stride,
    factor,
    PARTS: tl.constexpr,
    MOST: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    start, length, row_ptr, edge_ptr, part = _row(
        importance_ptr, edges_ptr, ctx_start_ptr, lens_ptr, stride, PARTS, MOST, BLOCK
    )
    if start < 0:
        return
    first = tl.program_id(2) * part
    blocks = tl.cdiv(tl.minimum(part, length - first), BLOCK)
    edge = tl.load(edge_ptr + tl.program_id(2), mask=first > 0, other=0.0)
    # From the end: what a block passes on to the next one is read before it changes.
    for i in range(0, blocks):
        offs = first + (blocks - 1 - i) * BLOCK + tl.arange(0, BLOCK)
        ok = (offs > SHIFT) & (offs < length)
        own = tl.load(row_ptr + offs, mask=ok, other=0.0)
        before = tl.load(row_ptr + offs - 1, mask=ok & (offs != first), other=0.0)
        before = tl.where(offs == first, edge, before)
        passed = (before.to(tl.float32) * factor).to(own.dtype)
        tl.debug_barrier()  # all of a block is read before any of it is written
        tl.store(row_ptr + offs, passed, mask=ok & (passed > own))
