"""Selection in Triton: the exact top k of a row of scores, a row for each (request, channel).

The k-th largest score of a row, its threshold, is found bit by bit: a bit is set if enough scores have it.
To count them fast, the 32 neighbouring scores of a lane are transposed as a matrix of bits. Word b, the plane
b, then has bit b of all 32, and one AND and one population count do the work of 32 comparisons. A row of one
tile, 32 x WORDS scores, is read and transposed once and stays in the registers of one program.

A longer row is read again by each pass of the search, which finds two bits of the threshold, where rows are
so many that a program each keeps the device busy. Where they are few, several programs have a part of a row
each. One kernel counts the scores of each part by rank, which is all but their lowest bits. A second one
counts those of the threshold's rank by these bits, unless they are no matter. The third knows from all counts
where its part goes in the list.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from sts_kernels.checks import check_select, expect, expect_half
from sts_kernels.layout import (
    ALIGN,
    PARTS,
    RANKS,
    SEGMENT,
    SHIFT,
    UNRANKED_BITS,
    Contexts,
    Lists,
    Scores,
    parts_of_rows,
)
from sts_kernels.split_kv import starts_early


@dataclass(frozen=True)
class SelectKnobs:
    """words: of 32 scores, in a tile. num_warps: of a program that lists a row by itself. maxnreg: registers
    that a thread of it has at most; with 128, two programs fit on a multiprocessor. alone: scores of such a
    row, of one tile at most; 0: all rows are in parts. many: from so many rows on a program lists a row by
    itself however long it is; not where the lowest bits are no matter, which parts count by one kernel less.
    parts, segment: see `layout.parts_of_rows`. counted, listed: scores of a part that a program counts or
    lists at a time. part_warps: of one. early: whether these start while the kernel before them ends.
    """

    words: int = 1024
    num_warps: int = 8
    maxnreg: int = 128
    alone: int = 32768
    many: int = 48
    parts: int = PARTS
    segment: int = SEGMENT
    counted: int = 4096
    listed: int = 2048
    part_warps: int = 4
    early: bool = True


KNOBS = SelectKnobs()
MOST_PARTS = 8  # of a row, whose counts a program has at a time
ANY_LENGTH = 2**31 - 1
# A key is the bits of a float16 score without the sign: those of non-negative numbers are in their order.
KEY_BITS = tl.constexpr(15)
# The key of a score that is no number, above that of infinity. It ranks above every score, so that no token
# is lost for want of a score.
NO_SCORE = tl.constexpr(0x7C01)
EACH_HALF = tl.constexpr(0x00010001)  # times a score: a word that has it twice
ALL = tl.constexpr(0xFFFFFFFF)


def select_tokens(
    scores: Scores,
    contexts: Contexts,
    budgets: torch.Tensor,
    lists: Lists,
    *,
    sink: int,
    recent: int,
    top_p: torch.Tensor | None = None,
    draft_indices: torch.Tensor | None = None,
) -> None:
    """Kernel of `sts_kernels.torch_ops.select_tokens` (see there); graph-safe, no host sync.

    `scores.starts` must be multiples of ALIGN where the number of columns is one.
    """
    check_select(scores, budgets, lists)
    expect_half("select_tokens", scores)
    select_rows(scores, contexts, lists, sink=sink, recent=recent, top_p=top_p, draft_indices=draft_indices)


def select_rows(
    scores: Scores,
    contexts: Contexts,
    lists: Lists,
    *,
    sink: int,
    recent: int,
    top_p: torch.Tensor | None = None,
    draft_indices: torch.Tensor | None = None,
    ranked: bool = False,
) -> None:
    """ranked: scores that differ in their last UNRANKED_BITS alone are equal."""
    ok = draft_indices is None or sink >= SHIFT
    expect("select_tokens", ok, f"sink is {sink}, and no draft key is about the first {SHIFT} positions")
    if contexts.lens.numel() == 0:
        return
    alone = min(KNOBS.alone, 32 * KNOBS.words)
    if not ranked and lists.counts.numel() >= KNOBS.many:
        alone = ANY_LENGTH
    rows = (
        scores.importance.view(torch.int16),
        scores.starts,
        contexts.lens,
        lists.counts,
        scores.importance.stride(0),
    )
    listed = (
        contexts.table,
        contexts.reqs,
        lists.indices,
        lists.indices if draft_indices is None else draft_indices,
        lists.starts,
        contexts.table.stride(0),
    )
    of_rows = {"SINK": sink, "RECENT": recent, "ALONE": alone}
    of_rows |= {"ALIGN": ALIGN if scores.importance.stride(0) % ALIGN == 0 else 1}
    of_lists = {"DRAFT_SHIFT": SHIFT if draft_indices is not None else 0}
    of_lists |= {"FORCED": min(1024, triton.next_power_of_2(sink + recent))}
    if alone or top_p is not None:
        _select_kernel[tuple(lists.counts.shape)](
            *rows,
            *listed,
            contexts.lens if top_p is None else top_p,
            TOP_P=top_p is not None,
            UNRANKED=UNRANKED_BITS if ranked else 0,
            WORDS=KNOBS.words,
            num_warps=KNOBS.num_warps,
            maxnreg=KNOBS.maxnreg,
            **of_rows,
            **of_lists,
        )
    longest = contexts.table.shape[1] - recent  # what of a row may be listed
    if longest > alone:
        _list_in_parts(rows, listed, longest, ranked, of_rows, of_lists)


def _list_in_parts(
    rows: tuple, listed: tuple, longest: int, ranked: bool, of_rows: dict, of_lists: dict
) -> None:
    """What no program lists by itself. rows, listed, and shapes of them: of _select_kernel."""
    counts, device = rows[3], rows[0].device
    parts, segment = parts_of_rows(counts.numel(), longest, parts=KNOBS.parts, least=KNOBS.segment)
    counted = torch.empty(*counts.shape, parts, RANKS, dtype=torch.int32, device=device)
    refined = counted  # which nothing reads, unless
    if not ranked:
        refined = torch.empty(*counts.shape, parts, 1 << UNRANKED_BITS, dtype=torch.int32, device=device)
    early = starts_early(device) if KNOBS.early else {}
    of_parts = {**of_rows, "ALL_RANKS": RANKS, "UNRANKED": UNRANKED_BITS, "EARLY": bool(early)}
    of_parts |= {"num_warps": KNOBS.part_warps, **early}
    at_once = {"AT_ONCE": min(MOST_PARTS, triton.next_power_of_2(parts))}
    grid = (parts, *counts.shape)
    _count_kernel[grid](*rows, counted, segment, BLOCK=KNOBS.counted, **of_parts)
    if not ranked:
        _refine_kernel[grid](*rows, counted, refined, segment, BLOCK=KNOBS.counted, **at_once, **of_parts)
    found = (counted, refined, segment)
    of_parts |= of_lists
    _list_kernel[grid](*rows, *listed, *found, RANKED=ranked, BLOCK=KNOBS.listed, **at_once, **of_parts)


# ---- words and planes


@triton.jit
def _popcount(x):
    """Bits set in each uint32, as int32. The compiler makes one instruction of this."""
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def _lowest(number):
    """uint32 with the lowest `number` bits set: none if it is negative, all from 32 on."""
    some = (tl.full(number.shape, 1, tl.uint32) << (number & 31).to(tl.uint32)) - 1
    return tl.where(number >= 32, ALL, tl.where(number > 0, some, 0)).to(tl.uint32)


@triton.jit
def _inside(at, first, last):
    """uint32 [WORDS, 1]: which of the 32 scores from `at` [WORDS, 1] on are at [first, last), a bit each."""
    return _lowest(last - at) & (_lowest(first - at) ^ ALL)


@triton.jit
def _row(scores_ptr, column_ptr, b, c, stride_channel, ALIGN: tl.constexpr):
    """Where the scores of a request in a channel begin."""
    return scores_ptr + c.to(tl.int64) * stride_channel + tl.load(column_ptr + b) // ALIGN * ALIGN


@triton.jit
def _bits(row_ptr, offs, last, ALIGN: tl.constexpr):
    """uint32, the float16 bits of the scores at `offs`. Those from `last` on are not meant to be used."""
    # Scores are read up to a multiple of ALIGN, where this request's columns end: a mask by position would
    # split the access into single scores.
    bits = tl.load(row_ptr + offs, mask=offs // ALIGN * ALIGN < last, other=0)
    return bits.to(tl.uint16, bitcast=True).to(tl.uint32)


@triton.jit
def _words(row_ptr, at, last, ALIGN: tl.constexpr):
    """The 32 scores from each of `at` [WORDS, 1] on, two to a word: uint32 [WORDS, 8] twice. Column r of the
    first has scores r and r + 16, column r of the second scores r + 8 and r + 24."""
    offs = at + tl.arange(0, 8)[None, :]
    low = _bits(row_ptr, offs, last, ALIGN) | (_bits(row_ptr, offs + 16, last, ALIGN) << 16)
    high = _bits(row_ptr, offs + 8, last, ALIGN) | (_bits(row_ptr, offs + 24, last, ALIGN) << 16)
    return low, high


@triton.jit
def _swap(a, b, BY: tl.constexpr, MASK: tl.constexpr):
    """One step of the transposition: of every 2 * BY bits the upper BY of `a` and the lower BY of `b` trade
    places. MASK: the lower ones."""
    return (a & MASK) | ((b & MASK) << BY), ((a >> BY) & MASK) | (b & (MASK << BY))


@triton.jit
def _swap_columns(x, BY: tl.constexpr, MASK: tl.constexpr):
    """`_swap` of the even columns of [WORDS, n] with the odd ones, two [WORDS, n / 2]."""
    even, odd = tl.split(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))
    return _swap(even, odd, BY, MASK)


@triton.jit
def _eight(x):
    """The 8 columns of [WORDS, 8], each [WORDS, 1], transposed among themselves."""
    a, b = _swap_columns(x, 1, 0x55555555)
    a, c = _swap_columns(a, 2, 0x33333333)
    b, d = _swap_columns(b, 2, 0x33333333)
    a0, a4 = _swap_columns(a, 4, 0x0F0F0F0F)
    b1, b5 = _swap_columns(b, 4, 0x0F0F0F0F)
    c2, c6 = _swap_columns(c, 4, 0x0F0F0F0F)
    d3, d7 = _swap_columns(d, 4, 0x0F0F0F0F)
    return a0, b1, c2, d3, a4, b5, c6, d7


@triton.jit
def _planes(row_ptr, at, last, ALIGN: tl.constexpr):
    """KEY_BITS planes [WORDS, 1]: bit i of plane b is bit b of the key at `at` [WORDS, 1] + i."""
    few, more = _words(row_ptr, at, last, ALIGN)
    few, more = _swap(few, more, 8, 0x00FF00FF)
    planes = _eight(few) + _eight(more)
    # A NaN has all bits of the exponent and any below it. Of those below, NO_SCORE has the lowest alone.
    nan = planes[0]
    for b in tl.static_range(1, 10):
        nan |= planes[b]
    nan &= planes[10] & planes[11] & planes[12] & planes[13] & planes[14]
    low = (planes[0] | nan,)
    for b in tl.static_range(1, 10):
        low += (planes[b] & (nan ^ ALL),)
    return low + planes[10:15]


# ---- the threshold: the highest key that at least `wanted` scores reach, and how many reach it


@triton.jit
def _search_tile(planes, active, wanted, UNRANKED: tl.constexpr):
    """Bit by bit in registers. active: uint32 [WORDS, 1], the scores to search, and then those of them whose
    upper bits are the threshold's. The threshold has no bit of those that are not ranked."""
    threshold = 0
    above = 0  # how many scores are above the active ones
    reach = tl.sum(_popcount(active))
    for i in tl.static_range(KEY_BITS - UNRANKED):
        plane = planes[KEY_BITS - 1 - i]
        number = above + tl.sum(_popcount(active & plane))
        enough = number >= wanted
        threshold = threshold * 2 + enough.to(tl.int32)
        reach = tl.where(enough, number, reach)
        above = tl.where(enough, above, number)
        active &= plane ^ tl.where(enough, 0, ALL).to(tl.uint32)
    return threshold << UNRANKED, reach


