"""The hooks on SGLang. `patches/` holds, for each, the upstream change that would replace it."""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from sts_sglang import cpu
from sts_sglang.backends import dense
from sts_sglang.backends.draft import DraftMultiStepBackend
from sts_sglang.config import BACKEND, ENV, ConfigError, StsConfig, check_request
from sts_sglang.core import dumps
from sts_sglang.core.aside import StandAside
from sts_sglang.core.runtime import Runtime
from sts_sglang.host import bind, compat, handover, refused, reserve, views
from sts_sglang.host.draft_first import DraftFirst
from sts_sglang.host.metrics import Exporter
from sts_sglang.host.releases import release
from sts_sglang.host.sampling import check_sampling
from sts_sglang.host.serves import Refusal, asks_for_sts, check_all, check_raw, speculates

if TYPE_CHECKING:
    from sglang.srt.managers.io_struct import GetInternalStateReqOutput, TokenizedGenerateReqInput
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
    from sglang.srt.managers.tp_worker import TpModelWorker
    from sglang.srt.mem_cache.base_prefix_cache import BasePrefixCache
    from sglang.srt.mem_cache.kv_cache_configurator import KVCacheConfigurator
    from sglang.srt.model_executor.model_runner import ModelRunner
    from sglang.srt.model_executor.runner.decode_cuda_graph_runner import DecodeCudaGraphRunner
    from sglang.srt.sampling.sampling_params import SamplingParams
    from sglang.srt.server_args import ServerArgs
    from sglang.srt.speculative.draft_utils import DraftBackendFactory
    from sglang.srt.speculative.eagle_info import EagleDraftInput
    from sglang.srt.speculative.eagle_worker_v2 import EagleDraftWorker, EAGLEWorkerV2

UNSET = object()


class _Launch:
    """State of the launching process, where ServerArgs are built and requests are validated."""

    config: StsConfig | None = None  # of the first `sts` launch, as it was asked for
    served: StsConfig | None = None  # the same with what `auto` stands for in the latest
    speculates = False  # whether a draft does in any launch of this process
    user_env: Any = UNSET  # STS_CONFIG as the user left it, before we hand canonical JSON to children
    given: Any = None  # --sts-config or Engine(sts_config=...), on its way to the arguments it came with


class _Scheduler:
    """State of a scheduler process, where forwards run."""

    exporter: Exporter | None = None  # of the counters, once draft and target are bound
    draft_first: DraftFirst | None = None  # of a bound pair


def add_cli_args(result: None, parser: argparse.ArgumentParser) -> None:
    """AFTER ServerArgs.add_cli_args: `--sts-config`."""
    parser.add_argument(
        "--sts-config",
        type=str,
        default=None,
        metavar="JSON|PATH",
        help="Configuration of --attention-backend sts: inline JSON or a JSON file, for example "
        '\'{"keep": 0.1, "budget": 1024}\'. Wins over the environment variable STS_CONFIG. '
        "`sts-sglang config --help` lists the keys.",
    )


def from_cli_args(original, cls, args: argparse.Namespace):
    """AROUND ServerArgs.from_cli_args: carry the flag over; our refusals end in one line and code 2."""
    try:
        with _giving(getattr(args, "sts_config", None)):
            return _with_what_is_given(original(cls, args))
    except (ConfigError, Refusal) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def engine_args(original, **kwargs) -> ServerArgs:
    """AROUND Engine.server_args_class: `sgl.Engine(sts_config=...)` takes a dict, JSON or a path."""
    with _giving(kwargs.pop("sts_config", None)):
        return _with_what_is_given(original(**kwargs))


@contextlib.contextmanager
def _giving(config: Any) -> Iterator[None]:
    _Launch.given = config
    try:
        yield
    finally:
        _Launch.given = None


def _with_what_is_given(server_args: ServerArgs) -> ServerArgs:
    """A release that resolves arguments when it launches them would meet them without their configuration."""
    if _Launch.given is not None or asks_for_sts(server_args):
        release.resolve(server_args)
    return server_args


def resolve_args(original, self: ServerArgs) -> None:
    """AROUND what resolves ServerArgs: refuse before weights load, hand the config to the children."""
    if release.is_resolved(self):
        return original(self)
    given, _Launch.given = _Launch.given, None
    if not asks_for_sts(self):
        if given is not None:
            raise Refusal("--sts-config: given without --attention-backend sts; add it or drop the config")
        return original(self)
    _require_hooks()
    config = _launch_config(given)
    check_raw(self)
    release.ask_draft_kv(self, config.draft_kv)
    original(self)
    _check(self, config)
    return None


