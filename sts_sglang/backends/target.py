"""Target backend: dense everywhere except verify, which attends to the draft's selection."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend

from sts_sglang.backends.draft import score_carried_rows
from sts_sglang.backends.reference import tail_masks, write_kv

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner

    from sts_kernels.reference import Plan
    from sts_sglang.backends.flashinfer_verify import FlashInferVerify
    from sts_sglang.importance import Selection
    from sts_sglang.runtime import StsRuntime


class StsTargetBackend(AttentionBackend):
    """Holds a dense backend for prefill and decode, and owns the sparse verify path.

    Args:
        model_runner: the target's.
        dense: attention backend for everything but sparse verify layers.
        dense_name: its name, see dense.name_for.
    """

    def __init__(self, model_runner: ModelRunner, dense: AttentionBackend, dense_name: str):
        super().__init__()
        self.dense, self.dense_name = dense, dense_name
        self.device = model_runner.device
        self.req_to_token_pool = model_runner.req_to_token_pool
        self.token_to_kv_pool = model_runner.token_to_kv_pool
        self.max_context_len = model_runner.model_config.context_len
        self.needs_cpu_seq_lens = dense.needs_cpu_seq_lens
        self.runtime: StsRuntime | None = None  # set by the draft-target binding
        self.headwise: FlashInferVerify | None = None  # under kernel flashinfer, set there too
        self._selection: Selection | None = None
        self._plan: Plan | None = None  # of the selection, see StsRuntime.plan_verify
        self._whole: Selection | None = None  # of dense layers that `dense` cannot verify
        self._tail_mask: torch.Tensor | None = None
        self._mask_buffer: torch.Tensor | None = None  # trees under CUDA graphs

    def support_triton(self) -> bool:
        return self.dense.support_triton()

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        self.dense.init_cuda_graph_state(max_bs, max_num_tokens)
        # SGLang fills the buffer for batches beyond the largest graph too.
        tokens, requests = max_num_tokens // max_bs, self.req_to_token_pool.req_to_token.shape[0]
        self._mask_buffer = torch.ones(requests * tokens * tokens, dtype=torch.bool, device=self.device)

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        return 1

    def get_verify_buffers_to_fill_after_draft(self):
        # The tree mask must be where the graph reads it; QLEN_ONLY, see compat.use_qlen_tree_mask.
        return [self._mask_buffer, None]

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        if self._dense_plans(forward_batch):
            self.dense.init_forward_metadata(forward_batch)
        if forward_batch.forward_mode.is_target_verify():
            if self.headwise is not None:
                self.headwise.plan_eager(forward_batch.batch_size)
            self._plan_verify(forward_batch)

    def init_forward_metadata_out_graph(self, forward_batch: ForwardBatch, in_capture: bool = False) -> None:
        if self._dense_plans(forward_batch):
            self.dense.init_forward_metadata_out_graph(forward_batch, in_capture=in_capture)
        if forward_batch.forward_mode.is_target_verify() and self.headwise is not None:
            self.headwise.plan_graph(forward_batch.batch_size, in_capture)

    def init_forward_metadata_in_graph(self, forward_batch: ForwardBatch) -> None:
        if self._dense_plans(forward_batch):
            self.dense.init_forward_metadata_in_graph(forward_batch)
        if forward_batch.forward_mode.is_target_verify():
            self._plan_verify(forward_batch)

    def forward_extend(self, q, k, v, layer, forward_batch, save_kv_cache=True, **kwargs):
        if layer.layer_id == 0 and self.runtime.state.history is not None:
            self.runtime.state.history.forget(forward_batch.out_cache_loc)
        if not forward_batch.forward_mode.is_target_verify():
            return self.dense.forward_extend(q, k, v, layer, forward_batch, save_kv_cache, **kwargs)
        if self.runtime.config.dense_verify(layer.layer_id):
            if self._whole is None:
                return self._verify_densely(q, k, v, layer, forward_batch, save_kv_cache, **kwargs)
            selection, plan = self._whole, None
        else:
            selection, plan = self._selection, self._plan
        if save_kv_cache and k is not None:
            write_kv(self.token_to_kv_pool, k, v, layer, forward_batch)
        return self._attend(selection, plan, q, layer, forward_batch)

    def forward_decode(self, q, k, v, layer, forward_batch, save_kv_cache=True, **kwargs):
        return self.dense.forward_decode(q, k, v, layer, forward_batch, save_kv_cache, **kwargs)

    def _dense_plans(self, fb: ForwardBatch) -> bool:
        """Whether the dense backend plans this forward: every one but verify, and that if it has layers.

        Verify's mask is QLEN_ONLY (compat.use_qlen_tree_mask). FA3 and FlashInfer read FULL_MASK, FlashInfer
        for chains too; torch reads either, but not in a graph. What they cannot verify attends whole by the
        sparse kernel."""
        if not fb.forward_mode.is_target_verify():
            return True
        able = {"fa3": fb.spec_info.topk == 1, "flashinfer": False, "torch": self._mask_buffer is None}
        return able[self.dense_name] and self.runtime.config.some_dense_verify

    def _plan_verify(self, fb: ForwardBatch) -> None:
        """Select per (request, channel); runs once a round, before the first layer."""
        runtime, table = self.runtime, self.req_to_token_pool.req_to_token
        if runtime.num_steps == 1:
            score_carried_rows(runtime, fb.req_pool_indices, fb.seq_lens)
        if runtime.config.sparse_draft:
            self._selection = runtime.state.selected(fb.batch_size)
        else:
            self._selection = runtime.state.select(runtime.ops, fb.req_pool_indices, fb.seq_lens, table)
        self._plan = runtime.plan_verify(self._selection, fb.seq_lens)
        whole = runtime.config.some_dense_verify and not self._dense_plans(fb)
        self._whole = self._selection.whole() if whole else None
        self._tail_mask = self._tail_masks(fb).contiguous()

    def _tail_masks(self, fb: ForwardBatch) -> torch.Tensor:
        tokens = fb.spec_info.draft_token_num
        if self._mask_buffer is None or fb.spec_info.topk == 1:
            return tail_masks(fb)
        return self._mask_buffer[: fb.batch_size * tokens * tokens].view(-1, tokens, tokens)

    def _verify_densely(self, q, k, v, layer, fb: ForwardBatch, save_kv_cache, **kwargs) -> torch.Tensor:
        there = (fb.seq_lens * (fb.req_pool_indices > 0)).sum()
        self.runtime.state.attended.add_(there * layer.tp_k_head_num)
        return self.dense.forward_extend(q, k, v, layer, fb, save_kv_cache, **kwargs)

    def _attend(
        self,
        selection: Selection,
        plan: Plan | None,
        q: torch.Tensor,
        layer: RadixAttention,
        fb: ForwardBatch,
    ) -> torch.Tensor:
        runtime = self.runtime
        rows = q.view(fb.batch_size, -1, layer.tp_q_head_num, layer.qk_head_dim)
        kv_indices, channels = runtime.state.kv_indices, runtime.head_channels(layer.layer_id)
        attend = runtime.ops.sparse_verify_attention
        if plan is not None:
            attend = partial(attend, plan=plan.of(layer.layer_id))
        if self.headwise is not None and selection is not self._whole:  # which nobody planned
            attend = partial(self.headwise.attend, layer.layer_id)
        if runtime.selector is not None:
            counts = selection.kv_count[:, channels.long()]
            kv_indices, *selection = self._select_by_layer(counts, rows, layer, fb)
            channels = runtime.selector.heads
        out = attend(
            rows,
            self.token_to_kv_pool.get_key_buffer(layer.layer_id),
            self.token_to_kv_pool.get_value_buffer(layer.layer_id),
            kv_indices,
            *selection,
            channels,
            self.req_to_token_pool.req_to_token,
            fb.req_pool_indices,
            fb.seq_lens,
            self._tail_mask,
            layer.scaling,
            runtime.state.attended,
        )
        return out.view(q.shape[0], -1)

    def _select_by_layer(self, counts, rows, layer: RadixAttention, fb: ForwardBatch):
        """Lists of another selector than the draft: kv_indices, kv_start, kv_count."""
        return self.runtime.selector.select(
            self.runtime.ops,
            layer.layer_id,
            rows,
            self.token_to_kv_pool.get_key_buffer(layer.layer_id),
            self.req_to_token_pool.req_to_token,
            fb.req_pool_indices,
            fb.seq_lens,
            self.runtime.state.columns(fb.seq_lens),
            counts,
            self._tail_mask,
            layer.scaling,
        )