@triton.jit
def _cleared(words, inside, FIRST: tl.constexpr):
    """`words` [WORDS, 8] of `_words`, whose column 0 begins with score FIRST, with 0 for scores that are not
    `inside` [WORDS, 1]."""
    column = (FIRST + tl.arange(0, 8)[None, :]).to(tl.uint32)
    return words & (((inside >> column) & EACH_HALF) * 0xFFFF)


@triton.jit
def _reaching(words, key):
    """uint32 [WORDS], a count in each half: how many scores of `words` [WORDS, 8] are at least `key`."""
    # A score has 15 bits: the bit above is set, and the subtraction clears it where the key is higher.
    spare: tl.constexpr = EACH_HALF << KEY_BITS
    return tl.sum((((words | spare) - key.to(tl.uint32) * EACH_HALF) >> KEY_BITS) & EACH_HALF, 1)


@triton.jit
def _search_row(row_ptr, first, last, wanted, ALIGN: tl.constexpr, WORDS: tl.constexpr):
    """Two bits a pass over the row, which counts the scores that reach each of three keys."""
    tiles = tl.cdiv(last, 32 * WORDS)
    threshold = 0
    reach = last - first
    for i in range(8):
        step = 1 << (14 - 2 * i)
        # uint32 [WORDS] for each of the three keys, as `_reaching` counts.
        counts = (tl.zeros([WORDS], tl.uint32), tl.zeros([WORDS], tl.uint32), tl.zeros([WORDS], tl.uint32))
        for tile in range(tiles):
            at = (tile * WORDS + tl.arange(0, WORDS)[:, None]) * 32
            low, high = _words(row_ptr, at, last, ALIGN)
            if (tile * 32 * WORDS < first) | (tile == tiles - 1):
                inside = _inside(at, first, last)
                low, high = _cleared(low, inside, 0), _cleared(high, inside, 8)
            more = ()
            for k in tl.static_range(3):
                key = threshold + (k + 1) * step
                more += (counts[k] + _reaching(low, key) + _reaching(high, key),)
            counts = more
        base = threshold
        for k in tl.static_range(3):
            key = base + (k + 1) * step
            number = tl.sum((counts[k] & 0xFFFF) + (counts[k] >> 16)).to(tl.int32)
            # No threshold is above NO_SCORE: all NaN are equal, as in _planes.
            enough = (number >= wanted) & (key <= NO_SCORE)
            threshold = tl.where(enough, key, threshold)
            reach = tl.where(enough, number, reach)
    return threshold, reach


