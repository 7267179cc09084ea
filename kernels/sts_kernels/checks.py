"""Argument checks shared by the kernels and their twins: one line, what came and what was expected."""

from __future__ import annotations

import torch

# Importance is stored as float16 probability * 2**14: relative precision 2**-11 down to 4e-9, below
# what a token among 128K can get on average by three orders of magnitude.
IMPORTANCE_SCALE = 2.0**14
# What a slot remembers that was never scored since it was written. Below every score, so that a maximum never
# keeps it.
UNKNOWN = -1.0


def expect(op: str, ok: bool, message: str) -> None:
    """Raise ValueError `op: message` unless `ok`."""
    if not ok:
        raise ValueError(f"{op}: {message}")


def expect_importance(op: str, importance: torch.Tensor) -> None:
    """float16 everywhere; float32 for the twins, which the reference server uses to be exact."""
    ok = importance.dim() == 2 and importance.dtype in (torch.float16, torch.float32)
    expect(
        op, ok, f"importance must be [channels, columns], got {importance.dtype} {tuple(importance.shape)}"
    )


def check_verify(q, k_buffer, v_buffer, kv_start, kv_count, head_channels, tail_mask) -> None:
    """Shapes of sparse_verify_attention."""
    op = "sparse_verify_attention"
    expect(op, q.dim() == 4, f"q must be [bs, T, H_q, D], got {tuple(q.shape)}")
    bs, tokens, q_heads, dim = q.shape
    # The stride of a dimension of one says nothing.
    rows = (tokens == 1 or q.stride(0) == tokens * q.stride(1)) and q.stride()[2:] == (dim, 1)
    seen = tail_mask.shape[:2] == (bs, tokens) and tail_mask.stride(2) == 1
    seen = seen and (tokens == 1 or tail_mask.stride(1) == tail_mask.shape[2])
    expect(
        op, rows or bs == 0, f"q must be rows of contiguous heads at one distance, got strides {q.stride()}"
    )
    expect(
        op,
        k_buffer.dim() == 3 and k_buffer.shape == v_buffer.shape and k_buffer.shape[2] == dim,
        f"pools {tuple(k_buffer.shape)} and {tuple(v_buffer.shape)} do not fit q {tuple(q.shape)}",
    )
    expect(
        op,
        k_buffer.stride() == v_buffer.stride() and k_buffer.stride(2) == 1,
        "pools must share strides [.., .., 1]",
    )
    expect(op, q_heads % k_buffer.shape[1] == 0, f"{q_heads} query heads for {k_buffer.shape[1]} KV heads")
    expect(
        op, head_channels.numel() == k_buffer.shape[1], f"head_channels has {head_channels.numel()} entries"
    )
    expect(
        op,
        kv_start.shape == kv_count.shape and kv_count.dim() == 2 and kv_count.shape[0] == bs,
        f"kv_start {tuple(kv_start.shape)} and kv_count {tuple(kv_count.shape)} must be [bs, channels]",
    )
    expect(
        op,
        seen,
        f"tail_mask must be [bs, T, N] with contiguous rows, got {tuple(tail_mask.shape)}",
    )


def check_plan(kv_start, kv_count, head_channels) -> None:
    """Shapes of plan_verify."""
    op = "plan_verify"
    expect(op, kv_start.shape == kv_count.shape and kv_count.dim() == 2, "kv_count must be [bs, channels]")
    ok = head_channels.dim() == 2 and head_channels.dtype == torch.int32
    expect(op, ok, f"head_channels must be int32 [layers, H_kv], got {tuple(head_channels.shape)}")


def check_sizes(seq_lens, carried_len, keeps, split, channels) -> None:
    """Arguments of size_lists."""
    op = "size_lists"
    expect(op, seq_lens.dim() == 1, f"seq_lens must be [bs], got {tuple(seq_lens.shape)}")
    expect(op, keeps.dtype == torch.float64, f"keeps must be float64, got {keeps.dtype}")
    ok = carried_len.dtype == torch.int64 and carried_len.shape == keeps.shape
    expect(op, ok, f"carried_len must be int64 {tuple(keeps.shape)}, got {carried_len.dtype}")
    if split is not None:
        ok = split.dtype == torch.float64 and split.dim() == 2 and split.shape[1] == channels
        expect(op, ok, f"split must be float64 [steps + 1, {channels}], got {tuple(split.shape)}")
        expect(
            op, split.shape[0] > 1 and split.is_contiguous(), "split must be contiguous, of 2 rows or more"
        )


