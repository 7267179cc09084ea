"""From SGLang's workers and backends to one bound draft-target pair, and what it says of itself."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from sts_kernels import Ops, ops
from sts_kernels.layout import FP8, PAGE, Count
from sts_sglang import headmap
from sts_sglang.backends import dense
from sts_sglang.backends.carry import CarryLastRow
from sts_sglang.backends.draft import DraftMultiStepBackend
from sts_sglang.backends.target import StsTargetBackend
from sts_sglang.config import StsConfig, not_allowed, shown
from sts_sglang.core import block_attention, sizes
from sts_sglang.core.aside import StandAside, limit_of
from sts_sglang.core.block_attention import Fa3, Heads
from sts_sglang.core.block_selectors import ByDraft, ByOwnQueries
from sts_sglang.core.channels import Channels
from sts_sglang.core.prefill import DraftPrefill, Reader, ReadsFirst, SparsePrefill
from sts_sglang.core.ranks import ALONE, Ranks
from sts_sglang.core.refresh import Refresh
from sts_sglang.core.round import Cache, Draft, RoundState
from sts_sglang.core.runtime import Runtime
from sts_sglang.core.selectors import registry as selectors
from sts_sglang.core.selectors import tokens
from sts_sglang.core.sizes import Capacity
from sts_sglang.core.sketches import PageSketches, Sketches, TokenSketches
from sts_sglang.core.verifier import TargetShape, VerifierParts
from sts_sglang.headmap import HeadCounts, ModelPaths
from sts_sglang.host import reserve, views
from sts_sglang.host.metrics import read_counters
from sts_sglang.host.releases import release
from sts_sglang.verifiers import by_ops
from sts_sglang.verifiers import registry as verifiers

if TYPE_CHECKING:
    from sglang.srt.managers.tp_worker import TpModelWorker
    from sglang.srt.model_executor.model_runner import ModelRunner
    from sglang.srt.speculative.eagle_worker_v2 import EagleDraftWorker, EAGLEWorkerV2

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Bound:
    """The pair of this process, or its target alone, and what the start-up line says besides.

    verify: the target's backend. kv_bytes: of both KV pools. graphs: by pass, whether it runs
    as a CUDA graph; empty without graphs, and before they are captured.
    """

    runtime: Runtime
    verify: StsTargetBackend
    kv_bytes: int
    graphs: dict[str, bool]

    @property
    def dense(self) -> str:
        """Class of the target's dense backend."""
        return type(self.verify.dense).__name__

    @property
    def alone(self) -> bool:
        """Whether no draft speculates for the target."""
        return self.runtime.draft is None

    def describe(self) -> dict[str, Any]:
        """The start-up line as data, with the counters so far; also in /server_info. Bytes and channels are
        of a rank. Every rank has to ask, for the counters are of all."""
        runtime, own = self.runtime, self.runtime.nbytes()
        return {
            "config": json.loads(runtime.config.to_json()),
            "selects_by": runtime.selects_by,
            "prefill": runtime.prefills,
            **self._prefill_attends(),
            **self._draft_prefill(),
            "head_map": runtime.head_map.origin,
            "channels": runtime.channels.number,
            "ranks": runtime.ranks.size,
            "device": runtime.device,
            "kernel": runtime.kernel,
            "dense": self.dense,
            "stands_aside": runtime.aside.said,
            "graphs": self.graphs or "none",
            "longest_context": runtime.state.room.columns,
            "longest_list": runtime.state.room.budget,
            "memory_bytes": own,
            **self._history_bytes(),
            **self._draft_kv(),
            **_simulated(),
            "memory_share": round(sum(own.values()) / self.kv_bytes, 4),
            "counters": read_counters(runtime.totals(), runtime.verifier.host_plans),
        }

    def _prefill_attends(self) -> dict[str, str]:
        """What attends to what a sparse prefill selects."""
        prefill = self.runtime.prefill
        return {} if prefill is None else {"prefill_attends_by": prefill.reader.attention.name}

    def _draft_prefill(self) -> dict[str, str]:
        """What a draft's own prefill attends to, and what does."""
        if self.alone:
            return {}
        own = self.runtime.draft_prefill
        attends = {} if own is None else {"draft_prefill_attends_by": own.reader.attention.name}
        return {"draft_prefill": self.runtime.draft_prefills, **attends}

    def _history_bytes(self) -> dict[str, int]:
        if (history := self.runtime.state.history) is None:
            return {}
        width = history.remembered.element_size()
        number = self.runtime.channels.number
        return {"history_bytes_per_token": sizes.history_bytes_per_token(number, width)}

    def _draft_kv(self) -> dict[str, str]:
        """What the draft's keys are kept as."""
        if self.alone:
            return {}
        return {"draft_kv": str(self.runtime.draft.pools.layer(0).k.dtype).removeprefix("torch.")}


