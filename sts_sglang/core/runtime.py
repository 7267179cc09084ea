"""What the draft and the target of one scheduler process share, and the steps of a round."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from sts_kernels import Ops
from sts_kernels.layout import WHOLE, Contexts, Lists, Plan, Pooling
from sts_sglang.config import ConfigError, StsConfig, quoted, request_keep
from sts_sglang.core.aside import StandAside
from sts_sglang.core.channels import NO_MEMBERS, Channels
from sts_sglang.core.prefill import DraftPrefill, SparsePrefill
from sts_sglang.core.ranks import ALONE, Ranks
from sts_sglang.core.refresh import Parted, Refresh
from sts_sglang.core.request import Request
from sts_sglang.core.round import Cache, Draft, KvPools, RoundState
from sts_sglang.core.selectors.base import LayerCall, Selector
from sts_sglang.core.sizes import parted
from sts_sglang.core.sketches import Sketches, catch_up
from sts_sglang.core.verifier import Verifier
from sts_sglang.headmap import HeadMap

logger = logging.getLogger(__name__)

SIGNALS = {
    "draft": "the draft's attention",
    "tokens": "token scores of the target's queries",
    "pages": "page scores of the target's queries",
    "joined": "the draft's attention, and page scores of the target's queries",
    "oracle": "the target's attention, for comparison",
    "quest": "Quest's bounds of pages, for comparison",
    "recent": "recency, for comparison",
    "random": "chance, for comparison",
}


class Share(NamedTuple):
    """Neighbours of a batch whose contexts a draft layer scores at once, how their work is parted, and where
    their scores start (RoundState.score_columns)."""

    requests: slice
    plan: Plan | None
    columns: torch.Tensor


@dataclass
class Runtime:
    """One bound draft-target pair, or a target alone: configuration, the buffers of a round, and who works on
    them.

    config: as served, the head map's own choices included. draft: None without one, where a round is one
    decode step. kernel: `triton`, `torch`, or `flashinfer`. verifier: attends to what `selector` chose.
    whole: attends to whole contexts, in dense layers. sketches: of the target's pages, where they have a say.
    aside: when nothing is scored or selected. ranks: who has the other heads. prefill: of long prompts, where
    it may be sparse. draft_prefill: the draft's, where that may be. refresh: where selections may be kept.
    """

    config: StsConfig
    head_map: HeadMap
    channels: Channels
    cache: Cache
    draft: Draft | None
    state: RoundState
    ops: Ops
    kernel: str
    device: str
    selector: Selector
    verifier: Verifier
    whole: Verifier
    sketches: Sketches | None
    aside: StandAside
    ranks: Ranks = ALONE
    prefill: SparsePrefill | None = None
    draft_prefill: DraftPrefill | None = None
    refresh: Refresh | None = None
    _loaded: list[torch.Tensor] = field(default_factory=list)

    @property
    def selects_by(self) -> str:
        """In words, what decides which tokens are attended to."""
        return SIGNALS[self.config.selector]

    @property
    def prefills(self) -> str:
        """In words, what prompts attend to where their requests do not ask for something else."""
        if self.prefill is None:
            return "dense"
        keep, floor = self.config.prefill_keep, self.config.prefill_floor
        return f"{keep} of the blocks of keys, by {self.prefill.selector.said}, beyond {floor} tokens"

    @property
    def draft_prefills(self) -> str:
        """The same of the draft."""
        if self.draft_prefill is None:
            return "dense"
        return f"{self.config.prefill_keep} of the blocks of keys, by its own queries"

    @property
    def scoring_steps(self) -> int:
        """Draft decode steps of a round that score the context. The last of `num_steps` tokens is drafted by
        the step before it and never runs, so there is one step less."""
        return 1 if self.config.sparse_steps else self.draft.num_steps - 1

    @property
    def pooling(self) -> Pooling:
        """Of the carried row and of every branch of every step that scores."""
        rows = 1 + self.scoring_steps * self.draft.topk
        return Pooling(self.config.pool_rows, self.config.pool_heads, rows)

    def totals(self) -> torch.Tensor:
        """int64 [by Count] on the CPU, of all ranks, which have to ask together; waits for the device."""
        return self.ranks.whole(self.state.totals.cpu())

    def admit(self, requests: list[Request]) -> None:
        """Note the keep each request of a prefill batch asks for; its row may have had another owner."""
        keeps = [keep_of(request, self.config) for request in requests]
        rows = torch.tensor([request.row for request in requests], dtype=torch.int64)
        rows = rows.to(self.device, non_blocking=True)
        values = torch.tensor([torch.nan if keep is None else keep for keep in keeps], dtype=torch.float64)
        self.state.keeps[rows] = values.to(self.device, non_blocking=True)
        self.verifier.admit(requests, keeps)
        self.aside.admit(requests)
        self.selector.admit(rows, [request.prompt for request in requests])
        for prefill in (self.prefill, self.draft_prefill):
            if prefill is not None:
                prefill.admit(requests)

    def begin_round(self, requests: list[Request]) -> None:
        """On the host, before the forward of a round: who is in it."""
        if self.verifier.on_host:
            self.verifier.note(requests)
        if self.aside.limit:
            self.aside.begin(requests)

    @property
    def looks_at_rounds(self) -> bool:
        """Whether `begin_round` has anything to do."""
        return self.verifier.on_host or self.aside.limit > 0

    # ---- slots that no forward writes

    def loaded(self, slots: torch.Tensor) -> None:
        """HiCache brings KV from the host back into these slots: to be forgotten before the next forward."""
        if self.state.history is not None or self.sketches is not None:
            self._loaded.append(slots)

    def forget_loaded(self) -> None:
        """To be called on the stream of the forwards, before the next one.

        Not when HiCache allocates: a round that is still in flight may hold a request that has finished,
        and lets the slots it no longer owns remember.
        """
        for slots in self._loaded:
            for remembers in (self.state.history, self.sketches):
                if remembers is not None:
                    remembers.forget(slots)
            if slots.is_cuda:  # allocated on the scheduler's stream, and dropped here before it was read
                slots.record_stream(torch.cuda.current_stream())
        self._loaded.clear()

    # ---- prefill of the target

    def begin_prefill(self, contexts: Contexts, before: torch.Tensor) -> None:
        """Before its layers. before: int [bs], tokens of the prefix."""
        if self.draft is None:
            self.state.carry_lengths(contexts.reqs.long(), contexts.lens.long(), prefill=True)
        if self.sketches is not None:
            self.sketches.begin_prefill(contexts, before)

    def prefilled(self, layer: int, pools: KvPools) -> None:
        """Once the keys of a layer are there."""
        if self.sketches is not None and layer in self.sketches.of_layer:
            self.sketches.write(layer, pools.layer(layer))

    # ---- the draft's passes

    def contexts(self, reqs: torch.Tensor, lens: torch.Tensor) -> Contexts:
        """A batch of requests at committed lengths."""
        return Contexts(self.cache.table, reqs, lens)

    def shares(self, contexts: Contexts) -> list[Share]:
        """How draft steps that attend to everything part their work, alike in every layer: as many requests
        at a time as there is scratch for (`sizes.SCRATCH`)."""
        (table, reqs, lens), pool = contexts, self.draft.pools.layer(0)
        found = []
        for few in parted(lens.numel(), self.state.at_once):
            own = Contexts(table, reqs[few], lens[few])
            plan = self.ops.plan_contexts(own.lens, pool, max_context=table.shape[1])
            found.append(Share(few, plan, self.state.score_columns(self.ops, own)))
        return found

    def plan_draft(self, lists: Lists, lens: torch.Tensor) -> Plan | None:
        """The same for sparse passes."""
        width = self.cache.table.shape[1]
        return self.ops.plan_attention(lists, self.channels.of_draft, lens, max_context=width)

    def score(
        self,
        layer: int,
        q: torch.Tensor | None,
        contexts: Contexts,
        shares: list[Share],
        *,
        step: int,
        scale: float,
        elsewhere: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        """Dense attention of a draft layer in decode step `step`, whose rows' importance is pooled in; the
        first step scores the carried rows too. q: [bs * W, H_q, D], None for the carried rows alone.
        elsewhere: Parted.elsewhere."""
        table, reqs, lens = contexts
        rows = None if q is None else q.unflatten(0, (lens.numel(), -1))
        found = [
            self.ops.draft_attention(
                None if rows is None else rows[few].flatten(0, 1),
                self.draft.pools.layer(layer),
                Contexts(table, reqs[few], lens[few]),
                self.state.scores_of(few, columns),
                self.channels.members.get(layer, NO_MEMBERS),
                self.state.carried_of(layer, step == 0),
                step=step,
                num_steps=self.draft.num_steps,
                scale=scale,
                pooling=self.pooling,
                elsewhere=None if elsewhere is None else elsewhere[few],
                plan=plan,
            )
            for few, plan, columns in shares
        ]
        return found[0] if q is None or len(found) == 1 else torch.cat(found)

    def attend_draft(self, call: LayerCall, lists: Lists, plan: Plan | None) -> torch.Tensor:
        """Attention of a draft layer over the round's selection and the tail of the call."""
        return self.ops.sparse_attention(
            call.q,
            call.pool,
            lists._replace(indices=self.state.draft_indices),
            self.channels.of_draft[call.layer],
            call.contexts,
            call.tail_mask,
            self.state.draft_attended,
            scale=call.scale,
            plan=None if plan is None else plan.of(call.layer),
        )

    def select_early(self, contexts: Contexts, parted: Parted | None) -> Lists:
        """Select after the first draft step, for the steps after it and for verify."""
        if parted is not None:
            return self.refresh.select(parted, contexts)
        self.state.keep_lists(self._select(contexts))
        return self.state.kept_lists(contexts.lens.numel())

    # ---- verify

    def begin_verify(self, contexts: Contexts, tokens: int = 1) -> Lists:
        """Once a round, before the first layer: select per (request, channel). tokens: of the tail."""
        if self.draft is None:  # the layers score, by what they are asked
            self.state.carry_lengths(contexts.reqs.long(), contexts.lens.long(), prefill=False)
        elif self.draft.num_steps == 1:
            self._score_carried(contexts)
        if self.sketches is not None:
            most = 1 if self.draft is None else self.draft.num_steps + 1
            self.sketches.begin_verify(contexts, most, tokens)
        if self.config.sparse_steps:
            lists = self.state.kept_lists(contexts.lens.numel())
        else:
            lists = self._select(contexts)
            if self.config.sparse_extend:
                self.state.keep_lists(lists)
        lists = self.selector.begin(lists, contexts)
        self.verifier.begin(lists, self.selector.channels, contexts.lens)
        return lists

    def begin_aside(self, contexts: Contexts, by_dense: bool) -> Lists | None:
        """The same of a round that stands aside. None where the dense backend attends to everything
        (by_dense), else the lists for `verify_whole`."""
        heads, bs = self.selector.channels.numel(), contexts.lens.numel()
        self.state.count_aside(contexts, heads if by_dense else 0)
        if by_dense:
            return None
        counts = torch.full((bs, heads), WHOLE, dtype=torch.int32, device=self.device)
        starts = torch.zeros_like(counts, dtype=torch.int64)
        return self.plan_whole(Lists(self.state.indices, starts, counts), contexts)

    def plan_whole(self, lists: Lists, contexts: Contexts) -> Lists:
        """Of the same requests, but whole, for `verify_whole`."""
        whole = lists.whole()
        self.whole.begin(whole, self.selector.channels, contexts.lens)
        return whole

    def catch_up(self, contexts: Contexts, most: int, pools: KvPools) -> None:
        """Sketch what was committed while these requests stood aside: at most `most` tokens of each."""
        if self.sketches is not None:
            catch_up(self.sketches, contexts, most, pools)

    def released(self, row: int, committed: int, pools: KvPools) -> None:
        """Before a request that waits for sketches gives up its row. Its slots may become those of another
        with the same text, who has written sketches beside slots that it loses then."""
        self.aside.await_forward()
        here = torch.tensor([[row], [committed]]).to(self.device, non_blocking=True)
        self.catch_up(self.contexts(here[0], here[1]), self.aside.release(row, committed), pools)

    def verify(self, call: LayerCall, lists: Lists) -> torch.Tensor:
        """[bs, T, H_q, D]: attention of a target layer over what is selected and the tail."""
        self.selector.list_layer(lists, call)
        return self.verifier.attend(call, lists, self.selector.channels[call.layer], self.state.attended)

    def verify_whole(self, call: LayerCall, lists: Lists) -> torch.Tensor:
        """The same over whole contexts (Lists.whole), in a layer that is configured to be dense."""
        return self.whole.attend(call, lists, self.selector.channels[call.layer], self.state.attended)

    def _select(self, contexts: Contexts) -> Lists:
        return self.selector.select(self.state.size(self.ops, contexts), contexts)

    def _score_carried(self, contexts: Contexts) -> None:
        """A round of one step has no draft decode step: nothing but the carried rows is scored."""
        shares = self.shares(contexts)
        for layer in self.channels.members:
            self.score(layer, None, contexts, shares, step=0, scale=self.draft.scales[layer])

    def nbytes(self) -> dict[str, int]:
        """Bytes by purpose."""
        own = {} if self.sketches is None else {"sketches": self.sketches.nbytes()}
        if taken := self.selector.nbytes():
            own["selector"] = taken
        return {**self.state.nbytes(), **self.verifier.nbytes(), **own}


def keep_of(request: Request, config: StsConfig) -> float | None:
    """The keep that a request asks for and may have, else None."""
    try:
        return request_keep(request.params, config)
    except ConfigError as error:
        # The tokenizer manager answers 400 to these; one that comes by another road must not
        # take the scheduler down.
        logger.warning("STS: request %s served with the server's keep: %s", quoted(request.rid), error)
        return None