@triton.jit
def _mass(row_ptr, begin, end, least, ALIGN: tl.constexpr, BLOCK: tl.constexpr):
    """Sum of the scores in [begin, end) with a key of at least `least`, and how many; NaN counts as 0."""
    total = tl.zeros([BLOCK], tl.float32)
    number = tl.zeros([BLOCK], tl.int32)
    for block in range(0, end, BLOCK):
        offs = block + tl.arange(0, BLOCK)
        key = _bits(row_ptr, offs, end, ALIGN) & 0x7FFF  # [BLOCK]
        inside = (offs >= begin) & (offs < end) & (key >= least)
        value = key.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
        total += tl.where(inside & (key < NO_SCORE), value, 0.0)
        number += inside.to(tl.int32)
    return tl.sum(total), tl.sum(number)


@triton.jit
def _top_p_wanted(row_ptr, length, first, last, top_p, ALIGN: tl.constexpr, BLOCK: tl.constexpr):
    """How many free tokens, those at [first, last), the smallest set that holds `top_p` of the mass has.

    Bisects the highest key at which the free scores that reach it bring what is missing; of those that equal
    it only as many are taken as are needed.
    """
    total, _ = _mass(row_ptr, 1, length, 0, ALIGN, BLOCK)
    free, free_number = _mass(row_ptr, first, last, 0, ALIGN, BLOCK)
    above, without = _mass(row_ptr, first, last, NO_SCORE, ALIGN, BLOCK)
    missing = top_p * total - (total - free)  # what the free tokens have to bring
    low = 0
    high = NO_SCORE
    number = without  # of the scores that reach `high`, as `above` is their mass
    for _ in range(KEY_BITS):
        middle = (low + high) // 2
        held, held_number = _mass(row_ptr, first, last, middle, ALIGN, BLOCK)
        enough = held >= missing
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
        above = tl.where(enough, above, held)
        number = tl.where(enough, number, held_number)
    value = low.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    ties = tl.where(value > 0, tl.ceil((missing - above) / tl.maximum(value, 1e-30)), 0.0).to(tl.int32)
    return tl.where(missing <= 0, without, tl.minimum(number + tl.maximum(ties, 0), free_number))


