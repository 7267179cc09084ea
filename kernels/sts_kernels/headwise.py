"""Lists and masks of verify for a paged attention that takes every (request, KV head) as a request."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from sts_kernels.checks import check_headwise
from sts_kernels.layout import Contexts, Lists, PagedLists


@dataclass(frozen=True)
class HeadwiseKnobs:
    """block: entries of a list, or bits of a mask, that a program writes at a time. programs: that share a
    (request, KV head); the grid cannot follow lengths, which are read on the device.
    """

    block: int = 1024
    programs: int = 16


KNOBS = HeadwiseKnobs()


def headwise_lists(
    lists: Lists,
    channels: torch.Tensor,
    contexts: Contexts,
    paged: PagedLists,
    attended: torch.Tensor,
    clipped: torch.Tensor,
    *,
    tokens: int,
    layers: int,
) -> None:
    """Kernel of `sts_kernels.torch_ops.headwise_lists` (see there); graph-safe, no host sync."""
    check_headwise(lists, channels, paged)
    kv_heads = channels.numel()
    pairs = lists.counts.shape[0] * kv_heads
    if pairs == 0:
        return
    _lists_kernel[(pairs, KNOBS.programs)](
        lists.indices,
        lists.starts,
        lists.counts,
        channels,
        contexts.table,
        contexts.reqs,
        contexts.lens,
        paged.indptr,
        paged.mask_indptr,
        paged.indices,
        paged.mask,
        attended,
        clipped,
        layers,
        lists.counts.shape[1],
        contexts.table.stride(0),
        T=tokens,
        H_KV=kv_heads,
        BLOCK=KNOBS.block,
        PROGRAMS=KNOBS.programs,
    )


@triton.jit
def _lists_kernel(
    list_ptr,  # int32 [entries]
    start_ptr,  # int64 [bs, channels]
    count_ptr,  # int32 [bs, channels], below 0: WHOLE
    channels_ptr,  # int [H_kv]
    table_ptr,  # int32 [requests, width]
    reqs_ptr,  # int [bs]
    lens_ptr,  # int [bs]
    indptr_ptr,  # int32 [pairs + 1]
    mask_indptr_ptr,  # int32 [pairs + 1]
    indices_ptr,  # int32, written
    mask_ptr,  # uint8, written
    attended_ptr,  # int64 [2]: selected, available
    clipped_ptr,  # int64 [1]
    layers,
    channels,
    stride_table,
    T: tl.constexpr,
    H_KV: tl.constexpr,
    BLOCK: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    pair, program = tl.program_id(0), tl.program_id(1)
    b, h = pair // H_KV, pair % H_KV
    channel = tl.load(channels_ptr + h)
    length = tl.load(lens_ptr + b).to(tl.int32)
    req = tl.load(reqs_ptr + b).to(tl.int64)
    total = tl.load(count_ptr + b * channels + channel)
    row_ptr = table_ptr + req * stride_table
    chosen_ptr = list_ptr + tl.load(start_ptr + b * channels + channel)
    if total < 0:
        total = length
        chosen_ptr = row_ptr
    first = tl.load(indptr_ptr + pair)
    width = tl.load(indptr_ptr + pair + 1) - first
    room = width - T
    kept = tl.minimum(total, room)
    chosen_ptr += total - kept
    if (program == 0) & (req > 0):  # row 0 pads the batches of CUDA graphs
        tl.atomic_add(attended_ptr, kept.to(tl.int64) * layers)
        tl.atomic_add(attended_ptr + 1, length.to(tl.int64) * layers)
        tl.atomic_add(clipped_ptr, (total - kept).to(tl.int64) * layers)

    # Padding: attention reads what the mask hides too, so it must be a slot that was written.
    own = tl.load(row_ptr)
    for block in range(program * BLOCK, width, PROGRAMS * BLOCK):
        offs = block + tl.arange(0, BLOCK)
        chosen = tl.load(chosen_ptr + offs, mask=offs < kept, other=0)  # [BLOCK]
        in_tail = (offs >= room) & (offs < width)
        tail = tl.load(row_ptr + length + offs - room, mask=in_tail, other=0)  # [BLOCK]
        slots = tl.where(offs < kept, chosen, tl.where(in_tail, tail, own))
        tl.store(indices_ptr + first + offs, slots * H_KV + h, mask=offs < width)

    size = (T * width + 7) // 8
    BYTES: tl.constexpr = BLOCK // 8
    place = tl.arange(0, 8)
    for block in range(program * BYTES, size, PROGRAMS * BYTES):
        offs = block + tl.arange(0, BYTES)
        bit = offs[:, None] * 8 + place[None, :]  # [BYTES, 8]
        row, column = bit // width, bit % width
        seen = (column < kept) | ((column >= room) & (column - room <= row))
        byte = tl.sum(tl.where(seen & (row < T), 1, 0) << place[None, :], 1)
        tl.store(mask_ptr + tl.load(mask_indptr_ptr + pair) + offs, byte.to(tl.uint8), mask=offs < size)
