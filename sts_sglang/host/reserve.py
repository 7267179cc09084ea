"""What a launch leaves free before SGLang sizes its KV pool, so that pool and buffers fit together."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from sts_kernels.layout import part_bytes
from sts_sglang import headmap
from sts_sglang.config import StsConfig, not_allowed
from sts_sglang.core import block_attention, prefill, sizes
from sts_sglang.core.block_attention import Kept
from sts_sglang.core.selectors import registry as selectors
from sts_sglang.core.sizes import Capacity, Need
from sts_sglang.core.verifier import TargetShape
from sts_sglang.host import serves, views
from sts_sglang.verifiers import registry as verifiers

EXTRA = 4  # positions of the table of slots beyond a context and its draft tokens (extra_max_context_len)
MAX_REQUESTS = 4096  # SGLang's own bound where the user gives none (resolve_max_num_reqs)


class _Launch(NamedTuple):
    """draft: None without one. rows: query rows of a draft KV head in one step. requests: of a batch. above:
    bytes of a token in the draft's pool that SGLang does not count. draft_kv: what its keys are kept as.
    chunk: new tokens of the largest prefill, which has those of a context besides unless prompts are
    chunked."""

    config: StsConfig
    target: TargetShape
    draft: views.Model | None
    head_map: headmap.HeadMap
    rows: int
    requests: int
    above: int
    draft_kv: torch.dtype | None
    chunk: int
    chunked: bool

    def need(self, context: int) -> Need:
        """Where no context has more tokens."""
        # The table of slots has a row that pads graphs, and positions for the last round of a context.
        capacity = Capacity.of(self.requests + 1, context + EXTRA + self.target.tokens)
        config = self.config
        shape = self.target._replace(requests=capacity.requests, context_len=capacity.context)
        needs = [
            self._of_round(capacity),
            selectors.need(config, shape, capacity.longest(config, self.head_map)),
            verifiers.of(config.kernel).need(config, shape),
            self._of_prefill(capacity),
            self._of_lists(shape),
            Need(per_token=self.above),
        ]
        return Need(*map(sum, zip(*needs, strict=True)))

    def _of_lists(self, shape: TargetShape) -> Need:
        target, draft = Kept(shape.dtype, shape.kv_dtype, shape.head_dim), self.draft
        drafts = None if draft is None else Kept(draft.dtype, self.draft_kv, draft.head_dim)
        return block_attention.need(self.config, target, drafts)

    def _of_prefill(self, capacity: Capacity) -> Need:
        tokens = self.chunk + (0 if self.chunked else capacity.context)
        channels = len(self.head_map.channels)
        return prefill.need(self.config, channels, tokens, self.requests, capacity.context)

    def _of_round(self, capacity: Capacity) -> Need:
        channels, draft = len(self.head_map.channels), self.draft
        if draft is None:  # nothing is scored for all layers at once
            return Need()
        buffers = capacity.nbytes(self.config, self.head_map)
        stored = sizes.scratch_bytes(capacity.context, draft.counts.kv_heads, self.rows)
        scratch = min(capacity.requests * stored, max(stored, sizes.SCRATCH))
        scratch = max(scratch, part_bytes(capacity.requests * channels))  # one after the other
        carried = draft.counts.layers * draft.counts.q_heads * draft.head_dim * draft.dtype.itemsize
        remembers = self.config.history != "off"
        per_token = sizes.history_bytes_per_token(channels) if remembers else 0
        return Need(buffers + scratch + capacity.requests * carried, per_token)


def reserved_bytes(config: StsConfig, server_args: Any, target: Any, available: int) -> int:
    """Bytes of `available` that a round's buffers take, given the target's ModelConfig.

    Raises `ConfigError` where they leave no room for KV.
    """
    of, draft = views.model(target), None
    if (drafts := serves.draft_config(server_args, target)) is not None:
        draft = views.model(drafts)
    requests = server_args.max_running_requests or MAX_REQUESTS
    ranks, whole = server_args.tp_size, (of.counts, draft and draft.counts)
    head_map = headmap.of_config(config, *whole, views.paths(server_args), ranks)
    of, draft = of.of_rank(ranks), draft and draft.of_rank(ranks)
    rows = (1 + (server_args.speculative_eagle_topk or 1)) * draft.group if draft else 0
    shape, chunk = target_shape(server_args, of, requests), _chunk(server_args)
    kv_bytes, above, draft_kv = of.kv_bytes(shape.kv_dtype), 0, None
    if draft:
        # SGLang counts a token of the draft's pool as if it were kept like the target's.
        counted = draft.kv_bytes(shape.kv_dtype)
        draft_kv = views.kv_asked(server_args, of_draft=config).dtype(draft.dtype)
        own = draft.kv_bytes(draft_kv)
        kv_bytes, above = kv_bytes + counted, max(0, own - counted)
    maps = [head_map.of_rank(rank, ranks, *whole) for rank in range(ranks)]
    launches = [
        _Launch(config, shape, draft, of_rank, rows, requests, above, draft_kv, *chunk) for of_rank in maps
    ]
    # The same on every rank, whose pools must be of one size.
    reserved = max(sizes.reserve(available, kv_bytes, shape.context_len, launch.need) for launch in launches)
    if reserved >= available:
        raise not_allowed(
            "--max-running-requests",
            f"scores and lists of {requests} requests with contexts of up to {shape.context_len} tokens take "
            f"the {available / 2**30:.1f} GiB that weights leave, so that none is left for KV",
            "fewer, a smaller --context-length, or draft 'dense', which needs half the lists"
            if config.sparse_draft
            else "fewer, or a smaller --context-length",
        )
    return reserved


def _chunk(server_args: Any) -> tuple[int, bool]:
    """New tokens of the largest prefill, and whether longer prompts are cut there."""
    if (size := server_args.chunked_prefill_size or 0) > 0:
        return size, True
    return server_args.max_prefill_tokens, False


def target_shape(server_args: Any, target: views.Model, requests: int) -> TargetShape:
    """Of one rank of a launch, whose heads `target` has, given the requests of the largest batch."""
    return TargetShape(
        tokens=server_args.speculative_num_draft_tokens or 1,
        layers=target.counts.layers,
        q_heads=target.counts.q_heads,
        kv_heads=target.counts.kv_heads,
        head_dim=target.head_dim,
        dtype=target.dtype,
        kv_dtype=views.kv_asked(server_args).dtype(target.dtype),
        context_len=target.context_len,
        requests=requests,
        graph_requests=views.decode_graphs(server_args).largest,
    )
