"""Fresh importance: what the draft's latest rows say about each running request's context.

A round has these rows per request: the *carried* row (the last accepted token's, from the previous
draft-extend or the prefill; it stands for verify row 0) and one row per draft decode step and
branch. The last draft token never runs through the draft, so it has no row; rows are pooled per
request because tree nodes cannot be matched to the branches that ran.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch

from sts_sglang.headmap import SHIFT


class ImportanceRows:
    """Rows of the running requests, keyed by req_pool_idx. Each row is float32 [channels, draft keys].

    Batches change between the draft-extend that writes the carried row and the verify that reads it,
    so a carried row also says for which committed length it was made: a row of another length is a
    leftover of an earlier owner of the request slot and is not used.
    """

    def __init__(self, pool_rows: str, pool_heads: str):
        self.pool_rows = pool_rows
        self.pool_heads = pool_heads
        self._carried: dict[int, torch.Tensor] = {}
        self._steps: dict[int, dict[Hashable, torch.Tensor]] = {}

    def start_round(self) -> None:
        """Forget the step rows of the previous round."""
        self._steps.clear()

    def start_carried(self, req: int) -> None:
        """Forget the carried row of a request whose next one is about to be captured."""
        self._carried.pop(req, None)

    def add_carried(self, req: int, partial: torch.Tensor) -> None:
        """Combine one draft layer's part of the carried row."""
        self._carried[req] = self._combine(self._carried.get(req), partial)

    def add_step(self, req: int, row: Hashable, partial: torch.Tensor) -> None:
        """Combine one draft layer's part of a decode row; `row` tells step and branch."""
        rows = self._steps.setdefault(req, {})
        rows[row] = self._combine(rows.get(row), partial)

    def context(self, req: int, length: int) -> torch.Tensor | None:
        """Importance of the `length` committed tokens, float32 [channels, length], NaN = unknown.

        None when the request has no carried row for this length: then nothing is known about it.
        Position 0 has no draft score (SHIFT); the token at position `length` is the tail's.
        """
        carried = self._carried.get(req)
        if carried is None or carried.shape[1] != length:
            return None
        rows = [row[:, : length - SHIFT] for row in (carried, *self._steps.get(req, {}).values())]
        stacked = torch.stack(rows)
        pooled = stacked.amax(0) if self.pool_rows == "max" else stacked.mean(0)
        unknown = pooled.new_full((pooled.shape[0], SHIFT), torch.nan)
        return torch.cat([unknown, pooled], dim=1)

    def nbytes(self) -> int:
        """Bytes held now."""
        steps = (row for rows in self._steps.values() for row in rows.values())
        return sum(t.numel() * t.element_size() for t in (*self._carried.values(), *steps))

    def _combine(self, row: torch.Tensor | None, partial: torch.Tensor) -> torch.Tensor:
        if row is None:
            return partial
        return torch.maximum(row, partial) if self.pool_heads == "max" else row + partial
