"""What a launch leaves free before SGLang sizes its KV pool, so that pool and buffers fit together."""

from __future__ import annotations

from typing import Any

from sts_sglang import headmap
from sts_sglang.config import StsConfig
from sts_sglang.core import sizes
from sts_sglang.core.selectors import compare
from sts_sglang.core.sizes import Need
from sts_sglang.host import serves, views
from sts_sglang.verifiers import flashinfer

MAX_REQUESTS = 4096  # SGLang's own bound where the user gives none (resolve_max_num_reqs)


def reserved_bytes(config: StsConfig, server_args: Any, target: Any, available: int) -> int:
    """Bytes of `available` that a round's buffers take, given the target's ModelConfig."""
    models = views.model(target), views.model(serves.draft_config(server_args, target))
    requests = server_args.max_running_requests or MAX_REQUESTS
    needs = [
        _of_round(config, server_args, models, requests),
        _of_selector(config, server_args, models[0]),
        _of_verifier(config, server_args, models[0], requests),
    ]
    fixed, per_token = (sum(parts) for parts in zip(*needs, strict=True))
    kv = sum(model.kv_bytes for model in models)
    return sizes.reserve(available - int(fixed), kv, per_token) + int(fixed)


def _of_round(config, server_args, models: tuple[views.Model, views.Model], requests: int) -> Need:
    target, draft = models
    # Fingerprints say whose map it is, not how large it is.
    head_map = headmap.of_config(config, target.counts, draft.counts)
    channels, growth = len(head_map.channels), head_map.list_growth(config.keep)
    rows = (1 + (server_args.speculative_eagle_topk or 1)) * draft.group
    per_token = sizes.bytes_per_token(config, channels, draft.counts.kv_heads, rows, growth)
    carried = draft.counts.layers * draft.counts.q_heads * draft.head_dim * draft.dtype.itemsize
    floor = sizes.floor_bytes(config, requests, channels, growth)
    return Need(floor + requests * carried, per_token)


def _of_selector(config: StsConfig, server_args: Any, target: views.Model) -> Need:
    """The draft's choice needs nothing besides the buffers of a round."""
    if config.selector == "draft":
        return Need()
    rows = server_args.speculative_num_draft_tokens * target.group
    return compare.need(
        target.counts.kv_heads, target.head_dim, target.dtype.itemsize, rows, target.context_len
    )


def _of_verifier(config: StsConfig, server_args: Any, target: views.Model, requests: int) -> Need:
    """The ops of this package need nothing besides the buffers of a round."""
    if config.kernel != "flashinfer":
        return Need()
    return flashinfer_shape(server_args, target, requests).need(config, target.context_len)


def flashinfer_shape(server_args: Any, target: views.Model, requests: int) -> flashinfer.Shape:
    """Given the requests of the largest batch."""
    return flashinfer.Shape(
        server_args.speculative_num_draft_tokens,
        target.counts.q_heads,
        target.counts.kv_heads,
        target.head_dim,
        requests,
        min(requests, views.decode_graphs(server_args).largest),
    )
