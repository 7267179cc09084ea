"""What a verifier is, and what a kind of verifiers says of itself before one is made."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch

from sts_kernels import Ops
from sts_kernels.layout import Lists
from sts_sglang.config import StsConfig
from sts_sglang.core.channels import Channels
from sts_sglang.core.request import Request
from sts_sglang.core.round import RoundState
from sts_sglang.core.selectors.base import LayerCall
from sts_sglang.core.sizes import Need
from sts_sglang.headmap import HeadMap


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

    def begin(self, lists: Lists, channels: torch.Tensor, lens: torch.Tensor) -> None:
        """Once a round, before its first layer, and part of its graph: where the lists of all layers are and
        how long. channels: int32 [layers, H_kv], columns of them that the KV heads go by."""

    def attend(
        self, call: LayerCall, lists: Lists, channels: torch.Tensor, attended: torch.Tensor
    ) -> torch.Tensor:
        """[bs, T, H_q, D] in the dtype of the queries. channels: int32 [H_kv], columns of the lists that the
        KV heads go by. attended: int64 [2], adds the context tokens attended to and those there."""

    def nbytes(self) -> dict[str, int]:
        """Bytes by purpose, besides those of the round."""


class TargetShape(NamedTuple):
    """The target as a launch knows it.

    tokens: T, that a verify checks. dtype: of its queries. kv_dtype: of keys and values as they are kept.
    requests: of the largest batch. graph_requests: of the largest graph, 0 without. slots: rows of the KV
    pool's buffers, 0 before it has a size.
    """

    tokens: int
    layers: int
    q_heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    kv_dtype: torch.dtype
    context_len: int
    requests: int
    graph_requests: int
    slots: int = 0


class VerifierParts(NamedTuple):
    """What a verifier is made of. width: positions in the table of slots. target: None without one."""

    config: StsConfig
    head_map: HeadMap
    channels: Channels
    state: RoundState
    ops: Ops
    width: int
    target: TargetShape | None


class Kind(Protocol):
    """A module of `verifiers/`, as `verifiers.registry` lists it by the configuration's `kernel`."""

    def refusal(self, config: StsConfig, topk: int | None) -> str | None:
        """What of this launch it does not serve, or None."""

    def need(self, config: StsConfig, target: TargetShape) -> Need:
        """What it takes beside the buffers of a round."""

    def make(self, parts: VerifierParts) -> Verifier:
        """Raises ConfigError where the models are too large for it."""
