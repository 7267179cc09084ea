"""Target backend: dense everywhere except verify, which attends to the draft's selection."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sts_kernels import select_tokens, sparse_verify_attention

from sts_sglang.backends.reference import TorchBackend, tail_masks

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner

    from sts_sglang.runtime import StsRuntime


@dataclass
class VerifyPlan:
    """What one verify round attends to; the same for every sparse layer."""

    kv_indptr: torch.Tensor  # int64 [bs * channels + 1]
    kv_indices: torch.Tensor  # int64 [nnz] slots
    tail_slots: torch.Tensor  # int64 [bs, T]
    tail_mask: torch.Tensor  # bool [bs, T, T]
    lengths: list[int]  # committed tokens per request
    unknown: int  # requests without importance, attended whole


class StsTargetBackend(AttentionBackend):
    """Holds a dense backend for prefill and decode, and owns the sparse verify path."""

    def __init__(self, model_runner: ModelRunner):
        super().__init__()
        self.dense = TorchBackend(model_runner)
        self.device = self.dense.device
        self.req_to_token_pool = self.dense.req_to_token_pool
        self.token_to_kv_pool = self.dense.token_to_kv_pool
        self.max_context_len = self.dense.max_context_len
        self.num_layers = model_runner.model_config.num_hidden_layers
        self.runtime: StsRuntime | None = None  # set by the draft-target binding
        self.plan: VerifyPlan | None = None

    def support_triton(self) -> bool:
        return False

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        self.plan = None
        verify = forward_batch.forward_mode.is_target_verify()
        if not verify or self.runtime.config.dense_layers:
            self.dense.init_forward_metadata(forward_batch)
        if verify:
            self.plan = self._plan_verify(forward_batch)

    def forward_extend(self, q, k, v, layer, forward_batch, save_kv_cache=True, **kwargs):
        if self.plan is None:
            return self.dense.forward_extend(q, k, v, layer, forward_batch, save_kv_cache, **kwargs)
        if save_kv_cache and k is not None:
            self.dense.write_kv(k, v, layer, forward_batch)
        if layer.layer_id in self.runtime.config.dense_layers:
            out = self.dense.attend(q, layer)
            self._count(layer, selected=sum(self.plan.lengths) * layer.tp_k_head_num)
        else:
            out = self._attend_selected(q, layer)
        return out

    def forward_decode(self, q, k, v, layer, forward_batch, save_kv_cache=True, **kwargs):
        return self.dense.forward_decode(q, k, v, layer, forward_batch, save_kv_cache, **kwargs)

    def _plan_verify(self, fb: ForwardBatch) -> VerifyPlan:
        """Select per (request, channel) and look the slots up."""
        runtime, config = self.runtime, self.runtime.config
        reqs, lengths = fb.req_pool_indices.tolist(), fb.seq_lens.tolist()
        rows = [runtime.rows.context(req, length) for req, length in zip(reqs, lengths, strict=True)]
        unknown = torch.tensor([row is None for row in rows], device=self.device)
        keeps = torch.tensor(
            [runtime.request_keep.get(req, torch.nan) for req in reqs],
            dtype=torch.float64,
            device=self.device,
        )
        budgets = torch.where(unknown, fb.seq_lens, config.budget_tokens(fb.seq_lens, keeps))
        top_p = None
        if config.policy == "top_p":
            top_p = torch.where(unknown | ~keeps.isnan(), torch.inf, config.top_p)
        channels = len(runtime.head_map.channels)
        scores = [
            torch.zeros(channels, length, device=self.device) if row is None else row
            for row, length in zip(rows, lengths, strict=True)
        ]
        indptr, positions = select_tokens(
            torch.cat(scores, dim=1),
            torch.tensor([0, *lengths]).cumsum(0),
            budgets,
            config.sink,
            config.recent,
            top_p,
        )
        tokens = fb.spec_info.draft_token_num
        per_request = positions.split((indptr[channels::channels] - indptr[:-1:channels]).tolist())
        table = self.req_to_token_pool.req_to_token
        return VerifyPlan(
            kv_indptr=indptr,
            kv_indices=torch.cat(
                [table[req, chosen].long() for req, chosen in zip(reqs, per_request, strict=True)]
            ),
            tail_slots=torch.stack(
                [self.dense.request_slots(req, n + tokens, n) for req, n in zip(reqs, lengths, strict=True)]
            ),
            tail_mask=tail_masks(fb),
            lengths=lengths,
            unknown=int(unknown.sum()),
        )

    def _attend_selected(self, q: torch.Tensor, layer: RadixAttention) -> torch.Tensor:
        plan = self.plan
        bs, tokens = plan.tail_slots.shape
        keys, values = self.dense.kv_buffers(layer)
        head_channels = self.runtime.head_channels(layer.layer_id)
        out = sparse_verify_attention(
            q.reshape(bs, tokens, layer.tp_q_head_num, layer.qk_head_dim),
            keys,
            values,
            plan.kv_indptr,
            plan.kv_indices,
            head_channels,
            plan.tail_slots,
            plan.tail_mask,
            layer.scaling,
        )
        attended = plan.kv_indptr.diff().view(bs, -1)[:, head_channels]
        self._count(layer, selected=int(attended.sum()))
        return out.reshape(bs * tokens, -1)

    def _count(self, layer: RadixAttention, selected: int) -> None:
        """Count what this layer attended to; requests are counted with the last layer."""
        counters, plan = self.runtime.counters, self.plan
        counters.selected_tokens += selected
        counters.available_tokens += sum(plan.lengths) * layer.tp_k_head_num
        if layer.layer_id == self.num_layers - 1:
            counters.dense_verifies += plan.unknown
            counters.sparse_verifies += len(plan.lengths) - plan.unknown
