"""Lists and masks of verify for a paged attention that takes every (request, KV head) as a request."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sts_kernels.checks import check_headwise

BLOCK = 1024
PROGRAMS = 16  # per (request, KV head); lengths are read on the device, so the grid cannot follow them


def headwise_lists(
    kv_indices: torch.Tensor,
    kv_start: torch.Tensor,
    kv_count: torch.Tensor,
    head_channels: torch.Tensor,
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    seq_lens: torch.Tensor,
    tokens: int,
    indptr: torch.Tensor,
    mask_indptr: torch.Tensor,
    indices: torch.Tensor,
    mask: torch.Tensor,
    layers: int,
    attended: torch.Tensor,
    clipped: torch.Tensor,
) -> None:
    """Kernel of `sts_kernels.reference.headwise_lists` (see there); graph-safe, no host sync."""
    check_headwise(kv_start, kv_count, head_channels, indptr, mask_indptr, indices, mask)
    pairs, kv_heads = kv_count.shape[0] * head_channels.numel(), head_channels.numel()
    if pairs == 0:
        return
    _lists_kernel[(pairs, PROGRAMS)](
        kv_indices,
        kv_start,
        kv_count,
        head_channels,
        req_to_token,
        req_pool_indices,
        seq_lens,
        indptr,
        mask_indptr,
        indices,
        mask,
        attended,
        clipped,
        layers,
        kv_count.shape[1],
        req_to_token.stride(0),
        T=tokens,
        H_KV=kv_heads,
        BLOCK=BLOCK,
        PROGRAMS=PROGRAMS,
    )


@triton.jit
def _lists_kernel(
    list_ptr,
    start_ptr,  # [bs, channels]
    count_ptr,  # [bs, channels], -1: the whole context
    head_channels_ptr,
    table_ptr,
    reqs_ptr,
    lens_ptr,
    indptr_ptr,
    mask_indptr_ptr,
    indices_ptr,
    mask_ptr,
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
    channel = tl.load(head_channels_ptr + h)
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
    if (program == 0) & (req > 0):  # slot 0 is the padding of CUDA graphs
        tl.atomic_add(attended_ptr, kept.to(tl.int64) * layers)
        tl.atomic_add(attended_ptr + 1, length.to(tl.int64) * layers)
        tl.atomic_add(clipped_ptr, (total - kept).to(tl.int64) * layers)

    own = tl.load(row_ptr)  # what is masked is read all the same: a slot of the request, never garbage
    for block in range(program * BLOCK, width, PROGRAMS * BLOCK):
        offs = block + tl.arange(0, BLOCK)
        chosen = tl.load(chosen_ptr + offs, mask=offs < kept, other=0)
        in_tail = (offs >= room) & (offs < width)
        tail = tl.load(row_ptr + length + offs - room, mask=in_tail, other=0)
        slots = tl.where(offs < kept, chosen, tl.where(in_tail, tail, own))
        tl.store(indices_ptr + first + offs, slots * H_KV + h, mask=offs < width)

    size = (T * width + 7) // 8
    BYTES: tl.constexpr = BLOCK // 8
    place = tl.arange(0, 8)
    for block in range(program * BYTES, size, PROGRAMS * BYTES):
        offs = block + tl.arange(0, BYTES)
        bit = offs[:, None] * 8 + place[None, :]
        row, column = bit // width, bit % width
        seen = (column < kept) | ((column >= room) & (column - room <= row))
        byte = tl.sum(tl.where(seen & (row < T), 1, 0) << place[None, :], 1)
        tl.store(mask_ptr + tl.load(mask_indptr_ptr + pair) + offs, byte.to(tl.uint8), mask=offs < size)