def check_args(self: ServerArgs) -> None:
    """BEFORE ServerArgs.check_server_args: arguments that were built without our hooks, in another process,
    or changed since, are checked where every launch passes."""
    if not asks_for_sts(self) or (_Launch.config is not None and handover.fits(views.resolved(self))):
        return
    _require_hooks()
    config = _Launch.config or _launch_config(None)
    check_raw(self)
    _check(self, config)


def _require_hooks() -> None:
    """SGLang logs a hook that it could not apply, and goes on."""
    if missing := compat.unhooked():
        raise SystemExit(f"sts_sglang: SGLang did not apply the hooks on {', '.join(missing)}; see its log")


def _check(server_args: ServerArgs, config: StsConfig) -> None:
    """Of resolved arguments; what passes is this process's launch."""
    checked = config
    if server_args.model_path.lower() not in ("none", "dummy"):  # SGLang's own placeholder: resolves nothing
        checked = check_all(views.resolved(server_args), config)
    _Launch.config, _Launch.served = config, checked
    _Launch.speculates |= speculates(views.resolved(server_args))
    handover.leave(views.resolved(server_args), checked)


def _launch_config(given: Any) -> StsConfig:
    if _Launch.user_env is UNSET:
        _Launch.user_env = os.environ.get(ENV)
    config = StsConfig.resolve(given, {ENV: _Launch.user_env} if _Launch.user_env else {})
    if _Launch.config is not None and config != _Launch.config:
        raise ConfigError(
            "sts_config: this process already launched an engine with another config; "
            "allowed: the same config, or a process of its own"
        )
    return config


def sampling_verify(result: None, self: SamplingParams, vocab_size: int) -> None:
    """AFTER SamplingParams.verify: what a request asks of us; ValueError becomes HTTP 400."""
    if _Launch.served is not None:
        check_request(self.custom_params, _Launch.served)
        release.refuse_beams(self)
        if _Launch.speculates:
            check_sampling(self, cpu=cpu.selected())


def ends_in_one_line(hook: Callable) -> Callable:
    """A scheduler ends with our reason alone: SGLang would print a traceback for an Exception."""

    @functools.wraps(hook)
    def ends(*args, **kwargs):
        try:
            return hook(*args, **kwargs)
        except (ConfigError, Refusal) as error:
            raise SystemExit(f"sts_sglang: {error}") from None

    return ends


@ends_in_one_line
def scheduler_init(self, server_args: ServerArgs, *args, **kwargs) -> None:
    """BEFORE Scheduler.__init__: serve nothing that no launch has checked."""
    if asks_for_sts(server_args):
        handover.verify(views.resolved(server_args))


def create_draft_backend(
    original, self: DraftBackendFactory, backend_name: str, backend_map: dict, error_template: str, **kwargs
):
    """AROUND DraftBackendFactory._create_backend: `sts` joins the closed map; SGLang keeps choosing."""
    runner = self.draft_model_runner
    if backend_map["triton"] == self._create_triton_decode_backend:

        def build():
            return release.built(DraftMultiStepBackend(runner, self.topk, self.speculative_num_steps))
    else:

        def build():
            return release.built(dense.of_draft_extend(StsConfig.of_launch(), runner))

    return original(self, backend_name, {**backend_map, BACKEND: build}, error_template, **kwargs)


@ends_in_one_line
def init_attention_backends(result: None, self: EAGLEWorkerV2) -> None:
    """AFTER EAGLEWorkerV2.init_attention_backends: bind draft and target, before any capture."""
    if not asks_for_sts(self.server_args):
        return
    runtime = bind.bind(self, StsConfig.of_launch()).runtime
    _Scheduler.draft_first = DraftFirst(runtime)
    _count(runtime, views.resolved(self.server_args))


def _count(runtime: Runtime, args: ServerArgs) -> None:
    """Publish its counters from now on."""
    _Scheduler.exporter = Exporter(
        runtime.state.totals,
        enable_metrics=args.enable_metrics,
        interval=args.decode_log_interval,
        plans=lambda: runtime.verifier.host_plans,
        ranks=runtime.ranks,
    )


def init_cuda_graphs(result: None, self: EAGLEWorkerV2) -> None:
    """AFTER EAGLEWorkerV2.init_cuda_graphs: say what serves, now that the graphs are known."""
    if bind.current() is not None:
        bind.announce(bind.note_graphs(bind.captured_graphs(self)))


