"""The channels of a head map as tensors: which draft heads feed them, which target heads select by them."""

from __future__ import annotations

from typing import NamedTuple

import torch

from sts_kernels.layout import Members
from sts_sglang.headmap import HeadMap

NO_MEMBERS = Members(
    torch.empty(0, dtype=torch.int32), torch.empty(0, 1, dtype=torch.int32), torch.empty(0), torch.empty(0)
)


class Channels(NamedTuple):
    """Of one pair of models.

    number: how many. of_target: int32 [target layers, H_kv], the channel each KV head of the target selects
    by. of_draft: int32 [draft layers, H_kv], the same of the draft's own heads; empty where the draft
    attends to everything. members: by draft layer that feeds any channel, in order.
    """

    number: int
    of_target: torch.Tensor
    of_draft: torch.Tensor
    members: dict[int, Members]

    @classmethod
    def of(cls, head_map: HeadMap, device: str, heard: bool = True) -> Channels:
        """heard: whether anybody goes by what the draft attends to; if not, none of its layers feeds any."""
        target = [head_map.head_channels(layer) for layer in range(len(head_map.sources))]
        return cls(
            len(head_map.channels),
            torch.tensor(target, dtype=torch.int32, device=device),
            torch.tensor(head_map.of_draft(), dtype=torch.int32, device=device),
            members_by_layer(head_map, device) if heard else {},
        )


def members_by_layer(head_map: HeadMap, device: str) -> dict[int, Members]:
    """For every draft layer that speaks, the channels it feeds.

    Layers run in order, so the lowest layer of a channel is the first to feed it.
    """
    fed: dict[int, list[tuple[int, list[int]]]] = {}
    for channel, sources in enumerate(head_map.channels):
        for layer in sorted({layer for layer, _ in sources}):
            heads = [head for source, head in sources if source == layer]
            fed.setdefault(layer, []).append((channel, heads))
    # A channel without sources is fed by none: its row stays zero, and of equal scores the later wins.
    first = [min((layer for layer, _ in sources), default=-1) for sources in head_map.channels]
    members = {}
    for layer, entries in sorted(fed.items()):
        most = max(len(heads) for _, heads in entries)
        channels = [channel for channel, _ in entries]
        members[layer] = Members(
            channels=torch.tensor(channels, dtype=torch.int32, device=device),
            heads=torch.tensor(
                [heads + [-1] * (most - len(heads)) for _, heads in entries], dtype=torch.int32, device=device
            ),
            scale=torch.tensor([1 / len(head_map.channels[c]) for c in channels], device=device),
            fresh=torch.tensor([first[c] == layer for c in channels], device=device),
        )
    return members