def _simulated() -> dict[str, float]:
    """How many tokens a round accepts by chance, where a bench asks for that: its output means nothing."""
    from sglang.srt.environ import envs

    length = envs.SGLANG_SIMULATE_ACC_LEN.get()
    return {"simulated_accept_length": length} if length > 0 else {}


_bound: Bound | None = None


def current() -> Bound | None:
    """What was bound in this process, None before and where another backend serves."""
    return _bound


def create_backend(config: StsConfig, runner: ModelRunner):
    """Attention backend of a model runner: the draft's carries rows, the target's verifies sparsely."""
    if runner.is_draft_worker:
        return dense.of_draft_extend(config, runner)
    name = dense.name_of(config, runner)
    return StsTargetBackend(runner, dense.of_target(name, runner), name)


class WorkerParts(NamedTuple):
    """Runners and backends of a speculative worker. steps: None with one speculative step."""

    target: ModelRunner
    draft: ModelRunner
    verify: StsTargetBackend
    steps: DraftMultiStepBackend | None
    extend: CarryLastRow


def parts(worker: EAGLEWorkerV2) -> WorkerParts:
    """After the backends of a worker exist.

    Raises:
        RuntimeError: when one of them is not ours; serving on would be dense without saying so.
    """
    draft: EagleDraftWorker = worker._draft_worker
    target: TpModelWorker = worker._target_worker
    runner: ModelRunner = target.model_runner
    verify, steps, extend = runner.attn_backend, draft.draft_attn_backend, draft.draft_extend_attn_backend
    expected = [(verify, StsTargetBackend), (extend, CarryLastRow)]
    if steps is not None:
        expected.append((steps, DraftMultiStepBackend))
    _check_ours(*expected)
    return WorkerParts(runner, draft.draft_runner, verify, steps, extend)


def bind(worker: EAGLEWorkerV2, config: StsConfig) -> Bound:
    """Join the target's and the draft's backends of a speculative worker.

    Raises:
        RuntimeError: when one of them is not ours.
        ConfigError: when the head map or the dense layers do not fit the models, or KV is of another dtype.
    """
    global _bound
    found = parts(worker)
    target, draft = views.runner(found.target), views.runner(found.draft)
    args = views.resolved(worker.server_args)
    _check_kv(target, views.kv_asked(args), dense.name_of(config, found.target))
    _check_kv(draft, views.kv_asked(args, of_draft=config), dense.name_of(config, found.draft))
    _attention_of(found.target, target, args.tp_size)
    runtime = assemble(
        config,
        target.model.counts,
        draft.model.counts,
        _cache_of(draft),
        _draft_of(worker, draft, _attention_of(found.draft, draft, args.tp_size)),
        target.device,
        models=views.paths(args),
        shape=_target_of(args, target),
        ranks=views.ranks(args),
        fa3=_fa3_of(found.verify),
    )
    release.use_qlen_tree_mask(worker._draft_worker)
    for backend in (found.verify, found.extend, found.steps):
        if backend is not None:
            backend.bind(runtime)
    _bound = Bound(runtime, found.verify, target.pools.nbytes() + draft.pools.nbytes(), {})
    return _bound


def bind_alone(worker: TpModelWorker, config: StsConfig) -> Bound:
    """Give the backend of a target that no draft speculates for what it decodes with.

    Raises: as `bind`.
    """
    global _bound
    model_runner: ModelRunner = worker.model_runner
    backend = model_runner.attn_backend
    _check_ours((backend, StsTargetBackend))
    target, args = views.runner(model_runner), views.resolved(worker.server_args)
    _check_kv(target, views.kv_asked(args), backend.dense_name)
    _attention_of(model_runner, target, args.tp_size)
    runtime = assemble(
        config,
        target.model.counts,
        None,
        _cache_of(target),
        None,
        target.device,
        models=views.paths(args),
        shape=_target_of(args, target),
        ranks=views.ranks(args),
        fa3=_fa3_of(backend),
    )
    backend.bind(runtime)
    _bound = Bound(runtime, backend, target.pools.nbytes(), {})
    return _bound


