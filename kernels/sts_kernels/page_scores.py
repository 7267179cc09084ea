"""Scores of pages in Triton: a pass over the sketches that leaves logits, and one that makes them importance.

A page's sketch lies in slices beside its slots, mean and deviation of some dimensions each. A page is read as
one row of all its slices, and the queries are laid out alike, so that a logit is one product of the two: of q
with the mean and of |q| with the deviation. Probabilities need the sum over all pages of a request, which is
known only after the last part of the first pass; logits are small beside sketches, and stay in the cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from sts_kernels.checks import check_page_scores, expect_half
from sts_kernels.layout import IMPORTANCE_SCALE, PAGE, Contexts, PageSizes, Plan, Pooling, Scores
from sts_kernels.split_kv import LOG2E, SplitKnobs, padded, plan_whole, starts_early


@dataclass(frozen=True)
class PoolKnobs(SplitKnobs):
    """pool_programs: that all (request, KV head) pairs are parted among where logits are pooled. pool_warps:
    of one. The rest: see SplitKnobs.
    """

    pool_programs: int = 528
    pool_warps: int = 4


@dataclass(frozen=True)
class PageScoresKnobs(PoolKnobs):
    """block: bytes of sketches that a program reads at a time, about. pool_pages: pages that a pooling
    program takes at a time. The rest: see PoolKnobs, in pages.
    """

    programs: int = 528
    least: int = 64
    block: int = 32768
    pool_pages: int = 128


KNOBS = PageScoresKnobs()


# Bytes of shared memory of the score kernel: of its sketches, and for every query row and value of a sketch.
# Read off kernels that Triton 3.6 compiled for Hopper (heads of 128 dimensions).
SKETCH_BYTES, ROW_BYTES = 73728, 3


def shared_bytes(rows: int, head_dim: int) -> int:
    """About the bytes of shared memory that a thread block takes for the `rows` query rows of a (request, KV
    head)."""
    return SKETCH_BYTES + ROW_BYTES * padded(rows) * PAGE * _slice(head_dim)


def _slice(head_dim: int) -> int:
    """Values of a page's sketch beside one slot, padded to a power of two."""
    return triton.next_power_of_2(2 * head_dim // PAGE)


def plan_pages(sizes: PageSizes, *, kv_heads: int) -> Plan | None:
    """How the pages of a batch are parted among programs: alike for every KV head and layer of a step. Never
    None."""
    longest = sizes.known.shape[1]
    return plan_whole(sizes.contexts.lens, kv_heads=kv_heads, longest=longest, knobs=KNOBS)


def score_pages(
    q: torch.Tensor,
    sketches: torch.Tensor,
    contexts: Contexts,
    sizes: PageSizes,
    scores: Scores,
    *,
    scale: float,
    pooling: Pooling,
    plan: Plan | None = None,
) -> None:
    """Kernel of `sts_kernels.torch_ops.score_pages` (see there); graph-safe, no host sync.

    Queries are rounded to the dtype of the sketches. Without a plan, which one launch of `plan_pages` makes
    for all layers of a step, the call makes its own.
    """
    check_page_scores(q, sketches, sizes, scores, pooling)
    expect_half("score_pages", scores)
    bs, tokens, q_heads, dim = q.shape
    if bs == 0:
        return
    kv_heads, columns = scores.importance.shape
    plan = plan_pages(sizes, kv_heads=kv_heads) if plan is None else plan
    work, used = plan.work.shape[0], tokens * (q_heads // kv_heads)
    rows, slice_p2 = padded(used), _slice(dim)
    logits = torch.empty(kv_heads, columns, used, dtype=torch.float32, device=q.device)
    stats = torch.empty(kv_heads, work, rows, 2, dtype=torch.float32, device=q.device)
    early = starts_early(q.device) if KNOBS.early else {}
    lens, width = sizes.contexts.lens, sizes.known.shape[1]
    _score_kernel[(kv_heads, work)](
        q,
        sketches,
        sizes.known,
        logits,
        stats,
        plan.work,
        plan.ends,
        contexts.table,
        contexts.reqs,
        scores.starts,
        scale * LOG2E,
        q.stride(1 if tokens > 1 else 0),  # that of a dimension of one says nothing
        contexts.table.stride(0),
        columns,
        width,
        bs,
        T=tokens,
        H_Q=q_heads,
        H_KV=kv_heads,
        WIDTH=dim // PAGE,
        SLICE=slice_p2,
        ROWS=rows,
        LARGEST=torch.finfo(sketches.dtype).max,
        PAGE=PAGE,
        BLOCK=max(16, KNOBS.block // (PAGE * slice_p2 * sketches.itemsize)),
        EARLY=bool(early),
        num_warps=KNOBS.num_warps,
        num_stages=KNOBS.num_stages,
    )
    pool_logits(
        logits,
        stats,
        scores,
        lens,
        plan,
        pooling,
        tokens=tokens,
        group=q_heads // kv_heads,
        longest=width,
        block=KNOBS.pool_pages,
        knobs=KNOBS,
        known=sizes.known,
    )


def pool_logits(
    logits: torch.Tensor,
    stats: torch.Tensor,
    scores: Scores,
    lens: torch.Tensor,
    plan: Plan,
    pooling: Pooling,
    *,
    tokens: int,
    group: int,
    longest: int,
    block: int,
    knobs: PoolKnobs,
    known: torch.Tensor | None = None,
) -> None:
    """Make importance of what a score kernel left: logits [H_kv, columns, T * group] of pages, or of what
    else there are `lens` [bs] of, at most `longest`, and stats [H_kv, work, rows, 2] of the parts of `plan`.

    block: of them at a time. known: uint8 [bs, longest], which have logits; None: all.
    """
    (kv_heads, columns), bs = scores.importance.shape, lens.numel()
    early = starts_early(logits.device) if knobs.early else {}
    programs = max(1, min(knobs.pool_programs // (bs * kv_heads), -(-longest // block)))
    pool_logits_kernel[(kv_heads, bs, programs)](
        logits,
        stats,
        known,
        plan.ends,
        scores.importance,
        lens,
        scores.starts,
        columns,
        scores.importance.stride(0),
        longest,
        stats.shape[1],
        IMPORTANCE_SCALE / (pooling.total_rows if pooling.rows == "mean" else 1),
        MEAN_ROWS=pooling.rows == "mean",
        MEAN_HEADS=pooling.heads == "mean",
        T=tokens,
        T_P2=triton.next_power_of_2(tokens),
        GROUP=group,
        GROUP_P2=triton.next_power_of_2(group),
        ROWS=stats.shape[2],
        SPLITS_P2=triton.next_power_of_2(plan.most),
        PROGRAMS=programs,
        BLOCK=block,
        EARLY=bool(early),
        num_warps=knobs.pool_warps,
        **early,
    )


@triton.jit
def _laid_out(q_ptr, q_offs, ok, WIDTH: tl.constexpr, SLICE: tl.constexpr, PAGE: tl.constexpr):
    """Rows of queries at `q_offs` [ROWS] in the order of a page's slices, [ROWS, PAGE * SLICE]: each slice
    has WIDTH dimensions of q, the same of |q|, and padding."""
    lane = tl.arange(0, PAGE * SLICE)
    place = lane % SLICE
    dims = lane // SLICE * WIDTH + tl.where(place < WIDTH, place, place - WIDTH)
    mask = ok[:, None] & (place < 2 * WIDTH)[None, :]
    q = tl.load(q_ptr + q_offs[:, None] + dims[None, :], mask=mask, other=0.0).to(tl.float32)
    return tl.where((place < WIDTH)[None, :], q, tl.abs(q))


@triton.jit
def _score_kernel(
    q_ptr,  # [bs, T, H_q, D], tokens `stride_q` apart
    sketch_ptr,  # [slots, H_kv, 2 * WIDTH]
    known_ptr,  # uint8 [bs, width]
    logits_ptr,  # float32 [H_kv, columns, T * group], LOG2E included; undefined where a page has no sketch
    stats_ptr,  # float32 [H_kv, work, ROWS, 2]: maximum of logits, sum of exp2(logit - maximum)
    work_ptr,  # int64 [work, 4], see Plan
    ends_ptr,  # int32 [bs + 1]
    table_ptr,  # int32 [requests, ..]
    reqs_ptr,  # int [bs]
    column_ptr,  # int64 [bs], first columns
    scale,  # of logits, LOG2E included
    stride_q,
    stride_table,
    columns,
    width,
    bs,
    T: tl.constexpr,
    H_Q: tl.constexpr,
    H_KV: tl.constexpr,
    WIDTH: tl.constexpr,  # D / PAGE
    SLICE: tl.constexpr,  # 2 * WIDTH, padded to a power of two
    ROWS: tl.constexpr,  # T * group, padded to a power of two of at least 16
    LARGEST: tl.constexpr,  # of the sketches' dtype
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,  # pages at a time
    EARLY: tl.constexpr,
):
    h, program = tl.program_id(0), tl.program_id(1)
    GROUP: tl.constexpr = H_Q // H_KV
    entry = work_ptr + program * 4
    b = tl.load(entry).to(tl.int32)
    begin, number = tl.load(entry + 1).to(tl.int32), tl.load(entry + 2).to(tl.int32)
    if program >= tl.load(ends_ptr + bs):
        return
    slot_ptr = table_ptr + tl.load(reqs_ptr + b).to(tl.int64) * stride_table
    column = tl.load(column_ptr + b)

    rows = tl.arange(0, ROWS)
    place = tl.arange(0, SLICE)
    q_offs = (b * T + rows // GROUP) * stride_q + (h * GROUP + rows % GROUP) * (WIDTH * PAGE)
    q = _laid_out(q_ptr, q_offs, rows < T * GROUP, WIDTH, SLICE, PAGE)
    q = tl.minimum(tl.maximum(q, -LARGEST), LARGEST).to(sketch_ptr.dtype.element_ty)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    norm = tl.zeros([ROWS], tl.float32)
    for block in range(begin, begin + number, BLOCK):
        pages = block + tl.arange(0, BLOCK)
        ok = pages < begin + number
        known = tl.load(known_ptr + b.to(tl.int64) * width + pages, mask=ok, other=0) != 0
        slots = tl.load(
            slot_ptr + pages[:, None] * PAGE + tl.arange(0, PAGE)[None, :], mask=ok[:, None], other=0
        )  # [BLOCK, PAGE]
        offs = (slots.to(tl.int64)[:, :, None] * H_KV + h) * (2 * WIDTH) + place[None, None, :]
        mask = ok[:, None, None] & (place < 2 * WIDTH)[None, None, :]
        sketch = tl.load(sketch_ptr + offs, mask=mask, other=0.0)  # [BLOCK, PAGE, SLICE]
        sketch = tl.reshape(sketch, [BLOCK, PAGE * SLICE])
        s = tl.dot(sketch, tl.trans(q), input_precision="ieee") * scale  # [BLOCK, ROWS]
        # Beside what a page without a sketch holds may be anything, NaN too.
        s = tl.where(known[:, None], s, float("-inf"))
        line = (h.to(tl.int64) * columns + column + pages) * (T * GROUP)
        mask = ok[:, None] & (rows < T * GROUP)[None, :]
        tl.store(logits_ptr + line[:, None] + rows[None, :], s, mask=mask)
        new_peak = tl.maximum(peak, tl.max(s, 0))
        safe = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        norm = norm * tl.exp2(peak - safe) + tl.sum(tl.exp2(s - safe[None, :]), 0)
        peak = new_peak
    if EARLY:
        gdc_launch_dependents()
    base = (h * tl.num_programs(1) + program).to(tl.int64) * ROWS
    tl.store(stats_ptr + (base + rows) * 2, peak)
    tl.store(stats_ptr + (base + rows) * 2 + 1, norm)


@triton.jit
def pool_logits_kernel(
    logits_ptr,  # float32 or float16 [H_kv, columns, T * GROUP]
    stats_ptr,  # float32 [H_kv, work, ROWS, 2]
    known_ptr,  # uint8 [bs, width], None: all of them are
    ends_ptr,  # int32 [bs + 1]
    importance_ptr,  # float16 [H_kv, columns]
    lens_ptr,  # int [bs], pages, or whatever has the logits
    column_ptr,  # int64 [bs], first columns
    columns,
    stride_channel,
    width,
    work,
    factor,  # from a probability to importance
    MEAN_ROWS: tl.constexpr,
    MEAN_HEADS: tl.constexpr,
    T: tl.constexpr,
    T_P2: tl.constexpr,  # padded to a power of two, and so is the next
    GROUP: tl.constexpr,
    GROUP_P2: tl.constexpr,
    ROWS: tl.constexpr,
    SPLITS_P2: tl.constexpr,
    PROGRAMS: tl.constexpr,  # that share a (request, KV head)
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    h, b, program = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first = tl.load(ends_ptr + b)
    splits = tl.load(ends_ptr + b + 1) - first
    pages_end = tl.load(lens_ptr + b).to(tl.int32)
    column = tl.load(column_ptr + b)
    if EARLY:
        gdc_wait()
    token, head = tl.arange(0, T_P2)[:, None], tl.arange(0, GROUP_P2)[None, :]  # [T, GROUP]
    row = token * GROUP + head
    there = (token < T) & (head < GROUP)
    split = tl.arange(0, SPLITS_P2)[:, None, None]
    base = (h.to(tl.int64) * work + first + split) * ROWS + row[None, :, :]  # [SPLITS, T, GROUP]
    ok = (split < splits) & there[None, :, :]
    peak = tl.load(stats_ptr + base * 2, mask=ok, other=float("-inf"))
    norm = tl.load(stats_ptr + base * 2 + 1, mask=ok, other=0.0)
    top = tl.max(peak, 0)
    top = tl.where(top == float("-inf"), 0.0, top)  # padding, or nothing known
    lse = top + tl.log2(tl.sum(norm * tl.exp2(peak - top[None, :, :]), 0))  # [T, GROUP]
    lse = tl.where(there, lse, float("inf"))  # no probability
    for block in range(program * BLOCK, pages_end, PROGRAMS * BLOCK):
        pages = block + tl.arange(0, BLOCK)
        in_request = pages < pages_end
        line = (h.to(tl.int64) * columns + column + pages) * (T * GROUP)
        mask = in_request[:, None, None] & there[None, :, :]
        s = tl.load(logits_ptr + line[:, None, None] + row[None, :, :], mask=mask, other=float("-inf"))
        s = s.to(tl.float32) - lse[None, :, :]  # [BLOCK, T, GROUP]
        if MEAN_ROWS or MEAN_HEADS:
            p = tl.exp2(s)
            p = tl.sum(p, 2) / GROUP if MEAN_HEADS else tl.max(p, 2)
            p = tl.sum(p, 1) if MEAN_ROWS else tl.max(p, 1)
        else:  # one exponential a page, of the most probable
            p = tl.exp2(tl.max(tl.max(s, 2), 1))
        p = p * factor
        if known_ptr is not None:
            known = tl.load(known_ptr + b.to(tl.int64) * width + pages, mask=in_request, other=0) != 0
            p = tl.where(known, p, float("nan"))
        row_ptr = importance_ptr + h.to(tl.int64) * stride_channel + column
        tl.store(row_ptr + pages, p.to(tl.float16), mask=in_request)
