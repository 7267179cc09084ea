"""Sizes of the lists in Triton, and who has any: one launch each for what is a hundred of small ones in
torch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from sts_kernels.checks import check_columns, check_sizes
from sts_kernels.layout import WHOLE, Contexts, Count, Room, Rule, Sizes


@dataclass(frozen=True)
class SizesKnobs:
    """tile: (request, channel) pairs at a time. num_warps: of the only program."""

    tile: int = 2048
    num_warps: int = 8


KNOBS = SizesKnobs()


def score_columns(contexts: Contexts, keeps: torch.Tensor, rule: Rule, room: Room) -> torch.Tensor:
    """Kernel of `sts_kernels.torch_ops.score_columns` (see there); graph-safe, no host sync."""
    check_columns("score_columns", contexts, keeps, room)
    bs = contexts.lens.numel()
    columns = torch.empty(bs, dtype=torch.int64, device=contexts.lens.device)
    if bs:
        _columns_kernel[(1,)](
            contexts.lens,
            contexts.reqs,
            keeps,
            columns,
            bs,
            room.columns,
            room.budget,
            **_of_rule(rule),
            B=triton.next_power_of_2(bs),
            num_warps=1,
        )
    return columns


def _of_rule(rule: Rule) -> dict[str, float | int | None]:
    """By the names of kernels."""
    return {"KEEP": rule.keep, "BUDGET": rule.budget, "LEAST": rule.least, "GUARD": rule.guard}


def size_lists(
    contexts: Contexts,
    carried_lens: torch.Tensor,
    keeps: torch.Tensor,
    rule: Rule,
    room: Room,
    totals: torch.Tensor,
    *,
    split: torch.Tensor | None = None,
    full: torch.Tensor | None = None,
    list_full: bool = False,
) -> Sizes:
    """Kernel of `sts_kernels.torch_ops.size_lists` (see there); graph-safe, no host sync."""
    check_sizes(contexts, carried_lens, keeps, split, room)
    lens, channels = contexts.lens, room.channels
    bs, device = lens.numel(), lens.device
    # A tensor each, not parts of one: Triton compiles anew for a pointer of another alignment.
    known, sparse, budgets = (torch.empty(bs, dtype=torch.int64, device=device) for _ in range(3))
    starts = torch.empty(bs, channels, dtype=torch.int64, device=device)
    counts = torch.empty(bs, channels, dtype=torch.int32, device=device)
    sizes = Sizes(known, sparse, budgets, starts, counts)
    if bs == 0:
        return sizes
    wide = triton.next_power_of_2(channels)
    _sizes_kernel[(1,)](
        lens,
        contexts.reqs,
        carried_lens,
        keeps,
        lens if full is None else full,
        keeps if split is None else split,
        *sizes,
        totals,
        bs,
        channels,
        *room[1:],
        **_of_rule(rule),
        FORCED=rule.forced,
        STEPS=0 if split is None else split.shape[0] - 1,
        FULL=full is not None,
        LIST_FULL=list_full,
        WHOLE=WHOLE,
        SPARSE_VERIFIES=Count.SPARSE_VERIFIES.value,
        DENSE_VERIFIES=Count.DENSE_VERIFIES.value,
        FULL_VERIFIES=Count.FULL_VERIFIES.value,
        ASIDE_VERIFIES=Count.ASIDE_VERIFIES.value,
        B=max(1, min(triton.next_power_of_2(bs), KNOBS.tile // wide)),
        C=wide,
        num_warps=KNOBS.num_warps,
    )
    return sizes


@triton.jit
def _budgets(
    lens_ptr,  # int [bs]
    reqs_ptr,  # int [bs]
    keeps_ptr,  # float64 [requests]
    b,  # int [B], places in the batch
    there,  # bool [B], which of them there are
    most,  # of Room: tokens of a list
    KEEP: tl.constexpr,
    BUDGET: tl.constexpr,
    LEAST: tl.constexpr,
    GUARD: tl.constexpr,
    B: tl.constexpr,
):
    """int64 [B] each: lengths, rows of the table, and budgets, as in torch_ops.budget_tokens."""
    length = tl.load(lens_ptr + b, mask=there, other=0).to(tl.int64)
    req = tl.load(reqs_ptr + b, mask=there, other=0).to(tl.int64)
    context = length.to(tl.float64)
    guard = tl.full((B,), GUARD, tl.float64)  # a float that is no tensor would be a float32
    keep = tl.load(keeps_ptr + req)
    own = keep == keep  # not NaN
    if KEEP is None:
        wanted = tl.full((B,), BUDGET, tl.float64)
    else:
        wanted = tl.ceil(tl.full((B,), KEEP, tl.float64) * context - guard)
    wanted = tl.where(own, tl.ceil(keep * context - guard), wanted)
    budget = tl.minimum(tl.maximum(wanted, LEAST), context).to(tl.int64)
    return length, req, tl.where(budget > most, length, budget)


@triton.jit
def _columns_kernel(
    lens_ptr,  # int [bs]
    reqs_ptr,  # int [bs]
    keeps_ptr,  # float64 [requests]
    column_ptr,  # int64 [bs], written
    bs,
    columns,  # of Room, and so is the next
    most,
    KEEP: tl.constexpr,
    BUDGET: tl.constexpr,
    LEAST: tl.constexpr,
    GUARD: tl.constexpr,
    B: tl.constexpr,  # bs, padded to a power of two
):
    b = tl.arange(0, B)
    there = b < bs
    length, req, budget = _budgets(
        lens_ptr, reqs_ptr, keeps_ptr, b, there, most, KEEP, BUDGET, LEAST, GUARD, B
    )
    tl.store(column_ptr + b, tl.where(budget < length, b.to(tl.int64) * columns, -1), mask=there)


@triton.jit
def _sizes_kernel(
    lens_ptr,  # int [bs]
    reqs_ptr,  # int [bs]
    carried_ptr,  # int64 [requests]
    keeps_ptr,  # float64 [requests]
    full_ptr,  # bool [bs], if FULL
    split_ptr,  # float64 [STEPS + 1, channels], if STEPS
    known_ptr,  # int64 [bs]
    sparse_ptr,  # int64 [bs]
    budgets_ptr,  # int64 [bs]
    start_ptr,  # int64 [bs, channels]
    count_ptr,  # int32 [bs, channels]
    totals_ptr,  # int64 [by Count]
    bs,
    channels,
    columns,  # from here on of Room
    most,
    entries,
    KEEP: tl.constexpr,
    BUDGET: tl.constexpr,
    LEAST: tl.constexpr,
    FORCED: tl.constexpr,
    GUARD: tl.constexpr,
    STEPS: tl.constexpr,
    FULL: tl.constexpr,
    LIST_FULL: tl.constexpr,
    WHOLE: tl.constexpr,
    SPARSE_VERIFIES: tl.constexpr,  # places in the totals
    DENSE_VERIFIES: tl.constexpr,
    FULL_VERIFIES: tl.constexpr,
    ASIDE_VERIFIES: tl.constexpr,
    B: tl.constexpr,  # requests at a time
    C: tl.constexpr,  # channels, padded to a power of two
):
    c = tl.arange(0, C)[None, :]  # [1, C]
    guard = tl.full((B,), GUARD, tl.float64)  # a float that is no tensor would be a float32
    sparsely, densely, fully = tl.cast(0, tl.int64), tl.cast(0, tl.int64), tl.cast(0, tl.int64)
    asides = tl.cast(0, tl.int64)
    for first in range(0, bs, B):
        b = first + tl.arange(0, B)  # [B], and so is what is loaded by it
        there = b < bs
        length, req, budget = _budgets(
            lens_ptr, reqs_ptr, keeps_ptr, b, there, most, KEEP, BUDGET, LEAST, GUARD, B
        )
        column, context = b.to(tl.int64) * columns, length.to(tl.float64)
        sizes = tl.broadcast_to(budget[:, None], (B, C))  # [B, C]
        if STEPS > 0:
            at = budget.to(tl.float64) / tl.maximum(context, 1) * STEPS
            low = tl.minimum(at.to(tl.int64), STEPS - 1)
            part_ptr = split_ptr + low[:, None] * channels + c
            a = tl.load(part_ptr, mask=c < channels, other=0)  # [B, C]
            z = tl.load(part_ptr + channels, mask=c < channels, other=0)  # [B, C]
            weight = (at - low.to(tl.float64))[:, None]
            # Rounded as torch.lerp rounds, so that both implementations list the same tokens.
            part = tl.where(weight < 0.5, a + weight * (z - a), z - (z - a) * (1 - weight))
            sizes = tl.ceil(part * context[:, None] - guard[:, None]).to(tl.int64)
            sizes = tl.minimum(tl.maximum(sizes, FORCED), length[:, None])
        # Lists.
        known = there & (tl.load(carried_ptr + req) == length)
        sparse, aside = known & (budget < length), known & (budget >= length)
        full = tl.zeros((B,), tl.int1)
        if FULL:
            full = tl.load(full_ptr + b, mask=there, other=0) != 0
            if not LIST_FULL:
                sparse = sparse & (full == 0)
        listed = sparse[:, None] & (sizes < length[:, None]) & (c < channels)
        room = tl.where(listed, sizes, 0)  # [B, C]
        start = (b.to(tl.int64) * entries)[:, None] + tl.cumsum(room, 1) - room
        count = tl.where(listed, sizes, WHOLE).to(tl.int32)
        tl.store(known_ptr + b, tl.where(known, column, -1), mask=there)
        tl.store(sparse_ptr + b, tl.where(sparse, column, -1), mask=there)
        tl.store(budgets_ptr + b, budget, mask=there)
        place = b[:, None].to(tl.int64) * channels + c
        tl.store(start_ptr + place, start, mask=there[:, None] & (c < channels))
        tl.store(count_ptr + place, count, mask=there[:, None] & (c < channels))
        real = there & (req > 0)  # row 0 pads the batches of CUDA graphs
        chosen = real & (full == 0)
        sparsely += tl.sum((known & chosen).to(tl.int64), 0)
        densely += tl.sum(((known == 0) & chosen).to(tl.int64), 0)
        fully += tl.sum((full & real).to(tl.int64), 0)
        asides += tl.sum((aside & chosen).to(tl.int64), 0)
    tl.store(totals_ptr + SPARSE_VERIFIES, tl.load(totals_ptr + SPARSE_VERIFIES) + sparsely)
    tl.store(totals_ptr + DENSE_VERIFIES, tl.load(totals_ptr + DENSE_VERIFIES) + densely)
    tl.store(totals_ptr + FULL_VERIFIES, tl.load(totals_ptr + FULL_VERIFIES) + fully)
    tl.store(totals_ptr + ASIDE_VERIFIES, tl.load(totals_ptr + ASIDE_VERIFIES) + asides)