def _check_ours(*expected: tuple[object, type]) -> None:
    for backend, cls in expected:
        if not isinstance(backend, cls):
            raise RuntimeError(
                f"STS was asked for, but SGLang built {type(backend).__name__} where {cls.__name__} belongs; "
                "use --attention-backend sts and no other attention backend flag"
            )


def _check_kv(runner: views.Runner, asked: views.KvAsked, dense_name: str) -> None:
    """A checkpoint may have set another dtype than the launch was asked for; a device may not have it."""
    kept, wanted = runner.pools.layer(0).k.dtype, asked.dtype(runner.dtype)
    if kept != wanted:
        raise not_allowed(
            asked.flag,
            f"keys are kept as {kept}, where {asked.value} of a model in {runner.dtype} is {wanted}",
            "fp8_e4m3, or bfloat16 with a model that runs in it",
        )
    if kept not in FP8 and runner.pools.scaled and dense_name == "flashinfer":
        raise not_allowed(
            asked.flag,
            f"SGLang's FlashInfer scales keys of {kept} too, by what the checkpoint means for FP8",
            "fp8_e4m3, or sts_config.dense 'fa3' or 'torch'",
        )
    if kept in FP8 and runner.device != "cpu" and torch.cuda.get_device_capability() < (8, 9):
        raise not_allowed(asked.flag, "this GPU has no FP8, which begins with compute capability 8.9", "auto")


def _attention_of(of_model: ModelRunner, runner: views.Runner, ranks: int) -> list[views.Layer]:
    """The attention layers that a model has on one of so many ranks, in their order, once it is known that
    they are what its configuration was taken for: another package may have put a class of its own in the
    place of one that was read.

    Raises:
        RuntimeError: naming the layer.
    """
    counts, dim = runner.model.counts.of_rank(ranks), runner.model.head_dim
    found = sorted(views.attention_layers(of_model), key=lambda layer: views.layer(layer).number)
    layers = [views.layer(layer) for layer in found]
    which = "draft" if of_model.is_draft_worker else "target"
    if [layer.number for layer in layers] != list(range(counts.layers)):
        numbers = [layer.number for layer in layers]
        raise RuntimeError(
            f"STS: the {which} has attention layers {shown(numbers)}, and its configuration {counts.layers} "
            "layers; sts serves one attention layer in each"
        )
    for layer, shape in zip(found, layers, strict=True):
        if (what := views.beyond_plain(layer)) is not None:
            raise RuntimeError(f"STS: layer {shape.number} of the {which} has {what}; sts does not serve it")
        has = shape.q_heads, shape.kv_heads, shape.head_dim, shape.v_head_dim
        if has != (counts.q_heads, counts.kv_heads, dim, dim):
            raise RuntimeError(
                f"STS: layer {shape.number} of the {which} has {has} query heads, KV heads, dimensions of "
                f"keys and of values; its configuration says {(counts.q_heads, counts.kv_heads, dim, dim)}"
            )
    return layers


def assemble(
    config: StsConfig,
    target: HeadCounts,
    draft_counts: HeadCounts | None,
    cache: Cache,
    draft: Draft | None,
    device: str,
    *,
    models: ModelPaths | None = None,
    shape: TargetShape | None = None,
    ranks: Ranks = ALONE,
    fa3: Fa3 | None = None,
) -> Runtime:
    """The runtime of a pair, or of a target alone; on one of several ranks, of its heads.

    Args:
        config: validated configuration. target, draft_counts: attention shapes of the whole models.
        cache: where contexts are. draft: of its pass, None without one. device: where the state lives.
        models: where the weights are, for the fingerprints of head maps.
        shape: of the target on this rank, for verifiers that plan for it. ranks: who has the other heads.
        fa3: where it can attend to lists.
    """
    config.check_layers(target.layers)
    head_map = headmap.of_config(config, target, draft_counts, models, ranks.size)
    config = config.for_launch(draft is not None, head_map.directions is not None)
    config = headmap.served(config, head_map)
    config = replace(config, stand_aside=limit_of(config, shape, device))
    head_map = head_map.of_rank(ranks.rank, ranks.size, target, draft_counts)
    target = target.of_rank(ranks.size)
    kernel = kernel_for(config, device)
    own_ops = ops_for(kernel, device)
    own = ops(own_ops)
    channels = Channels.of(head_map, device, config.hears_draft)
    # Exact on the CPU, the reference. On CUDA the torch ops stand beside the kernels, and a tenth of
    # a context reaches down to scores that only float32 tells from zero.
    exact = device == "cpu" and own_ops == "torch"
    dtype = torch.float32 if exact else torch.float16
    state = RoundState(config, head_map, channels, cache, draft, device, dtype)
    sketches = _sketches(config, head_map, own, shape, cache, state.importance)
    longest = cache.capacity.longest(config, head_map)
    selector = selectors.make(config, state, channels, own, cache, sketches, longest)
    made_of = VerifierParts(config, head_map, channels, state, own, cache.table.shape[1], shape)
    prefill, draft_prefill = _prefills(made_of, own_ops, head_map, target, draft, fa3)
    return Runtime(
        config=config,
        head_map=head_map,
        channels=channels,
        cache=cache,
        draft=draft,
        state=state,
        ops=own,
        kernel=kernel,
        device=device,
        selector=selector,
        verifier=verifiers.of(kernel).make(made_of),
        whole=by_ops.make(made_of),
        sketches=sketches,
        aside=StandAside(config.stand_aside, 1 if draft is None else draft.num_steps + 1),
        ranks=ranks,
        prefill=prefill,
        draft_prefill=draft_prefill,
        refresh=Refresh(state, selector, own) if config.keeps_selections else None,
    )


