"""Target backend: dense everywhere except verify, and decode without a draft, which attend to what was
selected."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend

from sts_kernels.layout import Contexts, Lists
from sts_sglang.backends.bindable import Bindable
from sts_sglang.backends.torch_dense import tail_masks
from sts_sglang.core.block_selectors import BlockCall
from sts_sglang.core.selectors.base import LayerCall
from sts_sglang.host import views
from sts_sglang.host.views import Mode

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner


@views.offers_tree_mask
@views.reads_table_to_the_end
class StsTargetBackend(Bindable, AttentionBackend):
    """Holds a dense backend for prefill, and owns the sparse verify path; a decode step without a draft is a
    verify of one token.

    Args:
        model_runner: the target's.
        dense: attention backend for everything but sparse verify layers.
        dense_name: its name, see dense.choose.
    """

    def __init__(self, model_runner: ModelRunner, dense: AttentionBackend, dense_name: str):
        super().__init__()
        # SGLang reads these three of a backend.
        self.req_to_token_pool = model_runner.req_to_token_pool
        self.token_to_kv_pool = model_runner.token_to_kv_pool
        self.max_context_len = model_runner.model_config.context_len
        self.dense, self.dense_name = dense, dense_name
        self.device = model_runner.device
        self.table = views.slots_of(self.req_to_token_pool)
        self.pools = views.pools(model_runner)
        self.needs_cpu_seq_lens = dense.needs_cpu_seq_lens
        # Of the running verify: its contexts, its lists, and whole contexts for dense layers that `dense`
        # cannot verify.
        self._contexts: Contexts | None = None
        self._lists: Lists | None = None
        self._whole: Lists | None = None
        self._tail_mask: torch.Tensor | None = None  # of the same
        self.tree_mask_buffer: torch.Tensor | None = None  # trees under CUDA graphs: where these read them

    def support_triton(self) -> bool:
        return self.dense.support_triton()

    @property
    def reads_table(self) -> bool:
        """Whether a decode graph reads the table of slots in its layers. Where it stands aside the metadata
        of SGLang's own backends, made before it, has been all that did."""
        return not self.runtime.aside.now or self.dense_name == "torch"

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        self.dense.init_cuda_graph_state(max_bs, max_num_tokens)
        # SGLang fills the buffer for batches beyond the largest graph too.
        tokens, requests = max_num_tokens // max_bs, self.table.shape[0]
        self.tree_mask_buffer = torch.ones(requests * tokens * tokens, dtype=torch.bool, device=self.device)

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        return 1

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        if self._dense_plans(forward_batch):
            self.dense.init_forward_metadata(forward_batch)
        if views.mode(forward_batch) == Mode.PREFILL:
            self._begin_prefill(forward_batch)
        if self._selects(forward_batch):
            self._before_verify(forward_batch)
            if not self.runtime.aside.now:
                self.runtime.verifier.before_eager(views.requests_of(forward_batch).size)
            self._begin_verify(forward_batch)

    def init_forward_metadata_out_graph(self, forward_batch: ForwardBatch, in_capture: bool = False) -> None:
        aside = self._selects(forward_batch) and self.runtime.aside.now
        if self._dense_plans(forward_batch):
            # What the first of two graphs of a batch size has bound, both replay.
            bound = aside and self.runtime.config.some_dense_verify
            in_dense = in_capture and not bound
            self.dense.init_forward_metadata_out_graph(forward_batch, in_capture=in_dense)
        if self._selects(forward_batch):
            if not in_capture:
                self._before_verify(forward_batch)
            if not aside:
                self.runtime.verifier.before_graph(views.requests_of(forward_batch).size, in_capture)

    def init_forward_metadata_in_graph(self, forward_batch: ForwardBatch) -> None:
        if self._dense_plans(forward_batch):
            self.dense.init_forward_metadata_in_graph(forward_batch)
        if self._selects(forward_batch):
            self._begin_verify(forward_batch)

    def forward_extend(self, q, k, v, layer, forward_batch, save_kv_cache=True, **kwargs):
        runtime, of = self.runtime, views.layer(layer)
        if of.number == 0 and runtime.state.history is not None:
            runtime.state.history.forget(views.written(forward_batch))
        if self._selects(forward_batch):
            return self._attend(q, k, v, layer, forward_batch, save_kv_cache, **kwargs)
        if self._prefills_sparsely(forward_batch, of):
            out = self._prefill(q, k, v, layer, forward_batch, save_kv_cache, **kwargs)
        else:
            out = self.dense.forward_extend(q, k, v, layer, forward_batch, save_kv_cache, **kwargs)
        runtime.prefilled(of.number, self.pools)
        return out

    def forward_decode(self, q, k, v, layer, forward_batch, save_kv_cache=True, **kwargs):
        if self._selects(forward_batch):
            return self._attend(q, k, v, layer, forward_batch, save_kv_cache, **kwargs)
        return self.dense.forward_decode(q, k, v, layer, forward_batch, save_kv_cache, **kwargs)

    def _attend(self, q, k, v, layer, forward_batch, save_kv_cache, **kwargs) -> torch.Tensor:
        """To what was selected or, in a dense layer, to everything."""
        runtime, of = self.runtime, views.layer(layer)
        _check_plain(of, kwargs)
        attend, lists, aside = runtime.verify, self._lists, runtime.aside.now
        if aside or runtime.config.dense_verify(of.number):
            if self._dense_verifies(forward_batch):
                if not aside:  # which has counted them all at once
                    self._count_dense(of)
                decodes = views.mode(forward_batch) == Mode.DECODE
                dense = self.dense.forward_decode if decodes else self.dense.forward_extend
                return dense(q, k, v, layer, forward_batch, save_kv_cache, **kwargs)
            attend, lists = runtime.verify_whole, self._whole
        if save_kv_cache and k is not None:
            self.pools.write(k, v, layer, forward_batch)
        return attend(self._call(q, of), lists).view(-1, of.q_heads * of.v_head_dim)

    def _prefills_sparsely(self, fb: ForwardBatch, of: views.Layer) -> bool:
        prefill = self.runtime.prefill
        return prefill is not None and views.mode(fb) == Mode.PREFILL and prefill.attends(of.number)

    def _prefill(self, q, k, v, layer, forward_batch, save_kv_cache, **kwargs) -> torch.Tensor:
        """To what is selected for the new tokens."""
        of = views.layer(layer)
        _check_plain(of, kwargs)
        if save_kv_cache and k is not None:
            self.pools.write(k, v, layer, forward_batch)
        rows, pool = q.view(-1, of.q_heads, of.head_dim), self.pools.layer(of.number)
        return self.runtime.prefill.attend(BlockCall(of.number, rows, pool, of.scale)).flatten(1)

    def _selects(self, fb: ForwardBatch) -> bool:
        """Whether a forward attends to a selection: verify does, and decode where nothing is drafted."""
        mode = views.mode(fb)
        return mode == Mode.VERIFY or (mode == Mode.DECODE and self.runtime.draft is None)

    def _dense_plans(self, fb: ForwardBatch) -> bool:
        """Whether the dense backend plans this forward: one that selects nothing, or where it has layers."""
        if not self._selects(fb):
            return True
        some = self.runtime.aside.now or self.runtime.config.some_dense_verify
        return some and self._dense_verifies(fb)

    def _dense_verifies(self, fb: ForwardBatch) -> bool:
        """Whether the dense backend can verify, or decode.

        The mask is QLEN_ONLY (views.offers_tree_mask): FA3 and FlashInfer read FULL_MASK, FlashInfer for
        chains too; torch reads either, but not in a graph. What they cannot verify attends whole by the
        sparse kernel.
        """
        able = {
            "fa3": views.tree(fb).topk == 1,
            "flashinfer": views.mode(fb) == Mode.DECODE,
            "torch": self.tree_mask_buffer is None,
        }
        return able[self.dense_name]

    def _begin_prefill(self, fb: ForwardBatch) -> None:
        """Before the first layer."""
        contexts = views.requests_of(fb).contexts(self.table)
        self.runtime.begin_prefill(contexts, views.new_rows(fb).before)
        if self.runtime.prefill is not None:
            self.runtime.prefill.begin(contexts, *views.new_rows_on_host(fb))

    def _before_verify(self, fb: ForwardBatch) -> None:
        """On the host, and outside of graphs: sketch what came while this batch stood aside."""
        if most := self.runtime.aside.take_due():
            self.runtime.catch_up(views.committed(fb).contexts(self.table), most, self.pools)

    def _begin_verify(self, fb: ForwardBatch) -> None:
        """Once a round, before the first layer."""
        runtime, by_dense = self.runtime, self._dense_verifies(fb)
        self._contexts = views.committed(fb).contexts(self.table)
        if runtime.aside.now:
            self._lists, self._whole = None, runtime.begin_aside(self._contexts, by_dense)
        else:
            self._lists = runtime.begin_verify(self._contexts, views.tree(fb)[0])
            whole = runtime.config.some_dense_verify and not by_dense
            self._whole = runtime.plan_whole(self._lists, self._contexts) if whole else None
        if runtime.sketches is not None:
            runtime.sketches.forget(views.written(fb))
        ours = not runtime.aside.now or not by_dense
        self._tail_mask = self._tail_masks(fb).contiguous() if ours else None

    def _tail_masks(self, fb: ForwardBatch) -> torch.Tensor:
        tokens, topk, _ = views.tree(fb)
        if self.tree_mask_buffer is None or topk == 1:
            return tail_masks(fb)
        bs = views.requests_of(fb).size
        return self.tree_mask_buffer[: bs * tokens * tokens].view(-1, tokens, tokens)

    def _call(self, q: torch.Tensor, of: views.Layer) -> LayerCall:
        rows = q.view(self._contexts.lens.numel(), -1, of.q_heads, of.head_dim)
        pool = self.pools.layer(of.number)
        return LayerCall(of.number, rows, pool, self._contexts, self._tail_mask, of.scale)

    def _count_dense(self, of: views.Layer) -> None:
        _, reqs, lens = self._contexts
        there = (lens * (reqs > 0)).sum()
        self.runtime.state.attended.add_(there * of.kv_heads)


def _check_plain(of: views.Layer, kwargs: dict) -> None:
    """Raises RuntimeError for sinks, or parts of a key: what no kernel of ours would use."""
    if kwargs:
        raise RuntimeError(f"STS: layer {of.number} asks its attention for {', '.join(sorted(kwargs))}")