@ends_in_one_line
def init_target_backends(result: None, self: TpModelWorker) -> None:
    """AFTER TpModelWorker.init_attention_backends: bind a target that no draft speculates for."""
    args = views.resolved(self.server_args)
    if asks_for_sts(self.server_args) and not speculates(args):
        _count(bind.bind_alone(self, StsConfig.of_launch()).runtime, args)


def init_target_graphs(result: None, self: TpModelWorker, *args, **kwargs) -> None:
    """AFTER TpModelWorker.init_cuda_graphs: as `init_cuda_graphs`, of a target that was bound alone."""
    if (bound := bind.current()) is not None and bound.alone:
        bind.announce(bind.note_graphs(bind.captured_alone(self)))


def forward_target(original, self: TpModelWorker, batch: ScheduleBatch | None, *args, **kwargs) -> Any:
    """AROUND TpModelWorker.forward_batch_generation: as `forward_batch`, of a target that was bound alone."""
    if (bound := bind.current()) is None or not bound.alone:
        return original(self, batch, *args, **kwargs)
    if batch is not None:
        _before_forward(bound.runtime, batch)
    result = original(self, batch, *args, **kwargs)
    if bound.verify.reads_table:
        release.hold_table(self.model_runner)
    else:
        bound.runtime.aside.forwarded()
    return result


def decode_complete(result: None, self, *args, **kwargs) -> None:
    """AFTER SchedulerBatchResultProcessor.process_batch_result_decode: as `verify_complete`, likewise."""
    if (bound := bind.current()) is not None and bound.alone:
        _Scheduler.exporter.on_round()


def forward_batch(self: EAGLEWorkerV2, batch: ScheduleBatch, *args, **kwargs) -> None:
    """BEFORE EAGLEWorkerV2.forward_batch_generation: note keeps at prefill, and who is in a round; let the
    draft read first where it selects."""
    if (bound := bind.current()) is not None:
        _before_forward(bound.runtime, batch)
        if _Scheduler.draft_first is not None and views.prefills(batch):
            _Scheduler.draft_first.before_target(self, batch)


def draft_prefill(
    original,
    self: EagleDraftWorker,
    batch: ScheduleBatch,
    target_hidden_states,
    next_token_ids,
    *rest,
    **of_all,
) -> EagleDraftInput:
    """AROUND EagleDraftWorker._draft_extend_for_prefill: what the draft has not read yet. rest, of_all: of a
    pass over all new tokens."""
    stock = functools.partial(original, self, batch, target_hidden_states, next_token_ids, *rest, **of_all)
    if _Scheduler.draft_first is None:
        return stock()
    again = functools.partial(original, self)
    return _Scheduler.draft_first.after_target(again, batch, next_token_ids, stock)


def _before_forward(runtime: Runtime, batch: ScheduleBatch) -> None:
    runtime.forget_loaded()
    if views.prefills(batch):
        runtime.admit(views.requests(batch))
    elif runtime.looks_at_rounds:
        runtime.begin_round(views.requests(batch))


def verify_complete(result: None, self: EAGLEWorkerV2, *args, **kwargs) -> None:
    """AFTER EAGLEWorkerV2.on_verify_complete_cpu: publish counters; results are on the CPU already."""
    if _Scheduler.exporter is not None:
        _Scheduler.exporter.on_round()


def begin_request(self, recv_req: TokenizedGenerateReqInput, *args, **kwargs) -> None:
    """BEFORE Scheduler.handle_generate_request: KV of a sparse prefill is for those who ask for the like."""
    if (bound := bind.current()) is None or (prefill := bound.runtime.prefill) is None:
        return
    if mark := prefill.mark(views.asked_of(recv_req)):
        views.keep_apart(recv_req, mark)


def configure_kv(result: None, self: ModelRunner) -> None:
    """AFTER ModelRunner.configure_kv_cache_dtype, where no flag says it: what the draft's KV is kept as."""
    if self.is_draft_worker and asks_for_sts(self.server_args):
        config = StsConfig.of_launch()
        if config.draft_kv != "auto":
            views.keep_kv_as(self, views.kv_asked(views.resolved(self.server_args), of_draft=config))


@ends_in_one_line
def profile_available_bytes(result: int, self: KVCacheConfigurator, pre_model_load_memory) -> int | None:
    """AFTER KVCacheConfigurator._profile_available_bytes: leave room for the buffers of a round."""
    if self.is_draft_worker or not asks_for_sts(self.server_args):
        return None
    config = StsConfig.of_launch()
    args = views.resolved(self.server_args)
    return result - reserve.reserved_bytes(config, args, self.model_config, result)


