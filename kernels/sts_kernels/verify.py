"""Attention over lists of slots in Triton: a program attends to a part of one with all rows of a request.

Lists are parted among programs and merged as `sts_kernels.split_kv` says.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from sts_kernels import split_kv
from sts_kernels.checks import check_attention
from sts_kernels.layout import Contexts, KvPool, Lists, Plan
from sts_kernels.split_kv import (
    FIRST_PART,
    LAST_PART,
    LOG2E,
    OF_CONTEXT,
    SplitKnobs,
    attend,
    in_tile,
    meet_keys,
    merge,
    padded,
    plan_lists,
    read,
    splits,
    starts_early,
    store_head,
)


@dataclass(frozen=True)
class VerifyKnobs(SplitKnobs):
    """block: slots that a program reads at a time. merge_warps: of a program that merges the parts of a row.
    The rest: see SplitKnobs."""

    programs: int = 396
    block: int = 32
    merge_warps: int = 4


KNOBS = VerifyKnobs()


def shared_bytes(rows: int, head_dim: int) -> int:
    """Bytes of shared memory that a thread block takes for the `rows` query rows of a (request, KV head); by
    kernels that Triton 3.6 compiled, which holds three blocks of keys for more than 32 rows, else two."""
    if padded(rows) > 32:
        return split_kv.shared_bytes(rows, head_dim, per_dim=384, per_row=32)
    return split_kv.shared_bytes(rows, head_dim, per_dim=256, per_row=64)


def plan_attention(
    lists: Lists, channels: torch.Tensor, lens: torch.Tensor, *, max_context: int
) -> Plan | None:
    """How the lists of several layers are parted for `sparse_attention`, in one launch for a round.

    channels: int32 [layers, H_kv]. lens: int [bs]. max_context: width of the table of slots. Never None.
    """
    programs, most = splits(lens.numel() * channels.shape[1], max_context, KNOBS)
    return plan_lists(lists, channels, lens, programs=programs, most=most)


def sparse_attention(
    q: torch.Tensor,
    pool: KvPool,
    lists: Lists,
    channels: torch.Tensor,
    contexts: Contexts,
    tail_mask: torch.Tensor,
    attended: torch.Tensor,
    *,
    scale: float,
    plan: Plan | None = None,
) -> torch.Tensor:
    """Kernel of `sts_kernels.torch_ops.sparse_attention` (see there); graph-safe, no host sync.

    All T * G query rows of a (request, KV head) share one read of the selected KV. Without a plan, which
    one launch of `plan_attention` makes for all layers of a round, the layer makes its own.
    """
    check_attention(q, pool, lists, channels, tail_mask)
    bs, tokens, q_heads, dim = q.shape
    kv_heads, tail, width = pool.k.shape[1], tail_mask.shape[2], contexts.table.shape[1]
    rows = padded(tokens * (q_heads // kv_heads))
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if bs == 0:
        return out
    if plan is None:
        plan = plan_attention(lists, channels[None], contexts.lens, max_context=width).of(0)
    number = plan.work.shape[0]
    partial = torch.empty(number, rows, dim, dtype=torch.float32, device=q.device)
    stats = torch.empty(number, rows, 2, dtype=torch.float32, device=q.device)
    early = starts_early(q.device) if KNOBS.early else {}
    shape = {"T": tokens, "H_Q": q_heads, "H_KV": kv_heads, "D": dim, "ROWS": rows, "EARLY": bool(early)}
    shape["D_P2"] = padded(dim)
    _verify_kernel[(number,)](
        q,
        pool.k,
        pool.v,
        partial,
        stats,
        plan.work,
        plan.ends,
        lists.indices,
        lists.counts,
        channels,
        contexts.table,
        contexts.reqs,
        contexts.lens,
        tail_mask,
        attended,
        scale * pool.k_scale * LOG2E,
        lists.counts.shape[1],
        bs * kv_heads,
        q.stride(1 if tokens > 1 else 0),  # that of a dimension of one says nothing
        pool.k.stride(0),
        pool.k.stride(1),
        contexts.table.stride(0),
        tail_mask.stride(0),
        TAIL=tail,
        BLOCK=KNOBS.block,
        num_warps=KNOBS.num_warps,
        num_stages=KNOBS.num_stages,
        **shape,
    )
    _verify_merge_kernel[(bs, tokens, q_heads)](
        partial,
        stats,
        plan.ends,
        out,
        pool.v_scale,
        SPLITS_P2=triton.next_power_of_2(plan.most),
        num_warps=KNOBS.merge_warps,
        **shape,
        **early,
    )
    return out


@triton.jit
def _verify_kernel(
    q_ptr,  # [bs, T, H_q, D], tokens `stride_q` apart
    k_ptr,  # [slots, H_kv, D]
    v_ptr,  # [slots, H_kv, D]
    partial_ptr,  # float32 [work, ROWS, D]
    stats_ptr,  # float32 [work, ROWS, 2]: maximum in log2, sum
    work_ptr,  # int64 [work, 4], see Plan
    ends_ptr,  # int32 [pairs + 1]
    indices_ptr,  # int32 [entries]
    count_ptr,  # int32 [bs, channels], below 0: WHOLE
    channels_ptr,  # int [H_kv]
    table_ptr,  # int32 [requests, width]
    reqs_ptr,  # int [bs]
    lens_ptr,  # int [bs]
    mask_ptr,  # bool [bs, T, TAIL], requests `stride_mask` apart
    attended_ptr,  # int64 [2]: selected, available
    scale,  # of logits, LOG2E and that of the keys included
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
    D_P2: tl.constexpr,  # padded to a power of two
    ROWS: tl.constexpr,  # T * group, padded to a power of two of at least 16
    BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
    EARLY: tl.constexpr,
):
    program = tl.program_id(0)
    GROUP: tl.constexpr = H_Q // H_KV
    # Loads are issued together, before it is known whether they are needed: one after the other, each would
    # wait for memory.
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
    if (kind & OF_CONTEXT) != 0:
        list_ptr = row_ptr + begin

    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, D_P2)
    row_token = rows // GROUP
    row_ok = rows < T * GROUP
    q_offs = (b * T + row_token) * stride_q + (h * GROUP + rows % GROUP) * D
    q = tl.load(
        q_ptr + q_offs[:, None] + dims[None, :], mask=in_tile(row_ok, dims, D), other=0.0
    )  # [ROWS, D]
    q, scale = meet_keys(q, scale, k_ptr)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    norm = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, D_P2], tl.float32)

    # The tail ends the last part's list, so that it is on its way with the blocks before it. Lists are parted
    # by tokens, not by whole blocks, since what a block masks costs no read.
    tail = tl.where((kind & LAST_PART) != 0, TAIL, 0)
    for block in range(0, total + tail, BLOCK):
        offs = block + tl.arange(0, BLOCK)
        col = offs - total  # of the tail
        listed, in_tail = col < 0, (col >= 0) & (col < tail)
        slot_ptr = tl.where(listed, list_ptr + offs, row_ptr + length + col)
        slots = tl.load(slot_ptr, mask=listed | in_tail, other=0)  # [BLOCK]
        seen = tl.broadcast_to(listed[None, :], [ROWS, BLOCK])
        if block + BLOCK > total:  # a row attends to what its row of the mask allows
            mask_offs = b * stride_mask + row_token[:, None] * TAIL + col[None, :]
            allowed = tl.load(mask_ptr + mask_offs, mask=row_ok[:, None] & in_tail[None, :], other=0)
            seen = seen | (allowed != 0)
        k, v = read(k_ptr, v_ptr, slots, listed | in_tail, h * stride_head, stride_slot, dims, D)
        peak, norm, acc = attend(q, k, v, seen, scale, peak, norm, acc)
    if EARLY:
        gdc_launch_dependents()
    if ((kind & FIRST_PART) != 0) & (req > 0):  # row 0 pads the batches of CUDA graphs
        count = tl.load(count_ptr + b * channels + tl.load(channels_ptr + h))
        tl.atomic_add(attended_ptr, tl.where(count < 0, length, count).to(tl.int64))
        tl.atomic_add(attended_ptr + 1, length.to(tl.int64))
    base = program.to(tl.int64) * ROWS
    tl.store(partial_ptr + (base + rows[:, None]) * D + dims[None, :], acc, mask=in_tile(row_ok, dims, D))
    tl.store(stats_ptr + (base + rows) * 2, peak)
    tl.store(stats_ptr + (base + rows) * 2 + 1, norm)


@triton.jit
def _verify_merge_kernel(
    partial_ptr,  # float32 [work, ROWS, D]
    stats_ptr,  # float32 [work, ROWS, 2]
    ends_ptr,  # int32 [pairs + 1]
    out_ptr,  # [bs, T, H_q, D]
    v_scale,  # of the values
    T: tl.constexpr,
    H_Q: tl.constexpr,
    H_KV: tl.constexpr,
    D: tl.constexpr,
    D_P2: tl.constexpr,  # padded to a power of two
    ROWS: tl.constexpr,
    SPLITS_P2: tl.constexpr,
    EARLY: tl.constexpr,
):
    b, token, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    GROUP: tl.constexpr = H_Q // H_KV
    row = token * GROUP + head % GROUP
    # Read before the wait, which is for the parts' results: the plan was there before they began.
    end_ptr = ends_ptr + b * H_KV + head // GROUP
    first, end = tl.load(end_ptr), tl.load(end_ptr + 1)
    if EARLY:
        gdc_wait()
    # Every row sees itself in the tail, so one part at least has a finite maximum.
    dims = tl.arange(0, D_P2)
    _, _, out = merge(partial_ptr, stats_ptr, first, row, end - first, v_scale, dims, D, ROWS, SPLITS_P2)
    store_head(out_ptr + ((b * T + token) * H_Q + head) * D, out, dims, D)
