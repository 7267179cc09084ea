"""Prefill that attends to selected blocks of keys, in Triton.

Three kernels a layer. A few rows of each block of queries are multiplied with all keys before them and leave
the sum of each block of keys; these sums become scores, and the best blocks a list; then all rows attend to
what their block has listed. For a paged attention in its place a kernel writes the slots of that; where a
draft is asked, another makes scores of the target's heads of its sums. How many blocks are listed is known on
the host, so nothing waits for the device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from sts_kernels.checks import (
    check_block_attention,
    check_block_lists,
    check_block_pooling,
    check_block_scores,
    check_block_slots,
)
from sts_kernels.layout import (
    KEY_BLOCK,
    QUERY_BLOCK,
    Contexts,
    KvPool,
    Members,
    Pooling,
    QueryBlocks,
    blocks_of,
)
from sts_kernels.split_kv import LOG2E, in_tile, meet_keys, padded


@dataclass(frozen=True)
class PrefillKnobs:
    """score_rows: that a program multiplies with a block of keys, those of several blocks of queries. span:
    blocks of keys that it goes through. score_warps, score_stages: of it. score_registers: that a thread of
    it may have where it has no more rows; 128 let two programs share a multiprocessor, so that one multiplies
    while the other makes exponentials or waits for keys. cells: sums that a selecting program holds at a
    time. list_warps: of it. heads: query heads of a KV head that an attending program has, which share its
    reads. tile: keys that it reads at a time. num_warps, num_stages: of it.
    """

    score_rows: int = 128
    span: int = 64
    score_warps: int = 8
    score_stages: int = 3
    score_registers: int = 128
    cells: int = 8192
    list_warps: int = 4
    heads: int = 2
    tile: int = 64
    num_warps: int = 8
    num_stages: int = 4


KNOBS = PrefillKnobs()
LISTED = 16  # blocks of keys whose slots a program writes
# Of an attending program, of half precision: of keys that it reads at a time, and of its queries.
TILE_BYTES, QUERY_BYTES = 32768, 65536


def shared_bytes(head_dim: int, rows: int) -> int:
    """About the bytes of shared memory that a thread block takes, of half precision, where a block of queries
    asks with so many rows; read off kernels that Triton 3.6 compiled."""
    more = 2 * max(0, triton.next_power_of_2(rows) - KNOBS.score_rows)
    return padded(head_dim) * ((1300 if padded(head_dim) <= 128 else 780) + more)


def score_blocks(
    q: torch.Tensor,
    pool: KvPool,
    contexts: Contexts,
    blocks: QueryBlocks,
    *,
    scale: float,
    sampled: int,
    shift: int = 0,
) -> torch.Tensor:
    """Kernel of `sts_kernels.torch_ops.score_blocks` (see there); no host sync."""
    check_block_scores(q, pool, contexts, blocks, sampled, shift)
    number, kv_heads, q_heads = blocks.counts.numel(), pool.k.shape[1], q.shape[1]
    each = sampled * (q_heads // kv_heads)
    sums = torch.empty(number, kv_heads, blocks.most, each, dtype=torch.float32, device=q.device)
    if number == 0:
        return sums
    together = max(1, KNOBS.score_rows // each)
    rows = padded(together * each)
    grid = (kv_heads, -(-number // together), -(-blocks.most // KNOBS.span))
    _score_blocks_kernel[grid](
        q,
        pool.k,
        sums,
        *blocks[:5],
        contexts.table,
        contexts.reqs,
        scale * pool.k_scale * LOG2E,
        number,
        blocks.most,
        q.stride(0),
        pool.k.stride(0),
        pool.k.stride(1),
        contexts.table.stride(0),
        GROUP=q_heads // kv_heads,
        D=q.shape[2],
        D_P2=padded(q.shape[2]),
        SHIFT=shift,
        SAMPLED=sampled,
        TOGETHER=together,
        ROWS=rows,
        BLOCK=KEY_BLOCK,
        SPAN=KNOBS.span,
        num_warps=KNOBS.score_warps,
        num_stages=KNOBS.score_stages,
        maxnreg=KNOBS.score_registers if rows <= KNOBS.score_rows else None,
    )
    return sums


def pool_blocks(
    sums: torch.Tensor, blocks: QueryBlocks, members: Members, scores: torch.Tensor, *, pooling: Pooling
) -> None:
    """Kernel of `sts_kernels.torch_ops.pool_blocks` (see there); no host sync."""
    check_block_pooling(sums, blocks, members, scores, pooling)
    number, kv_heads, most, each = sums.shape
    if number == 0 or members.channels.numel() == 0:
        return
    columns, rows = triton.next_power_of_2(most), triton.next_power_of_2(pooling.total_rows)
    _pool_blocks_kernel[(number, members.channels.numel())](
        sums,
        scores,
        blocks.numbers,
        blocks.before,
        blocks.counts,
        *members,
        most,
        scores.shape[1],
        KV_HEADS=kv_heads,
        GROUP=each // pooling.total_rows,
        ASKED=pooling.total_rows,
        HEADS=members.heads.shape[1],
        MAX_HEADS=pooling.heads == "max",
        MAX_ROWS=pooling.rows == "max",
        STEP=max(1, min(rows, KNOBS.cells // columns)),
        BLOCK=KEY_BLOCK,
        COLUMNS=columns,
        num_warps=KNOBS.list_warps,
    )


def list_blocks(sums: torch.Tensor, blocks: QueryBlocks, *, sink: int, recent: int) -> torch.Tensor:
    """Kernel of `sts_kernels.torch_ops.list_blocks` (see there); no host sync, deterministic."""
    check_block_lists(sums, blocks, sink, recent)
    number, kv_heads, most, each = sums.shape
    listed = torch.empty(number, kv_heads, most, dtype=torch.int32, device=sums.device)
    if number == 0:
        return listed
    columns, rows = triton.next_power_of_2(most), triton.next_power_of_2(each)
    _list_blocks_kernel[(number, kv_heads)](
        sums,
        listed,
        blocks.numbers,
        blocks.before,
        blocks.counts,
        most,
        SINK=sink,
        RECENT=recent,
        R=each,
        STEP=max(1, min(rows, KNOBS.cells // columns)),
        BLOCK=KEY_BLOCK,
        COLUMNS=columns,
        num_warps=KNOBS.list_warps,
    )
    return listed


def block_attention(
    q: torch.Tensor,
    pool: KvPool,
    contexts: Contexts,
    blocks: QueryBlocks,
    listed: torch.Tensor,
    out: torch.Tensor,
    *,
    scale: float,
) -> None:
    """Kernel of `sts_kernels.torch_ops.block_attention` (see there); no host sync."""
    check_block_attention(q, pool, contexts, blocks, listed, out)
    number, kv_heads, group = blocks.counts.numel(), pool.k.shape[1], q.shape[1] // pool.k.shape[1]
    if number == 0:
        return
    dims = padded(q.shape[2])
    heads = math.gcd(group, max(1, min(KNOBS.heads, QUERY_BYTES // (2 * QUERY_BLOCK * dims))))
    _block_attention_kernel[(number * (group // heads), kv_heads)](
        q,
        pool.k,
        pool.v,
        out,
        listed,
        *blocks[:5],
        contexts.table,
        contexts.reqs,
        scale * pool.k_scale * LOG2E,
        pool.v_scale,
        blocks.most,
        q.stride(0),
        out.stride(0),
        pool.k.stride(0),
        pool.k.stride(1),
        contexts.table.stride(0),
        GROUP=group,
        HEADS=heads,
        D=q.shape[2],
        D_P2=dims,
        QUERIES=QUERY_BLOCK,
        KEYS=KEY_BLOCK,
        TILE=min(KNOBS.tile, TILE_BYTES // (2 * dims)),
        num_warps=KNOBS.num_warps,
        num_stages=KNOBS.num_stages,
    )


def block_slots(contexts: Contexts, blocks: QueryBlocks, listed: torch.Tensor, *, width: int) -> torch.Tensor:
    """Kernel of `sts_kernels.torch_ops.block_slots` (see there); no host sync."""
    check_block_slots(contexts, blocks, listed, width)
    number, kv_heads, most = listed.shape
    slots = torch.empty(kv_heads, number, width, dtype=torch.int32, device=listed.device)
    if slots.numel() == 0:
        return slots
    _block_slots_kernel[(-(-blocks_of(width) // LISTED), number, kv_heads)](
        slots,
        listed,
        blocks.requests,
        *blocks[2:5],
        contexts.table,
        contexts.reqs,
        most,
        width,
        contexts.table.stride(0),
        KEYS=KEY_BLOCK,
        LISTED=LISTED,
    )
    return slots


@triton.jit
def _score_blocks_kernel(
    q_ptr,  # [N, H_q, D], rows `stride_q` apart
    k_ptr,  # [slots, H_kv, D]
    sums_ptr,  # float32 [blocks, H_kv, most, SAMPLED * GROUP], written
    request_ptr,  # int32 [blocks], and so the next four, see QueryBlocks
    row_ptr,
    number_ptr,
    before_ptr,
    count_ptr,
    table_ptr,  # int32 [requests, ..]
    reqs_ptr,  # int [bs]
    scale,  # of logits, LOG2E and that of the keys included
    blocks,
    most,
    stride_q,
    stride_slot,
    stride_head,
    stride_table,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    D_P2: tl.constexpr,  # padded to a power of two
    SHIFT: tl.constexpr,  # positions that a token's key lies before it, those of a draft
    SAMPLED: tl.constexpr,
    TOGETHER: tl.constexpr,  # query blocks of a program
    ROWS: tl.constexpr,  # their rows, padded to a power of two
    BLOCK: tl.constexpr,
    SPAN: tl.constexpr,
):
    h, first, part = tl.program_id(0), tl.program_id(1) * TOGETHER, tl.program_id(2)
    EACH: tl.constexpr = SAMPLED * GROUP
    rows, dims = tl.arange(0, ROWS), tl.arange(0, D_P2)
    block = first + rows // EACH  # [ROWS], as all that follows
    ok = (rows < TOGETHER * EACH) & (block < blocks)
    ok = ok & (tl.load(count_ptr + block, mask=ok, other=-1) >= 0)
    request = tl.load(request_ptr + block, mask=ok, other=-1)
    number = tl.load(number_ptr + block, mask=ok, other=0)
    place = tl.maximum((rows % EACH // GROUP + 1) * number // SAMPLED - 1, 0)
    position = tl.load(before_ptr + block, mask=ok, other=0) + place
    row = (tl.load(row_ptr + block, mask=ok, other=0) + place).to(tl.int64)
    q_offs = row * stride_q + (h * GROUP + rows % GROUP) * D
    q = tl.load(q_ptr + q_offs[:, None] + dims[None, :], mask=in_tile(ok, dims, D), other=0.0)  # [ROWS, D]
    q, scale = meet_keys(q, scale, k_ptr)
    to_ptr = sums_ptr + (block.to(tl.int64) * tl.num_programs(0) + h) * most * EACH + rows % EACH

    begin = part * SPAN
    for i in range(TOGETHER):
        # The blocks of a request stand side by side: its first one goes through the keys for all of them.
        leads = first + i < blocks
        own = tl.load(request_ptr + first + i, mask=leads, other=-1)
        leads = leads & (tl.load(count_ptr + first + i, mask=leads, other=-1) >= 0)
        if i > 0:
            before = tl.load(request_ptr + first + i - 1, mask=leads, other=-1) != own
            leads = leads & (before | (tl.load(count_ptr + first + i - 1, mask=leads, other=-1) < 0))
        asks = ok & (request == own)
        last = tl.max(tl.where(asks, position, -1), 0)
        end = tl.where(leads, tl.minimum(last // BLOCK + 1, begin + SPAN), 0)
        # Blocks before this one all rows see whole.
        clear = (tl.min(tl.where(asks, position, last), 0) + 1) // BLOCK
        clear = tl.minimum(clear, end)
        if SHIFT > 0:  # the first one begins with a token that has no key
            clear = tl.where(begin == 0, 0, clear)
        req = tl.load(reqs_ptr + tl.maximum(own, 0)).to(tl.int64)
        slot_ptr = table_ptr + req * stride_table
        head_ptr = k_ptr + h * stride_head
        for j in range(begin, clear):
            offs = j * BLOCK + tl.arange(0, BLOCK)
            slots = tl.load(slot_ptr + offs - SHIFT).to(tl.int64)  # [BLOCK]
            k_offs = head_ptr + slots[:, None] * stride_slot + dims[None, :]
            if D_P2 == D:
                k = tl.load(k_offs)  # [BLOCK, D]
            else:
                k = tl.load(k_offs, mask=(dims < D)[None, :], other=0.0)
            s = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee")  # [ROWS, BLOCK]
            peak = tl.max(s, 1) * scale
            found = peak + tl.log2(tl.sum(tl.exp2(s * scale - peak[:, None]), 1))
            tl.store(to_ptr + j * EACH, found, mask=asks)
        for j in range(tl.maximum(begin, clear), end):
            offs = j * BLOCK + tl.arange(0, BLOCK)
            there = (offs <= last) & (offs >= SHIFT)
            slots = tl.load(slot_ptr + offs - SHIFT, mask=there, other=0).to(tl.int64)
            k_offs = head_ptr + slots[:, None] * stride_slot + dims[None, :]
            k = tl.load(k_offs, mask=in_tile(there, dims, D), other=0.0)
            s = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee") * scale
            s = tl.where(there[None, :] & (offs[None, :] <= position[:, None]), s, float("-inf"))
            peak = tl.max(s, 1)
            safe = tl.where(peak == float("-inf"), 0.0, peak)  # of a row that sees none of these keys
            found = safe + tl.log2(tl.sum(tl.exp2(s - safe[:, None]), 1))
            tl.store(to_ptr + j * EACH, found, mask=asks)


@triton.jit
def _pool_blocks_kernel(
    sums_ptr,  # float32 [blocks, KV_HEADS, most, ASKED * GROUP]
    scores_ptr,  # float32 [blocks, channels, most], written or raised
    number_ptr,  # int32 [blocks], and so the next two, see QueryBlocks
    before_ptr,
    count_ptr,
    channel_ptr,  # int32 [n], and so on, see Members
    head_ptr,
    weight_ptr,
    fresh_ptr,
    most,
    channels,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    ASKED: tl.constexpr,  # rows of a block
    HEADS: tl.constexpr,  # of a channel in this layer, at most
    MAX_HEADS: tl.constexpr,
    MAX_ROWS: tl.constexpr,
    STEP: tl.constexpr,  # rows at a time
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,  # most, padded to a power of two
):
    block, member = tl.program_id(0).to(tl.int64), tl.program_id(1)
    count, before = tl.load(count_ptr + block), tl.load(before_ptr + block)
    if count < 0:
        return
    seen = tl.cdiv(before + tl.load(number_ptr + block), BLOCK)
    columns = tl.arange(0, COLUMNS)
    there = columns < seen
    score = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, ASKED, STEP):
        rows = start + tl.arange(0, STEP)
        ok = there[:, None] & (rows < ASKED)[None, :]
        spoken = tl.zeros([COLUMNS, STEP], tl.float32)
        for i in range(HEADS):
            head = tl.load(head_ptr + member * HEADS + i)
            if head >= 0:
                first = (block * KV_HEADS + head // GROUP) * most
                offs = (first + columns[:, None]) * (ASKED * GROUP) + (rows * GROUP)[None, :] + head % GROUP
                own = tl.load(sums_ptr + offs, mask=ok, other=float("-inf"))
                peak = tl.max(own, 0)  # [STEP]
                peak = tl.where(peak == float("-inf"), 0.0, peak)  # of a row that is not there
                norm = tl.maximum(tl.sum(tl.exp2(own - peak[None, :]), 0), 1e-30)
                share = tl.exp2(own - (peak + tl.log2(norm))[None, :])
                if MAX_HEADS:
                    spoken = tl.maximum(spoken, share)
                else:
                    spoken += share
        if MAX_ROWS:
            score = tl.maximum(score, tl.max(spoken, 1))
        else:
            score += tl.sum(spoken, 1)
    if not MAX_HEADS:
        score *= tl.load(weight_ptr + member)
    if not MAX_ROWS:
        score /= ASKED
    to_ptr = scores_ptr + (block * channels + tl.load(channel_ptr + member)) * most + columns
    earlier = there & (tl.load(fresh_ptr + member) == 0)  # whether a layer before has fed the channel
    found = tl.load(to_ptr, mask=earlier, other=0.0)
    tl.store(to_ptr, tl.maximum(score, found) if MAX_ROWS else score + found, mask=there)


@triton.jit
def _list_blocks_kernel(
    sums_ptr,  # float32 [blocks, H_kv, most, R]
    listed_ptr,  # int32 [blocks, H_kv, most], written
    number_ptr,  # int32 [blocks], and so the next two, see QueryBlocks
    before_ptr,
    count_ptr,
    most,
    SINK: tl.constexpr,
    RECENT: tl.constexpr,
    R: tl.constexpr,
    STEP: tl.constexpr,  # rows at a time
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,  # most, padded to a power of two
):
    block, h = tl.program_id(0), tl.program_id(1)
    count, before = tl.load(count_ptr + block), tl.load(before_ptr + block)
    if count < 0:
        return
    choices, seen = before // BLOCK, tl.cdiv(before + tl.load(number_ptr + block), BLOCK)
    pair = (block.to(tl.int64) * tl.num_programs(1) + h) * most
    columns = tl.arange(0, COLUMNS)
    score = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, R, STEP):
        rows = start + tl.arange(0, STEP)
        ok = (columns < seen)[:, None] & (rows < R)[None, :]
        own = tl.load(sums_ptr + (pair + columns[:, None]) * R + rows[None, :], mask=ok, other=float("-inf"))
        peak = tl.max(own, 0)  # [STEP]
        peak = tl.where(peak == float("-inf"), 0.0, peak)  # of a row that is not there
        norm = tl.maximum(tl.sum(tl.exp2(own - peak[None, :]), 0), 1e-30)
        share = tl.exp2(own - (peak + tl.log2(norm))[None, :])
        score = tl.maximum(score, tl.max(share, 1))
    # The bits of floats that are not negative stand in the order of the floats.
    bits = score.to(tl.int32, bitcast=True)
    bits = tl.where((columns < SINK) | (columns >= choices - RECENT), 0x7FFFFFFF, bits)
    bits = tl.where(columns < choices, bits, -1)
    lowest = 0  # that is listed
    for place in tl.static_range(31):
        higher = lowest | (1 << (30 - place))
        lowest = tl.where(tl.sum((bits >= higher).to(tl.int32), 0) >= count, higher, lowest)
    above, ties = bits > lowest, bits == lowest
    wanted = count - tl.sum(above.to(tl.int32), 0)
    later = tl.cumsum(ties.to(tl.int32), 0, reverse=True)
    take = above | (ties & (later <= wanted))
    place = tl.cumsum(take.to(tl.int32), 0) - 1
    tl.store(listed_ptr + pair + place, columns, mask=take)


@triton.jit
def _block_attention_kernel(
    q_ptr,  # [N, H_q, D], rows `stride_q` apart
    k_ptr,  # [slots, H_kv, D]
    v_ptr,  # [slots, H_kv, D]
    out_ptr,  # [N, H_q, D], written
    listed_ptr,  # int32 [blocks, H_kv, most]
    request_ptr,  # int32 [blocks], and so the next four, see QueryBlocks
    row_ptr,
    number_ptr,
    before_ptr,
    count_ptr,
    table_ptr,  # int32 [requests, ..]
    reqs_ptr,  # int [bs]
    scale,  # of logits, LOG2E and that of the keys included
    v_scale,  # of the values
    most,
    stride_q,
    stride_out,
    stride_slot,
    stride_head,
    stride_table,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,  # query heads of a program
    D: tl.constexpr,
    D_P2: tl.constexpr,  # padded to a power of two
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    TILE: tl.constexpr,  # keys at a time
):
    SHARES: tl.constexpr = GROUP // HEADS
    block, h = tl.program_id(0) // SHARES, tl.program_id(1)
    number, before = tl.load(number_ptr + block), tl.load(before_ptr + block)
    count = tl.load(count_ptr + block)
    req = tl.load(reqs_ptr + tl.load(request_ptr + block)).to(tl.int64)
    slot_ptr = table_ptr + req * stride_table
    list_ptr = listed_ptr + (block.to(tl.int64) * tl.num_programs(1) + h) * most
    choices = before // KEYS
    whole = count < 0
    total = tl.where(whole, choices, count)

    rows, dims = tl.arange(0, QUERIES * HEADS), tl.arange(0, D_P2)
    place = rows % QUERIES
    head = h * GROUP + tl.program_id(0) % SHARES * HEADS + rows // QUERIES
    ok = place < number
    row = (tl.load(row_ptr + block) + place).to(tl.int64)
    q = tl.load(
        q_ptr + (row * stride_q + head * D)[:, None] + dims[None, :], mask=in_tile(ok, dims, D), other=0.0
    )  # [ROWS, D]
    q, scale = meet_keys(q, scale, k_ptr)
    peak = tl.full([QUERIES * HEADS], float("-inf"), tl.float32)
    norm = tl.zeros([QUERIES * HEADS], tl.float32)
    acc = tl.zeros([QUERIES * HEADS, D_P2], tl.float32)

    PARTS: tl.constexpr = KEYS // TILE
    for i in range(0, total * PARTS):
        j = i // PARTS
        j = tl.where(whole, j, tl.load(list_ptr + j, mask=count >= 0, other=0))
        slots = tl.load(slot_ptr + j * KEYS + i % PARTS * TILE + tl.arange(0, TILE)).to(tl.int64)  # [TILE]
        kv_offs = (slots * stride_slot + h * stride_head)[:, None] + dims[None, :]
        if D_P2 == D:
            k, v = tl.load(k_ptr + kv_offs), tl.load(v_ptr + kv_offs)  # [TILE, D]
        else:
            k = tl.load(k_ptr + kv_offs, mask=(dims < D)[None, :], other=0.0)
            v = tl.load(v_ptr + kv_offs, mask=(dims < D)[None, :], other=0.0)
        s = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee")  # [ROWS, TILE]
        new_peak = tl.maximum(peak, tl.max(s, 1) * scale)
        fade = tl.exp2(peak - new_peak)
        p = tl.exp2(s * scale - new_peak[:, None])
        norm = norm * fade + tl.sum(p, 1)
        acc = tl.dot(p.to(q.dtype), v.to(q.dtype), acc * fade[:, None], input_precision="ieee")
        peak = new_peak
    # From the last block that could be selected on, causally. Every row sees the first of these keys.
    for start in range(choices * KEYS, before + number, TILE):
        offs = start + tl.arange(0, TILE)
        there = offs < before + number
        slots = tl.load(slot_ptr + offs, mask=there, other=0).to(tl.int64)
        kv_offs = (slots * stride_slot + h * stride_head)[:, None] + dims[None, :]
        k = tl.load(k_ptr + kv_offs, mask=in_tile(there, dims, D), other=0.0)
        v = tl.load(v_ptr + kv_offs, mask=in_tile(there, dims, D), other=0.0)
        s = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee") * scale
        s = tl.where(offs[None, :] <= (before + place)[:, None], s, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(s, 1))
        fade = tl.exp2(peak - new_peak)
        p = tl.exp2(s - new_peak[:, None])
        norm = norm * fade + tl.sum(p, 1)
        acc = tl.dot(p.to(q.dtype), v.to(q.dtype), acc * fade[:, None], input_precision="ieee")
        peak = new_peak
    out = acc / norm[:, None] * v_scale
    to_ptr = out_ptr + (row * stride_out + head * D)[:, None] + dims[None, :]
    tl.store(to_ptr, out.to(out_ptr.dtype.element_ty), mask=in_tile(ok, dims, D))


@triton.jit
def _block_slots_kernel(
    slots_ptr,  # int32 [H_kv, blocks, width], written
    listed_ptr,  # int32 [blocks, H_kv, most]
    request_ptr,  # int32 [blocks], and so the next three, see QueryBlocks
    number_ptr,
    before_ptr,
    count_ptr,
    table_ptr,  # int32 [requests, ..]
    reqs_ptr,  # int [bs]
    most,
    width,
    stride_table,
    KEYS: tl.constexpr,
    LISTED: tl.constexpr,  # blocks of keys of a program
):
    block, h = tl.program_id(1), tl.program_id(2)
    heads = tl.num_programs(2)
    count, before = tl.load(count_ptr + block), tl.load(before_ptr + block)
    if count < 0:
        return
    end = before + tl.load(number_ptr + block)
    req = tl.load(reqs_ptr + tl.load(request_ptr + block)).to(tl.int64)
    place, keys = tl.program_id(0) * LISTED + tl.arange(0, LISTED), tl.arange(0, KEYS)
    listed = place < count
    list_ptr = listed_ptr + (block.to(tl.int64) * heads + h) * most
    # Behind the list stands what is between the blocks that could be selected and the last new token.
    j = tl.where(listed, tl.load(list_ptr + place, mask=listed, other=0), before // KEYS + place - count)
    offs = j[:, None] * KEYS + keys[None, :]
    there = offs < end
    slots = tl.load(table_ptr + req * stride_table + offs, mask=there, other=0)
    to_ptr = slots_ptr + (h.to(tl.int64) * tl.num_programs(1) + block) * width
    tl.store(to_ptr + place[:, None] * KEYS + keys[None, :], slots * heads + h, mask=there)
