"""Draft-extend on CUDA: SGLang's dense backends that also carry the last row of each request.

Imported on CUDA only: SGLang's module of FA3 loads its kernels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sglang.srt.layers.attention.flashattention_backend import FlashAttentionBackend
from sglang.srt.layers.attention.flashinfer_backend import FlashInferAttnBackend

from sts_sglang.backends.carry import CarryLastRow

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch


class FlashInfer(CarryLastRow, FlashInferAttnBackend):
    """Plans on the host in every round, as stock does."""


class FlashAttention(CarryLastRow, FlashAttentionBackend):
    """FA3, captured: its page table is a snapshot made before the replay."""

    def init_forward_metadata_in_graph(self, forward_batch: ForwardBatch) -> None:
        """Nothing: upstream reads req_to_token here once more, and by then the scheduler may write it.

        The draft-extend runner publishes its read-done event before the replay, and
        `init_forward_metadata_out_graph` has filled the same buffers by then.
        """


# The draft worker captures draft-extend for a closed list of classes, which this one runs under as it
# is (patches/0002): a virtual subclass of one on the list gets in and inherits nothing.
FlashInferAttnBackend.register(FlashAttention)