# ---- the lists


@triton.jit
def _split(planes, inside, threshold, UNRANKED: tl.constexpr):
    """uint32 [WORDS, 1] twice: the scores of `inside` above the threshold, and those that equal it."""
    above, equal = inside ^ inside, inside
    for i in tl.static_range(KEY_BITS - UNRANKED):
        plane = planes[KEY_BITS - 1 - i]
        zero = tl.where((threshold >> (KEY_BITS - 1 - i)) & 1 == 0, ALL, 0).to(tl.uint32)
        above |= equal & plane & zero
        equal &= plane ^ zero
    return above, equal


@triton.jit
def _copy_slots(slot_ptr, positions, out_ptr, places, masks):
    """Copy the slots at `positions` to `places` of a list. All are tuples of tiles, so that all loads are
    issued before the first store waits."""
    slots = ()
    for k in tl.static_range(len(positions)):
        slots += (tl.load(slot_ptr + positions[k], mask=masks[k], other=0),)
    for k in tl.static_range(len(positions)):
        tl.store(out_ptr + places[k], slots[k], mask=masks[k])


@triton.jit
def _write_tile(above, equal, at, written, skip, slot_ptr, out_ptr, draft_ptr, DRAFT_SHIFT: tl.constexpr):
    """List the scores `above`, and those `equal` but for the first `skip`, behind `written` others.

    above, equal: uint32 [WORDS, 1], a bit for each of the 32 scores from `at` [WORDS, 1] on. Returns
    `written` and `skip` for the next tile.
    """
    numbers = _popcount(above).to(tl.int64) | (_popcount(equal).to(tl.int64) << 32)
    before = tl.cumsum(numbers, 0) - numbers  # int64 [WORDS, 1]: both counts by one scan
    equal_before = (before >> 32).to(tl.int32)
    place = written + (before & ALL).to(tl.int32) + tl.maximum(equal_before - skip, 0)
    to_skip = tl.maximum(skip - equal_before, 0)
    left = above | equal
    # Each lane goes through its own bits, from the lowest, four in a round.
    for _ in range(tl.cdiv(tl.max(_popcount(left)), 4)):
        positions, places, takes = (), (), ()
        for _ in tl.static_range(4):
            bit = left & (0 - left)
            tie = (equal & bit) != 0
            take = ((bit & above) != 0) | (tie & (to_skip <= 0))
            positions += (at + _popcount(bit - 1),)
            places += (place,)
            takes += (take,)
            left ^= bit
            to_skip -= tie.to(tl.int32)
            place += take.to(tl.int32)
        _copy_slots(slot_ptr, positions, out_ptr, places, takes)
        if DRAFT_SHIFT:
            _copy_slots(slot_ptr - DRAFT_SHIFT, positions, draft_ptr, places, takes)
    # Counted anew: Triton 3.6 compiles a sum of `numbers` for an H100 so that some count twice or not at all.
    ties = tl.sum(_popcount(equal))
    taken = tl.sum(_popcount(above)) + tl.maximum(ties - skip, 0)
    return written + taken, tl.maximum(skip - ties, 0)


