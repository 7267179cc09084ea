"""History in Triton: mix what slots remember into importance, decay it once, let them remember the round."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sts_kernels.checks import UNKNOWN, check_history
from sts_kernels.reference import SHIFT

BLOCK = 1024
# Lengths are read on the device, so the grid cannot follow them: so many programs share a context.
KNOBS = {"claim_programs": 128, "programs": 32, "channels": 4, "num_warps": 4}


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
    was remembered before the round, and add their maximum after it; where nothing is shared, these two
    passes only find that out.
    """
    check_history(importance, history, stamp, weight)
    bs, channels = seq_lens.numel(), importance.shape[0]
    if bs == 0:
        return
    columns, slots = importance.stride(0), history.stride(0)
    owned = torch.empty(importance.shape[1], dtype=torch.int8, device=importance.device)
    fresh = torch.empty_like(importance)  # of those that share, as it was before they mixed
    requests = [ctx_start, seq_lens, req_to_token, req_pool_indices, req_to_token.stride(0)]
    shape = {"SHIFT": SHIFT, "BLOCK": BLOCK}
    claims, programs, several = KNOBS["claim_programs"], KNOBS["programs"], KNOBS["channels"]
    _claim_kernel[(bs, claims)](owned, stamp, round_, *requests, PROGRAMS=claims, **shape)
    grid = (bs, triton.cdiv(channels, several), programs)
    shape |= {"PROGRAMS": programs, "CHANNELS": several, "num_warps": KNOBS["num_warps"]}
    common = [owned, weight, *requests, columns, slots, channels]
    if bs > 1:  # one request alone shares with nobody
        _mix_shared_kernel[grid](importance, fresh, history, *common, UNKNOWN=UNKNOWN, **shape)
    _remember_kernel[grid](importance, history, *common, decay, UNKNOWN=UNKNOWN, **shape)
    if bs > 1:
        _remember_shared_kernel[grid](importance, fresh, history.view(torch.int32), *common, **shape)


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
    CHANNELS: tl.constexpr,
):
    b, first, program = tl.program_id(0), tl.program_id(1) * CHANNELS, tl.program_id(2)
    column, length, slot_ptr = _request(b, ctx_start_ptr, lens_ptr, table_ptr, reqs_ptr, stride_table)
    w = tl.load(weight_ptr + b)
    if (column < 0) | (w == 0):  # it does not mix
        return
    for block in range(SHIFT + program * BLOCK, length, PROGRAMS * BLOCK):
        offs, ok, slots = _block(block, length, slot_ptr, BLOCK)
        shared, some = _shared(owned_ptr + column + offs, ok)
        if some:
            for i in tl.static_range(CHANNELS):
                c, mask = (first + i).to(tl.int64), shared & (first + i < channels)
                place = c * columns + column + offs
                fresh = tl.load(importance_ptr + place, mask=mask, other=0.0)
                held = tl.load(history_ptr + c * slots_stride + slots, mask=mask, other=UNKNOWN)
                mixed = _mixed(fresh, held, w, UNKNOWN)
                tl.store(fresh_ptr + place, fresh, mask=mask)
                tl.store(importance_ptr + place, mixed.to(importance_ptr.dtype.element_ty), mask=mask)


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
    channels,
    decay,
    UNKNOWN: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK: tl.constexpr,
    PROGRAMS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    b, first, program = tl.program_id(0), tl.program_id(1) * CHANNELS, tl.program_id(2)
    column, length, slot_ptr = _request(b, ctx_start_ptr, lens_ptr, table_ptr, reqs_ptr, stride_table)
    if column < 0:
        return
    w = tl.load(weight_ptr + b)
    for block in range(SHIFT + program * BLOCK, length, PROGRAMS * BLOCK):
        offs, ok, slots = _block(block, length, slot_ptr, BLOCK)
        own = ok & (tl.load(owned_ptr + column + offs, mask=ok, other=0) != 0)
        for i in tl.static_range(CHANNELS):
            c, mask = (first + i).to(tl.int64), own & (first + i < channels)
            place, slot = importance_ptr + c * columns + column + offs, history_ptr + c * slots_stride + slots
            fresh = tl.load(place, mask=mask, other=0.0)
            held = tl.load(slot, mask=mask, other=UNKNOWN)
            if w != 0:
                mixed = _mixed(fresh, held, w, UNKNOWN)
                tl.store(place, mixed.to(importance_ptr.dtype.element_ty), mask=mask)
            new = tl.maximum(fresh.to(tl.float32), tl.where(held == UNKNOWN, held, held * decay))
            tl.store(slot, new, mask=mask)


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
    CHANNELS: tl.constexpr,
):
    b, first, program = tl.program_id(0), tl.program_id(1) * CHANNELS, tl.program_id(2)
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
            for i in tl.static_range(CHANNELS):
                c, mask = (first + i).to(tl.int64), shared & (first + i < channels)
                fresh = tl.load(source_ptr + c * columns + column + offs, mask=mask, other=0.0).to(tl.float32)
                # Scores are not negative, so their bits order as integers; UNKNOWN's are below them.
                slot = history_bits_ptr + c * slots_stride + slots
                tl.atomic_max(slot, fresh.to(tl.int32, bitcast=True), mask=mask)
