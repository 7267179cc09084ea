"""Selections that outlive their round, in Triton: who goes by one, and where its slots are now."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from sts_kernels.checks import check_kept, check_kept_lists, check_kept_selected
from sts_kernels.layout import KEPT_TOKENS, SHIFT, WHOLE, Contexts, Count, Kept, KeptSizes, Lists, Room, Sizes


@dataclass(frozen=True)
class KeptKnobs:
    """tile: (request, channel) pairs that the program of size_kept takes at a time. block: entries of a list
    at a time; programs: that share one list at most."""

    tile: int = 2048
    block: int = 1024
    programs: int = 16


KNOBS = KeptKnobs()


def size_kept(
    contexts: Contexts,
    sizes: Sizes,
    kept: Kept,
    room: Room,
    totals: torch.Tensor,
    *,
    every: int,
    percent: int | None = None,
    first_too: bool = False,
) -> KeptSizes:
    """Kernel of `sts_kernels.torch_ops.size_kept` (see there); graph-safe, no host sync."""
    check_kept(kept, sizes, room)
    lens, bs = contexts.lens, contexts.lens.numel()
    found = Sizes(
        torch.empty_like(sizes.known),
        torch.empty_like(sizes.sparse),
        sizes.budgets,
        sizes.starts,
        torch.empty_like(sizes.counts),
    )
    lists = torch.empty_like(sizes.starts), torch.empty_like(sizes.counts)
    own_lens = torch.empty_like(lens), torch.empty_like(lens)
    goes = torch.empty_like(lens, dtype=torch.bool)
    made = KeptSizes(found, *lists, *own_lens, goes, torch.empty_like(sizes.starts))
    if bs == 0:
        return made
    wide = triton.next_power_of_2(room.channels)
    _size_kept_kernel[(1,)](
        lens,
        contexts.reqs,
        sizes.known,
        sizes.sparse,
        sizes.budgets,
        sizes.starts,
        sizes.counts,
        *kept[2:],
        found.known,
        found.sparse,
        found.counts,
        *made[1:],
        totals,
        bs,
        room.channels,
        room.entries,
        every,
        0 if percent is None else percent,
        FIRST_TOO=first_too,
        KEPT_TOKENS=KEPT_TOKENS,
        WHOLE=WHOLE,
        SCORED_ROUNDS=Count.SCORED_ROUNDS.value,
        KEPT_ROUNDS=Count.KEPT_ROUNDS.value,
        B=max(1, min(triton.next_power_of_2(bs), KNOBS.tile // wide)),
        C=wide,
        num_warps=8,
    )
    return made


def list_kept(kept: Kept, contexts: Contexts, lists: Lists, draft_indices: torch.Tensor) -> None:
    """Kernel of `sts_kernels.torch_ops.list_kept` (see there); graph-safe, no host sync."""
    check_kept_lists(kept, contexts, lists)
    bs, channels = lists.counts.shape
    if bs == 0:
        return
    _list_kept_kernel[(bs, channels, KNOBS.programs)](
        kept.positions,
        kept.starts,
        kept.counts,
        contexts.table,
        contexts.reqs,
        contexts.lens,
        lists.indices,
        draft_indices,
        lists.starts,
        lists.counts,
        contexts.table.stride(0),
        channels,
        PROGRAMS=KNOBS.programs,
        SHIFT=SHIFT,
        BLOCK=KNOBS.block,
    )


def keep_selected(kept: Kept, contexts: Contexts, found: KeptSizes, lists: Lists) -> None:
    """Kernel of `sts_kernels.torch_ops.keep_selected` (see there); graph-safe, no host sync."""
    check_kept_selected(kept, contexts, found, lists)
    bs, channels = lists.counts.shape
    if bs == 0:
        return
    _keep_selected_kernel[(bs,)](
        contexts.reqs,
        found.scored,
        found.sizes.starts,
        found.sizes.counts,
        found.keep_at,
        found.starts,
        found.counts,
        kept.starts,
        kept.counts,
        lists.starts,
        lists.counts,
        channels,
        C=triton.next_power_of_2(channels),
        num_warps=1,
    )


@triton.jit
def _size_kept_kernel(
    lens_ptr,  # int [bs]
    reqs_ptr,  # int [bs]
    known_ptr,  # int64 [bs], from here on of Sizes
    sparse_ptr,  # int64 [bs]
    budgets_ptr,  # int64 [bs]
    start_ptr,  # int64 [bs, channels]
    count_ptr,  # int32 [bs, channels]
    selected_ptr,  # int32 [rows, channels], from here on of Kept
    made_ptr,  # int64 [rows]
    rounds_ptr,  # int64 [rows]
    last_ptr,  # int64 [rows]
    accepted_ptr,  # int64 [rows, 4]
    known_out_ptr,  # int64 [bs], from here on written
    sparse_out_ptr,  # int64 [bs]
    count_out_ptr,  # int32 [bs, channels]
    kept_start_ptr,  # int64 [bs, channels]
    kept_count_ptr,  # int32 [bs, channels]
    scored_lens_ptr,  # int [bs]
    kept_lens_ptr,  # int [bs]
    goes_ptr,  # bool [bs]
    keep_at_ptr,  # int64 [bs, channels]
    totals_ptr,  # int64 [by Count]
    bs,
    channels,
    entries,
    every,
    percent,  # 0: any number of tokens will do
    FIRST_TOO: tl.constexpr,
    KEPT_TOKENS: tl.constexpr,
    WHOLE: tl.constexpr,
    SCORED_ROUNDS: tl.constexpr,  # places in the totals
    KEPT_ROUNDS: tl.constexpr,
    B: tl.constexpr,  # requests at a time
    C: tl.constexpr,  # channels, padded to a power of two
):
    c = tl.arange(0, C)[None, :]  # [1, C]
    scored_rounds, kept_rounds = tl.cast(0, tl.int64), tl.cast(0, tl.int64)
    for first in range(0, bs, B):
        b = first + tl.arange(0, B)  # [B], and so is what is loaded by it
        there = b < bs
        length = tl.load(lens_ptr + b, mask=there, other=0).to(tl.int64)
        req = tl.load(reqs_ptr + b, mask=there, other=0).to(tl.int64)
        known = tl.load(known_ptr + b, mask=there, other=-1)
        sparse = tl.load(sparse_ptr + b, mask=there, other=-1)
        budget = tl.load(budgets_ptr + b, mask=there, other=0)
        made, rounds = tl.load(made_ptr + req), tl.load(rounds_ptr + req)
        came = length - tl.load(last_ptr + req)
        sum_ptr = accepted_ptr + req * 4
        fresh, fresh_rounds = tl.load(sum_ptr), tl.load(sum_ptr + 1)
        old, old_rounds = tl.load(sum_ptr + 2), tl.load(sum_ptr + 3)
        since = length - made
        real = there & (req > 0)
        fits = real & (made > 0) & (known >= 0) & (since >= 0) & (since <= KEPT_TOKENS)
        by_scored, by_kept = (fits & (rounds == 1)).to(tl.int64), (fits & (rounds > 1)).to(tl.int64)
        fresh, fresh_rounds = fresh + came * by_scored, fresh_rounds + by_scored
        old, old_rounds = (old + came) * by_kept, (old_rounds + 1) * by_kept
        enough = 100 * old * fresh_rounds >= percent * fresh * old_rounds
        stays = fits & (rounds < every) & enough
        goes = stays
        if FIRST_TOO:
            goes = stays | (fits & (sparse >= 0))
        tl.debug_barrier()  # every warp has loaded what is kept of a row before one of them writes there
        tl.store(rounds_ptr + req, tl.where(stays, rounds + 1, 1), mask=there)
        tl.store(last_ptr + req, length, mask=there)
        tl.store(made_ptr + req, tl.where(stays, made, tl.where(sparse >= 0, length, 0)), mask=there)
        tl.store(sum_ptr, fresh, mask=there)
        tl.store(sum_ptr + 1, fresh_rounds, mask=there)
        tl.store(sum_ptr + 2, old, mask=there)
        tl.store(sum_ptr + 3, old_rounds, mask=there)
        tl.store(known_out_ptr + b, tl.where(stays, -1, known), mask=there)
        tl.store(sparse_out_ptr + b, tl.where(stays, -1, sparse), mask=there)
        tl.store(scored_lens_ptr + b, tl.where(stays, 0, length), mask=there)
        tl.store(kept_lens_ptr + b, tl.where(goes, length, 0), mask=there)
        tl.store(goes_ptr + b, goes, mask=there)
        wanted = real & (known >= 0) & (budget < length)
        scored_rounds += tl.sum((wanted & (stays == 0)).to(tl.int64), 0)
        kept_rounds += tl.sum((stays & (sparse >= 0)).to(tl.int64), 0)

        inside = there[:, None] & (c < channels)  # [B, C]
        place = b[:, None].to(tl.int64) * channels + c
        selected = tl.load(selected_ptr + req[:, None] * channels + c, mask=inside, other=WHOLE)
        listed = (goes & (sparse >= 0))[:, None] & (selected >= 0)
        room = tl.where(listed, selected + since[:, None], 0)  # int64 [B, C]
        start = (b.to(tl.int64) * entries)[:, None] + tl.cumsum(room, 1) - room
        own_start = tl.load(start_ptr + place, mask=inside, other=0)
        own_count = tl.load(count_ptr + place, mask=inside, other=0)
        kept_count = tl.where(listed, room, WHOLE).to(tl.int32)
        tl.store(kept_start_ptr + place, start, mask=inside)
        tl.store(kept_count_ptr + place, kept_count, mask=inside)
        tl.store(count_out_ptr + place, tl.where(stays[:, None], WHOLE, own_count), mask=inside)
        tl.store(keep_at_ptr + place, own_start + ((req - b) * entries)[:, None], mask=inside)
    tl.store(totals_ptr + SCORED_ROUNDS, tl.load(totals_ptr + SCORED_ROUNDS) + scored_rounds)
    tl.store(totals_ptr + KEPT_ROUNDS, tl.load(totals_ptr + KEPT_ROUNDS) + kept_rounds)


@triton.jit
def _list_kept_kernel(
    positions_ptr,  # int32 [entries]
    first_ptr,  # int64 [rows, channels], where the positions of a list start
    number_ptr,  # int32 [rows, channels], and how many there are
    table_ptr,  # int32 [requests, width]
    reqs_ptr,  # int [bs]
    lens_ptr,  # int [bs]
    indices_ptr,  # int32 [entries], written
    draft_ptr,  # int32 [entries], written
    start_ptr,  # int64 [bs, channels]
    count_ptr,  # int32 [bs, channels], below 0: WHOLE
    stride_table,
    channels,
    PROGRAMS: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b, c, program = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    count = tl.load(count_ptr + b * channels + c)
    if program * BLOCK >= count:
        return
    req = tl.load(reqs_ptr + b).to(tl.int64)
    length = tl.load(lens_ptr + b).to(tl.int32)
    start = tl.load(start_ptr + b * channels + c)
    list_ptr = positions_ptr + tl.load(first_ptr + req * channels + c)
    number = tl.load(number_ptr + req * channels + c)
    row_ptr = table_ptr + req * stride_table
    for block in range(program * BLOCK, count, PROGRAMS * BLOCK):
        entry = block + tl.arange(0, BLOCK)
        here = entry < count
        position = tl.load(list_ptr + entry, mask=entry < number, other=0)
        # What came since ends the context.
        position = tl.where(entry < number, position, length - count + entry)
        # No draft key is about position 0: the one about the bonus token takes its place.
        key = tl.where(position > 0, position, length) - SHIFT
        slot = tl.load(row_ptr + position, mask=here, other=0)
        draft_slot = tl.load(row_ptr + key, mask=here, other=0)
        tl.store(indices_ptr + start + entry, slot, mask=here)
        tl.store(draft_ptr + start + entry, draft_slot, mask=here)


@triton.jit
def _keep_selected_kernel(
    reqs_ptr,  # int [bs]
    scored_ptr,  # int [bs], above 0: of who is scored
    own_start_ptr,  # int64 [bs, channels], and the next two: of what was selected
    own_count_ptr,  # int32 [bs, channels]
    keep_at_ptr,  # int64 [bs, channels]
    old_start_ptr,  # int64 [bs, channels], and the next one: of what is kept from an earlier round
    old_count_ptr,  # int32 [bs, channels]
    first_ptr,  # int64 [rows, channels], from here on written, two of Kept first
    number_ptr,  # int32 [rows, channels]
    start_ptr,  # int64 [bs, channels]
    count_ptr,  # int32 [bs, channels]
    channels,
    C: tl.constexpr,  # channels, padded to a power of two
):
    b, c = tl.program_id(0), tl.arange(0, C)
    inside, place = c < channels, b * channels + c
    req = tl.load(reqs_ptr + b).to(tl.int64)
    scored = tl.load(scored_ptr + b) > 0
    own = inside & scored
    own_count = tl.load(own_count_ptr + place, mask=own)
    tl.store(first_ptr + req * channels + c, tl.load(keep_at_ptr + place, mask=own), mask=own)
    tl.store(number_ptr + req * channels + c, own_count, mask=own)
    own_start = tl.load(own_start_ptr + place, mask=own)
    old_start = tl.load(old_start_ptr + place, mask=inside)
    old_count = tl.load(old_count_ptr + place, mask=inside)
    tl.store(start_ptr + place, tl.where(scored, own_start, old_start), mask=inside)
    tl.store(count_ptr + place, tl.where(scored, own_count, old_count), mask=inside)
