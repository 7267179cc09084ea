"""What a round's buffers take, known before SGLang sizes its KV pool."""

from __future__ import annotations

from typing import NamedTuple

from sts_sglang.config import StsConfig

# Requests that share a prefix are scored each for itself, so a batch can have more context tokens than
# the pool has slots. What does not fit attends whole, and is counted as a dense verify.
OVERSUBSCRIBED = 3
# A request's own keep may exceed the configured one: a quarter more room for the lists.
LIST_SLACK = 1.25
# So many requests at once may have lists of the least length, whatever their share is.
FLOORS = 64


class Capacity(NamedTuple):
    """Elements of the buffers of one round."""

    columns: int  # context tokens of a batch that can be scored
    indices: int  # of one channel: tokens that a batch can select


class Need(NamedTuple):
    """Bytes that a part of the machinery takes, before the KV pool has a size."""

    fixed: float = 0.0
    per_token: float = 0.0  # of the KV pool


def capacity(config: StsConfig, pool_tokens: int, requests: int, context_len: int) -> Capacity:
    """Buffers for a KV pool of so many tokens, so many running requests and contexts up to so many tokens."""
    columns = min(OVERSUBSCRIBED * pool_tokens, requests * context_len)
    if config.policy == "ratio":
        wanted = int(columns * config.keep * LIST_SLACK) + min(requests, FLOORS) * _floor(config)
    else:
        wanted = requests * config.budget
    return Capacity(columns, min(columns, wanted))


def _floor(config: StsConfig) -> int:
    return max(config.budget, config.sink + config.recent)


def bytes_per_token(
    config: StsConfig, channels: int, draft_kv_heads: int, draft_rows: int, list_growth: float = 1.0
) -> float:
    """Bytes that one more token of the KV pool adds.

    Args:
        channels: of the head map; draft_kv_heads: of the draft.
        draft_rows: query rows of a draft KV head in one step, (1 + topk) * group: the draft attention
            keeps what they saw until it knows their log-sum-exp.
        list_growth: of the head map.
    """
    share = min(1.0, config.keep * LIST_SLACK) if config.policy == "ratio" else 1.0
    remembers = config.history != "off"
    # Remembering notes with whom a column's slot is shared.
    scores = 2 * channels + (4 if remembers else 0)
    scored = scores + _entry_bytes(config) * channels * share * list_growth + 2 * draft_kv_heads * draft_rows
    return OVERSUBSCRIBED * scored + (history_bytes_per_token(channels) if remembers else 0)


def floor_bytes(config: StsConfig, requests: int, channels: int, list_growth: float = 1.0) -> int:
    """Bytes of the lists of contexts so short that `budget` is more than their share (see `capacity`)."""
    if config.policy != "ratio":
        return 0
    return int(min(requests, FLOORS) * _floor(config) * channels * list_growth * _entry_bytes(config))


def _entry_bytes(config: StsConfig) -> int:
    """Of a list: int32, and one more where the draft reads a list of its own."""
    return 8 if config.sparse_draft else 4


def history_bytes_per_token(channels: int, bytes_per_score: int = 2) -> int:
    """float16 a channel, or what the reference server has, and int64: who touched the slot, and when."""
    return bytes_per_score * channels + 8


def reserve(available: int, kv_bytes_per_token: int, state_bytes_per_token: float) -> int:
    """Part of `available` bytes to leave free, so that a pool of the rest and its buffers fit together."""
    return int(available * state_bytes_per_token / (kv_bytes_per_token + state_bytes_per_token))
