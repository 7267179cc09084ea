"""Selection: which context tokens the target may attend to, per (request, channel)."""

from __future__ import annotations

import torch

from sts_kernels.checks import expect_dims, expect_indptr


def select_tokens(
    importance: torch.Tensor,
    ctx_indptr: torch.Tensor,
    budgets: torch.Tensor,
    sink: int,
    recent: int,
    top_p: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sink, recent and the top of importance, at most `budgets[b]` tokens of request b's context.

    Order of preference: sink and recent, then unknown tokens (never lose for want of a score), then
    by importance. Of equal importance the later position wins. A budget of at least the context is
    the identity.

    Args:
        importance: float [channels, nnz], position-ordered per request, NaN where unknown.
        ctx_indptr: int [bs + 1] offsets of the requests in the second dimension.
        budgets: int [bs], each at least min(context, sink + recent).
        sink: first tokens of the context that are always selected.
        recent: last tokens of the context that are always selected.
        top_p: float [bs] or None. A finite entry selects, within the budget, the smallest set that
            holds this part of the channel's importance (unknown tokens are in it); None or an
            infinite entry selects exactly min(context, budget).

    Returns:
        (indptr, positions): int64 [bs * channels + 1] offsets, request-major, and int64 positions
        within the request's context, ascending.

    Raises:
        ValueError: on shapes that do not fit or a budget below sink + recent.
    """
    op = "select_tokens"
    expect_dims(op, importance=(importance, 2), budgets=(budgets, 1))
    expect_indptr(op, "ctx_indptr", ctx_indptr, budgets.numel())
    offsets = ctx_indptr.tolist()
    chosen: list[torch.Tensor] = []
    top_ps = [torch.inf] * budgets.numel() if top_p is None else top_p.tolist()
    for start, end, budget, p in zip(offsets[:-1], offsets[1:], budgets.tolist(), top_ps, strict=True):
        if budget < min(end - start, sink + recent):
            raise ValueError(f"{op}: budget {budget} is below sink {sink} + recent {recent}")
        chosen.extend(_select_row(row, budget, sink, recent, p) for row in importance[:, start:end])
    lengths = torch.tensor([0] + [c.numel() for c in chosen], dtype=torch.int64)
    positions = torch.cat(chosen) if chosen else torch.empty(0, dtype=torch.int64)
    return lengths.cumsum(0).to(importance.device), positions.to(importance.device)


def _select_row(scores: torch.Tensor, budget: int, sink: int, recent: int, top_p: float) -> torch.Tensor:
    """Ascending positions of one (request, channel)."""
    context = scores.numel()
    forced = torch.zeros(context, dtype=torch.bool, device=scores.device)
    forced[:sink] = True
    forced[max(context - recent, 0) :] = True
    rank = scores.nan_to_num(nan=torch.inf).masked_fill(forced, torch.inf)
    # A stable sort of the reversed row puts the later of two equal positions first; forced tokens
    # come before unknown ones, which the second key (stable again) restores.
    order = context - 1 - torch.argsort(rank.flip(0), descending=True, stable=True)
    order = order[torch.argsort(forced[order].int(), descending=True, stable=True)]
    count = min(context, budget)
    if top_p != torch.inf:
        count = min(count, _top_p_count(scores, forced, order, top_p))
    return order[:count].sort().values


def _top_p_count(scores: torch.Tensor, forced: torch.Tensor, order: torch.Tensor, top_p: float) -> int:
    """Length of the shortest prefix of `order` with `top_p` of the mass and all that must be in."""
    mass = scores.nan_to_num(nan=0.0).double()[order].cumsum(0)
    must = int((forced | scores.isnan()).sum())
    if mass.numel() == 0 or mass[-1] <= 0:
        return must
    reached = int(torch.searchsorted(mass, top_p * mass[-1] * (1 - 1e-12))) + 1
    return max(must, min(reached, mass.numel()))
