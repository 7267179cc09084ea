"""Draft attention in Triton that leaves the importance of its rows behind, in one read of the keys.

Three launches: a split-KV pass that also stores exp2(logit - running maximum) of the rows, a merge that
yields outputs and log-sum-exps, and a pooling pass that turns the stored values into probabilities.
Storing normalised values needs the log-sum-exp, which is known only after the last split.

All passes count by the target's positions: draft key p is the target's token p + SHIFT, and is stored
there. A block of positions then is aligned in every buffer, and its accesses are 16 bytes wide.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from sts_kernels.checks import IMPORTANCE_SCALE, check_draft, expect
from sts_kernels.reference import SHIFT, Members, Plan
from sts_kernels.verify import LOG2E, _attend, _merge, plan_verify, splits, starts_early

BLOCK = 64  # columns of a request start at multiples of it
# What the benches tune, as in verify.py; a pooling program takes `pool_blocks` blocks at a time, and
# `pool_programs` of them share the context of a (request, channel).
KNOBS = {
    "programs": 264,
    "least": 512,
    "num_warps": 4,
    "num_stages": 5,
    "early": True,
    "uneven": 4,
    "pool_blocks": 16,
    "pool_programs": 64,
    "pool_warps": 4,
    # What is stored is read once more, soon, and would else be driven out by keys and values.
    "stored_policy": "evict_last",
}
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
    plan: Plan | None = None,
) -> torch.Tensor | None:
    """Kernel of `sts_kernels.reference.draft_attention` (see there); graph-safe, no host sync.

    `ctx_start` must be multiples of 64, and so the number of columns: a block of positions never shares
    columns with another request. Without a plan, which one launch of `plan_contexts` makes for all steps and
    layers of a round, the call makes its own.
    """
    check_draft(q, carried_q, k_buffer, v_buffer, members, importance, pool_heads, pool_rows)
    expect(
        "draft_attention", importance.dtype == torch.float16, f"importance is {importance.dtype}, not float16"
    )
    columns = importance.shape[1]
    expect("draft_attention", columns % BLOCK == 0, f"{columns} columns are no multiple of {BLOCK}")
    bs, kv_heads, dim = seq_lens.numel(), k_buffer.shape[1], k_buffer.shape[2]
    q_heads = (carried_q if q is None else q).shape[1]
    out = None if q is None else torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if bs == 0:
        return out
    branches = 0 if q is None else q.shape[0] // bs
    queries = branches + (carried_q is not None)
    used = queries * (q_heads // kv_heads)
    rows = max(16, triton.next_power_of_2(used))
    _, most = splits(bs * kv_heads, req_to_token.shape[1], KNOBS)
    plan = plan or plan_contexts(seq_lens, kv_heads, req_to_token.shape[1])
    work = plan.work.shape[0]
    new = {"device": k_buffer.device}
    partial = torch.empty(kv_heads, work, rows, dim, dtype=torch.float32, **new)
    stats = torch.empty(kv_heads, work, rows, 2, dtype=torch.float32, **new)
    lse = torch.empty(bs, kv_heads, rows, dtype=torch.float32, **new)
    capture = members.channels.numel() > 0
    blocks = columns // BLOCK if capture else 0
    stored = torch.empty(kv_heads, blocks, used, BLOCK, dtype=torch.float16, **new)
    peaks = torch.empty(kv_heads, blocks, used, dtype=torch.float32, **new)
    shape = {"W": branches, "CARRIED": carried_q is not None, "H_Q": q_heads, "H_KV": kv_heads, "D": dim}
    early = starts_early(k_buffer.device) if KNOBS["early"] else {}
    shape |= {"ROWS": rows, "USED": used, "EARLY": bool(early)}
    some = carried_q if q is None else q
    _draft_kernel[(work, kv_heads)](
        some if q is None else q,
        some if carried_q is None else carried_q,
        carried_len,
        k_buffer,
        v_buffer,
        partial,
        stats,
        plan.work,
        plan.ends,
        stored,
        peaks,
        req_to_token,
        req_pool_indices,
        seq_lens,
        ctx_start,
        sm_scale * LOG2E,
        step,
        num_steps,
        some.stride(0),
        k_buffer.stride(0),
        k_buffer.stride(1),
        req_to_token.stride(0),
        blocks,
        bs,
        SCRATCH=max(16, triton.next_power_of_2(branches * (step + 1))),
        BLOCK=BLOCK,
        CAPTURE=capture,
        SHIFT=SHIFT,
        POLICY=KNOBS["stored_policy"],
        num_warps=KNOBS["num_warps"],
        num_stages=KNOBS["num_stages"],
        **shape,
    )
    splits_p2 = triton.next_power_of_2(most)
    _draft_merge_kernel[(bs, kv_heads, used)](
        partial,
        stats,
        plan.ends,
        lse,
        some if out is None else out,
        work,
        SPLITS_P2=splits_p2,
        **shape,
        **early,
    )
    if not capture:
        return out
    _pool_kernel[(bs, members.channels.numel(), KNOBS["pool_programs"])](
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
        blocks,
        importance.stride(0),
        IMPORTANCE_SCALE / (total_rows if pool_rows == "mean" else 1),
        QUERIES=queries,
        HEADS=members.heads.shape[1],
        MEAN_HEADS=pool_heads == "mean",
        MEAN_ROWS=pool_rows == "mean",
        FIRST=carried_q is not None,
        SHIFT=SHIFT,
        H_Q=q_heads,
        H_KV=kv_heads,
        ROWS=rows,
        USED=used,
        PROGRAMS=KNOBS["pool_programs"],
        BLOCKS=KNOBS["pool_blocks"],
        BLOCK=BLOCK,
        EARLY=bool(early),
        num_warps=KNOBS["pool_warps"],
        **early,
    )
    return out


def plan_contexts(seq_lens: torch.Tensor, kv_heads: int, max_context: int) -> Plan:
    """How the contexts of a batch are parted among programs, for every KV head alike; see plan_verify."""
    programs, most = splits(seq_lens.numel() * kv_heads, max_context, KNOBS)
    start = torch.zeros(seq_lens.numel(), 1, dtype=torch.int64, device=seq_lens.device)
    whole = torch.full_like(start, -1, dtype=torch.int32)
    head = torch.zeros(1, 1, dtype=torch.int32, device=seq_lens.device)
    return plan_verify(start, whole, head, seq_lens, programs // kv_heads, most).of(0)


@triton.jit
def _draft_kernel(
    q_ptr,  # [bs * W, H_q, D], rows `stride_q` apart
    carried_ptr,  # [requests, H_q, D]
    carried_len_ptr,
    k_ptr,
    v_ptr,
    partial_ptr,  # float32 [H_kv, work, ROWS, D]
    stats_ptr,  # float32 [H_kv, work, ROWS, 2]
    work_ptr,  # int64 [work, 4], see Plan
    ends_ptr,  # [bs + 1]
    stored_ptr,  # float16 [H_kv, blocks of columns, USED, BLOCK]
    peaks_ptr,  # float32 [H_kv, blocks of columns, USED]
    table_ptr,
    reqs_ptr,
    lens_ptr,
    ctx_start_ptr,
    scale,
    step,
    num_steps,
    stride_q,
    stride_slot,
    stride_head,
    stride_table,
    blocks,
    bs,
    W: tl.constexpr,
    CARRIED: tl.constexpr,
    H_Q: tl.constexpr,
    H_KV: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,  # USED padded: tiles of tl.dot have at least 16 rows
    USED: tl.constexpr,  # (carried + W) * group: the carried row's heads come first
    SCRATCH: tl.constexpr,
    BLOCK: tl.constexpr,
    CAPTURE: tl.constexpr,
    POLICY: tl.constexpr,
    SHIFT: tl.constexpr,
    EARLY: tl.constexpr,
):
    program, h = tl.program_id(0), tl.program_id(1)
    GROUP: tl.constexpr = H_Q // H_KV
    entry = work_ptr + program * 4
    b, kind = tl.load(entry).to(tl.int32), tl.load(entry + 3)
    begin, tokens = tl.load(entry + 1).to(tl.int32), tl.load(entry + 2).to(tl.int32)
    if program >= tl.load(ends_ptr + bs):
        return
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
            q_ptr + (b * W + branch[:, None]) * stride_q + head[:, None] * D + dims[None, :],
            mask=in_step[:, None],
            other=0.0,
        )
        q = tl.where(in_step[:, None], own, q)
    live = is_carried | in_step

    peak = tl.full([ROWS], float("-inf"), tl.float32)
    norm = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, D], tl.float32)
    # Positions [SHIFT, length + SHIFT), in whole blocks; each block holds a key.
    end = tl.where(length > 0, length + SHIFT, 0)
    first = tl.cdiv(begin, BLOCK) * BLOCK
    last = tl.where((kind & 4) != 0, end, tl.cdiv(begin + tokens, BLOCK) * BLOCK)
    place = h.to(tl.int64) * blocks + column // BLOCK  # this request's first block
    for block in range(first, last, BLOCK):
        offs = block + tl.arange(0, BLOCK)
        ok = (offs >= SHIFT) & (offs < end)
        slots = tl.load(row_ptr + offs - SHIFT, mask=ok, other=0)
        kv_offs = slots.to(tl.int64)[:, None] * stride_slot + h * stride_head + dims[None, :]
        k = tl.load(k_ptr + kv_offs, mask=ok[:, None], other=0.0)  # [BLOCK, D]
        s = tl.where(ok[None, :], tl.dot(q, tl.trans(k), input_precision="ieee") * scale, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(s, 1))
        fade = tl.exp2(peak - new_peak)
        p = tl.exp2(s - new_peak[:, None])
        if CAPTURE:
            # The bonus token's position, length, is the tail's, and its block may be another request's.
            line = (place + block // BLOCK) * USED
            mine = rows < tl.where((column >= 0) & (block < length), USED, 0)
            stored = tl.where(live[:, None], p * STORED_SCALE, 0.0).to(tl.float16)
            lanes = rows[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
            tl.store(stored_ptr + line * BLOCK + lanes, stored, mask=mine[:, None], eviction_policy=POLICY)
            tl.store(peaks_ptr + line + rows, new_peak, mask=mine)
        if W > 0:
            v = tl.load(v_ptr + kv_offs, mask=ok[:, None], other=0.0)
            acc = acc * fade[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        norm = norm * fade + tl.sum(p, 1)
        peak = new_peak
    if (W > 0) & ((kind & 4) != 0):
        # Scratch: what ran in a row's own branch, itself included. The carried row ends at L.
        cols = tl.arange(0, SCRATCH)
        ok = cols < W * (step + 1)
        owner = cols // (step + 1)
        slots = tl.load(row_ptr + length + owner * num_steps + cols % (step + 1), mask=ok, other=0)
        seen = ok[None, :] & in_step[:, None] & (owner[None, :] == branch[:, None])
        peak, norm, acc = _attend(
            q, k_ptr, v_ptr, slots, ok, seen, h * stride_head, stride_slot, dims, scale, peak, norm, acc
        )
    if EARLY:
        gdc_launch_dependents()
    base = (h * tl.num_programs(0) + program).to(tl.int64) * ROWS
    tl.store(partial_ptr + (base + rows[:, None]) * D + dims[None, :], acc, mask=(rows < USED)[:, None])
    tl.store(stats_ptr + (base + rows) * 2, peak)
    tl.store(stats_ptr + (base + rows) * 2 + 1, norm)


@triton.jit
def _draft_merge_kernel(
    partial_ptr,
    stats_ptr,
    ends_ptr,
    lse_ptr,  # float32 [bs, H_kv, ROWS], log2
    out_ptr,
    work,
    W: tl.constexpr,
    CARRIED: tl.constexpr,
    H_Q: tl.constexpr,
    H_KV: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    USED: tl.constexpr,
    SPLITS_P2: tl.constexpr,
    EARLY: tl.constexpr,
):
    b, h, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    GROUP: tl.constexpr = H_Q // H_KV
    branch = row // GROUP - CARRIED
    first = tl.load(ends_ptr + b)
    number = tl.load(ends_ptr + b + 1) - first
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    peak, norm, out = _merge(partial_ptr, stats_ptr, h * work + first, row, number, D, ROWS, SPLITS_P2)
    tl.store(lse_ptr + (b * H_KV + h) * ROWS + row, peak + tl.log2(norm))
    if (W > 0) & (branch >= 0):
        place = ((b * W + branch) * H_Q + h * GROUP + row % GROUP) * D + tl.arange(0, D)
        tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty))


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
    blocks,
    stride_channel,
    factor,
    QUERIES: tl.constexpr,
    HEADS: tl.constexpr,
    MEAN_HEADS: tl.constexpr,
    MEAN_ROWS: tl.constexpr,
    FIRST: tl.constexpr,
    SHIFT: tl.constexpr,
    H_Q: tl.constexpr,
    H_KV: tl.constexpr,
    ROWS: tl.constexpr,
    USED: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    b, member, program = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    GROUP: tl.constexpr = H_Q // H_KV
    length = tl.load(lens_ptr + b).to(tl.int32)
    column = tl.load(ctx_start_ptr + b)
    if EARLY:
        gdc_wait()
    if column < 0:
        return
    head_scale = tl.load(scale_ptr + member)
    first_block = column // BLOCK
    write_ptr = (
        importance_ptr + tl.load(channels_ptr + member).to(tl.int64) * stride_channel + first_block * BLOCK
    )
    overwrite = FIRST & (tl.load(fresh_ptr + member) != 0)

    lanes = tl.arange(0, BLOCK)
    total = tl.cdiv(length, BLOCK)
    for start in range(program * BLOCKS, total, PROGRAMS * BLOCKS):
        block = start + tl.arange(0, BLOCKS)
        here = block < total
        p = tl.zeros([BLOCKS, BLOCK], tl.float32)
        # Unrolled, so that all loads are on their way together, and nothing is reduced across threads.
        for query in tl.static_range(QUERIES):
            row_p = tl.zeros([BLOCKS, BLOCK], tl.float32)
            for i in tl.static_range(HEADS):
                head = tl.load(heads_ptr + member * HEADS + i)
                speaks = here & (head >= 0)
                kv, row = tl.maximum(head, 0) // GROUP, query * GROUP + tl.maximum(head, 0) % GROUP
                lse = tl.load(lse_ptr + (b * H_KV + kv) * ROWS + row)
                line = (kv.to(tl.int64) * blocks + first_block + block) * USED + row
                peak = tl.load(peaks_ptr + line, mask=speaks, other=float("-inf"))
                values = tl.load(
                    stored_ptr + line[:, None] * BLOCK + lanes[None, :],
                    mask=speaks[:, None],
                    other=0.0,
                    eviction_policy="evict_first",
                ).to(tl.float32)
                values *= (tl.exp2(peak - lse) / STORED_SCALE)[:, None]
                if MEAN_HEADS:
                    row_p += values * head_scale
                else:
                    row_p = tl.maximum(row_p, values)
            if MEAN_ROWS:
                p += row_p
            else:
                p = tl.maximum(p, row_p)
        p = p * factor
        # Whole blocks are written: positions before SHIFT and past the context with what they held. A mask
        # by position would split every access into single scores.
        offs = block[:, None] * BLOCK + lanes[None, :]
        edge = (block == 0) | ((block + 1) * BLOCK > length)
        old = tl.load(write_ptr + offs, mask=(here & (edge | (overwrite == 0)))[:, None], other=0.0)
        if MEAN_ROWS:
            new = tl.where(overwrite, 0.0, old.to(tl.float32)) + p
        else:
            new = tl.maximum(tl.where(overwrite, 0.0, old.to(tl.float32)), p)
        new = tl.where((offs >= SHIFT) & (offs < length), new.to(tl.float16), old)
        tl.store(write_ptr + offs, new, mask=here[:, None])
