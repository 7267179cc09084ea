"""The kinds of selectors, by the configuration's `selector`."""

from __future__ import annotations

from sts_kernels import Ops
from sts_sglang.config import StsConfig
from sts_sglang.core.channels import Channels
from sts_sglang.core.round import Draft, RoundState
from sts_sglang.core.selectors import compare
from sts_sglang.core.selectors.base import Selector
from sts_sglang.core.selectors.draft import DraftSelector
from sts_sglang.core.sizes import Need
from sts_sglang.core.verifier import TargetShape


def make(config: StsConfig, state: RoundState, channels: Channels, ops: Ops, draft: Draft) -> Selector:
    """The selector of a launch."""
    if config.selector == "draft":
        return DraftSelector(config, state, channels, ops)
    scores, table = state.importance, draft.table
    # On a GPU without a look at the lengths.
    width = None if scores.device.type == "cpu" else table.shape[1]
    return compare.LayerSelector(
        config, ops, channels.of_target, draft.capacity, table.shape[0], scores.dtype, width=width
    )


def need(config: StsConfig, target: TargetShape) -> Need:
    """What it takes beside the buffers of a round: nothing, where the draft selects."""
    return Need() if config.selector == "draft" else compare.need(target)