@triton.jit
def _list_tile(
    row_ptr,
    first,
    last,
    wanted,
    slot_ptr,
    out_ptr,
    draft_ptr,
    DRAFT_SHIFT: tl.constexpr,
    UNRANKED: tl.constexpr,
    ALIGN: tl.constexpr,
    WORDS: tl.constexpr,
):
    """Search and list a row of one tile, which stays in registers."""
    at = tl.arange(0, WORDS)[:, None] * 32
    planes, inside = _planes(row_ptr, at, last, ALIGN), _inside(at, first, last)
    threshold, reach = _search_tile(planes, inside, wanted, UNRANKED)
    above, equal = _split(planes, inside, threshold, UNRANKED)
    # More may reach the threshold than are wanted: the first that equal it are skipped, as the later win.
    _write_tile(above, equal, at, 0, reach - wanted, slot_ptr, out_ptr, draft_ptr, DRAFT_SHIFT)


@triton.jit
def _list_row(
    row_ptr,
    first,
    last,
    wanted,
    slot_ptr,
    out_ptr,
    draft_ptr,
    DRAFT_SHIFT: tl.constexpr,
    ALIGN: tl.constexpr,
    WORDS: tl.constexpr,
):
    """Search and list a row of several tiles, which every pass reads again, by all bits of its scores."""
    threshold, reach = _search_row(row_ptr, first, last, wanted, ALIGN, WORDS)
    written, skip = 0, reach - wanted
    for tile in range(0, last, 32 * WORDS):
        at = tile + tl.arange(0, WORDS)[:, None] * 32
        planes, inside = _planes(row_ptr, at, last, ALIGN), _inside(at, first, last)
        above, equal = _split(planes, inside, threshold, 0)
        written, skip = _write_tile(
            above, equal, at, written, skip, slot_ptr, out_ptr, draft_ptr, DRAFT_SHIFT
        )


