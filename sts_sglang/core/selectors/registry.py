"""The kinds of selectors, by the configuration's `selector`."""

from __future__ import annotations

from sts_kernels import Ops
from sts_sglang.config import StsConfig
from sts_sglang.core.channels import Channels
from sts_sglang.core.round import Cache, RoundState
from sts_sglang.core.selectors import compare, pages, tokens
from sts_sglang.core.selectors.base import HeadLists, Selector
from sts_sglang.core.selectors.draft import DraftSelector
from sts_sglang.core.sizes import Need
from sts_sglang.core.sketches import Sketches
from sts_sglang.core.verifier import TargetShape


def make(
    config: StsConfig,
    state: RoundState,
    channels: Channels,
    ops: Ops,
    cache: Cache,
    sketches: Sketches | None,
    longest: int,
) -> Selector:
    """The selector of a launch. sketches: where it needs them (`StsConfig.by_sketches`). longest: of the
    lists (Capacity.longest)."""
    drafted = DraftSelector(config, state, channels, ops)
    if config.by_draft:
        return drafted
    capacity, of_target = cache.capacity, channels.of_target
    lists = HeadLists(of_target, capacity.requests, longest)
    if config.selector == "tokens":
        dtype = state.importance.dtype
        return tokens.TokensSelector(config, state, ops, sketches, lists, capacity, dtype)
    if config.by_pages:
        scores = pages.PageScores(config, ops, sketches, of_target, capacity, state.importance.dtype)
        if config.selector == "pages":
            return pages.PagesSelector(config, state, scores, lists)
        return pages.JoinedSelector(config, state, drafted, scores, lists)
    scores, table = state.importance, cache.table
    # On a GPU without a look at the lengths.
    width = None if scores.device.type == "cpu" else table.shape[1]
    return compare.LayerSelector(config, ops, lists, capacity, table.shape[0], scores.dtype, width=width)


def need(config: StsConfig, target: TargetShape, longest: int) -> Need:
    """What it takes beside the buffers of a round: nothing, where the draft selects."""
    if config.by_draft:
        return Need()
    if config.selector == "tokens":
        return tokens.need(config, target, longest)
    return pages.need(config, target, longest) if config.by_pages else compare.need(target, longest)
