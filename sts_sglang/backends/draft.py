"""The draft's decode steps: attention that leaves importance behind, or goes by a selection."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend

from sts_kernels.layout import Contexts, Lists, Plan
from sts_sglang.backends.bindable import Bindable
from sts_sglang.core.refresh import Parted
from sts_sglang.core.runtime import Runtime, Share
from sts_sglang.core.selectors.base import LayerCall
from sts_sglang.host import views
from sts_sglang.host.views import Mode

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner


@dataclass
class DraftRound:
    """What the steps of a round share.

    contexts: of the requests that the steps which score do it for; shares: of these. parted: who else there
    is, where selections are kept. lists: what a step selected, for the sparse steps after it, and before that
    what is kept; plan: of those.
    """

    contexts: Contexts
    shares: list[Share]
    parted: Parted | None = None
    lists: Lists | None = None
    plan: Plan | None = None

    @classmethod
    def begin(cls, runtime: Runtime, contexts: Contexts) -> DraftRound:
        if runtime.refresh is None:
            return cls(contexts, runtime.shares(contexts))
        parted = runtime.refresh.part(contexts)
        plan = runtime.plan_draft(parted.lists, parted.kept.lens)
        return cls(parted.scored, runtime.shares(parted.scored), parted, parted.lists, plan)


class DraftStepBackend(Bindable, AttentionBackend):
    """One draft decode step; the first of a round also scores the carried rows."""

    def __init__(self, model_runner: ModelRunner, step: int, topk: int, num_steps: int):
        super().__init__()
        # SGLang reads these three of a backend.
        self.req_to_token_pool = model_runner.req_to_token_pool
        self.token_to_kv_pool = model_runner.token_to_kv_pool
        self.max_context_len = model_runner.model_config.context_len
        self.pools = views.pools(model_runner)
        self.step = step
        self.round: DraftRound | None = None  # set by DraftMultiStepBackend, before the first layer
        # bool [W, W * S]: what of the round's scratch each branch attends to.
        branch, cell = torch.arange(topk)[:, None], torch.arange(topk * num_steps)
        seen = (cell // num_steps == branch) & (cell % num_steps <= step)
        self._scratch = seen.to(model_runner.device)

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        return 1

    def forward_decode(self, q, k, v, layer, forward_batch, save_kv_cache=True, **kwargs):
        if save_kv_cache and k is not None:
            self.pools.write(k, v, layer, forward_batch)
        of, contexts = views.layer(layer), views.requests_of(forward_batch).contexts(self.runtime.cache.table)
        if self.step >= self.runtime.scoring_steps:
            return self._attend_sparsely(q, of, contexts)
        rows, round_ = q.view(-1, of.q_heads, of.head_dim), self.round
        out = self.runtime.score(
            of.number,
            rows,
            round_.contexts,
            round_.shares,
            step=self.step,
            scale=of.scale,
            elsewhere=None if round_.parted is None else round_.parted.elsewhere,
        )
        if round_.parted is not None:
            out = round_.parted.join(out, self._attend_sparsely(q, of, round_.parted.kept))
        return out.flatten(1)

    def _attend_sparsely(self, q: torch.Tensor, of: views.Layer, contexts: Contexts) -> torch.Tensor:
        """To what the step before selected, or an earlier round, and to the round's scratch."""
        runtime, round_, bs = self.runtime, self.round, contexts.lens.numel()
        if self.step == runtime.scoring_steps and of.number == 0:
            round_.lists = runtime.select_early(contexts, round_.parted)
            round_.plan = runtime.plan_draft(round_.lists, contexts.lens)
        rows = q.view(bs, -1, of.q_heads, of.head_dim)
        seen = self._scratch.expand(bs, -1, -1)
        call = LayerCall(of.number, rows, self.pools.layer(of.number), contexts, seen, of.scale)
        return runtime.attend_draft(call, round_.lists, round_.plan).view(-1, of.q_heads * of.v_head_dim)


class DraftMultiStepBackend(Bindable):
    """The container SGLang's draft worker expects: one backend per decode step (S - 1 of them)."""

    needs_cpu_seq_lens = False

    def __init__(self, model_runner: ModelRunner, topk: int, num_steps: int):
        self.topk, self.num_steps = topk, num_steps
        self.attn_backends = [
            DraftStepBackend(model_runner, step, topk, num_steps) for step in range(num_steps - 1)
        ]

    def bind(self, runtime: Runtime) -> None:
        super().bind(runtime)
        for backend in self.attn_backends:
            backend.bind(runtime)

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Nothing to allocate: the state is static already."""

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        self.init_forward_metadata_in_graph(forward_batch)

    def init_forward_metadata_out_graph(self, forward_batch: ForwardBatch, in_capture: bool = False) -> None:
        """Nothing happens outside the graph."""

    def init_forward_metadata_in_graph(self, forward_batch: ForwardBatch) -> None:
        """The plan of the round, recorded into the graph of each batch size."""
        if views.mode(forward_batch) == Mode.IDLE:
            return
        contexts = views.requests_of(forward_batch).contexts(self.runtime.cache.table)
        round_ = DraftRound.begin(self.runtime, contexts)
        for backend in self.attn_backends:
            backend.round = round_
