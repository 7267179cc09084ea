"""Draft attention in Triton that leaves the importance of its rows behind, in one read of the keys.

Three launches: a pass over parts of the contexts that also stores exp2(logit - running maximum) of the rows,
a merge that yields outputs and log-sum-exps, and a pooling pass that turns what is stored into probabilities.
The first pass cannot store those: a log-sum-exp is known only after the last part.

All passes count by the target's positions: draft key p is the target's token p + SHIFT, and is stored
there. A block of positions then is aligned in every buffer, and its accesses are 16 bytes wide.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from sts_kernels import split_kv
from sts_kernels.checks import check_draft, expect, expect_half
from sts_kernels.layout import (
    ALIGN,
    IMPORTANCE_SCALE,
    SHIFT,
    Carried,
    Contexts,
    KvPool,
    Members,
    Plan,
    Pooling,
    Scores,
)
from sts_kernels.split_kv import (
    LAST_PART,
    LOG2E,
    SplitKnobs,
    attend,
    in_tile,
    meet_keys,
    merge,
    padded,
    plan_whole,
    read,
    starts_early,
    store_head,
)


@dataclass(frozen=True)
class DraftKnobs(SplitKnobs):
    """programs: three for each of Hopper's 132 multiprocessors, which have room for so many of five stages
    and heads of at most 128; two read keys alone too slowly. narrow: a key of at most so many bytes; what is
    done with a block of such keys takes as long as with large ones, so that more of them have to be under
    way, by `narrow_programs`.
    pool_blocks: blocks that a pooling program takes at a time. pool_programs: how many of them share the
    context of a (request, channel). pool_warps: of one. stored_policy: of the cache, for exponentials; they
    are read once more, soon, and would else be driven out by keys and values. The rest: see SplitKnobs.
    """

    programs: int = 396
    narrow: int = 128
    narrow_programs: int = 528
    pool_blocks: int = 16
    pool_programs: int = 64
    pool_warps: int = 4
    stored_policy: str = "evict_last"


KNOBS = DraftKnobs()
BLOCK = ALIGN  # keys read at a time: a block never has columns of two requests
# exp2(logit - running maximum) is at most 1: scaled to the top of float16, its relative precision is
# 2**-11 down to 2e-9 of the maximum.
STORED_SCALE = tl.constexpr(2.0**15)


def shared_bytes(rows: int, head_dim: int) -> int:
    """Bytes of shared memory that a thread block takes for the `rows` query rows of a (request, KV head), the
    carried row's among them; by kernels that Triton 3.6 compiled, see `verify.shared_bytes`."""
    return split_kv.shared_bytes(rows, head_dim, per_dim=768 if padded(rows) > 32 else 512, per_row=128)


def plan_contexts(lens: torch.Tensor, pool: KvPool, *, max_context: int) -> Plan | None:
    """How the contexts of a batch are parted among programs: alike for every KV head, layer and step of a
    round.

    lens: int [bs]. pool: of any layer. max_context: width of the table of slots. Never None.
    """
    _, kv_heads, dim = pool.k.shape
    narrow = dim * pool.k.itemsize <= KNOBS.narrow
    knobs = replace(KNOBS, programs=KNOBS.narrow_programs if narrow else KNOBS.programs)
    return plan_whole(lens, kv_heads=kv_heads, longest=max_context, knobs=knobs)


