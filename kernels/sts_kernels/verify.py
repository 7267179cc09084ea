"""Sparse verify attention in Triton: split-KV over per-head slot lists, all rows of a request in a tile."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from sts_kernels.checks import check_plan, check_verify
from sts_kernels.reference import Plan

LOG2E = 1.4426950408889634
# What the benches tune. `programs` share the lists of all (request, KV head) pairs, each at least
# `least` tokens of a full context. Slots, then keys and values are loaded ahead: with five stages two
# blocks of keys and values are in flight, with three only one. `early` lets the merge start while the splits
# end. A list longer than the mean is read in up to `uneven` times as many splits.
KNOBS = {
    "BLOCK": 32,
    "programs": 264,
    "least": 512,
    "num_warps": 4,
    "num_stages": 5,
    "early": True,
    "uneven": 4,
}


def sparse_verify_attention(
    q: torch.Tensor,
    k_buffer: torch.Tensor,
    v_buffer: torch.Tensor,
    kv_indices: torch.Tensor,
    kv_start: torch.Tensor,
    kv_count: torch.Tensor,
    head_channels: torch.Tensor,
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    seq_lens: torch.Tensor,
    tail_mask: torch.Tensor,
    sm_scale: float,
    attended: torch.Tensor,
    plan: Plan | None = None,
) -> torch.Tensor:
    """Kernel of `sts_kernels.reference.sparse_verify_attention` (see there); graph-safe, no host sync.

    All T * G query rows of a (request, KV head) share one read of the selected KV. Without a plan, which
    one launch of `plan_verify` makes for all layers of a round, the layer makes its own.
    """
    check_verify(q, k_buffer, v_buffer, kv_start, kv_count, head_channels, tail_mask)
    bs, tokens, q_heads, dim = q.shape
    kv_heads = k_buffer.shape[1]
    rows = max(16, triton.next_power_of_2(tokens * (q_heads // kv_heads)))
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if bs == 0:
        return out
    programs, most = splits(bs * kv_heads, req_to_token.shape[1])
    if plan is None:
        plan = plan_verify(kv_start, kv_count, head_channels[None], seq_lens, programs, most).of(0)
    number = plan.work.shape[0]
    partial = torch.empty(number, rows, dim, dtype=torch.float32, device=q.device)
    stats = torch.empty(number, rows, 2, dtype=torch.float32, device=q.device)
    shape = {"T": tokens, "H_Q": q_heads, "H_KV": kv_heads, "D": dim, "ROWS": rows}
    early = starts_early(q.device) if KNOBS["early"] else {}
    _verify_kernel[(number,)](
        q,
        k_buffer,
        v_buffer,
        partial,
        stats,
        plan.work,
        plan.ends,
        kv_indices,
        kv_count,
        head_channels,
        req_to_token,
        req_pool_indices,
        seq_lens,
        tail_mask,
        attended,
        sm_scale * LOG2E,
        kv_count.shape[1],
        bs * kv_heads,
        q.stride(1 if tokens > 1 else 0),  # that of a dimension of one says nothing
        k_buffer.stride(0),
        k_buffer.stride(1),
        req_to_token.stride(0),
        tail_mask.stride(0),
        TAIL=tail_mask.shape[2],
        TAIL_P2=max(16, triton.next_power_of_2(tail_mask.shape[2])),
        BLOCK=KNOBS["BLOCK"],
        EARLY=bool(early),
        num_warps=KNOBS["num_warps"],
        num_stages=KNOBS["num_stages"],
        **shape,
    )
    splits_p2 = triton.next_power_of_2(most)
    _verify_merge_kernel[(bs, tokens, q_heads)](
        partial, stats, plan.ends, out, SPLITS_P2=splits_p2, EARLY=bool(early), **shape, **early
    )
    return out


def plan_verify(
    kv_start: torch.Tensor,
    kv_count: torch.Tensor,
    head_channels: torch.Tensor,
    seq_lens: torch.Tensor,
    programs: int,
    most: int,
) -> Plan:
    """Kernel of `sts_kernels.reference.plan_verify` (see there); graph-safe, no host sync."""
    check_plan(kv_start, kv_count, head_channels)
    layers, heads = head_channels.shape
    pairs = seq_lens.numel() * heads
    plan = Plan.empty(layers, pairs, programs, kv_start.device)
    if pairs:
        _plan_kernel[(layers,)](
            plan.work,
            plan.ends,
            kv_start,
            kv_count,
            head_channels,
            seq_lens,
            kv_count.shape[1],
            pairs,
            plan.work.shape[1],
            programs,
            most,
            H_KV=heads,
            PAIRS_P2=triton.next_power_of_2(pairs),
            num_warps=1 if pairs <= 256 else 16,  # a warp sums without barriers
        )
    return plan


def splits(pairs: int, max_context: int, knobs: dict[str, int] = KNOBS) -> tuple[int, int]:
    """How many programs share the lists of so many (request, KV head) pairs, and how many at most one list;
    a merge holds 64 of them in registers."""
    most = max(1, min(max_context // knobs["least"], 64))
    each = max(1, min(knobs["programs"] // max(1, pairs), most))
    return each * pairs, min(each * knobs["uneven"], most)


@functools.cache
def starts_early(device: torch.device) -> dict[str, bool]:
    """Launch options of a kernel that may start while the one before it ends (from sm_90), and waits in
    it for that one's results: its launch then costs nothing. Triton's interpreter knows no such option."""
    if device.type == "cpu" or (device.type == "cuda" and torch.cuda.get_device_capability(device) < (9, 0)):
        return {}
    return {"launch_pdl": True}


@triton.jit
def _plan_kernel(
    work_ptr,  # int64 [layers, work, 4]
    ends_ptr,  # int32 [layers, pairs + 1]
    start_ptr,
    count_ptr,
    heads_ptr,  # [layers, H_kv]
    lens_ptr,
    channels,
    pairs,
    work,
    programs,
    most,
    H_KV: tl.constexpr,
    PAIRS_P2: tl.constexpr,
):
    layer = tl.program_id(0)
    pair = tl.arange(0, PAIRS_P2)
    there = pair < pairs
    place = pair // H_KV * channels + tl.load(heads_ptr + layer * H_KV + pair % H_KV, mask=there, other=0)
    count = tl.load(count_ptr + place, mask=there, other=0)
    begin = tl.load(start_ptr + place, mask=there, other=0)
    whole = count < 0
    total = tl.where(whole, tl.load(lens_ptr + pair // H_KV, mask=there, other=0).to(tl.int32), count)
    begin = tl.where(whole, 0, begin)

    # The smallest share that the programs suffice for: in halves, then exactly.
    low, high = 0, tl.maximum(tl.max(total, 0), 1)
    while high - low > 1:
        middle = (low + high) // 2
        enough = tl.sum(_parts(total, middle, most, there), 0) <= programs
        low = tl.where(enough, low, middle)
        high = tl.where(enough, middle, high)
    number = _parts(total, high, most, there)
    end = tl.cumsum(number, 0)
    tl.store(ends_ptr + layer * (pairs + 1) + 1 + pair, end, mask=there)
    tl.store(ends_ptr + layer * (pairs + 1), 0)
    for split in range(0, tl.max(number, 0)):
        entry = work_ptr + (layer * work + end - number + split).to(tl.int64) * 4
        here = split < number
        parts = tl.maximum(number, 1)  # none where there is no pair
        first = total.to(tl.int64) * split // parts
        kind = tl.where(whole, 1, 0) + (2 if split == 0 else 0) + tl.where(split == number - 1, 4, 0)
        tl.store(entry, pair, mask=here)
        tl.store(entry + 1, begin + first, mask=here)
        tl.store(entry + 2, total.to(tl.int64) * (split + 1) // parts - first, mask=here)
        tl.store(entry + 3, kind, mask=here)


@triton.jit
def _parts(total, share, most, there):
    """Splits of each list into parts of about `share` tokens."""
    return tl.where(there, tl.minimum(tl.maximum(tl.cdiv(total, share), 1), most), 0)


@triton.jit
def _attend(
    q, k_ptr, v_ptr, slots, ok, seen, head_offset, stride_slot, dims, scale, peak, norm, acc
):  # fmt: skip
    """One online-softmax step over a block of slots; `seen` [ROWS, BLOCK] masks."""
    kv_offs = slots.to(tl.int64) * stride_slot + head_offset
    k = tl.load(k_ptr + kv_offs[:, None] + dims[None, :], mask=ok[:, None], other=0.0)  # [BLOCK, D]
    v = tl.load(v_ptr + kv_offs[:, None] + dims[None, :], mask=ok[:, None], other=0.0)
    s = tl.where(seen, tl.dot(q, tl.trans(k), input_precision="ieee") * scale, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(s, 1))
    # A row that has seen nothing yet has no maximum: keep the exponents finite, its sum stays 0.
    safe = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    fade = tl.exp2(peak - safe)
    p = tl.exp2(s - safe[:, None])
    acc = acc * fade[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
    return new_peak, norm * fade + tl.sum(p, 1), acc


@triton.jit
def _verify_kernel(
    q_ptr,  # [bs, T, H_q, D], tokens `stride_q` apart
    k_ptr,  # [slots, H_kv, D]
    v_ptr,
    partial_ptr,  # float32 [work, ROWS, D]
    stats_ptr,  # float32 [work, ROWS, 2]: maximum in log2, sum
    work_ptr,  # int64 [work, 4], see Plan
    ends_ptr,  # [pairs + 1]
    indices_ptr,
    count_ptr,  # [bs, channels], -1: the whole context
    head_channels_ptr,
    table_ptr,  # req_to_token
    reqs_ptr,
    lens_ptr,
    mask_ptr,  # [bs, T, TAIL]
    attended_ptr,  # int64 [2]: selected, available
    scale,
    channels,
    pairs,
    stride_q,
    stride_slot,
    stride_head,
    stride_table,
    stride_mask,
    T: tl.constexpr,
    H_Q: tl.constexpr,
    H_KV: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,  # T * group, padded to a power of two of at least 16
    BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
    TAIL_P2: tl.constexpr,  # padded to a power of two of at least 16
    EARLY: tl.constexpr,
):
    program = tl.program_id(0)
    GROUP: tl.constexpr = H_Q // H_KV
    # All at once, used or not: what to read is two latencies away from the slots.
    entry = work_ptr + program * 4
    pair, kind = tl.load(entry).to(tl.int32), tl.load(entry + 3)
    begin, total = tl.load(entry + 1), tl.load(entry + 2).to(tl.int32)
    if program >= tl.load(ends_ptr + pairs):
        return
    b, h = pair // H_KV, pair % H_KV
    length = tl.load(lens_ptr + b).to(tl.int32)
    req = tl.load(reqs_ptr + b).to(tl.int64)
    row_ptr = table_ptr + req * stride_table
    list_ptr = indices_ptr + begin
    if (kind & 1) != 0:
        list_ptr = row_ptr + begin

    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, D)
    row_token = rows // GROUP
    row_ok = rows < T * GROUP
    q_offs = (b * T + row_token) * stride_q + (h * GROUP + rows % GROUP) * D
    q = tl.load(q_ptr + q_offs[:, None] + dims[None, :], mask=row_ok[:, None], other=0.0)  # [ROWS, D]
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    norm = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, D], tl.float32)

    # Lists are parted by tokens, not by blocks: what is masked in a block is not read.
    for block in range(0, total, BLOCK):
        offs = block + tl.arange(0, BLOCK)
        ok = offs < total
        slots = tl.load(list_ptr + offs, mask=ok, other=0)
        peak, norm, acc = _attend(
            q,
            k_ptr,
            v_ptr,
            slots,
            ok,
            ok[None, :],
            h * stride_head,
            stride_slot,
            dims,
            scale,
            peak,
            norm,
            acc,
        )
    if (kind & 4) != 0:
        # The tail: the draft tokens themselves, each seeing what its row of the mask allows.
        cols = tl.arange(0, TAIL_P2)
        ok = cols < TAIL
        slots = tl.load(row_ptr + length + cols, mask=ok, other=0)
        seen = tl.load(
            mask_ptr + b * stride_mask + row_token[:, None] * TAIL + cols[None, :],
            mask=row_ok[:, None] & ok[None, :],
            other=0,
        )
        peak, norm, acc = _attend(
            q, k_ptr, v_ptr, slots, ok, seen != 0, h * stride_head, stride_slot, dims, scale, peak, norm, acc
        )
    if EARLY:
        gdc_launch_dependents()
    if ((kind & 2) != 0) & (req > 0):  # slot 0 is the padding of CUDA graphs
        count = tl.load(count_ptr + b * channels + tl.load(head_channels_ptr + h))
        tl.atomic_add(attended_ptr, tl.where(count < 0, length, count).to(tl.int64))
        tl.atomic_add(attended_ptr + 1, length.to(tl.int64))
    base = program.to(tl.int64) * ROWS
    tl.store(partial_ptr + (base + rows[:, None]) * D + dims[None, :], acc, mask=row_ok[:, None])
    tl.store(stats_ptr + (base + rows) * 2, peak)
    tl.store(stats_ptr + (base + rows) * 2 + 1, norm)


@triton.jit
def _verify_merge_kernel(
    partial_ptr,
    stats_ptr,
    ends_ptr,
    out_ptr,  # [bs, T, H_q, D]
    T: tl.constexpr,
    H_Q: tl.constexpr,
    H_KV: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    SPLITS_P2: tl.constexpr,
    EARLY: tl.constexpr,
):
    b, token, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    GROUP: tl.constexpr = H_Q // H_KV
    row = token * GROUP + head % GROUP
    # The plan was there before the splits began: only their results are waited for.
    end_ptr = ends_ptr + b * H_KV + head // GROUP
    first, end = tl.load(end_ptr), tl.load(end_ptr + 1)
    if EARLY:
        gdc_wait()
    # Every row sees itself in the tail, so one split at least has a finite maximum.
    _, _, out = _merge(partial_ptr, stats_ptr, first, row, end - first, D, ROWS, SPLITS_P2)
    dims = tl.arange(0, D)
    tl.store(out_ptr + ((b * T + token) * H_Q + head) * D + dims, out.to(out_ptr.dtype.element_ty))


@triton.jit
def _merge(
    partial_ptr,
    stats_ptr,
    first,
    row,
    splits,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    SPLITS_P2: tl.constexpr,
):
    """Maximum (log2), sum and output [D] of one row over its splits, the first of which is `first`."""
    split = tl.arange(0, SPLITS_P2)
    ok = split < splits
    base = (first + split) * ROWS + row  # [SPLITS_P2]
    peak = tl.load(stats_ptr + base * 2, mask=ok, other=float("-inf"))
    norm = tl.load(stats_ptr + base * 2 + 1, mask=ok, other=0.0)
    partial = tl.load(partial_ptr + base[:, None] * D + tl.arange(0, D)[None, :], mask=ok[:, None], other=0.0)
    top = tl.max(peak, 0)
    weight = tl.exp2(peak - top)
    total = tl.sum(norm * weight, 0)
    return top, total, tl.sum(partial * weight[:, None], 0) / total
