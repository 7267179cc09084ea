"""Sparse verify attention in Triton: split-KV over per-head slot lists, all rows of a request in a tile."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from sts_kernels.checks import check_verify

LOG2E = 1.4426950408889634
# What the benches tune. `programs` over (request, KV head) pairs gives the splits, each of at least
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
) -> torch.Tensor:
    """Kernel of `sts_kernels.reference.sparse_verify_attention` (see there); graph-safe, no host sync.

    All T * G query rows of a (request, KV head) share one read of the selected KV.
    """
    check_verify(q, k_buffer, v_buffer, kv_start, kv_count, head_channels, tail_mask)
    bs, tokens, q_heads, dim = q.shape
    kv_heads = k_buffer.shape[1]
    rows = max(16, triton.next_power_of_2(tokens * (q_heads // kv_heads)))
    splits, most = _splits(KNOBS, bs * kv_heads, req_to_token.shape[1])
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if bs == 0:
        return out
    partial = torch.empty(bs, kv_heads, most, rows, dim, dtype=torch.float32, device=q.device)
    stats = torch.empty(bs, kv_heads, most, rows, 2, dtype=torch.float32, device=q.device)
    number = torch.empty(bs, kv_heads, dtype=torch.int32, device=q.device)
    shape = {"T": tokens, "H_Q": q_heads, "H_KV": kv_heads, "D": dim, "ROWS": rows}
    early = starts_early(q.device) if KNOBS["early"] else {}
    _split_kernel[(bs, kv_heads, most)](
        q,
        k_buffer,
        v_buffer,
        partial,
        stats,
        number,
        kv_indices,
        kv_start,
        kv_count,
        head_channels,
        req_to_token,
        req_pool_indices,
        seq_lens,
        tail_mask,
        attended,
        sm_scale * LOG2E,
        kv_count.shape[1],
        q.stride(1),
        k_buffer.stride(0),
        k_buffer.stride(1),
        req_to_token.stride(0),
        bs,
        splits,
        most,
        PAIRS_P2=triton.next_power_of_2(bs * kv_heads),
        TAIL=max(16, triton.next_power_of_2(tokens)),
        BLOCK=KNOBS["BLOCK"],
        EARLY=bool(early),
        num_warps=KNOBS["num_warps"],
        num_stages=KNOBS["num_stages"],
        **shape,
    )
    splits_p2 = triton.next_power_of_2(most)
    _merge_kernel[(bs, tokens, q_heads)](
        partial, stats, number, out, most, SPLITS_P2=splits_p2, EARLY=bool(early), **shape, **early
    )
    return out


def _splits(knobs: dict[str, int], pairs: int, max_context: int) -> tuple[int, int]:
    """KV splits of a (request, KV head) of mean length, and of the longest; a merge holds 64 in registers."""
    most = max(1, min(max_context // knobs["least"], 64))
    splits = max(1, min(knobs["programs"] // max(1, pairs), most))
    return splits, min(splits * knobs["uneven"], most)


@functools.cache
def starts_early(device: torch.device) -> dict[str, bool]:
    """Launch options of a kernel that may start while the one before it ends (from sm_90), and waits in
    it for that one's results: its launch then costs nothing. Triton's interpreter knows no such option."""
    if device.type == "cpu" or (device.type == "cuda" and torch.cuda.get_device_capability(device) < (9, 0)):
        return {}
    return {"launch_pdl": True}


@triton.jit
def _number(total, tokens, programs, most):
    """Splits of `total` of a batch's `tokens`, so that every program gets about as many as any other."""
    share = tl.maximum(tl.cdiv(tokens, programs), 1)
    return tl.minimum(tl.maximum(tl.cdiv(total, share), 1), most)


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
def _split_kernel(
    q_ptr,  # [bs, T, H_q, D], tokens `stride_q` apart
    k_ptr,  # [slots, H_kv, D]
    v_ptr,
    partial_ptr,  # float32 [bs, H_kv, most, ROWS, D]
    stats_ptr,  # float32 [bs, H_kv, most, ROWS, 2]: maximum in log2, sum
    number_ptr,  # [bs, H_kv], splits that a list is read in
    indices_ptr,
    start_ptr,  # [bs, channels]
    count_ptr,  # [bs, channels], -1: the whole context
    head_channels_ptr,
    table_ptr,  # req_to_token
    reqs_ptr,
    lens_ptr,
    mask_ptr,  # [bs, T, T]
    attended_ptr,  # int64 [2]: selected, available
    scale,
    channels,
    stride_q,
    stride_slot,
    stride_head,
    stride_table,
    bs,
    splits,  # of a list of mean length
    most,
    PAIRS_P2: tl.constexpr,  # bs * H_kv padded
    T: tl.constexpr,
    H_Q: tl.constexpr,
    H_KV: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,  # T * group, padded to a power of two of at least 16
    BLOCK: tl.constexpr,
    TAIL: tl.constexpr,  # T padded to a power of two of at least 16
    EARLY: tl.constexpr,
):
    b, h, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    GROUP: tl.constexpr = H_Q // H_KV
    channel = tl.load(head_channels_ptr + h)
    length = tl.load(lens_ptr + b).to(tl.int32)
    count = tl.load(count_ptr + b * channels + channel)
    req = tl.load(reqs_ptr + b).to(tl.int64)
    row_ptr = table_ptr + req * stride_table
    # Loaded beside the count, used or not: one latency less before the first block.
    list_ptr = indices_ptr + tl.load(start_ptr + b * channels + channel)
    total = count
    if count < 0:
        total = length
        list_ptr = row_ptr
    pair = tl.arange(0, PAIRS_P2)
    there = pair < bs * H_KV
    its_channel = tl.load(head_channels_ptr + pair % H_KV, mask=there, other=0)
    counts = tl.load(count_ptr + pair // H_KV * channels + its_channel, mask=there, other=0)
    lengths = tl.load(lens_ptr + pair // H_KV, mask=there, other=0).to(tl.int32)
    tokens = tl.sum(tl.where(counts < 0, lengths, counts), 0)
    number = _number(total, tokens, bs * H_KV * splits, most)
    if split >= number:
        return
    if split == 0:
        tl.store(number_ptr + b * H_KV + h, number)
    if (split == 0) & (req > 0):  # slot 0 is the padding of CUDA graphs
        tl.atomic_add(attended_ptr, total.to(tl.int64))
        tl.atomic_add(attended_ptr + 1, length.to(tl.int64))

    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, D)
    row_token = rows // GROUP
    row_ok = rows < T * GROUP
    q_offs = (b * T + row_token) * stride_q + (h * GROUP + rows % GROUP) * D
    q = tl.load(q_ptr + q_offs[:, None] + dims[None, :], mask=row_ok[:, None], other=0.0)  # [ROWS, D]
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    norm = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, D], tl.float32)

    # Equal numbers of tokens, not of blocks: what is masked in a block is not read.
    first = total * split // number
    last = total * (split + 1) // number
    for block in range(first, last, BLOCK):
        offs = block + tl.arange(0, BLOCK)
        ok = offs < last
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
    if split == number - 1:
        # The tail: the draft tokens themselves, each seeing what its row of the mask allows.
        cols = tl.arange(0, TAIL)
        ok = cols < T
        slots = tl.load(row_ptr + length + cols, mask=ok, other=0)
        seen = tl.load(
            mask_ptr + (b * T + row_token[:, None]) * T + cols[None, :],
            mask=row_ok[:, None] & ok[None, :],
            other=0,
        )
        peak, norm, acc = _attend(
            q, k_ptr, v_ptr, slots, ok, seen != 0, h * stride_head, stride_slot, dims, scale, peak, norm, acc
        )
    if EARLY:
        gdc_launch_dependents()
    base = ((b * H_KV + h) * most + split) * ROWS
    tl.store(partial_ptr + (base + rows[:, None]) * D + dims[None, :], acc, mask=row_ok[:, None])
    tl.store(stats_ptr + (base + rows) * 2, peak)
    tl.store(stats_ptr + (base + rows) * 2 + 1, norm)


@triton.jit
def _merge_kernel(
    partial_ptr,
    stats_ptr,
    number_ptr,
    out_ptr,  # [bs, T, H_q, D]
    most,
    T: tl.constexpr,
    H_Q: tl.constexpr,
    H_KV: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    SPLITS_P2: tl.constexpr,
    EARLY: tl.constexpr,
):
    if EARLY:
        gdc_wait()
    b, token, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    GROUP: tl.constexpr = H_Q // H_KV
    row = token * GROUP + head % GROUP
    kv_head = b * H_KV + head // GROUP
    number = tl.load(number_ptr + kv_head)
    # Every row sees itself in the tail, so one split at least has a finite maximum.
    _, _, out = _merge(partial_ptr, stats_ptr, kv_head * most, row, number, D, ROWS, SPLITS_P2)
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
