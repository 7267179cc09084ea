"""What KV slots remember of the importance their tokens had in earlier rounds."""

from __future__ import annotations

import torch

from sts_kernels import Ops
from sts_kernels.layout import UNKNOWN, Contexts, History, Scores
from sts_sglang.config import StsConfig


class SlotHistory:
    """Importance by the slot of the *target's* token, in buffers as long as the KV pool.

    A slot forgets when the target writes it for a token, so what it remembers is of its present
    occupant, whatever happened in between (eviction, flush, abort, retraction): no hook on the
    allocator is needed. HiCache writes slots without a forward, and says which. Requests with a
    common prefix share its slots, and so what was learned of it.

    Args:
        config: how much of a score comes from history, and how fast it fades.
        channels: of the head map. slots: of the KV pool. requests: rows of the table of slots.
        dtype: of importance. device: where it lives.
    """

    def __init__(
        self,
        config: StsConfig,
        channels: int,
        slots: int,
        requests: int,
        device: str,
        dtype: torch.dtype,
    ):
        self.config = config
        self.remembered = torch.full((slots, channels), UNKNOWN, dtype=dtype, device=device)
        self.owner = torch.zeros(slots, dtype=torch.int64, device=device)
        self.round = torch.zeros(1, dtype=torch.int64, device=device)
        self.fresh_request = torch.zeros(requests, dtype=torch.bool, device=device)

    def forget(self, slots: torch.Tensor) -> None:
        """The target writes these slots now."""
        # index_fill_, here and below: assigning a Python number copies from the host, which no graph holds.
        self.remembered.index_fill_(0, slots, UNKNOWN)

    def blend(self, ops: Ops, scores: Scores, contexts: Contexts) -> None:
        """Mix history into the importance of a verify batch, and let its slots remember the batch."""
        self.round += 1
        weight = torch.full_like(contexts.lens, self.config.history_weight, dtype=torch.float32)
        if self.config.history == "warm":
            weight = weight * self.fresh_request[contexts.reqs]
        self.fresh_request.index_fill_(0, contexts.reqs, False)
        history = History(self.remembered, self.owner, self.round)
        ops.blend_history(scores, contexts, history, weight, decay=self.config.history_decay)

    def nbytes(self) -> int:
        return self.remembered.nbytes + self.owner.nbytes
