"""What the draft and the target of one scheduler process share."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from sts_kernels import ops
from sts_sglang import compat, headmap, memory
from sts_sglang.config import ConfigError, StsConfig, quoted, request_keep
from sts_sglang.importance import RoundState
from sts_sglang.metrics import read_counters
from sts_sglang.selectors import SCRATCH, LayerSelector, request_bytes
from sts_sglang.validate import draft_config

if TYPE_CHECKING:
    from sts_kernels.reference import Plan
    from sts_sglang.backends.flashinfer_verify import FlashInferVerify
    from sts_sglang.headmap import HeadCounts, ModelPaths
    from sts_sglang.importance import Selection
    from sts_sglang.memory import Sizes

logger = logging.getLogger(__name__)

MAX_REQUESTS = 4096  # SGLang's own bound where the user gives none (resolve_max_num_reqs)

_current: StsRuntime | None = None


class DraftShape(NamedTuple):
    """What the round's state needs to know of the draft."""

    num_steps: int
    topk: int
    head_dim: int
    requests: int  # request slots, the padding slot included
    slots: int  # KV slots, page 0 included
    sizes: Sizes  # of the buffers that follow the KV pool
    pool: Any  # KV pool of the draft
    req_to_token: torch.Tensor
    dtype: torch.dtype


class StsRuntime:
    """Configuration, head map, the round's state and the ops that work on it.

    Args:
        config: validated configuration.
        target, draft: attention shapes of the two models.
        shape: of the draft pass (steps, branches, head size and scaling, pools).
        device: where the state lives.
        models: where the weights are, for the fingerprints of head maps.
    """

    def __init__(
        self,
        config: StsConfig,
        target: HeadCounts,
        draft: HeadCounts,
        shape: DraftShape,
        device: str,
        models: ModelPaths | None = None,
    ):
        config.check_layers(target.layers)
        self.head_map = headmap.of_config(config, target, draft, models)
        self.config = config = headmap.served(config, self.head_map)
        self.device = device
        self.kernel = kernel_for(config, device)
        self.ops = ops("torch" if self.kernel == "torch" else "triton")
        self.num_steps = shape.num_steps
        # Of them the carried row; the last step of a round does not run.
        self.scoring_steps = 1 if config.sparse_draft else shape.num_steps - 1
        self.rows_per_round = 1 + self.scoring_steps * shape.topk
        self.draft_pool, self.req_to_token = shape.pool, shape.req_to_token
        self.draft_scaling = shape.head_dim**-0.5
        self.state = RoundState(
            config,
            self.head_map,
            shape.requests,
            shape.slots,
            shape.sizes,
            draft.q_heads,
            shape.head_dim,
            shape.dtype,
            device,
            # Exact on the CPU, the reference. On CUDA the torch ops stand beside the kernels, and a tenth of
            # a context reaches down to scores that only float32 tells from zero.
            torch.float32 if device == "cpu" and self.kernel == "torch" else torch.float16,
        )
        self.selector = None if config.selector == "draft" else self._comparison(target, shape.requests)
        self.headwise: FlashInferVerify | None = None  # of kernel flashinfer, set by bind
        self.dense = "unknown"  # class of the target's dense backend, set by bind
        self.kv_bytes = 0  # of both KV pools, set by bind
        self.graphs: dict[str, bool] = {}
        self._head_channels = [
            torch.tensor(self.head_map.head_channels(layer), dtype=torch.int32, device=device)
            for layer in range(target.layers)
        ]
        self._target_heads = torch.stack(self._head_channels)
        own = self.head_map.of_draft() if config.sparse_draft else []
        self.draft_heads = torch.tensor(own, dtype=torch.int32, device=device)  # [layers, H_kv] or nothing

    def plan_verify(self, selection: Selection, seq_lens: torch.Tensor) -> Plan | None:
        """How Triton's verify parts its work in every layer; the other kernels, and selectors that make their
        lists layer by layer, have no such plan."""
        if self.kernel != "triton" or self.selector is not None:
            return None
        return self._plan(selection, self._target_heads, seq_lens)

    def plan_contexts(self, seq_lens: torch.Tensor) -> Plan | None:
        """The same for dense draft steps."""
        if self.kernel == "torch":
            return None
        from sts_kernels.draft_attention import plan_contexts  # imports Triton, as below

        kv_heads = self.draft_pool.get_key_buffer(0).shape[1]
        return plan_contexts(seq_lens, kv_heads, self.req_to_token.shape[1])

    def plan_draft(self, selection: Selection, seq_lens: torch.Tensor) -> Plan | None:
        """The same for sparse draft steps."""
        return None if self.kernel == "torch" else self._plan(selection, self.draft_heads, seq_lens)

    def _plan(self, selection: Selection, heads: torch.Tensor, seq_lens: torch.Tensor) -> Plan:
        from sts_kernels.verify import splits  # imports Triton, which the torch ops do without

        programs = splits(seq_lens.numel() * heads.shape[1], self.req_to_token.shape[1])
        return self.ops.plan_verify(*selection, heads, seq_lens, *programs)

    def _comparison(self, target: HeadCounts, requests: int) -> LayerSelector:
        """Selects in the draft's stead, over the same columns; on a GPU without a look at the lengths."""
        scores, width = self.state.importance, None if self.device == "cpu" else self.req_to_token.shape[1]
        return LayerSelector(
            self.config, target.kv_heads, scores.shape[1], requests, scores.dtype, self.device, width
        )

    def head_channels(self, target_layer: int) -> torch.Tensor:
        """int32 [H_kv], the channel each KV head of a target layer selects by."""
        return self._head_channels[target_layer]

    def admit(self, reqs: list[Any]) -> None:
        """Note the keep each request of a prefill batch asks for; its slot may have had another owner."""
        keeps = []
        for req in reqs:
            try:
                keep = request_keep(req.sampling_params.custom_params, self.config)
            except ConfigError as error:
                # The tokenizer manager answers 400 to these; one that comes by another road must not
                # take the scheduler down.
                logger.warning("STS: request %s served with the server's keep: %s", quoted(req.rid), error)
                keep = None
            keeps.append(torch.nan if keep is None else keep)
        slots = torch.tensor([req.req_pool_idx for req in reqs], dtype=torch.int64)
        slots = slots.to(self.device, non_blocking=True)
        values = torch.tensor(keeps, dtype=torch.float64)
        self.state.keeps[slots] = values.to(self.device, non_blocking=True)
        if self.headwise is not None:
            self.headwise.host.admit(reqs, keeps)
        if self.selector is not None:
            self.selector.admit(slots, [req.origin_input_ids for req in reqs])

    def plans(self) -> int:
        """Plans made on the host so far."""
        return 0 if self.headwise is None else self.headwise.plans

    def describe(self) -> dict[str, Any]:
        """The start-up line as data, with the counters so far; also in /get_server_info."""
        channels = len(self.head_map.channels)
        own = {**self.state.nbytes(), **(self.headwise.nbytes() if self.headwise else {})}
        return {
            "config": json.loads(self.config.to_json()),
            "head_map": self.head_map.origin,
            "channels": channels,
            "device": self.device,
            "kernel": self.kernel,
            "dense": self.dense,
            "graphs": self.graphs or "none",
            "columns": self.state.importance.shape[1],
            "memory_bytes": own,
            **self._history_bytes(),
            "memory_share": round(sum(own.values()) / self.kv_bytes, 4) if self.kv_bytes else None,
            "counters": read_counters(self.state.counts, self.plans()),
        }

    def _history_bytes(self) -> dict[str, int]:
        if self.state.history is None:
            return {}
        width = self.state.history.remembered.element_size()
        return {"history_bytes_per_token": memory.history_bytes_per_token(len(self.head_map.channels), width)}


