"""Argument checks shared by the ops: one line that says what came and what was expected."""

from __future__ import annotations

import torch


def expect_dims(op: str, **tensors: tuple[torch.Tensor, int]) -> None:
    """Raise ValueError unless every `name=(tensor, dims)` has that number of dimensions."""
    for name, (tensor, dims) in tensors.items():
        if tensor.dim() != dims:
            raise ValueError(f"{op}: {name} must have {dims} dimensions, got shape {tuple(tensor.shape)}")


def expect_indptr(op: str, name: str, indptr: torch.Tensor, rows: int) -> None:
    """Raise ValueError unless `indptr` is a 1-D integer tensor of rows + 1 offsets."""
    if indptr.dim() != 1 or indptr.numel() != rows + 1 or indptr.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"{op}: {name} must be int32 or int64 [{rows + 1}], got {indptr.dtype} {tuple(indptr.shape)}"
        )
