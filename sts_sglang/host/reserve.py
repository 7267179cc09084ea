"""What a launch leaves free before SGLang sizes its KV pool, so that pool and buffers fit together."""

from __future__ import annotations

from typing import Any

from sts_sglang import headmap
from sts_sglang.config import StsConfig
from sts_sglang.core import sizes
from sts_sglang.core.selectors import registry as selectors
from sts_sglang.core.sizes import Need
from sts_sglang.core.verifier import TargetShape
from sts_sglang.host import serves, views
from sts_sglang.verifiers import registry as verifiers

MAX_REQUESTS = 4096  # SGLang's own bound where the user gives none (resolve_max_num_reqs)


def reserved_bytes(config: StsConfig, server_args: Any, target: Any, available: int) -> int:
    """Bytes of `available` that a round's buffers take, given the target's ModelConfig."""
    models = views.model(target), views.model(serves.draft_config(server_args, target))
    requests = server_args.max_running_requests or MAX_REQUESTS
    shape = target_shape(server_args, models[0], requests)
    needs = [
        _of_round(config, server_args, models, requests),
        selectors.need(config, shape),
        verifiers.of(config.kernel).need(config, shape),
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


def target_shape(server_args: Any, target: views.Model, requests: int) -> TargetShape:
    """Of a launch, given the requests of the largest batch."""
    return TargetShape(
        tokens=server_args.speculative_num_draft_tokens,
        layers=target.counts.layers,
        q_heads=target.counts.q_heads,
        kv_heads=target.counts.kv_heads,
        head_dim=target.head_dim,
        dtype=target.dtype,
        context_len=target.context_len,
        requests=requests,
        graph_requests=views.decode_graphs(server_args).largest,
    )
