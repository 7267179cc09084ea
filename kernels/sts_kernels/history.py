"""History in Triton: mix what slots remember into importance, decay it once, let them remember the round."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sts_kernels.checks import UNKNOWN, check_history
from sts_kernels.reference import ALIGN, SHIFT

CLAIM_BLOCK = 1024
MAX_CHANNELS = 128  # of a tile
# Lengths are read on the device, so the grid cannot follow them: so many programs share a context.
# Tiles are scores, several a thread: none may hold what another one writes. The walk along shared slots takes
# registers, so that its tiles are smaller.
KNOBS = {"claim_programs": 64, "programs": 256, "tile": 4096, "tile_alone": 8192, "num_warps": 4}


def blend_history(
    importance: torch.Tensor,
    ctx_start: torch.Tensor,
    seq_lens: torch.Tensor,
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    history: torch.Tensor,
    owner: torch.Tensor,
    round_: torch.Tensor,
    weight: torch.Tensor,
    decay: float,
) -> None:
    """Kernel of `sts_kernels.reference.blend_history` (see there); graph-safe, no host sync, deterministic.

    Requests that share a slot hold it at the same position, so they form a list: each puts itself into the
    slot's `owner` and notes whom of this round it found there. The last one owns the slot for the round: it
    alone reads and writes what the slot remembers, and walks the list for the others. A slot's channels lie
    side by side, so slots in any order are read in whole lines.
    """
    check_history(importance, history, owner, round_, weight)
    bs, channels = seq_lens.numel(), importance.shape[0]
    if bs == 0:
        return
    alone = bs == 1  # shares with nobody
    requests = [ctx_start, seq_lens, req_to_token, req_pool_indices, req_to_token.stride(0)]
    before = torch.empty(0 if alone else importance.shape[1], dtype=torch.int32, device=importance.device)
    if not alone:
        claims = KNOBS["claim_programs"]
        _claim_kernel[(bs, claims)](
            before, owner, round_, *requests, SHIFT=SHIFT, ALIGN=ALIGN, BLOCK=CLAIM_BLOCK, PROGRAMS=claims
        )
    at_once = min(triton.next_power_of_2(channels), MAX_CHANNELS)
    programs = KNOBS["programs"]
    _remember_kernel[(bs, programs)](
        importance,
        history,
        owner,
        round_,
        before,
        weight,
        *requests,
        importance.stride(0),
        channels,
        decay,
        UNKNOWN=UNKNOWN,
        SHIFT=SHIFT,
        ALIGN=ALIGN,
        ALONE=alone,
        CHANNELS=at_once,
        BLOCK=KNOBS["tile_alone" if alone else "tile"] // at_once,
        PROGRAMS=programs,
        num_warps=KNOBS["num_warps"],
    )


@triton.jit
def _request(b, ctx_start_ptr, lens_ptr, table_ptr, reqs_ptr, stride_table, ALIGN: tl.constexpr):
    """First column, below 0 where there is none, and length of a request; where its slots stand."""
    slot_ptr = table_ptr + tl.load(reqs_ptr + b).to(tl.int64) * stride_table
    column = tl.multiple_of(tl.load(ctx_start_ptr + b), ALIGN)
    return column, tl.load(lens_ptr + b).to(tl.int32), slot_ptr


@triton.jit
def _block(block, length, slot_ptr, SHIFT: tl.constexpr, BLOCK: tl.constexpr):
    """Positions from `block` on, which of them the context scores, and their slots."""
    offs = block + tl.arange(0, BLOCK)
    ok = (offs >= SHIFT) & (offs < length)
    return offs, ok, tl.load(slot_ptr + offs, mask=ok, other=0).to(tl.int64)


@triton.jit
def _mix(place, fresh, held, w, mask, UNKNOWN: tl.constexpr):
    """Write a request's importance with memory mixed in."""
    mixed = tl.where(held == UNKNOWN, fresh, (1 - w) * fresh + w * held)
    tl.store(place, mixed.to(place.dtype.element_ty), mask=mask)


@triton.jit
def _name(round_ptr, b):
    """What `owner` says of slots of request b in this round."""
    return tl.load(round_ptr) * 4294967296 + b  # int64: the round, the request


