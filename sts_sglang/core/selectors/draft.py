"""STS itself: the tokens that the draft attended to."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sts_kernels import Ops
from sts_kernels.layout import Contexts, Lists, Sizes
from sts_sglang.config import StsConfig
from sts_sglang.core.channels import Channels
from sts_sglang.core.round import RoundState
from sts_sglang.core.selectors.base import LayerCall, Scored


class DraftSelector:
    """Selects by the importance that the draft's passes of this round left, once for all layers.

    Args:
        config: what to keep. state: of the round. channels: of the head map. ops: the ops in use.
    """

    def __init__(self, config: StsConfig, state: RoundState, channels: Channels, ops: Ops):
        self.config, self.state, self.ops = config, state, ops
        self.channels = channels.of_target

    def admit(self, rows: torch.Tensor, prompts: list[Sequence[int]]) -> None:
        """What the draft attends to needs no prompt."""

    def select(self, sizes: Sizes, contexts: Contexts) -> Lists:
        lists = Lists(self.state.indices, sizes.starts, sizes.counts)
        self.list_best(sizes, contexts, contexts, lists, self.state.draft_indices)
        return lists

    def list_best(
        self,
        sizes: Sizes,
        contexts: Contexts,
        listed: Contexts,
        lists: Lists,
        draft_indices: torch.Tensor | None = None,
    ) -> None:
        """Finish the scores of `contexts` and select; lists then have what `listed` has in the place of
        slots."""
        self.finish_scores(sizes, contexts)
        self.ops.select_tokens(
            self.state.scores(sizes.known),
            listed,
            sizes.budgets,
            lists,
            sink=self.config.sink,
            recent=self.config.recent,
            top_p=self._top_p(contexts.reqs),
            draft_indices=draft_indices,
        )

    def finish_scores(self, sizes: Sizes, contexts: Contexts) -> None:
        """What happens to the importance of a round before it is sorted."""
        config, state = self.config, self.state
        if state.history is not None:
            state.history.blend(self.ops, state.scores(sizes.known), contexts)
        if config.spread:
            scores, (factor, over) = state.scores(sizes.sparse), config.passed_on
            self.ops.spread_importance(scores, contexts.lens, factor=factor, over=over)
        state.note_scores(sizes.known, contexts)

    def begin(self, lists: Lists, contexts: Contexts) -> Lists:
        """The lists of all layers are made."""
        return lists

    def list_layer(self, lists: Lists, call: LayerCall) -> None:
        """They are made."""

    def scored(self, row: int, slots: torch.Tensor) -> Scored:
        """What slots remember or, without history, the importance of the last round."""
        state = self.state
        if state.history is None:
            return Scored(state.last_scores(row, slots.numel()), self.channels.cpu(), "last round")
        # Some at a time: the device may have no room for all.
        found = [state.history.remembered[some].cpu() for some in slots.split(4096)]
        return Scored(torch.cat(found).T, self.channels.cpu(), "history")

    def nbytes(self) -> int:
        return 0

    def _top_p(self, reqs: torch.Tensor) -> torch.Tensor | None:
        """float32 [bs], infinite for a request with a keep of its own; None under other policies."""
        if self.config.policy != "top_p":
            return None
        return torch.where(self.state.keeps[reqs].isnan(), self.config.top_p, torch.inf).float()
