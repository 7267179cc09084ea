"""Pages in Triton: sketches of their keys, which slots hold whose, and the lists of the pages chosen.

A page is PAGE positions of a request. Nothing says where its slots are, so every kernel goes through the
table of slots. `sts_kernels.page_scores` has the scores in between.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from sts_kernels.checks import (
    check_join,
    check_page_lists,
    check_page_sizes,
    check_sketches,
    check_tags,
    expect_half,
)
from sts_kernels.layout import ALIGN, NO_PAGE, PAGE, WHOLE, Contexts, Lists, PageSizes, Scores, pages_of
from sts_kernels.select import select_tokens


@dataclass(frozen=True)
class PagesKnobs:
    """How much programs take at a time, and how many share a request; grids cannot follow lengths, which are
    read on the device.

    tag_block: positions, of the kernels that tag. sketch_pages: pages whose keys are read together.
    known_pages: pages whose tags are. list_block: entries of a list. programs: that all requests, or all
    (request, KV head) pairs, are parted among; most_programs: of one.
    """

    tag_block: int = 1024
    sketch_pages: int = 4
    known_pages: int = 64
    list_block: int = 1024
    programs: int = 1056
    most_programs: int = 64


KNOBS = PagesKnobs()


def _programs(pairs: int, pieces: int) -> int:
    """Programs that share a request, or a (request, KV head) pair, whose work falls into so many pieces."""
    return max(1, min(KNOBS.programs // pairs, KNOBS.most_programs, pieces))


def tag_pages(contexts: Contexts, before: torch.Tensor, tags: torch.Tensor, *, most: int) -> None:
    """Kernel of `sts_kernels.torch_ops.tag_pages` (see there); graph-safe, no host sync, deterministic.

    Requests claim the slots of the pages that they complete, by a minimum of names that fall along the batch;
    a second launch replaces the claims that were left. So it never matters which program comes first.
    """
    check_tags("tag_pages", contexts, before, tags)
    bs, block = contexts.lens.numel(), min(KNOBS.tag_block, triton.next_power_of_2(most + PAGE))
    if bs == 0:
        return
    grid = (bs, _programs(bs, -(-most // block)))
    for kernel in (_claim_pages_kernel, _tag_kernel):
        kernel[grid](
            tags,
            contexts.table,
            contexts.reqs,
            contexts.lens,
            before,
            contexts.table.stride(0),
            NO_PAGE=NO_PAGE,
            PAGE=PAGE,
            BLOCK=block,
            num_warps=1 if block <= 128 else 4,
        )


def sketch_pages(
    keys: torch.Tensor,
    sketches: torch.Tensor,
    contexts: Contexts,
    before: torch.Tensor,
    tags: torch.Tensor,
    *,
    most: int,
) -> None:
    """Kernel of `sts_kernels.torch_ops.sketch_pages` (see there); graph-safe, no host sync."""
    check_sketches(keys, sketches, contexts, before, tags)
    bs, kv_heads, width = contexts.lens.numel(), keys.shape[1], keys.shape[2] // PAGE
    if bs == 0:
        return
    number = pages_of(max(1, most))  # that a request completes at most
    at_once = min(KNOBS.sketch_pages, triton.next_power_of_2(number))
    _sketch_kernel[(kv_heads, bs, _programs(bs * kv_heads, -(-number // at_once)))](
        keys,
        sketches,
        tags,
        contexts.table,
        contexts.reqs,
        contexts.lens,
        before,
        keys.stride(0),
        keys.stride(1),
        contexts.table.stride(0),
        H_KV=kv_heads,
        WIDTH=width,
        WIDTH_P2=triton.next_power_of_2(width),
        LARGEST=torch.finfo(sketches.dtype).max,
        PAGE=PAGE,
        PAGES=at_once,
    )


def size_pages(
    contexts: Contexts,
    tags: torch.Tensor,
    lists: Lists,
    channels: torch.Tensor,
    *,
    sink: int,
    recent: int,
) -> PageSizes:
    """Kernel of `sts_kernels.torch_ops.size_pages` (see there); graph-safe, no host sync.

    `known` is undefined where a request has no pages in `contexts`, and past them.
    """
    check_page_sizes(contexts, tags, lists, channels)
    lens, bs, width = contexts.lens, contexts.lens.numel(), contexts.table.shape[1] // PAGE
    layers, kv_heads = channels.shape

    def new(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=lens.device)

    pages = Contexts(torch.arange(width, dtype=torch.int32, device=lens.device)[None], new(bs), new(bs))
    starts = new(bs, kv_heads, dtype=torch.int64)
    counts, per_head = new(*lists.counts.shape), new(layers, bs, kv_heads)
    sizes = PageSizes(new(bs, width, dtype=torch.uint8), new(bs), pages, counts, starts, per_head)
    if bs == 0:
        return sizes
    programs = _programs(bs, -(-width // KNOBS.known_pages))
    lacking, number = new(bs, programs), lists.counts.shape[1]
    shape = {"SINK": pages_of(sink), "RECENT": pages_of(recent), "PAGE": PAGE, "PROGRAMS": programs}
    shape |= {"WHOLE": WHOLE, "CHANNELS": triton.next_power_of_2(number)}
    requests = [contexts.table, contexts.reqs, lens, lists.counts, contexts.table.stride(0), number]
    _known_kernel[(bs, programs)](
        sizes.known, lacking, tags, *requests, width, BLOCK=KNOBS.known_pages, **shape
    )
    _page_sizes_kernel[(bs,)](
        *sizes[1:2],
        *pages[1:],
        *sizes[3:],
        lacking,
        *requests[1:4],
        channels,
        number,
        bs,
        width,
        layers * kv_heads,
        H_KV=kv_heads,
        PROGRAMS_P2=triton.next_power_of_2(programs),
        BLOCK=min(1024, triton.next_power_of_2(layers * kv_heads)),
        **shape,
    )
    return sizes


def list_pages(
    scores: Scores,
    contexts: Contexts,
    sizes: PageSizes,
    lists: Lists,
    channels: torch.Tensor,
    *,
    layer: int,
    sink: int,
    recent: int,
) -> None:
    """Kernel of `sts_kernels.torch_ops.list_pages` (see there); graph-safe, no host sync.

    `scores.starts` must be multiples of ALIGN where the number of columns is one.
    """
    check_page_lists(scores, sizes, lists, channels)
    expect_half("list_pages", scores)
    bs, kv_heads = contexts.lens.numel(), channels.shape[1]
    if bs == 0:
        return
    chosen = _choose(scores, sizes, layer, sink, recent)
    programs = _programs(bs * kv_heads, -(-contexts.table.shape[1] // KNOBS.list_block))
    _list_pages_kernel[(kv_heads, bs, programs)](
        *chosen,
        lists.indices,
        lists.starts,
        channels[layer],
        contexts.table,
        contexts.reqs,
        contexts.lens,
        contexts.table.stride(0),
        lists.counts.shape[1],
        PAGE=PAGE,
        BLOCK=KNOBS.list_block,
    )


def join_pages(
    scores: Scores,
    drafted: Scores,
    joined: torch.Tensor,
    contexts: Contexts,
    sizes: PageSizes,
    channels: torch.Tensor,
    *,
    layer: int,
    sink: int,
    recent: int,
) -> None:
    """Kernel of `sts_kernels.torch_ops.join_pages` (see there); graph-safe, no host sync.

    Starts of both scores must be multiples of ALIGN. Columns up to the next multiple of ALIGN are written
    too: they are the request's own.
    """
    check_join(scores, drafted, joined, sizes, channels)
    expect_half("join_pages", scores)
    expect_half("join_pages", drafted)
    bs, kv_heads, width = contexts.lens.numel(), channels.shape[1], contexts.table.shape[1]
    if bs == 0:
        return
    chosen = _choose(scores, sizes, layer, sink, recent)
    requests = [drafted.starts, contexts.lens, joined.stride(0)]
    programs = _programs(bs * kv_heads, -(-width // KNOBS.list_block))
    _copy_scores_kernel[(kv_heads, bs, programs)](
        joined,
        drafted.importance,
        channels[layer],
        *requests,
        drafted.importance.stride(0),
        ALIGN=ALIGN,
        BLOCK=KNOBS.list_block,
    )
    _mark_pages_kernel[(kv_heads, bs, programs)](
        joined, *chosen, drafted.starts, joined.stride(0), PAGE=PAGE, PAGES=KNOBS.list_block // PAGE
    )


def _choose(scores: Scores, sizes: PageSizes, layer: int, sink: int, recent: int) -> Lists:
    """Lists of the numbers of chosen pages."""
    chosen, own = sizes.lists(layer), sizes.contexts
    select_tokens(scores, own, own.lens, chosen, sink=pages_of(sink), recent=pages_of(recent))
    return chosen


@triton.jit
def _claim_pages_kernel(
    tags_ptr,  # int32 [slots]
    table_ptr,  # int32 [requests, width]
    reqs_ptr,  # int [bs]
    lens_ptr,  # int [bs]
    before_ptr,  # int [bs]
    stride_table,
    NO_PAGE: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b, program = tl.program_id(0), tl.program_id(1)
    req = tl.load(reqs_ptr + b).to(tl.int64)
    length, before = tl.load(lens_ptr + b).to(tl.int32), tl.load(before_ptr + b).to(tl.int32)
    if req == 0:
        return
    slot_ptr = table_ptr + req * stride_table
    complete = length // PAGE * PAGE
    mine = NO_PAGE - 1 - b  # below NO_PAGE, and the later in the batch the lower
    first = before // PAGE * PAGE
    for block in range(first + program * BLOCK, length, tl.num_programs(1) * BLOCK):
        offs = block + tl.arange(0, BLOCK)
        slots = tl.load(slot_ptr + offs, mask=offs < length, other=0).to(tl.int64)  # [BLOCK]
        # Requests may share a slot, and their programs come in any order. It ends with the lowest of what
        # they write: the name of the last one that completes a page over it, else NO_PAGE, which is below
        # every tag and above every name.
        claimed = (offs < length) & ((offs >= before) | (offs < complete))
        tl.atomic_min(tags_ptr + slots, tl.where(offs < complete, mine, NO_PAGE), mask=claimed)


@triton.jit
def _tag_kernel(
    tags_ptr,  # from here on as in _claim_pages_kernel
    table_ptr,
    reqs_ptr,
    lens_ptr,
    before_ptr,
    stride_table,
    NO_PAGE: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b, program = tl.program_id(0), tl.program_id(1)
    req = tl.load(reqs_ptr + b).to(tl.int64)
    length, before = tl.load(lens_ptr + b).to(tl.int32), tl.load(before_ptr + b).to(tl.int32)
    if req == 0:
        return
    slot_ptr = table_ptr + req * stride_table
    complete = length // PAGE * PAGE
    mine = NO_PAGE - 1 - b
    first = before // PAGE * PAGE
    for block in range(first + program * BLOCK, complete, tl.num_programs(1) * BLOCK):
        offs = block + tl.arange(0, BLOCK)
        ok = offs < complete
        slots = tl.load(slot_ptr + offs, mask=ok, other=0).to(tl.int64)  # [BLOCK]
        last = tl.load(slot_ptr + offs // PAGE * PAGE + PAGE - 1, mask=ok, other=0)
        left = tl.load(tags_ptr + slots, mask=ok, other=NO_PAGE) == mine
        tl.store(tags_ptr + slots, last, mask=ok & left)


@triton.jit
def _owned(slot_ptr, tags_ptr, pages, ok, PAGE: tl.constexpr):
    """Slots of pages [n], int32 [n, PAGE], and which of the pages that are `ok` have a sketch, bool [n]."""
    within = tl.arange(0, PAGE)[None, :]
    slots = tl.load(slot_ptr + pages[:, None] * PAGE + within, mask=ok[:, None], other=0)
    last = tl.load(slot_ptr + pages * PAGE + PAGE - 1, mask=ok, other=0)
    tags = tl.load(tags_ptr + slots.to(tl.int64), mask=ok[:, None], other=0)
    strange = tl.sum((tags != last[:, None]).to(tl.int32), 1)
    return slots, ok & (strange == 0)


@triton.jit
def _sketch_kernel(
    k_ptr,  # [slots, H_kv, D]
    sketch_ptr,  # [slots, H_kv, 2 * WIDTH]
    tags_ptr,  # int32 [slots]
    table_ptr,  # int32 [requests, width]
    reqs_ptr,  # int [bs]
    lens_ptr,  # int [bs]
    before_ptr,  # int [bs]
    stride_slot,
    stride_head,
    stride_table,
    H_KV: tl.constexpr,
    WIDTH: tl.constexpr,  # D / PAGE
    WIDTH_P2: tl.constexpr,  # padded to a power of two
    LARGEST: tl.constexpr,
    PAGE: tl.constexpr,
    PAGES: tl.constexpr,  # at a time
):
    h, b, program = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    req = tl.load(reqs_ptr + b).to(tl.int64)
    first, end = tl.load(before_ptr + b).to(tl.int32) // PAGE, tl.load(lens_ptr + b).to(tl.int32) // PAGE
    if req == 0:
        return
    slot_ptr = table_ptr + req * stride_table
    place = tl.arange(0, WIDTH_P2)  # in a slice
    dims = tl.arange(0, PAGE)[:, None] * WIDTH + place[None, :]  # [PAGE, WIDTH]
    for start in range(first + program * PAGES, end, tl.num_programs(2) * PAGES):
        pages = start + tl.arange(0, PAGES)
        slots, own = _owned(slot_ptr, tags_ptr, pages, pages < end, PAGE)
        slots = slots.to(tl.int64)
        # [PAGES, PAGE positions, PAGE slices, WIDTH]
        mask = own[:, None, None, None] & (place < WIDTH)[None, None, None, :]
        offs = slots[:, :, None, None] * stride_slot + h * stride_head + dims[None, None, :, :]
        k = tl.load(k_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        mean = tl.sum(k, 1) / PAGE  # [PAGES, PAGE, WIDTH]
        off = k - mean[:, None, :, :]
        deviation = tl.sqrt(tl.sum(off * off, 1) / PAGE)
        target = sketch_ptr + (slots[:, :, None] * H_KV + h) * 2 * WIDTH + place[None, None, :]
        mask = own[:, None, None] & (place < WIDTH)[None, None, :]
        for part in tl.static_range(2):
            value = mean if part == 0 else deviation
            value = tl.minimum(tl.maximum(value, -LARGEST), LARGEST)
            tl.store(target + part * WIDTH, value.to(sketch_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _pages_wanted(counts, length, SINK: tl.constexpr, RECENT: tl.constexpr, PAGE: tl.constexpr):
    """int32 twice, as `counts`: pages that lists of so many tokens have room for, and whether they would do
    if all pages had a sketch."""
    rest = length % PAGE
    wanted = tl.maximum(counts - rest, 0) // PAGE
    return wanted, (counts >= (SINK + RECENT) * PAGE + rest) & (wanted < length // PAGE)


@triton.jit
def _pages_listed(counts, length, unknown, real, SINK, RECENT, PAGE, WHOLE: tl.constexpr):
    """int32, as `counts`: pages on lists of a request that has `unknown` pages without a sketch, or WHOLE."""
    wanted, fits = _pages_wanted(counts, length, SINK, RECENT, PAGE)
    return tl.where(fits & real & (wanted - SINK - RECENT >= unknown), wanted, WHOLE)


@triton.jit
def _known_kernel(
    known_ptr,  # uint8 [bs, width]
    lacking_ptr,  # int32 [bs, PROGRAMS]: pages without a sketch that each program found
    tags_ptr,  # int32 [slots]
    table_ptr,  # int32 [requests, ..]
    reqs_ptr,  # int [bs]
    lens_ptr,  # int [bs]
    count_ptr,  # int32 [bs, channels], tokens
    stride_table,
    channels,
    width,
    SINK: tl.constexpr,  # pages
    RECENT: tl.constexpr,
    PAGE: tl.constexpr,
    PROGRAMS: tl.constexpr,
    WHOLE: tl.constexpr,
    CHANNELS: tl.constexpr,  # padded to a power of two
    BLOCK: tl.constexpr,
):
    b, program = tl.program_id(0), tl.program_id(1)
    req = tl.load(reqs_ptr + b).to(tl.int64)
    length = tl.load(lens_ptr + b).to(tl.int32)
    c = tl.arange(0, CHANNELS)
    counts = tl.load(count_ptr + b * channels + c, mask=c < channels, other=WHOLE)
    fits = _pages_wanted(counts, length, SINK, RECENT, PAGE)[1]
    wants = (tl.max(fits.to(tl.int32), 0) > 0) & (req > 0)
    # Where all attend to everything, no tag is read.
    complete = tl.where(wants, length // PAGE, 0)
    lacking = tl.zeros([BLOCK], tl.int32)
    for block in range(program * BLOCK, complete, PROGRAMS * BLOCK):
        pages = block + tl.arange(0, BLOCK)
        ok = pages < complete
        own = _owned(table_ptr + req * stride_table, tags_ptr, pages, ok, PAGE)[1]
        tl.store(known_ptr + b.to(tl.int64) * width + pages, own.to(tl.uint8), mask=ok)
        free = (pages >= SINK) & (pages < complete - RECENT)
        lacking += (free & (own == 0)).to(tl.int32)
    tl.store(lacking_ptr + b * PROGRAMS + program, tl.sum(lacking, 0))


@triton.jit
def _page_sizes_kernel(
    unknown_ptr,  # int32 [bs]
    page_req_ptr,  # int32 [bs], zeros
    page_len_ptr,  # int32 [bs]
    out_count_ptr,  # int32 [bs, channels]
    page_start_ptr,  # int64 [bs, H_kv]
    page_count_ptr,  # int32 [layers, bs, H_kv]
    lacking_ptr,  # int32 [bs, PROGRAMS]
    reqs_ptr,  # int [bs]
    lens_ptr,  # int [bs]
    count_ptr,  # int32 [bs, channels]
    channels_ptr,  # int32 [layers, H_kv]
    channels,
    bs,
    width,  # pages
    heads,  # layers * H_kv
    H_KV: tl.constexpr,
    SINK: tl.constexpr,  # from here on as in _known_kernel
    RECENT: tl.constexpr,
    PAGE: tl.constexpr,
    PROGRAMS: tl.constexpr,
    PROGRAMS_P2: tl.constexpr,
    WHOLE: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,  # of `heads` at a time
):
    b = tl.program_id(0)
    real = tl.load(reqs_ptr + b) > 0  # row 0 pads the batches of CUDA graphs
    length = tl.load(lens_ptr + b).to(tl.int32)
    program = tl.arange(0, PROGRAMS_P2)
    lacking = tl.load(lacking_ptr + b * PROGRAMS + program, mask=program < PROGRAMS, other=0)
    unknown = tl.sum(lacking, 0)
    c = tl.arange(0, CHANNELS)
    counts = tl.load(count_ptr + b * channels + c, mask=c < channels, other=WHOLE)
    pages = _pages_listed(counts, length, unknown, real, SINK, RECENT, PAGE, WHOLE)
    listed = pages >= 0
    tokens = tl.where(listed, pages * PAGE + length % PAGE, WHOLE)
    tl.store(out_count_ptr + b * channels + c, tokens, mask=c < channels)
    tl.store(unknown_ptr + b, unknown)
    tl.store(page_req_ptr + b, 0)
    tl.store(page_len_ptr + b, tl.where(tl.max(listed.to(tl.int32), 0) > 0, length // PAGE, 0))
    for first in range(0, heads, BLOCK):
        head = first + tl.arange(0, BLOCK)
        ok = head < heads
        place = b * channels + tl.load(channels_ptr + head, mask=ok, other=0)
        of_head = tl.load(count_ptr + place, mask=ok, other=WHOLE)
        number = _pages_listed(of_head, length, unknown, real, SINK, RECENT, PAGE, WHOLE)
        pair = b * H_KV + head % H_KV
        tl.store(page_start_ptr + pair, pair.to(tl.int64) * width, mask=ok & (head < H_KV))
        tl.store(page_count_ptr + head // H_KV * bs * H_KV + pair, number, mask=ok)


@triton.jit
def _list_pages_kernel(
    numbers_ptr,  # int32 [..], page numbers
    page_start_ptr,  # int64 [bs, H_kv]
    page_count_ptr,  # int32 [bs, H_kv], below 0: WHOLE
    indices_ptr,  # int32 [entries]
    start_ptr,  # int64 [bs, channels]
    channels_ptr,  # int32 [H_kv]
    table_ptr,  # int32 [requests, width]
    reqs_ptr,  # int [bs]
    lens_ptr,  # int [bs]
    stride_table,
    channels,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    h, b, program = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    pair = b * tl.num_programs(0) + h
    number = tl.load(page_count_ptr + pair)
    page_ptr = numbers_ptr + tl.load(page_start_ptr + pair)
    out_ptr = indices_ptr + tl.load(start_ptr + b * channels + tl.load(channels_ptr + h))
    length = tl.load(lens_ptr + b).to(tl.int32)
    slot_ptr = table_ptr + tl.load(reqs_ptr + b).to(tl.int64) * stride_table
    if number < 0:
        return
    tokens = number * PAGE
    entries = tokens + length % PAGE
    for block in range(program * BLOCK, entries, tl.num_programs(2) * BLOCK):
        offs = block + tl.arange(0, BLOCK)
        page = tl.load(page_ptr + offs // PAGE, mask=offs < tokens, other=0)  # [BLOCK]
        position = tl.where(offs < tokens, page * PAGE + offs % PAGE, length // PAGE * PAGE + offs - tokens)
        slots = tl.load(slot_ptr + position, mask=offs < entries, other=0)
        tl.store(out_ptr + offs, slots, mask=offs < entries)


@triton.jit
def _copy_scores_kernel(
    joined_ptr,  # float16 [H_kv, columns]
    drafted_ptr,  # float16 [channels, columns]
    channels_ptr,  # int32 [H_kv]
    column_ptr,  # int64 [bs], first columns
    lens_ptr,  # int [bs]
    stride_head,
    stride_channel,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    h, b, program = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start = tl.load(column_ptr + b)  # -1: the request has no lists
    column, length = start // ALIGN * ALIGN, tl.load(lens_ptr + b).to(tl.int32)
    source_ptr = drafted_ptr + tl.load(channels_ptr + h).to(tl.int64) * stride_channel + column
    target_ptr = joined_ptr + h.to(tl.int64) * stride_head + column
    end = tl.where(start >= 0, length, 0)
    for block in range(program * BLOCK, end, tl.num_programs(2) * BLOCK):
        offs = block + tl.arange(0, BLOCK)
        ok = offs // ALIGN * ALIGN < end  # a mask by position would split every access into single scores
        tl.store(target_ptr + offs, tl.load(source_ptr + offs, mask=ok, other=0.0), mask=ok)


@triton.jit
def _mark_pages_kernel(
    joined_ptr,  # float16 [H_kv, columns]
    numbers_ptr,  # int32 [..], page numbers
    page_start_ptr,  # int64 [bs, H_kv]
    page_count_ptr,  # int32 [bs, H_kv], below 0: WHOLE
    column_ptr,  # int64 [bs], first columns
    stride_head,
    PAGE: tl.constexpr,
    PAGES: tl.constexpr,  # at a time
):
    h, b, program = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    pair = b * tl.num_programs(0) + h
    number = tl.load(page_count_ptr + pair)
    page_ptr = numbers_ptr + tl.load(page_start_ptr + pair)
    row_ptr = joined_ptr + h.to(tl.int64) * stride_head + tl.load(column_ptr + b)
    none = tl.full([PAGES, PAGE], float("nan"), tl.float16)
    for first in range(program * PAGES, number, tl.num_programs(2) * PAGES):
        i = first + tl.arange(0, PAGES)
        page = tl.load(page_ptr + i, mask=i < number, other=0)  # [PAGES]
        tl.store(
            row_ptr + page[:, None] * PAGE + tl.arange(0, PAGE)[None, :], none, mask=(i < number)[:, None]
        )