class _Rows(NamedTuple):
    """The query rows of a (request, KV head): those of the carried row first, then of every branch."""

    branches: int
    carried: bool
    q_heads: int
    kv_heads: int
    dim: int

    @property
    def queries(self) -> int:
        return self.carried + self.branches

    @property
    def used(self) -> int:
        return self.queries * (self.q_heads // self.kv_heads)

    @property
    def padded(self) -> int:
        return padded(self.used)

    def constants(self) -> dict[str, int | bool]:
        """By their names in the first two kernels."""
        sizes = {"H_Q": self.q_heads, "H_KV": self.kv_heads, "D": self.dim, "ROWS": self.padded}
        sizes["D_P2"] = padded(self.dim)
        return {"W": self.branches, "CARRIED": self.carried, "USED": self.used, **sizes}


class _Stored(NamedTuple):
    """What the launches of a call leave for each other.

    partial: float32 [H_kv, work, ROWS, D] and stats: float32 [H_kv, work, ROWS, 2], sums of a part.
    lse: float32 [bs, H_kv, ROWS], log2 of the sum of a row's exponentials. exps: float16 [H_kv, blocks, USED,
    BLOCK], exp2(logit - running maximum) by block of columns, and peaks: float32 [H_kv, blocks, USED], that
    maximum; there are no blocks where nothing is scored.
    """

    partial: torch.Tensor
    stats: torch.Tensor
    lse: torch.Tensor
    exps: torch.Tensor
    peaks: torch.Tensor

    @classmethod
    def empty(cls, rows: _Rows, bs: int, work: int, blocks: int, device: torch.device) -> _Stored:
        padded, heads = rows.padded, rows.kv_heads

        def new(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.empty(heads, *size, dtype=dtype, device=device)

        return cls(
            partial=new(work, padded, rows.dim),
            stats=new(work, padded, 2),
            lse=torch.empty(bs, heads, padded, dtype=torch.float32, device=device),
            exps=new(blocks, rows.used, BLOCK, dtype=torch.float16),
            peaks=new(blocks, rows.used),
        )


def draft_attention(
    q: torch.Tensor | None,
    pool: KvPool,
    contexts: Contexts,
    scores: Scores,
    members: Members,
    carried: Carried,
    *,
    step: int,
    num_steps: int,
    scale: float,
    pooling: Pooling,
    elsewhere: torch.Tensor | None = None,
    plan: Plan | None = None,
) -> torch.Tensor | None:
    """Kernel of `sts_kernels.torch_ops.draft_attention` (see there); graph-safe, no host sync.

    `scores.starts` must be multiples of ALIGN, and so the number of columns. Without a plan, which one launch
    of `plan_contexts` makes for all steps and layers of a round, the call makes its own.
    """
    check_draft(q, pool, scores, members, carried, pooling)
    expect_half("draft_attention", scores)
    columns, bs = scores.importance.shape[1], contexts.lens.numel()
    expect("draft_attention", columns % BLOCK == 0, f"{columns} columns are no multiple of {BLOCK}")
    out = None if q is None else torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if bs == 0:
        return out
    some = carried.q if q is None else q
    branches = 0 if q is None else q.shape[0] // bs
    rows = _Rows(branches, carried.q is not None, some.shape[1], *pool.k.shape[1:])
    if plan is None:
        plan = plan_contexts(contexts.lens, pool, max_context=contexts.table.shape[1])
    work = plan.work.shape[0]
    capture = members.channels.numel() > 0
    blocks = columns // BLOCK if capture else 0
    stored = _Stored.empty(rows, bs, work, blocks, pool.k.device)
    early = starts_early(pool.k.device) if KNOBS.early else {}
    shape = {**rows.constants(), "EARLY": bool(early)}
    _draft_kernel[(work, rows.kv_heads)](
        some if q is None else q,
        some if carried.q is None else carried.q,
        carried.lens,
        pool.k,
        pool.v,
        stored.partial,
        stored.stats,
        plan.work,
        plan.ends,
        stored.exps,
        stored.peaks,
        contexts.table,
        contexts.reqs,
        contexts.lens,
        scores.starts,
        contexts.lens if elsewhere is None else elsewhere,
        members.heads,
        scale * pool.k_scale * LOG2E,
        members.heads.numel(),
        step,
        num_steps,
        some.stride(0),
        pool.k.stride(0),
        pool.k.stride(1),
        contexts.table.stride(0),
        blocks,
        bs,
        SCRATCH=max(16, triton.next_power_of_2(branches * (step + 1))),
        BLOCK=BLOCK,
        CAPTURE=capture,
        ELSEWHERE=elsewhere is not None,
        MEMBERS=triton.next_power_of_2(max(1, members.heads.numel())),
        SHIFT=SHIFT,
        POLICY=KNOBS.stored_policy,
        num_warps=KNOBS.num_warps,
        num_stages=KNOBS.num_stages,
        **shape,
    )
    _draft_merge_kernel[(bs, rows.kv_heads, rows.used)](
        stored.partial,
        stored.stats,
        plan.ends,
        stored.lse,
        some if out is None else out,
        work,
        pool.v_scale,
        SPLITS_P2=triton.next_power_of_2(plan.most),
        **shape,
        **early,
    )
    if capture:
        _pool_rows(rows, stored, contexts, scores, members, pooling, early)
    return out


def _pool_rows(
    rows: _Rows,
    stored: _Stored,
    contexts: Contexts,
    scores: Scores,
    members: Members,
    pooling: Pooling,
    early: dict[str, bool],
) -> None:
    """Pool what is stored of the rows into importance."""
    _pool_kernel[(contexts.lens.numel(), members.channels.numel(), KNOBS.pool_programs)](
        stored.exps,
        stored.peaks,
        stored.lse,
        members.channels,
        members.heads,
        members.scale,
        members.fresh,
        scores.importance,
        contexts.lens,
        scores.starts,
        stored.exps.shape[1],
        scores.importance.stride(0),
        IMPORTANCE_SCALE / (pooling.total_rows if pooling.rows == "mean" else 1),
        QUERIES=rows.queries,
        HEADS=members.heads.shape[1],
        MEAN_HEADS=pooling.heads == "mean",
        MEAN_ROWS=pooling.rows == "mean",
        FIRST=rows.carried,
        SHIFT=SHIFT,
        H_Q=rows.q_heads,
        H_KV=rows.kv_heads,
        ROWS=rows.padded,
        USED=rows.used,
        PROGRAMS=KNOBS.pool_programs,
        BLOCKS=KNOBS.pool_blocks,
        BLOCK=BLOCK,
        EARLY=bool(early),
        num_warps=KNOBS.pool_warps,
        **early,
    )


@triton.jit
def _draft_kernel(
    q_ptr,  # [bs * W, H_q, D], rows `stride_q` apart
    carried_ptr,  # [requests, H_q, D]
    carried_lens_ptr,  # int64 [requests]
    k_ptr,  # [slots, H_kv, D]
    v_ptr,  # [slots, H_kv, D]
    partial_ptr,  # float32 [H_kv, work, ROWS, D]
    stats_ptr,  # float32 [H_kv, work, ROWS, 2]
    work_ptr,  # int64 [work, 4], see Plan
    ends_ptr,  # int32 [bs + 1]
    exps_ptr,  # float16 [H_kv, blocks of columns, USED, BLOCK]
    peaks_ptr,  # float32 [H_kv, blocks of columns, USED]
    table_ptr,  # int32 [requests, width]
    reqs_ptr,  # int [bs]
    lens_ptr,  # int [bs]
    column_ptr,  # int64 [bs], first columns, below 0: none
    elsewhere_ptr,  # bool [bs], if ELSEWHERE
    heads_ptr,  # int32 [speaking], heads that feed a channel, below 0: none
    scale,  # of logits, LOG2E and that of the keys included
    speaking,
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
    D_P2: tl.constexpr,  # padded to a power of two
    ROWS: tl.constexpr,  # USED padded: tiles of tl.dot have at least 16 rows
    USED: tl.constexpr,  # (carried + W) * group: the carried row's heads come first
    SCRATCH: tl.constexpr,  # W * (step + 1), padded to a power of two of at least 16
    BLOCK: tl.constexpr,
    CAPTURE: tl.constexpr,  # whether exponentials are stored
    ELSEWHERE: tl.constexpr,
    MEMBERS: tl.constexpr,  # speaking, padded to a power of two
    POLICY: tl.constexpr,  # of the cache, for them
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
    column = tl.load(column_ptr + b)
    only_scored = W == 0
    if ELSEWHERE:
        only_scored = tl.load(elsewhere_ptr + b) != 0
    if ELSEWHERE or W == 0:
        member = tl.arange(0, MEMBERS)
        head = tl.load(heads_ptr + member, mask=member < speaking, other=-1)
        speaks = tl.sum(((head >= 0) & (head // GROUP == h)).to(tl.int32), 0) > 0
        if only_scored & (speaks == 0):
            return  # nobody reads what is left behind of this head

    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, D_P2)
    query, head = rows // GROUP, h * GROUP + rows % GROUP  # [ROWS]
    if CARRIED:
        branch = query - 1
        is_carried = (query == 0) & (tl.load(carried_lens_ptr + req).to(tl.int32) == length)
        q = tl.load(
            carried_ptr + (req * H_Q + head[:, None]) * D + dims[None, :],
            mask=in_tile(is_carried, dims, D),
            other=0.0,
        )  # [ROWS, D]
    else:
        branch = query
        is_carried = query < 0
        q = tl.zeros([ROWS, D_P2], q_ptr.dtype.element_ty)
    in_step = (branch >= 0) & (branch < W)
    if W > 0:
        own = tl.load(
            q_ptr + (b * W + branch[:, None]) * stride_q + head[:, None] * D + dims[None, :],
            mask=in_tile(in_step, dims, D),
            other=0.0,
        )  # [ROWS, D]
        q = tl.where(in_step[:, None], own, q)
    q, scale = meet_keys(q, scale, k_ptr)
    live = is_carried | in_step  # [ROWS], not padding, nor a row that is a leftover

    peak = tl.full([ROWS], float("-inf"), tl.float32)
    norm = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, D_P2], tl.float32)
    # Positions [SHIFT, length + SHIFT) have keys. A part has whole blocks, so that each is stored once. Each
    # block has a key, so that maxima are finite.
    end = tl.where(length > 0, length + SHIFT, 0)
    first = tl.cdiv(begin, BLOCK) * BLOCK
    last = tl.where((kind & LAST_PART) != 0, end, tl.cdiv(begin + tokens, BLOCK) * BLOCK)
    place = h.to(tl.int64) * blocks + column // BLOCK  # this request's first block
    # Who is only scored needs no values: a loop of their own loads and multiplies none.
    middle = last
    if ELSEWHERE:
        middle = tl.where(only_scored, first, last)
    for block in range(first, middle, BLOCK):
        peak, norm, acc = _read_block(
            q, k_ptr, v_ptr, exps_ptr, peaks_ptr, row_ptr, block, end, length, column, place, live, rows,
            dims, h * stride_head, stride_slot, scale, peak, norm, acc, D, USED, BLOCK, CAPTURE, W > 0, SHIFT,
            POLICY,
        )  # fmt: skip
    if ELSEWHERE:
        for block in range(middle, last, BLOCK):
            peak, norm, acc = _read_block(
                q, k_ptr, v_ptr, exps_ptr, peaks_ptr, row_ptr, block, end, length, column, place, live, rows,
                dims, h * stride_head, stride_slot, scale, peak, norm, acc,
                D, USED, BLOCK, CAPTURE, False, SHIFT, POLICY,
            )  # fmt: skip
    if (W > 0) & ((kind & LAST_PART) != 0):
        # Scratch: a branch attends to what ran in it, this step's token included. The carried row has none.
        cols = tl.arange(0, SCRATCH)
        ok = cols < W * (step + 1)
        owner = cols // (step + 1)
        slots = tl.load(row_ptr + length + owner * num_steps + cols % (step + 1), mask=ok, other=0)
        seen = ok[None, :] & in_step[:, None] & (owner[None, :] == branch[:, None])  # [ROWS, SCRATCH]
        k, v = read(k_ptr, v_ptr, slots, ok, h * stride_head, stride_slot, dims, D)
        peak, norm, acc = attend(q, k, v, seen, scale, peak, norm, acc)
    if EARLY:
        gdc_launch_dependents()
    base = (h * tl.num_programs(0) + program).to(tl.int64) * ROWS
    attends = rows < USED
    if ELSEWHERE:
        attends = attends & (only_scored == 0)
    tl.store(partial_ptr + (base + rows[:, None]) * D + dims[None, :], acc, mask=in_tile(attends, dims, D))
    tl.store(stats_ptr + (base + rows) * 2, peak)
    tl.store(stats_ptr + (base + rows) * 2 + 1, norm)


@triton.jit
def _read_block(
    q,  # [ROWS, D]
    k_ptr,  # [slots, H_kv, D]
    v_ptr,  # [slots, H_kv, D], if VALUES
    exps_ptr,  # float16 [H_kv, blocks of columns, USED, BLOCK], if CAPTURE
    peaks_ptr,  # float32 [H_kv, blocks of columns, USED], if CAPTURE
    row_ptr,  # int32 [width], the request's slots
    block,  # first position
    end,  # of positions with keys
    length,
    column,  # below 0: nothing is stored
    place,  # of the request's first block of columns
    live,  # bool [ROWS]
    rows,
    dims,  # 0 to D, padded to a power of two
    head_offset,  # of the KV head in a slot
    stride_slot,
    scale,  # of logits, LOG2E and that of the keys included
    peak,  # float32 [ROWS], from here on as in split_kv.attend
    norm,
    acc,
    D: tl.constexpr,
    USED: tl.constexpr,
    BLOCK: tl.constexpr,
    CAPTURE: tl.constexpr,
    VALUES: tl.constexpr,
    SHIFT: tl.constexpr,
    POLICY: tl.constexpr,
):
    """`peak`, `norm` and `acc` after a block of positions, whose exponentials are stored."""
    offs = block + tl.arange(0, BLOCK)
    ok = (offs >= SHIFT) & (offs < end)
    slots = tl.load(row_ptr + offs - SHIFT, mask=ok, other=0)  # [BLOCK]
    kv_offs = slots.to(tl.int64)[:, None] * stride_slot + head_offset + dims[None, :]
    k = tl.load(k_ptr + kv_offs, mask=in_tile(ok, dims, D), other=0.0)  # [BLOCK, D]
    s = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee") * scale  # [ROWS, BLOCK]
    s = tl.where(ok[None, :], s, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(s, 1))
    fade = tl.exp2(peak - new_peak)
    p = tl.exp2(s - new_peak[:, None])  # [ROWS, BLOCK]
    if CAPTURE:
        # Position `length` has a key too, about the bonus token, but no column: the block that it begins
        # may be another request's.
        line = (place + block // BLOCK) * USED
        mine = rows < tl.where((column >= 0) & (block < length), USED, 0)
        stored = tl.where(live[:, None], p * STORED_SCALE, 0.0).to(tl.float16)
        lanes = rows[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]  # [ROWS, BLOCK]
        tl.store(exps_ptr + line * BLOCK + lanes, stored, mask=mine[:, None], eviction_policy=POLICY)
        tl.store(peaks_ptr + line + rows, new_peak, mask=mine)
    if VALUES:
        v = tl.load(v_ptr + kv_offs, mask=in_tile(ok, dims, D), other=0.0)  # [BLOCK, D]
        acc = acc * fade[:, None] + tl.dot(p.to(q.dtype), v.to(q.dtype), input_precision="ieee")
    return new_peak, norm * fade + tl.sum(p, 1), acc


@triton.jit
def _draft_merge_kernel(
    partial_ptr,  # float32 [H_kv, work, ROWS, D]
    stats_ptr,  # float32 [H_kv, work, ROWS, 2]
    ends_ptr,  # int32 [bs + 1]
    lse_ptr,  # float32 [bs, H_kv, ROWS], log2
    out_ptr,  # [bs * W, H_q, D]
    work,
    v_scale,  # of the values
    W: tl.constexpr,
    CARRIED: tl.constexpr,
    H_Q: tl.constexpr,
    H_KV: tl.constexpr,
    D: tl.constexpr,
    D_P2: tl.constexpr,  # padded to a power of two
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
    dims = tl.arange(0, D_P2)
    part = h * work + first
    peak, norm, out = merge(partial_ptr, stats_ptr, part, row, number, v_scale, dims, D, ROWS, SPLITS_P2)
    tl.store(lse_ptr + (b * H_KV + h) * ROWS + row, peak + tl.log2(norm))
    if (W > 0) & (branch >= 0):
        store_head(out_ptr + ((b * W + branch) * H_Q + h * GROUP + row % GROUP) * D, out, dims, D)


@triton.jit
def _pool_kernel(
    exps_ptr,  # float16 [H_kv, blocks, USED, BLOCK]
    peaks_ptr,  # float32 [H_kv, blocks, USED]
    lse_ptr,  # float32 [bs, H_kv, ROWS], log2
    channels_ptr,  # int32 [n]
    heads_ptr,  # int32 [n, HEADS], below 0: none
    scale_ptr,  # float32 [n]
    fresh_ptr,  # bool [n]
    importance_ptr,  # float16 [channels, columns]
    lens_ptr,  # int [bs]
    column_ptr,  # int64 [bs], first columns, below 0: none
    blocks,  # of columns
    stride_channel,
    factor,  # from a probability to importance
    QUERIES: tl.constexpr,  # carried + W
    HEADS: tl.constexpr,  # of a member at most
    MEAN_HEADS: tl.constexpr,
    MEAN_ROWS: tl.constexpr,
    FIRST: tl.constexpr,  # this call scores the first rows of a round
    SHIFT: tl.constexpr,
    H_Q: tl.constexpr,
    H_KV: tl.constexpr,
    ROWS: tl.constexpr,
    USED: tl.constexpr,
    PROGRAMS: tl.constexpr,  # that share a (request, channel)
    BLOCKS: tl.constexpr,  # at a time
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    b, member, program = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    GROUP: tl.constexpr = H_Q // H_KV
    length = tl.load(lens_ptr + b).to(tl.int32)
    column = tl.load(column_ptr + b)
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
        # Unrolled, so that all loads are issued together, and nothing is reduced across threads.
        for query in tl.static_range(QUERIES):
            row_p = tl.zeros([BLOCKS, BLOCK], tl.float32)
            for i in tl.static_range(HEADS):
                head = tl.load(heads_ptr + member * HEADS + i)
                speaks = here & (head >= 0)
                kv, row = tl.maximum(head, 0) // GROUP, query * GROUP + tl.maximum(head, 0) % GROUP
                lse = tl.load(lse_ptr + (b * H_KV + kv) * ROWS + row, mask=head >= 0, other=0.0)
                line = (kv.to(tl.int64) * blocks + first_block + block) * USED + row
                peak = tl.load(peaks_ptr + line, mask=speaks, other=float("-inf"))  # [BLOCKS]
                values = tl.load(
                    exps_ptr + line[:, None] * BLOCK + lanes[None, :],
                    mask=speaks[:, None],
                    other=0.0,
                    eviction_policy="evict_first",
                ).to(tl.float32)  # [BLOCKS, BLOCK]
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
        offs = block[:, None] * BLOCK + lanes[None, :]  # [BLOCKS, BLOCK]
        edge = (block == 0) | ((block + 1) * BLOCK > length)
        old = tl.load(write_ptr + offs, mask=(here & (edge | (overwrite == 0)))[:, None], other=0.0)
        if MEAN_ROWS:
            new = tl.where(overwrite, 0.0, old.to(tl.float32)) + p
        else:
            new = tl.maximum(tl.where(overwrite, 0.0, old.to(tl.float32)), p)
        new = tl.where((offs >= SHIFT) & (offs < length), new.to(tl.float16), old)
        tl.store(write_ptr + offs, new, mask=here[:, None])
