"""History in Triton: mix what slots remember into importance, decay it once, let them remember the round."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sts_kernels.checks import UNKNOWN, check_history
from sts_kernels.reference import SHIFT

BLOCK = 1024
PROGRAMS = 16  # per (request, channel); lengths are read on the device, so the grid cannot follow them


def blend_history(
    importance: torch.Tensor,
    ctx_start: torch.Tensor,
    seq_lens: torch.Tensor,
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    history: torch.Tensor,
    stamp: torch.Tensor,
    round_: torch.Tensor,
    weight: torch.Tensor,
    decay: float,
) -> None:
    """Kernel of `sts_kernels.reference.blend_history` (see there); graph-safe, no host sync.

    Three launches, because all requests read before any writes, and every slot decays before it takes
    a maximum: read-and-mix keeps the fresh values aside, then decay, then atomic maximum.
    """
    check_history(importance, history, stamp, weight)
    bs, channels = seq_lens.numel(), importance.shape[0]
    if bs == 0:
        return
    fresh = torch.empty_like(importance)
    common = [ctx_start, seq_lens, req_to_token, req_pool_indices, req_to_token.stride(0)]
    grid = (bs, channels, PROGRAMS)
    shape = {"SHIFT": SHIFT, "BLOCK": BLOCK, "PROGRAMS": PROGRAMS}
    columns, slots = importance.stride(0), history.stride(0)
    _mix_kernel[grid](importance, fresh, history, weight, *common, columns, slots, UNKNOWN=UNKNOWN, **shape)
    _decay_kernel[(bs, PROGRAMS)](history, stamp, round_, decay, *common, slots, channels, **shape)
    _remember_kernel[grid](fresh, history.view(torch.int32), *common, columns, slots, **shape)


@triton.jit
def _request(b, ctx_start_ptr, lens_ptr, table_ptr, reqs_ptr, stride_table):
    """First column, below 0 where there is none, and length of a request; where its slots stand."""
    slot_ptr = table_ptr + tl.load(reqs_ptr + b).to(tl.int64) * stride_table
    return tl.load(ctx_start_ptr + b), tl.load(lens_ptr + b).to(tl.int32), slot_ptr


@triton.jit
def _block(block, length, slot_ptr, BLOCK: tl.constexpr):
    """Positions from `block` on, which of them the context has, and their slots."""
    offs = block + tl.arange(0, BLOCK)
    ok = offs < length
    return offs, ok, tl.load(slot_ptr + offs, mask=ok, other=0)


@triton.jit
def _mix_kernel(
    importance_ptr,
    fresh_ptr,
    history_ptr,
    weight_ptr,
    ctx_start_ptr,
    lens_ptr,
    table_ptr,
    reqs_ptr,
    stride_table,
    columns,
    slots_stride,
    UNKNOWN: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    b, c, program = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    column, length, slot_ptr = _request(b, ctx_start_ptr, lens_ptr, table_ptr, reqs_ptr, stride_table)
    if column < 0:
        return
    w = tl.load(weight_ptr + b)
    for block in range(SHIFT + program * BLOCK, length, PROGRAMS * BLOCK):
        offs, ok, slots = _block(block, length, slot_ptr, BLOCK)
        place = c * columns + column + offs
        fresh = tl.load(importance_ptr + place, mask=ok, other=0.0)
        remembered = tl.load(history_ptr + c * slots_stride + slots, mask=ok, other=UNKNOWN)
        mixed = tl.where(remembered == UNKNOWN, fresh.to(tl.float32), (1 - w) * fresh + w * remembered)
        tl.store(fresh_ptr + place, fresh, mask=ok)
        tl.store(importance_ptr + place, mixed.to(importance_ptr.dtype.element_ty), mask=ok)


@triton.jit
def _decay_kernel(
    history_ptr,
    stamp_ptr,
    round_ptr,
    decay,
    ctx_start_ptr,
    lens_ptr,
    table_ptr,
    reqs_ptr,
    stride_table,
    slots_stride,
    channels,
    SHIFT: tl.constexpr,
    BLOCK: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    b, program = tl.program_id(0), tl.program_id(1)
    column, length, slot_ptr = _request(b, ctx_start_ptr, lens_ptr, table_ptr, reqs_ptr, stride_table)
    if column < 0:
        return
    now = tl.load(round_ptr)
    for block in range(SHIFT + program * BLOCK, length, PROGRAMS * BLOCK):
        offs, ok, slots = _block(block, length, slot_ptr, BLOCK)
        # Whoever changes the stamp decays the slot, for all that share it.
        first = ok & (tl.atomic_xchg(stamp_ptr + slots, tl.zeros_like(slots) + now, mask=ok) != now)
        place = history_ptr + slots
        for _ in range(0, channels):
            held = tl.load(place, mask=first, other=0.0)
            tl.store(place, tl.where(held < 0, held, held * decay), mask=first)
            place += slots_stride


@triton.jit
def _remember_kernel(
    fresh_ptr,
    history_bits_ptr,
    ctx_start_ptr,
    lens_ptr,
    table_ptr,
    reqs_ptr,
    stride_table,
    columns,
    slots_stride,
    SHIFT: tl.constexpr,
    BLOCK: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    b, c, program = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    column, length, slot_ptr = _request(b, ctx_start_ptr, lens_ptr, table_ptr, reqs_ptr, stride_table)
    if column < 0:
        return
    for block in range(SHIFT + program * BLOCK, length, PROGRAMS * BLOCK):
        offs, ok, slots = _block(block, length, slot_ptr, BLOCK)
        fresh = tl.load(fresh_ptr + c * columns + column + offs, mask=ok, other=0.0).to(tl.float32)
        # Scores are not negative, so their bits order as integers; UNKNOWN's are below them.
        tl.atomic_max(history_bits_ptr + c * slots_stride + slots, fresh.to(tl.int32, bitcast=True), mask=ok)
