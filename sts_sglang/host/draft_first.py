"""A draft that reads new tokens before its target does, where its attention selects what these attend to.

SGLang's draft reads a prompt after the target, shifted by one: its row of a token stands a position before
the token's own, and the last row is that of the token which the target has sampled just then. Here its pass
runs first, with any token in the place of those that nobody knows yet; no other row sees these. When the
target has sampled, the last row of each request runs once more, and writes over what was there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sts_sglang.core.runtime import Runtime
from sts_sglang.host import views
from sts_sglang.host.releases import release

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from sglang.srt.managers.schedule_batch import ScheduleBatch
    from sglang.srt.speculative.eagle_info import EagleDraftInput
    from sglang.srt.speculative.eagle_worker_v2 import EagleDraftWorker, EAGLEWorkerV2


class DraftFirst:
    """The prefills of one worker. Nothing happens but where the draft is to be asked and somebody in a batch
    selects: then it reads all of the batch.

    Args:
        runtime: of the bound pair.
    """

    def __init__(self, runtime: Runtime):
        self.runtime = runtime
        self._read: EagleDraftInput | None = None  # what the draft makes of the running batch

    @property
    def asks(self) -> bool:
        return self.runtime.prefill is not None and self.runtime.prefill.selector.asks_draft

    def before_target(self, worker: EAGLEWorkerV2, batch: ScheduleBatch) -> None:
        """Let the draft read a batch that is to be prefilled."""
        self._read = None
        if not self.asks:
            return
        prefill, contexts = self.runtime.prefill, views.batch_of(batch).contexts(self.runtime.cache.table)
        if not prefill.ask_draft(contexts, *views.new_rows_of(batch)):
            return
        draft: EagleDraftWorker = worker._draft_worker
        known, following = views.as_known(batch)
        with release.drafting(draft), prefill.listening():
            self._read = draft._draft_extend_for_prefill(known, None, following)

    def after_target(
        self, again: Callable, batch: ScheduleBatch, following: torch.Tensor, stock: Callable
    ) -> EagleDraftInput:
        """In place of SGLang's own pass over a batch, which is `stock()`. again: the same pass over a batch
        and what follows it. following: int [bs], tokens that the target has sampled."""
        if not self.asks or self.runtime.prefill.listens:
            return stock()
        self.runtime.prefill.end()
        read, self._read = self._read, None
        if read is None:
            return stock()
        if views.next_is_known(batch):
            return views.followed_by(read, following)
        return again(views.last_rows_of(batch), None, following)