def kernel_for(config: StsConfig, device: str) -> str:
    """`triton` or `torch`, the ops that run, or `flashinfer`: Triton's with FlashInfer's verify attention."""
    if config.kernel != "auto":
        return config.kernel
    return "torch" if device == "cpu" else "triton"


def current() -> StsRuntime | None:
    """The runtime of this process, None unless a draft and a target were bound here."""
    return _current


def bind(worker: Any, config: StsConfig) -> StsRuntime:
    """Join the target's and the draft's backends of a speculative worker.

    Raises:
        RuntimeError: when one of them is not ours; serving on would be dense without saying so.
        ConfigError: when the head map or the dense layers do not fit the models.
    """
    from sts_sglang.backends.draft import CarryLastRow, DraftMultiStepBackend
    from sts_sglang.backends.target import StsTargetBackend

    global _current
    parts = compat.spec_parts(worker)
    target = parts.target_runner.attn_backend
    expected = [(target, StsTargetBackend), (parts.extend_backend, CarryLastRow)]
    if parts.multi_step_backend is not None:
        expected.append((parts.multi_step_backend, DraftMultiStepBackend))
    for backend, cls in expected:
        if not isinstance(backend, cls):
            raise RuntimeError(
                f"STS was asked for, but SGLang built {type(backend).__name__} where {cls.__name__} belongs; "
                "use --attention-backend sts and no other attention backend flag"
            )
    runtime = StsRuntime(
        config,
        headmap.counts(parts.target_runner.model_config),
        headmap.counts(parts.draft_runner.model_config),
        _draft_shape(config, worker, parts),
        str(target.device),
        headmap.ModelPaths.of_server(worker.server_args),
    )
    runtime.dense = type(target.dense).__name__
    pools = (parts.target_runner.token_to_kv_pool, parts.draft_runner.token_to_kv_pool)
    runtime.kv_bytes = sum(sum(pool.get_kv_size_bytes()) for pool in pools)
    compat.use_qlen_tree_mask(worker)
    target.runtime = parts.extend_backend.runtime = runtime
    if runtime.kernel == "flashinfer":
        target.headwise = runtime.headwise = _headwise(runtime, worker.server_args, parts.target_runner)
    if parts.multi_step_backend is not None:
        parts.multi_step_backend.bind(runtime)
    _current = runtime
    return runtime