@triton.jit
def _list_forced(
    slot_ptr,
    out_ptr,
    draft_ptr,
    length,
    DRAFT_SHIFT: tl.constexpr,
    SINK: tl.constexpr,
    RECENT: tl.constexpr,
    FORCED: tl.constexpr,
):
    """Sink and recent, which are first in the list."""
    for begin in range(0, SINK + RECENT, FORCED):
        forced = begin + tl.arange(0, FORCED)  # [FORCED], places in the list
        position = tl.where(forced < SINK, forced, length - RECENT + forced - SINK)
        is_forced = forced < SINK + RECENT
        _copy_slots(slot_ptr, (position,), out_ptr, (forced,), (is_forced,))
        if DRAFT_SHIFT:
            # No draft key is about position 0: the one about the bonus token takes its place.
            position = tl.where(position == 0, length, position)
            _copy_slots(slot_ptr - DRAFT_SHIFT, (position,), draft_ptr, (forced,), (is_forced,))


@triton.jit
def _select_kernel(
    scores_ptr,  # int16 [channels, columns], bits of float16
    column_ptr,  # int64 [bs], first columns
    lens_ptr,  # int [bs]
    count_ptr,  # int32 [bs, channels], below 0: WHOLE; written if TOP_P
    stride_channel,
    table_ptr,  # int32 [requests, width]
    reqs_ptr,  # int [bs]
    indices_ptr,  # int32 [entries], written
    draft_ptr,  # int32 [entries], written if DRAFT_SHIFT
    start_ptr,  # int64 [bs, channels]
    stride_table,
    top_p_ptr,  # float32 [bs], if TOP_P
    TOP_P: tl.constexpr,
    DRAFT_SHIFT: tl.constexpr,
    SINK: tl.constexpr,
    RECENT: tl.constexpr,
    FORCED: tl.constexpr,  # of sink and recent, at a time
    UNRANKED: tl.constexpr,  # lowest bits of a score that are no matter
    ALONE: tl.constexpr,  # scores of a row that is listed here
    ALIGN: tl.constexpr,
    WORDS: tl.constexpr,
):
    b, c, channels = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    count = tl.load(count_ptr + b * channels + c)
    if count < 0:
        return
    length = tl.load(lens_ptr + b).to(tl.int32)
    row_ptr = _row(scores_ptr, column_ptr, b, c, stride_channel, ALIGN)
    first, last = SINK, length - RECENT
    wanted = count - SINK - RECENT
    if TOP_P:
        top_p = tl.load(top_p_ptr + b)
        if top_p < float("inf"):
            most = _top_p_wanted(row_ptr, length, first, last, top_p, ALIGN, 4 * WORDS)
            wanted = tl.minimum(wanted, most)
            tl.store(count_ptr + b * channels + c, SINK + RECENT + wanted)
    if last > ALONE:
        return
    slot_ptr = table_ptr + tl.load(reqs_ptr + b).to(tl.int64) * stride_table
    start = tl.load(start_ptr + b * channels + c)
    out_ptr, draft_ptr = indices_ptr + start, draft_ptr + start
    _list_forced(slot_ptr, out_ptr, draft_ptr, length, DRAFT_SHIFT, SINK, RECENT, FORCED)
    if wanted <= 0:
        return

    out_ptr += SINK + RECENT
    draft_ptr += SINK + RECENT
    if last <= 8 * WORDS:  # a tile costs the same whatever is in it, so that a short row takes a small one
        few: tl.constexpr = WORDS // 4
        _list_tile(
            row_ptr, first, last, wanted, slot_ptr, out_ptr, draft_ptr, DRAFT_SHIFT, UNRANKED, ALIGN, few
        )
    elif last <= 32 * WORDS:
        _list_tile(
            row_ptr, first, last, wanted, slot_ptr, out_ptr, draft_ptr, DRAFT_SHIFT, UNRANKED, ALIGN, WORDS
        )
    elif ALONE > 32 * WORDS:
        _list_row(row_ptr, first, last, wanted, slot_ptr, out_ptr, draft_ptr, DRAFT_SHIFT, ALIGN, WORDS)


# ---- rows in parts


