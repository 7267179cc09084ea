"""The processes of a tensor-parallel launch. Each scores, selects and verifies its own heads and sees none of
the others'; they meet here to say something of the whole."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import distributed

from sts_kernels.layout import Count

OF_REQUESTS = (
    Count.SPARSE_VERIFIES,
    Count.DENSE_VERIFIES,
    Count.FULL_VERIFIES,
    Count.ASIDE_VERIFIES,
    Count.SCORED_ROUNDS,
    Count.KEPT_ROUNDS,
)


class Ranks(NamedTuple):
    """rank: of this process, among `size`. group: of torch.distributed, for tensors on the CPU; None alone.

    What talks to the others waits for them: every rank has to call it, in the same order.
    """

    rank: int
    size: int
    group: Any = None

    def whole(self, totals: torch.Tensor) -> torch.Tensor:
        """int64 [by Count] of all ranks, given those of this one. Tokens are counted by KV head and add up (a
        head that several ranks have counts on each); a verify is sparse where it was on every rank."""
        if self.size == 1:
            return totals
        found = [torch.empty_like(totals) for _ in range(self.size)]
        distributed.all_gather(found, totals, group=self.group)
        by_rank = torch.stack(found)
        whole = by_rank.sum(0)
        for count in OF_REQUESTS:
            of_count = by_rank[:, count]
            whole[count] = of_count.min() if count == Count.SPARSE_VERIFIES else of_count.max()
        return whole

    def gather(self, rows: torch.Tensor) -> list[torch.Tensor] | None:
        """[n, L] of every rank in order on the first one, None on the others, given those of this rank on the
        CPU; L and the dtype are alike, n need not be."""
        if self.size == 1:
            return [rows]
        number = torch.tensor([len(rows)])
        numbers = [torch.empty_like(number) for _ in range(self.size)]
        distributed.all_gather(numbers, number, group=self.group)
        most = int(torch.cat(numbers).max())
        padded = rows.new_zeros(most, rows.shape[1])
        padded[: len(rows)] = rows
        found = [torch.empty_like(padded) for _ in range(self.size)] if self.rank == 0 else None
        distributed.gather(padded, found, group=self.group, group_dst=0)
        if found is None:
            return None
        return [of_rank[: int(n)] for of_rank, n in zip(found, numbers, strict=True)]


ALONE = Ranks(0, 1)
