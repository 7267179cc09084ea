"""FA3's paged attention in plain torch: what `flash_attn_with_kvcache` of sgl_kernel says of itself."""

from __future__ import annotations

import torch


def paged_fa3(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    page_table: torch.Tensor,
    cache_seqlens: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    max_seqlen_q: int,
    softmax_scale: float,
    causal: bool,
    out: torch.Tensor,
    num_splits: int = 0,
) -> torch.Tensor:
    """Requests of any lengths; the last row of each attends to all its keys, every one before it to one less,
    and a row is zero where it sees none.

    q: [rows, H_q, D]. k_cache, v_cache: [pages, page, H_kv, D]. page_table: int32 [requests, pages].
    cache_seqlens: int32 [requests]. cu_seqlens_q: int32 [requests + 1]. out: as q, written.
    num_splits: of keys, whatever it is.
    """
    heads, kv_heads = q.shape[1], k_cache.shape[2]
    for tensor in (page_table, cache_seqlens, cu_seqlens_q):
        assert tensor.dtype == torch.int32 and tensor.stride(-1) == 1
    assert q.is_contiguous() and out.shape == q.shape and out.dtype == q.dtype == k_cache.dtype
    assert k_cache.shape == v_cache.shape and k_cache.shape[3] == q.shape[2] and heads % kv_heads == 0
    starts, lens = cu_seqlens_q.tolist(), cache_seqlens.tolist()
    assert len(starts) == len(lens) + 1 == page_table.shape[0] + 1
    assert starts[0] == 0 and starts[-1] == q.shape[0] and causal
    assert max(map(int, cu_seqlens_q.diff())) == max_seqlen_q
    page = k_cache.shape[1]
    for i, length in enumerate(lens):
        rows, number = slice(starts[i], starts[i + 1]), starts[i + 1] - starts[i]
        positions = torch.arange(length, device=q.device)
        pages = page_table[i, positions // page].long()
        k, v = (cache[pages, positions % page].float() for cache in (k_cache, v_cache))  # [length, H_kv, D]
        k, v = (part.repeat_interleave(heads // kv_heads, 1) for part in (k, v))
        logits = torch.einsum("nhd,lhd->hnl", q[rows].float(), k) * softmax_scale
        last = length - number + torch.arange(number, device=q.device)
        logits = logits.masked_fill(positions > last[:, None], -torch.inf)
        probs = logits.softmax(-1).nan_to_num(0.0)
        out[rows] = torch.einsum("hnl,lhd->nhd", probs, v).to(q.dtype)
    return out
