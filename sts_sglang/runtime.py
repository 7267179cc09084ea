"""What the draft and the target of one scheduler process share."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, Any

import torch

from sts_sglang import compat, headmap
from sts_sglang.config import ConfigError, StsConfig, request_keep
from sts_sglang.importance import ImportanceRows
from sts_sglang.metrics import Counters

if TYPE_CHECKING:
    from sts_sglang.headmap import HeadCounts, HeadMap

logger = logging.getLogger(__name__)

_current: StsRuntime | None = None


class StsRuntime:
    """Configuration, head map, fresh importance, per-request keeps and counters."""

    def __init__(self, config: StsConfig, target: HeadCounts, draft: HeadCounts, device: str):
        config.check_layers(target.layers)
        self.config = config
        self.device = device
        self.head_map: HeadMap = (
            headmap.load(config.head_map, target, draft)
            if config.head_map
            else headmap.proportional(target, draft)
        )
        self.rows = ImportanceRows(config.pool_rows, config.pool_heads)
        self.request_keep: dict[int, float] = {}
        self.counters = Counters()
        self.graphs: dict[str, bool] = {}
        self._head_channels = [
            torch.tensor(self.head_map.head_channels(layer), device=device) for layer in range(target.layers)
        ]
        self._weights: dict[int, torch.Tensor] = {}

    def head_channels(self, target_layer: int) -> torch.Tensor:
        """int64 [H_kv], the channel each KV head of a target layer selects by."""
        return self._head_channels[target_layer]

    def channel_weights(self, draft_layer: int, q_heads: int) -> torch.Tensor:
        """float32 [channels, H_q] of a draft layer (see HeadMap.channel_weights)."""
        if draft_layer not in self._weights:
            weights = self.head_map.channel_weights(draft_layer, q_heads)
            self._weights[draft_layer] = weights.to(self.device)
        return self._weights[draft_layer]

    def admit(self, reqs: list[Any]) -> None:
        """Note the keep each request of a prefill batch asks for; its slot may have had another owner."""
        for req in reqs:
            self.request_keep.pop(req.req_pool_idx, None)
            try:
                keep = request_keep(req.sampling_params.custom_params)
            except ConfigError as error:
                # The tokenizer manager answers 400 to these; one that comes by another road must not
                # take the scheduler down.
                logger.warning("STS: request %s served with the server's keep: %s", req.rid, error)
                continue
            if keep is not None:
                self.request_keep[req.req_pool_idx] = keep

    def describe(self) -> dict[str, Any]:
        """The start-up line as data, with the counters so far; also in /get_server_info."""
        channels = len(self.head_map.channels)
        return {
            "config": json.loads(self.config.to_json()),
            "head_map": self.head_map.origin,
            "channels": channels,
            "device": self.device,
            "kernel": "torch",
            "graphs": self.graphs or "none",
            # float32 rows; a request holds one between rounds and one more per draft step in a round
            "importance_bytes_per_token_and_row": 4 * channels,
            "importance_bytes": self.rows.nbytes(),
            "counters": self.counters.as_dict(),
        }


def current() -> StsRuntime | None:
    """The runtime of this process, None unless a draft and a target were bound here."""
    return _current


def bind(worker: Any, config: StsConfig) -> StsRuntime:
    """Join the target's and the draft's backends of a speculative worker.

    Raises:
        RuntimeError: when one of them is not ours; serving on would be dense without saying so.
        ConfigError: when the head map or the dense layers do not fit the models.
    """
    from sts_sglang.backends.draft import DraftExtendBackend, DraftMultiStepBackend
    from sts_sglang.backends.target import StsTargetBackend

    global _current
    parts = compat.spec_parts(worker)
    target = parts.target_runner.attn_backend
    expected = [(target, StsTargetBackend), (parts.extend_backend, DraftExtendBackend)]
    if parts.multi_step_backend is not None:
        expected.append((parts.multi_step_backend, DraftMultiStepBackend))
    for backend, cls in expected:
        if not isinstance(backend, cls):
            raise RuntimeError(
                f"STS was asked for, but SGLang built {type(backend).__name__} where {cls.__name__} belongs; "
                "use --attention-backend sts and no other attention backend flag"
            )
    runtime = StsRuntime(
        config, _head_counts(parts.target_runner), _head_counts(parts.draft_runner), str(target.device)
    )
    compat.use_qlen_tree_mask(worker)
    target.runtime = parts.extend_backend.runtime = runtime
    if parts.multi_step_backend is not None:
        parts.multi_step_backend.bind(runtime)
    _current = runtime
    return runtime


def announce(runtime: StsRuntime) -> None:
    """Log the start-up line."""
    described = runtime.describe()
    described.pop("counters")
    logger.info("STS serves: %s", json.dumps(described))


def _head_counts(model_runner: Any) -> HeadCounts:
    config = model_runner.model_config
    return headmap.HeadCounts(
        layers=len(model_runner.token_to_kv_pool.k_buffer),
        q_heads=config.num_attention_heads,
        kv_heads=config.get_total_num_kv_heads(),
    )
