"""Draft backends: dense attention that leaves the importance of its rows behind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend

from sts_sglang.backends.reference import TorchBackend, chain_mask, write_kv
from sts_sglang.importance import NO_MEMBERS

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner

    from sts_kernels.reference import Plan
    from sts_sglang.importance import Selection
    from sts_sglang.runtime import StsRuntime


class CarryLastRow:
    """Mixin of a dense backend for the draft's prefill and draft-extend (see dense.of_draft_extend).

    Keeps the query of each request's last accepted token: that row is the bonus token's, verify row 0
    of the next round. With `draft` "all", draft-extend attends to the round's selection.
    """

    runtime: StsRuntime | None = None  # set by the draft-target binding
    # Of the running forward: each request's row, the queries so far, and whether it is a prefill.
    _rows: torch.Tensor | None = None
    _queries: list[torch.Tensor] | None = None
    _prefill = False
    _round: DraftRound | None = None  # of the running draft-extend
    _seen: torch.Tensor | None = None  # of the same, which row sees which

    def forward_extend(self, q, k, v, layer, forward_batch, save_kv_cache=True, **kwargs):
        if self.runtime is not None and self.runtime.config.draft == "all" and extends(forward_batch):
            out = self._extend_sparsely(q, k, v, layer, forward_batch, save_kv_cache)
        else:
            out = super().forward_extend(q, k, v, layer, forward_batch, save_kv_cache, **kwargs)
        if self.runtime is not None:
            self._carry(q.view(-1, layer.tp_q_head_num, layer.qk_head_dim), layer.layer_id, forward_batch)
        return out

    def _carry(self, queries: torch.Tensor, layer: int, fb: ForwardBatch) -> None:
        """Note the layer's queries; with the last one that speaks, keep the rows."""
        state, reqs = self.runtime.state, fb.req_pool_indices.long()
        if layer == 0:
            self._rows, committed, self._prefill = last_rows(fb)
            self._queries = []
            state.carry_lengths(reqs, committed, self._prefill)
        if layer not in state.carried_q:
            return
        # A prompt has many rows, and another layer's may take their place.
        self._queries.append(queries.index_select(0, self._rows) if self._prefill else queries)
        if layer == max(state.carried_q):
            state.carry(reqs, self._queries, None if self._prefill else self._rows)
            self._queries = []

    def _extend_sparsely(self, q, k, v, layer, fb: ForwardBatch, save_kv_cache: bool) -> torch.Tensor:
        """All T rows of a request: to what the round selected, and to each other."""
        runtime, tokens = self.runtime, fb.spec_info.num_tokens_per_req
        if save_kv_cache and k is not None:
            write_kv(runtime.draft_pool, k, v, layer, fb)
        committed = (fb.seq_lens - tokens).clamp(min=0)  # rows that pad a graph have a length of 1
        if layer.layer_id == 0:
            selection = runtime.state.selected(committed.numel())
            self._round = DraftRound(selection=selection, plan=runtime.plan_draft(selection, committed))
            self._seen = chain_mask(tokens, q.device)
        return attend_sparsely(runtime, self._round, q, layer, fb.req_pool_indices, committed, self._seen)


def extends(fb: ForwardBatch) -> bool:
    """Whether this is a draft-extend, and not a prefill."""
    return getattr(fb.spec_info, "num_accept_tokens", None) is not None


def last_rows(fb: ForwardBatch) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """int64 [bs] each: the row of each request's last accepted token, and its length up to that one; and
    whether this is a prefill."""
    if not extends(fb):
        return fb.extend_seq_lens.cumsum(0) - 1, fb.seq_lens, True
    accepted = fb.spec_info.num_accept_tokens
    # Draft-extend runs all T rows of a request and says how many of them count.
    width = fb.spec_info.num_tokens_per_req
    first = torch.arange(accepted.numel(), device=accepted.device) * width
    return first + accepted - 1, fb.seq_lens - width + accepted, False


class DraftExtendBackend(CarryLastRow, TorchBackend):
    """Dense torch attention for the draft's prefill and draft-extend."""