@triton.jit
def _keys(row_ptr, offs, first, last, ALIGN: tl.constexpr):
    """int32, the keys of the scores at `offs`, -1 where they are not at [first, last)."""
    key = tl.minimum((_bits(row_ptr, offs, last, ALIGN) & 0x7FFF).to(tl.int32), NO_SCORE)
    return tl.where((offs >= first) & (offs < last), key, -1)


@triton.jit
def _boundary(counted_ptr, wanted, parts, part, NUMBER: tl.constexpr, AT_ONCE: tl.constexpr):
    """Of counts int32 [parts, NUMBER], by rank, of a row: the lowest rank of the `wanted` highest scores, how
    many of those that have it are wanted, and how many, the first ones, are not; in the parts before `part`,
    how many scores are above it, and how many have it."""
    ranks = tl.arange(0, NUMBER)
    total, before = tl.zeros([NUMBER], tl.int32), tl.zeros([NUMBER], tl.int32)
    for some in range(0, parts, AT_ONCE):
        of = some + tl.arange(0, AT_ONCE)[:, None]
        own = tl.load(counted_ptr + of * NUMBER + ranks[None, :], mask=of < parts, other=0)
        total += tl.sum(own, 0)
        before += tl.sum(tl.where(of < part, own, 0), 0)
    reach = tl.cumsum(total, 0, reverse=True)
    lowest = tl.sum((reach >= wanted).to(tl.int32), 0) - 1
    here = ranks == lowest
    # How many reach the lowest rank is how many are above it and have it.
    skip = tl.max(tl.where(here, reach, 0), 0) - wanted
    taken = tl.sum(tl.where(here, total, 0), 0) - skip
    above_before = tl.sum(tl.where(ranks > lowest, before, 0), 0)
    return lowest, taken, skip, above_before, tl.sum(tl.where(here, before, 0), 0)


