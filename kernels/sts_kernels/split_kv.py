"""What verify and draft attention share: lists of KV slots are parted among programs, then merged.

A request with a long list would keep one program busy while the rest of the GPU waits. So lists are cut into
parts of about the same size (`plan_lists`), each program attends to one part (`attend`) and leaves its sums
behind, and a second kernel merges the parts of a list (`merge`).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from sts_kernels.checks import check_plan
from sts_kernels.layout import WHOLE, Lists, Part, Plan

LOG2E = 1.4426950408889634  # kernels compute exp(x) as exp2(x * LOG2E)
MOST_PARTS = 64  # of a list: a merge holds them in registers

# `Part` for kernels, which take globals only as constexpr.
OF_CONTEXT = tl.constexpr(Part.OF_CONTEXT.value)
FIRST_PART = tl.constexpr(Part.FIRST.value)
LAST_PART = tl.constexpr(Part.LAST.value)


@dataclass(frozen=True)
class SplitKnobs:
    """How the lists of a kernel are parted, and how its programs run.

    programs: that share the lists of all (request, KV head) pairs. least: tokens of a full context that a
    part has at least. uneven: a list longer than the mean is cut into so many times as many parts at most.
    num_warps: of a program. num_stages: loads on their way at once; slots are loaded ahead, then keys and
    values, so that five stages have two blocks of keys and values on their way, and three only one. early:
    whether the merge may start while the last parts are read.
    """

    programs: int = 264
    least: int = 512
    uneven: int = 4
    num_warps: int = 4
    num_stages: int = 5
    early: bool = True


def splits(pairs: int, max_context: int, knobs: SplitKnobs) -> tuple[int, int]:
    """Programs that share the lists of so many (request, KV head) pairs, and those that share one at most.

    Half a program more than there are pairs, however many these are: a list longer than the mean can be cut
    then, which would else be read long after all others, and lists of one length stay whole.
    """
    most = max(1, min(max_context // knobs.least, MOST_PARTS))
    each = max(1, min(knobs.programs // max(1, pairs), most))
    return max(each * pairs, pairs + pairs // 2), min(each * knobs.uneven, most)


def padded(size: int) -> int:
    """Of a tile that holds so many query rows, or dimensions of a head: a power of two, and at least 16 for
    tl.dot."""
    return max(16, triton.next_power_of_2(size))


def shared_bytes(rows: int, head_dim: int, per_dim: int, per_row: int) -> int:
    """Bytes of shared memory that a thread block takes for so many query rows, and a few hundred more.

    per_dim: for each dimension of a head, of keys and values that are on their way; queries are held beside
    them. per_row: for each query row, of what it has of a block. Half precision is assumed.
    """
    held = padded(rows)
    return padded(head_dim) * (per_dim + 2 * held) + per_row * held + 512


@functools.cache
def starts_early(device: torch.device) -> dict[str, bool]:
    """Launch options of a kernel that may start while the one before it ends, whose results it waits for.

    The launch costs no time then. GPUs can do so from sm_90 on; Triton's interpreter knows no such option.
    """
    if device.type == "cpu" or (device.type == "cuda" and torch.cuda.get_device_capability(device) < (9, 0)):
        return {}
    return {"launch_pdl": True}


# ---- the plan


def plan_lists(lists: Lists, channels: torch.Tensor, lens: torch.Tensor, *, programs: int, most: int) -> Plan:
    """Kernel of `sts_kernels.torch_ops.plan_lists` (see there); graph-safe, no host sync."""
    check_plan(lists, channels)
    layers, heads = channels.shape
    pairs = lens.numel() * heads
    plan = Plan.empty(layers, pairs, programs, most, lists.starts.device)
    if pairs:
        _plan_kernel[(layers,)](
            plan.work,
            plan.ends,
            lists.starts,
            lists.counts,
            channels,
            lens,
            lists.counts.shape[1],
            pairs,
            plan.work.shape[1],
            programs,
            most,
            H_KV=heads,
            PAIRS_P2=triton.next_power_of_2(pairs),
            num_warps=1 if pairs <= 256 else 16,  # a warp sums without barriers
        )
    return plan


def plan_whole(lens: torch.Tensor, *, kv_heads: int, longest: int, knobs: SplitKnobs) -> Plan:
    """How rows of `lens` [bs] entries, at most `longest`, are parted: alike for every KV head."""
    programs, most = splits(lens.numel() * kv_heads, longest, knobs)
    starts = torch.zeros(lens.numel(), 1, dtype=torch.int64, device=lens.device)
    counts = torch.full_like(starts, WHOLE, dtype=torch.int32)
    whole = Lists(starts, starts, counts)  # nothing is listed, so no entry is read
    channel = torch.zeros(1, 1, dtype=torch.int32, device=lens.device)
    return plan_lists(whole, channel, lens, programs=programs // kv_heads, most=most).of(0)


@triton.jit
def _plan_kernel(
    work_ptr,  # int64 [layers, work, 4]
    ends_ptr,  # int32 [layers, pairs + 1]
    start_ptr,  # int64 [bs, channels]
    count_ptr,  # int32 [bs, channels], below 0: WHOLE
    heads_ptr,  # int32 [layers, H_kv], a channel each
    lens_ptr,  # int [bs]
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
    count = tl.load(count_ptr + place, mask=there, other=0)  # [PAIRS_P2], as all that follows
    begin = tl.load(start_ptr + place, mask=there, other=0)
    whole = count < 0
    total = tl.where(whole, tl.load(lens_ptr + pair // H_KV, mask=there, other=0).to(tl.int32), count)
    begin = tl.where(whole, 0, begin)

    # The smallest share of tokens at which there are no more parts than programs, found by bisection.
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
    parts = tl.maximum(number, 1)  # a padding pair has none, and nothing may be divided by zero
    first = tl.zeros_like(total)
    for split in range(0, tl.max(number, 0)):
        entry = work_ptr + (layer * work + end - number + split).to(tl.int64) * 4
        here = split < number
        # In 32 bits, of which a division takes a tenth of the time: a list has MOST_PARTS parts at most.
        last = total * (split + 1) // parts
        kind = tl.where(whole, OF_CONTEXT, 0) + (FIRST_PART if split == 0 else 0)
        kind += tl.where(split == number - 1, LAST_PART, 0)
        tl.store(entry, pair, mask=here)
        tl.store(entry + 1, begin + first, mask=here)
        tl.store(entry + 2, last - first, mask=here)
        tl.store(entry + 3, kind, mask=here)
        first = last


@triton.jit
def _parts(total, share, most, there):
    """int32 [PAIRS_P2]: parts of each list at about `share` tokens a part, none where no pair is `there`."""
    return tl.where(there, tl.minimum(tl.maximum(tl.cdiv(total, share), 1), most), 0)


# ---- for kernels


@triton.jit
def in_tile(ok, dims, D: tl.constexpr):
    """Which of a tile [.., dims] there are: of the rows that are `ok` [..], the dimensions of a head."""
    mask = ok[:, None]
    if dims.shape[0] != D:  # padded to a power of two; else a mask by dimension would cost registers
        mask = mask & (dims < D)[None, :]
    return mask


@triton.jit
def store_head(ptr, out, dims, D: tl.constexpr):
    """Write the dimensions that a head has of a row `out` [dims]."""
    if dims.shape[0] == D:
        tl.store(ptr + dims, out.to(ptr.dtype.element_ty))
    else:
        tl.store(ptr + dims, out.to(ptr.dtype.element_ty), mask=dims < D)


@triton.jit
def meet_keys(q, scale, k_ptr):
    """Queries as they are multiplied with keys, and the scale of logits. Keys of FP8 become float16, which is
    one instruction for two values; bfloat16 is one more for each, which takes longer than reading them.

    A sixteenth of a value of bfloat16 is one of float16, but for what is nearer to zero than 2^-13, of which
    the last bits are lost, and what is beyond a million, which becomes that.
    """
    if k_ptr.dtype.element_ty == tl.float8e4nv and q.dtype == tl.bfloat16:
        q = tl.clamp(q.to(tl.float32) / 16, -65504.0, 65504.0).to(tl.float16)
        scale = scale * 16
    return q, scale


@triton.jit
def read(
    k_ptr,  # [slots, H_kv, D]
    v_ptr,  # [slots, H_kv, D]
    slots,  # int32 [BLOCK]
    ok,  # bool [BLOCK], which slots there are
    head_offset,  # of the KV head in a slot
    stride_slot,
    dims,  # 0 to D, padded to a power of two
    D: tl.constexpr,
):
    """Keys and values [BLOCK, D] of a block of slots, 0 where there are none."""
    offs = slots.to(tl.int64)[:, None] * stride_slot + head_offset + dims[None, :]
    k = tl.load(k_ptr + offs, mask=in_tile(ok, dims, D), other=0.0)
    return k, tl.load(v_ptr + offs, mask=in_tile(ok, dims, D), other=0.0)


@triton.jit
def attend(
    q,  # [ROWS, D], see `meet_keys`
    k,  # [BLOCK, D]
    v,  # [BLOCK, D], both of the dtype of q or of fp8
    seen,  # bool [ROWS, BLOCK] or [1, BLOCK], which of them a row attends to
    scale,  # of logits, LOG2E and that of the keys included
    peak,  # float32 [ROWS], largest logit so far
    norm,  # float32 [ROWS], sum of exp2(logit - peak) so far
    acc,  # float32 [ROWS, D], the same sum of values
):
    """One step of online softmax: `peak`, `norm` and `acc` after a block of keys and values."""
    k, v = k.to(q.dtype), v.to(q.dtype)
    s = tl.where(seen, tl.dot(q, tl.trans(k), input_precision="ieee") * scale, float("-inf"))  # [ROWS, BLOCK]
    new_peak = tl.maximum(peak, tl.max(s, 1))
    # A row that has seen nothing yet has no maximum: keep the exponents finite, its sum stays 0.
    safe = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    fade = tl.exp2(peak - safe)
    p = tl.exp2(s - safe[:, None])  # [ROWS, BLOCK]
    acc = acc * fade[:, None] + tl.dot(p.to(q.dtype), v, input_precision="ieee")
    return new_peak, norm * fade + tl.sum(p, 1), acc


@triton.jit
def merge(
    partial_ptr,  # float32 [parts, ROWS, D], `acc` of each part
    stats_ptr,  # float32 [parts, ROWS, 2], its `peak` and `norm`
    first,  # part of the list
    row,
    splits,  # parts of the list
    v_scale,  # of the values
    dims,  # 0 to D, padded to a power of two
    D: tl.constexpr,
    ROWS: tl.constexpr,
    SPLITS_P2: tl.constexpr,
):
    """Maximum (of log2), sum and output [dims] of one row over the parts of its list."""
    split = tl.arange(0, SPLITS_P2)
    ok = split < splits
    base = (first + split) * ROWS + row  # [SPLITS_P2]
    peak = tl.load(stats_ptr + base * 2, mask=ok, other=float("-inf"))  # [SPLITS_P2]
    norm = tl.load(stats_ptr + base * 2 + 1, mask=ok, other=0.0)  # [SPLITS_P2]
    partial = tl.load(
        partial_ptr + base[:, None] * D + dims[None, :], mask=in_tile(ok, dims, D), other=0.0
    )  # [SPLITS_P2, D]
    top = tl.max(peak, 0)
    weight = tl.exp2(peak - top)
    total = tl.sum(norm * weight, 0)
    return top, total, tl.sum(partial * weight[:, None], 0) / total * v_scale
