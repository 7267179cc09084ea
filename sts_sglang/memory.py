"""What a round's buffers take, known before SGLang sizes its KV pool."""

from __future__ import annotations

from typing import NamedTuple

from sts_sglang.config import StsConfig

# Requests that share a prefix are scored each for itself, so a batch can have more context tokens than
# the pool has slots. What does not fit attends whole, and is counted as a dense verify.
OVERSUBSCRIBED = 3
# A request's own keep may exceed the configured one: a quarter more room for the lists.
LIST_SLACK = 1.25


class Sizes(NamedTuple):
    """Elements of the buffers of one round."""

    columns: int  # context tokens of a batch that can be scored
    indices: int  # of one channel: tokens that a batch can select


def sizes(config: StsConfig, pool_tokens: int, requests: int, context_len: int) -> Sizes:
    """Buffers for a KV pool of so many tokens, so many running requests and contexts up to so many tokens."""
    columns = min(OVERSUBSCRIBED * pool_tokens, requests * context_len)
    if config.policy == "ratio":
        least = max(config.budget, config.sink + config.recent)
        wanted = int(columns * config.keep * LIST_SLACK) + min(requests, 64) * least
    else:
        wanted = requests * config.budget
    return Sizes(columns, min(columns, wanted))


def bytes_per_token(config: StsConfig, channels: int, draft_kv_heads: int, draft_rows: int) -> float:
    """Bytes that one more token of the KV pool adds.

    Args:
        channels: of the head map; draft_kv_heads: of the draft.
        draft_rows: query rows of a draft KV head in one step, (1 + topk) * group: the draft attention
            keeps what they saw until it knows their log-sum-exp.
    """
    share = min(1.0, config.keep * LIST_SLACK) if config.policy == "ratio" else 1.0
    scored = 2 * channels + 4 * channels * share + 2 * draft_kv_heads * draft_rows
    return OVERSUBSCRIBED * scored + (4 * channels if config.history != "off" else 0)


def reserve(available: int, kv_bytes_per_token: int, state_bytes_per_token: float) -> int:
    """Part of `available` bytes to leave free, so that a pool of the rest and its buffers fit together."""
    return int(available * state_bytes_per_token / (kv_bytes_per_token + state_bytes_per_token))