@triton.jit
def _claim_kernel(
    before_ptr,  # int32 [columns]: 1 + the request that was the slot's owner before this one, 0: none
    owner_ptr,
    round_ptr,
    ctx_start_ptr,
    lens_ptr,
    table_ptr,
    reqs_ptr,
    stride_table,
    SHIFT: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    b, program = tl.program_id(0), tl.program_id(1)
    column, length, slot_ptr = _request(b, ctx_start_ptr, lens_ptr, table_ptr, reqs_ptr, stride_table, ALIGN)
    if column < 0:
        return
    mine, first = _name(round_ptr, b), _name(round_ptr, 0)
    for block in range(program * BLOCK, length, PROGRAMS * BLOCK):
        offs, ok, slots = _block(block, length, slot_ptr, SHIFT, BLOCK)
        found = tl.atomic_xchg(owner_ptr + slots, tl.zeros_like(slots) + mine, mask=ok)
        before = tl.where(found < first, 0, found - first + 1)  # of an earlier round: nobody
        tl.store(before_ptr + column + offs, before.to(tl.int32), mask=ok)


@triton.jit
def _remember_kernel(
    importance_ptr,
    history_ptr,
    owner_ptr,
    round_ptr,
    before_ptr,
    weight_ptr,
    ctx_start_ptr,
    lens_ptr,
    table_ptr,
    reqs_ptr,
    stride_table,
    columns,
    channels,
    decay,
    UNKNOWN: tl.constexpr,
    SHIFT: tl.constexpr,
    ALIGN: tl.constexpr,
    ALONE: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    b, program = tl.program_id(0), tl.program_id(1)
    column, length, slot_ptr = _request(b, ctx_start_ptr, lens_ptr, table_ptr, reqs_ptr, stride_table, ALIGN)
    if column < 0:
        return
    w = tl.load(weight_ptr + b)
    # A request's columns end at a multiple of ALIGN: loads of whole vectors may go on to there.
    wide = tl.multiple_of((length + ALIGN - 1) // ALIGN * ALIGN, ALIGN)
    for block in range(program * BLOCK, length, PROGRAMS * BLOCK):
        offs, own, slots = _block(block, length, slot_ptr, SHIFT, BLOCK)
        before = tl.zeros_like(offs)
        if not ALONE:
            own = own & (tl.load(owner_ptr + slots, mask=own, other=0) == _name(round_ptr, b))
            before = tl.load(before_ptr + column + offs, mask=own, other=0)
        # Of a block that others own nothing is read.
        end = tl.where(tl.max(own.to(tl.int32), 0) > 0, channels, 0)
        for first in range(0, end, CHANNELS):
            c = first + tl.arange(0, CHANNELS)[None, :]
            mask = own[:, None] & (c < channels)
            rows = importance_ptr + c.to(tl.int64) * columns
            place, slot = rows + (column + offs)[:, None], history_ptr + slots[:, None] * channels + c
            held = tl.load(slot, mask=mask, other=UNKNOWN).to(tl.float32)
            fresh = tl.load(place, mask=(offs < wide)[:, None] & (c < channels), other=0.0).to(tl.float32)
            if w != 0:
                _mix(place, fresh, held, w, mask, UNKNOWN)
            new = tl.maximum(fresh, tl.where(held == UNKNOWN, held, held * decay))
            if not ALONE:
                other = before
                while tl.max(other, 0) > 0:
                    some = other > 0
                    at = tl.load(ctx_start_ptr + other - 1, mask=some, other=0) + offs
                    share = tl.load(weight_ptr + other - 1, mask=some, other=0.0)[:, None]
                    theirs, there = rows + at[:, None], mask & some[:, None]
                    fresh = tl.load(theirs, mask=there, other=0.0).to(tl.float32)
                    _mix(theirs, fresh, held, share, there & (share != 0), UNKNOWN)
                    new = tl.maximum(new, tl.where(there, fresh, UNKNOWN))
                    other = tl.load(before_ptr + at, mask=some, other=0)
            tl.store(slot, new.to(slot.dtype.element_ty), mask=mask)
