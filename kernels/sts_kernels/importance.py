"""Importance: the attention probabilities of draft query rows, pooled over the mapped heads."""

from __future__ import annotations

import torch

from sts_kernels.checks import expect_dims, expect_indptr


def row_importance(
    q: torch.Tensor,
    k_buffer: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_indices: torch.Tensor,
    channel_weights: torch.Tensor,
    sm_scale: float,
    pool_heads: str = "max",
) -> torch.Tensor:
    """Attention probabilities of each query row over its own keys, pooled into channels.

    A channel is a set of draft heads that together speak for some target KV head. One draft layer
    contributes only the heads it owns: the caller combines layers with `maximum` (pool "max") or by
    adding (pool "mean", whose weights already carry 1 / number of heads of the whole channel).

    Args:
        q: [rows, H_q, D] post-RoPE queries.
        k_buffer: [slots, H_kv, D] key pool.
        kv_indptr: int [rows + 1], row r attends to `kv_indices[kv_indptr[r]:kv_indptr[r + 1]]`.
        kv_indices: int [nnz] slots, in position order.
        channel_weights: float [channels, H_q], zero for heads that are not in the channel.
        sm_scale: scale of the logits before the softmax.
        pool_heads: "max" or "mean".

    Returns:
        float32 [channels, nnz], each row's softmax over exactly its own keys (so it is comparable
        between rows and heads), pooled over the heads of the channel. Channels without a head in
        this layer are 0.

    Raises:
        ValueError: on shapes that do not fit or an unknown pool.
    """
    _check(q, k_buffer, kv_indptr, channel_weights, pool_heads)
    channels, group = channel_weights.shape[0], q.shape[1] // k_buffer.shape[1]
    out = torch.zeros(channels, kv_indices.numel(), dtype=torch.float32, device=q.device)
    used = (channel_weights > 0).any(0).nonzero().flatten()
    if used.numel() == 0:
        return out
    weights = channel_weights[:, used].float()
    offsets = kv_indptr.tolist()
    for row, (start, end) in enumerate(zip(offsets[:-1], offsets[1:], strict=True)):
        keys = k_buffer[kv_indices[start:end].long()][:, used // group].float()  # [n, heads, D]
        logits = torch.einsum("hd,nhd->hn", q[row, used].float(), keys) * sm_scale
        out[:, start:end] = _pool(torch.softmax(logits, dim=-1), weights, pool_heads)
    return out


def _pool(probs: torch.Tensor, weights: torch.Tensor, pool_heads: str) -> torch.Tensor:
    """[heads, n] probabilities to [channels, n]."""
    if pool_heads == "mean":
        return weights @ probs
    pooled = [
        probs[member].amax(0) if member.any() else probs.new_zeros(probs.shape[1]) for member in weights > 0
    ]
    return torch.stack(pooled)


def _check(q, k_buffer, kv_indptr, channel_weights, pool_heads) -> None:
    op = "row_importance"
    expect_dims(op, q=(q, 3), k_buffer=(k_buffer, 3), channel_weights=(channel_weights, 2))
    expect_indptr(op, "kv_indptr", kv_indptr, q.shape[0])
    if q.shape[1] % k_buffer.shape[1] or channel_weights.shape[1] != q.shape[1]:
        raise ValueError(
            f"{op}: {q.shape[1]} query heads do not fit {k_buffer.shape[1]} KV heads and "
            f"channel_weights {tuple(channel_weights.shape)}"
        )
    if pool_heads not in ("max", "mean"):
        raise ValueError(f"{op}: pool_heads must be 'max' or 'mean', got {pool_heads!r}")
