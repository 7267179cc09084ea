"""What a round's buffers take, known before SGLang sizes its KV pool."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from sts_kernels.layout import ALIGN, KEPT_TOKENS, Room
from sts_sglang.config import StsConfig
from sts_sglang.headmap import HeadMap

# Where requests may ask for more than the configured keep, a list holds twice that of the longest context,
# and this part of it at least. Who asks for more at its length attends to everything.
OWN_KEEP, OWN_SLACK = 0.25, 2
# Bytes that draft attention may take for what the rows of a call saw, until their log-sum-exps are known:
# so many requests at a time.
SCRATCH = 512 << 20


class Capacity(NamedTuple):
    """What the buffers of a round hold. Every request has its own part of them: requests that share a prefix
    are scored each for itself, and are together many times what the KV pool holds.

    requests: of a batch. context: tokens of the longest context, rounded up to whole blocks of scores.
    """

    requests: int
    context: int

    @classmethod
    def of(cls, requests: int, context: int) -> Capacity:
        return cls(requests, -(-context // ALIGN) * ALIGN)

    def budget(self, config: StsConfig) -> int:
        """Tokens of the longest list, before a head map splits them."""
        budget = config.budget_for(self.context)
        if config.request_keep == "at_most":  # of the context, whatever the policy
            return max(budget, config.budget_for(self.context, config.share))
        if config.request_keep == "any":
            budget = min(self.context, max(OWN_SLACK * budget, math.ceil(OWN_KEEP * self.context)))
        return budget

    def longest(self, config: StsConfig, head_map: HeadMap) -> int:
        """Tokens of the longest list of a head."""
        longest = math.ceil(head_map.longest_growth() * self.budget(config))
        if head_map.shares is not None:  # parts are rounded up, and have sink and recent at least
            longest = max(longest, config.forced) + 1
        return min(longest, self.context)

    def room(self, config: StsConfig, head_map: HeadMap) -> Room:
        """Of one request."""
        channels, budget = len(head_map.channels), self.budget(config)
        longest = math.ceil(head_map.list_growth() * budget)
        if head_map.shares is not None:  # parts are rounded up, and have sink and recent at least
            longest += 1 + config.sink + config.recent
        longest += KEPT_TOKENS if config.keeps_selections else 0
        return Room(channels, self.context, budget, channels * longest)

    def nbytes(self, config: StsConfig, head_map: HeadMap) -> int:
        """Of scores and lists, of selections that are kept, and of what remembering notes: with whom a
        column's slot is shared."""
        room = self.room(config, head_map)
        lists = room.entries * (8 if config.sparse_draft else 4)  # a sparse draft reads a list of its own
        notes = 0 if config.history == "off" else 4 * self.context
        kept, table = (kept_bytes(room), 4 * self.context) if config.keeps_selections else (0, 0)
        return self.requests * (2 * room.channels * self.context + lists + kept + notes) + table


class Need(NamedTuple):
    """Bytes that a part of the machinery takes, before the KV pool has a size."""

    fixed: float = 0.0
    per_token: float = 0.0  # of the KV pool


def kept_bytes(room: Room) -> int:
    """Of a request in `layout.Kept`."""
    return 4 * room.entries + room.channels * (8 + 4) + 7 * 8


def scratch_bytes(context: int, kv_heads: int, rows: int) -> int:
    """Of one request in draft attention: a float16 for each of a KV head's query rows in a step, which are
    (1 + topk) * group, and their maximum in float32 by block."""
    return kv_heads * rows * (2 * context + 4 * (context // ALIGN))


def at_once(context: int, kv_heads: int, rows: int) -> int:
    """Requests that are scored within SCRATCH bytes, and at least one."""
    return max(1, SCRATCH // scratch_bytes(context, kv_heads, rows))


def parted(requests: int, most: int) -> list[slice]:
    """A batch in neighbours, so many at a time."""
    return [slice(first, min(first + most, requests)) for first in range(0, requests, most)]


def history_bytes_per_token(channels: int, bytes_per_score: int = 2) -> int:
    """float16 a channel, or what the reference server has, and int64: who touched the slot, and when."""
    return bytes_per_score * channels + 8


def reserve(available: int, kv_bytes_per_token: int, context_len: int, need: Callable[[int], Need]) -> int:
    """Part of `available` bytes to leave free, so that a pool of the rest and its buffers fit together.

    Args:
        need: by the longest context, which is `context_len` or what the pool holds, if that is less.
    """

    def left(context: int) -> int:
        fixed, per_token = need(context)
        rest = max(0, available - int(fixed))
        return available - int(rest * kv_bytes_per_token / (kv_bytes_per_token + per_token))

    def holds(context: int) -> bool:
        return available - left(context) >= context * kv_bytes_per_token

    low, high = 1, context_len
    while low < high:  # the longest context that a pool has room for beside its buffers
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    # A pool that ends this search holds a little more than `low`, which may need one more block of scores.
    return left(min(low + 1, context_len))
