"""The draft's prefill and draft-extend: dense attention that keeps the row of each request's last token."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sts_kernels.layout import Contexts, Lists, Plan
from sts_sglang.backends.bindable import Bindable
from sts_sglang.backends.torch_dense import TorchBackend, chain_mask
from sts_sglang.core.block_selectors import BlockCall
from sts_sglang.core.selectors.base import LayerCall
from sts_sglang.host import views
from sts_sglang.host.views import Mode

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch


class CarryLastRow(Bindable):
    """Mixin of a dense backend for the draft's prefill and draft-extend (see dense.of_draft_extend).

    Keeps the query of each request's last accepted token: that row is the bonus token's, verify row 0
    of the next round. With `draft` "extend", "all" or "every", draft-extend attends to the round's selection;
    with `prefill_draft` "sparse" a prefill attends to blocks of keys.
    """

    # Of the running forward: each request's row, the queries so far, and whether it is a prefill.
    _rows: torch.Tensor | None = None
    _queries: list[torch.Tensor] | None = None
    _prefill = False
    # Of the running sparse draft-extend: its requests before their rows, what the round selected, how to part
    # it, and the mask of the rows.
    _contexts: Contexts | None = None
    _lists: Lists | None = None
    _plan: Plan | None = None
    _seen: torch.Tensor | None = None

    def forward_extend(self, q, k, v, layer, forward_batch, save_kv_cache=True, **kwargs):
        if self.runtime.config.sparse_extend and views.mode(forward_batch) == Mode.DRAFT_EXTEND:
            if save_kv_cache and k is not None:
                self.runtime.draft.pools.write(k, v, layer, forward_batch)
            out = self._extend_sparsely(q, layer, forward_batch)
        elif self._prefills_sparsely(layer, forward_batch):
            if save_kv_cache and k is not None:
                self.runtime.draft.pools.write(k, v, layer, forward_batch)
            out = self._prefill_sparsely(q, layer)
        else:
            out = super().forward_extend(q, k, v, layer, forward_batch, save_kv_cache, **kwargs)
            self._tell_prefill(q, views.layer(layer))
        self._carry(q, views.layer(layer), forward_batch)
        return out

    def _carry(self, q: torch.Tensor, layer: views.Layer, fb: ForwardBatch) -> None:
        """Note the layer's queries; with the last one that speaks, keep the rows."""
        state, reqs = self.runtime.state, views.requests_of(fb).reqs.long()
        if layer.number == 0:
            self._rows, committed, self._prefill = last_rows(fb)
            self._queries = []
            state.carry_lengths(reqs, committed, self._prefill)
        if layer.number not in state.carried_q:
            return
        queries = q.view(-1, layer.q_heads, layer.head_dim)
        # A prompt has many rows, and another layer's may take their place.
        self._queries.append(queries.index_select(0, self._rows) if self._prefill else queries)
        if layer.number == max(state.carried_q):
            state.carry(reqs, self._queries, None if self._prefill else self._rows)
            self._queries = []

    def _tell_prefill(self, q: torch.Tensor, layer: views.Layer) -> None:
        """Where the draft reads a prompt before the target does, so that its attention selects for that."""
        prefill = self.runtime.prefill
        if prefill is not None and prefill.listens:
            prefill.hear(layer.number, q.view(-1, layer.q_heads, layer.head_dim))

    def _prefills_sparsely(self, layer: RadixAttention, fb: ForwardBatch) -> bool:
        prefill, number = self.runtime.draft_prefill, views.layer(layer).number
        if prefill is None or views.mode(fb) != Mode.PREFILL:
            return False
        if number == 0:
            contexts = views.requests_of(fb).contexts(self.runtime.cache.table)
            prefill.begin(contexts, *views.new_rows_on_host(fb))
        return prefill.attends(number)

    def _prefill_sparsely(self, q: torch.Tensor, layer: RadixAttention) -> torch.Tensor:
        """To what is selected for the new tokens."""
        runtime, of = self.runtime, views.layer(layer)
        rows, pool = q.view(-1, of.q_heads, of.head_dim), runtime.draft.pools.layer(of.number)
        return runtime.draft_prefill.attend(BlockCall(of.number, rows, pool, of.scale)).flatten(1)

    def _extend_sparsely(self, q: torch.Tensor, layer: RadixAttention, fb: ForwardBatch) -> torch.Tensor:
        """All T rows of a request: to what the round selected, and to each other."""
        runtime, of, tokens = self.runtime, views.layer(layer), views.accepted(fb).width
        if of.number == 0:
            _, reqs, lens = views.requests_of(fb)
            committed = (lens - tokens).clamp(min=0)  # rows that pad a graph have a length of 1
            self._contexts = runtime.contexts(reqs, committed)
            self._lists = runtime.state.kept_lists(committed.numel())
            self._plan = runtime.plan_draft(self._lists, committed)
            self._seen = chain_mask(tokens, q.device).expand(committed.numel(), -1, -1)
        rows = q.view(self._contexts.lens.numel(), tokens, of.q_heads, of.head_dim)
        pool = runtime.draft.pools.layer(of.number)
        call = LayerCall(of.number, rows, pool, self._contexts, self._seen, of.scale)
        return runtime.attend_draft(call, self._lists, self._plan).view(-1, of.q_heads * of.v_head_dim)


def last_rows(fb: ForwardBatch) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """int64 [bs] each: the row of each request's last accepted token, and its length up to that one; and
    whether this is a prefill."""
    lens = views.requests_of(fb).lens
    if views.mode(fb) != Mode.DRAFT_EXTEND:
        return views.new_rows(fb).number.cumsum(0) - 1, lens, True
    # Draft-extend runs all T rows of a request and says how many of them count.
    accepted, width = views.accepted(fb)
    first = torch.arange(accepted.numel(), device=accepted.device) * width
    return first + accepted - 1, lens - width + accepted, False


class TorchCarry(CarryLastRow, TorchBackend):
    """Dense torch attention for the draft's prefill and draft-extend."""
