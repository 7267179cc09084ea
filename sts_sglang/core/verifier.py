"""What a verifier is."""

from __future__ import annotations

from typing import Protocol

import torch

from sts_kernels.layout import Lists
from sts_sglang.core.request import Request
from sts_sglang.core.selectors.base import LayerCall


class Verifier(Protocol):
    """Attends to what a selector chose, exactly: softmax over the selected tokens and the tail.

    on_host: whether it must know on the host who is in a round (`note`). host_plans: plans it made there.
    """

    on_host: bool
    host_plans: int

    def admit(self, requests: list[Request], keeps: list[float | None]) -> None:
        """A prefill batch, and the keep that each request asks for; its draft pass leaves their rows."""

    def note(self, requests: list[Request]) -> None:
        """Who is in the next round."""

    def before_graph(self, bs: int, capturing: bool) -> None:
        """On the host, before a CUDA graph of so many requests is captured or replayed."""

    def before_eager(self, bs: int) -> None:
        """On the host, before a verify without a graph."""

    def begin(self, lists: Lists | None, lens: torch.Tensor) -> None:
        """Once a round, before its first layer, and part of its graph: the lists of all layers; None where
        they are made layer by layer."""

    def attend(
        self, call: LayerCall, lists: Lists, channels: torch.Tensor, attended: torch.Tensor
    ) -> torch.Tensor:
        """[bs, T, H_q, D] in the dtype of the queries. channels: int32 [H_kv], columns of the lists that the
        KV heads go by. attended: int64 [2], adds the context tokens attended to and those there."""

    def nbytes(self) -> dict[str, int]:
        """Bytes by purpose, besides those of the round."""
