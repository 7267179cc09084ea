"""Verify by `sparse_attention` of this package: Triton kernels, or plain torch."""

from __future__ import annotations

import torch

from sts_kernels import Ops
from sts_kernels.layout import Lists, Plan
from sts_sglang.config import StsConfig
from sts_sglang.core.request import Request
from sts_sglang.core.selectors.base import LayerCall
from sts_sglang.core.sizes import Need
from sts_sglang.core.verifier import TargetShape, VerifierParts


class OpsVerifier:
    """Plans on the device, once a round for all layers, and knows nothing of requests.

    Args:
        ops: the ops in use. max_context: width of the table of slots.
    """

    on_host = False
    host_plans = 0

    def __init__(self, ops: Ops, max_context: int):
        self.ops, self.max_context = ops, max_context
        self._plan: Plan | None = None

    def admit(self, requests: list[Request], keeps: list[float | None]) -> None:
        """Lists say how long they are on the device."""

    def note(self, requests: list[Request]) -> None:
        """As `admit`."""

    def before_graph(self, bs: int, capturing: bool) -> None:
        """Nothing happens on the host."""

    def before_eager(self, bs: int) -> None:
        """Nothing happens on the host."""

    def begin(self, lists: Lists, channels: torch.Tensor, lens: torch.Tensor) -> None:
        self._plan = self.ops.plan_attention(lists, channels, lens, max_context=self.max_context)

    def attend(
        self, call: LayerCall, lists: Lists, channels: torch.Tensor, attended: torch.Tensor
    ) -> torch.Tensor:
        return self.ops.sparse_attention(
            call.q,
            call.pool,
            lists,
            channels,
            call.contexts,
            call.tail_mask,
            attended,
            scale=call.scale,
            plan=None if self._plan is None else self._plan.of(call.layer),
        )

    def nbytes(self) -> dict[str, int]:
        return {}


def refusal(config: StsConfig, topk: int | None) -> str | None:
    """Serves every configuration."""
    return None


def need(config: StsConfig, target: TargetShape) -> Need:
    """Partial results live as long as a kernel runs."""
    return Need()


def make(parts: VerifierParts) -> OpsVerifier:
    return OpsVerifier(parts.ops, parts.width)
