"""Ops of draft-guided sparse attention (STS, arXiv 2605.15508), from scores to attention.

Eight functions in two implementations of the same signature: `ops("torch")` is the reference on any
device, `ops("triton")` the kernels. This package imports torch and triton and never sglang.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from sts_kernels.checks import IMPORTANCE_SCALE, UNKNOWN
from sts_kernels.reference import ALIGN, SHIFT, Members, Rule

__all__ = ["ALIGN", "IMPORTANCE_SCALE", "SHIFT", "UNKNOWN", "Members", "Ops", "Rule", "ops"]


class Ops(NamedTuple):
    """The steps of a round; see `sts_kernels.reference` for what they take and write."""

    draft_attention: Callable
    size_lists: Callable
    blend_history: Callable
    spread_importance: Callable
    select_tokens: Callable
    plan_verify: Callable
    sparse_verify_attention: Callable
    headwise_lists: Callable


def ops(kernel: str) -> Ops:
    """The steps by implementation, "torch" or "triton"; ValueError for another name."""
    if kernel == "torch":
        from sts_kernels import reference as headwise
        from sts_kernels import reference as history
        from sts_kernels import reference as score
        from sts_kernels import reference as select
        from sts_kernels import reference as sizes
        from sts_kernels import reference as spread
        from sts_kernels import reference as verify
    elif kernel == "triton":
        from sts_kernels import draft_attention as score
        from sts_kernels import headwise, history, select, sizes, spread, verify
    else:
        raise ValueError(f"kernel must be 'torch' or 'triton', got {kernel!r}")
    return Ops(
        score.draft_attention,
        sizes.size_lists,
        history.blend_history,
        spread.spread_importance,
        select.select_tokens,
        verify.plan_verify,
        verify.sparse_verify_attention,
        headwise.headwise_lists,
    )