def internal_state(result: GetInternalStateReqOutput, self, recv_req) -> None:
    """AFTER Scheduler.get_internal_state: repeat the start-up line, with counters, in /get_server_info."""
    if (bound := bind.current()) is not None:
        result.internal_state["sts"] = bound.describe()


def hicache_load(result, self, *args, **kwargs) -> None:
    """AFTER a cache controller's load: these slots get new occupants that no forward writes."""
    bound = bind.current()
    if result is not None and bound is not None:
        bound.runtime.loaded(result)


def release_kv(req: Req, tree_cache: BasePrefixCache, *args, **kwargs) -> None:
    """BEFORE release_kv_cache, while a request's slots are its own: sketch what stood aside, and dump a
    finished one that asks for it."""
    bound = bind.current()
    if bound is None:
        return
    runtime = bound.runtime
    if runtime.aside.limit and runtime.aside.waits(row := release.pool_row(req)):
        runtime.released(row, release.committed(req), bound.verify.pools)
    if runtime.config.inspect_dir is None:
        return
    if (ended := views.finished(req)) is not None:
        dumps.finished(runtime, ended, views.table_of(tree_cache))


ASIDE = "sts_aside"  # label of the graphs of batches that stand aside


def _standing_aside(graphs: DecodeCudaGraphRunner) -> StandAside | None:
    """Of the target's graphs, where a batch may stand aside."""
    runner: ModelRunner = graphs.model_runner
    bound = bind.current()
    if bound is None or runner.attn_backend is not bound.verify or not bound.runtime.aside.limit:
        return None
    return bound.runtime.aside


def capture_shape(
    original,
    self: DecodeCudaGraphRunner,
    size: int,
    forward: Callable,
    stream_idx: int | None = None,
    variant_label: str | None = None,
    *rest,
) -> None:
    """AROUND DecodeCudaGraphRunner.capture_one_shape: of every batch size two graphs, one of them of batches
    that stand aside."""
    if (aside := _standing_aside(self)) is None:
        return original(self, size, forward, stream_idx, variant_label, *rest)
    for now, label in ((False, variant_label), (True, ASIDE)):
        with aside.recorded(now):
            original(self, size, forward, stream_idx, label, *rest)
    return None


def graph_variant(original, self: DecodeCudaGraphRunner, forward_batch) -> str | None:
    """AROUND DecodeCudaGraphRunner._resolve_lora_variant: which of them a batch replays."""
    aside = _standing_aside(self)
    return ASIDE if aside is not None and aside.now else original(self, forward_batch)


# Each hooks the function of that name in the release's table, where it has one.
HOOKS: tuple[tuple[Callable, str], ...] = (
    (create_draft_backend, "AROUND"),
    (init_attention_backends, "AFTER"),
    (init_cuda_graphs, "AFTER"),
    (forward_batch, "BEFORE"),
    (draft_prefill, "AROUND"),
    (verify_complete, "AFTER"),
    (init_target_backends, "AFTER"),
    (init_target_graphs, "AFTER"),
    (capture_shape, "AROUND"),
    (graph_variant, "AROUND"),
    (forward_target, "AROUND"),
    (decode_complete, "AFTER"),
    (configure_kv, "AFTER"),
    (profile_available_bytes, "AFTER"),
    (begin_request, "BEFORE"),
    (internal_state, "AFTER"),
    (hicache_load, "AFTER"),
    (release_kv, "BEFORE"),
    (add_cli_args, "AFTER"),
    (from_cli_args, "AROUND"),
    (resolve_args, "AROUND"),
    (check_args, "BEFORE"),
    (scheduler_init, "BEFORE"),
    (sampling_verify, "AFTER"),
    (refused.validate_request, "AFTER"),
    (refused.update_from_disk, "AROUND"),
    (refused.update_from_tensor, "AROUND"),
    (refused.update_from_ipc, "AROUND"),
    (refused.update_from_distributed, "AROUND"),
    (refused.check_weights, "AROUND"),
    (refused.attach_storage, "AROUND"),
    (refused.begin_update, "AROUND"),
    (refused.end_update, "AROUND"),
)


def table() -> list[tuple[compat.Target, Callable, str]]:
    """(target, hook, HookType name) of every hook on this release; a later one has more calls to refuse."""
    there = [(hook, kind) for hook, kind in HOOKS if hook.__name__ in compat.HOOKS]
    return [(compat.HOOKS[hook.__name__], hook, kind) for hook, kind in there]
