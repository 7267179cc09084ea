"""Sketches of single tokens in Triton: a key on few directions, half a byte each, and the scores by them.

A token's sketch lies beside its slot, so that it is shared and dies with the key. Scores take two kernels, as
the sum over the whole context has to be known: one reads the sketches and leaves logits, and one makes them
importance. Of many query rows logits are more bytes than sketches: then there are none, and both kernels read
the sketches. Lists are made as those of the draft's choice are, of scores of fewer bits.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from sts_kernels.checks import check_select, check_token_scores, check_token_sketches, expect, expect_half
from sts_kernels.layout import (
    AGAIN,
    IMPORTANCE_SCALE,
    LOW_ZERO,
    MOST_STEPS,
    QUERY_STEPS,
    Contexts,
    Directions,
    Lists,
    Plan,
    Pooling,
    Scores,
    sketch_bytes,
)
from sts_kernels.page_scores import PoolKnobs, pool_logits
from sts_kernels.select import select_rows
from sts_kernels.split_kv import LOG2E, padded, plan_whole, starts_early

LARGEST = 65504.0  # of float16, which logits are kept in
LEAST_COLUMNS, LEAST_BYTES = 8, 32  # of a product of int8
# Of a head: 16 times a product is less than 2 ** 22 then.
MOST_DIM = 256
# A float beside which the next 2 ** 22 whole numbers are floats, either way, one bit apart; and its bits.
EXACT, EXACT_BITS = tl.constexpr(1.5 * 2**23), tl.constexpr(0x4B400000)


@dataclass(frozen=True)
class TokensKnobs(PoolKnobs):
    """sketch_block: keys that a program sketches at a time. sketch_programs: that all (request, KV head)
    pairs are parted among. block: tokens that a program scores at a time. products: of these and query rows,
    at a time. again: query rows of a KV head from which on sketches are read again for want of logits.
    maxnreg: registers that a thread has at most that scores, None: any. pooled: logits that a pooling program
    takes at a time. The rest: see PoolKnobs.
    """

    programs: int = 528
    least: int = 1024
    num_stages: int = 5
    sketch_block: int = 64
    sketch_programs: int = 1056
    block: int = 256
    products: int = 4096
    again: int = AGAIN
    maxnreg: int | None = None
    pooled: int = 4096
    pool_programs: int = 1056


KNOBS = TokensKnobs()


def shared_bytes(rows: int, head_dim: int) -> int:
    """About the bytes of shared memory that a thread block takes for so many query rows.

    Queries and directions, or then sketches, slots and logits: no kernel that Triton 3.6 compiled for Hopper
    had more.
    """
    dim, sketch = padded(head_dim), _sketch(sketch_bytes(head_dim))
    return max(dim * (2 * _rows(rows) + 4 * sketch), 4 * KNOBS.block * sketch)


def _sketch(number: int) -> int:
    """Bytes of a sketch, padded for a product of int8."""
    return max(LEAST_BYTES, triton.next_power_of_2(number))


def _rows(used: int) -> int:
    """Query rows, padded: at least half of the columns of a product, as a thread has two of its columns."""
    return max(LEAST_COLUMNS // 2, triton.next_power_of_2(used))


def _block(rows: int) -> int:
    """Tokens at a time: fewer of many rows, whose products a thread holds in registers."""
    return max(16 * KNOBS.num_warps, min(KNOBS.block, KNOBS.products // rows))


def sketch_tokens(
    keys: torch.Tensor,
    sketches: torch.Tensor,
    directions: Directions,
    contexts: Contexts,
    before: torch.Tensor,
    *,
    most: int,
    k_scale: float = 1.0,
) -> None:
    """Kernel of `sts_kernels.torch_ops.sketch_tokens` (see there); graph-safe, no host sync."""
    check_token_sketches(keys, sketches, directions, contexts, before)
    bs, (_, kv_heads, dim), number = contexts.lens.numel(), keys.shape, sketches.shape[2]
    if bs == 0:
        return
    block = min(KNOBS.sketch_block, padded(most))
    programs = max(1, min(KNOBS.sketch_programs // (bs * kv_heads), -(-most // block)))
    _sketch_tokens_kernel[(kv_heads, bs, programs)](
        keys,
        sketches,
        directions.onto,
        directions.centre,
        contexts.table,
        contexts.reqs,
        contexts.lens,
        before,
        k_scale,
        keys.stride(0),
        keys.stride(1),
        contexts.table.stride(0),
        H_KV=kv_heads,
        D=dim,
        D_P2=padded(dim),
        R=number,
        R_P2=padded(number),
        MOST=MOST_STEPS,
        ZERO=LOW_ZERO,
        BLOCK=block,
    )


def plan_scores(contexts: Contexts, *, kv_heads: int) -> Plan | None:
    """How the contexts of a batch are parted among the programs of score_tokens: alike for every KV head and
    layer of a step. Never None."""
    return plan_whole(contexts.lens, kv_heads=kv_heads, longest=contexts.table.shape[1], knobs=KNOBS)


def score_tokens(
    q: torch.Tensor,
    sketches: torch.Tensor,
    directions: Directions,
    contexts: Contexts,
    scores: Scores,
    *,
    scale: float,
    pooling: Pooling,
    plan: Plan | None = None,
) -> None:
    """Kernel of `sts_kernels.torch_ops.score_tokens` (see there); graph-safe, no host sync.

    Queries are rounded to the dtype of the directions. Logits that are kept are rounded to float16, all of a
    row made smaller where one could be out of its range. Without a plan, which one launch of `plan_scores`
    makes for all layers of a step, the call makes its own.
    """
    check_token_scores(q, sketches, directions, scores, pooling)
    expect_half("score_tokens", scores)
    bs, tokens, q_heads, dim = q.shape
    expect("score_tokens", dim <= MOST_DIM, f"heads may have {MOST_DIM} dimensions, got {dim}")
    if bs == 0:
        return
    (kv_heads, columns), number = scores.importance.shape, sketches.shape[2]
    plan = plan_scores(contexts, kv_heads=kv_heads) if plan is None else plan
    work, group = plan.work.shape[0], q_heads // kv_heads
    used = tokens * group
    rows = _rows(used)
    again = used >= KNOBS.again and pooling.rows == pooling.heads == "max"
    spread, sketch = max(1, LEAST_COLUMNS // rows), _sketch(number)
    shape = {"H_KV": kv_heads, "R": number, "R_P2": sketch, "ROWS": rows, "SPREAD": spread}
    shape |= {"BLOCK": _block(rows), "EARLY": KNOBS.early and bool(starts_early(q.device))}
    shape |= {"num_warps": KNOBS.num_warps, "num_stages": KNOBS.num_stages, "maxnreg": KNOBS.maxnreg}
    made = functools.partial(torch.empty, device=q.device)
    stats = made(kv_heads, work, rows, 2, dtype=torch.float32)
    logits = None if again else made(kv_heads, columns, used, dtype=torch.float16)
    asked = made(kv_heads, bs, 2, rows * spread, sketch, dtype=torch.int8) if again else None
    lines = made(kv_heads, bs, 2, rows, dtype=torch.float32) if again else None
    _score_tokens_kernel[(kv_heads, work)](
        q,
        sketches,
        directions.back,
        logits,
        asked,
        lines,
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
        bs,
        T=tokens,
        H_Q=q_heads,
        D=dim,
        D_P2=padded(dim),
        MOST=QUERY_STEPS,
        ZERO=LOW_ZERO,
        LARGEST=LARGEST / (2 * number * MOST_STEPS * QUERY_STEPS),
        TILE=16 * KNOBS.num_warps,
        **shape,
    )
    if again:
        _weigh(sketches, (asked, lines, stats), contexts, scores, plan, {"USED": used, **shape})
        return
    pool_logits(
        logits,
        stats,
        scores,
        contexts.lens,
        plan,
        pooling,
        tokens=tokens,
        group=group,
        longest=contexts.table.shape[1],
        block=max(16, KNOBS.pooled // triton.next_power_of_2(used)),
        knobs=KNOBS,
    )


def _weigh(
    sketches: torch.Tensor,
    found: tuple[torch.Tensor, ...],
    contexts: Contexts,
    scores: Scores,
    plan: Plan,
    shape: dict,
) -> None:
    """Importance by a second reading of sketches. found: what `_score_tokens_kernel` left: queries, lines and
    stats. shape: of the launch."""
    _weigh_tokens_kernel[(scores.importance.shape[0], plan.work.shape[0])](
        sketches,
        *found,
        scores.importance,
        plan.work,
        plan.ends,
        contexts.table,
        contexts.reqs,
        scores.starts,
        scores.importance.stride(0),
        contexts.table.stride(0),
        contexts.lens.numel(),
        FACTOR=math.log2(IMPORTANCE_SCALE),
        SPLITS_P2=triton.next_power_of_2(plan.most),
        **shape,
        **(starts_early(sketches.device) if shape["EARLY"] else {}),
    )


def list_tokens(scores: Scores, contexts: Contexts, lists: Lists, *, sink: int, recent: int) -> None:
    """Kernel of `sts_kernels.torch_ops.list_tokens` (see there); graph-safe, no host sync, deterministic.

    `scores.starts` must be multiples of ALIGN, and so the number of columns.
    """
    check_select(scores, contexts.lens, lists)
    expect_half("list_tokens", scores)
    select_rows(scores, contexts, lists, sink=sink, recent=recent, ranked=True)


@triton.jit
def _steps(found, MOST: tl.constexpr):
    """The nearest whole steps, in float32."""
    return tl.minimum(tl.maximum(tl.floor(found + 0.5), -MOST), MOST)


@triton.jit
def _sketch_tokens_kernel(
    k_ptr,  # [slots, H_kv, D]
    sketch_ptr,  # int8 [slots, H_kv, R]
    onto_ptr,  # [H_kv, D, 2 * R]
    centre_ptr,  # float32 [H_kv, 2 * R]
    table_ptr,  # int32 [requests, width]
    reqs_ptr,  # int [bs]
    lens_ptr,  # int [bs]
    before_ptr,  # int [bs]
    k_scale,  # of keys as they are stored
    stride_slot,
    stride_head,
    stride_table,
    H_KV: tl.constexpr,
    D: tl.constexpr,
    D_P2: tl.constexpr,  # padded to a power of two of at least 16, and so is the next
    R: tl.constexpr,  # bytes of a sketch: half of the directions
    R_P2: tl.constexpr,
    MOST: tl.constexpr,
    ZERO: tl.constexpr,
    BLOCK: tl.constexpr,
):
    h, b, program = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    req = tl.load(reqs_ptr + b).to(tl.int64)
    first, end = tl.load(before_ptr + b).to(tl.int32), tl.load(lens_ptr + b).to(tl.int32)
    if (req == 0) | (first + program * BLOCK >= end):
        return
    slot_ptr = table_ptr + req * stride_table
    dims, place = tl.arange(0, D_P2), tl.arange(0, R_P2)
    here = (dims < D)[:, None] & (place < R)[None, :]
    onto_ptr += (h * D + dims)[:, None] * (2 * R) + place[None, :]
    low_onto = tl.load(onto_ptr, mask=here, other=0.0)  # [D, R], and so the other
    high_onto = tl.load(onto_ptr + R, mask=here, other=0.0)
    low_centre = tl.load(centre_ptr + h * 2 * R + place, mask=place < R, other=0.0)
    high_centre = tl.load(centre_ptr + h * 2 * R + R + place, mask=place < R, other=0.0)
    for start in range(first + program * BLOCK, end, tl.num_programs(2) * BLOCK):
        offs = start + tl.arange(0, BLOCK)
        ok = offs < end
        slots = tl.load(slot_ptr + offs, mask=ok, other=0).to(tl.int64)  # [BLOCK]
        from_ptr = k_ptr + slots[:, None] * stride_slot + h * stride_head + dims[None, :]
        k = tl.load(from_ptr, mask=ok[:, None] & (dims < D)[None, :], other=0.0)  # [BLOCK, D]
        k = k.to(low_onto.dtype)
        low = _steps(tl.dot(k, low_onto, input_precision="ieee") * k_scale - low_centre[None, :], MOST)
        high = _steps(tl.dot(k, high_onto, input_precision="ieee") * k_scale - high_centre[None, :], MOST)
        to_ptr = sketch_ptr + (slots[:, None] * H_KV + h) * R + place[None, :]
        tl.store(to_ptr, (16 * high + low + ZERO).to(tl.int8), mask=ok[:, None] & (place < R)[None, :])


@triton.jit
def _asked(
    q_ptr,  # of a request and KV head, tokens `stride_q` apart
    back_ptr,  # [D, 2 * R]
    stride_q,
    T: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    D_P2: tl.constexpr,
    R: tl.constexpr,
    R_P2: tl.constexpr,
    COLS: tl.constexpr,
    SPREAD: tl.constexpr,
    MOST: tl.constexpr,
):
    """Queries on the directions of the low halves of sketches and of the high ones, int8 [COLS, R_P2] each,
    in steps [COLS]. Query r is row r * SPREAD, and rows between are 0."""
    PRODUCT: tl.constexpr = max(16, COLS)
    cols, dims, place = tl.arange(0, PRODUCT), tl.arange(0, D_P2), tl.arange(0, R_P2)
    row = cols // SPREAD
    asks = (row < T * GROUP) & (cols % SPREAD == 0) & (cols < COLS)
    q_offs = row // GROUP * stride_q + row % GROUP * D
    there = asks[:, None] & (dims < D)[None, :]
    q = tl.load(q_ptr + q_offs[:, None] + dims[None, :], mask=there, other=0.0)  # [PRODUCT, D]
    here = (dims < D)[:, None] & (place < R)[None, :]
    back_ptr += dims[:, None] * (2 * R) + place[None, :]
    low_back = tl.load(back_ptr, mask=here, other=0.0)  # [D, R], and so the other
    high_back = tl.load(back_ptr + R, mask=here, other=0.0)
    q = q.to(low_back.dtype)
    low_q = _first(tl.dot(q, low_back, input_precision="ieee"), COLS)  # [COLS, R], and so the other
    high_q = _first(tl.dot(q, high_back, input_precision="ieee"), COLS)
    largest = tl.maximum(tl.max(tl.abs(low_q), 1), tl.max(tl.abs(high_q), 1))
    step = tl.maximum(largest, 1e-30) / MOST
    # Both sides are int8: to turn a sketch into float16 takes longer than to read it.
    low_q = tl.floor(low_q / step[:, None] + 0.5).to(tl.int8)
    high_q = tl.floor(high_q / step[:, None] + 0.5).to(tl.int8)
    return low_q, high_q, step


@triton.jit
def _first(x, ROWS: tl.constexpr):
    """The first ROWS of a product [ROWS or 2 * ROWS, n]."""
    if x.shape[0] != ROWS:  # a thread has row r and row 8 + r, so that nothing is moved
        x, _ = tl.split(tl.permute(tl.reshape(x, [2, ROWS, x.shape[1]]), (1, 2, 0)))
    return x


@triton.jit
def _of_rows(x, SPREAD: tl.constexpr):
    """Of [.., COLS] what is of queries, [.., ROWS]."""
    if SPREAD == 2:  # a thread has two neighbours, so that it goes on with what is of a query alone
        x, _ = tl.split(tl.reshape(x, x.shape[:-1] + (x.shape[-1] // 2, 2)))
    return x


@triton.jit
def _products(sketch_ptr, slots, low_q, high_q, STRIDE: tl.constexpr, R: tl.constexpr, SPREAD: tl.constexpr):
    """float32 [BLOCK, ROWS], whole numbers: EXACT, and 16 times the products of queries and the sketches of a
    KV head, from `sketch_ptr` on, at `slots` [BLOCK]. Their low halves are too large by ZERO."""
    place = tl.arange(0, low_q.shape[1])
    from_ptr = (sketch_ptr + place)[None, :] + (slots.to(tl.int64) * STRIDE)[:, None]
    if low_q.shape[1] == R:
        sketch = tl.load(from_ptr)  # [BLOCK, R]
    else:
        sketch = tl.load(from_ptr, mask=(place < R)[None, :], other=0)
    # A mask is all that either half takes: the high one is 16 times what it says.
    low = tl.dot(sketch & 15, tl.trans(low_q))
    # Added up from the bits of EXACT on, sums are the bits of a float: nothing is converted.
    if SPREAD == 1:
        high = tl.dot(sketch & -16, tl.trans(high_q), 16 * low + EXACT_BITS, out_dtype=tl.int32)
    else:
        bits = tl.full(low.shape, EXACT_BITS, tl.int32)
        high = tl.dot(sketch & -16, tl.trans(high_q), bits, out_dtype=tl.int32)
        high = _of_rows(high, SPREAD) + 16 * _of_rows(low, SPREAD)
    return high.to(tl.float32, bitcast=True)


@triton.jit
def _score_tokens_kernel(
    q_ptr,  # [bs, T, H_q, D], tokens `stride_q` apart
    sketch_ptr,  # int8 [slots, H_kv, R]
    back_ptr,  # [H_kv, D, 2 * R]
    logits_ptr,  # float16 [H_kv, columns, T * group], LOG2E included; None: they are not kept
    asked_ptr,  # int8 [H_kv, bs, 2, COLS, R_P2], what `_asked` finds; None where logits are kept
    lines_ptr,  # float32 [H_kv, bs, 2, ROWS]: a logit is the first of a product and the second; None likewise
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
    bs,
    T: tl.constexpr,
    H_Q: tl.constexpr,
    H_KV: tl.constexpr,
    D: tl.constexpr,
    D_P2: tl.constexpr,  # padded to a power of two of at least 16
    R: tl.constexpr,  # bytes of a sketch: half of the directions
    R_P2: tl.constexpr,  # padded to a power of two of at least 32
    ROWS: tl.constexpr,  # T * group, padded to a power of two of at least 4
    SPREAD: tl.constexpr,  # of COLS columns of a product to a query row
    MOST: tl.constexpr,
    ZERO: tl.constexpr,
    LARGEST: tl.constexpr,  # of a step, at which no logit that is kept is out of range
    BLOCK: tl.constexpr,  # tokens at a time
    TILE: tl.constexpr,  # tokens of which a thread has two neighbours by 8
    EARLY: tl.constexpr,
):
    h, program = tl.program_id(0), tl.program_id(1)
    GROUP: tl.constexpr = H_Q // H_KV
    COLS: tl.constexpr = ROWS * SPREAD
    entry = work_ptr + program * 4
    b = tl.load(entry).to(tl.int32)
    begin, number = tl.load(entry + 1).to(tl.int32), tl.load(entry + 2).to(tl.int32)
    if program >= tl.load(ends_ptr + bs):
        return
    end = begin + number
    slot_ptr = table_ptr + tl.load(reqs_ptr + b).to(tl.int64) * stride_table
    low_q, high_q, step = _asked(
        q_ptr + (b * T).to(tl.int64) * stride_q + h * GROUP * D,
        back_ptr + h * D * (2 * R),
        *(stride_q, T, GROUP, D, D_P2, R, R_P2, COLS, SPREAD, MOST),
    )
    zero = 16 * ZERO * _of_rows(tl.sum(low_q.to(tl.int32), 1), SPREAD).to(tl.float32)
    step = _of_rows(step, SPREAD) * (scale / 16)  # [ROWS], of a product
    if logits_ptr is not None:
        step = tl.minimum(step, LARGEST / 16)
    zero = -(zero + EXACT) * step
    rows = tl.arange(0, ROWS)
    if asked_ptr is not None and begin == 0:
        pair = (h * bs + b).to(tl.int64)
        asked_ptr += pair * (2 * COLS * R_P2)
        own = tl.arange(0, COLS)[:, None] * R_P2 + tl.arange(0, R_P2)[None, :]
        tl.store(asked_ptr + own, low_q)
        tl.store(asked_ptr + COLS * R_P2 + own, high_q)
        tl.store(lines_ptr + pair * (2 * ROWS) + rows, step)
        tl.store(lines_ptr + pair * (2 * ROWS) + ROWS + rows, zero)
    line = (h.to(tl.int64) * columns + tl.load(column_ptr + b)) * (T * GROUP)

    # Of what a thread has itself, until the end: a maximum and a sum over all threads take barriers.
    peak = tl.zeros([TILE // 16, 8, ROWS], tl.float32)  # of `_products`, which are all above
    norm = tl.zeros([TILE // 16, 8, ROWS], tl.float32)
    for block in range(begin, end, BLOCK):
        offs = block + tl.arange(0, BLOCK)
        slots = tl.load(slot_ptr + tl.minimum(offs, end - 1))  # [BLOCK]
        s = _products(sketch_ptr + h * R, slots, low_q, high_q, H_KV * R, R, SPREAD)
        if logits_ptr is not None:
            mask = (offs < end)[:, None] & (rows < T * GROUP)[None, :]
            to_ptr = logits_ptr + line + (offs.to(tl.int64) * (T * GROUP))[:, None] + rows[None, :]
            tl.store(to_ptr, (s * step[None, :] + zero[None, :]).to(tl.float16), mask=mask)
        if block + BLOCK > end:
            s = tl.where((offs < end)[:, None], s, float("-inf"))
        s = tl.reshape(s, [BLOCK // TILE, TILE // 16, 2, 8, ROWS])
        new_peak = tl.maximum(peak, tl.max(tl.max(s, 0), 1))
        low = -new_peak * step[None, None, :]
        p = tl.exp2(tl.fma(s, step[None, None, None, None, :], low[None, :, None, :, :]))
        norm = norm * tl.exp2((peak - new_peak) * step[None, None, :]) + tl.sum(tl.sum(p, 0), 1)
        peak = new_peak
    if EARLY:
        gdc_launch_dependents()
    peak, norm = tl.reshape(peak, [TILE // 2, ROWS]), tl.reshape(norm, [TILE // 2, ROWS])
    top = tl.max(peak, 0)
    norm = tl.sum(norm * tl.exp2((peak - top[None, :]) * step[None, :]), 0)
    base = (h * tl.num_programs(1) + program).to(tl.int64) * ROWS
    tl.store(stats_ptr + (base + rows) * 2, top * step + zero)
    tl.store(stats_ptr + (base + rows) * 2 + 1, norm)


@triton.jit
def _weigh_tokens_kernel(
    sketch_ptr,  # int8 [slots, H_kv, R]
    asked_ptr,  # int8 [H_kv, bs, 2, COLS, R_P2], as _score_tokens_kernel left it, and so the next two
    lines_ptr,  # float32 [H_kv, bs, 2, ROWS]
    stats_ptr,  # float32 [H_kv, work, ROWS, 2]
    importance_ptr,  # float16 [H_kv, columns], written
    work_ptr,  # int64 [work, 4], see Plan
    ends_ptr,  # int32 [bs + 1]
    table_ptr,  # int32 [requests, ..]
    reqs_ptr,  # int [bs]
    column_ptr,  # int64 [bs], first columns
    stride_channel,
    stride_table,
    bs,
    FACTOR: tl.constexpr,  # from a probability to importance, of base 2
    USED: tl.constexpr,  # query rows
    H_KV: tl.constexpr,
    R: tl.constexpr,
    R_P2: tl.constexpr,
    ROWS: tl.constexpr,
    SPREAD: tl.constexpr,
    SPLITS_P2: tl.constexpr,  # parts of a request, padded to a power of two
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    h, program = tl.program_id(0), tl.program_id(1)
    COLS: tl.constexpr = ROWS * SPREAD
    entry = work_ptr + program * 4
    b = tl.load(entry).to(tl.int32)
    begin, number = tl.load(entry + 1).to(tl.int32), tl.load(entry + 2).to(tl.int32)
    if program >= tl.load(ends_ptr + bs):
        return
    end = begin + number
    slot_ptr = table_ptr + tl.load(reqs_ptr + b).to(tl.int64) * stride_table
    to_ptr = importance_ptr + h.to(tl.int64) * stride_channel + tl.load(column_ptr + b)
    first = tl.load(ends_ptr + b)
    splits = tl.load(ends_ptr + b + 1) - first
    if EARLY:
        gdc_wait()
    rows, split = tl.arange(0, ROWS), tl.arange(0, SPLITS_P2)[:, None]
    base = (h.to(tl.int64) * tl.num_programs(1) + first + split) * ROWS + rows[None, :]  # [SPLITS, ROWS]
    peak = tl.load(stats_ptr + base * 2, mask=split < splits, other=float("-inf"))
    norm = tl.load(stats_ptr + base * 2 + 1, mask=split < splits, other=0.0)
    top = tl.max(peak, 0)
    lse = top + tl.log2(tl.sum(norm * tl.exp2(peak - top[None, :]), 0))  # [ROWS]
    pair = (h * bs + b).to(tl.int64)
    step = tl.load(lines_ptr + pair * (2 * ROWS) + rows)
    zero = tl.load(lines_ptr + pair * (2 * ROWS) + ROWS + rows)
    zero = tl.where(rows < USED, zero - lse + FACTOR, float("-inf"))
    asked_ptr += pair * (2 * COLS * R_P2)
    own = tl.arange(0, COLS)[:, None] * R_P2 + tl.arange(0, R_P2)[None, :]
    low_q, high_q = tl.load(asked_ptr + own), tl.load(asked_ptr + COLS * R_P2 + own)
    # Backwards: what was read last is the most likely to be in the cache still.
    last = begin + (number - 1) // BLOCK * BLOCK
    for back in range(0, number, BLOCK):
        offs = last - back + tl.arange(0, BLOCK)
        slots = tl.load(slot_ptr + tl.minimum(offs, end - 1))  # [BLOCK]
        s = _products(sketch_ptr + h * R, slots, low_q, high_q, H_KV * R, R, SPREAD)
        # The most probable row's: exp2 is taken once a token.
        p = tl.exp2(tl.max(s * step[None, :] + zero[None, :], 1))
        tl.store(to_ptr + offs, p.to(tl.float16), mask=offs < end)
