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

    Four launches. One request owns a slot for the round: it reads what the slot remembers, mixes, decays and
    writes the maximum, all in one pass. Requests that share the slot mix before that, since all read what
    was remembered before the round, and add their maximum after it: next to nothing where nothing is shared.
    """
    check_history(importance, history, stamp, weight)
    bs, channels = seq_lens.numel(), importance.shape[0]
    if bs == 0:
        return
    columns, slots = importance.stride(0), history.stride(0)
    owned = torch.empty(importance.shape[1], dtype=torch.int8, device=importance.device)
    fresh = torch.empty_like(importance)  # of those that share, as it was before they mixed
    requests = [ctx_start, seq_lens, req_to_token, req_pool_indices, req_to_token.stride(0)]
    shape = {"SHIFT": SHIFT, "BLOCK": BLOCK, "PROGRAMS": PROGRAMS}
    few, all_channels = (bs, PROGRAMS), (bs, channels, PROGRAMS)
    _claim_kernel[few](owned, stamp, round_, *requests, **shape)
    common = [owned, weight, *requests, columns, slots]
    _mix_shared_kernel[few](importance, fresh, history, *common, channels, UNKNOWN=UNKNOWN, **shape)
    _remember_kernel[all_channels](importance, history, *common, decay, UNKNOWN=UNKNOWN, **shape)
    _remember_shared_kernel[few](importance, fresh, history.view(torch.int32), *common, channels, **shape)


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
def _shared(owned_ptr, ok):
    """Which positions another request owns, and whether there are any."""
    shared = ok & (tl.load(owned_ptr, mask=ok, other=1) == 0)
    return shared, tl.max(shared.to(tl.int32), 0) > 0


@triton.jit
def _mixed(fresh, remembered, w, UNKNOWN: tl.constexpr):
    return tl.where(remembered == UNKNOWN, fresh.to(tl.float32), (1 - w) * fresh + w * remembered)


@triton.jit
def _claim_kernel(
    owned_ptr,  # int8 [columns]: whether the column's request owns its slot
    stamp_ptr,
    round_ptr,
    ctx_start_ptr,
    lens_ptr,
    table_ptr,
    reqs_ptr,
    stride_table,
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
        # Whoever changes the stamp owns the slot.
        before = tl.atomic_xchg(stamp_ptr + slots, tl.zeros_like(slots) + now, mask=ok)
        tl.store(owned_ptr + column + offs, (before != now).to(tl.int8), mask=ok)


@triton.jit
def _mix_shared_kernel(
    importance_ptr,
    fresh_ptr,
    history_ptr,
    owned_ptr,
    weight_ptr,
    ctx_start_ptr,
    lens_ptr,
    table_ptr,
    reqs_ptr,
    stride_table,
    columns,
    slots_stride,
    channels,
    UNKNOWN: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    b, program = tl.program_id(0), tl.program_id(1)
    column, length, slot_ptr = _request(b, ctx_start_ptr, lens_ptr, table_ptr, reqs_ptr, stride_table)
    w = tl.load(weight_ptr + b)
    if (column < 0) | (w == 0):  # it does not mix
        return
    for block in range(SHIFT + program * BLOCK, length, PROGRAMS * BLOCK):
        offs, ok, slots = _block(block, length, slot_ptr, BLOCK)
        shared, some = _shared(owned_ptr + column + offs, ok)
        if some:
            place, aside, slot = (
                importance_ptr + column + offs,
                fresh_ptr + column + offs,
                history_ptr + slots,
            )
            for _ in range(0, channels):
                fresh = tl.load(place, mask=shared, other=0.0)
                mixed = _mixed(fresh, tl.load(slot, mask=shared, other=UNKNOWN), w, UNKNOWN)
                tl.store(aside, fresh, mask=shared)
                tl.store(place, mixed.to(importance_ptr.dtype.element_ty), mask=shared)
                place += columns
                aside += columns
                slot += slots_stride


@triton.jit
def _remember_kernel(
    importance_ptr,
    history_ptr,
    owned_ptr,
    weight_ptr,
    ctx_start_ptr,
    lens_ptr,
    table_ptr,
    reqs_ptr,
    stride_table,
    columns,
    slots_stride,
    decay,
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
        own = ok & (tl.load(owned_ptr + column + offs, mask=ok, other=0) != 0)
        place = importance_ptr + c * columns + column + offs
        slot = history_ptr + c * slots_stride + slots
        fresh = tl.load(place, mask=own, other=0.0)
        held = tl.load(slot, mask=own, other=UNKNOWN)
        if w != 0:
            mixed = _mixed(fresh, held, w, UNKNOWN)
            tl.store(place, mixed.to(importance_ptr.dtype.element_ty), mask=own)
        new = tl.maximum(fresh.to(tl.float32), tl.where(held == UNKNOWN, held, held * decay))
        tl.store(slot, new, mask=own)


@triton.jit
def _remember_shared_kernel(
    importance_ptr,
    fresh_ptr,
    history_bits_ptr,
    owned_ptr,
    weight_ptr,
    ctx_start_ptr,
    lens_ptr,
    table_ptr,
    reqs_ptr,
    stride_table,
    columns,
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
    # What did not mix is fresh where it stands.
    source_ptr = fresh_ptr
    if tl.load(weight_ptr + b) == 0:
        source_ptr = importance_ptr
    for block in range(SHIFT + program * BLOCK, length, PROGRAMS * BLOCK):
        offs, ok, slots = _block(block, length, slot_ptr, BLOCK)
        shared, some = _shared(owned_ptr + column + offs, ok)
        if some:
            place, slot = source_ptr + column + offs, history_bits_ptr + slots
            for _ in range(0, channels):
                fresh = tl.load(place, mask=shared, other=0.0).to(tl.float32)
                # Scores are not negative, so their bits order as integers; UNKNOWN's are below them.
                tl.atomic_max(slot, fresh.to(tl.int32, bitcast=True), mask=shared)
                place += columns
                slot += slots_stride
