"""Sparse verify attention: all draft rows of a request over its selected tokens and the tail."""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from sts_kernels.checks import expect_dims, expect_indptr


def sparse_verify_attention(
    q: torch.Tensor,
    k_buffer: torch.Tensor,
    v_buffer: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_indices: torch.Tensor,
    head_channels: torch.Tensor,
    tail_slots: torch.Tensor,
    tail_mask: torch.Tensor,
    sm_scale: float,
) -> torch.Tensor:
    """Exact softmax attention over (selected context + tail), per (request, KV head).

    Args:
        q: [bs, T, H_q, D] queries of the T draft tokens of each request.
        k_buffer, v_buffer: [slots, H_kv, D] key and value pools.
        kv_indptr: int [bs * channels + 1], request-major offsets into `kv_indices`.
        kv_indices: int [nnz] slots of the selected context tokens.
        head_channels: int [H_kv], the channel whose selection a KV head attends to.
        tail_slots: int [bs, T] slots of the draft tokens themselves.
        tail_mask: bool [bs, T, T], row i may attend to tail token j (causal chain or tree).
        sm_scale: scale of the logits.

    Returns:
        [bs, T, H_q, D_v] in the dtype of q.

    Raises:
        ValueError: on shapes that do not fit.
    """
    _check(q, k_buffer, v_buffer, kv_indptr, head_channels, tail_slots, tail_mask)
    bs, num_tokens, q_heads, _ = q.shape
    kv_heads = k_buffer.shape[1]
    group = q_heads // kv_heads
    out = q.new_empty(bs, num_tokens, q_heads, v_buffer.shape[2])
    if bs == 0:
        return out
    channels = (kv_indptr.numel() - 1) // bs
    offsets = kv_indptr.tolist()
    head_channel = head_channels.tolist()
    for b in range(bs):
        for h in range(kv_heads):
            row = b * channels + head_channel[h]
            selected = kv_indices[offsets[row] : offsets[row + 1]].long()
            slots = torch.cat([selected, tail_slots[b].long()])
            heads = slice(h * group, (h + 1) * group)
            mask = torch.ones(num_tokens, slots.numel(), dtype=torch.bool, device=q.device)
            mask[:, selected.numel() :] = tail_mask[b]
            out[b, :, heads] = scaled_dot_product_attention(
                q[b, :, heads].transpose(0, 1)[None],  # [1, G, T, D]
                k_buffer[slots, h].to(q.dtype).expand(1, group, -1, -1),
                v_buffer[slots, h].to(q.dtype).expand(1, group, -1, -1),
                attn_mask=mask,
                scale=sm_scale,
            )[0].transpose(0, 1)
    return out


def _check(q, k_buffer, v_buffer, kv_indptr, head_channels, tail_slots, tail_mask) -> None:
    op = "sparse_verify_attention"
    expect_dims(op, q=(q, 4), k_buffer=(k_buffer, 3), v_buffer=(v_buffer, 3), tail_mask=(tail_mask, 3))
    bs, num_tokens, q_heads, head_dim = q.shape
    if k_buffer.shape[:2] != v_buffer.shape[:2] or k_buffer.shape[2] != head_dim:
        raise ValueError(
            f"{op}: pools {tuple(k_buffer.shape)}, {tuple(v_buffer.shape)} do not fit q {tuple(q.shape)}"
        )
    if q_heads % k_buffer.shape[1] or head_channels.numel() != k_buffer.shape[1]:
        raise ValueError(
            f"{op}: {q_heads} query heads, {head_channels.numel()} channels, {k_buffer.shape[1]} KV heads"
        )
    if tail_slots.shape != (bs, num_tokens) or tail_mask.shape != (bs, num_tokens, num_tokens):
        raise ValueError(
            f"{op}: tail {tuple(tail_slots.shape)}, {tuple(tail_mask.shape)} for q {tuple(q.shape)}"
        )
    if bs and (kv_indptr.numel() - 1) % bs:
        raise ValueError(f"{op}: kv_indptr of {kv_indptr.numel()} does not divide into {bs} requests")
    expect_indptr(op, "kv_indptr", kv_indptr, kv_indptr.numel() - 1)
