"""History in Triton: mix what slots remember into importance, decay it once, let them remember the round."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from sts_kernels.checks import check_history
from sts_kernels.layout import ALIGN, SHIFT, UNKNOWN, Contexts, History, Scores

MAX_CHANNELS = 128  # of a tile


@dataclass(frozen=True)
class HistoryKnobs:
    """How much the two kernels take at a time, and how many programs share a context; the grid cannot follow
    lengths, which are read on the device.

    claim_block, claim_programs: positions, and programs, of the one that claims slots. tile, programs,
    num_warps: scores, programs, and warps of one, of the one that remembers. tile_alone: its scores where
    there is a single request; shared slots are walked along, which takes registers. A tile has several scores
    for each thread: else threads would hold the same ones, and one might read what another has written.
    """

    claim_block: int = 1024
    claim_programs: int = 64
    programs: int = 256
    tile: int = 4096
    tile_alone: int = 8192
    num_warps: int = 4


KNOBS = HistoryKnobs()


def blend_history(
    scores: Scores, contexts: Contexts, history: History, weight: torch.Tensor, *, decay: float
) -> None:
    """Kernel of `sts_kernels.torch_ops.blend_history` (see there); graph-safe, no host sync, deterministic.

    Requests that share a slot hold it at the same position. A first kernel makes a list of them: each puts
    itself into the slot's `owner` and notes whom of this round it found there. The last one owns the slot for
    the round: in the second kernel it alone reads and writes what the slot remembers, and walks the list for
    the others. A slot's channels lie side by side in memory, so that slots in any order are read in whole
    cache lines.
    """
    check_history(scores, history, weight)
    importance, bs = scores.importance, contexts.lens.numel()
    channels, columns = importance.shape
    if bs == 0:
        return
    alone = bs == 1  # shares with nobody
    requests = [scores.starts, contexts.lens, contexts.table, contexts.reqs, contexts.table.stride(0)]
    before = torch.empty(0 if alone else columns, dtype=torch.int32, device=importance.device)
    if not alone:
        _claim_kernel[(bs, KNOBS.claim_programs)](
            before,
            history.owner,
            history.round,
            *requests,
            SHIFT=SHIFT,
            ALIGN=ALIGN,
            BLOCK=KNOBS.claim_block,
            PROGRAMS=KNOBS.claim_programs,
        )
    at_once = min(triton.next_power_of_2(channels), MAX_CHANNELS)
    _remember_kernel[(bs, KNOBS.programs)](
        importance,
        history.scores,
        history.owner,
        history.round,
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
        BLOCK=(KNOBS.tile_alone if alone else KNOBS.tile) // at_once,
        PROGRAMS=KNOBS.programs,
        num_warps=KNOBS.num_warps,
    )


@triton.jit
def _request(b, column_ptr, lens_ptr, table_ptr, reqs_ptr, stride_table, ALIGN: tl.constexpr):
    """First column of a request, below 0 where there is none, its length, and its row of the table."""
    slot_ptr = table_ptr + tl.load(reqs_ptr + b).to(tl.int64) * stride_table
    column = tl.multiple_of(tl.load(column_ptr + b), ALIGN)
    return column, tl.load(lens_ptr + b).to(tl.int32), slot_ptr


@triton.jit
def _block(block, length, slot_ptr, SHIFT: tl.constexpr, BLOCK: tl.constexpr):
    """[BLOCK] each: positions from `block` on, which of them have scores, and their slots."""
    offs = block + tl.arange(0, BLOCK)
    ok = (offs >= SHIFT) & (offs < length)
    return offs, ok, tl.load(slot_ptr + offs, mask=ok, other=0).to(tl.int64)


@triton.jit
def _mix(place, fresh, held, w, mask, UNKNOWN: tl.constexpr):
    """Write importance: fresh scores with those that are held mixed in; all are tiles [BLOCK, CHANNELS]."""
    mixed = tl.where(held == UNKNOWN, fresh, (1 - w) * fresh + w * held)
    tl.store(place, mixed.to(place.dtype.element_ty), mask=mask)


@triton.jit
def _name(round_ptr, b):
    """What request b writes into `owner` of its slots in this round: int64, round * 2**32 + request."""
    return tl.load(round_ptr) * 4294967296 + b


@triton.jit
def _claim_kernel(
    before_ptr,  # int32 [columns]: 1 + the request that owned the slot before this one in this round, 0: none
    owner_ptr,  # int64 [slots]
    round_ptr,  # int64 [1]
    column_ptr,  # int64 [bs], first columns, below 0: none
    lens_ptr,  # int [bs]
    table_ptr,  # int32 [requests, width]
    reqs_ptr,  # int [bs]
    stride_table,
    SHIFT: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    b, program = tl.program_id(0), tl.program_id(1)
    column, length, slot_ptr = _request(b, column_ptr, lens_ptr, table_ptr, reqs_ptr, stride_table, ALIGN)
    if column < 0:
        return
    mine, first = _name(round_ptr, b), _name(round_ptr, 0)
    for block in range(program * BLOCK, length, PROGRAMS * BLOCK):
        offs, ok, slots = _block(block, length, slot_ptr, SHIFT, BLOCK)
        found = tl.atomic_xchg(owner_ptr + slots, tl.zeros_like(slots) + mine, mask=ok)
        before = tl.where(found < first, 0, found - first + 1)  # an owner of an earlier round is none
        tl.store(before_ptr + column + offs, before.to(tl.int32), mask=ok)


@triton.jit
def _remember_kernel(
    importance_ptr,  # [channels, columns]
    history_ptr,  # [slots, channels]
    owner_ptr,  # from here on as in _claim_kernel
    round_ptr,
    before_ptr,
    weight_ptr,  # float32 [bs]
    column_ptr,
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
    ALONE: tl.constexpr,  # there is one request, which shares with nobody
    CHANNELS: tl.constexpr,  # at a time
    BLOCK: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    b, program = tl.program_id(0), tl.program_id(1)
    column, length, slot_ptr = _request(b, column_ptr, lens_ptr, table_ptr, reqs_ptr, stride_table, ALIGN)
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
        # Where others own all slots of a block, nothing is read.
        end = tl.where(tl.max(own.to(tl.int32), 0) > 0, channels, 0)
        for first in range(0, end, CHANNELS):
            c = first + tl.arange(0, CHANNELS)[None, :]
            mask = own[:, None] & (c < channels)  # [BLOCK, CHANNELS], as all tiles from here on
            rows = importance_ptr + c.to(tl.int64) * columns
            place, slot = rows + (column + offs)[:, None], history_ptr + slots[:, None] * channels + c
            held = tl.load(slot, mask=mask, other=UNKNOWN).to(tl.float32)
            fresh = tl.load(place, mask=(offs < wide)[:, None] & (c < channels), other=0.0).to(tl.float32)
            if w != 0:
                _mix(place, fresh, held, w, mask, UNKNOWN)
            new = tl.maximum(fresh, tl.where(held == UNKNOWN, held, held * decay))
            if not ALONE:
                other = before  # [BLOCK]: the next request of each slot's list, 1 + its place in the batch
                while tl.max(other, 0) > 0:
                    some = other > 0
                    at = tl.load(column_ptr + other - 1, mask=some, other=0) + offs
                    share = tl.load(weight_ptr + other - 1, mask=some, other=0.0)[:, None]
                    theirs, there = rows + at[:, None], mask & some[:, None]
                    fresh = tl.load(theirs, mask=there, other=0.0).to(tl.float32)
                    _mix(theirs, fresh, held, share, there & (share != 0), UNKNOWN)
                    new = tl.maximum(new, tl.where(there, fresh, UNKNOWN))
                    other = tl.load(before_ptr + at, mask=some, other=0)
            tl.store(slot, new.to(slot.dtype.element_ty), mask=mask)
