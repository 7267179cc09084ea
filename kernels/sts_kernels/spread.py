"""Spread in Triton: a token's importance passes on to the next token, in place."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sts_kernels.checks import check_spread
from sts_kernels.reference import SHIFT

BLOCK = 4096


def spread_importance(
    importance: torch.Tensor, ctx_start: torch.Tensor, seq_lens: torch.Tensor, factor: float
) -> None:
    """Kernel of `sts_kernels.reference.spread_importance` (see there); graph-safe, no host sync."""
    check_spread(importance, factor)
    channels, bs = importance.shape[0], seq_lens.numel()
    if bs:
        _spread_kernel[(bs, channels)](
            importance,
            ctx_start,
            seq_lens,
            importance.stride(0),
            factor,
            SHIFT=SHIFT,
            BLOCK=BLOCK,
            num_warps=8,
        )


@triton.jit
def _spread_kernel(
    importance_ptr, ctx_start_ptr, lens_ptr, stride, factor, SHIFT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    b, c = tl.program_id(0), tl.program_id(1)
    start = tl.load(ctx_start_ptr + b)
    length = tl.load(lens_ptr + b).to(tl.int32)
    if start < 0:
        return
    row_ptr = importance_ptr + c.to(tl.int64) * stride + start
    # From the end: what a block passes on to the next one is read before it changes.
    blocks = tl.cdiv(length, BLOCK)
    for i in range(0, blocks):
        offs = (blocks - 1 - i) * BLOCK + tl.arange(0, BLOCK)
        ok = (offs > SHIFT) & (offs < length)
        own = tl.load(row_ptr + offs, mask=ok, other=0.0)
        before = tl.load(row_ptr + offs - 1, mask=ok, other=0.0)
        passed = (before.to(tl.float32) * factor).to(own.dtype)
        tl.debug_barrier()  # all of a block is read before any of it is written
        tl.store(row_ptr + offs, passed, mask=ok & (passed > own))