@triton.jit
def _count_kernel(
    scores_ptr,  # from here on as in _select_kernel
    column_ptr,
    lens_ptr,
    count_ptr,
    stride_channel,
    counted_ptr,  # int32 [bs, channels, parts, ALL_RANKS], written: scores of a rank; undefined behind a row
    segment,  # scores of a part
    SINK: tl.constexpr,
    RECENT: tl.constexpr,
    ALONE: tl.constexpr,  # scores of a row that _select_kernel lists
    ALIGN: tl.constexpr,
    ALL_RANKS: tl.constexpr,
    UNRANKED: tl.constexpr,  # lowest bits of a key, which its rank lacks
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    if EARLY:  # all wait: what comes after this kernel takes it that the ones before have ended
        gdc_launch_dependents()
        gdc_wait()
    part, b, c = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = b * tl.num_programs(2) + c
    last = tl.load(lens_ptr + b).to(tl.int32) - RECENT
    begin = part * segment
    if (last <= ALONE) | (begin >= last):
        return
    if tl.load(count_ptr + row) < 0:
        return
    row_ptr = _row(scores_ptr, column_ptr, b, c, stride_channel, ALIGN)
    found = tl.zeros([ALL_RANKS], tl.int32)
    end = tl.minimum(begin + segment, last)
    for block in range(begin, end, BLOCK):
        key = _keys(row_ptr, block + tl.arange(0, BLOCK), SINK, end, ALIGN)
        found += tl.histogram(tl.maximum(key, 0) >> UNRANKED, ALL_RANKS, mask=key >= 0)
    counted_ptr += (row.to(tl.int64) * tl.num_programs(0) + part) * ALL_RANKS
    tl.store(counted_ptr + tl.arange(0, ALL_RANKS), found)


@triton.jit
def _refine_kernel(
    scores_ptr,  # from here on as in _count_kernel
    column_ptr,
    lens_ptr,
    count_ptr,
    stride_channel,
    counted_ptr,
    refined_ptr,  # int32 [bs, channels, parts, 1 << UNRANKED], written: of the lowest rank, by the other bits
    segment,
    SINK: tl.constexpr,
    RECENT: tl.constexpr,
    ALONE: tl.constexpr,
    ALIGN: tl.constexpr,
    ALL_RANKS: tl.constexpr,
    UNRANKED: tl.constexpr,
    AT_ONCE: tl.constexpr,  # parts whose counts are read
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    part, b, c = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = b * tl.num_programs(2) + c
    last = tl.load(lens_ptr + b).to(tl.int32) - RECENT
    begin, wanted = part * segment, tl.load(count_ptr + row) - SINK - RECENT
    if (last <= ALONE) | (begin >= last) | (wanted <= 0):
        return
    of_row, parts = row.to(tl.int64) * tl.num_programs(0), tl.cdiv(last, segment)
    lowest, _, _, _, _ = _boundary(counted_ptr + of_row * ALL_RANKS, wanted, parts, part, ALL_RANKS, AT_ONCE)
    row_ptr = _row(scores_ptr, column_ptr, b, c, stride_channel, ALIGN)
    number: tl.constexpr = 1 << UNRANKED
    found = tl.zeros([number], tl.int32)
    end = tl.minimum(begin + segment, last)
    for block in range(begin, end, BLOCK):
        key = _keys(row_ptr, block + tl.arange(0, BLOCK), SINK, end, ALIGN)
        found += tl.histogram(key & (number - 1), number, mask=(key >> UNRANKED) == lowest)
    tl.store(refined_ptr + (of_row + part) * number + tl.arange(0, number), found)


@triton.jit
def _list_kernel(
    scores_ptr,  # from here on as in _select_kernel
    column_ptr,
    lens_ptr,
    count_ptr,
    stride_channel,
    table_ptr,
    reqs_ptr,
    indices_ptr,
    draft_ptr,
    start_ptr,
    stride_table,
    counted_ptr,
    refined_ptr,  # unless RANKED
    segment,
    RANKED: tl.constexpr,  # whether scores of a rank are equal
    DRAFT_SHIFT: tl.constexpr,
    SINK: tl.constexpr,
    RECENT: tl.constexpr,
    FORCED: tl.constexpr,
    ALONE: tl.constexpr,
    ALIGN: tl.constexpr,
    ALL_RANKS: tl.constexpr,
    UNRANKED: tl.constexpr,
    AT_ONCE: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    if EARLY:
        gdc_wait()
    part, b, c = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = b * tl.num_programs(2) + c
    length, count = tl.load(lens_ptr + b).to(tl.int32), tl.load(count_ptr + row)
    last, begin, wanted = length - RECENT, part * segment, count - SINK - RECENT
    if (last <= ALONE) | (count < 0) | (begin >= last):
        return
    row_ptr = _row(scores_ptr, column_ptr, b, c, stride_channel, ALIGN)
    slot_ptr = table_ptr + tl.load(reqs_ptr + b).to(tl.int64) * stride_table
    start = tl.load(start_ptr + row)
    out_ptr, draft_ptr = indices_ptr + start, draft_ptr + start
    if part == 0:
        _list_forced(slot_ptr, out_ptr, draft_ptr, length, DRAFT_SHIFT, SINK, RECENT, FORCED)
    if wanted <= 0:
        return

    of_row, parts = row.to(tl.int64) * tl.num_programs(0), tl.cdiv(last, segment)
    lowest, taken, skip, above_before, ties_before = _boundary(
        counted_ptr + of_row * ALL_RANKS, wanted, parts, part, ALL_RANKS, AT_ONCE
    )
    if not RANKED:
        number: tl.constexpr = 1 << UNRANKED
        least, _, skip, more, ties_before = _boundary(
            refined_ptr + of_row * number, taken, parts, part, number, AT_ONCE
        )
        lowest, above_before = (lowest << UNRANKED) + least, above_before + more
    out_ptr += SINK + RECENT
    draft_ptr += SINK + RECENT
    end = tl.minimum(begin + segment, last)
    for block in range(begin, end, BLOCK):
        offs = block + tl.arange(0, BLOCK)
        key = _keys(row_ptr, offs, SINK, end, ALIGN)
        if RANKED:
            key = key >> UNRANKED
        is_above, is_tie = (key > lowest).to(tl.int32), (key == lowest).to(tl.int32)
        both = tl.cumsum(is_above | (is_tie << 16), 0)  # counts of both by one scan
        place = above_before + (both & 0xFFFF) - is_above
        tie = ties_before + (both >> 16) - is_tie
        take = (is_above > 0) | ((is_tie > 0) & (tie >= skip))
        place += tl.maximum(tie - skip, 0)
        _copy_slots(slot_ptr, (offs,), out_ptr, (place,), (take,))
        if DRAFT_SHIFT:
            _copy_slots(slot_ptr - DRAFT_SHIFT, (offs,), draft_ptr, (place,), (take,))
        above_before += tl.sum(is_above, 0)
        ties_before += tl.sum(is_tie, 0)