def reserved_bytes(config: StsConfig, server_args: Any, target: Any, available: int) -> int:
    """Bytes of `available` that a round's buffers take, given the target's ModelConfig."""
    draft = draft_config(server_args, target)
    counts = [headmap.counts(model) for model in (target, draft)]
    # Fingerprints say whose map it is, not how large it is.
    head_map = headmap.of_config(config, *counts)
    group = draft.num_attention_heads // counts[1].kv_heads
    rows = (1 + (server_args.speculative_eagle_topk or 1)) * group
    kv = sum(
        c.layers * c.kv_heads * 2 * m.head_dim * m.dtype.itemsize
        for c, m in zip(counts, (target, draft), strict=True)
    )
    growth = head_map.list_growth(config.keep)
    state = memory.bytes_per_token(config, len(head_map.channels), counts[1].kv_heads, rows, growth)
    requests = server_args.max_running_requests or MAX_REQUESTS
    own = memory.floor_bytes(config, requests, len(head_map.channels), growth)
    if config.selector != "draft":  # scores and lists of a LayerSelector, and what scoring takes
        state += memory.OVERSUBSCRIBED * 6 * counts[0].kv_heads
        rows = server_args.speculative_num_draft_tokens * (target.num_attention_heads // counts[0].kv_heads)
        layer = (counts[0].kv_heads, target.head_dim, target.dtype.itemsize, rows)
        own += max(SCRATCH, request_bytes(target.context_len, *layer))
    if config.kernel == "flashinfer":
        shape = _headwise_shape(server_args, target, requests)
        own += shape.float_workspace() + shape.list_bytes(shape.entries(config, 0, target.context_len))
        state += memory.OVERSUBSCRIBED * shape.list_bytes(8) / 8
    carried = counts[1].layers * draft.num_attention_heads * draft.head_dim * draft.dtype.itemsize
    own += requests * carried
    return memory.reserve(available - own, kv, state) + own


def _headwise_shape(server_args: Any, target: Any, requests: int) -> memory.Headwise:
    """Given the target's ModelConfig, and the requests of the largest batch."""
    return memory.Headwise(
        server_args.speculative_num_draft_tokens,
        target.num_attention_heads,
        target.get_total_num_kv_heads(),
        target.head_dim,
        requests,
        min(requests, compat.largest_decode_graph(server_args)),
    )


def _batch_limit(server_args: Any, table: torch.Tensor) -> int:
    """Most requests of a batch, given req_to_token."""
    return min(table.shape[0], server_args.max_running_requests or table.shape[0])


def _headwise(runtime: StsRuntime, server_args: Any, runner: Any) -> FlashInferVerify:
    from sts_sglang.backends.flashinfer_verify import FlashInferVerify, layer_runs

    table, pool = runner.req_to_token_pool.req_to_token, runner.token_to_kv_pool
    shape = _headwise_shape(server_args, runner.model_config, _batch_limit(server_args, table))
    if pool.get_key_buffer(0).shape[0] * shape.kv_heads >= 2**31:
        raise ConfigError(
            "sts_config.kernel: 'flashinfer' numbers the slots of all KV heads by int32, and the KV pool has "
            "too many; allowed: 'triton', or a smaller --max-total-tokens"
        )
    state = runtime.state
    return FlashInferVerify(
        runtime.config,
        shape,
        runner.dtype,
        shape.entries(runtime.config, pool.size, runner.model_config.context_len),
        state.importance.shape[1],
        state.kv_indices.numel() // state.importance.shape[0],
        layer_runs(runtime.config, runtime.head_map, runner.model_config.num_hidden_layers),
        table.shape[1],
        runtime.ops,
        runtime.device,
        state.clipped,
    )


def check_graphs(captured: dict[str, bool], dense: str) -> dict[str, bool]:
    """The captured passes; RuntimeError when SGLang left one out that runs under graphs."""
    missing = [name for name, on in captured.items() if not on]
    if dense == "TorchBackend" and "draft_extend" in missing:
        missing.remove("draft_extend")
    if missing:
        raise RuntimeError(
            f"STS: SGLang captured no CUDA graph of {', '.join(missing)}; see its log, or serve without "
            "graphs by --disable-cuda-graph"
        )
    return captured


def announce(runtime: StsRuntime) -> None:
    """Log the start-up line."""
    described = runtime.describe()
    described.pop("counters")
    logger.info("STS serves: %s", json.dumps(described))


def _draft_shape(config: StsConfig, worker: Any, parts: compat.SpecParts) -> DraftShape:
    runner = parts.draft_runner
    table, pool = runner.req_to_token_pool.req_to_token, runner.token_to_kv_pool
    requests = _batch_limit(worker.server_args, table)
    return DraftShape(
        num_steps=worker.speculative_num_steps,
        topk=worker.topk,
        head_dim=runner.model_config.head_dim,
        requests=table.shape[0],
        slots=pool.get_key_buffer(0).shape[0],
        sizes=memory.sizes(config, pool.size, requests, runner.model_config.context_len),
        pool=pool,
        req_to_token=table,
        dtype=runner.dtype,
    )
