"""Draft-extend on CUDA: SGLang's dense backends that also carry the last row of each request.

Imported on CUDA only: SGLang's module of FA3 loads its kernels.
"""

from __future__ import annotations

from sglang.srt.layers.attention.flashattention_backend import FlashAttentionBackend
from sglang.srt.layers.attention.flashinfer_backend import FlashInferAttnBackend
from sglang.srt.model_executor.model_runner import ModelRunner

from sts_sglang.backends.carry import CarryLastRow
from sts_sglang.host import views


class FlashInfer(CarryLastRow, FlashInferAttnBackend):
    """Plans on the host in every round, as stock does."""


@views.captured_draft_extend
class FlashAttention(CarryLastRow, FlashAttentionBackend):
    """FA3, captured in a CUDA graph."""

    def __init__(self, model_runner: ModelRunner, **kwargs):
        super().__init__(model_runner, **kwargs)
        views.reads_own_kv(self)
