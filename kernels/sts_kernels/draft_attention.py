"""Draft attention in Triton that leaves the importance of its rows behind, in one read of the keys.

Three launches: a split-KV pass that also stores exp2(logit - running maximum) of the rows, a merge that
yields outputs and log-sum-exps, and a pooling pass that turns the stored values into probabilities.
Storing normalised values needs the log-sum-exp, which is known only after the last split.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sts_kernels.checks import IMPORTANCE_SCALE, check_draft, expect
from sts_kernels.reference import SHIFT, Members
from sts_kernels.verify import LOG2E, _attend, _splits

BLOCK = 64
# exp2(logit - running maximum) is at most 1: scaled to the top of float16, its relative precision is
# 2**-11 down to 2e-9 of the maximum.
STORED_SCALE = tl.constexpr(2.0**15)


def draft_attention(
    q: torch.Tensor | None,
    carried_q: torch.Tensor | None,
    carried_len: torch.Tensor,
    k_buffer: torch.Tensor,
    v_buffer: torch.Tensor,
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    seq_lens: torch.Tensor,
    ctx_start: torch.Tensor,
    step: int,
    num_steps: int,
    sm_scale: float,
    members: Members,
    importance: torch.Tensor,
    total_rows: int,
    pool_heads: str = "max",
    pool_rows: str = "max",
) -> torch.Tensor | None:
    """Kernel of `sts_kernels.reference.draft_attention` (see there); graph-safe, no host sync.

    `ctx_start` must be multiples of 64: a block of keys never shares columns with another request.
    """
    check_draft(q, carried_q, k_buffer, v_buffer, members, importance, pool_heads, pool_rows)
    expect(
        "draft_attention", importance.dtype == torch.float16, f"importance is {importance.dtype}, not float16"
    )
    bs, kv_heads, dim = seq_lens.numel(), k_buffer.shape[1], k_buffer.shape[2]
    q_heads = (carried_q if q is None else q).shape[1]
    out = None if q is None else torch.empty_like(q)
    if bs == 0:
        return out
    branches = 0 if q is None else q.shape[0] // bs
    queries = branches + (carried_q is not None)
    group, columns = q_heads // kv_heads, importance.shape[1]
    rows = max(16, triton.next_power_of_2(queries * group))
    splits = _splits(bs * kv_heads, req_to_token.shape[1])
    new = {"device": k_buffer.device}
    partial = torch.empty(bs, kv_heads, splits, rows, dim, dtype=torch.float32, **new)
    stats = torch.empty(bs, kv_heads, splits, rows, 2, dtype=torch.float32, **new)
    lse = torch.empty(bs, kv_heads, rows, dtype=torch.float32, **new)
    capture = members.channels.numel() > 0
    stored = torch.empty(kv_heads, rows, columns if capture else 1, dtype=torch.float16, **new)
    peaks = torch.empty(kv_heads, rows, triton.cdiv(columns, BLOCK), dtype=torch.float32, **new)
    shape = {"W": branches, "CARRIED": carried_q is not None, "H_Q": q_heads, "H_KV": kv_heads, "D": dim}
    shape |= {"ROWS": rows, "SPLITS": splits}
    some = carried_q if q is None else q
    _split_kernel[(bs, kv_heads, splits)](
        some if q is None else q,
        some if carried_q is None else carried_q,
        carried_len,
        k_buffer,
        v_buffer,
        partial,
        stats,
        stored,
        peaks,
        req_to_token,
        req_pool_indices,
        seq_lens,
        ctx_start,
        sm_scale * LOG2E,
        step,
        num_steps,
        k_buffer.stride(0),
        k_buffer.stride(1),
        req_to_token.stride(0),
        columns,
        peaks.shape[2],
        SCRATCH=max(16, triton.next_power_of_2(branches * (step + 1))),
        BLOCK=BLOCK,
        CAPTURE=capture,
        num_warps=4,
        num_stages=3,
        **shape,
    )
    _merge_kernel[(bs, kv_heads, rows)](partial, stats, lse, some if out is None else out, **shape)
    if not capture:
        return out
    _pool_kernel[(bs, members.channels.numel(), splits)](
        stored,
        peaks,
        lse,
        members.channels,
        members.heads,
        members.scale,
        members.fresh,
        importance,
        seq_lens,
        ctx_start,
        columns,
        peaks.shape[2],
        importance.stride(0),
        IMPORTANCE_SCALE / (total_rows if pool_rows == "mean" else 1),
        QUERIES=queries,
        QUERIES_P2=triton.next_power_of_2(queries),
        HEADS_P2=triton.next_power_of_2(members.heads.shape[1]),
        HEADS=members.heads.shape[1],
        MEAN_HEADS=pool_heads == "mean",
        MEAN_ROWS=pool_rows == "mean",
        FIRST=carried_q is not None,
        SHIFT=SHIFT,
        H_Q=q_heads,
        H_KV=kv_heads,
        ROWS=rows,
        SPLITS=splits,
        BLOCK=BLOCK,
        num_warps=4,
    )
    return out


@triton.jit
def _split_kernel(
    q_ptr,  # [bs * W, H_q, D]
    carried_ptr,  # [requests, H_q, D]
    carried_len_ptr,
    k_ptr,
    v_ptr,
    partial_ptr,  # float32 [bs, H_kv, SPLITS, ROWS, D]
    stats_ptr,  # float32 [bs, H_kv, SPLITS, ROWS, 2]
    stored_ptr,  # float16 [H_kv, ROWS, columns]
    peaks_ptr,  # float32 [H_kv, ROWS, columns / BLOCK]
    table_ptr,
    reqs_ptr,
    lens_ptr,
    ctx_start_ptr,
    scale,
    step,
    num_steps,
    stride_slot,
    stride_head,
    stride_table,
    columns,
    blocks,
    W: tl.constexpr,
    CARRIED: tl.constexpr,
    H_Q: tl.constexpr,
    H_KV: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,  # (carried + W) * group, padded: the carried row's heads come first
    SCRATCH: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    CAPTURE: tl.constexpr,
):
    b, h, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    GROUP: tl.constexpr = H_Q // H_KV
    req = tl.load(reqs_ptr + b).to(tl.int64)
    length = tl.load(lens_ptr + b).to(tl.int32)
    row_ptr = table_ptr + req * stride_table
    column = tl.load(ctx_start_ptr + b)

    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, D)
    query, head = rows // GROUP, h * GROUP + rows % GROUP
    if CARRIED:
        branch = query - 1
        is_carried = (query == 0) & (tl.load(carried_len_ptr + req).to(tl.int32) == length)
        q = tl.load(
            carried_ptr + (req * H_Q + head[:, None]) * D + dims[None, :], mask=is_carried[:, None], other=0.0
        )
    else:
        branch = query
        is_carried = query < 0
        q = tl.zeros([ROWS, D], q_ptr.dtype.element_ty)
    in_step = (branch >= 0) & (branch < W)
    if W > 0:
        own = tl.load(
            q_ptr + ((b * W + branch[:, None]) * H_Q + head[:, None]) * D + dims[None, :],
            mask=in_step[:, None],
            other=0.0,
        )
        q = tl.where(in_step[:, None], own, q)
    live = is_carried | in_step

    peak = tl.full([ROWS], float("-inf"), tl.float32)
    norm = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, D], tl.float32)
    per_split = tl.cdiv(tl.cdiv(length, BLOCK), SPLITS) * BLOCK
    first = split * per_split
    last = tl.minimum(first + per_split, length)
    for block in range(first, last, BLOCK):
        offs = block + tl.arange(0, BLOCK)
        ok = offs < last
        slots = tl.load(row_ptr + offs, mask=ok, other=0)
        kv_offs = slots.to(tl.int64) * stride_slot + h * stride_head
        k = tl.load(k_ptr + kv_offs[:, None] + dims[None, :], mask=ok[:, None], other=0.0)  # [BLOCK, D]
        s = tl.where(ok[None, :], tl.dot(q, tl.trans(k), input_precision="ieee") * scale, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(s, 1))
        fade = tl.exp2(peak - new_peak)
        p = tl.exp2(s - new_peak[:, None])
        if CAPTURE:
            stored_offs = (h * ROWS + rows[:, None]).to(tl.int64) * columns + column + offs[None, :]
            stored = tl.where(live[:, None], p * STORED_SCALE, 0.0)
            tl.store(stored_ptr + stored_offs, stored.to(tl.float16), mask=ok[None, :] & (column >= 0))
            peak_offs = (h * ROWS + rows).to(tl.int64) * blocks + (column + block) // BLOCK
            tl.store(peaks_ptr + peak_offs, new_peak, mask=(rows >= 0) & (column >= 0))
        if W > 0:
            v = tl.load(v_ptr + kv_offs[:, None] + dims[None, :], mask=ok[:, None], other=0.0)
            acc = acc * fade[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        norm = norm * fade + tl.sum(p, 1)
        peak = new_peak
    if (W > 0) & (split == SPLITS - 1):
        # Scratch: what ran in a row's own branch, itself included. The carried row ends at L.
        cols = tl.arange(0, SCRATCH)
        ok = cols < W * (step + 1)
        owner = cols // (step + 1)
        slots = tl.load(row_ptr + length + owner * num_steps + cols % (step + 1), mask=ok, other=0)
        seen = ok[None, :] & in_step[:, None] & (owner[None, :] == branch[:, None])
        peak, norm, acc = _attend(
            q, k_ptr, v_ptr, slots, ok, seen, h * stride_head, stride_slot, dims, scale, peak, norm, acc
        )
    base = ((b * H_KV + h) * SPLITS + split) * ROWS
    tl.store(partial_ptr + (base + rows[:, None]) * D + dims[None, :], acc)
    tl.store(stats_ptr + (base + rows) * 2, peak)
    tl.store(stats_ptr + (base + rows) * 2 + 1, norm)


@triton.jit
def _merge_kernel(
    partial_ptr,
    stats_ptr,
    lse_ptr,  # float32 [bs, H_kv, ROWS], log2
    out_ptr,
    W: tl.constexpr,
    CARRIED: tl.constexpr,
    H_Q: tl.constexpr,
    H_KV: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    b, h, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    GROUP: tl.constexpr = H_Q // H_KV
    branch = row // GROUP - CARRIED
    if branch < W:
        base = ((b * H_KV + h) * SPLITS + tl.arange(0, SPLITS)) * ROWS + row  # [SPLITS]
        peak = tl.load(stats_ptr + base * 2)
        top = tl.max(peak, 0)
        weight = tl.exp2(peak - top)
        norm = tl.sum(tl.load(stats_ptr + base * 2 + 1) * weight, 0)
        tl.store(lse_ptr + (b * H_KV + h) * ROWS + row, top + tl.log2(norm))
        if branch >= 0:
            dims = tl.arange(0, D)
            partial = tl.load(partial_ptr + base[:, None] * D + dims[None, :])
            out = tl.sum(partial * weight[:, None], 0) / norm
            head = h * GROUP + row % GROUP
            tl.store(out_ptr + ((b * W + branch) * H_Q + head) * D + dims, out.to(out_ptr.dtype.element_ty))


@triton.jit
def _pool_kernel(
    stored_ptr,
    peaks_ptr,
    lse_ptr,
    channels_ptr,  # [n]
    heads_ptr,  # [n, HEADS]
    scale_ptr,
    fresh_ptr,
    importance_ptr,  # float16 [channels, columns]
    lens_ptr,
    ctx_start_ptr,
    columns,
    blocks,
    stride_channel,
    factor,
    QUERIES: tl.constexpr,
    QUERIES_P2: tl.constexpr,
    HEADS_P2: tl.constexpr,
    HEADS: tl.constexpr,
    MEAN_HEADS: tl.constexpr,
    MEAN_ROWS: tl.constexpr,
    FIRST: tl.constexpr,
    SHIFT: tl.constexpr,
    H_Q: tl.constexpr,
    H_KV: tl.constexpr,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b, member, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    GROUP: tl.constexpr = H_Q // H_KV
    length = tl.load(lens_ptr + b).to(tl.int32)
    column = tl.load(ctx_start_ptr + b)
    if column < 0:
        return
    place = tl.arange(0, HEADS_P2)
    head = tl.load(heads_ptr + member * HEADS + place, mask=place < HEADS, other=-1)
    speaks = head >= 0
    head = tl.maximum(head, 0)
    query = tl.arange(0, QUERIES_P2)
    row = query[:, None] * GROUP + (head % GROUP)[None, :]  # [QUERIES, HEADS]
    kv = (head // GROUP)[None, :]
    live = (query < QUERIES)[:, None] & speaks[None, :]
    lse = tl.load(lse_ptr + (b * H_KV + kv) * ROWS + row, mask=live, other=0.0)
    line = (kv * ROWS + row).to(tl.int64)
    head_scale = tl.load(scale_ptr + member)
    write_ptr = importance_ptr + tl.load(channels_ptr + member).to(tl.int64) * stride_channel + column + SHIFT
    overwrite = FIRST & (tl.load(fresh_ptr + member) != 0)

    per_split = tl.cdiv(tl.cdiv(length, BLOCK), SPLITS) * BLOCK
    first = split * per_split
    for block in range(first, tl.minimum(first + per_split, length), BLOCK):
        offs = block + tl.arange(0, BLOCK)
        ok = offs < length - SHIFT  # the last draft key is the bonus token's: the tail, not the context
        peak = tl.load(peaks_ptr + line * blocks + (column + block) // BLOCK, mask=live, other=0.0)
        values = tl.load(
            stored_ptr + line[:, :, None] * columns + column + offs[None, None, :],
            mask=live[:, :, None] & ok[None, None, :],
            other=0.0,
        ).to(tl.float32)
        p = values * (tl.exp2(peak - lse) / STORED_SCALE)[:, :, None]  # [QUERIES, HEADS, BLOCK]
        if MEAN_HEADS:
            p = tl.sum(p, 1) * head_scale
        else:
            p = tl.max(p, 1)
        if MEAN_ROWS:
            p = tl.sum(p, 0)
        else:
            p = tl.max(p, 0)
        p = p * factor
        old = tl.load(write_ptr + offs, mask=ok & (overwrite == 0), other=0.0).to(tl.float32)
        if MEAN_ROWS:
            p = old + p
        else:
            p = tl.maximum(old, p)
        tl.store(write_ptr + offs, p.to(tl.float16), mask=ok)
