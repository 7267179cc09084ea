"""Selections that are kept for some rounds: who is scored in a round, and what the others go by.

A round of a sparse draft scores the context in its first draft step, which reads all of it. With
`draft_refresh` a request is scored in some rounds only, and goes by its latest selection and everything that
came since in the others. Who is which is data on the device: both kinds of attention run in every round, each
over no tokens of those whom the other one serves, so that one CUDA graph holds all cases. With `draft`
"every" the first step of a round that scores goes by the latest selection too, and what scores reads the keys
of heads that speak alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from sts_kernels import Ops
from sts_kernels.layout import Contexts, KeptSizes, Lists
from sts_sglang.core.round import RoundState
from sts_sglang.core.selectors.draft import DraftSelector


class Parted(NamedTuple):
    """The requests of a round.

    found: who is which, and lists. scored, kept: contexts of those that are scored, and of those that go by
    what is kept; the others of the batch have no tokens there. lists: of the latter. elsewhere: bool [bs],
    the latter, where some of them are scored too.
    """

    found: KeptSizes
    scored: Contexts
    kept: Contexts
    lists: Lists
    elsewhere: torch.Tensor | None

    def join(self, of_scored: torch.Tensor, of_kept: torch.Tensor) -> torch.Tensor:
        """Rows [bs * W, ..]: of those that go by what is kept the latter, of the others the former."""
        goes, bs = self.found.goes[:, None], self.found.goes.numel()
        return torch.where(goes, of_kept.view(bs, -1), of_scored.view(bs, -1)).view(of_scored.shape)


class Refresh:
    """Says who is scored in a round (`StsConfig.refresh`), and keeps what is selected.

    Args:
        state: of the round, whose `kept` outlives it. selector: by what is scored. ops: in use.
    """

    def __init__(self, state: RoundState, selector: DraftSelector, ops: Ops):
        self.state, self.selector, self.ops = state, selector, ops
        self.every, self.percent = state.config.refresh
        self.first_too = state.config.draft == "every"

    def part(self, contexts: Contexts) -> Parted:
        """Once a round, before its first draft step."""
        state = self.state
        found = self.ops.size_kept(
            contexts,
            state.size(self.ops, contexts),
            state.kept,
            state.room,
            state.totals,
            every=self.every,
            percent=self.percent,
            first_too=self.first_too,
        )
        lists = Lists(state.indices, found.starts, found.counts)
        self.ops.list_kept(state.kept, contexts, lists, state.draft_indices)
        scored, kept = (contexts._replace(lens=lens) for lens in (found.scored, found.kept))
        return Parted(found, scored, kept, lists, found.goes if self.first_too else None)

    def select(self, parted: Parted, contexts: Contexts) -> Lists:
        """Once those that are scored were: the lists of all, where the other graphs of the round find
        them."""
        state, found = self.state, parted.found
        lists = state.kept_lists(contexts.lens.numel())
        listed = contexts._replace(table=state.positions.expand(contexts.table.shape[0], -1))
        own = Lists(state.kept.positions, found.keep_at, found.sizes.counts)
        self.selector.list_best(found.sizes, contexts, listed, own)
        self.ops.keep_selected(state.kept, contexts, found, lists)
        now = Lists(state.indices, found.sizes.starts, found.sizes.counts)
        self.ops.list_kept(state.kept, contexts, now, state.draft_indices)
        return lists
