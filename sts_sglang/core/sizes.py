"""What a round's buffers take, known before SGLang sizes its KV pool."""

from __future__ import annotations

from typing import NamedTuple

from sts_sglang.config import StsConfig

# Requests that share a prefix are scored each for itself, so a batch can have more context tokens than
# the pool has slots. What does not fit attends whole, and is counted as a dense verify.
OVERSUBSCRIBED = 3
# A request's own keep may exceed the configured one: a quarter more room for the lists.
LIST_SLACK = 1.25
# The FlashInfer verify path plans lists of whole blocks: a plan holds until a list outgrows its last one.
PLAN_BLOCK = 256
# FlashInfer splits lists over two thread blocks a multiprocessor; no device has more than 160 of them.
PLAN_GRID = 320
# So many requests at once may have lists of the least length, whatever their share is.
FLOORS = 64


class Sizes(NamedTuple):
    """Elements of the buffers of one round."""

    columns: int  # context tokens of a batch that can be scored
    indices: int  # of one channel: tokens that a batch can select


def sizes(config: StsConfig, pool_tokens: int, requests: int, context_len: int) -> Sizes:
    """Buffers for a KV pool of so many tokens, so many running requests and contexts up to so many tokens."""
    columns = min(OVERSUBSCRIBED * pool_tokens, requests * context_len)
    if config.policy == "ratio":
        wanted = int(columns * config.keep * LIST_SLACK) + min(requests, FLOORS) * _floor(config)
    else:
        wanted = requests * config.budget
    return Sizes(columns, min(columns, wanted))


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
    """Bytes of the lists of contexts so short that `budget` is more than their share (sizes)."""
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


class Headwise(NamedTuple):
    """What the FlashInfer verify path must hold: T query rows of a GQA group for every (request, KV head)."""

    tokens: int  # T
    q_heads: int
    kv_heads: int
    head_dim: int
    requests: int  # of a batch
    graph_requests: int  # of the largest CUDA graph, 0 without graphs

    @property
    def group(self) -> int:
        return self.q_heads // self.kv_heads

    def entries(self, config: StsConfig, pool_tokens: int, context_len: int) -> int:
        """Entries of the lists of one KV head; a batch that needs more loses tokens, and counts them."""
        contexts = min(OVERSUBSCRIBED * pool_tokens, self.requests * context_len)
        fixed = config.budget if config.policy == "fixed" else 0
        return contexts + max(self.requests, self.graph_requests) * (PLAN_BLOCK + fixed + self.tokens)

    def list_bytes(self, entries: int) -> int:
        """Of lists and mask bits of so many entries a KV head; each pair's bits start at a byte."""
        return self.kv_heads * (4 * entries + self.mask_bytes(entries))

    def mask_bytes(self, entries: int) -> int:
        """Of one KV head."""
        return -(-self.tokens * entries // 8) + max(self.requests, self.graph_requests)

    @property
    def tile(self) -> int:
        """Query rows of FlashInfer's thread blocks (FA2DetermineCtaTileQ)."""
        rows = self.tokens * self.group
        return 16 if rows <= 16 else 64 if rows <= 64 else 128

    def planned_requests(self, pairs: int) -> int:
        """Requests to plan a graph of so many (request, KV head) pairs for, the last ones empty.

        For graphs FlashInfer sizes its tile for the longest query there can be among so many rows of so
        many requests. Just enough empty ones make that T, not a tile of 128 rows that are nearly all waste.
        """
        return pairs if self.tile == 128 else max(0, pairs - 1) * self.tokens + 1

    def slots(self, pairs: int) -> int:
        """Thread blocks of the graph of so many pairs, at least those of any batch that is split."""
        tiles = -(-pairs * self.tokens * self.group // self.tile) + self.planned_requests(pairs)
        return max(PLAN_GRID, tiles)

    def float_workspace(self) -> int:
        """Bytes for partial results (PrefillPlan): output and log-sum-exp of every row of every block."""
        slots = self.slots(self.graph_requests * self.kv_heads)
        return self.group * slots * self.tile * (self.head_dim + 1) * 4 + 1024

    def int_workspace(self, pairs: int, slots: int) -> int:
        """Bytes of one plan."""
        rows = pairs * self.tokens
        return 16 * slots + 8 * (rows + self.planned_requests(pairs)) + 4096