def check_select(importance, budgets, kv_start, kv_count) -> None:
    """Shapes of select_tokens."""
    op = "select_tokens"
    expect_importance(op, importance)
    shape = (budgets.numel(), importance.shape[0])
    expect(
        op,
        kv_start.shape == shape and kv_count.shape == shape,
        f"kv_start {tuple(kv_start.shape)} and kv_count {tuple(kv_count.shape)} must be {shape}",
    )


def check_draft(q, carried_q, k_buffer, v_buffer, members, importance, pool_heads, pool_rows) -> None:
    """Shapes of draft_attention."""
    op = "draft_attention"
    for name, rows in (("q", q), ("carried_q", carried_q)):
        if rows is not None:
            expect(
                op,
                rows.dim() == 3 and rows.shape[2] == k_buffer.shape[2],
                f"{name} has shape {tuple(rows.shape)}",
            )
            ok = rows.stride()[1:] == (rows.shape[2], 1)
            expect(op, ok, f"{name} must have contiguous heads, got strides {rows.stride()}")
            heads = rows.shape[1]
            expect(
                op, heads % k_buffer.shape[1] == 0, f"{heads} query heads for {k_buffer.shape[1]} KV heads"
            )
    expect(op, carried_q is None or carried_q.is_contiguous(), "carried_q must be contiguous")
    expect(op, q is not None or carried_q is not None, "neither q nor carried_q is given")
    expect(
        op,
        k_buffer.shape == v_buffer.shape,
        f"pools {tuple(k_buffer.shape)} and {tuple(v_buffer.shape)} differ",
    )
    expect_importance(op, importance)
    expect(
        op,
        members.heads.shape[0] == members.channels.numel() == members.scale.numel(),
        "members do not agree",
    )
    for name, pool in (("pool_heads", pool_heads), ("pool_rows", pool_rows)):
        expect(op, pool in ("max", "mean"), f"{name} must be 'max' or 'mean', got {pool!r}")


def check_history(importance, history, owner, round_, weight) -> None:
    """Shapes of blend_history."""
    op = "blend_history"
    expect_importance(op, importance)
    ok = history.dim() == 2 and history.is_contiguous() and history.shape[1] == importance.shape[0]
    got = f"{history.dtype} {tuple(history.shape)}"
    expect(op, ok, f"history must be contiguous [slots, channels], got {got}")
    expect(op, history.dtype == importance.dtype, f"history must be {importance.dtype}, got {got}")
    expect(op, owner.shape == history.shape[:1] and owner.dtype == torch.int64, "owner must be int64 [slots]")
    expect(op, round_.shape == (1,) and round_.dtype == torch.int64, "round_ must be int64 [1]")
    expect(op, weight.dtype == torch.float32, f"weight must be float32 [bs], got {weight.dtype}")


def check_spread(importance, factor) -> None:
    """Arguments of spread_importance."""
    expect_importance("spread_importance", importance)
    expect("spread_importance", 0 < factor <= 1, f"factor must be above 0 and at most 1, got {factor}")


def check_headwise(kv_start, kv_count, head_channels, indptr, mask_indptr, indices, mask) -> None:
    """Shapes of headwise_lists."""
    op = "headwise_lists"
    expect(op, kv_start.shape == kv_count.shape and kv_count.dim() == 2, "kv_count must be [bs, channels]")
    pairs = kv_count.shape[0] * head_channels.numel()
    for name, ends in (("indptr", indptr), ("mask_indptr", mask_indptr)):
        ok = ends.dtype == torch.int32 and ends.dim() == 1 and ends.numel() > pairs
        expect(op, ok, f"{name} must be int32 [{pairs} + 1 or more], got {ends.dtype} {tuple(ends.shape)}")
    expect(op, indices.dtype == torch.int32, f"indices must be int32, got {indices.dtype}")
    expect(op, mask.dtype == torch.uint8, f"mask must be uint8, got {mask.dtype}")