class DraftStepBackend(AttentionBackend):
    """One draft decode step; the first of a round also scores the carried rows."""

    def __init__(self, model_runner: ModelRunner, step: int, topk: int, num_steps: int):
        super().__init__()
        self.req_to_token_pool = model_runner.req_to_token_pool
        self.token_to_kv_pool = model_runner.token_to_kv_pool
        self.max_context_len = model_runner.model_config.context_len
        self.step, self.topk, self.num_steps = step, topk, num_steps
        self.runtime: StsRuntime | None = None
        self.round: DraftRound | None = None  # set by DraftMultiStepBackend
        # bool [W, W * S]: what of the round's scratch each branch attends to.
        branch, cell = torch.arange(topk)[:, None], torch.arange(topk * num_steps)
        seen = (cell // num_steps == branch) & (cell % num_steps <= step)
        self._scratch = seen.to(model_runner.device)

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        return 1

    def forward_decode(self, q, k, v, layer, forward_batch, save_kv_cache=True, **kwargs):
        if save_kv_cache and k is not None:
            write_kv(self.token_to_kv_pool, k, v, layer, forward_batch)
        if self.step >= self.runtime.scoring_steps:
            return self._attend_sparsely(q, layer, forward_batch)
        runtime, state = self.runtime, self.runtime.state
        members = state.members.get(layer.layer_id, NO_MEMBERS)
        speaks = layer.layer_id in state.members
        out = runtime.ops.draft_attention(
            q.view(-1, layer.tp_q_head_num, layer.qk_head_dim),
            state.carried_q[layer.layer_id] if speaks and self.step == 0 else None,
            state.carried_len,
            self.token_to_kv_pool.get_key_buffer(layer.layer_id),
            self.token_to_kv_pool.get_value_buffer(layer.layer_id),
            self.req_to_token_pool.req_to_token,
            forward_batch.req_pool_indices,
            forward_batch.seq_lens,
            self.round.columns,
            self.step,
            self.num_steps,
            layer.scaling,
            members,
            state.importance,
            runtime.rows_per_round,
            runtime.config.pool_heads,
            runtime.config.pool_rows,
            self.round.contexts,
        )
        return out.flatten(1)

    def _attend_sparsely(self, q, layer, fb: ForwardBatch) -> torch.Tensor:
        """To what the step before selected, and to the round's scratch."""
        runtime, round_ = self.runtime, self.round
        if self.step == runtime.scoring_steps and layer.layer_id == 0:
            args = (runtime.ops, fb.req_pool_indices, fb.seq_lens, runtime.req_to_token)
            round_.selection = runtime.state.select_early(*args)
            round_.plan = runtime.plan_draft(round_.selection, fb.seq_lens)
        return attend_sparsely(runtime, round_, q, layer, fb.req_pool_indices, fb.seq_lens, self._scratch)


def attend_sparsely(runtime: StsRuntime, round_: DraftRound, q, layer, reqs, seq_lens, seen) -> torch.Tensor:
    """Draft rows [bs * W, H_q * D] over the round's selection of contexts `seq_lens` and the N tokens after
    them, of which row w sees `seen` [W, N]."""
    bs, pool, plan = seq_lens.numel(), runtime.draft_pool, round_.plan
    out = runtime.ops.sparse_verify_attention(
        q.view(bs, -1, layer.tp_q_head_num, layer.qk_head_dim),
        pool.get_key_buffer(layer.layer_id),
        pool.get_value_buffer(layer.layer_id),
        runtime.state.draft_indices,
        *round_.selection,
        runtime.draft_heads[layer.layer_id],
        runtime.req_to_token,
        reqs,
        seq_lens,
        seen.expand(bs, -1, -1),
        layer.scaling,
        runtime.state.draft_attended,
        None if plan is None else plan.of(layer.layer_id),
    )
    return out.view(q.shape[0], -1)


@dataclass
class DraftRound:
    """What the steps of a round share."""

    columns: torch.Tensor | None = None  # int64 [bs], of the steps that score
    contexts: Plan | None = None  # of the same
    selection: Selection | None = None  # of sparse passes
    plan: Plan | None = None  # of the same


class DraftMultiStepBackend:
    """The container SGLang's draft worker expects: one backend per decode step (S - 1 of them)."""

    needs_cpu_seq_lens = False

    def __init__(self, model_runner: ModelRunner, topk: int, num_steps: int):
        self.topk, self.num_steps = topk, num_steps
        self.attn_backends = [
            DraftStepBackend(model_runner, step, topk, num_steps) for step in range(num_steps - 1)
        ]

    def bind(self, runtime: StsRuntime) -> None:
        """Give every step its destination."""
        self.runtime = runtime
        for backend in self.attn_backends:
            backend.runtime = runtime

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Nothing to allocate: the state is static already."""

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        self.init_forward_metadata_in_graph(forward_batch)

    def init_forward_metadata_out_graph(self, forward_batch: ForwardBatch, in_capture: bool = False) -> None:
        """Nothing happens outside the graph."""

    def init_forward_metadata_in_graph(self, forward_batch: ForwardBatch) -> None:
        """Columns of the round, recorded into the graph of each batch size."""
        if forward_batch.forward_mode.is_idle():
            return
        runtime, seq_lens = self.runtime, forward_batch.seq_lens
        round_ = DraftRound(runtime.state.columns(seq_lens), runtime.plan_contexts(seq_lens))
        for backend in self.attn_backends:
            backend.round = round_


def score_carried_rows(runtime: StsRuntime, reqs: torch.Tensor, seq_lens: torch.Tensor) -> None:
    """Rounds without a draft decode step (S = 1) have only the carried row: score it by itself."""
    state, pool = runtime.state, runtime.draft_pool
    columns, contexts = state.columns(seq_lens), runtime.plan_contexts(seq_lens)
    for layer, members in state.members.items():
        runtime.ops.draft_attention(
            None,
            state.carried_q[layer],
            state.carried_len,
            pool.get_key_buffer(layer),
            pool.get_value_buffer(layer),
            runtime.req_to_token,
            reqs,
            seq_lens,
            columns,
            0,
            1,
            runtime.draft_scaling,
            members,
            state.importance,
            runtime.rows_per_round,
            runtime.config.pool_heads,
            runtime.config.pool_rows,
            contexts,
        )
