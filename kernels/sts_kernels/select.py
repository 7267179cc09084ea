"""Selection in Triton: exact top-k by two byte histograms and one compaction, per (request, channel)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sts_kernels.checks import check_select, expect

# What the benches tune.
KNOBS = {"BLOCK": 4096, "num_warps": 16}
ALIGN = 64  # of columns: scores are read 16 bytes at a time where requests start at multiples of it
UNKNOWN = tl.constexpr(0x7C01)  # float16 bits above those of infinity are NaN


def select_tokens(
    importance: torch.Tensor,
    ctx_start: torch.Tensor,
    seq_lens: torch.Tensor,
    budgets: torch.Tensor,
    sink: int,
    recent: int,
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    kv_indices: torch.Tensor,
    kv_start: torch.Tensor,
    kv_count: torch.Tensor,
    top_p: torch.Tensor | None = None,
) -> None:
    """Kernel of `sts_kernels.reference.select_tokens` (see there); graph-safe, no host sync.

    `ctx_start` must be multiples of 64 where the number of columns is one.
    """
    check_select(importance, budgets, kv_start, kv_count)
    expect(
        "select_tokens", importance.dtype == torch.float16, f"importance is {importance.dtype}, not float16"
    )
    channels, bs = importance.shape[0], budgets.numel()
    if bs == 0:
        return
    _select_kernel[(bs, channels)](
        importance.view(torch.int16),
        ctx_start,
        seq_lens,
        budgets,
        req_to_token,
        req_pool_indices,
        kv_indices,
        kv_start,
        kv_count,
        importance.stride(0),
        req_to_token.stride(0),
        channels,
        seq_lens if top_p is None else top_p,
        TOP_P=top_p is not None,
        SINK=sink,
        RECENT=recent,
        FORCED=triton.next_power_of_2(sink + recent),
        ALIGN=ALIGN if importance.stride(0) % ALIGN == 0 else 1,
        **KNOBS,
    )


@triton.jit
def _keys(row_ptr, offs, first, last, ALIGN: tl.constexpr):
    """Order-preserving int32 keys of non-negative float16 scores (NaN, unknown, above all); and validity."""
    # Up to the end of the last ALIGN columns, which are this request's: a mask by position would split
    # the access into single scores.
    key = tl.load(row_ptr + offs, mask=offs // ALIGN * ALIGN < last, other=0).to(tl.int32) & 0xFFFF
    return key, (offs >= first) & (offs < last)


@triton.jit
def _threshold_bin(counts, wanted):
    """The highest bin whose suffix holds `wanted`, and how many lie above it."""
    bins = tl.arange(0, 256)
    suffix = tl.cumsum(counts, 0, reverse=True)
    bin_ = tl.max(tl.where(suffix >= wanted, bins, -1), 0)
    return bin_, tl.sum(tl.where(bins > bin_, counts, 0), 0)


@triton.jit
def _mass(row_ptr, begin, end, least, ALIGN: tl.constexpr, BLOCK: tl.constexpr):
    """Sum of the scores with a key of at least `least` in [begin, end), and how many; NaN has no mass."""
    total = 0.0
    number = 0
    for block in range(0, end, BLOCK):
        key, ok = _keys(row_ptr, block + tl.arange(0, BLOCK), begin, end, ALIGN)
        inside = ok & (key >= least)
        value = key.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
        total += tl.sum(tl.where(inside & (key < UNKNOWN), value, 0.0), 0)
        number += tl.sum(inside.to(tl.int32), 0)
    return total, number


@triton.jit
def _top_p_wanted(row_ptr, length, first, last, top_p, ALIGN: tl.constexpr, BLOCK: tl.constexpr):
    """Free tokens of the smallest set with `top_p` of the mass: bisects the threshold key."""
    total, _ = _mass(row_ptr, 1, length, 0, ALIGN, BLOCK)
    free, free_number = _mass(row_ptr, first, last, 0, ALIGN, BLOCK)
    _, unknown = _mass(row_ptr, first, last, UNKNOWN, ALIGN, BLOCK)
    missing = top_p * total - (total - free)  # what the free tokens have to bring
    low = 0
    high = UNKNOWN
    for _ in range(15):
        middle = (low + high) // 2
        held, _ = _mass(row_ptr, first, last, middle, ALIGN, BLOCK)
        enough = held >= missing
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    above, number = _mass(row_ptr, first, last, low + 1, ALIGN, BLOCK)
    value = low.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    ties = tl.where(value > 0, tl.ceil((missing - above) / tl.maximum(value, 1e-30)), 0.0).to(tl.int32)
    return tl.where(missing <= 0, unknown, tl.minimum(number + tl.maximum(ties, 0), free_number))


@triton.jit
def _select_kernel(
    scores_ptr,  # float16 bits as int16 [channels, tokens]
    ctx_start_ptr,
    lens_ptr,
    budgets_ptr,
    table_ptr,
    reqs_ptr,
    indices_ptr,
    start_ptr,  # [bs, channels]
    count_ptr,  # [bs, channels]: in, -1 for the whole context, else the budget
    stride_channel,
    stride_table,
    channels,
    top_p_ptr,
    TOP_P: tl.constexpr,
    SINK: tl.constexpr,
    RECENT: tl.constexpr,
    FORCED: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b, c = tl.program_id(0), tl.program_id(1)
    count = tl.load(count_ptr + b * channels + c)
    if count < 0:
        return
    length = tl.load(lens_ptr + b).to(tl.int32)
    row_ptr = scores_ptr + c.to(tl.int64) * stride_channel + tl.load(ctx_start_ptr + b) // ALIGN * ALIGN
    slot_ptr = table_ptr + tl.load(reqs_ptr + b).to(tl.int64) * stride_table
    out_ptr = indices_ptr + tl.load(start_ptr + b * channels + c)
    first, last = SINK, length - RECENT
    wanted = count - SINK - RECENT
    if TOP_P:
        top_p = tl.load(top_p_ptr + b)
        if top_p < float("inf"):
            wanted = tl.minimum(wanted, _top_p_wanted(row_ptr, length, first, last, top_p, ALIGN, BLOCK))
            tl.store(count_ptr + b * channels + c, SINK + RECENT + wanted)

    forced = tl.arange(0, FORCED)
    position = tl.where(forced < SINK, forced, last + forced - SINK)
    is_forced = forced < SINK + RECENT
    tl.store(out_ptr + forced, tl.load(slot_ptr + position, mask=is_forced, other=0), mask=is_forced)
    if wanted <= 0:
        return

    # High byte, then low byte within its bin: the threshold key, exactly.
    high = tl.zeros([256], tl.int32)
    for block in range(0, last, BLOCK):
        key, ok = _keys(row_ptr, block + tl.arange(0, BLOCK), first, last, ALIGN)
        high += tl.histogram(key >> 8, 256, mask=ok)
    high_bin, above = _threshold_bin(high, wanted)
    wanted_low = wanted - above
    low = tl.zeros([256], tl.int32)
    for block in range(0, last, BLOCK):
        key, ok = _keys(row_ptr, block + tl.arange(0, BLOCK), first, last, ALIGN)
        low += tl.histogram(key & 255, 256, mask=ok & ((key >> 8) == high_bin))
    low_bin, above_low = _threshold_bin(low, wanted_low)
    threshold = high_bin * 256 + low_bin
    ties = wanted_low - above_low

    # From the end: of equal scores the later position wins.
    written = 0
    tied = 0
    blocks = tl.cdiv(last, BLOCK)
    for i in range(0, blocks):
        offs = (blocks - 1 - i) * BLOCK + tl.arange(0, BLOCK)
        key, ok = _keys(row_ptr, offs, first, last, ALIGN)
        equal = (ok & (key == threshold)).to(tl.int32)
        rank = tied + tl.cumsum(equal, 0, reverse=True)
        take = (ok & ((key > threshold) | ((equal == 1) & (rank <= ties)))).to(tl.int32)
        place = SINK + RECENT + written + tl.cumsum(take, 0, reverse=True) - 1
        slots = tl.load(slot_ptr + offs, mask=take == 1, other=0)
        tl.store(out_ptr + place, slots, mask=take == 1)
        written += tl.sum(take, 0)
        tied += tl.sum(equal, 0)