def _prefills(
    parts: VerifierParts,
    kernel: str,
    head_map: headmap.HeadMap,
    target: HeadCounts,
    draft: Draft | None,
    fa3: Fa3 | None,
) -> tuple[SparsePrefill | None, DraftPrefill | None]:
    """The target's and the draft's, of a rank's heads, where they may be sparse. kernel: name of the ops."""
    config, ops, totals = parts.config, parts.ops, parts.state.totals
    if config.prefill == "dense":
        return None, None
    device = str(totals.device)

    def reader(heads: Heads | None, layers: Iterable[int], kv_heads: int, count: Count) -> Reader:
        attention = block_attention.make(config, ops, kernel, heads, fa3, device)
        return Reader(attention, frozenset(layers), kv_heads, totals[count : count + 2])

    def by_itself(own: Reader, q_heads: int, model: str) -> SparsePrefill:
        selector = ByOwnQueries(config, ops, own.kv_heads, q_heads // own.kv_heads, model)
        return SparsePrefill(config, selector, own, device)

    layers = set(range(target.layers)) - set(config.dense_layers)
    own, first = reader(parts.target, layers, target.kv_heads, Count.PREFILL_SELECTED_BLOCKS), None
    if config.prefills_draft:
        layers = range(len(draft.scales))
        first = reader(draft, layers, draft.kv_heads, Count.DRAFT_PREFILL_SELECTED_BLOCKS)
    if config.prefill_selector == "draft":
        # Whoever selects for verify, the draft is heard here.
        selector = ByDraft(config, ops, Channels.of(head_map, device), draft)
        prefill = SparsePrefill(config, selector, own, device, first)
        return prefill, None if first is None else ReadsFirst(prefill)
    of_draft = None if first is None else by_itself(first, draft.q_heads, "draft")
    return by_itself(own, target.q_heads, "target"), of_draft


def _fa3_of(backend: StsTargetBackend) -> Fa3 | None:
    """SGLang's, where it serves what is dense on a GPU that its kernels are made for."""
    if backend.dense_name != "fa3" or torch.cuda.get_device_capability()[0] != 9:
        return None
    return views.fa3(backend.dense)


def _sketches(
    config: StsConfig,
    head_map: headmap.HeadMap,
    ops: Ops,
    shape: TargetShape | None,
    cache: Cache,
    like: torch.Tensor,
) -> Sketches | None:
    """Of the layers that verify sparsely, where they have a say in that. like: dtype and device of scores."""
    if not config.by_sketches:
        return None
    layers = [layer for layer in range(shape.layers) if not config.dense_verify(layer)]
    requests, device = cache.table.shape[0], like.device
    if config.selector == "tokens":
        headmap.check_directions(config, head_map, shape.head_dim)
        made = tokens.directions(head_map.directions, device, shape.dtype)
        return TokenSketches(ops, {layer: made[layer] for layer in layers}, shape.slots, requests, device)
    if shape.head_dim % PAGE:
        raise not_allowed(
            "sts_config.selector",
            f"got {config.selector!r}, but {PAGE} slots cannot share the sketch of a head of "
            f"{shape.head_dim} dimensions evenly",
            "'draft', and with it a draft, with this target",
        )
    return PageSketches(
        ops, layers, shape.slots, shape.kv_heads, shape.head_dim, requests, device, like.dtype
    )


def kernel_for(config: StsConfig, device: str) -> str:
    """`triton` or `torch`, the ops that run, or `flashinfer`: Triton's with FlashInfer's verify attention."""
    if config.kernel != "auto":
        return config.kernel
    return "torch" if device == "cpu" else "triton"


def ops_for(kernel: str, device: str) -> str:
    """`triton` or `torch`: what runs everything but the verify of another kernel."""
    return "torch" if kernel == "torch" or (device == "cpu" and kernel != "triton") else "triton"


def _batch_limit(server_args: Any, table: torch.Tensor) -> int:
    """Most requests of a batch."""
    return min(table.shape[0], server_args.max_running_requests or table.shape[0])


def _target_of(server_args: Any, target: views.Runner) -> TargetShape:
    requests = _batch_limit(server_args, target.table)
    shape = reserve.target_shape(server_args, target.model.of_rank(server_args.tp_size), requests)
    return shape._replace(slots=target.pools.slots)


def _cache_of(runner: views.Runner) -> Cache:
    """That draft and target share."""
    requests, width = runner.table.shape
    capacity = Capacity.of(requests, min(width, runner.pools.tokens))
    return Cache(runner.table, runner.pools.slots, capacity)


def _draft_of(worker: EAGLEWorkerV2, draft: views.Runner, layers: list[views.Layer]) -> Draft:
    return Draft(
        num_steps=worker.speculative_num_steps,
        topk=worker.topk,
        q_heads=layers[0].q_heads,
        kv_heads=layers[0].kv_heads,
        head_dim=draft.model.head_dim,
        dtype=draft.dtype,
        pools=draft.pools,
        scales=tuple(layer.scale for layer in layers),
    )


def note_graphs(captured: dict[str, bool]) -> Bound:
    """After CUDA graphs were captured: which of them, in the start-up line."""
    global _bound
    _bound = replace(_bound, graphs=check_graphs(captured, _bound.dense))
    return _bound


def captured_alone(worker: TpModelWorker) -> dict[str, bool]:
    """`captured_graphs` of a target that no draft speculates for."""
    if not views.decode_graphs(views.resolved(worker.server_args)).captured:
        return {}
    runner: ModelRunner = worker.model_runner
    return {"decode": runner.decode_cuda_graph_runner is not None}


def captured_graphs(worker: EAGLEWorkerV2) -> dict[str, bool]:
    """Whether each of the round's passes replays a CUDA graph; without graphs, none is named."""
    from sglang.srt.environ import envs

    if not views.decode_graphs(views.resolved(worker.server_args)).captured:
        return {}
    draft: EagleDraftWorker = worker._draft_worker
    target: TpModelWorker = worker._target_worker
    runner: ModelRunner = target.model_runner
    captured = {"verify": runner.decode_cuda_graph_runner is not None}
    if worker.speculative_num_steps > 1:
        captured["draft_decode"] = draft.cuda_graph_runner is not None
    if not envs.SGLANG_DISABLE_DRAFT_EXTEND_CUDA_GRAPH.get():
        captured["draft_extend"] = draft.cuda_graph_runner_for_draft_extend is not None
    return captured


def check_graphs(captured: dict[str, bool], dense_class: str) -> dict[str, bool]:
    """The captured passes; RuntimeError when SGLang left one out that runs under graphs."""
    missing = [name for name, on in captured.items() if not on]
    if dense_class == "TorchBackend" and "draft_extend" in missing:
        missing.remove("draft_extend")
    if missing:
        raise RuntimeError(
            f"STS: SGLang captured no CUDA graph of {', '.join(missing)}; see its log, or serve without "
            "graphs by --disable-cuda-graph"
        )
    return captured


def announce(bound: Bound) -> None:
    """Log the start-up line, and what is known to lose answers."""
    described = bound.describe()
    described.pop("counters")
    logger.info("STS serves: %s", json.dumps(described))
    if bound.runtime.config.refresh[0] > 2:
        logger.warning(
            "STS: draft_refresh %s loses answers that are copied from a prompt, which accept length does not "
            "show (docs/method.md, 'Selections that are kept'); 1, the default, keeps them",
            bound.runtime.config.draft_refresh,
        )
