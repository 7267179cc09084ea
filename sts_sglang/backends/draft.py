"""Draft backends: dense attention that leaves the importance of its rows behind."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from sts_kernels import row_importance

from sts_sglang.backends.reference import Segment, TorchBackend

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner

    from sts_sglang.runtime import StsRuntime


class _CapturingBackend(TorchBackend):
    """Dense torch attention; subclasses say which rows are captured and where they go."""

    def __init__(self, model_runner: ModelRunner):
        super().__init__(model_runner)
        self.runtime: StsRuntime | None = None  # set by the draft-target binding

    def forward_extend(self, q, k, v, layer, forward_batch, save_kv_cache=True, **kwargs):
        out = super().forward_extend(q, k, v, layer, forward_batch, save_kv_cache, **kwargs)
        rows = self.captured_rows()
        if self.runtime is not None and rows:
            queries = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
            self._capture(queries, rows, layer)
        return out

    forward_decode = forward_extend

    def captured_rows(self) -> list[tuple[int, Segment]]:
        """(query row, segment cut to the keys that row sees) of every row to capture."""
        raise NotImplementedError

    def store(self, index: int, segment: Segment, partial: torch.Tensor) -> None:
        """Keep one captured row's part from the current layer."""
        raise NotImplementedError

    def _capture(self, q: torch.Tensor, rows: list[tuple[int, Segment]], layer: RadixAttention) -> None:
        lengths = torch.tensor([0] + [segment.slots.numel() for _, segment in rows])
        partial = row_importance(
            q[[row for row, _ in rows]],
            self.kv_buffers(layer)[0],
            lengths.cumsum(0),
            torch.cat([segment.slots for _, segment in rows]),
            self.runtime.channel_weights(layer.layer_id, layer.tp_q_head_num),
            layer.scaling,
            self.runtime.config.pool_heads,
        )
        parts = partial.split(lengths[1:].tolist(), dim=1)
        for index, ((_, segment), part) in enumerate(zip(rows, parts, strict=True)):
            self.store(index, segment, part)


class DraftExtendBackend(_CapturingBackend):
    """Draft prefill and draft-extend: captures the row of each request's last accepted token.

    That row belongs to the bonus token, verify row 0 of the next round.
    """

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        super().init_forward_metadata(forward_batch)
        self._rows = []
        if self.runtime is None or not self.segments:
            return
        # Prefill keeps its last row; draft-extend runs all T rows and only those accepted count.
        accepted = getattr(forward_batch.spec_info, "num_accept_tokens", None)
        ends = [s.end - s.start for s in self.segments] if accepted is None else accepted.tolist()
        for segment, end in zip(self.segments, ends, strict=True):
            hidden = segment.end - segment.start - end  # keys of rows after the captured one
            seen = segment.slots[: segment.slots.numel() - hidden]
            self._rows.append((segment.start + end - 1, segment._replace(slots=seen)))
            self.runtime.rows.start_carried(segment.req)

    def captured_rows(self) -> list[tuple[int, Segment]]:
        return self._rows

    def store(self, index: int, segment: Segment, partial: torch.Tensor) -> None:
        self.runtime.rows.add_carried(segment.req, partial)


class DraftStepBackend(_CapturingBackend):
    """One draft decode step: captures every row (one per request and branch)."""

    def __init__(self, model_runner: ModelRunner, step: int, topk: int, num_steps: int):
        super().__init__(model_runner)
        self.step, self.topk, self.num_steps = step, topk, num_steps

    def _decode_segments(self, fb: ForwardBatch) -> list[Segment]:
        """A branch sees the committed tokens and its own scratch slots [L + branch * S, + step]."""
        segments = []
        for req, length in zip(fb.req_pool_indices.tolist(), fb.seq_lens.tolist(), strict=True):
            committed = self.request_slots(req, length)
            for branch in range(self.topk):
                scratch = length + branch * self.num_steps
                own = self.request_slots(req, scratch + self.step + 1, scratch)
                row = len(segments)
                segments.append(Segment(req, row, row + 1, torch.cat([committed, own]), None))
        return segments

    def captured_rows(self) -> list[tuple[int, Segment]]:
        return [(segment.start, segment) for segment in self.segments]

    def store(self, index: int, segment: Segment, partial: torch.Tensor) -> None:
        self.runtime.rows.add_step(segment.req, (self.step, index % self.topk), partial)


class DraftMultiStepBackend:
    """The container SGLang's draft worker expects: one backend per decode step (S - 1 of them)."""

    needs_cpu_seq_lens = True

    def __init__(self, model_runner: ModelRunner, topk: int, num_steps: int):
        self.runtime: StsRuntime | None = None  # set by the draft-target binding
        self.attn_backends = [
            DraftStepBackend(model_runner, step, topk, num_steps) for step in range(num_steps - 1)
        ]

    def bind(self, runtime: StsRuntime) -> None:
        """Give every step its destination."""
        for backend in (self, *self.attn_backends):
            backend.runtime = runtime

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        if self.runtime is not None:
            self.runtime.rows.start_round()
        for backend in self.attn_backends:
            backend.init_forward_metadata(forward_batch)
